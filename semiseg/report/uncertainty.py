"""How far the numbers of a report can be trusted: AP of resampled validation images, from matchings done once.

Everything goes through the measurements that lie beside the report, so that a page can be rebuilt where the detections
are gone. What cannot be measured is None, and the page says less.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from semiseg.evaluation.matching import (
    RESAMPLES,
    Interval,
    Numbers,
    average_precision,
    class_bootstrap,
    means_of_groups,
    percentile_interval,
)
from semiseg.report.aggregate import NEITHER, UPPER_BOUND, ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.results import Result

_VERSION = 1  # of the intervals that are kept; another one measures anew


def thresholds_of(page: PageContext, result: Result) -> dict[str, list[float | None]] | None:
    """Mask AP of a run in percent, class -> at IoU 0.5, 0.55, ... 0.95 (`matching.IOU_THRESHOLDS`).

    An AP is None for a class without objects, the whole where it cannot be measured.
    """

    def measure() -> dict[str, dict[str, list[float | None]]] | None:
        matches = page.stored.matches(result)
        if matches is None:
            return None
        lines = zip(matches.classes, average_precision(matches).tolist(), strict=True)
        return {
            "segm": {name: [None if math.isnan(value) else round(value, 3) for value in line] for name, line in lines}
        }

    return (page.measured.get("thresholds", result.trained_as, measure) or {}).get("segm")


def with_image_intervals(page: PageContext) -> list[TableNumbers]:
    """The tables of a page with the 95 % intervals of their numbers over validation images, as far as measurable."""
    resampled: dict[str, Numbers] = {}
    return [_Resamples(page, numbers.table, resampled).added_to(numbers) for numbers in page.tables]


class _Resamples:
    """The runs of one table on the same resampled images: APs are means over seeds within each resample."""

    def __init__(self, page: PageContext, table: ReportTable, resampled: dict[str, Numbers]) -> None:
        """`resampled`: `Result.trained_as` -> (resamples, C) AP of every class; shared between tables."""
        self._page, self._groups, self._resampled = page, table.groups, resampled
        self._runs: dict[str, dict[int, Result]] = {row.name: {} for row in table.rows}
        for row, seed, run in page.report.cells(table):
            self._runs[row][seed] = run
        digest = hashlib.sha256(json.dumps(self._groups).encode()).hexdigest()[:12]
        self._settings = f"v{_VERSION}, {RESAMPLES} resamples, classes {digest}"

    def added_to(self, numbers: TableNumbers) -> TableNumbers:
        intervals: dict[tuple[str, ...], Mapping[str, Interval]] = {(row,): self._kept((row,)) for row in self._runs}
        if not any(intervals.values()):
            return numbers
        for first, second in combinations(self._runs, 2):
            intervals[first, second] = self._kept((second, first))
            intervals[second, first] = {group: (-high, -low) for group, (low, high) in intervals[first, second].items()}
        if "unseen" in self._groups and {NEITHER, UPPER_BOUND} <= set(self._runs):
            for row in self._runs.keys() - {NEITHER, UPPER_BOUND}:
                intervals[row, NEITHER, UPPER_BOUND] = self._kept((row, NEITHER, UPPER_BOUND))
        return replace(numbers, intervals=intervals)

    def _kept(self, rows: Sequence[str]) -> Mapping[str, Interval]:
        """Group -> interval of a row, of the difference of two, or of the share of the gap; empty if not measurable."""
        seeds = sorted(set.intersection(*(set(self._runs[row]) for row in rows)))
        if not seeds:
            return {}
        ids = [[self._runs[row][seed].trained_as for seed in seeds] for row in rows]
        key = f"{self._settings}: {' - '.join('+'.join(own) for own in ids)}"
        kept = self._page.measured.get("bootstrap", key, lambda: self._measure(rows, seeds))
        return {group: (low, high) for group, (low, high) in (kept or {}).items()}

    def _measure(self, rows: Sequence[str], seeds: Sequence[int]) -> Mapping[str, list[float]] | None:
        samples = []
        for row in rows:
            by_seed = [self._samples(self._runs[row][seed]) for seed in seeds]
            measured = [numbers for numbers in by_seed if numbers is not None]
            if len(measured) < len(by_seed):
                return None
            samples.append(np.mean(measured, axis=0))
        numbers = samples[0]
        if len(rows) == 2:
            numbers = samples[0] - samples[1]
        elif len(rows) == 3:
            numbers = _share(*samples)
        intervals = {group: percentile_interval(numbers[:, column]) for column, group in enumerate(self._groups)}
        return {group: [round(end, 3) for end in ends] for group, ends in intervals.items() if ends is not None}

    def _samples(self, result: Result) -> Numbers | None:
        """(resamples, groups) of one run."""
        matches = self._page.stored.matches(result)
        if matches is None or not set(self._groups["all"]) <= set(matches.classes):
            return None
        key = result.trained_as
        if key not in self._resampled:
            self._resampled[key] = class_bootstrap(matches)
        return means_of_groups(self._resampled[key], matches.classes, list(self._groups.values()))


def _share(row: Numbers, start: Numbers, goal: Numbers) -> Numbers:
    """Percent of the gap that a row closes, by resample and group; NaN in groups whose gap is not resolved.

    A share of a gap that may be nothing or negative is any number.
    """
    gap = goal - start
    lowest = [percentile_interval(gap[:, column]) for column in range(gap.shape[1])]
    resolved = np.array([ends is not None and ends[0] > 0 for ends in lowest])
    return np.divide(100 * (row - start), gap, out=np.full_like(gap, np.nan), where=resolved & (gap != 0))
