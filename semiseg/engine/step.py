"""One training step, in order: forward, assign, sample, predict masks, losses. What `accelerate` wraps.

    batch -> plan (assign; what each instance may learn from; counts)        no parameters, before the first backward
    batch, plan, global counts -> forward -> sample -> predict_masks -> losses

The plan comes first because every denominator counts over the whole optimizer step (all processes, all accumulation
parts) and follows from targets and images alone (METHOD section 2, Mixing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semiseg.losses.terms import LossTerms, MaskTargets, Objective, compute_losses, mask_targets, term_counts
from semiseg.models.assign import assign
from semiseg.models.condinst import CondInst
from semiseg.models.sample import mask_quotas, sample_positives
from semiseg.structures.inputs import Batch, Targets
from semiseg.structures.outputs import Assignment


@dataclass(frozen=True)
class StepPlan:
    """What is known of a batch before the network has seen it.

    Attributes:
        assignment: positive and ignored locations.
        mask_targets: what each instance's mask may learn from.
        quotas: (N,) int64, positives of each instance that get a mask loss.
        counts: (len(COUNT_NAMES),) float64, this batch's share of every denominator.
    """

    assignment: Assignment
    mask_targets: MaskTargets
    quotas: Tensor
    counts: Tensor


class TrainStep(nn.Module):
    """A model together with its assignment and losses.

    Mask heads with parameters of their own work under data parallelism because they are called inside `forward`.
    """

    def __init__(self, model: CondInst, *, objective: Objective, centre_radius: float, max_mask_positives: int) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.centre_radius = centre_radius
        self.max_mask_positives = max_mask_positives

    @torch.no_grad()
    def plan(self, batch: Batch) -> StepPlan:
        """Assigns locations and counts what the losses will divide by; uses no parameter and no random number."""
        targets = _targets(batch)
        num_images = batch.images.shape[0]
        padded_hw = (batch.images.shape[-2], batch.images.shape[-1])
        assignment = assign(
            self.model.locations(padded_hw, device=batch.images.device),
            targets,
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
        wanted = mask_targets(batch, objective=self.objective)
        # Quotas are shared out whatever the supervision; masks are then computed only where a term will use them.
        quotas = torch.where(wanted.used, quotas, torch.zeros_like(quotas))
        return StepPlan(assignment, wanted, quotas, term_counts(assignment, targets, wanted, quotas))

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
        queries = sample_positives(outputs, plan.assignment, plan.quotas)
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
