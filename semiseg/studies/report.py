"""From a study file and its recorded results to its report, in words too. Nothing is trained or measured here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from semiseg.config import DataConfig, RunConfig
from semiseg.data.images import read_image
from semiseg.data.reading import Reading
from semiseg.data.sources import expected_files, reading_of
from semiseg.errors import UserError
from semiseg.files import require_folder, require_nothing_else
from semiseg.project import find
from semiseg.report.aggregate import UPPER_BOUND, ReportInput, ReportRow, ReportTable
from semiseg.report.context import MEASURED_NAME
from semiseg.report.html import PAGE_NAME
from semiseg.report.page import build_report, report_text
from semiseg.report.provenance import differing, flat_settings, settings, unmeant
from semiseg.report.published import read_published
from semiseg.results import read
from semiseg.splits import ClassSplit, load_split
from semiseg.studies.file import CellKey, Study, StudyRow, StudyRun, StudyTable, load_study, study_cells
from semiseg.studies.identity import (
    REPORTS_FOLDER,
    RESULTS_NAME,
    RUNS_FOLDER,
    class_names,
    matching_results,
    planned_steps,
)

PUBLISHED = "boxinst"
_MASK_LOSS = {
    "dice": "Dice",
    "labelled": "projection and pairwise terms with labelled edges",
    "bce": "binary cross entropy",
    "crop_bce": "binary cross entropy by the area of the box",
    "rays": "PolarMask's loss of rays",
}
_BOX_LOSS = {
    "none": "no mask loss",
    "projection": "BoxInst's projection term",
    "projection+pairwise": "BoxInst's projection and pairwise terms",
    "projection+learned": "BoxInst's projection and pairwise terms, the edges learned from the masks",
    "box_as_mask": "Dice with the filled box as mask",
    "mil": "BBTP's bags of rows and columns",
    "mil+smooth": "BBTP's bags of rows and columns and its smoothness",
}
# What the words for a row's supervision say already; everything else in `set` follows as it is written.
_IN_WORDS = {"supervision.source", "supervision.split", "objective.mask", "objective.box"}


def build(report: ReportInput, folder: Path, *, recorded: ReportInput | None = None) -> tuple[str, Path]:
    """Builds a report in a folder: its tables as text, beside those of another record; the path of the page."""
    return report_text(report, recorded), build_report(report, out=folder, published=find("published", PUBLISHED))


def check_printed(study: Study) -> None:
    """A UserError if the printed numbers that a table of the study names are not there; to be called before runs."""
    path = find("published", PUBLISHED)
    known = list(dict.fromkeys(read_published(path)["table"]))
    for table in study.tables:
        if table.number is not None and str(table.number) not in known:
            where = f"study {study.name!r}, table {table.name!r}"
            raise UserError(f"{where}: 'number' is {table.number}, which {path} does not hold: {', '.join(known)}")


def require_report_folder(folder: Path) -> None:
    """A UserError if no report can be written into a folder, or if it holds other things than a report and a record.

    What has its own name beside a record or a whole report stays.
    """
    require_folder(folder)
    page = {PAGE_NAME, "report.md", "tables"}
    if not (folder / RESULTS_NAME).is_file() and not all((folder / name).exists() for name in page):
        parts = {"report.md", "tables", "figures", MEASURED_NAME}  # a killed report has written the page last
        require_nothing_else(folder, writer="report", known=parts)


def record_folder(study: Study, folder: Path) -> Path:
    """Where the study's results are recorded: the folder of the report, else the study's own."""
    folders = dict.fromkeys((folder, REPORTS_FOLDER / study.name))
    for candidate in folders:
        if (candidate / RESULTS_NAME).is_file():
            return candidate
    named = " and ".join(map(str, folders))
    raise UserError(f"{named}: no recorded results; 'semiseg run {study.name}' makes them")


def reference_input(study: Study) -> ReportInput | None:
    """What the study that a study names as its reference has recorded; None where that is not at hand."""
    reference = None if study.reference is None else load_study(study.reference)
    if reference is None or not (REPORTS_FOLDER / reference.name / RESULTS_NAME).is_file():
        return None
    return report_input(reference, REPORTS_FOLDER / reference.name, command=())


def report_input(study: Study, folder: Path, *, command: Sequence[str]) -> ReportInput:
    """Everything that the report of a study is made from; `folder` has its record, `command` trains its runs."""
    matching = matching_results(study, read(folder / RESULTS_NAME))
    cells = study_cells(study)
    pretrainings = list({run.init.key: run.init for run in cells.values() if run.init is not None}.values())
    configs = [run.config for run in {run.key: run for run in cells.values()}.values()]
    # As recorded; while nothing is, those of Shapes and no others: a report needs no data.
    known = class_names(configs[-1].data) if configs[-1].data.format == "shapes" else ()
    classes = next((tuple(result.metrics["instances"]) for result in matching.values()), known)
    run_ids = {result.run_id for result in matching.values()}
    return ReportInput(
        study=study.name,
        title=study.title,
        question=study.question,
        seeds=tuple(study.seeds),
        tables=tuple(_table(study, table, cells, classes) for table in study.tables),
        results={cell: matching[run.key] for cell, run in cells.items() if run.key in matching},
        run_command=shlex.join(command),
        report_command=shlex.join([*command[:1], "report", *command[2:]]),
        pretraining_results=tuple(matching[run.key] for run in pretrainings if run.key in matching),
        run_folders={run_id: path for run_id in run_ids for path in RUNS_FOLDER.glob(f"*/*-{run_id}")},
        **protocol_fields(configs, pretraining=pretrainings[0].config if pretrainings else None, classes=len(classes)),
    )


def class_groups(split: ClassSplit | None, classes: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a `ReportTable` that say which classes are shown apart; without a split every class is seen."""
    if split is None:
        return {"split": "", "split_digest": "", "seen": classes, "unseen": ()}
    return {"split": split.name, "split_digest": split.digest(), "seen": split.seen, "unseen": split.unseen}


