"""Outlines and RLE -> their cells on the mask grid, read from the run lengths.

A cell takes the value of one pixel of a raster, its centre's. The raster is never written: a compressed RLE says how
long a mask stays the same, column by column, and from that follows for how many of the cells that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pycocotools import mask as coco_mask

# A character of a compressed RLE, less '0': five bits of a number, "more follows", and in the last one the sign.
VALUE, MORE, SIGN, BITS = 0x1F, 0x20, 0x10, 5


def signed_area(x: np.ndarray, y: np.ndarray) -> float:
    """Of the closed polygon through the points; the sign says which way it runs round."""
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def outlines_to_rle(polygons: Sequence[np.ndarray], size_hw: tuple[int, int]) -> bytes:
    """The union of polygons, (2K,) float64 x0, y0, x1, y1, ... each, by COCO's own rasteriser: counts of an RLE."""
    rles = coco_mask.frPyObjects(list(polygons), *size_hw)
    counts: bytes = (rles[0] if len(rles) == 1 else coco_mask.merge(rles))["counts"]
    return counts


def cell_centres(size: int, stride: int) -> np.ndarray:
    """The pixels s*i + s//2 of one side that lie in an image of `size` pixels; (cells,) int64."""
    return np.arange(stride // 2, size, stride)


def read_cells(rles: Sequence[bytes], size_hw: tuple[int, int], *, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(M, h, w) bool: the pixels (rows[i], columns[j]) of each mask; as decoding and indexing would, but faster.

    Args:
        rles: counts of M compressed RLE whose runs fill the raster exactly.
        rows, columns: (h,) and (w,) int64, in any order, repetitions allowed.
    """
    if not rles:
        return np.zeros((0, len(rows), len(columns)), dtype=np.bool_)
    height, width = size_hw
    row_set, row_order = np.unique(rows, return_inverse=True)
    column_set, column_order = np.unique(columns, return_inverse=True)
    # Of the cells that are read: how many lie before each row in one column, and before each column.
    before_row = np.searchsorted(row_set, np.arange(height))
    before_column = np.searchsorted(column_set, np.arange(width)) * len(row_set)
    is_read = np.isin(np.arange(width), column_set)
    runs, bounds = run_lengths(rles)
    column, row = np.divmod(np.cumsum(runs), height)
    mask, column = np.divmod(column, width)  # the end of a raster is the start of the next one
    ends = mask * len(row_set) * len(column_set) + before_column[column] + is_read[column] * before_row[row]
    foreground = (np.arange(len(runs)) - np.repeat(bounds[:-1], np.diff(bounds))) % 2 == 1
    cells = np.repeat(foreground, np.diff(ends, prepend=0)).reshape(len(rles), len(column_set), len(row_set))
    return cells[:, column_order][:, :, row_order].transpose(0, 2, 1)


def run_lengths(rles: Sequence[bytes]) -> tuple[np.ndarray, list[int]]:
    """The runs of M compressed RLE, int64: background and foreground in turn, background first; and M + 1 bounds.

    Mask m has the runs bounds[m] .. bounds[m + 1] - 1. From the fourth on, the text holds the difference to the run
    two before.
    """
    characters = np.frombuffer(b"".join(rles), dtype=np.uint8) - ord("0")
    ends = np.flatnonzero((characters & MORE) == 0) + 1  # of the numbers
    digits = np.diff(ends, prepend=0)
    starts = ends - digits
    exponents = BITS * (np.arange(len(characters)) - np.repeat(starts, digits))
    runs = np.add.reduceat((characters & VALUE).astype(np.int64) << exponents, starts)
    runs -= ((characters[ends - 1] & SIGN) != 0).astype(np.int64) << (BITS * digits)  # two's complement
    bounds = np.searchsorted(ends, np.cumsum([0, *map(len, rles)]), side="right").tolist()
    for first, end in pairwise(bounds):
        for chain in (runs[first + 1 : end : 2], runs[first + 2 : end : 2]):
            np.cumsum(chain, out=chain)
    return runs, bounds
