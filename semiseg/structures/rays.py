"""How far given masks reach from the locations that are positive for them: what PolarMask learns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RayTargets:
    """Of a batch with N instances; made behind the leak barrier, from the masks that it has and from boxes.

    Attributes:
        centres_xy: (N, 2) float32 input pixels: locations near an instance's centre are positive for it.
        instance_index: (K,) int64, of the positives whose instance has a mask; by image, then location.
        location_index: (K,) int64, where they are.
        distances: (K, rays) float32 input pixels > 0, see `data.rays.marched_rays`.
        everywhere: whether every instance of the run has a mask. Only then may centre and centreness of an instance
            follow from its mask: else those of boxes alone would be learned from other locations and to other scores.
    """

    centres_xy: Tensor
    instance_index: Tensor
    location_index: Tensor
    distances: Tensor
    everywhere: bool
