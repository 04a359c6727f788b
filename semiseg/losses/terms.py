"""Which mask losses an instance gets, and how the sums of a step become shares of its loss.

Letters: B images, N instances, Q sampled positives with a mask, K neighbours, (h, w) the mask grid of the batch.
A new kind of supervision or a new mask loss is a row of `TERMS`, a name in `MASK_LOSSES` and one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from semiseg.losses.affinity import (
    affinity_edges,
    downsample_images,
    from_both_ends,
    neighbour_inside,
    rgb_to_lab,
)
from semiseg.losses.boxinst import (
    box_cells,
    cell_profiles,
    edge_counts,
    edge_sums,
    mask_projection_loss,
    patch_cells,
    projection_loss,
)
from semiseg.losses.crops import (
    CROP_WEIGHT,
    SMOOTHNESS_WEIGHT,
    Crops,
    bag_loss,
    crop_loss,
    cross_entropy_loss,
    one_around,
    smoothness_loss,
)
from semiseg.losses.dice import at_least_float32, dice_loss
from semiseg.losses.learned import COLOUR_COUNTS, AffinityTargets, LearnedEdges, affinity_loss
from semiseg.losses.level_set import level_set_loss
from semiseg.losses.rays import LEAST_CENTRENESS, polar_centreness, ray_loss_sum
from semiseg.losses.regions import crop_cells, region_cells, region_edges, region_inside, shrunk_cells, soft_masks
from semiseg.structures.grids import MaskGrid, Regions, WholeMap
from semiseg.structures.inputs import Batch, Supervision, Targets, has_mask
from semiseg.structures.outputs import MaskLogits
from semiseg.structures.rays import RayTargets

MaskObjective = Literal["dice", "labelled", "bce", "crop_bce", "rays"]
PseudoObjective = Literal["dice", "bce", "dice+projection", "dice+projection+pairwise"]
BoxObjective = Literal[
    "none", "projection", "projection+pairwise", "projection+learned", "box_as_mask", "mil", "mil+smooth"
]
Affinity = Literal["colour", "learned"]

# Supervision of the instance and the objective for that supervision -> the mask losses that the instance gets.
TERMS: Mapping[tuple[Supervision, str], tuple[str, ...]] = {
    (Supervision.MASK, "dice"): ("dice",),
    (Supervision.MASK, "labelled"): ("projection", "pairwise_labelled"),
    (Supervision.MASK, "bce"): ("bce",),
    (Supervision.MASK, "crop_bce"): ("crop_bce",),
    (Supervision.MASK, "rays"): ("rays",),
    # The box of a pseudo mask is annotated, so that projection compares with it and not with the mask.
    (Supervision.PSEUDO, "dice"): ("dice",),
    (Supervision.PSEUDO, "bce"): ("bce",),
    (Supervision.PSEUDO, "dice+projection"): ("dice", "projection"),
    (Supervision.PSEUDO, "dice+projection+pairwise"): ("dice", "projection", "pairwise"),
    (Supervision.BOX, "none"): (),
    (Supervision.BOX, "projection"): ("projection",),
    (Supervision.BOX, "projection+pairwise"): ("projection", "pairwise"),
    (Supervision.BOX, "projection+learned"): ("projection", "pairwise", "pairwise_learned"),
    (Supervision.BOX, "box_as_mask"): ("dice",),  # on the filled box: the first row of the paper's Table 3
    (Supervision.BOX, "mil"): ("mil",),
    (Supervision.BOX, "mil+smooth"): ("mil", "smoothness"),
}

MASK_LOSSES = ("dice", "projection", "pairwise", "pairwise_labelled")

# What the denominators of a step are made of beside the detector's, in the order of `term_counts`. The last four are
# what the mask losses of the same name sum over: masks, masks, edges, edges.
MASK_COUNTS = ("masks", "box_masks", "mask_masks", *MASK_LOSSES)

EDGE_LOSSES = ("pairwise", "pairwise_labelled", "pairwise_learned")

# With learned affinity there are two losses more, which sum over edges, and counts of the colour rule's answers.
LEARNED_LOSSES = ("pairwise_learned", "affinity")
# Losses that a step names where its objective has them, each of which sums over masks.
CROP_LOSSES = ("bce", "crop_bce", "mil", "smoothness")
_WEIGHTS = {"bce": 1.0, "mil": 1.0, "crop_bce": CROP_WEIGHT, "smoothness": SMOOTHNESS_WEIGHT}
OPTIONAL_MASK_LOSSES = ("pairwise_learned", "level_set", *CROP_LOSSES, "rays")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The study's choice of mask losses: for instances with a mask, for those with only a box, and the edges."""

    mask: MaskObjective
    box: BoxObjective
    affinity_threshold: float
    affinity_size: int
    affinity_dilation: int
    affinity: Affinity = "colour"
    level_set: float = 0.0
    pseudo: PseudoObjective | None = None  # for instances with a pseudo mask; None = there are none in the run

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Of all mask losses of a step, in their order."""
        return (*MASK_LOSSES, *self._optional, *(LEARNED_LOSSES if self.affinity == "learned" else ()))

    @property
    def count_names(self) -> tuple[str, ...]:
        """Of what `term_counts` gives, in its order."""
        learned = (*LEARNED_LOSSES, *COLOUR_COUNTS) if self.affinity == "learned" else ()
        return (*MASK_COUNTS, *self._optional, *learned)

    def terms_of(self, supervision: Supervision) -> tuple[str, ...]:
        if supervision == Supervision.MASK:
            return TERMS[supervision, self.mask]
        if supervision == Supervision.CUT:
            return ()
        if supervision == Supervision.PSEUDO:
            terms = () if self.pseudo is None else TERMS[supervision, self.pseudo]
            learned = "pairwise" in terms and self.box == "projection+learned"
            return (*terms, "pairwise_learned") if learned else terms
        terms = TERMS[supervision, self.box]
        return (*terms, "level_set") if self.level_set > 0 and "projection" in terms else terms

    @property
    def _optional(self) -> tuple[str, ...]:
        used = {name for kind in Supervision for name in self.terms_of(kind)}
        own = tuple(name for name in (*CROP_LOSSES, "rays") if name in used)
        return ("level_set", *own) if self.level_set > 0 else own


@dataclass(frozen=True)
class InstanceTerms:
    """What each instance's mask may learn from, by its supervision, the objective, its box and its mask."""

    # Which instances, (N,) bool, get the mask loss of this name: the table gives it to them, and their mask (their box,
    # where they have none) has a cell. A loss that no instance of the batch can get, as the numbers of instances and of
    # masks show, is not among the keys.
    chosen: dict[str, Tensor]
    box_only: Tensor  # (N,) bool, whether the supervision is BOX or CUT
    pseudo: Tensor  # (N,) bool, whether it is PSEUDO
    grid: MaskGrid  # of the N instances' masks
    cells: Tensor  # (N, 4) int64, the box on the mask grid, see `boxinst.box_cells`
    mask_row: Tensor  # (N,) int64, row among the given masks; without meaning where `box_only`
    weight: Tensor  # (N,) float32 factor of each instance's mask losses
    # (N,) float32 one more, of the losses that compare with its mask: `Targets.mask_weight`, 1 where there is no mask
    mask_weight: Tensor

    @property
    def annotated(self) -> Tensor:
        """(N,) bool: whose supervision is MASK."""
        return ~(self.box_only | self.pseudo)

    @property
    def used(self) -> Tensor:
        """(N,) bool: which instances get any mask loss."""
        nothing = torch.zeros_like(self.box_only)
        return torch.stack([nothing, *self.chosen.values()]).any(0)

    @property
    def drawn(self) -> Tensor:
        """(N,) bool: which instances get a loss of the masks' cells; `rays` looks at what these are drawn from."""
        nothing = torch.zeros_like(self.box_only)
        return torch.stack([nothing, *(gets for name, gets in self.chosen.items() if name != "rays")]).any(0)


