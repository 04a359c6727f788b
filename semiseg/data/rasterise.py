"""Outlines and RLE -> boolean masks, and masks -> their cells on the mask grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from semiseg.structures.inputs import grid_size


def polygons_to_mask(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> np.ndarray:
    """The union of the polygons by COCO's own rasteriser.

    Args:
        polygons: [x0, y0, x1, y1, ...] each, in pixels of the raster.
        size_hw: (height, width) of the raster.

    Returns:
        (H, W) bool.
    """
    runs = coco_mask.frPyObjects([list(polygon) for polygon in polygons], *size_hw)
    return _decode(runs[0] if len(runs) == 1 else coco_mask.merge(runs))


def rle_to_mask(counts: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a compressed RLE of that size."""
    return _decode({"size": list(size_hw), "counts": counts})


def sample_cells(mask: np.ndarray, stride: int) -> Tensor:
    """The mask at the centres of the grid's cells: pixel (s*i + s//2, s*j + s//2) for cell (i, j).

    Args:
        mask: (H, W) bool.
        stride: s, in pixels.

    Returns:
        (ceil(H/s), ceil(W/s)) bool; a cell whose centre lies beyond the image is False.
    """
    cells = np.zeros(grid_size((mask.shape[0], mask.shape[1]), stride), dtype=bool)
    inside = mask[stride // 2 :: stride, stride // 2 :: stride]
    cells[: inside.shape[0], : inside.shape[1]] = inside
    return torch.from_numpy(cells)


def _decode(rle: dict) -> np.ndarray:
    return coco_mask.decode(rle).view(bool)
