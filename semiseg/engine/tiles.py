"""Large images in tiles: each tile is predicted as an image, and what two tiles see of one object becomes one.

Everything stays as it is in the tile until its part in the image is made, so that beside the decoded image memory
follows from the tile and from what is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semiseg.config import InferenceConfig
from semiseg.engine.predict import ImageDetections, each_image, encode_placed
from semiseg.models.paste import Window
from semiseg.models.segmenter import Segmenter
from semiseg.structures.masks import PlacedMask
from semiseg.structures.rasterise import read_cells

SAME_IOU = 0.5  # of the masks where two tiles overlap, from which they are one object
COVERED = 0.5  # of what a cut mask has there, from which it is a part of the other one
NEAR_CUT = 16  # a mask is cut if it ends within the overlap divided by this from an inner border of its tile


@dataclass(frozen=True)
class Tiling:
    """Square tiles over an image, in its pixels."""

    side: int
    overlap: int  # of neighbours, at least; less than the side

    def fits(self, size_hw: tuple[int, int]) -> bool:
        """Whether one tile holds the image, which is then predicted as without tiles."""
        return max(size_hw) <= self.side

    def windows(self, size_hw: tuple[int, int]) -> list[Window]:
        """The tiles, row by row: as large as the others also at the end, where they overlap by more."""
        rows, columns = (self._starts(length) for length in size_hw)
        height, width = (min(self.side, length) for length in size_hw)
        return [Window(top, top + height, left, left + width) for top in rows for left in columns]

    def _starts(self, length: int) -> list[int]:
        last = max(length - self.side, 0)
        return [*range(0, last, self.side - self.overlap), last]


@dataclass(frozen=True)
class _Found:
    """A detection of a tile; the mask is kept as its RLE there, all the rest is in the image's pixels."""

    tile: Window
    label: int
    score: float
    box_xyxy: NDArray[np.float64]
    counts: bytes
    bounds: Window  # of the mask

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """The mask in a window of the tile."""
        top, left, size_hw = self.tile.top, self.tile.left, _size(self.tile)
        rows, columns = np.arange(window.top - top, window.bottom - top), np.arange(window.left, window.right) - left
        inside: NDArray[np.bool_] = read_cells([self.counts], size_hw, rows=rows, columns=columns)[0]
        return inside


