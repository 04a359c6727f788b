"""Row `mask_losses`: projection and pairwise loss of many instances, forward and backward.

Straightforward: every map of every instance as a whole. METHOD section 2; BoxInst (arXiv 2012.02310), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.bench.inputs import coco_like_boxes, shared_out
from semiseg.bench.row import Close, Place, Result, Row, Sizes, Task, array
from semiseg.losses.affinity import neighbour_inside
from semiseg.losses.boxinst import box_cells, cell_profiles, pairwise_loss, projection_loss

STRIDE, SIZE, DILATION = 4, 3, 2
SHARE_OF_EDGES = 0.7  # that count, about what threshold 0.3 leaves of a photograph
DICE_EPSILON = 1e-5
LOGIT_DEVIATION = 2.0


def full_map_projection(logits: Tensor, box_masks: Tensor) -> Tensor:
    """(N,) projection losses of whole maps: logits (N, h, w), box masks (N, h, w) float."""
    scores = logits.sigmoid()
    losses = []
    for axis in (1, 2):
        predicted, wanted = scores.max(axis).values, box_masks.max(axis).values
        overlap = (predicted * wanted).sum(1)
        losses.append(1 - 2 * overlap / ((predicted**2).sum(1) + (wanted**2).sum(1) + DICE_EPSILON))
    return losses[0] + losses[1]


def full_map_pairwise(logits: Tensor) -> Tensor:
    """-log P(same label) of every cell with each of its neighbours: logits (N, h, w) -> (N, K, h, w)."""
    inside, outside = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_inside = inside[:, None] + unfold_neighbours(inside[:, None], SIZE, DILATION)[:, 0]  # (N, K, h, w)
    both_outside = outside[:, None] + unfold_neighbours(outside[:, None], SIZE, DILATION)[:, 0]
    largest = torch.maximum(both_inside, both_outside)
    return -(torch.log(torch.exp(both_inside - largest) + torch.exp(both_outside - largest)) + largest)


def unfold_neighbours(maps: Tensor, size: int, dilation: int) -> Tensor:
    """(N, C, h, w) -> (N, C, K, h, w): the K neighbours of every cell, row-major, without the cell; 0 outside."""
    count, channels, height, width = maps.shape
    margin = size // 2 * dilation
    unfolded = F.unfold(maps, size, dilation=dilation, padding=margin).view(count, channels, size**2, height, width)
    centre = size**2 // 2
    return torch.cat((unfolded[:, :, :centre], unfolded[:, :, centre + 1 :]), dim=2)


def _ours(sizes: Sizes, place: Place) -> Task:
    logits, cells, edges, image_index = _inputs(sizes, place.device)

    def run() -> tuple[Tensor, ...]:
        logits.grad = None
        projection = projection_loss(logits, cells).mean()
        sums, counts = pairwise_loss(logits, cells, edges, image_index, size=SIZE, dilation=DILATION)
        pairwise = sums.sum() / counts.sum().clamp(min=1)
        (projection + pairwise).backward()
        return projection, pairwise

    return Task(run, lambda losses: _result(losses, logits))


def _straightforward(sizes: Sizes, place: Place) -> Task:
    logits, cells, edges, image_index = _inputs(sizes, place.device)
    rows, columns = cell_profiles(cells, (logits.shape[1], logits.shape[2]))
    box_masks = (rows[:, :, None] & columns[:, None, :]).float()
    similarity = edges[image_index].float()
    del edges

    def run() -> tuple[Tensor, ...]:
        logits.grad = None
        projection = full_map_projection(logits, box_masks).mean()
        edge_losses = full_map_pairwise(logits)
        weights = (similarity >= 0.3).float() * box_masks[:, None]
        pairwise = (edge_losses * weights).sum() / weights.sum().clamp(min=1)
        (projection + pairwise).backward()
        return projection, pairwise

    return Task(run, lambda losses: _result(losses, logits))


def _inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (Q, h, w) that want a gradient, boxes as cells (Q, 4), edges (B, K, h, w) bool, image of each (Q,)."""
    generator = torch.Generator().manual_seed(1)
    count, images, grid_hw = sizes["instances"], sizes["images"], (sizes["rows"], sizes["columns"])
    size_hw = (STRIDE * grid_hw[0], STRIDE * grid_hw[1])
    logits = torch.stack([_normal_quantiles(grid_hw, generator) for _ in range(count)])
    logits = logits.mul_(LOGIT_DEVIATION).to(device).requires_grad_()
    cells = box_cells(coco_like_boxes(count, size_hw, seed=2), stride=STRIDE, grid_hw=grid_hw)
    inside = neighbour_inside(
        torch.tensor([size_hw] * images),
        torch.zeros(images, dtype=torch.int64),
        stride=STRIDE,
        grid_hw=grid_hw,
        size=SIZE,
        dilation=DILATION,
    )
    edges = inside & (torch.rand(inside.shape, generator=generator) < SHARE_OF_EDGES)
    return logits, cells.to(device), edges.to(device), shared_out(count, images).to(device)


def _normal_quantiles(size_hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(h, w) the quantiles of a normal distribution in random order: no two are alike, nor are their sigmoids.

    Of random numbers some differ by so little that their sigmoids are one float32 number. Where these are the largest
    two of a column, the maximum after the sigmoid (straightforward) and the one before it (ours) may be different
    cells, and the gradient goes there: at short side 1600 to 4 wrong cells, on the straightforward side.
    """
    area = size_hw[0] * size_hw[1]
    ranks = torch.randperm(area, generator=generator)
    quantiles: Tensor = torch.special.ndtri((ranks + 0.5) / area)
    return quantiles.view(size_hw)


def _result(losses: tuple[Tensor, ...], logits: Tensor) -> Result:
    assert logits.grad is not None
    return {"projection": array(losses[0]), "pairwise": array(losses[1]), "gradient": array(logits.grad)}


ROW = Row(
    name="mask_losses",
    sizes={"instances": 64, "rows": 200, "columns": 304, "images": 2},
    tiny={"instances": 4, "rows": 24, "columns": 32},
    passes=8,
    quick_passes=4,
    ours=_ours,
    straightforward=_straightforward,
    agree=Close(2e-5),
)
