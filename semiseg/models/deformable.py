"""Modulated deformable convolution (DCNv2): every output cell chooses where, and how strongly, its kernel looks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

KERNEL_POINTS = 9
OFFSET_CHANNELS = 2 * KERNEL_POINTS


class DeformableConv(nn.Conv2d):
    """A 3x3 convolution without bias, padding 1, whose nine points are shifted and weighted by what it sees.

    `offset`, a 3x3 convolution with bias that starts at 0, gives 27 channels: 0..17 the shifts in cells, (dy, dx) of
    each point, rows of the kernel first (torchvision's order); 18..26 the points' weights before the sigmoid. Outside
    the map the input is 0. At the start all shifts are 0 and all weights 1/2, so the result is half the ordinary
    convolution's, as in the reference; a frozen norm behind it does not make up for that.

    Under autocast the sampling runs in float32 and its result has the type of the input. Source: Deformable ConvNets
    v2 (Zhu et al. 2019), METHOD section 3.

    Args:
        in_channels, out_channels: of the maps.
        stride: of the output in cells of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet
        offset = nn.Conv2d(in_channels, OFFSET_CHANNELS + KERNEL_POINTS, kernel_size=3, stride=stride, padding=1)
        assert offset.bias is not None
        nn.init.zeros_(offset.weight)
        nn.init.zeros_(offset.bias)
        self.offset = offset

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, ceil(h / stride), ceil(w / stride)), in the type of the input."""
        precise = torch.promote_types(features.dtype, torch.float32)
        predicted = self.offset(features).to(precise)
        found: Tensor = deform_conv2d(
            features.to(precise),
            predicted[:, :OFFSET_CHANNELS],
            self.weight.to(precise),
            stride=self.stride,
            padding=self.padding,
            mask=predicted[:, OFFSET_CHANNELS:].sigmoid(),
        )
        return found.to(features.dtype)
