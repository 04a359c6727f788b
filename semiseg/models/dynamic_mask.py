"""The dynamic mask head: every instance brings the weights of its own three 1x1 layers.

The features of an image are shared by its instances, never copied: the first layers of all instances of an image are
one matrix product. Relative coordinates are linear in the cell's coordinates, so the cell's x and y and a constant 1
are three more shared channels, and the location only changes the weight of the 1, which is the bias.
Source: CondInst (Tian et al. 2020), METHOD section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COORDINATES = 2  # dx, dy come before the features


def filter_shapes(mask_channels: int, dynamic_channels: int, num_layers: int) -> list[tuple[int, int]]:
    """(out, in) of each layer: relative coordinates + features -> dynamic channels -> ... -> one logit."""
    widths = [COORDINATES + mask_channels, *[dynamic_channels] * (num_layers - 1), 1]
    return list(zip(widths[1:], widths[:-1], strict=True))


def num_filter_numbers(shapes: Sequence[tuple[int, int]]) -> int:
    """How many numbers one instance's filters have: 169 for 8 mask channels, 233 for 16."""
    return sum(out * inputs + out for out, inputs in shapes)


def split_filters(filters: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Cuts filters (Q, D) into weights (Q, out, in) and biases (Q, out) per layer: all weights first, then biases."""
    sizes = [out * inputs for out, inputs in shapes] + [out for out, _ in shapes]
    parts = filters.split(sizes, dim=1)
    weights = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=False)]
    return weights, list(parts[len(shapes) :])


def dynamic_masks(
    features: Tensor,
    filters: Tensor,
    image_index: Tensor,
    location_xy: Tensor,
    coordinate_range: Tensor,
    *,
    shapes: Sequence[tuple[int, int]],
    stride: int,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Mask logits of Q queries on the grid of the features.

    Computed in float32 whatever autocast says: the coordinates of the far side of an image do not survive bfloat16.

    Args:
        features: (B, F, h, w); cell (i, j) stands for input pixel (stride * i + stride // 2, the same for j).
        filters: (Q, D), weights of all layers, then biases.
        image_index: (Q,) int64, any order (ascending saves a copy).
        location_xy: (Q, 2) input pixels from which relative coordinates count: (location - cell) / range.
        coordinate_range: (Q,) in input pixels.
        shapes: of the layers, see `filter_shapes`.
        stride: of the features, in input pixels.
        counts: how many queries each image has, if `image_index` ascends and the caller knows; nothing is then read
            back from the device and nothing reordered.

    Returns:
        (Q, h, w) float32, on the graph even when Q is 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        if counts is not None:
            return _by_image(features, filters, location_xy, coordinate_range, counts, shapes, stride)
        counts = torch.bincount(image_index, minlength=features.shape[0]).tolist()
        order = torch.argsort(image_index, stable=True)
        logits = _by_image(
            features, filters[order], location_xy[order], coordinate_range[order], counts, shapes, stride
        )
        ascending = bool((image_index[1:] >= image_index[:-1]).all())
        return logits if ascending else logits[torch.argsort(order)]


def _by_image(
    features: Tensor,
    filters: Tensor,
    location_xy: Tensor,
    coordinate_range: Tensor,
    counts: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    stride: int,
) -> Tensor:
    """`dynamic_masks` of queries that are ordered by image, `counts` of each."""
    weights, biases = split_filters(filters.float(), shapes)
    weights[0] = _absorb_coordinates(weights[0], biases[0], location_xy, coordinate_range)
    used = [image for image, count in enumerate(counts) if count] or [0]  # without queries: an empty product
    if len(used) < len(features):
        features = torch.stack([features[image] for image in used])
    shared = _with_coordinates(features.float(), stride).unbind()
    of_image = [parameter.split([counts[image] for image in used]) for parameter in (*weights, *biases[1:])]
    logits = torch.cat([_apply_layers(maps, parts) for maps, *parts in zip(shared, *of_image, strict=True)])
    return logits.view(-1, *features.shape[-2:])


def _absorb_coordinates(weight: Tensor, bias: Tensor, location_xy: Tensor, range_: Tensor) -> Tensor:
    """First layer on (features, x, y, 1) of a cell that equals the one on ((location - cell) / range, features).

    weight (Q, out, 2 + F), bias (Q, out) -> (Q, out, F + 3).
    """
    per_pixel = weight[:, :, :COORDINATES] / range_[:, None, None]  # (Q, out, 2)
    moved_bias = bias + (per_pixel * location_xy[:, None]).sum(dim=-1)
    return torch.cat([weight[:, :, COORDINATES:], -per_pixel, moved_bias[:, :, None]], dim=2)


def _with_coordinates(features: Tensor, stride: int) -> Tensor:
    """(B, F, h, w) -> (B, F + 3, h * w): the features, the x and the y pixel of each cell, and 1."""
    height, width = features.shape[-2:]
    x = torch.arange(width, device=features.device, dtype=features.dtype) * stride + stride // 2
    y = torch.arange(height, device=features.device, dtype=features.dtype) * stride + stride // 2
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width), features.new_ones(height, width)])
    return torch.cat([features, grid.expand(len(features), -1, -1, -1)], dim=1).flatten(2)


def _apply_layers(shared: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The layers of n instances of one image on its shared maps (F + 3, cells) -> logits (n, cells).

    `parameters` are the weights of all layers, then the biases of all but the first.
    """
    num_layers = (len(parameters) + 1) // 2
    first, *weights = parameters[:num_layers]
    count, out, inputs = first.shape
    x = first.reshape(count * out, inputs) @ shared  # (n * out, cells)
    for weight, bias in zip(weights, parameters[num_layers:], strict=True):
        # in place before the view: on a view, autograd would copy the map
        x = torch.baddbmm(bias[:, :, None], weight, x.relu_().view(count, weight.shape[2], x.shape[-1]))
    return x.view(count, shared.shape[1])
