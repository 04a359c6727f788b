"""COCO json <-> records: the COCO boundary. COCO's ids and xywh boxes exist only here and in `evaluation/`.

Labels are 0..C-1 in the order of the category ids. Names compare after NFC and trimming.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from semiseg.data.measures import Measures
from semiseg.data.problems import BadValue, CrowdCounts, Kind, Problem, Reporter, stop_at_errors
from semiseg.errors import UserError
from semiseg.splits import normalise
from semiseg.structures.objects import SMALLEST_SIDE, Box, Crowds, Place, groupings, mask_box_xyxy, place
from semiseg.structures.rasterise import MORE, outlines_to_rle, run_lengths

SECTIONS = ("images", "annotations", "categories")
NO_ANNOTATIONS = f"no list 'annotations'; needed: {', '.join(SECTIONS)}"
LARGEST_ID = 2**63 - 1  # ids are stored as int64
LARGEST_SIDE = 2**31 - 1
LONGEST_RUN = 8  # characters of a compressed RLE, five bits each
ROUNDING = 0.02  # px: COCO writes two decimals, so a box at the edge may reach over it by this much unreported


@dataclass(frozen=True)
class CocoFile:
    """A parsed instances file whose ids are known to be unique and to refer to each other."""

    path: Path
    digest: str  # hex SHA-256 of the file's bytes
    class_names: tuple[str, ...]  # of each label
    category_ids: tuple[int, ...]  # COCO's, of each label, ascending
    images: list[dict[str, Any]]  # raw entries in the file's order
    annotations: dict[int, list[dict[str, Any]]]  # raw, of each image id in the file's order; no empty lists
    annotated: bool = True  # false: no list `annotations` at all, as in COCO's `image_info_test-dev2017.json`
    groupings: tuple[str, ...] = ()  # names of categories that are no classes, see `structures/objects.py`


def read_coco(
    path: Path,
    *,
    report: Reporter | None = None,
    annotations_required: bool = True,
    classes: Collection[str] = (),
) -> CocoFile:
    """Reads an instances file; entries with a problem are reported and left out.

    Without a reporter the first error is a `UserError`, as is in any case a file that is missing, not JSON, or lacks a
    section; the list `annotations` may be missing where it is not required, for images to be predicted. `classes`
    are names that are classes even where the file alone would not say so (`objects.groupings`).
    """
    report = report or stop_at_errors(path)
    raw, digest = parse_sections(path, SECTIONS if annotations_required else ("images", "categories"))
    return coco_file(raw, path, digest, report, classes)


def coco_file(
    raw: dict[str, Any], path: Path, digest: str, report: Reporter, classes: Collection[str] = ()
) -> CocoFile:
    """The content of an instances file, whose sections are lists; what has a problem is reported and left out."""
    annotations = raw.get("annotations", [])
    annotated = [entry.get("category_id") for entry in annotations if isinstance(entry, dict)]
    groups = groupings(raw["categories"], {each for each in annotated if type(each) is int}, classes)
    categories = _categories(raw["categories"], groups, report)
    images = _images(raw["images"], report)
    known = {"image_id": {image["id"] for image in images}, "category_id": set(categories)}
    # What was refused is said once, and not again of all that refers to it.
    refused = {
        key: _ids(raw[name]) - known[key] for key, name in (("image_id", "images"), ("category_id", "categories"))
    }
    return CocoFile(
        path,
        digest,
        class_names=tuple(categories[category_id] for category_id in sorted(categories)),
        category_ids=tuple(sorted(categories)),
        images=images,
        annotations=_annotations(annotations, known, refused, report),
        annotated="annotations" in raw,
        groupings=tuple(normalise(raw["categories"][number]["name"]) for number in groups),
    )


def image_records(
    coco: CocoFile,
    *,
    report: Reporter | None = None,
    crowds: Crowds = "ignore",
    measures: Measures | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields one record per image in the form of `table.FEATURES`; annotations with a problem are reported.

    Boxes become xyxy pixels of the stored image, clipped to it; RLE becomes its compressed form. An annotation whose
    `segmentation` is absent, null, [] or {} has no mask, which is not an empty mask. One whose box has no area in the
    image has its mask's, or is a crowd region, or is left out where nothing of it is in the image (`objects.place`).
    `measures` are told of every object that has a place.
    """
    report = report or stop_at_errors(coco.path)
    label_of = {category_id: label for label, category_id in enumerate(coco.category_ids)}
    for image in coco.images:
        objects = []
        for entry in coco.annotations.get(image["id"], ()):
            where = f"annotation {entry['id']}"
            size_hw = (image["height"], image["width"])
            try:
                _require_box(entry.get("bbox"))
                (polygons, rle_counts), (box, origin) = _mask_and_place(entry, size_hw)
            except BadValue as bad:
                report(bad.at(where))
                continue
            has_mask = bool(polygons) or rle_counts is not None
            if measures is not None and not entry.get("iscrowd") and (has_mask or origin == "box"):
                measures.add(entry, polygons, rle_counts, size_hw)
            _report_box(entry["bbox"], box, origin, size_hw, where, report)
            if box is None:
                continue
            objects.append(
                {
                    "annotation_id": entry["id"],
                    "label": label_of[entry["category_id"]],
                    "box_xyxy": list(box),
                    "is_crowd": (crowds == "ignore" and bool(entry.get("iscrowd", 0))) or origin == "region",
                    "has_mask": has_mask,
                    "polygons": polygons,
                    "rle_counts": rle_counts,
                }
            )
        fields = {name: image[name] for name in ("file_name", "height", "width")}
        yield {"image_id": image["id"], **fields, "objects": objects}


