"""Pseudo masks from a COCO json, whoever made them: each goes to an object of the training's own annotations.

They reach a training through `dataset.py`, which gives them to instances that have nothing but their box.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from pycocotools import mask as rle_codec
from torchvision.ops import box_iou

from semiseg.config.read import digest, file_digest
from semiseg.data.coco import is_number, parse_sections, read_counts
from semiseg.data.problems import BadValue
from semiseg.data.table import Table, open_rows
from semiseg.errors import UserError
from semiseg.files import whole_folder
from semiseg.structures.objects import mask_box_xyxy, place

READER_VERSION = 3  # raise it when rows change
SAME_BOX = 0.9  # IoU from which a mask of unknown id belongs to a box
OWN_BOX = 0.5  # IoU below which an annotation of a known id is another object's
LEAST_INSIDE = 0.5  # share of a mask that lies in its box; the rest is cut off
FEATURES = Features(
    {
        "image_id": Value("int64"),
        "masks": List(
            {
                "annotation_id": Value("int64"),  # of the table's object
                "weight": Value("float64"),
                "rle_counts": Value("binary"),  # compressed, of the stored image
                "known_counts": Value("binary"),  # likewise, the cells that the mask says something of; null = all
            }
        ),
    }
)


class PseudoMask(NamedTuple):
    """A mask for one instance."""

    rle_counts: bytes
    weight: float  # in [0, 1]
    known_counts: bytes | None


@dataclass(frozen=True)
class PseudoMasks:
    """The masks for the objects of a table, memory-mapped like it."""

    rows: datasets.Dataset  # of the form `FEATURES`, one per image of the table and in its order
    summary: str  # what of which file fits, in a sentence

    def of(self, index: int) -> dict[int, PseudoMask]:
        """Annotation id -> mask, for the image of a row."""
        return {
            each["annotation_id"]: PseudoMask(each["rle_counts"], each["weight"], each["known_counts"])
            for each in self.rows[index]["masks"]
        }


def load_pseudo(path: Path, table: Table, *, cache: Path) -> PseudoMasks:
    """The masks that a COCO json has for the objects of a table, matched once and then read from the cache.

    An annotation belongs to the object of its id in the same image, where their boxes overlap by an IoU of `OWN_BOX`;
    else to the object of that image whose box is the same (`SAME_BOX`). Images are the same by file name, without the
    folders where only one of each side is called so. A mask is cut to the box of its object. Beside `segmentation` are
    read `mask_weight` in [0, 1] (1 where it is missing) and `mask_known`, an RLE of the pixels that the mask says
    something of.

    Raises:
        UserError: no such file, or not such a one; no image or no object in common; another image size; a mask that
            lies outside its box; a weight outside [0, 1].
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of pseudo masks; 'semiseg pseudo' makes one")
    name = digest([file_digest(path, 64), table.object_fingerprint])[:16]
    folder = cache / f"pseudo-{name}-v{READER_VERSION}"
    rows, about = open_rows(folder, partial(_match, path, table))
    return PseudoMasks(rows, f"{path}: {about['summary']}")


def _match(path: Path, table: Table, folder: Path) -> None:
    raw = parse_sections(path, ("images", "annotations"))[0]
    images = _by_table(path, raw["images"], table)
    by_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    known: set[Any] = set()
    for number, entry in enumerate(raw["annotations"]):
        where = f"{path}: annotations[{number}]"
        _require_ids(entry, ("image_id",), where)
        if (own := entry.get("id")) is not None:
            _require_ids(entry, ("id",), where)
            if own in known:
                raise UserError(f"{where}: annotation id {own} is used twice")
            known.add(own)
        if entry.get("segmentation") and not entry.get("iscrowd"):
            by_image[entry["image_id"]].append(entry)
    counts: Counter[str] = Counter(masks=sum(map(len, by_image.values())))
    with whole_folder(folder) as temporary:
        rows = temporary / "rows.arrow"
        with ArrowWriter(features=FEATURES, path=str(rows)) as writer:
            for row in table.rows:
                entries = by_image.get(images.get(row["image_id"]), [])
                masks = list(_masks_of(path, row, entries))
                counts["objects"] += sum(not item["is_crowd"] for item in row["objects"])
                counts["matched"] += len(masks)
                writer.write({"image_id": row["image_id"], "masks": masks})
            writer.finalize()
        if counts["objects"] and not counts["matched"]:
            raise UserError(
                f"{path}: none of its {counts['masks']} masks belongs to one of the {counts['objects']} objects of "
                f"{table.annotations_file}, by annotation id or by box"
            )
        about: dict[str, Any] = {"summary": _in_words(counts)}
        about["digest"] = digest([file_digest(rows), about])
        (temporary / "classes.json").write_text(json.dumps(about), encoding="utf-8")


def _in_words(counts: Mapping[str, int]) -> str:
    left = counts["masks"] - counts["matched"]
    text = f"pseudo masks for {counts['matched']} of {counts['objects']} objects"
    return f"{text}; {left} of the file's {counts['masks']} masks belong to none of them" if left else text


