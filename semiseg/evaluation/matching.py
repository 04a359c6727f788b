"""The matching of one run's detections, done once by pycocotools, and from it AP of resampled images.

Whether a detection is a true positive depends on its own image alone; images meet only where precision and recall are
counted over detections in the order of their scores. So the matching is kept, and AP is counted anew for images that
occur several times or not at all: the bootstrap over images (Efron, "Bootstrap methods: another look at the
jackknife", 1979). All rows see the same resamples, so that differences of rows are differences on the same images.
1 000 resamples of COCO's size take 9 s of one core for one run (`tests.test_bootstrap.measure_coco_size`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO

from semiseg.evaluation.precision import Results, coco_evaluation, names_of_classes
from semiseg.results import MAX_DETS

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # to the bit as pycocotools has them
_RECALLS = np.linspace(0.0, 1.0, 101)
RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)  # the 95 % interval
_BLOCK_ELEMENTS = 400_000  # of the largest array, resamples x detections: it stays in the cache

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """The detections of one class, at most `max_dets` of an image, in falling order of their scores."""

    image: Counts  # (D,) whose they are: numbers of images in the order of their ids
    matched: NDArray[np.bool_]  # (T, D) bool, whether an object was found at an IoU threshold, crowd among them
    # (T, D) bool, whether it counts neither as found nor as wrong: it was matched with crowd
    ignored: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Matches:
    """The matching of one run, for one IoU type and objects of all sizes."""

    classes: tuple[str, ...]  # names in the order of the category ids
    detections: tuple[ClassMatches, ...]  # of every class
    positives: Counts  # (C, N) objects that are not crowd, by class and image

    def __post_init__(self) -> None:
        for name, detections, objects in zip(self.classes, self.detections, self.positives, strict=True):
            for true in detections.matched & ~detections.ignored:
                if (np.bincount(detections.image[true], minlength=self.images) > objects).any():
                    raise ValueError(f"class {name!r} has more true positives than objects in an image")

    @property
    def images(self) -> int:
        """The number of images, N."""
        return int(self.positives.shape[1])


def match_cells(
    truth: COCO, results: Results, iou_type: str, thresholds: Collection[float], *, max_dets: int = MAX_DETS
) -> list[Mapping[str, Any]]:
    """COCOeval's `evalImgs` for objects of all sizes, of each class and image that has objects or detections.

    Detections are the best `max_dets` in falling order of their scores; those with `dtIds` 1, 2, ... are the results.

    Args:
        truth: from `coco_metrics.load_ground_truth`; for "segm" after `prepare_masks`. Its outlines become RLE masks.
        results: COCO results whose images and categories are the file's; left unchanged.
        iou_type: "bbox" or "segm".
        max_dets: as the run was measured, `Metrics.max_dets`.
    """
    evaluation = coco_evaluation(truth, results, iou_type, max_dets=max_dets)
    evaluation.params.iouThrs = np.array(thresholds, dtype=np.float64)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return [cell for cell in evaluation.evalImgs if cell is not None]


def match(truth: COCO, results: Results, iou_type: str, *, max_dets: int = MAX_DETS) -> Matches:
    """Matches detections and objects as COCO's evaluation does; arguments as of `match_cells`."""
    images, categories = sorted(truth.imgs), sorted(truth.cats)
    if not images or not categories:
        raise ValueError("a ground truth without images or classes has no matching")
    columns = {image: index for index, image in enumerate(images)}
    positives = np.zeros((len(categories), len(images)), np.int64)
    cells: dict[Any, list[Mapping[str, Any]]] = {category: [] for category in categories}
    for cell in match_cells(truth, results, iou_type, _THRESHOLDS, max_dets=max_dets):
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


def average_precision(matches: Matches) -> Numbers:
    """(C, T): AP in percent by class and IoU threshold, as pycocotools counts it; NaN for a class without objects."""
    once = np.ones((1, matches.images), np.int64)
    by_class = zip(matches.detections, matches.positives, strict=True)
    return np.concatenate([class_average_precision(detections, positives, once) for detections, positives in by_class])


def class_average_precision(detections: ClassMatches, positives: Counts, weights: Counts) -> Numbers:
    """AP of one class in percent, for images that occur several times or not at all.

    It is pycocotools' number for a data set in which the images lie that often, with a repeated image's detections one
    after the other. In a data set on disk that holds only if no two detections of a class have one score: among equal
    ones pycocotools goes through image by image, so that the repetitions of two images would alternate.

    Args:
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
) -> Numbers:
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


def resampled_images(images: int, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """(resamples, images): how often each image occurs in each resample; the same for the same arguments."""
    random = np.random.default_rng(seed)
    drawn = (random.integers(images, size=images) for _ in range(resamples))
    counts = [np.bincount(chosen, minlength=images) for chosen in drawn]
    return np.array(counts, np.int64).reshape(resamples, images)


def class_bootstrap(matches: Matches, *, resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """(resamples, C): mean AP of every class over IoU thresholds, percent; NaN where a resample has no object."""
    weights = resampled_images(matches.images, resamples=resamples, seed=seed)
    numbers = np.empty((resamples, len(matches.classes)))
    for column, (detections, positives) in enumerate(zip(matches.detections, matches.positives, strict=True)):
        numbers[:, column] = class_average_precision(detections, positives, weights).mean(axis=1)
    return numbers


def means_of_groups(by_class: Numbers, classes: Sequence[str], groups: Sequence[Collection[str]]) -> Numbers:
    """(resamples, groups): means of `class_bootstrap` over groups of its classes; NaN where none has an object."""
    unknown = sorted({name for group in groups for name in group} - set(classes))
    if unknown:
        raise ValueError(f"class {unknown[0]!r} was not matched; matched: {', '.join(classes)}")
    member = np.array([[name in group for name in classes] for group in groups], bool).reshape(len(groups), -1)
    counts = (~np.isnan(by_class)).astype(float) @ member.T
    totals = np.nan_to_num(by_class) @ member.T
    means: Numbers = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return means


def percentile_interval(samples: Numbers) -> Interval | None:
    """The 95 % percentile interval of one number over resamples; None if no resample has it."""
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return None
    low, high = np.percentile(finite, PERCENTILES)
    return float(low), float(high)