@dataclass(frozen=True, kw_only=True)
class MaskTargets(InstanceTerms):
    """What the mask losses compare with, from the batch and the objective alone."""

    objective: Objective  # that it was prepared for
    masks: Tensor  # (M, h, w) bool, only of instances with a mask
    # (B, K, h, w) bool, the edges that count for the edge loss of this name; keys as in `chosen`. On regions (N, K, h,
    # w).
    edges: dict[str, Tensor]
    affinity: AffinityTargets | None = None  # what learned affinity learns from; None without it
    lab: Tensor | None = None  # (B, 3, h, w) the cells' colours, where an instance gets `level_set`
    known: Tensor | None = None  # (M, h, w) bool, the cells of `masks` that count; None = all
    soft: Tensor | None = None  # (M, h, w) float, the shares of the cells that are inside, where `bce` wants those
    crops: Crops | None = None  # where an instance gets `crop_bce`
    rays: RayTargets | None = None  # where the objective learns from rays
    # See `loss_sizes`; None = they are read back from the device when they are needed
    sizes: Mapping[str, int] | None = None

    def edge_index(self, image: Tensor, instance: Tensor) -> Tensor:
        """Which of `edges` are those of masks (Q,) of these images and instances."""
        return image if isinstance(self.grid, WholeMap) else instance


