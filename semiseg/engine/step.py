"""One training step, in order: forward, assign, sample, predict masks, losses. What `accelerate` wraps.

    batch -> plan (assign; what each instance may learn from; how many masks; colour affinity; counts)
    batch, plan, global counts -> forward -> sample -> predict_masks -> losses

The plan needs no parameters. It comes first because every denominator counts over the whole optimizer step (all
processes, all accumulation parts) and follows from targets and images alone (METHOD section 2, Mixing). Every number
that the size of a tensor depends on is computed on the host, which never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from semiseg.engine.detection import DetectorStep
from semiseg.engine.rays import with_rays
from semiseg.losses.learned import AffinityTargets, LearnedEdges, affinity_targets
from semiseg.losses.terms import (
    LossTerms,
    MaskTargets,
    Objective,
    cell_colours,
    instance_terms,
    loss_edges,
    loss_sizes,
    mask_crops,
    mask_losses,
    soft_cells,
    term_counts,
    whole_map,
)
from semiseg.models.affinity import AffinityBranch
from semiseg.models.detectors.sample import mask_quotas, sums_by_image
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch, Targets
from semiseg.structures.outputs import MaskLogits, MaskQueries
from semiseg.structures.transfer import send


@dataclass(frozen=True)
class StepPlan:
    """What is known of a batch before the network has seen it, on the batch's device."""

    assignment: Any  # the detector's own: what is positive for which instance, and what is ignored
    mask_targets: MaskTargets  # what each instance's mask may learn from
    quotas: Tensor  # (N,) int64, positives of each instance whose mask is predicted
    queries: tuple[int, ...]  # how many masks each image gets
    counts: Tensor  # (len(TrainStep.count_names),) float64, this batch's share of every denominator
    rays: MaskQueries | None = None  # the positives whose rays are learned, in the order of `mask_targets.rays`


