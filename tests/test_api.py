"""The Python API: names, `detect` against one image at a time, bad arguments, `train`, and the examples of its page."""

from __future__ import annotations

import inspect
import math
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomlkit
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.engine import predict as engine
from semiseg.engine.predict import forward_groups
from semiseg.models.detectors.select import select_detections
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import pad_images
from semiseg.structures.outputs import Detections
from tests.coco_files import picture
from tests.model_folders import make_model
from tests.test_postprocess import postprocess
from tests.tiny import tiny_config

PAGE = Path(__file__).parent.parent / "docs" / "API.md"
SIZES = [(64, 80), (48, 96), (64, 80), (33, 40), (60, 70), (33, 41)]  # padded: 64x96 three times, 64x64, 64x96, 64x64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> semiseg.LoadedModel:
    folder = tmp_path_factory.mktemp("api") / "model"
    make_model(folder)
    return semiseg.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    random = np.random.default_rng(0)
    return [torch.from_numpy(picture(random, *size)).permute(2, 0, 1) for size in SIZES]


def slowly(model: semiseg.LoadedModel, image: Tensor, output_hw: tuple[int, int], threshold: float) -> Detections:
    """One image through the network and the whole post-processing."""
    batch, sizes = pad_images([image], 32)
    limits = model.info.inference
    with torch.no_grad():
        outputs = model.network(batch, sizes)
        (found,) = postprocess(
            model.network,
            outputs,
            sizes,
            torch.tensor([output_hw]),
            score_threshold=threshold,
            candidates_per_level=limits.candidates_per_level,
            nms_threshold=limits.nms_threshold,
            max_detections=limits.max_detections,
        )
    return found


def assert_same(found: Detections, wanted: Detections) -> None:
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, wanted.labels)
    assert found.masks.shape == wanted.masks.shape
    assert (found.masks ^ wanted.masks).float().mean() < 1e-4


