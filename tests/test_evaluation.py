"""The COCO evaluation against pycocotools itself, with `params.catIds`, and against cases one can do in the head."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from benchmarks import straightforward as plain
from semiseg.cli import app
from semiseg.config import InferenceConfig
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import (
    METRIC_NAMES,
    Metrics,
    evaluate_detections,
    group_means,
    load_ground_truth,
)
from semiseg.evaluation.precision import Backend
from tests.coco_files import make_coco
from tests.model_folders import make_model

SIZE = 128
CLASSES = ("ring", "猫", "cross", "never", "only crowd")
CATEGORY_IDS = (3, 7, 20, 21, 90)  # in label order, with gaps


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def rectangle(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def truth_of(
    x: int, y: int, width: int, height: int, *, image: int, category: int, number: int | str, crowd: int = 0
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": crowd,
        "segmentation": encode(rectangle(x, y, width, height)),
    }


def found(annotation: dict[str, Any], *, score: float, shift: int = 0) -> dict[str, Any]:
    x, y, width, height = annotation["bbox"]
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": [x + shift, y, width, height],
        "score": score,
        "segmentation": encode(rectangle(x + shift, y, width, height)),
    }


def write(path: Path, annotations: list[dict[str, Any]], *, images: int, classes: int = len(CLASSES)) -> Path:
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(images)],
        # The file lists categories in another order than their ids'.
        "categories": [{"id": CATEGORY_IDS[c], "name": CLASSES[c]} for c in reversed(range(classes))],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """20 images of objects in three classes and all area ranges, crowd, misses, false and shifted detections."""
    generator = np.random.default_rng(5)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(20):
        for _ in range(int(generator.integers(0, 7))):
            x, y = (int(v) for v in generator.integers(0, 28, 2))
            width, height = (int(v) for v in generator.choice([12, 40, 98], 2))
            annotation = truth_of(
                x, y, width, height, image=image, category=CATEGORY_IDS[generator.integers(3)], number=len(annotations)
            )
            annotation["iscrowd"] = int(generator.random() < 0.15)
            annotations.append(annotation)
            for _ in range(int(generator.integers(0, 3))):
                shift = int(generator.integers(0, 10))
                result = found(annotation, score=round(float(generator.random()), 1), shift=shift)  # ties
                if generator.random() < 0.2:
                    result["category_id"] = CATEGORY_IDS[generator.integers(5)]
                results.append(result)
    crowd = truth_of(0, 0, 50, 50, image=0, category=CATEGORY_IDS[4], number=len(annotations), crowd=1)
    path = write(tmp_path_factory.mktemp("random") / "val.json", [*annotations, crowd], images=20)
    return path, results


def official(
    path: Path, results: list[dict[str, Any]], iou_type: str, category_ids: list[int]
) -> dict[str, float | None]:
    """pycocotools alone, restricted by params.catIds and summarised by its own summarize()."""
    key = "bbox" if iou_type == "segm" else "segmentation"
    shown = [{k: v for k, v in result.items() if k != key} for result in results]
    stats = plain.coco_summary(load_ground_truth(path), shown, iou_type, category_ids)
    values = zip(METRIC_NAMES, stats.tolist(), strict=True)
    return {name: None if value == -1 else round(100 * value, 10) for name, value in values}


def test_groups_equal_pycocotools_restricted_to_the_classes(random_case: tuple[Path, list[dict[str, Any]]]) -> None:
    path, results = random_case
    groups = {
        "seen": ("cross", "ring"),
        "unseen": ("猫",),
        "with absent": ("never", "猫", "only crowd"),
        "nobody": ("never",),
    }
    metrics = evaluate_detections(path, results, class_names=CLASSES, image_ids=range(20))
    compared = 0
    for iou_type, measured in (("bbox", metrics.bbox), ("segm", metrics.segm)):
        assert measured is not None
        for group, members in {"all": CLASSES, **groups}.items():
            expected = official(path, results, iou_type, [CATEGORY_IDS[CLASSES.index(name)] for name in members])
            if group == "all":
                assert measured.groups[group] == expected, iou_type
            recovered = metrics.group(iou_type, members)
            for name in METRIC_NAMES:
                assert recovered[name] == (None if expected[name] is None else pytest.approx(expected[name], abs=1e-8))
                compared += expected[name] is not None
        assert measured.classes["never"] is None
        assert measured.classes["only crowd"] is None
    assert compared == 2 * 4 * 6
    assert metrics.segm is not None
    assert 10 < (metrics.segm.groups["all"]["AP"] or 0) < 90
    assert metrics.segm.groups["all"] != metrics.bbox.groups["all"]
    assert metrics.instances["only crowd"] == 0


def test_one_matching_pass_per_iou_type(
    random_case: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = random_case
    passes = []
    evaluate = COCOeval.evaluate

    def counted(evaluation: COCOeval) -> None:
        passes.append(evaluation.params.iouType)
        evaluate(evaluation)

    monkeypatch.setattr(COCOeval, "evaluate", counted)
    evaluate_detections(path, results, class_names=CLASSES, image_ids=range(20))
    assert passes == ["bbox", "segm"]


def test_quiet(random_case: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    path, results = random_case
    evaluate_detections(path, results, class_names=CLASSES, image_ids=range(20))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("number", [0, 1, "first"], ids=repr)
def test_perfect_prediction_of_one_object_is_exactly_100(tmp_path: Path, number: int | str) -> None:
    annotation = truth_of(5, 6, 40, 50, image=0, category=7, number=number)
    path = write(tmp_path / "val.json", [annotation], images=1)
    metrics = evaluate_detections(path, [found(annotation, score=0.9)], class_names=CLASSES, image_ids=[0])
    for iou_type, measured in (("bbox", metrics.bbox), ("segm", metrics.segm)):
        assert measured is not None
        assert measured.groups["all"] == {"AP": 100, "AP50": 100, "AP75": 100, "APs": None, "APm": 100, "APl": None}
        assert metrics.group(iou_type, ("猫",)) == measured.groups["all"]


def test_own_limits_between_small_medium_and_large_objects(tmp_path: Path) -> None:
    """Objects of 100, 400 and 900 pixels: limits of 400 and 900 put the second in two ranges, as COCO's do."""
    objects = [
        truth_of(30 * number, 0, side, side, image=0, category=7, number=number + 1)
        for number, side in enumerate((10, 20, 30))
    ]
    path = write(tmp_path / "val.json", objects, images=1)
    hits = [found(each, score=0.9) for each in objects[:2]]
    arguments: dict[str, Any] = {"class_names": CLASSES, "image_ids": [0]}
    usual = evaluate_detections(path, hits, **arguments)
    assert usual.bbox.groups["all"]["APm"] is None  # all three are small
    assert "area_limits" not in usual.to_dict()
    metrics = evaluate_detections(path, hits, area_limits=(400.0, 800.0), **arguments)
    for measured in (metrics.bbox, metrics.segm):
        assert measured is not None
        assert [measured.groups["all"][name] for name in ("APs", "APm", "APl")] == [100, 100, 0]
        assert measured.groups["all"]["AP"] == usual.bbox.groups["all"]["AP"]
    assert json.loads(json.dumps(metrics.to_dict()))["area_limits"] == [400, 800]
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics


