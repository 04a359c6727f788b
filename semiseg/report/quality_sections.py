"""The sections of one table beside its numbers: AP by class, by the IoU of a match, by size; training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import Metrics, TypeMetrics, load_ground_truth
from semiseg.evaluation.matching import IOU_THRESHOLDS
from semiseg.report.aggregate import UPPER_BOUND, ReportInput, ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.figures import (
    TrainingCurves,
    class_figure,
    class_gaps,
    read_curves,
    row_styles,
    shown_row,
    size_figure,
    sorted_classes,
    threshold_figure,
    training_figure,
)
from semiseg.report.tables import escape_markdown, markdown_table, number
from semiseg.report.uncertainty import thresholds_of
from semiseg.results import Result
from semiseg.splits import normalise

# A class whose masks are so far behind full-masks', though its boxes are found as well, has masks like filled boxes.
_STAYED, _FOUND = 0.5, 0.75
_PRINTED_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
# COCO's ranges of object area in pixels of the original image, ends included, as COCOeval has them.
_SIZES = {"APs": ("small", 0, 32**2), "APm": ("medium", 32**2, 96**2), "APl": ("large", 96**2, 10**10)}


def class_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP per class: table and bars, both in the same order."""
    table, gaps = numbers.table, class_gaps(numbers)
    classes = numbers.classes.loc[sorted_classes(numbers)]
    labels = {row.name: row.label for row in table.rows}
    lines = []
    for name, line in zip(classes.index, classes.to_numpy(), strict=True):
        group = ["unseen" if name in table.unseen else "seen"] if table.unseen else []
        gap = [] if gaps is None else [number(gaps[name], sign=True)]
        lines.append([str(name), *group, *(number(value) for value in line), *gap])
    headings = ["class", *(["group"] if table.unseen else []), *(row.label for row in table.rows)]
    main, order, below = shown_row(numbers), "", ""
    if main is not None:
        groups = ", unseen and seen classes apart" if table.unseen else ""
        by = f"AP of {labels[main]}, highest first"
        if gaps is not None:
            by = f"full-masks minus {labels[main]}, widest gap first"
            headings.append("gap")
        order = f"Mask AP in percent, mean over seeds. Sorted by {by}{groups}."
        below = f"Mask AP per class. Bars: {labels[main]}. Sorted by {by}{groups}."
    return [
        "### Per class",
        *([escape_markdown(order)] if order else []),
        markdown_table(headings, lines, texts=2 if table.unseen else 1),
        *at_the_box(page.report, table),
        *page.figures.show(
            f"{table.name}_classes",
            class_figure(numbers, row_styles(page.report.tables)),
            alt=f"mask AP per class, {table.name}",
            caption=below,
        ),
    ]


def at_the_box(report: ReportInput, table: ReportTable) -> list[str]:
    """Which classes a row with the pairwise loss left at masks like filled boxes, and with which seeds it did not."""
    staying = {row.label: _stayed(report, table, row.name) for row in table.rows if row.pairwise == "yes"}
    counted = {label: classes for label, classes in staying.items() if classes is not None}
    if not counted:
        return []
    told = []
    for label, (seeds, classes) in counted.items():
        names = [
            f"{escape_markdown(name)} with {_seeds(stayed)}"
            + (f", by chance: not with {_seeds([seed for seed in seeds if seed not in stayed])}" * (stayed != seeds))
            for name, stayed in classes.items()
        ]
        told.append(f"{escape_markdown(label)}: {'; '.join(names) or 'none'}")
    return [
        f"Classes that stay at the filled box, where masks begin (mask AP below {100 * _STAYED:.0f} % of full-masks', "
        f"box AP at least {100 * _FOUND:.0f} % of its): {'. '.join(told)}."
    ]


