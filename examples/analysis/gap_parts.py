"""What a detector's boxes and what its masks cost in mask AP, beside a detector that learned every mask.

    python -m examples.analysis.gap_parts val.json runs/full-masks/detections.json runs/mine/detections.json

The gap between the two is divided by exchanging masks. No detection is invented: every one that is evaluated has image,
class, box and score of a stored one, and either its own mask, that of the object it found, or that of the other run's
detection of the same thing.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from examples.analysis import read_detections, read_truth, run_script
from semiseg.evaluation.instances import FOUND_IOU, box_matches
from semiseg.evaluation.matching import average_precision, match
from semiseg.evaluation.precision import names_of_classes

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Exchanged:
    """The detections of one row with the masks of another.

    Attributes:
        results: COCO results.
        own: one per result, whether it had no partner and keeps its own mask.
    """

    results: list[dict[str, Any]]
    own: list[bool]


def with_true_masks(truth: COCO, results: Results, found: Sequence[int | None] | None = None) -> list[dict[str, Any]]:
    """The detections, those that found an object with the object's mask; the others keep theirs.

    Args:
        found: `box_matches` of these results, if at hand.
    """
    found = box_matches(truth, results) if found is None else found
    return [
        {**result, "segmentation": result["segmentation"] if match is None else truth.annToRLE(truth.anns[match])}
        for result, match in zip(results, found, strict=True)
    ]


def with_masks_of(results: Results, donors: Results) -> Exchanged:
    """The detections with the masks of another row's: boxes and scores stay, masks change.

    By descending score every detection takes the mask of the donor of its image and class whose box overlaps its own
    most, of those with an IoU of at least 0.5 that are still free; equal scores and overlaps go by the order given.
    """
    free = _by_image_and_class(donors)
    changed, own = [dict(result) for result in results], [True] * len(results)
    for key, numbers in _by_image_and_class(results).items():
        offered = free.get(key, [])
        if not offered:
            continue
        # Columns by descending score, so that argmax prefers the more certain of two equal overlaps.
        boxes = [
            np.array([found[n]["bbox"] for n in of], float) for found, of in ((results, numbers), (donors, offered))
        ]
        overlaps = rle.iou(boxes[0], boxes[1], [0] * len(offered))
        for line, number in enumerate(numbers):
            best = int(overlaps[line].argmax())
            if overlaps[line, best] >= FOUND_IOU:
                changed[number]["segmentation"] = donors[offered[best]]["segmentation"]
                own[number] = False
                overlaps[:, best] = -1.0
    return Exchanged(changed, own)


def class_ap(truth: COCO, results: Results) -> dict[str, float | None]:
    """Mask AP in percent of every class, as pycocotools counts it; None for a class without objects.

    Args:
        truth: from `coco_metrics.load_ground_truth`, after `prepare_masks`.
    """
    matches = match(truth, results, "segm")
    means = average_precision(matches).mean(axis=1).tolist()
    # Rounding hides the machine epsilon that pycocotools adds to its denominator.
    return {
        name: None if math.isnan(value) else round(value, 10)
        for name, value in zip(matches.classes, means, strict=True)
    }


def _by_image_and_class(results: Results) -> dict[tuple[int, int], list[int]]:
    """Numbers of the detections of each image and class, by descending score."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number in sorted(range(len(results)), key=lambda n: -results[n]["score"]):
        groups.setdefault((results[number]["image_id"], results[number]["category_id"]), []).append(number)
    return groups


def gap_parts(truth: COCO, full: Results, row: Results, classes: Iterable[str] | None = None) -> dict[str, float]:
    """Mask AP in percent, means over classes with objects, and the gap of `row` to `full` in two parts.

    `ap` and `full` as they are; `true_masks` and `full_true_masks` with the object's mask in every detection that found
    one: only errors of detection remain; `exchanged` of the row's masks under the boxes and scores of `full`.
    `gap` = `boxes` (what the row gains by the boxes and scores of `full`) + `masks` (what it still lacks);
    `boxes_by_truth`, the difference with true masks in both, is a second estimate of `boxes`. `kept`: percent of the
    detections of `full` that found an object without a partner: they keep their mask, which moves a little from masks
    to boxes.
    """
    swapped, found = with_masks_of(full, row), box_matches(truth, full)
    measured = {
        "full": full,
        "ap": row,
        "full_true_masks": with_true_masks(truth, full, found),
        "true_masks": with_true_masks(truth, row),
        "exchanged": swapped.results,
    }
    wanted = None if classes is None else set(classes)
    values = {name: _mean_ap(class_ap(truth, results), wanted) for name, results in measured.items()}
    names = dict(zip(sorted(truth.cats), names_of_classes(truth), strict=True))
    lone = [
        own
        for result, own, match in zip(full, swapped.own, found, strict=True)
        if match is not None and (wanted is None or names[result["category_id"]] in wanted)
    ]
    return {
        **values,
        "gap": values["full"] - values["ap"],
        "boxes": values["exchanged"] - values["ap"],
        "masks": values["full"] - values["exchanged"],
        "boxes_by_truth": values["full_true_masks"] - values["true_masks"],
        "kept": 100 * sum(lone) / len(lone) if lone else 0.0,
    }


def _mean_ap(by_class: Mapping[str, float | None], wanted: set[str] | None) -> float:
    known = [ap for name, ap in by_class.items() if ap is not None and (wanted is None or name in wanted)]
    return statistics.fmean(known) if known else math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the parts."""
    parser = argparse.ArgumentParser(description="Divides a gap in mask AP into boxes and masks.")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("full", type=Path, help="detections.json of the run that learned every mask")
    parser.add_argument("row", type=Path, help="detections.json of the run that lacks masks")
    parser.add_argument("--classes", help="names with commas between; default: all")
    given = parser.parse_args(arguments)
    truth = read_truth(given.annotations)
    full, row = (read_detections(path, truth) for path in (given.full, given.row))
    for name, value in gap_parts(truth, full, row, given.classes and given.classes.split(",")).items():
        print(f"{name:<16}{value:8.1f}")


if __name__ == "__main__":
    run_script(main)
