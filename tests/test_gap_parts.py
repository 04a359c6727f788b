"""Where the AP goes: masks exchanged between stored detections, against slow references and limit cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from examples.analysis.gap_parts import class_ap, gap_parts, main, with_masks_of, with_true_masks
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import box_matches

SIZE = 48
CLASSES = ("cat", "dog", "nowhere")  # the last without objects


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[round(y) : round(y + height), round(x) : round(x + width)] = True
    return mask


def detection(
    image: int, category: int, box: list[float], score: float, mask: np.ndarray | None = None
) -> dict[str, Any]:
    mask = rectangle(*box) if mask is None else mask
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": encode(mask)}


def objects() -> list[dict[str, Any]]:
    """Six objects of two classes in three images, and a crowd region."""
    places = [(0, 1, (2, 2)), (0, 1, (26, 2)), (0, 2, (2, 26)), (1, 1, (4, 4)), (1, 2, (26, 26)), (2, 2, (10, 10))]
    found: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category, "bbox": [x, y, 16, 14], "area": 224, "iscrowd": 0}
        for image, category, (x, y) in places
    ]
    found.append({"image_id": 2, "category_id": 1, "bbox": [30, 30, 16, 16], "area": 256, "iscrowd": 1})
    return [
        {**item, "id": number, "segmentation": encode(rectangle(*item["bbox"]))} for number, item in enumerate(found)
    ]


def write_truth(folder: Path, annotations: list[dict[str, Any]]) -> Path:
    content = {
        "images": [{"id": number, "width": SIZE, "height": SIZE} for number in range(4)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    return write_truth(tmp_path, objects())


@pytest.fixture
def truth(truth_file: Path) -> COCO:
    found = load_ground_truth(truth_file)
    assert prepare_masks(found)
    return found


def noisy(seed: int, *, count: int = 60) -> list[dict[str, Any]]:
    """Detections near objects and elsewhere, with masks that are not their boxes."""
    draw = np.random.default_rng(seed)
    near, found = [item for item in objects() if not item["iscrowd"]], []
    for _ in range(count):
        item = near[draw.integers(len(near))]
        x, y, width, height = (float(side + draw.integers(-3, 4)) for side in item["bbox"])
        box = [min(max(x, 0.0), 30.0), min(max(y, 0.0), 30.0), width, height]
        category = item["category_id"] if draw.random() < 0.8 else int(draw.integers(1, 4))
        mask = rectangle(*box) & (draw.random((SIZE, SIZE)) < 0.9)
        found.append(detection(item["image_id"], category, box, float(draw.integers(1, 40)) / 40, mask))
    return found


def box_iou(first: list[float], second: list[float]) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def slow_pairs(results: list[dict[str, Any]], partners: list[dict[str, Any]]) -> list[int | None]:
    """By score, each takes the free partner of its image and class with the highest IoU from 0.5."""
    taken: set[int] = set()
    pairs: list[int | None] = [None] * len(results)
    for number in sorted(range(len(results)), key=lambda n: -results[n]["score"]):
        offered = [
            (box_iou(results[number]["bbox"], partner["bbox"]), partner.get("score", 0.0), -place)
            for place, partner in enumerate(partners)
            if place not in taken and all(partner[key] == results[number][key] for key in ("image_id", "category_id"))
        ]
        if offered and max(offered)[0] >= 0.5:
            place = -max(offered)[2]
            pairs[number] = place
            taken.add(place)
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_detections_find_objects_as_a_slow_reference_says(truth: COCO, seed: int) -> None:
    results = noisy(seed)
    whole = [item for item in objects() if not item["iscrowd"]]
    expected = slow_pairs(results, whole)
    found = box_matches(truth, results)
    assert found == [None if number is None else whole[number]["id"] + 1 for number in expected]
    assert sum(match is not None for match in found) >= 4
    changed = with_true_masks(truth, results)
    for before, after, match in zip(results, changed, found, strict=True):
        assert {key: after[key] for key in ("bbox", "score")} == {key: before[key] for key in ("bbox", "score")}
        if match is None:
            assert after["segmentation"] == before["segmentation"]
        else:
            expected_mask = rectangle(*whole[match - 1]["bbox"])
            assert (rle.decode(after["segmentation"]).astype(bool) == expected_mask).all()


@pytest.mark.parametrize("seed", range(5))
def test_masks_go_to_partners_as_a_slow_reference_says(seed: int) -> None:
    full, donors = noisy(seed), noisy(seed + 100, count=45)
    before = json.dumps([full, donors])
    pairs, changed = slow_pairs(full, donors), with_masks_of(full, donors)
    assert changed.own == [partner is None for partner in pairs]
    assert 5 < sum(changed.own) < 55
    for result, after, partner in zip(full, changed.results, pairs, strict=True):
        giver = result if partner is None else donors[partner]
        assert after == {**result, "segmentation": giver["segmentation"]}
    assert json.dumps([full, donors]) == before


def test_what_lies_on_crowd_or_has_no_object_finds_nothing(truth: COCO) -> None:
    on_crowd, elsewhere = detection(2, 1, [30, 30, 16, 16], 0.9), detection(3, 1, [5, 5, 9, 9], 0.8)
    wrong_class = detection(2, 1, [10, 10, 16, 14], 0.7)
    assert box_matches(truth, [on_crowd, elsewhere, wrong_class]) == [None, None, None]
    assert box_matches(truth, []) == []
    assert with_true_masks(truth, []) == []
    assert with_masks_of([], [elsewhere]).results == []
    alone = with_masks_of([elsewhere], [])
    assert alone.results == [elsewhere]
    assert alone.own == [True]


def test_ap_is_that_of_the_evaluation(truth: COCO, truth_file: Path) -> None:
    results = noisy(3)
    metrics = evaluate_detections(truth_file, results, class_names=CLASSES, image_ids=range(4))
    assert metrics.segm is not None
    expected = {name: numbers and numbers["AP"] for name, numbers in metrics.segm.classes.items()}
    found = class_ap(truth, results)
    assert found == expected
    assert found["nowhere"] is None
    assert 0 < (found["cat"] or 0) < 100
    assert class_ap(truth, []) == {"cat": 0.0, "dog": 0.0, "nowhere": None}


def perfect() -> list[dict[str, Any]]:
    """Every object found, in the order of falling scores, and one false alarm between them."""
    whole = [item for item in objects() if not item["iscrowd"]]
    found = [
        detection(item["image_id"], item["category_id"], item["bbox"], 0.95 - 0.1 * number)
        for number, item in enumerate(whole)
    ]
    return [*found, detection(3, 2, [5, 5, 12, 12], 0.5)]


def worse_masks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every mask the upper 70 %."""
    masks = [rectangle(x, y, width, 0.7 * height) for x, y, width, height in (item["bbox"] for item in results)]
    return [{**item, "segmentation": encode(mask)} for item, mask in zip(results, masks, strict=True)]


