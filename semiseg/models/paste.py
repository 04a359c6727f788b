"""From chosen detections to output pixels: their boxes, and their masks one at a time, each where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from semiseg.models.upsample import aligned_upsample
from semiseg.structures.grids import MaskGrid, Regions
from semiseg.structures.masks import PlacedMask
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

MASK_THRESHOLD = 0.5
ALMOST_INSIDE = -1e-3  # a logit so far below one half that no rounding of what is made of it reaches that
SMALL_SIDES = 129  # height + width of a result: below, torch resizes in another way on a CPU, which rounds otherwise
SMALL_IMAGE = 2**16  # pixels, below which to look for the place of a mask takes longer than to make it whole
CHUNK_PIXELS = 2**20  # of float masks held at once, or one mask: 4 MiB stay in cache, and the allocator keeps them


class Window(NamedTuple):
    """Some pixels of an image, half open."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def empty(self) -> bool:
        """Whether it has no pixel."""
        return self.bottom <= self.top or self.right <= self.left


class MaskPredictor(Protocol):
    """What pasting needs of a model."""

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits: ...


def to_output_boxes(boxes_xyxy: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Scales boxes (N, 4) from the (unpadded) input to the output image and clips them to it."""
    (height, width), (output_height, output_width) = input_hw, output_hw
    scale = boxes_xyxy.new_tensor([output_width / width, output_height / height] * 2)
    limit = boxes_xyxy.new_tensor([output_width, output_height] * 2)
    return torch.minimum((boxes_xyxy * scale).clamp(min=0), limit)


@torch.no_grad()
def iter_masks(
    model: MaskPredictor,
    outputs: Outputs,
    queries: MaskQueries,
    input_hw: tuple[int, int],
    output_hw: tuple[int, int],
    *,
    refine: Callable[[Tensor, Tensor], Tensor] | None = None,
    polygons: bool = False,
    chunk_pixels: int = CHUNK_PIXELS,
) -> Iterator[PlacedMask]:
    """Yields the masks of one image's detections in the order of the queries, one at a time.

    Each is made where it can be: its time and memory follow from the object, not from the image. Only what a refiner
    looks at is of the image's size, at most `chunk_pixels` float pixels (or one mask) at once.

    Args:
        model: its masks may have any grid.
        outputs: of the batch that the image is in.
        queries: of one image.
        input_hw: size of the image in the input, before padding.
        output_hw: size of the image that the masks are placed in.
        refine: (numbers of the queries (M,), probabilities (M, H, W)) -> masks (M, H, W) bool; None = those above one
            half.
        polygons: the masks' outlines, filled, in place of their cells, see `fill_outlines`.
        chunk_pixels: see above.
    """
    predicted = model.predict_masks(outputs, queries)
    if refine is not None:
        size = max(chunk_pixels // max(input_hw[0] * input_hw[1], output_hw[0] * output_hw[1]), 1)
        for numbers in torch.arange(len(predicted.logits), device=predicted.logits.device).split(size):
            probabilities = _whole(predicted, numbers, input_hw, output_hw, polygons=polygons)
            yield from (PlacedMask(mask, 0, 0) for mask in refine(numbers, probabilities))
    elif polygons:
        assert predicted.outlines_xy is not None  # the configuration allows no other head
        yield from _filled_outlines(predicted.outlines_xy, input_hw, output_hw)
    else:
        yield from placed_masks(predicted.logits, predicted.grid, input_hw, output_hw)


def _whole(
    predicted: MaskLogits, numbers: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int], *, polygons: bool
) -> Tensor:
    """Probabilities (M, H, W) of some masks in the whole image."""
    if not polygons:
        return paste_probabilities(predicted.logits[numbers], predicted.grid.of(numbers), input_hw, output_hw)
    assert predicted.outlines_xy is not None
    return fill_outlines(predicted.outlines_xy[numbers], input_hw, output_hw).float()


def placed_masks(
    logits: Tensor, grid: MaskGrid, input_hw: tuple[int, int], output_hw: tuple[int, int]
) -> Iterator[PlacedMask]:
    """Yields the masks of logits (M, h, w) on their grid, in output pixels: where a probability is above one half.

    To the bit what `paste_probabilities` would give, made only where cells let it reach one half; on maps of small
    images whole, many at once.

    Raises:
        ValueError: a map that does not cover the image.
    """
    pixels = max(input_hw[0] * input_hw[1], output_hw[0] * output_hw[1])
    if pixels <= SMALL_IMAGE and not isinstance(grid, Regions):
        for some in logits.split(CHUNK_PIXELS // pixels):
            masks = paste_probabilities(some, grid, input_hw, output_hw).gt_(MASK_THRESHOLD).to(torch.bool)
            yield from (PlacedMask(mask, 0, 0) for mask in masks)
        return
    cells = _cells_inside(logits)
    if isinstance(grid, Regions):
        sides = _sides(grid, input_hw, output_hw)
        windows = _windows_of_regions(cells, grid, sides)
    else:
        sides, windows = None, _windows_of_map(cells, grid.stride, input_hw, output_hw)
    for number, window in enumerate(windows):
        own = logits[number : number + 1].float()
        if window.empty:
            yield PlacedMask(own.new_zeros(0, 0, dtype=torch.bool), 0, 0)
            continue
        if isinstance(grid, Regions):
            assert sides is not None
            beyond, own_sides = "border" if grid.whole_image else "zeros", [side[number : number + 1] for side in sides]
            probability = _paste_region(own.sigmoid(), own_sides, window, beyond=beyond)
        else:
            probability = _paste_map(own, grid.stride, input_hw, output_hw, window)
        # in place, then to bool: on a CPU a fifth of the time of a comparison that writes bool
        yield PlacedMask(probability[0, 0].gt_(MASK_THRESHOLD).to(torch.bool), window.top, window.left)


def paste_masks(logits: Tensor, grid: MaskGrid, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """`placed_masks` as masks (M, H, W) bool of the whole image."""
    masks = torch.zeros(len(logits), *output_hw, dtype=torch.bool, device=logits.device)
    for mask, placed in zip(masks, placed_masks(logits, grid, input_hw, output_hw), strict=True):
        placed.write(mask)
    return masks


def paste_probabilities(
    logits: Tensor, grid: MaskGrid, input_hw: tuple[int, int], output_hw: tuple[int, int]
) -> Tensor:
    """Probabilities (M, H, W) in output pixels from the logits (M, h, w) of one image on their grid.

    Raises:
        ValueError: a map that does not cover the image.
    """
    whole = Window(0, output_hw[0], 0, output_hw[1])
    if not isinstance(grid, Regions):
        return _paste_map(logits, grid.stride, input_hw, output_hw, whole)[:, 0]
    probability, sides = logits.float().sigmoid(), _sides(grid, input_hw, output_hw)
    if grid.whole_image:
        return _paste_region(probability, sides, whole, beyond="border")[:, 0]
    pasted = probability.new_zeros(len(probability), *output_hw)
    all_cells = torch.tensor([[0, logits.shape[1], 0, logits.shape[2]]], device=logits.device).expand(len(logits), -1)
    for number, window in enumerate(_windows_of_regions(all_cells, grid, sides)):
        if not window.empty:  # only where a mask is not 0, which is a small part of the image
            own = slice(number, number + 1)
            part = _paste_region(probability[own], [side[own] for side in sides], window, beyond="zeros")
            pasted[number, window.top : window.bottom, window.left : window.right] = part[0, 0]
    return pasted


def fill_outlines(outlines_xy: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Masks (M, H, W) bool in output pixels of polygons (M, K, 2) in input pixels, as PolarMask makes them.

    Their ends are brought into the image, scaled and cut to whole pixels; the lines between them belong to the mask.
    """
    masks = torch.zeros(len(outlines_xy), *output_hw, dtype=torch.bool, device=outlines_xy.device)
    for mask, placed in zip(masks, _filled_outlines(outlines_xy, input_hw, output_hw), strict=True):
        placed.write(mask)
    return masks


def _filled_outlines(
    outlines_xy: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]
) -> Iterator[PlacedMask]:
    (height, width), (output_height, output_width) = input_hw, output_hw
    limit = outlines_xy.new_tensor([width - 1, height - 1])
    scale = outlines_xy.new_tensor([output_width / width, output_height / height])
    # What rounding leaves of a whole pixel is not cut to the one before.
    points = (torch.minimum(outlines_xy.clamp(min=0), limit) * scale + 1e-4).long()
    for polygon in points.cpu().numpy():
        left, top = polygon.min(0).tolist()
        yield PlacedMask(torch.from_numpy(_filled(polygon)).to(outlines_xy.device), top, left)


