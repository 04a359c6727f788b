"""The Dice loss between predicted masks and given ones."""

from __future__ import annotations

from typing import Any

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
    losses: Tensor = _Dice.apply(logits, targets)
    return losses


class _Dice(torch.autograd.Function):
    """`soft_dice` of maps with its gradient: the scores and the targets as given are kept, and no other map."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, h, w) and (N, h, w) -> (N,)."""
        scores = at_least_float32(logits).sigmoid().flatten(1)
        flat = targets.flatten(1).to(scores.dtype)
        overlap = (scores * flat).sum(1)
        size = scores.square().sum(1).add_(flat.square_().sum(1)).add_(DICE_EPSILON)
        ctx.save_for_backward(scores, targets, overlap, size)
        ctx.dtype = logits.dtype
        return 1 - 2 * overlap / size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """By the score m: -2 t / size + 4 overlap m / size^2; by the logit m (1 - m) times that."""
        scores, targets, overlap, size = ctx.saved_tensors
        flat = targets.flatten(1).to(scores.dtype)
        gradient = scores * (4 * upstream * overlap / size.square())[:, None]
        gradient.addcmul_(flat, (2 * upstream / size)[:, None], value=-1)
        gradient.mul_(scores).addcmul_(gradient, scores, value=-1)
        return gradient.view_as(targets).to(ctx.dtype), None


def soft_dice(scores: Tensor, targets: Tensor) -> Tensor:
    """The same between scores (N, X) in [0, 1] and targets (N, X) -> (N,)."""
    targets = targets.to(scores.dtype)
    overlap = (scores * targets).sum(1)
    size = scores.square().sum(1) + targets.square().sum(1)
    return 1 - 2 * overlap / (size + DICE_EPSILON)
