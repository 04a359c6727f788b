"""Released CondInst and BoxInst checkpoints: recognised and renamed without loss, or refused with the keys to blame.

The key lists in tests/golden come from the reference; the names below are written down a second time.
"""

from __future__ import annotations

import gzip
import json
import pickle
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.commands.known_classes import COCO_CATEGORY_IDS, COCO_CLASSES
from semiseg.config import InferenceConfig, ModelConfig, RunConfig
from semiseg.config.former import leaves
from semiseg.config.read import parse_config
from semiseg.engine.checkpoint import check_initial, initial_weights, load_initial, load_model_folder
from semiseg.errors import UserError
from semiseg.interop.adelaidet import convert_state
from semiseg.interop.checkpoints import read_state
from semiseg.models.build import build_model
from semiseg.models.segmenter import Segmenter
from tests.coco_files import make_coco, polygon_annotation
from tests.tiny import model_config

GOLDEN = Path(__file__).parent / "golden"
RELEASED = {"backbone.weights": "random", "backbone.stride_in_1x1": True, "pixel_std": [1.0, 1.0, 1.0]}
BIFPN = {"neck.kind": "bifpn", "neck.channels": 160, "neck.repeats": 6}
MEMBERS: dict[str, dict[str, Any]] = {
    "boxinst_r50": {},
    "condinst_r50": {"mask_head.feature_channels": 8},
    "boxinst_r50_bifpn": BIFPN,
    "boxinst_r101_bifpn_dcn": {"backbone.depth": 101, "backbone.deformable_interval": 1, **BIFPN},
}
NARROW = {"neck.channels": 64, "detector.tower_convs": 1, "mask_head.branch_channels": 8, "mask_head.branch_convs": 1}
AUXILIARY = {
    "mask_branch.seg_head.0.weight": (128, 256, 3, 3),
    "mask_branch.seg_head.1.num_batches_tracked": (),
    "mask_branch.logits.weight": (80, 128, 1, 1),
}


def released_config(changes: Mapping[str, Any] | None = None) -> ModelConfig:
    return model_config(RELEASED, changes or {})


def released_name(key: str, *, bifpn: bool) -> str:
    """A key of our model as the released files spell it; written apart from the package's rules."""
    part, _, rest = key.partition(".")
    bottom = "backbone.bottom_up.backbone." if bifpn else "backbone.bottom_up."
    words = rest.split(".")
    if part == "backbone" and not words[0].startswith("layer"):
        return f"{bottom}stem.conv1.{'norm.' if words[0] == 'bn1' else ''}{words[1]}"
    if part == "backbone":
        block = f"{bottom}res{int(words[0][-1]) + 1}.{words[1]}"
        if words[2] == "downsample":
            return f"{block}.shortcut.{'norm.' if words[3] == '1' else ''}{words[4]}"
        if words[3] == "offset":
            return f"{block}.conv2_offset.{words[4]}"
        return f"{block}.conv{words[2][-1]}.{'norm.' if words[2].startswith('bn') else ''}{words[3]}"
    if part == "neck" and bifpn:
        *place, number, what = words if not words[-1].startswith("weights_") else [*words[:-1], "", words[-1]]
        if not number:
            return f"backbone.repeated_bifpn.{place[1]}.{what}"
        norm = {"0": "", "1": "norm."}[number]
        if place == ["p6"]:
            return f"backbone.bottom_up.res6.reduction.{norm}{what}"
        return f"backbone.repeated_bifpn.{place[1]}.{place[2]}.{norm}{what}"
    if part == "neck":
        if words[0] == "extra":
            return f"backbone.top_block.p{6 + int(words[1])}.{words[2]}"
        kind = {"inner_blocks": "lateral", "layer_blocks": "output"}[words[1]]
        return f"backbone.fpn_{kind}{3 + int(words[2])}.{words[4]}"
    if part == "detector":
        if words[0] == "level_scales":
            return f"proposal_generator.fcos_head.scales.{words[1]}.scale"
        kinds = {"class_tower": "cls_tower", "box_tower": "bbox_tower", "class_logits": "cls_logits"}
        kinds |= {"box_distances": "bbox_pred", "centreness": "ctrness"}
        return ".".join(["proposal_generator.fcos_head", kinds[words[0]], *words[1:]])
    assert part == "mask_head"
    return ".".join(["mask_branch", *words[1:]] if words[0] == "branch" else words)


