"""The two losses that learn masks from boxes, and their variants for given masks.

Letters: Q predicted masks, B images, K neighbours (see `affinity`), (h, w) the mask grid of the padded batch.
A box on the grid is a half-open rectangle of cells (row0, row1, column0, column1), possibly empty.
Source: METHOD section 2; BoxInst (arXiv 2012.02310), sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from semiseg.losses.dice import at_least_float32, soft_dice
from semiseg.losses.edge_sum import EdgeSum


def box_cells(boxes_xyxy: Tensor, *, stride: int, grid_hw: tuple[int, int]) -> Tensor:
    """The cells whose pixel (s*i + s//2, s*j + s//2) lies in the box: floor(y1) <= s*i + s//2 < floor(y2 + 1).

    Args:
        boxes_xyxy: (N, 4) input pixels; stride: of the grid; grid_hw: its size.

    Returns:
        (N, 4) int64 row0, row1, column0, column1, half open. A box without a cell has row0 = row1 and
        column0 = column1.
    """
    pixels = torch.stack((boxes_xyxy[:, :2].floor(), (boxes_xyxy[:, 2:] + 1).floor()), dim=1).long()  # (N, 2, xy)
    first = -((stride // 2 - pixels) // stride)  # ceil((pixel - s//2) / s)
    first = torch.stack((first[:, :, 0].clamp(0, grid_hw[1]), first[:, :, 1].clamp(0, grid_hw[0])), dim=2)
    start = first[:, 0]
    stop = torch.where((first[:, 1] > start).all(1, keepdim=True), first[:, 1], start)
    return torch.stack((start[:, 1], stop[:, 1], start[:, 0], stop[:, 0]), dim=1)


def cell_profiles(cells: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which rows (N, h) and which columns (N, w) the rectangles (N, 4) cover, bool."""
    row0, row1, column0, column1 = cells[:, :, None].unbind(1)  # (N, 1) each
    rows = torch.arange(grid_hw[0], device=cells.device)
    columns = torch.arange(grid_hw[1], device=cells.device)
    return (rows >= row0) & (rows < row1), (columns >= column0) & (columns < column1)


def projection_loss(logits: Tensor, cells: Tensor) -> Tensor:
    """Dice between mask and box, both projected on the rows by max, plus the same on the columns.

    Args:
        logits: (Q, h, w) any float type; cells: (Q, 4) the boxes on the grid.

    Returns:
        (Q,) in [0, 2]; exactly 2 with no gradient for a box without a cell. The gradient of a maximum goes to one
        of the cells that reach it.
    """
    return _projection(logits, *cell_profiles(cells, (logits.shape[1], logits.shape[2])))


def mask_projection_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """`projection_loss` with the projections of given masks (Q, h, w) bool instead of boxes: -> (Q,)."""
    bytes_ = masks.view(torch.uint8)  # whose maxima are found far sooner than `any` of bool
    return _projection(logits, bytes_.amax(2), bytes_.amax(1))


def _projection(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # The sigmoid is monotonic: taken after the maximum, it never exists as a full map.
    of_rows, of_columns = Maxima.apply(logits)  # (Q, h), (Q, w)
    row_scores, column_scores = at_least_float32(of_rows).sigmoid(), at_least_float32(of_columns).sigmoid()
    return soft_dice(row_scores, rows) + soft_dice(column_scores, columns)


class Maxima(torch.autograd.Function):
    """The maximum of every row and of every column of maps, with one map for the gradients of both."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, h, w) -> (Q, h) and (Q, w)."""
        rows, columns = maps.max(2), maps.max(1)
        ctx.save_for_backward(rows.indices, columns.indices)
        ctx.shape = maps.shape
        return rows.values, columns.values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_columns: Tensor) -> Tensor:
        """A maximum's gradient goes to the cell that was taken; a cell may be the maximum of its row and column."""
        of_row, of_column = ctx.saved_tensors
        gradient = of_rows.new_zeros(ctx.shape).scatter_(2, of_row[:, :, None], of_rows[:, :, None])
        there = gradient.gather(1, of_column[:, None])
        return gradient.scatter_(1, of_column[:, None], there.add_(of_columns[:, None]))


def patch_cells(cells: Tensor, *, size: int, dilation: int) -> Tensor:
    """How many cells the pairwise loss looks at for each box (N, 4): its own and its neighbours'; 0 if it is empty.

    Returns:
        (N,) int64; their sum over the masks is `total_cells` of `pairwise_loss`.
    """
    extent = cells[:, 1::2] - cells[:, ::2]
    return (extent + size // 2 * dilation * 2).prod(1) * (extent > 0).all(1)


def edge_counts(cells: Tensor, edges: Tensor, image_index: Tensor) -> Tensor:
    """Number of edges of each instance that count and have their centre in its box, from targets alone.

    Args:
        cells: (N, 4); edges: (B, K, h, w) bool; image_index: (N,).

    Returns:
        (N,) int64. By an integral image: no transfer to the host, no work in proportion to the boxes.
    """
    number = edges.view(torch.uint8).sum(1, dtype=torch.uint8)  # at most K; bytes add up fastest
    integral = number.cumsum(2).cumsum(1)  # (B, h, w)
    integral = torch.nn.functional.pad(integral, (1, 0, 1, 0))
    row0, row1, column0, column1 = cells.unbind(1)
    below = integral[image_index, row1, column1] - integral[image_index, row1, column0]
    return below - integral[image_index, row0, column1] + integral[image_index, row0, column0]


def pairwise_loss(
    logits: Tensor,
    cells: Tensor,
    edges: Tensor,
    image_index: Tensor,
    *,
    size: int,
    dilation: int,
    total_cells: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of -log P(both ends have the same label) over the edges that count and have their centre in the box.

    Args:
        logits: (Q, h, w) any float type.
        cells: (Q, 4) boxes on the grid; an empty one takes no part and costs nothing.
        edges: (B, K, h, w) bool, the edges that count; False where a neighbour is outside the grid.
        image_index: (Q,) int64 image of each mask.
        size, dilation: of the neighbourhood that `edges` was made with.
        total_cells: the sum of `patch_cells` over the masks; None = it is read back from the device.

    Returns:
        sums (Q,) and counts (Q,) of edges. Finite for any finite logits. Memory is in proportion to the area of the
        boxes, whatever K.
    """
    sums = edge_sums(logits, cells, edges, image_index, size=size, dilation=dilation, total_cells=total_cells)
    return sums, edge_counts(cells, edges, image_index).to(sums.dtype)


def labelled_pairwise_loss(
    logits: Tensor,
    cells: Tensor,
    masks: Tensor,
    inside: Tensor,
    image_index: Tensor,
    *,
    size: int,
    dilation: int,
    total_cells: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same over all edges with a neighbour inside, towards the labels of a given mask (BoxInst, Table 2).

    An edge costs -log P(same) where the mask has one label at both ends and -log P(different) elsewhere.

    Args:
        masks: (Q, h, w) bool; inside: (B, K, h, w) bool from `affinity.neighbour_inside`; others and returns as for
            `pairwise_loss`.
    """
    sums = edge_sums(logits, cells, inside, image_index, masks, size=size, dilation=dilation, total_cells=total_cells)
    return sums, edge_counts(cells, inside, image_index).to(sums.dtype)


def edge_sums(
    logits: Tensor,
    cells: Tensor,
    edges: Tensor,
    image_index: Tensor,
    masks: Tensor | None = None,
    costs: tuple[Tensor, Tensor] | None = None,
    *,
    size: int,
    dilation: int,
    total_cells: int | None = None,
) -> Tensor:
    """The sums (Q,) of `pairwise_loss` alone, or of `labelled_pairwise_loss` where `masks` are given.

    Where `costs` are given, two of (B, K / 2, h, w) at least 0, an edge costs - first log P(same) - second
    log P(different); entry k is of the edge to a cell's k-th neighbour, in the row above or to the left.
    """
    if edges.shape[1:] != (size * size - 1, *logits.shape[1:]) or edges.dtype != torch.bool:
        raise ValueError(
            f"edges {tuple(edges.shape)} {edges.dtype} do not fit logits {tuple(logits.shape)} at size {size}"
        )
    if total_cells is None:
        total_cells = int(patch_cells(cells, size=size, dilation=dilation).sum())
    sums: Tensor = EdgeSum.apply(logits, cells, edges, image_index, masks, costs, size, dilation, total_cells)
    return sums
