"""How a detector is trained: the functions of it that a step calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from semiseg.config.model import AnchorDetector, FCOSDetector, ModelConfig, RegionDetector
from semiseg.engine.anchor_step import anchor_counts, mean_anchor_losses, on_device
from semiseg.losses import anchors as squares
from semiseg.losses import detection as fcos
from semiseg.losses import two_stage
from semiseg.models.detectors import regions
from semiseg.models.detectors.anchor_targets import assign_squares, sample_anchors
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.boxes import encode_boxes
from semiseg.models.detectors.region_targets import Draw, RegionAssignment, assign_anchors, sample_regions
from semiseg.models.detectors.sample import queries_of, sample_positives
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment, MaskQueries


@dataclass(frozen=True, kw_only=True)
class DetectorStep:
    """What a training step needs of its detector, from the plan to the losses.

    An assignment is the detector's own structure; its `instance_index` (P,) names the instance of each place that may
    be asked for a mask, by image.
    """

    loss_names: tuple[str, ...]
    count_names: tuple[str, ...]
    # (targets on the host, sizes_hw of the levels, num_images) -> assignment; it uses no parameter
    assign: Callable[..., Any]
    # (assignment, box_only (N,) bool) -> by `count_names`, what the denominators of this batch's losses are made of
    counts: Callable[[Any, Tensor], dict[str, Tensor]]
    # (outputs, assignment, targets, quotas (N,), counts of each image) -> as many masks of each instance
    sample: Callable[..., MaskQueries]
    # (outputs, assignment, targets, count of the whole step, processes) -> by `loss_names`, as they are added up
    losses: Callable[..., dict[str, Tensor]]
    draws: bool = False  # whether `assign` takes the seeds of the images, too
    sized: bool = False  # whether it takes height and width of the padded images
    own_regions: bool = False  # whether masks are asked for in other boxes than the objects', as predictions have it

    def assignment(
        self,
        targets: Targets,
        *,
        sizes_hw: Sequence[tuple[int, int]],
        num_images: int,
        seeds: tuple[int, ...],
        padded_hw: tuple[int, int],
    ) -> Any:
        """What `assign` gives, which takes of the images' seeds and padded size what it asks for."""
        more: dict[str, Any] = {"seeds": seeds} if self.draws else {}
        more |= {"padded_hw": padded_hw} if self.sized else {}
        return self.assign(targets, sizes_hw=sizes_hw, num_images=num_images, **more)


def detector_step(config: ModelConfig, model: Segmenter) -> DetectorStep:
    """The functions of the configured detector."""
    if isinstance(config.detector, RegionDetector):
        return _region_step(config.detector, model)
    if isinstance(config.detector, AnchorDetector):
        return _anchor_step(config.detector)
    return _fcos_step(config.detector)


def fcos_assignment(config: FCOSDetector) -> Callable[..., Assignment]:
    """FCOS's `DetectorStep.assign`."""
    return partial(
        assign,
        strides=config.strides,
        level_ranges=[float(limit) for limit in config.level_ranges],
        centre_radius=config.centre_radius,
    )


def _fcos_step(config: FCOSDetector) -> DetectorStep:
    return DetectorStep(
        loss_names=fcos.LOSSES,
        count_names=fcos.COUNTS,
        assign=fcos_assignment(config),
        counts=fcos.detection_counts,
        sample=sample_positives,
        losses=fcos.mean_detection_losses,
    )


def _anchor_step(config: AnchorDetector) -> DetectorStep:
    return DetectorStep(
        loss_names=squares.LOSSES,
        count_names=squares.COUNTS,
        assign=partial(
            assign_squares,
            sides=config.anchor_sides,
            scales=config.anchor_scales,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            negatives=config.negatives,
        ),
        counts=anchor_counts,
        sample=sample_anchors,
        losses=mean_anchor_losses,
        sized=True,
    )


def _region_step(config: RegionDetector, model: Segmenter) -> DetectorStep:
    sampled = partial(
        sample_regions,
        iou=config.region_iou,
        draw=Draw(config.regions_drawn, config.positive_regions),
    )
    return DetectorStep(
        loss_names=two_stage.LOSSES,
        count_names=two_stage.COUNTS,
        assign=partial(
            assign_anchors,
            first_stride=config.strides[0],
            sides=config.anchor_sides,
            ratios=config.anchor_ratios,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            draw=Draw(config.anchors_drawn, config.positive_anchors),
        ),
        counts=_region_counts,
        sample=queries_of_boxes if config.mask_regions == "boxes" else partial(queries_of_proposals, sampled=sampled),
        own_regions=config.mask_regions == "proposals",
        # through the model, of which `TrainStep` is the owner: a copy of the step has a detector of its own
        losses=partial(mean_region_losses, model=model, sampled=sampled),
        draws=True,
    )