def _stayed(report: ReportInput, table: ReportTable, row: str) -> tuple[list[int], dict[str, list[int]]] | None:
    """The seeds that full-masks has, too, and class -> those with which its masks stayed; None without such a seed."""
    seeds, classes = [], dict[str, list[int]]()
    for seed in report.seeds:
        runs = [report.results.get((table.name, name, seed)) for name in (row, UPPER_BOUND)]
        own, full = (Metrics.from_dict(run.metrics) if run is not None else None for run in runs)
        if own is None or full is None or own.segm is None or full.segm is None:
            continue
        seeds.append(seed)
        for name in (*table.unseen, *table.seen):
            found = [_class_ap(metrics, name) for metrics in (own.segm, full.segm, own.bbox, full.bbox)]
            if found[0] < _STAYED * found[1] and found[2] >= _FOUND * found[3]:
                classes.setdefault(name, []).append(seed)
    return (seeds, classes) if seeds else None


def _class_ap(metrics: TypeMetrics, name: str) -> float:
    """NaN where a class has no objects: it compares as neither."""
    numbers = metrics.classes.get(name)
    value = None if numbers is None else numbers["AP"]
    return float("nan") if value is None else value


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def threshold_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP against the IoU that a match takes: curves, and a table of some thresholds."""
    table = numbers.table
    cells = _cells(page, table)
    measured = [(row, thresholds_of(page, result)) for row, result in cells]
    known = [(row, found["segm"]) for row, found in measured if found is not None and "segm" in found]
    groups = _groups(table)
    frames = {
        words: pd.DataFrame(
            [{"row": row, **_threshold_means(by_class, classes)} for row, by_class in known],
            columns=["row", *IOU_THRESHOLDS],
        )
        for words, classes in groups.items()
    }
    # A figure that lacks runs would replace a better one of an earlier report.
    complete = bool(known) and len(known) == len(cells)
    first, frame = next(iter(frames.items()))
    lines = [
        [row.label, *(_over_seeds(frame, row.name, threshold) for threshold in _PRINTED_THRESHOLDS)]
        for row in table.rows
    ]
    spread = ", ± standard deviation over seeds" if frame["row"].duplicated().any() else ""
    text = (
        "A detection counts as found if the IoU of its mask with the object's is at least the threshold; AP is the "
        f"mean over 0.50, 0.55, …, 0.95. In the table mask AP in percent on {first}{spread}."
    )
    shown = page.figures.show(
        f"{table.name}_thresholds",
        threshold_figure(table, frames, row_styles(page.report.tables)) if complete else None,
        alt=f"mask AP against IoU threshold, {table.name}",
        caption="Mask AP by the IoU that a match takes"
        + (": means over seeds, bands of ± one standard deviation." if spread else "."),
        absent="the run folders with the detections are not on this machine",
    )
    if not known:
        return ["### AP against IoU threshold", *shown]
    headings = ("row", *(f"IoU {threshold:.1f}" for threshold in _PRINTED_THRESHOLDS))
    return ["### AP against IoU threshold", text, markdown_table(headings, lines), *shown]


def size_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP by object size, for the sizes that the validation objects have."""
    table = numbers.table
    cells = [(row, Metrics.from_dict(result.metrics)) for row, result in _cells(page, table)]
    frames = {
        words: pd.DataFrame(
            [{"row": row, **metrics.group("segm", classes)} for row, metrics in cells], columns=["row", *_SIZES]
        ).astype(dict.fromkeys(_SIZES, float))
        for words, classes in _groups(table).items()
    }
    found = [size for size in _SIZES if any(frame[size].notna().any() for frame in frames.values())]
    if not found:
        return []
    names = {size: _SIZES[size][0] for size in found}
    lines = [
        [row.label, *(_over_seeds(frame, row.name, size) for frame in frames.values() for size in found)]
        for row in table.rows
    ]
    headings = [f"{words.removesuffix(' classes')}: {names[size]}" for words in frames for size in found]
    shown = page.figures.show(
        f"{table.name}_sizes",
        size_figure(table, frames, names, row_styles(page.report.tables)),
        alt=f"mask AP by object size, {table.name}",
        caption="Mask AP by the size of the objects."
        + " Error bars: standard deviation over seeds." * bool(numbers.summary["seeds"].max() > 1),
    )
    return ["### AP by object size", _size_sentence(page, numbers), markdown_table(["row", *headings], lines), *shown]


