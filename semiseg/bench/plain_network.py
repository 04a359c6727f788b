"""The straightforward BoxInst network of row `step`: plain torch and torchvision modules, everything everywhere.

Parameters bear the names of `models.condinst.CondInst`, so that both start from the same weights. METHOD section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d

from semiseg.bench.dynamic_head import DYNAMIC_CHANNELS, LAYERS, grouped_masks
from semiseg.models.masks.dynamic import filter_shapes, num_filter_numbers

STRIDES = (8, 16, 32, 64, 128)
COORDINATE_RANGES = (64.0, 128.0, 256.0, 512.0, 1024.0)
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MASK_STRIDE, MASK_FEATURE_STRIDE = 4, 8
CHANNELS, BRANCH_CHANNELS, MASK_CHANNELS = 256, 128, 16


class PlainOutputs(NamedTuple):
    """Of R locations, level after level: class logits (B, R, C), distances in strides (B, R, 4), centreness logits
    (B, R), filters (B, R, D); features of the masks (B, F, h, w); place in pixels (R, 2), stride and level (R,).
    """

    class_logits: Tensor
    distances: Tensor
    centreness_logits: Tensor
    filters: Tensor
    mask_features: Tensor
    xy: Tensor
    stride: Tensor
    level: Tensor


class PlainResNet50(ResNet):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's, with its frozen batch norm and without its classifier; stem and first stage are not trained."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], norm_layer=FrozenBatchNorm2d)
        del self.avgpool, self.fc
        for frozen in (self.conv1, self.layer1):
            frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C3, C4 and C5."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]


class PlainPyramid(nn.Module):
    """torchvision's FPN with two further levels."""

    def __init__(self) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork([512, 1024, 2048], CHANNELS)
        self.extra = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """P3 to P7."""
        levels = list(self.fpn(OrderedDict((str(number), m) for number, m in enumerate(maps))).values())
        levels.append(self.extra[0](levels[-1]))
        levels.append(self.extra[1](F.relu(levels[-1])))
        return levels


class PlainHead(nn.Module):
    """The FCOS head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.class_tower, self.box_tower = _tower(), _tower()
        self.class_logits = nn.Conv2d(CHANNELS, num_classes, 3, padding=1)
        self.box_distances = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.centreness = nn.Conv2d(CHANNELS, 1, 3, padding=1)
        self.level_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in STRIDES)


class PlainMaskBranch(nn.Module):
    """P3 to P5 to the shared features of the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.ModuleList(Conv2dNormActivation(CHANNELS, BRANCH_CHANNELS) for _ in range(3))
        tower = [Conv2dNormActivation(BRANCH_CHANNELS, BRANCH_CHANNELS) for _ in range(4)]
        self.tower = nn.Sequential(*tower, nn.Conv2d(BRANCH_CHANNELS, MASK_CHANNELS, 1))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """(B, F, h, w) at the stride of the first level."""
        fine, middle, coarse = (refine(level) for refine, level in zip(self.refine, levels, strict=True))
        features: Tensor = self.tower(fine + aligned(middle, 2) + aligned(coarse, 4))
        return features


class PlainCondInst(nn.Module):
    """The whole network; images need no padding, their sides divide by 32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = PlainResNet50()
        self.neck = PlainPyramid()
        self.head = PlainHead(num_classes)
        shapes = filter_shapes(MASK_CHANNELS, DYNAMIC_CHANNELS, LAYERS)
        self.controller = nn.Conv2d(CHANNELS, num_filter_numbers(shapes), 3, padding=1)
        self.mask_branch = PlainMaskBranch()

    def forward(self, images: Tensor) -> PlainOutputs:
        """(B, 3, H, W) uint8."""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        levels = self.neck(self.backbone((images.float() - mean) / std))
        head = self.head
        boxes = [head.box_tower(level) for level in levels]
        distances = [
            F.relu(scale * head.box_distances(box)) for scale, box in zip(head.level_scales, boxes, strict=True)
        ]
        return PlainOutputs(
            class_logits=_flat([head.class_logits(head.class_tower(level)) for level in levels]),
            distances=_flat(distances),
            centreness_logits=_flat([head.centreness(box) for box in boxes])[..., 0],
            filters=_flat([self.controller(box) for box in boxes]),
            mask_features=self.mask_branch(levels[:3]),
            **_locations([level.shape[-2:] for level in levels], images.device),
        )

    def masks(self, outputs: PlainOutputs, image: Tensor, location: Tensor) -> Tensor:
        """Mask logits (Q, h, w) at stride 4 of the chosen locations (Q,) of the images (Q,)."""
        ranges = outputs.xy.new_tensor(COORDINATE_RANGES)[outputs.level[location]]
        filters = outputs.filters[image, location]
        logits = grouped_masks(outputs.mask_features, filters, image, outputs.xy[location], ranges, MASK_FEATURE_STRIDE)
        return aligned(logits[:, None], MASK_FEATURE_STRIDE // MASK_STRIDE)[:, 0]


def aligned(maps: Tensor, factor: int) -> Tensor:
    """Aligned bilinear upsampling: repeat the border, resize corner to corner, shift by half a step, crop."""
    if factor == 1:
        return maps
    height, width = (factor * side for side in maps.shape[-2:])
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    maps = F.interpolate(maps, size=(height + 1, width + 1), mode="bilinear", align_corners=True)
    return F.pad(maps, (factor // 2, 0, factor // 2, 0), mode="replicate")[..., :height, :width]


def _tower() -> nn.Sequential:
    layers = ((nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(32, CHANNELS), nn.ReLU()) for _ in range(4))
    return nn.Sequential(*[layer for three in layers for layer in three])


def _flat(maps: list[Tensor]) -> Tensor:
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps], dim=1)


def _locations(sizes_hw: list[torch.Size], device: torch.device) -> dict[str, Tensor]:
    xy, strides, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes_hw, STRIDES, strict=True)):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        xy.append(torch.stack((x, y), dim=-1).reshape(-1, 2) * stride + stride // 2)
        strides.append(torch.full((height * width,), float(stride)))
        levels.append(torch.full((height * width,), level))
    parts = {"xy": torch.cat(xy).float(), "stride": torch.cat(strides), "level": torch.cat(levels)}
    return {name: values.to(device) for name, values in parts.items()}
