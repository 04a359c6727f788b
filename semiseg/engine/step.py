"""One training step, in order: forward, assign, sample, predict masks, losses. What `accelerate` wraps.

    targets -> draft (assign; what each instance may learn from; how many masks)        on the host
    batch, draft -> plan (colour affinity; counts)                                      on the batch's device
    batch, plan, global counts -> forward -> sample -> predict_masks -> losses

Draft and plan need no parameters. They come first because every denominator counts over the whole optimizer step (all
processes, all accumulation parts) and follows from targets and images alone (METHOD section 2, Mixing). Every number
that the size of a tensor depends on is in the draft: the host has it and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semiseg.losses.terms import (
    COUNT_NAMES,
    LOSS_NAMES,
    InstanceTerms,
    LossTerms,
    MaskTargets,
    Objective,
    compute_losses,
    instance_terms,
    loss_sizes,
    mask_targets,
    term_counts,
)
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.sample import mask_quotas, sample_positives, sums_by_image
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch, Targets
from semiseg.structures.outputs import Assignment
from semiseg.structures.transfer import send


@dataclass(frozen=True)
class StepDraft:
    """The part of a plan that follows from the targets and the padded size alone, made on the host.

    Attributes:
        assignment: positive and ignored locations.
        instances: what each instance's mask may learn from.
        quotas: (N,) int64, positives of each instance that get a mask loss.
        queries: how many masks each image gets.
        sizes: how much each mask loss looks at, see `terms.loss_sizes`.
    """

    assignment: Assignment
    instances: InstanceTerms
    quotas: Tensor
    queries: tuple[int, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class StepPlan:
    """What is known of a batch before the network has seen it, on the batch's device.

    Attributes:
        assignment, quotas, queries: see `StepDraft`.
        mask_targets: what each instance's mask may learn from.
        counts: (len(TrainStep.count_names),) float64, this batch's share of every denominator.
    """

    assignment: Assignment
    mask_targets: MaskTargets
    quotas: Tensor
    queries: tuple[int, ...]
    counts: Tensor


class TrainStep(nn.Module):
    """A model together with its assignment and losses.

    Mask heads with parameters of their own work under data parallelism because they are called inside `forward`.

    Attributes:
        loss_names, count_names: of what `forward` and `plan` return; the same for every part and process of a run.
    """

    loss_names = LOSS_NAMES
    count_names = COUNT_NAMES

    def __init__(
        self, model: Segmenter, *, objective: Objective, centre_radius: float, max_mask_positives: int
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.centre_radius = centre_radius
        self.max_mask_positives = max_mask_positives

    @torch.no_grad()
    def draft(self, batch: Batch) -> StepDraft:
        """Assigns locations and shares out the masks; uses no parameter and no random number.

        Args:
            batch: as the loader gives it. The targets of one that is on a device already are read back.
        """
        targets = _targets(batch).to("cpu")
        num_images = batch.images.shape[0]
        assignment = assign(
            targets,
            sizes_hw=self.model.level_sizes((batch.images.shape[-2], batch.images.shape[-1])),
            strides=self.model.strides,
            num_images=num_images,
            level_ranges=self.model.level_ranges,
            centre_radius=self.centre_radius,
        )
        quotas = mask_quotas(
            assignment,
            num_instances=targets.num_instances,
            num_images=num_images,
            image_index=targets.image_index,
            max_positives=self.max_mask_positives,
        )
        grid = self.model.mask_grid(targets.boxes_xyxy, (batch.images.shape[-2], batch.images.shape[-1]))
        instances = instance_terms(targets, grid, objective=self.objective)
        # Quotas are shared out whatever the supervision; masks are then computed only where a term will use them.
        quotas = torch.where(instances.used, quotas, torch.zeros_like(quotas))
        queries = sums_by_image(targets.image_index, quotas, num_images)
        sizes = loss_sizes(instances, quotas, objective=self.objective)
        return StepDraft(assignment, instances, quotas, tuple(queries), sizes)

    @torch.no_grad()
    def plan(self, batch: Batch, draft: StepDraft | None = None) -> StepPlan:
        """Completes a draft on the batch's device: colour affinity, and counts of what the losses will divide by.

        Args:
            batch: images and targets on the model's device.
            draft: what `draft` returned for the batch, on the host; None = it is made now.
        """
        if draft is None:
            draft = self.draft(batch)
        sent = send(draft, batch.images.device)
        wanted = mask_targets(batch, sent.instances, objective=self.objective, sizes=draft.sizes)
        counts = term_counts(sent.assignment, _targets(batch), wanted, sent.quotas)
        return StepPlan(sent.assignment, wanted, sent.quotas, draft.queries, counts)

    def forward(self, batch: Batch, plan: StepPlan, counts: Tensor, *, warmup: float, processes: int) -> LossTerms:
        """The losses of one batch.

        Args:
            batch: images and targets on the model's device.
            plan: what `plan(batch)` returned.
            counts: the plans' counts summed over the whole optimizer step.
            warmup: factor of the pairwise term, in [0, 1].
            processes: over how many the gradients will be averaged.
        """
        targets = _targets(batch)
        outputs = self.model(batch.images, batch.image_sizes_hw)
        queries = sample_positives(outputs, plan.assignment, targets, plan.quotas, counts=plan.queries)
        mask_logits = self.model.predict_masks(outputs, queries)
        return compute_losses(
            outputs,
            plan.assignment,
            mask_logits,
            targets,
            plan.mask_targets,
            counts,
            warmup=warmup,
            processes=processes,
        )


def _targets(batch: Batch) -> Targets:
    if batch.targets is None:
        raise ValueError("a training batch needs targets")
    return batch.targets
