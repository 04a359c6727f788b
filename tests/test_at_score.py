"""Precision, recall, F1 and confusions at a score: cases one can do in the head, and plain loops on random ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.evaluation.at_score import AtScore, at_score
from semiseg.evaluation.coco_metrics import Metrics, evaluate_detections, load_ground_truth, prepare_masks

SIDE = 64
CLASSES = ("cat", "dog", "owl")
Box = tuple[int, int, int, int]


def shape(box: Box) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    encoded = rle.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def thing(image: int, label: int, box: Box, **more: Any) -> dict[str, Any]:
    segmentation, area = shape(box), box[2] * box[3]
    return {
        "image_id": image,
        "category_id": label,
        "bbox": list(box),
        "segmentation": segmentation,
        "area": area,
    } | more


def write(folder: Path, objects: list[dict[str, Any]], images: int = 1) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE} for n in range(images)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES)],
        "annotations": [{"iscrowd": 0, **each, "id": n} for n, each in enumerate(objects, start=1)],
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def counted(path: Path, results: list[dict[str, Any]], iou_type: Any = "segm", **how: Any) -> AtScore:
    truth = load_ground_truth(path)
    assert prepare_masks(truth)
    return at_score(truth, results, iou_type, **{"score": 0.5, **how})


def test_in_the_head(tmp_path: Path) -> None:
    """Two cats, one found; a dog taken for a cat; an owl missed; a cat where nothing is; one below the score."""
    objects = [thing(0, 0, (0, 0, 10, 10)), thing(0, 0, (20, 0, 10, 10)), thing(0, 1, (40, 0, 10, 10))]
    objects += [thing(0, 2, (0, 40, 10, 10)), thing(0, 0, (40, 40, 20, 20), iscrowd=1)]
    results = [
        thing(0, 0, (0, 0, 10, 10), score=0.9),
        thing(0, 0, (0, 0, 10, 10), score=0.6),  # twice: wrong
        thing(0, 0, (40, 0, 10, 9), score=0.8),  # lies on the dog
        thing(0, 0, (20, 20, 5, 5), score=0.5),  # the limit itself is taken
        thing(0, 0, (20, 0, 10, 10), score=0.49),
        thing(0, 0, (42, 42, 10, 10), score=0.7),  # on the crowd: neither found nor wrong
    ]
    for iou_type in ("segm", "bbox"):
        found = counted(write(tmp_path, objects), results, iou_type)
        assert found.counts("cat") == (2, 4, 1)
        assert found.counts("dog") == found.counts("owl") == (1, 0, 0)
        assert found.counts() == (4, 4, 1)
        assert list(found.percent("cat")) == pytest.approx([25, 50, 100 / 3])
        assert found.percent("dog") == (None, 0, 0)
        assert found.percent() == (25, 25, 25)
        assert found.confused == {"dog": {"cat": 1}}


def test_the_best_score_is_confused_first_and_an_object_once(tmp_path: Path) -> None:
    path = write(tmp_path, [thing(0, 0, (0, 0, 20, 20))])
    results = [thing(0, 1, (0, 0, 20, 20), score=0.6), thing(0, 2, (0, 0, 20, 15), score=0.9)]
    assert counted(path, results).confused == {"cat": {"owl": 1}}
    assert counted(path, results, iou=0.8).confused == {"cat": {"dog": 1}}
    assert counted(path, [*results, thing(0, 0, (0, 0, 20, 20), score=0.55)]).confused == {}  # the cat is found


def test_nothing_to_count(tmp_path: Path) -> None:
    path = write(tmp_path, [thing(0, 0, (0, 0, 20, 20))])
    for results in ([], [thing(0, 0, (0, 0, 20, 20), score=0.4)]):
        found = counted(path, results)
        assert found.counts() == (1, 0, 0)
        assert found.percent() == (None, 0, 0)
        assert found.percent("dog") == (None, None, None)


def slowly(objects: list[dict[str, Any]], results: list[dict[str, Any]], score: float, iou: float) -> Any:
    """(found by class, confusions): one detection after the other in falling order of scores, own class first."""

    def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
        a, b = (rle.decode(each["segmentation"]).astype(bool) for each in (one, other))
        return float((a & b).sum() / (a | b).sum())

    taken = sorted((each for each in results if each["score"] >= score), key=lambda each: -each["score"])
    free, left = list(range(len(objects))), list[dict[str, Any]]()
    found, confused = Counter[int](), Counter[tuple[int, int]]()
    for own_class in (True, False):
        for result in taken if own_class else left:
            near = [
                (overlap(result, objects[n]), n)
                for n in free
                if objects[n]["image_id"] == result["image_id"]
                and (objects[n]["category_id"] == result["category_id"]) == own_class
            ]
            best, number = max(near, default=(0.0, -1))
            if best < iou:
                left += [result] if own_class else []
                continue
            free.remove(number)
            if own_class:
                found[result["category_id"]] += 1
            else:
                confused[objects[number]["category_id"], result["category_id"]] += 1
    return found, confused


@pytest.mark.parametrize("seed", range(6))
def test_against_plain_loops(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)

    def some(count: int) -> list[dict[str, Any]]:
        made = []
        for _ in range(count):
            x, y, width, height = (int(v) for v in random.integers([0, 0, 8, 8], [32, 32, 30, 30]))
            made.append(thing(int(random.integers(3)), int(random.integers(3)), (x, y, width, height)))
        return made

    objects = some(60)
    results = [
        {**each, "score": float(score)} for each, score in zip(some(120), random.permutation(120) / 120, strict=True)
    ]
    found = counted(write(tmp_path, objects, images=3), results, score=0.3, iou=0.4)
    wanted, confused = slowly(objects, results, 0.3, 0.4)
    assert [found.found[name] for name in CLASSES] == [wanted[label] for label in range(3)]
    assert sum(wanted.values()) > 3
    pairs = {
        (CLASSES.index(of), CLASSES.index(other)): n for of, row in found.confused.items() for other, n in row.items()
    }
    assert pairs == confused
    assert len(pairs) > 1
    assert found.counts()[1] == sum(each["score"] >= 0.3 for each in results)


def test_evaluate_prints_and_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path, [thing(0, 0, (0, 0, 20, 20)), thing(0, 1, (30, 30, 20, 20))])
    results = [thing(0, 0, (0, 0, 20, 20), score=0.9), thing(0, 2, (30, 30, 20, 20), score=0.8)]
    metrics = evaluate_detections(path, results, class_names=CLASSES, image_ids=[0], score=0.5)
    assert metrics.at_score is not None
    assert metrics.at_score.of == "segm"
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    plain = evaluate_detections(path, results, class_names=CLASSES, image_ids=[0])
    assert "at_score" not in plain.to_dict()
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "0.png")
    words = ["evaluate", "--results", tmp_path / "results.json", "--annotations", path, "--images", tmp_path]
    told = CliRunner().invoke(app, [*map(str, words), "--at-score", "0.5", "--out", str(tmp_path / "out.json")])
    assert told.exit_code == 0, told.output
    lines = {line.split()[0]: line.split()[1:] for line in told.output.splitlines() if line.strip()}
    assert lines["all"] == ["2", "2", "1", "50.0", "50.0", "50.0"]
    assert lines["cat"] == ["1", "1", "1", "100.0", "100.0", "100.0"]
    assert "taken for another class: dog as owl 1" in told.output
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["at_score"]
    assert written["confused"] == {"dog": {"owl": 1}}
    assert written["objects"] == {"cat": 1, "dog": 1, "owl": 0}
