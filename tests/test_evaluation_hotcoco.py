"""The fast evaluation is the official one, to the last bit: random data full of borderline cases, and odd files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.engine.run import execute_run, package_versions
from semiseg.errors import UserError
from semiseg.evaluation import precision
from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth
from semiseg.evaluation.precision import coco_precision, require_backend
from tests.coco_files import make_coco
from tests.model_folders import make_model
from tests.tiny import tiny_config

pytest.importorskip("hotcoco", reason="the extra `fast` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*detections are not measured")  # images have up to 130

HEIGHT, WIDTH = 110, 130
CLASSES = ("a", "b", "c", "never", "only crowd", "only false")
CATEGORY_IDS = (90, 3, 7, 20, 21, 1000)
LABELS = tuple(name for _, name in sorted(zip(CATEGORY_IDS, CLASSES, strict=True)))
AREA_LIMITS = ((32, 32), (16, 64), (96, 96))  # boxes of exactly 32² and 96² pixels belong to two ranges


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def shape(generator: np.random.Generator, box: list[float]) -> np.ndarray:
    """A rectangle of whole pixels, at times with holes, at times without a pixel."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    x, y, width, height = (int(v) for v in box)
    kind = generator.random()
    if kind > 0.05:
        mask[max(y, 0) : y + height, max(x, 0) : x + width] = True
    if kind > 0.6:
        mask &= generator.random((HEIGHT, WIDTH)) < 0.9
    return mask


def segmentation(generator: np.random.Generator, box: list[float], *, crowd: bool) -> Any:
    """What files hold: compressed or plain counts, outlines of one or two parts, with corners beside the image."""
    kind = generator.integers(4)
    if kind == 0:
        return encode(shape(generator, box))
    if kind == 1 or crowd:
        pixels = shape(generator, box).T.ravel()
        changes = np.flatnonzero(np.diff(pixels, prepend=False))
        return {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0, append=pixels.size).tolist()}
    corners = generator.uniform([box[0] - 3, box[1] - 3], [box[0] + box[2] + 3, box[1] + box[3] + 3], (kind, 7, 2))
    return [part.ravel().round(2).tolist() for part in corners]


def random_box(generator: np.random.Generator) -> list[float]:
    width, height = AREA_LIMITS[generator.integers(3)] if generator.random() < 0.3 else generator.integers(0, 90, 2)
    x, y = generator.integers(-5, 60, 2)
    return [float(x), float(y), float(width), float(height)]


