"""Configurations that torch cannot compute are refused before a training, or computed after all; errors of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.config import RunConfig
from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_step, require_normalisable
from semiseg.engine.processes import batch_norms
from semiseg.engine.run import execute_run
from semiseg.engine.session import start_accelerator
from semiseg.engine.step import TrainStep
from semiseg.errors import StepError, UserError
from semiseg.models.norms import GroupNorm
from tests.coco_files import make_coco
from tests.tiny import tiny_config

SMALL = {"short_sides": [32], "long_side": 32}
BIFPN: dict[str, Any] = {
    "neck": {"kind": "bifpn", "channels": 16, "repeats": 1},
    "detector": {"strides": [8, 16, 32, 64, 128], "level_ranges": [8, 16, 32, 64]},
    "mask_head": {"feature_stride": 8},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def config_of(root: Path, **sections: dict[str, Any]) -> RunConfig:
    model = {"backbone.norm": "gn", "mask_head.branch_norm": "gn"} | sections.pop("model", {})
    optim = {"steps": 1, "batch_size": 1} | sections.pop("optim", {})
    return tiny_config(root, model=model, optim=optim, **sections)


def require(config: RunConfig) -> None:
    step = build_step(config, num_classes=12)
    weights = {key: value.clone() for key, value in step.state_dict().items()}
    require_normalisable(config, build_data(config), step.model, start_accelerator(config.runtime, seed=0))
    assert step.model.training
    for key, value in step.state_dict().items():  # statistics of batch norm, too
        assert torch.equal(value, weights[key])


def test_one_value_is_normalised_to_the_bias() -> None:
    norm = GroupNorm(4, 4)
    nn.init.normal_(norm.bias)
    image = torch.randn(1, 4, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.GroupNorm(4, 4)(image)
    for training_ in (True, False):
        found = norm.train(training_)(image)
        torch.testing.assert_close(found, norm.bias[None, :, None, None], atol=1e-4, rtol=0)
    found.sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, torch.zeros_like(image))


def test_more_values_are_normalised_as_torch_does() -> None:
    maps = torch.randn(2, 8, 3, 5)
    assert torch.equal(GroupNorm(4, 8)(maps), nn.GroupNorm(4, 8)(maps))


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"data": SMALL, "model": {"backbone.norm": "bn"}}, "model.backbone.norm"),
        ({"data": SMALL, "model": {"backbone.norm": "sync_bn"}}, "model.backbone.norm"),
        ({"data": SMALL, "model": {"mask_head.branch_norm": "bn"}}, "model.mask_head.branch_norm"),
        (
            {"data": SMALL, "model": {"backbone.norm": "bn", "mask_head.branch_norm": "bn"}},
            "model.backbone.norm and model.mask_head.branch_norm",
        ),
        ({"data": {"short_sides": [128], "long_side": 128}, "model": BIFPN}, "model.neck.norm"),  # stride 128
        (
            {
                "data": SMALL | {"long_side": 64},
                "model": {"backbone.norm": "bn"},
                "optim": {"batch_size": 4},
                "runtime": {"images_per_process": 1},
            },
            "model.backbone.norm",
        ),
        ({"data": {"augment": {"scale": [0.5, 1]}, "short_sides": [64]}, "model": {"backbone.norm": "bn"}}, "model"),
    ],
)
def test_a_single_value_of_batch_norm_is_refused(root: Path, sections: dict[str, Any], keys: str) -> None:
    config = config_of(root, **sections)
    with pytest.raises(UserError, match=rf"^batch norm \({keys}.* would get a single value a channel, .*one image at"):
        require(config)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": SMALL},
        {"data": SMALL, "model": {"backbone.norm": "bn"}, "optim": {"batch_size": 2}},
        {"data": {"short_sides": [64], "long_side": 64}, "model": {"backbone.norm": "bn"}},
        {"data": SMALL, "model": {"backbone.norm": "frozen_bn"}},
        {"data": SMALL, "model": {"backbone.norm": "bn", "backbone.frozen_stages": 4}},
        {"data": SMALL, "model": BIFPN | {"neck": BIFPN["neck"] | {"norm": "gn"}}},
    ],
)
def test_what_torch_computes_is_taken(root: Path, sections: dict[str, Any]) -> None:
    require(config_of(root, **sections))


def test_the_smallest_image_of_the_smallest_scale_counts(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(64, 128), (50, 50), (128, 64)])
    data = {"format": "coco", "root": str(tmp_path), "short_sides": [96, 32], "long_side": 96}
    data |= {f"{name}_images": "images" for name in ("train", "val")}
    data |= {f"{name}_annotations": files.annotations.name for name in ("train", "val")}
    sections: dict[str, Any] = {"model": {"backbone.norm": "bn"}, "supervision": {"source": "boxes", "split": None}}
    with pytest.raises(UserError, match="of 32 x 32 pixels at the least"):
        require(config_of(tmp_path, data=data, **sections))
    require(config_of(tmp_path, data=data | {"short_sides": [40]}, **sections))  # 40 x 40, two cells each way
    files.rewrite(lambda content: content["images"].pop(1) and content.update(annotations=content["annotations"][:2]))
    require(config_of(tmp_path, data=data, **sections))  # 32 x 64
    with pytest.raises(UserError, match="of 32 x 32 pixels at the least"):  # what a crop may leave
        require(config_of(tmp_path, data=data | {"augment": {"crop": "random"}}, **sections))


def test_how_many_images_are_normalised_together(root: Path) -> None:
    config = config_of(root, model={"backbone.norm": "bn"}, optim={"batch_size": 8, "accumulation": 2})
    assert batch_norms(config, 1) == {"bn": 4}
    assert batch_norms(config, 4) == {"bn": 1}
    both = config_of(root, model={"backbone.norm": "sync_bn", "mask_head.branch_norm": "bn"}, optim={"batch_size": 8})
    assert batch_norms(both, 4) == {"bn": 2, "sync_bn": 8}
    assert batch_norms(config_of(root), 1) == {}


def test_a_run_of_one_cell_trains_evaluates_and_predicts(root: Path, tmp_path: Path) -> None:
    config = config_of(root, data=SMALL, inference={"short_side": 32, "long_side": 32}, model={"neck.channels": 8})
    execute_run(config, out=tmp_path / "run", progress=False)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ValueError("two\nlines"), StepError, "ValueError: two; .*error_step_00000001_rank0.txt has the whole error$"),
        (KeyError("a"), StepError, "KeyError: 'a'; "),
        (AssertionError(), StepError, "AssertionError: ; "),
        (
            RuntimeError("CUDA out of memory. Tried"),
            UserError,
            r"not enough memory \(CUDA out of memory. Tried\); fewer",
        ),
        (MemoryError(), UserError, "not enough memory; fewer images at a time"),
        (UserError("x.png: damaged"), UserError, "x.png: damaged$"),
        (UserError("step 1: the loss is not finite"), UserError, "the loss is not finite$"),
    ],
)
def test_errors_of_a_step_name_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], told: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "forward", fail)
    with pytest.raises(kind, match=f"^step 1: {told}") as caught:
        execute_run(config_of(root), out=tmp_path / "run", progress=False)
    assert caught.value.__cause__ is error
    files = list((tmp_path / "run").glob("error_step_*.txt"))
    assert len(files) == (kind is StepError)
    if files:
        text = files[0].read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" in text
        assert "raise error" in text


def test_an_image_that_cannot_be_loaded_names_the_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("a.png: the image cannot be decoded")

    monkeypatch.setattr(training, "_next_parts", fail)
    with pytest.raises(UserError, match=r"^step 1: a\.png: the image cannot be decoded$"):
        execute_run(config_of(root), out=tmp_path / "run", progress=False)


def test_a_failed_step_is_one_sentence_of_the_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("what torch says")

    monkeypatch.setattr(TrainStep, "forward", fail)
    path = tmp_path / "run.json"
    path.write_text(config_of(root).model_dump_json(), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("semiseg: step")]
    assert line.startswith("semiseg: step 1: ValueError: what torch says; ")
    assert "Traceback" not in result.output
    monkeypatch.undo()  # the folder is the run's still
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "run"), "--resume"])
    assert result.exit_code == 0, result.output
