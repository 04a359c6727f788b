"""Rows `mask_losses`, `affinity`, `dynamic_head` and `postprocess`: what is computed with masks, without the network.

`mask_losses`: projection and pairwise loss of many instances, forward and backward. `affinity`: the edges and the boxes
on the mask grid of a batch. `dynamic_head`: mask logits of many instances from their own filters, forward and backward.
`postprocess`: the masks of one image's detections as RLE in the pixels of a large image, from their logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_codec
from torch import Tensor

from benchmarks import straightforward as plain
from benchmarks.inputs import coco_like_boxes, picture, shared_out
from benchmarks.measure import Close, Place, Result, Row, Side, Sizes, Task
from benchmarks.plain_step import DILATION, SIZE, THRESHOLD, instance_affinity
from semiseg.data.transforms import resized_size
from semiseg.engine.predict import ImageDetections, coco_results
from semiseg.losses.affinity import affinity_edges, neighbour_inside
from semiseg.losses.boxinst import box_cells, cell_profiles, pairwise_loss, projection_loss
from semiseg.models.masks.dynamic import dynamic_masks, filter_shapes, num_filter_numbers
from semiseg.models.paste import iter_masks
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import Locations, MaskLogits, MaskQueries, Outputs

STRIDE, SIZE_DIVISOR = 4, 32
SHARE_OF_EDGES = 0.7  # that count, about what threshold 0.3 leaves of a photograph
LOGIT_DEVIATION = 2.0
BOTTOM_ROWS = 16  # that COCO's 10 become at this size
DIFFERING_EDGES = 1e-5  # share of edges whose similarity may round to the other side of the threshold
FEATURE_STRIDE, DYNAMIC_CHANNELS, LAYERS = 8, 8, 3
FEATURE_STEP, FILTER_STEP = 1 / 4, 1 / 8
DIFFERING_PIXELS = 1e-5  # share of the masks' pixels whose probability may round to the other side of one half


# mask_losses ---------------------------------------------------------------------------------------------------------


def prepare_losses(side: Side, sizes: Sizes, place: Place) -> Task:
    """`mask_losses`."""
    logits, cells, edges, image_index = loss_inputs(sizes, place.device)
    rows, columns = cell_profiles(cells, (logits.shape[1], logits.shape[2]))
    box_masks = (rows[:, :, None] & columns[:, None, :]).float()
    similarity = edges[image_index].float()

    def ours() -> dict[str, Tensor | None]:
        logits.grad = None
        projection = projection_loss(logits, cells).mean()
        sums, counts = pairwise_loss(logits, cells, edges, image_index, size=SIZE, dilation=DILATION)
        return backward(projection, sums.sum() / counts.sum().clamp(min=1))

    def straightforward() -> dict[str, Tensor | None]:
        logits.grad = None
        projection = plain.projection(logits, box_masks).mean()
        losses = plain.edge_losses(logits, size=SIZE, dilation=DILATION)
        weights = (similarity >= THRESHOLD).float() * box_masks[:, None]
        return backward(projection, (losses * weights).sum() / weights.sum().clamp(min=1))

    def backward(projection: Tensor, pairwise: Tensor) -> dict[str, Tensor | None]:
        (projection + pairwise).backward()
        return {"projection": projection, "pairwise": pairwise, "gradient": logits.grad}

    return Task(ours if side == "ours" else straightforward)


def loss_inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (Q, h, w) that want a gradient, boxes as cells (Q, 4), edges (B, K, h, w) bool, image of each (Q,)."""
    generator = torch.Generator().manual_seed(1)
    count, images, grid_hw = sizes["instances"], sizes["images"], (sizes["rows"], sizes["columns"])
    size_hw = (STRIDE * grid_hw[0], STRIDE * grid_hw[1])
    logits = torch.stack([normal_quantiles(grid_hw, generator) for _ in range(count)])
    logits = logits.mul_(LOGIT_DEVIATION).to(device).requires_grad_()
    cells = box_cells(coco_like_boxes(count, size_hw, seed=2), stride=STRIDE, grid_hw=grid_hw)
    image_sizes, bottom = torch.tensor([size_hw] * images), torch.zeros(images, dtype=torch.int64)
    inside = neighbour_inside(image_sizes, bottom, stride=STRIDE, grid_hw=grid_hw, size=SIZE, dilation=DILATION)
    edges = inside & (torch.rand(inside.shape, generator=generator) < SHARE_OF_EDGES)
    return logits, cells.to(device), edges.to(device), shared_out(count, images).to(device)


