"""How far a mask reaches from a location in evenly spaced directions, and where its centre of mass is.

Frames: a mask is a raster of pixels, and the integer point (x, y) is the middle of pixel (x, y), as locations are. Ray
k of K points to the angle 2 pi k / K, from x towards y.
Source: PolarMask (Xie et al. 2020), section 3.2; `marched_rays` are this project's (docs/NUMERICS.md).
"""

from __future__ import annotations

import math

import numpy as np

NO_RAY = 1e-6  # pixels: of a ray that meets nothing of the mask
STEP = 0.25  # pixels between two looks at the mask along a ray
DEGREES = (0, 1, -1, 2, -2, 3, -3)  # where the contour rule looks for a pixel of the contour, in its order
# The eight neighbours of a pixel as (row, column), clockwise where rows go down.
AROUND = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def marched_rays(mask: np.ndarray, points_xy: np.ndarray, count: int) -> np.ndarray:
    """Distance from each point to the last place of each ray that is in the mask, by steps of a quarter of a pixel.

    Args:
        mask: (h, w) bool.
        points_xy: (P, 2) pixels of the mask, inside of it or not.
        count: K.

    Returns:
        (P, K) float32 pixels, `NO_RAY` where a ray meets nothing.
    """
    height, width = mask.shape
    if not len(points_xy) or not mask.any():
        return np.full((len(points_xy), count), NO_RAY, dtype=np.float32)
    angle = np.arange(count) * (2 * math.pi / count)
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]])
    farthest = np.linalg.norm(points_xy[:, None] - corners, axis=2).max()
    reach = np.arange(1, int(farthest / STEP) + 2) * STEP  # (S,)
    padded = np.pad(mask, 1)  # what lies beyond is looked up in the border
    # floor of value + 1.5: the nearest pixel, counted from the border
    column = (points_xy[:, :1, None] + np.cos(angle)[:, None] * reach + 1.5).astype(np.int32).clip(0, width + 1)
    row = (points_xy[:, 1:, None] + np.sin(angle)[:, None] * reach + 1.5).astype(np.int32).clip(0, height + 1)
    inside = padded[row, column]  # (P, K, S)
    last = len(reach) - 1 - inside[:, :, ::-1].argmax(2)
    return np.where(inside.any(2), reach[last], NO_RAY).astype(np.float32)


def contour_rays(contour_xy: np.ndarray, points_xy: np.ndarray, count: int) -> np.ndarray:
    """The original's rule: along each ray the farthest pixel of the contour whose angle, cut to degrees, is the ray's.

    Where there is none of that degree, of the next one, the one before, and so on, at most three away.

    Args:
        contour_xy: (T, 2) pixels of `largest_contour`.
        points_xy: (P, 2) pixels.
        count: K, of which 360 is a multiple.

    Returns:
        (P, K) float32 pixels, `NO_RAY` where there is none of these degrees either.
    """
    offset = contour_xy[None].astype(np.float64) - points_xy[:, None]  # (P, T, xy)
    # The original measures angles from y towards x, and cuts those: its ray k is the one at 90 degrees - k * 360 / K.
    degree = np.degrees(np.arctan2(offset[..., 0], offset[..., 1]))
    degree = np.where(degree < 0, degree + 360, degree).astype(np.int64) % 360
    farthest = np.zeros((len(points_xy), 360))
    rows = np.broadcast_to(np.arange(len(points_xy))[:, None], degree.shape)
    np.maximum.at(farthest, (rows, degree), np.linalg.norm(offset, axis=2))
    known = np.zeros_like(farthest, dtype=np.bool_)
    known[rows, degree] = True
    wanted = (90 - np.arange(count) * (360 // count)) % 360
    rays = np.full((len(points_xy), count), NO_RAY)
    for shift in reversed(DEGREES):  # the first that is known is written last
        at = (wanted + shift) % 360
        rays = np.where(known[:, at], farthest[:, at], rays)
    return np.maximum(rays, NO_RAY).astype(np.float32)


def mass_centre(mask: np.ndarray) -> np.ndarray:
    """(2,) float64 x, y: the mean of the mask's pixels, of which there is at least one."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()])


def contour_centre(contour_xy: np.ndarray) -> np.ndarray:
    """(2,) float64 x, y: the original's centre, that of the contour's area, cut to whole pixels.

    A contour without area has the mean of its pixels.
    """
    x, y = contour_xy.astype(np.float64).T
    x0, y0 = np.roll(x, 1), np.roll(y, 1)
    area = (x * y0 - y * x0) / 2
    # One after the other, as the original adds: what should be a whole number may fall short of it and be cut.
    total, *moments = (
        np.add.accumulate(each)[-1] for each in (area, area * (x + x0) / 3, area * (y + y0) / 3)
    )
    if total == 0:
        return np.floor(np.array([x.mean(), y.mean()]))
    return np.trunc(np.array(moments) / total)


def largest_contour(mask: np.ndarray) -> np.ndarray:
    """The border of the part of the mask with the largest area within it: (T, 2) int64 x, y in their order.

    Parts are joined at corners, too. A pixel that the border passes twice is there twice.
    Source: border following by Suzuki and Abe (1985).
    """
    padded = np.pad(mask, 1)
    starts = np.argwhere(padded & ~np.roll(padded, 1, axis=1))  # with nothing to their left; row by row
    seen: set[tuple[int, int]] = set()
    best, largest = np.zeros((0, 2), dtype=np.int64), -1.0
    for row, column in starts.tolist():
        if (row, column) in seen:
            continue
        border = _follow(padded, (row, column))
        seen.update(border)
        y, x = np.array(border, dtype=np.int64).T - 1
        area = abs(float((np.roll(x, 1) * y - x * np.roll(y, 1)).sum())) / 2
        if area > largest:
            best, largest = np.stack([x, y], axis=1), area
    return best


def _follow(mask: np.ndarray, start: tuple[int, int]) -> list[tuple[int, int]]:
    """The border that begins at a pixel with nothing to its left, until it comes back as it began."""

    def inside(pixel: tuple[int, int], direction: int) -> tuple[int, int] | None:
        row, column = AROUND[direction % 8]
        there = (pixel[0] + row, pixel[1] + column)
        return there if mask[there] else None

    west = 4
    first = next((west + turn for turn in range(1, 9) if inside(start, west + turn)), None)
    if first is None:
        return [start]  # a single pixel
    last, border, here, back = inside(start, first), [start], start, first
    while True:
        # the other way round, from behind the pixel that it came from
        turn = next(turn for turn in range(1, 9) if inside(here, back - turn))
        there = inside(here, back - turn)
        assert there is not None
        if there == start and here == last:
            return border
        border.append(there)
        here, back = there, back - turn + 4