def released(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict as a released file holds it, but for the order of the stem's channels."""
    names = {released_name(key, bifpn=config.neck.kind == "bifpn"): value for key, value in state.items()}
    assert len(names) == len(state)
    constants = {
        "mask_head.sizes_of_interest": torch.tensor([64, 128, 256, 512, 1024]),
        "mask_head._iter": torch.zeros(1),
    }
    return {**names, **constants}


def empty_state(config: ModelConfig, *, num_classes: int = 80) -> dict[str, Tensor]:
    """Names and shapes of a model's weights, without values."""
    with torch.device("meta"):
        return build_model(config, num_classes=num_classes).state_dict()


def small_file(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    """Saves tensors that repeat a single number, so that even a whole network makes a small file."""
    repeated = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape) if value.is_meta else value
        for key, value in state.items()
    }
    torch.save({"model": repeated, **beside} if beside else repeated, path)
    return path


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["convert", "adelaidet", *map(str, arguments)])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """BoxInst ResNet-50 in released names, without values."""
    config = released_config()
    return released(empty_state(config), config)


def test_the_key_lists_are_small() -> None:
    files = sorted(GOLDEN.glob("keys_*.json.gz"))
    assert [file.name.split(".")[0].removeprefix("keys_") for file in files] == sorted(MEMBERS)
    assert all(file.stat().st_size < 50_000 for file in files)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_of_the_family_has_the_released_names_and_is_recognised(member: str) -> None:
    config = released_config(MEMBERS[member])
    expected = empty_state(config)
    state = released(expected, config)
    listed = json.loads(gzip.decompress((GOLDEN / f"keys_{member}.json.gz").read_bytes()))
    assert {key: list(value.shape) for key, value in state.items()} == listed
    # every key of the file gets a value of its own, so that a swapped pair would show
    values = {released_name(key, bifpn=config.neck.kind == "bifpn"): number for number, key in enumerate(expected)}
    filled = {key: value if key not in values else torch.tensor(values[key]) for key, value in state.items()}
    filled = {key: value.expand(state[key].shape) for key, value in filled.items()}
    found = convert_state(filled, where="file")
    assert found.config == config
    assert found.num_classes == 80
    assert found.dropped == ("mask_head._iter", "mask_head.sizes_of_interest")
    assert list(found.weights) == list(expected)
    for number, (key, value) in enumerate(found.weights.items()):
        assert (value.dtype, value.shape) == (expected[key].dtype, expected[key].shape)
        assert bool((value == number).all()), key


@pytest.mark.parametrize(
    "changes",
    [
        {**NARROW, "backbone.deformable_interval": 3, "neck.kind": "bifpn", "neck.repeats": 2},
        {
            **NARROW,
            "detector.tower_convs": 2,
            "mask_head.branch_convs": 3,
            "mask_head.feature_channels": 5,
            "neck.channels": 96,
        },
        {"backbone.depth": 101, "backbone.deformable_interval": 2},
    ],
)
def test_other_widths_and_depths_are_recognised(changes: dict[str, Any]) -> None:
    config = released_config(changes)
    found = convert_state(released(empty_state(config, num_classes=7), config), where="file")
    assert (found.config, found.num_classes) == (config, 7)


