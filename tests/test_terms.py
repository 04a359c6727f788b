"""From supervision and objective to one loss: the table, the mixing formula in plain loops, its ends, its algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import straightforward as plain
from semiseg.losses.affinity import neighbour_offsets
from semiseg.losses.detection import COUNTS, LOSSES, detection_counts, mean_detection_losses
from semiseg.losses.learned import AffinityTargets, LearnedEdges, affinity_targets
from semiseg.losses.terms import (
    CROP_LOSSES,
    MASK_LOSSES,
    TERMS,
    Affinity,
    BoxObjective,
    LossTerms,
    MaskObjective,
    MaskTargets,
    Objective,
    PseudoObjective,
    instance_terms,
    loss_edges,
    mask_crops,
    mask_losses,
    term_counts,
)
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import Batch, Supervision, Targets
from semiseg.structures.outputs import Assignment, DenseOutputs, Locations, MaskLogits
from tests.tiny import COUNT_NAMES

BOX, MASK, PSEUDO = Supervision.BOX, Supervision.MASK, Supervision.PSEUDO
STRIDE, GRID = 4, (8, 8)
R, C = 6, 3


def objective(
    mask: MaskObjective = "dice",
    box: BoxObjective = "projection+pairwise",
    pseudo: PseudoObjective | None = None,
) -> Objective:
    affinity: Affinity = "learned" if box == "projection+learned" else "colour"
    neighbours = {"affinity_size": 3, "affinity_dilation": 2}
    return Objective(mask=mask, box=box, affinity_threshold=0.3, **neighbours, affinity=affinity, pseudo=pseudo)


TRUST = 0.25  # in learned edges, where the objective has them

# Image, box, quota. Number 3 has no cell on the grid; number 6 is there to be given an empty mask.
INSTANCES = [
    (0, (3.0, 4.0, 18.0, 17.0), 2),
    (0, (0.0, 0.0, 30.0, 26.0), 1),
    (0, (20.0, 12.0, 31.0, 27.0), 3),
    (0, (3.1, 3.1, 4.9, 4.9), 2),
    (1, (8.0, 2.0, 29.0, 29.0), 1),
    (1, (1.0, 13.0, 12.0, 28.0), 2),
    (1, (14.0, 14.0, 27.0, 22.0), 1),
]
MIXED = [MASK, BOX, BOX, BOX, BOX, MASK, MASK]


def make_batch(supervision: list[Supervision], instances: list[int] | None = None, seed: int = 0) -> Batch:
    """Two images of 27 x 31 and 31 x 29 pixels padded to 32 x 32, with the chosen of INSTANCES."""
    chosen = [INSTANCES[n] for n in (range(len(INSTANCES)) if instances is None else instances)]
    assert len(chosen) == len(supervision)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, 107, (2, 3, 8, 8), generator=generator)  # some neighbours alike, some not
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    boxes = torch.tensor([box for _, box, _ in chosen]).reshape(-1, 4)
    with_mask = [n for n, kind in enumerate(supervision) if kind != BOX]
    masks = torch.rand(len(INSTANCES), *GRID, generator=generator) > 0.4
    masks[6] = False
    names = list(range(len(INSTANCES))) if instances is None else instances
    targets = Targets(
        boxes_xyxy=boxes,
        labels=torch.arange(len(chosen)) % C,
        image_index=torch.tensor([image for image, _, _ in chosen], dtype=torch.int64),
        supervision=torch.tensor([int(kind) for kind in supervision], dtype=torch.int64),
        masks=masks[[names[n] for n in with_mask]],
        mask_instance=torch.tensor(with_mask, dtype=torch.int64),
        mask_weight=torch.tensor([0.25 if supervision[n] == PSEUDO else 1.0 for n in with_mask]),
        crowd_boxes_xyxy=torch.zeros(0, 4),
        crowd_image_index=torch.zeros(0, dtype=torch.int64),
        mask_stride=STRIDE,
    )
    sizes, bottom = torch.tensor([[27, 31], [31, 29]]), torch.tensor([3, 0])
    return Batch(images, sizes, (7, 8), bottom, targets)


def prepare(batch: Batch, goal: Objective) -> MaskTargets:
    assert batch.targets is not None
    instances = instance_terms(batch.targets, WholeMap(STRIDE, GRID), objective=goal)
    affinity = affinity_of(batch) if goal.affinity == "learned" else None
    edges = loss_edges(batch, batch.targets, instances, affinity, objective=goal)
    masks, known = batch.targets.masks, batch.targets.mask_known
    crops = mask_crops(batch.targets, instances)
    return MaskTargets(
        **vars(instances), objective=goal, masks=masks, known=known, edges=edges, affinity=affinity, crops=crops
    )


def affinity_of(batch: Batch) -> AffinityTargets:
    assert batch.targets is not None
    return affinity_targets(batch, batch.targets, WholeMap(STRIDE, GRID), size=3, dilation=2, threshold=0.3)


class Step:
    """A batch together with made-up predictions, as the engine would hold them."""

    def __init__(self, batch: Batch, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        assert batch.targets is not None
        self.batch, self.targets = batch, batch.targets
        count = self.targets.num_instances
        boxes = [list(box) for _, box, _ in INSTANCES]
        self.names = [boxes.index(box) for box in self.rounded_boxes()]
        self.quotas = torch.tensor([INSTANCES[n][2] for n in self.names], dtype=torch.int64)
        instance = torch.repeat_interleave(torch.arange(count), self.quotas)
        image = self.targets.image_index[instance]
        # Predictions belong to the instance, whatever else is in the batch: halves see what the whole sees.
        logits = [self.draw(100 + 10 * n + q, *GRID) * 2 for n in self.names for q in range(INSTANCES[n][2])]
        stacked = torch.stack(logits) if logits else torch.zeros(0, *GRID)
        self.logits = stacked.to(dtype).requires_grad_()
        self.mask_logits = MaskLogits(self.logits, image, instance, grid=WholeMap(STRIDE, GRID))
        self.assignment = self.assign(image, instance)
        self.outputs = self.predict(dtype)
        self.edge_logits = self.draw(9, 2, 4, *GRID).to(dtype)

    def rounded_boxes(self) -> list[list[float]]:
        return [[round(value, 1) for value in box] for box in self.targets.boxes_xyxy.tolist()]

    @staticmethod
    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def assign(self, image: Tensor, instance: Tensor) -> Assignment:
        keep = torch.arange(len(instance)) % 2 == 0  # fewer positives than masks: any will do here
        image, instance = image[keep], instance[keep]
        place = torch.arange(len(image)) % R
        distances = self.draw(5, len(image), 4).abs() + 0.5
        ignored = torch.zeros(2, R, dtype=torch.bool)
        return Assignment(image, place, instance, distances, torch.linspace(0.2, 0.9, len(image)), ignored)

    def predict(self, dtype: torch.dtype) -> DenseOutputs:
        def leaf(seed: int, *shape: int) -> Tensor:
            return self.draw(seed, *shape).abs().to(dtype).requires_grad_()

        places = Locations(torch.zeros(R, 2), torch.ones(R), torch.zeros(R, dtype=torch.int64), counts=(R,))
        return DenseOutputs(leaf(1, 2, R, C), leaf(2, 2, R, 4), leaf(3, 2, R), locations=places)

    def prepare(self, goal: Objective) -> tuple[MaskTargets, Tensor]:
        prepared = prepare(self.batch, goal)
        of_detector = detection_counts(self.assignment, prepared.box_only)
        counts = torch.stack([of_detector[name].double() for name in COUNTS])
        return prepared, torch.cat([counts, term_counts(self.targets, prepared, self.quotas)])

    def losses(
        self, goal: Objective, *, counts: Tensor | None = None, warmup: float = 1.0, processes: int = 1
    ) -> LossTerms:
        prepared, own = self.prepare(goal)
        values = (own if counts is None else counts).unbind()
        count = dict(zip(COUNTS + goal.count_names, values, strict=True))
        masks = mask_losses(
            self.mask_logits,
            prepared,
            count,
            warmup=warmup,
            processes=processes,
            learned=LearnedEdges(self.edge_logits, torch.tensor(TRUST)) if goal.affinity == "learned" else None,
        )
        losses = mean_detection_losses(self.outputs, self.assignment, self.targets, count, processes=processes)
        return masks.with_detection(losses)


def mask_total(terms: LossTerms) -> Tensor:
    return torch.stack(
        [terms.weighted[name] for name in (*MASK_LOSSES, "pairwise_learned", *CROP_LOSSES) if name in terms.weighted]
    ).sum()


def of_all_neighbours(labels: Tensor, size: int, dilation: int) -> Tensor:
    """Labels (B, K / 2, h, w) of edges at one end -> (B, K, h, w) of every cell and neighbour, 0 beyond the grid."""
    height, width = labels.shape[-2:]
    offsets = neighbour_offsets(size, dilation)
    result = labels.new_zeros(len(labels), len(offsets), height, width)
    for k, (down, right) in enumerate(offsets):
        for row in range(height):
            for column in range(width):
                if 0 <= row + down < height and 0 <= column + right < width:
                    first = k < len(offsets) // 2
                    place = (row, column) if first else (row + down, column + right)
                    result[:, k, row, column] = labels[:, k if first else len(offsets) - 1 - k, *place]
    return result


def slow_mask_loss(step: Step, goal: Objective, warmup: float) -> Tensor:
    """METHOD section 2, Mixing, one sampled positive after the other."""
    targets, batch = step.targets, step.batch
    masks = dict(zip(targets.mask_instance.tolist(), targets.masks.double(), strict=True))
    weights = dict(zip(targets.mask_instance.tolist(), targets.mask_weight.tolist(), strict=True))
    known_cells = torch.ones_like(targets.masks) if targets.mask_known is None else targets.mask_known
    known_of = dict(zip(targets.mask_instance.tolist(), known_cells, strict=True))
    around_cell = torch.tensor([-STRIDE, -STRIDE, STRIDE, STRIDE])
    similar = [
        plain.similarity(
            batch.images[b],
            tuple(batch.image_sizes_hw[b].tolist()),
            bottom=int(batch.bottom_rows_without_affinity[b]),
            stride=STRIDE,
            size=3,
            dilation=2,
        )
        for b in range(2)
    ]
    per_mask, labelled, labelled_count = torch.zeros(()).double(), torch.zeros(()).double(), 0
    all_masks, edge_masks, mask_masks = 0, 0, 0
    pairs, pair_count, learned, learned_count = torch.zeros(()).double(), 0, torch.zeros(()).double(), 0
    trust = TRUST if goal.affinity == "learned" else 0.0
    alone = of_all_neighbours(affinity_of(batch).of_one_box.float(), 3, 2).bool()
    labels = of_all_neighbours(step.edge_logits.sigmoid(), 3, 2)
    for q, n in enumerate(step.mask_logits.instance_index.tolist()):
        logits, of_image = step.logits[q : q + 1], similar[int(targets.image_index[n])][None]
        box = plain.box_mask(targets.boxes_xyxy[n], GRID, STRIDE).double()[None]
        edges_of_box = False
        if n in masks and not masks[n].any():
            continue
        if targets.supervision[n] == PSEUDO:
            assert goal.pseudo is not None
            known = known_of[n]
            scores, mask = logits.sigmoid()[:, known], masks[n][known][None]
            if goal.pseudo == "bce":
                around = (plain.box_mask(targets.boxes_xyxy[n] + around_cell, GRID, STRIDE).bool() & known)[None]
                each = F.binary_cross_entropy_with_logits(logits, masks[n][None], reduction="none")
                per_mask = per_mask + weights[n] * each[around].mean()
            else:
                per_mask = per_mask + weights[n] * plain.dice(scores[..., None], mask[..., None]).sum()
            if "projection" in goal.pseudo:
                per_mask = per_mask + plain.projection(logits, box).sum()
            edges_of_box = "pairwise" in goal.pseudo
        elif n in masks:
            mask_masks += 1
            if goal.mask == "dice":
                per_mask = per_mask + plain.dice(logits.sigmoid(), masks[n][None]).sum()
            elif goal.mask == "crop_bce":
                around = plain.box_mask(targets.boxes_xyxy[n] + around_cell, GRID, STRIDE).bool()
                each = F.binary_cross_entropy_with_logits(logits[0], masks[n], reduction="none")
                width, height = (targets.boxes_xyxy[n, 2:] - targets.boxes_xyxy[n, :2]).double() / STRIDE
                total = each[around].sum() + 100 * masks[n][~around].sum()
                per_mask = per_mask + 6.125 * total / (width * height).clamp(min=1)
            else:
                mask, inside = masks[n][None], of_image > 0
                per_mask = per_mask + plain.projection(logits, mask).sum()
                total, number = plain.pairwise_sums(logits, box, inside, size=3, dilation=2, labels=mask)
                labelled, labelled_count = labelled + total.sum(), labelled_count + int(number)
        else:
            if not box.any() or goal.box == "none":
                continue
            edge_masks += 1
            if goal.box == "box_as_mask":
                per_mask = per_mask + plain.dice(logits.sigmoid(), box).sum()
            else:
                per_mask = per_mask + plain.projection(logits, box).sum()
        all_masks += 1
        edge_masks += edges_of_box
        box_only = n not in masks
        if edges_of_box or (box_only and goal.box in ("projection+pairwise", "projection+learned")):
            own = alone[int(targets.image_index[n])][None]
            for where, factor in ((own, 1 - trust), (~own, 1.0)):
                total, number = plain.pairwise_sums(logits, box, (of_image >= 0.3) & where, size=3, dilation=2)
                pairs, pair_count = pairs + factor * total.sum(), pair_count + int(number)
        if goal.box == "projection+learned" and (edges_of_box or box_only):
            edges = alone[int(targets.image_index[n])] & box[0].bool()
            same = plain.edge_losses(logits, size=3, dilation=2)[0][edges]
            y = labels[int(targets.image_index[n])][edges]
            each = (1 - y) * same - y * torch.log1p(-torch.exp(-same))
            learned, learned_count = learned + each.sum(), learned_count + len(each)
    pairwise = pairs / max(pair_count, 1) + 2 * trust * learned / max(learned_count, 1)
    loss = per_mask / max(all_masks, 1) + edge_masks / max(all_masks, 1) * warmup * pairwise
    return loss + mask_masks / max(all_masks, 1) * warmup * labelled / max(labelled_count, 1)


def test_the_table_is_complete() -> None:
    expected = {(BOX, name) for name in get_args(BoxObjective)}
    expected |= {(MASK, name) for name in get_args(MaskObjective)}
    expected |= {(PSEUDO, name) for name in get_args(PseudoObjective)}
    assert set(TERMS) == expected
    assert {name for terms in TERMS.values() for name in terms} == {
        *MASK_LOSSES,
        "pairwise_learned",
        *CROP_LOSSES,
        "rays",
    }


@pytest.mark.parametrize("mask", ["dice", "labelled", "crop_bce"])  # the others have plain loops in tests of their own
@pytest.mark.parametrize("box", [name for name in get_args(BoxObjective) if not name.startswith("mil")])
def test_a_mixed_batch_equals_the_formula_in_a_plain_loop(mask: MaskObjective, box: BoxObjective) -> None:
    check_against_the_loop(make_batch([PSEUDO, *MIXED[1:]]), objective(mask, box, pseudo="dice"))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("pseudo", get_args(PseudoObjective))
@pytest.mark.parametrize("box", ["none", "projection+pairwise", "projection+learned"])
def test_pseudo_masks_equal_the_formula(box: BoxObjective, pseudo: PseudoObjective, known: bool) -> None:
    batch = make_batch([PSEUDO, BOX, PSEUDO, BOX, PSEUDO, MASK, MASK])
    assert batch.targets is not None
    if known:
        cells = torch.rand(len(batch.targets.masks), *GRID, generator=torch.Generator().manual_seed(4)) < 0.7
        cells |= (batch.targets.mask_weight == 1)[:, None, None]
        batch = replace(batch, targets=replace(batch.targets, mask_known=cells))
    check_against_the_loop(batch, objective("dice", box, pseudo=pseudo))


def test_cells_that_are_not_known_count_for_nobody() -> None:
    batch = make_batch([PSEUDO] * 7)
    assert batch.targets is not None
    known = torch.rand(7, *GRID, generator=torch.Generator().manual_seed(4)) < 0.7
    flipped = torch.where(known, batch.targets.masks, ~batch.targets.masks)
    for pseudo in ("dice", "bce"):
        goal, found = objective("dice", "none", pseudo=pseudo), []
        for masks in (batch.targets.masks, flipped):
            step = Step(replace(batch, targets=replace(batch.targets, masks=masks, mask_known=known)))
            total = step.losses(goal).weighted[pseudo]
            (gradient,) = torch.autograd.grad(total, step.logits, retain_graph=True)
            unknown = ~known[step.mask_logits.instance_index]
            used = (batch.targets.masks & known)[step.mask_logits.instance_index].any(2).any(1)
            assert not gradient[unknown].any()
            assert gradient[used].any()
            found.append(total.detach())
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def check_against_the_loop(batch: Batch, goal: Objective) -> None:
    step = Step(batch)
    terms = step.losses(goal, warmup=0.4)
    expected = slow_mask_loss(step, goal, 0.4)
    torch.testing.assert_close(mask_total(terms), expected, rtol=1e-9, atol=0)
    (mine,) = torch.autograd.grad(mask_total(terms), step.logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, step.logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    assert tuple(terms.weighted) == tuple(terms.unweighted) == LOSSES + goal.loss_names
    torch.testing.assert_close(terms.total, sum(terms.weighted.values()), rtol=1e-12, atol=0)


def test_a_batch_of_masks_alone_is_the_mean_dice() -> None:
    step = Step(make_batch([MASK] * 7))
    used = [q for q, n in enumerate(step.mask_logits.instance_index.tolist()) if step.targets.masks[n].any()]
    assert 0 < len(used) < len(step.logits)
    masks = step.targets.masks[step.mask_logits.instance_index].double()
    expected = plain.dice(step.logits[used].sigmoid(), masks[used]).mean()
    terms = step.losses(objective())
    torch.testing.assert_close(mask_total(terms), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.unweighted["dice"], expected, rtol=1e-10, atol=0)


def test_a_batch_of_boxes_alone_is_boxinst() -> None:
    step = Step(make_batch([BOX] * 7))
    terms = step.losses(objective(), warmup=0.3)
    torch.testing.assert_close(
        mask_total(terms), terms.unweighted["projection"] + 0.3 * terms.unweighted["pairwise"], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(mask_total(terms), slow_mask_loss(step, objective(), 0.3), rtol=1e-9, atol=0)


def test_counts() -> None:
    step = Step(make_batch(MIXED))
    prepared, counts = step.prepare(objective())
    # Number 3 has no cell, number 6 no mask cell; quotas 2 1 3 . 1 2 . of which 0 and 5 have masks.
    assert prepared.used.tolist() == [True, True, True, False, True, True, False]
    count = dict(zip(COUNT_NAMES, counts.tolist(), strict=True))
    assert (count["masks"], count["box_masks"], count["mask_masks"]) == (9, 5, 4)
    assert (count["dice"], count["projection"], count["pairwise_labelled"]) == (4, 5, 0)
    assert count["positives"] == 6
    assert count["box_positives"] == sum(MIXED[n] == BOX for n in step.assignment.instance_index.tolist())
    assert count["centreness"] == pytest.approx(step.assignment.centreness.sum().item())
    boxes = [plain.box_mask(box, GRID, STRIDE).bool() for box in step.targets.boxes_xyxy]
    quotas = step.quotas.tolist()
    expected = sum(
        quotas[n] * int((prepared.edges["pairwise"][int(step.targets.image_index[n])] & boxes[n]).sum())
        for n in range(7)
        if MIXED[n] == BOX
    )
    assert count["pairwise"] == expected > 50
    assert 0.1 < prepared.edges["pairwise"].float().mean() < 0.6
    assert counts.dtype == torch.float64


def test_no_pairwise_objective_means_no_affinity() -> None:
    batch = make_batch(MIXED)
    assert set(prepare(batch, objective()).edges) == {"pairwise"}
    assert set(prepare(batch, objective("labelled")).edges) == {"pairwise", "pairwise_labelled"}
    for box in ("none", "projection", "box_as_mask"):
        assert not prepare(batch, objective(box=box)).edges
    assert not prepare(make_batch([MASK] * 7), objective()).edges
    assert not prepare(make_batch([BOX] * 7), objective("labelled", "none")).edges


@pytest.mark.parametrize("mask", get_args(MaskObjective))
def test_halves_with_the_global_counts_sum_to_the_whole(mask: MaskObjective) -> None:
    goal = objective(mask)
    first, second = [0, 1, 2, 3], [4, 5, 6]  # by image; each half keeps both images, so that both see the same
    whole = Step(make_batch(MIXED))
    halves = [Step(make_batch([MIXED[n] for n in part], part)) for part in (first, second)]
    counts = torch.stack([half.prepare(goal)[1] for half in halves]).sum(0)
    expected = whole.losses(goal, warmup=0.7)
    parts = [half.losses(goal, counts=counts, warmup=0.7) for half in halves]
    shared = [half.losses(goal, counts=counts, warmup=0.7, processes=2) for half in halves]
    own_counts = whole.prepare(goal)[1]
    masks_counted = [
        COUNT_NAMES.index(name) for name in COUNT_NAMES if "positives" not in name and name != "centreness"
    ]
    assert counts[masks_counted].tolist() == own_counts[masks_counted].tolist()
    for name in MASK_LOSSES:
        for kind in ("weighted", "unweighted"):
            value = getattr(expected, kind)[name]
            summed = sum(getattr(part, kind)[name] for part in parts)
            averaged = sum(getattr(part, kind)[name] for part in shared) / 2
            torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(averaged, value, rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad(mask_total(expected), whole.logits)
    by_parts = [torch.autograd.grad(mask_total(p), h.logits)[0] for p, h in zip(parts, halves, strict=True)]
    torch.testing.assert_close(torch.cat(by_parts), gradient, rtol=1e-12, atol=1e-15)


def test_detection_denominators() -> None:
    step = Step(make_batch(MIXED))
    _, counts = step.prepare(objective())
    alone = step.losses(objective())
    tripled = step.losses(objective(), counts=3 * counts, processes=3)  # three processes that saw the same
    for name in LOSSES:
        assert alone.weighted[name] == alone.unweighted[name]
        torch.testing.assert_close(tripled.weighted[name], alone.weighted[name], rtol=1e-12, atol=0)
    nothing = step.losses(objective(), counts=torch.zeros_like(counts), processes=4)  # at least 1, at least 1e-6
    positives, centreness = counts[0], counts[COUNT_NAMES.index("centreness")]
    torch.testing.assert_close(nothing.weighted["centreness"], alone.weighted["centreness"] * positives)
    torch.testing.assert_close(nothing.weighted["box"], alone.weighted["box"] * centreness / 1e-6)


@pytest.mark.parametrize(("supervision", "instances"), [([], []), ([BOX], [3]), ([MASK], [6]), ([BOX, MASK], [3, 6])])
@pytest.mark.parametrize("mask", get_args(MaskObjective))
def test_nothing_to_learn_a_mask_from(
    supervision: list[Supervision], instances: list[int], mask: MaskObjective
) -> None:
    step = Step(make_batch(supervision, instances))
    terms = step.losses(objective(mask))
    for name in MASK_LOSSES:
        assert terms.weighted[name].item() == terms.unweighted[name].item() == 0
    terms.total.backward()
    assert step.logits.grad is not None
    assert torch.equal(step.logits.grad, torch.zeros_like(step.logits))
    assert torch.isfinite(terms.total)
    assert step.outputs.box_distances.grad is not None


def test_no_objective_for_boxes_leaves_their_masks_alone() -> None:
    step = Step(make_batch(MIXED))
    step.losses(objective(box="none")).total.backward()
    assert step.logits.grad is not None
    kinds = [MIXED[n] for n in step.mask_logits.instance_index.tolist()]
    for gradient, kind, n in zip(step.logits.grad, kinds, step.mask_logits.instance_index.tolist(), strict=True):
        assert bool(gradient.any()) == (kind == MASK and n != 6)


def test_half_precision_predictions_give_float32_losses() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        step = Step(make_batch(MIXED), dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = step.losses(objective())
        assert {value.dtype for value in terms.weighted.values()} == {torch.float32}
        terms.total.backward()
        assert step.logits.grad is not None
        assert step.logits.grad.dtype == dtype
        single = Step(make_batch(MIXED), dtype=dtype)
        single.logits = single.logits.detach().float().requires_grad_()
        single.mask_logits = replace(single.mask_logits, logits=single.logits)
        torch.testing.assert_close(mask_total(terms), mask_total(single.losses(objective())), rtol=1e-6, atol=0)


def test_wrong_shapes_are_refused() -> None:
    step = Step(make_batch(MIXED))
    with pytest.raises(ValueError, match="the cells of their grid"):
        replace(step.mask_logits, logits=step.logits[:, :-1])
    lower = WholeMap(STRIDE, (GRID[0] - 1, GRID[1]))
    for logits, grid in ((step.logits[:, :-1], lower), (step.logits, WholeMap(2 * STRIDE, GRID))):
        step.mask_logits = replace(step.mask_logits, logits=logits, grid=grid)
        with pytest.raises(ValueError, match=f"grid WholeMap.*{grid.stride}.* is not that of the masks"):
            step.losses(objective())
        with pytest.raises(ValueError, match="the masks have stride and size"):
            instance_terms(step.targets, grid, objective=objective())
