"""Bidirectional feature pyramid: every repeat passes features down the levels and up again, with learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from semiseg.config.model import BIFPN_STRIDES, Norm
from semiseg.models.norms import norm_layer
from semiseg.models.resnet import BACKBONE_STRIDES

NUM_LEVELS = len(BIFPN_STRIDES)  # level 0 is P3
FUSION_EPSILON = 1e-4


@dataclass(frozen=True)
class Node:
    """One sum of a repeat: at `level`, of the maps numbered `inputs` (0..4 the originals, 5.. the nodes in order)."""

    level: int
    inputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in the names of its parameters, such as `f3_3_4`."""
        return "_".join([f"f{self.level}", *map(str, self.inputs)])


def _nodes() -> tuple[Node, ...]:
    """Down at levels 3..0 from the level above, then up at 1..4 from the level below; the top has no downward node."""
    nodes: list[Node] = []
    latest = list(range(NUM_LEVELS))  # number of the newest map of each level
    for level in range(NUM_LEVELS - 2, -1, -1):
        nodes.append(Node(level, (level, latest[level + 1])))
        latest[level] = NUM_LEVELS + len(nodes) - 1
    for level in range(1, NUM_LEVELS):
        inputs = (level, latest[level], latest[level - 1])
        nodes.append(Node(level, tuple(dict.fromkeys(inputs))))
        latest[level] = NUM_LEVELS + len(nodes) - 1
    return tuple(nodes)


NODES = _nodes()
# Level of every map by its number.
MAP_LEVELS = (*range(NUM_LEVELS), *(node.level for node in NODES))


class BiFPN(nn.Module):
    """Repeated bidirectional fusion of five levels, strides 8..128.

    P6 is a 1x1 convolution with norm on C5 and a 3x3 max-pool of stride 2, P7 another max-pool. Interface as
    `FeaturePyramid`. Source: EfficientDet (Tan et al. 2020) as the reference builds it, METHOD section 3.

    Args:
        backbone_channels: of C2..C5; C2 is not used.
        channels: of every level.
        repeats: number of repeats, at least 1.
        norm: kind of the norm behind every convolution.
    """

    def __init__(self, backbone_channels: Sequence[int], channels: int, *, repeats: int, norm: Norm) -> None:
        super().__init__()
        self.channels = channels
        self.strides = list(BIFPN_STRIDES)
        self.first_input = BACKBONE_STRIDES.index(BIFPN_STRIDES[0])
        self.p6 = _conv_norm(backbone_channels[-1], channels, kernel_size=1, norm=norm)
        from_backbone = list(backbone_channels[self.first_input :])
        made = [channels] * (NUM_LEVELS - len(from_backbone))
        widths = [[*from_backbone, *made], *([channels] * NUM_LEVELS for _ in range(repeats - 1))]
        self.blocks = nn.ModuleList(BiFPNBlock(inputs, channels, norm=norm) for inputs in widths)

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """From [C2, C3, C4, C5], each level (B, channels, h, w) by its stride; beyond 32, sizes are halved up."""
        p6 = _halve(self.p6(features[-1]))
        levels = [*features[self.first_input :], p6, _halve(p6)]
        for block in self.blocks:
            levels = block(levels)
        return dict(zip(self.strides, levels, strict=True))

    def parts_of_finer_levels(self, stride: int) -> list[nn.Module]:
        """Nothing: every level passes into every other, and none is finer than those that predict."""
        return []


class BiFPNBlock(nn.Module):
    """One repeat: from five maps, finest first, each half the size of the one before, to five of `channels` channels.

    Parameters are named after the reference's: `weights_f{level}_{inputs}` and `outputs_f{level}_{inputs}` of a node,
    `lateral_{input}_f{level}` of an input whose width is not `channels`.
    """

    def __init__(self, input_channels: Sequence[int], channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.has_lateral = [width != channels for width in input_channels]
        for level, width in enumerate(input_channels):
            if self.has_lateral[level]:
                lateral = _conv_norm(width, channels, kernel_size=1, norm=norm, bias=True)
                self.add_module(f"lateral_{level}_f{level}", lateral)
        for node in NODES:
            self.register_parameter(f"weights_{node.name}", nn.Parameter(torch.ones(len(node.inputs))))
            self.add_module(f"outputs_{node.name}", _conv_norm(channels, channels, kernel_size=3, norm=norm))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        # The two nodes of a level share its lateral, so it is computed once. (The reference computes it twice: the
        # same values, but its running statistics move twice a step.)
        maps = [
            getattr(self, f"lateral_{level}_f{level}")(one) if self.has_lateral[level] else one
            for level, one in enumerate(levels)
        ]
        sizes_hw = [one.shape[-2:] for one in maps]
        newest = list(maps)
        for node in NODES:
            inputs = [_at_level(maps[i], MAP_LEVELS[i] - node.level, sizes_hw[node.level]) for i in node.inputs]
            fused = F.silu(weighted_mean(inputs, getattr(self, f"weights_{node.name}")))
            newest[node.level] = getattr(self, f"outputs_{node.name}")(fused)
            maps.append(newest[node.level])
        return newest


def weighted_mean(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of maps of one shape with shares ReLU(w) / (sum of ReLU(w) + 1e-4), "fast normalised fusion"; weights (n,).

    Negative weights count as 0; if all do, the result is 0.
    """
    positive = F.relu(weights)
    shares = positive / (positive.sum() + FUSION_EPSILON)
    total = maps[0] * shares[0]
    for number in range(1, len(maps)):
        total = total + maps[number] * shares[number]
    return total


def _at_level(features: Tensor, steps_up: int, size_hw: torch.Size) -> Tensor:
    """Brings a map that is `steps_up` levels coarser (1), finer (-1) or neither (0) to the size of the target level."""
    if steps_up == 0:
        return features
    return _halve(features) if steps_up < 0 else F.interpolate(features, size=size_hw, mode="nearest")


def _halve(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""
    return F.max_pool2d(features, kernel_size=3, stride=2, padding=1)


def _conv_norm(inputs: int, outputs: int, *, kernel_size: int, norm: Norm, bias: bool = False) -> Conv2dNormActivation:
    """Convolution and norm, Kaiming-uniform (a = 1) like the FPN's."""
    block = Conv2dNormActivation(
        inputs, outputs, kernel_size, norm_layer=norm_layer(norm), activation_layer=None, bias=bias
    )
    conv = block[0]
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if bias:
        nn.init.zeros_(conv.bias)
    return block
