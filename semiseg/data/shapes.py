"""Shapes: the embedded data set, drawn on the spot from a seed, in COCO layout on disk.

Twelve families of shapes on cluttered backgrounds, several in a picture, hiding parts of each other, with exact masks
of what is visible. Picture i depends on the seed and on i alone, not on the number of pictures or the platform.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from semiseg.config.read import digest
from semiseg.data.coco import annotation
from semiseg.data.shapes_scene import LABELS, compose
from semiseg.data.workers import START_METHOD, live_as_long_as_the_main_process
from semiseg.errors import UserError
from semiseg.resources import available_cores, make_once, settle, whole_folder

GENERATOR_VERSION = 2  # raised with every change of pictures or annotations, so that no stale folder is used
SHAPES_CLASSES: tuple[str, ...] = LABELS
ANNOTATIONS = "annotations.json"
IMAGES = "images"
SMALLEST_IMAGE = 32
MANY_PICTURES = 100  # from here on several processes draw them
PICTURES_AT_A_TIME = 16

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
    return [annotation(o.label + 1, o.visible) | {"visible": round(o.visible_share, 4)} for o in objects]


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
        try:
            yield from pool.map(draw, range(images), chunksize=PICTURES_AT_A_TIME)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_complete(folder: Path, images: int) -> bool:
    return (folder / ANNOTATIONS).is_file() and len(list((folder / IMAGES).glob("*.png"))) == images
