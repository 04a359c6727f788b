"""Seeded inputs of the size and shape that COCO has."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.models.affinity import FULL_GAIN, AffinityBranch

# sqrt(box area / image area) of COCO is roughly log-normal with this median and deviation: 37 % small, 42 % medium,
# 21 % large instances at 480 x 640, and 4 % of the image's area on average.
MEDIAN_SCALE, SCALE_DEVIATION = 0.08, 0.95
SIDE_DEVIATION = 0.4  # of the logarithm of width / height
LARGEST = 0.9  # of either side
SMALLEST = 8.0  # pixels: every box has a cell of the mask grid


def half_open(branch: AffinityBranch) -> None:
    """Sets the gate as if the branch had saved half of what it must of an ignorant colour rule's cross entropy."""
    branch.sums.copy_(torch.tensor([140 * (1 - FULL_GAIN / 2) * math.log(2), 35.0, 35.0, 35.0, 35.0]))


def coco_like_boxes(count: int, size_hw: tuple[int, int], *, seed: int) -> Tensor:
    """(count, 4) float32 xyxy in pixels: sizes at the quantiles of COCO's, so that any count has its share of each."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    quantiles = (torch.randperm(count, generator=generator) + 0.5) / count
    scale = MEDIAN_SCALE * torch.exp(SCALE_DEVIATION * torch.special.ndtri(quantiles))
    ratio = torch.exp(SIDE_DEVIATION / 2 * torch.randn(count, generator=generator))
    side = (height * width) ** 0.5
    extent = torch.stack((side * scale * ratio, side * scale / ratio), dim=1)  # (N, xy)
    limits = torch.tensor([width, height], dtype=torch.float32)
    extent = extent.clamp(min=SMALLEST).minimum(LARGEST * limits)
    start = torch.rand(count, 2, generator=generator) * (limits - extent)
    return torch.cat((start, start + extent), dim=1)


def shared_out(count: int, groups: int) -> Tensor:
    """(count,) int64: which of the groups each belongs to, ascending, sizes as equal as they can be."""
    return torch.arange(count) * groups // count


def picture(size_hw: tuple[int, int], *, seed: int) -> Tensor:
    """(3, H, W) uint8: soft patches of colour with some noise, about as hard for a codec as a photograph."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    patches = torch.rand(1, 3, max(height // 48, 2), max(width // 48, 2), generator=generator) * 255
    image = F.interpolate(patches, size=size_hw, mode="bicubic", align_corners=True)[0]
    noise = torch.randn(1, 3, -(-height // 2), -(-width // 2), generator=generator) * 14
    return (image + F.interpolate(noise, scale_factor=2.0)[0, :, :height, :width]).clamp(0, 255).to(torch.uint8)