@dataclass(frozen=True)
class LossTerms:
    """The losses of one part of a step, by their names, all of them always there."""

    # Scalars, the mean of each loss over what it sums over; without warm-up or mixing shares
    unweighted: dict[str, Tensor]
    weighted: dict[str, Tensor]  # scalars, what each contributes to the total

    def with_detection(self, losses: Mapping[str, Tensor]) -> LossTerms:
        """The same beside the detector's losses, which come first and are not weighted."""
        return LossTerms({**losses, **self.unweighted}, {**losses, **self.weighted})

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.weighted.values())).sum()


def instance_terms(targets: Targets, grid: MaskGrid, *, objective: Objective) -> InstanceTerms:
    """Looks up what each instance's mask may learn from; without a transfer to the host."""
    if isinstance(grid, WholeMap):
        cells = box_cells(targets.boxes_xyxy, stride=grid.stride, grid_hw=grid.size_hw)
    else:
        cells = region_cells(targets.boxes_xyxy, grid, pixels=not objective.box.startswith("mil"))
    has_cell = cells[:, 1] > cells[:, 0]
    # `any` as a maximum of bytes, which is 20 times faster
    masks, known = targets.masks_on(grid), targets.known_on(grid)
    masks = masks if known is None else masks & known
    has_cell[targets.mask_instance] = masks.flatten(1).view(torch.uint8).amax(1) > 0
    mask_row = torch.zeros_like(targets.supervision)
    mask_row[targets.mask_instance] = torch.arange(len(targets.mask_instance), device=mask_row.device)
    mask_weight = torch.ones_like(has_cell, dtype=torch.float32)
    mask_weight[targets.mask_instance] = targets.mask_weight
    return InstanceTerms(
        chosen=_choose(targets, objective, has_cell),
        box_only=~has_mask(targets.supervision),
        pseudo=targets.supervision == Supervision.PSEUDO,
        grid=grid,
        cells=cells,
        mask_row=mask_row,
        weight=torch.ones_like(mask_weight),
        mask_weight=mask_weight,
    )


def loss_edges(
    batch: Batch,
    targets: Targets,
    instances: InstanceTerms,
    affinity: AffinityTargets | None = None,
    *,
    objective: Objective,
) -> dict[str, Tensor]:
    """`MaskTargets.edges`, on the batch's device, without a transfer to the host; only of losses that someone gets.

    Args:
        batch: its images are looked at where an instance gets `pairwise`.
        targets: the batch's.
        instances: what `instance_terms` gives of them, on the batch's device.
        affinity: of the same batch, where an instance gets `pairwise_learned`.
        objective: the study's.
    """
    grid, image_index = instances.grid, targets.image_index
    of_images = (batch.image_sizes_hw, batch.bottom_rows_without_affinity)
    size, dilation, threshold = objective.affinity_size, objective.affinity_dilation, objective.affinity_threshold
    if isinstance(grid, WholeMap):
        coloured = partial(affinity_edges, batch.images, *of_images, stride=grid.stride)
        inside = partial(neighbour_inside, *of_images, stride=grid.stride, grid_hw=grid.size_hw)
    else:
        coloured = partial(region_edges, batch.images, grid, image_index, *of_images)
        inside = partial(region_inside, grid, image_index, *of_images)
    edges = {}
    if affinity is not None and "pairwise_learned" in instances.chosen:
        alike, of_one_box = (
            from_both_ends(each, size=size, dilation=dilation) for each in (affinity.alike, affinity.of_one_box)
        )
        edges["pairwise"] = alike.logical_and_(inside(size=size, dilation=dilation))
        edges["pairwise_learned"] = of_one_box
    elif "pairwise" in instances.chosen:
        edges["pairwise"] = coloured(size=size, dilation=dilation, threshold=threshold)
    if "pairwise_labelled" in instances.chosen:
        edges["pairwise_labelled"] = inside(size=size, dilation=dilation)
    return edges