def _size_sentence(page: PageContext, numbers: TableNumbers) -> str:
    """The areas, and how many validation objects have them, if that is known."""
    text = (
        "Mask AP in percent by the area of the objects' masks in pixels of the original image, in COCO's ranges: small "
        "below 32² = 1,024, medium below 96² = 9,216, large from there on."
    )
    counts = _object_sizes(page, numbers.table)
    if counts is None:
        return text
    groups = _groups(numbers.table)
    told = [
        f"{words}: " + ", ".join(f"{count:,} {_SIZES[size][0]}" for size, count in _added(counts, classes).items())
        for words, classes in groups.items()
    ]
    return f"{text} Validation objects without crowd, {'; '.join(told)}."


def _object_sizes(page: PageContext, table: ReportTable) -> Mapping[str, Mapping[str, int]] | None:
    """Class -> size -> validation objects of it; None where the annotations are gone or not those of the runs."""
    cells = _cells(page, table)
    if not cells:
        return None
    result, path = cells[0][1], page.report.val_annotations
    instances = Metrics.from_dict(result.metrics).instances

    def measure() -> dict[str, dict[str, int]] | None:
        if path is None:
            return None
        try:
            truth = load_ground_truth(path)
        except (UserError, OSError):
            return None
        names = {key: normalise(str(category["name"])) for key, category in truth.cats.items()}
        counts = {name: dict.fromkeys(_SIZES, 0) for name in names.values()}
        for annotation in truth.dataset["annotations"]:
            if not annotation["iscrowd"] and annotation["category_id"] in names:
                size = next(size for size, (_, _, end) in _SIZES.items() if annotation["area"] < end)
                counts[names[annotation["category_id"]]][size] += 1
        totals = {name: sum(found.values()) for name, found in counts.items()}
        return counts if totals == dict(instances) else None

    return page.measured.get("object_sizes", result.run_id, measure)


def _added(counts: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> dict[str, int]:
    return {size: sum(counts[name][size] for name in classes) for size in _SIZES}


def _cells(page: PageContext, table: ReportTable) -> list[tuple[str, Result]]:
    """(row name, run) of every recorded cell of a table."""
    cells = (
        (row.name, page.report.results.get((table.name, row.name, seed)))
        for row in table.rows
        for seed in page.report.seeds
    )
    return [(row, result) for row, result in cells if result is not None]


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
    for place, threshold in enumerate(IOU_THRESHOLDS):
        values = [value for line in lines if (value := line[place]) is not None]
        means[threshold] = sum(values) / len(values) if values else None
    return means


def _over_seeds(frame: pd.DataFrame, row: str, column: str | float) -> str:
    values = frame.loc[frame["row"] == row][column].astype(float)
    return number(float(values.mean()), float(values.std(ddof=1)))


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term, and of the validation AP where it was measured on the way."""
    report, table = page.report, numbers.table
    curves: dict[str, list[TrainingCurves]] = {row.name: [] for row in table.rows}
    complete = True  # a figure that lacks runs would replace a better one of an earlier report
    for row in table.rows:
        for seed in report.seeds:
            if (run := report.results.get((table.name, row.name, seed))) is None:
                continue
            masks = Metrics.from_dict(run.metrics).group("segm", table.seen + table.unseen)["AP"]
            folder = report.run_folders.get(run.run_id)
            found = None if folder is None else read_curves(folder / "log.jsonl", final=(run.steps, masks))
            complete = complete and found is not None
            curves[row.name] += [found] if found is not None else []
    validated = any(len(curve.mask_ap) for found in curves.values() for curve in found)
    shown = page.figures.show(
        f"{table.name}_losses",
        training_figure(table, curves, row_styles(report.tables)) if complete else None,
        alt=f"training losses{' and validation AP' if validated else ''}, {table.name}",
        caption="Loss terms before weighting, over the steps of the rows' own training, averaged over some steps; one "
        f"line per run.{' Validation mask AP is that of all classes.' if validated else ''}",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]
