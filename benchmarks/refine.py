"""Rows `crf` and `grabcut`: masks made by the colours of the image, as `evaluate --refine` and `semiseg pseudo` do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import straightforward as plain
from benchmarks.inputs import picture
from benchmarks.measure import Place, Result, Row, Side, Sizes, Task
from semiseg.models.refine import CRF_ITERATIONS, GRABCUT_ITERATIONS, crf_kernel, grabcut, mean_field, opencv

CRF_DISTANCE = 1e-3  # of a probability, in float32


def prepare_crf(side: Side, sizes: Sizes, place: Place) -> Task:
    """`crf`: the instances of one image, whose kernel they share."""
    height, width = sizes["height"], sizes["width"]
    image = picture((height, width), seed=0).float()
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(sizes["instances"], height * width, generator=generator)

    def run() -> dict[str, Tensor]:
        if side == "ours":
            settled = mean_field(probabilities, crf_kernel(image))
        else:
            settled = torch.stack(
                [plain.two_label_sums(own, image, iterations=CRF_ITERATIONS) for own in probabilities]
            )
        return {"probabilities": settled}

    return Task(run)


def same_probabilities(ours: Result, theirs: Result) -> bool:
    """Whether no probability differs by more than `CRF_DISTANCE`."""
    return bool(np.abs(ours["probabilities"] - theirs["probabilities"]).max() <= CRF_DISTANCE)


CRF = Row(
    name="crf",
    sizes={"height": 64, "width": 64, "instances": 10},
    quick={"height": 32, "width": 32},
    tiny={"height": 8, "width": 10, "instances": 2},
    passes=2,
    quick_passes=1,
    prepare=prepare_crf,
    agree=same_probabilities,
)


def prepare_grabcut(side: Side, sizes: Sizes, place: Place) -> Task:
    """`grabcut`: objects one beside the other, each in a crop of so many pixels; seconds are those of one object."""
    crop, count = sizes["crop"], sizes["objects"]
    size_hw = (crop, crop * count)
    image, margin = picture(size_hw, seed=0), crop // 6  # a quarter of the box on each side
    boxes = torch.tensor([[n * crop + margin, margin, (n + 1) * crop - margin, crop - margin] for n in range(count)])
    y, x = torch.meshgrid(torch.arange(crop), torch.arange(crop), indexing="ij")
    disc = (y - crop / 2) ** 2 + (x - crop / 2) ** 2 < (crop / 2 - margin) ** 2
    image = torch.where(disc.repeat(1, count), image // 4 + 190, image // 2)

    def run() -> dict[str, Any]:
        found = grabcut(image, boxes.float()) if side == "ours" else _plainly(image, boxes, size_hw)
        return {"masks": torch.as_tensor(found)}

    return Task(run, units=count)


def _plainly(image: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    """OpenCV's on the whole image, object after object."""
    cv2 = opencv()
    pixels, masks = np.ascontiguousarray(image.permute(1, 2, 0).numpy()), []
    for x0, y0, x1, y1 in boxes.tolist():
        labels, models = np.zeros(size_hw, dtype=np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.setRNGSeed(0)
        cv2.grabCut(pixels, labels, (x0, y0, x1 - x0, y1 - y0), *models, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_RECT)
        masks.append((labels % 2) == 1)
    return np.stack(masks)


def alike_masks(ours: Result, theirs: Result) -> bool:
    """Whether each mask of a crop overlaps that of the whole image by an IoU of 0.9: they know other backgrounds."""
    mine, others = ours["masks"] > 0, theirs["masks"] > 0
    both, either = mine & others, mine | others
    return bool((both.sum((1, 2)) >= 0.9 * either.sum((1, 2))).all() and ours["masks"].any())


GRABCUT = Row(
    name="grabcut",
    sizes={"crop": 128, "objects": 8},
    quick={"objects": 3},
    tiny={"crop": 48, "objects": 2},
    passes=5,
    quick_passes=2,
    prepare=prepare_grabcut,
    package="cv2",
    agree=alike_masks,
)
