"""What of COCO's annotations is a class or an object, and where it stands: the one rule of training and evaluation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

SMALLEST_SIDE = 1e-3  # px: a box thinner than this has no area
MANY_CROWDS = 0.05  # share of a file's objects that are crowd, above which that is said
Box = tuple[float, float, float, float]
Crowds = Literal["ignore", "objects"]  # what `iscrowd` 1 means: a region to leave out, or an object as all others


class Place(NamedTuple):
    """Where an annotation stands in its image.

    `origin` is "box", "mask" where the box of its mask stands in for its own, which has no area in the image, and
    "region" where that is not known either: then nothing is learnt or measured in the box, as in a crowd region.
    """

    box_xyxy: Box | None  # pixels of the stored image, clipped to it; None: nothing of it is in the image
    origin: Literal["box", "mask", "region"]


def groupings(categories: Sequence[Any], annotated: Collection[Any], classes: Collection[str] = ()) -> list[int]:
    """Which entries of COCO's list of categories only group others and are no classes, by their numbers in the list.

    These are without an annotation and named as the supercategory of another entry, as some labelling tools write the
    name of the whole project; never all of them.

    Args:
        categories: raw, whatever is in them.
        annotated: the category ids that annotations have.
        classes: names that are classes all the same, because another file or a model has them.
    """
    entries = [entry if isinstance(entry, dict) else {} for entry in categories]
    names, above = ([_plain(entry.get(key)) for entry in entries] for key in ("name", "supercategory"))
    groups = [
        number
        for number, (entry, name) in enumerate(zip(entries, names, strict=True))
        if name
        and not (isinstance(key := entry.get("id"), Hashable) and key in annotated)
        and name in (*above[:number], *above[number + 1 :])
    ]
    others = {name for number, name in enumerate(names) if number not in groups}
    wanted = {_plain(name) for name in classes} - others
    groups = [number for number in groups if names[number] not in wanted]
    return groups if len(groups) < len(entries) else []


def _plain(name: Any) -> str:
    return unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""


def place(box_xywh: Sequence[float], size_hw: tuple[int, int], mask_box: Callable[[], Box | None] | None) -> Place:
    """Where an annotation stands whose box is four finite numbers.

    Args:
        box_xywh: pixels of the stored image; it may reach over it.
        size_hw: of the stored image.
        mask_box: gives `mask_box_xyxy` of its mask, asked for only if the box does not do; None = it has no mask.
    """
    x, y, width, height = (float(value) for value in box_xywh)
    if width >= SMALLEST_SIDE and height >= SMALLEST_SIDE:
        box = _clipped((x, y, x + width, y + height), size_hw)
        if box is not None:
            return Place(box, "box")
        inside = None  # a box beside the image has no pixel in it
    else:
        inside = _pixels((x, y, x + width, y + height), size_hw)
    if mask_box is None:
        return Place(inside, "region")
    found = mask_box()
    return Place(found, "mask" if found else "region")


def mask_box_xyxy(
    outlines: Sequence[Sequence[float]], counts: bytes | str | None, size_hw: tuple[int, int]
) -> Box | None:
    """The box of a mask in pixels of its image, clipped to it; None where the mask has no area there.

    Args:
        outlines: polygons [x0, y0, x1, y1, ...], whose corners bound the box, as in COCO's files.
        counts: of the compressed RLE, in place of outlines.
    """
    if counts is not None:
        left, top, width, height = coco_mask.toBbox({"size": list(size_hw), "counts": counts}).tolist()
        return _clipped((left, top, left + width, top + height), size_hw)
    if not outlines:
        return None
    points = np.concatenate([np.asarray(outline, dtype=np.float64) for outline in outlines]).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return _clipped((left, top, right, bottom), size_hw)


def _clipped(box_xyxy: Box, size_hw: tuple[int, int]) -> Box | None:
    left, top, right, bottom = box_xyxy
    box = (max(left, 0.0), max(top, 0.0), min(right, float(size_hw[1])), min(bottom, float(size_hw[0])))
    return box if box[2] - box[0] >= SMALLEST_SIDE and box[3] - box[1] >= SMALLEST_SIDE else None


def _pixels(box_xyxy: Box, size_hw: tuple[int, int]) -> Box | None:
    """A box without area, or with corners the other way round, as a region of at least a pixel of the image."""
    sides = []
    for axis, length in ((0, size_hw[1]), (1, size_hw[0])):
        low, high = sorted((box_xyxy[axis], box_xyxy[axis + 2]))
        if high < 0 or low > length:
            return None
        if high - low < 1:
            low = (low + high) / 2 - 0.5
            high = low + 1
        low = min(max(low, 0.0), length - 1.0)
        sides.append((low, max(min(high, float(length)), low + 1)))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom
