"""Feature pyramid: torchvision's FPN with further levels made from P5."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from semiseg.models.resnet import BACKBONE_STRIDES


class FeaturePyramid(nn.Module):
    """FPN over the maps of the backbone, then convolutions of stride 2 for the levels coarser than 32.

    Lateral 1x1 and output 3x3 convolutions with bias, nearest upsampling, no norm (torchvision's). The first further
    level (P6) is a 3x3 convolution of stride 2 on P5, each after it one on the ReLU of the level before. torchvision's
    `LastLevelP6P7` computes the same but always both levels; small images want only P6.

    Args:
        backbone_channels: of C2..C5.
        channels: of every level.
        first_stride: of the finest level, 4, 8 or 16; finer maps of the backbone are not used.
        last_stride: of the coarsest level, a power of two; below 32 it counts as 32.
        coarse: "pool" = further levels are every second cell of the one before (Faster R-CNN's) and have no weights.
        form: "yolact" = bilinear upsampling, a ReLU behind the levels up to 32, none between the further ones.
    """

    def __init__(
        self,
        backbone_channels: Sequence[int],
        channels: int,
        *,
        first_stride: int,
        last_stride: int,
        coarse: str,
        form: str = "usual",
    ) -> None:
        super().__init__()
        self.form = form
        self.channels = channels
        self.first_input = BACKBONE_STRIDES.index(first_stride)
        self.strides = list(BACKBONE_STRIDES[self.first_input :])
        while self.strides[-1] < last_stride:
            self.strides.append(2 * self.strides[-1])
        self.fpn = FeaturePyramidNetwork(list(backbone_channels[self.first_input :]), channels)
        num_extra = len(self.strides) - len(BACKBONE_STRIDES[self.first_input :])
        pooled = coarse == "pool"
        self.extra = nn.ModuleList(nn.MaxPool2d(1, 2) if pooled else _halving(channels) for _ in range(num_extra))

    def forward(self, features: Sequence[Tensor]) -> dict[int, Tensor]:
        """From [C2, C3, C4, C5], each level (B, channels, h, w) by its stride; beyond 32, sizes are halved up."""
        used = OrderedDict((str(stride), feature) for stride, feature in zip(BACKBONE_STRIDES, features, strict=True))
        for stride in BACKBONE_STRIDES[: self.first_input]:
            del used[str(stride)]
        levels = self._bilinear(list(used.values())) if self.form == "yolact" else list(self.fpn(used).values())
        for number, conv in enumerate(self.extra):
            as_it_is = number == 0 or isinstance(conv, nn.MaxPool2d) or self.form == "yolact"
            levels.append(conv(levels[-1] if as_it_is else F.relu(levels[-1])))
        return dict(zip(self.strides, levels, strict=True))

    def _bilinear(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The levels up to 32; half-pixel, to the very size of the finer map, which may be odd."""
        merged = [block(feature) for block, feature in zip(self.fpn.inner_blocks, features, strict=True)]
        for number in reversed(range(len(merged) - 1)):
            size = merged[number].shape[-2:]
            coarser = F.interpolate(merged[number + 1], size=size, mode="bilinear", align_corners=False)
            merged[number] = merged[number] + coarser
        return [F.relu(block(level)) for block, level in zip(self.fpn.layer_blocks, merged, strict=True)]

    def parts_of_finer_levels(self, stride: int) -> list[nn.Module]:
        """What computes the levels finer than `stride` and no other: nothing passes from fine to coarse."""
        count = sum(level < stride for level in self.strides)
        return [*self.fpn.inner_blocks[:count], *self.fpn.layer_blocks[:count]]


def _halving(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
    assert conv.bias is not None
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
    return conv