def cell_colours(batch: Batch, instances: InstanceTerms, affinity: AffinityTargets | None) -> Tensor | None:
    """`MaskTargets.lab`."""
    if "level_set" not in instances.chosen:
        return None
    if affinity is not None:
        return affinity.lab
    return rgb_to_lab(downsample_images(batch.images, stride=whole_map(instances.grid).stride))


def soft_cells(targets: Targets, instances: InstanceTerms) -> Tensor | None:
    """`MaskTargets.soft`: where masks are made as torchvision makes them, they are also compared as it does."""
    grid = instances.grid
    if "bce" not in instances.chosen or not isinstance(grid, Regions) or not grid.whole_pixels:
        return None
    assert targets.encoded is not None
    return soft_masks(targets.encoded, grid.of(targets.mask_instance))


def mask_crops(targets: Targets, instances: InstanceTerms) -> Crops | None:
    """`MaskTargets.crops`. On grids of parts boxes are cut and masks shrunk as YOLACT does it."""
    if "crop_bce" not in instances.chosen:
        return None
    grid, boxes = instances.grid, targets.boxes_xyxy
    if isinstance(grid, WholeMap):
        cells, masks = one_around(instances.cells), targets.masks_on(grid)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / grid.stride**2
    else:
        assert targets.encoded is not None
        cells, area = crop_cells(boxes, grid)
        masks = shrunk_cells(grid.of(targets.mask_instance), targets.encoded)
    # smaller boxes are dropped by the original's augmentation: at 550 pixels and 138 cells, a side of 4 pixels is one
    return Crops(cells, area.clamp(min=1), masks)


def whole_map(grid: MaskGrid) -> WholeMap:
    """The grid, of which learned affinity and the level set need that it is an image's, not an instance's own."""
    if not isinstance(grid, WholeMap):
        raise TypeError(f"masks on one grid for all instances are needed, not on {type(grid).__name__}")
    return grid


def loss_sizes(instances: InstanceTerms, quotas: Tensor, *, objective: Objective) -> dict[str, int]:
    """How many masks `dice` looks at, and how many cells each edge loss, of the positives that will be sampled.

    The sizes of tensors in the step depend on these numbers. On the host they are had for nothing; read from a
    device, each would make it wait.

    Args:
        instances: of N instances, on the host.
        quotas: (N,) int64, how many positives of each instance get a mask.
    """
    around = patch_cells(instances.cells, size=objective.affinity_size, dilation=objective.affinity_dilation)
    numbers = {"dice": quotas} | dict.fromkeys(EDGE_LOSSES, quotas * around)
    return {name: int((numbers[name] * instances.chosen[name]).sum()) for name in numbers if name in instances.chosen}


def _choose(targets: Targets, objective: Objective, has_cell: Tensor) -> dict[str, Tensor]:
    with_mask = len(targets.mask_instance)  # instances that have one: known without asking the device
    kinds = [Supervision.BOX] * (with_mask < targets.num_instances)
    kinds += [Supervision.MASK, Supervision.PSEUDO] * (with_mask > 0)
    chosen: dict[str, Tensor] = {}
    for kind in kinds:
        for name in objective.terms_of(kind):
            gets = (targets.supervision == kind) & has_cell
            chosen[name] = chosen[name] | gets if name in chosen else gets
    return chosen


