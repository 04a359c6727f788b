"""One definition of the objects of a file, for training, evaluation and everything beside them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from semiseg.data.check import check_annotations
from semiseg.data.coco import image_records, read_coco
from semiseg.data.missing import where_instead
from semiseg.data.problems import Kind
from semiseg.data.pseudo import load_pseudo
from semiseg.data.table import load_table
from semiseg.engine.build import build_data
from semiseg.engine.run import _warn_of_measures, execute_run
from semiseg.errors import UserError, UserNotice
from semiseg.evaluation.coco_metrics import Metrics, describe_placed, evaluate_detections, load_ground_truth
from semiseg.structures.objects import Crowds, groupings, mask_box_xyxy, place
from semiseg.studies.identity import class_names
from tests.coco_files import CocoFiles, encode, make_coco
from tests.tiny import tiny_config

SIZE = (64, 80)  # height, width
SQUARE = [20, 10, 50, 10, 50, 40, 20, 40]  # an outline


def annotation(number: int, box: Sequence[float] | None, mask: Any = None, **more: Any) -> dict[str, Any]:
    values = {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}
    return values | ({} if mask is None else {"segmentation": mask}) | more


def coco(folder: Path, *annotations: dict[str, Any], sizes: int = 1, **more: Any) -> CocoFiles:
    return make_coco(folder, sizes_hw=[SIZE] * sizes, annotations=annotations, **more)


def trained_objects(files: CocoFiles) -> dict[int, tuple[list[float], bool]]:
    """Annotation id -> box xyxy and whether nothing is learnt there."""
    records = image_records(read_coco(files.annotations))
    return {each["annotation_id"]: (each["box_xyxy"], each["is_crowd"]) for r in records for each in r["objects"]}


def measured_objects(files: CocoFiles) -> dict[int, tuple[list[float], bool]]:
    """The same of an evaluation, whose boxes are not clipped."""
    truth, ids = load_ground_truth(files.annotations), [a["id"] for a in files.content["annotations"]]
    boxes = {ids[each["id"] - 1]: (each["bbox"], bool(each["iscrowd"])) for each in truth.dataset["annotations"]}
    return {key: ([x, y, x + w, y + h], crowd) for key, ((x, y, w, h), crowd) in boxes.items()}


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


# where an annotation stands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "mask", "expected"),
    [
        ([1, 2, 3, 4], SQUARE, ([1, 2, 4, 6], False)),  # the annotated box, whatever the mask is
        ([0, 0, 0, 0], SQUARE, ([20, 10, 50, 40], False)),
        ([20, 10, 0, 30], SQUARE, ([20, 10, 50, 40], False)),
        ([20, 10, -5, 30], SQUARE, ([20, 10, 50, 40], False)),
        ([90, 10, 5, 5], SQUARE, ([20, 10, 50, 40], False)),  # beside the image
        ([0, 0, 0, 0], [70, 50, 99, 50, 99, 99, 70, 99], ([70, 50, 80, 64], False)),  # a mask over the edge
        ([0, 0, 0, 0], [90, 50, 99, 50, 99, 60], None),  # a mask beside the image
        ([30, 9.8, 7, 0], [30, 9.8, 37, 9.8, 37, 9.8], None),  # an outline without area, as two of COCO's
        ([90, 10, 5, 5], None, None),
        ([-30, 4, 20, 20], None, None),
        ([80, 10, 5, 5], None, None),
        ([30, 20, 0, 0], None, ([29.5, 19.5, 30.5, 20.5], True)),  # a pixel of the image at least
        ([0, 0, 0, 0], None, ([0, 0, 1, 1], True)),
        ([80, 64, 0, 0], None, ([79, 63, 80, 64], True)),
        ([30, 20, 10, 0], None, ([30, 19.5, 40, 20.5], True)),
        ([30, 20, -10, 8], None, ([20, 20, 30, 28], True)),  # corners the other way round
        ([75, 20, 30, 0], None, ([75, 19.5, 80, 20.5], True)),
    ],
)
def test_training_and_evaluation_have_the_same_objects(
    tmp_path: Path, box: list[float], mask: list[float] | None, expected: tuple[list[float], bool] | None
) -> None:
    given: list[Any] = [None if mask is None else [mask]]
    if mask is not None:
        outlines = rle.merge(rle.frPyObjects([mask], *SIZE))
        given += [{"size": list(SIZE), "counts": outlines["counts"].decode()}, encode(rle.decode(outlines), False)]
    for form in given:
        files = coco(tmp_path, annotation(7, box, form))
        wanted = {} if expected is None else {7: expected}
        for found in (trained_objects(files), measured_objects(files)):
            assert found.keys() == wanted.keys()
            assert all(found[key][0] == pytest.approx(wanted[key][0], abs=1e-9) for key in wanted)
            assert all(found[key][1] == wanted[key][1] for key in wanted)


def test_a_crowd_without_a_box_stays_one(tmp_path: Path) -> None:
    files = coco(tmp_path, annotation(1, [0, 0, 0, 0], [SQUARE], iscrowd=1))
    assert trained_objects(files) == measured_objects(files) == {1: ([20, 10, 50, 40], True)}


def test_the_mask_is_only_looked_at_where_the_box_does_not_do() -> None:
    def unasked() -> None:
        raise AssertionError

    assert place((1, 2, 3, 4), SIZE, unasked).origin == "box"
    assert mask_box_xyxy([], None, SIZE) is None
    assert mask_box_xyxy([], encode(rectangle(3, 4, 9, 8), True)["counts"], SIZE) == (3, 4, 9, 8)


def test_a_detector_that_finds_what_training_keeps_has_100(tmp_path: Path) -> None:
    boxes: list[tuple[list[float], Any]] = [
        ([2, 2, 12, 10], encode(rectangle(2, 2, 14, 12), True)),
        ([0, 0, 0, 0], encode(rectangle(20, 10, 50, 40), True)),
        ([200, 200, 10, 10], [[200, 200, 210, 200, 210, 210]]),
        ([5, 5, 0, 0], None),
    ]
    files = coco(tmp_path, *(annotation(number, *each) for number, each in enumerate(boxes)))
    results = [
        {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        | {"segmentation": encode(rectangle(*(int(v) for v in (x0, y0, x1, y1))), True)}
        for (x0, y0, x1, y1), crowd in trained_objects(files).values()
        if not crowd
    ]
    on_the_region = {**results[0], "bbox": [4.6, 4.6, 0.8, 0.8], "score": 0.9}
    on_the_region["segmentation"] = encode(rectangle(5, 5, 5, 5), True)
    names = ("cat", "dog", "bird", "fish")
    metrics = evaluate_detections(files.annotations, results, class_names=names, image_ids=[1])
    assert metrics.segm is not None
    assert (metrics.bbox.groups["all"]["AP"], metrics.segm.groups["all"]["AP"]) == (100, 100)
    assert metrics.instances["cat"] == 2
    assert metrics.placed == {"mask": 1, "region": 2}
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    words = "3 annotations have boxes without area in the image: 1 count with the box of their mask, 2 are ignored"
    assert describe_placed(metrics.placed) == words
    boxes_only = evaluate_detections(
        files.annotations, [*results, on_the_region], class_names=names, image_ids=[1]
    ).bbox.groups["all"]["AP"]
    assert boxes_only == 100, "a detection in an ignored region is neither right nor wrong"


def test_a_file_without_such_boxes_records_nothing(tmp_path: Path) -> None:
    files = coco(tmp_path, annotation(1, [1, 2, 3, 4], [SQUARE]))
    metrics = evaluate_detections(files.annotations, [], class_names=("cat", "dog", "bird", "fish"), image_ids=[1])
    assert metrics.placed is None
    assert "placed" not in metrics.to_dict()


def test_counts_are_said_at_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = coco(
        tmp_path,
        annotation(1, [0, 0, 0, 0], [SQUARE]),
        annotation(2, [0, 0, 0, 0]),
        annotation(3, [200, 0, 9, 9]),
        annotation(4, [70, 0, 30, 9]),
    )
    said = (
        "ignored: 1 x box lies outside the image, 1 x box has no area; mended: 1 x box has no area in the image, the "
        "mask's is taken; clipped: 1 x box reaches over the edge of the image; `semiseg data check` lists them"
    )
    for _ in range(2):  # the second time from the cache
        table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
        assert table.notices() == [f"{files.annotations}: {said}"]
        monkeypatch.setattr("semiseg.data.table._convert", print)
    report = check_annotations(files.annotations, None)
    kinds = [Kind.BOX_OUTSIDE, Kind.BOX_NO_AREA, Kind.BOX_OF_MASK, Kind.BOX_CLIPPED]
    assert [finding.kind for finding in report.findings if finding.kind in kinds] == kinds
    assert report.contents == {"images": 1, "classes": 4, "with mask": 1, "box only": 1, "crowd": 1}


def test_pseudo_masks_find_an_object_whose_box_is_its_masks(tmp_path: Path) -> None:
    """The file itself as the file of pseudo masks, as some labelling tools export it: no box, good outlines."""
    files = coco(tmp_path, annotation(1, [0, 0, 0, 0], [SQUARE]), annotation(2, [60, 40, 0, 0]))
    table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    found = load_pseudo(files.annotations, table, cache=tmp_path / "arrow")
    assert found.of(0).keys() == {1}
    renumbered = tmp_path / "other.json"
    renumbered.write_text(json.dumps({**files.content, "annotations": [annotation(9, [0, 0, 0, 0], [SQUARE])]}))
    assert load_pseudo(renumbered, table, cache=tmp_path / "arrow").of(0).keys() == {1}


# classes -------------------------------------------------------------------------------------------------------------

GROUP = {"id": 0, "name": "things", "supercategory": "none"}
CAT, DOG = ({"id": number, "name": name, "supercategory": "things"} for number, name in ((1, "cat"), (2, "dog")))


@pytest.mark.parametrize(
    ("categories", "used", "expected"),
    [
        ([GROUP, CAT, DOG], {1, 2}, [0]),
        ([CAT, DOG, GROUP], {1}, [2]),
        ([GROUP, CAT, DOG], {0, 1, 2}, []),  # a class of its own after all
        ([GROUP, {**CAT, "name": "things"}], {1}, [0]),  # of the same name as the only class
        ([{**CAT, "supercategory": "cat"}, DOG], {2}, []),  # its own supercategory, as COCO's person
        ([{**GROUP, "name": " things"}, CAT], {1}, [0]),
        (
            [GROUP, {**GROUP, "id": 5, "name": "cats", "supercategory": "things"}, {**CAT, "supercategory": "cats"}],
            {1},
            [0, 1],
        ),
        ([{**CAT, "supercategory": "dog"}, {**DOG, "supercategory": "cat"}], set(), []),  # never all
        ([GROUP, {"id": 1, "name": "cat"}, None, {"id": 2}], {1}, []),
    ],
)
def test_groupings_are_no_classes(categories: list[Any], used: set[int], expected: list[int]) -> None:
    assert groupings(categories, used) == expected


def test_training_and_evaluation_have_the_same_classes(tmp_path: Path) -> None:
    files = coco(tmp_path, annotation(1, [20, 10, 30, 30], [SQUARE]))
    files.rewrite(lambda content: content.update(categories=[GROUP, CAT, DOG]))
    table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (1, 2))
    assert table.notices() == [f"{files.annotations}: no classes, only supercategories of others: things"]
    assert table.classes_without_objects() == ["dog"]
    metrics = evaluate_detections(files.annotations, [], class_names=table.class_names, image_ids=[1])
    assert metrics.instances == {"cat": 1, "dog": 0}
    report = check_annotations(files.annotations, None)
    assert [finding.kind for finding in report.findings] == [Kind.GROUPING, Kind.CLASS_EMPTY]
    assert report.errors == ()


def test_what_groups_others_in_one_file_may_be_a_class_of_another(tmp_path: Path) -> None:
    """The parent of a hierarchy, of which the validation images happen to show none."""
    categories, entry = [{**GROUP, "id": 3}, CAT], annotation(1, [20, 10, 30, 30], [SQUARE])
    train = coco(tmp_path / "train", entry, annotation(2, [3, 3, 9, 9], category_id=3))
    val = coco(tmp_path / "val", entry)
    for files in (train, val):
        files.rewrite(lambda content: content.update(categories=categories))
    paths = {f"{name}_{kind}": f"{name}/{file}" for name in ("train", "val") for kind, file in FILES.items()}
    config = tiny_config(
        tmp_path,
        data={"format": "coco", "root": str(tmp_path), **paths},
        supervision={"source": "masks", "split": None},
    )
    data = build_data(config)
    assert data.train.class_names == data.val.class_names == ("cat", "things")
    assert class_names(config.data) == ("cat", "things")
    metrics = evaluate_detections(val.annotations, [], class_names=data.val.class_names, image_ids=[1])
    assert metrics.instances == {"cat": 1, "things": 0}


FILES = {"images": "images", "annotations": "instances.json"}


def test_what_refers_to_a_refused_entry_is_not_judged_again(tmp_path: Path) -> None:
    entries = [annotation(number, [1, 2, 30, 40], [SQUARE], category_id=1 + number % 2) for number in range(15)]
    files = coco(tmp_path, *entries, annotation(99, [1, 2, 3, 4], image_id=2), annotation(98, [1, 2, 3, 4], image_id=9))

    def change(content: dict[str, Any]) -> None:
        content["categories"] = [CAT, {**DOG, "name": "cat"}]
        content["images"].append({"id": 2, "file_name": "2.png", "height": 0, "width": 4})

    files.rewrite(change)
    report = check_annotations(files.annotations, None)
    found = {finding.kind: finding.count for finding in report.errors}
    assert found == {Kind.CATEGORY_NAME_TWICE: 1, Kind.IMAGE: 1, Kind.UNKNOWN_IMAGE: 1}
    everything = files.rewrite(lambda content: content.update(categories=[{"id": 1, "name": ""}]))
    kinds = [finding.kind for finding in check_annotations(everything.annotations, None).findings]
    assert Kind.NO_OBJECTS not in kinds, "they are there"


# crowd regions -------------------------------------------------------------------------------------------------------


def crowded(folder: Path, *, crowd: int, others: int) -> CocoFiles:
    """Objects with outlines, and crowd regions as labelling tools export what was drawn by brush."""
    mask = encode(rectangle(3, 4, 20, 30), compressed=False)
    entries = [annotation(number, [20, 10, 30, 30], [SQUARE]) for number in range(others)]
    entries += [annotation(others + number, [3, 4, 17, 26], mask, iscrowd=1) for number in range(crowd)]
    return coco(folder, *entries, class_names=("cat",))


@pytest.mark.parametrize(("crowd", "others", "said"), [(1, 3, False), (2, 38, False), (2, 37, True), (11, 4, True)])
def test_many_crowd_regions_are_said(tmp_path: Path, crowd: int, others: int, said: bool) -> None:
    files = crowded(tmp_path, crowd=crowd, others=others)
    table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    report = check_annotations(files.annotations, None)
    assert [finding.kind for finding in report.findings] == [Kind.CROWDS] * said
    notices = table.notices()
    assert len(notices) == said
    for text in [*notices, *(finding.examples[0] for finding in report.findings)]:
        assert f"{crowd} of {crowd + others} annotations" in text
        assert "drawn by brush" in text
        assert "data.crowds = 'objects'" in text


def test_crowd_regions_can_be_objects(tmp_path: Path) -> None:
    files = crowded(tmp_path, crowd=3, others=2)
    cache = tmp_path / "arrow"
    meanings: list[tuple[Crowds, int]] = [("ignore", 2), ("objects", 5), ("ignore", 2)]
    for crowds, objects in meanings:
        table = load_table(files.annotations, files.images, cache=cache, crowds=crowds)
        assert table.count_objects() == (objects, 0)
        assert bool(table.notices()) == (crowds == "ignore")
        metrics = evaluate_detections(
            files.annotations,
            [],
            class_names=("cat",),
            image_ids=[1],
            crowds=table.crowds,
            fingerprint=table.fingerprint,
        )
        assert metrics.instances == {"cat": objects}
    assert table.object_fingerprint == table.fingerprint
    region = coco(tmp_path / "region", annotation(1, [5, 5, 0, 0], iscrowd=1), class_names=("cat",))
    other = load_table(region.annotations, region.images, cache=cache, crowds="objects")
    assert other.count_objects() == (0, 0), "what has no place is no object"
    assert other.object_fingerprint != other.fingerprint


def test_a_file_of_crowd_regions_alone_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = crowded(tmp_path / "a", crowd=3, others=0)
    paths = {f"{name}_{kind}": file for name in ("train", "val") for kind, file in FILES.items()}
    data = {"format": "coco", "root": str(tmp_path / "a"), **paths}
    config = tiny_config(tmp_path, data=data, supervision={"source": "masks", "split": None})
    with pytest.raises(UserError, match=r"no objects to learn from; .* 3 of 3 annotations .*data\.crowds = 'objects'"):
        execute_run(config, out=tmp_path / "run", progress=False)
    assert files.annotations.is_file()
    chosen = tiny_config(tmp_path, data={**data, "crowds": "objects"}, supervision={"source": "masks", "split": None})
    assert build_data(chosen).train.count_objects() == (3, 0)
    assert chosen.identity() != config.identity()
    assert "crowds" not in config.identity()["data"], "recorded runs keep theirs"


# images under other names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "named", "remedy"),
    [
        ("a.png", "images\\a.png", "'file_name' is to be 'a.png', not 'images\\\\a.png'"),
        ("a.png", "..\\..\\media\\4\\a.png", "'file_name' is to be 'a.png'"),
        ("a.png", "C:\\Users\\me\\a.png", "'file_name' is to be 'a.png'"),
        ("a.png", "/home/other/a.png", "'file_name' is to be 'a.png'"),
        ("a.png", "https://host/x/a.png?token=1", "'file_name' is to be 'a.png'"),
        ("my a.png", "my%20a.png", "'file_name' is to be 'my a.png'"),
        ("my a.png", "x%5Cmy%20a.png", "'file_name' is to be 'my a.png'"),
        ("sub/a.png", "a.png", "for {images}/sub as the folder of images"),
        ("sub/a.png", "other/a.png", "'file_name' is to be 'sub/a.png', not 'other/a.png'"),
        ("a.png", "images/a.png", "for {images.parent} as the folder of images (data.train_images"),
        ("../val/a.png", "a.png", "for {images.parent}/val as the folder of images"),
        ("../val/a.png", "b\\a.png", "are in {images.parent}/val: name that as the folder of images"),
        ("A.PNG", "a.png", "'file_name' is to be 'A.PNG'"),
        ("a.jpg", "a.png", "'file_name' is to be 'a.jpg'"),
        (unicodedata.normalize("NFD", "\u00e9.png"), "\u00e9.png", "'file_name' is to be"),
    ],
)
def test_images_are_looked_for_by_their_base_names(tmp_path: Path, stored: str, named: str, remedy: str) -> None:
    files = coco(tmp_path, annotation(1, [1, 2, 3, 4]))
    (files.images / stored).parent.mkdir(exist_ok=True)
    (files.images / "001.png").rename(files.images / stored)
    files.rewrite(lambda content: content["images"][0].update(file_name=named))
    with pytest.raises(UserError) as caught:
        load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    remedy = remedy.format(images=files.images)
    for text in (str(caught.value), check_annotations(files.annotations, files.images).render()):
        assert remedy in text
        assert "unpack their archive" not in text


def test_the_folder_that_shares_most_is_meant(tmp_path: Path) -> None:
    for name in ("images/a/1.png", "images/b/1.png", "images/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = where_instead(tmp_path / "images", ["x\\b\\1.png", "x\\b\\2.png", "x\\b\\3.png"])
    assert found is not None
    assert found.startswith("2 of them are there under another name: 'file_name' is to be 'b/1.png'")
    assert where_instead(tmp_path / "images", ["9.png"]) is None


# box, mask and area --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def boxes_as(change: Callable[[float, float, float, float], list[float]]) -> Change:
    def changed(entry: dict[str, Any]) -> None:
        entry["bbox"] = change(*entry["bbox"])

    return changed


def without_masks(change: Change) -> Change:
    def changed(entry: dict[str, Any]) -> None:
        change(entry)
        del entry["segmentation"]

    return changed


def all_shares(entry: dict[str, Any]) -> None:
    entry["bbox"] = shares(*entry["bbox"])
    entry["segmentation"] = [[v / (64 if i % 2 else 80) for i, v in enumerate(entry["segmentation"][0])]]


def shares(x: float, y: float, w: float, h: float) -> list[float]:
    return [x / 80, y / 64, w / 80, h / 64]


def corners(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y + h]


def centres(x: float, y: float, w: float, h: float) -> list[float]:
    return [x + w / 2, y + h / 2, w, h]


def area_as(area: Callable[[dict[str, Any]], float]) -> Change:
    return lambda entry: entry.update(area=area(entry))


def rounded(entry: dict[str, Any]) -> None:
    entry["bbox"] = [float(int(v)) for v in entry["bbox"]]
    entry["area"] = round(entry["area"] * 1.03)


@pytest.mark.parametrize(
    ("change", "remarks"),
    [
        (lambda entry: None, {}),
        (lambda entry: entry.pop("area"), {}),
        (rounded, {}),
        (without_masks(lambda entry: None), {}),
        (all_shares, {"boxes": "no number of the boxes and outlines is above 1"}),
        (boxes_as(shares), {"boxes": "as [x, y, width, height] in shares of the image (0..1) 12 of them"}),
        (
            boxes_as(lambda *b: [100 * v for v in shares(*b)]),
            {"boxes": "as [x, y, width, height] in per cent (0..100)"},
        ),
        (boxes_as(lambda *b: shares(*corners(*b))), {"boxes": "as [x0, y0, x1, y1] in shares of the image (0..1)"}),
        (boxes_as(corners), {"boxes": "12 of 12 boxes are not those of their masks: as [x0, y0, x1, y1] in pixels 12"}),
        (boxes_as(centres), {"boxes": "as [centre x, centre y, width, height] in pixels 12 of them"}),
        (boxes_as(lambda x, y, w, h: [y, x, y + h, x + w]), {"boxes": "as [y0, x0, y1, x1] in pixels 12 of them"}),
        (boxes_as(lambda x, y, w, h: [1, 1, 70, 60]), {"boxes": "no convention fits them"}),
        (without_masks(boxes_as(shares)), {"boxes": "no number of the boxes is above 1"}),
        (without_masks(boxes_as(corners)), {"boxes": "and as [x0, y0, x1, y1] none would"}),
        (without_masks(boxes_as(centres)), {"boxes": "and as [centre x, centre y, width, height] none would"}),
        (area_as(lambda entry: 0), {"areas": "12 of 12 'area' are not those of the masks or boxes: they are 0;"}),
        (area_as(lambda entry: entry["bbox"][2] * entry["bbox"][3]), {"areas": "they are their boxes'"}),
        (area_as(lambda entry: entry["area"] / 64 / 80), {"areas": "they are shares of the image (0..1)"}),
        (without_masks(area_as(lambda entry: 0)), {"areas": "they are 0"}),
    ],
)
def test_what_does_not_measure_one_thing_is_said_with_what_would_fit(
    tmp_path: Path, change: Change, remarks: dict[str, str]
) -> None:
    entries = []
    for number in range(12):
        x, y, w, h = 4 + 5 * number % 48, 3 + 7 * number % 36, 14 + number, 12 + number
        octagon = [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)]
        outline = [v for fx, fy in octagon for v in (x + fx * w, y + fy * h)]
        entries.append(annotation(number, [x, y, w, h], [outline], area=0.82 * w * h))
        change(entries[-1])
    shown = tmp_path / "annotations"
    files = coco(shown, *entries, class_names=("cat",))
    table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    assert table.remarks.keys() == remarks.keys()
    report = check_annotations(files.annotations, None)
    examples = [each for finding in report.findings if finding.kind == Kind.MEASURES for each in finding.examples]
    assert len(examples) == len(remarks)
    for what, text in remarks.items():
        assert text in table.remarks[what]
        assert any(text in example for example in examples)
    assert [finding.kind for finding in report.findings if finding.kind == Kind.NO_OBJECTS] == []


def test_masks_as_rle_tell_the_same(tmp_path: Path) -> None:
    mask = encode(rectangle(40, 30, 70, 60), compressed=True)
    fine, corner = ([40, 30, 30, 30], 900), ([40, 30, 70, 60], 900)
    for given, words in ((fine, None), (corner, "as [x0, y0, x1, y1] in pixels 4 of them")):
        files = coco(tmp_path, *(annotation(number, given[0], mask, area=given[1]) for number in range(4)))
        remarks = load_table(files.annotations, files.images, cache=tmp_path / "arrow").remarks
        assert (remarks == {}) == (words is None)
        assert words is None or words in remarks["boxes"]


def test_a_run_says_it_in_one_warning(tmp_path: Path) -> None:
    entries = [annotation(number, [40, 30, 70, 60], [[40, 30, 70, 30, 70, 60, 40, 60]], area=0) for number in range(4)]
    files = coco(tmp_path / "a", *entries, class_names=("cat",))
    table = load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    data = tiny_config(tmp_path, data={"format": "coco"}).data
    with pytest.warns(UserNotice) as caught:
        _warn_of_measures(data, learnt=table, measured=table)
    (warning,) = caught
    assert str(warning.message).count("as [x0, y0, x1, y1] in pixels 4") == 2
    assert str(warning.message).count("'area' are not those") == 1, "training reads none"
