"""The straightforward BoxInst of row `step`: plain torch and torchvision modules, everything everywhere, one image and
one instance after the other. Parameters bear the names of `models.condinst.CondInst`, so that both start alike.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d, sigmoid_focal_loss

from benchmarks import straightforward as plain

STRIDES = (8, 16, 32, 64, 128)
COORDINATE_RANGES = (64.0, 128.0, 256.0, 512.0, 1024.0)
LEVEL_RANGES = (-1.0, 64.0, 128.0, 256.0, 512.0, math.inf)
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MASK_STRIDE, MASK_FEATURE_STRIDE = 4, 8
CHANNELS, BRANCH_CHANNELS, MASK_CHANNELS = 256, 128, 16
FILTERS = 233  # numbers of an instance: three layers of 18, 8 and 8 inputs
CENTRE_RADIUS, MAX_POSITIVES = 1.5, 64
SIZE, DILATION, THRESHOLD = 3, 2, 0.3


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


class PlainCondInst(nn.Module):
    """ResNet-50 with frozen batch norm, stem and first stage; FPN from P3 to P7; FCOS; the mask branch and its filters.

    Images need no padding: their sides divide by 32.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = resnet50(norm_layer=FrozenBatchNorm2d)
        del self.backbone.avgpool, self.backbone.fc
        for frozen in (self.backbone.conv1, self.backbone.layer1):
            frozen.requires_grad_(False)
        further = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(2))
        self.neck: Any = nn.ModuleDict({"fpn": FeaturePyramidNetwork([512, 1024, 2048], CHANNELS), "extra": further})
        self.detector: Any = nn.ModuleDict(
            {
                "class_tower": _tower(),
                "box_tower": _tower(),
                "class_logits": nn.Conv2d(CHANNELS, num_classes, 3, padding=1),
                "box_distances": nn.Conv2d(CHANNELS, 4, 3, padding=1),
                "centreness": nn.Conv2d(CHANNELS, 1, 3, padding=1),
                "level_scales": nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in STRIDES),
            }
        )
        refine = nn.ModuleList(Conv2dNormActivation(CHANNELS, BRANCH_CHANNELS) for _ in range(3))
        tower = [Conv2dNormActivation(BRANCH_CHANNELS, BRANCH_CHANNELS) for _ in range(4)]
        last = nn.Conv2d(BRANCH_CHANNELS, MASK_CHANNELS, 1)
        branch = nn.ModuleDict({"refine": refine, "tower": nn.Sequential(*tower, last)})
        controller = nn.Conv2d(CHANNELS, FILTERS, 3, padding=1)
        self.mask_head: Any = nn.ModuleDict({"controller": controller, "branch": branch})

    def forward(self, images: Tensor) -> PlainOutputs:
        """(B, 3, H, W) uint8."""
        levels, head, branch = self._levels(images), self.detector, self.mask_head["branch"]
        boxes = [head["box_tower"](level) for level in levels]
        scaled = [scale * head["box_distances"](box) for scale, box in zip(head["level_scales"], boxes, strict=True)]
        fine, middle, coarse = (refine(level) for refine, level in zip(branch["refine"], levels[:3], strict=True))
        fused = fine + plain.aligned_upsample(middle, 2) + plain.aligned_upsample(coarse, 4)
        return PlainOutputs(
            class_logits=_flat([head["class_logits"](head["class_tower"](level)) for level in levels]),
            distances=_flat([F.relu(distances) for distances in scaled]),
            centreness_logits=_flat([head["centreness"](box) for box in boxes])[..., 0],
            filters=_flat([self.mask_head["controller"](box) for box in boxes]),
            mask_features=branch["tower"](fused),
            **_locations([level.shape[-2:] for level in levels], images.device),
        )

    def _levels(self, images: Tensor) -> list[Tensor]:
        """P3 to P7."""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        body = self.backbone
        c2 = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1((images.float() - mean) / std)))))
        c3 = body.layer2(c2)
        c4 = body.layer3(c3)
        levels = list(self.neck["fpn"](OrderedDict(c3=c3, c4=c4, c5=body.layer4(c4))).values())
        levels.append(self.neck["extra"][0](levels[-1]))
        levels.append(self.neck["extra"][1](F.relu(levels[-1])))
        return levels


