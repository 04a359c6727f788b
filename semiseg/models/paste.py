"""From chosen detections to output pixels: their boxes, and their masks a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.models.upsample import aligned_upsample
from semiseg.structures.outputs import DenseOutputs, MaskLogits, MaskQueries

MASK_THRESHOLD = 0.5
CHUNK_PIXELS = 2**20  # of float masks held at once, or one mask: 4 MiB stay in cache, and the allocator keeps them


class MaskPredictor(Protocol):
    """What pasting needs of a model."""

    def predict_masks(self, outputs: DenseOutputs, queries: MaskQueries) -> MaskLogits: ...


def to_output_boxes(boxes_xyxy: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Scales boxes (N, 4) from the (unpadded) input to the output image and clips them to it."""
    (height, width), (output_height, output_width) = input_hw, output_hw
    scale = boxes_xyxy.new_tensor([output_width / width, output_height / height] * 2)
    limit = boxes_xyxy.new_tensor([output_width, output_height] * 2)
    return torch.minimum((boxes_xyxy * scale).clamp(min=0), limit)


@torch.no_grad()
def iter_masks(
    model: MaskPredictor,
    outputs: DenseOutputs,
    queries: MaskQueries,
    input_hw: tuple[int, int],
    output_hw: tuple[int, int],
    *,
    chunk_pixels: int = CHUNK_PIXELS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the masks of one image's detections a few at a time: (numbers (M,) int64, masks (M, H, W) bool).

    At most `chunk_pixels` pixels of full-size float masks (or one mask) exist at once, so that a caller who turns
    each chunk into RLE needs little memory whatever the image. Without queries nothing is yielded.

    Args:
        model: its `predict_masks` gives whole maps, at any stride.
        outputs: of the batch that the image is in.
        queries: of one image; the numbers count them from 0.
        input_hw: size of the image in the input, before padding.
        output_hw: size of the masks.
        chunk_pixels: see above.
    """
    largest = max(input_hw[0] * input_hw[1], output_hw[0] * output_hw[1])
    size = max(chunk_pixels // largest, 1)
    predicted = model.predict_masks(outputs, queries)
    logits = predicted.logits
    for start in range(0, logits.shape[0], size):
        chunk = logits[start : start + size]
        numbers = torch.arange(start, start + chunk.shape[0], device=logits.device)
        yield numbers, paste_masks(chunk, predicted.stride, input_hw, output_hw)


def paste_masks(logits: Tensor, stride: int, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Masks (M, H, W) bool in output pixels from whole-map logits (M, h, w) of the padded input.

    Sigmoid, aligned upsampling to input pixels, crop to the unpadded image, bilinear resize, above one half.

    Raises:
        ValueError: the maps do not cover the image.
    """
    height, width = input_hw
    if logits.shape[-2] * stride < height or logits.shape[-1] * stride < width:
        raise ValueError(f"mask logits {tuple(logits.shape[-2:])} at stride {stride} do not cover the input {input_hw}")
    # one cell more than the image covers: the last pixels lie between it and the one before
    cells = logits[:, None, : -(-height // stride) + 1, : -(-width // stride) + 1]
    probability = aligned_upsample(cells.float().sigmoid(), stride)[..., :height, :width]
    if output_hw != input_hw:
        probability = F.interpolate(probability, size=output_hw, mode="bilinear", align_corners=False)
    # in place, then to bool: on a CPU a fifth of the time of a comparison that writes bool
    return probability[:, 0].gt_(MASK_THRESHOLD).to(torch.bool)
