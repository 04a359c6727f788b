"""The level set loss beside its definition in plain loops, its limits, and its part in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from semiseg.config import RunConfig
from semiseg.errors import UserError
from semiseg.losses.level_set import level_set_loss
from tests.distributed_worker import LEARNED
from tests.test_losses_boxinst import CELLS, IMAGE_INDEX, random_logits
from tests.test_train import first_batches, fresh_step, losses_and_gradients, same_in_two_parts, without_instances
from tests.tiny import COUNT_NAMES, LOSS_NAMES, tiny_config


def colours() -> Tensor:
    shape = (2, 3, *random_logits().shape[1:])
    return 50 + 20 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plainly(logits: Tensor, cells: list[int], lab: Tensor) -> Tensor:
    row0, row1, column0, column1 = cells
    p, box = logits[row0:row1, column0:column1].sigmoid(), lab[:, row0:row1, column0:column1]
    sides = [(weight, (weight * box).sum((1, 2)) / weight.sum()) for weight in (p, 1 - p)]
    apart = [(weight * (box - mean[:, None, None]).square().sum(0)).sum() for weight, mean in sides]
    whole = (box - box.mean((1, 2), keepdim=True)).square().sum()
    return torch.stack(apart).sum() / whole


def test_it_is_the_share_of_the_colours_that_two_means_leave() -> None:
    logits, lab = random_logits().requires_grad_(), colours()
    each = level_set_loss(logits, CELLS, lab, IMAGE_INDEX)
    several = [
        q for q, (row0, row1, column0, column1) in enumerate(CELLS.tolist()) if row1 - row0 + column1 - column0 > 2
    ]
    assert 2 < len(several) < len(CELLS), "one of the boxes is empty"
    expected = torch.stack([plainly(logits[q], CELLS[q].tolist(), lab[IMAGE_INDEX[q]]) for q in several])
    torch.testing.assert_close(each[several], expected, rtol=1e-9, atol=0)
    (mine,) = torch.autograd.grad(each.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-11)
    assert gradcheck(lambda logits: level_set_loss(logits, CELLS, lab, IMAGE_INDEX), (logits,))


def test_limits() -> None:
    cells, one = torch.tensor([[1, 7, 2, 8], [3, 3, 3, 3]]), torch.zeros(2, dtype=torch.int64)
    mask = torch.zeros(2, 9, 10, dtype=torch.bool)
    mask[:, 2:5, 3:7] = True
    lab = torch.where(mask[:1, None], torch.tensor([70.0, 20.0, -5.0]).view(1, 3, 1, 1), 40.0)
    sure = torch.where(mask, 50.0, -50.0).requires_grad_()
    right, empty = level_set_loss(sure, cells, lab, one)
    assert right.item() == pytest.approx(0, abs=1e-5), "two colours, of which the mask has one"
    assert empty.item() == 1
    assert level_set_loss(-sure, cells, lab, one)[0].item() == pytest.approx(0, abs=1e-5), "which side is the mask's?"
    for filled in (torch.full_like(sure, 50.0), torch.full_like(sure, -50.0)):
        assert level_set_loss(filled, cells, lab, one)[0].item() == pytest.approx(1, abs=1e-5)
    assert level_set_loss(sure, cells, torch.full_like(lab, 40.0), one)[0].item() == pytest.approx(1, abs=1e-5)
    right.backward()
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


@pytest.mark.parametrize("value", [-40.0, -12.0, 12.0, 40.0])
@pytest.mark.parametrize("side", [37, 99, 127])
def test_a_mask_that_is_its_box_or_nothing_explains_nothing_whatever_rounding_leaves(side: int, value: float) -> None:
    cells, one = torch.tensor([[0, side, 0, side]]), torch.zeros(1, dtype=torch.int64)
    for colour in (33.3, 71.7, 91.3):  # of which float32 sums are off
        logits = torch.full((1, side, side), value, requires_grad=True)
        loss = level_set_loss(logits, cells, torch.full((1, 3, side, side), colour), one)
        assert loss.item() == pytest.approx(1, abs=1e-5)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = random_logits(scale=1e4, dtype=dtype).requires_grad_()
    each = level_set_loss(logits, CELLS, colours().float(), IMAGE_INDEX)
    assert each.dtype == torch.float32
    each.sum().backward()
    assert torch.isfinite(each).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def config_of(root: Path, weight: float, **optim: int) -> RunConfig:
    return tiny_config(root, objective={"level_set": weight}, optim=optim)


def test_in_a_step_it_is_weighted_by_box_only_masks(root: Path) -> None:
    batch = first_batches(config_of(root, 0.1), 1)[0]
    without, module = fresh_step(config_of(root, 0.0)), fresh_step(config_of(root, 0.1))
    assert without.loss_names == LOSS_NAMES
    plan = module.plan(batch)
    assert plan.counts[: len(COUNT_NAMES)].tolist() == without.plan(batch).counts.tolist()
    terms = module(batch, plan, plan.counts, warmup=0.5, processes=1)
    box_masks, masks = (plan.counts[COUNT_NAMES.index(name)] for name in ("box_masks", "masks"))
    expected = 0.1 * 0.5 * box_masks / masks * terms.unweighted["level_set"]
    torch.testing.assert_close(terms.weighted["level_set"], expected.float(), rtol=1e-5, atol=0)
    at_first = float(terms.unweighted["level_set"].detach())
    assert at_first == pytest.approx(1, abs=1e-3), "a mask that is the same everywhere explains nothing"
    losses, _ = losses_and_gradients(without, [batch])
    terms = module(batch, plan, plan.counts, warmup=0.7, processes=1)
    assert [float(terms.weighted[name].detach()) for name in LOSS_NAMES] == losses.tolist()


@pytest.mark.parametrize("box", ["none", "box_as_mask"])
def test_without_the_projection_loss_it_is_refused(root: Path, box: str) -> None:
    with pytest.raises(UserError, match=f"level_set is added to the projection loss, which box = '{box}' has not"):
        tiny_config(root, objective={"box": box, "level_set": 0.1})


@pytest.mark.parametrize("objective", [{}, LEARNED])
def test_parts_of_a_batch_make_the_same_step(root: Path, objective: dict[str, str]) -> None:
    whole, halves = (
        tiny_config(root, objective={**objective, "level_set": 0.1}, optim={"accumulation": parts}) for parts in (1, 2)
    )
    same_in_two_parts(fresh_step(whole), whole, halves)


def test_images_without_instances(root: Path) -> None:
    config = config_of(root, 0.1)
    losses, gradient = losses_and_gradients(
        fresh_step(config), [without_instances(first_batches(config, 1)[0], [0, 1, 2, 3])]
    )
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
