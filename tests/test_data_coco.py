"""The COCO boundary: what is read, and that everything bad is one sentence with file, place, value and allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semiseg.data.check import check_annotations
from semiseg.data.coco import image_records, read_coco
from semiseg.data.problems import Kind
from semiseg.data.table import load_table
from semiseg.errors import UserError
from tests.coco_files import CocoFiles, ellipse, encode, make_coco
from tests.full_masks import decompress_runs

SIZE = (64, 80)  # of image 1
# In make_coco's first image: 1 polygon, 2 uncompressed RLE, 3 compressed RLE, 4 box only; the last one is the crowd.


def first_objects(files: CocoFiles) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = next(image_records(read_coco(files.annotations)))["objects"]
    return objects


def edit(files: CocoFiles, section: str, index: int, **values: Any) -> CocoFiles:
    return files.rewrite(lambda content: content[section][index].update(values))


def test_labels_follow_the_category_ids_and_names_are_normalised(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    categories = [{"id": 30, "name": "cafe\u0301 "}, {"id": 7, "name": " cat"}]
    annotations = [files.content["annotations"][0] | {"category_id": 30}]
    files = files.rewrite(lambda content: content.update(categories=categories, annotations=annotations))
    coco = read_coco(files.annotations)
    assert coco.class_names == ("cat", "caf\u00e9")
    assert coco.category_ids == (7, 30)
    assert first_objects(files)[0]["label"] == 1


@pytest.mark.parametrize("empty", [None, [], {}, [[]], "absent"])
def test_no_segmentation_is_no_mask(tmp_path: Path, empty: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = empty
        if empty == "absent":
            del content["annotations"][0]["segmentation"]

    item = first_objects(make_coco(tmp_path).rewrite(change))[0]
    assert (item["has_mask"], item["polygons"], item["rle_counts"]) == (False, [], None)


def test_an_empty_mask_is_a_mask(tmp_path: Path) -> None:
    files = edit(make_coco(tmp_path), "annotations", 1, segmentation=encode(np.zeros(SIZE, bool), compressed=False))
    assert first_objects(files)[1]["has_mask"]


def test_both_kinds_of_rle_are_stored_alike(tmp_path: Path) -> None:
    mask = ellipse(*SIZE, box_xyxy=(10, 5, 50, 60))
    files = make_coco(tmp_path)
    stored = []
    for compressed in (False, True):
        files = edit(files, "annotations", 1, segmentation=encode(mask, compressed))
        stored.append(first_objects(files)[1]["rle_counts"])
    assert stored[0] == stored[1] == encode(mask, True)["counts"].encode()
    assert decompress_runs(stored[0]) == encode(mask, False)["counts"]


def test_boxes_become_xyxy_and_are_clipped(tmp_path: Path) -> None:
    files = edit(make_coco(tmp_path), "annotations", 3, bbox=[70, -5.5, 30, 20])
    assert first_objects(files)[3]["box_xyxy"] == [70, 0, 80, 14.5]
    (finding,) = check_annotations(files.annotations, None).findings
    assert (finding.kind, finding.count) == (Kind.BOX_CLIPPED, 1)
    assert "reaches 20 px" in finding.examples[0]


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([10, 10, 0, 5], Kind.BOX_NO_AREA),
        ([10, 10, 5, -3], Kind.BOX_NO_AREA),
        ([80, 0, 10, 10], Kind.BOX_OUTSIDE),
        ([-20, 0, 10, 10], Kind.BOX_OUTSIDE),
    ],
)
def test_useless_boxes_are_ignored_and_counted(tmp_path: Path, box: list[float], kind: Kind) -> None:
    files = edit(make_coco(tmp_path), "annotations", 3, bbox=box)
    assert [item["annotation_id"] for item in first_objects(files) if not item["is_crowd"]] == [1, 2, 3]
    (finding,) = check_annotations(files.annotations, None).findings
    assert (finding.kind, finding.kind.severity, finding.count) == (kind, "ignored", 1)
    assert "annotation 4" in finding.examples[0]


BROKEN_RLE = {"size": [64, 80], "counts": [10, 20]}
LONG_RLE = {"size": [64, 80], "counts": encode(np.ones((64, 81), bool), True)["counts"]}
# section, index, changed values -> kind, words of the message (place, value, allowed)
BAD = [
    ("annotations", 0, {"segmentation": [[1, 2, 3, 4]]}, Kind.POLYGON, ["annotation 1", "4 numbers", "at least 6"]),
    ("annotations", 0, {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, Kind.POLYGON, ["7 numbers", "even"]),
    ("annotations", 0, {"segmentation": [1, 2, 3, 4, 5, 6]}, Kind.POLYGON, ["annotation 1", "list of polygons"]),
    ("annotations", 0, {"segmentation": [[1, 2, "3", 4, 5, 6]]}, Kind.POLYGON, ["no number"]),
    ("annotations", 0, {"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, Kind.POLYGON, ["x = 1e+09", "-80 to 160"]),
    ("annotations", 0, {"segmentation": [[1, 2, float("nan"), 4, 5, 6]]}, Kind.NON_FINITE, ["annotation 1", "finite"]),
    ("annotations", 1, {"segmentation": {"size": [80, 64], "counts": [5120]}}, Kind.RLE, ["[80, 64]", "[64, 80]"]),
    ("annotations", 1, {"segmentation": BROKEN_RLE}, Kind.RLE, ["annotation 2", "covers 30 pixels", "5120"]),
    ("annotations", 1, {"segmentation": LONG_RLE}, Kind.RLE, ["annotation 2", "covers 5184 pixels", "5120"]),
    ("annotations", 1, {"segmentation": {"size": [64, 80], "counts": "\u00e9~"}}, Kind.RLE, ["no compressed RLE"]),
    ("annotations", 1, {"segmentation": {"size": [64, 80], "counts": "P"}}, Kind.RLE, ["middle of a number"]),
    ("annotations", 1, {"segmentation": {"size": [64, 80], "counts": "o" * 20 + "0"}}, Kind.RLE, ["no compressed RLE"]),
    ("annotations", 1, {"segmentation": {"size": [64, 80], "counts": ""}}, Kind.RLE, ["covers 0 pixels", "5120"]),
    ("annotations", 1, {"segmentation": {"size": [64, 80]}}, Kind.RLE, ["'counts'"]),
    ("annotations", 2, {"category_id": 4}, Kind.UNKNOWN_CATEGORY, ["annotation 3", "category_id 4", "[1, 3, 5, 7]"]),
    ("annotations", 2, {"image_id": 99}, Kind.UNKNOWN_IMAGE, ["annotation 3", "image_id 99"]),
    ("annotations", 2, {"id": 1}, Kind.ANNOTATION_ID_TWICE, ["annotation 1", "twice"]),
    ("annotations", 2, {"id": "three"}, Kind.ANNOTATION, ["annotations[2]", "'three'", "an integer"]),
    ("annotations", 2, {"iscrowd": 2}, Kind.ANNOTATION, ["annotation 3", "'iscrowd' is 2", "0 or 1"]),
    ("annotations", 2, {"bbox": [1, 2, 3]}, Kind.ANNOTATION, ["annotation 3", "four numbers"]),
    ("annotations", 2, {"bbox": [1, 2, float("inf"), 4]}, Kind.NON_FINITE, ["annotation 3", "finite"]),
    ("annotations", 2, {"bbox": [1, 2, 10**400, 4]}, Kind.NON_FINITE, ["annotation 3", "finite"]),
    ("images", 2, {"id": 1}, Kind.IMAGE_ID_TWICE, ["images[2]", "image id 1", "003.png"]),
    ("images", 2, {"height": 0}, Kind.IMAGE, ["images[2]", "'height' is 0", "positive"]),
    ("images", 2, {"file_name": None}, Kind.IMAGE, ["images[2]", "'file_name'"]),
    ("categories", 1, {"id": 1}, Kind.CATEGORY_ID_TWICE, ["categories[1]", "category id 1", "'cat'"]),
    ("categories", 1, {"name": " cat"}, Kind.CATEGORY_NAME_TWICE, ["categories[1]", "'cat'", "twice"]),
    ("categories", 1, {"name": ""}, Kind.CATEGORY, ["categories[1]", "'name'"]),
]


@pytest.mark.parametrize(("section", "index", "values", "kind", "words"), BAD)
def test_errors_stop_training_in_one_sentence_and_are_listed_by_the_check(
    tmp_path: Path, section: str, index: int, values: dict[str, Any], kind: Kind, words: list[str]
) -> None:
    files = edit(make_coco(tmp_path), section, index, **values)
    report = check_annotations(files.annotations, None)
    assert kind in [finding.kind for finding in report.errors]
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        load_table(files.annotations, files.images, cache=cache)
    message = str(caught.value)
    assert message.startswith(f"{files.annotations}: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert list(cache.glob("*")) == []
    assert list(cache.glob(".*")) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", ["not JSON", "line 1"]),
        ("[]", ["a list", "images, annotations, categories"]),
        ('{"images": [], "annotations": []}', ["no list 'categories'"]),
        ('{"categories": []}', ["no list 'images' and no list 'annotations'"]),
        ('{"images": [], "annotations": [], "categories": []}', ["'images' is empty"]),
    ],
)
def test_files_that_are_no_instances_file(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_table(path, tmp_path, cache=tmp_path / "cache")
    (finding,) = check_annotations(path, None).errors
    assert finding.kind == Kind.FILE
    for word in ["a.json", *words]:
        assert word in str(caught.value)
    assert words[0] in finding.examples[0]


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        load_table(tmp_path / "none.json", tmp_path, cache=tmp_path)
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not JSON"):
        read_coco(tmp_path / "binary.json")
    with pytest.raises(UserError, match=r"none\.json: no such annotation file$"):
        check_annotations(tmp_path / "none.json", None)
    with pytest.raises(UserError, match="is a folder, expected a COCO json"):
        check_annotations(tmp_path, None)


def test_the_check_lists_everything_at_once(tmp_path: Path) -> None:
    files = make_coco(tmp_path, suffix=".jpg", sizes_hw=[SIZE] * 4)
    for item in files.content["annotations"][:5]:
        item["bbox"] = [0, 0, 0, 0]
    files.content["annotations"][5]["segmentation"] = BROKEN_RLE
    files.content["images"][3]["width"] = 81
    files.annotations.write_text(json.dumps(files.content))
    (files.images / "001.jpg").unlink()
    jpeg = (files.images / "002.jpg").read_bytes()
    (files.images / "002.jpg").write_bytes(jpeg[: len(jpeg) // 2])

    report = check_annotations(files.annotations, files.images)
    found = {finding.kind: finding.count for finding in report.findings}
    # Image 4 is now 81 wide in the json, so the RLEs of annotations 14 and 15 are of another size than it.
    assert found == {
        Kind.RLE: 3,
        Kind.IMAGE_MISSING: 1,
        Kind.IMAGE_UNREADABLE: 1,
        Kind.IMAGE_SIZE: 1,
        Kind.BOX_NO_AREA: 1,
        Kind.BOX_OF_MASK: 4,
    }
    text = report.render()
    for part in (
        "4 x box has no area in the image",
        "... and 1 more",
        "001.jpg",
        "truncated",
        "80 x 64",
        "81 x 64",
        "6 errors",
    ):
        assert part in text
    assert text.index("error (") < text.index("ignored (")
    assert report.contents["images"] == 4


def test_a_clean_data_set_has_no_findings(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    report = check_annotations(files.annotations, files.images)
    assert report.findings == ()
    assert report.contents == {"images": 4, "classes": 4, "with mask": 12, "box only": 4, "crowd": 1}
    assert report.render().endswith("no errors")
    with pytest.raises(UserError, match="no such image folder"):
        check_annotations(files.annotations, tmp_path / "elsewhere")


def test_the_check_decodes_images_in_full(tmp_path: Path) -> None:
    """A file whose header is fine but whose pixels end early is found only by decoding."""
    files = make_coco(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)).save(files.images / "001.png")
    content = (files.images / "001.png").read_bytes()
    (files.images / "001.png").write_bytes(content[:-1000])
    (finding,) = check_annotations(files.annotations, files.images).errors
    assert finding.kind == Kind.IMAGE_UNREADABLE
    assert "001.png" in finding.examples[0]


def test_the_check_says_what_an_object_without_a_mask_does_to_an_evaluation(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    told = "4 of 16 objects have no mask: mask AP is measured on the others, and their boxes are regions in which masks"
    assert f"for validation: {told} count for nobody\nno errors" in check_annotations(files.annotations, None).render()
    files = files.rewrite(lambda content: [each.pop("segmentation", None) for each in content["annotations"]])
    told = "for validation: no object has a mask, so mask AP is not measured"
    assert told in check_annotations(files.annotations, None).render()
    for item in files.content["annotations"]:
        item.setdefault("segmentation", [[1, 1, 9, 1, 9, 9]])
    del files.content["annotations"][-1]["segmentation"]  # the crowd
    files.annotations.write_text(json.dumps(files.content))
    assert "no mask" not in check_annotations(files.annotations, None).render()
    del files.content["annotations"][0]["segmentation"]
    files.annotations.write_text(json.dumps(files.content))
    assert "1 of 16 objects has no mask" in check_annotations(files.annotations, None).render()


def test_a_file_without_objects_is_an_error_of_the_check(tmp_path: Path) -> None:
    crowd = make_coco(tmp_path).content["annotations"][-1]
    assert crowd["iscrowd"] == 1
    for listed in ([], [crowd]):
        (finding,) = check_annotations(make_coco(tmp_path, annotations=listed).annotations, None).findings
        assert (finding.kind, finding.kind.severity) == (Kind.NO_OBJECTS, "error")


@pytest.mark.parametrize("form", ["polygon", "rle"])
def test_a_mask_that_lies_outside_its_box_is_a_notice(tmp_path: Path, form: str) -> None:
    """Boxes [x, y, w, h] around a mask whose pixels are x 30 to 40 and y 20 to 28."""
    mask = np.zeros(SIZE, bool)
    mask[20:28, 30:40] = True
    outlines = [[30, 20, 40, 20, 40, 28, 30, 28]]
    segmentation = outlines if form == "polygon" else encode(mask, compressed=True)
    boxes = {1: [39, 27, 9, 9], 2: [40, 20, 9, 9], 3: [20, 20, 10, 8], 4: [30, 28, 9, 9], 5: [30, 5, 9, 15]}
    annotations: list[dict[str, Any]] = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": segmentation}
        for number, box in boxes.items()
    ]
    empty = {"id": 6, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}
    annotations.append({**empty, "segmentation": encode(np.zeros(SIZE, bool), compressed=True)})
    report = check_annotations(make_coco(tmp_path, annotations=annotations, class_names=("cat",)).annotations, None)
    of_all, finding = report.findings
    assert (of_all.kind, of_all.count) == (Kind.MEASURES, 1)
    assert (finding.kind, finding.kind.severity, finding.count) == (Kind.MASK_OUTSIDE_BOX, "notice", 4)
    assert finding.examples[0].startswith("annotation 2: ")
    assert report.errors == ()


@pytest.mark.parametrize(("suffix", "noticed"), [(".jpg", [3, 6]), (".png", [3, 6]), (".tif", [])])
def test_exif_orientations_that_keep_the_size_are_a_notice(tmp_path: Path, suffix: str, noticed: list[int]) -> None:
    """A half turn keeps the size of any image, a quarter turn that of a square one. Pillow itself turns TIFFs."""
    orientations = (1, 3, 6, 9)
    files = make_coco(tmp_path, suffix=suffix, sizes_hw=[(64, 64)] * len(orientations))
    for entry, orientation in zip(files.content["images"], orientations, strict=True):
        with Image.open(files.images / entry["file_name"]) as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            image.copy().save(files.images / entry["file_name"], exif=exif)
    report = check_annotations(files.annotations, files.images)
    found = [example for finding in report.findings if finding.kind == Kind.EXIF for example in finding.examples]
    assert [int(example.split("EXIF orientation ")[1][0]) for example in found] == noticed
    assert report.errors == ()
    assert ("2 x image has an EXIF orientation that is not applied" in report.render()) == bool(noticed)