def random_case(seed: int, *, images: int = 14) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Annotations and detections: crowds, empty images, equal scores, empty masks, over 100 of a class."""
    generator = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(images):
        if image % 5 == 4:
            continue  # nothing there, nothing found
        for _ in range(int(generator.integers(0, 6))):
            box, crowd = random_box(generator), generator.random() < 0.2
            annotations.append(
                {
                    "id": len(annotations),  # 0 among them
                    "image_id": image,
                    "category_id": CATEGORY_IDS[4]
                    if generator.random() < 0.05
                    else CATEGORY_IDS[generator.integers(3)],
                    "bbox": box,
                    "iscrowd": int(crowd),
                    "segmentation": segmentation(generator, box, crowd=crowd),
                }
            )
            annotations[-1]["iscrowd"] |= int(annotations[-1]["category_id"] == CATEGORY_IDS[4])
            if generator.random() < 0.7:  # others get the mask's
                annotations[-1]["area"] = float(generator.choice([32.0**2, 96.0**2, box[2] * box[3], 0.0, 1e6]))
        mine = [a for a in annotations if a["image_id"] == image]
        for _ in range(130 if image == 0 else int(generator.integers(0, 20))):
            results.append(random_detection(generator, image, mine))
    return annotations, results


def random_detection(generator: np.random.Generator, image: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    box, category = random_box(generator), CATEGORY_IDS[generator.integers(6)]
    if annotations and generator.random() < 0.7:
        target = annotations[generator.integers(len(annotations))]
        shift = generator.choice([0.0, 0.0, 0.5, 3.0, 8.0], 4)
        box, category = (np.array(target["bbox"]) + shift).tolist(), target["category_id"]
    if image == 0:
        category = CATEGORY_IDS[0]
    score = float(generator.choice([0.0, 0.25, 0.5, 1.0])) if generator.random() < 0.5 else float(generator.random())
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": encode(shape(generator, box)),
    }


def write(
    path: Path, annotations: list[dict[str, Any]], *, images: list[Any], categories: list[int] | None = None
) -> Path:
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in reversed(images)],
        "categories": [
            {"id": category, "name": name}
            for category, name in zip(CATEGORY_IDS, CLASSES, strict=True)
            if categories is None or category in categories
        ],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def assert_equal_precision(path: Path, results: list[dict[str, Any]], **how: Any) -> list[np.ndarray]:
    found = []
    for iou_type in ("bbox", "segm"):
        # one after the other on fresh truths: pycocotools writes into its annotations
        fast = coco_precision(load_ground_truth(path), results, iou_type, backend="hotcoco", **how)
        official = coco_precision(load_ground_truth(path), results, iou_type, **how)
        assert fast.shape == official.shape
        assert np.array_equal(fast, official), (iou_type, np.argwhere(fast != official)[:5])
        found.append(official)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_every_number_of_the_array_is_equal_on_random_data(tmp_path: Path, seed: int) -> None:
    annotations, results = random_case(seed)
    assert any(a["iscrowd"] for a in annotations)
    path = write(tmp_path / "val.json", annotations, images=list(range(14)))
    for official in assert_equal_precision(path, results):
        assert official.shape == (10, 101, len(CLASSES), 4, 1)
        for area in range(4):  # every area range has ground truth, and something was found in all of them together
            assert (official[..., area, 0] > -1).any()
        assert 0.02 < official[official > -1].mean() < 0.9
        assert (official[:, :, [LABELS.index("never"), LABELS.index("only crowd")]] == -1).all()


def test_metrics_of_both_are_equal(tmp_path: Path) -> None:
    annotations, results = random_case(11)
    for annotation in annotations:
        if annotation["iscrowd"]:
            del annotation["segmentation"]  # ignored by its box
    path = write(tmp_path / "val.json", annotations, images=list(range(14)))
    before = json.dumps(results)
    fast, official = (
        evaluate_detections(path, results, class_names=LABELS, image_ids=range(14), backend=backend)
        for backend in ("hotcoco", "pycocotools")
    )
    assert fast == official
    assert fast.segm is not None
    assert fast.group("bbox", ("b", "never"))["AP"] is not None
    assert json.dumps(results) == before


def test_odd_files(tmp_path: Path) -> None:
    """Names for images, annotations of images that are not listed, a mask of another size."""
    annotations, results = random_case(12)
    names = {image: f"image {'zyxwvutsrqponm'[image]}" for image in range(14)}  # whose order is another
    for item in annotations + results:
        item["image_id"] = names[item["image_id"]]
    annotations[1]["segmentation"] = {"size": [50, 50], "counts": [100, 900, 1500]}
    annotations[3] |= {"image_id": "elsewhere", "area": 100.0}
    annotations[4]["category_id"] = 555
    path = write(tmp_path / "val.json", annotations, images=list(names.values()))
    assert_equal_precision(path, results)
    assert_equal_precision(path, results, area_limits=(400.0, 32.0**2))


def test_nothing_found_nothing_there_and_boxes_alone(tmp_path: Path) -> None:
    annotations, results = random_case(13)
    path = write(tmp_path / "val.json", annotations, images=list(range(14)))
    for official in assert_equal_precision(path, []):
        assert set(np.unique(official)) == {-1.0, 0.0}
    crowds = write(tmp_path / "crowds.json", [a for a in annotations if a["iscrowd"]], images=list(range(14)))
    for official in assert_equal_precision(crowds, results):
        assert (official == -1).all()
    for annotation in annotations:
        del annotation["segmentation"], annotation["iscrowd"]
        annotation.pop("area", None)
    boxes = write(tmp_path / "boxes.json", annotations, images=list(range(14)))
    fast = evaluate_detections(boxes, results, class_names=LABELS, image_ids=range(14), backend="hotcoco")
    assert fast.segm is None
    assert fast == evaluate_detections(boxes, results, class_names=LABELS, image_ids=range(14))


def test_another_limit_of_detections(tmp_path: Path) -> None:
    annotations, results = random_case(3)
    path = write(tmp_path / "val.json", annotations, images=sorted({a["image_id"] for a in annotations}))
    results = [result for result in results if result["image_id"] in {a["image_id"] for a in annotations}]
    one, two, many = (assert_equal_precision(path, results, max_dets=limit)[0] for limit in (1, 2, 300))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, many)


def test_a_difference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, results = random_case(14, images=40)
    path = write(tmp_path / "val.json", annotations, images=list(range(40)))
    seen: list[set[int]] = []
    official = precision._pycocotools_precision

    def slightly_off(truth: Any, detections: Any, iou_type: str, image_ids: Any, *more: Any) -> np.ndarray:
        seen.append(set(image_ids))
        assert {detection["image_id"] for detection in detections} <= set(image_ids)
        return np.nextafter(official(truth, detections, iou_type, image_ids, *more), 2)

    monkeypatch.setattr(precision, "_pycocotools_precision", slightly_off)
    with pytest.raises(UserError, match=r"hotcoco \d.* give different segm numbers for 2 of the images"):
        coco_precision(load_ground_truth(path), results, "segm", backend="hotcoco")
    assert seen == [{0, 20}]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    require_backend("pycocotools")
    with pytest.raises(UserError, match=r"pip install 'semiseg\[fast\]'"):
        require_backend("hotcoco")


def test_evaluate_fast_writes_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    data = make_coco(tmp_path, sizes_hw=[(64, 80), (48, 96), (33, 40)])
    used: list[str] = []
    hotcoco_precision = precision._hotcoco_precision

    def counted(truth: Any, results: Any, iou_type: str, *more: Any) -> np.ndarray:
        used.append(iou_type)
        return hotcoco_precision(truth, results, iou_type, *more)

    monkeypatch.setattr(precision, "_hotcoco_precision", counted)
    written: list[str] = []
    for options in (["--fast"], []):
        out = tmp_path / f"metrics{len(written)}.json"
        arguments = [tmp_path / "model", "--annotations", data.annotations, "--images", data.images, "--out", out]
        with pytest.warns(UserWarning, match="3 of 12 objects have no mask"):
            result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--no-progress", *options])
        assert result.exit_code == 0, result.output
        written.append(out.read_text(encoding="utf-8"))
    assert written[0] == written[1]
    assert sorted(used) == ["bbox"] * 2 + ["segm"] * 2  # on the compared images and on all
    assert json.loads(written[0])["images"] == 3


def test_a_run_asks_for_the_package_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tiny_config(tmp_path, runtime={"fast_evaluation": True})
    assert fast.identity() == tiny_config(tmp_path).identity()
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(UserError, match="hotcoco"):
        execute_run(fast, out=tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_recorded_where_it_made_the_numbers() -> None:
    assert "hotcoco" not in package_versions()
    assert set(package_versions("hotcoco")) - set(package_versions()) == {"hotcoco"}
