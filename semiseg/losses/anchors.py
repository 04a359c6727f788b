"""The losses of YOLACT's detector: classes by the hardest background, boxes, and a map of what class is where.

Source: YOLACT (Bolya et al. 2019), sections 3.3 and 5, and its released configuration for the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.losses.dice import at_least_float32

LOSSES = ("classification", "box", "semantic")
COUNTS = ("positives", "images")  # what their denominators are made of
BOX_WEIGHT = 1.5


def class_loss(logits: Tensor, label: Tensor, learning: Tensor) -> Tensor:
    """Sum of the cross entropy of the positive anchors and of the `hardest_background`.

    Args:
        logits: (K, C + 1), the background first; label: (K,) int64 in 0..C.
        learning: (K,) bool, which anchors count.
    """
    each = F.cross_entropy(at_least_float32(logits), label, reduction="none")
    return torch.where(learning, each, 0).sum()


@torch.no_grad()
def hardest_background(logits: Tensor, background: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, A) bool: of each image's background so many anchors, those that the network is least sure of.

    By logsumexp(x) - x of the background, which is its cross entropy; equal ones by the lower anchor.

    Args:
        logits: (B, A, C + 1), the background first; background: (B, A) bool.
        counts: of each image, none above the number of its background.
    """
    logits = at_least_float32(logits)
    hardness = torch.where(background, logits.logsumexp(2) - logits[..., 0], -torch.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(background)
    for own, places, count in zip(chosen, order, counts, strict=True):
        own[places[:count]] = True
    return chosen


def box_loss(deltas: Tensor, wanted: Tensor) -> Tensor:
    """1.5 times the sum of the smooth L1 distances of encoded boxes (P, 4)."""
    deltas = at_least_float32(deltas)
    return BOX_WEIGHT * F.smooth_l1_loss(deltas, wanted.to(deltas.dtype), reduction="sum")


def semantic_loss(logits: Tensor, present: Tensor, known: Tensor) -> Tensor:
    """Sum over images of the binary cross entropy of all classes: over the known cells, by the number of all cells.

    Args:
        logits: (B, C, h, w); present, known: (B, C, h, w) bool, whether the class is there, and whether that is known.
    """
    logits = at_least_float32(logits)
    each = F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")
    return torch.where(known, each, 0).sum() / (logits.shape[2] * logits.shape[3])


def classes_present(masks: Tensor, label: Tensor, image: Tensor, *, num_images: int, num_classes: int) -> Tensor:
    """(B, C, h, w) bool: where a mask (M, h, w) bool of the class is, by its label (M,) and image (M,)."""
    count = torch.zeros(num_images * num_classes, *masks.shape[1:], dtype=torch.int32, device=masks.device)
    count.index_add_(0, image * num_classes + label, masks.int())
    return (count > 0).view(num_images, num_classes, *masks.shape[1:])


def shrunk(masks: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Masks (M, H, W) bool on a grid of fewer cells: where they, interpolated there, exceed one half."""
    if not len(masks):
        return masks.new_zeros(0, *size_hw)
    smaller: Tensor = F.interpolate(masks[:, None].float(), size_hw, mode="bilinear", align_corners=False)
    return smaller[:, 0] > 0.5


def cells_in_boxes(boxes_xyxy: Tensor, input_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """(N, h, w) bool: the centre of the cell, of so many equal parts of the input, lies in the box (N, 4)."""
    inside = []
    for axis, (side, count) in ((1, (input_hw[0], size_hw[0])), (0, (input_hw[1], size_hw[1]))):
        centre = (torch.arange(count, device=boxes_xyxy.device) + 0.5) * (side / count)
        inside.append((centre >= boxes_xyxy[:, axis, None]) & (centre <= boxes_xyxy[:, axis + 2, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
