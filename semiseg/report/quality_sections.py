"""The sections of one table beside its numbers: AP by class, by the IoU of a match, by size; training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from semiseg.evaluation.coco_metrics import Metrics
from semiseg.evaluation.matching import IOU_THRESHOLDS
from semiseg.report.aggregate import ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.figures import (
    TrainingCurves,
    class_gaps,
    read_curves,
    row_styles,
    shown_row,
    sorted_classes,
    threshold_figure,
    training_figure,
)
from semiseg.report.tables import escape_markdown, markdown_table, number
from semiseg.report.uncertainty import thresholds_of

_PRINTED_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def class_section(_: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP per class."""
    table, gaps, main = numbers.table, class_gaps(numbers), shown_row(numbers)
    labels = {row.name: row.label for row in table.rows}
    classes = numbers.classes.loc[sorted_classes(numbers)]
    headings = ["class", *(["group"] if table.unseen else []), *labels.values(), *(["gap"] if gaps is not None else [])]
    lines = []
    for name, values in zip(classes.index, classes.to_numpy(), strict=True):
        group = ["unseen" if name in table.unseen else "seen"] if table.unseen else []
        gap = [] if gaps is None else [number(gaps[name], sign=True)]
        lines.append([str(name), *group, *map(number, values), *gap])
    text = []
    if main is not None:
        by = f"AP of {labels[main]}" if gaps is None else f"full-masks minus {labels[main]} (gap)"
        text = [escape_markdown(f"Mask AP in percent, mean over seeds; sorted by {by}.")]
    return ["### Per class", *text, markdown_table(headings, lines, texts=2 if table.unseen else 1)]


def threshold_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP against the IoU that a match takes: curves, and a table of some thresholds."""
    table = numbers.table
    measured = [(row, thresholds_of(page, result)) for row, _, result in page.report.cells(table)]
    known = [(row, found["segm"]) for row, found in measured if found is not None and "segm" in found]
    frames = {
        words: pd.DataFrame(
            [{"row": row, **_threshold_means(by_class, classes)} for row, by_class in known],
            columns=["row", *IOU_THRESHOLDS],
        )
        for words, classes in _groups(table).items()
    }
    # A figure that lacks runs would replace a better one of an earlier report.
    complete = bool(known) and len(known) == len(measured)
    shown = page.figures.show(
        f"{table.name}_thresholds",
        threshold_figure(table, frames, row_styles(page.report.tables)) if complete else None,
        alt=f"mask AP against IoU threshold, {table.name}",
        caption="Mask AP by the IoU that a match takes: means over seeds, bands of ± one standard deviation.",
        absent="the run folders with the detections are not on this machine",
    )
    if not known:
        return ["### AP against IoU threshold", *shown]
    first, frame = next(iter(frames.items()))
    headings = ("row", *(f"IoU {threshold:.1f}" for threshold in _PRINTED_THRESHOLDS))
    lines = [[row.label, *_over_seeds(frame, row.name, _PRINTED_THRESHOLDS)] for row in table.rows]
    text = f"Mask AP in percent on {first} by the IoU from which a detection counts as found."
    return ["### AP against IoU threshold", text, markdown_table(headings, lines), *shown]


def size_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP by object size, for the sizes that the validation objects have."""
    table = numbers.table
    cells = [(row, Metrics.from_dict(result.metrics)) for row, _, result in page.report.cells(table)]
    frames = {
        words: pd.DataFrame(
            [{"row": row, **metrics.group("segm", classes)} for row, metrics in cells], columns=["row", *_SIZES]
        ).astype(dict.fromkeys(_SIZES, float))
        for words, classes in _groups(table).items()
    }
    names = {
        size: words for size, words in _SIZES.items() if any(frame[size].notna().any() for frame in frames.values())
    }
    if not names:
        return []
    lines = [
        [row.label, *(cell for frame in frames.values() for cell in _over_seeds(frame, row.name, list(names)))]
        for row in table.rows
    ]
    headings = [f"{group.removesuffix(' classes')}: {words}" for group in frames for words in names.values()]
    text = (
        "Mask AP in percent by the area of the objects' masks in pixels of the original image, in COCO's ranges: small "
        "below 32² = 1,024, medium below 96² = 9,216, large from there on."
    )
    return ["### AP by object size", text, markdown_table(["row", *headings], lines)]


def _groups(table: ReportTable) -> dict[str, tuple[str, ...]]:
    """Words -> classes: unseen ones first, if there are any, then all."""
    unseen = {"unseen classes": table.unseen} if table.unseen else {}
    return {**unseen, "all classes": table.seen + table.unseen}


def _threshold_means(
    by_class: Mapping[str, Sequence[float | None]], classes: Sequence[str]
) -> dict[float, float | None]:
    """IoU threshold -> mean over those classes that have objects."""
    lines = [by_class[name] for name in classes if name in by_class]
    means: dict[float, float | None] = {}
    for column, threshold in enumerate(IOU_THRESHOLDS):
        values = [value for line in lines if (value := line[column]) is not None]
        means[threshold] = sum(values) / len(values) if values else None
    return means


def _over_seeds(frame: pd.DataFrame, row: str, columns: Sequence[str | float]) -> list[str]:
    values = frame.loc[frame["row"] == row, list(columns)].astype(float)
    return [number(mean, std) for mean, std in zip(values.mean(), values.std(ddof=1), strict=True)]


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term, and of the validation AP where it was measured on the way."""
    report, table = page.report, numbers.table
    curves: dict[str, list[TrainingCurves]] = {row.name: [] for row in table.rows}
    complete = True  # a figure that lacks runs would replace a better one of an earlier report
    for row, _, run in report.cells(table):
        masks = Metrics.from_dict(run.metrics).group("segm", table.seen + table.unseen)["AP"]
        folder = report.run_folders.get(run.run_id)
        found = None if folder is None else read_curves(folder / "log.jsonl", final=(run.steps, masks))
        complete = complete and found is not None
        curves[row] += [found] if found is not None else []
    shown = page.figures.show(
        f"{table.name}_losses",
        training_figure(table, curves, row_styles(report.tables)) if complete else None,
        alt=f"training losses, {table.name}",
        caption="Loss terms before weighting over the steps of the rows' own training, averaged over some steps, and "
        "mask AP of all validation classes where it was measured on the way; one line per run.",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]
