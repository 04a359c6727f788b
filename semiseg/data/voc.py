"""PASCAL VOC 2012 (and SBD beside it) -> a COCO json per image set, written on first use.

Image sets: the lists of `ImageSets/Segmentation` (`train`, `val`, `trainval`, or any file that lies there), and three
that are made here for training. These leave out the images of Segmentation/val, on which a training is evaluated:
`train_aug` (Segmentation/train, and all of SBD with SBD's masks) and `main_train`, `main_trainval` (the lists of
`ImageSets/Main`, masks where `SegmentationObject` has the image, boxes elsewhere).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from semiseg.data.voc_objects import ARCHIVE, SBD_ARCHIVE, VOC_CLASSES, ImageRecord, read_names, sbd_record, voc_record
from semiseg.errors import UserError
from semiseg.files import require_folder, settle, write_text

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 1  # raise it when the json changes: older files are then left alone and made anew
SITE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
SBD_SITE = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
SBD_FOLDERS = ("SBD", "benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset")
EVALUATION_SET = "val"
DERIVED_SETS = ("train_aug", "main_train", "main_trainval")
LARGEST_MISFIT = 0.01  # share of the masks of a set that may contradict their object before it is an error
IDS_PER_IMAGE = 1000


def voc_files(root: Path, image_set: str) -> tuple[Path, Path]:
    """Where `ensure_voc` has or would have its two paths; without a layout there, as the archive unpacks."""
    images = (_find_voc(root) or root / "VOCdevkit" / "VOC2012") / "JPEGImages"
    return root / "semiseg" / f"voc2012_{image_set}_v{CONVERTER_VERSION}.json", images


def ensure_voc(root: Path, image_set: str) -> tuple[Path, Path]:
    """COCO instances json of an image set, converted first if it is not there, and its image folder.

    The json is the same byte for byte wherever and in whichever layout the data lie, since its digest identifies the
    data. Boxes are xywh in pixels of the stored image: VOC's pixels count from 1 and include the last one.

    Args:
        root: the folder that holds `VOCdevkit/VOC2012`, or `VOC2012`, or is that; SBD see `SBD_FOLDERS`.
        image_set: see the module.

    Raises:
        UserError: unknown set; something is missing (what to download and where to put it) or broken (which file);
            more than 1 % of the masks contradict their objects.
    """
    annotations, images = voc_files(root, image_set)
    settle(annotations.parent)
    if annotations.is_file():
        return annotations, images
    voc, *sbd = _require_parts(root, image_set)
    sources = _image_set(voc, sbd, image_set)
    require_folder(annotations.parent)
    records = []
    for name in tqdm(sorted(sources), desc=f"VOC 2012 {image_set}", unit=" images", delay=1, disable=None):
        if sources[name] == "sbd":
            records.append(sbd_record(sbd[0], name, image=images / f"{name}.jpg"))
        else:
            # Mask AP needs a mask of every instance: in the evaluation's set an object of which no mask is known is
            # ignored by its box; elsewhere it is an instance with a box.
            required, ignored = sources[name] == "masks", image_set == EVALUATION_SET
            records.append(voc_record(voc, name, masks_required=required, ignored_without_mask=ignored))
    _check_misfits(records, image_set)
    write_text(annotations, json.dumps(_coco(records, image_set), separators=(",", ":")) + "\n")
    return annotations, images


def _find_voc(root: Path) -> Path | None:
    candidates = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    return next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)


def _require_parts(root: Path, image_set: str) -> list[Path]:
    """The folders of VOC and, where the set needs it, of SBD; all that is missing is said at once."""
    folders, missing = [], []
    for require in (_require_voc, _require_sbd) if image_set == "train_aug" else (_require_voc,):
        try:
            folders.append(require(root))
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; and ".join(missing))
    return folders


def _require_voc(root: Path) -> Path:
    voc = _find_voc(root)
    if voc is None:
        raise UserError(
            f"{root}: no PASCAL VOC 2012 there; download {SITE}/{ARCHIVE} and unpack it in {root}, "
            f"so that {root / 'VOCdevkit' / 'VOC2012' / 'JPEGImages'} is there"
        )
    for part in ("Annotations", "SegmentationObject", "ImageSets/Segmentation"):
        folder = voc / part
        if not folder.is_dir() or next(folder.iterdir(), None) is None:
            fault = "is empty" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {fault}; it is part of {ARCHIVE}: unpack that again, so that {voc} is complete")
    return voc


def _require_sbd(root: Path) -> Path:
    """The folder with SBD's `inst/`, `train.txt` and `val.txt`."""
    for name in SBD_FOLDERS:
        if (root / name / "inst").is_dir():
            return root / name
    raise UserError(
        f"{root}: no SBD there, which the image set 'train_aug' needs; download {SBD_SITE}/{SBD_ARCHIVE} and unpack "
        f"it in {root}, so that {root / SBD_FOLDERS[1] / 'inst'} is there, or set data.voc.train_set to 'train'"
    )


