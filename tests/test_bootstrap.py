"""Matchings and resampled APs: against pycocotools on data sets whose images are really repeated, and limit cases."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.coco_metrics import load_ground_truth, prepare_masks
from semiseg.evaluation.matching import (
    IOU_THRESHOLDS,
    ClassMatches,
    Matches,
    average_precision,
    class_average_precision,
    class_bootstrap,
    match,
    means_of_groups,
    percentile_interval,
    resampled_images,
)
from semiseg.evaluation.precision import coco_precision

SIZE = 40
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "猫"}, {"id": 9, "name": "never"}]
IMAGES = 6


def encode(box: np.ndarray) -> dict[str, Any]:
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    x, y, width, height = box
    mask[y : y + height, x : x + width] = 1
    value = rle.encode(mask)
    return {"size": value["size"], "counts": value["counts"].decode()}


def content(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A ground truth and detections near it, with crowd, false ones and an image without objects; all scores differ."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in range(IMAGES):
        for number in range(0 if image == 3 else 5):
            box = np.concatenate([random.integers(0, 20, 2), random.integers(6, 18, 2)])
            category = int(random.choice([7, 2]))
            crowd = int(image < 2 and number == 0)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 10 * image,
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": int(box[2] * box[3]),
                    "iscrowd": crowd,
                    "segmentation": encode(box),
                }
            )
            for _ in range(3 if crowd else 1):
                near = np.maximum(box + random.integers(-2, 3, 4), [0, 0, 3, 3])
                detections.append({"image_id": 10 * image, "category_id": category, "bbox": near.tolist()})
        for _ in range(4):
            box = np.concatenate([random.integers(0, 25, 2), random.integers(4, 12, 2)])
            category = int(random.choice([7, 2, 9]))
            detections.append({"image_id": 10 * image, "category_id": category, "bbox": box.tolist()})
    scores = random.permutation(len(detections)) / len(detections)
    results = [
        {**found, "score": float(score), "segmentation": encode(np.array(found["bbox"]))}
        for found, score in zip(detections, scores, strict=True)
    ]
    images = [{"id": 10 * number, "file_name": "x", "width": SIZE, "height": SIZE} for number in range(IMAGES)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}, results


def repeated(
    truth: dict[str, Any], results: list[dict[str, Any]], weights: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same data set with image k really there `weights[k]` times, under ids of their own."""
    ids = {10 * number: [1000 * number + copy for copy in range(weights[number])] for number in range(IMAGES)}
    images = [{**image, "id": new} for image in truth["images"] for new in ids[image["id"]]]
    annotations = [{**a, "image_id": new} for a in truth["annotations"] for new in ids[a["image_id"]]]
    return {**truth, "images": images, "annotations": annotations}, [
        {**result, "image_id": new} for result in results for new in ids[result["image_id"]]
    ]


def load(folder: Path, truth: dict[str, Any]) -> COCO:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    loaded = load_ground_truth(path)
    assert prepare_masks(loaded)
    return loaded