def normal_quantiles(size_hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(h, w) the quantiles of a normal distribution in random order: no two are alike, nor are their sigmoids.

    Of random numbers some differ by so little that their sigmoids are one float32 number. Where these are the largest
    two of a column, the maximum after the sigmoid (straightforward) and the one before it (ours) may be different
    cells, and the gradient goes there: at short side 1600 to 4 wrong cells, on the straightforward side.
    """
    area = size_hw[0] * size_hw[1]
    ranks = torch.randperm(area, generator=generator)
    quantiles: Tensor = torch.special.ndtri((ranks + 0.5) / area)
    return quantiles.view(size_hw)


MASK_LOSSES = Row(
    name="mask_losses",
    sizes={"instances": 64, "rows": 200, "columns": 304, "images": 2},
    tiny={"instances": 4, "rows": 24, "columns": 32},
    passes=8,
    quick_passes=4,
    prepare=prepare_losses,
    agree=Close(2e-5),
)


# affinity ------------------------------------------------------------------------------------------------------------


def prepare_affinity(side: Side, sizes: Sizes, place: Place) -> Task:
    """`affinity`."""
    size_hw, count = (sizes["height"], sizes["width"]), sizes["images"] * sizes["boxes"]
    grid_hw = (size_hw[0] // STRIDE, size_hw[1] // STRIDE)
    images = torch.stack([picture(size_hw, seed=index) for index in range(sizes["images"])]).to(place.device)
    image_sizes = torch.tensor([size_hw] * len(images), device=place.device)
    bottom = torch.full((len(images),), BOTTOM_ROWS, device=place.device)
    boxes = coco_like_boxes(count, size_hw, seed=3).to(place.device)
    image_index = shared_out(count, len(images)).to(place.device)

    def ours() -> tuple[Tensor, Tensor]:
        edges = affinity_edges(
            images, image_sizes, bottom, stride=STRIDE, size=SIZE, dilation=DILATION, threshold=THRESHOLD
        )
        return edges, box_cells(boxes, stride=STRIDE, grid_hw=grid_hw)

    def our_result(returned: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        rows, columns = cell_profiles(returned[1], grid_hw)
        return {"edges": returned[0][image_index], "boxes": rows[:, :, None] & columns[:, None, :]}

    def straightforward() -> tuple[Tensor, Tensor]:
        return instance_affinity(images, boxes, image_index, bottom=BOTTOM_ROWS)

    def plain_result(returned: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"edges": returned[0] >= THRESHOLD, "boxes": returned[1]}

    return Task(ours, our_result) if side == "ours" else Task(straightforward, plain_result)


def same_edges(ours: Result, straightforward: Result) -> bool:
    """Whether all boxes are alike, and all edges but those that round."""
    differing = np.mean(ours["edges"] != straightforward["edges"])
    return bool(differing <= DIFFERING_EDGES and np.array_equal(ours["boxes"], straightforward["boxes"]))


AFFINITY = Row(
    name="affinity",
    sizes={"images": 2, "height": 800, "width": 1216, "boxes": 8},
    tiny={"height": 64, "width": 96},
    passes=12,
    quick_passes=6,
    prepare=prepare_affinity,
    agree=same_edges,
)


# dynamic_head --------------------------------------------------------------------------------------------------------


def prepare_head(side: Side, sizes: Sizes, place: Place) -> Task:
    """`dynamic_head`."""
    *inputs, upstream = head_inputs(sizes, place.device)
    features, filters = inputs[:2]
    shapes = filter_shapes(sizes["channels"], DYNAMIC_CHANNELS, LAYERS)

    def run() -> dict[str, Tensor | None]:
        features.grad = filters.grad = None
        if side == "ours":
            logits = dynamic_masks(*inputs, shapes=shapes, stride=FEATURE_STRIDE)
        else:
            logits = plain.dynamic_masks(*inputs, channels=DYNAMIC_CHANNELS, layers=LAYERS, stride=FEATURE_STRIDE)
        logits.backward(upstream)
        return {"logits": logits.detach(), "features": features.grad, "filters": filters.grad}

    return Task(run)


def head_inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, filters, image index, locations, ranges, and the gradient that comes from the losses.

    Features and filters are multiples of powers of 2, locations are centres of cells: in float32 everything before a
    ReLU is then exact, in whatever order it is added. Of arbitrary numbers one among 62 million before the ReLUs of
    256 instances was 5e-8, and one side rounded it to the other side of 0: another gradient in all features there.
    """
    generator = torch.Generator().manual_seed(4)
    count, grid_hw = sizes["instances"], (sizes["rows"], sizes["columns"])
    numbers = num_filter_numbers(filter_shapes(sizes["channels"], DYNAMIC_CHANNELS, LAYERS))
    features = torch.randn(sizes["images"], sizes["channels"], *grid_hw, generator=generator)
    features = (features / FEATURE_STEP).round() * FEATURE_STEP
    filters = (0.3 * torch.randn(count, numbers, generator=generator) / FILTER_STEP).round() * FILTER_STEP
    cell_xy = (torch.rand(count, 2, generator=generator) * torch.tensor([grid_hw[1], grid_hw[0]])).floor()
    coordinate_range = torch.tensor([64.0, 128.0, 256.0, 512.0, 1024.0])[torch.arange(count) % 5]
    upstream = torch.randn(count, *grid_hw, generator=generator)
    return (
        features.to(device).requires_grad_(),
        filters.to(device).requires_grad_(),
        shared_out(count, sizes["images"]).to(device),
        (cell_xy * FEATURE_STRIDE + FEATURE_STRIDE // 2).to(device),
        coordinate_range.to(device),
        upstream.to(device),
    )


DYNAMIC_HEAD = Row(
    name="dynamic_head",
    sizes={"instances": 64, "rows": 100, "columns": 152, "images": 2, "channels": 16},
    tiny={"instances": 4, "rows": 12, "columns": 16},
    passes=12,
    quick_passes=6,
    prepare=prepare_head,
    agree=Close(1e-4),
)


# postprocess ---------------------------------------------------------------------------------------------------------


class GivenMasks:
    """A network that has already predicted its masks: logits (N, h, w)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """Those of the queried detections."""
        grid = WholeMap(STRIDE, (self.logits.shape[1], self.logits.shape[2]))
        return MaskLogits(self.logits[queries.instance_index], queries.image_index, queries.instance_index, grid)


def prepare_masks(side: Side, sizes: Sizes, place: Place) -> Task:
    """`postprocess`."""
    logits, input_hw, output_hw = _mask_inputs(sizes, place.device)
    count, none = len(logits), torch.zeros(1, 0, 4, device=place.device)
    locations = Locations(none[0, :, :2], none[0, :, 0], none[0, :, 0].long(), counts=(0,))
    outputs = Outputs(locations=locations)  # nothing reads them
    index = torch.arange(count, device=place.device)
    zero = torch.zeros_like(index)
    queries = MaskQueries(zero, zero, index, torch.zeros(count, 4, device=place.device), zero)
    scores, labels = torch.linspace(1, 0.05, count), torch.zeros(count, dtype=torch.int64)

    def ours() -> dict[str, Any]:
        masks = iter_masks(GivenMasks(logits), outputs, queries, input_hw, output_hw)
        found = ImageDetections(0, output_hw, torch.zeros(count, 4), scores, labels, masks)
        return {"rles": [item["segmentation"] for item in coco_results(found, image_id=1, category_ids=[1])]}

    def straightforward() -> dict[str, Any]:
        masks = plain.paste_masks(logits, STRIDE, input_hw, output_hw).cpu().numpy()
        return {"rles": [rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]}

    return Task(ours if side == "ours" else straightforward)


def _mask_inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
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


def same_masks(ours: Result, straightforward: Result) -> bool:
    """Whether all masks are alike, but for pixels that round."""
    if len(ours["rles"]) != len(straightforward["rles"]):
        return False
    pairs = [list(pair) for pair in zip(ours["rles"], straightforward["rles"], strict=True)]
    union = sum(int(rle_codec.area(rle_codec.merge(pair))) for pair in pairs)
    both = sum(int(rle_codec.area(rle_codec.merge(pair, intersect=True))) for pair in pairs)
    return union - both <= DIFFERING_PIXELS * union


POSTPROCESS = Row(
    name="postprocess",
    sizes={"detections": 100, "height": 1800, "width": 2500, "short_side": 800, "long_side": 1333},
    tiny={"detections": 4, "height": 90, "width": 125, "short_side": 40, "long_side": 67},
    passes=4,
    quick_passes=1,
    prepare=prepare_masks,
    agree=same_masks,
)
