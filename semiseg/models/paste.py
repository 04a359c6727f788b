"""From chosen detections to output pixels: their boxes, and their masks a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from semiseg.models.upsample import aligned_upsample
from semiseg.structures.grids import MaskGrid, Regions
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

MASK_THRESHOLD = 0.5
CHUNK_PIXELS = 2**20  # of float masks held at once, or one mask: 4 MiB stay in cache, and the allocator keeps them


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the masks of one image's detections a few at a time: (numbers (M,) int64, masks (M, H, W) bool).

    At most `chunk_pixels` pixels of full-size float masks (or one mask) exist at once, so that a caller who turns
    each chunk into RLE needs little memory whatever the image. Without queries nothing is yielded.

    Args:
        model: its masks may have any grid.
        outputs: of the batch that the image is in.
        queries: of one image; the numbers count them from 0.
        input_hw: size of the image in the input, before padding.
        output_hw: size of the masks.
        refine: (numbers (M,), probabilities (M, H, W)) -> masks (M, H, W) bool; None = those above one half.
        polygons: the masks' outlines, filled, in place of their cells, see `fill_outlines`.
        chunk_pixels: see above.
    """
    largest = max(input_hw[0] * input_hw[1], output_hw[0] * output_hw[1])
    size = max(chunk_pixels // largest, 1)
    predicted = model.predict_masks(outputs, queries)
    logits = predicted.logits
    for start in range(0, logits.shape[0], size):
        chunk = logits[start : start + size]
        numbers = torch.arange(start, start + chunk.shape[0], device=logits.device)
        own = predicted.grid.of(numbers)
        if polygons:
            assert predicted.outlines_xy is not None  # the configuration allows no other head
            masks = fill_outlines(predicted.outlines_xy[numbers], input_hw, output_hw)
            yield numbers, masks if refine is None else refine(numbers, masks.float())
        elif refine is None:
            yield numbers, paste_masks(chunk, own, input_hw, output_hw)
        else:
            yield numbers, refine(numbers, paste_probabilities(chunk, own, input_hw, output_hw))


def paste_masks(logits: Tensor, grid: MaskGrid, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Masks (M, H, W) bool in output pixels from the logits (M, h, w) of one image on their grid: above one half."""
    probability = paste_probabilities(logits, grid, input_hw, output_hw)
    # in place, then to bool: on a CPU a fifth of the time of a comparison that writes bool
    return probability.gt_(MASK_THRESHOLD).to(torch.bool)


def paste_probabilities(
    logits: Tensor, grid: MaskGrid, input_hw: tuple[int, int], output_hw: tuple[int, int]
) -> Tensor:
    """Probabilities (M, H, W) in output pixels from the logits (M, h, w) of one image on their grid.

    Raises:
        ValueError: a map that does not cover the image.
    """
    if isinstance(grid, Regions):
        probability = _paste_regions(logits.float().sigmoid(), grid, input_hw, output_hw)
    else:
        probability = _paste_map(logits, grid.stride, input_hw, output_hw)
    return probability[:, 0]


def fill_outlines(outlines_xy: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Masks (M, H, W) bool in output pixels of polygons (M, K, 2) in input pixels, as PolarMask makes them.

    Their ends are brought into the image, scaled and cut to whole pixels; the lines between them belong to the mask.
    """
    (height, width), (output_height, output_width) = input_hw, output_hw
    limit = outlines_xy.new_tensor([width - 1, height - 1])
    scale = outlines_xy.new_tensor([output_width / width, output_height / height])
    # What rounding leaves of a whole pixel is not cut to the one before.
    points = (torch.minimum(outlines_xy.clamp(min=0), limit) * scale + 1e-4).long()
    masks = np.zeros((len(points), *output_hw), dtype=bool)
    for mask, polygon in zip(masks, points.cpu().numpy(), strict=True):
        _fill(mask, polygon)
    return torch.from_numpy(masks).to(outlines_xy.device)


def _fill(mask: NDArray[np.bool_], polygon: NDArray[np.int64]) -> None:
    """Sets what a polygon (K, 2) of whole x, y encloses by the even-odd rule, and its sides, in exact arithmetic."""
    corner = polygon.min(0)
    width, height = polygon.max(0) - corner + 1
    inside = mask[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
    first, last = polygon - corner, np.roll(polygon - corner, -1, axis=0)
    # Each row turns from outside to inside, or back, at the first pixel that is not left of a side.
    falls = last[:, 1:] < first[:, 1:]
    (x, y), way = np.where(falls, last, first).T, np.where(falls, first - last, last - first)
    row, side = np.nonzero((y <= (rows := np.arange(height)[:, None])) & (rows < y + way[:, 1]))
    column = x[side] - (row - y[side]) * -way[side, 0] // way[side, 1]
    turns = np.zeros((height, width + 1), dtype=bool)
    np.logical_xor.at(turns, (row, column), True)
    inside |= np.logical_xor.accumulate(turns, axis=1)[:, :width]
    # Sides are drawn from left to right, a pixel for each step of the longer way; halves stay behind.
    leftwards = last[:, :1] < first[:, :1]
    start, way = np.where(leftwards, last, first), np.where(leftwards, first - last, last - first)
    steps = abs(way).max(1).clip(min=1)[:, None, None]
    step = np.arange(steps.max() + 1)[:, None].clip(max=steps)  # (K, S, 1)
    drawn = start[:, None] - np.sign(way)[:, None] * ((steps - 2 * step * abs(way)[:, None]) // (2 * steps))
    inside[drawn[..., 1], drawn[..., 0]] = True


def _paste_map(logits: Tensor, stride: int, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Sigmoid, aligned upsampling to input pixels, crop to the unpadded image, bilinear resize: (M, 1, H, W)."""
    height, width = input_hw
    if logits.shape[-2] * stride < height or logits.shape[-1] * stride < width:
        raise ValueError(f"mask logits {tuple(logits.shape[-2:])} at stride {stride} do not cover the input {input_hw}")
    # one cell more than the image covers: the last pixels lie between it and the one before
    cells = logits[:, None, : -(-height // stride) + 1, : -(-width // stride) + 1]
    probability = aligned_upsample(cells.float().sigmoid(), stride)[..., :height, :width]
    if output_hw != input_hw:
        probability = F.interpolate(probability, size=output_hw, mode="bilinear", align_corners=False)
    return probability


def _paste_regions(
    probability: Tensor, regions: Regions, input_hw: tuple[int, int], output_hw: tuple[int, int]
) -> Tensor:
    """The cells' probabilities (M, h, w) at the centre of every output pixel, bilinear: (M, 1, H, W).

    Half a cell beyond a region they have fallen to half, one cell beyond to 0, if it is not the whole image.
    """
    scale = regions.boxes_xyxy.new_tensor([out / side for side, out in zip(input_hw, output_hw, strict=True)][::-1])
    low, high = (regions.boxes_xyxy.view(-1, 2, 2) * scale).unbind(1)  # (M, xy), output pixels
    if regions.whole_pixels:
        cells = low.new_tensor(regions.size_hw[::-1])
        reach = (high - low) / 2 * (cells + 2) / cells
        first, last = ((low + high) / 2 - reach).trunc(), ((low + high) / 2 + reach).trunc()
        cell = (last + 1 - first).clamp(min=1) / (cells + 2)
        low, high = first + cell, first + cell * (cells + 1)
    sides = [
        (torch.arange(out, device=low.device) + 0.5 - low[:, None, axis]) / (high - low)[:, None, axis] * 2 - 1
        for axis, out in enumerate(output_hw[::-1])
    ]  # x (M, W) and y (M, H), where a region reaches from -1 to 1
    if regions.whole_image:
        return _sampled(probability, *sides, beyond="border")
    pasted = probability.new_zeros(len(probability), 1, *output_hw)
    # only where a mask is not 0, which is a small part of the image
    ends = [_first_and_last(side, 1 + 2 / cells) for side, cells in zip(sides, regions.size_hw[::-1], strict=True)]
    for number, (left, right, top, bottom) in enumerate(torch.cat(ends, dim=1).tolist()):
        x, y = sides[0][number : number + 1, left:right], sides[1][number : number + 1, top:bottom]
        if x.numel() and y.numel():
            own = probability[number : number + 1]
            pasted[number : number + 1, :, top:bottom, left:right] = _sampled(own, x, y, beyond="zeros")
    return pasted


def _sampled(probability: Tensor, x: Tensor, y: Tensor, *, beyond: str) -> Tensor:
    """(M, 1, H, W) of cells (M, h, w) at the columns' x (M, W) and the rows' y (M, H), of which -1 to 1 is inside."""
    across, down = x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])
    places = torch.stack([across, down], dim=-1)
    return F.grid_sample(probability[:, None], places, mode="bilinear", padding_mode=beyond, align_corners=False)


def _first_and_last(side: Tensor, reach: float) -> Tensor:
    """(M, 2) int64, half open: where ascending numbers (M, n) lie between -reach and reach."""
    return torch.stack([(side < -reach).sum(1), (side <= reach).sum(1)], dim=1)
