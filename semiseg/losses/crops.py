"""Losses of masks in crops: Mask R-CNN's and YOLACT's for given masks, BBTP's two for boxes alone.

Letters: Q masks, (h, w) their cells: of a region, or of the map of the whole image.
Source: Mask R-CNN (He et al. 2017), section 3; YOLACT (Bolya et al. 2019), section 3, and its released configuration
for the weight; BBTP (Hsu et al. 2019), sections 3.3 and 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.losses.boxinst import Maxima, cell_profiles
from semiseg.losses.dice import at_least_float32

SMOOTHNESS_WEIGHT = 0.05  # beside the bags
CROP_WEIGHT = 6.125  # of YOLACT's masks beside its other losses
MISSED = 100.0  # what a cell of the mask costs that its crop has cut off: the released loss is nowhere larger


@dataclass(frozen=True)
class Crops:
    """What YOLACT's loss of masks compares with, of N instances, M of which have a mask."""

    cells: Tensor  # (N, 4) int64 row0, row1, column0, column1, half open: each box and a cell around it
    area: Tensor  # (N,) float32 >= 1, of each box without that, in cells
    masks: Tensor  # (M, h, w) bool


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
    rows, columns = (side.to(each.dtype) for side in cell_profiles(one_around(cells), (each.shape[1], each.shape[2])))
    if known is not None:
        counted = rows[:, :, None] * columns[:, None, :] * known
        return (each * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
    total = torch.einsum("qhw,qh,qw->q", each, rows, columns)
    return total / (rows.sum(1) * columns.sum(1)).clamp(min=1)


def one_around(cells: Tensor) -> Tensor:
    """Boxes on the grid (N, 4) with a cell around them, which may lie beyond it."""
    row0, row1, column0, column1 = cells.unbind(1)
    return torch.stack([row0 - 1, row1 + 1, column0 - 1, column1 + 1], dim=1)


def crop_loss(logits: Tensor, masks: Tensor, cells: Tensor, area: Tensor) -> Tensor:
    """Sum of the binary cross entropy of each mask over its crop, by the area of its box: (Q,).

    A cell of the mask beyond the crop adds `MISSED`, without a gradient, which no mask within its box has.

    Args:
        logits: (Q, h, w) any float type.
        masks: (Q, h, w) bool; cells, area: (Q, 4) and (Q,), see `Crops`.
    """
    logits = at_least_float32(logits)
    each = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    rows, columns = cell_profiles(cells, (each.shape[1], each.shape[2]))
    total = torch.einsum("qhw,qh,qw->q", each, rows.to(each.dtype), columns.to(each.dtype))
    missed = (masks & ~(rows[:, :, None] & columns[:, None, :])).sum((1, 2))
    return (total + MISSED * missed) / area


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
