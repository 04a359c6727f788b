"""Outlines and RLE -> their cells on the mask grid, read from the run lengths; RLE -> boolean masks.

A cell takes the value of one pixel of a raster, its centre's. The raster is never written: a compressed RLE says where
a mask changes, column by column, and only the cells between two such places are filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pycocotools import mask as coco_mask

# A character of a compressed RLE, less '0': five bits of a number, "more follows", and in the last one the sign.
VALUE, MORE, SIGN, BITS = 0x1F, 0x20, 0x10, 5


def outlines_to_rle(polygons: Sequence[np.ndarray], size_hw: tuple[int, int]) -> bytes:
    """The union of the polygons by COCO's own rasteriser, as the counts of a compressed RLE.

    Args:
        polygons: x0, y0, x1, y1, ... each, (2K,) float64, in pixels of the raster.
        size_hw: (height, width) of the raster.
    """
    rles = coco_mask.frPyObjects(list(polygons), *size_hw)
    counts: bytes = (rles[0] if len(rles) == 1 else coco_mask.merge(rles))["counts"]
    return counts


def rle_to_mask(counts: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of a compressed RLE of that size."""
    mask: np.ndarray = coco_mask.decode({"size": list(size_hw), "counts": counts})
    return mask.view(bool)


def cell_centres(size: int, stride: int) -> np.ndarray:
    """The pixels s*i + s//2 of one side that lie in an image of `size` pixels; (cells,) int64."""
    return np.arange(stride // 2, size, stride)


def read_cells(
    rles: Sequence[bytes],
    size_hw: tuple[int, int],
    *,
    rows: np.ndarray,
    columns: np.ndarray,
    cells: Sequence[np.ndarray],
) -> None:
    """Writes the pixels (rows[i], columns[j]) of each mask into `cells`; as decoding and indexing would, but faster.

    Args:
        rles: counts of M compressed RLE whose runs fill the raster exactly.
        size_hw: (height, width) of the raster.
        rows: (h,) int64, in any order, repetitions allowed.
        columns: (w,) int64, likewise.
        cells: M arrays (h, w) bool, all False before.
    """
    if not (len(rles) and len(rows) and len(columns)):
        return
    row_reads, column_reads = _Reads.of(rows, size_hw[0]), _Reads.of(columns, size_hw[1])
    lengths, bounds = run_lengths(rles)
    changes = _cells_before(np.cumsum(lengths), size_hw, row_reads, column_reads)
    cells_per_mask = row_reads.count * column_reads.count
    plain = row_reads.ascending and column_reads.ascending
    for number, (first, end) in enumerate(pairwise(bounds)):
        target = cells[number] if plain else np.zeros((row_reads.count, column_reads.count), dtype=bool)
        _fill(target, changes[first:end] - number * cells_per_mask)
        if not plain:
            cells[number][:] = target[row_reads.order][:, column_reads.order]


def run_lengths(rles: Sequence[bytes]) -> tuple[np.ndarray, list[int]]:
    """The runs of several compressed RLE: background and foreground in turn, background first.

    From the fourth run of a mask on, the text holds the difference to the run two before.

    Returns:
        (runs of all masks,) int64, and M + 1 bounds: mask m has the runs bounds[m] .. bounds[m + 1] - 1.
    """
    characters = np.frombuffer(b"".join(rles), dtype=np.uint8) - ord("0")
    ends = np.flatnonzero((characters & MORE) == 0) + 1  # of the numbers
    starts = np.concatenate([[0], ends[:-1]])
    digits = ends - starts
    place = np.arange(len(characters)) - np.repeat(starts, digits)
    runs = np.add.reduceat((characters & VALUE).astype(np.int64) << (BITS * place), starts)
    runs -= ((characters[ends - 1] & SIGN) != 0).astype(np.int64) << (BITS * digits)  # two's complement
    bounds = np.searchsorted(ends, np.cumsum([0, *map(len, rles)]), side="right").tolist()
    for first, end in pairwise(bounds):
        for chain in (runs[first + 1 : end : 2], runs[first + 2 : end : 2]):
            np.cumsum(chain, out=chain)
    return runs, bounds


@dataclass(frozen=True)
class _Reads:
    """Which pixels of one side of a raster are read.

    Attributes:
        read: (size,) 1 where a pixel is read, else 0.
        before: (size,) how many different ones before it are.
        count: how many different ones there are.
        order: (cells,) which of them each cell takes.
        ascending: `order` is 0, 1, 2, ...
    """

    read: np.ndarray
    before: np.ndarray
    count: int
    order: np.ndarray
    ascending: bool

    @classmethod
    def of(cls, pixels: np.ndarray, size: int) -> _Reads:
        read = np.zeros(size, dtype=np.int64)
        read[pixels] = 1
        before = np.cumsum(read)
        count = int(before[-1])
        before -= read
        order = before[pixels]
        return cls(read, before, count, order, count == len(order) and bool((order[1:] > order[:-1]).all()))


def _cells_before(pixels: np.ndarray, size_hw: tuple[int, int], rows: _Reads, columns: _Reads) -> np.ndarray:
    """How many cells that are read lie before each pixel, column by column, in rasters that follow each other."""
    column, row = np.divmod(pixels, size_hw[0])
    number, column = np.divmod(column, size_hw[1])
    whole_columns = number * columns.count + columns.before[column]
    before: np.ndarray = whole_columns * rows.count + columns.read[column] * rows.before[row]
    return before


def _fill(cells: np.ndarray, changes: np.ndarray) -> None:
    """Fills one mask (h, w) whose runs end at the cells `changes`, counted column by column."""
    height = cells.shape[0]
    inner = changes[: len(changes) // 2 * 2]  # the start and the end of each foreground run
    if not len(inner):
        return
    left, right = int(inner[0]) // height, -(-int(inner[-1]) // height)
    if left >= right:
        return
    edges = np.concatenate([[left * height], inner, [right * height]])
    filled = np.repeat(np.arange(len(inner) + 1) % 2 == 1, edges[1:] - edges[:-1])
    cells[:, left:right] = filled.reshape(right - left, height).T
