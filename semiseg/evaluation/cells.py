"""The matching of detections and objects cell by cell (one image and one class), by pycocotools' own matching.

A whole evaluation of pycocotools looks at every cell for four ranges of area, and copies all detections before. Here it
is asked for objects of all sizes and only where a cell has objects; in all others nothing can be found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from semiseg.evaluation.precision import DETECTIONS_PER_IMAGE

ALL_AREAS = (0.0, 1e10)  # pixels; COCO's range of all objects

Key = tuple[Any, Any]  # image id, category id


class Cell(NamedTuple):
    """The detections of one image and class, at most 100, in falling order of their scores.

    Attributes:
        numbers: (D,) their places in the results.
        found: (T, D) the annotation that each found at each IoU threshold, crowd among them; 0: none.
        ignored: (T, D) bool, whether what it found is crowd or outside of `ALL_AREAS`.
    """

    numbers: Sequence[int]
    found: NDArray[np.int64]
    ignored: NDArray[np.bool_]


def match_cells(
    truth: COCO, results: Sequence[Mapping[str, Any]], iou_type: str, thresholds: Collection[float]
) -> dict[Key, Cell]:
    """The cells with detections, matched as COCO's evaluation does for objects of all sizes.

    Args:
        truth: from `coco_metrics.load_ground_truth`; for "segm" after `prepare_masks`. Its outlines become RLE masks.
        results: COCO results whose images and categories are the file's; left unchanged.
        iou_type: "bbox" or "segm".
        thresholds: T IoU thresholds.
    """
    evaluation: Any = COCOeval(iouType=iou_type)
    evaluation.params.iouThrs = np.array(thresholds, dtype=np.float64)
    evaluation.params.maxDets = [DETECTIONS_PER_IMAGE]
    objects = _objects(truth, iou_type)
    shape = "segmentation" if iou_type == "segm" else "bbox"
    cells = {}
    for key, numbers in _by_score(results).items():
        if key not in objects:
            size = (len(thresholds), len(numbers))
            cells[key] = Cell(numbers, np.zeros(size, np.int64), np.zeros(size, bool))
            continue
        evaluation._gts[key] = objects[key]
        evaluation._dts[key] = [
            # An area of 0 lies in the range of all areas, as every detection's does.
            {"id": number + 1, "score": results[number]["score"], "area": 0, shape: results[number][shape]}
            for number in numbers
        ]
        evaluation.ious[key] = evaluation.computeIoU(*key)
        matched = evaluation.evaluateImg(*key, ALL_AREAS, DETECTIONS_PER_IMAGE)
        cells[key] = Cell(numbers, matched["dtMatches"].astype(np.int64), matched["dtIgnore"].astype(bool))
    return cells


def counts(annotation: Mapping[str, Any]) -> bool:
    """Whether an object is to be found: it is no crowd and inside of `ALL_AREAS`."""
    return not annotation["iscrowd"] and ALL_AREAS[0] <= annotation["area"] <= ALL_AREAS[1]


def _objects(truth: COCO, iou_type: str) -> dict[Key, list[dict[str, Any]]]:
    """The annotations of every cell, as pycocotools wants them."""
    cells = defaultdict(list)
    for annotation in truth.dataset["annotations"]:
        if annotation["image_id"] in truth.imgs and annotation["category_id"] in truth.cats:
            if iou_type == "segm":
                annotation["segmentation"] = truth.annToRLE(annotation)
            annotation["ignore"] = bool(annotation["iscrowd"])
            cells[annotation["image_id"], annotation["category_id"]].append(annotation)
    return dict(cells)


def _by_score(results: Sequence[Mapping[str, Any]]) -> dict[Key, list[int]]:
    """Places of the best detections of each cell; equal scores in the order given."""
    cells = defaultdict(list)
    for number in sorted(range(len(results)), key=lambda number: -results[number]["score"]):
        cells[results[number]["image_id"], results[number]["category_id"]].append(number)
    return {key: numbers[:DETECTIONS_PER_IMAGE] for key, numbers in cells.items()}
