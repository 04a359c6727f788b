"""The FCOS head, shared over levels, and the locations at which it predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.models.detectors.detector import Detector
from semiseg.models.detectors.select import select_detections
from semiseg.models.norms import GroupNorm
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import Candidates, DenseOutputs, Locations, Outputs

PRIOR_PROBABILITY = 0.01
HEAD_STD = 0.01


class LevelPrediction(NamedTuple):
    """What the head says of one level."""

    class_logits: Tensor  # (B, C, h, w)
    box_distances: Tensor  # (B, 4, h, w) left, top, right, bottom >= 0 in units of the stride, float32
    centreness_logits: Tensor  # (B, 1, h, w), float32
    box_tower: Tensor  # (B, channels, h, w) features from which the dynamic filters are made


class FCOSHead(Detector):
    """Two towers of (3x3 convolution, GroupNorm, ReLU); class logits on one, boxes and centreness on the other.

    Weights start at std 0.01, biases at 0, except that the class bias starts every class at probability 0.01.
    Source: FCOS (Tian et al. 2019), METHOD section 3.
    """

    def __init__(
        self, channels: int, *, num_classes: int, strides: Sequence[int], tower_convs: int, groups: int
    ) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.class_tower = conv_tower(channels, tower_convs, groups)
        self.box_tower = conv_tower(channels, tower_convs, groups)
        self.class_logits = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.box_distances = nn.Conv2d(channels, 4, kernel_size=3, padding=1)
        self.centreness = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.level_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in self.strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=HEAD_STD)
                nn.init.zeros_(module.bias)
        assert self.class_logits.bias is not None
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def predict(
        self, levels: Mapping[int, Tensor], padded_size_hw: tuple[int, int], image_sizes_hw: Tensor
    ) -> tuple[DenseOutputs, Sequence[Tensor]]:
        """As `Detector.predict`; the features are those of the box tower."""
        predictions: list[LevelPrediction] = self([levels[stride] for stride in self.strides])
        sizes = [grid_size(padded_size_hw, stride) for stride in self.strides]
        outputs = DenseOutputs(
            class_logits=flatten_levels([level.class_logits for level in predictions]),
            box_distances=flatten_levels([level.box_distances for level in predictions]),
            centreness_logits=flatten_levels([level.centreness_logits for level in predictions])[..., 0],
            locations=make_locations(sizes, self.strides, image_sizes_hw.device),
        )
        return outputs, [level.box_tower for level in predictions]

    def candidates(self, outputs: Outputs, image_sizes_hw: Tensor, **limits: Any) -> list[Candidates]:
        """As `Detector.candidates`."""
        assert isinstance(outputs, DenseOutputs)
        return select_detections(outputs, image_sizes_hw, **limits)

    def forward(self, levels: Sequence[Tensor]) -> list[LevelPrediction]:
        """Predictions per level, in the order of `levels`, one for each of `strides`."""
        # One convolution for both predictions of the box tower: they are narrow, so reading the tower costs most.
        assert self.box_distances.bias is not None
        assert self.centreness.bias is not None
        weight = torch.cat([self.box_distances.weight, self.centreness.weight])
        bias = torch.cat([self.box_distances.bias, self.centreness.bias])
        scales = zip(levels, self.level_scales, strict=True)
        return [self._predict(level, scale, weight, bias) for level, scale in scales]

    def _predict(self, level: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> LevelPrediction:
        box_tower = self.box_tower(level)
        with torch.autocast(level.device.type, enabled=False):
            # float32: half precision would move the side of a 500-pixel box by up to a pixel
            box_distances, centreness_logits = F.conv2d(box_tower.float(), weight, bias, padding=1).split([4, 1], dim=1)
            box_distances = F.relu(scale * box_distances)
        class_logits = self.class_logits(self.class_tower(level))
        return LevelPrediction(class_logits, box_distances, centreness_logits, box_tower)


def conv_tower(channels: int, convs: int, groups: int) -> nn.Sequential:
    """So many 3x3 convolutions, each with GroupNorm and ReLU behind it."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers.append(nn.Conv2d(channels, channels, kernel_size=3, padding=1))
        layers.append(GroupNorm(groups, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Joins maps (B, K, h_l, w_l) to (B, R, K): level after level, each row-major."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def neighbourhoods(locations: Locations, index: Tensor, padded_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The 3 x 3 locations around given ones, of the same level, row-major.

    Args:
        locations: of all levels.
        index: (Q,) int64.
        padded_hw: height and width of the padded images in input pixels, which the levels cover.

    Returns:
        (Q, 9) int64 indices, and (Q, 9) bool, whether there is such a location; where not, the index is another's.
    """
    stride = locations.stride[index]
    column, row = torch.div(locations.xy[index], stride[:, None], rounding_mode="floor").long().unbind(1)
    height, width = (((side + stride - 1) / stride).floor().long() for side in padded_hw)
    step = torch.arange(-1, 2, device=index.device)
    rows, columns = row[:, None] + step, column[:, None] + step  # (Q, 3)
    row_exists = (rows >= 0) & (rows < height[:, None])
    column_exists = (columns >= 0) & (columns < width[:, None])
    exists = (row_exists[:, :, None] & column_exists[:, None]).flatten(1)
    steps = (step[:, None] * width[:, None, None] + step).flatten(1)
    return index[:, None] + steps * exists, exists


def make_locations(sizes_hw: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Locations:
    """The locations of maps of the given (height, width) and strides: pixel stride * index + stride // 2."""
    xy, stride_of, level_of = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes_hw, strides, strict=True)):
        rows = torch.arange(height, device=device) * stride + stride // 2
        columns = torch.arange(width, device=device) * stride + stride // 2
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        xy.append(torch.stack([x, y], dim=-1).reshape(-1, 2).float())
        stride_of.append(torch.full((height * width,), float(stride), device=device))
        level_of.append(torch.full((height * width,), level, dtype=torch.int64, device=device))
    return Locations(
        xy=torch.cat(xy),
        stride=torch.cat(stride_of),
        level=torch.cat(level_of),
        counts=tuple(height * width for height, width in sizes_hw),
    )