def protocol_fields(configs: Sequence[RunConfig], *, pretraining: RunConfig | None, classes: int) -> dict[str, Any]:
    """The fields of a `ReportInput` that follow from the configurations of its rows: protocol and validation data."""
    files = expected_files(configs[0].data)["val"]
    here = files.annotations.is_file() and files.images.is_dir()
    return {
        "data": " ".join(dict.fromkeys(data_sentence(config.data) for config in configs)),
        "schedule": schedule_sentence(configs),
        "pretraining": None if pretraining is None else pretraining_sentence(pretraining),
        "initial": initial_weights_in_words(configs),
        "paper_data": is_paper_data(configs[0].data, classes),
        "val_annotations": files.annotations if here else None,
        "val_images": files.images if here else None,
        "val_crowds": configs[0].data.crowds,
        "pixels_of": partial(_pixels, reading_of(configs[0].data)),
    }


def _pixels(reading: Reading, path: Path) -> np.ndarray:
    return read_image(path, reading=reading).permute(1, 2, 0).numpy()


def _table(study: Study, table: StudyTable, cells: Mapping[CellKey, StudyRun], classes: tuple[str, ...]) -> ReportTable:
    configs = [cells[table.name, name, study.seeds[0]].config for name in table.rows]
    columns = [settings(config.model_dump(mode="json")) for config in configs]
    # Without classes, as long as nothing is recorded, there are no groups of them either.
    split = load_split(study.splits[table.split], classes) if table.split is not None and classes else None
    return ReportTable(
        name=table.name,
        title=table.title,
        published=str(table.number) if table.number is not None else None,
        rows=tuple(_row(study, name, config) for name, config in zip(table.rows, configs, strict=True)),
        compare=tuple((first, second) for first, second in table.compare),
        alike=not unmeant(columns) and all(config.data == configs[0].data for config in configs),
        varied=tuple(differing(columns)),
        **class_groups(split, classes),
    )


def _row(study: Study, name: str, config: RunConfig) -> ReportRow:
    row = next(row for row in study.rows if row.name == name)
    shared = config.supervision.source != "split" and sum(name in table.rows for table in study.tables) > 1
    return report_row(name, row.label or name, row_meaning(row, config, in_every_table=shared), config)


def report_row(name: str, label: str, meaning: str, config: RunConfig) -> ReportRow:
    """A row of a report, with the terms of BoxInst that objects without a mask get, or all of them in place of Dice."""
    every_mask = config.supervision.source == "masks"
    if every_mask or config.objective.box.startswith("mil"):
        projection = pairwise = "yes" if every_mask and config.objective.mask == "labelled" else ""
    else:
        box = config.objective.box
        projection, pairwise = ("yes" if term in box else "no" for term in ("projection", "pairwise"))
        if box == "projection+learned":
            pairwise = "learned"
    return ReportRow(name, projection, pairwise, label=label, meaning=meaning, every_mask=every_mask)


