"""The matching of one run's detections, done once by pycocotools, and from it AP for any weights of the images.

Whether a detection is a true positive depends on its own image alone; images meet only where precision and recall are
counted over detections in the order of their scores. So the matching is kept, and AP is counted anew for images that
occur several times or not at all (`evaluation/bootstrap.py`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools.coco import COCO

from semiseg.evaluation.coco_metrics import names_of_classes
from semiseg.evaluation.precision import Results, coco_evaluation

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # to the bit as pycocotools has them
_RECALLS = np.linspace(0.0, 1.0, 101)
_BLOCK_ELEMENTS = 400_000  # of the largest array, resamples x detections: it stays in the cache

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """The detections of one class, at most 100 of an image, in falling order of their scores.

    Attributes:
        image: (D,) whose they are: numbers of images in the order of their ids.
        matched: (T, D) bool, whether an object was found at an IoU threshold, crowd among them.
        ignored: (T, D) bool, whether it counts neither as found nor as wrong: it was matched with crowd.
    """

    image: Counts
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]

    def __post_init__(self) -> None:
        expected = (len(IOU_THRESHOLDS), len(self.image))
        if self.image.ndim != 1 or self.matched.shape != expected or self.ignored.shape != expected:
            shapes = (self.image.shape, self.matched.shape, self.ignored.shape)
            raise ValueError(f"image (D,), matched and ignored {expected} are needed, not {shapes}")
        if (self.ignored & ~self.matched).any():
            raise ValueError("a detection is ignored without a match")


@dataclass(frozen=True, eq=False)
class Matches:
    """The matching of one run, for one IoU type and objects of all sizes.

    Attributes:
        classes: names in the order of the category ids.
        detections: of every class.
        positives: (C, N) objects that are not crowd, by class and image.
    """

    classes: tuple[str, ...]
    detections: tuple[ClassMatches, ...]
    positives: Counts

    def __post_init__(self) -> None:
        if len(self.detections) != len(self.classes) or self.positives.shape[:1] != (len(self.classes),):
            raise ValueError(
                f"{len(self.classes)} classes, detections of {len(self.detections)}, positives {self.positives.shape}"
            )
        if self.positives.ndim != 2 or (self.positives < 0).any():
            raise ValueError("positives are counts by class and image")
        for name, detections, objects in zip(self.classes, self.detections, self.positives, strict=True):
            image = detections.image
            if image.size and not 0 <= image.min() <= image.max() < self.images:
                raise ValueError(f"class {name!r} has detections of images beyond 0..{self.images - 1}")
            for true in detections.matched & ~detections.ignored:
                if (np.bincount(image[true], minlength=self.images) > objects).any():
                    raise ValueError(f"class {name!r} has more true positives than objects in an image")

    @property
    def images(self) -> int:
        """The number of images, N."""
        return int(self.positives.shape[1])


def match_cells(truth: COCO, results: Results, iou_type: str, thresholds: Collection[float]) -> list[Mapping[str, Any]]:
    """COCOeval's `evalImgs` for objects of all sizes, of each class and image that has objects or detections.

    Detections are the best 100 in falling order of their scores; those with `dtIds` 1, 2, ... are the results.

    Args:
        truth: from `coco_metrics.load_ground_truth`; for "segm" after `prepare_masks`. Its outlines become RLE masks.
        results: COCO results whose images and categories are the file's; left unchanged.
        iou_type: "bbox" or "segm".
        thresholds: T IoU thresholds.
    """
    evaluation = coco_evaluation(truth, results, iou_type)
    evaluation.params.iouThrs = np.array(thresholds, dtype=np.float64)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return [cell for cell in evaluation.evalImgs if cell is not None]


def match(truth: COCO, results: Results, iou_type: str) -> Matches:
    """Matches detections and objects as COCO's evaluation does; arguments as of `match_cells`."""
    images, categories = sorted(truth.imgs), sorted(truth.cats)
    if not images or not categories:
        raise ValueError("a ground truth without images or classes has no matching")
    columns = {image: index for index, image in enumerate(images)}
    positives = np.zeros((len(categories), len(images)), np.int64)
    cells: dict[Any, list[Mapping[str, Any]]] = {category: [] for category in categories}
    for cell in match_cells(truth, results, iou_type, _THRESHOLDS):
        cells[cell["category_id"]].append(cell)
    detections = []
    for own, counts in zip(cells.values(), positives, strict=True):
        for cell in own:
            counts[columns[cell["image_id"]]] = np.count_nonzero(cell["gtIgnore"] == 0)
        detections.append(_class_matches(own, columns))
    return Matches(tuple(names_of_classes(truth)), tuple(detections), positives)


