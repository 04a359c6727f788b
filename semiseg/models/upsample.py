"""Aligned bilinear upsampling: the resize that keeps cell (i, j) of stride s on pixel (s*i + s//2, s*j + s//2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Upsamples maps by a whole factor so that both grids stand for the same pixels (METHOD section 3).

    Output row y samples input row (y - factor // 2) / factor, bilinearly, with the border repeated; columns alike.
    One ring of border is repeated on all four sides, resized with its corners aligned (a step of exactly 1 / factor),
    and the window that starts half a step before the first original cell is cut out.

    Args:
        maps: (B, C, h, w), floating point; h and w at least 1, B may be 0.
        factor: at least 1; 1 returns `maps` itself.

    Returns:
        (B, C, factor * h, factor * w).
    """
    if factor == 1:
        return maps
    height, width = maps.shape[-2:]
    ringed = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    size = (factor * (height + 1) + 1, factor * (width + 1) + 1)
    resized = F.interpolate(ringed, size=size, mode="bilinear", align_corners=True)
    start = factor - factor // 2
    return resized[..., start : start + factor * height, start : start + factor * width]
