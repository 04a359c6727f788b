"""The bidirectional pyramid against its definition in plain loops, its names, its limit cases and the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.config import OptimConfig
from semiseg.engine.optim import build_optimizer
from semiseg.errors import UserError
from semiseg.models.bifpn import BiFPN, weighted_mean
from semiseg.models.build import build_model
from semiseg.models.segmenter import Segmenter
from tests.tiny import TINY, dynamic, make_queries, model_config

WIDTHS = (3, 5, 6, 7)  # of C2..C5
CHANNELS = 4


def pyramid(**changes: Any) -> BiFPN:
    torch.manual_seed(1)
    return BiFPN(WIDTHS, CHANNELS, **{"repeats": 2, "norm": "bn", **changes})


def randomise(neck: BiFPN) -> BiFPN:
    """Values that no symmetry hides: norms that are not the identity, weights that differ, some of them negative."""
    generator = torch.Generator().manual_seed(2)
    for name, value in neck.state_dict().items():
        if value.is_floating_point():
            draw = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(draw.abs() + 0.5 if name.endswith("running_var") else draw * 0.5)
        if ".weights_" in name:
            value.add_(0.3)
    return neck


def backbone_maps(height: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """C2..C5 of two images whose sides divide by 32."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, c, height // s, width // s) for c, s in zip(WIDTHS, (4, 8, 16, 32), strict=True)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


# The definition (METHOD section 3), written out once more: one line per node, loops for everything but convolution.


