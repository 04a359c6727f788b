"""The projection error of stored masks against boxes: slow reference, limits, and the script that prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from examples.analysis.tightness import class_tightness, main, projection_error, true_tightness
from semiseg.evaluation.coco_metrics import load_ground_truth, prepare_masks

SIZE = 40
OBJECTS = (  # image, category, box; the last one is crowd
    (0, 1, (4.0, 6.0, 20.0, 10.0)),
    (0, 2, (20.0, 20.0, 12.0, 16.0)),
    (1, 1, (2.0, 2.0, 10.0, 10.0)),
    (1, 2, (22.0, 4.0, 10.0, 10.0)),
)


def rectangle(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[y : y + height, x : x + width] = 1
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def slow_error(mask: np.ndarray, box: tuple[float, float, float, float]) -> float:
    """Pixel by pixel: the box's columns are those of which some point inside [x, x + w) lies in the image."""
    height, width = mask.shape
    errors = []
    for low, high, size, lines in (
        (box[0], box[0] + box[2], width, mask.T),
        (box[1], box[1] + box[3], height, mask),
    ):
        of_box = [place for place in range(size) if low < place + 1 and high > place]
        of_mask = [place for place in range(size) if any(value != 0 for value in lines[place])]
        common = len(set(of_box) & set(of_mask))
        errors.append(1 - 2 * common / (len(of_box) + len(of_mask)))
    return sum(errors) / 2


@pytest.mark.parametrize("seed", range(8))
def test_the_error_is_that_of_a_slow_reference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask = (draw.random((SIZE, SIZE - 5)) < 0.002 * (1 + seed)).astype(np.uint8)
    x, y = (round(float(side), 2) for side in draw.uniform(-4, 30, 2))
    box = (x, y, round(float(draw.uniform(5, 20)), 2), round(float(draw.uniform(5, 20)), 2))
    assert projection_error(mask, box) == pytest.approx(slow_error(mask, box), abs=1e-12)


def test_limits() -> None:
    assert projection_error(rectangle(4, 6, 20, 10), (4, 6, 20, 10)) == 0
    corners = np.zeros((SIZE, SIZE), bool)
    corners[range(6, 16), range(4, 14)] = True  # a diagonal: it touches every column and row
    assert projection_error(corners, (4, 6, 10, 10)) == 0
    assert projection_error(np.zeros((SIZE, SIZE), np.uint8), (4, 6, 20, 10)) == 1
    assert projection_error(rectangle(0, 0, 5, 5), (20, 20, 5, 5)) == 1
    half = projection_error(rectangle(4, 6, 10, 10), (4, 6, 20, 10))  # x: 1 - 2 * 10 / 30; y: 0
    assert half == pytest.approx(1 / 6)
    # Beyond the image there is nothing that a mask could fill.
    assert projection_error(rectangle(30, 30, 10, 10), (30, 30, 50, 50)) == 0
    assert projection_error(rectangle(0, 0, 6, 6), (-8, -8, 14, 14)) == 0
    # Sides between pixels: the pixels that they cut belong to the box; a point lies in one pixel.
    assert projection_error(rectangle(4, 6, 3, 3), (4.6, 6.2, 1.9, 2.1)) == 0
    assert projection_error(rectangle(7, 9, 1, 1), (7.5, 9.0, 0.0, 0.0)) == 0
    assert projection_error(rectangle(1, 1, 9, 9), (1.1, 1.2, 8.9, 8.8)) == 0  # 1.1 + 8.9 is not more than 10


def write_truth(folder: Path) -> Path:
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": int(number == len(OBJECTS) - 1),
            "segmentation": encode(rectangle(*(int(side) for side in box))),
        }
        for number, (image, category, box) in enumerate(OBJECTS)
    ]
    content = {
        "images": [{"id": number, "width": SIZE, "height": SIZE} for number in range(2)],
        "categories": [{"id": number, "name": name} for number, name in enumerate("abc", start=1)],
        "annotations": annotations,
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return path


def test_means_per_class_over_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = load_ground_truth(write_truth(tmp_path))
    assert prepare_masks(truth)

    def found(image: int, category: int, box: list[float], score: float, mask: np.ndarray) -> dict[str, Any]:
        return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": encode(mask)}

    results = [
        # The box of the detection is off; the mask fills that of the object.
        found(0, 1, [6.0, 6.0, 20.0, 10.0], 0.9, rectangle(4, 6, 20, 10)),
        found(0, 1, [4.0, 6.0, 20.0, 10.0], 0.3, rectangle(0, 0, 1, 1)),  # second to the same object: not counted
        found(1, 1, [2.0, 2.0, 10.0, 10.0], 0.8, rectangle(2, 2, 5, 10)),  # half the columns
        found(1, 2, [22.0, 4.0, 10.0, 10.0], 0.9, rectangle(0, 0, 1, 1)),  # on crowd
        found(0, 3, [20.0, 20.0, 12.0, 16.0], 0.9, rectangle(0, 0, 1, 1)),  # of another class
    ]
    measured = class_tightness(truth, results)
    assert list(measured) == ["a", "b", "c"]
    assert measured["a"].objects == 2
    assert measured["a"].error == pytest.approx((0 + (1 / 3) / 2) / 2)
    assert [(measured[name].objects, measured[name].error) for name in "bc"] == [(0, None), (0, None)]
    assert all(value.objects == 0 for value in class_tightness(truth, []).values())
    true = true_tightness(truth)
    assert [(value.objects, value.error) for value in true.values()] == [(2, 0.0), (1, 0.0), (0, None)]
    (tmp_path / "detections.json").write_text(json.dumps(results))
    main([str(tmp_path / "val.json"), str(tmp_path / "detections.json")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["a", "2", "8.3", "%", "0.0", "%"], ["b", "0", "-", "0.0", "%"], ["c", "0", "-", "-"]]
