"""Tool: draws a data set of COCO's size and layout, to measure memory and start-up times without COCO.

    python -m tests.make_large_coco OUT                     # 118 000 images, 860 000 instances, 5 000 for validation
    python -m tests.make_large_coco OUT --images 300 --instances 2200 --val-images 40

The json has COCO's proportions: image sizes, instances per image, points per outline, 1.5 % crowd regions as
uncompressed RLE. The image files are links to a few hundred small JPEGs, so that reading and decoding work while the
disk holds only those. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from tests.coco_files import picture

# (height, width) and how often, about as in COCO
SIZES_HW = {(480, 640): 40, (640, 480): 15, (427, 640): 17, (426, 640): 9, (640, 427): 9, (375, 500): 6, (640, 640): 4}
CLASSES = 80
CROWD_SHARE = 0.015
INSTANCES_PER_IMAGE_SHAPE = 0.9  # of the gamma distribution: many images with few instances, some with many
POINTS_LOG_MEAN, POINTS_LOG_SPREAD = 2.9, 0.65  # 22 points per outline in the mean
SECOND_OUTLINE_SHARE = 0.1


def make_large_coco(
    out: Path, *, images: int, instances: int, val_images: int, pictures: int = 200, seed: int = 0
) -> None:
    """Writes `out/annotations/instances_{train,val}2017.json`, `out/train2017` and `out/val2017`.

    Args:
        images, instances: of the training set, exactly so many.
        val_images: of the validation set, with as many instances per image.
        pictures: distinct JPEG files; every image is a link to one of them.
    """
    random = np.random.default_rng(seed)
    drawn, sizes = _draw_pictures(random, out / "pictures", pictures)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for name, count in (("train2017", images), ("val2017", val_images)):
        choice = random.integers(0, pictures, count)
        _link(out / name, [drawn[number] for number in choice])
        total = instances if name == "train2017" else round(instances * count / images)
        with (out / "annotations" / f"instances_{name}.json").open("w", encoding="utf-8") as file:
            _write(file, random, [sizes[number] for number in choice], total, name)


def _draw_pictures(random: np.random.Generator, folder: Path, count: int) -> tuple[list[Path], list[tuple[int, int]]]:
    folder.mkdir(parents=True)
    weights = np.array(list(SIZES_HW.values()), dtype=float)
    sizes = [list(SIZES_HW)[number] for number in random.choice(len(SIZES_HW), count, p=weights / weights.sum())]
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.fromarray(picture(random, height, width)).save(path, quality=85)
    return paths, sizes


def _link(folder: Path, sources: list[Path]) -> None:
    """Hard links; symbolic ones where the file system has no others."""
    folder.mkdir(parents=True)
    for number, source in enumerate(sources, start=1):
        name = folder / f"{number:012d}.jpg"
        try:
            os.link(source, name)
        except OSError:
            name.symlink_to(source.resolve())


def _write(
    file: TextIO, random: np.random.Generator, sizes_hw: list[tuple[int, int]], instances: int, name: str
) -> None:
    """The json, written piece by piece."""
    entries = (
        {"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width}
        for number, (height, width) in enumerate(sizes_hw, start=1)
    )
    file.write('{"images": [')
    file.write(", ".join(map(json.dumps, entries)))
    file.write('], "categories": ')
    json.dump([{"id": number, "name": f"class {number:02d}"} for number in range(1, CLASSES + 1)], file)
    file.write(', "annotations": [')
    separator = ""
    for text in tqdm(_annotations(random, sizes_hw, instances), total=instances, desc=name, disable=None):
        file.write(separator + text)
        separator = ", "
    file.write("]}\n")


def _annotations(random: np.random.Generator, sizes_hw: list[tuple[int, int]], instances: int) -> Iterator[str]:
    weights = random.gamma(INSTANCES_PER_IMAGE_SHAPE, size=len(sizes_hw))
    per_image = random.multinomial(instances, weights / weights.sum())
    number = 0
    for image_id, (count, (height, width)) in enumerate(zip(per_image, sizes_hw, strict=True), start=1):
        sides = np.array((width, height))
        extents = np.clip(np.exp(random.normal(-1.9, 0.9, (count, 2))), 0.015, 0.95) * sides
        corners = random.random((count, 2)) * (sides - extents)
        for corner, extent in zip(corners, extents, strict=True):
            number += 1
            crowd = random.random() < CROWD_SHARE
            segmentation = (
                _crowd_rle(random, corner, extent, height, width) if crowd else _outlines(random, corner, extent)
            )
            box = [round(float(value), 2) for value in (*corner, *extent)]
            category = int(random.integers(1, CLASSES + 1))
            yield json.dumps(
                {
                    "segmentation": segmentation,
                    "area": round(0.6 * box[2] * box[3], 4),
                    "iscrowd": int(crowd),
                    "image_id": image_id,
                    "bbox": box,
                    "category_id": category,
                    "id": number,
                }
            )


def _outlines(random: np.random.Generator, corner: np.ndarray, extent: np.ndarray) -> list[list[float]]:
    """One outline, sometimes two: points around an ellipse with a wavy radius, to two decimals."""
    outlines = []
    for _ in range(1 + (random.random() < SECOND_OUTLINE_SHARE)):
        points = max(4, round(np.exp(random.normal(POINTS_LOG_MEAN, POINTS_LOG_SPREAD))))
        angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
        radii = 0.5 - 0.2 * random.random(points)
        around = np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii[:, None] + 0.5
        outlines.append(np.round(corner + around * extent, 2).flatten().tolist())
    return outlines


def _crowd_rle(
    random: np.random.Generator, corner: np.ndarray, extent: np.ndarray, height: int, width: int
) -> dict[str, object]:
    """Uncompressed, column by column: the filled part of each column of the box, ragged at its lower end."""
    left, top = corner.astype(int)
    columns, rows = np.maximum(extent.astype(int), 1)
    counts: list[int] = []
    last = 0
    for column in range(left, left + columns):
        start = column * height + top
        filled = int(random.integers(1, rows + 1))
        if start > last or not counts:
            counts += [int(start - last), filled]
        else:
            counts[-1] += filled
        last = start + filled
    counts.append(int(height * width - last))
    return {"size": [height, width], "counts": counts}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Draws a data set of COCO's size and layout.")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--instances", type=int, default=860_000)
    parser.add_argument("--val-images", type=int, default=5_000)
    parser.add_argument("--pictures", type=int, default=200, help="distinct image files")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    make_large_coco(
        values.out,
        images=values.images,
        instances=values.instances,
        val_images=values.val_images,
        pictures=values.pictures,
        seed=values.seed,
    )


if __name__ == "__main__":
    main()
