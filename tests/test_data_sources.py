"""Where data come from: what is said when they are missing, test sets without annotations, and the measuring tools."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.config import DataConfig, InferenceConfig
from semiseg.data.sources import AnnotatedImages, SetName, cache_folder, ensure_files, expected_files
from semiseg.data.table import load_table
from semiseg.engine.build import build_data, build_evaluation_loader, build_training_loader
from semiseg.engine.checkpoint import ModelInfo, save_model
from semiseg.errors import UserError
from semiseg.models.build import build_model
from tests.coco_files import CLASS_NAMES, make_coco
from tests.make_large_coco import make_large_coco
from tests.measure_loader_memory import data_config, family, measure, pss, report
from tests.tiny import tiny_config
from tests.voc_files import make_voc

SITE = "http://images.cocodataset.org"


def call(*arguments: object, code: int) -> str:
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """COCO's layout under `tmp_path/coco`, and `tmp_path` as the current folder."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "coco"
    for name in ("train2017", "val2017"):
        files = make_coco(tmp_path / name)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        files.images.rename(root / name)
        files.annotations.rename(root / "annotations" / f"instances_{name}.json")
    return root


def complaint(config: DataConfig, sets: Sequence[SetName] = ("train", "val")) -> str:
    with pytest.raises(UserError) as error:
        ensure_files(config, sets)
    return str(error.value)


def test_a_complete_layout(coco: Path) -> None:
    config = DataConfig(root="coco")
    files = ensure_files(config)
    assert files == expected_files(config)
    assert files["val"] == AnnotatedImages(Path("coco/annotations/instances_val2017.json"), Path("coco/val2017"))
    assert cache_folder(config) == Path("coco/arrow")
    assert list(ensure_files(config, ["val"])) == ["val"]


def test_missing_parts_name_the_archives(coco: Path) -> None:
    config = DataConfig(root="coco")
    (coco / "train2017").rename(coco / "elsewhere")
    assert complaint(config) == (
        f"coco: not there: train2017; download {SITE}/zips/train2017.zip and unpack there, "
        "or name another folder with '--set data.root=DIR'"
    )
    assert list(ensure_files(config, ["val"])) == ["val"]
    (coco / "annotations" / "instances_train2017.json").unlink()
    (coco / "annotations" / "instances_val2017.json").unlink()
    for path in (coco / "val2017").iterdir():
        path.unlink()  # an empty folder is as good as none
    told = complaint(config)
    assert told == (
        "coco: not there: train2017, annotations/instances_train2017.json, "
        "val2017, annotations/instances_val2017.json; "
        f"download {SITE}/zips/train2017.zip, {SITE}/annotations/annotations_trainval2017.zip, "
        f"{SITE}/zips/val2017.zip and unpack there, or name another folder with '--set data.root=DIR'"
    )
    assert "\n" not in told


def test_missing_parts_of_other_names_name_the_keys(coco: Path) -> None:
    assert complaint(DataConfig(root="coco", train_images="mine")) == (
        "coco: not there: mine; put that there, or change data.root or data.train_images"
    )
    told = complaint(
        DataConfig(root="coco", val_annotations="val2017", val_images="annotations/instances_val2017.json")
    )
    assert re.search(r"; put that there, or change data\.root or data\.val_images, data\.val_annotations$", told)


def test_a_missing_root_is_said_rather_than_all_that_it_lacks(coco: Path) -> None:
    told = complaint(DataConfig(root="coca", train_images="train", val_images="val"))
    assert told.startswith("coca: no such folder; data.root is to name the one that holds train, annotations/")
    assert complaint(DataConfig(root="coca")).startswith(f"coca: no such folder; download {SITE}/zips/train2017.zip")
    assert complaint(DataConfig(root="coca", format="voc")).startswith("coca: no such folder; download http")


def test_every_verb_says_the_same(coco: Path) -> None:
    (coco / "train2017").rename(coco / "elsewhere")
    told = "coco: not there: train2017; download"
    assert f"semiseg: {told}" in call("run", "coco_voc_splits", "--set", "data.root=coco", code=2)
    assert told in call("status", "coco_voc_splits", "--set", "data.root=coco", code=0)  # lists the runs all the same
    Path("run.toml").write_text('data = {root = "coco"}\noptim = {steps = 1}\n')
    assert f"semiseg: {told}" in call("train", "run.toml", "--out", "out", code=2)


def test_a_partial_image_folder_is_counted(coco: Path) -> None:
    for name in ("002.png", "004.png"):
        (coco / "train2017" / name).unlink()
    config = tiny_config(coco, data={"format": "coco"}, supervision={"source": "boxes", "split": None})
    told = r"train2017: 2 of the 4 images that .*instances_train2017\.json names are missing, such as 002\.png"
    with pytest.raises(UserError, match=told):
        build_data(config)


def test_voc_is_a_source(tmp_path: Path) -> None:
    make_voc(tmp_path)
    config = DataConfig.model_validate({"format": "voc", "root": str(tmp_path), "voc": {"train_set": "train"}})
    expected = expected_files(config)
    assert not expected["train"].annotations.exists()
    files = ensure_files(config)
    assert files == expected
    assert len(load_table(*files["val"], cache=cache_folder(config))) > 0


