"""Aligned bilinear upsampling: the resize that keeps cell (i, j) of stride s on pixel (s*i + s//2, s*j + s//2)."""

from __future__ import annotations

import torch
from torch import Tensor


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Upsamples maps by a whole factor so that both grids stand for the same pixels (METHOD section 3).

    Output row y samples input row (y - factor // 2) / factor, bilinearly, with the border repeated; columns alike.

    Written out instead of padding and `F.interpolate`: twice as fast with its gradient on a CPU, and on a GPU its
    gradient is deterministic, which the gradients of those two are not.

    Args:
        maps: (B, C, h, w), floating point; h and w at least 1, B may be 0.
        factor: at least 1; 1 returns `maps` itself.

    Returns:
        (B, C, factor * h, factor * w) in the type of `maps`.
    """
    if factor == 1:
        return maps
    return _upsample_axis(_upsample_axis(maps, factor, 3), factor, 2)


def _upsample_axis(maps: Tensor, factor: int, axis: int) -> Tensor:
    """Output position factor * k + p lies (p - factor // 2) / factor cells after cell k, for p = 0 ... factor - 1."""
    size = maps.shape[axis]
    before = torch.cat([maps.narrow(axis, 0, 1), maps.narrow(axis, 0, size - 1)], dim=axis)
    after = torch.cat([maps.narrow(axis, 1, size - 1), maps.narrow(axis, size - 1, 1)], dim=axis)
    shifts = [(position - factor // 2) / factor for position in range(factor)]
    phases = [torch.lerp(maps, after if shift >= 0 else before, abs(shift)) if shift else maps for shift in shifts]
    return torch.stack(phases, dim=axis + 1).flatten(axis, axis + 1)
