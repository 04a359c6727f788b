"""A tiny PASCAL VOC 2012 with SBD beside it: the folders and file forms of the real ones.

Segmentation/train: 000001 (a cat in front of a person, with void between them), 000003 (a dog, and a car without a
pixel). Segmentation/val: 000002 (a person; a difficult cat with a mask, a difficult bus without), 000004 (a sheep, and
a bird without a pixel). Main/train: 000001, 000002, 000005 (boxes of a horse and of a difficult train, no maps).
SBD: 000001, 000002, 000005, 000006.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from semiseg.data.voc import VOC_CLASSES
from tests.coco_files import ellipse, picture

SIZE_HW = (60, 80)
VOID = 255
LISTS = {
    "Segmentation/train": ("2007_000001", "2007_000003"),
    "Segmentation/val": ("2007_000002", "2007_000004"),
    "Segmentation/trainval": ("2007_000001", "2007_000002", "2007_000003", "2007_000004"),
    "Main/train": ("2007_000001", "2007_000002", "2008_000005"),
    "Main/trainval": ("2007_000001", "2007_000002", "2008_000005", "2007_000003"),
}


@dataclass(frozen=True)
class VocObject:
    """An object as VOC writes it: the box (xmin, ymin, xmax, ymax) counts pixels from 1 and includes the last."""

    name: str
    box: tuple[float, float, float, float]
    drawn: bool = True
    difficult: bool = False

    def mask(self) -> np.ndarray:
        """(H, W) bool: the ellipse that fills the box."""
        left, top, right, bottom = self.box
        return ellipse(*SIZE_HW, box_xyxy=(left - 1, top - 1, right, bottom))


IMAGES: dict[str, tuple[VocObject, ...]] = {
    "2007_000001": (VocObject("cat", (5, 4, 30, 40)), VocObject("person", (22, 10, 75, 58))),
    "2007_000002": (
        VocObject("person", (3, 5, 40, 50)),
        VocObject("cat", (45, 8, 78, 30), difficult=True),
        VocObject("bus", (50, 40, 70, 55), drawn=False, difficult=True),
    ),
    "2007_000003": (VocObject("dog", (10, 10, 50, 50)), VocObject("car", (60, 20, 64, 24), drawn=False)),
    "2007_000004": (VocObject("sheep", (20, 6, 60, 44)), VocObject("bird", (70, 50, 74, 54), drawn=False)),
    "2008_000005": (VocObject("horse", (1, 1, 80, 60)), VocObject("train", (30.5, 10, 60, 40), difficult=True)),
    "2008_000006": (VocObject("sofa", (8, 8, 60, 52)),),
}
SBD_IMAGES = ("2007_000001", "2007_000002", "2008_000005", "2008_000006")


def make_voc(root: Path, *, folder: str = "VOCdevkit/VOC2012", sbd: str | None = "SBD") -> Path:
    """Writes the tree and gives the folder VOC2012.

    Args:
        folder: of VOC2012 below root; "." is root itself.
        sbd: folder of SBD below root; None = no SBD. Needs SciPy.
    """
    voc = root / folder
    for part in ("JPEGImages", "Annotations", "SegmentationObject", "SegmentationClass"):
        (voc / part).mkdir(parents=True)
    random = np.random.default_rng(3)
    for name, objects in IMAGES.items():
        Image.fromarray(picture(random, *SIZE_HW)).save(voc / "JPEGImages" / f"{name}.jpg", quality=90)
        write_xml(voc / "Annotations" / f"{name}.xml", objects)
        if name in LISTS["Segmentation/trainval"]:
            write_maps(voc, name, objects)
    for name, images in LISTS.items():
        path = voc / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{image}\n" for image in images))
    if sbd is not None:
        make_sbd(root / sbd)
    return voc


def write_xml(path: Path, objects: Sequence[VocObject]) -> None:
    entries = []
    for item in objects:
        corners = "".join(
            f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)
        )
        # A part of an object has a box of its own, which is none of the object's.
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        entries.append(
            f"<object><name>{escape(item.name)}</name><difficult>{int(item.difficult)}</difficult>"
            f"{part}<bndbox>{corners}</bndbox></object>"
        )
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{''.join(entries)}</annotation>")


def index_map(objects: Sequence[VocObject]) -> np.ndarray:
    """(H, W) uint8 as in SegmentationObject: the first object is in front; a line of void where two meet."""
    indices = np.zeros(SIZE_HW, np.uint8)
    for number in range(len(objects), 0, -1):
        if objects[number - 1].drawn:
            mask = objects[number - 1].mask()
            padded = np.pad(mask, 1)
            inner = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
            border = mask & ~inner & (indices > 0)
            indices[mask] = number
            indices[border] = VOID
    return indices


def write_maps(voc: Path, name: str, objects: Sequence[VocObject]) -> None:
    indices = index_map(objects)
    classes = indices.copy()
    for number, item in enumerate(objects, start=1):
        classes[indices == number] = VOC_CLASSES.index(item.name) + 1
    for part, values in (("SegmentationObject", indices), ("SegmentationClass", classes)):
        write_palette(voc / part / f"{name}.png", values)


def write_palette(path: Path, indices: np.ndarray) -> None:
    """A palette PNG whose colours are not its indices."""
    image = Image.fromarray(indices)
    image.putpalette([(37 * value + 11) % 256 for value in range(768)])
    image.save(path)


def make_sbd(folder: Path, images: Mapping[str, Sequence[VocObject]] | None = None) -> None:
    """SBD in MATLAB files; its instances stand in the opposite order of the XML's objects."""
    images = images or {name: IMAGES[name] for name in SBD_IMAGES}
    (folder / "inst").mkdir(parents=True)
    for name, objects in images.items():
        write_mat(folder / "inst" / f"{name}.mat", [item for item in reversed(objects) if item.drawn])
    names = list(images)
    (folder / "train.txt").write_text("\n".join(names[:-1]))
    (folder / "val.txt").write_text("\n".join(names[-1:]))


def write_mat(path: Path, objects: Sequence[VocObject], *, categories: Sequence[int] | None = None) -> None:
    """`GTinst` as SBD stores it: sparse boundaries in a cell, the index map, a column of categories."""
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    indices = index_map(objects)
    indices[indices == VOID] = 0
    if categories is None:
        categories = [VOC_CLASSES.index(item.name) + 1 for item in objects]
    boundaries = np.empty((len(objects), 1), object)
    for number in range(len(objects)):
        boundaries[number, 0] = csc_matrix(indices == number + 1, dtype=float)
    column = np.array(categories, np.uint8).reshape(-1, 1)
    savemat(
        path,
        {"GTinst": {"Boundaries": boundaries, "Segmentation": indices, "Categories": column}},
        do_compression=True,
    )
