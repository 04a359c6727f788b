"""YOLACT's loss of masks beside the released implementation's numbers, plain loops and known values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.errors import UserError
from semiseg.losses.crops import crop_loss
from semiseg.losses.terms import (
    LossTerms,
    MaskTargets,
    Objective,
    instance_terms,
    mask_crops,
    mask_losses,
    term_counts,
)
from semiseg.structures.grids import Regions
from semiseg.structures.inputs import Targets
from semiseg.structures.masks import MASK_BITS, EncodedMasks
from semiseg.structures.outputs import MaskLogits
from tests.test_poison import everything, make_data
from tests.test_train import first_batches, fresh_step, learned, same_in_two_parts
from tests.test_yolact import assigned, close, draw, golden_numbers, golden_targets
from tests.tiny import DETECTORS, model_of, tiny_config


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers()


@pytest.fixture(scope="module")
def targets(golden: dict[str, np.ndarray]) -> Targets:
    return golden_targets(golden)


def encoded(masks: Tensor) -> EncodedMasks:
    """Masks (M, h, w) bool on the raster of the input."""
    count, height, width = masks.shape
    columns = F.pad(masks.transpose(1, 2).reshape(count, -1), (1, 1)).int()
    mask, place = torch.nonzero(columns.diff(dim=1), as_tuple=True)
    size = torch.tensor([[height, width]]).expand(count, 2)
    return EncodedMasks((mask << MASK_BITS) + place, size, size, torch.zeros(count, dtype=torch.bool))


def mask_terms(targets: Targets, instance: Tensor, logits: Tensor) -> LossTerms:
    """Of masks (Q, 40, 40) of instances (Q,), as a step has them."""
    goal = Objective(mask="crop_bce", box="none", affinity_threshold=0.3, affinity_size=3, affinity_dilation=2)
    targets = replace(targets, masks=targets.masks[:, :0, :0], encoded=encoded(targets.masks), mask_stride=None)
    whole = torch.tensor([[0.0, 0.0, 160.0, 160.0]])
    grid = Regions(whole.expand(targets.num_instances, 4), (40, 40), whole_image=True)
    own = instance_terms(targets, grid, objective=goal)
    masks, crops = targets.masks_on(grid), mask_crops(targets, own)
    prepared = MaskTargets(**vars(own), objective=goal, masks=masks, edges={}, crops=crops)
    counts = term_counts(targets, prepared, torch.bincount(instance, minlength=targets.num_instances))
    count = dict(zip(goal.count_names, counts, strict=True))
    mask_logits = MaskLogits(logits, targets.image_index[instance], instance, grid.of(instance))
    return mask_losses(mask_logits, prepared, count, warmup=1.0, processes=1)


def test_the_mask_loss_of_a_step_is_the_releaseds(golden: dict[str, np.ndarray], targets: Targets) -> None:
    found, count = assigned(targets), len(golden["conf_t"][0])
    place = (found.image_index, found.anchor_index)
    weights = draw("mask", 2, count, 32).tanh().requires_grad_()
    prototypes = draw("proto", 2, 40, 40, 32).relu().requires_grad_()
    logits = torch.einsum("qhwk,qk->qhw", prototypes[found.image_index], weights[place])
    terms = mask_terms(targets, found.instance_index, logits)
    terms.total.backward()
    close(terms.weighted["crop_bce"], golden["loss_M"])
    assert weights.grad is not None
    assert prototypes.grad is not None
    close(weights.grad[place], golden["grad_M_mask_positives"])
    close(weights.grad.norm(), golden["grad_M_mask_norm"])
    every = prototypes.grad.numel() // 2048
    close(prototypes.grad.flatten()[::every][:512], golden["grad_M_proto_sub"])
    close(prototypes.grad.norm(), golden["grad_M_proto_norm"])


@pytest.mark.parametrize("boxes", ["in", "out"])
def test_masks_in_and_beyond_their_crops_cost_what_the_releaseds_do(
    golden: dict[str, np.ndarray], targets: Targets, boxes: str
) -> None:
    own = targets.boxes_xyxy.clone()
    if boxes == "out":
        own[:4] = torch.from_numpy(golden["lincomb_out_boxes_rel"]) * 160
    prototypes = draw("proto", 2, 40, 40, 32)[0].relu().requires_grad_()
    weights = draw("mask", 2, len(golden["conf_t"][0]), 32)[0, :4].tanh().requires_grad_()
    logits = torch.einsum("hwk,qk->qhw", prototypes, weights)
    terms = mask_terms(replace(targets, boxes_xyxy=own), torch.arange(4), logits)
    (terms.total * 4).backward()
    close(4 * terms.total, golden[f"lincomb_{boxes}_loss"])
    assert weights.grad is not None
    close(weights.grad, golden[f"lincomb_{boxes}_grad_coeff"])
    if boxes == "in":
        assert prototypes.grad is not None
        close(prototypes.grad.flatten()[:: prototypes.grad.numel() // 2048][:512], golden["lincomb_in_grad_proto_sub"])
        each = [float(mask_terms(targets, torch.tensor([n]), logits[n : n + 1]).total.detach()) for n in range(4)]
        close(torch.tensor(each), golden["lincomb_in_loss_each"])


def test_the_loss_of_a_crop_is_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.rand(4, 5, 7, generator=generator) > 0.5
    masks[3] = False
    cells = torch.tensor([[1, 4, 2, 6], [-1, 6, -1, 8], [2, 3, 0, 1], [0, 2, 0, 2]])
    area = torch.tensor([3.5, 35.0, 1.0, 1.0], dtype=torch.float64)
    found = crop_loss(logits, masks, cells, area)
    for q, (row0, row1, column0, column1) in enumerate(cells.tolist()):
        total = 0.0
        for i in range(5):
            for j in range(7):
                if row0 <= i < row1 and column0 <= j < column1:
                    p = 1 / (1 + math.exp(-float(logits[q, i, j])))
                    total -= math.log(p if masks[q, i, j] else 1 - p)
                elif masks[q, i, j]:
                    total += 100
        assert float(found[q]) == pytest.approx(total / float(area[q]), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: crop_loss(x, masks, cells, area), logits.requires_grad_())
    assert crop_loss(logits[:0], masks[:0], cells[:0], area[:0]).shape == (0,)


def test_known_values_of_the_loss_of_a_crop() -> None:
    """A box of 2 x 2 cells, its crop of 4 x 4: without an opinion 16 times ln 2, a mask that is right nothing."""
    masks = torch.zeros(1, 6, 6, dtype=torch.bool)
    masks[0, 2:4, 2:4] = True
    cells, area = torch.tensor([[1, 5, 1, 5]]), torch.tensor([4.0])
    assert float(crop_loss(torch.zeros(1, 6, 6), masks, cells, area)) == pytest.approx(4 * math.log(2))
    right = torch.where(masks, 50.0, -50.0)
    assert float(crop_loss(right, masks, cells, area)) < 1e-20
    masks[0, 0, 0] = True
    assert float(crop_loss(right, masks, cells, area)) == pytest.approx(25)


@pytest.mark.parametrize("head", ["dynamic", "prototypes", "rays", "yolact"])
def test_the_loss_of_crops_teaches_every_head_of_whole_maps(tmp_path: Path, head: str) -> None:
    whole, halves = (
        tiny_config(tmp_path, model=model_of(head), objective={"mask": "crop_bce"}, optim={"accumulation": parts})
        for parts in (1, 2)
    )
    same_in_two_parts(fresh_step(whole), whole, halves)
    step = fresh_step(whole)
    (batch,) = first_batches(whole, 1)
    plan = step.plan(batch)
    terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
    count = dict(zip(step.count_names, plan.counts.tolist(), strict=True))
    assert 0 < count["crop_bce"] == count["mask_masks"] < count["masks"]
    expected = 6.125 * terms.unweighted["crop_bce"].detach() * count["crop_bce"] / count["masks"]
    torch.testing.assert_close(terms.weighted["crop_bce"].detach(), expected, rtol=1e-6, atol=0)
    totals = [each["crop_bce"] for each in learned(step, batch)]
    assert totals[-1] < 0.95 * totals[0]


def test_withheld_masks_change_nothing_in_crops(tmp_path: Path) -> None:
    own = {"model": DETECTORS["yolact"], "objective": {"mask": "crop_bce"}}
    changed = {name: getattr(tiny_config(tmp_path, **own), name) for name in own}
    runs = [make_data(tmp_path / str(poisoned), poisoned=poisoned) for poisoned in (False, True)]
    clean, poisoned = (everything(run.model_copy(update=changed)) for run in runs)
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])


def test_masks_of_regions_have_no_crops() -> None:
    for model in (model_of("regions"), DETECTORS["mask_rcnn"]):
        with pytest.raises(UserError, match=r"'crop_bce' cuts masks of whole images to their boxes: .* not 'regions'"):
            tiny_config(Path(), model=model, objective={"mask": "crop_bce"})