def test_the_limits_of_a_model_are_its_own_and_the_command_says_them(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    data, out = make_coco(tmp_path), tmp_path / "numbers.json"
    words = ["evaluate", str(tmp_path / "model"), "--annotations", str(data.annotations), "--images", str(data.images)]
    words += ["--out", str(out)]
    with pytest.warns(UserWarning, match="no mask"):
        told = CliRunner().invoke(app, [*words, "--area-limits", "400", "2500"])
    assert "APs, APm, APl: of objects up to 400 pixels, to 2500, and above" in told.output
    assert json.loads(out.read_text(encoding="utf-8"))["area_limits"] == [400, 2500]
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["inference"]["area_limits"] = [100, 200]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match="no mask"):
        told = CliRunner().invoke(app, words)
    assert "APs, APm, APl: of objects up to 100 pixels, to 200, and above" in told.output
    assert CliRunner().invoke(app, [*words, "--area-limits", "9", "4"]).exit_code == 2


def test_limits_in_the_wrong_order_are_refused() -> None:
    for wrong in ([9.0, 4.0], [0.0, 4.0], [4.0, 4.0]):
        with pytest.raises(ValueError, match="allowed: two areas, the smaller one first"):
            InferenceConfig(area_limits=wrong)


def test_hand_computed_precision(tmp_path: Path) -> None:
    """Two objects; best first: a hit, a miss, a hit: precision 1 up to recall 1/2, then 2/3."""
    first = truth_of(0, 0, 40, 40, image=0, category=3, number=1)
    second = truth_of(60, 60, 40, 40, image=0, category=3, number=2)
    miss = found(truth_of(0, 80, 40, 40, image=0, category=3, number=9), score=0.8)
    path = write(tmp_path / "val.json", [first, second], images=1)
    results = [found(first, score=0.9), miss, found(second, score=0.7)]
    metrics = evaluate_detections(path, results, class_names=CLASSES, image_ids=[0])
    expected = 100 * (51 * 1 + 50 * 2 / 3) / 101  # recall 0, 0.01, ..., 1
    assert metrics.segm is not None
    assert metrics.segm.groups["all"]["AP"] == pytest.approx(expected, abs=1e-8)


