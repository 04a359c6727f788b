"""PolarMask's own training: what of rays a run learns from, and the targets of a step that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from semiseg.config import RunConfig
from semiseg.config.model import FCOSDetector, RayMaskHead
from semiseg.data.rays import NO_RAY, RayRule
from semiseg.data.table import Table
from semiseg.engine.detection import fcos_assignment
from semiseg.losses.rays import polar_centreness
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.detectors.sample import queries_of
from semiseg.structures.inputs import Targets, grid_size, has_mask
from semiseg.structures.outputs import Assignment, MaskQueries


def build_ray_rule(config: RunConfig, train: Table) -> RayRule | None:
    """What of rays the run learns from; None if its objective is another, or all masks are withheld."""
    head, detector, source = config.model.mask_head, config.model.detector, config.supervision.source
    if config.objective.mask != "rays" or source == "boxes":
        return None
    assert isinstance(head, RayMaskHead)  # the configuration allows no other
    assert isinstance(detector, FCOSDetector)
    return RayRule(
        count=head.rays,
        contour=head.targets == "contour",
        everywhere=source == "masks" and train.count_objects()[1] == 0,
        positives=partial(positives_of, assign=fcos_assignment(detector), strides=tuple(detector.strides)),
    )


def positives_of(
    targets: Targets,
    padded_size_hw: tuple[int, int],
    num_images: int,
    *,
    assign: Callable[..., Assignment],
    strides: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The step's own assignment, which uses no parameter, where the masks are still at hand; see `RayRule`."""
    sizes = [grid_size(padded_size_hw, stride) for stride in strides]
    assignment = assign(targets, sizes_hw=sizes, num_images=num_images)
    locations = make_locations(sizes, strides, targets.boxes_xyxy.device)
    return assignment.instance_index, assignment.location_index, locations.xy[assignment.location_index]


def with_rays(assignment: Assignment, targets: Targets) -> tuple[Assignment, MaskQueries]:
    """The assignment as rays want it, and where those of the targets are predicted.

    If every instance of the run has a mask it has the centreness of rays; one whose mask has no pixel keeps FCOS's.
    """
    rays = targets.rays
    if rays is None:
        raise ValueError("objective.mask = 'rays' needs targets with rays")
    with_mask = has_mask(targets.supervision[assignment.instance_index])
    place = with_mask.nonzero()[:, 0]
    same = torch.equal(assignment.instance_index[place], rays.instance_index)
    if not same or not torch.equal(assignment.location_index[place], rays.location_index):
        raise ValueError("the rays of the targets are not those of the assignment's positives")
    if rays.everywhere:
        reached = (rays.distances > NO_RAY).any(1)
        centreness = assignment.centreness.clone()
        centreness[place[reached]] = polar_centreness(rays.distances[reached]).to(centreness.dtype)
        assignment = replace(assignment, centreness=centreness)
    return assignment, queries_of(targets, rays.instance_index, rays.location_index)
