"""How much AP depends on which images were looked at: the bootstrap over images, paired over rows.

Efron, "Bootstrap methods: another look at the jackknife", 1979. A resample draws as many images as there are, with
replacement, and AP is counted anew from the matchings of `evaluation/matching.py`; nothing is matched again. All rows
see the same resamples, so that differences of rows are differences on the same images.

What it costs: 1 000 resamples of 5 000 images with 100 detections each, 500 000 in all, of 80 classes with 36 000
objects take 9 s of one core for one run (`python -c "import tests.test_bootstrap as t; t.measure_coco_size()"`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from semiseg.evaluation.matching import Matches, class_average_precision

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)  # the 95 % interval

Interval = tuple[float, float]
Numbers = NDArray[np.float64]


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
    """Means over groups of classes, of the classes with objects in the resample.

    Args:
        by_class: (resamples, C) from `class_bootstrap`.
        classes: the C names. groups: names among them.

    Returns:
        (resamples, groups); NaN where no class of the group has an object.
    """
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


def leaves_out_zero(interval: Interval) -> bool:
    """Whether a difference with this interval is resolved."""
    return not interval[0] <= 0 <= interval[1]
