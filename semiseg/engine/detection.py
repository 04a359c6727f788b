"""How a detector is trained: the functions of it that a step calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from semiseg.config.model import FCOSDetector
from semiseg.losses.detection import COUNTS, LOSSES, detection_counts, mean_detection_losses
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.sample import sample_positives
from semiseg.structures.outputs import MaskQueries


@dataclass(frozen=True)
class DetectorStep:
    """What a training step needs of its detector, from the plan to the losses.

    An assignment is the detector's own structure; its `instance_index` (P,) names the instance of each of its
    positives, by image.
    """

    loss_names: tuple[str, ...]
    count_names: tuple[str, ...]
    # (targets on the host, sizes_hw of the levels, num_images) -> assignment; it uses no parameter
    assign: Callable[..., Any]
    # (assignment, box_only (N,) bool) -> by `count_names`, what the denominators of this batch's losses are made of
    counts: Callable[[Any, Tensor], dict[str, Tensor]]
    # (outputs, assignment, targets, quotas (N,), counts of each image) -> as many positives of each instance
    sample: Callable[..., MaskQueries]
    # (outputs, assignment, targets, count of the whole step, processes) -> by `loss_names`, as they are added up
    losses: Callable[..., dict[str, Tensor]]


def detector_step(config: FCOSDetector) -> DetectorStep:
    """The functions of the configured detector."""
    return DetectorStep(
        loss_names=LOSSES,
        count_names=COUNTS,
        assign=partial(
            assign,
            strides=config.strides,
            level_ranges=[float(limit) for limit in config.level_ranges],
            centre_radius=config.centre_radius,
        ),
        counts=detection_counts,
        sample=sample_positives,
        losses=mean_detection_losses,
    )