def crowd_counts(coco: CocoFile) -> CrowdCounts:
    """How many annotations are crowd regions, and in which form masks are drawn."""
    forms = Counter(
        (bool(entry.get("iscrowd", 0)), type(entry.get("segmentation") or None))
        for entries in coco.annotations.values()
        for entry in entries
    )
    crowd = sum(count for (is_crowd, _), count in forms.items() if is_crowd)
    return CrowdCounts(sum(forms.values()), crowd, forms[True, dict], forms[False, list])


def annotation(
    category_id: int, mask: np.ndarray | None, box_xywh: Box | None = None, *, is_crowd: bool = False
) -> dict[str, Any]:
    """An annotation as the converters of other data sets write it, without ids; without a box that of the mask.

    The box, in pixels of the stored image, may reach over it. Without a mask, (H, W) bool, the area is the box's.
    """
    segmentation: dict[str, Any] = {}
    if mask is None:
        assert box_xywh is not None
        box, area = list(box_xywh), box_xywh[2] * box_xywh[3]
    else:
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        box, area = list(box_xywh or map(int, coco_mask.toBbox(rle))), int(coco_mask.area(rle))
        segmentation = {"segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}}
    return {"category_id": category_id, "bbox": box, "area": area, "iscrowd": int(is_crowd), **segmentation}


def parse_sections(path: Path, needed: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The json's content and the digest of its bytes; every section of `needed` is there, each a list."""
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
        expected = ", ".join(dict.fromkeys([*needed, *missing]))
        raise UserError(f"{path}: no list {' and no list '.join(map(repr, missing))}; needed: {expected}")
    for name in ("images", "categories"):
        if name in needed and not raw[name]:
            raise UserError(f"{path}: the list {name!r} is empty")
    return raw, hashlib.sha256(content).hexdigest()


def _ids(entries: list[Any]) -> set[int]:
    return {entry["id"] for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int}


def _categories(entries: list[Any], groups: Collection[int], report: Reporter) -> dict[int, str]:
    """Category id -> name, in the file's order; those of the numbers `groups` are no classes."""
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if index in groups:
            text = f"{_short(entry['name'])} has no annotation and is the supercategory of others; it is no class"
            report(Problem(Kind.GROUPING, f"categories[{index}]", text))
            continue
        try:
            category_id = _integer(entry, "id", Kind.CATEGORY)
            name = normalise(_text(entry, "name", Kind.CATEGORY))
            if category_id in names:
                text = f"category id {category_id} ({name!r}) is already that of {names[category_id]!r}"
                raise BadValue(Kind.CATEGORY_ID_TWICE, text)
            if name in names.values():
                text = f"category name {name!r} is used twice (compared after NFC and trim)"
                raise BadValue(Kind.CATEGORY_NAME_TWICE, text)
            names[category_id] = name
        except BadValue as bad:
            report(bad.at(f"categories[{index}]"))
    return names


def _images(entries: list[Any], report: Reporter) -> list[dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        try:
            image_id = _integer(entry, "id", Kind.IMAGE)
            if "\0" in _text(entry, "file_name", Kind.IMAGE):
                raise BadValue(Kind.IMAGE, f"'file_name' is {_short(entry['file_name'])}, allowed: a file name")
            for side in ("height", "width"):
                if not 0 < _integer(entry, side, Kind.IMAGE) <= LARGEST_SIDE:
                    raise BadValue(Kind.IMAGE, f"{side!r} is {entry[side]}, allowed: a positive number of pixels")
            if image_id in images:
                raise BadValue(Kind.IMAGE_ID_TWICE, f"image id {image_id} ({entry['file_name']}) is used twice")
            images[image_id] = entry
        except BadValue as bad:
            report(bad.at(f"images[{index}]"))
    return list(images.values())


def _annotations(
    entries: list[Any], known: Mapping[str, set[int]], refused: Mapping[str, set[int]], report: Reporter
) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = {}
    seen: set[int] = set()
    for index, entry in enumerate(entries):
        where = f"annotations[{index}]"
        try:
            annotation_id = _integer(entry, "id", Kind.ANNOTATION)
            where = f"annotation {annotation_id}"
            if annotation_id in seen:
                raise BadValue(Kind.ANNOTATION_ID_TWICE, f"annotation id {annotation_id} is used twice")
            seen.add(annotation_id)
            if any(type(entry.get(key)) is int and entry[key] in ids for key, ids in refused.items()):
                continue
            if (image_id := _integer(entry, "image_id", Kind.ANNOTATION)) not in known["image_id"]:
                raise BadValue(Kind.UNKNOWN_IMAGE, f"image_id {image_id} is not in 'images'")
            if (category_id := _integer(entry, "category_id", Kind.ANNOTATION)) not in known["category_id"]:
                allowed = _short(sorted(known["category_id"]))
                text = f"category_id {category_id} is not in 'categories', allowed: {allowed}"
                raise BadValue(Kind.UNKNOWN_CATEGORY, text)
            if entry.get("iscrowd", 0) not in (0, 1):
                raise BadValue(Kind.ANNOTATION, f"'iscrowd' is {entry['iscrowd']!r}, allowed: 0 or 1")
            area = entry.get("area", 0)  # training does not need it, the evaluation does
            if type(area) not in (int, float) or not is_finite(area) or area < 0:
                text = f"'area' is {_short(area)}, allowed: a number of pixels, or no 'area' at all"
                raise BadValue(Kind.ANNOTATION, text)
        except BadValue as bad:
            report(bad.at(where))
            continue
        by_image.setdefault(image_id, []).append(entry)
    return by_image


def _require_box(value: Any) -> None:
    if not isinstance(value, list) or len(value) != 4 or any(type(v) not in (int, float) for v in value):
        raise BadValue(Kind.ANNOTATION, f"'bbox' is {_short(value)}, allowed: four numbers [x, y, width, height]")
    if not all(is_finite(v) for v in value):
        raise BadValue(Kind.NON_FINITE, f"'bbox' is {value}, allowed: finite numbers")


def _mask_and_place(
    entry: dict[str, Any], size_hw: tuple[int, int]
) -> tuple[tuple[list[list[float]], bytes | None], Place]:
    """What `read_segmentation` has of an annotation, and where it stands."""
    value = entry.get("segmentation")
    try:
        mask = read_segmentation(value, size_hw=size_hw)
    except BadValue:
        if place(entry["bbox"], size_hw, None).origin == "box" or not _is_beside(value, size_hw):
            raise
        return ([], None), Place(None, "region")
    mask_box = partial(mask_box_xyxy, *mask, size_hw)
    return mask, place(entry["bbox"], size_hw, None if mask == ([], None) else mask_box)


def _is_beside(value: Any, size_hw: tuple[int, int]) -> bool:
    """Whether outlines lie outside of their image, however far; nobody will draw them."""
    if not isinstance(value, list) or not all(isinstance(outline, list) and outline for outline in value):
        return False
    if not all(len(outline) % 2 == 0 and all(map(is_number, outline)) for outline in value):
        return False
    return mask_box_xyxy(value, None, size_hw) is None


def _report_box(
    value: list[float], box: Box | None, origin: str, size_hw: tuple[int, int], where: str, report: Reporter
) -> None:
    """Says what became of COCO's [x, y, width, height]."""
    x, y, width, height = value
    bottom, right = size_hw
    image = f"its image of {right} x {bottom} (width x height)"
    if origin == "box":
        over = max(-x, -y, x + width - right, y + height - bottom)
        if over > ROUNDING:
            report(Problem(Kind.BOX_CLIPPED, where, f"bbox {value} reaches {over:g} px over {image}; it is clipped"))
        return
    no_area = width < SMALLEST_SIDE or height < SMALLEST_SIDE
    what = f"bbox {value} has no area" if no_area else f"bbox {value} lies outside {image}"
    if origin == "mask":
        report(Problem(Kind.BOX_OF_MASK, where, f"{what}; the mask's box is taken: {list(box or ())} (x0, y0, x1, y1)"))
        return
    so = "is no object" if box is None else "is ignored like a crowd region"
    kind = Kind.BOX_NO_AREA if no_area else Kind.BOX_OUTSIDE
    report(Problem(kind, where, f"{what}, and there is no mask in the image; the annotation {so}"))


def read_segmentation(value: Any, *, size_hw: tuple[int, int]) -> tuple[list[list[float]], bytes | None]:
    """(polygons, compressed RLE counts); ([], None) says that the annotation has no mask. Raises `BadValue`.

    Args:
        value: None, [], {}, a list of polygons [x0, y0, x1, y1, ...], or {"size": [h, w], "counts": ...}.
        size_hw: of the stored image, which an RLE must have and polygons may not leave by more than its own size.
    """
    if value is None or value in ([], {}):
        return [], None
    if isinstance(value, dict):
        return [], _read_rle(value, size_hw)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise BadValue(
            Kind.POLYGON, "the mask is neither a list of polygons (each a list of numbers) nor an RLE object"
        )
    # Some tools write [[]] for "not annotated": an outline without a point says nothing about the mask.
    return [_read_polygon(polygon, index, size_hw) for index, polygon in enumerate(value) if polygon], None


def read_counts(value: Any, *, size_hw: tuple[int, int]) -> bytes | None:
    """The mask of `read_segmentation` as counts of a compressed RLE, outlines drawn at `size_hw`; None = no mask."""
    polygons, counts = read_segmentation(value, size_hw=size_hw)
    return outlines_to_rle([np.array(polygon) for polygon in polygons], size_hw) if polygons else counts


def is_number(value: Any) -> bool:
    """Whether it is a number as `is_finite` has it, and no truth value."""
    return type(value) in (int, float) and is_finite(value)


def is_finite(value: float) -> bool:
    """False also for numbers that no pixel arithmetic survives."""
    return abs(value) < 1e15


def _read_polygon(polygon: list[Any], index: int, size_hw: tuple[int, int]) -> list[float]:
    if any(type(v) not in (int, float) for v in polygon):
        raise BadValue(Kind.POLYGON, f"polygon {index} holds something that is no number")
    if not all(is_finite(v) for v in polygon):
        raise BadValue(Kind.NON_FINITE, f"polygon {index} holds a number that is not finite")
    if len(polygon) < 6 or len(polygon) % 2:
        raise BadValue(Kind.POLYGON, f"polygon {index} has {len(polygon)} numbers, allowed: an even number, at least 6")
    # The rasteriser's work and memory grow with the length of the outline: a point at 1e9 would stop the machine.
    for side, name, values in ((size_hw[1], "x", polygon[0::2]), (size_hw[0], "y", polygon[1::2])):
        if min(values) < -side or max(values) > 2 * side:
            far = max(values, key=lambda v: abs(v - side / 2))
            raise BadValue(
                Kind.POLYGON, f"polygon {index} has a point at {name} = {far:g}, allowed: {-side} to {2 * side}"
            )
    return [float(v) for v in polygon]


def _read_rle(value: dict[str, Any], size_hw: tuple[int, int]) -> bytes:
    size, counts = value.get("size"), value.get("counts")
    if size != list(size_hw):
        raise BadValue(Kind.RLE, f"RLE has size {size}, allowed: [height, width] of its image, {list(size_hw)}")
    if isinstance(counts, str):
        compressed = counts.encode(errors="replace")
        runs = _decompressed(compressed)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        compressed, runs = None, counts
    else:
        raise BadValue(Kind.RLE, "RLE has no 'counts', allowed: a list of integers or a compressed text")
    if min(runs, default=-1) < 0 or sum(runs) != size_hw[0] * size_hw[1]:
        pixels = size_hw[0] * size_hw[1]
        raise BadValue(Kind.RLE, f"RLE covers {sum(runs)} pixels, allowed: the {pixels} of its image, in runs >= 0")
    if compressed is None:
        compressed = coco_mask.frPyObjects({"size": size, "counts": runs}, *size_hw)["counts"]
    return compressed


def _decompressed(compressed: bytes) -> list[int]:
    """The run lengths of a compressed RLE; checked here because the decoder of pycocotools trusts its input."""
    characters = np.frombuffer(compressed, dtype=np.uint8) - ord("0")
    lasts = np.flatnonzero((characters & MORE) == 0)  # of each number
    if (characters >= 64).any() or np.diff(lasts, prepend=-1).max(initial=0) > LONGEST_RUN:
        raise BadValue(Kind.RLE, "RLE 'counts' is no compressed RLE text")
    if len(characters) and characters[-1] & MORE:
        raise BadValue(Kind.RLE, "RLE 'counts' ends in the middle of a number")
    runs: list[int] = run_lengths([compressed])[0].tolist()
    return runs


def _integer(entry: Any, name: str, kind: Kind) -> int:
    value = _field(entry, name, kind)
    if type(value) is not int or abs(value) > LARGEST_ID:
        raise BadValue(kind, f"{name!r} is {_short(value)}, allowed: an integer")
    return value


def _text(entry: Any, name: str, kind: Kind) -> str:
    value = _field(entry, name, kind)
    if not isinstance(value, str) or not value.strip():
        raise BadValue(kind, f"{name!r} is {_short(value)}, allowed: a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can hold half a character
        raise BadValue(kind, f"{name!r} is {_short(value)}, allowed: a text of whole characters")
    return value


def _field(entry: Any, name: str, kind: Kind) -> Any:
    if not isinstance(entry, dict):
        raise BadValue(kind, f"is {_kind_of(entry)}, allowed: an object")
    if name not in entry:
        raise BadValue(kind, f"{name!r} is missing")
    return entry[name]


def _short(value: Any) -> str:
    """A value for a message, cut to one readable length."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return ", ".join(map(str, value[:8])) + f", ... ({len(value)} values)"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
