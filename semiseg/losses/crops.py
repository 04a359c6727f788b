"""Losses of masks in crops: Mask R-CNN's cross entropy for given masks, BBTP's two losses for boxes alone.

Letters: Q masks, (h, w) their cells: of a region, or of the map of the whole image.
Source: Mask R-CNN (He et al. 2017), section 3; BBTP (Hsu et al. 2019), sections 3.3 and 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.losses.boxinst import Maxima, cell_profiles
from semiseg.losses.dice import at_least_float32

SMOOTHNESS_WEIGHT = 0.05  # beside the bags


def cross_entropy_loss(
    logits: Tensor, masks: Tensor, cells: Tensor | None = None, known: Tensor | None = None
) -> Tensor:
    """Mean binary cross entropy of each mask over its cells: (Q,).

    Args:
        logits: (Q, h, w) any float type.
        masks: (Q, h, w) bool, or float in [0, 1].
        cells: (Q, 4) boxes on the grid, see `boxinst.box_cells`; the mean is over their cells and one around them.
            None = over all: a region is the box already.
        known: (Q, h, w) bool, the cells that count; None = all.
    """
    logits = at_least_float32(logits)
    each = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    if cells is None and known is None:
        return each.mean((1, 2))
    if cells is None:
        cells = torch.tensor([0, each.shape[1], 0, each.shape[2]], device=each.device).expand(len(each), 4)
    around = cells + cells.new_tensor([-1, 1, -1, 1])
    rows, columns = (side.to(each.dtype) for side in cell_profiles(around, (each.shape[1], each.shape[2])))
    if known is not None:
        counted = rows[:, :, None] * columns[:, None, :] * known
        return (each * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
    total = torch.einsum("qhw,qh,qw->q", each, rows, columns)
    return total / (rows.sum(1) * columns.sum(1)).clamp(min=1)


def bag_loss(logits: Tensor, cells: Tensor) -> Tensor:
    """Mean binary cross entropy of each mask's rows and columns, each by its largest logit: (Q,).

    Every row and column is a bag, positive where it meets the box: there is a cell of the object in it, and in the
    others there is none. The gradient reaches one cell of each bag.

    Args:
        logits: (Q, h, w) any float type; cells: (Q, 4) boxes on the grid, see `boxinst.box_cells`.
    """
    bags = at_least_float32(torch.cat(Maxima.apply(logits), dim=1))  # (Q, h + w)
    positive = torch.cat(cell_profiles(cells, (logits.shape[1], logits.shape[2])), dim=1)
    return F.binary_cross_entropy_with_logits(bags, positive.to(bags.dtype), reduction="none").mean(1)


def smoothness_loss(logits: Tensor) -> Tensor:
    """Mean square of the differences between each cell's probability and its 8 neighbours': (Q,).

    Beyond the border there is 0, so that masks are pushed away from it.
    """
    inner = at_least_float32(logits).sigmoid()
    height, width = inner.shape[1:]
    around = F.pad(inner, (1, 1, 1, 1))
    total = torch.zeros_like(inner)
    for down in range(3):
        for across in range(3):
            total = total + (inner - around[:, down : down + height, across : across + width]).square()
    return total.mean((1, 2)) / 8