def official(folder: Path, truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> np.ndarray:
    """(C, T) in percent by pycocotools; NaN without objects."""
    precision = coco_precision(load(folder, truth), results, iou_type)[:, :, :, 0, 0]
    numbers = 100 * precision.mean(axis=1).T
    return np.where(numbers < 0, np.nan, numbers)


def weighted_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """(B, C, T) in percent, for images that occur as often as (B, N) weights say."""
    by_class = zip(matches.detections, matches.positives, strict=True)
    return np.stack([class_average_precision(*of_class, weights) for of_class in by_class], axis=1)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_average_precision_is_pycocotools(tmp_path: Path, iou_type: str) -> None:
    truth, results = content()
    matches = match(load(tmp_path, truth), results, iou_type)
    assert matches.classes == ("猫", "cat", "never")
    assert matches.images == IMAGES
    assert any(found.ignored.any() for found in matches.detections)  # the crowd is found
    expected = official(tmp_path, truth, results, iou_type)
    assert 5 < np.nanmean(expected) < 95
    assert np.isnan(expected[2]).all()
    np.testing.assert_allclose(average_precision(matches), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_weights_are_images_that_are_really_repeated(tmp_path: Path, iou_type: str) -> None:
    truth, results = content(1)
    matches = match(load(tmp_path, truth), results, iou_type)
    random = np.random.default_rng(2)
    weights = np.array([np.bincount(random.integers(IMAGES, size=IMAGES), minlength=IMAGES) for _ in range(12)])
    assert weights.max() > 2
    found = weighted_precision(matches, weights)
    assert found.shape == (12, 3, 10)
    for line, numbers in zip(weights, found, strict=True):
        expected = official(tmp_path, *repeated(truth, results, line), iou_type)
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(weighted_precision(matches, line[None])[0], numbers)


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = content(3)
    matches = match(load(tmp_path, truth), results, "segm")
    weights = np.random.default_rng(0).integers(0, 4, (50, IMAGES))
    whole = weighted_precision(matches, weights)
    monkeypatch.setattr("semiseg.evaluation.matching._BLOCK_ELEMENTS", 7)
    np.testing.assert_array_equal(weighted_precision(matches, weights), whole)


def test_no_detections_and_no_image_that_occurs(tmp_path: Path) -> None:
    truth, results = content()
    nothing = match(load(tmp_path, truth), [], "segm")
    np.testing.assert_array_equal(average_precision(nothing)[:2], np.zeros((2, 10)))
    assert np.isnan(average_precision(nothing)[2]).all()
    matches = match(load(tmp_path, truth), results, "segm")
    assert np.isnan(weighted_precision(matches, np.zeros((1, IMAGES), int))).all()
    only_empty = np.eye(IMAGES, dtype=int)[3:4]  # the image without objects
    assert np.isnan(weighted_precision(matches, only_empty)).all()
    assert weighted_precision(matches, np.zeros((0, IMAGES), int)).shape == (0, 3, 10)


def test_wrong_matchings_are_refused() -> None:
    true = np.ones((len(IOU_THRESHOLDS), 2), bool)
    found = ClassMatches(np.array([0, 1]), true, ~true)
    with pytest.raises(ValueError, match="more true positives than objects"):
        Matches(("a",), (found,), np.array([[1, 0]]))
    with pytest.raises(ValueError, match="more true positives than objects"):
        Matches(("a",), (found,), np.array([[0, 2]]))  # enough objects, but in the wrong image
    with pytest.raises(ValueError, match="shape"):
        Matches(("a",), (ClassMatches(np.array([0, 2]), true, ~true),), np.array([[2, 1]]))
    with pytest.raises(ValueError, match="zip"):
        Matches(("a", "b"), (found,), np.array([[2, 1]]))


def made_up(images: int, per_image: int, classes: int, objects: int, *, seed: int = 0) -> Matches:
    """A matching of COCO's kind without a data set: fewer true positives at lower scores and higher thresholds."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(classes, 0.7))  # a few classes have most of the objects
    of_class = random.choice(classes, size=images * per_image, p=share)
    image = np.repeat(np.arange(images), per_image)
    found, positives = [], np.zeros((classes, images), np.int64)
    for label in range(classes):
        own = random.permutation(image[of_class == label])
        known = round(objects * len(own) / (images * per_image))
        rank = np.arange(len(own))
        right = random.random(len(own)) < 0.85 * np.exp(-rank / max(known, 1))
        missed = random.integers(images, size=known // 5)
        positives[label] = np.bincount(own[right], minlength=images) + np.bincount(missed, minlength=images)
        quality = np.where(right, random.random(len(own)), -1.0)
        matched = quality > np.linspace(0.0, 0.9, len(IOU_THRESHOLDS))[:, None]
        found.append(ClassMatches(own, matched, matched & (random.random(len(own)) < 0.02)))
    return Matches(tuple(map(str, range(classes))), tuple(found), positives)


def test_bootstrap_is_an_evaluation_of_every_resample(tmp_path: Path) -> None:
    truth, results = content(4)
    fewer = results[::2]
    loaded = load(tmp_path, truth)
    rows = [match(loaded, found, "segm") for found in (results, fewer)]
    groups = (("cat", "猫", "never"), ("猫",), ("never",), ())
    of_rows = [means_of_groups(class_bootstrap(row, resamples=8, seed=3), row.classes, groups) for row in rows]
    numbers = np.stack(of_rows, axis=1)
    assert numbers.shape == (8, 2, 4)
    assert np.isnan(numbers[:, :, 2:]).all()
    for weights, line in zip(resampled_images(IMAGES, resamples=8, seed=3), numbers, strict=True):
        assert weights.sum() == IMAGES
        for found, own in zip((results, fewer), line, strict=True):
            by_class = official(tmp_path, *repeated(truth, found, weights), "segm").mean(axis=1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Mean of empty slice")
                expected = [np.nanmean(by_class), by_class[0]]
            np.testing.assert_allclose(own[:2], expected, rtol=0, atol=1e-9)


def test_bootstrap_is_paired_and_repeats_itself() -> None:
    matches = made_up(40, 10, 3, 60)
    one = class_bootstrap(matches, resamples=50)
    np.testing.assert_array_equal(one, class_bootstrap(matches, resamples=50))
    assert np.ptp(one) > 1
    assert (class_bootstrap(matches, resamples=50, seed=1) != one).any()
    assert means_of_groups(one[:0], matches.classes, [matches.classes]).shape == (0, 1)
    with pytest.raises(ValueError, match="'dog' was not matched"):
        means_of_groups(one, matches.classes, [("dog",)])


def test_interval_is_about_as_wide_as_the_spread_over_images() -> None:
    # With one class, one object and one detection per image, found in half of them, AP is the mean of known numbers.
    images = 400
    right = np.arange(images) % 2 == 0
    matched = np.repeat(right[None], len(IOU_THRESHOLDS), axis=0)
    order = np.argsort(~right, kind="stable")  # all true positives first: AP is the recall, 0.5
    found = ClassMatches(np.arange(images)[order], matched[:, order], np.zeros_like(matched))
    matches = Matches(("a",), (found,), np.ones((1, images), np.int64))
    interval = percentile_interval(class_bootstrap(matches)[:, 0])
    assert interval is not None
    low, high = interval
    half = 196 * 0.5 / np.sqrt(images)  # of a binomial share, in percent
    assert low == pytest.approx(50 - half, abs=1.5)
    assert high == pytest.approx(50 + half, abs=1.5)


def test_percentiles() -> None:
    assert percentile_interval(np.array([np.nan])) is None
    assert percentile_interval(np.append(np.arange(101.0), np.nan)) == (2.5, 97.5)


def measure_coco_size() -> None:
    """Prints what the bootstrap of one run of COCO's size takes (see `evaluation/matching.py`)."""
    matches = made_up(5000, 100, 80, 36_000)
    start = time.process_time()
    numbers = means_of_groups(class_bootstrap(matches), matches.classes, [matches.classes])
    seconds = time.process_time() - start
    true = sum((found.matched & ~found.ignored)[0].sum() for found in matches.detections)
    print(f"{seconds:.1f} s; {true} true positives at 0.5; AP {percentile_interval(numbers[:, 0])}")
