"""Row `data`: batches of one worker: decode, resize, flip, rasterise, collate. Seconds are per image.

Straightforward: decoding and resizing the same images to the same sizes, and nothing else. So the goal is a speed-up
of 0.9 and more, not above 1.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from benchmarks.inputs import coco_like_boxes, picture
from benchmarks.measure import Close, Place, Row, Side, Sizes, Task
from semiseg.data.dataset import InstanceDataset, build_rule
from semiseg.data.loader import StepBatches, build_loader
from semiseg.data.table import load_table
from semiseg.data.transforms import Resize
from semiseg.structures.inputs import Batch

CLASSES = 80
OUTLINE_POINTS = 24
TRANSFORM = Resize(short_sides=[640, 672, 704, 736, 768, 800], long_side=1333, flip=0.5)


def prepare(side: Side, sizes: Sizes, place: Place) -> Task:
    """Every image once."""
    annotations, folder = _inputs(sizes, place.folder)
    batches = StepBatches(
        sizes["images"],
        batch_size=sizes["batch"],
        accumulation=1,
        processes=1,
        rank=0,
        seed=0,
        start_step=0,
        steps=sizes["images"] // sizes["batch"],
    )
    dataset = InstanceDataset(
        load_table(annotations, folder, cache=place.folder / "cache"),
        rule=build_rule("masks", None),
        transform=TRANSFORM,
        mask_stride=4,
        bottom_rows_without_affinity=10,
    )

    def ours() -> Iterator[Batch]:
        yield from build_loader(dataset, batches=batches, size_divisor=32, workers=0, pin_memory=False)

    def our_images() -> Iterator[Tensor]:
        for batch in ours():
            for image, (height, width) in zip(batch.images, batch.image_sizes_hw.tolist(), strict=True):
                yield image[:, :height, :width]

    def straightforward() -> Iterator[Tensor]:
        for row, seed in (key for batch in batches for key in batch):
            with Image.open(folder / f"{row:06d}.jpg") as image:
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            input_hw = TRANSFORM((sizes["height"], sizes["width"]), seed).input_hw
            yield functional.resize(pixels, list(input_hw), antialias=True)

    work, images = (ours, our_images) if side == "ours" else (straightforward, straightforward)
    return Task(lambda: _exhaust(work()), lambda _: _fingerprints(images()), units=sizes["images"])


def _exhaust(items: Iterator[Any]) -> None:
    """Takes everything and keeps nothing, with one thread, as a loader's worker has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        deque(items, maxlen=0)
    finally:
        torch.set_num_threads(threads)


def _fingerprints(images: Iterator[Tensor]) -> dict[str, Any]:
    """What is the same of an image (3, H, W) and its mirror image: sums of the rows, and of their squares."""
    sizes, rows = [], []
    for image in images:
        sizes.append(tuple(image.shape))
        rows += [image.double().sum(2).flatten(), image.double().square().sum(2).flatten()]
    return {"sizes": sizes, "rows": torch.cat(rows)}


def _inputs(sizes: Sizes, folder: Path) -> tuple[Path, Path]:
    """A COCO file with outlines, and the folder of its JPEG files; the same at every call."""
    size_hw = (sizes["height"], sizes["width"])
    images_folder = folder / "images"
    images_folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    angles = torch.arange(OUTLINE_POINTS) * (2 * math.pi / OUTLINE_POINTS)
    ring = torch.stack((angles.cos(), angles.sin()), dim=1) / 2
    for index in range(sizes["images"]):
        name = f"{index:06d}.jpg"
        pixels = picture(size_hw, seed=index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images_folder / name, quality=92)
        images.append({"id": index + 1, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        for label, box in enumerate(coco_like_boxes(sizes["instances"], size_hw, seed=index)):
            extent = box[2:] - box[:2]
            outline = (box[:2] + extent / 2 + extent * ring).flatten().tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1 + label % CLASSES,
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


DATA = Row(
    name="data",
    sizes={"images": 64, "height": 480, "width": 640, "instances": 7, "batch": 4},
    quick={"images": 16},
    tiny={"images": 4, "height": 60, "width": 80, "batch": 2},
    passes=8,
    quick_passes=4,
    prepare=prepare,
    agree=Close(0.0),
    facts=_images_per_second,
)
