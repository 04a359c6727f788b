"""The losses of the detector, the same for every kind of supervision: class, box and centreness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from semiseg.losses.dice import at_least_float32
from semiseg.structures.outputs import Assignment, DenseOutputs

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def detection_losses(outputs: DenseOutputs, assignment: Assignment, labels: Tensor) -> dict[str, Tensor]:
    """Sums, not means, of the three detection losses over this batch; `terms.compute_losses` divides.

    Args:
        outputs: of the model.
        assignment: which locations are positive, and which are ignored: those take no part in `classification`.
        labels: (N,) int64, class of each instance.

    Returns:
        `classification`: focal loss over all classes and locations. `box`: 1 - GIoU of the positives, each weighted
        by its centreness target. `centreness`: binary cross-entropy of the positives. Scalars, at least float32;
        without positives the latter two are zeros that carry a graph.

    Source: METHOD section 2; FCOS (arXiv 1904.01355), section 3.
    """
    image, place = assignment.image_index, assignment.location_index
    predicted = at_least_float32(outputs.box_distances[image, place])  # (P, 4)
    centreness_logits = at_least_float32(outputs.centreness_logits[image, place])  # (P,)
    centreness = assignment.centreness.to(centreness_logits.dtype)
    box = (1 - generalised_iou(predicted, assignment.box_distances.to(predicted.dtype))) * centreness
    return {
        "classification": _classification(outputs.class_logits, assignment, labels),
        "box": box.sum(),
        "centreness": F.binary_cross_entropy_with_logits(centreness_logits, centreness, reduction="sum"),
    }


def _classification(class_logits: Tensor, assignment: Assignment, labels: Tensor) -> Tensor:
    logits = at_least_float32(class_logits)  # (B, R, C)
    targets = torch.zeros_like(logits)
    targets[assignment.image_index, assignment.location_index, labels[assignment.instance_index]] = 1
    loss = sigmoid_focal_loss(logits, targets, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA)
    return loss.masked_fill(assignment.ignored[:, :, None], 0).sum()


def generalised_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """(I + 1) / (U + 1) - (A - U) / A of two boxes around a common point.

    Args:
        predicted, target: (P, 4) distances left, top, right, bottom >= 0 from the point to the sides, in units of
            the location's stride; the target's are positive.

    Returns:
        (P,). I, U and A are the areas of intersection, union and smallest box around both.

    Deviation: the + 1, which the reference has and the paper (arXiv 1902.09630) has not; with distances in stride
    units it moves the value by up to 0.02 (docs/NUMERICS.md).
    """
    inner = torch.minimum(predicted, target)
    outer = torch.maximum(predicted, target)
    intersection = _area(inner)
    union = _area(predicted) + _area(target) - intersection
    around = _area(outer)
    return (intersection + 1) / (union + 1) - (around - union) / around


def _area(distances: Tensor) -> Tensor:
    return (distances[:, 0] + distances[:, 2]) * (distances[:, 1] + distances[:, 3])
