"""The difference of two rows, and whether it is resolved: over seeds by Student's t, over images by the bootstrap.

Everything is in percent AP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
from scipy.special import stdtrit  # scipy.stats.t.ppf, without the second that scipy.stats takes to load

from semiseg.evaluation.bootstrap import Interval, leaves_out_zero

_RESOLVES_NOTHING = {1: "one seed cannot resolve small differences", 2: "two seeds have no interval"}


@dataclass(frozen=True)
class Difference:
    """`second` minus `first` in one metric, seed by seed.

    Attributes:
        values: one difference per seed measured for both rows.
        image_interval: 95 % interval of the mean over resampled validation images, for the networks as they are; None
            where it was not measured.
    """

    first: str
    second: str
    group: str
    values: tuple[float, ...]
    image_interval: Interval | None = None

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for fewer than two."""
        return float(pd.Series(self.values).std(ddof=1)) if len(self.values) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the mean over seeds by Student's t; None for fewer than three seeds."""
        mean, std, count = self.mean, self.std, len(self.values)
        if mean is None or std is None or count < 3:
            return None
        half = float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count)
        return mean - half, mean + half

    @property
    def unresolved_over(self) -> tuple[str, ...]:
        """What the intervals that contain 0 are over: "seeds", "images", both or nothing."""
        intervals = {"seeds": self.interval, "images": self.image_interval}
        return tuple(name for name, ends in intervals.items() if ends is not None and not leaves_out_zero(ends))

    @property
    def resolved(self) -> bool | None:
        """Whether every interval that there is leaves out 0; None when there is none.

        With fewer than three seeds the interval over images stands alone, and what it resolves it resolves for these
        networks only.
        """
        if self.interval is None and self.image_interval is None:
            return None
        return not self.unresolved_over

    @property
    def reading(self) -> str:
        """What one may conclude from it."""
        count = len(self.values)
        if count == 0:
            return "not measured"
        if self.resolved is None:
            return f"{_RESOLVES_NOTHING[count]}: no claim"
        if not self.resolved:
            return f"not resolved over {' and '.join(self.unresolved_over)}"
        direction = "higher" if (self.mean or 0) > 0 else "lower"
        if self.interval is None:
            return f"resolved over images only: {direction}"
        return f"resolved: {direction}"


def difference(measured: pd.DataFrame, first: str, second: str, *, group: str) -> Difference:
    """Paired over the seeds that both rows have; `measured` is from `aggregate.measurements`."""
    values = measured.pivot(index="seed", columns="row", values=f"{group}_AP")
    if first not in values or second not in values:
        return Difference(first, second, group, ())
    return Difference(first, second, group, tuple((values[second] - values[first]).dropna()))


@dataclass(frozen=True)
class ImageIntervals:
    """95 % intervals over resampled validation images, of one table.

    Attributes:
        images, resamples: how many.
        cells: (row, group) -> of the mean AP over seeds.
        differences: (first, second, group) -> of the mean of second minus first over the seeds that both have, for
            every two rows in both orders.
        shares: row -> of the percentage of the gap that it closes, where the gap itself is resolved over images.
    """

    images: int
    resamples: int
    cells: Mapping[tuple[str, str], Interval]
    differences: Mapping[tuple[str, str, str], Interval]
    shares: Mapping[str, Interval]

    def beside(self, item: Difference) -> Difference:
        """The same difference with its interval over images, if there is one."""
        return replace(item, image_interval=self.differences.get((item.first, item.second, item.group)))
