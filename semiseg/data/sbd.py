"""SBD, the Semantic Boundaries Dataset: masks of instances for 11 355 images of PASCAL VOC, from MATLAB files.

A file `inst/NAME.mat` holds the struct `GTinst`: `Segmentation`, a map of indices 0 (background) and 1..n, and
`Categories`, the classes 1..20 of the n instances. Their order is not that of VOC's XML, so boxes are those of the
masks: from the first to the last pixel, which is included, as in VOC's own. SBD knows no "difficult".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from semiseg.data.voc_objects import VOC_CLASSES, VOID, ImageRecord, annotation, image_size, read_names, reading
from semiseg.errors import UserError

ARCHIVE = "benchmark.tgz"
SITE = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
FOLDERS = ("SBD", "benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset")


def find_sbd(root: Path) -> Path:
    """The folder with SBD's `inst/`, `train.txt` and `val.txt` below a data root.

    Raises:
        UserError: none is there; says what to download and where to put it.
    """
    for name in FOLDERS:
        if (root / name / "inst").is_dir():
            return root / name
    raise UserError(
        f"{root}: no SBD there, which the image set 'train_aug' needs; download {SITE}/{ARCHIVE} and unpack "
        f"it in {root}, so that {root / FOLDERS[1] / 'inst'} is there, or set data.voc.train_set to 'train'"
    )


def sbd_list(sbd: Path) -> list[str]:
    """Names of the images of SBD's own train and val lists."""
    return [name for part in ("train", "val") for name in read_names(sbd / f"{part}.txt", ARCHIVE)]


def sbd_record(sbd: Path, name: str, *, image: Path) -> ImageRecord:
    """The instances of an image, numbered as in its map; an instance without a pixel is left out.

    Args:
        sbd: see `find_sbd`.
        image: the photograph in VOC's `JPEGImages`; SBD annotates VOC's own images.

    Raises:
        UserError: SciPy is not installed; a file is missing, broken or contradicts itself.
    """
    if not image.is_file():
        raise UserError(f"{image}: no such image, but SBD lists it; copy {sbd / 'img' / image.name} there")
    path = sbd / "inst" / f"{name}.mat"
    indices, categories = _read_mat(path)
    size_hw = image_size(image)
    if indices.shape != size_hw:
        raise UserError(f"{path}: 'Segmentation' is {indices.shape}, allowed: (height, width) of its image, {size_hw}")
    largest = max((int(value) for value in np.unique(indices) if value != VOID), default=0)
    if largest > len(categories):
        raise UserError(f"{path}: 'Segmentation' has index {largest}, but 'Categories' {len(categories)} entries")
    wrong = [value for value in categories if not 1 <= value <= len(VOC_CLASSES)]
    if wrong:
        raise UserError(f"{path}: 'Categories' holds {wrong[0]}, allowed: 1 to {len(VOC_CLASSES)}")
    masks = {number: indices == number for number in range(1, len(categories) + 1)}
    objects = {number: annotation(categories[number - 1], None, mask) for number, mask in masks.items() if mask.any()}
    return ImageRecord(name, size_hw, objects)


def _read_mat(path: Path) -> tuple[np.ndarray, list[int]]:
    """`Segmentation` (H, W) and `Categories` (n) of a file."""
    from scipy.io import loadmat  # not above: only these files need it

    with reading(path, "no readable SBD file", archive=ARCHIVE):
        struct = loadmat(str(path), variable_names=["GTinst"])["GTinst"][0, 0]
        categories = [int(value) for value in np.asarray(struct["Categories"]).ravel()]
        return np.asarray(struct["Segmentation"]), categories
