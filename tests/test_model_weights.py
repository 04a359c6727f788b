"""Weights of the backbone: loaded in full, or a sentence that says what is wrong."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18
from torchvision.models._api import WeightsEnum

from semiseg.config import ModelConfig
from semiseg.config_files import parse_config
from semiseg.errors import UserError
from semiseg.models.condinst import CondInst, build_model


def build(**changes: Any) -> CondInst:
    values: dict[str, Any] = {"backbone": "resnet18", "neck_channels": 32, "mask_branch_channels": 8, **changes}
    return build_model(parse_config(ModelConfig, values, where="test"), num_classes=2)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_state_dict_is_loaded(tmp_path: Path, norm: str, suffix: str) -> None:
    torch.manual_seed(5)
    network = resnet18()
    network.bn1.running_mean.normal_()
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(network.state_dict(), path)
    model = build(weights=str(path), backbone_norm=norm)
    network.eval()
    model.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        expected = network.layer4(network.layer3(network.layer2(network.layer1(stem))))
        torch.testing.assert_close(model.backbone(images)[-1], expected, rtol=1e-4, atol=1e-4)


def test_imagenet_weights_come_from_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    network = resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: network.state_dict())
    model = build(weights="imagenet")
    assert torch.equal(
        model.backbone.state_dict()["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"]
    )


def test_a_failed_download_says_which_file_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: WeightsEnum, *args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"resnet18-\w+\.pth .*put that file at .*checkpoints/resnet18-\w+\.pth"):
        build(weights="imagenet")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = resnet18().state_dict()
    state["layer3.0.conv1.weight"] = state["layer3.0.conv1.weight"][:7]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"weights.pth: these weights do not fit the backbone: .*layer3.0.conv1"):
        build(weights=str(path))
    with pytest.raises(UserError, match="do not fit the backbone"):
        build(weights=str(path), backbone="small")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.pth: no such weights file"):
        build(weights=str(tmp_path / "absent.pth"))
    for name, content in (("text.pth", b"hello"), ("empty.pth", b""), ("text.safetensors", b"hello, no header here")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a weights file"):
            build(weights=str(path))
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"list.pth: expected a state dict"):
        build(weights=str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "small", "weights": "random", "small_widths": [8, 8, 8]},
            "model.small_widths: 4 widths needed, one per stage, not 3",
        ),
        ({"weights": "random", "stride_in_1x1": True}, "stride_in_1x1 needs a backbone with bottlenecks"),
    ],
)
def test_impossible_backbones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)