def random_model(config: ModelConfig, *, num_classes: int) -> Segmenter:
    """All parameters and statistics at random, none of them where it would hide another."""
    generator = torch.Generator().manual_seed(3)
    model = build_model(config, num_classes=num_classes).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(0.5 + noise)
            elif value.ndim < 2:
                value.add_(0.2 * noise)
            elif ".offset." in key:
                value.copy_(0.02 * (noise - 0.5))
    return model


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_converted_folder_computes_what_the_original_does_and_can_be_evaluated(tmp_path: Path) -> None:
    config = released_config(
        {
            **NARROW,
            "backbone.deformable_interval": 3,
            "neck.kind": "bifpn",
            "neck.repeats": 1,
            "mask_head.feature_channels": 8,
        }
    )
    # the original takes BGR images
    bgr = config.model_copy(update={"pixel_mean": config.pixel_mean[::-1]})
    original = random_model(bgr, num_classes=80)
    state = released(original.state_dict(), config)
    counters = {"backbone.bottom_up.backbone.stem.conv1.norm.num_batches_tracked": torch.tensor(0)}
    path = tmp_path / "released.pth"
    torch.save({"model": {**state, **counters}, "iteration": 90_000}, path)

    out = tmp_path / "models" / "converted"
    told = run(path, out, "--short-side", "64", "--long-side", "96")
    assert "released.pth: resnet50, bifpn, 80 classes\n" in told
    lines = told.splitlines()
    for line in ("backbone.deformable_interval = 3", "neck.repeats = 1", "mask_head.feature_channels = 8"):
        assert line in lines
    assert "mask_head._iter, mask_head.sizes_of_interest, num_batches_tracked of frozen norms (1)\n" in told
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]

    weights, info = load_model_folder(out)
    assert (info.config, info.inference) == (config, InferenceConfig(short_side=64, long_side=96))
    assert (info.class_names, info.category_ids) == (COCO_CLASSES, COCO_CATEGORY_IDS)
    for key, value in original.state_dict().items():
        expected = value[:, [2, 1, 0]] if key == "backbone.conv1.weight" else value
        assert torch.equal(weights[key], expected), key
    assert len(weights) == len(original.state_dict())
    converted = build_model(info.config, num_classes=80).eval()
    converted.load_state_dict(weights)
    images = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.inference_mode():
        size = torch.tensor([[60, 96]])
        ours, theirs = converted(images, size), original(images.flip(1), size)
    for name in ("class_logits", "box_distances", "centreness_logits"):
        assert_alike(getattr(ours, name), getattr(theirs, name))
    for name in ("filter_features", "mask_features"):
        assert_alike(getattr(ours.mask_inputs, name), getattr(theirs.mask_inputs, name))

    evaluate_folder(out, tmp_path)


def evaluate_folder(model: Path, folder: Path) -> None:
    """Runs `semiseg evaluate` on two images whose annotations have COCO's categories."""
    square = [8, 8, 40, 8, 40, 40, 8, 40]
    objects = [polygon_annotation(n, image_id=n, category_id=1 + 2 * 79, points=square) for n in (1, 2)]
    files = make_coco(folder, sizes_hw=((64, 80), (48, 96)), class_names=COCO_CLASSES, annotations=objects)

    def real_ids(content: dict[str, Any]) -> None:
        for category, number in zip(content["categories"], COCO_CATEGORY_IDS, strict=True):
            category["id"] = number
        for annotation in content["annotations"]:
            annotation["category_id"] = COCO_CATEGORY_IDS[-1]

    files = files.rewrite(real_ids)
    arguments = ["evaluate", model, "--annotations", files.annotations, "--images", files.images]
    results = folder / "results.json"
    found = CliRunner().invoke(app, [*map(str, arguments), "--detections", str(results), "--no-progress"])
    assert found.exit_code == 0, found.output
    assert "mask, all (80 classes)" in found.output
    assert {item["category_id"] for item in json.loads(results.read_text())} <= set(COCO_CATEGORY_IDS)


