"""Edges whose labels are learned: from masks, where they are known, for instances that have a box alone.

An edge joins a cell to one of its first K / 2 neighbours (in the row above or to the left; see `affinity`). The branch
of `models/affinity.py` predicts for every edge of an image the logit of "different": that some instance has exactly one
of its two cells. It learns where masks say so; its labels then take the place of colour's (docs/METHOD.md).

Letters: B images, N instances, M masks, K neighbours, (h, w) the mask grid of the padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.losses.affinity import (
    downsample_images,
    first_neighbours,
    lab_distances,
    rgb_to_lab,
    rows_and_columns_inside,
    similarity,
)
from semiseg.losses.boxinst import box_cells
from semiseg.losses.dice import at_least_float32
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import Batch, Supervision, Targets

# Of the edges with a known label, by the colour rule's answer and the label: what the rule's likelihood follows from.
COLOUR_COUNTS = ("alike_same", "alike_different", "unlike_same", "unlike_different")


@dataclass(frozen=True)
class AffinityTargets:
    """What the branch sees of a batch's colours, learns from its masks and may teach its boxes; on the device."""

    lab: Tensor  # (B, 3, h, w) float32, the cells' colours
    distances: Tensor  # (B, K / 2, h, w) float32, between the colours of an edge's cells
    alike: Tensor  # (B, K / 2, h, w) bool, the edges that are "same" by the colour rule, wherever they are
    # (B, K / 2, h, w) bool, the edges whose label the masks tell: both cells in the image, at least one in the box of
    # an instance with a mask, none in that of one without or of a crowd. (An edge into such a box may be the boundary
    # of its object: taught as "same", the branch would not see those of unseen classes.)
    known: Tensor
    different: Tensor  # (B, K / 2, h, w) bool, the labels; without meaning elsewhere
    # (B, K / 2, h, w) bool, the edges that concern one box alone, whatever its instance's supervision: a cell of it and
    # another, which is in it or in no box, both in the image and in no crowd's box. (Between two objects it is not
    # known whose mask an edge should cut.)
    of_one_box: Tensor

    def colour_counts(self) -> Tensor:
        """(4,) int64, the numbers of `COLOUR_COUNTS`."""
        alike, different = self.known & self.alike, self.known & self.different
        known, alike, different, both = (each.sum() for each in (self.known, alike, different, alike & different))
        return torch.stack([alike - both, both, known - alike - different + both, different - both])


