"""Where the AP goes: what a row lacks compared with full-masks, divided into boxes and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from semiseg.evaluation.coco_metrics import Metrics, names_of_classes
from semiseg.evaluation.gap_parts import class_ap, with_masks_of, with_true_masks
from semiseg.report.aggregate import UPPER_BOUND, ReportInput, ReportRow, ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.drawing import BLACK, BLUE, ORANGE, Drawing, chart, new_figure, plain
from semiseg.report.stored import StoredDetections, missing_note
from semiseg.report.tables import escape_markdown, markdown_table, number, signed
from semiseg.results import Result

_NOTHING = 0.05  # AP; a smaller difference is printed as 0.0


@dataclass(frozen=True)
class GapParts:
    """A row beside the row with every mask, on the unseen classes of a table (all classes where it has none).

    Attributes:
        row: the row.
        seeds: one line per seed (index) that both rows have, with columns in AP: `ap`; `true_masks`, with true masks;
            `exchanged`, with the boxes and scores of the row with every mask; `gap` = `boxes` + `masks`;
            `boxes_by_truth`, the boxes' part as the difference of both rows with true masks; `full` and
            `full_true_masks` of the row with every mask. `kept`: of its detections that found an object the share (in
            percent) without a partner.
    """

    row: ReportRow
    seeds: pd.DataFrame = field(repr=False)

    def mean(self, name: str) -> float:
        """A column's mean over seeds."""
        return float(self.seeds[name].mean())

    def told(self, name: str, *, sign: bool = False) -> str:
        """A column's "mean ± standard deviation" over seeds."""
        std = float(self.seeds[name].std(ddof=1)) if len(self.seeds) > 1 else None
        return number(_unsigned_zero(self.mean(name)), std, sign=sign)


def bound_row(table: ReportTable) -> ReportRow | None:
    """The row with every mask that the others are compared with: full-masks, else the only one there is."""
    named = [row for row in table.rows if row.name == UPPER_BOUND]
    bounds = named or [row for row in table.rows if row.every_mask]
    return bounds[0] if len(bounds) == 1 and len(table.rows) > 1 else None


def gap_parts_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """How much of what each row lacks is due to its boxes and how much to its masks: sentence, table and bars."""
    table = numbers.table
    bound = bound_row(table)
    rows = [row for row in table.rows if bound is not None and row != bound and not row.every_mask]
    if bound is None or not rows:
        return []
    heading, label = "### Where the AP goes", escape_markdown(bound.label)
    measured = (_measured_parts(page, table, row, bound) for row in rows)
    found = [parts for parts in measured if parts is not None]
    if not found:
        reason = f"it needs the stored detections of {label} and of another row with a common seed"
        return [heading, f"Not measured: {reason}."]
    classes = "unseen" if table.unseen else "all"
    by_row = {parts.row.name: parts for parts in found}
    return [
        heading,
        gap_sentence(by_row[numbers.main_row(by_row)], classes=classes, bound=bound.label),
        *_explanation(label),
        _parts_table(found, bound),
        *missing_note(_missing(page.report, table, found, bound)),
        *page.figures.show(
            f"{table.name}_gap_parts",
            gap_parts_figure(found, classes=classes, bound=bound.label),
            alt=f"what each row lacks on {classes} classes, by boxes and masks, {table.name}",
            caption=f"Mask AP on {classes} classes below {bound.label}, mean over seeds; left of 0: the row is better.",
        ),
    ]


def _missing(report: ReportInput, table: ReportTable, found: Sequence[GapParts], bound: ReportRow) -> list[str]:
    """Rows and seeds that were recorded beside the row with every mask but not measured."""
    return [
        f"{parts.row.label} seed {seed}"
        for parts in found
        for seed in report.seeds
        if seed not in parts.seeds.index
        and all((table.name, row.name, seed) in report.results for row in (parts.row, bound))
    ]


