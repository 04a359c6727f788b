"""What a detector's boxes and what its masks cost in mask AP: masks exchanged between stored detections.

No detection is invented: every one that is evaluated has image, class, box and score of a stored one, and either its
own mask, that of the object it found, or that of another row's detection of the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.box_matching import FOUND_IOU, box_matches
from semiseg.evaluation.matching import average_precision, match

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
