"""Assignment: which locations predict which box (METHOD section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment, Locations


@torch.no_grad()
def assign(
    locations: Locations,
    targets: Targets,
    *,
    num_images: int,
    level_ranges: Sequence[float],
    centre_radius: float,
) -> Assignment:
    """Assigns locations to boxes by the FCOS rule with centre sampling.

    A location is a candidate for a box if it lies strictly inside the square of `centre_radius` strides around the
    box centre, clipped to the box, and the largest of its distances to the sides is in its level's range, both ends
    included. Of several boxes the smallest wins, at equal areas the first.

    Deviation: the square is centred on the box for every instance, as the reference's mask centroid would let
    supervision leak into the assignment (docs/NUMERICS.md).

    Args:
        locations: the R locations of the padded batch.
        targets: N boxes in input pixels.
        num_images: B.
        level_ranges: boundaries of max(l, t, r, b) in input pixels, one fewer than levels.
        centre_radius: in strides.
    """
    distances = side_distances(locations.xy, targets.boxes_xyxy)  # 4 x (N, R)
    longest = torch.maximum(torch.maximum(*distances[::2]), torch.maximum(*distances[1::2]))
    lower = longest.new_tensor([-1.0, *level_ranges])[locations.level]  # (R,)
    upper = longest.new_tensor([*level_ranges, math.inf])[locations.level]
    candidate = (longest >= lower) & (longest <= upper)
    candidate &= _in_centre(locations, targets.boxes_xyxy, centre_radius)
    instance_index, location_index = _smallest_box(candidate, targets)
    image_index = targets.image_index[instance_index]
    positive = torch.stack([side[instance_index, location_index] for side in distances], dim=1)  # (P, 4) pixels
    box_distances = positive / locations.stride[location_index, None]
    ignored = _in_crowd(locations, targets, num_images)
    ignored[image_index, location_index] = False
    return Assignment(
        image_index=image_index,
        location_index=location_index,
        instance_index=instance_index,
        box_distances=box_distances,
        centreness=centreness_targets(box_distances),
        ignored=ignored,
    )


def side_distances(xy: Tensor, boxes_xyxy: Tensor) -> list[Tensor]:
    """Distances from points (R, 2) to the left, top, right, bottom sides of boxes (N, 4): four tensors (N, R)."""
    x, y = xy.unbind(1)
    left, top, right, bottom = boxes_xyxy[:, :, None].unbind(1)  # each (N, 1)
    return [x - left, y - top, right - x, bottom - y]


def centreness_targets(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of positive distances (P, 4) -> (P,) in (0, 1]."""
    left, top, right, bottom = distances.unbind(1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return torch.sqrt(across * down)


def _in_centre(locations: Locations, boxes_xyxy: Tensor, centre_radius: float) -> Tensor:
    """(N, R) bool: strictly inside the centre square clipped to the box."""
    inside = torch.ones(boxes_xyxy.shape[0], locations.xy.shape[0], dtype=torch.bool, device=boxes_xyxy.device)
    reach = centre_radius * locations.stride
    for axis in (0, 1):
        position = locations.xy[:, axis]
        low, high = boxes_xyxy[:, axis, None], boxes_xyxy[:, axis + 2, None]
        centre = (low + high) / 2
        inside &= position > torch.maximum(centre - reach, low)
        inside &= position < torch.minimum(centre + reach, high)
    return inside


def _smallest_box(candidate: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """One instance per location from candidates (N, R): (instance (P,), location (P,)), by image, then location."""
    num_locations = candidate.shape[1]
    instance_index, location_index = candidate.nonzero(as_tuple=True)  # by instance
    width, height = (targets.boxes_xyxy[:, 2:] - targets.boxes_xyxy[:, :2]).unbind(1)
    order = torch.argsort((width * height)[instance_index], stable=True)  # by area, then instance
    place = targets.image_index[instance_index] * num_locations + location_index
    order = order[torch.argsort(place[order], stable=True)]  # by place, then area, then instance
    place = place[order]
    is_first = torch.ones_like(place, dtype=torch.bool)
    is_first[1:] = place[1:] != place[:-1]
    winner = order[is_first]
    return instance_index[winner], location_index[winner]


def _in_crowd(locations: Locations, targets: Targets, num_images: int) -> Tensor:
    """(B, R) bool: strictly inside a crowd box of the image."""
    inside = torch.stack(side_distances(locations.xy, targets.crowd_boxes_xyxy)).amin(dim=0) > 0  # (K, R)
    count = torch.zeros(num_images, locations.xy.shape[0], dtype=torch.int32, device=inside.device)
    return count.index_add_(0, targets.crowd_image_index, inside.int()) > 0