def _by_table(path: Path, entries: Sequence[Any], table: Table) -> dict[int, Any]:
    """Image id of the table -> image id of the file, for those that both have."""
    by_id: dict[Any, dict[str, Any]] = {}
    by_name, by_last = defaultdict(list), defaultdict(list)  # the name with its folders, and without
    for number, entry in enumerate(entries):
        _require_ids(entry, ("id", "file_name"), f"{path}: images[{number}]")
        by_id[entry["id"]] = entry
        by_name[_name(entry["file_name"])].append(entry["id"])
        by_last[_name(entry["file_name"]).name].append(entry["id"])
    found: dict[int, Any] = {}
    columns = [table.rows.data.column(name).to_pylist() for name in ("image_id", "file_name", "height", "width")]
    called = Counter(_name(file_name).name for file_name in columns[1])
    for image_id, file_name, height, width in zip(*columns, strict=True):
        name = _name(file_name)
        alike = by_name.get(name) or (by_last.get(name.name, []) if called[name.name] == 1 else [])
        other = image_id if image_id in alike else alike[0] if len(alike) == 1 else None
        if other is None:
            continue
        entry, found[image_id] = by_id[other], other
        for side, length in (("height", height), ("width", width)):
            if entry.get(side, length) != length:
                raise UserError(
                    f"{path}: image {other} ({entry['file_name']}): {side!r} is {entry[side]!r}, allowed: {length}, "
                    f"as in {table.annotations_file}"
                )
    if not found:
        raise UserError(
            f"{path}: none of its {len(by_id)} images is one of the {len(table)} of {table.annotations_file}, by their "
            f"file names, such as {str(next(iter(by_name), 'none'))!r}"
        )
    return found


def _name(file_name: Any) -> PurePosixPath:
    """Without `.` and in POSIX form, whoever wrote it."""
    return PurePosixPath(str(file_name).replace("\\", "/"))


def _require_ids(entry: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict) or not all(type(entry.get(key)) in (int, str) for key in keys):
        raise UserError(f"{where} is no object with {' and '.join(map(repr, keys))}, each a number or a text")


def _masks_of(path: Path, row: dict[str, Any], entries: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `FEATURES` has of the image of a row."""
    objects = {item["annotation_id"]: item for item in row["objects"] if not item["is_crowd"]}
    size_hw = (row["height"], row["width"])
    for annotation_id, entry in _pairs(path, objects, entries, size_hw).items():
        where = f"{path}: annotation {entry.get('id')}"
        weight = entry.get("mask_weight", 1)
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise UserError(f"{where}: 'mask_weight' is {str(weight)[:40]!r}, allowed: a number from 0 to 1")
        mask = _within(
            _counts(entry["segmentation"], size_hw, where), objects[annotation_id]["box_xyxy"], size_hw, where
        )
        known = entry.get("mask_known")
        if known is not None:
            known = _counts(known, size_hw, f"{where}: mask_known")
        if mask is not None:
            yield {"annotation_id": annotation_id, "weight": float(weight), "rle_counts": mask, "known_counts": known}


def _pairs(
    path: Path, objects: Mapping[int, dict[str, Any]], entries: Sequence[dict[str, Any]], size_hw: tuple[int, int]
) -> dict[int, dict[str, Any]]:
    """Annotation id -> the file's entry for that object: by the id, else by the box, the most alike first."""
    boxes = [_corners(path, entry, size_hw) for entry in entries]
    ids = list(objects)
    theirs = torch.tensor([box or [0.0] * 4 for box in boxes], dtype=torch.float64).view(-1, 4)
    ours = torch.tensor([objects[each]["box_xyxy"] for each in ids], dtype=torch.float64).view(-1, 4)
    ious = box_iou(theirs, ours).tolist()
    pairs: dict[int, dict[str, Any]] = {}
    left = []
    for number, (entry, box) in enumerate(zip(entries, boxes, strict=True)):
        own = entry["id"] if type(entry.get("id")) is int and entry["id"] in objects else None
        if own is not None and (box is None or ious[number][ids.index(own)] >= OWN_BOX):
            pairs[own] = entry
        elif box is not None:
            left.append(number)
    alike = [
        (-iou, number, annotation_id)
        for number in left
        for annotation_id, iou in zip(ids, ious[number], strict=True)
        if iou >= SAME_BOX and annotation_id not in pairs
    ]
    taken: set[int] = set()
    for _, number, annotation_id in sorted(alike):
        if number not in taken and annotation_id not in pairs:
            taken.add(number)
            pairs[annotation_id] = entries[number]
    return pairs


def _corners(path: Path, entry: dict[str, Any], size_hw: tuple[int, int]) -> list[float] | None:
    """The box xyxy of an entry, or of its mask where the box has no area; None where it has none."""
    box, where = entry.get("bbox"), f"{path}: annotation {entry.get('id')}"
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"{where}: 'bbox' is {box!r}, allowed: four numbers")
    counts = partial(_counts, entry["segmentation"], size_hw, where)
    placed = place(box, size_hw, lambda: mask_box_xyxy([], counts(), size_hw))
    if placed.origin == "mask":
        return list(placed.box_xyxy or ())
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def _counts(value: Any, size_hw: tuple[int, int], where: str) -> bytes:
    try:
        counts = read_counts(value, size_hw=size_hw)
    except BadValue as bad:
        raise UserError(f"{where}: {bad.text}") from None
    if counts is None:
        raise UserError(f"{where}: is empty, allowed: polygons or an RLE")
    return counts


def _within(counts: bytes, box_xyxy: Sequence[float], size_hw: tuple[int, int], where: str) -> bytes | None:
    """The mask cut to the pixels that its box touches; None where nothing is in it."""
    x0, y0 = math.floor(box_xyxy[0]), math.floor(box_xyxy[1])
    x1, y1 = math.ceil(box_xyxy[2]), math.ceil(box_xyxy[3])
    mask = {"size": list(size_hw), "counts": counts}
    box = rle_codec.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]], dtype=np.float64), *size_hw)[0]
    inside = rle_codec.merge([mask, box], intersect=True)
    area, common = int(rle_codec.area(mask)), int(rle_codec.area(inside))
    if common < LEAST_INSIDE * area:
        raise UserError(
            f"{where}: only {common} of the {area} pixels of its mask are in the box of its object, "
            f"{[round(v, 2) for v in box_xyxy]} (xyxy); allowed: at least half"
        )
    cut: bytes = inside["counts"]
    return cut if common else None
