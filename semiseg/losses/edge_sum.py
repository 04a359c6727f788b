"""The pairwise loss over the edges in the boxes, with its gradient: what `boxinst.pairwise_loss` computes.

Letters: Q masks, K neighbours, T cells of all boxes with a margin around each, (h, w) the mask grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from semiseg.losses.affinity import neighbour_offsets
from semiseg.losses.dice import at_least_float32


@dataclass(frozen=True)
class _Patches:
    """All boxes with a margin around each, unrolled into flat lists of T cells, row by row, box after box.

    The margin, as wide as the longest step to a neighbour, may stick out of the grid: so every cell in a box has its
    neighbours at constant steps in the list. Tables have an entry for each of the Q * H rows that patches can have.
    """

    row: Tensor  # (T,) which entry of the tables
    column: Tensor  # (T,) on the grid, the nearest if outside
    in_box: Tensor  # (T,) uint8, 1 where not in the margin
    pitch: Tensor  # (Q * H,) width of the patch
    number: Tensor  # (Q * H,) the row's number in its patch, from 0
    begin: Tensor  # (Q * H,) (row of the grid, the nearest if outside) * w
    rows_per_patch: int  # H

    def of_mask(self, values: Tensor) -> Tensor:
        """A table of values (Q,) of the masks."""
        return values.repeat_interleave(self.rows_per_patch)

    def place(self, start: Tensor) -> Tensor:
        """(T,) where the cells stand in maps of which each mask's begins at `start` (Q,)."""
        return (self.of_mask(start) + self.begin).index_select(0, self.row).add_(self.column)

    def above(self, rows: int) -> Tensor:
        """(T,) where in the lists the cell so many rows above stands; the cell itself if that is in no patch."""
        step = self.pitch * (self.number >= rows) * rows
        return torch.arange(len(self.row), device=step.device, dtype=step.dtype).sub_(step.index_select(0, self.row))


def _unroll(cells: Tensor, margin: int, grid_hw: tuple[int, int], total_cells: int) -> _Patches:
    """Tables first, which are short; a list is then a table's entries and at most an addition."""
    row0, row1, column0, column1 = cells[:, :, None].unbind(1)  # (Q, 1) each
    height, width = grid_hw
    number = torch.arange(height + 2 * margin, device=cells.device, dtype=cells.dtype)  # (H,)
    used = (number < row1 - row0 + 2 * margin) & (row1 > row0) & (column1 > column0)  # (Q, H)
    pitch = ((column1 - column0 + 2 * margin) * used).flatten()
    row = torch.repeat_interleave(pitch, output_size=total_cells)
    first = (column0 - margin - pitch.cumsum(0, dtype=cells.dtype).sub_(pitch).view_as(used)).flatten()
    column = torch.arange(total_cells, device=cells.device, dtype=cells.dtype).add_(first.index_select(0, row))
    rows_in_box = (number >= margin) & (number < row1 - row0 + margin)
    low = torch.where(rows_in_box, column0, width).flatten()  # of other rows no column is in the box
    high = column1.expand_as(used).flatten()
    in_box = (column >= low.index_select(0, row)) & (column < high.index_select(0, row))
    begin = (number + row0 - margin).clamp_(0, height - 1).mul_(width).flatten()
    return _Patches(
        row=row,
        column=column.clamp_(0, width - 1),
        in_box=in_box.view(torch.uint8),
        pitch=pitch,
        number=number.repeat(len(cells)),
        begin=begin,
        rows_per_patch=len(number),
    )


