"""The two losses that learn masks from boxes, and their variants for given masks.

Letters: Q predicted masks, B images, K neighbours (see `affinity`), (h, w) the mask grid of the padded batch.
A box on the grid is a half-open rectangle of cells (row0, row1, column0, column1), possibly empty.
Source: METHOD section 2; BoxInst (arXiv 2012.02310), sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semiseg.losses.affinity import neighbour_offsets
from semiseg.losses.dice import at_least_float32, soft_dice


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
    return _projection(logits, masks.any(2), masks.any(1))


def _projection(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # The sigmoid is monotonic: taken after the maximum, it never exists as a full map.
    row_scores = at_least_float32(logits.max(2).values).sigmoid()  # (Q, h)
    column_scores = at_least_float32(logits.max(1).values).sigmoid()  # (Q, w)
    return soft_dice(row_scores, rows) + soft_dice(column_scores, columns)


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
    integral = edges.sum(1).cumsum(1).cumsum(2)  # (B, h, w)
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
        edges: (B, K, h, w) bool, the edges that count (or float: their weights); False where a neighbour is outside
            the grid.
        image_index: (Q,) int64 image of each mask.
        size, dilation: of the neighbourhood that `edges` was made with.
        total_cells: the sum of `patch_cells` over the masks; None = it is read back from the device.

    Returns:
        sums (Q,) and counts (Q,) of edges. Finite for any finite logits. Memory is in proportion to the area of the
        boxes, whatever K.
    """
    return _sum_edges(logits, cells, edges, image_index, None, size, dilation, total_cells)


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
    return _sum_edges(logits, cells, inside, image_index, masks, size, dilation, total_cells)


def _sum_edges(
    logits: Tensor,
    cells: Tensor,
    edges: Tensor,
    image_index: Tensor,
    masks: Tensor | None,
    size: int,
    dilation: int,
    total_cells: int | None,
) -> tuple[Tensor, Tensor]:
    if edges.shape[1:] != (size * size - 1, *logits.shape[1:]):
        raise ValueError(f"edges {tuple(edges.shape)} do not fit logits {tuple(logits.shape)} at size {size}")
    if total_cells is None:
        total_cells = int(patch_cells(cells, size=size, dilation=dilation).sum())
    return _EdgeSum.apply(logits, cells, edges, image_index, masks, size, dilation, total_cells)


@dataclass(frozen=True)
class _Patches:
    """All boxes with a margin around each, unrolled into flat lists of T cells, row by row, box after box.

    The margin, as wide as the longest step to a neighbour, may stick out of the grid: so every cell in a box has its
    neighbours at constant steps in the list, and a step from a margin ends in a margin or at an earlier row than 0.

    Attributes:
        owner: (T,) whose patch it is. row: (T,) row in the patch. pitch: (T,) width of the patch.
        in_box: (T,) bool, not in the margin. place: (T,) row * w + column on the grid, the nearest if outside.
    """

    owner: Tensor
    row: Tensor
    pitch: Tensor
    in_box: Tensor
    place: Tensor

    def neighbour(self, offset: tuple[int, int]) -> Tensor:
        """(T,) where in the lists the neighbour upwards or to the left stands; anywhere if it is in no patch."""
        step = (self.pitch * offset[0]).add_(offset[1]).mul_(self.row >= -offset[0])
        return step.add_(torch.arange(len(step), device=step.device)).clamp_(min=0)


def _unroll(cells: Tensor, margin: int, grid_hw: tuple[int, int], total_cells: int) -> _Patches:
    start, extent = cells[:, ::2], cells[:, 1::2] - cells[:, ::2]
    area = (extent + 2 * margin).prod(1) * (extent > 0).all(1)
    owner = torch.repeat_interleave(area, output_size=total_cells)
    height, width = extent[owner].unbind(1)
    pitch = width + 2 * margin
    position = torch.arange(len(owner), device=cells.device).sub_((area.cumsum(0) - area)[owner])
    row = position // pitch
    column = position - row * pitch
    row_in_box, column_in_box = row - margin, column - margin
    in_box = (row_in_box >= 0) & (row_in_box < height) & (column_in_box >= 0) & (column_in_box < width)
    grid_row = (row_in_box + start[owner, 0]).clamp_(0, grid_hw[0] - 1)
    grid_column = (column_in_box + start[owner, 1]).clamp_(0, grid_hw[1] - 1)
    return _Patches(owner=owner, row=row, pitch=pitch, in_box=in_box, place=grid_row * grid_hw[1] + grid_column)


