"""How the pixels of image files are meant: which stored values are black and white, and which side is up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from semiseg.errors import UserError

FEW_GREYS = 64  # of 256: what 14 of 16 bits leave
BITS = 2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1  # white of the usual cameras


@dataclass(frozen=True)
class Reading:
    """How image files become RGB uint8.

    value_range: the stored values that become 0 and 255, of files with more than 8 bits a channel; those between go
        linearly, those beyond are clipped, what is no number becomes 0. None: 0 to 65535 of integers, upper 8 bits
        kept, and no floating-point numbers, of which nothing says what is white.
    upright: apply the EXIF orientation, as viewers do: boxes and masks are then in the frame of the upright image.

    A UserError if black is not below white.
    """

    value_range: tuple[float, float] | None = None
    upright: bool = False

    def __post_init__(self) -> None:
        if self.value_range is not None and (wrong := wrong_range(self.value_range)):
            raise UserError(f"value range {wrong}")

    def or_else(self, other: Reading) -> Reading:
        """This one, where it says something, and else another."""
        return Reading(self.value_range or other.value_range, self.upright or other.upright)


AS_STORED = Reading()


def wrong_range(values: Iterable[float]) -> str | None:
    """What is wrong with a range of values, in words; None if nothing is."""
    low, high = values
    if math.isfinite(low) and math.isfinite(high) and low < high:
        return None
    return f"[{low:g}, {high:g}]: allowed: two finite numbers, the black one below the white one"


def scaled(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Stored values of any shape -> uint8, by `Reading.value_range`."""
    low, high = value_range
    grey = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.rint(np.nan_to_num(np.clip(grey, 0, 255), nan=0.0)).astype(np.uint8)


@dataclass(frozen=True)
class Greys:
    """What of an image's stored values is left in 8 bits."""

    low: float  # the smallest and the largest stored value that is a number
    high: float
    stored: int | None  # different values in the file; None = unknown, but more than 8 bits could hold
    kept: int  # different values in 8 bits

    @property
    def few(self) -> bool:
        """Whether the conversion has left almost nothing: an image that never had more values has lost none."""
        return self.kept <= FEW_GREYS and (self.stored is None or self.kept < self.stored)

    def __str__(self) -> str:
        of = "" if self.stored is None else f" of its {self.stored}"
        return f"its values go from {self.low:g} to {self.high:g}, of which 8 bits keep {self.kept}{of}"


def greys_of(stored: np.ndarray, grey: np.ndarray) -> Greys:
    """Of stored values and what they became, both of one shape."""
    kept = int(np.count_nonzero(np.bincount(grey.ravel(), minlength=256)))
    finite = stored[np.isfinite(stored)] if stored.dtype.kind == "f" else stored
    if finite.size == 0:
        return Greys(0, 0, 0, kept)
    different = len(np.unique(finite)) if kept <= FEW_GREYS else kept  # sorting all values takes a while
    return Greys(float(finite.min()), float(finite.max()), different, kept)


def describe_few_greys(found: dict[str, Greys], *, setting: str, among: int | None = None) -> str | None:
    """A sentence on the images, by name, that lost almost all of their grey values; None if none has.

    Args:
        found: the images of more than 8 bits a channel that were looked at.
        setting: how a range of values is given, with {low} and {high}.
        among: how many of such images there are; None = those.
    """
    few = {name: greys for name, greys in found.items() if greys.few}
    if not few:
        return None
    name, first = next(iter(few.items()))
    looked = "" if among in (None, len(found)) else f" looked at of the {among}"
    return (
        f"{len(few)} of {len(found)} images{looked} with more than 8 bits a channel keep almost none of their grey "
        f"values in 8 bits, such as {name} ({first}); {remedy(list(few.values()), setting)}"
    )


def remedy(found: list[Greys], setting: str) -> str:
    """What would keep the grey values of such images, in words: the setting with its {low} and {high}."""
    grey = [each for each in found if each.stored is not None]
    if not grey:
        return "of colours the upper 8 bits are read, so store these in 8 bits"
    low, high = _fitting(grey)
    return f"{setting.format(low=f'{low:.6g}', high=f'{high:.6g}')} says which values become black and white"


def _fitting(found: list[Greys]) -> tuple[float, float]:
    """A range for such images: of the narrowest usual camera, or their own where that would waste most of it."""
    low, high = min(greys.low for greys in found), max(greys.high for greys in found)
    if low >= 0:
        white = next((white for white in (1, *BITS) if high <= white), high)
        if high - low >= white / 4:
            return 0.0, float(white)
    return low, max(high, low + 1)