class EdgeSum(torch.autograd.Function):
    """Sum over edges of -log P(same label of both ends), per mask, each pair of cells evaluated once.

    P(same) = sigmoid(a) sigmoid(b) + sigmoid(-a) sigmoid(-b) for logits a and b, so that with q(x) = log(1 + exp(-|x|))
    -log P(same) = q(a) + q(b) - q(a + b) + (min(|a|, |b|) where the signs differ), and its derivative by a is
    sigmoid(a) - sigmoid(a + b). Nothing cancels, since q(a + b) <= min(q(a), q(b)) where the signs agree, and
    nothing overflows. P(different) of a and b is P(same) of a and -b.

    The derivatives are taken with the values: a mask's sum has a single upstream factor, so the backward only scales
    and scatters them. In one pass every cell receives from at most one other, so sums do not depend on the order in
    which a device adds.

    Neighbours in the row above are fetched once; those beside them stand beside them in the lists. The list of the
    edges that count is a bit for each neighbour. At the ends of rows the lists run on into the next row, but only in
    margins, which no edge leaves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        cells: Tensor,
        edges: Tensor,
        image_index: Tensor,
        masks: Tensor | None,
        costs: tuple[Tensor, Tensor] | None,
        size: int,
        dilation: int,
        total_cells: int,
    ) -> Tensor:
        """The sums (Q,), of arguments as in `boxinst.edge_sums`."""
        area, offsets = logits.shape[1] * logits.shape[2], neighbour_offsets(size, dilation)
        if max(logits.numel(), edges.numel(), total_cells) < 2**31:  # half the traffic of what is half the work
            cells, image_index = cells.int(), image_index.int()
        patches = _unroll(cells, size // 2 * dilation, (logits.shape[1], logits.shape[2]), total_cells)
        number = torch.arange(len(logits), device=cells.device, dtype=cells.dtype)
        centre = patches.place(number * area)
        of_image = patches.place(image_index * area)
        bits = _pack(edges).index_select(0, of_image)
        bits = bits.mul_(patches.in_box)  # edges from the margin do not count
        values = at_least_float32(logits.reshape(-1).index_select(0, centre))
        label = None if masks is None else masks.reshape(-1).view(torch.uint8).index_select(0, centre)
        mixed = None
        if costs is not None:  # (B, K / 2, h, w) each -> K / 2 pairs of lists, of the edges that `_sum_pairs` looks at
            same, different = (
                [maps.reshape(-1).index_select(0, of_image) for maps in kind.unbind(1)] for kind in costs
            )
            mixed = list(zip(same, different, strict=True))
        total, slope = _sum_pairs(_Cells.of(values, bits, label), patches, offsets, mixed)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(patches.row, centre, slope)
            ctx.shape, ctx.dtype, ctx.rows_per_patch = logits.shape, logits.dtype, patches.rows_per_patch
        owner = patches.of_mask(number).index_select(0, patches.row)
        return total.new_zeros(len(logits), dtype=torch.float64).index_add_(0, owner, total.double()).to(total.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Spreads each mask's factor over its cells."""
        row, centre, slope = ctx.saved_tensors
        gradient = slope.new_zeros(ctx.shape.numel())
        factor = upstream.repeat_interleave(ctx.rows_per_patch).index_select(0, row)
        gradient.index_add_(0, centre, factor.mul_(slope))  # margins outside the grid add 0 to its border
        return gradient.reshape(ctx.shape).to(ctx.dtype), *[None] * 8


def _pack(edges: Tensor) -> Tensor:
    """(B, K, h, w) bool -> (B * h * w,) with a bit for each of the K neighbours."""
    dtype = torch.uint8 if edges.shape[1] <= 8 else torch.int32 if edges.shape[1] < 32 else torch.int64
    bits = edges.view(torch.uint8)
    packed = bits[:, 0].to(dtype, copy=True)
    for k in range(1, edges.shape[1]):
        packed |= bits[:, k].to(dtype) << k
    return packed.reshape(-1)


@dataclass(frozen=True)
class _Cells:
    """What an edge needs of either end, lists of T cells each."""

    logit: Tensor  # x
    tail: Tensor  # log(1 + exp(-|x|))
    up: Tensor  # sigmoid(x)
    down: Tensor  # sigmoid(-x)
    edges: Tensor  # a bit for each neighbour
    label: Tensor | None  # of the given mask, if there is one

    @classmethod
    def of(cls, logit: Tensor, edges: Tensor, label: Tensor | None) -> _Cells:
        """All of it from the logits (T,)."""
        return cls(logit, _tail(logit), logit.sigmoid(), (-logit).sigmoid(), edges, label)

    def take(self, index: Tensor) -> _Cells:
        """The lists at the given places."""
        return self._map(lambda values: values.index_select(0, index))  # several times faster than values[index]

    def cut(self, part: slice) -> _Cells:
        """A part of the lists, not copied."""
        return self._map(lambda values: values[part])

    def negated(self) -> _Cells:
        """Those of the opposite logits."""
        return replace(self, logit=-self.logit, up=self.down, down=self.up)

    def _map(self, function: Callable[[Tensor], Tensor]) -> _Cells:
        return _Cells(
            logit=function(self.logit),
            tail=function(self.tail),
            up=function(self.up),
            down=function(self.down),
            edges=function(self.edges),
            label=None if self.label is None else function(self.label),
        )