def plain_losses(
    model: PlainCondInst, images: Tensor, boxes: Tensor, labels: Tensor, image_index: Tensor
) -> dict[str, Tensor]:
    """The five losses of a batch without a mask: images (B, 3, H, W) uint8, boxes (N, 4), labels and image (N,)."""
    outputs = model(images)
    of_images = []
    for image in range(len(images)):
        mine = (image_index == image).nonzero()[:, 0]
        places = (outputs.xy, outputs.stride, outputs.level)
        smallest = plain.assign(*places, boxes[mine], ranges=LEVEL_RANGES, radius=CENTRE_RADIUS)
        of_images.append(torch.where(smallest < 0, -1, mine[smallest]))
    matched = torch.stack(of_images)  # (B, R) instance of each location, -1 = background
    losses = _detection_losses(outputs, boxes, labels, matched)
    with torch.no_grad():
        scores = outputs.class_logits.sigmoid().amax(2) * outputs.centreness_logits.sigmoid()
    sampled = torch.tensor(plain.sample(scores, matched, MAX_POSITIVES), device=images.device)
    of_image, location, instance = sampled.reshape(-1, 3).unbind(1)
    logits = _masks(outputs, of_image, location)
    similarity, box_masks = instance_affinity(images, boxes, image_index, bottom=0)
    similarity, box_masks = similarity[instance], box_masks[instance]  # one copy for each mask
    edges = similarity >= THRESHOLD
    sums, counts = plain.pairwise_sums(logits, box_masks, edges, size=SIZE, dilation=DILATION)
    losses["projection"] = plain.projection(logits, box_masks).mean()
    losses["pairwise"] = sums.sum() / counts.sum().clamp(min=1)
    return losses


def instance_affinity(images: Tensor, boxes: Tensor, image_index: Tensor, *, bottom: int) -> tuple[Tensor, Tensor]:
    """Similarity (N, K, h, w) and box masks (N, h, w), one of each per instance, images one after the other."""
    size_hw = (images.shape[2], images.shape[3])
    grid_hw = (size_hw[0] // MASK_STRIDE, size_hw[1] // MASK_STRIDE)
    similarity, masks = [], []
    for index, image in enumerate(images):
        of_image = plain.similarity(
            image, size_hw, bottom=bottom, stride=MASK_STRIDE, size=SIZE, dilation=DILATION, dtype=torch.float32
        )
        for box in boxes[image_index == index]:
            similarity.append(of_image.clone())
            masks.append(plain.box_mask(box, grid_hw, MASK_STRIDE))
    return torch.stack(similarity), torch.stack(masks)


def _masks(outputs: PlainOutputs, image: Tensor, location: Tensor) -> Tensor:
    """Mask logits (Q, h, w) at stride 4 of the chosen locations (Q,) of the images (Q,)."""
    ranges = outputs.xy.new_tensor(COORDINATE_RANGES)[outputs.level[location]]
    features, filters, xy = outputs.mask_features, outputs.filters[image, location], outputs.xy[location]
    logits = plain.dynamic_masks(features, filters, image, xy, ranges, channels=8, layers=3, stride=MASK_FEATURE_STRIDE)
    return plain.aligned_upsample(logits[:, None], MASK_FEATURE_STRIDE // MASK_STRIDE)[:, 0]


def _detection_losses(outputs: PlainOutputs, boxes: Tensor, labels: Tensor, matched: Tensor) -> dict[str, Tensor]:
    image, location = (matched >= 0).nonzero(as_tuple=True)
    instance = matched[image, location]
    wanted = torch.zeros_like(outputs.class_logits)
    wanted[image, location, labels[instance]] = 1
    xy, stride = outputs.xy[location], outputs.stride[location, None]
    target = torch.cat((xy - boxes[instance, :2], boxes[instance, 2:] - xy), dim=1) / stride
    across, down = target[:, 0::2], target[:, 1::2]
    centreness = (across.amin(1) / across.amax(1) * down.amin(1) / down.amax(1)).sqrt()
    giou = plain.generalised_iou(outputs.distances[image, location], target)
    count = max(len(image), 1)
    focal = sigmoid_focal_loss(outputs.class_logits, wanted, alpha=0.25, gamma=2.0, reduction="sum")
    predicted = outputs.centreness_logits[image, location]
    return {
        "classification": focal / count,
        "box": ((1 - giou) * centreness).sum() / centreness.sum().clamp(min=1e-6),
        "centreness": F.binary_cross_entropy_with_logits(predicted, centreness, reduction="sum") / count,
    }


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
