"""Row `dynamic_head`: mask logits of many instances from their own filters, forward and backward.

Straightforward: the features of its image are copied to every instance, its relative coordinates are put before them,
and the layers of all instances are grouped convolutions. CondInst (Tian et al. 2020), METHOD section 3.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.bench.inputs import shared_out
from semiseg.bench.row import Close, Place, Result, Row, Sizes, Task, array
from semiseg.models.masks.dynamic import dynamic_masks, filter_shapes, num_filter_numbers

STRIDE, DYNAMIC_CHANNELS, LAYERS = 8, 8, 3
FEATURE_STEP, FILTER_STEP = 1 / 4, 1 / 8


def grouped_masks(
    features: Tensor, filters: Tensor, image_index: Tensor, location_xy: Tensor, coordinate_range: Tensor, stride: int
) -> Tensor:
    """Mask logits (N, h, w): features (B, F, h, w), filters (N, D), location_xy (N, 2) and range (N,) in pixels."""
    count, (height, width) = len(filters), features.shape[-2:]
    x = torch.arange(width, device=features.device) * stride + stride // 2
    y = torch.arange(height, device=features.device) * stride + stride // 2
    cells = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))  # (xy, h, w)
    relative = (location_xy[:, :, None, None] - cells) / coordinate_range[:, None, None, None]
    maps = torch.cat((relative, features[image_index]), dim=1)  # (N, 2 + F, h, w)
    weights, biases = _cut(filters, maps.shape[1])
    maps = maps.reshape(1, -1, height, width)
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        kernel = weight.reshape(-1, weight.shape[2], 1, 1)
        maps = F.conv2d(maps, kernel, bias.reshape(-1), groups=count)
        if number < len(weights) - 1:
            maps = F.relu(maps)
    return maps[0]


def _cut(filters: Tensor, inputs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (N, out, in) of all layers, then their biases (N, out)."""
    widths = [inputs, *[DYNAMIC_CHANNELS] * (LAYERS - 1), 1]
    weights, biases, start = [], [], 0
    for before, after in pairwise(widths):
        weights.append(filters[:, start : start + before * after].reshape(-1, after, before))
        start += before * after
    for after in widths[1:]:
        biases.append(filters[:, start : start + after])
        start += after
    return weights, biases


def _ours(sizes: Sizes, place: Place) -> Task:
    features, filters, image_index, location_xy, coordinate_range, upstream = _inputs(sizes, place.device)
    shapes = filter_shapes(sizes["channels"], DYNAMIC_CHANNELS, LAYERS)

    def run() -> Tensor:
        features.grad = filters.grad = None
        logits = dynamic_masks(
            features, filters, image_index, location_xy, coordinate_range, shapes=shapes, stride=STRIDE
        )
        logits.backward(upstream)
        return logits.detach()

    return Task(run, lambda logits: _result(logits, features, filters))


def _straightforward(sizes: Sizes, place: Place) -> Task:
    features, filters, image_index, location_xy, coordinate_range, upstream = _inputs(sizes, place.device)

    def run() -> Tensor:
        features.grad = filters.grad = None
        logits = grouped_masks(features, filters, image_index, location_xy, coordinate_range, STRIDE)
        logits.backward(upstream)
        return logits.detach()

    return Task(run, lambda logits: _result(logits, features, filters))


def _inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, filters, image index, locations, ranges, and the gradient that comes from the losses.

    Features and filters are multiples of powers of 2, locations are centres of cells: in float32 everything before a
    ReLU is then exact, in whatever order it is added. Of arbitrary numbers one among 62 million before the ReLUs of
    256 instances was 5e-8, and one side rounded it to the other side of 0: another gradient in all features there.
    """
    generator = torch.Generator().manual_seed(4)
    count, grid_hw = sizes["instances"], (sizes["rows"], sizes["columns"])
    numbers = num_filter_numbers(filter_shapes(sizes["channels"], DYNAMIC_CHANNELS, LAYERS))
    features = torch.randn(sizes["images"], sizes["channels"], *grid_hw, generator=generator)
    features = (features / FEATURE_STEP).round() * FEATURE_STEP
    filters = (0.3 * torch.randn(count, numbers, generator=generator) / FILTER_STEP).round() * FILTER_STEP
    cell_xy = (torch.rand(count, 2, generator=generator) * torch.tensor([grid_hw[1], grid_hw[0]])).floor()
    location_xy = cell_xy * STRIDE + STRIDE // 2
    coordinate_range = torch.tensor([64.0, 128.0, 256.0, 512.0, 1024.0])[torch.arange(count) % 5]
    upstream = torch.randn(count, *grid_hw, generator=generator)
    return (
        features.to(device).requires_grad_(),
        filters.to(device).requires_grad_(),
        shared_out(count, sizes["images"]).to(device),
        location_xy.to(device),
        coordinate_range.to(device),
        upstream.to(device),
    )


def _result(logits: Tensor, features: Tensor, filters: Tensor) -> Result:
    assert features.grad is not None
    assert filters.grad is not None
    return {"logits": array(logits), "features": array(features.grad), "filters": array(filters.grad)}


ROW = Row(
    name="dynamic_head",
    sizes={"instances": 64, "rows": 100, "columns": 152, "images": 2, "channels": 16},
    tiny={"instances": 4, "rows": 12, "columns": 16},
    passes=12,
    quick_passes=6,
    ours=_ours,
    straightforward=_straightforward,
    agree=Close(1e-4),
)
