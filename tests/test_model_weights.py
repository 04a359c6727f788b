"""Weights: sizes of the released networks; of the backbone; and of a whole model that a training starts from.

They are loaded in full, or a sentence says what is wrong.
"""

from __future__ import annotations

import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18
from torchvision.models._api import WeightsEnum

from semiseg.config import InferenceConfig, ModelConfig, RunConfig
from semiseg.config.former import leaves
from semiseg.config.read import parse_config
from semiseg.engine.checkpoint import (
    FREE_SETTINGS,
    ModelInfo,
    check_initial,
    differing_settings,
    initial_weights,
    load_initial,
    save_model,
)
from semiseg.errors import UserError
from semiseg.models.build import build_model
from semiseg.models.segmenter import Segmenter
from semiseg.project import available
from semiseg.studies.file import load_study, study_runs
from tests.tiny import TINY, model_config


def build(weights: str, **backbone: Any) -> Segmenter:
    sizes = {"backbone.depth": 18, "neck.channels": 32, "mask_head.branch_channels": 8}
    return build_model(model_config(sizes, {"backbone": {"weights": weights, **backbone}}), num_classes=2)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_state_dict_is_loaded(tmp_path: Path, norm: str, suffix: str) -> None:
    torch.manual_seed(5)
    network = resnet18()
    network.bn1.running_mean.normal_()
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(network.state_dict(), path)
    model = build(str(path), norm=norm)
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
        build_model(model_config(TINY["model"], {"backbone.weights": str(path)}), num_classes=2)


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
        ({"kind": "small", "widths": [8, 8, 8]}, r"'backbone\.widths': List should have at least 4 items"),
        ({"kind": "small", "depth": 18}, r"unknown key 'backbone\.depth'\. Kind 'resnet' reads it, not 'small'\."),
        ({"depth": 34, "stride_in_1x1": True}, "stride_in_1x1 needs a backbone with bottlenecks"),
        ({"depth": 18, "deformable_interval": 2}, "deformable_interval needs a backbone with bottlenecks"),
    ],
)
def test_impossible_backbones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config({"backbone": {"weights": "random", **changes}})


BIFPN: dict[str, Any] = {"neck.kind": "bifpn", "neck.channels": 160, "neck.repeats": 6, "neck.norm": "bn"}


