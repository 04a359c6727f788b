"""Masks the plain way: the whole raster is decoded or resized by pycocotools and torchvision, then indexed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from semiseg.data.transforms import Geometry


def polygons_to_mask(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the union of [x0, y0, x1, y1, ...] each."""
    rles = coco_mask.frPyObjects([list(polygon) for polygon in polygons], *size_hw)
    mask: np.ndarray = coco_mask.decode(coco_mask.merge(rles))
    return mask.astype(bool)


def rle_to_mask(counts: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a compressed RLE of that size."""
    mask: np.ndarray = coco_mask.decode({"size": list(size_hw), "counts": counts})
    return mask.view(bool)


def resized_mask(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(H, W) bool original -> (H', W') bool input: the nearest original pixel."""
    image = torch.from_numpy(np.ascontiguousarray(mask).astype(np.uint8))[None]
    image = functional.resize(image, list(geometry.input_hw), interpolation=InterpolationMode.NEAREST_EXACT)
    resized: np.ndarray = (functional.horizontal_flip(image) if geometry.flipped else image)[0].numpy()
    return resized.astype(bool)


def sample_cells(mask: np.ndarray, stride: int) -> np.ndarray:
    """(ceil(H/s), ceil(W/s)) bool: the pixel (s*i + s//2, s*j + s//2), False beyond the image."""
    height, width = mask.shape
    padded = np.zeros((height + stride, width + stride), dtype=bool)
    padded[:height, :width] = mask
    rows, columns = (stride * np.arange(-(-side // stride)) + stride // 2 for side in (height, width))
    cells: np.ndarray = padded[rows][:, columns]
    return cells


def decompress_runs(compressed: bytes) -> list[int]:
    """The run lengths of a compressed RLE: 6-bit characters from '0', five bits of value each, the sixth says
    "more"; from the fourth run on, the difference to the run two before.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in compressed:
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:  # two's complement: the sign bit of the last five
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return runs