def _tail(values: Tensor) -> Tensor:
    return values.abs().neg_().exp_().log1p_()


def _sum_pairs(
    own: _Cells, patches: _Patches, offsets: Sequence[tuple[int, int]], mixed: Sequence[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, Tensor]:
    """Of each cell the loss of the edges to its neighbours above and to the left, and the whole derivative: (T,) each.

    The other half of the neighbours are the same pairs seen from their other end. `mixed` are K / 2 pairs of lists
    (T,): the costs of those edges, see `boxinst.edge_sums`.
    """
    total, slope = torch.zeros_like(own.logit), torch.zeros_like(own.logit)
    count, last = len(total), len(offsets) - 1
    for rows in sorted({-row for row, _ in offsets if row <= 0}):
        above = patches.above(rows) if rows else None
        others = own if above is None else own.take(above)
        pulled = slope if above is None else torch.zeros_like(slope)
        for k, (row, column) in enumerate(offsets[: len(offsets) // 2]):
            if row != -rows:
                continue
            here, there = slice(max(0, -column), count - max(0, column)), slice(max(0, column), count + min(0, column))
            a, b = own.cut(here), others.cut(there)
            weight = ((a.edges >> k) & 1).add_((b.edges >> (last - k)) & 1).to(total.dtype)
            value, by_a, by_b = (
                _edge_loss(a, b) if mixed is None else _mixed_edge_loss(a, b, mixed[k][0][here], mixed[k][1][here])
            )
            total[here].addcmul_(value, weight)
            slope[here].addcmul_(by_a, weight)
            pulled[there].addcmul_(by_b, weight)
        if above is not None:
            slope.index_add_(0, above, pulled)
    return total, slope


def _edge_loss(a: _Cells, b: _Cells) -> tuple[Tensor, Tensor, Tensor]:
    """-log P(same), where the labels differ -log P(different), and the derivatives by both logits: (T,) each.

    Without a choice between two tensors, which on a CPU costs as much as all the rest.
    """
    logit, up, down, sign = b.logit, b.up, b.down, None
    if a.label is not None and b.label is not None:
        sign = 1 - 2 * (a.label ^ b.label).to(logit.dtype)  # -1 where the labels differ
        logit = logit * sign
        up, down = logit.sigmoid(), (-logit).sigmoid()
    both = a.logit + logit
    value = (a.tail + b.tail).sub_(_tail(both))
    # min(|a|, |b|) where the signs differ, else 0: how far -b is between 0 and a
    value += torch.clamp(logit, -a.logit.clamp(min=0), -a.logit.clamp(max=0)).abs_()
    up_both, down_both = both.sigmoid(), both.neg_().sigmoid()
    # sigmoid(a) - sigmoid(a + b) as a difference of products, which stays accurate where both are near 1.
    by_a = (down_both * a.up).sub_(up_both * a.down)
    by_b = (down_both * up).sub_(up_both * down)
    return value, by_a, by_b if sign is None else by_b.mul_(sign)


def _mixed_edge_loss(a: _Cells, b: _Cells, same: Tensor, different: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """- same log P(same) - different log P(different), and the derivatives by both logits: (T,) each."""
    alike, apart = _edge_loss(a, b), _edge_loss(a, b.negated())
    value, by_a, by_b = (one.mul_(same) for one in alike)
    value.addcmul_(apart[0], different)
    return value, by_a.addcmul_(apart[1], different), by_b.addcmul_(apart[2], different, value=-1)
