"""From a study file and its recorded results to what the report is built from. Nothing is trained or drawn here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from semiseg.commands.study_data import recorded_difficulty
from semiseg.config import DataConfig, RunConfig
from semiseg.data.sources import expected_files
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.page import build_report, report_text
from semiseg.resources import find
from semiseg.results import Result, read
from semiseg.splits import load_split
from semiseg.study import PRETRAIN_ROW, RunKey, Study, StudyRow, StudyTable, row_run, study_runs
from semiseg.study_plan import RESULTS_NAME, RUNS_FOLDER, class_names, matching_results, planned_steps

PUBLISHED = "boxinst"


def build(study: Study, folder: Path, *, command: Sequence[str]) -> tuple[str, Path]:
    """Builds the report of a study from `folder/results.jsonl`.

    Args:
        command: what trains the study's runs, for the page.

    Returns:
        the tables as text, and the path of the page.
    """
    report = report_input(study, folder, command=command)
    return report_text(report), build_report(report, out=folder, published=find("published", PUBLISHED))


def report_input(study: Study, folder: Path, *, command: Sequence[str]) -> ReportInput:
    """Everything that the report of a study is made from."""
    found = matching_results(study, read(folder / RESULTS_NAME))
    tables = tuple(_table(study, table, found) for table in study.tables)
    cells = {
        (table.name, row, seed): result
        for table in study.tables
        for row in table.rows
        for seed in study.seeds
        if (result := found.get(row_run(study, table, row, seed).key)) is not None
    }
    rows = [run for run in study_runs(study) if run.row != PRETRAIN_ROW]
    pretrainings = [run for run in study_runs(study) if run.row == PRETRAIN_ROW]
    data = rows[0].config.data
    annotations, images = _validation_files(data)
    run_ids = {result.run_id for result in found.values()}
    return ReportInput(
        study=study.name,
        title=study.title,
        question=study.question,
        seeds=tuple(study.seeds),
        tables=tables,
        results=cells,
        data=_data_sentence(data),
        schedule=_schedule_sentence(rows[0].config),
        pretraining=_pretraining_sentence(pretrainings[0].config) if pretrainings else None,
        run_command=shlex.join(command),
        report_command=shlex.join([command[0], "report", *command[2:]]),
        pretraining_results=tuple(found[run.key] for run in pretrainings if run.key in found),
        difficulty=recorded_difficulty(folder),
        run_folders={run_id: path for run_id in run_ids for path in RUNS_FOLDER.glob(f"*/*-{run_id}")},
        val_annotations=annotations,
        val_images=images,
    )


def _table(study: Study, table: StudyTable, found: Mapping[RunKey, Result]) -> ReportTable:
    rows = {row.name: row for row in study.rows}
    classes = tuple(_class_names(study, table, found))
    split = load_split(study.splits[table.split], classes) if table.split is not None else None
    return ReportTable(
        name=table.name,
        title=table.title,
        split=split.name if split else "",
        split_digest=split.digest() if split else "",
        seen=split.seen if split else classes,
        unseen=split.unseen if split else (),
        published=str(table.number) if table.number is not None else None,
        rows=tuple(_row(rows[name]) for name in table.rows),
    )


def _row(row: StudyRow) -> ReportRow:
    words = {True: "yes", False: "no", None: ""}
    return ReportRow(row.name, words[row.projection], words[row.pairwise], row.label or row.name)


def _class_names(study: Study, table: StudyTable, found: Mapping[RunKey, Result]) -> Sequence[str]:
    """As recorded; only while nothing is, from the data set."""
    for result in found.values():
        return list(result.metrics["instances"])
    return class_names(row_run(study, table, table.rows[0], study.seeds[0]).config.data)


def _validation_files(data: DataConfig) -> tuple[Path | None, Path | None]:
    """Annotation file and image folder for the pictures, if they are here."""
    annotations, images = expected_files(data)["val"]
    return (annotations, images) if annotations.is_file() and images.is_dir() else (None, None)


def _data_sentence(data: DataConfig) -> str:
    if data.format == "shapes":
        shapes = data.shapes
        return (
            f"Shapes, the embedded data set: {shapes.train_images} training and {shapes.val_images} validation images "
            f"of {shapes.image_size} by {shapes.image_size} pixels, drawn from the seeds {shapes.train_seed} and "
            f"{shapes.val_seed}."
        )
    return f"COCO format: training on {data.train_images}, validation on {data.val_images}."


def _schedule_sentence(config: RunConfig) -> str:
    optim, model = config.optim, config.model
    return (
        f"{_length(config)} of {optim.batch_size} images, {optim.optimizer}, "
        f"rate {optim.learning_rate:g} ({optim.schedule}); "
        f"backbone {model.backbone}, masks at stride {model.mask_stride}, τ = {config.objective.affinity_threshold:g}."
    )


def _pretraining_sentence(config: RunConfig) -> str:
    return (
        f"Every row starts from the detector that its seed pretrained on boxes alone, without any mask "
        f"({_length(config)} of {config.optim.batch_size} images, rate {config.optim.learning_rate:g})."
    )


def _length(config: RunConfig) -> str:
    steps = planned_steps(config)
    return f"{steps} steps" if steps is not None else f"{config.optim.epochs:g} epochs"