def row_meaning(row: StudyRow, config: RunConfig, *, in_every_table: bool) -> str:
    """What a row trains with: its masks, the loss that objects without one get, and what else it sets."""
    mask, box = _MASK_LOSS[config.objective.mask], _BOX_LOSS[config.objective.box]
    text = {
        "split": f"masks of seen classes, {mask}; {box} for objects of unseen classes",
        "boxes": f"no mask of any class, {box} for all objects",
        "masks": f"masks of every class, {mask}",
        "as_annotated": f"masks where they are annotated, {mask}; {box} for the other objects",
    }[config.supervision.source]
    others = [f"{path} = {value}" for path, value in flat_settings(row.set).items() if path not in _IN_WORDS]
    if others:
        text += f"; with {', '.join(others)}"
    if row.name == UPPER_BOUND:
        text += ": the upper bound, which the paper leaves out"
    return text + (" (the same run in every table)" if in_every_table else "")


def is_paper_data(data: DataConfig, classes: int) -> bool:
    """Whether these are the data that the paper's numbers were measured on: COCO 2017 or PASCAL VOC 2012, by name."""
    official = DataConfig()
    coco = data.format == "coco" and data.val_annotations == official.val_annotations and classes == 80
    return coco or (data.format == "voc" and data.voc.val_set == official.voc.val_set)


def data_sentence(data: DataConfig) -> str:
    """The data sets, for the protocol."""
    if data.format == "shapes":
        shapes = data.shapes
        return (
            f"Shapes, the embedded data set: {shapes.train_images} training and {shapes.val_images} validation images "
            f"of {shapes.image_size} by {shapes.image_size} pixels, drawn from the seeds {shapes.train_seed} and "
            f"{shapes.val_seed}."
        )
    if data.format == "voc":
        return f"PASCAL VOC 2012: training on {data.voc.train_set}, validation on {data.voc.val_set}."
    return f"COCO format in {data.root}: training on {data.train_images}, validation on {data.val_images}."


def schedule_sentence(configs: Sequence[RunConfig]) -> str:
    """Length, optimiser, backbone and mask losses; what differs between the rows is left to their own description."""
    backbones = [config.model.backbone for config in configs]
    return (
        f"{_each(_length(config) for config in configs)} of "
        f"{_each(f'{config.optim.batch_size} images' for config in configs)}, "
        f"{_each(config.optim.optimizer for config in configs)}, "
        f"rate {_each(f'{config.optim.learning_rate:g}' for config in configs)} "
        f"({_each(config.optim.schedule for config in configs)}); "
        f"backbone {_each(one.title for one in backbones)}, "
        f"masks at {_each(config.model.mask_cells for config in configs)}, "
        f"τ = {_each(f'{config.objective.affinity_threshold:g}' for config in configs)}."
    )


def _each(values: Iterable[Any]) -> str:
    """The values, each once: "resnet50 or resnet101 by row" where rows differ."""
    *others, last = dict.fromkeys(str(value) for value in values)
    return f"{', '.join(others)} or {last} by row" if others else last


def pretraining_sentence(config: RunConfig) -> str:
    """What all rows of a seed start from."""
    sides = " or ".join(str(side) for side in config.data.short_sides)
    return (
        f"Every row starts from the detector that its seed pretrained on boxes alone, without any mask "
        f"({_length(config)} of {config.optim.batch_size} images with short sides of {sides} pixels, "
        f"rate {config.optim.learning_rate:g})."
    )


def initial_weights_in_words(configs: Sequence[RunConfig]) -> str:
    """What the rows start from where a study has no pretraining of its own."""
    names = {
        "imagenet": "ImageNet weights of its backbone",
        "hub": "timm's weights of its backbone",
        "package": "ImageNet weights of its backbone",
        "random": "random weights",
    }
    given = ["the weights of a given model"] if any(config.init_from is not None for config in configs) else []
    weights = [config.model.backbone.weights for config in configs if config.init_from is None]
    return " or ".join(dict.fromkeys([*given, *(names.get(name, "given weights of its backbone") for name in weights)]))


def _length(config: RunConfig) -> str:
    """Steps, or epochs where the number of steps needs the data set."""
    steps = planned_steps(config)
    return f"{steps} steps" if steps is not None else f"{config.optim.epochs:g} epochs"
