"""VOC's own AP beside a plain reading of its rules, and on cases that can be counted in the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle_codec

from semiseg.data.voc import ensure_voc
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth
from semiseg.evaluation.voc_metrics import VOC_THRESHOLDS, voc_metrics
from tests.voc_files import make_voc

SIDE = 20


def encoded(mask: np.ndarray) -> dict[str, Any]:
    rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def decoded(rle: dict[str, Any]) -> np.ndarray:
    mask: np.ndarray = rle_codec.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
    return mask


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def content(
    objects: list[tuple[int, int, np.ndarray, bool]], voids: dict[int, np.ndarray], images: int = 1
) -> dict[str, Any]:
    """(image, category, mask, difficult) of each object."""
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "iscrowd": int(difficult), "bbox": [0, 0, 5, 5],
         "area": int(mask.sum()), "segmentation": encoded(mask)}
        for n, (image, category, mask, difficult) in enumerate(objects, start=1)
    ]  # fmt: skip
    entries = [
        {
            "id": n,
            "file_name": f"{n}.jpg",
            "height": SIDE,
            "width": SIDE,
            "void": encoded(voids.get(n, rectangle(0, 0, 0, 0))),
        }
        for n in range(1, images + 1)
    ]
    return {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def detection(mask: np.ndarray, score: float, *, image: int = 1, category: int = 1) -> dict[str, Any]:
    of_what = {"image_id": image, "category_id": category, "bbox": [0, 0, 1, 1]}
    return {**of_what, "score": score, "segmentation": encoded(mask)}


def measured(tmp_path: Path, data: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    found = voc_metrics(load_ground_truth(path), results, where=path)
    assert found is not None
    return found


def plainly(data: dict[str, Any], results: list[dict[str, Any]], threshold: float) -> float:
    """Detection after detection over all images, as VOC's development kit goes."""
    void = {image["id"]: decoded(image["void"]) for image in data["images"]}
    areas = []
    for category in sorted({a["category_id"] for a in data["annotations"] if not a["iscrowd"]}):
        objects = [a for a in data["annotations"] if a["category_id"] == category]
        total, taken, marks = sum(not a["iscrowd"] for a in objects), set(), []
        for result in sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"]):
            best, best_iou = None, -1.0
            for each in objects:
                if each["image_id"] != result["image_id"]:
                    continue
                mine, theirs = decoded(result["segmentation"]) & ~void[each["image_id"]], decoded(each["segmentation"])
                iou = (mine & theirs).sum() / max((mine | theirs).sum(), 1)
                if iou > best_iou:
                    best, best_iou = each, iou
            if best is not None and best_iou >= threshold:
                if best["iscrowd"]:
                    continue
                marks.append(best["id"] not in taken)
                taken.add(best["id"])
            else:
                marks.append(False)
        area, hits, curve = 0.0, 0, []
        for number, mark in enumerate(marks, start=1):
            hits += mark
            curve.append((hits / total, hits / number))
        for hit in range(1, total + 1):
            area += (
                max((precision for recall, precision in curve if recall >= hit / total - 1e-12), default=0.0) / total
            )
        areas.append(area)
    return 100 * float(np.mean(areas))


def test_it_is_vocs_rule_in_plain_loops(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def box() -> tuple[int, int, int, int]:
        x, y = random.integers(0, 12, 2)
        width, height = random.integers(4, 9, 2)
        return int(x), int(y), int(x + width), int(y + height)

    voids = {n: random.random((SIDE, SIDE)) < 0.15 for n in range(1, 9)}
    objects = [
        (n, int(random.integers(1, 3)), rectangle(*box()) & ~voids[n], bool(random.random() < 0.25))
        for n in range(1, 9)
        for _ in range(3)
    ]
    data = content(objects, voids, images=8)
    results = []
    for image, category, mask, _ in objects:
        for _ in range(3):
            noisy = mask ^ (random.random(mask.shape) < random.choice([0.0, 0.02, 0.08]))
            results.append(
                detection(
                    noisy | (voids[image] & rectangle(0, 0, 10, 20)),
                    float(random.random()),
                    image=image,
                    category=category,
                )
            )
    found = measured(tmp_path, data, results)
    for name, threshold in VOC_THRESHOLDS.items():
        assert found[name] == pytest.approx(plainly(data, results, threshold), abs=1e-8)
    assert 1 < found["AP75"] < found["AP50"] < found["AP25"] < 99


def test_void_pixels_and_difficult_objects_count_for_nobody(tmp_path: Path) -> None:
    objects = [(1, 1, rectangle(0, 0, 10, 10), False), (1, 1, rectangle(12, 12, 20, 20), True)]
    data = content(objects, {1: rectangle(10, 0, 20, 10)})
    spilled = detection(rectangle(0, 0, 20, 10), 0.5)
    of_difficult = detection(rectangle(12, 12, 20, 20), 0.9)
    assert measured(tmp_path, data, [of_difficult, spilled]) == dict.fromkeys(VOC_THRESHOLDS, 100.0)
    beside = detection(rectangle(0, 12, 8, 20), 0.9)
    assert measured(tmp_path, data, [beside, spilled]) == dict.fromkeys(VOC_THRESHOLDS, 50.0)
    again = [detection(rectangle(0, 0, 10, 10), score) for score in (0.9, 0.8)]
    assert measured(tmp_path, data, again) == dict.fromkeys(VOC_THRESHOLDS, 100.0)  # a false one after the last object
    assert measured(tmp_path, data, []) == dict.fromkeys(VOC_THRESHOLDS, 0.0)
    difficult = content([(1, 1, rectangle(0, 0, 5, 5), True)], {})
    (tmp_path / "difficult.json").write_text(json.dumps(difficult))
    assert voc_metrics(load_ground_truth(tmp_path / "difficult.json"), again, where=tmp_path) is None
    data["images"][0]["void"] = {"size": [SIDE, SIDE], "counts": [200, *[10, 10] * 10]}  # not compressed
    assert measured(tmp_path, data, [spilled]) == dict.fromkeys(VOC_THRESHOLDS, 100.0)
    wrongs: list[Any] = [5, [], {}, {"size": [3, 4], "counts": [12]}, {"size": [SIDE, SIDE], "counts": 3}]
    for wrong in wrongs:
        data["images"][0]["void"] = wrong
        with pytest.raises(UserError, match=r"\.json: image 1: 'void' is no mask, allowed: an RLE of size \[20, 20\]"):
            measured(tmp_path, data, [spilled])
    del data["images"][0]["void"]
    (tmp_path / "plain.json").write_text(json.dumps(data))
    assert voc_metrics(load_ground_truth(tmp_path / "plain.json"), again, where=tmp_path) is None


def test_the_conversion_says_which_pixels_are_void(tmp_path: Path) -> None:
    make_voc(tmp_path)
    path, _ = ensure_voc(tmp_path, "val")
    data = json.loads(path.read_text())
    assert all("void" in image for image in data["images"])
    results = [
        {**detection(decoded(each["segmentation"]), 0.9, image=each["image_id"], category=each["category_id"])}
        for each in data["annotations"]
        if each.get("segmentation") and not each["iscrowd"]
    ]
    names = [category["name"] for category in data["categories"]]
    metrics = evaluate_detections(path, results, class_names=names, image_ids=[image["id"] for image in data["images"]])
    assert metrics.voc == dict.fromkeys(VOC_THRESHOLDS, 100.0)
    assert metrics.to_dict()["voc"] == metrics.voc