def test_coco_ids_are_those_of_the_annotation_files() -> None:
    assert len(COCO_CATEGORY_IDS) == len(COCO_CLASSES) == 80
    ids = dict(zip(COCO_CLASSES, COCO_CATEGORY_IDS, strict=True))
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "bear": 23, "zebra": 24, "backpack": 27}
    known |= {"bottle": 44, "wine glass": 46, "chair": 62, "dining table": 67, "toilet": 70, "tv": 72}
    known |= {"refrigerator": 82, "book": 84, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known


def test_other_classes_are_named_by_an_annotation_file_and_can_change_in_training(tmp_path: Path) -> None:
    config = released_config(NARROW)
    state = released(empty_state(config, num_classes=3), config)
    path = small_file(tmp_path / "three.pth", state)
    out = tmp_path / "out"
    assert "has 3 classes, not COCO's 80; name them with --annotations" in run(path, out, code=2)
    four = make_coco(tmp_path / "four").annotations
    assert f"has 4 classes, but {path} has 3" in run(path, out, "--annotations", four, code=2)
    assert not out.exists()
    three = make_coco(tmp_path / "three", class_names=("cat", "dog", "bird")).annotations
    told = run(path, out, "--annotations", three)
    _, info = load_model_folder(out)
    assert (info.class_names, info.category_ids) == (("cat", "dog", "bird"), (1, 3, 5))

    # what is printed is enough of a configuration to start from the folder, with five classes
    block = tomllib.loads(told[told.index("init_from = ") :])
    assert leaves(block["model"]) == {"backbone.stride_in_1x1": True, "pixel_std": [1.0, 1.0, 1.0], **NARROW}
    training = parse_config(RunConfig, {**block, "data": {"format": "shapes"}}, where="printed")
    assert training.init_from == str(out)
    assert training.model.with_backbone_weights("random") == config
    check_initial(Path(training.init_from), training.model)
    model = build_model(config, num_classes=5)
    afresh = load_initial(model, initial_weights(Path(training.init_from)), where="converted")
    assert afresh == ["detector.class_logits.weight", "detector.class_logits.bias"]


def test_a_state_dict_may_stand_alone_or_under_model(tmp_path: Path) -> None:
    state = {"controller.weight": torch.rand(2, 3), "scale": torch.tensor(2.0)}
    for number, held in enumerate((state, {"model": state}, {"model": state, "optimizer": {}, "iteration": 7})):
        path = tmp_path / f"{number}.pth"
        torch.save(held, path)
        found = read_state(path)
        assert set(found) == set(state)
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_what_only_training_needs_is_dropped_and_named(plain: dict[str, Tensor]) -> None:
    without = {key: value for key, value in plain.items() if not key.startswith("mask_head.")}
    assert convert_state(without, where="file").dropped == ()
    auxiliary = {key: torch.empty(shape, device="meta") for key, shape in AUXILIARY.items()}
    pixels = {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
    }
    found = convert_state({**plain, **auxiliary, **pixels}, where="file")
    assert found.dropped == tuple(sorted([*AUXILIARY, *pixels, "mask_head._iter", "mask_head.sizes_of_interest"]))


def test_counters_of_norms_are_made_where_they_are_missing(plain: dict[str, Tensor]) -> None:
    found = convert_state({k: v for k, v in plain.items() if "num_batches_tracked" not in k}, where="file")
    counters = [value for key, value in found.weights.items() if key.endswith("num_batches_tracked")]
    assert len(counters) == 7
    assert all(value.dtype == torch.int64 and value.item() == 0 for value in counters)


def test_unmatched_keys_are_all_listed(plain: dict[str, Tensor]) -> None:
    state = dict(plain)
    lost = ["backbone.bottom_up.res4.5.conv3.weight", "controller.bias", "mask_branch.refine.2.0.weight"]
    lost += ["proposal_generator.fcos_head.scales.4.scale", "backbone.fpn_output3.weight"]
    for key in lost:
        del state[key]
    added = ["roi_heads.box_head.fc1.weight", "mask_branch.extra.bias", "backbone.fpn_lateral2.weight"]
    state |= {key: torch.zeros(1) for key in added}
    state["proposal_generator.fcos_head.bbox_pred.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        convert_state(state, where="some.pth")
    told = str(error.value)
    assert told.startswith("some.pth: ")
    assert f"3 unknown: {', '.join(sorted(added))};" in told
    assert all(key in told for key in lost)
    assert "5 missing: " in told
    assert told.endswith("1 of another shape: proposal_generator.fcos_head.bbox_pred.bias (5,), expected (4,)")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"backbone.bottom_up.res4.1.conv2_offset.weight": torch.zeros(27, 256, 3, 3)},
            "deformable blocks res2: none; res3: none; res4: 1; res5: none; model.backbone.deformable_interval can",
        ),
        (
            {"backbone.bottom_up.res2.0.conv2_offset.weight": torch.zeros(27, 64, 3, 3)},
            "deformable blocks res2: 0; res3: none",
        ),
        (
            {"backbone.bottom_up.res4.7.conv1.weight": torch.zeros(1)},
            "the stages backbone.bottom_up.res2 to res5 have 3-4-8-3 blocks; known are 3-4-6-3 (resnet50) and 3-4-23-3",
        ),
        (
            {"controller.weight": torch.zeros(217, 256, 3, 3)},
            "the controller writes 217 numbers per instance, but a mask head of 3 layers of 8 channels on 16 mask "
            "channels and two coordinates has 233",
        ),
        ({"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}, "pixel_mean is [123.6"),
        ({"pixel_std": torch.tensor([57.375, 57.12, 58.395])}, "expected [1.0, 1.0, 1.0]"),
        (
            {"mask_head.sizes_of_interest": torch.tensor([32, 64, 128, 256, 512])},
            "sizes_of_interest is [32, 64, 128, 256, 512], expected [64, 128, 256, 512, 1024]",
        ),
        (
            {"proposal_generator.fcos_head.cls_tower.12.weight": torch.zeros(256, 256, 3, 3)},
            "7 missing: proposal_generator.fcos_head.cls_tower.12.bias, ",
        ),
    ],
)
def test_variants_that_cannot_be_said_are_refused(
    plain: dict[str, Tensor], changes: dict[str, Tensor], told: str
) -> None:
    with pytest.raises(UserError) as error:
        convert_state({**plain, **changes}, where="some.pth")
    assert told in str(error.value)


def test_files_that_are_no_released_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(name: str, told: str) -> None:
        message = run(tmp_path / name, out, code=2)
        assert message.count("\n") == 1
        assert told in message, message
        assert not out.exists()

    refused("absent.pth", "absent.pth: no such file")
    (tmp_path / "text.pth").write_text("hello")
    refused("text.pth", "text.pth: not a readable checkpoint: damaged, or not written by torch.save\n")
    with (tmp_path / "zoo.pkl").open("wb") as file:
        pickle.dump({"model": {"conv1.weight": np.zeros(3, dtype=np.float32)}, "__author__": "x"}, file)
    refused("zoo.pkl", "zoo.pkl: not a torch file of tensors and plain values; anything else could run code")
    torch.save({"model": {"a": torch.zeros(1)}, "hook": tmp_path}, tmp_path / "object.pth")
    refused("object.pth", "object.pth: not a torch file of tensors and plain values; anything else could run code")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused("list.pth", "list.pth: not a checkpoint: holds list")
    torch.save({"model": [1]}, tmp_path / "inner.pth")
    refused("inner.pth", "inner.pth: 'model' is not a state dict, names to tensors")
    torch.save({}, tmp_path / "empty.pth")
    refused("empty.pth", "empty.pth: holds no tensors")
    torch.save({"step": 3, "seed": 0}, tmp_path / "plain.pth")
    refused("plain.pth", "plain.pth: not a state dict: 'step' is int, expected a tensor")
    with torch.device("meta"):
        imagenet = resnet50().state_dict()
    small_file(tmp_path / "imagenet.pth", imagenet)
    refused(
        "imagenet.pth",
        "imagenet.pth: not a released CondInst or BoxInst checkpoint: no keys backbone.bottom_up.*, "
        "proposal_generator.fcos_head.*, mask_branch.*, controller.*; its first keys are conv1.weight, bn1.weight, ",
    )
    (tmp_path / "folder").mkdir()
    refused("folder", "folder: is a folder, expected a checkpoint file")


def test_only_a_model_folder_is_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_text("x")
    (kept / "notes.txt").write_text("mine")
    assert "holds other things than a model, which would be lost" in run(tmp_path / "any.pth", kept, code=2)
    assert "is a file" in run(tmp_path / "any.pth", kept / "notes.txt", code=2)
    assert "is no folder" in run(tmp_path / "any.pth", kept / "notes.txt" / "below", code=2)
    assert (kept / "notes.txt").read_text() == "mine"
    (kept / "notes.txt").unlink()
    (kept / "config.json").write_text('{"model_type": "bert"}')  # others' models have files of the same names
    assert "holds no readable model of semiseg, but what would be lost" in run(tmp_path / "any.pth", kept, code=2)
    assert (kept / "model.safetensors").read_text() == "x"
    state = released(empty_state(released_config(NARROW)), released_config(NARROW))
    path = small_file(tmp_path / "small.pth", state, iteration=1)
    (tmp_path / "out").mkdir()
    for _ in range(2):  # an empty folder, then a model folder
        run(path, tmp_path / "out")
    assert load_model_folder(tmp_path / "out")[1].config == released_config(NARROW)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["kept", "out", "small.pth"]
