"""Data sets of the Hub's form, as folders on disk: both layouts of `objects`, both ways of writing them."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from semiseg.config import DataConfig
from semiseg.data import hub
from semiseg.data.coco import image_records, read_coco
from semiseg.data.hub import ensure_hub
from semiseg.data.sources import cache_folder, ensure_files, expected_files
from semiseg.data.table import load_table
from semiseg.errors import UserError
from tests.coco_files import ellipse, encode, picture

HEIGHT, WIDTH = 24, 32
NAMES = ["zebra", "ant"]
POLYGON = [[2.0, 3.0, 12.5, 3.0, 12.5, 9.0]]
RLE = encode(ellipse(HEIGHT, WIDTH, box_xyxy=(4, 4, 20, 16)), compressed=True)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written or asked for outside the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(np.random.default_rng(number), HEIGHT, WIDTH)).save(buffer, format=kind)
    return buffer.getvalue()


def objects(number: int, category: Callable[[int], Any], segmentation: Any = POLYGON) -> list[dict[str, Any]]:
    """Number 0 has none; the others two, the second without a mask."""
    if number == 0:
        return []
    boxes = [[2.0, 3.0, 10.5, 6.0], [1.0 + number, 2.0, 5.0, 8.0]]
    return [
        {"bbox": box, "category": category(index), "segmentation": segmentation if index == 0 else None}
        for index, box in enumerate(boxes)
    ]


def features(category: Any, segmentation: Any, *, lists: bool, **others: Any) -> Features:
    fields = {"bbox": List(Value("float32"), length=4), "category": category, "segmentation": segmentation}
    layout = {name: List(field) for name, field in fields.items()} if lists else List(fields)
    return Features({"image": datasets.Image(), "objects": layout, **others})


def dataset(
    numbers: range,
    *,
    lists: bool = True,
    category: Any = None,
    value: Callable[[int], Any] = lambda index: index,
    segmentation: Any = None,
    mask: Any = POLYGON,
    kinds: tuple[str, ...] = ("PNG",),
) -> Dataset:
    """Rows with the given numbers; by default classes by number and masks as polygons."""
    rows = []
    for number in numbers:
        found: Any = objects(number, value, mask)
        if lists:
            found = {name: [item[name] for item in found] for name in ("bbox", "category", "segmentation")}
        image = {"bytes": encoded(number, kinds[number % len(kinds)]), "path": None}
        rows.append({"image": image, "objects": found})
    form = features(category or ClassLabel(names=NAMES), segmentation or List(List(Value("float32"))), lists=lists)
    return Dataset.from_list(rows, features=form)


def saved(train: Dataset, val: Dataset | None = None, name: str = "mine") -> str:
    """Writes the form of `save_to_disk`; the name is a folder of the current one."""
    DatasetDict({"train": train, "validation": val or dataset(range(2, 4))}).save_to_disk(name)
    return name


def converted(name: str, *, train_split: str = "train", val_split: str = "validation") -> Path:
    return ensure_hub(name, train_split=train_split, val_split=val_split)


@pytest.mark.parametrize("lists", [True, False])
def test_both_layouts_give_coco(lists: bool) -> None:
    rows = dataset(range(3), lists=lists, kinds=("PNG", "JPEG", "WEBP"))
    folder = converted(saved(rows, dataset(range(1), lists=lists)))
    content = json.loads((folder / "train.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "ant"}]
    assert [image["file_name"] for image in content["images"]] == [
        "000000000001.png", "000000000002.jpg", "000000000003.webp",
    ]  # fmt: skip
    assert all((image["height"], image["width"]) == (HEIGHT, WIDTH) for image in content["images"])
    assert content["annotations"][:2] == [
        {
            "id": 1, "image_id": 2, "category_id": 1, "iscrowd": 0, "bbox": [2.0, 3.0, 10.5, 6.0],
            "segmentation": POLYGON,
        },
        {"id": 2, "image_id": 2, "category_id": 2, "iscrowd": 0, "bbox": [2.0, 2.0, 5.0, 8.0]},
    ]  # fmt: skip
    assert [item["id"] for item in content["annotations"]] == [1, 2, 3, 4]
    # Files are the very bytes of the data set, lossy formats included.
    for number, image in enumerate(content["images"]):
        assert (folder / "train" / image["file_name"]).read_bytes() == encoded(number, ("PNG", "JPEG", "WEBP")[number])
    assert json.loads((folder / "val.json").read_text())["annotations"] == []
    records = list(image_records(read_coco(folder / "train.json")))
    assert [[item["has_mask"] for item in record["objects"]] for record in records] == [
        [],
        [True, False],
        [True, False],
    ]


def test_names_are_sorted_strings_of_both_splits() -> None:
    train = dataset(range(3), category=Value("string"), value=lambda index: ("wolf ", "cow")[index])
    val = dataset(range(3), category=Value("string"), value=lambda index: ("wolf", "ape")[index], lists=False)
    folder = converted(saved(train, val))
    for name, used in (("train", [3, 2, 3, 2]), ("val", [3, 1, 3, 1])):
        content = json.loads((folder / f"{name}.json").read_text())
        assert [item["name"] for item in content["categories"]] == ["ape", "cow", "wolf"]
        assert [item["category_id"] for item in content["annotations"]] == used


@pytest.mark.parametrize("counts", ["text", "bytes", "numbers"])
def test_masks_as_rle(counts: str) -> None:
    mask = encode(ellipse(HEIGHT, WIDTH, box_xyxy=(4, 4, 20, 16)), compressed=counts != "numbers")
    if counts == "bytes":
        mask = {**mask, "counts": mask["counts"].encode()}
    kind = {"text": Value("string"), "bytes": Value("binary"), "numbers": List(Value("int32"))}[counts]
    rows = dataset(range(2), segmentation={"size": List(Value("int32")), "counts": kind}, mask=mask)
    folder = converted(saved(rows))
    (record,) = [r for r in image_records(read_coco(folder / "train.json")) if r["objects"]]
    assert [item["rle_counts"] for item in record["objects"]] == [RLE["counts"].encode(), None]


def test_optional_columns_are_kept() -> None:
    form = {
        "bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=NAMES)),
        "iscrowd": List(Value("bool")), "area": List(Value("float32")), "id": List(Value("int64")),
    }  # fmt: skip
    rows = [
        {
            "image": {"bytes": encoded(0), "path": None}, "image_id": 77, "width": WIDTH, "height": HEIGHT,
            "objects": {
                "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1, 0], "iscrowd": [None, True], "area": [9.5, None],
                "id": [501, 12],
            },
        }
    ]  # fmt: skip
    numbers = {"image_id": Value("int64"), "width": Value("int32"), "height": Value("int32")}
    every = Features({"image": datasets.Image(), "objects": form, **numbers})
    folder = converted(saved(Dataset.from_list(rows, features=every)))
    content = json.loads((folder / "train.json").read_text())
    assert content["annotations"] == [
        {"id": 501, "image_id": 77, "category_id": 2, "iscrowd": 0, "bbox": [1, 2, 3, 4], "area": 9.5},
        {"id": 12, "image_id": 77, "category_id": 1, "iscrowd": 1, "bbox": [5, 6, 7, 8]},
    ]
    assert content["images"] == [{"id": 77, "file_name": "000000000077.png", "width": WIDTH, "height": HEIGHT}]


def test_images_of_other_formats_become_png() -> None:
    pixels = picture(np.random.default_rng(0), HEIGHT, WIDTH)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PPM")
    form = features(ClassLabel(names=NAMES), List(List(Value("float32"))), lists=False)
    rows = Dataset.from_list([{"image": {"bytes": buffer.getvalue(), "path": None}, "objects": []}], features=form)
    folder = converted(saved(rows))
    (path,) = (folder / "train").iterdir()
    assert path.suffix == ".png"
    assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_a_parquet_folder_and_parts_of_a_split() -> None:
    Path("tables").mkdir()
    dataset(range(4)).to_parquet("tables/train-00000.parquet")
    folder = converted("tables", train_split="train[:75%]", val_split="train[75%:]")
    ids = {name: len(json.loads((folder / f"{name}.json").read_text())["images"]) for name in ("train", "val")}
    assert ids == {"train": 3, "val": 1}
    assert (folder / "val" / "000000000001.png").read_bytes() == encoded(3)
    assert converted("tables", train_split="train[:75%]", val_split="train[75%:]") == folder
    dataset(range(5)).to_parquet("tables/train-00000.parquet")
    again = converted("tables", train_split="train[:75%]", val_split="train[75%:]")
    assert len(list((again / "train").iterdir())) == 4


def test_images_that_lie_beside_their_metadata() -> None:
    for name in ("train", "validation"):
        Path(f"pictures/{name}").mkdir(parents=True)
        lines = []
        for number in range(2):
            Path(f"pictures/{name}/{number}.jpg").write_bytes(encoded(number, "JPEG"))
            found = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cow"], "segmentation": [POLYGON]}
            lines.append(json.dumps({"file_name": f"{number}.jpg", "objects": found}))
        Path(f"pictures/{name}/metadata.jsonl").write_text("\n".join(lines))
    folder = converted("pictures")
    files = sorted((folder / "val").iterdir())
    assert [path.name for path in files] == ["000000000001.jpg", "000000000002.jpg"]
    assert {path.read_bytes() for path in files} == {encoded(0, "JPEG"), encoded(1, "JPEG")}


def test_converted_once_and_anew_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(dataset(range(3)))
    calls = []
    convert = hub._convert

    def counted(*given: Any) -> None:
        calls.append(given)
        convert(*given)

    monkeypatch.setattr(hub, "_convert", counted)
    first = converted(name)
    assert converted(name) == first
    assert len(calls) == 1
    config = DataConfig(root=f"hf:{name}")
    assert expected_files(config)["val"].annotations == first / "val.json"
    os.rename(name, "elsewhere")
    saved(dataset(range(2)), name=name)
    second = converted(name)
    assert second != first
    assert len(calls) == 2
    assert expected_files(config)["train"] == (second / "train.json", second / "train")
    os.rename(name, "third")
    os.rename("elsewhere", name)  # the older one is back, and its conversion is the one that is meant
    assert converted(name) == first
    assert expected_files(config)["val"].images == first / "val"
    assert len(calls) == 2


def test_as_a_source_it_is_like_coco() -> None:
    config = DataConfig(root=f"hf:{saved(dataset(range(3)))}")
    assert not expected_files(config)["train"].annotations.exists()
    assert not Path("data").exists()
    files = ensure_files(config)
    assert files == expected_files(config)
    table = load_table(*files["train"], cache=cache_folder(config))
    assert table.class_names == ("zebra", "ant")
    assert len(table) == 3
    assert not Path("hf:mine").exists()
    assert cache_folder(config).parent == files["val"].images.parent.parent
    assert list(cache_folder(config).iterdir())


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(dataset(range(3)))

    def interrupted(*_given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_annotation", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(name)
    (place,) = Path("data/hub").iterdir()
    assert list(place.iterdir()) == []
    assert converted(name).is_dir()


def test_without_network(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"train": dataset(range(2)), "validation": dataset(range(2))}

    def reachable(name: str) -> Any:
        assert name == "someone/things"
        return rows

    def unreachable(name: str) -> Any:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    told = r"someone/things.*Couldn't reach.*--local-dir FOLDER.*data\.root = 'hf:FOLDER'"
    with pytest.raises(UserError, match=told):
        converted("someone/things")
    monkeypatch.setattr(datasets, "load_dataset", reachable)
    folder = converted("someone/things")
    assert folder.parent == Path("data/hub/someone--things")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with caplog.at_level(logging.WARNING):
        assert converted("someone/things") == folder
    assert "is used" in caplog.text
    with pytest.raises(UserError, match="Couldn't reach"):
        converted("someone/things", val_split="train")  # never converted like this


def test_bad_names_and_splits() -> None:
    name = saved(dataset(range(2)))
    for wrong, told in (
        ("nowhere", "no such folder, and no name on the Hub, which has the form OWNER/NAME"),
        ("a/b/c", "no such folder"),
    ):
        with pytest.raises(UserError, match=told):
            converted(wrong)
    with pytest.raises(UserError, match=r"data\.hub\.val_split is 'test', allowed: train, validation, or a part"):
        converted(name, val_split="test")
    with pytest.raises(UserError, match=r"'train\[5%' is|is 'train\[5%'"):
        converted(name, train_split="train[5%")
    with pytest.raises(UserError, match="has no rows"):
        converted(name, train_split="train[:0]")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="hf:empty: cannot be read"):
        converted("empty")
    for look in (ensure_files, expected_files, cache_folder):
        for root in ("hf:", "hf: "):
            with pytest.raises(UserError, match=r"data\.root = 'hf:' names no data set, expected 'hf:OWNER/NAME'"):
                look(DataConfig(root=root))
    with pytest.raises(UserError, match=r"needs data\.format = 'coco', not 'voc'"):
        ensure_files(DataConfig(root="hf:mine", format="voc"))


def renamed(rows: Dataset, **names: str) -> Dataset:
    return rows.rename_columns(names)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (lambda: renamed(dataset(range(2)), image="picture"), "no column 'image'; there are: objects"),
        (lambda: renamed(dataset(range(2)), objects="things"), "no column 'objects'; there are: image, things"),
        (lambda: dataset(range(2)).remove_columns("image").add_column("image", ["a", "b"]), "'image' is Value.*Image"),
        (lambda: dataset(range(2), category=Value("int64")), "'objects.category' is Value.*ClassLabel or string"),
        (
            lambda: dataset(range(2), segmentation=Value("string"), mask="x"),
            "annotation 1: the mask is .*polygons",
        ),
        (lambda: dataset(range(2)).add_column("image_id", ["a", "b"]), "row 0: 'image_id' is 'a', expected an integer"),
        (lambda: dataset(range(2)).add_column("image_id", [3, 3]), r"images\[1\]: image id 3 .*is used twice"),
        (lambda: dataset(range(2)).add_column("image_id", [3, None]), "row 1: 'image_id' is None, expected an integer"),
        (
            lambda: dataset(range(2)).add_column("width", [HEIGHT] * 2).add_column("height", [WIDTH] * 2),
            "row 0: the image is 32 x 24 .*, but its columns say 24 x 32",
        ),
        (lambda: dataset(range(2), value=lambda index: None), "row 1: 'objects.category' is None"),
        (lambda: dataset(range(3), category=ClassLabel(names=["ant", "zebra"])), "its categories are not those of"),
    ],
)
def test_bad_columns_and_rows_are_one_sentence(rows: Callable[[], Dataset], told: str) -> None:
    name = saved(rows())
    with pytest.raises(UserError, match=f"hf:mine.*{told}"):
        converted(name)
    assert not list(Path("data").glob("hub/*/*"))


def test_lists_of_different_length() -> None:
    rows = dataset(range(2)).to_list()
    rows[1]["objects"]["category"].pop()
    form = dataset(range(1)).features
    with pytest.raises(UserError, match=r"row 1: the lists of 'objects' differ in length: .*'bbox': 2, 'category': 1"):
        converted(saved(Dataset.from_list(rows, features=form)))


def test_a_damaged_image() -> None:
    rows = dataset(range(2)).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[1]["image"]["bytes"] = b"no image"
    form = dataset(range(1)).features
    with pytest.raises(UserError, match="row 1: the image cannot be read"):
        converted(saved(Dataset.from_list(rows, features=form)))
