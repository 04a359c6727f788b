"""The matching of detections and objects cell by cell (one image and one class), by pycocotools' own matching.

A whole evaluation of pycocotools looks at every cell for four ranges of area, and copies all detections before. Here it
is asked for objects of all sizes and only where a cell has objects; in all others nothing can be found.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from semiseg.evaluation.precision import DETECTIONS_PER_IMAGE, Results

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


def match_cells(truth: COCO, results: Results, iou_type: str, thresholds: Collection[float]) -> dict[Key, Cell]:
    """The cells with detections, matched as COCO's evaluation does for objects of all sizes.

    Args:
        truth: from `coco_metrics.load_ground_truth`; for "segm" after `prepare_masks`. Its outlines become RLE masks.
        results: COCO results whose images and categories are the file's; left unchanged.
        iou_type: "bbox" or "segm".
        thresholds: T IoU thresholds.
    """
    chosen = _by_score(results)
    evaluation = _evaluation(truth, results, chosen, iou_type, thresholds)
    images = defaultdict(list)  # with objects, of each class
    for image, category in chosen.keys() & {(a["image_id"], a["category_id"]) for a in truth.dataset["annotations"]}:
        images[category].append(image)
    matched: dict[Key, Mapping[str, Any]] = {}
    for category, some in images.items():
        evaluation.params.catIds, evaluation.params.imgIds = [category], some
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        matched |= {(cell["image_id"], category): cell for cell in evaluation.evalImgs}
    cells = {}
    for key, numbers in chosen.items():
        size = (len(thresholds), len(numbers))
        found = matched.get(key, {"dtMatches": np.zeros(size), "dtIgnore": np.zeros(size)})
        cells[key] = Cell(numbers, found["dtMatches"].astype(np.int64), found["dtIgnore"].astype(bool))
    return cells


def counts(annotation: Mapping[str, Any]) -> bool:
    """Whether an object is to be found: it is no crowd and inside of `ALL_AREAS`."""
    return not annotation["iscrowd"] and ALL_AREAS[0] <= annotation["area"] <= ALL_AREAS[1]


def _evaluation(
    truth: COCO, results: Results, chosen: Mapping[Key, Sequence[int]], iou_type: str, thresholds: Collection[float]
) -> COCOeval:
    """pycocotools' evaluation of the chosen detections, for objects of all sizes; which cells is still to be said."""
    used = ("image_id", "category_id", "score", "segmentation" if iou_type == "segm" else "bbox")
    predicted = COCO()
    predicted.dataset = {name: truth.dataset[name] for name in ("images", "categories")}
    predicted.dataset["annotations"] = [
        # An area of 0 lies in the range of all areas, as every detection's does.
        {"id": number + 1, "area": 0, **{name: results[number][name] for name in used}}
        for numbers in chosen.values()
        for number in numbers
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        predicted.createIndex()
    evaluation = COCOeval(truth, predicted, iou_type)
    evaluation.params.iouThrs = np.array(thresholds, dtype=np.float64)
    evaluation.params.maxDets = [DETECTIONS_PER_IMAGE]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [list(ALL_AREAS)], ["all"]
    return evaluation


def _by_score(results: Results) -> dict[Key, list[int]]:
    """Places of the best detections of each cell; equal scores in the order given."""
    cells = defaultdict(list)
    for number in sorted(range(len(results)), key=lambda number: -results[number]["score"]):
        cells[results[number]["image_id"], results[number]["category_id"]].append(number)
    return {key: numbers[:DETECTIONS_PER_IMAGE] for key, numbers in cells.items()}
