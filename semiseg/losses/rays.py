"""PolarMask's loss and centreness: how far masks reach from locations, compared without drawing them.

Source: PolarMask (Xie et al., CVPR 2020, arXiv 1909.13226), sections 3.3 and 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from semiseg.losses.dice import at_least_float32
from semiseg.structures.rays import RayTargets

LEAST_CENTRENESS = 1e-6  # of a step, by which the loss of its rays is divided


def polar_iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """ln(sum max(d, d*) / sum min(d, d*)) of each location.

    Args:
        predicted, target: (P, K) distances > 0 along K evenly spaced rays, in one unit, any float type.

    Returns:
        (P,) >= 0, at least float32; 0 where both are equal, ln a where one is a times the other.
    """
    predicted = at_least_float32(predicted)
    target = target.to(predicted.dtype)
    outer, inner = torch.maximum(predicted, target).sum(1), torch.minimum(predicted, target).sum(1)
    return (outer / inner).log()


def polar_centreness(distances: Tensor) -> Tensor:
    """sqrt(shortest / longest) of the rays (P, K) > 0 of each location: (P,) in (0, 1]."""
    shortest, longest = distances.aminmax(dim=1)
    return torch.sqrt(shortest / longest)


def ray_loss_sum(predicted: Tensor, targets: RayTargets, weight: Tensor) -> Tensor:
    """The polar IoU losses of rays (K, rays) in input pixels, each times its centreness and its instance's weight (N,).

    A scalar; without rays a zero on their graph. To be divided by the centreness of the whole step that has a weight.
    """
    each = polar_iou_loss(predicted, targets.distances) * polar_centreness(targets.distances)
    return (each * weight[targets.instance_index]).sum()
