"""Assignment: which locations predict which box (METHOD section 3).

Only the cells around a box's centre can be positive for it, so only those are looked at: the work does not grow with
the size of the image, and is small enough for the host, where the number of positives is then known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment


@torch.no_grad()
def assign(
    targets: Targets,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    strides: Sequence[int],
    num_images: int,
    level_ranges: Sequence[float],
    centre_radius: float,
) -> Assignment:
    """Assigns locations to boxes by the FCOS rule with centre sampling.

    A location is a candidate for a box if it lies strictly inside the square of `centre_radius` strides around the
    box centre, clipped to the box, and the largest of its distances to the sides is in its level's range, both ends
    included. Of several boxes the smallest wins, at equal areas the first.

    Deviation: the square is centred on the box for every instance, as the reference's mask centroid would let
    supervision leak into the assignment (docs/NUMERICS.md). Where every instance of a run has a mask, `targets.rays`
    may name other centres.

    Args:
        targets: N boxes in input pixels; on the host, unless reading back the number of positives does no harm.
        sizes_hw: height and width of each level, in cells.
        strides: of the levels. Locations are numbered as in `fcos_head.make_locations`.
        num_images: B.
        level_ranges: boundaries of max(l, t, r, b) in input pixels, one fewer than levels.
        centre_radius: in strides.
    """
    levels = _levels(sizes_hw, strides, level_ranges, targets.boxes_xyxy.device)
    centres = None if targets.rays is None else targets.rays.centres_xy
    instance_index, location_index, distances, stride = _candidates(levels, targets.boxes_xyxy, centres, centre_radius)
    winner = _smallest_box(instance_index, location_index, targets, levels.num_locations)
    instance_index, location_index = instance_index[winner], location_index[winner]
    image_index = targets.image_index[instance_index]
    box_distances = distances[winner] / stride[winner, None]
    ignored = _in_crowd(levels, targets, num_images)
    ignored[image_index, location_index] = False
    return Assignment(
        image_index=image_index,
        location_index=location_index,
        instance_index=instance_index,
        box_distances=box_distances,
        centreness=centreness_targets(box_distances),
        ignored=ignored,
    )


def centreness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of positive distances (P, 4) -> (P,) in (0, 1]."""
    left, top, right, bottom = distances.unbind(1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return torch.sqrt(across * down)


@dataclass(frozen=True)
class _Levels:
    """L levels: size (L, 2) int64 as (width, height), stride, offset (of cell 0), lower, upper: (L,) float32 pixels."""

    size_wh: Tensor
    stride: Tensor
    offset: Tensor
    lower: Tensor
    upper: Tensor
    sizes_hw: Sequence[tuple[int, int]]

    @property
    def num_locations(self) -> int:
        return sum(height * width for height, width in self.sizes_hw)


def _levels(
    sizes_hw: Sequence[tuple[int, int]], strides: Sequence[int], level_ranges: Sequence[float], device: torch.device
) -> _Levels:
    limits = torch.tensor([strides, [s // 2 for s in strides], [-1.0, *level_ranges], [*level_ranges, math.inf]])
    sizes = torch.tensor([(width, height) for height, width in sizes_hw], device=device)
    stride, offset, lower, upper = limits.to(device).unbind()
    return _Levels(sizes, stride, offset, lower, upper, sizes_hw)


def _candidates(
    levels: _Levels, boxes_xyxy: Tensor, centres_xy: Tensor | None, centre_radius: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which locations could predict which box: K pairs, by instance, then location; centres are the boxes' own if None.

    Returns:
        instance (K,), location (K,), distances to left, top, right, bottom (K, 4) in pixels, stride (K,).
    """
    low, high = boxes_xyxy[:, None, :2, None], boxes_xyxy[:, None, 2:, None]  # (N, 1, xy, 1)
    stride, offset = levels.stride[:, None, None], levels.offset[:, None, None]  # (L, 1, 1)
    centre, reach = (low + high) / 2 if centres_xy is None else centres_xy[:, None, :, None], centre_radius * stride
    # A square 2 r strides wide holds at most ceil(2 r) cells; one more on either side bears rounding.
    count = min(math.ceil(2 * centre_radius) + 2, max(max(size) for size in levels.sizes_hw))
    first = ((centre - reach - offset) / stride).floor().long()  # (N, L, xy, 1)
    first = first.minimum(levels.size_wh[:, :, None] - count).clamp(min=0)
    index = first + torch.arange(count, device=first.device)  # (N, L, xy, k)
    position = index * stride + offset
    inside = index < levels.size_wh[:, :, None]
    inside &= position > torch.maximum(centre - reach, low)
    inside &= position < torch.minimum(centre + reach, high)
    before, after = position - low, high - position
    farther = torch.maximum(before, after)
    longest = torch.maximum(farther[:, :, 0, None], farther[:, :, 1, :, None])  # (N, L, rows, columns)
    candidate = (longest >= levels.lower[:, None, None]) & (longest <= levels.upper[:, None, None])
    candidate &= inside[:, :, 0, None] & inside[:, :, 1, :, None]
    instance, level, row, column = candidate.nonzero(as_tuple=True)
    area = levels.size_wh.prod(1)
    start = (area.cumsum(0) - area)[level]
    location = start + index[instance, level, 1, row] * levels.size_wh[level, 0] + index[instance, level, 0, column]
    sides = [side[instance, level, axis, cell] for side in (before, after) for axis, cell in ((0, column), (1, row))]
    return instance, location, torch.stack(sides, dim=1), levels.stride[level]


def _smallest_box(instance_index: Tensor, location_index: Tensor, targets: Targets, num_locations: int) -> Tensor:
    """Which candidates (P,) of those by instance (K,) win their location; ordered by image, then location."""
    width, height = (targets.boxes_xyxy[:, 2:] - targets.boxes_xyxy[:, :2]).unbind(1)
    order = torch.argsort((width * height)[instance_index], stable=True)  # by area, then instance
    place = targets.image_index[instance_index] * num_locations + location_index
    order = order[torch.argsort(place[order], stable=True)]  # by place, then area, then instance
    place = place[order]
    is_first = torch.ones_like(place, dtype=torch.bool)
    is_first[1:] = place[1:] != place[:-1]
    return order[is_first]


def _in_crowd(levels: _Levels, targets: Targets, num_images: int) -> Tensor:
    """(B, R) bool: strictly inside a crowd box of the image."""
    low, high = targets.crowd_boxes_xyxy[:, :2, None], targets.crowd_boxes_xyxy[:, 2:, None]  # (K, xy, 1)
    ignored = torch.zeros(num_images, levels.num_locations, dtype=torch.bool, device=low.device)
    if not len(low):
        return ignored
    parts = []
    for (height, width), stride, offset in zip(levels.sizes_hw, levels.stride, levels.offset, strict=True):
        position = torch.arange(max(height, width), device=low.device) * stride + offset
        inside = (position > low) & (position < high)  # (K, xy, cells)
        parts.append((inside[:, 0, None, :width] & inside[:, 1, :height, None]).flatten(1))
    count = torch.zeros_like(ignored, dtype=torch.int32)
    return count.index_add_(0, targets.crowd_image_index, torch.cat(parts, dim=1).int()) > 0