def test_importing_is_cheap_and_shows_the_names() -> None:
    code = "import sys, semiseg; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)), dir(semiseg))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("[] ")
    assert all(repr(name) in told for name in semiseg.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    assert len(semiseg.__all__) == 10
    page = PAGE.read_text(encoding="utf-8")
    for name in semiseg.__all__:
        assert getattr(semiseg, name) is not None
        assert name == "__version__" or f"`{name}`" in page, name
    assert len(semiseg.losses.__all__) == 13
    for name in semiseg.losses.__all__:
        assert inspect.getdoc(getattr(semiseg.losses, name)), name
        assert f"`{name}`" in page, name
    with pytest.raises(AttributeError, match="has no attribute 'detekt'"):
        semiseg.detekt  # type: ignore[attr-defined]  # noqa: B018


def test_the_signatures_that_are_promised() -> None:
    assert str(inspect.signature(semiseg.detect)).startswith("(model: 'LoadedModel', images: 'Sequence[Tensor]', *, ")
    defaults = {name: value.default for name, value in inspect.signature(semiseg.detect).parameters.items()}
    assert defaults["output_sizes"] is None
    assert defaults["score_threshold"] == 0.05
    assert list(inspect.signature(semiseg.load_model).parameters) == ["folder", "device"]
    assert list(inspect.signature(semiseg.train).parameters) == ["config", "out", "resume", "progress"]


def test_detect_is_the_network_on_one_image_at_a_time(model: semiseg.LoadedModel, images: list[Tensor]) -> None:
    outputs = [(h * 2, w + 5) if number % 2 else (h, w) for number, (h, w) in enumerate(SIZES)]
    together = semiseg.detect(model, images, output_sizes=outputs, score_threshold=0.1)
    assert sum(map(len, together)) > 40
    for image, output_hw, found in zip(images, outputs, together, strict=True):
        assert len(found) > 0
        assert tuple(found.masks.shape[1:]) == output_hw
        assert 0 < found.masks.float().mean() < 1
        assert_same(found, slowly(model, image, output_hw, 0.1))
    for number in (5, 0, 3):  # alone, and in another order
        (alone,) = semiseg.detect(
            model, images[number : number + 1], output_sizes=[outputs[number]], score_threshold=0.1
        )
        assert_same(alone, together[number])
    backwards = semiseg.detect(model, images[::-1], output_sizes=outputs[::-1], score_threshold=0.1)
    for found, wanted in zip(backwards, reversed(together), strict=True):
        assert_same(found, wanted)


def test_only_equal_padded_sizes_share_a_forward_and_memory_is_bounded(
    model: semiseg.LoadedModel, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    handle = model.network.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    wanted = semiseg.detect(model, images)
    assert seen == [(4, 3, 64, 96), (2, 3, 64, 64)]
    seen.clear()
    monkeypatch.setattr(engine, "find_instances", partial(engine.find_instances, forward_pixels=64 * 96 * 2))
    for found, before in zip(semiseg.detect(model, images), wanted, strict=True):
        assert_same(found, before)
    assert seen == [(2, 3, 64, 96), (2, 3, 64, 96), (2, 3, 64, 64)]
    handle.remove()


def test_rescored_by_the_mean_probability_of_their_masks(model: semiseg.LoadedModel, images: list[Tensor]) -> None:
    limits = model.info.inference
    rescored = limits.model_copy(update={"rescore": True})
    plain, found = (
        engine.each_image(model.network, images, engine.collected, output_sizes=SIZES, limits=each)
        for each in (limits, rescored)
    )
    moved = False
    for image, before, after in zip(images, plain, found, strict=True):
        batch, sizes = pad_images([image], 32)
        with torch.no_grad():
            outputs = model.network(batch, sizes)
            (chosen,) = select_detections(
                outputs,
                sizes,
                **limits.model_dump(exclude={"short_side", "long_side", "rescore", "refine", "stretch", "area_limits"}),
            )
            masks = model.network.predict_masks(outputs, chosen.queries)
        assert isinstance(masks.grid, WholeMap)
        wanted = []
        for score, logits in zip(before.scores.tolist(), masks.logits.tolist(), strict=True):
            cells = [
                1 / (1 + math.exp(-logits[row][column]))
                for row in range(len(logits))
                for column in range(len(logits[0]))
                if row * masks.grid.stride < image.shape[1] and column * masks.grid.stride < image.shape[2]
            ]
            inside = [value for value in cells if value > 0.5]
            wanted.append(score * sum(inside) / len(inside) if inside else 0.0)
        order = sorted(range(len(wanted)), key=lambda index: -wanted[index])
        moved = moved or order != list(range(len(wanted)))
        assert after.scores.tolist() == pytest.approx([wanted[index] for index in order], abs=1e-5)
        torch.testing.assert_close(after.boxes, before.boxes[order])
        assert torch.equal(after.labels, before.labels[order])
        assert torch.equal(after.masks, before.masks[order])
    assert moved, "a sure mask overtakes an unsure one"


def test_groups_hold_every_image_once() -> None:
    sizes = [(32, 32), (33, 32), (1, 1), (64, 32), (32, 31), (500, 900)]
    assert forward_groups(sizes, size_divisor=32, forward_pixels=2**11) == [[0, 2], [4], [1], [3], [5]]
    assert forward_groups(sizes, size_divisor=32, forward_pixels=2**22) == [[0, 2, 4], [1, 3], [5]]
    assert forward_groups([], size_divisor=32, forward_pixels=1) == []


def test_output_sizes_scale_boxes(model: semiseg.LoadedModel, images: list[Tensor]) -> None:
    (own,) = semiseg.detect(model, images[:1])
    (scaled,) = semiseg.detect(model, images[:1], output_sizes=[(128, 240)])
    torch.testing.assert_close(scaled.boxes, own.boxes * torch.tensor([3, 2, 3, 2]))
    assert torch.equal(scaled.scores, own.scores)
    assert scaled.masks.shape[1:] == (128, 240)


def test_the_threshold_is_on_the_square_of_the_score(model: semiseg.LoadedModel, images: list[Tensor]) -> None:
    (many,) = semiseg.detect(model, images[:1], score_threshold=0.0)
    (some,) = semiseg.detect(model, images[:1], score_threshold=0.4)
    assert 0 < len(some) < len(many)
    assert torch.equal(some.scores, many.scores[many.scores**2 > 0.4])
    (none,) = semiseg.detect(model, images[:1], score_threshold=1.0)
    assert (none.boxes.shape, none.masks.shape) == ((0, 4), (0, 64, 80))
    assert semiseg.detect(model, []) == []


def test_results_are_ordinary_tensors_on_the_cpu(model: semiseg.LoadedModel, images: list[Tensor]) -> None:
    (found,) = semiseg.detect(model, images[:1])
    for values in (found.boxes, found.scores, found.labels, found.masks):
        assert values.device.type == "cpu"
        assert not values.is_inference()
    found.masks[:] = False
    factor = torch.ones(4, requires_grad=True)
    (found.boxes * factor).sum().backward()  # saved for the backward: inference tensors refuse that
    assert factor.grad is not None


IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        (([IMAGE, IMAGE.float()],), TypeError, r"images\[1\] must be uint8 with values 0 to 255, not float32"),
        (([IMAGE[0]],), ValueError, r"images\[0\] must be \(3, height, width\), not \(8, 8\)"),
        (([IMAGE.permute(1, 2, 0)],), ValueError, r"not \(8, 8, 3\)"),
        (([IMAGE[:, :0]],), ValueError, r"not \(3, 0, 8\)"),
        (([np.zeros((3, 8, 8), np.uint8)],), TypeError, r"images\[0\] must be a tensor, not ndarray"),
        ((IMAGE,), TypeError, "images must be a list of tensors, not Tensor"),
        (([IMAGE], {"output_sizes": []}), ValueError, "output_sizes has 0 entries for 1 images"),
        (([IMAGE], {"output_sizes": [8]}), TypeError, r"output_sizes\[0\] must be \(height, width\), not 8"),
        (([IMAGE], {"output_sizes": [(8, 0)]}), ValueError, r"output_sizes\[0\] must be two whole numbers"),
        (([IMAGE], {"output_sizes": [(8, 2.5)]}), ValueError, r"output_sizes\[0\] must be two whole numbers"),
        (([IMAGE], {"output_sizes": [(8, 8, 3)]}), TypeError, "not \\(8, 8, 3\\)"),
        (([IMAGE], {"score_threshold": 1.5}), ValueError, r"score_threshold must be in \[0, 1\], not 1.5"),
    ],
)
def test_wrong_arguments(
    model: semiseg.LoadedModel, arguments: tuple[Any, ...], kind: type[Exception], told: str
) -> None:
    given, options = arguments if len(arguments) == 2 else (*arguments, {})
    with pytest.raises(kind, match=told):
        semiseg.detect(model, given, **options)