def test_detections_on_crowd_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    target = truth_of(0, 0, 30, 30, image=0, category=3, number=1)
    crowd = truth_of(60, 60, 60, 60, image=0, category=3, number=2, crowd=1)
    inside = found(truth_of(70, 70, 20, 20, image=0, category=3, number=9), score=0.95)
    results = [inside, found(target, score=0.5)]
    path = write(tmp_path / "val.json", [target, crowd], images=1)
    assert _all_ap(path, results) == 100
    del crowd["segmentation"]  # then its box counts
    assert _all_ap(write(path, [target, crowd], images=1), results) == 100
    assert _all_ap(write(path, [target], images=1), results) < 60


def _all_ap(path: Path, results: list[dict[str, Any]]) -> float:
    metrics = evaluate_detections(path, results, class_names=CLASSES, image_ids=[0])
    assert metrics.segm is not None
    found_ap = metrics.segm.groups["all"]["AP"]
    assert found_ap is not None
    return found_ap


def test_mask_areas_decide_the_area_ranges_of_masks(tmp_path: Path) -> None:
    """A thin mask in a large box is a small object; a false one must lower APs, not APm."""
    thin = truth_of(0, 0, 100, 4, image=0, category=3, number=1)
    false = found(truth_of(0, 20, 100, 4, image=0, category=3, number=9), score=0.99)
    false["bbox"] = [0, 20, 100, 100]
    path = write(tmp_path / "val.json", [thin], images=1)
    metrics = evaluate_detections(path, [false, found(thin, score=0.5)], class_names=CLASSES, image_ids=[0])
    assert metrics.segm is not None
    assert metrics.segm.groups["all"]["APs"] == pytest.approx(50)
    assert metrics.bbox.groups["all"]["APs"] == 100  # there the false one is a large box


def test_nothing_found_is_zero_and_nothing_to_find_is_none(tmp_path: Path) -> None:
    annotation = truth_of(5, 6, 40, 50, image=0, category=7, number=1)
    path = write(tmp_path / "val.json", [annotation], images=2)
    metrics = evaluate_detections(path, [], class_names=CLASSES, image_ids=[1, 0])
    assert metrics.segm is not None
    assert metrics.segm.groups["all"]["AP"] == 0
    cat = metrics.bbox.classes["猫"]
    assert cat is not None
    assert cat["AP75"] == 0
    assert set(metrics.group("segm", ("ring",)).values()) == {None}
    empty = write(tmp_path / "empty.json", [], images=2)
    metrics = evaluate_detections(empty, [], class_names=CLASSES, image_ids=[0, 1])
    assert set(metrics.bbox.groups["all"].values()) == {None}
    false = found(annotation, score=0.5)
    metrics = evaluate_detections(empty, [false], class_names=CLASSES, image_ids=[0, 1])
    assert metrics.segm is not None
    assert set(metrics.segm.groups["all"].values()) == {None}


