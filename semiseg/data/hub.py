"""A data set of the Hugging Face Hub, or of its form on disk -> COCO json and image files, once.

Columns: `image`; `objects` with `bbox` (x, y, width, height), `category` and, where there are, `segmentation`,
`iscrowd`, `area`, `id`, as a struct of lists or as a list of structs; `image_id`, `width` and `height` where there are.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tqdm import tqdm

from semiseg.config.read import digest
from semiseg.data.coco import coco_file, image_records
from semiseg.data.images import open_image
from semiseg.data.problems import stop_at_errors
from semiseg.errors import UserError
from semiseg.files import settle, whole_folder
from semiseg.splits import normalise

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 1  # raised with every change of what is written
HUB_ROOT = Path("data/hub")
SOURCE_NAME = "source.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Formats of Pillow whose files are kept as they are; images of others are stored as PNG.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class _NotReachable(UserError):
    """The data set could not be loaded from the Hub."""


class _Split(NamedTuple):
    """Rows of a split; `class_names` are those of a `ClassLabel`, None without one."""

    rows: Dataset
    class_names: list[str] | None
    title: str  # for messages


def hub_folder(name: str) -> Path:
    """Where a data set's conversions lie: of `OWNER/NAME`, or of a folder, known by its path."""
    if not name.strip():  # as a path, the current folder
        raise UserError("data.root = 'hf:' names no data set, expected 'hf:OWNER/NAME' or 'hf:FOLDER'")
    folder = Path(name).expanduser()
    if folder.is_dir():
        path = folder.resolve()
        return HUB_ROOT / f"{path.name}-{digest(str(path), 8)}"
    return HUB_ROOT / name.replace("/", "--")


def converted_folder(name: str, *, train_split: str, val_split: str) -> Path:
    """The conversion that was used last; a path where nothing is if there is none. Nothing is made or loaded."""
    source = _source(name, train_split, val_split)
    conversions = []
    for path in hub_folder(name).glob(f"*/{SOURCE_NAME}"):
        with contextlib.suppress(OSError, ValueError):  # not ours
            if json.loads(path.read_text(encoding="utf-8")) == source:
                conversions.append((path.stat().st_mtime_ns, path.parent))
    return max(conversions)[1] if conversions else hub_folder(name) / "not-converted"


def ensure_hub(name: str, *, train_split: str, val_split: str) -> Path:
    """The folder of a data set in COCO form: `train.json`, `train/`, `val.json`, `val/`; converted on first use.

    A data set with another fingerprint is converted anew. Where the Hub cannot be reached, the conversion that was
    used last serves, with a warning. Several processes may convert at once: the first to finish is kept.
    The name is `OWNER/NAME`, or a folder: what `datasets.load_dataset` reads, or what `save_to_disk` wrote; splits may
    be parts such as `train[:90%]`.
    """
    conversions = hub_folder(name)
    try:
        loaded = _load(name)
    except _NotReachable as error:
        folder = converted_folder(name, train_split=train_split, val_split=val_split)
        if not folder.is_dir():
            raise
        logger.warning("%s; the conversion in %s is used", error, folder)
        return folder
    splits = {}
    for kind, spec in (("train", train_split), ("val", val_split)):
        rows, title = _part(loaded, spec, f"{kind}_split", name), f"hf:{name}, split {spec!r}"
        splits[kind] = _Split(rows, _class_names(rows.features, title), title)
    folder = conversions / digest([CONVERTER_VERSION, *(split.rows._fingerprint for split in splits.values())], 16)
    settle(conversions)
    if not folder.is_dir():
        with whole_folder(folder) as temporary:
            _convert(splits, temporary)
            source = json.dumps(_source(name, train_split, val_split))
            (temporary / SOURCE_NAME).write_text(source, encoding="utf-8")
    with contextlib.suppress(OSError):  # a folder that only others may write
        os.utime(folder / SOURCE_NAME)
    return folder


def _source(name: str, train_split: str, val_split: str) -> dict[str, Any]:
    """What a conversion was made from, as its folder records it."""
    return {"name": name, "train_split": train_split, "val_split": val_split, "converter": CONVERTER_VERSION}