def test_a_model_that_is_none(model: semiseg.LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be what load_model returns, not str"):
        semiseg.detect("runs/mine", [IMAGE])  # type: ignore[arg-type]
    model.network.train()
    with pytest.raises(ValueError, match="training mode"):
        semiseg.detect(model, [IMAGE])
    model.network.eval()
    with pytest.raises(semiseg.UserError, match=r"not a model folder: config\.json is missing"):
        semiseg.load_model(tmp_path)
    make_model(tmp_path / "model")
    with pytest.raises(semiseg.UserError, match="device 'nonsense' is not on this machine"):
        semiseg.load_model(tmp_path / "model", device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(semiseg.UserError, match="device 'cuda' is not on this machine"):
            semiseg.load_model(tmp_path, device="cuda")
    loaded = semiseg.load_model(str(tmp_path))  # a run's folder: the model is in it
    assert loaded.class_names == ("cat", "dog", "bird", "fish")
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    make_model(tmp_path / "other", class_names=("cat",), category_ids=(1,))
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    with pytest.raises(
        semiseg.UserError, match=r"other/model\.safetensors: not the weights that config\.json describes"
    ):
        semiseg.load_model(tmp_path / "other")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page supposes: a finished run in runs/mine, its run.toml, and a photograph."""
    folder = tmp_path_factory.mktemp("page")
    config = tiny_config(folder / "data", optim={"steps": 1})
    (folder / "run.toml").write_text(tomlkit.dumps(config.model_dump(mode="json", exclude_none=True)))
    semiseg.train(config, out=folder / "runs" / "mine")
    (folder / "photos").mkdir()
    Image.fromarray(picture(np.random.default_rng(1), 96, 128)).save(folder / "photos" / "street.png")
    return folder


def test_the_examples_of_the_page_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["result"]["steps"] == 1


def test_the_commands_of_the_page_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    Image.fromarray(picture(np.random.default_rng(2), 300, 1500)).save("aerial.tif")
    blocks = re.findall(r"^```\n(semiseg .*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    for command in blocks[0].splitlines():
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert (workplace / "predictions" / "overlays" / "aerial.jpg").is_file()


def test_train_takes_configurations_in_every_form(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    result = semiseg.train("run.toml", out="runs/mine")  # finished: nothing is trained
    assert result["steps"] == 1
    assert result["folder"] == "runs/mine"
    assert result["command"] == "called from Python"
    config = tiny_config(workplace / "data", optim={"steps": 1})
    assert semiseg.train(config.model_dump(exclude_none=True), out=Path("runs/mine")) == result
    with pytest.raises(semiseg.UserError, match="holds this run already"):
        semiseg.train(config, out="runs/mine", resume=False)
    with pytest.raises(semiseg.UserError, match=r"config: unknown key 'optim.stesp'. Did you mean 'steps'"):
        semiseg.train({"optim": {"stesp": 1}})
    with pytest.raises(TypeError, match="config must be a RunConfig, a dict or a path, not int"):
        semiseg.train(3)  # type: ignore[arg-type]


def test_wrong_keys_and_values_of_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(semiseg.UserError, match=r"unknown key 'optim\.stepz'\. Did you mean 'steps'\?"):
        semiseg.train({"optim": {"stepz": 3}}, out=tmp_path / "run")
    with pytest.raises(semiseg.UserError, match=r"model\.backbone\.frozen_stages > 0 .*: set it to 0"):
        semiseg.train({"model": {"backbone": {"weights": "random"}}}, out=tmp_path / "run")
    with pytest.raises(ValueError, match="stepz"):  # as docs/API.md says
        semiseg.RunConfig(optim={"stepz": 3})  # type: ignore[arg-type]  # pydantic reads what it is given
    assert not (tmp_path / "run").exists()


def test_every_configuration_has_a_folder_of_its_own(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def note(config: semiseg.RunConfig, *, out: Path, resume: bool, progress: bool) -> dict[str, Any]:
        folders.append(out)
        return {}

    monkeypatch.setattr("semiseg.engine.run.execute_run", note)
    config = tiny_config(workplace / "data")
    for changed in (config, config.model_copy(update={"seed": 3}), config.model_copy(update={"init_from": "x"})):
        assert semiseg.train(changed) == {"folder": str(folders[-1])}
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"runs/api-[0-9a-f]{16}", folder.as_posix()) for folder in folders)
    semiseg.train(tiny_config(workplace / "data", runtime={"workers": 1}))
    assert folders[-1] == folders[0]
