"""Features of regions, each from the level of the pyramid that fits its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

LARGE_SIDE = 224  # of a box whose features are of stride 16: two levels finer is a quarter of it
SAMPLES = 2  # in each direction of a cell


def region_features(
    levels: Sequence[Tensor],
    rois: Tensor,
    *,
    strides: Sequence[int],
    size: int,
    aligned: bool = True,
    margin: float = 1.0,
) -> Tensor:
    """(Q, channels, size, size) of Q regions.

    Args:
        levels: (B, channels, h, w) by rising stride.
        rois: (Q, 5) image index and box xyxy in input pixels.
        aligned: False = each cell is taken half a feature cell too far down and right, as the first RoIAlign did.
        margin: sides of the region by those of the box whose size decides about the level.

    Source: FPN (Lin et al. 2017), section 4.2.
    """
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt() / margin
    level = (torch.log2(side / LARGE_SIDE * 16 / strides[0]) + 1e-6).floor().long().clamp(0, len(levels) - 1)
    of_levels, places = [], []
    for number, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        (chosen,) = torch.nonzero(level == number, as_tuple=True)
        own = roi_align(features.float(), rois[chosen], size, 1 / stride, sampling_ratio=SAMPLES, aligned=aligned)
        of_levels.append(own.to(levels[0].dtype))
        places.append(chosen)
    # by level, then back: one copy there and one of the gradient; copies into zeros would be one for each level
    return torch.cat(of_levels).index_select(0, torch.argsort(torch.cat(places)))