def _class_matches(cells: Sequence[Mapping[str, Any]], columns: Mapping[Any, int]) -> ClassMatches:
    """Puts together the cells of a class in the order of pycocotools."""
    nothing = np.zeros((len(IOU_THRESHOLDS), 0), bool)
    scores = np.array([score for cell in cells for score in cell["dtScores"]], dtype=np.float64)
    order = np.argsort(-scores, kind="mergesort")
    image = np.array([columns[cell["image_id"]] for cell in cells for _ in cell["dtIds"]], dtype=np.int64)
    matched = np.concatenate([nothing, *(cell["dtMatches"] > 0 for cell in cells)], axis=1)
    ignored = np.concatenate([nothing, *(cell["dtIgnore"].astype(bool) for cell in cells)], axis=1)
    return ClassMatches(image[order], matched[:, order], ignored[:, order])


def average_precision(matches: Matches, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """AP in percent by class and IoU threshold.

    Args:
        matches: of one run.
        weights: (N,) or (B, N) whole numbers: how often each image occurs. None: once.

    Returns:
        (C, T), or (B, C, T); NaN where the class has no object in the images that occur. It is pycocotools' number for
        a data set in which the images lie that often, with a repeated image's detections one after the other. In a
        data set on disk that holds only if no two detections of a class have one score: among equal ones pycocotools
        goes through image by image, so that the repetitions of two images would alternate.
    """
    counts = np.ones(matches.images, np.int64) if weights is None else np.asarray(weights)
    if counts.shape[-1:] != (matches.images,) or counts.ndim > 2 or (counts < 0).any() or counts.dtype.kind not in "iu":
        raise ValueError(f"weights are whole numbers, (N,) or (B, N) with N = {matches.images}, not {counts.shape}")
    rows = np.atleast_2d(counts).astype(np.int64)
    by_class = [
        class_average_precision(detections, positives, rows)
        for detections, positives in zip(matches.detections, matches.positives, strict=True)
    ]
    numbers = np.stack(by_class, axis=1)
    return numbers if counts.ndim == 2 else numbers[0]


def class_average_precision(detections: ClassMatches, positives: Counts, weights: Counts) -> NDArray[np.float64]:
    """AP of one class in percent.

    Args:
        detections: D of them.
        positives: (N,) objects of the class.
        weights: (B, N) how often each image occurs.

    Returns:
        (B, T); NaN without an object. Precision is highest at true positives, so that it is looked at only there:
        (true positives so far) / (detections so far that are not ignored), then from each on the highest to come, once
        for every recall threshold 0, 0.01, ... 1 that this true positive is the first to reach.
    """
    true = [np.flatnonzero(row) for row in detections.matched & ~detections.ignored]
    ignored = [np.flatnonzero(row) for row in detections.ignored]
    step = max(1, _BLOCK_ELEMENTS // max(1, len(detections.image)))
    blocks = [
        _block_precision(detections.image, true, ignored, weights[start : start + step], positives)
        for start in range(0, len(weights), step)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, len(IOU_THRESHOLDS)))


def _block_precision(
    image: Counts, true: Sequence[Counts], ignored: Sequence[Counts], weights: Counts, positives: Counts
) -> NDArray[np.float64]:
    objects = weights @ positives
    reached = _recalls_reached(objects)
    so_far = np.cumsum(weights[:, image], axis=1)
    numbers = np.zeros((len(weights), len(true)))
    for threshold, (hits, skipped) in enumerate(zip(true, ignored, strict=True)):
        if not hits.size:
            continue
        so_far_true = np.cumsum(weights[:, image[hits]], axis=1)
        counted = so_far[:, hits]
        if skipped.size:
            out = np.cumsum(weights[:, image[skipped]], axis=1)
            before = np.searchsorted(skipped, hits)
            counted -= np.where(before > 0, out[:, before - 1], 0)
        precision = so_far_true / (counted + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recalls = np.take_along_axis(reached, so_far_true, axis=1)
        first = np.diff(recalls, axis=1, prepend=0)
        numbers[:, threshold] = 100 * np.einsum("bp,bp->b", highest, first) / len(_RECALLS)
    numbers[objects == 0] = np.nan
    return numbers


def _recalls_reached(objects: Counts) -> Counts:
    """(B, max + 1): recall thresholds that k of a resample's objects reach, k = 0, 1, ... (as pycocotools divides)."""
    whole = np.maximum(objects, 1)[:, None]
    needed = np.ceil(_RECALLS * whole).astype(np.int64)
    # Rounding may put the product on the other side of a whole number than the quotient that pycocotools compares.
    needed -= (needed > 0) & ((needed - 1) / whole >= _RECALLS)
    needed += needed / whole < _RECALLS
    size = int(whole.max()) + 1
    places = needed + size * np.arange(len(objects))[:, None]
    return np.bincount(places.ravel(), minlength=size * len(objects)).reshape(len(objects), size).cumsum(axis=1)