def term_counts(targets: Targets, prepared: MaskTargets, quotas: Tensor) -> Tensor:
    """Everything that the denominators of the mask losses need, from targets and images alone: no prediction enters.

    Sum the vectors of all accumulation parts and all processes of an optimizer step before its first backward.

    Args:
        quotas: (N,) int64, how many positives of each instance get a mask.

    Returns:
        (len(objective.count_names),) float64: `masks` P, sampled positives that get any mask loss, of which
        `box_masks` P_box are box-supervised, or learn from a pseudo mask and the edges in their box, and `mask_masks`
        have an annotated mask; and the number that each mask loss sums over, all counted per sampled positive. With
        learned affinity also the known edges of all images, and `COLOUR_COUNTS` of these.
    """
    edged = prepared.box_only
    if "pairwise" in prepared.objective.terms_of(Supervision.PSEUDO):
        edged = edged | prepared.pseudo
    used = quotas * prepared.used
    counts: dict[str, Tensor] = {
        "masks": used.sum(),
        "box_masks": (used * edged).sum(),
        "mask_masks": (used * prepared.annotated).sum(),
    }
    for name in MASK_LOSSES + OPTIONAL_MASK_LOSSES:
        each = quotas * prepared.chosen[name] if name in prepared.chosen else quotas.new_zeros(1)
        if name in prepared.edges:
            instances = torch.arange(len(quotas), device=quotas.device)
            index = prepared.edge_index(targets.image_index, instances)
            each = each * edge_counts(prepared.cells, prepared.edges[name], index)
        counts[name] = each.sum()
    if prepared.rays is not None:
        of_instances = prepared.chosen["rays"][prepared.rays.instance_index]
        counts["rays"] = (polar_centreness(prepared.rays.distances) * of_instances).double().sum()
    if prepared.affinity is not None:
        counts["affinity"] = prepared.affinity.known.sum()
        counts |= zip(COLOUR_COUNTS, prepared.affinity.colour_counts(), strict=True)
    return torch.stack([counts[name].double() for name in prepared.objective.count_names])


def mask_losses(
    mask_logits: MaskLogits,
    prepared: MaskTargets,
    count: Mapping[str, Tensor],
    *,
    warmup: float,
    processes: int,
    learned: LearnedEdges | None = None,
    rays: Tensor | None = None,
) -> LossTerms:
    """The mask losses of one accumulation part on one process, as its share of the whole optimizer step.

    With n = `count`, S = a sum over this part, p = `processes`:

        unweighted mask loss t     = p S_t / max(n.t, 1), n.t masks for dice and projection, edges otherwise
        weighted dice, projection  = (n.t / max(n.masks, 1)) unweighted
        weighted pairwise_labelled = warmup (n.mask_masks / max(n.masks, 1)) unweighted
        weighted pairwise[_learned] = warmup (n.box_masks / max(n.masks, 1)) unweighted
        weighted level_set         = objective.level_set warmup (n.level_set / max(n.masks, 1)) unweighted
        weighted bce, mil          = as dice; smoothness 0.05 times that, crop_bce 6.125 times
        affinity                   = p S / max(n.affinity, 1)
        rays                       = (n.mask_masks / max(n.masks, 1)) p S / max(n.rays, 1e-6), n.rays their centreness

    so that (sum of dice + sum of projection) / P + (P_box / P) pairwise is METHOD's mixed loss. Sums over the parts
    of a step and means over its processes (which data parallelism takes of gradients) give the values of the step.
    Pseudo masks scale what compares with them by their weight and count as one. Deviation: the labelled edges, for
    which the method names no weight, take the same kind of share and warm-up as the coloured ones (docs/NUMERICS.md).
    `pairwise_learned` takes the place of `pairwise`, which it equals until learned labels are trusted.

    Args:
        mask_logits: one per sampled positive, on the grid of its instance.
        prepared: `mask_targets` of the same batch.
        count: `term_counts` summed over the whole step, by `Objective.count_names`.
        warmup: factor of the edge losses in [0, 1]: min(step / W, 1) with step from 1.
        processes: number of processes that share the step.
        learned: the branch's prediction for the batch, exactly where `prepared.affinity` is given.
        rays: (K, rays) predicted input pixels, exactly where `prepared.rays` is given: one row for each row of it.

    Returns:
        Every loss of the objective, 0 where nothing is there to sum. Their total carries a graph through the masks
        and the branch even then.
    """
    sums = _mask_sums(mask_logits, prepared, count, learned, rays)
    shares = _shares(count, warmup, prepared.objective)
    names = prepared.objective.loss_names
    factors = {name: processes / count[name].clamp(min=LEAST_CENTRENESS if name == "rays" else 1) for name in names}
    unweighted = {name: sums[name] * factors[name].to(sums[name].dtype) for name in names}
    weighted = {
        name: value * shares[name].to(value.dtype) if name in shares else value for name, value in unweighted.items()
    }
    return LossTerms(unweighted=unweighted, weighted=weighted)


