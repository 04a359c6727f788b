"""Resize and flip: first the geometry is chosen, from the sample's seed alone, then applied to image, boxes and masks.

Frames: original = the stored image; input = after resize and flip. A point (x, y) of the original goes to
(x * W'/W, y * H'/H), and to (W' - that, y) under the flip. Polygons are mapped as points and rasterised afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

FLIPPED_AT_ONCE = 64  # rows: what `flip` makes of so many is still in cache when it is copied


@dataclass(frozen=True)
class Geometry:
    """One choice of resize and flip for an image of a known size; sizes are (height, width)."""

    original_hw: tuple[int, int]
    input_hw: tuple[int, int]
    flipped: bool

    def image(self, image: Tensor, out: Tensor | None = None) -> Tensor:
        """(3, H, W) uint8 -> (3, H', W') uint8: antialiased bilinear; untouched where the size stays.

        The memory layout stays too. An image as decoded, channels last, takes half the time of one channel by channel.
        The result is written to `out` where that is given, such as a part of a batch.
        """
        if self.input_hw != self.original_hw:
            size = list(self.input_hw)
            image = functional.resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
        if out is None:
            return image.flip(-1) if self.flipped else image
        rows = FLIPPED_AT_ONCE if self.flipped else max(image.shape[1], 1)
        for target, part in zip(out.split(rows, dim=1), image.split(rows, dim=1), strict=True):
            target.copy_(part.flip(-1) if self.flipped else part)
        return out

    def source_rows(self, rows: np.ndarray) -> np.ndarray:
        """The original pixel row that holds the centre of each input pixel row; (n,) int64 both."""
        return _nearest(rows, self.input_hw[0], self.original_hw[0])

    def source_columns(self, columns: np.ndarray) -> np.ndarray:
        """As `source_rows`, for columns; under the flip they descend."""
        width = self.input_hw[1]
        return _nearest(width - 1 - columns if self.flipped else columns, width, self.original_hw[1])

    def points(self, points_xy: np.ndarray) -> np.ndarray:
        """(..., 2) float64 original pixels -> (..., 2) float64 input pixels."""
        (height, width), (new_height, new_width) = self.original_hw, self.input_hw
        # Multiply before dividing: a point on the far edge then lands on the new edge exactly.
        x = points_xy[..., 0] * new_width / width
        y = points_xy[..., 1] * new_height / height
        return np.stack([new_width - x if self.flipped else x, y], axis=-1)

    def polygons(self, polygons: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """[x0, y0, x1, y1, ...] original pixels each -> (2K,) float64 input pixels each."""
        ends = list(accumulate(len(polygon) for polygon in polygons))
        numbers = np.fromiter(chain.from_iterable(polygons), dtype=np.float64, count=ends[-1] if ends else 0)
        mapped = self.points(numbers.reshape(-1, 2)).reshape(-1)
        return [mapped[start:end] for start, end in pairwise([0, *ends])]

    def boxes(self, boxes_xyxy: np.ndarray) -> Tensor:
        """(N, 4) float64 original pixels -> (N, 4) float32 input pixels."""
        corners = self.points(boxes_xyxy.reshape(-1, 2, 2))
        if self.flipped:  # the right edge became the left one
            corners[:, :, 0] = corners[:, ::-1, 0].copy()
        return torch.from_numpy(corners.reshape(-1, 4)).to(torch.float32)


def _nearest(pixels: np.ndarray, size: int, original_size: int) -> np.ndarray:
    """The original pixels that hold the centres of `pixels` of a side that was resized; in float32, as torch has it."""
    scale = np.float32(original_size) / np.float32(size)
    centres = (pixels.astype(np.float32) + np.float32(0.5)) * scale
    return np.minimum(centres.astype(np.int64), original_size - 1)


# Chooses the geometry of one sample from its (height, width) and seed alone.
Transform = Callable[[tuple[int, int], int], Geometry]


@dataclass(frozen=True)
class Resize:
    """Resize, of several scales for a training, and horizontal flip; with one scale and no flip nothing is chance."""

    short_sides: Sequence[int]  # one of them is drawn for each sample
    long_side: int  # upper limit of the longer side, in pixels
    flip: float = 0.0  # probability of the horizontal flip
    stretch: bool = False  # height and width both become the drawn side
    scale: tuple[float, float] = (1.0, 1.0)  # between which a factor of all sides is drawn

    def __call__(self, size_hw: tuple[int, int], seed: int) -> Geometry:
        # random.random() is the one draw whose values Python promises to keep between versions.
        generator = random.Random(seed)
        short_side = self.short_sides[int(generator.random() * len(self.short_sides))]
        flipped = generator.random() < self.flip
        long_side, (low, high) = self.long_side, self.scale
        if high > 1 or low < 1:
            factor = low + (high - low) * generator.random()
            short_side, long_side = (max(1, round(side * factor)) for side in (short_side, long_side))
        if self.stretch:
            return Geometry(size_hw, (short_side, short_side), flipped)
        return Geometry(size_hw, resized_size(size_hw, short_side, long_side), flipped)


def resized_size(size_hw: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `short_side`, or less so that the longer is at most `long_side`.

    The ratio is kept, each side rounded half up; integers only, so no platform rounds otherwise.
    """
    numerator, denominator = short_side, min(size_hw)
    if max(size_hw) * short_side > long_side * min(size_hw):
        numerator, denominator = long_side, max(size_hw)
    height, width = (max(1, (2 * side * numerator + denominator) // (2 * denominator)) for side in size_hw)
    return height, width
