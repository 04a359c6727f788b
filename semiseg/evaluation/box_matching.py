"""Which stored detection found which object: COCO's own matching of boxes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from semiseg.evaluation.precision import pycocotools_evaluation

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
    if not results:
        return matches
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools_evaluation(truth, results, "bbox")
        evaluation.params.iouThrs = np.array([FOUND_IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    for image in evaluation.evalImgs:
        if image is None:  # neither objects nor detections of the class
            continue
        for detection, annotation in zip(image["dtIds"], image["dtMatches"][0].astype(int).tolist(), strict=True):
            if annotation and not truth.anns[annotation]["iscrowd"]:
                matches[detection - 1] = annotation  # loadRes numbers the results from 1
    return matches
