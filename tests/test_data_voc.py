"""PASCAL VOC 2012 and SBD -> COCO json: boxes, masks, crowd, image sets, layouts, errors; and Table 5's study."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.data.coco import read_coco
from semiseg.data.voc import VOC_CLASSES, ensure_voc, voc_files
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import evaluate_detections
from semiseg.splits import load_split
from tests.voc_files import (
    IMAGES,
    SIZE_HW,
    VOID,
    VocObject,
    index_map,
    make_sbd,
    make_voc,
    write_maps,
    write_mat,
    write_palette,
    write_xml,
)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The folder VOC2012 of a tree without SBD."""
    return make_voc(tmp_path, sbd=None)


def convert(root: Path, image_set: str) -> dict[str, Any]:
    annotations, _ = ensure_voc(root, image_set)
    content: dict[str, Any] = json.loads(annotations.read_text())
    return content


def objects_of(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    image_id = next(image["id"] for image in content["images"] if image["file_name"] == f"{name}.jpg")
    return [item for item in content["annotations"] if item["image_id"] == image_id]


def names_of(content: dict[str, Any]) -> list[str]:
    return [image["file_name"].removesuffix(".jpg") for image in content["images"]]


def decode(annotation: dict[str, Any]) -> np.ndarray:
    mask: np.ndarray = coco_mask.decode(annotation["segmentation"])
    return mask.astype(bool)


def test_boxes_masks_and_classes_of_a_segmented_image(voc: Path, tmp_path: Path) -> None:
    content = convert(tmp_path, "train")
    assert names_of(content) == ["2007_000001", "2007_000003"]
    assert [category["name"] for category in content["categories"]] == list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert [category["id"] for category in content["categories"]] == list(range(1, 21))
    assert [(image["height"], image["width"]) for image in content["images"]] == [SIZE_HW, SIZE_HW]
    cat, person = objects_of(content, "2007_000001")
    # xmin 5 is the fifth pixel, column 4; to xmax 30 inclusive these are 26 columns.
    assert cat["bbox"] == [4, 3, 26, 37]
    assert person["bbox"] == [21, 9, 54, 49]
    assert (cat["category_id"], person["category_id"]) == (8, 15)
    indices = index_map(IMAGES["2007_000001"])
    assert (indices == VOID).any()
    for number, item in enumerate((cat, person), start=1):
        np.testing.assert_array_equal(decode(item), indices == number)
        assert item["area"] == int((indices == number).sum())
        assert item["iscrowd"] == 0
    assert not (decode(cat) & decode(person)).any()


def test_no_pixels_is_no_mask_but_not_an_empty_one(voc: Path, tmp_path: Path) -> None:
    dog, car = objects_of(convert(tmp_path, "train"), "2007_000003")
    assert "segmentation" in dog
    assert "segmentation" not in car
    assert (car["bbox"], car["area"], car["iscrowd"]) == ([59, 19, 5, 5], 25, 0)
    # Mask AP needs a mask of every instance: in val such an object is ignored by its box.
    sheep, bird = objects_of(convert(tmp_path, "val"), "2007_000004")
    assert (sheep["iscrowd"], bird["iscrowd"]) == (0, 1)
    assert "segmentation" not in bird


def test_difficult_is_crowd_with_and_without_a_mask(voc: Path, tmp_path: Path) -> None:
    person, cat, bus = objects_of(convert(tmp_path, "val"), "2007_000002")
    assert [item["iscrowd"] for item in (person, cat, bus)] == [0, 1, 1]
    np.testing.assert_array_equal(decode(cat), index_map(IMAGES["2007_000002"]) == 2)
    assert "segmentation" not in bus


def test_detection_lists_give_boxes_and_never_images_of_val(voc: Path, tmp_path: Path) -> None:
    content = convert(tmp_path, "main_train")
    assert names_of(content) == ["2007_000001", "2008_000005"]
    assert all("segmentation" in item for item in objects_of(content, "2007_000001"))
    horse, train = objects_of(content, "2008_000005")
    assert (horse["bbox"], horse["iscrowd"]) == ([0, 0, 80, 60], 0)
    assert (train["bbox"], train["iscrowd"]) == ([29.5, 9, 30.5, 31], 1)
    assert not any("segmentation" in item for item in (horse, train))
    assert names_of(convert(tmp_path, "main_trainval")) == ["2007_000001", "2007_000003", "2008_000005"]


def test_train_aug_takes_vocs_masks_first_then_sbds_and_nothing_of_val(voc: Path, tmp_path: Path) -> None:
    make_sbd(tmp_path / "benchmark_RELEASE" / "dataset")
    content = convert(tmp_path, "train_aug")
    assert names_of(content) == ["2007_000001", "2007_000003", "2008_000005", "2008_000006"]
    assert objects_of(content, "2007_000001") == objects_of(convert(tmp_path, "train"), "2007_000001")
    # SBD's order is its own and its boxes are those of the masks; the train has no special standing there.
    train, horse = objects_of(content, "2008_000005")
    assert (train["category_id"], horse["category_id"]) == (19, 13)
    assert (train["iscrowd"], horse["iscrowd"]) == (0, 0)
    (sofa,) = objects_of(content, "2008_000006")
    assert sofa["bbox"] == [7, 7, 53, 45]  # of xmin 8 to xmax 60: the same box as the XML's
    np.testing.assert_array_equal(decode(sofa), index_map(IMAGES["2008_000006"]) == 1)


def test_ids_are_those_of_every_set_and_unique(voc: Path, tmp_path: Path) -> None:
    by_set = {name: convert(tmp_path, name) for name in ("train", "trainval", "main_train")}
    ids = {name: {item["id"]: item for item in content["annotations"]} for name, content in by_set.items()}
    assert all(len(ids[name]) == len(by_set[name]["annotations"]) for name in ids)
    shared = set(ids["train"]) & set(ids["trainval"]) & set(ids["main_train"])
    assert shared == {2007000001001, 2007000001002}
    assert all(ids["train"][key] == ids["trainval"][key] for key in ids["train"])


@pytest.mark.parametrize("name", ["garden", "gar\u2028d\x85e\xa0n"])
def test_other_names_than_vocs_are_numbered(voc: Path, tmp_path: Path, name: str) -> None:
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationObject", "png")):
        shutil.copy(voc / part / f"2007_000003.{suffix}", voc / part / f"{name}.{suffix}")
    (voc / "ImageSets" / "Segmentation" / "own.txt").write_bytes(f"{name}\n2007_000001\r\n\n{name}  1\n".encode())
    content = convert(tmp_path, "own")
    assert names_of(content) == ["2007_000001", name]
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [item["id"] for item in content["annotations"]] == [1001, 1002, 2001, 2002]


@pytest.mark.parametrize("folder", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_every_layout_gives_the_same_bytes(tmp_path: Path, voc: Path, folder: str) -> None:
    other = make_voc(tmp_path / "other", folder=folder, sbd=None)
    annotations, images = ensure_voc(tmp_path / "other", "trainval")
    assert (annotations, images) == voc_files(tmp_path / "other", "trainval")
    assert images == other / "JPEGImages"
    assert annotations.read_bytes() == ensure_voc(tmp_path, "trainval")[0].read_bytes()
    assert read_coco(annotations).class_names == VOC_CLASSES


def test_converted_once_and_nothing_half_written(voc: Path, tmp_path: Path) -> None:
    expected = voc_files(tmp_path, "train")
    assert not expected[0].exists()
    last = voc / "Annotations" / "2007_000003.xml"
    content = last.read_text()
    last.write_text(content[:-20])
    with pytest.raises(UserError, match=r"2007_000003\.xml: not readable as XML"):
        ensure_voc(tmp_path, "train")
    assert list(expected[0].parent.glob("*")) == [] if expected[0].parent.exists() else True
    last.write_text(content)
    assert ensure_voc(tmp_path, "train") == expected
    assert [path.name for path in expected[0].parent.iterdir()] == [expected[0].name]
    stamp = expected[0].stat().st_mtime_ns
    shutil.rmtree(voc / "Annotations")
    assert ensure_voc(tmp_path, "train") == expected
    assert expected[0].stat().st_mtime_ns == stamp


def test_missing_folders_say_what_to_download_and_where_to_put_it(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: .*VOCtrainval_11-May-2012\.tar.*nowhere/VOCdevkit/VOC2012/JPEG"):
        ensure_voc(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no SBD there.*benchmark\.tgz.*benchmark_RELEASE/dataset/inst"):
        ensure_voc(tmp_path, "train_aug")
    for part in ("Annotations", "SegmentationObject", "ImageSets/Segmentation"):
        (voc / part).rename(voc / "aside")
        with pytest.raises(UserError, match=rf"{part}: no such folder; it is part of VOCtrainval_11-May-2012\.tar"):
            ensure_voc(tmp_path, "train")
        (voc / part).mkdir()
        with pytest.raises(UserError, match=rf"{part}: is empty; it is part of VOCtrainval_11-May-2012\.tar"):
            ensure_voc(tmp_path, "train")
        with pytest.raises(UserError, match=rf"{part}: is empty; .*; and .*: no SBD there"):
            ensure_voc(tmp_path, "train_aug")
        (voc / part).rmdir()
        (voc / "aside").rename(voc / part)


def test_an_unknown_set_lists_those_there(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'trian'.*known: train, trainval, val, train_aug, main_train, main_trainval$"):
        ensure_voc(tmp_path, "trian")
    (voc / "ImageSets" / "Segmentation" / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="'none': lists no image"):
        ensure_voc(tmp_path, "none")
    assert not (tmp_path / "semiseg").exists()


@pytest.mark.parametrize(
    ("part", "suffix", "told"),
    [
        ("JPEGImages", "jpg", r"2007_000003\.jpg: no such image; it is part of VOCtrainval"),
        ("Annotations", "xml", r"2007_000003\.xml: no such file; it is part of VOCtrainval"),
        ("SegmentationObject", "png", r"SegmentationObject/2007_000003\.png: no such file; it is part of VOCtrainval"),
    ],
)
def test_missing_files_are_named(voc: Path, tmp_path: Path, part: str, suffix: str, told: str) -> None:
    (voc / part / f"2007_000003.{suffix}").unlink()
    with pytest.raises(UserError, match=told):
        ensure_voc(tmp_path, "train")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("<name>dog</name>", "<name>hound</name>", r"object 1: 'name' is 'hound', allowed: aeroplane, bicycle"),
        ("<xmin>10</xmin>", "<xmin>ten</xmin>", r"object 1: 'xmin' is 'ten', allowed: a number of pixels"),
        ("<xmax>64</xmax>", "", r"object 2: 'xmax' is None, allowed"),
        ("<ymax>24</ymax>", "<ymax>inf</ymax>", r"object 2: 'ymax' is 'inf', allowed"),
        ("<difficult>0</difficult>", "<difficult>yes</difficult>", r"'difficult' is 'yes', allowed: 0 or 1"),
    ],
)
def test_bad_values_in_an_xml(voc: Path, tmp_path: Path, old: str, new: str, told: str) -> None:
    path = voc / "Annotations" / "2007_000003.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"2007_000003\.xml: object \d: .*" + told.partition(": ")[2]):
        ensure_voc(tmp_path, "train")


def test_bad_maps_are_named(voc: Path, tmp_path: Path) -> None:
    path = voc / "SegmentationObject" / "2007_000003.png"
    shutil.copy(voc / "JPEGImages" / "2007_000003.jpg", path)
    with pytest.raises(UserError, match=r"SegmentationObject/2007_000003\.png: holds RGB colours, allowed: a palette"):
        ensure_voc(tmp_path, "train")
    write_palette(path, np.zeros((8, 9), np.uint8))
    with pytest.raises(UserError, match=r"2007_000003\.png: 9 x 8 pixels .*allowed: .*80 x 60"):
        ensure_voc(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"2007_000003\.png: the image cannot be decoded"):
        ensure_voc(tmp_path, "train")
    (voc / "JPEGImages" / "2007_000003.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2007_000003\.jpg: the image cannot be read"):
        ensure_voc(tmp_path, "train")


@pytest.mark.parametrize(
    ("annotated", "told"),
    [
        ((VocObject("cow", (10, 10, 50, 50)),), r"index 1: the XML says 'cow', SegmentationClass 'dog'"),
        ((VocObject("dog", (60, 1, 80, 9)),), r"index 1: 0% of the mask lie in the box of its 'dog'"),
        ((), r"index 1, but the XML has 0 objects"),
    ],
)
def test_maps_that_contradict_the_annotations(
    voc: Path, tmp_path: Path, annotated: tuple[VocObject, ...], told: str
) -> None:
    write_xml(voc / "Annotations" / "2007_000003.xml", annotated)
    with pytest.raises(UserError, match=rf"1 of 3 masks .*2007_000003\.png: {told}; at most 1% may"):
        ensure_voc(tmp_path, "train")


def test_one_contradiction_in_a_hundred_masks_is_left_out_with_a_warning(
    voc: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        VocObject("dog", (1 + 4 * (k % 20), 1 + 10 * (k // 20), 4 + 4 * (k % 20), 10 + 10 * (k // 20)))
        for k in range(100)
    ]
    write_maps(voc, "2007_000003", rows)
    wrong = [*rows[:41], VocObject("cat", rows[41].box), *rows[42:]]
    write_xml(voc / "Annotations" / "2007_000003.xml", wrong)
    with caplog.at_level(logging.WARNING, logger="semiseg"):
        items = objects_of(convert(tmp_path, "train"), "2007_000003")
    assert [number for number, item in enumerate(items) if "segmentation" not in item] == [41]
    assert "1 of 102 masks" in caplog.text
    assert "the XML says 'cat', SegmentationClass 'dog'" in caplog.text


def test_maps_of_classes_may_be_missing(voc: Path, tmp_path: Path) -> None:
    expected = convert(tmp_path, "train")
    shutil.rmtree(voc / "SegmentationClass")
    shutil.rmtree(tmp_path / "semiseg")
    assert convert(tmp_path, "train") == expected


def test_errors_in_sbd(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbd = tmp_path / "SBD"
    make_sbd(sbd)
    mat, image = sbd / "inst" / "2008_000006.mat", voc / "JPEGImages" / "2008_000006.jpg"
    cases = [
        ([21], r"2008_000006\.mat: 'Categories' holds 21, allowed: 1 to 20"),
        ([], r"2008_000006\.mat: 'Segmentation' has index 1, but 'Categories' 0 entries"),
    ]
    for categories, told in cases:
        write_mat(mat, IMAGES["2008_000006"], categories=categories)
        with pytest.raises(UserError, match=told):
            ensure_voc(tmp_path, "train_aug")
    mat.write_bytes(mat.read_bytes()[:200])
    with pytest.raises(UserError, match=r"2008_000006\.mat: no readable SBD file: "):
        ensure_voc(tmp_path, "train_aug")
    mat.unlink()
    with pytest.raises(UserError, match=r"2008_000006\.mat: no such file; it is part of benchmark\.tgz"):
        ensure_voc(tmp_path, "train_aug")
    image.unlink()
    with pytest.raises(UserError, match=r"2008_000006\.jpg: no such image, but SBD lists it; copy .*SBD/img/"):
        ensure_voc(tmp_path, "train_aug")
    (sbd / "val.txt").unlink()
    with pytest.raises(UserError, match=r"SBD/val\.txt: the list of images cannot be read: No such file"):
        ensure_voc(tmp_path, "train_aug")


def test_splits_are_each_others_reverse() -> None:
    first, last = (load_split(name, VOC_CLASSES) for name in ("voc_first10_seen", "voc_last10_seen"))
    assert first.seen == last.unseen == VOC_CLASSES[:10]
    assert first.unseen == last.seen == VOC_CLASSES[10:]
    assert {first.dataset, last.dataset} == {"voc"}


def test_the_command_line_knows_vocs_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["split", "show", "voc_first10_seen"])
    assert shown.exit_code == 0, shown.output
    assert f"unseen (boxes only): {', '.join(VOC_CLASSES[10:])}" in shown.output
    made = CliRunner().invoke(app, ["split", "make", "pets", "--dataset", "voc", "--seen", "cat, dog"])
    assert made.exit_code == 0, made.output
    assert load_split("pets", VOC_CLASSES).seen == ("cat", "dog")


def perfect(content: dict[str, Any], *, crowd: bool) -> list[dict[str, Any]]:
    """Detections equal to the instances; with `crowd` also some on everything that is to be ignored."""
    results = []
    for item in content["annotations"]:
        if item["iscrowd"] and not crowd:
            continue
        mask = np.zeros(SIZE_HW, np.uint8)
        x, y, width, height = map(int, item["bbox"])
        mask[y : y + height, x : x + width] = 1
        rle = coco_mask.encode(np.asfortranarray(mask))
        box_rle = {"size": rle["size"], "counts": rle["counts"].decode()}
        results.append(
            {
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": item["bbox"],
                "score": 0.99 if item["iscrowd"] else 0.5,
                "segmentation": item.get("segmentation", box_rle),
            }
        )
    return results


@pytest.mark.parametrize("crowd", [False, True])
def test_a_perfect_prediction_of_val_has_ap_1(voc: Path, tmp_path: Path, crowd: bool) -> None:
    annotations, _ = ensure_voc(tmp_path, "val")
    content = json.loads(annotations.read_text())
    results = perfect(content, crowd=crowd)
    assert len(results) == (5 if crowd else 2)
    image_ids = [image["id"] for image in content["images"]]
    metrics = evaluate_detections(annotations, results, class_names=VOC_CLASSES, image_ids=image_ids)
    assert metrics.segm is not None
    for numbers in (metrics.segm.groups["all"], metrics.bbox.groups["all"]):
        assert [numbers[name] for name in ("AP", "AP50", "AP75")] == [100.0, 100.0, 100.0]
    # Crowd is no ground truth: the classes that have nothing else are not measured.
    assert {name for name, values in metrics.segm.classes.items() if values is not None} == {"person", "sheep"}
    missed = evaluate_detections(annotations, results[:1], class_names=VOC_CLASSES, image_ids=image_ids)
    assert missed.segm is not None
    assert missed.segm.groups["all"]["AP"] == 50.0
