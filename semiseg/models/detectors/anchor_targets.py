"""Which anchors learn which object, and which learn background or nothing.

Source: YOLACT's released matching; SSD (Liu et al. 2016), section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_iou

from semiseg.models.detectors.anchors import WEIGHTS, AnchorOutputs, square_anchors
from semiseg.models.detectors.boxes import BACKGROUND, NEITHER, encode_boxes, in_crowds, match
from semiseg.models.detectors.sample import best_of_instances, queries_of
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import MaskQueries

CROWD_SHARE = 0.7  # of a background anchor's area in a crowd, above which it learns nothing


@dataclass(frozen=True)
class AnchorAssignment:
    """P positive anchors, by image, then anchor, and what the others are."""

    image_index: Tensor  # (P,) int64
    anchor_index: Tensor  # (P,) int64 in 0..A-1
    instance_index: Tensor  # (P,) int64, index into Targets' instances
    deltas: Tensor  # (P, 4), see `encode_boxes`
    background: Tensor  # (B, A) bool; what is neither positive nor background learns no class
    negatives: tuple[int, ...]  # how many of its background each image learns


@torch.no_grad()
def assign_squares(
    targets: Targets,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    num_images: int,
    padded_hw: tuple[int, int],
    sides: Sequence[int],
    scales: Sequence[float],
    positive_iou: float,
    negative_iou: float,
    negatives: int,
) -> AnchorAssignment:
    """Matches the anchors of each image with its objects.

    Args:
        targets: on the host.
        sizes_hw, padded_hw, sides, scales: see `square_anchors`.
        positive_iou, negative_iou: see `boxes.match`; then every object takes an anchor, see `best_free_anchors`.
        negatives: of an image for each of its positives, as far as there is background.
    """
    anchors = square_anchors(sizes_hw, padded_hw, sides, scales, targets.boxes_xyxy.device)
    numbers = torch.arange(targets.num_instances)
    background = torch.zeros(num_images, len(anchors), dtype=torch.bool)
    image_index, anchor_index, instance_index, counts = [], [], [], []
    for image in range(num_images):
        own = numbers[targets.image_index == image]
        boxes = targets.boxes_xyxy[own]
        matched = match(anchors, boxes, positive_iou=positive_iou, negative_iou=negative_iou)
        if len(own):
            matched[best_free_anchors(box_iou(boxes, anchors))] = torch.arange(len(own))
        in_crowd = in_crowds(anchors, targets.crowds_of(image), share=CROWD_SHARE)
        matched[(matched == BACKGROUND) & in_crowd] = NEITHER
        (positive,) = torch.nonzero(matched >= 0, as_tuple=True)
        background[image] = matched == BACKGROUND
        counts.append(min(negatives * len(positive), int(background[image].sum())))
        image_index.append(torch.full_like(positive, image))
        anchor_index.append(positive)
        instance_index.append(own[matched[positive]])
    anchor, instance = torch.cat(anchor_index), torch.cat(instance_index)
    deltas = encode_boxes(targets.boxes_xyxy[instance], anchors[anchor], WEIGHTS)
    return AnchorAssignment(torch.cat(image_index), anchor, instance, deltas, background, tuple(counts))


def best_free_anchors(iou: Tensor) -> Tensor:
    """An anchor for each object, (G,) int64, of their IoU (G, A), G at most A.

    The pair with the highest IoU first: that object takes that anchor, and both are out. Equal ones: the lower number.
    """
    left, taken = iou.clone(), torch.zeros(len(iou), dtype=torch.int64, device=iou.device)
    for _ in range(min(iou.shape)):
        best, anchor = left.max(1)
        own = int(best.argmax())
        taken[own] = anchor[own]
        left[:, anchor[own]] = -1
        left[own] = -2
    return taken


@torch.no_grad()
def sample_anchors(
    outputs: AnchorOutputs,
    assignment: AnchorAssignment,
    targets: Targets,
    quotas: Tensor,
    *,
    counts: Sequence[int] | None = None,
) -> MaskQueries:
    """As `sample_positives`; the best positives are those with the most probable class, whichever it is."""
    logits = outputs.class_logits[assignment.image_index, assignment.anchor_index].float()
    score = logits.softmax(1)[:, 1:].amax(1)
    kept, counts = best_of_instances(
        score, assignment.image_index, assignment.instance_index, quotas, counts, len(outputs.class_logits)
    )
    instance, anchor = assignment.instance_index[kept], assignment.anchor_index[kept]
    queries = queries_of(targets, instance, anchor // outputs.shapes, counts=tuple(counts))
    return replace(queries, shape_index=anchor % outputs.shapes)
