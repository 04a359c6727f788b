"""The Dice loss between predicted masks and given ones."""

from __future__ import annotations

import torch
from torch import Tensor

DICE_EPSILON = 1e-5


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in the precision that losses are computed in: half precisions become float32, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - 2 sum(m t) / (sum m^2 + sum t^2 + 1e-5) of each instance, m = sigmoid(logits).

    Args:
        logits: (N, h, w), any float type.
        targets: (N, h, w) bool or float in [0, 1], the mask sampled at the cell centres.

    Returns:
        (N,) in [0, 1]; exactly 1 with no gradient where a target is empty.

    Source: METHOD section 2; V-Net (arXiv 1606.04797), equation of section 3 with squared sizes.
    """
    return soft_dice(at_least_float32(logits).sigmoid().flatten(1), targets.flatten(1))


def soft_dice(scores: Tensor, targets: Tensor) -> Tensor:
    """The same between scores (N, X) in [0, 1] and targets (N, X) -> (N,)."""
    targets = targets.to(scores.dtype)
    overlap = (scores * targets).sum(1)
    size = scores.square().sum(1) + targets.square().sum(1)
    return 1 - 2 * overlap / (size + DICE_EPSILON)
