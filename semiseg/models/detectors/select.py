"""The choice of detections from FCOS's dense predictions: threshold, best of each level, NMS.

The result of an image depends on its own predictions only: batches may mix image sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from semiseg.models.resnet import BACKBONE_STRIDES
from semiseg.structures.outputs import Candidates, DenseOutputs, Locations, MaskQueries


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
    decoding: str = "usual",
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
        decoding: "polarmask" = the original's: the threshold is for the class probability p, the score is
            p (centreness + 1/2) / 1.5 (theirs is not divided), and boxes end in the middle of the image's outer pixels
            before NMS, in which both pixels at their ends count.
    """
    polar = decoding == "polarmask"
    own_sizes = (image_sizes_hw + size_divisor - 1) // size_divisor * size_divisor
    results = []
    for image in range(outputs.class_logits.shape[0]):
        scores, asked = _scores(outputs, image, cell_exists(outputs.locations, own_sizes[image]), polar=polar)
        above, counts = asked > score_threshold, outputs.locations.counts
        location, label = _best_per_level(scores, above, counts, candidates_per_level)
        score, boxes = scores[location, label], decode_boxes(outputs, image, location)
        if polar:
            boxes = torch.minimum(boxes.clamp(min=0), (image_sizes_hw[image].flip(0) - 1).repeat(2))
        # double: batched_nms keeps classes apart by large offsets, which in float32 would round the boxes
        shifted = boxes.double() - boxes.amin() if len(boxes) else boxes.double()  # and supposes coordinates >= 0
        shifted[:, 2:] += int(polar)
        kept = batched_nms(shifted, score.double(), label, nms_threshold)[:max_detections]
        kept = kept[overlaps_image(boxes[kept], image_sizes_hw[image])]
        results.append(
            Candidates(
                scores=score[kept] if polar else score[kept].sqrt(),
                queries=MaskQueries(
                    image_index=torch.full_like(kept, image),
                    location_index=location[kept],
                    instance_index=torch.arange(len(kept), device=kept.device),
                    boxes_xyxy=boxes[kept],
                    labels=label[kept],
                ),
            )
        )
    return results


def decode_boxes(outputs: DenseOutputs, image: int, location: Tensor) -> Tensor:
    """Boxes (K, 4) xyxy in input pixels, unclipped, that one image predicts at K locations."""
    centre = outputs.locations.xy[location]
    reach = outputs.box_distances[image, location].float() * outputs.locations.stride[location, None]
    return torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], dim=1)


def cell_exists(locations: Locations, size_hw: Tensor) -> Tensor:
    """(R,) bool: the cell of the location begins inside an input of this size."""
    corner = locations.xy - torch.div(locations.stride, 2, rounding_mode="floor")[:, None]
    return (corner < size_hw.flip(0)).all(dim=1)


def overlaps_image(boxes_xyxy: Tensor, size_hw: Tensor) -> Tensor:
    """(N,) bool: the box has some area inside the unpadded image."""
    low, high = boxes_xyxy[:, :2].clamp(min=0), torch.minimum(boxes_xyxy[:, 2:], size_hw.flip(0))
    return (high > low).all(dim=1)


def _scores(outputs: DenseOutputs, image: int, exists: Tensor, *, polar: bool) -> tuple[Tensor, Tensor]:
    """The scores (R, C) of an image, and what the threshold is for; 0 where a location does not exist (R,)."""
    probability = outputs.class_logits[image].float().sigmoid()
    centreness = outputs.centreness_logits[image, :, None].float().sigmoid()
    if polar:
        return probability * (centreness + 0.5) / 1.5 * exists[:, None], probability * exists[:, None]
    scores = probability * centreness * exists[:, None]
    return scores, scores


def _best_per_level(scores: Tensor, above: Tensor, level_counts: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """(locations (K,), labels (K,)) of the `count` best scores (R, C) in each level, of those that are `above`."""
    best = []
    levels = (values.split(list(level_counts)) for values in (scores, above))
    for level_scores, level_above, start in zip(*levels, _starts(level_counts), strict=True):
        place = level_above.nonzero()  # (k, 2) by location, then class
        order = torch.argsort(level_scores[place[:, 0], place[:, 1]], descending=True, stable=True)[:count]
        best.append(place[order] + place.new_tensor([start, 0]))
    location, label = torch.cat(best).unbind(1)
    return location, label


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:number]) for number in range(len(counts))]
