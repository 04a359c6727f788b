"""Sampling: which positives get a mask in training (METHOD section 3).

The number per instance follows from the assignment alone, so that the counts by which losses are divided are known
before the network has run; which of its positives they are follows from the predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment, DenseOutputs, MaskQueries


@torch.no_grad()
def mask_quotas(
    assignment: Assignment, *, num_instances: int, num_images: int, image_index: Tensor, max_positives: int
) -> Tensor:
    """How many positives of each instance get a mask, whatever its supervision.

    An image with G instances that have positives gives each of them max(max_positives // G, 1), or all it has if
    these are fewer; quotas are not passed on. Deviation: with G > max_positives only the `max_positives` instances
    with the most positives get one, ties to the first (docs/NUMERICS.md).

    Args:
        assignment: P positives.
        num_instances: N.
        num_images: B.
        image_index: (N,) the image of each instance, ascending.
        max_positives: per image.

    Returns:
        (N,) int64.
    """
    counts = torch.bincount(assignment.instance_index, minlength=num_instances)
    with_positives = torch.bincount(image_index[counts > 0], minlength=num_images)  # (B,) G
    share = (max_positives // with_positives.clamp(min=1)).clamp(min=1)
    quotas = torch.minimum(counts, share[image_index])
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[torch.argsort(image_index[order], stable=True)]  # by image, most positives first
    chosen = rank_in_group(image_index[order]) < max_positives
    return torch.zeros_like(quotas).index_copy(0, order, quotas[order] * chosen)


@torch.no_grad()
def sample_positives(
    outputs: DenseOutputs,
    assignment: Assignment,
    targets: Targets,
    quotas: Tensor,
    *,
    counts: Sequence[int] | None = None,
) -> MaskQueries:
    """The best positives of each instance, as many as its quota.

    Best by highest class probability x centreness, in float32; equal ones by the lower location. Ordered by instance
    (so by image), best first.

    Args:
        outputs: of B images.
        assignment: P positives.
        targets: N instances.
        quotas: (N,) int64, none above the number of the instance's positives.
        counts: the sum of the quotas of each image; None = they are read back from the device.
    """
    place = (assignment.image_index, assignment.location_index)
    probability = outputs.class_logits[place].float().sigmoid().amax(dim=-1)  # (P,)
    score = probability * outputs.centreness_logits[place].float().sigmoid()
    kept, counts = best_of_instances(
        score, assignment.image_index, assignment.instance_index, quotas, counts, len(outputs.class_logits)
    )
    instance, location = assignment.instance_index[kept], assignment.location_index[kept]
    return queries_of(targets, instance, location, counts=tuple(counts))


def queries_of(
    targets: Targets, instance_index: Tensor, location_index: Tensor, *, counts: tuple[int, ...] | None = None
) -> MaskQueries:
    """The masks of instances (Q,) at locations (Q,), with the instances' own boxes and classes."""
    return MaskQueries(
        image_index=targets.image_index[instance_index],
        location_index=location_index,
        instance_index=instance_index,
        boxes_xyxy=targets.boxes_xyxy[instance_index],
        labels=targets.labels[instance_index],
        counts=counts,
    )


def best_of_instances(
    score: Tensor,
    image_index: Tensor,
    instance_index: Tensor,
    quotas: Tensor,
    counts: Sequence[int] | None,
    num_images: int,
) -> tuple[Tensor, Sequence[int]]:
    """Which of P positives, by image, have the best scores (P,) of their instance, as many as its quota (N,).

    Returns:
        (Q,) int64, by instance, best first, equal ones in their order; and `counts`, or if they are None, the numbers
        of each image, read back from the device.
    """
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(instance_index[order], stable=True)]
    instance = instance_index[order]
    chosen = rank_in_group(instance) < quotas[instance]
    if counts is None:
        counts = sums_by_image(image_index[order], chosen, num_images)
    return order[torch.nonzero_static(chosen, size=sum(counts))[:, 0]], counts


def sums_by_image(image_index: Tensor, numbers: Tensor, num_images: int) -> list[int]:
    """The sums of whole numbers (K,) by the image (K,) that they belong to, read back where they are on a device."""
    return numbers.new_zeros(num_images, dtype=torch.int64).index_add_(0, image_index, numbers.long()).tolist()


def rank_in_group(group: Tensor) -> Tensor:
    """Position of each element among those of its group, from 0; `group` (K,) ascends."""
    first = torch.searchsorted(group, group)
    return torch.arange(group.shape[0], device=group.device) - first