def test_boxes_alone_can_be_evaluated(tmp_path: Path) -> None:
    annotation = truth_of(5, 6, 40, 50, image=0, category=7, number=1)
    result = found(annotation, score=0.5)
    del annotation["segmentation"], annotation["area"], annotation["iscrowd"]
    path = write(tmp_path / "val.json", [annotation], images=1)
    metrics = evaluate_detections(path, [result], class_names=CLASSES, image_ids=[0])
    assert metrics.segm is None
    assert metrics.bbox.groups["all"]["AP"] == 100
    assert set(metrics.group("segm", CLASSES).values()) == {None}
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_masks_are_measured_on_the_objects_that_have_one(
    random_case: tuple[Path, list[dict[str, Any]]], tmp_path: Path, backend: Backend
) -> None:
    """As if each object without a mask were the crowd region of its box; boxes are measured on all."""
    path, results = random_case
    if backend == "hotcoco":
        pytest.importorskip("hotcoco")
    given: dict[str, Any] = {"class_names": CLASSES, "image_ids": range(20), "backend": backend}
    content = json.loads(path.read_text(encoding="utf-8"))
    whole = evaluate_detections(path, results, **given)
    objects = [each for each in content["annotations"] if not each["iscrowd"]]
    for annotation in objects[::3]:
        del annotation["segmentation"]
    some = tmp_path / "some.json"
    some.write_text(json.dumps(content), encoding="utf-8")
    mixed = evaluate_detections(some, results, **given)
    for annotation in objects[::3]:
        x, y, width, height = annotation["bbox"]
        annotation |= {"iscrowd": 1, "segmentation": encode(rectangle(x, y, width, height))}
    crowds = tmp_path / "crowds.json"
    crowds.write_text(json.dumps(content), encoding="utf-8")
    plainly = evaluate_detections(crowds, results, **given)
    assert mixed.segm == plainly.segm != whole.segm
    assert (mixed.bbox, mixed.instances) == (whole.bbox, whole.instances)
    assert (mixed.unmasked, whole.unmasked, plainly.unmasked) == (len(objects[::3]), None, None)
    assert Metrics.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert "unmasked" not in whole.to_dict()


def test_metrics_survive_json(random_case: tuple[Path, list[dict[str, Any]]]) -> None:
    path, results = random_case
    metrics = evaluate_detections(path, results, class_names=CLASSES, image_ids=range(20))
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    with pytest.raises(UserError, match="bbox"):
        Metrics.from_dict({name: part for name, part in metrics.to_dict().items() if name != "bbox"})
    change: dict[str, Any]
    for change in ({"bbox": 3}, {"segm": []}, {"images": "many"}, {"instances": {"a": None}}, {"bbox": {"groups": {}}}):
        with pytest.raises(UserError, match=f"recorded metrics: '{next(iter(change))}"):
            Metrics.from_dict({**metrics.to_dict(), **change})
    broken = metrics.to_dict()
    broken["segm"]["groups"]["all"]["AP"] = "high"
    with pytest.raises(UserError, match=r"'segm\.groups\.all\.AP': .*number"):
        Metrics.from_dict(broken)


def test_annotations_that_changed_since_they_were_read_are_not_measured_on(
    random_case: tuple[Path, list[dict[str, Any]]],
) -> None:
    path, results = random_case
    known = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    arguments: dict[str, Any] = {"class_names": CLASSES, "image_ids": range(20)}
    metrics = evaluate_detections(path, results, fingerprint=known, **arguments)
    assert metrics == evaluate_detections(path, results, **arguments)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=rf"json: was changed since this run read it \(its digest was {known}\)"):
        evaluate_detections(path, results, fingerprint=known, **arguments)


