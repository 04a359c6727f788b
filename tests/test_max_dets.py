"""The evaluation's limit of detections follows the model's: 144 objects in an image of which nothing is left out."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.engine.run import evaluate_run, execute_run
from semiseg.errors import UserNotice
from semiseg.evaluation.coco_metrics import Metrics, evaluate_detections, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import box_matches
from semiseg.evaluation.matching import average_precision, match
from semiseg.results import limit_in_words
from tests.coco_files import make_coco
from tests.model_folders import make_model
from tests.tiny import tiny_config

CELLS, SIDE = 144, 256
CLASSES = ("cell", "other")


def encoded(x: int, y: int, side: int) -> dict[str, Any]:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    value = rle.encode(mask)
    return {"size": value["size"], "counts": value["counts"].decode()}


@pytest.fixture
def cells(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """An image of 12 x 12 cells, and one of three other objects; detections with misses among the best."""
    random = np.random.default_rng(2)
    annotations, results = [], []
    for number in range(CELLS + 3):
        image = int(number >= CELLS)
        x, y = 4 + 21 * (number % 12), 4 + 21 * (number // 12 % 12)
        shape = {"image_id": image, "category_id": 1 + image, "bbox": [x, y, 14, 14], "segmentation": encoded(x, y, 14)}
        annotations.append({**shape, "id": number + 1, "area": 196, "iscrowd": int(number == 17)})
        shift = int(random.choice([0, 1, 2, 9]))
        results.append(
            {**shape, "bbox": [x + shift, y, 14, 14], "segmentation": encoded(x + shift, y, 14)}
            | {"score": float(random.permutation(1000)[0] / 1000 + number / 1e6)}
        )
    images = [{"id": key, "file_name": f"{key}.png", "width": SIDE, "height": SIDE} for key in (0, 1)]
    categories = [{"id": key + 1, "name": name} for key, name in enumerate(CLASSES)]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path, results


def official(path: Path, results: list[dict[str, Any]], iou_type: str, limit: int) -> float:
    """AP in percent by pycocotools alone, with maxDets as its users write it."""
    hidden = "bbox" if iou_type == "segm" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        found = truth.loadRes([{key: value for key, value in result.items() if key != hidden} for result in results])
        measured = COCOeval(truth, found, iou_type)
        measured.params.maxDets = [1, 2, limit]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][:, :, :, 0, -1]
    return 100 * float(precision[precision > -1].mean())


def evaluate(path: Path, results: list[dict[str, Any]], **options: Any) -> Metrics:
    return evaluate_detections(path, results, class_names=CLASSES, image_ids=[0, 1], **options)


@pytest.mark.parametrize("limit", [2, 100, 130, 144, 300])
@pytest.mark.filterwarnings("ignore:.*detections are not measured")
def test_the_numbers_are_pycocotools_at_that_limit(cells: tuple[Path, list[dict[str, Any]]], limit: int) -> None:
    path, results = cells
    metrics = evaluate(path, results, max_dets=limit)
    assert metrics.segm is not None
    for iou_type, measured in (("bbox", metrics.bbox), ("segm", metrics.segm)):
        assert measured.groups["all"]["AP"] == pytest.approx(official(path, results, iou_type, limit), abs=1e-9)
    truth = load_ground_truth(path)
    assert prepare_masks(truth)
    matched = average_precision(match(truth, results, "segm", max_dets=limit)).mean(axis=1)
    assert matched.tolist() == pytest.approx([metrics.segm.classes[name]["AP"] for name in CLASSES])  # type: ignore[index]
    found = box_matches(load_ground_truth(path), results, max_dets=limit)
    beyond = np.argsort([-result["score"] for result in results[:CELLS]], kind="stable")[limit:]
    assert all(found[number] is None for number in beyond)
    assert sum(key is not None for key in found) > min(limit, CELLS) // 2


def test_what_the_limit_cuts_is_said_and_what_it_is_recorded(cells: tuple[Path, list[dict[str, Any]]]) -> None:
    path, results = cells
    told = r"44 of 147 detections are not measured.*best 100 are.*up to 144.*--max-dets 144"
    with pytest.warns(UserNotice, match=told):
        usual = evaluate(path, results)
    assert "max_dets" not in usual.to_dict()  # as recorded before there was another limit
    assert Metrics.from_dict(usual.to_dict()) == usual
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_of_them = evaluate(path, results, max_dets=144)
    assert all_of_them.to_dict()["max_dets"] == 144
    assert Metrics.from_dict(all_of_them.to_dict()) == all_of_them
    assert all_of_them.bbox.groups["all"]["AP"] > usual.bbox.groups["all"]["AP"] + 5  # type: ignore[operator]
    assert limit_in_words(100) == ""
    assert "the best 144 detections of each image and class" in limit_in_words(144)


@pytest.mark.filterwarnings("ignore:.*objects have no mask")
def test_the_limit_follows_the_model(tmp_path: Path) -> None:
    data = make_coco(tmp_path, sizes_hw=[(64, 80), (48, 96)])
    make_model(tmp_path / "model", score_threshold=0.0)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    given: dict[str, Any] = {"annotations": data.annotations, "images": data.images, "progress": False}
    for kept, limit in ((7, 100), (100, 100), (120, 120)):
        settings["inference"]["max_detections"] = kept
        (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
        metrics = evaluate_run(tmp_path / "model", **given)
        assert metrics is not None
        assert metrics.max_dets == limit
    chosen = evaluate_run(tmp_path / "model", **given, max_dets=100)  # COCO's own numbers of that model
    assert chosen is not None
    assert "max_dets" not in chosen.to_dict()


def test_a_run_records_its_limit_and_its_stored_detections_keep_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, inference={"max_detections": 120}, optim={"steps": 1})
    result = execute_run(config, out=tmp_path / "run", progress=False)
    assert result["metrics"]["max_dets"] == 120
    again = evaluate_run(tmp_path / "run", results=tmp_path / "run" / "detections.json", progress=False)
    assert again is not None
    assert again.to_dict() == result["metrics"]


def test_the_command_says_the_limit(cells: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, results = cells
    (tmp_path / "found.json").write_text(json.dumps(results))
    for key in (0, 1):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{key}.png")
    given = ["--results", tmp_path / "found.json", "--annotations", path, "--images", tmp_path]
    for options, told in (([], False), (["--max-dets", "300"], True)):
        out = tmp_path / "numbers.json"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(app, ["evaluate", *map(str, given), *options, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert ("measured: the best 300 detections of each image and class" in result.output) == told
        assert json.loads(out.read_text()).get("max_dets") == (300 if told else None)
    refused = CliRunner().invoke(app, ["evaluate", *map(str, given), "--max-dets", "0"])
    assert refused.exit_code == 2