def _load(name: str) -> Mapping[str, Dataset]:
    """All splits by name; a single table that `save_to_disk` wrote is the split `train`."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise UserError(f"hf:{name}: no such folder, and no name on the Hub, which has the form OWNER/NAME")
    try:
        if any((folder / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # readers of many formats, with exceptions of their own, behind a network with others
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if folder.is_dir():
            raise UserError(f"hf:{name}: cannot be read: {reason}") from None
        raise _NotReachable(
            f"hf:{name}: no such folder, and not loaded from the Hub ({reason}); without network, get it elsewhere "
            f"with 'hf download {name} --repo-type dataset --local-dir FOLDER' and set data.root = 'hf:FOLDER'"
        ) from None
    splits: Mapping[str, Dataset] = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    return splits


def _part(loaded: Mapping[str, Dataset], spec: str, key: str, name: str) -> Dataset:
    """The rows of a split or of a part of one."""
    try:
        lengths = {split: len(rows) for split, rows in loaded.items()}
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        pieces = [loaded[part.splitname].select(range(part.from_, part.to)) for part in parts]
        rows = datasets.concatenate_datasets(pieces)
    except (ValueError, AssertionError):
        allowed = f"{', '.join(loaded)}, or a part such as 'train[:90%]'"
        raise UserError(f"hf:{name}: data.hub.{key} is {spec!r}, allowed: {allowed}") from None
    if len(rows) == 0:
        raise UserError(f"hf:{name}: data.hub.{key} = {spec!r} has no rows")
    return rows


def _class_names(features: Features, title: str) -> list[str] | None:
    """The names of the `ClassLabel` of the objects, if that is their type."""
    for name in ("image", "objects"):
        if name not in features:
            raise UserError(f"{title}: no column {name!r}; there are: {', '.join(sorted(features))}")
    if not isinstance(features["image"], datasets.Image):
        raise UserError(f"{title}: the column 'image' is {features['image']}, expected Image")
    fields = getattr(features["objects"], "feature", features["objects"])  # of a list of structs, or a struct of lists
    category = fields.get("category") if isinstance(fields, dict) else None
    category = getattr(category, "feature", category)
    if not isinstance(category, ClassLabel) and category not in (Value("string"), Value("large_string")):
        raise UserError(f"{title}: the column 'objects.category' is {category}, expected ClassLabel or string")
    return list(category.names) if isinstance(category, ClassLabel) else None


def _convert(splits: Mapping[str, _Split], folder: Path) -> None:
    """Writes image files and json of each split.

    All splits have the same categories, with ids 1, 2, ...: of `ClassLabel` in its order, else all strings, sorted.
    """
    first = splits["train"]
    for split in splits.values():
        if split.class_names != first.class_names:
            raise UserError(f"{split.title}: its categories are not those of {first.title}")
    contents = {}
    for kind, split in splits.items():
        (folder / kind).mkdir()
        contents[kind] = _convert_split(split, folder / kind)
    names = first.class_names
    if names is None:
        names = sorted({item["category"] for _, items in contents.values() for item in items})
    if not names:
        raise UserError(f"{first.title}: no object has a category")
    ids = {name: number for number, name in enumerate(names, start=1)}
    for kind, (images, items) in contents.items():
        for item in items:
            category = item.pop("category")
            item["category_id"] = ids[category] if isinstance(category, str) else category + 1
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        content = {"annotations": items, "categories": categories, "images": images}
        report = stop_at_errors(splits[kind].title)
        for _ in image_records(coco_file(content, Path(kind), "", report), report=report):
            pass  # what a training would refuse is no conversion
        (folder / f"{kind}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _convert_split(split: _Split, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the images of a split into a folder; COCO's images, and annotations with a `category` without id."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rows = split.rows.cast_column("image", datasets.Image(decode=False))
    for index, row in enumerate(tqdm(rows, desc=split.title, unit=" images", delay=1, disable=None)):
        where = f"{split.title}, row {index}"
        images.append(_store_image(row, index + 1, folder, where))
        for item in _objects(row["objects"], where):
            annotations.append(_annotation(item, len(annotations) + 1, images[-1]["id"], split.class_names, where))
    return images, annotations


def _objects(objects: Any, where: str) -> list[dict[str, Any]]:
    """One dictionary per object, from either layout."""
    items = objects or []
    if isinstance(objects, dict):
        columns = {name: values for name, values in objects.items() if values is not None}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{where}: the lists of 'objects' differ in length: {lengths}")
        items = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: 'objects' is {items}, expected a struct of lists or a list of structs")
    return list(items)


def _annotation(
    item: Mapping[str, Any], number: int, image_id: int, class_names: list[str] | None, where: str
) -> dict[str, Any]:
    """COCO's form of an object, with a name or an index of `class_names` as `category`; what is null is left out."""
    category = item.get("category")
    if isinstance(category, str):
        category = normalise(category)
    elif category is None or class_names is None or not 0 <= category < len(class_names):
        allowed = f"0 to {len(class_names) - 1}" if class_names else "a name"
        raise UserError(f"{where}: 'objects.category' is {category}, allowed: {allowed}")
    segmentation = item.get("segmentation")
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if isinstance(counts, bytes):
            segmentation = {**segmentation, "counts": counts.decode("ascii", errors="replace")}
        if counts is None:  # a struct of nulls
            segmentation = None
    is_crowd = item.get("iscrowd") or 0
    annotation = {
        "id": item.get("id", number),
        "bbox": item.get("bbox"),
        "iscrowd": int(is_crowd) if isinstance(is_crowd, bool) else is_crowd,
    }
    if item.get("area") is not None:
        annotation["area"] = item["area"]
    if segmentation:
        annotation["segmentation"] = segmentation
    return {**annotation, "image_id": image_id, "category": category}


def _store_image(row: Mapping[str, Any], number: int, folder: Path, where: str) -> dict[str, Any]:
    """Writes the image's file with its own bytes where its format is known; COCO's entry of it.

    Pixels are taken as stored, without EXIF rotation, as everywhere.
    """
    image_id = row.get("image_id", number)
    if type(image_id) is not int:
        raise UserError(f"{where}: 'image_id' is {image_id!r}, expected an integer")
    stored = row["image"] or {}
    try:
        content = stored.get("bytes") or Path(stored.get("path") or "").read_bytes()
        with open_image(io.BytesIO(content)) as image:
            size, suffix = image.size, SUFFIXES.get(image.format or "")
            if suffix is None:
                suffix, buffer = "png", io.BytesIO()
                (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, format="PNG")
                content = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: the image cannot be read: {str(error) or type(error).__name__}") from None
    width, height = row.get("width", size[0]), row.get("height", size[1])
    if (width, height) != size:
        raise UserError(
            f"{where}: the image is {size[0]} x {size[1]} (width x height), but its columns say {width} x {height}; "
            "EXIF rotation is not applied"
        )
    name = f"{image_id:012d}.{suffix}"
    (folder / name).write_bytes(content)
    return {"id": image_id, "file_name": name, "width": size[0], "height": size[1]}
