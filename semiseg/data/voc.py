"""PASCAL VOC 2012 (and SBD beside it) -> a COCO json per image set, written on first use.

Image sets: the lists of `ImageSets/Segmentation`, and three for training that are made here, without the images of
Segmentation/val, on which a training is evaluated: `train_aug`, `main_train` and `main_trainval` (docs/DATA.md).

In a map of VOC's `SegmentationObject`, index n is the n-th `object` of the image's XML, 0 is background, and 255 is
void: the borders of objects, which belong to no mask.

SBD, the Semantic Boundaries Dataset, has masks for 11 355 images of VOC, in MATLAB files. `inst/NAME.mat` holds the
struct `GTinst`: `Segmentation`, a map of indices 0 (background) and 1..n, and `Categories`, the classes 1..20 of the n
instances. Their order is not that of VOC's XML, so boxes are those of the masks: from the first to the last pixel,
which is included, as in VOC's own. SBD knows no "difficult".
"""

from __future__ import annotations

import json
import logging
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from semiseg.data.coco import annotation
from semiseg.data.images import open_image
from semiseg.errors import UserError
from semiseg.files import require_folder, settle, write_text
from semiseg.project import cache_root
from semiseg.structures.objects import Box

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 2  # raise it when the json changes: older files are then left alone and made anew
# In alphabetical order, which is that of the indices 1..20 in `SegmentationClass` and of SBD's categories.
VOC_CLASSES: tuple[str, ...] = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SITE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
ARCHIVE = "VOCtrainval_11-May-2012.tar"
SBD_SITE = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
SBD_ARCHIVE = "benchmark.tgz"
SBD_FOLDERS = ("SBD", "benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset")
EVALUATION_SET = "val"
DERIVED_SETS = ("train_aug", "main_train", "main_trainval")
VOID = 255
SMALLEST_SHARE_IN_BOX = 0.5  # of a mask's pixels in the box of its object; less, and it is another object's
LARGEST_MISFIT = 0.01  # share of the masks of a set that may contradict their object before it is an error
IDS_PER_IMAGE = 1000


@dataclass(frozen=True)
class _ImageRecord:
    name: str
    size_hw: tuple[int, int]
    objects: dict[int, dict[str, Any]]  # number of the object, from 1 -> its COCO annotation, without ids
    misfits: list[str] = field(default_factory=list)  # which masks contradict their object and were left out
    void: dict[str, Any] | None = None  # RLE of the pixels that are nobody's, where there is a map


class _XmlObject(NamedTuple):
    category_id: int
    box_xywh: Box
    difficult: bool


def voc_files(root: Path, image_set: str) -> tuple[Path, Path]:
    """Where `ensure_voc` has or would have its two paths; without a layout there, as the archive unpacks."""
    images = (_find_voc(root) or root / "VOCdevkit" / "VOC2012") / "JPEGImages"
    return cache_root(root) / "semiseg" / f"voc2012_{image_set}_v{CONVERTER_VERSION}.json", images


def ensure_voc(root: Path, image_set: str) -> tuple[Path, Path]:
    """COCO instances json of an image set, converted first if it is not there, and its image folder.

    The json is the same byte for byte wherever and in whichever layout the data lie, since its digest identifies the
    data. Boxes are xywh in pixels of the stored image: VOC's pixels count from 1 and include the last one.
    `root` holds `VOCdevkit/VOC2012`, or `VOC2012`, or is that; SBD see `SBD_FOLDERS`.

    A UserError for an unknown set, for what is missing (what to download and where to put it) or broken (which file),
    or if more than 1 % of the masks contradict their objects.
    """
    annotations, images = voc_files(root, image_set)
    settle(annotations.parent)
    if annotations.is_file():
        return annotations, images
    voc, sbd = _find_folders(root, image_set)
    sources = _image_set(voc, sbd, image_set)
    require_folder(annotations.parent)
    records = []
    for name in tqdm(sorted(sources), desc=f"VOC 2012 {image_set}", unit=" images", delay=1, disable=None):
        if sources[name] == "sbd" and sbd is not None:
            records.append(_sbd_record(sbd, name, image=images / f"{name}.jpg"))
        else:
            # Mask AP needs a mask of every instance: in the evaluation's set an object of which no mask is known is
            # ignored by its box; elsewhere it is an instance with a box.
            required, ignored = sources[name] == "masks", image_set == EVALUATION_SET
            records.append(_voc_record(voc, name, masks_required=required, ignored_without_mask=ignored))
    _check_misfits(records, image_set)
    write_text(annotations, json.dumps(_coco(records, image_set), separators=(",", ":")) + "\n")
    return annotations, images


