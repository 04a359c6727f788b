"""Backbones: torchvision's ResNets and a small two-blocks-per-stage one, all giving the maps C2..C5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    WeightsEnum,
)
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from semiseg.config.model import Norm
from semiseg.errors import UserError
from semiseg.models.deformable import DeformableConv
from semiseg.models.norms import freeze, norm_layer

BACKBONE_STRIDES = (4, 8, 16, 32)
STAGE_MODULES = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",))
Depth = Literal[18, 34, 50, 101]
NormLayer = Callable[..., nn.Module]


class Strided1x1(nn.Conv2d):
    """A 1x1 convolution with a stride, computed as a slice and a convolution of stride 1: the same numbers.

    oneDNN's kernels for the weights' gradient of a strided 1x1 convolution in channels-last write beyond a buffer, and
    the process dies, where there are fewer input channels than a register holds numbers: 8 under AVX2 (3 to 7 die,
    8 to 12 do not), 16 under AVX-512. No strided 1x1 may therefore reach torch, whatever the widths.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias)


class ResNetFeatures(ResNet):  # type: ignore[misc]  # torchvision is untyped
    """A torchvision ResNet without its classifier; parameter names are torchvision's.

    `forward` takes normalised images (B, 3, H, W), H and W multiples of 32, and returns [C2, C3, C4, C5] at the
    strides 4, 8, 16, 32 with `channels` channels.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        *,
        norm: NormLayer,
        stride_in_1x1: bool = False,
        deformable_interval: int = 0,
    ) -> None:
        super().__init__(block, layers, norm_layer=norm)
        del self.avgpool, self.fc
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))
        if stride_in_1x1:
            self._move_stride_to_1x1()
        if deformable_interval:
            self._make_deformable(deformable_interval)
        _slice_strided_1x1(self)

    def _move_stride_to_1x1(self) -> None:
        for stage in (self.layer2, self.layer3, self.layer4):
            first = stage[0]
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride

    def _make_deformable(self, interval: int) -> None:
        """Blocks 0, interval, 2 * interval ... of every stage but the first get a deformable 3x3 of the same stride."""
        for stage in (self.layer2, self.layer3, self.layer4):
            for bottleneck in list(stage)[::interval]:
                plain = bottleneck.conv2
                bottleneck.conv2 = DeformableConv(plain.in_channels, plain.out_channels, stride=plain.stride[0])

    def forward(self, images: Tensor) -> list[Tensor]:
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


class SmallResNet(nn.Module):
    """Two torchvision `BasicBlock`s per stage behind a 3x3 stem of stride 2: the network for small images.

    Unlike ImageNet's stem it does not pool: at 128 pixels an object is often 20 pixels wide. Interface and names as
    in `ResNetFeatures`; `channels` are the four widths.
    """

    def __init__(self, widths: Sequence[int], *, norm: NormLayer) -> None:
        super().__init__()
        self.channels = tuple(widths)
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = norm(widths[0])
        self.relu = nn.ReLU(inplace=True)
        inputs = (widths[0], *widths[:3])
        stages = [_small_stage(before, after, norm) for before, after in zip(inputs, widths, strict=True)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        c2 = self.layer1(self.relu(self.bn1(self.conv1(images))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


def _small_stage(before: int, after: int, norm: NormLayer) -> nn.Sequential:
    shortcut = nn.Sequential(Strided1x1(before, after, kernel_size=1, stride=2, bias=False), norm(after))
    return nn.Sequential(
        BasicBlock(before, after, stride=2, downsample=shortcut, norm_layer=norm),
        BasicBlock(after, after, norm_layer=norm),
    )


def _slice_strided_1x1(module: nn.Module) -> None:
    """Replaces every strided 1x1 convolution below a module by a `Strided1x1` of the same parameters."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1) and child.stride != (1, 1):
            sliced = nn.utils.skip_init(  # draws no numbers: seeds give the weights that they gave before
                Strided1x1, child.in_channels, child.out_channels, kernel_size=1, stride=child.stride, bias=False
            )
            sliced.weight = child.weight
            setattr(module, name, sliced)
        else:
            _slice_strided_1x1(child)


