"""How badly a mask and the rest of its box explain the box's colours as two means (Chan and Vese, 2001)."""

from __future__ import annotations

import torch
from torch import Tensor

from semiseg.losses.boxinst import cell_profiles
from semiseg.losses.dice import at_least_float32

LEAST_VARIANCE = 1.0  # squared units of Lab: in a box of one colour, where all masks are equal, rounding has no say


def level_set_loss(logits: Tensor, cells: Tensor, lab: Tensor, image_index: Tensor) -> Tensor:
    """The colours' squared distances to the mean of their side, as a share of those to the mean of the whole box.

    With p the mask's probabilities, n the box's cells, I their colours less the box's mean and V their sum of squares:
    sum p |I - mean of the mask|^2 + (1 - p) |I - mean of the rest|^2 = V - |sum p I|^2 (1 / sum p + 1 / (n - sum p)).

    Args:
        logits: (Q, h, w) any float type; cells: (Q, 4) the boxes on the grid.
        lab: (B, 3, h, w) the cells' colours; image_index: (Q,) int64 image of each mask.

    Returns:
        (Q,) in [0, 1], at least float32; 1 without gradient for a box without a cell. Of each mask no map
        of colours is made: the sums are products with the colours of all images.
    """
    rows, columns = cell_profiles(cells, (logits.shape[1], logits.shape[2]))
    box = (rows[:, :, None] & columns[:, None, :]).flatten(1)
    values = at_least_float32(logits).flatten(1)
    inside, outside = values.sigmoid() * box, (-values).sigmoid() * box
    box = box.to(inside.dtype)
    colours = lab.permute(2, 3, 0, 1).flatten(0, 1).to(inside.dtype)  # (h w, B, 3)
    squares = colours.square().sum(2)

    def of_own_image(weights: Tensor) -> Tensor:
        sums = (weights @ colours.flatten(1)).view(-1, *colours.shape[1:])
        return sums[torch.arange(len(sums), device=sums.device), image_index]  # (Q, 3)

    area, size, rest = box.sum(1), inside.sum(1), outside.sum(1)
    mean = of_own_image(box) / area.clamp(min=1)[:, None]
    total = (box @ squares).gather(1, image_index[:, None])[:, 0] - area * mean.square().sum(1)
    # Of mask and rest, whose sums are opposite, the smaller one's: of nearly the whole box rounding would be left, to
    # be divided by next to nothing.
    weights = torch.where((size < rest)[:, None], inside, -outside)
    centred = of_own_image(weights) - mean * weights.sum(1, keepdim=True)
    tiny = torch.finfo(size.dtype).eps
    explained = centred.square().sum(1) * (1 / size.clamp(min=tiny) + 1 / rest.clamp(min=tiny))
    return 1 - explained / total.clamp(min=LEAST_VARIANCE * area.clamp(min=1))