@pytest.mark.parametrize(
    ("changes", "entries", "numbers", "parameters"),
    [
        ({}, 370, 34_367_770, 34_259_731),
        ({"mask_head.feature_channels": 8}, 370, 34_219_218, 34_111_179),
        (BIFPN, 717, 39_009_120, 38_884_389),
        ({**BIFPN, "backbone.depth": 101, "backbone.deformable_interval": 1}, 1032, 59_982_730, 59_753_551),
    ],
    ids=["BoxInst R50", "Segmenter R50", "BoxInst R50 BiFPN", "BoxInst R101 BiFPN DCN"],
)
def test_networks_are_as_large_as_the_released_ones(
    changes: dict[str, Any], entries: int, numbers: int, parameters: int
) -> None:
    """Entries and numbers of the released state dicts, without the two constants of their mask head (6 numbers).

    The parameters are those numbers without the statistics of norms and without all of a frozen norm.
    """
    with torch.device("meta"):
        model = build_model(model_config({"backbone.weights": "random"}, changes), num_classes=80)
    state = model.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (entries, numbers)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def config_of(changes: Mapping[str, Any] | None = None) -> ModelConfig:
    own = {"detector.level_ranges": [28, 56], "mask_head.branch_norm": "bn"}
    return model_config(TINY["model"], own, changes or {})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    info = ModelInfo(config_of(), InferenceConfig(), ("a", "b"), (1, 2))
    save_model(folder, build_model(config_of(), num_classes=2).state_dict(), info)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone.norm": "bn", "mask_head.branch_norm": "frozen_bn"},
        {
            "mask_head.stride": 8,
            "mask_head.max_positives": 5,
            "detector.centre_radius": 2.0,
            "backbone.frozen_stages": 2,
        },
    ],
)
def test_settings_that_may_differ_from_the_initial_weights(model_folder: Path, changes: dict[str, Any]) -> None:
    check_initial(model_folder, config_of(changes))
    model = build_model(config_of(changes), num_classes=2)
    weights = initial_weights(model_folder)
    assert load_initial(model, weights, where="here") == []
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items() if key in found)
    images, sizes = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]])
    original = build_model(config_of(), num_classes=2).eval()
    load_initial(original, weights, where="here")
    with torch.no_grad():
        one, other = original(images, sizes), model.eval()(images, sizes)
    torch.testing.assert_close(one.class_logits, other.class_logits)
    torch.testing.assert_close(one.mask_inputs.mask_features, other.mask_inputs.mask_features)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pixel_std": [1.0, 1.0, 1.0]}, "pixel_std = [58.395, 57.12, 57.375]  # now [1.0, 1.0, 1.0]"),
        ({"detector.strides": [4, 8, 16]}, "detector.strides = [8, 16, 32]  # now [4, 8, 16]"),
        ({"detector.tower_groups": 2}, "detector.tower_groups = 4  # now 2"),
        ({"mask_head.branch_norm": "gn"}, 'mask_head.branch_norm = "bn"  # now "gn"'),
        (
            {"detector.level_ranges": [32, 64], "pixel_mean": [0.0, 0.0, 0.0]},
            "detector.level_ranges = [28, 56]        # now [32, 64]\n"
            "pixel_mean = [123.675, 116.28, 103.53]  # now [0.0, 0.0, 0.0]",
        ),
    ],
)
def test_initial_weights_of_another_network(model_folder: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        check_initial(model_folder, config_of(changes))
    assert str(caught.value) == (
        f"{model_folder}: its weights are of another network; to start from them set\n\n[model]\n{named}"
    )


def test_the_lines_can_be_pasted(model_folder: Path) -> None:
    """A default [model] differs in a dozen settings, and a small backbone has no ImageNet weights either."""
    with pytest.raises(UserError) as caught:
        check_initial(model_folder, ModelConfig())
    pasted = tomlkit.parse(str(caught.value).split("\n\n", 1)[1]).unwrap()
    assert len(leaves(pasted["model"])) > 8
    config = parse_config(RunConfig, {**pasted, "init_from": str(model_folder)}, where="pasted")
    check_initial(model_folder, config.model)


def test_which_settings_are_compared() -> None:
    """All but the free ones, so that a new setting is compared until somebody says otherwise."""
    rays = model_config({"mask_head.kind": "rays"})
    assert {*leaves(ModelConfig().model_dump()), *leaves(rays.model_dump())} >= FREE_SETTINGS
    released = {**BIFPN, "backbone.weights": "random", "backbone.stride_in_1x1": True}
    reference, plain = model_config(released), ModelConfig()
    both = ["backbone.stride_in_1x1", "neck.kind", "neck.channels"]
    assert differing_settings(reference, plain) == [*both, "neck.repeats", "neck.norm"]
    assert differing_settings(plain, reference) == [*both, "neck.coarse", "neck.form"]
    fewer = model_config(released, {"neck.repeats": 3, "neck.norm": "gn"})
    assert differing_settings(reference, fewer) == ["neck.repeats", "neck.norm"]
    assert differing_settings(reference, model_config(released, {"neck.norm": "sync_bn"})) == []


def test_a_checkpoint_file_says_nothing_of_its_network(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    torch.save({"model": {}}, path)
    check_initial(path, config_of())
    with pytest.raises(UserError, match=r"not a model folder: config.json is missing"):
        check_initial(tmp_path, config_of())


def test_rows_of_the_shipped_studies_fit_their_pretraining() -> None:
    compared = 0
    for name in available("experiments"):
        for run in study_runs(load_study(name)):
            if run.init is not None:
                compared += 1
                differing = differing_settings(run.init.config.model, run.config.model)
                if name in (
                    "shapes_heads",
                    "shapes_table5",
                    "animals_table5",
                ):  # a detector may start a network with another mask head
                    differing = [key for key in differing if not key.startswith("mask_head.")]
                assert differing == [], name
    assert compared >= 30


def test_only_the_counter_of_batches_may_be_missing(model_folder: Path) -> None:
    weights = initial_weights(model_folder)
    model = build_model(config_of({"backbone.norm": "bn"}), num_classes=2)
    del weights["backbone.bn1.running_var"]
    with pytest.raises(UserError, match=r"here: 1 weights do not fit the model, first: backbone.bn1.running_var"):
        load_initial(model, weights, where="here")


def test_a_model_folder_can_be_read_by_others(model_folder: Path) -> None:
    assert model_folder.stat().st_mode & 0o777 == 0o755
    assert (model_folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
