"""From a study file and its recorded results to what the report is built from. Nothing is trained or drawn here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from semiseg.commands.study_words import (
    data_sentence,
    initial_weights_in_words,
    is_alike,
    is_paper_data,
    pretraining_sentence,
    row_meaning,
    schedule_sentence,
)
from semiseg.config import DataConfig, RunConfig
from semiseg.data.sources import expected_files
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.page import build_report, report_text
from semiseg.report.provenance import differing, settings
from semiseg.resources import find
from semiseg.results import Result, latest, read
from semiseg.splits import load_split
from semiseg.study import PRETRAIN_ROW, RunKey, Study, StudyRow, StudyTable, row_run, study_runs
from semiseg.study_plan import RESULTS_NAME, RUNS_FOLDER, class_names, matching_results

PUBLISHED = "boxinst"


def build(study: Study, folder: Path, *, record: Path, command: Sequence[str]) -> tuple[str, Path]:
    """Builds the report of a study in a folder from `record/results.jsonl`, which is only read.

    Args:
        record: the folder itself, or that of the study's own record.
        command: what trains the study's runs, for the page.

    Returns:
        the tables as text, and the path of the page.
    """
    report = report_input(study, record, command=command)
    return report_text(report), build_report(report, out=folder, published=find("published", PUBLISHED))


def report_input(study: Study, folder: Path, *, command: Sequence[str]) -> ReportInput:
    """Everything that the report of a study is made from; `folder` is that of the record."""
    recorded = read(folder / RESULTS_NAME)
    found = matching_results(study, recorded)
    tables = tuple(_table(study, table, found) for table in study.tables)
    cells = {
        (table.name, row, seed): result
        for table in study.tables
        for row in table.rows
        for seed in study.seeds
        if (result := found.get(row_run(study, table, row, seed).key)) is not None
    }
    configs = [run.config for run in study_runs(study) if run.row != PRETRAIN_ROW]
    pretrainings = [run for run in study_runs(study) if run.row == PRETRAIN_ROW]
    data = configs[0].data
    annotations, images = _validation_files(data)
    run_ids = {result.run_id for result in found.values()}
    return ReportInput(
        study=study.name,
        title=study.title,
        question=study.question,
        seeds=tuple(study.seeds),
        tables=tables,
        results=cells,
        data=data_sentence(data),
        schedule=schedule_sentence(configs),
        pretraining=pretraining_sentence(pretrainings[0].config) if pretrainings else None,
        initial=initial_weights_in_words(configs),
        paper_data=is_paper_data(data, len(tables[0].seen + tables[0].unseen)),
        run_command=shlex.join(command),
        report_command=shlex.join([command[0], "report", *command[2:]]),
        pretraining_results=tuple(found[run.key] for run in pretrainings if run.key in found),
        recorded=tuple(latest(recorded).values()),
        run_folders={run_id: path for run_id in run_ids for path in RUNS_FOLDER.glob(f"*/*-{run_id}")},
        val_annotations=annotations,
        val_images=images,
    )


def _table(study: Study, table: StudyTable, found: Mapping[RunKey, Result]) -> ReportTable:
    rows = {row.name: row for row in study.rows}
    configs = {name: row_run(study, table, name, study.seeds[0]).config for name in table.rows}
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
        rows=tuple(_row(study, rows[name], config) for name, config in configs.items()),
        compare=tuple((first, second) for first, second in table.compare),
        alike=is_alike(list(configs.values())),
        varied=tuple(differing([settings(config.model_dump(mode="json")) for config in configs.values()])),
    )


def _row(study: Study, row: StudyRow, config: RunConfig) -> ReportRow:
    words = {True: "yes", False: "no", None: ""}
    source = config.supervision.source
    shared = source != "split" and sum(row.name in table.rows for table in study.tables) > 1
    return ReportRow(
        name=row.name,
        projection=words[row.projection],
        pairwise=words[row.pairwise],
        label=row.label or row.name,
        meaning=row_meaning(row, config, in_every_table=shared),
        every_mask=source == "masks",
    )


def _class_names(study: Study, table: StudyTable, found: Mapping[RunKey, Result]) -> Sequence[str]:
    """As recorded; only while nothing is, from the data set."""
    for result in found.values():
        return list(result.metrics["instances"])
    return class_names(row_run(study, table, table.rows[0], study.seeds[0]).config.data)


def _validation_files(data: DataConfig) -> tuple[Path | None, Path | None]:
    """Annotation file and image folder for the pictures, if they are here."""
    annotations, images = expected_files(data)["val"]
    return (annotations, images) if annotations.is_file() and images.is_dir() else (None, None)