def slow_pool(maps: Tensor) -> Tensor:
    height, width = maps.shape[2:]
    rows = []
    for i in range(0, height, 2):
        row = []
        for j in range(0, width, 2):
            window = maps[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            row.append(window.flatten(2).max(dim=2).values)
        rows.append(torch.stack(row, dim=2))
    return torch.stack(rows, dim=2)


def slow_nearest(maps: Tensor, like: Tensor) -> Tensor:
    (height, width), (rows, columns) = maps.shape[2:], like.shape[2:]
    picked = [
        torch.stack([maps[:, :, i * height // rows, j * width // columns] for j in range(columns)], 2)
        for i in range(rows)
    ]
    return torch.stack(picked, 2)


def slow_norm(maps: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    channels = []
    for c in range(maps.shape[1]):
        scaled = (maps[:, c] - state[f"{name}.running_mean"][c]) / (state[f"{name}.running_var"][c] + 1e-5) ** 0.5
        channels.append(scaled * state[f"{name}.weight"][c] + state[f"{name}.bias"][c])
    return torch.stack(channels, 1)


def slow_lateral(maps: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.0.weight" not in state:
        return maps
    bias = state.get(f"{name}.0.bias")
    return slow_norm(F.conv2d(maps, state[f"{name}.0.weight"], bias), state, f"{name}.1")


def slow_node(state: dict[str, Tensor], block: str, name: str, inputs: list[Tensor]) -> Tensor:
    weights = [max(float(value), 0.0) for value in state[f"{block}.weights_{name}"]]
    total = sum((w / (sum(weights) + 1e-4) * x for w, x in zip(weights, inputs, strict=True)), 0 * inputs[0])
    swish = total / (1 + torch.exp(-total))
    found = F.conv2d(swish, state[f"{block}.outputs_{name}.0.weight"], padding=1)
    return slow_norm(found, state, f"{block}.outputs_{name}.1")


def slow_repeat(state: dict[str, Tensor], block: str, levels: list[Tensor]) -> list[Tensor]:
    p3, p4, p5, p6, p7 = (slow_lateral(x, state, f"{block}.lateral_{i}_f{i}") for i, x in enumerate(levels))
    down6 = slow_node(state, block, "f3_3_4", [p6, slow_nearest(p7, p6)])
    down5 = slow_node(state, block, "f2_2_5", [p5, slow_nearest(down6, p5)])
    down4 = slow_node(state, block, "f1_1_6", [p4, slow_nearest(down5, p4)])
    out3 = slow_node(state, block, "f0_0_7", [p3, slow_nearest(down4, p3)])
    out4 = slow_node(state, block, "f1_1_7_8", [p4, down4, slow_pool(out3)])
    out5 = slow_node(state, block, "f2_2_6_9", [p5, down5, slow_pool(out4)])
    out6 = slow_node(state, block, "f3_3_5_10", [p6, down6, slow_pool(out5)])
    out7 = slow_node(state, block, "f4_4_11", [p7, slow_pool(out6)])
    return [out3, out4, out5, out6, out7]


def slow_bifpn(state: dict[str, Tensor], maps: list[Tensor], repeats: int) -> dict[int, Tensor]:
    p6 = slow_pool(slow_lateral(maps[3], state, "p6"))
    levels = [*maps[1:], p6, slow_pool(p6)]
    for number in range(repeats):
        levels = slow_repeat(state, f"blocks.{number}", levels)
    return dict(zip((8, 16, 32, 64, 128), levels, strict=True))


@pytest.mark.parametrize("size", [(96, 160), (128, 128), (32, 224), (32, 32)], ids=str)
def test_it_is_its_definition(size: tuple[int, int]) -> None:
    neck = randomise(pyramid().double()).eval()
    maps = backbone_maps(*size, dtype=torch.float64)
    with torch.no_grad():
        found, expected = neck(maps), slow_bifpn(neck.state_dict(), maps, 2)
    assert list(found) == [8, 16, 32, 64, 128]
    for stride, level in found.items():
        assert level.shape == (2, CHANNELS, -(-size[0] // stride), -(-size[1] // stride))
        torch.testing.assert_close(level, expected[stride], rtol=1e-10, atol=1e-10)


def test_an_input_of_the_right_width_passes_no_convolution() -> None:
    neck = randomise(BiFPN((3, CHANNELS, 6, CHANNELS), CHANNELS, repeats=1, norm="frozen_bn").double())
    assert sorted(n for n, _ in neck.blocks[0].named_children() if n.startswith("lateral")) == ["lateral_1_f1"]
    assert "p6.0.weight" in neck.state_dict()  # P6 has its convolution at any width
    widths = dict(zip((4, 8, 16, 32), (3, CHANNELS, 6, CHANNELS), strict=True))
    maps = [torch.randn(1, c, 64 // s, 96 // s, dtype=torch.float64) for s, c in widths.items()]
    expected = slow_bifpn(neck.state_dict(), maps, 1)
    for stride, level in neck(maps).items():
        torch.testing.assert_close(level, expected[stride], rtol=1e-10, atol=1e-10)


def test_names_and_shapes_are_those_of_the_released_checkpoints() -> None:
    neck = BiFPN((256, 512, 1024, 2048), 160, repeats=6, norm="frozen_bn")
    expected: dict[str, tuple[int, ...]] = {"p6.0.weight": (160, 2048, 1, 1)}
    norms = ["p6.1"]
    for block in range(6):
        for name in ("f3_3_4", "f2_2_5", "f1_1_6", "f0_0_7", "f1_1_7_8", "f2_2_6_9", "f3_3_5_10", "f4_4_11"):
            expected[f"blocks.{block}.weights_{name}"] = (name.count("_"),)
            expected[f"blocks.{block}.outputs_{name}.0.weight"] = (160, 160, 3, 3)
            norms.append(f"blocks.{block}.outputs_{name}.1")
    for name, width in (("lateral_0_f0", 512), ("lateral_1_f1", 1024), ("lateral_2_f2", 2048)):
        expected[f"blocks.0.{name}.0.weight"] = (160, width, 1, 1)
        expected[f"blocks.0.{name}.0.bias"] = (160,)
        norms.append(f"blocks.0.{name}.1")
    for norm in norms:
        expected |= {f"{norm}.{part}": (160,) for part in ("weight", "bias", "running_mean", "running_var")}
    assert {name: tuple(value.shape) for name, value in neck.state_dict().items()} == expected


def test_the_weighted_mean() -> None:
    one, two = torch.tensor([[2.0, -4.0]]), torch.tensor([[6.0, 10.0]])
    torch.testing.assert_close(weighted_mean([one, two], torch.tensor([1.0, 1.0])), (one + two) / 2.0001)
    torch.testing.assert_close(weighted_mean([one, two], torch.tensor([3.0, 1.0])), (3 * one + two) / 4.0001)
    torch.testing.assert_close(weighted_mean([one, two], torch.tensor([-5.0, 2.0])), two * (2 / 2.0001))
    weights = torch.tensor([-1.0, -2.0], requires_grad=True)
    nothing = weighted_mean([one, two], weights)
    assert nothing.tolist() == [[0.0, 0.0]]
    nothing.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn"])
def test_a_gradient_reaches_every_parameter(norm: str) -> None:
    neck = pyramid(norm=norm)
    loss = torch.stack([level.square().sum() for level in neck(backbone_maps(96, 160)).values()]).sum()
    loss.backward()
    without = [
        name for name, parameter in neck.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    # in front of a batch norm a bias has no effect, and its gradient is rounding
    assert [name for name in without if not ("lateral" in name and name.endswith("0.bias"))] == []


def test_each_lateral_runs_once_a_step() -> None:
    neck = pyramid(repeats=1).train()
    neck(backbone_maps(64, 64))
    counted = {n: int(v) for n, v in neck.state_dict().items() if n.endswith("num_batches_tracked")}
    assert len(counted) == 12  # P6, three laterals, eight nodes
    assert set(counted.values()) == {1}


SMALL: dict[str, Any] = {
    "backbone.norm": "gn",
    "neck.kind": "bifpn",
    "neck.channels": 16,
    "neck.repeats": 2,
    "neck.norm": "gn",
    "detector.strides": [8, 16, 32, 64, 128],
    "detector.level_ranges": [64, 128, 256, 512],
}


def small_model(changes: Mapping[str, Any] | None = None) -> Segmenter:
    torch.manual_seed(0)
    return build_model(model_config(TINY["model"], SMALL, changes or {}), num_classes=3)


def test_the_network_with_it_has_a_prediction_at_every_location() -> None:
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    model = small_model()
    outputs = model(images, torch.tensor([[96, 160]] * 2))
    count = 12 * 20 + 6 * 10 + 3 * 5 + 2 * 3 + 1 * 2
    assert outputs.class_logits.shape == (2, count, 3)
    assert outputs.locations.xy.shape == (count, 2)
    assert outputs.mask_inputs.mask_features.shape == (2, 4, 12, 20)
    queries = make_queries(torch.tensor([0, 1]), torch.tensor([0, count - 1]))
    total = outputs.class_logits.sum() + outputs.box_distances.sum() + dynamic(model).filters(outputs, queries).sum()
    (total + outputs.mask_inputs.mask_features.sum() + outputs.centreness_logits.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_precision_memory_format_and_compilation() -> None:
    neck = pyramid(norm="frozen_bn", repeats=1).eval()
    maps = backbone_maps(96, 160)
    with torch.no_grad():
        expected = neck(maps)
        compiled = torch.compile(neck, backend="eager", fullgraph=True)(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = neck(maps)
        last = neck.to(memory_format=torch.channels_last)(
            [m.contiguous(memory_format=torch.channels_last) for m in maps]
        )
    for stride, level in expected.items():
        torch.testing.assert_close(compiled[stride], level)
        torch.testing.assert_close(last[stride], level, rtol=1e-4, atol=1e-5)
        assert rounded[stride].dtype == torch.bfloat16
        torch.testing.assert_close(rounded[stride].float(), level, rtol=0.1, atol=0.1)


def test_weight_decay_is_for_all_but_the_norms() -> None:
    model = small_model({"neck.norm": "bn"})
    decayed, free = build_optimizer(model, OptimConfig(steps=1, optimizer="sgd")).param_groups
    block: Any = model.neck.get_submodule("blocks.0")
    assert any(parameter is block.weights_f3_3_4 for parameter in decayed["params"])
    assert any(parameter is block.outputs_f3_3_4[0].weight for parameter in decayed["params"])
    assert any(parameter is block.outputs_f3_3_4[1].weight for parameter in free["params"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detector.strides": [8, 16, 32], "detector.level_ranges": [64, 128]},
            r"needs detector\.strides \[8, 16, 32, 64, 128\], not \[8, 16, 32\]",
        ),
        ({"mask_head.feature_stride": 4}, "has no mask_head.feature_stride 4: take 8 or 16"),
    ],
)
def test_levels_that_it_does_not_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_model(changes)
