"""From a study file and its recorded results to its report. Nothing is trained or measured here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from semiseg.data.sources import expected_files
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.page import beside_recorded, build_report, report_text
from semiseg.report.provenance import differing, settings
from semiseg.resources import find
from semiseg.results import Result, read
from semiseg.splits import load_split
from semiseg.studies.file import PRETRAIN_ROW, CellKey, Study, StudyRun, StudyTable, load_study, study_cells, study_runs
from semiseg.studies.identity import (
    REPORTS_FOLDER,
    RESULTS_NAME,
    RUNS_FOLDER,
    class_names,
    matching_results,
)
from semiseg.studies.words import (
    data_sentence,
    initial_weights_in_words,
    is_alike,
    is_paper_data,
    pretraining_sentence,
    row_meaning,
    schedule_sentence,
)

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


def record_folder(study: Study, folder: Path) -> Path:
    """Where the study's results are recorded: the folder of the report, else the study's own."""
    folders = dict.fromkeys((folder, REPORTS_FOLDER / study.name))
    for candidate in folders:
        if (candidate / RESULTS_NAME).is_file():
            return candidate
    named = " and ".join(map(str, folders))
    raise UserError(f"{named}: no recorded results; 'semiseg run {study.name}' makes them")


def beside_reference(study: Study, folder: Path) -> str:
    """What a run gave beside the means over seeds that its study names, as text; "" where they are not at hand."""
    if study.reference is None:
        return ""
    reference = load_study(study.reference)
    record = REPORTS_FOLDER / reference.name
    if not (record / RESULTS_NAME).is_file():
        return ""
    own, means = (report_input(one, path, command=()) for one, path in ((study, folder), (reference, record)))
    text = beside_recorded(own, means)
    if not text:
        return ""
    return (
        f"beside the means ± deviations over {len(reference.seeds)} seeds in {record} (one seed moves by several AP "
        f"with processor and chance; '!' is further away than two deviations):\n\n{text}"
    )


def report_input(study: Study, folder: Path, *, command: Sequence[str]) -> ReportInput:
    """Everything that the report of a study is made from.

    Args:
        folder: of the record.
        command: what trains the study's runs; () if that is not to be said.
    """
    recorded = read(folder / RESULTS_NAME)
    matching = matching_results(study, recorded)
    runs, cells = study_runs(study), study_cells(study)
    classes = _class_names(runs, list(matching.values()))
    tables = tuple(_table(study, table, cells, classes) for table in study.tables)
    configs = [run.config for run in runs if run.row != PRETRAIN_ROW]
    pretrainings = [run for run in runs if run.row == PRETRAIN_ROW]
    data = configs[0].data
    files = expected_files(data)["val"]
    here = files.annotations.is_file() and files.images.is_dir()
    run_ids = {result.run_id for result in matching.values()}
    return ReportInput(
        study=study.name,
        title=study.title,
        question=study.question,
        seeds=tuple(study.seeds),
        tables=tables,
        results={cell: matching[run.key] for cell, run in cells.items() if run.key in matching},
        data=data_sentence(data),
        schedule=schedule_sentence(configs),
        pretraining=pretraining_sentence(pretrainings[0].config) if pretrainings else None,
        initial=initial_weights_in_words(configs),
        paper_data=is_paper_data(data, len(classes)),
        run_command=shlex.join(command),
        report_command=shlex.join([*command[:1], "report", *command[2:]]),
        pretraining_results=tuple(matching[run.key] for run in pretrainings if run.key in matching),
        run_folders={run_id: path for run_id in run_ids for path in RUNS_FOLDER.glob(f"*/*-{run_id}")},
        val_annotations=files.annotations if here else None,
        val_images=files.images if here else None,
    )


def _table(study: Study, table: StudyTable, cells: Mapping[CellKey, StudyRun], classes: tuple[str, ...]) -> ReportTable:
    configs = [cells[table.name, name, study.seeds[0]].config for name in table.rows]
    # Without classes, as long as nothing is recorded, there are no groups of them either.
    split = load_split(study.splits[table.split], classes) if table.split is not None and classes else None
    return ReportTable(
        name=table.name,
        title=table.title,
        split=split.name if split else "",
        split_digest=split.digest() if split else "",
        seen=split.seen if split else classes,
        unseen=split.unseen if split else (),
        published=str(table.number) if table.number is not None else None,
        rows=tuple(_row(study, cells[table.name, name, study.seeds[0]]) for name in table.rows),
        compare=tuple((first, second) for first, second in table.compare),
        alike=is_alike(configs),
        varied=tuple(differing([settings(config.model_dump(mode="json")) for config in configs])),
    )


def _row(study: Study, run: StudyRun) -> ReportRow:
    row = next(row for row in study.rows if row.name == run.row)
    words = {True: "yes", False: "no", None: ""}
    source = run.config.supervision.source
    shared = source != "split" and sum(row.name in table.rows for table in study.tables) > 1
    return ReportRow(
        name=row.name,
        projection=words[row.projection],
        pairwise=words[row.pairwise],
        label=row.label or row.name,
        meaning=row_meaning(row, run.config, in_every_table=shared),
        every_mask=source == "masks",
    )


def _class_names(runs: Sequence[StudyRun], results: Sequence[Result]) -> tuple[str, ...]:
    """As recorded; while nothing is, those of Shapes and no others: a report needs no data."""
    if results:
        return tuple(results[0].metrics["instances"])
    data = runs[-1].config.data
    return class_names(data) if data.format == "shapes" else ()