def _image_set(voc: Path, sbd: Sequence[Path], image_set: str) -> dict[str, str]:
    """The images of a set -> `masks` (SegmentationObject must have it), `boxes` (it may have it) or `sbd`."""
    lists = voc / "ImageSets" / "Segmentation"
    names = sorted(path.stem for path in lists.glob("*.txt"))
    if image_set in DERIVED_SETS:
        if sbd:
            lists_of_sbd = (read_names(sbd[0] / f"{part}.txt", SBD_ARCHIVE) for part in ("train", "val"))
            source = dict.fromkeys(chain.from_iterable(lists_of_sbd), "sbd")
            source |= dict.fromkeys(read_names(lists / "train.txt", ARCHIVE), "masks")
        else:
            main = voc / "ImageSets" / "Main" / f"{image_set.removeprefix('main_')}.txt"
            source = dict.fromkeys(read_names(main, ARCHIVE), "boxes")
        for name in read_names(lists / f"{EVALUATION_SET}.txt", ARCHIVE):
            source.pop(name, None)
    elif image_set in names:
        source = dict.fromkeys(read_names(lists / f"{image_set}.txt", ARCHIVE), "masks")
    else:
        known = ", ".join([*names, *DERIVED_SETS])
        raise UserError(f"VOC image set {image_set!r}: there is none in {lists}; known: {known}")
    if not source:
        raise UserError(f"VOC image set {image_set!r}: lists no image")
    return source


def _check_misfits(records: Sequence[ImageRecord], image_set: str) -> None:
    misfits = [text for record in records for text in record.misfits]
    if not misfits:
        return
    masks = len(misfits) + sum("segmentation" in item for record in records for item in record.objects.values())
    text = f"{len(misfits)} of {masks} masks of VOC image set {image_set!r} contradict their objects: {misfits[0]}"
    if len(misfits) > LARGEST_MISFIT * masks:
        parts = "Annotations, SegmentationObject and SegmentationClass"
        raise UserError(f"{text}; at most {LARGEST_MISFIT:.0%} may: are {parts} of one release?")
    logger.warning("%s; they are left out, the boxes stay", text)


def _coco(records: Sequence[ImageRecord], image_set: str) -> dict[str, Any]:
    # The digits of VOC's own names, so that an image has one id in every set; other names are numbered in order.
    # Annotation ids come from them, and by these a mask fraction keeps the same masks in every set.
    has_digits = all(re.fullmatch(r"\d{4}_\d{6}", record.name) for record in records)
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        image_id = int(record.name.replace("_", "")) if has_digits else number
        height, width = record.size_hw
        images.append({"id": image_id, "file_name": f"{record.name}.jpg", "height": height, "width": width})
        for object_number, item in record.objects.items():
            annotations.append({"id": image_id * IDS_PER_IMAGE + object_number, "image_id": image_id, **item})
    return {
        "info": {"description": f"PASCAL VOC 2012, {image_set}", "version": str(CONVERTER_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, start=1)],
    }
