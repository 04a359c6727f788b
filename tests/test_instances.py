"""Which detection found which instance and how their masks differ, against decoded masks counted pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.coco_metrics import load_ground_truth
from semiseg.evaluation.instances import SHARES, match_instances

SIZE = 48


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def square(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def annotation(image: int, category: int, box: list[int], mask: np.ndarray | None, *, crowd: int = 0) -> dict[str, Any]:
    value = {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd, "area": box[2] * box[3]}
    return value | ({} if mask is None else {"segmentation": encode(mask)})


def detection(image: int, category: int, box: list[int], mask: np.ndarray, score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": encode(mask)}


def ground_truth(folder: Path, annotations: list[dict[str, Any]], images: int = 2) -> COCO:
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIZE, "height": SIZE} for n in range(images)],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations)],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return load_ground_truth(path)


def box_iou(first: list[int], second: list[int]) -> float:
    one, two = square(*first), square(*second)
    return float((one & two).sum() / (one | two).sum())


def slow_lines(truth: COCO, results: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The definition, one pixel at a time: no crowd regions in the data."""
    found: dict[int, int] = {}
    for number in sorted(range(len(results)), key=lambda number: -results[number]["score"]):
        result = results[number]
        free = [
            a
            for a in truth.dataset["annotations"]
            if (a["image_id"], a["category_id"]) == (result["image_id"], result["category_id"]) and a["id"] not in found
        ]
        best = max(free, key=lambda a: box_iou(result["bbox"], a["bbox"]), default=None)
        if best is not None and box_iou(result["bbox"], best["bbox"]) >= 0.5:
            found[best["id"]] = number
    lines: dict[int, dict[str, Any]] = {}
    for item in truth.dataset["annotations"]:
        if item["id"] not in found:
            lines[item["id"]] = {"detection": -1}
            continue
        result = results[found[item["id"]]]
        mask, own = rle.decode(result["segmentation"]).astype(bool), rle.decode(item["segmentation"]).astype(bool)
        others = np.zeros_like(own)
        for other in truth.imgToAnns[item["image_id"]]:
            if other["id"] != item["id"]:
                others |= rle.decode(other["segmentation"]).astype(bool)
        box = square(*result["bbox"])
        lines[item["id"]] = {
            "detection": found[item["id"]],
            "mask_iou": (mask & own).sum() / (mask | own).sum(),
            "outside": (mask & ~own).sum() / mask.sum(),
            "recall": (mask & own).sum() / own.sum(),
            "on_others": (mask & others & ~own).sum() / mask.sum(),
            "mask_box_iou": (mask & box).sum() / (mask | box).sum(),
        }
    return lines


def test_against_pixels(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(12):
        for _ in range(4):
            box = [*draw.integers(0, 20, 2).tolist(), *draw.integers(8, 20, 2).tolist()]
            category = int(draw.integers(1, 3))
            annotations.append(annotation(image, category, box, square(*box) & (draw.random((SIZE, SIZE)) < 0.7)))
            for _ in range(2):
                x, y = (max(0, int(start + draw.integers(-3, 4))) for start in box[:2])
                near = [x, y, *box[2:]]
                blob = square(x, y, box[2] + 3, box[3]) & (draw.random((SIZE, SIZE)) < 0.8)
                results.append(detection(image, category, near, blob, float(draw.random())))
    truth = ground_truth(tmp_path, annotations, images=12)
    lines = match_instances(truth, results)
    expected = slow_lines(truth, results)
    assert list(lines.index) == [a["id"] for image in truth.imgs for a in truth.imgToAnns[image]]
    assert 20 < (lines["detection"] >= 0).sum() < len(lines)
    assert (lines["on_others"] > 0).sum() > 5
    for key, values in expected.items():
        assert lines.loc[key, "detection"] == values["detection"]
        for name in SHARES:
            assert lines.loc[key, name] == pytest.approx(values.get(name, np.nan), nan_ok=True), (key, name)


def test_crowd_is_no_instance_and_an_object_without_a_mask_has_no_line(tmp_path: Path) -> None:
    box, elsewhere = [2, 2, 10, 10], [20, 20, 10, 10]
    truth = ground_truth(
        tmp_path,
        [
            annotation(0, 1, box, square(*box), crowd=1),
            annotation(0, 1, box, None),
            annotation(0, 1, elsewhere, square(*elsewhere)),
        ],
    )
    lines = match_instances(truth, [detection(0, 1, box, square(*box), 0.9)])
    assert list(lines.index) == [3]  # ids are those of load_ground_truth
    assert lines["detection"].tolist() == [-1]
    assert lines[[*SHARES]].isna().all(axis=None)


def test_nothing_found_nothing_there_and_an_empty_mask(tmp_path: Path) -> None:
    box = [2, 2, 10, 10]
    truth = ground_truth(tmp_path, [annotation(0, 1, box, square(*box))])
    assert match_instances(truth, [])["detection"].tolist() == [-1]
    wrong_class = match_instances(truth, [detection(0, 2, box, square(*box), 0.9)])
    assert wrong_class["detection"].tolist() == [-1]
    empty = match_instances(truth, [detection(0, 1, box, np.zeros((SIZE, SIZE), bool), 0.9)]).loc[1]
    assert empty["detection"] == 0
    assert [empty[name] for name in SHARES] == [0.0, 0.0, 0.0, 0.0, 0.0]
    assert len(match_instances(ground_truth(tmp_path, []), [])) == 0