def _shares(count: Mapping[str, Tensor], warmup: float, objective: Objective) -> dict[str, Tensor]:
    """What the unweighted mask losses are weighted with, see `mask_losses`."""
    masks = count["masks"].clamp(min=1)
    of_boxes = warmup * count["box_masks"] / masks
    return {
        "dice": count["dice"] / masks,
        "projection": count["projection"] / masks,
        "pairwise": of_boxes,
        "pairwise_labelled": warmup * count["mask_masks"] / masks,
        "pairwise_learned": of_boxes,
        **({"level_set": objective.level_set * warmup * count["level_set"] / masks} if "level_set" in count else {}),
        **{name: weight * count[name] / masks for name, weight in _WEIGHTS.items() if name in count},
        "rays": count["mask_masks"] / masks,
    }


def _mask_sums(
    mask_logits: MaskLogits,
    prepared: MaskTargets,
    count: Mapping[str, Tensor],
    learned: LearnedEdges | None,
    rays: Tensor | None,
) -> dict[str, Tensor]:
    logits, image, instance = mask_logits.logits, mask_logits.image_index, mask_logits.instance_index
    if not _same_cells(mask_logits.grid, prepared.grid):
        raise ValueError(f"the mask logits' grid {mask_logits.grid} is not that of the masks, {prepared.grid}")
    sums = {}
    if len(logits) and "dice" in prepared.chosen:
        sums["dice"] = _dice_sum(logits, instance, prepared)
    if len(logits) and "projection" in prepared.chosen:
        sums["projection"] = _projection_sum(logits, instance, prepared)
    if len(logits) and learned is not None and "pairwise_learned" in prepared.edges:
        sums["pairwise_learned"] = _learned_sum(logits, image, instance, prepared, count, learned)
    elif len(logits) and "pairwise" in prepared.edges:
        sums["pairwise"] = _edge_sum("pairwise", logits, image, instance, prepared, prepared.edges["pairwise"])
    if len(logits) and "pairwise_labelled" in prepared.edges:
        edges = prepared.edges["pairwise_labelled"]
        sums["pairwise_labelled"] = _edge_sum("pairwise_labelled", logits, image, instance, prepared, edges)
    for name in CROP_LOSSES:
        if len(logits) and name in prepared.chosen:
            sums[name] = _crop_sum(name, logits, instance, prepared)
    if len(logits) and prepared.lab is not None:
        each = level_set_loss(logits, prepared.cells[instance], prepared.lab, image)
        sums["level_set"] = torch.where(prepared.chosen["level_set"][instance], each, 0).sum()
    if rays is not None and prepared.rays is not None:
        sums["rays"] = ray_loss_sum(rays, prepared.rays, prepared.weight * prepared.chosen["rays"])
    # One loss with a graph is enough, and a graph for nothing costs a map of zeros. Without any, the masks take part in
    # the 0 (those of no queries are on the graph, too), so that no process waits for a gradient that never comes.
    zero = at_least_float32(logits.new_zeros(()) if sums else logits[:0].sum())
    if prepared.affinity is not None and learned is not None:
        sums["affinity"] = affinity_loss(learned.logits, prepared.affinity)
    return dict.fromkeys(MASK_LOSSES + OPTIONAL_MASK_LOSSES, zero) | sums


def _same_cells(one: MaskGrid, other: MaskGrid) -> bool:
    """Whether masks of the two grids can be compared; where regions stand is not read back from the device."""
    if isinstance(one, WholeMap) or isinstance(other, WholeMap):
        return one == other
    return one.size_hw == other.size_hw


def _dice_sum(logits: Tensor, instance: Tensor, prepared: MaskTargets) -> Tensor:
    wanted = prepared.chosen["dice"][instance]
    number = int(wanted.sum()) if prepared.sizes is None else prepared.sizes["dice"]
    if number < len(logits):
        rows = torch.nonzero_static(wanted, size=number)[:, 0]
        logits, instance = logits[rows], instance[rows]
    masks = _masks_of(instance, prepared)
    if prepared.known is not None:  # elsewhere the score is 0 and so is the target, which adds nothing to any sum
        known = _known(instance, prepared.known, prepared)
        logits, masks = logits.masked_fill(~known, -torch.inf), masks & known
    return (dice_loss(logits, masks) * _mask_factor(instance, prepared)).sum()


