"""The mask branch: one feature map per image, shared by the masks of all its instances."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from semiseg.config import Norm
from semiseg.models.norms import norm_layer
from semiseg.models.upsample import aligned_upsample


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
        self.out_channels = out_channels
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

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, out_channels, h, w) at the stride of the first of `levels`."""
        total = self.refine[0](levels[0])
        for number in range(1, len(self.refine)):
            total = total + aligned_upsample(self.refine[number](levels[number]), 2**number)
        features: Tensor = self.tower(total)
        return features
