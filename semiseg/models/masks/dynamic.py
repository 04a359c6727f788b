"""CondInst's mask head: shared features of an image, and for every instance the weights of its own three 1x1 layers.

The features of an image are shared by its instances, never copied: the first layers of all instances of an image are
one matrix product. Relative coordinates are linear in the cell's coordinates, so the cell's x and y and a constant 1
are three more shared channels, and the location only changes the weight of the 1, which is the bias.
Source: CondInst (Tian et al. 2020), METHOD section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from semiseg.config.model import Norm
from semiseg.models.detectors.fcos import HEAD_STD, flatten_levels
from semiseg.models.masks.head import MaskHead, convolve_at
from semiseg.models.norms import norm_layer
from semiseg.models.upsample import aligned_upsample
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import grid_size, require
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

COORDINATES = 2  # dx, dy come before the features


@dataclass(frozen=True)
class DynamicInputs:
    """What masks are made from, of a batch; see `Outputs.mask_inputs`."""

    filter_features: Tensor  # (B, R, F'), from which a location's filters are computed when a mask is wanted there
    mask_features: Tensor  # (B, F, h, w) shared by all instances of an image
    wide_features: Tensor | None = None  # (B, F'', h, w) what these were reduced from; None in a training without masks

    def __post_init__(self) -> None:
        require(self.filter_features.ndim == 3, "filter_features must be (B, R, F')")
        require(self.mask_features.shape[0] == len(self.filter_features), "mask_features must be (B, F, h, w)")


class DynamicMasks(MaskHead):
    """Mask branch, and the controller that writes each instance's mask head.

    Attributes:
        feature_stride, stride: input pixels per cell of the shared features and of the predicted masks.
        level_strides: of the levels that the branch takes, finest first.
        coordinate_ranges: (levels,) input pixels by which the relative coordinates of a location's level are divided.
        learns: False in a training that has no mask loss.
    """

    coordinate_ranges: Tensor

    def __init__(
        self,
        *,
        branch: MaskBranch,
        channels: int,
        level_strides: Sequence[int],
        stride: int,
        coordinate_ranges: Sequence[float],
        dynamic_channels: int,
        dynamic_layers: int,
    ) -> None:
        super().__init__()
        self.level_strides = tuple(level_strides)
        self.feature_stride = self.edge_stride = self.level_strides[0]
        self.edge_channels = branch.channels
        self.stride = stride
        self.filter_shapes = filter_shapes(branch.out_channels, dynamic_channels, dynamic_layers)
        self.controller = _controller(channels, num_filter_numbers(self.filter_shapes))
        self.branch = branch
        self.learns = True
        # a buffer for its device only: it follows from the configuration, so it is not part of the weights
        self.register_buffer("coordinate_ranges", torch.tensor(coordinate_ranges), persistent=False)

    def freeze(self) -> None:
        """The branch is not computed in such a training: on the finest map its gradients, 0 everywhere, are dear."""
        self.learns = False
        self.requires_grad_(False)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The branch."""
        return (self.branch,)

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> DynamicInputs:
        """As `MaskHead.forward`; the features are 0 in a training without masks."""
        taken = [levels[stride] for stride in self.level_strides]
        if self.training and not self.learns:
            batch, _, height, width = taken[0].shape
            features = taken[0].new_zeros(batch, self.branch.out_channels, height, width)
            return DynamicInputs(flatten_levels(box_towers), features)
        features, wide = self.branch(taken)
        return DynamicInputs(flatten_levels(box_towers), features, wide)

    def edge_features(self, outputs: Outputs) -> Tensor:
        """The branch's features before they are reduced to few channels."""
        inputs: DynamicInputs = outputs.mask_inputs
        if inputs.wide_features is None:
            raise ValueError("a training without masks has no features of edges")
        return inputs.wide_features

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> WholeMap:
        """The whole padded map at `stride`, whatever the boxes."""
        return WholeMap(self.stride, grid_size(padded_size_hw, self.stride))

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """Mask logits (Q, h, w) of the queried locations on the whole padded map, at `stride`."""
        inputs: DynamicInputs = outputs.mask_inputs
        locations = outputs.locations
        logits = dynamic_masks(
            inputs.mask_features,
            self.filters(outputs, queries),
            queries.image_index,
            locations.xy[queries.location_index],
            self.coordinate_ranges[locations.level[queries.location_index]],
            shapes=self.filter_shapes,
            stride=self.feature_stride,
            counts=queries.counts,
        )
        logits = aligned_upsample(logits.unsqueeze(1), self.feature_stride // self.stride).squeeze(1)
        return MaskLogits(
            logits=logits,
            image_index=queries.image_index,
            instance_index=queries.instance_index,
            grid=WholeMap(self.stride, (logits.shape[1], logits.shape[2])),
        )

    def filters(self, outputs: Outputs, queries: MaskQueries) -> Tensor:
        """The filters (Q, D) of the queried locations: weights of all layers, then biases."""
        inputs: DynamicInputs = outputs.mask_inputs
        height, width = (side * self.feature_stride for side in inputs.mask_features.shape[-2:])
        return convolve_at(self.controller, inputs.filter_features, outputs, queries, (height, width))


def _controller(channels: int, numbers: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, numbers, kernel_size=3, padding=1)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=HEAD_STD)
    nn.init.zeros_(conv.bias)
    return conv


class MaskBranch(nn.Module):
    """Refines pyramid levels, sums them at the finest one's stride, and reduces the sum to few channels.

    3x3 convolutions without bias before a norm, Kaiming-uniform (a = 1) like the FPN's; a last 1x1 with bias.

    Args:
        in_channels: channels of the pyramid.
        num_levels: number of levels, each twice as coarse as the one before.
        channels: width of the branch.
        convs: number of convolutions after the sum.
        out_channels: channels of the result (METHOD: 16, CondInst's own config 8).
        norm: kind of every norm.
    """

    def __init__(
        self, in_channels: int, *, num_levels: int, channels: int, convs: int, out_channels: int, norm: Norm
    ) -> None:
        super().__init__()
        self.out_channels, self.channels = out_channels, channels
        make_norm = norm_layer(norm)
        self.refine = nn.ModuleList(
            Conv2dNormActivation(in_channels, channels, norm_layer=make_norm) for _ in range(num_levels)
        )
        tower = [Conv2dNormActivation(channels, channels, norm_layer=make_norm) for _ in range(convs)]
        self.tower = nn.Sequential(*tower, nn.Conv2d(channels, out_channels, kernel_size=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, out_channels, h, w) at the stride of the first of `levels`, and the (B, channels, h, w) it is made of."""
        total = self.refine[0](levels[0])
        for number in range(1, len(self.refine)):
            total = total + aligned_upsample(self.refine[number](levels[number]), 2**number)
        wide: Tensor = self.tower[:-1](total)
        return self.tower[-1](wide), wide


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