def find_in_tiles(
    network: Segmenter,
    image: Tensor,
    *,
    tiling: Tiling,
    limits: InferenceConfig,
    resized: Callable[[Tensor], Tensor] | None = None,
    batch_size: int,
) -> ImageDetections:
    """The detections of one image, found in tiles and united across them (see `unite`), best first.

    The limits hold for each tile: an image may have more than `limits.max_detections` detections.

    Args:
        network: in evaluation mode.
        image: (3, H, W) uint8 RGB.
        tiling: the tiles; an image that fits in one has the detections of one pass.
        limits: as of `find_instances`; masks are refined by the colours of the tile.
        resized: what the network sees of a tile (3, h, w); None = as it is.
        batch_size: tiles that are looked at, and kept resized, at a time.
    """
    size_hw = (image.shape[1], image.shape[2])
    tiles = tiling.windows(size_hw)
    found: list[list[_Found]] = []
    for first in range(0, len(tiles), batch_size):
        windows = tiles[first : first + batch_size]
        parts = [image[:, tile.top : tile.bottom, tile.left : tile.right] for tile in windows]
        found += each_image(
            network,
            parts if resized is None else list(map(resized, parts)),
            functools.partial(_kept, windows),
            output_sizes=list(map(_size, windows)),
            limits=limits,
            originals=parts.__getitem__,
        )
    united = unite(found, near=max(tiling.overlap // NEAR_CUT, 1))
    united.sort(key=lambda parts: -parts[0].score)  # stable: equal ones by tile
    boxes = [np.concatenate([_least(parts, slice(0, 2)), -_least(parts, slice(2, 4), -1)]) for parts in united]
    return ImageDetections(
        number=0,
        output_hw=size_hw,
        boxes_xyxy=torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        scores=torch.tensor([parts[0].score for parts in united], dtype=torch.float32),
        labels=torch.tensor([parts[0].label for parts in united], dtype=torch.int64),
        masks=map(_union, united),
    )


def _size(window: Window) -> tuple[int, int]:
    return window.bottom - window.top, window.right - window.left


def _least(parts: Sequence[_Found], sides: slice, sign: int = 1) -> NDArray[np.float64]:
    least: NDArray[np.float64] = np.min([sign * part.box_xyxy[sides] for part in parts], axis=0)
    return least


def _kept(tiles: Sequence[Window], detections: ImageDetections) -> list[_Found]:
    """The detections of a tile, in a form that is small."""
    tile = tiles[detections.number]
    masks = (PlacedMask(placed.inside.cpu(), placed.top, placed.left) for placed in detections.masks)
    boxes = detections.boxes_xyxy.double().cpu().numpy() + np.array([tile.left, tile.top] * 2)
    each = zip(masks, detections.labels.tolist(), detections.scores.tolist(), boxes, strict=True)
    found = []
    for placed, label, score, box in each:
        counts = encode_placed(placed, detections.output_hw)["counts"].encode()
        found.append(_Found(tile, label, score, box, counts, _bounds(placed, tile)))
    return found


def _bounds(placed: PlacedMask, tile: Window) -> Window:
    ends = []
    for axis, before in ((1, tile.top + placed.top), (0, tile.left + placed.left)):
        there = placed.inside.any(axis).nonzero()[:, 0].tolist()
        ends += [before + there[0], before + there[-1] + 1] if there else [0, 0]
    return Window(*ends)


def unite(found: Sequence[Sequence[_Found]], *, near: int) -> list[list[_Found]]:
    """The detections of each tile -> those that are of one object, the best of them first.

    Two detections of one class and of tiles that overlap are one object if, in the overlap, their masks have an IoU of
    at least `SAME_IOU`; or if one is cut, the other has at least `COVERED` of it there, and more of it than any other
    of its tile. A mask is cut that ends within `near` pixels of a border of its tile which lies inside the other tile.
    What is one object with a third is so with each other.
    """
    # Not above: half a second, and few cut their images.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    every = [one for of_tile in found for one in of_tile]
    firsts = np.cumsum([0, *map(len, found)]).tolist()
    pairs = [
        (firsts[one] + a, firsts[other] + b)
        for one, other in combinations(range(len(found)), 2)
        if found[one] and found[other]
        for a, b in _matches(found[one], found[other], near)
    ]
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    alike = coo_array((np.ones(len(pairs)), (ends[0], ends[1])), shape=(len(every), len(every)))
    united: dict[int, list[_Found]] = {}
    for number, each in zip(connected_components(alike, directed=False)[1].tolist(), every, strict=True):
        united.setdefault(number, []).append(each)
    return [sorted(parts, key=lambda part: -part.score) for parts in united.values()]


def _matches(ours: Sequence[_Found], theirs: Sequence[_Found], near: int) -> Iterator[tuple[int, int]]:
    """Which detections of two tiles are of one object, see `unite`."""
    shared = _common(ours[0].tile, theirs[0].tile)
    if shared.empty:
        return
    parts = [
        [(number, one, part) for number, one in enumerate(of_tile) if not (part := _common(one.bounds, shared)).empty]
        for of_tile in (ours, theirs)
    ]
    areas = [[int(one.inside(part).sum()) for _, one, part in of_tile] for of_tile in parts]
    common = np.zeros((len(parts[0]), len(parts[1])), dtype=np.int64)
    for row, (_, one, part) in enumerate(parts[0]):
        for column, (_, other, their_part) in enumerate(parts[1]):
            both = _common(part, their_part)
            if one.label == other.label and not both.empty:
                common[row, column] = int((one.inside(both) & other.inside(both)).sum())
    own, their = (np.array(area, dtype=np.int64) for area in areas)
    same = (common > 0) & (common >= SAME_IOU * (own[:, None] + their - common))
    cut = np.array([_is_cut(one, theirs[0].tile, near) for _, one, _ in parts[0]], dtype=bool)
    their_cut = np.array([_is_cut(other, ours[0].tile, near) for _, other, _ in parts[1]], dtype=bool)
    for counts, all_of, ends, matched in ((common, own, cut, same), (common.T, their, their_cut, same.T)):
        for number in np.flatnonzero(ends).tolist() if counts.size else ():
            best = int(counts[number].argmax())
            matched[number, best] |= counts[number, best] > 0 and counts[number, best] >= COVERED * all_of[number]
    for mine, yours in np.argwhere(same).tolist():
        yield parts[0][mine][0], parts[1][yours][0]


def _common(one: Window, other: Window) -> Window:
    return Window(
        max(one.top, other.top),
        min(one.bottom, other.bottom),
        max(one.left, other.left),
        min(one.right, other.right),
    )


def _is_cut(one: _Found, other: Window, near: int) -> bool:
    """Whether the mask ends at a border of its tile behind which the other tile goes on."""
    own, mask = one.tile, one.bounds
    return (
        (other.top < own.top and mask.top < own.top + near)
        or (other.bottom > own.bottom and mask.bottom > own.bottom - near)
        or (other.left < own.left and mask.left < own.left + near)
        or (other.right > own.right and mask.right > own.right - near)
    )


def _union(parts: Sequence[_Found]) -> PlacedMask:
    """The mask of one object in the image: what any of its detections has."""
    seen = [part for part in parts if not part.bounds.empty]
    if not seen:
        return PlacedMask(torch.zeros(0, 0, dtype=torch.bool), 0, 0)
    top, left = min(part.bounds.top for part in seen), min(part.bounds.left for part in seen)
    bottom, right = max(part.bounds.bottom for part in seen), max(part.bounds.right for part in seen)
    inside = np.zeros((bottom - top, right - left), dtype=bool)
    for part in seen:
        place = part.bounds
        inside[place.top - top : place.bottom - top, place.left - left : place.right - left] |= part.inside(place)
    return PlacedMask(torch.from_numpy(inside), top, left)