def _known(instance: Tensor, known: Tensor, prepared: MaskTargets) -> Tensor:
    """(Q, h, w) bool: the cells of which the masks of instances (Q,) say something; all of those without one."""
    return known[prepared.mask_row[instance]] | prepared.box_only[instance, None, None]


def _mask_factor(instance: Tensor, prepared: MaskTargets) -> Tensor:
    """(Q,) of the losses that compare with masks."""
    return (prepared.weight * prepared.mask_weight)[instance]


def _masks_of(instance: Tensor, prepared: MaskTargets) -> Tensor:
    """The masks (Q, h, w) bool of instances (Q,); of those without one the filled box, if the objective takes it."""
    given = prepared.masks[prepared.mask_row[instance]] if len(prepared.masks) else None
    if given is not None and prepared.objective.box != "box_as_mask":
        return given
    rows, columns = cell_profiles(prepared.cells[instance], prepared.grid.size_hw)
    filled = rows[:, :, None] & columns[:, None, :]
    return filled if given is None else torch.where(prepared.box_only[instance, None, None], filled, given)


def _projection_sum(logits: Tensor, instance: Tensor, prepared: MaskTargets) -> Tensor:
    """Projects every map, which is cheap, and cuts the other instances out of the sum instead of copying maps."""
    each = projection_loss(logits, prepared.cells[instance])
    if len(prepared.masks) and "projection" in prepared.objective.terms_of(Supervision.MASK):
        given = mask_projection_loss(logits, prepared.masks[prepared.mask_row[instance]])
        each = torch.where(prepared.annotated[instance], given, each)
    return torch.where(prepared.chosen["projection"][instance], each * prepared.weight[instance], 0).sum()


def _crop_sum(name: str, logits: Tensor, instance: Tensor, prepared: MaskTargets) -> Tensor:
    cells = prepared.cells[instance]
    if name == "bce":
        masks = (prepared.masks if prepared.soft is None else prepared.soft)[prepared.mask_row[instance]]
        whole = isinstance(prepared.grid, WholeMap) or prepared.grid.whole_image
        known = None if prepared.known is None else _known(instance, prepared.known, prepared)
        each = cross_entropy_loss(logits, masks, cells if whole else None, known)
        factor = _mask_factor(instance, prepared)
    elif name == "crop_bce":
        assert prepared.crops is not None
        crops, row = prepared.crops, prepared.mask_row[instance]
        each = crop_loss(logits, crops.masks[row], crops.cells[instance], crops.area[instance])
        factor = _mask_factor(instance, prepared)
    else:
        each = bag_loss(logits, cells) if name == "mil" else smoothness_loss(logits)
        factor = prepared.weight[instance]
    return torch.where(prepared.chosen[name][instance], each * factor, 0).sum()


def _learned_sum(
    logits: Tensor,
    image: Tensor,
    instance: Tensor,
    prepared: MaskTargets,
    count: Mapping[str, Tensor],
    learned: LearnedEdges,
) -> Tensor:
    """Colour's edges and the learned ones in one pass, since both need the same of every cell."""
    assert prepared.affinity is not None
    edges = prepared.edges["pairwise"] | prepared.edges["pairwise_learned"]
    costs = learned.costs(prepared.affinity, count["pairwise"], count["pairwise_learned"])
    return _edge_sum("pairwise_learned", logits, image, instance, prepared, edges, costs)


def _edge_sum(
    name: str,
    logits: Tensor,
    image: Tensor,
    instance: Tensor,
    prepared: MaskTargets,
    edges: Tensor,
    costs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    cells = (prepared.cells * prepared.chosen[name][:, None])[instance]  # those of other instances become empty
    objective = prepared.objective
    total = None if prepared.sizes is None else prepared.sizes[name]
    size, dilation = objective.affinity_size, objective.affinity_dilation
    masks = prepared.masks[prepared.mask_row[instance]] if name == "pairwise_labelled" else None
    index = prepared.edge_index(image, instance)
    each = edge_sums(logits, cells, edges, index, masks, costs, size=size, dilation=dilation, total_cells=total)
    return (each * prepared.weight[instance]).sum()
