"""Training works on every processor: no operation that dies in some kernel, and losses that the kernels agree on.

oneDNN chooses its kernels by the instruction set; `ONEDNN_MAX_CPU_ISA` makes a processor take those of a lesser one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from semiseg.config import ModelConfig
from semiseg.config.read import parse_config
from semiseg.engine.build import build_data
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.models.build import build_model
from semiseg.models.resnet import Strided1x1
from tests.forked import start
from tests.tiny import TINY, tiny_config

INSTRUCTION_SETS = (None, "AVX512_CORE", "AVX2")
# Fewer channels than a register of AVX2 holds (8 numbers), than one of AVX-512 (16), and no multiples of either.
WIDTHS = ([3, 5, 6, 7], [8, 8, 16, 16], [9, 12, 12, 20])


class Convolutions(TorchDispatchMode):
    """Records (size of the kernel, stride) of every convolution of the forward and of the backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.seen.append((tuple(args[1].shape[2:]), tuple(args[3])))
        elif name == "convolution_backward":
            self.seen.append((tuple(args[2].shape[2:]), tuple(args[4])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "model",
    [
        TINY["model"],
        {"backbone": {"depth": 18, "weights": "random"}},
        {"backbone": {"depth": 50, "weights": "random", "frozen_stages": 0}},
        {"backbone": {"weights": "random", "stride_in_1x1": True}, "neck": {"kind": "bifpn", "repeats": 1}},
        {"backbone": {"weights": "random", "deformable_interval": 2}},
    ],
    ids=["small", "resnet18", "resnet50", "stride_in_1x1", "deformable"],
)
def test_no_strided_1x1_convolution_reaches_torch(model: dict[str, Any]) -> None:
    config = parse_config(ModelConfig, model, where="test")
    network = build_model(config, num_classes=3).to(memory_format=torch.channels_last).train()
    with Convolutions() as convolutions:
        maps = network.backbone(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        torch.stack([level.square().mean() for level in network.neck(maps).values()]).sum().backward()
    assert len(convolutions.seen) > 2 * 8  # both directions of what the smallest network has
    assert any(stride == (2, 2) for _, stride in convolutions.seen)
    assert [seen for seen in convolutions.seen if seen[0] == (1, 1) and seen[1] != (1, 1)] == []
    strided = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) != m.stride]
    assert {type(module) for module in strided} == {Strided1x1}


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_slice_and_a_1x1_are_the_strided_1x1(size: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    convolution = Strided1x1(16, 4, kernel_size=1, stride=2).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    ours, theirs = convolution(x), F.conv2d(x, convolution.weight, convolution.bias, stride=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert convolution.bias is not None
    wanted = [x, convolution.weight, convolution.bias]
    for one, other in zip(
        torch.autograd.grad(ours.square().sum(), wanted),
        torch.autograd.grad(theirs.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_smallest_networks_train_alike_under_every_instruction_set(tmp_path: Path) -> None:
    """In a process for each: oneDNN looks at the environment when it is first asked for something."""
    build_data(tiny_config(tmp_path))  # drawn once
    usual = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"}
    for name in INSTRUCTION_SETS:
        environment = usual if name is None else {**usual, "ONEDNN_MAX_CPU_ISA": name}
        output = tmp_path / f"{name}.txt"
        process = start(_train_the_smallest_networks, tmp_path, name, output=output, environment=environment)
        process.join()
        assert process.exitcode == 0, f"{name}: {output.read_text()[-2000:]}"
    told = [torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in INSTRUCTION_SETS]
    assert told[0].shape[:2] == (len(WIDTHS), TINY["optim"]["steps"])
    for name, losses in zip(INSTRUCTION_SETS[1:], told[1:], strict=True):
        torch.testing.assert_close(losses, told[0], rtol=1e-3, atol=1e-4, msg=f"{name}: {{}}".format)


def _train_the_smallest_networks(root: Path, name: str | None) -> None:
    """Writes the losses of every step of the network of each of `WIDTHS`."""
    runs = []
    for number, widths in enumerate(WIDTHS):
        config = tiny_config(root, model={"backbone.widths": widths, "backbone.norm": "bn"})
        execute_run(config, out=root / f"{name}-{number}", progress=False)
        log = read_log(root / f"{name}-{number}" / "log.jsonl")
        runs.append([list(line["losses"].values()) for line in log if "losses" in line])
    (root / f"{name}.json").write_text(json.dumps(runs))
