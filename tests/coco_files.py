"""A small factory of COCO data sets for tests: images with structure, and annotations of every kind.

files = make_coco(tmp_path, annotations=[polygon_annotation(1, image_id=1, category_id=1, points=...)])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

CLASS_NAMES = ("cat", "dog", "bird", "fish")


@dataclass(frozen=True)
class CocoFiles:
    """A data set on disk; `content` is what the json holds. `rewrite` changes the json in place."""

    annotations: Path
    images: Path
    content: dict[str, Any]

    def rewrite(self, change: Callable[[dict[str, Any]], object]) -> CocoFiles:
        content = json.loads(json.dumps(self.content))
        change(content)
        self.annotations.write_text(json.dumps(content))
        return CocoFiles(self.annotations, self.images, content)


@dataclass(frozen=True)
class KeepClasses:
    """A stand-in for a class split: the classes listed keep the masks whose annotation id is a multiple of `every`."""

    seen: tuple[str, ...]
    every: int = 1

    def keeps_mask(self, class_name: str, annotation_id: int) -> bool:
        return class_name in self.seen and annotation_id % self.every == 0


def make_coco(
    folder: Path,
    *,
    sizes_hw: Sequence[tuple[int, int]] = ((64, 80), (64, 80), (48, 96), (80, 64)),
    class_names: Sequence[str] = CLASS_NAMES,
    annotations: Sequence[dict[str, Any]] | None = None,
    instances_per_image: int = 4,
    seed: int = 0,
    suffix: str = ".png",
) -> CocoFiles:
    """Writes `folder/images/*` and `folder/instances.json`; image ids are 1.., category ids 1, 3, 5, ...

    Without `annotations`, each image gets `instances_per_image` of them in turn: polygon, uncompressed RLE,
    compressed RLE, box only; and the first image a crowd region.
    """
    random = np.random.default_rng(seed)
    images_folder = folder / "images"
    images_folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number, (height, width) in enumerate(sizes_hw, start=1):
        name = f"{number:03d}{suffix}"
        Image.fromarray(picture(random, height, width)).save(images_folder / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": 2 * label + 1, "name": name} for label, name in enumerate(class_names)]
    if annotations is None:
        annotations = _annotations(random, images, categories, instances_per_image)
    content = {"images": images, "annotations": list(annotations), "categories": categories}
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return CocoFiles(path, images_folder, content)


def picture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 with smooth structure and some noise."""
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    smooth = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    noisy: np.ndarray = np.clip(smooth + random.integers(-8, 9, smooth.shape), 0, 255)
    return noisy.astype(np.uint8)


def polygon_annotation(
    number: int, *, image_id: int, category_id: int, points: Sequence[float], iscrowd: int = 0
) -> dict[str, Any]:
    """One outline [x0, y0, x1, y1, ...]; the box is that of the points."""
    x, y = points[0::2], points[1::2]
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    return _annotation(number, image_id, category_id, box, [list(points)], iscrowd)


def rle_annotation(
    number: int, *, image_id: int, category_id: int, mask: np.ndarray, compressed: bool, iscrowd: int = 0
) -> dict[str, Any]:
    """The box is that of the mask, which may not be empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return _annotation(number, image_id, category_id, [int(v) for v in box], encode(mask, compressed), iscrowd)


def box_annotation(number: int, *, image_id: int, category_id: int, box_xywh: Sequence[float]) -> dict[str, Any]:
    """No `segmentation` at all."""
    annotation = _annotation(number, image_id, category_id, list(box_xywh), None, 0)
    del annotation["segmentation"]
    return annotation


def encode(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    """A mask (H, W) as COCO's RLE object."""
    if compressed:
        counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    else:
        flat = mask.astype(np.uint8).flatten(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *edges, flat.size]).tolist()
        counts = [0, *counts] if flat[0] else counts
    return {"size": list(mask.shape), "counts": counts}


def ellipse(height: int, width: int, *, box_xyxy: Sequence[float]) -> np.ndarray:
    """(H, W) bool: the ellipse that fills the box."""
    x0, y0, x1, y1 = box_xyxy
    y, x = np.mgrid[:height, :width] + 0.5
    distance: np.ndarray = ((x - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2 + ((y - (y0 + y1) / 2) / ((y1 - y0) / 2)) ** 2
    return distance <= 1


def _annotation(
    number: int, image_id: int, category_id: int, box: list[float], segmentation: Any, iscrowd: int
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": _area(box, segmentation),
        "iscrowd": iscrowd,
        "segmentation": segmentation,
    }


def _area(box: list[float], segmentation: Any) -> float:
    """Of the mask, or of the box where there is none."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        rle = segmentation if isinstance(counts, str) else coco_mask.frPyObjects(segmentation, *segmentation["size"])
        return float(coco_mask.area(rle))
    if isinstance(segmentation, list):
        x, y = np.array(segmentation[0][0::2]), np.array(segmentation[0][1::2])
        return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
    return box[2] * box[3]


def _annotations(
    random: np.random.Generator, images: list[dict[str, Any]], categories: list[dict[str, Any]], per_image: int
) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for image in images:
        height, width = image["height"], image["width"]
        for kind in range(per_image):
            x0, y0 = random.integers(0, width // 2), random.integers(0, height // 2)
            box = [
                int(v) for v in (x0, y0, x0 + random.integers(12, width // 2), y0 + random.integers(12, height // 2))
            ]
            category_id = categories[len(result) % len(categories)]["id"]
            place = {"image_id": image["id"], "category_id": category_id}
            number = len(result) + 1
            if kind % 4 == 0:
                points = [box[0], box[1], box[2], (box[1] + box[3]) / 2, box[0] + 3.25, box[3]]
                result.append(polygon_annotation(number, points=points, **place))
            elif kind % 4 == 3:
                x, y, right, bottom = box
                result.append(box_annotation(number, box_xywh=[x, y, right - x, bottom - y], **place))
            else:
                mask = ellipse(height, width, box_xyxy=box)
                result.append(rle_annotation(number, mask=mask, compressed=kind % 4 == 2, **place))
    first = images[0]
    crowd = ellipse(first["height"], first["width"], box_xyxy=(4, 6, 40, 30))
    place = {"image_id": first["id"], "category_id": categories[-1]["id"]}
    result.append(rle_annotation(len(result) + 1, mask=crowd, compressed=False, iscrowd=1, **place))
    return result