class _EdgeSum(torch.autograd.Function):
    """Sum over edges of -log P(same label of both ends), per mask, each pair of cells evaluated once.

    P(same) = sigmoid(a) sigmoid(b) + sigmoid(-a) sigmoid(-b) for logits a and b, so that with q(x) = log(1 + exp(-|x|))
    -log P(same) = q(a) + q(b) - q(a + b) + (min(|a|, |b|) where the signs differ), and its derivative by a is
    sigmoid(a) - sigmoid(a + b). Nothing cancels, since q(a + b) <= min(q(a), q(b)) where the signs agree, and
    nothing overflows. P(different) of a and b is P(same) of a and -b.

    The derivatives are taken with the values: a mask's sum has a single upstream factor, so the backward only scales
    and scatters them. In one pass every cell receives from at most one other, so sums do not depend on the order in
    which a device adds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        cells: Tensor,
        edges: Tensor,
        image_index: Tensor,
        masks: Tensor | None,
        size: int,
        dilation: int,
        total_cells: int,
    ) -> tuple[Tensor, Tensor]:
        height, width = logits.shape[1:]
        area, neighbours = height * width, size * size - 1
        patches = _unroll(cells, size // 2 * dilation, (height, width), total_cells)
        centre = patches.owner * area + patches.place
        first_edge = image_index[patches.owner] * (neighbours * area) + patches.place
        # index_select: several times faster than indexing on the CPU.
        own = _cell_values(at_least_float32(logits.reshape(-1).index_select(0, centre)))  # (4, T)
        label = None if masks is None else masks.reshape(-1).index_select(0, centre)
        edges_flat = edges.reshape(-1)
        total, number, slope = torch.zeros_like(own[0]), torch.zeros_like(own[0]), torch.zeros_like(own[0])
        # The other half of the neighbours are the same pairs seen from their other end.
        for k, offset in enumerate(neighbour_offsets(size, dilation)[: neighbours // 2]):
            neighbour = patches.neighbour(offset)
            forth = edges_flat.index_select(0, first_edge + k * area) * patches.in_box
            back = edges_flat.index_select(0, first_edge + (neighbours - 1 - k) * area) * patches.in_box
            weight = forth.to(own.dtype) + back.index_select(0, neighbour)
            other = torch.stack([values.index_select(0, neighbour) for values in own])
            same = None if label is None else label == label.index_select(0, neighbour)
            value, by_centre, by_neighbour = _edge_loss(own, other, same)
            total += value * weight
            number += weight
            slope += by_centre * weight
            slope.index_add_(0, neighbour, by_neighbour * weight)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(patches.owner, centre, slope)
            ctx.shape, ctx.dtype = logits.shape, logits.dtype
        zeros = own.new_zeros(len(logits), dtype=torch.float64)
        sums = zeros.index_add(0, patches.owner, total.double()).to(own.dtype)
        counts = zeros.index_add(0, patches.owner, number.double()).to(own.dtype)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        owner, centre, slope = ctx.saved_tensors
        gradient = slope.new_zeros(ctx.shape.numel())
        gradient.index_add_(0, centre, slope * upstream[owner])  # margins outside the grid add 0 to its border
        return gradient.reshape(ctx.shape).to(ctx.dtype), None, None, None, None, None, None, None


def _cell_values(logits: Tensor) -> Tensor:
    """What an edge needs of either end, (4, T): logit x, q(x) = log(1 + exp(-|x|)), sigmoid(x), sigmoid(-x)."""
    return torch.stack((logits, _softplus_tail(logits), logits.sigmoid(), (-logits).sigmoid()))


def _softplus_tail(values: Tensor) -> Tensor:
    return values.abs().neg_().exp_().log1p_()


def _edge_loss(own: Tensor, other: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-log P(same), where `same` (T,) is False -log P(different), and the derivatives by both logits: (T,) each."""
    a, tail_a, up_a, down_a = own
    b, tail_b, up_b, down_b = other
    if same is not None:
        b = torch.where(same, b, -b)
        up_b, down_b = torch.where(same, up_b, down_b), torch.where(same, down_b, up_b)
    both = a + b
    value = (tail_a + tail_b).sub_(_softplus_tail(both))
    value += torch.maximum(torch.minimum(a, -b), torch.minimum(-a, b)).clamp_(min=0)  # min(|a|, |b|), signs differing
    up, down = both.sigmoid(), (-both).sigmoid()
    # sigmoid(x) - sigmoid(a + b) as a difference of products, which stays accurate where both are near 1.
    by_a = (down * up_a).sub_(up * down_a)
    by_b = (down * up_b).sub_(up * down_b)
    return value, by_a, by_b if same is None else torch.where(same, by_b, -by_b)