def other_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same detections with the false alarm first."""
    return [{**item, "score": 0.99 if item["image_id"] == 3 else item["score"]} for item in results]


def mean_ap(truth_file: Path, results: list[dict[str, Any]], names: list[str]) -> float:
    metrics = evaluate_detections(truth_file, results, class_names=CLASSES, image_ids=range(4))
    value = metrics.group("segm", names)["AP"]
    assert value is not None
    return value


@pytest.mark.parametrize("names", [["cat", "dog", "nowhere"], ["dog", "nowhere"]])
def test_the_parts_are_what_was_made_worse(truth: COCO, truth_file: Path, names: list[str]) -> None:
    full = perfect()
    goal = mean_ap(truth_file, full, names)

    def parts(row: list[dict[str, Any]]) -> dict[str, float]:
        found = gap_parts(truth, full, row, names)
        assert found["ap"] == pytest.approx(mean_ap(truth_file, row, names))
        assert found["full"] == found["full_true_masks"] == pytest.approx(goal)
        assert found["gap"] == pytest.approx(found["boxes"] + found["masks"])
        return found

    same = parts(full)
    assert [same[name] for name in ("gap", "boxes", "masks", "boxes_by_truth", "kept")] == [0] * 5
    worse = parts(worse_masks(full))
    assert worse["true_masks"] == pytest.approx(goal)
    assert (worse["boxes"], worse["boxes_by_truth"], worse["kept"]) == (0, 0, 0)
    assert 0 < worse["masks"] == pytest.approx(goal - worse["ap"])
    order = parts(other_order(full))
    assert order["true_masks"] == order["ap"] < goal
    assert order["masks"] == 0
    assert order["exchanged"] == pytest.approx(goal)
    assert order["boxes_by_truth"] == order["boxes"] == pytest.approx(goal - order["ap"])
    nothing = parts([])
    assert (nothing["ap"], nothing["true_masks"], nothing["masks"], nothing["kept"]) == (0, 0, 0, 100)


def test_the_script_prints_the_parts(tmp_path: Path, truth_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, results in (("full", perfect()), ("row", worse_masks(perfect()))):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    arguments = [str(truth_file), str(tmp_path / "full.json"), str(tmp_path / "row.json")]
    main([*arguments, "--classes", "dog,nowhere"])
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(told["gap"]) == float(told["masks"]) > 0
    (tmp_path / "row.json").write_text("[{")
    with pytest.raises(UserError, match=r"row\.json: cannot be read"):
        main(arguments)
    truth_file.write_text(truth_file.read_text().replace('"segmentation"', '"none"'))
    with pytest.raises(UserError, match="every object needs a mask"):
        main(arguments)
