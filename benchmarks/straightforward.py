"""What the package computes, as one would write it from docs/METHOD.md: whole maps, whole images, one after the other.

The benchmark measures the package against these in float32; the tests compare it with them in float64. Nothing here
comes from semiseg. Letters as everywhere: B images, N instances, K neighbours, R locations, (h, w) the mask grid.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn import functional as F

SRGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE_XYZ = (0.95047, 1.0, 1.08883)


# Masks of boxes and neighbours ---------------------------------------------------------------------------------------


def box_mask(box_xyxy: Tensor, grid_hw: tuple[int, int], stride: int) -> Tensor:
    """(h, w) float32, 1 in the box: drawn on the whole image, then the pixel (stride / 2, stride / 2) of each cell."""
    full = torch.zeros(grid_hw[0] * stride, grid_hw[1] * stride, device=box_xyxy.device)
    x0, y0, x1, y1 = box_xyxy.tolist()
    full[max(math.floor(y0), 0) : math.floor(y1 + 1), max(math.floor(x0), 0) : math.floor(x1 + 1)] = 1
    return full[stride // 2 :: stride, stride // 2 :: stride]


def neighbours(maps: Tensor, *, size: int, dilation: int) -> Tensor:
    """(N, C, h, w) -> (N, C, K, h, w): the K neighbours of every cell, row-major, without the cell; 0 outside."""
    count, channels, height, width = maps.shape
    margin = size // 2 * dilation
    unfolded = F.unfold(maps, size, dilation=dilation, padding=margin).view(count, channels, size**2, height, width)
    centre = size**2 // 2
    return torch.cat((unfolded[:, :, :centre], unfolded[:, :, centre + 1 :]), dim=2)


# Mask losses ---------------------------------------------------------------------------------------------------------


def dice(scores: Tensor, targets: Tensor) -> Tensor:
    """(N,) Dice losses of scores (N, ...) against targets of the same shape, 0 or 1."""
    scores, targets = scores.flatten(1), targets.flatten(1)
    overlap = (scores * targets).sum(1)
    return 1 - 2 * overlap / ((scores**2).sum(1) + (targets**2).sum(1) + 1e-5)


def projection(logits: Tensor, masks: Tensor) -> Tensor:
    """(N,) projection losses: logits (N, h, w), masks (N, h, w) 0 or 1."""
    scores = logits.sigmoid()
    columns, rows = (dice(scores.max(axis).values, masks.max(axis).values) for axis in (1, 2))
    return columns + rows


def edge_losses(logits: Tensor, *, size: int, dilation: int, labels: Tensor | None = None) -> Tensor:
    """-log P(both ends have the same label) of every cell with each neighbour: logits (N, h, w) -> (N, K, h, w).

    Args:
        labels: (N, h, w) 0 or 1, the true ones: then -log P(both ends are right, or both wrong), which is that they
            have the same label where the true ones are the same, and different ones where they differ.
    """
    if labels is not None:
        logits = torch.where(labels > 0, logits, -logits)
    inside, outside = F.logsigmoid(logits), F.logsigmoid(-logits)
    both_inside = inside[:, None] + neighbours(inside[:, None], size=size, dilation=dilation)[:, 0]  # (N, K, h, w)
    both_outside = outside[:, None] + neighbours(outside[:, None], size=size, dilation=dilation)[:, 0]
    largest = torch.maximum(both_inside, both_outside)
    return -(torch.log(torch.exp(both_inside - largest) + torch.exp(both_outside - largest)) + largest)


def pairwise_sums(
    logits: Tensor, box_masks: Tensor, edges: Tensor, *, size: int, dilation: int, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and number (N,) of `edge_losses` over the edges (N, K, h, w) bool whose cell is in the box."""
    losses = edge_losses(logits, size=size, dilation=dilation, labels=labels)
    weights = edges.to(logits.dtype) * box_masks[:, None]
    return (losses * weights).sum((1, 2, 3)), weights.sum((1, 2, 3))


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """(N,) mean binary cross entropies of logits (N, h, w) against masks (N, h, w) in [0, 1]."""
    losses = -(masks * F.logsigmoid(logits) + (1 - masks) * F.logsigmoid(-logits))
    return losses.flatten(1).mean(1)


