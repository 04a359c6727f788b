"""Dice, projection and pairwise losses: straightforward formulations, gradcheck, cases one can compute in the head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from benchmarks import straightforward as plain
from semiseg.losses.affinity import neighbour_inside
from semiseg.losses.boxinst import (
    box_cells,
    cell_profiles,
    edge_counts,
    labelled_pairwise_loss,
    mask_projection_loss,
    pairwise_loss,
    projection_loss,
)
from semiseg.losses.dice import dice_loss

GRID = (7, 9)
# On a grid of stride 4: an inner box, the corner bottom right, the whole grid, a box between cell centres, one cell.
BOXES = torch.tensor([[5.0, 5, 21, 18], [20, 16, 36, 28], [0, 0, 36, 28], [3.2, 3.2, 4.9, 4.9], [10, 10, 10.5, 10.5]])
CELLS = box_cells(BOXES, stride=4, grid_hw=GRID)
IMAGE_INDEX = torch.tensor([0, 1, 0, 1, 1])


def random_logits(scale: float = 3.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(BOXES), *GRID, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def random_masks(seed: int = 1) -> Tensor:
    return torch.rand(len(BOXES), *GRID, generator=torch.Generator().manual_seed(seed)) > 0.5


def inside_edges(size: int, dilation: int) -> Tensor:
    sizes, bottom = torch.tensor([[28, 36], [27, 31]]), torch.tensor([0, 4])
    return neighbour_inside(sizes, bottom, stride=4, grid_hw=GRID, size=size, dilation=dilation)


def random_edges(size: int, dilation: int) -> Tensor:
    inside = inside_edges(size, dilation)
    return inside & (torch.rand(inside.shape, generator=torch.Generator().manual_seed(2)) > 0.4)


def box_masks() -> Tensor:
    return torch.stack([plain.box_mask(box, GRID, 4) for box in BOXES]).double()


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_box_cells_equal_the_definition(stride: int) -> None:
    generator = torch.Generator().manual_seed(stride)
    corner = torch.rand(40, 2, generator=generator) * 20
    boxes = torch.cat((corner, corner + torch.rand(40, 2, generator=generator) * 12), dim=1)
    boxes[::4] = boxes[::4].round()
    grid_hw = (24 // stride, 28 // stride)
    rows, columns = cell_profiles(box_cells(boxes, stride=stride, grid_hw=grid_hw), grid_hw)
    actual = rows[:, :, None] & columns[:, None, :]
    assert torch.equal(actual, torch.stack([plain.box_mask(box, grid_hw, stride) for box in boxes]).bool())


def test_box_cells_by_hand() -> None:
    # Stride 4, centres at 2, 6, 10, ...: x from floor(5) to below floor(22) holds 6, 10, 14, 18: columns 1 to 4.
    assert CELLS.tolist() == [[1, 5, 1, 5], [4, 7, 5, 9], [0, 7, 0, 9], [1, 1, 1, 1], [2, 3, 2, 3]]


def test_dice_and_projection_equal_the_straightforward_formulation() -> None:
    logits, masks = random_logits(), random_masks()
    exact = masks.double()
    for actual, expected in (
        (projection_loss(logits, CELLS), plain.projection(logits, box_masks())),
        (mask_projection_loss(logits, masks), plain.projection(logits, exact)),
        (dice_loss(logits, masks), plain.dice(logits.sigmoid(), exact)),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (5, 1), (3, 6)])
def test_pairwise_equals_the_straightforward_formulation(size: int, dilation: int) -> None:
    logits, masks, edges = random_logits().requires_grad_(), random_masks(), random_edges(size, dilation)
    inside = inside_edges(size, dilation)
    sums, counts = pairwise_loss(logits, CELLS, edges, IMAGE_INDEX, size=size, dilation=dilation)
    labelled, labelled_counts = labelled_pairwise_loss(
        logits, CELLS, masks, inside, IMAGE_INDEX, size=size, dilation=dilation
    )
    of_edges = plain.pairwise_sums(logits, box_masks(), edges[IMAGE_INDEX], size=size, dilation=dilation)
    of_labels = plain.pairwise_sums(
        logits, box_masks(), inside[IMAGE_INDEX], size=size, dilation=dilation, labels=masks.double()
    )
    for actual, number, values, count in ((sums, counts, *of_edges), (labelled, labelled_counts, *of_labels)):
        assert number.tolist() == count.tolist()
        assert dilation == 6 or number.sum() > 100
        torch.testing.assert_close(actual, values, rtol=1e-11, atol=1e-12)
        factors = torch.arange(1.0, 6, dtype=torch.float64)
        mine = torch.autograd.grad((actual * factors).sum(), logits)[0]
        theirs = torch.autograd.grad((values * factors).sum(), logits)[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_edge_counts_equal_those_of_the_loss() -> None:
    edges = random_edges(3, 2)
    _, counts = pairwise_loss(random_logits(), CELLS, edges, IMAGE_INDEX, size=3, dilation=2)
    assert counts.tolist() == edge_counts(CELLS, edges, IMAGE_INDEX).tolist()
    assert edge_counts(CELLS, edges, IMAGE_INDEX).dtype == torch.int64


def test_gradcheck() -> None:
    logits, masks = random_logits(1.0).requires_grad_(), random_masks()
    edges, inside = random_edges(3, 2), inside_edges(3, 2)
    assert gradcheck(lambda x: dice_loss(x, masks), logits)
    assert gradcheck(lambda x: projection_loss(x, CELLS), logits)
    assert gradcheck(lambda x: mask_projection_loss(x, masks), logits)
    assert gradcheck(lambda x: pairwise_loss(x, CELLS, edges, IMAGE_INDEX, size=3, dilation=2)[0], logits)
    assert gradcheck(
        lambda x: labelled_pairwise_loss(x, CELLS, masks, inside, IMAGE_INDEX, size=3, dilation=2)[0], logits
    )


def test_pairwise_by_hand() -> None:
    # Two cells side by side, both in the box, both edges count: 2 * -log(m n + (1 - m)(1 - n)).
    logits = torch.tensor([[[0.0, math.log(3)]]])  # m = 0.5, n = 0.75 -> P(same) = 0.5
    edges = torch.zeros(1, 8, 1, 2, dtype=torch.bool)
    edges[0, 3, 0, 1] = edges[0, 4, 0, 0] = True
    cells, image = torch.tensor([[0, 1, 0, 2]]), torch.tensor([0])
    sums, counts = pairwise_loss(logits, cells, edges, image, size=3, dilation=1)
    assert sums.item() == pytest.approx(2 * math.log(2))
    assert counts.item() == 2
    # With only the first cell in the box only its own edge is left.
    sums, counts = pairwise_loss(logits, torch.tensor([[0, 1, 0, 1]]), edges, image, size=3, dilation=1)
    assert sums.item() == pytest.approx(math.log(2))
    assert counts.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    # Columns alternate between 100 and -100, neighbours sit one column away: every horizontal edge disagrees.
    logits = torch.full((1, 3, 6), 100.0, dtype=dtype)
    logits[:, :, ::2] = -100
    logits.requires_grad_()
    cells, image = torch.tensor([[0, 3, 0, 6]]), torch.tensor([0])
    edges = neighbour_inside(torch.tensor([[3, 6]]), torch.tensor([0]), stride=1, grid_hw=(3, 6), size=3, dilation=1)
    sums, _ = pairwise_loss(logits, cells, edges, image, size=3, dilation=1)
    disagreeing, agreeing = 3 * 5 * 2 + 2 * 5 * 4, 2 * 6 * 2
    assert sums.item() == pytest.approx(disagreeing * (100 - math.log(2)) + agreeing * 0, rel=1e-6)
    masks = torch.ones(1, 3, 6, dtype=torch.bool)
    labelled, _ = labelled_pairwise_loss(logits, cells, masks, edges, image, size=3, dilation=1)
    total = sums.sum() + labelled.sum() + dice_loss(logits, masks).sum() + projection_loss(logits, cells).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() >= 1  # saturated, yet the disagreement pulls with full force


def test_small_losses_keep_their_precision() -> None:
    # Both ends sure and alike: -log P(same) is about exp(-|a|) + exp(-|b|), 1e-9 here, far below float32's epsilon.
    logits = torch.tensor([[[20.0, 21.0]]])
    edges = torch.zeros(1, 8, 1, 2, dtype=torch.bool)
    edges[0, 4, 0, 0] = True
    sums, _ = pairwise_loss(logits, torch.tensor([[0, 1, 0, 2]]), edges, torch.tensor([0]), size=3, dilation=1)
    assert sums.item() == pytest.approx(math.exp(-20) + math.exp(-21), rel=1e-5)


def test_empty_box() -> None:
    logits = random_logits()[[3]].requires_grad_()
    cells, image = CELLS[[3]], IMAGE_INDEX[[3]]
    loss = projection_loss(logits, cells)
    assert loss.tolist() == [2.0]
    sums, counts = pairwise_loss(logits, cells, random_edges(3, 2), image, size=3, dilation=2)
    assert (sums.tolist(), counts.tolist()) == ([0.0], [0.0])
    (gradient,) = torch.autograd.grad(loss.sum() + sums.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_masks_at_all() -> None:
    logits = torch.zeros(0, *GRID, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    cells = torch.zeros(0, 4, dtype=torch.int64)
    sums, counts = pairwise_loss(logits, cells, random_edges(3, 2), none, size=3, dilation=2)
    total = sums.sum() + projection_loss(logits, cells).sum() + dice_loss(logits, logits > 0).sum()
    total.backward()
    assert total.item() == 0
    assert counts.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert edge_counts(cells, random_edges(3, 2), none).shape == (0,)


def test_perfect_masks_cost_nothing() -> None:
    masks = torch.zeros(1, *GRID, dtype=torch.bool)
    masks[0, 1:5, 1:5] = True
    logits = torch.where(masks, 40.0, -40.0)
    cells = CELLS[[0]]
    assert dice_loss(logits, masks).item() == pytest.approx(0, abs=1e-6)
    assert projection_loss(logits, cells).item() == pytest.approx(0, abs=1e-5)
    inside = inside_edges(3, 2)
    sums, counts = labelled_pairwise_loss(logits, cells, masks, inside, torch.tensor([0]), size=3, dilation=2)
    assert sums.item() == pytest.approx(0, abs=1e-12)
    assert counts.item() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = random_logits(dtype=dtype)
    edges, masks = random_edges(3, 2), random_masks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [
            dice_loss(half, masks),
            projection_loss(half, CELLS),
            pairwise_loss(half, CELLS, edges, IMAGE_INDEX, size=3, dilation=2)[0],
        ]
    single = half.float()
    expected = [
        dice_loss(single, masks),
        projection_loss(single, CELLS),
        pairwise_loss(single, CELLS, edges, IMAGE_INDEX, size=3, dilation=2)[0],
    ]
    for actual, value in zip(losses, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, value)
    half.requires_grad_()
    pairwise_loss(half, CELLS, edges, IMAGE_INDEX, size=3, dilation=2)[0].sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype


def test_the_pairwise_loss_reads_only_boxes_and_their_neighbours() -> None:
    # Cells out of reach of every box may hold anything, even what is not a number.
    logits = random_logits()[[4]]
    cells, image = CELLS[[4]], torch.tensor([0])  # the one cell (2, 2), whose neighbours are at distance 1
    edges = inside_edges(3, 1)
    expected, _ = pairwise_loss(logits, cells, edges, image, size=3, dilation=1)
    poisoned = logits.clone()
    poisoned[0, 4:] = poisoned[0, :, 4:] = math.nan
    actual, _ = pairwise_loss(poisoned, cells, edges, image, size=3, dilation=1)
    assert torch.equal(actual, expected)


def test_memory_is_in_proportion_to_the_boxes() -> None:
    # What autograd keeps for the backward: a handful of numbers per cell of the boxes with their margin, no maps.
    logits = torch.randn(8, 200, 300, requires_grad=True)
    cells = torch.tensor([[50, 70, 80, 110]]).repeat(8, 1)
    edges = torch.ones(1, 8, 200, 300, dtype=torch.bool)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pairwise_loss(logits, cells, edges, torch.zeros(8, dtype=torch.int64), size=3, dilation=2)
    assert saved
    assert sum(saved) <= 3 * 8 * (20 + 4) * (30 + 4)


def test_edges_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pairwise_loss(random_logits(), CELLS, random_edges(5, 1), IMAGE_INDEX, size=3, dilation=1)
