"""COCO json <-> records: the COCO boundary. COCO's ids and xywh boxes exist only here and in `evaluation/`.

Labels are 0..C-1 in the order of the category ids. Names compare after NFC and trimming.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from semiseg.data.problems import BadValue, Kind, Problem, Reporter, stop_at_errors
from semiseg.data.segmentations import is_finite, read_segmentation
from semiseg.errors import UserError
from semiseg.splits import normalise

SECTIONS = ("images", "annotations", "categories")
NO_ANNOTATIONS = f"no list 'annotations'; needed: {', '.join(SECTIONS)}"
LARGEST_ID = 2**63 - 1  # ids are stored as int64
LARGEST_SIDE = 2**31 - 1
ROUNDING = 0.02  # px: COCO writes two decimals, so a box at the edge may reach over it by this much unreported
SMALLEST_SIDE = 1e-3  # px: a box thinner than this has no area


@dataclass(frozen=True)
class CocoFile:
    """A parsed instances file whose ids are known to be unique and to refer to each other.

    Attributes:
        path: the json file.
        digest: hex SHA-256 of its bytes.
        class_names: name of each label.
        category_ids: COCO's category id of each label, ascending.
        images: the raw image entries in the file's order.
        annotations: the raw annotations of each image id in the file's order; images without any are absent.
        annotated: false if the file has no list `annotations` at all, as COCO's `image_info_test-dev2017.json`.
    """

    path: Path
    digest: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    annotated: bool = True


def read_coco(path: Path, *, report: Reporter | None = None, annotations_required: bool = True) -> CocoFile:
    """Reads an instances file; entries with a problem are reported and left out.

    Args:
        path: COCO instances json.
        report: told every problem; by default the first error is raised as `UserError`.
        annotations_required: false takes a file without the list `annotations` for one of images to be predicted.

    Raises:
        UserError: the file is missing, not JSON, or lacks a section, whatever the reporter.
    """
    report = report or stop_at_errors(path)
    raw, digest = _parse(path, SECTIONS if annotations_required else ("images", "categories"))
    annotated = "annotations" in raw
    categories = _categories(raw["categories"], report)
    images = _images(raw["images"], report)
    known_images = {image["id"] for image in images}
    annotations = _annotations(raw.get("annotations", []), known_images, frozenset(categories), report)
    category_ids = tuple(sorted(categories))
    class_names = tuple(categories[category_id] for category_id in category_ids)
    return CocoFile(path, digest, class_names, category_ids, images, annotations, annotated)


def image_records(coco: CocoFile, *, report: Reporter | None = None) -> Iterator[dict[str, Any]]:
    """Yields one record per image in the form of `table.FEATURES`; annotations with a problem are reported.

    Boxes become xyxy pixels of the stored image, clipped to it; RLE becomes its compressed form. An annotation whose
    `segmentation` is absent, null, [] or {} has no mask, which is not an empty mask.
    """
    report = report or stop_at_errors(coco.path)
    label_of = {category_id: label for label, category_id in enumerate(coco.category_ids)}
    for image in coco.images:
        objects = []
        for annotation in coco.annotations.get(image["id"], ()):
            place = f"annotation {annotation['id']}"
            try:
                box = _box(annotation.get("bbox"), image, place, report)
                polygons, rle_counts = read_segmentation(
                    annotation.get("segmentation"), size_hw=(image["height"], image["width"])
                )
            except BadValue as bad:
                report(bad.at(place))
                continue
            objects.append(
                {
                    "annotation_id": annotation["id"],
                    "label": label_of[annotation["category_id"]],
                    "box_xyxy": box,
                    "is_crowd": bool(annotation.get("iscrowd", 0)),
                    "has_mask": bool(polygons) or rle_counts is not None,
                    "polygons": polygons,
                    "rle_counts": rle_counts,
                }
            )
        yield {
            "image_id": image["id"],
            "file_name": image["file_name"],
            "height": image["height"],
            "width": image["width"],
            "objects": objects,
        }


def _parse(path: Path, needed: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The json's content and the digest of its bytes; every section of `needed` is there, and each one is a list."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        raw = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON: no text that a JSON reader understands") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected an object with {', '.join(SECTIONS)}, not {_kind_of(raw)}")
    missing = [name for name in SECTIONS if not isinstance(raw.get(name, None if name in needed else []), list)]
    if missing:
        raise UserError(f"{path}: no list {' and no list '.join(map(repr, missing))}; needed: {', '.join(SECTIONS)}")
    for name in ("images", "categories"):
        if not raw[name]:
            raise UserError(f"{path}: the list {name!r} is empty")
    return raw, hashlib.sha256(content).hexdigest()


def _categories(entries: list[Any], report: Reporter) -> dict[int, str]:
    """Category id -> name, in the file's order."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        place = f"categories[{index}]"
        try:
            number = _integer(entry, "id", Kind.CATEGORY)
            name = normalise(_text(entry, "name", Kind.CATEGORY))
            if number in names:
                _bad(Kind.CATEGORY_ID_TWICE, f"category id {number} ({name!r}) is already that of {names[number]!r}")
            if name in names.values():
                _bad(Kind.CATEGORY_NAME_TWICE, f"category name {name!r} is used twice (compared after NFC and trim)")
        except BadValue as bad:
            report(bad.at(place))
            continue
        names[number] = name
    return names