def test_group_means_by_hand() -> None:
    def numbers(value: float | None) -> dict[str, float | None]:
        return dict.fromkeys(METRIC_NAMES, value)

    per_class = {"a": {**numbers(10.0), "APs": None}, "b": numbers(40.0), "c": None}
    means = group_means(per_class, ("a", "b", "c"))
    assert means == {**numbers(25.0), "APs": 40.0}
    assert group_means(per_class, ("c",)) == numbers(None)
    with pytest.raises(UserError, match="'d'"):
        group_means(per_class, ("a", "d"))


def test_results_are_left_unchanged(tmp_path: Path) -> None:
    annotation = truth_of(5, 6, 40, 50, image=0, category=7, number=1)
    results = [found(annotation, score=0.5)]
    before = json.dumps(results)
    path = write(tmp_path / "val.json", [annotation], images=1)
    evaluate_detections(path, results, class_names=CLASSES, image_ids=[0])
    assert json.dumps(results) == before


@pytest.mark.parametrize(
    ("image_ids", "message"),
    [
        ([0], "2 missing \\(such as 1, 2\\)"),
        ([0, 1, 2, 9], "1 unknown \\(such as 9\\)"),
        ([0, 1, 2, 2], "1 evaluated more than once \\(such as 2\\)"),
    ],
)
def test_evaluated_images_must_be_the_data_sets(tmp_path: Path, image_ids: list[int], message: str) -> None:
    path = write(tmp_path / "val.json", [], images=3)
    with pytest.raises(UserError, match=message):
        evaluate_detections(path, [], class_names=CLASSES, image_ids=image_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "image 8"),
        ({"category_id": 4}, "category 4"),
        ({"score": float("nan")}, "score nan"),
        ({"segmentation": {"size": [4, 4], "counts": "`0"}}, "mask size"),
    ],
)
def test_a_detection_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    annotation = truth_of(5, 6, 40, 50, image=0, category=7, number=1)
    path = write(tmp_path / "val.json", [annotation], images=1)
    results = [found(annotation, score=0.5), {**found(annotation, score=0.5), **change}]
    with pytest.raises(UserError, match=f"detection 1 of 2: .*{message}"):
        evaluate_detections(path, results, class_names=CLASSES, image_ids=[0])


def test_classes_must_be_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "val.json", [], images=1)
    with pytest.raises(UserError, match="its classes"):
        evaluate_detections(path, [], class_names=tuple(reversed(CLASSES)), image_ids=[0])
    metrics = evaluate_detections(path, [], class_names=CLASSES, image_ids=[0])
    with pytest.raises(UserError, match="'circle' was not evaluated"):
        metrics.group("bbox", ["circle"])
    with pytest.raises(UserError, match="no such file"):
        evaluate_detections(tmp_path / "no.json", [], class_names=CLASSES, image_ids=[0])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="not a COCO instances file"):
        evaluate_detections(tmp_path / "list.json", [], class_names=CLASSES, image_ids=[0])


def test_outlines_without_a_point_and_byte_order_marks(tmp_path: Path) -> None:
    """`[[]]`, written by some tools for "not annotated", is no mask; training reads such files too."""
    whole = truth_of(8, 8, 32, 32, image=1, category=3, number=1)
    outline = [8, 8, 40, 8, 40, 40, 8, 40]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": SIZE, "width": SIZE}],
        "categories": [{"id": 3, "name": "ring"}],
    }
    path = tmp_path / "truth.json"
    for segmentation, measured in (([[]], False), ([[], outline], True)):
        annotations = [{**whole, "segmentation": segmentation}]
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**content, "annotations": annotations}).encode())
        metrics = evaluate_detections(path, [found(whole, score=0.9)], class_names=["ring"], image_ids=[1])
        assert (metrics.segm is not None) == measured
        assert metrics.bbox.groups["all"]["AP"] == 100.0
        if metrics.segm is not None:
            assert metrics.segm.groups["all"]["AP"] == 100.0