def _find_voc(root: Path) -> Path | None:
    candidates = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    return next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)


def _find_folders(root: Path, image_set: str) -> tuple[Path, Path | None]:
    """The folder of VOC, and that of SBD's `inst/`, `train.txt` and `val.txt`; all that is missing is said at once."""
    voc, missing = _find_voc(root), []
    if voc is None:
        fault = "no PASCAL VOC 2012 there" if root.is_dir() else "no such folder"
        missing.append(
            f"{root}: {fault}; download {SITE}/{ARCHIVE} and unpack it in {root}, "
            f"so that {root / 'VOCdevkit' / 'VOC2012' / 'JPEGImages'} is there"
        )
    else:
        for folder in (voc / part for part in ("Annotations", "SegmentationObject", "ImageSets/Segmentation")):
            if not folder.is_dir() or not any(folder.iterdir()):
                fault = "is empty" if folder.is_dir() else "no such folder"
                remedy = f"it is part of {ARCHIVE}: unpack that again, so that {voc} is complete"
                missing.append(f"{folder}: {fault}; {remedy}")
    sbd = next((root / name for name in SBD_FOLDERS if (root / name / "inst").is_dir()), None)
    if sbd is None and image_set == "train_aug":
        missing.append(
            f"{root}: no SBD there, which the image set 'train_aug' needs; "
            f"download {SBD_SITE}/{SBD_ARCHIVE} and unpack it in {root}, "
            f"so that {root / SBD_FOLDERS[1] / 'inst'} is there, or set data.voc.train_set to 'train'"
        )
    if voc is None or missing:
        raise UserError("; and ".join(missing))
    return voc, sbd


def _image_set(voc: Path, sbd: Path | None, image_set: str) -> dict[str, str]:
    """The images of a set -> `masks` (SegmentationObject must have it), `boxes` (it may have it) or `sbd`."""
    lists = voc / "ImageSets" / "Segmentation"
    names = sorted(path.stem for path in lists.glob("*.txt"))
    if image_set == "train_aug" and sbd is not None:
        source = dict.fromkeys(_read_names(sbd / "train.txt", SBD_ARCHIVE), "sbd")
        source |= dict.fromkeys(_read_names(sbd / "val.txt", SBD_ARCHIVE), "sbd")
        source |= dict.fromkeys(_read_names(lists / "train.txt", ARCHIVE), "masks")
    elif image_set in DERIVED_SETS:
        main = voc / "ImageSets" / "Main" / f"{image_set.removeprefix('main_')}.txt"
        source = dict.fromkeys(_read_names(main, ARCHIVE), "boxes")
    elif image_set in names:
        source = dict.fromkeys(_read_names(lists / f"{image_set}.txt", ARCHIVE), "masks")
    else:
        known = ", ".join([*names, *DERIVED_SETS])
        raise UserError(f"VOC image set {image_set!r}: there is none in {lists}; known: {known}")
    if image_set in DERIVED_SETS:
        for name in _read_names(lists / f"{EVALUATION_SET}.txt", ARCHIVE):
            source.pop(name, None)
    if not source:
        raise UserError(f"VOC image set {image_set!r}: lists no image")
    return source


def _check_misfits(records: Sequence[_ImageRecord], image_set: str) -> None:
    misfits = [text for record in records for text in record.misfits]
    if not misfits:
        return
    masks = len(misfits) + sum("segmentation" in item for record in records for item in record.objects.values())
    text = f"{len(misfits)} of {masks} masks of VOC image set {image_set!r} contradict their objects: {misfits[0]}"
    if len(misfits) > LARGEST_MISFIT * masks:
        parts = "Annotations, SegmentationObject and SegmentationClass"
        raise UserError(f"{text}; at most {LARGEST_MISFIT:.0%} may: are {parts} of one release?")
    logger.warning("%s; they are left out, the boxes stay", text)


