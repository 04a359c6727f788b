"""The sections of one table beside its numbers: AP by class, by the IoU of a match, by size; training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    cells = [(row, thresholds_of(page, result)) for row, _, result in page.report.cells(table)]
    measured = [(row, values["segm"]) for row, values in cells if values is not None and "segm" in values]
    frames = {
        words: pd.DataFrame(
            [{"row": row, **_threshold_means(by_class, classes)} for row, by_class in measured],
            columns=["row", *IOU_THRESHOLDS],
        )
        for words, classes in _groups(table).items()
    }
    # A figure that lacks runs would replace a better one of an earlier report.
    complete = bool(measured) and len(measured) == len(cells)
    shown = page.figures.show(
        f"{table.name}_thresholds",
        threshold_figure(table, frames, row_styles(page.report.tables)) if complete else None,
        alt=f"mask AP against IoU threshold, {table.name}",
        caption="Means over seeds, bands of ± one standard deviation.",
        absent="the run folders with the detections are not on this machine",
    )
    if not measured:
        return ["### AP against IoU threshold", *shown]
    first, frame = next(iter(frames.items()))
    columns = {threshold: f"IoU {threshold:.1f}" for threshold in _PRINTED_THRESHOLDS}
    text = f"Mask AP in percent on {first} by the IoU that a match takes."
    return ["### AP against IoU threshold", text, _over_seeds(table, {"": frame}, columns), *shown]


def size_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP by object size, for the sizes that the validation objects have."""
    table = numbers.table
    cells = [(row, Metrics.from_dict(result.metrics)) for row, _, result in page.report.cells(table)]
    frames = {
        f"{words.removesuffix(' classes')}: ": pd.DataFrame(
            [{"row": row, **metrics.group("segm", classes)} for row, metrics in cells], columns=["row", *_SIZES]
        ).astype(dict.fromkeys(_SIZES, float))
        for words, classes in _groups(table).items()
    }
    sizes = {
        size: words for size, words in _SIZES.items() if any(frame[size].notna().any() for frame in frames.values())
    }
    if not sizes:
        return []
    text = "Mask AP in percent by mask area: small below 32² pixels of the original image, medium below 96², large."
    return ["### AP by object size", text, _over_seeds(table, frames, sizes)]


def _groups(table: ReportTable) -> dict[str, tuple[str, ...]]:
    """Words -> classes: unseen ones first, if there are any, then all."""
    unseen = {"unseen classes": table.unseen} if table.unseen else {}
    return {**unseen, "all classes": table.seen + table.unseen}


def _threshold_means(by_class: Mapping[str, Sequence[float | None]], classes: Sequence[str]) -> dict[float, float]:
    """IoU threshold -> mean over those classes that have objects; NaN where none has."""
    lines = {name: by_class[name] for name in classes if name in by_class}
    means = pd.DataFrame(lines, index=IOU_THRESHOLDS, dtype=float).mean(axis=1)
    return dict(zip(IOU_THRESHOLDS, means.tolist(), strict=True))


def _over_seeds(table: ReportTable, frames: Mapping[str, pd.DataFrame], columns: Mapping[Any, str]) -> str:
    """A table of means and deviations over seeds: a line per row, and per frame (by its words) the columns."""
    lines = [[row.label] for row in table.rows]
    for frame in frames.values():
        for row, line in zip(table.rows, lines, strict=True):
            values = frame.loc[frame["row"] == row.name, list(columns)].astype(float)
            line += map(number, values.mean(), values.std(ddof=1))
    return markdown_table(["row", *(f"{words}{name}" for words in frames for name in columns.values())], lines)


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term, and of the validation AP where it was measured on the way."""
    report, table = page.report, numbers.table
    curves: dict[str, list[TrainingCurves]] = {row.name: [] for row in table.rows}
    complete = True  # a figure that lacks runs would replace a better one of an earlier report
    for row, _, run in report.cells(table):
        masks = Metrics.from_dict(run.metrics).group("segm", table.seen + table.unseen)["AP"]
        folder = report.run_folders.get(run.run_id)
        curve = None if folder is None else read_curves(folder / "log.jsonl", final=(run.steps, masks))
        if curve is None:
            complete = False
        else:
            curves[row].append(curve)
    shown = page.figures.show(
        f"{table.name}_losses",
        training_figure(table, curves, row_styles(report.tables)) if complete else None,
        alt=f"training losses, {table.name}",
        caption="Loss terms before weighting, averaged over some steps, and mask AP where it was measured on the way.",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]
