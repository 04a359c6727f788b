"""Which stored detection found which object: COCO's own matching of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools.coco import COCO

from semiseg.evaluation.cells import match_cells

FOUND_IOU = 0.5  # of the boxes, from which a detection counts as the object's


def box_matches(truth: COCO, results: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """The annotation that each detection found: by score, the best one still free of its image and class.

    It is the matching of pycocotools on boxes at IoU 0.5, so that no object is found twice.

    Args:
        truth: from `coco_metrics.load_ground_truth`.
        results: COCO results; only image_id, category_id, bbox and score are read. Image ids must be the file's.

    Returns:
        one annotation id per detection; None for one without an object, for one that lies on a crowd region, and for
        all after the first 100 of an image and class.
    """
    matches: list[int | None] = [None] * len(results)
    for cell in match_cells(truth, results, "bbox", [FOUND_IOU]).values():
        for number, annotation in zip(cell.numbers, cell.found[0].tolist(), strict=True):
            if annotation and not truth.anns[annotation]["iscrowd"]:
                matches[number] = annotation
    return matches