def bags(logits: Tensor, boxes: Tensor) -> Tensor:
    """(N,) mean binary cross entropies of each mask's rows and columns by their largest cell: logits (N, h, w).

    Args:
        boxes: (N, 4) row0, row1, column0, column1, half open: rows and columns in it are to have a cell of the object.
    """
    losses = []
    for one, (row0, row1, column0, column1) in zip(logits, boxes.tolist(), strict=True):
        rows, columns = one.amax(1), one.amax(0)
        wanted_rows, wanted_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        wanted_rows[row0:row1], wanted_columns[column0:column1] = 1, 1
        largest, wanted = torch.cat((rows, columns)), torch.cat((wanted_rows, wanted_columns))
        losses.append(F.binary_cross_entropy_with_logits(largest, wanted))
    return torch.stack(losses)


# Colour affinity -----------------------------------------------------------------------------------------------------


def lab(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 sRGB -> (h, w, 3) float64 CIE Lab, D65 at 2 degrees."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = linear @ np.array(SRGB_TO_XYZ).T / np.array(WHITE_XYZ)
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1)


def similarity(
    image: Tensor,
    size_hw: tuple[int, int],
    *,
    bottom: int,
    stride: int,
    size: int,
    dilation: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The colour similarity (K, h, w) of every cell to its neighbours, above 0; 0 where there is no neighbour.

    Args:
        image: (3, H, W) uint8, padded.
        size_hw: of the image without its padding. No neighbour lies outside, nor in its `bottom` last rows.
    """
    small = F.avg_pool2d(image[None].float(), stride)[0].to(torch.uint8)
    colours = torch.from_numpy(lab(small.permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1).to(image.device, dtype)
    difference = colours[:, None] - neighbours(colours[None], size=size, dilation=dilation)[0]  # (3, K, h, w)
    valid = torch.zeros(image.shape[1:], device=image.device)
    valid[: size_hw[0] - bottom, : size_hw[1]] = 1
    valid = valid[stride // 2 :: stride, stride // 2 :: stride]
    near: Tensor = torch.exp(-torch.linalg.norm(difference, dim=0) / 2)
    return near * neighbours(valid[None, None], size=size, dilation=dilation)[0, 0]


# The mask head, its upsampling and pasting ---------------------------------------------------------------------------


def dynamic_masks(
    features: Tensor,
    filters: Tensor,
    image_index: Tensor,
    location_xy: Tensor,
    coordinate_range: Tensor,
    *,
    channels: int,
    layers: int,
    stride: int,
) -> Tensor:
    """Mask logits (N, h, w): its image's features copied to every instance, all layers as grouped convolutions.

    Args:
        features: (B, F, h, w) of stride `stride`.
        filters: (N, D) weights and biases of every instance, see `cut_filters`.
        location_xy, coordinate_range: (N, 2) and (N,) in pixels.
    """
    count, (height, width) = len(filters), features.shape[-2:]
    x = torch.arange(width, device=features.device) * stride + stride // 2
    y = torch.arange(height, device=features.device) * stride + stride // 2
    cells = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))  # (xy, h, w)
    relative = (location_xy[:, :, None, None] - cells) / coordinate_range[:, None, None, None]
    maps = torch.cat((relative, features[image_index]), dim=1)  # (N, 2 + F, h, w)
    weights, biases = cut_filters(filters, [maps.shape[1], *[channels] * (layers - 1), 1])
    maps = maps.reshape(1, -1, height, width)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        kernel = weight.reshape(-1, weight.shape[2], 1, 1)
        maps = F.conv2d(maps, kernel, bias.reshape(-1), groups=count)
        if layer < layers - 1:
            maps = F.relu(maps)
    return maps[0]


def convolved_at(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    sizes_hw: Sequence[tuple[int, int]],
    image_index: Tensor,
    location_index: Tensor,
) -> Tensor:
    """(Q, out) of a 3x3 convolution of every level, everywhere, at the chosen locations of the images (Q,).

    Args:
        features: (B, R, channels) level after level; sizes_hw: of the levels.
    """
    maps, start = [], 0
    for height, width in sizes_hw:
        level = features[:, start : start + height * width].transpose(1, 2).unflatten(2, (height, width))
        maps.append(F.conv2d(level, weight, bias, padding=1).flatten(2))
        start += height * width
    return torch.cat(maps, dim=2)[image_index, :, location_index]


def prototype_masks(prototypes: Tensor, weights: Tensor, image_index: Tensor) -> Tensor:
    """Sums (Q, h, w) of each one's own image's prototypes (B, K, h, w) by its weights (Q, K)."""
    masks = []
    for own, image in zip(weights, image_index.tolist(), strict=True):
        masks.append((own[:, None, None] * prototypes[image]).sum(0))
    return torch.stack(masks)


def box_depths(boxes_xyxy: Tensor, stride: int, grid_hw: tuple[int, int]) -> Tensor:
    """(Q, h, w) how far the centre of each cell's pixel lies inside a box (Q, 4), in cells; negative outside."""
    x = torch.arange(grid_hw[1]) * stride + stride // 2 + 0.5
    y = torch.arange(grid_hw[0]) * stride + stride // 2 + 0.5
    depths = []
    for x0, y0, x1, y1 in boxes_xyxy:
        sides = torch.broadcast_tensors(x - x0, x1 - x, (y - y0)[:, None], (y1 - y)[:, None])
        depths.append(torch.stack(sides).amin(0) / stride)
    return torch.stack(depths)


def ray_masks(
    distances: Tensor, centres_xy: Tensor, stride: int, grid_hw: tuple[int, int], *, shortest: float, steepest: float
) -> Tensor:
    """(Q, h, w) how many pixels each cell lies within the polygon through the ends of rays.

    Inside that is the distance from the line of the side that the cell looks at; outside, along its own ray.

    Args:
        distances: (Q, rays) from the centres (Q, 2).
        shortest: pixels of a ray; steepest: least cosine between a ray and what stands upright on a side.
    """
    x = torch.arange(grid_hw[1]) * stride + stride // 2
    y = torch.arange(grid_hw[0]) * stride + stride // 2
    angle = torch.arange(distances.shape[1]) * (2 * math.pi / distances.shape[1])
    way = torch.stack((angle.cos(), angle.sin()), dim=1)
    masks = []
    for own, centre in zip(distances, centres_xy, strict=True):
        across, down = torch.broadcast_tensors(x - centre[0], (y - centre[1])[:, None])
        ends = own.clamp(min=shortest)[:, None] * way
        sides = ends.roll(-1, 0) - ends
        upright = torch.stack((sides[:, 1], -sides[:, 0]), dim=1) / torch.linalg.norm(sides, dim=1, keepdim=True)
        looks_at = torch.remainder(torch.atan2(down, across) * (len(own) / (2 * math.pi)), len(own)).long() % len(own)
        outwards = upright[looks_at, 0] * across + upright[looks_at, 1] * down
        inside = (ends * upright).sum(1)[looks_at] - outwards
        cosine = outwards / torch.sqrt(across**2 + down**2).clamp(min=shortest)
        masks.append(torch.where(inside < 0, inside / cosine.clamp(min=steepest), inside))
    return torch.stack(masks)


def cut_filters(filters: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Filters (N, D) -> weights (N, out, in) of all layers and biases (N, out); D is all weights, then all biases."""
    weights, biases, start = [], [], 0
    for before, after in pairwise(widths):
        weights.append(filters[:, start : start + before * after].reshape(-1, after, before))
        start += before * after
    for after in widths[1:]:
        biases.append(filters[:, start : start + after])
        start += after
    return weights, biases


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """(..., h, w) -> (..., f h, f w): repeat the border, resize corner to corner, shift by half a step, crop."""
    if factor == 1:
        return maps
    height, width = (factor * side for side in maps.shape[-2:])
    maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    maps = F.interpolate(maps, size=(height + 1, width + 1), mode="bilinear", align_corners=True)
    return F.pad(maps, (factor // 2, 0, factor // 2, 0), mode="replicate")[..., :height, :width]


def paste_masks(logits: Tensor, stride: int, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of logits (N, h, w): upsampled to the input, cropped, resized to the output, above 0.5."""
    probability = aligned_upsample(logits[:, None].sigmoid(), stride)[..., : input_hw[0], : input_hw[1]]
    probability = F.interpolate(probability, size=output_hw, mode="bilinear", align_corners=False)[:, 0]
    return probability > 0.5


# Detector ------------------------------------------------------------------------------------------------------------


def assign(
    xy: Tensor, stride: Tensor, level: Tensor, boxes_xyxy: Tensor, *, ranges: Sequence[float], radius: float
) -> Tensor:
    """(R,) which box each location of an image belongs to, -1 = none: of those that want it the smallest, at equal
    areas the first.

    Args:
        xy, stride, level: (R, 2), (R,), (R,) of the locations.
        ranges: of the longest side, in pixels: level i has [ranges[i], ranges[i + 1]].
        radius: of the square around the centre, in strides.
    """
    matched = torch.full((len(xy),), -1, device=xy.device)
    limits, reach = xy.new_tensor(ranges), radius * stride
    areas = ((boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])).tolist()
    for index in sorted(range(len(areas)), key=lambda index: (areas[index], index), reverse=True):
        x0, y0, x1, y1 = boxes_xyxy[index]
        x, y, centre_x, centre_y = xy[:, 0], xy[:, 1], (x0 + x1) / 2, (y0 + y1) / 2
        wanted = (x > torch.maximum(centre_x - reach, x0)) & (x < torch.minimum(centre_x + reach, x1))
        wanted &= (y > torch.maximum(centre_y - reach, y0)) & (y < torch.minimum(centre_y + reach, y1))
        longest = torch.stack((x - x0, y - y0, x1 - x, y1 - y)).amax(0)
        wanted &= (longest >= limits[level]) & (longest <= limits[level + 1])
        matched[wanted] = index
    return matched


def sample(scores: Tensor, matched: Tensor, limit: int) -> list[tuple[int, int, int]]:
    """(image, location, instance) of the masks: of each instance its best positives, `limit` shared by an image's.

    With more instances than that, those with the most positives have one each.

    Args:
        scores: (B, R) of all locations.
        matched: (B, R) instance of each location, -1 = background.
    """
    chosen = []
    for image, of_image in enumerate(matched):
        instances, counts = of_image[of_image >= 0].unique(return_counts=True)
        share = max(limit // max(len(instances), 1), 1)
        for instance in sorted(instances[counts.argsort(descending=True, stable=True)[:limit]].tolist()):
            locations = (of_image == instance).nonzero()[:, 0]
            best = locations[scores[image, locations].argsort(descending=True, stable=True)[:share]]
            chosen += [(image, location, instance) for location in best.tolist()]
    return chosen


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """(P,) (I + 1) / (U + 1) - (A - U) / A of boxes by their distances (P, 4) left, top, right, bottom from a point."""
    areas = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (a, b, torch.minimum(a, b), torch.maximum(a, b))]
    intersection, around = areas[2], areas[3]
    union = areas[0] + areas[1] - intersection
    return (intersection + 1) / (union + 1) - (around - union) / around


# Evaluation ----------------------------------------------------------------------------------------------------------


def coco_summary(
    truth: COCO, results: list[dict[str, Any]], iou_type: str, category_ids: Sequence[int] | None = None
) -> np.ndarray:
    """(6,) AP, AP50, AP75 and AP by size, as fractions, -1 where nothing was measured: pycocotools alone.

    Args:
        results: written into by pycocotools. Those of masks without boxes: with them it would sort by the box's area.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        measured = COCOeval(truth, truth.loadRes(results), iou_type)
        if category_ids is not None:
            measured.params.catIds = list(category_ids)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return np.asarray(measured.stats[:6])


# Masks by the colours of the image ------------------------------------------------------------------------------------


def two_label_sums(probabilities: Tensor, image: Tensor, *, iterations: int) -> Tensor:
    """(n,) the dense CRF's mean field of one mask, from its probabilities (n,) on the cells of an image (3, h, w).

    For each cell and label the sum over all other cells and their other label, with BBTP's weights and widths.
    """
    height, width = image.shape[1:]
    colours, cells = image.flatten(1).T, torch.arange(height * width, device=image.device)
    y, x = (side.to(image.dtype) for side in (cells // width, cells % width))
    inside = probabilities.clamp(1e-5, 1 - 1e-5)
    belief = torch.stack([1 - inside, inside])
    unary = -belief.log()
    for _ in range(iterations):
        cost = unary.clone()
        for cell in range(len(cells)):
            squares = (x - x[cell]) ** 2 + (y - y[cell]) ** 2
            alike = torch.exp(-squares / (2 * 60.0**2) - ((colours - colours[cell]) ** 2).sum(1) / (2 * 10.0**2))
            weight = 0.05 * torch.exp(-squares / (2 * 3.0**2)) + 0.005 * alike
            weight[cell] = 0
            cost[:, cell] += (weight * belief.flip(0)).sum(1)
        belief = torch.softmax(-cost, dim=0)
    return belief[1]
