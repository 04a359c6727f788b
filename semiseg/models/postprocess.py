"""Post-processing: from dense predictions to the detections of each image, in output pixels.

The result of an image depends on its own predictions only: batches may mix image sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from semiseg.models.resnet import BACKBONE_STRIDES
from semiseg.models.upsample import aligned_upsample
from semiseg.structures.outputs import DenseOutputs, Detections, Locations, MaskLogits, MaskQueries

MASK_THRESHOLD = 0.5
CHUNK_PIXELS = 2**20  # of float masks held at once, or one mask: 4 MiB stay in cache, and the allocator keeps them


class MaskPredictor(Protocol):
    """What post-processing needs of a model."""

    def predict_masks(self, outputs: DenseOutputs, queries: MaskQueries) -> MaskLogits: ...


@dataclass(frozen=True)
class Candidates:
    """The chosen detections of one image, best first, before their masks.

    Attributes:
        boxes_xyxy: (N, 4) float32, input pixels, unclipped; each has some area inside the unpadded image.
        scores: (N,) float32 in [0, 1], descending.
        labels: (N,) int64 in 0..C-1.
        queries: where their masks come from; `instance_index` is 0..N-1.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    queries: MaskQueries

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]


@torch.no_grad()
def select_detections(
    outputs: DenseOutputs,
    image_sizes_hw: Tensor,
    *,
    score_threshold: float,
    candidates_per_level: int,
    nms_threshold: float,
    max_detections: int,
    size_divisor: int = BACKBONE_STRIDES[-1],
) -> list[Candidates]:
    """Chooses the detections of each image (METHOD section 3, inference).

    (Location, class) pairs with class probability x centreness above the threshold, the best of each level, NMS per
    class on unclipped boxes, the best of what is left, without boxes wholly in the padding. Equal scores: the lower
    location, then the lower class.

    Cells that the image would not have if it were alone are left out, so that larger neighbours in the batch add
    nothing (docs/NUMERICS.md).

    Args:
        outputs: of B images.
        image_sizes_hw: (B, 2) int64, before padding.
        score_threshold: for class probability x centreness; the returned score is the square root of that.
        candidates_per_level: before NMS.
        nms_threshold: of the IoU above which the lower-scored box of a class goes.
        max_detections: per image.
        size_divisor: to multiples of which an image alone is padded.
    """
    own_sizes = (image_sizes_hw + size_divisor - 1) // size_divisor * size_divisor
    results = []
    for image in range(outputs.class_logits.shape[0]):
        scores = outputs.class_logits[image].float().sigmoid()  # (R, C)
        scores = scores * outputs.centreness_logits[image, :, None].float().sigmoid()
        scores = scores * _cell_exists(outputs.locations, own_sizes[image])[:, None]
        location, label = _best_per_level(scores, outputs.locations.counts, score_threshold, candidates_per_level)
        score, boxes = scores[location, label], decode_boxes(outputs, image, location)
        # double: batched_nms keeps classes apart by large offsets, which in float32 would round the boxes
        shifted = boxes.double() - boxes.amin() if len(boxes) else boxes.double()  # and supposes coordinates >= 0
        kept = batched_nms(shifted, score.double(), label, nms_threshold)[:max_detections]
        kept = kept[_overlaps_image(boxes[kept], image_sizes_hw[image])]
        results.append(
            Candidates(
                boxes_xyxy=boxes[kept],
                scores=score[kept].sqrt(),
                labels=label[kept],
                queries=MaskQueries(
                    image_index=torch.full_like(kept, image),
                    location_index=location[kept],
                    instance_index=torch.arange(len(kept), device=kept.device),
                ),
            )
        )
    return results


def decode_boxes(outputs: DenseOutputs, image: int, location: Tensor) -> Tensor:
    """Boxes (K, 4) xyxy in input pixels, unclipped, that one image predicts at K locations."""
    centre = outputs.locations.xy[location]
    reach = outputs.box_distances[image, location].float() * outputs.locations.stride[location, None]
    return torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], dim=1)


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


@torch.no_grad()
def postprocess(
    model: MaskPredictor,
    outputs: DenseOutputs,
    image_sizes_hw: Tensor,
    output_sizes_hw: Tensor,
    *,
    score_threshold: float,
    candidates_per_level: int,
    nms_threshold: float,
    max_detections: int,
) -> list[Detections]:
    """The detections of every image with all their masks, in output pixels; arguments as in `select_detections`.

    `output_sizes_hw` (B, 2) are the sizes of the images before they were resized for the network. Where all masks of
    an image need not exist together, use `select_detections`, `to_output_boxes` and `iter_masks`.
    """
    chosen = select_detections(
        outputs,
        image_sizes_hw,
        score_threshold=score_threshold,
        candidates_per_level=candidates_per_level,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
    )
    results = []
    for found, input_size, output_size in zip(chosen, image_sizes_hw.tolist(), output_sizes_hw.tolist(), strict=True):
        input_hw, output_hw = (input_size[0], input_size[1]), (output_size[0], output_size[1])
        chunks = iter_masks(model, outputs, found.queries, input_hw, output_hw)
        none = torch.zeros(0, *output_hw, dtype=torch.bool, device=found.scores.device)
        results.append(
            Detections(
                boxes=to_output_boxes(found.boxes_xyxy, input_hw, output_hw),
                scores=found.scores,
                labels=found.labels,
                masks=torch.cat([none, *[masks for _, masks in chunks]]),
            )
        )
    return results


def _cell_exists(locations: Locations, size_hw: Tensor) -> Tensor:
    """(R,) bool: the cell of the location begins inside an input of this size."""
    corner = locations.xy - torch.div(locations.stride, 2, rounding_mode="floor")[:, None]
    return (corner < size_hw.flip(0)).all(dim=1)


def _overlaps_image(boxes_xyxy: Tensor, size_hw: Tensor) -> Tensor:
    """(N,) bool: the box has some area inside the unpadded image."""
    low, high = boxes_xyxy[:, :2].clamp(min=0), torch.minimum(boxes_xyxy[:, 2:], size_hw.flip(0))
    return (high > low).all(dim=1)


def _best_per_level(scores: Tensor, level_counts: Sequence[int], threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """(locations (K,), labels (K,)) of the `count` best scores (R, C) above the threshold in each level."""
    best = []
    for level_scores, start in zip(scores.split(list(level_counts)), _starts(level_counts), strict=True):
        place = (level_scores > threshold).nonzero()  # (k, 2) by location, then class
        order = torch.argsort(level_scores[place[:, 0], place[:, 1]], descending=True, stable=True)[:count]
        best.append(place[order] + place.new_tensor([start, 0]))
    location, label = torch.cat(best).unbind(1)
    return location, label


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:number]) for number in range(len(counts))]
