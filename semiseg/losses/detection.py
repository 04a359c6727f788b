"""The losses of FCOS, the same for every kind of supervision: class, box and centreness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.losses.dice import at_least_float32
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment, DenseOutputs

LOSSES = ("classification", "box", "centreness")
COUNTS = ("positives", "box_positives", "centreness")  # what their denominators are made of

FOCAL_ALPHA = 0.25  # gamma is 2: the power is written into the formulas of `_FocalSum`


def detection_losses(outputs: DenseOutputs, assignment: Assignment, labels: Tensor) -> dict[str, Tensor]:
    """Sums, not means, of the three detection losses over this batch; `mean_detection_losses` divides.

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


def detection_counts(assignment: Assignment, box_only: Tensor) -> dict[str, Tensor]:
    """By `COUNTS`: positives, those of instances (N,) with a box alone, and the sum of the centreness targets."""
    return {
        "positives": torch.ones_like(assignment.instance_index).sum(),
        "box_positives": box_only[assignment.instance_index].sum(),
        "centreness": assignment.centreness.double().sum(),
    }


def mean_detection_losses(
    outputs: DenseOutputs, assignment: Assignment, targets: Targets, count: Mapping[str, Tensor], *, processes: int
) -> dict[str, Tensor]:
    """The losses of one accumulation part on one process, as its share of the whole optimizer step.

    With n = `count` of the whole step, p = `processes`: classification and centreness are divided by max(n.positives /
    p, 1), box by max(n.centreness / p, 1e-6).
    """
    sums = detection_losses(outputs, assignment, targets.labels)
    positives = (count["positives"] / processes).clamp(min=1)
    factors = {
        "classification": 1 / positives,
        "box": 1 / (count["centreness"] / processes).clamp(min=1e-6),
        "centreness": 1 / positives,
    }
    return {name: sums[name] * factors[name].to(sums[name].dtype) for name in LOSSES}


def _classification(class_logits: Tensor, assignment: Assignment, labels: Tensor) -> Tensor:
    place = (assignment.image_index, assignment.location_index, labels[assignment.instance_index])
    total: Tensor = _FocalSum.apply(class_logits, place, ~assignment.ignored)
    return total


class _FocalSum(torch.autograd.Function):
    """Focal loss of all classes and locations, alpha 0.25 and gamma 2, with its gradient: one map kept, not ten.

    With p = sigmoid(x) and s = softplus(x), g(x) = p^2 s is the loss of a logit without an object, up to its factor
    1 - alpha; that of a logit with one is alpha g(-x). g'(x) = p^2 (2 (1 - p) s + p).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, place: tuple[Tensor, Tensor, Tensor], counts: Tensor) -> Tensor:
        """logits (B, R, C); place: image, location, class (P,) of the objects; counts: (B, R) bool -> the sum."""
        exact = at_least_float32(logits)
        value, slope = _background(exact)
        at_objects = exact[place]
        object_value, object_slope = _background(-at_objects)
        counts = counts.to(exact.dtype)
        value[place] = object_value.mul_(FOCAL_ALPHA / (1 - FOCAL_ALPHA))
        if ctx.needs_input_grad[0]:
            slope[place] = object_slope.mul_(-FOCAL_ALPHA / (1 - FOCAL_ALPHA))
            ctx.save_for_backward(slope.mul_(counts[:, :, None]))
            ctx.dtype = logits.dtype
        return (value.sum(-1) * counts).sum() * (1 - FOCAL_ALPHA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the derivative."""
        (slope,) = ctx.saved_tensors
        return (slope * (upstream * (1 - FOCAL_ALPHA))).to(ctx.dtype), None, None


def _background(logits: Tensor) -> tuple[Tensor, Tensor]:
    """g and its derivative."""
    probability = logits.sigmoid()
    softplus = F.softplus(logits, threshold=40)
    square = probability.square()
    slope = (1 - probability).mul_(softplus).mul_(2).add_(probability).mul_(square)
    return square.mul_(softplus), slope


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
