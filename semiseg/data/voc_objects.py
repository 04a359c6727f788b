"""One image of PASCAL VOC or SBD -> its objects with boxes and masks.

In a map of VOC's `SegmentationObject`, index n is the n-th `object` of the image's XML, 0 is background, and 255 is
void: the borders of objects, which belong to no mask.

SBD, the Semantic Boundaries Dataset, has masks for 11 355 images of VOC, in MATLAB files. `inst/NAME.mat` holds the
struct `GTinst`: `Segmentation`, a map of indices 0 (background) and 1..n, and `Categories`, the classes 1..20 of the n
instances. Their order is not that of VOC's XML, so boxes are those of the masks: from the first to the last pixel,
which is included, as in VOC's own. SBD knows no "difficult".
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from semiseg.data.coco import Box, annotation
from semiseg.data.images import open_image
from semiseg.errors import UserError

# In alphabetical order, which is that of the indices 1..20 in `SegmentationClass` and of SBD's categories.
VOC_CLASSES: tuple[str, ...] = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ARCHIVE = "VOCtrainval_11-May-2012.tar"
SBD_ARCHIVE = "benchmark.tgz"
VOID = 255
SMALLEST_SHARE_IN_BOX = 0.5  # of a mask's pixels in the box of its object; less, and it is another object's


@dataclass(frozen=True)
class ImageRecord:
    """One image."""

    name: str
    size_hw: tuple[int, int]
    objects: dict[int, dict[str, Any]]  # number of the object, from 1 -> its COCO annotation, without ids
    misfits: list[str] = field(default_factory=list)  # which masks contradict their object and were left out


class _XmlObject(NamedTuple):
    category_id: int
    box_xywh: Box
    difficult: bool


def voc_record(voc: Path, name: str, *, masks_required: bool, ignored_without_mask: bool) -> ImageRecord:
    """The objects of an image in the XML's order; "difficult" ones are crowd.

    Args:
        masks_required: a missing map in `SegmentationObject` is an error; otherwise such an image has boxes only.
        ignored_without_mask: an object without a pixel in the map is ignored by its box, no instance with a box.
    """
    size_hw = image_size(voc / "JPEGImages" / f"{name}.jpg")
    xml = voc / "Annotations" / f"{name}.xml"
    with reading(xml, "not readable as XML"):
        elements = ElementTree.parse(xml).getroot().findall("object")
    annotated = [_xml_object(element, f"{xml}: object {number}") for number, element in enumerate(elements, start=1)]
    map_path = voc / "SegmentationObject" / f"{name}.png"
    masks: dict[int, np.ndarray] = {}
    misfits: list[str] = []
    if masks_required or map_path.is_file():
        class_path = voc / "SegmentationClass" / f"{name}.png"
        classes = _read_indices(class_path, size_hw) if class_path.is_file() else None
        masks, misfits = _masks(_read_indices(map_path, size_hw), classes, annotated, str(map_path))
    objects = {}
    for number, item in enumerate(annotated, start=1):
        mask = masks.get(number)
        is_crowd = item.difficult or (mask is None and ignored_without_mask)
        objects[number] = annotation(item.category_id, mask, item.box_xywh, is_crowd=is_crowd)
    return ImageRecord(name, size_hw, objects, misfits)


@contextmanager
def reading(path: Path, fault: str, *, archive: str = ARCHIVE, noun: str = "file") -> Iterator[None]:
    """Makes what goes wrong in reading a file of an archive one sentence; damaged bytes surface as almost anything."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such {noun}; it is part of {archive}") from None
    except Exception as error:
        damaged = isinstance(error, UnidentifiedImageError)
        detail = "not an image or damaged" if damaged else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {fault}: {detail}") from None


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header."""
    with reading(path, "the image cannot be read", noun="image"), open_image(path) as image:
        return image.height, image.width


def _read_indices(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8: the indices of a palette image, not its colours; `size_hw` is that of its photograph."""
    with reading(path, "the image cannot be decoded"), open_image(path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path}: holds {image.mode} colours, allowed: a palette image, whose values are indices")
        indices = np.array(image, dtype=np.uint8)
    if indices.shape != size_hw:
        size, allowed = (f"{width} x {height}" for height, width in (indices.shape, size_hw))
        raise UserError(f"{path}: {size} pixels (width x height), allowed: those of its photograph, {allowed}")
    return indices