def _filled(polygon: NDArray[np.int64]) -> NDArray[np.bool_]:
    """What a polygon (K, 2) of whole x, y encloses by the even-odd rule, and its sides, exactly: as large as it is."""
    corner = polygon.min(0)
    width, height = polygon.max(0) - corner + 1
    first, last = polygon - corner, np.roll(polygon - corner, -1, axis=0)
    # Each row turns from outside to inside, or back, at the first pixel that is not left of a side.
    falls = last[:, 1:] < first[:, 1:]
    (x, y), way = np.where(falls, last, first).T, np.where(falls, first - last, last - first)
    row, side = np.nonzero((y <= (rows := np.arange(height)[:, None])) & (rows < y + way[:, 1]))
    column = x[side] - (row - y[side]) * -way[side, 0] // way[side, 1]
    turns = np.zeros((height, width + 1), dtype=bool)
    np.logical_xor.at(turns, (row, column), True)
    inside: NDArray[np.bool_] = np.logical_xor.accumulate(turns, axis=1)[:, :width].copy()
    # Sides are drawn from left to right, a pixel for each step of the longer way; halves stay behind.
    leftwards = last[:, :1] < first[:, :1]
    start, way = np.where(leftwards, last, first), np.where(leftwards, first - last, last - first)
    steps = abs(way).max(1).clip(min=1)[:, None, None]
    step = np.arange(steps.max() + 1)[:, None].clip(max=steps)  # (K, S, 1)
    drawn = start[:, None] - np.sign(way)[:, None] * ((steps - 2 * step * abs(way)[:, None]) // (2 * steps))
    inside[drawn[..., 1], drawn[..., 0]] = True
    return inside


def _cells_inside(logits: Tensor) -> Tensor:
    """(M, 4) int64: first and last + 1 row and column of the cells that are one half or more; all 0 without one.

    Where the cells around a point are all below, so is what lies between them.
    """
    inside = logits > ALMOST_INSIDE
    ends = []
    for of_side in (inside.any(2), inside.any(1)):  # (M, h), (M, w)
        place = torch.arange(of_side.shape[1], device=logits.device)
        ends += [torch.where(of_side, place, of_side.shape[1]).amin(1), torch.where(of_side, place + 1, 0).amax(1)]
    found = torch.stack(ends, dim=1)
    return found * (found[:, 1:2] > 0)


def _windows_of_map(cells: Tensor, stride: int, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> list[Window]:
    """The output pixels that cells (M, 4) of a map have a part in, and a few around them."""
    windows = []
    for of_mask in cells.tolist():
        ends = []
        for (first, last), size, out in zip((of_mask[:2], of_mask[2:]), input_hw, output_hw, strict=True):
            # Input pixels between the centres of the cells before and behind.
            low, high = max(stride * (first - 1) + stride // 2, 0), min(stride * last + stride // 2 + 1, size)
            if out != size:
                low, high = math.floor((low - 0.5) * out / size) - 2, math.ceil((high + 0.5) * out / size) + 2
            ends += [max(low, 0), min(high, out)]
        windows.append(Window(*ends) if of_mask[1] else Window(0, 0, 0, 0))
    return windows


def _paste_map(
    logits: Tensor, stride: int, input_hw: tuple[int, int], output_hw: tuple[int, int], window: Window
) -> Tensor:
    """Sigmoid, aligned upsampling to input pixels, crop to the unpadded image, bilinear resize: (M, 1, h, w).

    Of the output pixels only those of the window, to the bit. Torch resizes whole images alone; but a resize is one of
    the columns and then one of the rows. So it is done in two strips across the image: the columns of those rows that
    the window is made from, then the rows of its own columns.
    """
    (height, width), (input_height, input_width) = output_hw, input_hw
    if logits.shape[-2] * stride < input_height or logits.shape[-1] * stride < input_width:
        raise ValueError(f"mask logits {tuple(logits.shape[-2:])} at stride {stride} do not cover the input {input_hw}")
    if output_hw == input_hw:
        return _upsampled(logits, stride, input_hw, window)
    source = _source_window(window, input_hw, output_hw)
    rows, columns = source.bottom - source.top, window.right - window.left
    if height + width < SMALL_SIDES or rows * width + height * columns >= height * width:
        whole = _upsampled(logits, stride, input_hw, Window(0, input_height, 0, input_width))
        return _resized(whole, output_hw)[..., window.top : window.bottom, window.left : window.right]
    more_rows, more_columns = max(SMALL_SIDES - rows, 0), max(SMALL_SIDES - columns, 0)
    strip = _upsampled(logits, stride, input_hw, source)
    strip = _resized(F.pad(strip, (source.left, input_width - source.right, 0, more_rows)), (rows + more_rows, width))
    strip = strip[..., :rows, window.left : window.right]
    strip = F.pad(strip, (0, more_columns, source.top, input_height - source.bottom))
    return _resized(strip, (height, columns + more_columns))[..., window.top : window.bottom, :columns]


def _upsampled(logits: Tensor, stride: int, input_hw: tuple[int, int], window: Window) -> Tensor:
    """Probabilities (M, 1, h, w) of a window of input pixels, from the cells around it."""
    # A cell more than the pixels need on every side, so that no end of the cut is one of theirs; and not more than one
    # beyond the image, whose last pixels lie between it and the one before.
    top, left = (max(first // stride - 1, 0) for first in (window.top, window.left))
    bottom, right = (
        min(-(-last // stride) + 2, -(-side // stride) + 1)
        for last, side in zip((window.bottom, window.right), input_hw, strict=True)
    )
    pixels = aligned_upsample(logits[:, None, top:bottom, left:right].float().sigmoid(), stride)
    top, left = top * stride, left * stride
    return pixels[..., window.top - top : window.bottom - top, window.left - left : window.right - left]


def _resized(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)


def _source_window(window: Window, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Window:
    """The input pixels that a bilinear resize makes output pixels from, and one more on every side."""
    ends = []
    for (first, last), size, out in zip((window[:2], window[2:]), input_hw, output_hw, strict=True):
        low, high = (math.floor((place + 0.5) * size / out - 0.5) for place in (first, last - 1))
        ends += [max(low - 1, 0), min(high + 3, size)]
    return Window(*ends)


def _sides(regions: Regions, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> list[Tensor]:
    """x (M, W) and y (M, H) of the centres of output pixels, where a region reaches from -1 to 1."""
    scale = regions.boxes_xyxy.new_tensor([out / side for side, out in zip(input_hw, output_hw, strict=True)][::-1])
    low, high = (regions.boxes_xyxy.view(-1, 2, 2) * scale).unbind(1)  # (M, xy), output pixels
    if regions.whole_pixels:
        cells = low.new_tensor(regions.size_hw[::-1])
        reach = (high - low) / 2 * (cells + 2) / cells
        first, last = ((low + high) / 2 - reach).trunc(), ((low + high) / 2 + reach).trunc()
        cell = (last + 1 - first).clamp(min=1) / (cells + 2)
        low, high = first + cell, first + cell * (cells + 1)
    return [
        (torch.arange(out, device=low.device) + 0.5 - low[:, None, axis]) / (high - low)[:, None, axis] * 2 - 1
        for axis, out in enumerate(output_hw[::-1])
    ]


def _windows_of_regions(cells: Tensor, regions: Regions, sides: Sequence[Tensor]) -> list[Window]:
    """The output pixels that cells (M, 4) of regions have a part in: less than a cell from the centre of one.

    Half a cell beyond a region masks have fallen to half, one cell beyond to 0. If it is the whole image they go on.
    """
    ends = []
    for first, last, count, side in zip(cells[:, ::2].T, cells[:, 1::2].T, regions.size_hw, sides[::-1], strict=True):
        low, high = (2 * first - 1.5) / count - 1, (2 * last + 1.5) / count - 1
        if regions.whole_image:
            low, high = low.where(first > 0, -torch.inf), high.where(last < count, torch.inf)
        ends += [(side < low[:, None]).sum(1), (side <= high[:, None]).sum(1) * (last > 0)]
    return [Window(*of_mask) for of_mask in torch.stack(ends, dim=1).tolist()]


def _paste_region(probability: Tensor, sides: Sequence[Tensor], window: Window, *, beyond: str) -> Tensor:
    """The cells' probabilities (M, h, w) at the centres of the window's pixels, bilinear: (M, 1, H, W)."""
    x, y = sides[0][:, window.left : window.right], sides[1][:, window.top : window.bottom]
    return _sampled(probability, x, y, beyond=beyond)


def _sampled(probability: Tensor, x: Tensor, y: Tensor, *, beyond: str) -> Tensor:
    """(M, 1, H, W) of cells (M, h, w) at the columns' x (M, W) and the rows' y (M, H), of which -1 to 1 is inside."""
    across, down = x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])
    places = torch.stack([across, down], dim=-1)
    return F.grid_sample(probability[:, None], places, mode="bilinear", padding_mode=beyond, align_corners=False)
