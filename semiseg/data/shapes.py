"""Shapes: the embedded data set, drawn on the spot from a seed, in COCO layout on disk.

Twelve families of shapes on cluttered backgrounds, several in a picture, hiding parts of each other, with exact masks
of what is visible, which is decided before anything is drawn. Picture i depends on the seed and on i alone, not on the
number of pictures or the platform.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from semiseg.config.read import digest
from semiseg.data.coco import annotation
from semiseg.data.shapes_drawing import FAMILIES, Draws, Frame, Patch, Picture, fill, turned
from semiseg.data.workers import START_METHOD, available_cores, live_as_long_as_the_main_process, results_of
from semiseg.errors import UserError
from semiseg.files import make_once, settle, whole_folder

GENERATOR_VERSION = 2  # raised with every change of pictures or annotations, so that no stale folder is used
SHAPES_CLASSES: tuple[str, ...] = tuple(sorted(FAMILIES))  # of each label
ANNOTATIONS = "annotations.json"
IMAGES = "images"
SMALLEST_IMAGE = 32
MANY_PICTURES = 100  # from here on several processes draw them
PICTURES_AT_A_TIME = 16

FEWEST, MOST = 2, 4  # objects in a picture; now and then less, if no place is found
MIN_VISIBLE_PIXELS = 24
MIN_VISIBLE_SHARE = 0.7
SIDES = (0.32, 0.56)  # longer side of an object's box, as a share of the image's side
ANGLES = (0.0, 50.0)  # degrees; half of the objects are mirrored as well. Slanting shapes fill less of their box
INSIDE = 0.4  # the centre's least distance from the image's edge, as a share of the object's side
DOUBLED = 0.33  # share of the objects that lie on a blob of their own colour
TRIES = 8  # positions tried for each object

Annotations = list[dict[str, Any]]  # of one picture


def shapes_folder(root: Path, *, images: int, image_size: int, seed: int) -> Path:
    """Where `ensure_shapes` puts a data set; its name carries a digest of parameters and generator version."""
    parameters = {"images": images, "image_size": image_size, "seed": seed, "version": GENERATOR_VERSION}
    return root / f"shapes-{images}x{image_size}px-seed{seed}-{digest(parameters, 8)}"


def ensure_shapes(root: Path, *, images: int, image_size: int, seed: int) -> Path:
    """`shapes_folder` with `images/` and `annotations.json`, drawn first if it is not there or pictures are missing.

    Of processes that ask at once one draws and the others wait; where the file system has no locks, each draws and the
    first to finish is kept. Impossible parameters are a `UserError`.
    """
    folder = shapes_folder(root, images=images, image_size=image_size, seed=seed)

    def draw() -> None:
        # In this order: a folder that another process puts in place right now is complete and must not be removed.
        if folder.exists() and not _is_complete(folder, images):
            shutil.rmtree(folder)
        if not folder.exists():
            make_shapes(folder, images=images, image_size=image_size, seed=seed)

    waiting = f"{root}: another process draws Shapes; waiting"
    make_once(folder, draw, ready=lambda: _is_complete(folder, images), waiting=waiting)
    return folder


def make_shapes(folder: Path, *, images: int, image_size: int, seed: int) -> None:
    """Draws a Shapes data set into a new folder: `images/000001.png`, ... and `annotations.json`.

    The folder appears under its name when it is complete; if the drawing is interrupted, nothing is left. If another
    process has drawn it meanwhile, its is kept. Errors: as `ensure_shapes`, and if the folder exists and is not empty.
    """
    if images < 1 or image_size < SMALLEST_IMAGE or seed < 0:
        raise UserError(
            f"Shapes: images={images}, image_size={image_size}, seed={seed}: needs at least 1 image, "
            f"a side of at least {SMALLEST_IMAGE} pixels and a seed that is not negative"
        )
    settle(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a new or an empty folder")
    with whole_folder(folder) as temporary:
        _draw_all(temporary, images=images, image_size=image_size, seed=seed)


def _draw_all(folder: Path, *, images: int, image_size: int, seed: int) -> None:
    (folder / IMAGES).mkdir(parents=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    draw = partial(_draw_picture, folder=folder / IMAGES, image_size=image_size, seed=seed)
    with closing(_on_every_core(draw, images)) as pictures:
        title = f"drawing {images} Shapes pictures"
        for index, objects in enumerate(tqdm(pictures, total=images, desc=title, unit="img", disable=None)):
            size = {"width": image_size, "height": image_size}
            records.append({"id": index + 1, "file_name": _file_name(index), **size, "license": 1})
            for item in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **item})
    text, version = "Shapes: drawn by semiseg from a seed", str(GENERATOR_VERSION)
    document = {
        "info": {"description": text, "version": version, "images": images, "image_size": image_size, "seed": seed},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": records,
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES_CLASSES)],
    }
    (folder / ANNOTATIONS).write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def _draw_picture(index: int, *, folder: Path, image_size: int, seed: int) -> Annotations:
    """Writes the file of one picture; its annotations."""
    pixels, objects = compose(seed, index, image_size)
    # Not compressed: the pictures are noise, and half of a picture's way into a batch was taking it apart.
    Image.fromarray(pixels).save(folder / _file_name(index), compress_level=0)
    # Beyond COCO, `visible` is the visible share of the whole object.
    shares = [round(int(item.visible.sum()) / item.full_area, 4) for item in objects]
    return [annotation(o.label + 1, o.visible) | {"visible": s} for o, s in zip(objects, shares, strict=True)]


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _on_every_core(draw: Callable[[int], Annotations], images: int) -> Generator[Annotations, None, None]:
    """What `draw` returns for each picture, in their order; where there are many, processes share them.

    When it is closed, no process draws any more: what they write can be removed.
    """
    # Elsewhere than on Linux, a script of the user's own would be run again in each process.
    if images < MANY_PICTURES or START_METHOD != "fork" or multiprocessing.current_process().daemon:
        yield from map(draw, range(images))
        return
    fork = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(available_cores(), fork, initializer=live_as_long_as_the_main_process) as pool:
        yield from results_of(pool, draw, range(images), at_a_time=PICTURES_AT_A_TIME)


def _is_complete(folder: Path, images: int) -> bool:
    return (folder / ANNOTATIONS).is_file() and len(list((folder / IMAGES).glob("*.png"))) == images


@dataclass
class SceneObject:
    """One annotated object."""

    label: int  # index into `SHAPES_CLASSES`
    frame: Frame
    patch: Patch  # what it covers, inside the image
    visible: NDArray[np.bool_]  # (H, W), the pixels that show it; those of different objects are disjoint
    full_area: int  # pixels of the whole object, parts outside the image included


def compose(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """Picture `index` of the data set with this seed: (size, size, 3) RGB and its objects, from back to front."""
    draws = Draws(seed, index)
    objects = _place_objects(draws, size)
    picture = Picture(draws, size)
    colours = [picture.add_double(item.patch) if draws.chance(DOUBLED) else None for item in objects]
    for item, colour in zip(objects, colours, strict=True):
        picture.add_object(item.patch, item.frame, family=SHAPES_CLASSES[item.label], colour=colour)
    return picture.finished(), objects


def _place_objects(draws: Draws, size: int) -> list[SceneObject]:
    """Objects from back to front, each leaving enough of those behind it in sight."""
    count = draws.integer(FEWEST, MOST)
    share = draws.uniform(MIN_VISIBLE_SHARE, 1.0)  # some pictures are crowded, some are not
    sides = [size * draws.uniform(*SIDES) for _ in range(count)]
    sides.sort(key=lambda side: side * draws.uniform(0.3, 1.0), reverse=True)
    placed: list[SceneObject] = []
    spare = [size * SIDES[0]] * 8  # for pictures in which too few found a place
    for index, side in enumerate(sides + spare):
        if index >= count and len(placed) >= FEWEST:
            break
        label = draws.integer(0, len(SHAPES_CLASSES) - 1)
        for _ in range(TRIES):
            candidate = _draw_object(draws, size, label, side)
            if _try_to_place(candidate, placed, share):
                break
    return placed


def _draw_object(draws: Draws, size: int, label: int, side: float) -> SceneObject:
    """An object whose outline is stretched, turned, and scaled so that its box's longer side is `side`."""
    shape = FAMILIES[SHAPES_CLASSES[label]](draws)
    stretch = draws.uniform(0.8, 1.0) * draws.choice((-1.0, 1.0))  # of the y axis, or its mirror image
    angle = math.radians(draws.uniform(*ANGLES))
    margin = INSIDE * side
    centre = draws.uniform(margin, size - margin), draws.uniform(margin, size - margin)
    outline = shape.mapped(lambda ring: turned(ring, angle, stretch))
    points = np.concatenate(outline.solids)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = side / float((high - low).max())
    shift = np.array(centre) - scale * (low + high) / 2
    whole = fill(outline.mapped(lambda ring: ring * scale + shift))
    patch = whole.inside((size, size))
    visible = np.zeros((size, size), dtype=np.bool_)
    visible[patch.window] = patch.mask
    frame = Frame(float(shift[0]), float(shift[1]), angle, scale, math.copysign(1.0, stretch))
    return SceneObject(label, frame, patch, visible, int(whole.mask.sum()))


def _try_to_place(candidate: SceneObject, placed: list[SceneObject], share: float) -> bool:
    """Adds the candidate in front of the others, unless too little of anything would be seen."""
    left = [item.visible & ~candidate.visible for item in placed]
    for visible, item in zip([*left, candidate.visible], [*placed, candidate], strict=True):
        if np.count_nonzero(visible) < max(MIN_VISIBLE_PIXELS, share * item.full_area):
            return False
    for item, visible in zip(placed, left, strict=True):
        item.visible = visible
    placed.append(candidate)
    return True
