"""AP of masks by PASCAL VOC's own rules, which BBTP's and SDI's papers count by: beside COCO's numbers, never in them.

Pixels that VOC marks as void count for nobody, and a detection that fits an object marked "difficult" best counts
neither way. AP is the area under the precision, made monotone, over recall; the mean is over classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.errors import UserError

VOC_THRESHOLDS = {"AP25": 0.25, "AP50": 0.5, "AP70": 0.7, "AP75": 0.75}
VOID_KEY = "void"  # of an image of the annotations: an RLE


def voc_metrics(truth: COCO, results: Sequence[Mapping[str, Any]], *, where: Path) -> dict[str, float] | None:
    """AP in percent by the names of `VOC_THRESHOLDS`; None where the annotations say nothing of void pixels, or have
    no object to find.

    Args:
        truth: of a file that `data/voc.py` wrote: objects that are "difficult" are crowd, images have `void`.
        results: COCO results, see `coco_metrics.evaluate_detections`.
        where: the file of `truth`, for a UserError where `void` is no mask.
    """
    if not any(VOID_KEY in image for image in truth.imgs.values()):
        return None
    voids = {image_id: _void(truth, image_id, where) for image_id in truth.imgs}
    objects, found = defaultdict(list), defaultdict(list)
    for each in truth.anns.values():
        if each.get("segmentation"):
            objects[each["image_id"], each["category_id"]].append(each)
    for result in results:
        found[result["image_id"], result["category_id"]].append(result)
    judged: defaultdict[int, list[tuple[float, np.ndarray, np.ndarray]]] = defaultdict(list)
    for image_id, category_id in found:
        own = sorted(found[image_id, category_id], key=lambda result: -result["score"])
        there = objects.get((image_id, category_id), [])
        ious = _ious(own, [truth.annToRLE(each) for each in there], voids[image_id])
        hits, counted = _judge(ious, np.array([bool(each["iscrowd"]) for each in there]))
        judged[category_id] += zip((result["score"] for result in own), hits, counted, strict=True)
    numbers: dict[int, int] = defaultdict(int)
    for (_, category_id), there in objects.items():
        numbers[category_id] += sum(not each["iscrowd"] for each in there)
    classes = [category_id for category_id, number in numbers.items() if number]
    if not classes:
        return None
    ap = np.array([_areas(judged[key], numbers[key]) for key in classes]).reshape(-1, len(VOC_THRESHOLDS))
    return {name: round(100 * float(value), 10) for name, value in zip(VOC_THRESHOLDS, ap.mean(0), strict=True)}


def _void(truth: COCO, image_id: int, where: Path) -> dict[str, Any] | None:
    """The RLE of an image's void pixels, of whatever form of COCO's they are; None where nothing is said of them."""
    image = truth.imgs[image_id]
    value = image.get(VOID_KEY)
    if value is None:
        return None
    size_hw = [image["height"], image["width"]]
    with suppress(AttributeError, LookupError, TypeError, ValueError):
        mask: dict[str, Any] = truth.annToRLE({"image_id": image_id, "segmentation": value})
        if rle.decode(mask).shape == tuple(size_hw):
            return mask
    raise UserError(f"{where}: image {image_id}: {VOID_KEY!r} is no mask, allowed: an RLE of size {size_hw}")


def _ious(own: Sequence[Mapping[str, Any]], there: Sequence[Any], void: dict[str, Any] | None) -> np.ndarray:
    """(D, G) of the detections' masks, without void pixels, and the objects'."""
    masks = [dict(result["segmentation"]) for result in own]
    if void is not None:
        clear = rle.encode(np.asfortranarray(1 - rle.decode(void)))
        masks = [rle.merge([mask, clear], intersect=True) for mask in masks]
    if not there:
        return np.zeros((len(masks), 0))
    ious: np.ndarray = np.asarray(rle.iou(masks, list(there), [0] * len(there))).reshape(len(masks), len(there))
    return ious


def _judge(ious: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D, T) whether each detection, the best first, is a hit at each threshold, and (D, T) whether it counts."""
    thresholds = np.array(list(VOC_THRESHOLDS.values()))
    hits, counted = np.zeros((len(ious), len(thresholds)), bool), np.ones((len(ious), len(thresholds)), bool)
    taken = np.zeros((ious.shape[1], len(thresholds)), bool)
    for number in range(len(ious) if ious.shape[1] else 0):
        best = int(ious[number].argmax())
        fits = ious[number, best] >= thresholds
        if difficult[best]:
            counted[number] = ~fits
        else:
            hits[number] = fits & ~taken[best]
            taken[best] |= fits
    return hits, counted


def _areas(judged: list[tuple[float, np.ndarray, np.ndarray]], objects: int) -> list[float]:
    """AP of one class at each threshold."""
    ordered = sorted(judged, key=lambda each: -each[0])
    areas = []
    for threshold in range(len(VOC_THRESHOLDS)):
        hits = np.array([hit[threshold] for _, hit, counted in ordered if counted[threshold]], dtype=bool)
        recall = np.concatenate([[0.0], np.cumsum(hits) / objects, [1.0]])
        precision = np.concatenate([[0.0], np.cumsum(hits) / np.arange(1, len(hits) + 1), [0.0]])
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append(float(np.sum(np.diff(recall) * precision[1:])))
    return areas