@dataclass(frozen=True)
class LearnedEdges:
    """What the branch says of a batch."""

    logits: Tensor  # (B, K / 2, h, w) of "different", on the graph
    trust: Tensor  # scalar in [0, 1], how far its labels replace those of colour

    def costs(self, wanted: AffinityTargets, coloured: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """What each edge of a box-only instance costs where its ends are predicted different, and where alike.

        With r = `trust` and the branch's probability y of "different", (1 - r) for alike colours, and where it
        concerns one box alone 2 r (1 - y) and 2 r y more; 1 for alike colours elsewhere, of which the branch says
        nothing. Their sum is to be divided by `learned`: colour's costs are scaled so that each kind is a mean.

        Args:
            coloured, learned: scalars, the step's numbers of edges with alike colours and of edges of one box.

        Returns:
            Two of (B, K / 2, h, w), at least float32, see `boxinst.edge_sums`; without gradient.
        """
        y = at_least_float32(self.logits.detach()).sigmoid()
        own = wanted.of_one_box * self.trust.to(y.dtype)
        by_colour = wanted.alike * (1 - own) * (learned.clamp(min=1) / coloured.clamp(min=1)).to(y.dtype)
        return by_colour + 2 * own * (1 - y), 2 * own * y


@torch.no_grad()
def affinity_targets(
    batch: Batch, targets: Targets, grid: WholeMap, *, size: int, dilation: int, threshold: float
) -> AffinityTargets:
    """Colours, known edges and their labels, edges of one box; without a transfer to the host.

    Args:
        size, dilation: of the neighbourhood. threshold: of the colour rule.
    """
    cells = box_cells(targets.boxes_xyxy, stride=grid.stride, grid_hw=grid.size_hw)
    lab = rgb_to_lab(downsample_images(batch.images, stride=grid.stride))
    distances = lab_distances(lab, size=size, dilation=dilation)
    boxed, image_index = targets.supervision != Supervision.MASK, targets.image_index  # pseudo masks do not teach edges
    numbers = torch.arange(1, len(boxed) + 1, device=lab.device)
    of_masks, of_boxes, owner = (
        _cover(cells, image_index, value, len(lab), grid) for value in ((~boxed).long(), boxed.long(), numbers)
    )
    usable = _inside(batch, grid) & (_crowds(targets, len(lab), grid) == 0)
    # A cell's part in its edges as a number, so that an edge takes few comparisons: in a mask's box 2, in no box 1, in
    # one that has no mask 0; and in one box alone its instance's number, which is the sum of all, in none 0, else -1.
    taught = torch.where(of_masks > 0, 2, 1).byte() * (usable & (of_boxes == 0))
    single = torch.where(usable & (of_masks + of_boxes <= 1), owner, -1).int()
    other = first_neighbours(single, size=size, dilation=dilation, beyond=-1)
    single = single[:, None]
    of_one_box = ((single | other) > 0) & ((single == other) | (single * other == 0))
    known = taught[:, None] * first_neighbours(taught, size=size, dilation=dilation, beyond=0) >= 2
    codes = _codes(targets, grid, len(lab))
    different = codes[:, None] != first_neighbours(codes, size=size, dilation=dilation, beyond=0)
    return AffinityTargets(lab, distances, similarity(distances) >= threshold, known, different, of_one_box)


def affinity_loss(logits: Tensor, wanted: AffinityTargets) -> Tensor:
    """The sum of the cross entropies of the known edges, in float32.

    Args:
        logits: (B, K / 2, h, w) of "different".
    """
    labels, known = wanted.different.float(), wanted.known.float()
    return F.binary_cross_entropy_with_logits(logits.float(), labels, known, reduction="sum")


def _cover(cells: Tensor, image_index: Tensor, value: Tensor, images: int, grid: WholeMap) -> Tensor:
    """(B, h, w) int64: of every cell the sum of the values (N,) of the boxes (N, 4) of its image that contain it."""
    height, width = grid.size_hw
    corners = cells.new_zeros(images, height + 1, width + 1)
    row0, row1, column0, column1 = cells.unbind(1)
    for row, column, sign in ((row0, column0, 1), (row0, column1, -1), (row1, column0, -1), (row1, column1, 1)):
        corners.index_put_((image_index, row, column), sign * value, accumulate=True)
    return corners.cumsum(1).cumsum(2)[:, :height, :width]


def _crowds(targets: Targets, images: int, grid: WholeMap) -> Tensor:
    """(B, h, w) int64: how many crowd boxes a cell is in."""
    cells = box_cells(targets.crowd_boxes_xyxy, stride=grid.stride, grid_hw=grid.size_hw)
    return _cover(cells, targets.crowd_image_index, torch.ones_like(targets.crowd_image_index), images, grid)


def _inside(batch: Batch, grid: WholeMap) -> Tensor:
    """(B, h, w) bool: the cells in the unpadded image, above the rows whose colours are not to be trusted."""
    sizes_hw, bottom = batch.image_sizes_hw, batch.bottom_rows_without_affinity
    row_in, column_in = rows_and_columns_inside(sizes_hw, bottom, stride=grid.stride, grid_hw=grid.size_hw)
    return row_in[:, :, None] & column_in[:, None, :]


def _codes(targets: Targets, grid: WholeMap, images: int) -> Tensor:
    """(B, h, w) int64 that differ between two cells of an image if and only if some mask has exactly one of them.

    Each mask adds a number of its own, drawn by a fixed rule: two sets of masks have equal sums with a chance of 2^-64.
    """
    masks = targets.masks_on(grid)
    mixed = torch.arange(1, len(masks) + 1, device=masks.device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):  # splitmix64's constants
        mixed = (mixed ^ (mixed >> shift)) * factor
    codes = torch.zeros(images, *grid.size_hw, dtype=torch.int64, device=masks.device)
    return codes.index_add_(0, targets.image_index[targets.mask_instance], masks * mixed[:, None, None])
