"""Why masks fail although the box was found: each failed instance has one cause, by rules that the page prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.overlays import COLOURS, paint_mask
from semiseg.report.aggregate import ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.pictures import (
    Pictures,
    class_name,
    contact_sheet,
    drawn_name,
    judged,
    read_image,
    runs_of_one_seed,
    there,
    truth_of,
)
from semiseg.report.tables import escape_markdown, markdown_table
from semiseg.results import Result

FAILED_IOU = 0.5  # of the masks: what COCO's easiest threshold misses
# Cause -> rule in words, in the order in which the rules are asked; the first that applies is the cause.
CAUSES: Mapping[str, str] = {
    "merged": "more than 25 % of the mask on other instances, of any class",
    "box": "IoU of the mask and the detection's own box above 0.9: the mask fills its box",
    "leak": "more than 25 % of the mask outside the object",
    "part missing": "less than half of the object covered",
    "other": "none of these",
}
PER_CAUSE = 6
_VERSION = "v1"  # of the rules, in the key of what is kept
_CROP = 1.6  # side of a tile, in longer sides of the object's box
_TILE = 160  # pixels


def causes_of_failure(matches: pd.DataFrame) -> pd.Series:
    """The cause of each failed line of `match_instances`; "" for instances that were not found or have not failed."""
    rules = [
        matches["on_others"] > 0.25,
        matches["mask_box_iou"] > 0.9,
        matches["outside"] > 0.25,
        matches["recall"] < 0.5,
    ]
    first = np.select(rules, list(CAUSES)[:-1], "other")
    failed = (matches["detection"] >= 0) & (matches["mask_iou"] < FAILED_IOU)
    return pd.Series(np.where(failed, first, ""), index=matches.index, dtype=object)


def failure_counts(truth: COCO, matches: pd.DataFrame) -> dict[str, list[int]]:
    """Class -> number of instances, of found ones, and of failures by cause in the order of CAUSES.

    Args:
        matches: `match_instances` of a run.
    """
    causes = causes_of_failure(matches)
    counts = {}
    for category, lines in matches.groupby("category"):
        own = causes.loc[lines.index]
        found = int((lines["detection"] >= 0).sum())
        counts[class_name(truth, category)] = [len(lines), found, *(int((own == cause).sum()) for cause in CAUSES)]
    return counts


def failure_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """How many found objects have a failed mask and why, for every row; the worst of the main row as pictures."""
    report, table = page.report, numbers.table
    labels = {row.name: row.label for row in table.rows}
    counted: dict[str, list[np.ndarray]] = {row.name: [] for row in table.rows}
    missing = []
    for row, seed, run in report.cells(table):
        if (counts := _kept_counts(page, run)) is None:
            missing.append(f"{escape_markdown(labels[row])} seed {seed}")
        else:
            counted[row].append(_sums(table, counts))
    lines = [[row.label, *_cells(counted[row.name])] for row in table.rows]
    gone = f"Without {', '.join(missing)}: the detections of these runs are not on this machine."
    return [
        "### Failures",
        _rules(table),
        markdown_table(("row", "runs", "found", "failed", *CAUSES), lines),
        *([gone] if missing else []),
        *_pictured(page, numbers),
    ]


def _pictured(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The worst failures of the main row; whether there are any follows from the counts, which outlive run folders."""
    report, table = page.report, numbers.table
    if not report.cells(table):
        return []
    seed, runs = runs_of_one_seed(report, table)
    row = numbers.main_row(runs)
    counts = _kept_counts(page, runs[row])
    if counts is not None and not _sums(table, counts)[2:].any():
        label = next(item.label for item in table.rows if item.name == row)
        return [f"No mask of {escape_markdown(label)}, seed {seed}, has failed: there is nothing to picture."]
    picture = failure_picture(page, table, row, seed)
    return page.figures.show(
        f"{table.name}_failures",
        picture.png,
        alt=f"failed masks by cause, {table.name}",
        caption=picture.note,
        absent=picture.note,
    )


def _kept_counts(page: PageContext, run: Result) -> dict[str, list[int]] | None:
    def measure() -> dict[str, list[int]] | None:
        truth, matches = page.stored.truth(), page.stored.instances(run)
        return None if truth is None or matches is None else failure_counts(truth, matches)

    return page.measured.get("failures", f"{run.trained_as}/{_VERSION}", measure)


