"""The straightforward training step of row `step`: box supervision, one image after the other, one instance after the
other, losses on whole maps. METHOD sections 2 and 3, written for clarity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from semiseg.bench.affinity import straightforward_affinity
from semiseg.bench.mask_losses import full_map_pairwise, full_map_projection
from semiseg.bench.plain_network import PlainCondInst, PlainOutputs

LEVEL_RANGES = (-1.0, 64.0, 128.0, 256.0, 512.0, math.inf)
CENTRE_RADIUS = 1.5
MAX_POSITIVES = 64
THRESHOLD = 0.3


def plain_losses(
    model: PlainCondInst, images: Tensor, boxes: Tensor, labels: Tensor, image_index: Tensor
) -> dict[str, Tensor]:
    """The five losses of a batch without a mask: images (B, 3, H, W) uint8, boxes (N, 4), labels and image (N,)."""
    outputs = model(images)
    matched = torch.stack(
        [_assign(outputs, boxes, image_index == number) for number in range(len(images))]
    )  # (B, R) instance of each location, -1 = background
    losses = _detection_losses(outputs, boxes, labels, matched)
    image, location, instance = _sample(outputs, matched)
    logits = model.masks(outputs, image, location)
    similarity, box_masks = straightforward_affinity(images, boxes, image_index, 0)
    similarity, box_masks = similarity[instance], box_masks[instance]  # one copy for each mask
    edge_losses = full_map_pairwise(logits)
    weights = (similarity >= THRESHOLD).float() * box_masks[:, None]
    losses["projection"] = full_map_projection(logits, box_masks).mean()
    losses["pairwise"] = (edge_losses * weights).sum() / weights.sum().clamp(min=1)
    return losses


def _assign(outputs: PlainOutputs, boxes: Tensor, mine: Tensor) -> Tensor:
    """(R,) the smallest of an image's boxes whose centre square and level a location is in, else -1."""
    numbers = mine.nonzero()[:, 0]
    x0, y0, x1, y1 = boxes[numbers].unbind(1)
    x, y = outputs.xy[:, 0, None], outputs.xy[:, 1, None]  # (R, 1)
    sides = torch.stack((x - x0, y - y0, x1 - x, y1 - y), dim=2)  # (R, N, 4)
    reach = CENTRE_RADIUS * outputs.stride[:, None]
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    inside = (x > torch.maximum(centre_x - reach, x0)) & (x < torch.minimum(centre_x + reach, x1))
    inside &= (y > torch.maximum(centre_y - reach, y0)) & (y < torch.minimum(centre_y + reach, y1))
    longest = sides.amax(2)
    ranges = longest.new_tensor(LEVEL_RANGES)
    inside &= (longest >= ranges[outputs.level, None]) & (longest <= ranges[outputs.level + 1, None])
    area = ((x1 - x0) * (y1 - y0)).expand_as(inside).masked_fill(~inside, math.inf)
    smallest, index = area.min(1)
    return torch.where(smallest < math.inf, numbers[index], -1)


def _detection_losses(outputs: PlainOutputs, boxes: Tensor, labels: Tensor, matched: Tensor) -> dict[str, Tensor]:
    image, location = (matched >= 0).nonzero(as_tuple=True)
    instance = matched[image, location]
    wanted = torch.zeros_like(outputs.class_logits)
    wanted[image, location, labels[instance]] = 1
    xy, stride = outputs.xy[location], outputs.stride[location, None]
    target = torch.cat((xy - boxes[instance, :2], boxes[instance, 2:] - xy), dim=1) / stride
    across, down = target[:, 0::2], target[:, 1::2]
    centreness = (across.amin(1) / across.amax(1) * down.amin(1) / down.amax(1)).sqrt()
    giou = _giou(outputs.distances[image, location], target)
    count = max(len(image), 1)
    focal = sigmoid_focal_loss(outputs.class_logits, wanted, alpha=0.25, gamma=2.0, reduction="sum")
    predicted = outputs.centreness_logits[image, location]
    return {
        "classification": focal / count,
        "box": ((1 - giou) * centreness).sum() / centreness.sum().clamp(min=1e-6),
        "centreness": F.binary_cross_entropy_with_logits(predicted, centreness, reduction="sum") / count,
    }


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """(I + 1) / (U + 1) - (A - U) / A of boxes given by their distances (P, 4) left, top, right, bottom."""
    areas = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (a, b, torch.minimum(a, b), torch.maximum(a, b))]
    intersection, around = areas[2], areas[3]
    union = areas[0] + areas[1] - intersection
    return (intersection + 1) / (union + 1) - (around - union) / around


def _sample(outputs: PlainOutputs, matched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image, location and instance (Q,) of the masks: the best positives of each instance, 64 / G of each."""
    with torch.no_grad():
        scores = outputs.class_logits.sigmoid().amax(2) * outputs.centreness_logits.sigmoid()  # (B, R)
    chosen = []
    for image, of_image in enumerate(matched):
        instances = of_image[of_image >= 0].unique().tolist()
        quota = max(MAX_POSITIVES // max(len(instances), 1), 1)
        for instance in instances:
            places = (of_image == instance).nonzero()[:, 0]
            best = places[scores[image, places].argsort(descending=True, stable=True)[:quota]]
            chosen += [(image, place, instance) for place in best.tolist()]
    image_index, location, instance_index = torch.tensor(chosen, device=matched.device).reshape(-1, 3).unbind(1)
    return image_index, location, instance_index
