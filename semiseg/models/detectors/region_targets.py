"""What the two stages of a region detector learn from: anchors drawn before the network runs, regions behind it.

Everything drawn follows from the seeds of the samples, so that neither processes, parts of a step nor an interruption
change it. Source: Faster R-CNN (Ren et al. 2015), section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semiseg.models.detectors.boxes import BACKGROUND, NEITHER, drawn, in_crowds, match, random_order
from semiseg.models.detectors.regions import RegionOutputs, make_anchors
from semiseg.structures.inputs import Targets

ANCHORS, REGIONS = 1, 2  # the two draws of a sample


@dataclass(frozen=True)
class RegionAssignment:
    """The anchors that the proposal network learns from (S of them, by image), and what the second stage draws by."""

    image_index: Tensor  # (S,) int64
    anchor_index: Tensor  # (S,) int64
    anchor_instance: Tensor  # (S,) int64, -1 = background
    # (N,) int64, every instance: its own box is a region, so that each may be given a mask (`mask_quotas`)
    instance_index: Tensor
    seeds: tuple[int, ...]  # of the B images


@dataclass(frozen=True)
class SampledRegions:
    """The regions that the second stage learns from, by image."""

    boxes_xyxy: tuple[Tensor, ...]  # (k, 4) of each image
    instance: Tensor  # (K,) int64 of all of them, -1 = background


@dataclass(frozen=True)
class Draw:
    """How many are drawn of an image, at most, and which share of that may be positive."""

    count: int
    positive_share: float

    def __call__(self, matched: Tensor, order: Tensor) -> Tensor:
        """Indices, ascending, of those drawn among K matched (K,), see `boxes.match`, in a random order (K,)."""
        positive = drawn(matched >= 0, int(self.count * self.positive_share), order)
        negative = drawn(matched == BACKGROUND, self.count - int(positive.sum()), order)
        return torch.nonzero(positive | negative)[:, 0]


@torch.no_grad()
def assign_anchors(
    targets: Targets,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    num_images: int,
    seeds: tuple[int, ...],
    first_stride: int,
    sides: Sequence[int],
    ratios: Sequence[float],
    positive_iou: float,
    negative_iou: float,
    draw: Draw,
) -> RegionAssignment:
    """Matches the anchors of each image with its objects and draws those that take part.

    Deviation: an anchor that lies for more than half in a crowd is no background (docs/NUMERICS.md).

    Args:
        targets: on the host.
        sizes_hw, first_stride, sides, ratios: see `make_anchors`.
        seeds: of the images.
        positive_iou, negative_iou: see `boxes.match`; the best anchors of an object are positive, too.
    """
    anchors = make_anchors(sizes_hw, first_stride, sides, ratios, targets.boxes_xyxy.device)
    instances = torch.arange(targets.num_instances)
    parts = []
    for image in range(num_images):
        own = instances[targets.image_index == image]
        matched = match(
            anchors, targets.boxes_xyxy[own], positive_iou=positive_iou, negative_iou=negative_iou, best_too=True
        )
        matched[(matched == BACKGROUND) & in_crowds(anchors, targets.crowds_of(image))] = NEITHER
        index = draw(matched, random_order(seeds[image], ANCHORS, len(anchors), anchors.device))
        parts.append((torch.full_like(index, image), index, _instance(matched[index], own)))
    image_index, anchor_index, instance = (torch.cat(part) for part in zip(*parts, strict=True))
    return RegionAssignment(image_index, anchor_index, instance, instances, seeds)


@torch.no_grad()
def sample_regions(
    outputs: RegionOutputs,
    assignment: RegionAssignment,
    targets: Targets,
    *,
    iou: float,
    draw: Draw,
) -> SampledRegions:
    """Draws regions of each image from its proposals and the boxes of its objects.

    Args:
        iou: from which on a region is the object's, below it is background.
    """
    boxes, instance = [], []
    for image, found in enumerate(outputs.proposals):
        own = torch.nonzero(targets.image_index == image)[:, 0]
        regions = torch.cat([found, targets.boxes_xyxy[own]])
        matched = match(regions, targets.boxes_xyxy[own], positive_iou=iou, negative_iou=iou)
        matched[(matched == BACKGROUND) & in_crowds(regions, targets.crowds_of(image))] = NEITHER
        index = draw(matched, random_order(assignment.seeds[image], REGIONS, len(regions), regions.device))
        boxes.append(regions[index])
        instance.append(_instance(matched[index], own))
    return SampledRegions(tuple(boxes), torch.cat(instance))


def _instance(matched: Tensor, own: Tensor) -> Tensor:
    """Numbers of instances of the batch for those of an image, -1 for the background."""
    if not len(own):
        return matched.clamp(max=BACKGROUND)
    return torch.where(matched >= 0, own[matched.clamp(min=0)], BACKGROUND)