def _coco(records: Sequence[_ImageRecord], image_set: str) -> dict[str, Any]:
    # The digits of VOC's own names, so that an image has one id in every set; other names are numbered in order.
    # Annotation ids come from them, and by these a mask fraction keeps the same masks in every set.
    has_digits = all(re.fullmatch(r"\d{4}_\d{6}", record.name) for record in records)
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        image_id = int(record.name.replace("_", "")) if has_digits else number
        height, width = record.size_hw
        entry = {"id": image_id, "file_name": f"{record.name}.jpg", "height": height, "width": width}
        images.append(entry if record.void is None else {**entry, "void": record.void})  # of VOC's own AP
        for object_number, item in record.objects.items():
            annotations.append({"id": image_id * IDS_PER_IMAGE + object_number, "image_id": image_id, **item})
    return {
        "info": {"description": f"PASCAL VOC 2012, {image_set}", "version": str(CONVERTER_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, start=1)],
    }


def _voc_record(voc: Path, name: str, *, masks_required: bool, ignored_without_mask: bool) -> _ImageRecord:
    """The objects of an image in the XML's order; "difficult" ones are crowd.

    Where no masks are required, an image without a map in `SegmentationObject` has boxes only. An object without a
    pixel in the map is an instance with a box, or ignored by its box.
    """
    size_hw = _image_size(voc / "JPEGImages" / f"{name}.jpg")
    xml = voc / "Annotations" / f"{name}.xml"
    with _reading(xml, "not readable as XML"):
        elements = ElementTree.parse(xml).getroot().findall("object")
    annotated = [_xml_object(element, f"{xml}: object {number}") for number, element in enumerate(elements, start=1)]
    map_path = voc / "SegmentationObject" / f"{name}.png"
    masks: dict[int, np.ndarray] = {}
    misfits: list[str] = []
    void = None
    if masks_required or map_path.is_file():
        class_path = voc / "SegmentationClass" / f"{name}.png"
        classes = _read_indices(class_path, size_hw) if class_path.is_file() else None
        indices = _read_indices(map_path, size_hw)
        masks, misfits = _masks(indices, classes, annotated, str(map_path))
        void = annotation(0, indices == VOID)["segmentation"]
    objects = {}
    for number, item in enumerate(annotated, start=1):
        mask = masks.get(number)
        is_crowd = item.difficult or (mask is None and ignored_without_mask)
        objects[number] = annotation(item.category_id, mask, item.box_xywh, is_crowd=is_crowd)
    return _ImageRecord(name, size_hw, objects, misfits, void)


@contextmanager
def _reading(path: Path, fault: str, *, archive: str = ARCHIVE, noun: str = "file") -> Iterator[None]:
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


def _image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header."""
    with _reading(path, "the image cannot be read", noun="image"), open_image(path) as image:
        return image.height, image.width


def _read_indices(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8: the indices of a palette image, not its colours; `size_hw` is that of its photograph."""
    with _reading(path, "the image cannot be decoded"), open_image(path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path}: holds {image.mode} colours, allowed: a palette image, whose values are indices")
        indices = np.array(image, dtype=np.uint8)
    if indices.shape != size_hw:
        size, allowed = (f"{width} x {height}" for height, width in (indices.shape, size_hw))
        raise UserError(f"{path}: {size} pixels (width x height), allowed: those of its photograph, {allowed}")
    return indices


def _read_names(path: Path, archive: str) -> list[str]:
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


def _sbd_record(sbd: Path, name: str, *, image: Path) -> _ImageRecord:
    """The instances of a photograph in VOC's `JPEGImages`, numbered as in the map; one without a pixel is left out."""
    if not image.is_file():
        raise UserError(f"{image}: no such image, but SBD lists it; copy {sbd / 'img' / image.name} there")
    from scipy.io import loadmat  # not above: only SBD's files need it

    path, size_hw = sbd / "inst" / f"{name}.mat", _image_size(image)
    with _reading(path, "no readable SBD file", archive=SBD_ARCHIVE):
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
    return _ImageRecord(name, size_hw, objects)