def _region_counts(assignment: RegionAssignment, box_only: Tensor) -> dict[str, Tensor]:
    return on_device(box_only.device, anchors=len(assignment.anchor_index), images=len(assignment.seeds))


def queries_of_boxes(
    outputs: regions.RegionOutputs,
    assignment: RegionAssignment,
    targets: Targets,
    quotas: Tensor,
    *,
    counts: tuple[int, ...],
) -> MaskQueries:
    """The objects' own boxes, of those whose quota is 1 and not 0: how many is known beforehand."""
    instance = torch.nonzero_static(quotas > 0, size=sum(counts))[:, 0]
    return queries_of(targets, instance, torch.zeros_like(instance), counts=counts)  # masks are made from boxes


def queries_of_proposals(
    outputs: regions.RegionOutputs,
    assignment: RegionAssignment,
    targets: Targets,
    quotas: Tensor,
    *,
    counts: tuple[int, ...],
    sampled: Callable[..., Any],
) -> MaskQueries:
    """The drawn regions of the objects whose quota is 1 and not 0: how many follows from the predictions."""
    found = sampled(outputs, assignment, targets)
    wanted = (found.instance >= 0) & (_of(quotas, found.instance) > 0)
    instance = found.instance[wanted]
    queries = queries_of(targets, instance, torch.zeros_like(instance))
    return replace(queries, boxes_xyxy=torch.cat(found.boxes_xyxy)[wanted])


def mean_region_losses(
    outputs: regions.RegionOutputs,
    assignment: RegionAssignment,
    targets: Targets,
    count: Mapping[str, Tensor],
    *,
    processes: int,
    model: Segmenter,
    sampled: Callable[..., Any],
) -> dict[str, Tensor]:
    """The losses of both stages of one accumulation part on one process, as its share of the whole optimizer step.

    With n = `count` of the whole step, p = `processes`: sums over anchors are divided by max(n.anchors / p, 1), the
    sums of each image's own means by max(n.images / p, 1): how many regions are drawn follows from predictions, how
    many images there are does not.
    """
    detector = model.detector
    assert isinstance(detector, regions.RegionDetector)
    place = (assignment.image_index, assignment.anchor_index)
    wanted = _wanted(targets, assignment.anchor_instance, outputs.anchors_xyxy[place[1]], regions.ANCHOR_WEIGHTS)
    positive = assignment.anchor_instance >= 0
    sums = two_stage.anchor_losses(outputs.objectness_logits[place], outputs.anchor_deltas[place], wanted, positive)
    found = sampled(outputs, assignment, targets)
    logits, deltas = detector.refine(outputs, found.boxes_xyxy)
    device = logits.device
    image = torch.cat([torch.full((len(own),), k, device=device) for k, own in enumerate(found.boxes_xyxy)])
    background = torch.zeros_like(found.instance)
    label = torch.where(found.instance >= 0, _of(targets.labels, found.instance) + 1, background)
    wanted = _wanted(targets, found.instance, torch.cat(found.boxes_xyxy), regions.REGION_WEIGHTS)
    sums |= two_stage.region_losses(logits, deltas, wanted, label, image, len(assignment.seeds))
    of_anchors, of_images = ((count[name] / processes).clamp(min=1) for name in two_stage.COUNTS)
    divisors = dict(zip(two_stage.LOSSES, (of_anchors, of_anchors, of_images, of_images), strict=True))
    return {name: sums[name] / divisors[name].to(sums[name].dtype) for name in two_stage.LOSSES}


def _of(values: Tensor, instance: Tensor) -> Tensor:
    """Rows of values (N, ...) of instances (K,); of the background any, zeros where there is no instance."""
    if not len(values):
        return values.new_zeros(len(instance), *values.shape[1:])
    return values[instance.clamp(min=0)]


def _wanted(targets: Targets, instance: Tensor, boxes_xyxy: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The deltas (K, 4) from boxes to those of their instances; without meaning for the background."""
    return encode_boxes(_of(targets.boxes_xyxy, instance), boxes_xyxy, weights)
