"""Row `data`: batches of one worker: decode, resize, flip, rasterise, collate. Seconds are per image.

Straightforward: decoding and resizing the same images to the same sizes, and nothing else. So the goal is a speed-up
of 0.9 and more, not above 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from semiseg.bench.inputs import coco_like_boxes, picture
from semiseg.bench.row import Close, Place, Row, Sizes, Task, array
from semiseg.data.collate import Collate
from semiseg.data.dataset import InstanceDataset, build_rule
from semiseg.data.loader import StepBatches, build_train_loader
from semiseg.data.table import load_table
from semiseg.data.transforms import TrainTransform
from semiseg.structures.inputs import Batch

CLASSES = 80
OUTLINE_POINTS = 24
TRANSFORM = TrainTransform(short_sides=[640, 672, 704, 736, 768, 800], long_side=1333, flip=0.5)


def decode_and_resize(path: Path, size_hw: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 of an image file."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    resized: Tensor = functional.resize(pixels, list(size_hw), antialias=True)
    return resized


def _ours(sizes: Sizes, place: Place) -> Task:
    annotations, images = _inputs(sizes, place.folder)
    dataset = InstanceDataset(
        load_table(annotations, images, cache=place.folder / "cache"),
        rule=build_rule("masks", None),
        transform=TRANSFORM,
        mask_stride=4,
        bottom_rows_without_affinity=10,
    )

    def batches() -> Iterator[Batch]:
        with one_thread():
            yield from build_train_loader(
                dataset, batches=_batches(sizes), collate=Collate(32), workers=0, pin_memory=False
            )

    def unpadded() -> Iterator[Tensor]:
        for batch in batches():
            for image, (height, width) in zip(batch.images, batch.image_sizes_hw.tolist(), strict=True):
                yield image[:, :height, :width]

    return Task(lambda: exhaust(batches()), lambda _: _fingerprints(unpadded()), units=sizes["images"])


def _straightforward(sizes: Sizes, place: Place) -> Task:
    _, images = _inputs(sizes, place.folder)
    size_hw = (sizes["height"], sizes["width"])
    keys = [key for batch in _batches(sizes) for key in batch]

    def inputs() -> Iterator[Tensor]:
        with one_thread():
            for row, seed in keys:
                yield decode_and_resize(images / f"{row:06d}.jpg", TRANSFORM(size_hw, seed).input_hw)

    return Task(lambda: exhaust(inputs()), lambda _: _fingerprints(inputs()), units=sizes["images"])


def exhaust(items: Iterator[Any]) -> None:
    """Takes everything and keeps nothing."""
    for _ in items:
        pass


def _batches(sizes: Sizes) -> StepBatches:
    """Every image once."""
    return StepBatches(
        sizes["images"],
        batch_size=sizes["batch"],
        accumulation=1,
        processes=1,
        rank=0,
        seed=0,
        start_step=0,
        steps=sizes["images"] // sizes["batch"],
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch as a loader's worker has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fingerprints(images: Iterator[Tensor]) -> dict[str, Any]:
    """What is the same of an image (3, H, W) and its mirror image: sums of the rows, and of their squares."""
    sizes, rows = [], []
    for image in images:
        sizes.append(tuple(image.shape))
        rows += [image.double().sum(2).flatten(), image.double().square().sum(2).flatten()]
    return {"sizes": sizes, "rows": array(torch.cat(rows))}


def _inputs(sizes: Sizes, folder: Path) -> tuple[Path, Path]:
    """A COCO file with outlines, and the folder of its JPEG files; the same at every call."""
    size_hw = (sizes["height"], sizes["width"])
    images_folder = folder / "images"
    images_folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    angles = torch.arange(OUTLINE_POINTS) * (2 * math.pi / OUTLINE_POINTS)
    ring = torch.stack((angles.cos(), angles.sin()), dim=1) / 2
    for number in range(sizes["images"]):
        name = f"{number:06d}.jpg"
        pixels = picture(size_hw, seed=number).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images_folder / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        for index, box in enumerate(coco_like_boxes(sizes["instances"], size_hw, seed=number)):
            extent = box[2:] - box[:2]
            outline = (box[:2] + extent / 2 + extent * ring).flatten().tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1 + index % CLASSES,
                    "bbox": [*box[:2].tolist(), *extent.tolist()],
                    "area": float(extent.prod()),
                    "iscrowd": 0,
                    "segmentation": [outline],
                }
            )
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, images_folder


def _images_per_second(sizes: Sizes, seconds: float) -> dict[str, float]:
    return {"images_per_second_and_worker": 1 / seconds}


ROW = Row(
    name="data",
    sizes={"images": 64, "height": 480, "width": 640, "instances": 7, "batch": 4},
    quick={"images": 16},
    tiny={"images": 4, "height": 60, "width": 80, "batch": 2},
    passes=8,
    quick_passes=4,
    ours=_ours,
    straightforward=_straightforward,
    agree=Close(0.0),
    facts=_images_per_second,
)
