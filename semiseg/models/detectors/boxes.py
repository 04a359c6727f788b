"""Boxes beside anchors and regions: how they are encoded, and which belongs to which object.

Source: Faster R-CNN (Ren et al. 2015), section 3.1; the constants are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND, NEITHER = -1, -2  # what a candidate without an object learns, see `match`
LARGEST_LOG = math.log(1000 / 16)  # of a side by its anchor's


def encode_boxes(boxes_xyxy: Tensor, anchors_xyxy: Tensor, weights: Sequence[float]) -> Tensor:
    """(K, 4) weights x (shift of the centre by the anchor's sides, logarithm of the sides by the anchor's)."""
    centre, size = _centre_and_size(boxes_xyxy)
    anchor_centre, anchor_size = _centre_and_size(anchors_xyxy)
    shift, log = (centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)
    return torch.cat([shift, log], dim=-1) * shift.new_tensor(weights)


def decode_boxes(deltas: Tensor, anchors_xyxy: Tensor, weights: Sequence[float]) -> Tensor:
    """The boxes (..., 4) that `encode_boxes` gives these deltas (..., 4) for; no side beyond 62.5 of the anchor's."""
    shift, log = (deltas / deltas.new_tensor(weights)).split(2, dim=-1)
    centre, size = _centre_and_size(anchors_xyxy)
    centre, half = shift * size + centre, log.clamp(max=LARGEST_LOG).exp() * size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes_xyxy: Tensor, size_hw: Tensor) -> Tensor:
    """Boxes (..., 4) cut to an image of this (2,) height and width."""
    limit = size_hw.flip(0).repeat(2).to(boxes_xyxy.dtype)
    return torch.minimum(boxes_xyxy.clamp(min=0), limit)


def match(
    candidates_xyxy: Tensor, boxes_xyxy: Tensor, *, positive_iou: float, negative_iou: float, best_too: bool = False
) -> Tensor:
    """Which of G objects each of K candidates is to learn: (K,) int64; or `BACKGROUND`, or `NEITHER`.

    Positive from `positive_iou` on, background below `negative_iou`. With `best_too` a candidate that no other has a
    larger IoU than with some object is positive, whatever that IoU, for the object of its own largest IoU.
    """
    if not len(boxes_xyxy):
        return torch.full((len(candidates_xyxy),), BACKGROUND, dtype=torch.int64, device=candidates_xyxy.device)
    iou = box_iou(boxes_xyxy, candidates_xyxy)  # (G, K)
    best, index = iou.max(0)
    matched = torch.where(best >= positive_iou, index, torch.where(best < negative_iou, BACKGROUND, NEITHER))
    if best_too:
        largest = iou.amax(1, keepdim=True)
        reaches = ((iou == largest) & (largest > 0)).any(0)
        matched = torch.where(reaches, index, matched)
    return matched


def in_crowds(candidates_xyxy: Tensor, crowd_boxes_xyxy: Tensor, *, share: float = 0.5) -> Tensor:
    """(K,) bool: more than such a share of the candidate's area lies in one of the crowd boxes (C, 4)."""
    low = torch.maximum(candidates_xyxy[:, None, :2], crowd_boxes_xyxy[None, :, :2])
    high = torch.minimum(candidates_xyxy[:, None, 2:], crowd_boxes_xyxy[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)  # (K, C)
    area = (candidates_xyxy[:, 2:] - candidates_xyxy[:, :2]).prod(1)
    return (shared > share * area[:, None]).any(1)


def drawn(wanted: Tensor, count: int, order: Tensor) -> Tensor:
    """At most `count` of the wanted (K,) bool, those that come first in an order (K,) of random numbers: (K,) bool."""
    if count <= 0:
        return torch.zeros_like(wanted)
    if count >= len(wanted):
        return wanted
    numbers = torch.where(wanted, order, torch.inf)
    near = torch.nonzero((numbers <= numbers.kthvalue(count).values) & wanted)[:, 0]  # more where numbers are equal
    chosen = torch.zeros_like(wanted)
    chosen[near[torch.argsort(numbers[near], stable=True)[:count]]] = True
    return chosen


def random_order(seed: int, purpose: int, count: int, device: torch.device) -> Tensor:
    """(count,) float64 numbers in [0, 1) that follow from the seed of a sample and a purpose, on any device alike."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + purpose) % 2**63)
    return torch.rand(count, generator=generator, dtype=torch.float64).to(device)


def _centre_and_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes_xyxy.split(2, dim=-1)
    return (low + high) / 2, high - low
