"""YOLACT's mask head: maps that the instances of an image share, and for every instance a weight of each.

In training a mask is the whole map, in evaluation it ends a cell beyond its box. Cut to the box in training, too, a
mask that fills its box would satisfy every loss of a box: only cells outside of it teach the background.
A mask begins as its box, of which prototypes take away: they stand for no place, and without that a mask has first to
learn where its object is. The box is the object's in training, the detection's in evaluation.
Source: YOLACT (Bolya et al. 2019), section 3; the box is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.models.detectors.fcos import flatten_levels
from semiseg.models.masks.head import MaskHead, conv_layers, convolve_at
from semiseg.models.upsample import aligned_upsample
from semiseg.structures.grids import MaskGrid, Regions, WholeMap
from semiseg.structures.inputs import grid_size, require
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

INSIDE, OUTSIDE = 1.0, -4.0  # bounds of what a box gives to the logits of its mask


@dataclass(frozen=True)
class PrototypeInputs:
    """What masks are made from, of a batch; see `Outputs.mask_inputs`."""

    weight_features: Tensor  # (B, R, F'), from which a location's weights are computed when a mask is wanted there
    prototypes: Tensor  # (B, K, h, w), at least 0
    wide_features: Tensor | None = None  # (B, F, h, w) what these were reduced from; None in a training without masks

    def __post_init__(self) -> None:
        require(self.weight_features.ndim == 3, "weight_features must be (B, R, F')")
        require(self.prototypes.shape[0] == len(self.weight_features), "prototypes must be (B, K, h, w)")


class PrototypeMasks(MaskHead):
    """Prototypes from one level of the pyramid, their weights from the features of the box tower.

    Attributes:
        from_box: whether a mask begins as its box.
        level_stride, edge_stride, stride: input pixels per cell of the level, the prototypes and the predicted masks.
        learns: False in a training that has no mask loss.
        in_parts: the cells are equal parts of the padded image (the original's), not at pixels of `stride`.
        shapes: anchors of a location, each with weights of its own.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        prototypes: int,
        channels: int,
        convs: int,
        norm: str,
        level_stride: int,
        stride: int,
        from_box: bool,
        in_parts: bool = False,
        shapes: int = 1,
    ) -> None:
        super().__init__()
        self.from_box, self.in_parts, self.shapes = from_box, in_parts, shapes
        self.level_stride, self.edge_stride, self.stride = level_stride, level_stride // 2, stride
        self.edge_channels = channels
        widths = [in_channels, *[channels] * convs]
        self.before = conv_layers(widths, norm=norm)
        self.after = conv_layers([widths[-1], channels], norm=norm)
        self.prototypes = nn.Conv2d(channels, prototypes, kernel_size=1)
        self.weights = nn.Conv2d(in_channels, shapes * prototypes, kernel_size=3, padding=1)
        self.learns = True
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def freeze(self) -> None:
        """The prototypes are not computed in such a training."""
        self.learns = False
        self.requires_grad_(False)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What makes the prototypes."""
        return (self.before, self.after)

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> PrototypeInputs:
        """As `MaskHead.forward`; the prototypes are 0 in a training without masks."""
        level = levels[self.level_stride]
        if self.training and not self.learns:
            batch, _, height, width = level.shape
            nothing = level.new_zeros(batch, self.prototypes.out_channels, 2 * height, 2 * width)
            return PrototypeInputs(flatten_levels(box_towers), nothing)
        wide = self.after(self._doubled(self.before(level)).relu())
        return PrototypeInputs(flatten_levels(box_towers), self.prototypes(wide).relu(), wide)

    def edge_features(self, outputs: Outputs) -> Tensor:
        """The features before they become prototypes."""
        inputs: PrototypeInputs = outputs.mask_inputs
        if inputs.wide_features is None:
            raise ValueError("a training without masks has no features of edges")
        return inputs.wide_features

    def _doubled(self, maps: Tensor) -> Tensor:
        if self.in_parts:
            return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
        return aligned_upsample(maps, 2)

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> MaskGrid:
        """The whole padded map at `stride`, or in twice as many parts as the level has cells, whatever the boxes."""
        if self.in_parts:
            height, width = padded_size_hw
            rows, columns = grid_size(padded_size_hw, self.level_stride)
            whole = boxes_xyxy.new_tensor([0, 0, width, height]).expand(len(boxes_xyxy), 4)
            return Regions(whole, (2 * rows, 2 * columns), whole_image=True)
        return WholeMap(self.stride, grid_size(padded_size_hw, self.stride))

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """As `MaskHead.predict_masks`; in evaluation a mask is 0 beyond its box and a cell around it."""
        inputs: PrototypeInputs = outputs.mask_inputs
        height, width = (side * self.edge_stride for side in inputs.prototypes.shape[-2:])
        padded_hw = outputs.padded_hw or (height, width)
        weights = convolve_at(self.weights, inputs.weight_features, outputs, queries, padded_hw).tanh()
        if queries.shape_index is not None:
            of_shapes = weights.unflatten(1, (self.shapes, -1))
            weights = of_shapes[torch.arange(len(weights), device=weights.device), queries.shape_index]
        with torch.autocast(weights.device.type, enabled=False):
            logits = weighted_sums(inputs.prototypes.float(), weights.float(), queries)
            logits = aligned_upsample(logits.unsqueeze(1), self.edge_stride // self.stride).squeeze(1)
        boxes, stride = queries.boxes_xyxy, self.stride
        if self.in_parts:  # in cells, not in pixels
            scale = [cells / side for cells, side in zip(logits.shape[1:], padded_hw, strict=True)][::-1]
            boxes, stride = boxes * boxes.new_tensor(2 * scale), 1
        if self.from_box:
            logits = logits + inner_distances(boxes, stride, logits.shape).clamp(OUTSIDE, INSIDE)
        if not self.training:
            inside = (inside_parts if self.in_parts else partial(inside_boxes, stride=stride))(
                boxes, shape=logits.shape
            )
            logits = logits.masked_fill(~inside, float("-inf"))
        grid = self.grid(queries.boxes_xyxy, padded_hw)
        return MaskLogits(logits, queries.image_index, queries.instance_index, grid)


def weighted_sums(prototypes: Tensor, weights: Tensor, queries: MaskQueries) -> Tensor:
    """Sums (Q, h, w) of each query's own image's prototypes (B, K, h, w) by its weights (Q, K).

    One product for each image: prototypes are never copied. Without queries still on the graph of both.
    """
    counts, order = queries.counts, None
    if counts is None:
        counts = tuple(torch.bincount(queries.image_index, minlength=len(prototypes)).tolist())
        order = torch.argsort(queries.image_index, stable=True)
        weights = weights[order]
    by_image = zip(weights.split(list(counts)), prototypes.flatten(2), strict=True)
    sums = torch.cat([own @ maps for own, maps in by_image]).view(-1, *prototypes.shape[-2:])
    return sums if order is None else sums[torch.argsort(order)]


def inner_distances(boxes_xyxy: Tensor, stride: int, shape: Sequence[int]) -> Tensor:
    """How far each cell (Q, h, w) lies inside its query's box (Q, 4), in cells; negative outside."""
    x0, y0, x1, y1 = boxes_xyxy[:, :, None].unbind(1)  # (Q, 1) each
    rows, columns = (torch.arange(side, device=x0.device) * stride + stride // 2 + 0.5 for side in shape[-2:])
    across, down = torch.minimum(columns - x0, x1 - columns), torch.minimum(rows - y0, y1 - rows)
    return torch.minimum(down[:, :, None], across[:, None, :]) / stride


def inside_boxes(boxes_xyxy: Tensor, stride: int, shape: Sequence[int]) -> Tensor:
    """Which cells (Q, h, w) stand in their query's box (Q, 4) or at most a cell away from it."""
    x0, y0, x1, y1 = boxes_xyxy[:, :, None].unbind(1)  # (Q, 1) each
    rows, columns = (torch.arange(side, device=x0.device) * stride + stride // 2 for side in shape[-2:])
    across = (columns >= x0 - stride) & (columns <= x1 + stride)
    down = (rows >= y0 - stride) & (rows <= y1 + stride)
    return down[:, :, None] & across[:, None, :]


def inside_parts(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """As `inside_boxes`, of boxes (Q, 4) in cells: those that begin in the box or a cell beside it.

    Source: the released network's crop; corners may be swapped.
    """
    height, width = shape[-2:]
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    sides = []
    for axis, count in ((1, height), (0, width)):
        cell = torch.arange(count, device=boxes.device)
        first, last = low[:, axis, None] - 1, high[:, axis, None] + 1
        sides.append((cell >= first) & (cell < last))
    return sides[0][:, :, None] & sides[1][:, None, :]
