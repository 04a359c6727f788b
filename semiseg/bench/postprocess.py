"""Row `postprocess`: the masks of one image's detections as RLE in the pixels of a large image.

Straightforward: all masks at once, as floats. The network's part is left out: both start from its mask logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_codec
from torch import Tensor
from torch.nn import functional as F

from semiseg.bench.inputs import coco_like_boxes
from semiseg.bench.plain_network import aligned
from semiseg.bench.row import Place, Result, Row, Sizes, Task
from semiseg.data.transforms import resized_size
from semiseg.engine.predict import Found, coco_results
from semiseg.models.paste import iter_masks
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import DenseOutputs, Locations, MaskLogits, MaskQueries

STRIDE, SIZE_DIVISOR = 4, 32
DIFFERING_PIXELS = 1e-5  # share of the masks' pixels whose probability may round to the other side of one half


class GivenMasks:
    """A network that has already predicted its masks: logits (N, h, w)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def predict_masks(self, outputs: DenseOutputs, queries: MaskQueries) -> MaskLogits:
        """Those of the queried detections."""
        return MaskLogits(
            self.logits[queries.instance_index], queries.image_index, queries.instance_index, stride=STRIDE
        )


def all_masks_at_once(logits: Tensor, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """RLEs of masks (N, h, w): sigmoid, upsampled to the input, cropped, resized to the output, above one half."""
    probability = aligned(logits[:, None].sigmoid(), STRIDE)[..., : input_hw[0], : input_hw[1]]
    probability = F.interpolate(probability, size=output_hw, mode="bilinear", align_corners=False)[:, 0]
    masks = (probability > 0.5).cpu().numpy()
    return [rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


def _ours(sizes: Sizes, place: Place) -> Task:
    logits, input_hw, output_hw = _inputs(sizes, place.device)
    count = len(logits)
    network, outputs = GivenMasks(logits), _no_outputs(place.device)
    numbers = torch.arange(count, device=place.device)
    queries = MaskQueries(torch.zeros_like(numbers), torch.zeros_like(numbers), numbers)
    scores = torch.linspace(1, 0.05, count)

    def run() -> list[dict[str, Any]]:
        masks = iter_masks(network, outputs, queries, input_hw, output_hw)
        found = Found(0, output_hw, torch.zeros(count, 4), scores, torch.zeros(count, dtype=torch.int64), masks)
        return [item["segmentation"] for item in coco_results(found, image_id=1, category_ids=[1])]

    return Task(run, lambda rles: {"rles": rles})


def _straightforward(sizes: Sizes, place: Place) -> Task:
    logits, input_hw, output_hw = _inputs(sizes, place.device)
    return Task(lambda: all_masks_at_once(logits, input_hw, output_hw), lambda rles: {"rles": rles})


def _inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Logits (N, h, w) of soft ellipses on the grid of the padded input; sizes of the input and of the output."""
    output_hw = (sizes["height"], sizes["width"])
    input_hw = resized_size(output_hw, sizes["short_side"], sizes["long_side"])
    padded = (-(-input_hw[0] // SIZE_DIVISOR) * SIZE_DIVISOR, -(-input_hw[1] // SIZE_DIVISOR) * SIZE_DIVISOR)
    grid_hw = grid_size(padded, STRIDE)
    boxes = coco_like_boxes(sizes["detections"], input_hw, seed=7) / STRIDE
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x, y = torch.arange(grid_hw[1]), torch.arange(grid_hw[0])
    across = ((x - centre[:, :1]) / half[:, :1]) ** 2  # (N, w)
    down = ((y - centre[:, 1:]) / half[:, 1:]) ** 2  # (N, h)
    logits = (4 * (1 - across[:, None, :] - down[:, :, None])).clamp(min=-20)
    return logits.to(device), input_hw, output_hw


def _no_outputs(device: torch.device) -> DenseOutputs:
    """The dense predictions of a network that has none: nothing looks at them."""
    none = torch.zeros(1, 0, 4, device=device)
    locations = Locations(none[0, :, :2], none[0, :, 0], none[0, :, 0].long(), counts=(0,))
    return DenseOutputs(none, none, none[..., 0], locations, mask_inputs=None)


def _agree(ours: Result, straightforward: Result) -> bool:
    if len(ours["rles"]) != len(straightforward["rles"]):
        return False
    pairs = [list(pair) for pair in zip(ours["rles"], straightforward["rles"], strict=True)]
    union = sum(int(rle_codec.area(rle_codec.merge(pair))) for pair in pairs)
    both = sum(int(rle_codec.area(rle_codec.merge(pair, intersect=True))) for pair in pairs)
    return union - both <= DIFFERING_PIXELS * union


ROW = Row(
    name="postprocess",
    sizes={"detections": 100, "height": 1800, "width": 2500, "short_side": 800, "long_side": 1333},
    tiny={"detections": 4, "height": 90, "width": 125, "short_side": 40, "long_side": 67},
    passes=4,
    quick_passes=1,
    ours=_ours,
    straightforward=_straightforward,
    agree=_agree,
)