@pytest.mark.filterwarnings("ignore:.* objects have no mask")
def test_what_is_made_of_data_goes_where_it_may(coco: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_voc(coco.parent / "voc")
    before = sorted(coco.parent.rglob("*"))
    monkeypatch.setenv("SEMISEG_CACHE", str(coco.parent / "cache"))
    build_data(tiny_config(coco, data={"format": "coco", "shapes": {}}, supervision={"split": None, "source": "boxes"}))
    voc = DataConfig.model_validate({"format": "voc", "root": str(coco.parent / "voc"), "voc": {"train_set": "train"}})
    assert ensure_files(voc) == expected_files(voc)
    annotations, images = coco / "annotations" / "instances_val2017.json", coco / "val2017"
    call("evaluate", model, "--annotations", annotations, "--images", images, code=0)
    made = {path for path in coco.parent.rglob("*") if "cache" not in path.parts}
    assert made == set(before)
    assert {path.name for path in (coco.parent / "cache").iterdir()} == {"arrow", "semiseg"}
    assert len(list((coco.parent / "cache" / "arrow").iterdir())) == 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with random weights and the classes of `make_coco`."""
    config = tiny_config(tmp_path).model
    torch.manual_seed(0)
    network = build_model(config, num_classes=len(CLASS_NAMES))
    inference = InferenceConfig(short_side=64, long_side=96, score_threshold=0.0)
    info = ModelInfo(config, inference, CLASS_NAMES, (1, 3, 5, 7))
    save_model(tmp_path / "model", network.state_dict(), info)
    return tmp_path / "model"


def test_a_test_set_without_annotations_is_predicted(coco: Path, model: Path) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    del content["annotations"]
    test_dev = coco / "annotations" / "image_info_test-dev2017.json"
    test_dev.write_text(json.dumps(content))
    command = ("evaluate", model, "--annotations", test_dev, "--images", coco / "val2017")
    assert "has no annotations, so there is nothing to measure; name a file" in call(*command, code=2)
    told = call(*command, "--detections", "found.json", "--out", "numbers.json", code=0)
    assert "no ground truth to measure AP on 4 images; the detections are in found.json" in told
    found = json.loads(Path("found.json").read_text())
    assert {item["image_id"] for item in found} <= {1, 2, 3, 4}
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(found[0])
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["images"] == 4
    assert set(numbers["instances"].values()) == {0}
    assert numbers["segm"]["groups"]["all"]["AP"] is None

    # To train on it, or to check a training with it, stays an error; also when its table is there already.
    name = f"annotations/{test_dev.name}"
    for key in ("train_annotations", "val_annotations"):
        config = tiny_config(coco, data={"format": "coco", key: name}, supervision={"source": "boxes", "split": None})
        with pytest.raises(UserError, match=r"test-dev2017\.json: no list 'annotations'; needed: images, annotations"):
            build_data(config)


def test_a_present_but_wrong_annotation_list_is_no_test_set(coco: Path) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": None}))
    with pytest.raises(UserError, match="no list 'annotations'"):
        load_table(path, coco / "val2017", cache=coco / "arrow", annotations_required=False)


def test_the_measuring_tools_work(tmp_path: Path) -> None:
    make_large_coco(tmp_path / "large", images=300, instances=2200, val_images=20, pictures=8)
    content = json.loads((tmp_path / "large/annotations/instances_train2017.json").read_text())
    assert (len(content["images"]), len(content["annotations"])) == (300, 2200)
    crowd = sum(item["iscrowd"] for item in content["annotations"])
    assert 0.008 < crowd / 2200 < 0.025
    config = data_config(tmp_path / "large", batch_size=2, settings=["data.short_sides=[64]", "data.long_side=96"])
    gc.collect()  # ends the workers of loaders that earlier tests have left in reference cycles
    alone = measure(config, method=None, workers=0, batches=6)
    forked = measure(config, method="fork", workers=2, batches=6)
    assert forked.processes == alone.processes + 2
    assert all(item.pss >= item.main_pss > 50 * 2**20 for item in (alone, forked))
    assert forked.pss > forked.main_pss
    assert re.search(r"fork +2 workers .* growth +[+-]\d+ MiB", report(forked, alone))


def test_proportional_memory_of_a_process_that_is_gone_is_nothing() -> None:
    assert pss(2**22 + 1) == 0
    assert family(2**22 + 1) == [2**22 + 1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forking is unsafe")
def test_linux_forks_whatever_python_prefers(coco: Path) -> None:
    config = tiny_config(
        coco, data={"format": "coco"}, supervision={"source": "boxes", "split": None}, runtime={"workers": 1}
    )
    data = build_data(config)
    training = build_training_loader(config, data, steps=1, start_step=0, processes=1, rank=0, pin_memory=False)
    evaluation = build_evaluation_loader(
        data.val, model=config.model, inference=config.inference, runtime=config.runtime, processes=1, rank=0
    )
    for loader in (training, evaluation):
        assert loader.multiprocessing_context.get_start_method() == "fork"
