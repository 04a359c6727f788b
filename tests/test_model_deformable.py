"""The deformable convolution against plain loops, where it sits in the backbone, and what loading and freezing do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from semiseg.config import OptimConfig
from semiseg.engine.optim import build_optimizer
from semiseg.errors import UserError
from semiseg.models.build import build_model
from semiseg.models.deformable import DeformableConv
from semiseg.models.norms import freeze, norm_layer
from semiseg.models.resnet import ResNetFeatures, freeze_stages, load_backbone_state
from tests.tiny import model_config


def random_conv(inputs: int, outputs: int, *, stride: int) -> DeformableConv:
    """One whose shifts are a cell or two and whose weights differ."""
    torch.manual_seed(7)
    conv = DeformableConv(inputs, outputs, stride=stride).double()
    assert conv.offset.bias is not None
    nn.init.normal_(conv.offset.weight, std=0.3)
    nn.init.normal_(conv.offset.bias)
    return conv


def sample(plane: Tensor, y: float, x: float) -> float:
    """Bilinear value at a point; every cell outside the map is 0."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * float(plane[row, column])
    return total


def slow_deformable(conv: DeformableConv, maps: Tensor) -> Tensor:
    stride = conv.stride[0]
    predicted = F.conv2d(maps, conv.offset.weight, conv.offset.bias, stride=stride, padding=1)
    result = maps.new_zeros(maps.shape[0], conv.out_channels, *predicted.shape[2:])
    for image, channel, i, j in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        for point in range(9):
            dy, dx = (float(predicted[image, 2 * point + axis, i, j]) for axis in (0, 1))
            weight = float(predicted[image, 18 + point, i, j].sigmoid())
            y, x = stride * i - 1 + point // 3 + dy, stride * j - 1 + point % 3 + dx
            for plane in range(maps.shape[1]):
                kernel = float(conv.weight[channel, plane, point // 3, point % 3])
                result[image, channel, i, j] += kernel * weight * sample(maps[image, plane], y, x)
    return result


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_it_is_its_definition(stride: int) -> None:
    conv = random_conv(2, 3, stride=stride)
    maps = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    found = conv(maps)
    assert found.shape == (2, 3, math.ceil(5 / stride), math.ceil(4 / stride))
    torch.testing.assert_close(found, slow_deformable(conv, maps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_without_shifts_it_is_the_ordinary_convolution(stride: int) -> None:
    conv, maps = DeformableConv(4, 6, stride=stride), torch.randn(2, 4, 7, 6)
    ordinary = F.conv2d(maps, conv.weight, stride=stride, padding=1)
    torch.testing.assert_close(conv(maps), ordinary / 2, rtol=1e-5, atol=1e-6)  # every weight is sigmoid(0)
    assert conv.offset.bias is not None
    with torch.no_grad():
        conv.offset.bias[18:] = 100.0
    torch.testing.assert_close(conv(maps), ordinary, rtol=1e-5, atol=1e-6)


def test_gradients_reach_input_kernel_and_shifts() -> None:
    conv, maps = random_conv(2, 3, stride=1), torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    conv(maps).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in conv.parameters())
    assert maps.grad is not None
    step = torch.zeros_like(maps)
    step[0, 1, 2, 2] = 1e-6
    with torch.no_grad():
        numeric = (conv(maps + step).square().sum() - conv(maps - step).square().sum()) / 2e-6
    torch.testing.assert_close(maps.grad[0, 1, 2, 2], numeric, rtol=1e-5, atol=1e-6)


def test_autocast_channels_last_and_compilation() -> None:
    torch.manual_seed(1)
    conv, maps = random_conv(4, 6, stride=1).float(), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        expected = conv(maps)
        torch.testing.assert_close(torch.compile(conv, backend="eager", fullgraph=True)(maps), expected)
        last = conv.to(memory_format=torch.channels_last)(maps.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = conv(maps.bfloat16())
    assert rounded.dtype == torch.bfloat16
    error = (rounded.detach().float() - expected).abs().mean()
    assert error < 0.05 * expected.abs().mean()
    rounded.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in conv.parameters())


def deformable_blocks(backbone: nn.Module) -> list[str]:
    found = [name for name, module in backbone.named_modules() if isinstance(module, DeformableConv)]
    return [name.removesuffix(".conv2") for name in found]


def build_backbone(**backbone: Any) -> nn.Module:
    with torch.device("meta"):  # names, shapes and strides without values
        return build_model(model_config({"backbone": {"weights": "random", **backbone}}), num_classes=2).backbone


def test_the_interval_counts_blocks_within_a_stage() -> None:
    assert deformable_blocks(build_backbone()) == []
    every = deformable_blocks(build_backbone(depth=101, deformable_interval=1))
    assert every == [f"layer{stage}.{block}" for stage, n in ((2, 4), (3, 23), (4, 3)) for block in range(n)]
    third = deformable_blocks(build_backbone(depth=101, deformable_interval=3))
    in_layer3 = [f"layer3.{block}" for block in (0, 3, 6, 9, 12, 15, 18, 21)]
    assert third == ["layer2.0", "layer2.3", *in_layer3, "layer4.0"]


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_the_stride_stays_where_it_was(stride_in_1x1: bool) -> None:
    backbone = build_backbone(deformable_interval=1, stride_in_1x1=stride_in_1x1)
    conv = backbone.get_submodule("layer3.0.conv2")
    assert isinstance(conv, DeformableConv)
    expected = (1, 1) if stride_in_1x1 else (2, 2)
    assert conv.stride == conv.offset.stride == expected
    assert conv.padding == conv.offset.padding == (1, 1)
    maps = backbone(torch.zeros(1, 3, 64, 96, device="meta"))
    assert [tuple(level.shape[1:]) for level in maps] == [(256, 16, 24), (512, 8, 12), (1024, 4, 6), (2048, 2, 3)]


def test_names_and_shapes_are_those_of_the_released_checkpoint() -> None:
    state = build_backbone(depth=101, deformable_interval=1, stride_in_1x1=True).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    expected = {
        "layer1.0.conv2.weight": (64, 64, 3, 3),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer2.0.conv2.offset.weight": (27, 128, 3, 3),
        "layer2.0.conv2.offset.bias": (27,),
        "layer3.22.conv2.offset.weight": (27, 256, 3, 3),
        "layer4.2.conv2.weight": (512, 512, 3, 3),
        "layer4.2.conv2.offset.weight": (27, 512, 3, 3),
        "layer4.2.conv2.offset.bias": (27,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    shifts = [name for name in shapes if "offset" in name]
    assert len(shifts) == 60
    assert not any(name.startswith("layer1") for name in shifts)
    assert "layer2.0.conv2.bias" not in shapes


def one_block_stages(*, interval: int, norm: str = "bn") -> ResNetFeatures:
    torch.manual_seed(interval)
    make_norm = norm_layer(norm)  # type: ignore[arg-type]
    return ResNetFeatures(Bottleneck, [1, 1, 1, 1], norm=make_norm, deformable_interval=interval)


def test_weights_of_the_plain_network_load_and_only_shifts_may_be_missing(tmp_path: Path) -> None:
    plain, network = one_block_stages(interval=0), one_block_stages(interval=1)
    state = plain.state_dict()
    load_backbone_state(network, state, origin="here")
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    shifts = {name: value for name, value in loaded.items() if ".offset." in name}
    assert len(shifts) == 6
    assert not any(value.any() for value in shifts.values())
    moved = {name: torch.full_like(value, 0.5) for name, value in shifts.items()}
    load_backbone_state(network, {**state, **moved}, origin="here")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in moved.items())
    with pytest.raises(UserError, match=r"here: these weights do not fit the backbone: .*layer3.0.conv2.offset"):
        load_backbone_state(plain, {**state, "layer3.0.conv2.offset.bias": torch.zeros(27)}, origin="here")
    del state["layer3.0.conv2.weight"]
    with pytest.raises(UserError, match=r"here: these weights do not fit the backbone: .*layer3.0.conv2.weight"):
        load_backbone_state(network, state, origin="here")


def test_frozen_stages_freeze_shifts_and_the_rest_trains() -> None:
    backbone = one_block_stages(interval=1)
    freeze_stages(backbone, 2)
    assert isinstance(backbone.layer2[0].conv2, DeformableConv)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = build_optimizer(backbone.train(), OptimConfig(steps=1, optimizer="sgd", learning_rate=0.1))
    backbone(torch.randn(2, 3, 64, 64))[-1].square().sum().backward()
    decayed, free = optimizer.param_groups
    shift = backbone.layer3[0].conv2.offset.weight
    assert any(parameter is shift for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert shift.grad is not None
    assert shift.grad.any()
    optimizer.step()
    after = backbone.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"layer3", "layer4"}
    assert not torch.equal(after["layer3.0.conv2.offset.weight"], before["layer3.0.conv2.offset.weight"])


def test_freeze_takes_all_of_it() -> None:
    conv = freeze(DeformableConv(4, 4, stride=1))
    assert [parameter.requires_grad for parameter in conv.parameters()] == [False] * 3