def _explanation(label: str) -> list[str]:
    """How it was measured: a sentence, then a list with what each column means."""
    return [
        'Measured on stored detections, seed by seed. "Found" means a box IoU of at least 0.5, matched as COCO does.',
        "- **With true masks**: every detection that found an object gets the object's mask. Only errors of detection "
        "remain.\n"
        f"- **Boxes and order of {label}**: every detection of {label} takes a mask of the row, that of the detection "
        "of the same image and class that overlaps its box most (IoU of at least 0.5). The row's masks then stand "
        f"under the boxes and scores of {label}.\n"
        "- **Gap** = box part + mask part. **Box part**: what the row gains by the boxes and order of "
        f"{label}. **Mask part**: what it still lacks.\n"
        f"- **Box part by true masks**: the difference to {label} with true masks in both, a second estimate, in AP "
        "whose masks are perfect.\n"
        f"- **Without partner**: of the detections of {label} that found an object the share for which the row has no "
        f"such mask. They keep the mask of {label}, which moves a little from the mask part to the box part.",
    ]


def _parts_table(found: Sequence[GapParts], bound: ReportRow) -> str:
    headings = (
        "row",
        "AP",
        "with true masks",
        f"boxes and order of {bound.label}",
        "gap",
        "box part",
        "mask part",
        "box part by true masks",
        "without partner",
    )
    lines = [
        [
            parts.row.label,
            *(parts.told(name) for name in ("ap", "true_masks", "exchanged")),
            *(parts.told(name, sign=True) for name in ("gap", "boxes", "masks", "boxes_by_truth")),
            f"{parts.mean('kept'):.1f} %",
        ]
        for parts in found
    ]
    most = max(found, key=lambda parts: len(parts.seeds))
    full = GapParts(bound, most.seeds[["full", "full_true_masks"]])
    lines.append([bound.label, full.told("full"), full.told("full_true_masks"), *["—"] * 6])
    return markdown_table(headings, lines)


def gap_sentence(parts: GapParts, *, classes: str, bound: str) -> str:
    """How much of a row's gap its masks and how much its boxes and scores make up."""
    row, full = escape_markdown(parts.row.label), escape_markdown(bound)
    gap, masks, boxes = (_unsigned_zero(parts.mean(name)) for name in ("gap", "masks", "boxes"))
    where = f"on {classes} classes"
    seeds = "one seed" if len(parts.seeds) == 1 else f"{len(parts.seeds)} seeds"
    if gap < _NOTHING:
        return (
            f"{row} lacks nothing {where} compared with {full} ({signed(gap)} AP below it, {seeds}): masks "
            f"{signed(masks)}, boxes and scores {signed(boxes)}."
        )
    if min(masks, boxes) <= -_NOTHING:
        share = f"its masks make up {signed(masks)}, its boxes and scores {signed(boxes)}"
    else:
        share = f"{masks:.1f} are masks and {boxes:.1f} boxes and scores"
    return f"Of the {gap:.1f} AP that {row} lacks {where} compared with {full}, {share} ({seeds})."


def _measured_parts(page: PageContext, table: ReportTable, row: ReportRow, bound: ReportRow) -> GapParts | None:
    """The parts of one row over the seeds for which they can be had."""
    classes = table.unseen or table.seen
    lines = {}
    for seed in page.report.seeds:
        runs = [page.report.results.get((table.name, name, seed)) for name in (bound.name, row.name)]
        if runs[0] is None or runs[1] is None:
            continue
        if (line := _seed_parts(page, runs[0], runs[1], classes)) is not None:
            lines[seed] = line
    return GapParts(row, pd.DataFrame.from_dict(lines, orient="index")) if lines else None


def _seed_parts(page: PageContext, full: Result, run: Result, classes: Sequence[str]) -> dict[str, float] | None:
    """One line of `GapParts.seeds`; None where something was not measured or no class has objects."""
    exchanged = page.measured.get(
        "gap_parts", f"{run.trained_as}|{full.trained_as}", lambda: _exchange(page.stored, full, run)
    )
    if exchanged is None:
        return None
    true_masks = [_true_masks(page, result) for result in (full, run)]
    goal, ap = (Metrics.from_dict(result.metrics).group("segm", classes)["AP"] for result in (full, run))
    goal_true, ap_true, between = (_mean(values, classes) for values in (*true_masks, exchanged["ap"]))
    if goal is None or ap is None or goal_true is None or ap_true is None or between is None:
        return None
    matched, kept = (sum(exchanged["matched"].get(name, (0, 0))[part] for name in classes) for part in (0, 1))
    return {
        "ap": ap,
        "true_masks": ap_true,
        "exchanged": between,
        "gap": goal - ap,
        "boxes": between - ap,
        "masks": goal - between,
        "boxes_by_truth": goal_true - ap_true,
        "kept": 100 * kept / matched if matched else 0.0,
        "full": goal,
        "full_true_masks": goal_true,
    }


