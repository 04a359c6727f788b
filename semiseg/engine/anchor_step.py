"""The losses of YOLACT's detector in a step: what the functions of `losses.anchors` are given, and what they add to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from semiseg.losses import anchors as losses
from semiseg.losses.regions import shrunk_cells
from semiseg.models.detectors.anchor_targets import AnchorAssignment
from semiseg.models.detectors.anchors import AnchorOutputs
from semiseg.structures.grids import Regions
from semiseg.structures.inputs import Supervision, Targets


def anchor_counts(assignment: AnchorAssignment, box_only: Tensor) -> dict[str, Tensor]:
    """By `losses.anchors.COUNTS`."""
    return on_device(box_only.device, positives=len(assignment.anchor_index), images=len(assignment.negatives))


def on_device(device: torch.device, **numbers: int) -> dict[str, Tensor]:
    """Numbers that the host knows, as tensors by their names."""
    return {name: torch.tensor(number, device=device) for name, number in numbers.items()}


def mean_anchor_losses(
    outputs: AnchorOutputs,
    assignment: AnchorAssignment,
    targets: Targets,
    count: Mapping[str, Tensor],
    *,
    processes: int,
) -> dict[str, Tensor]:
    """The losses of one accumulation part on one process, as its share of the whole optimizer step.

    With n = `count` of the whole step, p = `processes`: classes and boxes are divided by max(n.positives / p, 1), the
    semantic map by max(n.images / p, 1).
    """
    place = (assignment.image_index, assignment.anchor_index)
    learning = losses.hardest_background(outputs.class_logits, assignment.background, assignment.negatives)
    label = torch.zeros_like(learning, dtype=torch.int64)
    label[place] = targets.labels[assignment.instance_index] + 1
    learning[place] = True
    assert outputs.semantic_logits is not None, "a forward in training has a semantic map"
    present, known = semantic_targets(targets, outputs.semantic_logits, outputs.padded_hw or (0, 0))
    sums = {
        "classification": losses.class_loss(outputs.class_logits.flatten(0, 1), label.flatten(), learning.flatten()),
        "box": losses.box_loss(outputs.box_deltas[place], assignment.deltas),
        "semantic": losses.semantic_loss(outputs.semantic_logits, present, known),
    }
    positives, images = ((count[name] / processes).clamp(min=1) for name in losses.COUNTS)
    divisors = {"classification": positives, "box": positives, "semantic": images}
    return {name: sums[name] / divisors[name].to(sums[name].dtype) for name in losses.LOSSES}


@torch.no_grad()
def semantic_targets(targets: Targets, logits: Tensor, padded_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each class is, by the given masks, and where that is known: (B, C, h, w) bool both, of the map's cells.

    Not known are, outside of given masks, the cells in a box of the class that has no annotated one, and those in a
    crowd. Of a pseudo mask, cells that it says nothing of are outside.
    """
    images, classes, *size = logits.shape
    size_hw = (size[0], size[1])
    masks = _masks_at(targets, size_hw, padded_hw)
    label, image = targets.labels[targets.mask_instance], targets.image_index[targets.mask_instance]
    present = losses.classes_present(masks, label, image, num_images=images, num_classes=classes)
    unsure = (targets.supervision != Supervision.MASK)[:, None, None]
    in_box = losses.cells_in_boxes(targets.boxes_xyxy, padded_hw, size_hw) & unsure
    hidden = losses.classes_present(in_box, targets.labels, targets.image_index, num_images=images, num_classes=classes)
    in_crowd = losses.cells_in_boxes(targets.crowd_boxes_xyxy, padded_hw, size_hw)
    one_class = torch.zeros_like(targets.crowd_image_index)
    hidden |= losses.classes_present(in_crowd, one_class, targets.crowd_image_index, num_images=images, num_classes=1)
    return present, present | ~hidden


def _masks_at(targets: Targets, size_hw: tuple[int, int], padded_hw: tuple[int, int]) -> Tensor:
    """The masks (M, h, w) bool on a grid of equal parts: as they are given, or the four pixels at a cell's centre."""
    if targets.encoded is None:
        masks = targets.masks if targets.mask_known is None else targets.masks & targets.mask_known
        return losses.shrunk(masks, size_hw)
    whole = targets.boxes_xyxy.new_tensor([0, 0, padded_hw[1], padded_hw[0]]).expand(len(targets.mask_instance), 4)
    return shrunk_cells(Regions(whole, size_hw), targets.encoded, targets.encoded_known)
