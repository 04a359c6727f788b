"""Exact filling of outlines: integer arithmetic alone decides each sample, so masks are the same on every platform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLES = 4  # per pixel side: 16 samples in a pixel
UNIT = 16  # fixed point: vertices are rounded to 1/16 of a sample, 1/64 of a pixel

Ring = NDArray[np.float64]  # (V, 2) closed polygon, (x, y)


@dataclass(frozen=True)
class Outline:
    """The boundary of a shape: the union of the solid rings without the holes; a hole lies inside one solid ring.

    Attributes:
        solids: rings (V, 2) of (x, y), in any direction.
        holes: likewise.
    """

    solids: Sequence[Ring]
    holes: Sequence[Ring] = ()

    def rings(self) -> list[Ring]:
        """All rings, solids clockwise on the screen (positive area with y down), holes the other way."""
        return [_turned(r, positive=True) for r in self.solids] + [_turned(r, positive=False) for r in self.holes]


@dataclass(frozen=True)
class Patch:
    """What a shape covers, on the window of pixels around it; the window may reach beyond the image.

    Attributes:
        top, left: image pixel of the window's first row and column.
        coverage: (h, w) uint8, samples inside the shape, 0..SAMPLES².
    """

    top: int
    left: int
    coverage: NDArray[np.uint8]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(h, w) bool: the pixels of which at least half is covered."""
        return 2 * self.coverage >= SAMPLES * SAMPLES

    def inside(self, size_hw: tuple[int, int]) -> Patch:
        """The part of the patch that lies in an image of the given size; may be empty."""
        rows, columns = self.coverage.shape
        top, left = min(max(self.top, 0), size_hw[0]), min(max(self.left, 0), size_hw[1])
        bottom, right = min(self.top + rows, size_hw[0]), min(self.left + columns, size_hw[1])
        part = self.coverage[
            top - self.top : max(bottom, top) - self.top, left - self.left : max(right, left) - self.left
        ]
        return Patch(top, left, part)

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the window in an image that contains it."""
        rows, columns = self.coverage.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


def fill(outline: Outline, *, within: tuple[int, int] | None = None) -> Patch:
    """Counts the samples of each pixel (pixel (r, c) spans [c, c+1) x [r, r+1)) that lie in an outline.

    The counts of the rings are added and cut at a full pixel, so that solids may overlap; only in a pixel that the
    boundaries of two of them cross can the sum be more than the union.

    Args:
        outline: in pixels.
        within: (height, width) of the image to stay in; None = the whole shape, wherever it is.
    """
    rings = outline.rings()
    points = np.concatenate(rings)
    (left, top), (right, bottom) = (
        np.floor(points.min(axis=0)).astype(int),
        np.floor(points.max(axis=0)).astype(int) + 1,
    )
    if within is not None:
        top, bottom = np.clip((top, bottom), 0, within[0])
        left, right = np.clip((left, right), 0, within[1])
    rows, columns = int(bottom - top), int(right - left)
    fixed = [np.rint((ring - (left, top)) * (SAMPLES * UNIT)).astype(np.int64) for ring in rings]
    ends = [np.concatenate((ring[1:], ring[:1])) for ring in fixed]
    row, column, sign = _crossings(np.concatenate(fixed), np.concatenate(ends), rows * SAMPLES)
    pixel, sample = np.divmod(np.minimum(np.maximum(column, 0), columns * SAMPLES), SAMPLES)
    # From a crossing on, every sample of the row counts: the rest of its pixel, then all of each further pixel.
    width = columns + 2
    place = row // SAMPLES * width + pixel
    weights = np.concatenate((sign * (SAMPLES - sample), sign * sample))
    steps = np.bincount(np.concatenate((place, place + 1)), weights, minlength=rows * width)
    counts = np.cumsum(steps.reshape(rows, width), axis=1)[:, :columns]
    return Patch(int(top), int(left), np.minimum(np.maximum(counts, 0), SAMPLES * SAMPLES).astype(np.uint8))


def _crossings(
    starts: NDArray[np.int64], ends: NDArray[np.int64], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where edges cross the sample rows 0..rows-1: row, first sample column at or right of the crossing, direction."""
    down = ends[:, 1] > starts[:, 1]
    upper, lower = np.where(down[:, None], starts, ends), np.where(down[:, None], ends, starts)
    half = UNIT // 2  # sample r has its centre at r * UNIT + half
    first, last = (np.minimum(np.maximum(-((half - end[:, 1]) // UNIT), 0), rows) for end in (upper, lower))
    counts = last - first
    edge = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    dx, dy = (lower - upper)[edge].T
    x0, y0 = upper[edge].T
    numerator = (x0 - half) * dy + (row * UNIT + half - y0) * dx
    column = -(-numerator // (UNIT * dy))
    # y runs down, so a ring of positive area goes down on its right side: +1 where an edge goes up.
    return row, column, np.where(down[edge], -1, 1)


def _turned(ring: Ring, *, positive: bool) -> Ring:
    x, y = ring[:, 0], ring[:, 1]
    area = np.sum(x * np.concatenate((y[1:], y[:1])) - y * np.concatenate((x[1:], x[:1])))
    return ring if (area > 0) == positive else ring[::-1]