def build_resnet(
    depth: Depth,
    *,
    norm: Norm,
    weights: str | None,
    frozen_stages: int,
    stride_in_1x1: bool,
    deformable_interval: int = 0,
) -> ResNetFeatures:
    """A ResNet, its weights loaded and its first stages frozen.

    Args:
        depth: which one of the family.
        norm: kind of every norm.
        weights: None (Kaiming), "imagenet" (torchvision's IMAGENET1K_V1) or a path to a state dict.
        frozen_stages: how many of (stem + first stage), second, third, fourth are not trained.
        stride_in_1x1: strides of bottlenecks in their first 1x1 (the reference's weights) instead of the 3x3
            (torchvision's weights); the parameters are the same.
        deformable_interval: every so many bottlenecks of C3..C5 have a deformable 3x3; 0 = none.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    blocks = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
    backbone = ResNetFeatures(
        BasicBlock if depth < 50 else Bottleneck,
        blocks[depth],
        norm=norm_layer(norm),
        stride_in_1x1=stride_in_1x1,
        deformable_interval=deformable_interval,
    )
    if weights is not None:
        state = _imagenet_state(depth) if weights == "imagenet" else read_state_dict(Path(weights))
        load_backbone_state(backbone, state, origin=weights)
    freeze_stages(backbone, frozen_stages)
    return backbone


def build_small_resnet(widths: Sequence[int], *, norm: Norm, weights: str | None, frozen_stages: int) -> SmallResNet:
    """The small backbone, `widths` the channels of its four stages; `weights` are None or a path, the rest as above."""
    backbone = SmallResNet(widths, norm=norm_layer(norm))
    if weights is not None:
        load_backbone_state(backbone, read_state_dict(Path(weights)), origin=weights)
    freeze_stages(backbone, frozen_stages)
    return backbone


def freeze_stages(backbone: ResNetFeatures | SmallResNet, count: int) -> None:
    """Freezes (stem + first stage) and the `count - 1` stages after it, in place; 0 freezes nothing."""
    for names in STAGE_MODULES[:count]:
        for name in names:
            setattr(backbone, name, freeze(getattr(backbone, name)))


def load_backbone_state(backbone: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Loads a state dict in torchvision's names; the classifier `fc.*` is left out, anything else must fit exactly.

    Only the shifts of deformable convolutions may be missing, as they are in weights of the plain network: those stay
    as they are.
    """
    kept = {key: value for key, value in state.items() if not key.startswith("fc.")}
    shifts = {key: value for key, value in backbone.state_dict().items() if ".conv2.offset." in key}
    try:
        backbone.load_state_dict({**shifts, **kept})
    except RuntimeError as error:
        first_lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise UserError(f"{origin}: these weights do not fit the backbone: {first_lines}") from None


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Reads a state dict from a .safetensors or torch file; a torch file cannot run code (weights_only)."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's reader may raise anything, KeyError and IndexError included
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: not a weights file ({type(error).__name__}: {reason})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict, names to tensors")
    return state


def _imagenet_state(depth: Depth) -> Mapping[str, Tensor]:
    known: dict[int, WeightsEnum] = {
        18: ResNet18_Weights.IMAGENET1K_V1,
        34: ResNet34_Weights.IMAGENET1K_V1,
        50: ResNet50_Weights.IMAGENET1K_V1,
        101: ResNet101_Weights.IMAGENET1K_V1,
    }
    chosen = known[depth]
    try:
        weights: Mapping[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
        return weights
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
        raise UserError(
            f"model.backbone.weights = 'imagenet': cannot download {chosen.url} ({error}); put that file at {place}, "
            "or give its path as model.backbone.weights"
        ) from None
