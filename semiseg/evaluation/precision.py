"""The precision array of a COCO evaluation: by pycocotools, which defines the numbers, or by hotcoco, which is fast.

hotcoco (the extra `fast`) matches and accumulates in compiled code. What depends on rounding or on the oddities of a
file is left to pycocotools: outlines become masks by its own code, and hotcoco sees clean columns alone, in which
images, classes and annotations are numbered from 1 in the order of their ids. Before hotcoco's numbers are used, both
evaluate some of the images at hand and must agree to the last bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from semiseg.errors import UserError
from semiseg.results import MAX_DETS
from semiseg.splits import normalise

Backend = Literal["pycocotools", "hotcoco"]
Results = Sequence[Mapping[str, Any]]
Precision = NDArray[np.float64]

AREA_LIMITS = (32.0**2, 96.0**2)  # COCO's, between small, medium and large objects
CHECKED_IMAGES = 8  # at most, and at most one in 20: pycocotools' share of the time stays small


def require_backend(backend: Backend) -> None:
    """A `UserError` unless the backend is installed; to be called before work whose end needs it."""
    if backend == "hotcoco" and importlib.util.find_spec("hotcoco") is None:
        raise UserError(
            "the fast evaluation needs the package hotcoco: pip install 'semiseg[fast]', or leave it out "
            "(no --fast, runtime.fast_evaluation = false)"
        )


def coco_precision(
    truth: COCO,
    results: Results,
    iou_type: str,
    *,
    backend: Backend = "pycocotools",
    area_limits: tuple[float, float] = AREA_LIMITS,
    max_dets: int = MAX_DETS,
) -> Precision:
    """The precision of one quiet evaluation with the best `max_dets` detections of each image and class.

    Args:
        truth: from `coco_metrics.load_ground_truth`; with "segm" its outlines are replaced by RLE masks.
        results: COCO results with boxes and masks; left unchanged.
        iou_type: "bbox" or "segm". Masks go into the area ranges by their own area, not by their boxes'.
        backend: "hotcoco" gives the same array, and a `UserError` where a part of the images shows that it does not.
        area_limits: areas in pixels up to which an object is small and from which it is large; one at a limit is both.

    Returns:
        (T IoU thresholds, R recalls, C classes by id, A areas, 1) in 0..1; -1 without ground truth of the area.
    """
    images = sorted(truth.imgs)
    if backend == "pycocotools":
        return _pycocotools_precision(truth, results, iou_type, images, area_limits, max_dets)
    require_backend(backend)
    _check_equal(truth, results, iou_type, images, area_limits, max_dets)
    return _hotcoco_precision(truth, results, iou_type, images, area_limits, max_dets)


def names_of_classes(truth: COCO) -> list[str]:
    """Names of the labels 0..C-1, that is of the categories in the order of their ids."""
    return [normalise(str(truth.cats[key]["name"])) for key in sorted(truth.cats)]


def coco_evaluation(truth: COCO, results: Results, iou_type: str, *, max_dets: int) -> COCOeval:
    """pycocotools' evaluation, not started yet, of `max_dets` per image and class; ids of results are 1, 2, ..."""
    # With boxes beside the masks loadRes would take the boxes' areas.
    hidden = "bbox" if iou_type == "segm" else "segmentation"
    detections = [{key: value for key, value in result.items() if key != hidden} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            predicted = truth.loadRes(detections)
        else:  # loadRes looks at the first result
            predicted = COCO()
            predicted.dataset = {**truth.dataset, "annotations": []}
            predicted.createIndex()
        evaluation = COCOeval(truth, predicted, iou_type)
    evaluation.params.maxDets = [max_dets]  # those with 1 and 10 are for recalls, which nobody reads
    return evaluation


def _precision(evaluation: Any, area_limits: tuple[float, float], max_dets: int) -> Precision:
    """That of an evaluation of either package, quietly."""
    evaluation.params.maxDets = [max_dets]
    (smallest, largest), (small, large) = evaluation.params.areaRng[0], area_limits
    evaluation.params.areaRng = [[smallest, largest], [smallest, small], [small, large], [large, largest]]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision: Precision = evaluation.eval["precision"]
    return precision


def _pycocotools_precision(
    truth: COCO,
    results: Results,
    iou_type: str,
    image_ids: Sequence[Any],
    area_limits: tuple[float, float],
    max_dets: int,
) -> Precision:
    evaluation = coco_evaluation(truth, results, iou_type, max_dets=max_dets)
    evaluation.params.imgIds = image_ids
    return _precision(evaluation, area_limits, max_dets)


def _hotcoco_precision(
    truth: COCO,
    results: Results,
    iou_type: str,
    image_ids: Sequence[Any],
    area_limits: tuple[float, float],
    max_dets: int,
) -> Precision:
    import hotcoco

    images = {image: index for index, image in enumerate(image_ids, start=1)}
    classes = {category: index for index, category in enumerate(sorted(truth.cats), start=1)}
    masks = [r["segmentation"] for r in results] if iou_type == "segm" else None
    objects = _truth_columns(truth, images, classes, masks=masks is not None)
    table = np.array(
        [(images[r["image_id"]], *r["bbox"], r["score"], classes[r["category_id"]]) for r in results], dtype=np.float64
    ).reshape(-1, 7)  # the columns of loadRes
    predicted = objects.load_res(table, segmentation=masks)
    if masks is not None:
        areas = np.asarray(hotcoco.mask.area(masks), dtype=np.float64).reshape(-1)
        predicted.update_anns(ids=np.arange(1, len(masks) + 1), area=areas)  # it had the boxes' areas
    return _precision(hotcoco.COCOeval(objects, predicted, iou_type), area_limits, max_dets)


def _truth_columns(truth: COCO, images: Mapping[Any, int], classes: Mapping[Any, int], *, masks: bool) -> Any:
    """The ground truth as hotcoco's data set: annotations of these images and of the classes that the file lists."""
    import hotcoco

    annotations = [a for a in truth.dataset["annotations"] if a["image_id"] in images and a["category_id"] in classes]
    sizes = {number: truth.imgs[image] for image, number in images.items()}
    return hotcoco.COCO.from_arrays(
        [{"id": number, "height": image["height"], "width": image["width"]} for number, image in sizes.items()],
        [{"id": number, "name": str(number)} for number in classes.values()],
        np.array([images[a["image_id"]] for a in annotations], dtype=np.int64),
        np.array([classes[a["category_id"]] for a in annotations], dtype=np.int64),
        np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        ids=np.arange(1, len(annotations) + 1),
        area=np.array([a["area"] for a in annotations], dtype=np.float64),
        iscrowd=np.array([int(a["iscrowd"]) for a in annotations], dtype=np.int64),
        segmentation=[truth.annToRLE(a) for a in annotations] if masks else None,
    )


def _check_equal(
    truth: COCO, results: Results, iou_type: str, images: Sequence[Any], area_limits: tuple[float, float], max_dets: int
) -> None:
    """Compares both on some of the images, evenly spread over the file."""
    checked = images[:: max(20, -(-len(images) // CHECKED_IMAGES))]
    detections = [result for result in results if result["image_id"] in checked]
    both = (_hotcoco_precision, _pycocotools_precision)
    fast, official = (each(truth, detections, iou_type, checked, area_limits, max_dets) for each in both)
    if not np.array_equal(fast, official):
        raise UserError(
            f"hotcoco {version('hotcoco')} and pycocotools {version('pycocotools')} give different {iou_type} numbers "
            f"for {len(checked)} of the images; evaluate without it (no --fast, runtime.fast_evaluation = false)"
        )