def _sums(table: ReportTable, counts: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Instances, found ones and failures by cause, summed over the classes that count."""
    wanted = [values for name, values in counts.items() if not table.unseen or name in table.unseen]
    sums: np.ndarray = np.array(wanted, dtype=np.int64).reshape(-1, 2 + len(CAUSES)).sum(0)
    return sums


def _cells(runs: Sequence[np.ndarray]) -> list[str]:
    """Number of runs; then means over them, each with its share of the column that it is part of."""
    if not runs:
        return ["0", *["—"] * (2 + len(CAUSES))]
    instances, found, *causes = np.mean(runs, axis=0)
    failed = sum(causes)
    cells = [_with_share(found, instances), _with_share(failed, found)]
    return [str(len(runs)), *cells, *(_with_share(count, failed) for count in causes)]


def _with_share(count: float, of: float) -> str:
    number = f"{count:.1f}".removesuffix(".0")
    return f"{number} ({100 * count / of:.0f} %)" if of else number


def _rules(table: ReportTable) -> str:
    whose = "Objects of unseen classes" if table.unseen else "Objects"
    rules = "; ".join(f"**{cause}**: {rule}" for cause, rule in CAUSES.items())
    return (
        f"{whose} whose box was found (box IoU of at least 0.5, matched one to one by score) but whose mask has an IoU "
        f"below 0.5. The cause is the first of these rules that applies: {rules}. Means over the runs; in brackets the "
        "share of all objects, of the found ones, and of the failed ones."
    )


def failure_picture(page: PageContext, table: ReportTable, row: str, seed: int) -> Pictures:
    """The PER_CAUSE worst failures of each cause by mask IoU, of one run."""
    run, label = page.report.results[table.name, row, seed], next(r.label for r in table.rows if r.name == row)
    try:
        truth = truth_of(page.stored)
        results, matches = there(page.stored.of(run)), judged(table, truth, there(page.stored.instances(run)))
        failed = matches.assign(cause=causes_of_failure(matches)).query("cause != ''")
        strips = []
        for cause, lines in worst_failures(failed).items():
            count = int((failed["cause"] == cause).sum())
            words = f"{cause}: {count} of {len(failed)} ({100 * count / len(failed):.0f} %)"
            tiles = []
            for key, line in lines.iterrows():
                annotation = truth.anns[key]
                image = read_image(page.report.val_images, truth, annotation["image_id"])
                predicted = results[line["detection"]]["segmentation"]
                tile = _tile(image, truth.annToRLE(annotation), predicted, annotation["bbox"])
                tiles.append((_title(truth, annotation, line["mask_iou"]), tile))
            strips.append((words, tiles))
    except UserError as error:
        return Pictures(None, str(error))
    note = (
        f"The failures of {label}, seed {seed}: of each cause the {PER_CAUSE} with the lowest mask IoU at most; above "
        "them its share of all failures. White line: the object's mask; orange: the predicted mask. Each tile is "
        f"{_CROP} times as wide as the object's box."
    )
    return Pictures(contact_sheet(strips), note)


def worst_failures(failed: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Cause -> its PER_CAUSE lines with the lowest mask IoU, ties by annotation id; causes without any are left out."""
    ordered = failed.sort_index().sort_values("mask_iou", kind="stable")
    worst = {cause: ordered[ordered["cause"] == cause].head(PER_CAUSE) for cause in CAUSES}
    return {cause: lines for cause, lines in worst.items() if len(lines)}


def _title(truth: COCO, annotation: Mapping[str, Any], mask_iou: float) -> str:
    name = drawn_name(truth, annotation["category_id"])
    shown = math.floor(100 * mask_iou) / 100  # a failure is never shown as 0.50
    return f"{name}, IoU {shown:.2f}\nimage {annotation['image_id']}"


def _tile(
    image: np.ndarray, truth: Mapping[str, Any], predicted: Mapping[str, Any], box: Sequence[float]
) -> Image.Image:
    """The predicted mask in orange over a grey image, the outline of the object in white beside black, cut out."""
    left, top, side = crop_window(box, width=image.shape[1], height=image.shape[0])
    window = (round(left), round(top), round(left + side), round(top + side))
    picture = Image.fromarray(image).convert("L").convert("RGB").crop(window)
    picture = picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    paint_mask(picture, _cut(predicted, window), COLOURS[0], line=1)
    for colour, line in (((0, 0, 0), 3), ((255, 255, 255), 2)):
        paint_mask(picture, _cut(truth, window), colour, line=line, opacity=0)
    return picture


def _cut(mask: Mapping[str, Any], window: tuple[int, int, int, int]) -> dict[str, Any]:
    """The part of a mask in a window, which may reach beyond the image."""
    part = np.asarray(Image.fromarray(rle.decode(mask)).crop(window))
    encoded: dict[str, Any] = rle.encode(np.asfortranarray(part))
    return encoded


def crop_window(box: Sequence[float], *, width: int, height: int) -> tuple[float, float, float]:
    """Left, top and side in pixels of the square around a box (x, y, w, h), moved into the image where it fits."""
    side = _CROP * max(box[2], box[3], 1.0)
    corner = []
    for start, extent, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        low = start + extent / 2 - side / 2
        corner.append(min(max(low, 0.0), limit - side) if side <= limit else (limit - side) / 2)
    return corner[0], corner[1], side
