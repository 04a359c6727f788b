"""How far a mask reaches from a location in evenly spaced directions, and where its centre of mass is.

Frames: a mask is a raster of pixels, and the integer point (x, y) is the middle of pixel (x, y), as locations are. Ray
k of K points to the angle 2 pi k / K, from x towards y.
Source: PolarMask (Xie et al. 2020), section 3.2; `marched_rays` are this project's (docs/NUMERICS.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from semiseg.structures.inputs import Targets
from semiseg.structures.rays import RayTargets

NO_RAY = 1e-6  # pixels: of a ray that meets nothing of the mask
STEP = 0.25  # pixels between two looks at the mask along a ray
DEGREES = (0, 1, -1, 2, -2, 3, -3)  # where the contour rule looks for a pixel of the contour, in its order
# The eight neighbours of a pixel as (row, column), clockwise where rows go down.
AROUND = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


@dataclass(frozen=True, kw_only=True)
class RayRule:
    """What of rays a run learns from."""

    count: int  # K
    contour: bool  # the original's rule, in place of marching
    everywhere: bool  # see `RayTargets`
    # (targets, padded_size_hw, num_images) -> the positives: instances (P,), locations (P,) and where these are (P, 2)
    positives: Callable[[Targets, tuple[int, int], int], tuple[Tensor, Tensor, Tensor]]


# The cut-out of an input that holds a mask, (h, w) bool, and the pixel (x, y) of its first cell.
Raster = tuple[np.ndarray, tuple[int, int]]


def ray_targets(
    targets: Targets, rasters: Sequence[Raster], rule: RayRule, padded_size_hw: tuple[int, int], num_images: int
) -> RayTargets:
    """How far the masks of a batch reach from the locations that are positive for their instances.

    Args:
        targets: still without rays.
        rasters: of the M masks.
        padded_size_hw, num_images: of the batch.
    """
    centres = (targets.boxes_xyxy[:, :2] + targets.boxes_xyxy[:, 2:]) / 2
    shapes = [
        (owner, mask, corner, largest_contour(mask) if rule.contour else None)
        for owner, (mask, corner) in zip(targets.mask_instance.tolist(), rasters, strict=True)
    ]
    for owner, mask, corner, contour in shapes:
        if rule.everywhere and mask.any():
            own = mass_centre(mask) if contour is None else contour_centre(contour)
            centres[owner] = torch.from_numpy(own + corner).float()
    nothing = torch.zeros(0, dtype=torch.int64)
    rays = RayTargets(centres, nothing, nothing, torch.zeros(0, rule.count), rule.everywhere)
    instance, location, xy = rule.positives(replace(targets, rays=rays), padded_size_hw, num_images)
    distances = torch.zeros(len(instance), rule.count)
    for owner, mask, corner, contour in shapes:
        points = xy[instance == owner].double().numpy() - corner
        found = marched_rays(mask, points, rule.count) if contour is None else contour_rays(contour, points, rule.count)
        distances[instance == owner] = torch.from_numpy(found)
    with_mask = torch.isin(instance, targets.mask_instance)
    return RayTargets(centres, instance[with_mask], location[with_mask], distances[with_mask], rule.everywhere)


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
    # The nearest pixel. Whole pixels are added afterwards, so that rounding does not depend on where the mask stands.
    way = np.round([np.cos(angle), np.sin(angle)], 12)[:, None, :, None] * reach  # (xy, 1, K, S)
    whole = np.floor(points_xy).astype(np.int32)
    part = (points_xy - whole).T[:, :, None, None]
    if not part.any():  # of locations, which all see the same pixels around them
        part = part[:, :1]
    column, row = np.floor(part + way + 0.5).astype(np.int32)
    x, y = whole.T[:, :, None, None]
    column, row = (column + (x + 1)).clip(0, width + 1), (row + (y + 1)).clip(0, height + 1)
    inside = padded.ravel()[row * (width + 2) + column]  # (P, K, S)
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
    farthest = np.full((len(points_xy), 360), -1.0)  # where there is no pixel
    rows = np.broadcast_to(np.arange(len(points_xy))[:, None], degree.shape)
    np.maximum.at(farthest, (rows, degree), np.linalg.norm(offset, axis=2))
    wanted = (90 - np.arange(count) * (360 // count)) % 360
    rays = np.full((len(points_xy), count), NO_RAY)
    for shift in reversed(DEGREES):  # the first that has a pixel is written last
        found = farthest[:, (wanted + shift) % 360]
        rays = np.where(found >= 0, found, rays)
    return np.asarray(np.maximum(rays, NO_RAY), dtype=np.float32)


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
    total, *moments = (np.add.accumulate(each)[-1] for each in (area, area * (x + x0) / 3, area * (y + y0) / 3))
    if total == 0:
        return np.array([x.mean() // 1, y.mean() // 1])
    return np.array([int(each / total) for each in moments], dtype=np.float64)


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
    """The border that begins at a pixel with nothing to its left, until it would begin again."""
    border: list[tuple[int, int]] = []
    here, back = start, 4  # where it came from: the left
    while True:
        around = [(here[0] + row, here[1] + column) for row, column in AROUND]
        turn = next((turn for turn in range(1, 9) if mask[around[(back - turn) % 8]]), None)
        if turn is None:
            return [start]  # a single pixel
        there = around[(back - turn) % 8]
        if border[:2] == [here, there]:
            return border
        border.append(here)
        here, back = there, back - turn + 4