class TrainStep(nn.Module):
    """A model together with its assignment and losses.

    Mask heads with parameters of their own work under data parallelism because they are called inside `forward`.

    Attributes:
        detector: how the detector is trained.
        affinity: the branch that learns which edges separate instances, where the objective wants one.
        loss_names, count_names: of what `forward` and `plan` return; the same for every part and process of a run.
    """

    def __init__(
        self,
        model: Segmenter,
        *,
        detector: DetectorStep,
        objective: Objective,
        max_mask_positives: int,
        affinity: AffinityBranch | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.affinity = affinity
        self.detector, self.objective = detector, objective
        self.loss_names = detector.loss_names + objective.loss_names
        self.count_names = detector.count_names + objective.count_names
        self.max_mask_positives = max_mask_positives

    @torch.no_grad()
    def plan(self, batch: Batch, loaded: Batch | None = None) -> StepPlan:
        """Assigns locations, shares out the masks and prepares their targets; uses no parameter.

        What is drawn follows from the seeds of the samples. What the sizes of tensors depend on is computed on the
        host and sent; then nothing is read back.

        Args:
            batch: images and targets on the model's device.
            loaded: the same batch on the host, as the loader gave it; None = the targets of `batch` are read back.
        """
        targets = _targets(batch if loaded is None else loaded).to("cpu")
        num_images, size_hw = batch.images.shape[0], (batch.images.shape[-2], batch.images.shape[-1])
        sizes_hw = self.model.level_sizes(size_hw)
        assignment = self.detector.assignment(
            targets, sizes_hw=sizes_hw, num_images=num_images, seeds=batch.seeds, padded_hw=size_hw
        )
        quotas = mask_quotas(
            assignment,
            num_instances=targets.num_instances,
            num_images=num_images,
            image_index=targets.image_index,
            max_positives=self.max_mask_positives,
        )
        grid = self.model.mask_grid(targets.boxes_xyxy, size_hw)
        instances = instance_terms(targets, grid, objective=self.objective)
        # Quotas are shared out whatever the supervision; masks are then computed only where a term will use them.
        shared = torch.where(instances.used, quotas.clamp(max=self.model.mask_head.most_per_instance), 0)
        quotas = torch.where(instances.drawn, shared, 0)
        queries = sums_by_image(targets.image_index, quotas, num_images)
        sizes = loss_sizes(instances, quotas, objective=self.objective)
        rays = None
        if "rays" in instances.chosen:
            assignment, rays = with_rays(assignment, targets)

        assignment, instances, quotas, shared, rays = send(
            (assignment, instances, quotas, shared, rays), batch.images.device
        )
        targets = _targets(batch)
        affinity = self.affinity_targets(batch, targets) if self.affinity is not None else None
        wanted = MaskTargets(
            **vars(instances),
            objective=self.objective,
            masks=targets.masks_on(instances.grid),
            edges=loss_edges(batch, targets, instances, affinity, objective=self.objective),
            affinity=affinity,
            lab=cell_colours(batch, instances, affinity),
            known=targets.known_on(instances.grid),
            soft=None if self.detector.own_regions else soft_cells(targets, instances),
            sizes=sizes,
            crops=mask_crops(targets, instances),
            rays=None if rays is None else targets.rays,
        )
        own = self.detector.counts(assignment, wanted.box_only)
        of_detector = torch.stack([own[name].double() for name in self.detector.count_names])
        counts = torch.cat([of_detector, term_counts(targets, wanted, shared)])
        return StepPlan(assignment, wanted, quotas, tuple(queries), counts, rays)

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
        queries = self.detector.sample(outputs, plan.assignment, targets, plan.quotas, counts=plan.queries)
        mask_logits, wanted = self.model.predict_masks(outputs, queries), plan.mask_targets
        if self.detector.own_regions:
            mask_logits, wanted = self._in_own_regions(mask_logits, queries, targets, plan)
        learned = None
        if self.affinity is not None and plan.mask_targets.affinity is not None:
            colours = plan.mask_targets.affinity
            logits = self.affinity(self.model.mask_head.edge_features(outputs), colours.lab, colours.distances)
            learned = LearnedEdges(logits, self.affinity.trust())
        count = dict(zip(self.count_names, counts.unbind(), strict=True))
        of_detector = self.detector.losses(outputs, plan.assignment, targets, count, processes=processes)
        rays = None if plan.rays is None else self.model.mask_head.distances(outputs, plan.rays)
        masks = mask_losses(mask_logits, wanted, count, warmup=warmup, processes=processes, learned=learned, rays=rays)
        return masks.with_detection(of_detector)

    def _in_own_regions(
        self, logits: MaskLogits, queries: MaskQueries, targets: Targets, plan: StepPlan
    ) -> tuple[MaskLogits, MaskTargets]:
        """What masks in other boxes than the objects' learn from: every query counts as an instance.

        Denominators are known before the network has run, how many queries an image has is not: its queries share the
        weight of its objects. The configuration allows no loss here whose denominators count edges.
        """
        of_queries = targets.of_queries(queries.instance_index, queries.image_index)
        instances = instance_terms(of_queries, logits.grid, objective=self.objective)
        images = len(plan.queries)
        wanted, found = (
            torch.bincount(index, minlength=images)
            for index in (targets.image_index[plan.quotas > 0], queries.image_index)
        )
        share = (wanted / found.clamp(min=1))[queries.image_index]
        prepared = MaskTargets(
            **{**vars(instances), "weight": instances.weight * share},
            objective=self.objective,
            masks=of_queries.masks_on(logits.grid),
            edges={},
            known=of_queries.known_on(logits.grid),
            soft=soft_cells(of_queries, instances),
        )
        return replace(logits, instance_index=torch.arange(len(share), device=share.device)), prepared

    def affinity_targets(self, batch: Batch, targets: Targets) -> AffinityTargets:
        """What the branch sees of a batch with these targets, and what it learns from it."""
        size_hw = (batch.images.shape[-2], batch.images.shape[-1])
        return affinity_targets(
            batch,
            targets,
            whole_map(self.model.mask_grid(targets.boxes_xyxy, size_hw)),
            size=self.objective.affinity_size,
            dilation=self.objective.affinity_dilation,
            threshold=self.objective.affinity_threshold,
        )


def _targets(batch: Batch) -> Targets:
    if batch.targets is None:
        raise ValueError("a training batch needs targets")
    return batch.targets