def _true_masks(page: PageContext, run: Result) -> dict[str, float | None] | None:
    """Class -> AP with true masks in the matched detections."""

    def measure() -> dict[str, float | None] | None:
        stored = page.stored
        truth, results, found = stored.truth(), stored.of(run), stored.found(run)
        if truth is None or results is None or found is None:
            return None
        return _rounded(class_ap(truth, with_true_masks(truth, results, found)))

    return page.measured.get("true_masks", run.trained_as, measure)


def _exchange(stored: StoredDetections, full: Result, run: Result) -> dict[str, Any] | None:
    """AP per class of the row's masks under the boxes and scores of full-masks.

    `matched`: class -> number of full-masks detections that found an object, and how many of these had no partner.
    """
    truth, results, donors = stored.truth(), stored.of(full), stored.of(run)
    found = stored.found(full)
    if truth is None or results is None or donors is None or found is None:
        return None
    changed = with_masks_of(results, donors)
    names = dict(zip(sorted(truth.cats), names_of_classes(truth), strict=True))
    matched: dict[str, list[int]] = {}
    for result, own, match in zip(results, changed.own, found, strict=True):
        if match is not None:
            counts = matched.setdefault(names[result["category_id"]], [0, 0])
            counts[0] += 1
            counts[1] += own
    return {"ap": _rounded(class_ap(truth, changed.results)), "matched": dict(sorted(matched.items()))}


def _unsigned_zero(value: float) -> float:
    """What would be printed as -0.0 as 0.0."""
    return 0.0 if abs(value) < _NOTHING else value


def _mean(values: Mapping[str, float | None] | None, classes: Sequence[str]) -> float | None:
    if values is None:
        return None
    found = [value for name in classes if (value := values.get(name)) is not None]
    return math.fsum(found) / len(found) if found else None


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """To a thousandth of an AP, which keeps the file of measurements small."""
    return {name: None if value is None else round(value, 3) for name, value in values.items()}


def gap_parts_figure(found: Sequence[GapParts], *, classes: str, bound: str) -> Drawing:
    """One bar per row: the mean box part and mask part of its gap, negative ones left of 0; a mark at their sum."""
    figure = new_figure(7.2, 1.5 + 0.42 * len(found))
    panel = figure.subplots()
    for name, colour, label in (("masks", ORANGE, "masks"), ("boxes", BLUE, "boxes and scores")):
        for place, parts in enumerate(found):
            value, other = parts.mean(name), parts.mean("boxes" if name == "masks" else "masks")
            start = other if name == "boxes" and value * other > 0 else 0.0  # parts of one sign lie end to end
            panel.barh(place, value, 0.6, left=start, color=colour, label=label if place == 0 else None)
    ends = [side for parts in found for side in _ends(parts)]
    low, high = min(0.0, *ends), max(0.1, *ends)  # not of length 0
    for place, parts in enumerate(found):
        gap, masks, boxes = (_unsigned_zero(parts.mean(name)) for name in ("gap", "masks", "boxes"))
        panel.plot(gap, place, "D", color="white", markeredgecolor=BLACK, markersize=5, label="gap" * (place == 0))
        text = f"{gap:.1f} = {masks:.1f} masks {'−' if boxes < 0 else '+'} {abs(boxes):.1f} boxes"  # noqa: RUF001
        panel.text(high + 0.04 * (high - low), place, text, va="center", fontsize=8)
    panel.set_xlim(low - 0.04 * (high - low), high + 0.6 * (high - low))  # room for the text
    panel.set_yticks(range(len(found)), [plain(parts.row.label) for parts in found], fontsize=8.5)
    panel.invert_yaxis()
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.set_xlabel(f"AP below {plain(bound)} on {classes} classes", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    return chart(figure)


def _ends(parts: GapParts) -> tuple[float, float]:
    """Where the bar of a row begins and ends."""
    values = parts.mean("masks"), parts.mean("boxes")
    return sum(value for value in values if value < 0), sum(value for value in values if value > 0)