def _images(entries: list[Any], report: Reporter) -> list[dict[str, Any]]:
    images, known = [], set()
    for index, entry in enumerate(entries):
        try:
            number = _integer(entry, "id", Kind.IMAGE)
            if "\0" in _text(entry, "file_name", Kind.IMAGE):
                _bad(Kind.IMAGE, f"'file_name' is {_shown(entry['file_name'])}, allowed: a file name")
            for side in ("height", "width"):
                if not 0 < _integer(entry, side, Kind.IMAGE) <= LARGEST_SIDE:
                    _bad(Kind.IMAGE, f"{side!r} is {entry[side]}, allowed: a positive number of pixels")
            if number in known:
                _bad(Kind.IMAGE_ID_TWICE, f"image id {number} ({entry['file_name']}) is used twice")
        except BadValue as bad:
            report(bad.at(f"images[{index}]"))
            continue
        known.add(number)
        images.append(entry)
    return images


def _annotations(
    entries: list[Any], known_images: set[int], known_categories: frozenset[int], report: Reporter
) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = {}
    known: set[int] = set()
    for index, entry in enumerate(entries):
        place = f"annotations[{index}]"
        try:
            number = _integer(entry, "id", Kind.ANNOTATION)
            place = f"annotation {number}"
            if number in known:
                _bad(Kind.ANNOTATION_ID_TWICE, f"annotation id {number} is used twice")
            known.add(number)
            if (image_id := _integer(entry, "image_id", Kind.ANNOTATION)) not in known_images:
                _bad(Kind.UNKNOWN_IMAGE, f"image_id {image_id} is not in 'images'")
            if (category_id := _integer(entry, "category_id", Kind.ANNOTATION)) not in known_categories:
                allowed = _shown(sorted(known_categories))
                _bad(Kind.UNKNOWN_CATEGORY, f"category_id {category_id} is not in 'categories', allowed: {allowed}")
            if entry.get("iscrowd", 0) not in (0, 1):
                _bad(Kind.ANNOTATION, f"'iscrowd' is {entry['iscrowd']!r}, allowed: 0 or 1")
            _check_area(entry)
        except BadValue as bad:
            report(bad.at(place))
            continue
        by_image.setdefault(image_id, []).append(entry)
    return by_image


def _check_area(entry: dict[str, Any]) -> None:
    """Training does not need the area, the evaluation does: absent, or a number."""
    area = entry.get("area", 0)
    if type(area) not in (int, float) or not is_finite(area) or area < 0:
        _bad(Kind.ANNOTATION, f"'area' is {_shown(area)}, allowed: a number of pixels, or no 'area' at all")


def _box(value: Any, image: dict[str, Any], place: str, report: Reporter) -> list[float]:
    """COCO's [x, y, width, height] as xyxy, clipped to the image."""
    if not isinstance(value, list) or len(value) != 4 or any(type(v) not in (int, float) for v in value):
        _bad(Kind.ANNOTATION, f"'bbox' is {_shown(value)}, allowed: four numbers [x, y, width, height]")
    x, y, width, height = value
    if not all(is_finite(v) for v in value):
        _bad(Kind.NON_FINITE, f"'bbox' is {value}, allowed: finite numbers")
    right, bottom = image["width"], image["height"]
    if width < SMALLEST_SIDE or height < SMALLEST_SIDE:
        _bad(Kind.BOX_NO_AREA, f"bbox {value} has no area; the annotation is dropped")
    clipped = [float(v) for v in (max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom))]
    if clipped[2] - clipped[0] < SMALLEST_SIDE or clipped[3] - clipped[1] < SMALLEST_SIDE:
        text = f"bbox {value} lies outside its image of {right} x {bottom} (width x height); the annotation is dropped"
        _bad(Kind.BOX_OUTSIDE, text)
    over = max(-x, -y, x + width - right, y + height - bottom)
    if over > ROUNDING:
        text = f"bbox {value} reaches {over:g} px over its image of {right} x {bottom} (width x height); it is clipped"
        report(Problem(Kind.BOX_CLIPPED, place, text))
    return clipped


def _field(entry: Any, name: str, kind: Kind) -> Any:
    if not isinstance(entry, dict):
        _bad(kind, f"is {_kind_of(entry)}, allowed: an object")
    if name not in entry:
        _bad(kind, f"{name!r} is missing")
    return entry[name]


def _integer(entry: Any, name: str, kind: Kind) -> int:
    value = _field(entry, name, kind)
    if type(value) is not int or abs(value) > LARGEST_ID:
        _bad(kind, f"{name!r} is {_shown(value)}, allowed: an integer")
    return value


def _text(entry: Any, name: str, kind: Kind) -> str:
    value = _field(entry, name, kind)
    if not isinstance(value, str) or not value.strip():
        _bad(kind, f"{name!r} is {_shown(value)}, allowed: a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can hold half a character
        _bad(kind, f"{name!r} is {_shown(value)}, allowed: a text of whole characters")
    return value


def _bad(kind: Kind, text: str) -> NoReturn:
    raise BadValue(kind, text)


def _shown(value: Any) -> str:
    """A value for a message, cut to one readable length."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return ", ".join(map(str, value[:8])) + f", ... ({len(value)} values)"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