def read_names(path: Path, archive: str) -> list[str]:
    """The first word of each line of a list of images, which is part of that archive."""
    try:
        # Words of bytes: in a text, signs such as U+2028 or a no-break space would end a word, too.
        return [line.split()[0].decode("utf-8") for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the list of images cannot be read: {reason}; it is part of {archive}") from None


def _masks(
    indices: np.ndarray, classes: np.ndarray | None, annotated: list[_XmlObject], where: str
) -> tuple[dict[int, np.ndarray], list[str]]:
    """Object number -> mask (H, W) bool, and what contradicts its object; an object without a pixel has no mask."""
    masks: dict[int, np.ndarray] = {}
    misfits = []
    for number in (int(value) for value in np.unique(indices) if value not in (0, VOID)):
        mask = indices == number
        if number > len(annotated):
            misfits.append(f"{where}: index {number}, but the XML has {len(annotated)} objects")
        elif contradiction := _contradiction(mask, classes, annotated[number - 1]):
            misfits.append(f"{where}: index {number}: {contradiction}")
        else:
            masks[number] = mask
    return masks, misfits


def _contradiction(mask: np.ndarray, classes: np.ndarray | None, item: _XmlObject) -> str | None:
    expected = VOC_CLASSES[item.category_id - 1]
    if classes is not None:
        most = int(np.bincount(classes[mask], minlength=VOID + 1).argmax())
        if most != item.category_id:
            marked = VOC_CLASSES[most - 1] if 0 < most <= len(VOC_CLASSES) else f"index {most}"
            return f"the XML says {expected!r}, SegmentationClass {marked!r}"
    x, y, width, height = item.box_xywh
    rows, columns = (index + 0.5 for index in np.nonzero(mask))  # centres of the pixels
    inside = (x <= columns) & (columns < x + width) & (y <= rows) & (rows < y + height)
    if inside.mean() < SMALLEST_SHARE_IN_BOX:
        return f"{inside.mean():.0%} of the mask lie in the box of its {expected!r}"
    return None


def _xml_object(element: ElementTree.Element, where: str) -> _XmlObject:
    name = (element.findtext("name") or "").strip()
    if name not in VOC_CLASSES:
        raise UserError(f"{where}: 'name' is {name!r}, allowed: {', '.join(VOC_CLASSES)}")
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{where}: 'difficult' is {difficult!r}, allowed: 0 or 1")
    # An object's parts (heads, hands) have boxes of their own further down.
    left, top, right, bottom = (_coordinate(element, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
    # Pixels count from 1 and the last one is included.
    box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
    return _XmlObject(VOC_CLASSES.index(name) + 1, box, difficult == "1")


def _coordinate(element: ElementTree.Element, key: str, where: str) -> float:
    """A whole number as int, so that the json shows it as VOC writes it; a few of VOC's are not whole."""
    text = element.findtext(f"bndbox/{key}")
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: '{key}' is {text!r}, allowed: a number of pixels")
    return int(value) if value.is_integer() else value


def sbd_record(sbd: Path, name: str, *, image: Path) -> ImageRecord:
    """The instances of a photograph in VOC's `JPEGImages`, numbered as in the map; one without a pixel is left out."""
    if not image.is_file():
        raise UserError(f"{image}: no such image, but SBD lists it; copy {sbd / 'img' / image.name} there")
    from scipy.io import loadmat  # not above: only SBD's files need it

    path, size_hw = sbd / "inst" / f"{name}.mat", image_size(image)
    with reading(path, "no readable SBD file", archive=SBD_ARCHIVE):
        struct = loadmat(str(path), variable_names=["GTinst"])["GTinst"][0, 0]
        indices, categories = np.asarray(struct["Segmentation"]), np.asarray(struct["Categories"]).ravel().tolist()
    if indices.shape != size_hw:
        raise UserError(f"{path}: 'Segmentation' is {indices.shape}, allowed: (height, width) of its image, {size_hw}")
    largest = max((int(value) for value in np.unique(indices) if value != VOID), default=0)
    if largest > len(categories):
        raise UserError(f"{path}: 'Segmentation' has index {largest}, but 'Categories' {len(categories)} entries")
    wrong = [value for value in categories if not 1 <= value <= len(VOC_CLASSES)]
    if wrong:
        raise UserError(f"{path}: 'Categories' holds {wrong[0]}, allowed: 1 to {len(VOC_CLASSES)}")
    masks = {number: indices == number for number in range(1, len(categories) + 1)}
    objects = {number: annotation(categories[number - 1], mask) for number, mask in masks.items() if mask.any()}
    return ImageRecord(name, size_hw, objects)
