"""PolarMask's own training: its loss and centreness, how far masks reach, and the step that learns it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from semiseg.config import RunConfig
from semiseg.config.model import FCOSDetector
from semiseg.config.read import digest
from semiseg.data.rays import (
    NO_RAY,
    RayRule,
    contour_centre,
    contour_rays,
    largest_contour,
    marched_rays,
    mass_centre,
    ray_targets,
)
from semiseg.engine import train as training
from semiseg.engine.build import build_data
from semiseg.engine.detection import fcos_assignment
from semiseg.engine.logs import read_log
from semiseg.engine.rays import positives_of
from semiseg.engine.replay import replay_step
from semiseg.engine.step import TrainStep
from semiseg.errors import UserError
from semiseg.losses.rays import polar_centreness, polar_iou_loss
from semiseg.structures.inputs import Batch, Supervision
from tests.test_heads import SUPERVISION, same_after_a_cut
from tests.test_host_syncs import MIXED, fake_step, make_batch, plan_of
from tests.test_poison import everything, make_data, with_source
from tests.test_train import first_batches, fresh_step, losses_and_gradients, same_in_two_parts, without_instances
from tests.tiny import HEADS, TINY, tiny_config

RULES = ["mask", "contour"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def config_of(root: Path, supervision: str = "mixed", targets: str = "mask", **sections: Any) -> RunConfig:
    chosen = SUPERVISION[supervision]
    objective = {**chosen.get("objective", {}), "mask": "rays"}
    model = {"mask_head": {**HEADS["rays"], "targets": targets}}
    return tiny_config(root, **{**chosen, "objective": objective, "model": model, **sections})


# The loss and the centreness ------------------------------------------------------------------------------------------


def exact_square(half: float, count: int = 36) -> Tensor:
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return half / torch.maximum(angle.cos().abs(), angle.sin().abs())


def test_known_losses() -> None:
    target = torch.rand(3, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    half = torch.where(torch.arange(36) < 18, 2.0, 1.0)
    even = torch.full((1, 36), 7.0)
    assert polar_iou_loss(1.1 * target, target).tolist() == pytest.approx([0.095310] * 3, abs=1e-6)
    assert polar_iou_loss(target / 1.1, target).tolist() == pytest.approx([0.095310] * 3, abs=1e-6)
    assert float(polar_iou_loss(half * even, even)) == pytest.approx(0.405465, abs=1e-6)
    assert polar_iou_loss(target, target).tolist() == [0, 0, 0]
    assert polar_iou_loss(even.half(), even).dtype == torch.float32
    assert polar_iou_loss(torch.zeros(0, 36), torch.zeros(0, 36)).shape == (0,)


def test_the_loss_and_its_gradient_beside_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    predicted, target = (torch.rand(4, 9, dtype=torch.float64, generator=generator) * 5 + 0.1 for _ in range(2))
    for row, loss in enumerate(polar_iou_loss(predicted, target).tolist()):
        pairs = list(zip(predicted[row].tolist(), target[row].tolist(), strict=True))
        assert loss == pytest.approx(math.log(sum(map(max, pairs)) / sum(map(min, pairs))))
    assert gradcheck(lambda x: polar_iou_loss(x, target), predicted.requires_grad_())


def test_the_centreness_of_a_square() -> None:
    square = exact_square(10)
    assert float(square.sum()) == pytest.approx(403.1770, abs=1e-4)
    assert float(polar_centreness(square[None])) == pytest.approx(math.sqrt(10 / 13.0541), abs=1e-5)
    assert float(polar_centreness(square[None])) == pytest.approx(0.875240, abs=1e-6)
    assert polar_centreness(torch.full((2, 5), 3.0)).tolist() == [1, 1]


# How far masks reach --------------------------------------------------------------------------------------------------


def square_mask(half: int, side: int) -> np.ndarray:
    """The pixels at most `half` away from the middle, along each axis."""
    away = abs(np.arange(side) - side // 2)
    return np.asarray(np.maximum(away[:, None], away) <= half)


def disc_mask(radius: float, side: int) -> np.ndarray:
    away = np.arange(side) - side // 2
    return np.asarray(np.hypot(away[:, None], away) <= radius)


def test_marched_rays_of_a_square() -> None:
    fine = 40  # pixels a unit
    rays = marched_rays(square_mask(10 * fine, 900), np.array([[450.0, 450.0]]), 36)[0] / fine
    assert rays[[0, 1, 4]].tolist() == pytest.approx([10, 10.1543, 13.0541], abs=0.02)
    assert float(rays.sum()) == pytest.approx(403.1770, abs=0.5)
    assert float(polar_centreness(torch.tensor(rays[None]))) == pytest.approx(0.875240, abs=1e-3)


@pytest.mark.parametrize(("count", "share"), [(18, 0.979816), (36, 0.994931), (72, 0.998731), (120, 0.999543)])
def test_marched_rays_of_a_disc_are_a_polygon(count: int, share: float) -> None:
    rays = marched_rays(disc_mask(400, 900), np.array([[450.0, 450.0]]), count)[0].astype(np.float64)
    area = (rays * np.roll(rays, -1)).sum() * math.sin(2 * math.pi / count) / 2
    assert area / (math.pi * 400**2) == pytest.approx(share, abs=2e-3)


def test_marched_rays_beside_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    mask = random.random((20, 26)) < 0.3
    points = np.array([[3.0, 4.0], [25.0, 19.0], [-4.0, 10.0], [12.0, 40.0]])
    found = marched_rays(mask, points, 8)
    for row, (x, y) in enumerate(points):
        for ray in range(8):
            last = NO_RAY
            for step in range(1, 400):
                distance = step / 4
                column = math.floor(x + round(math.cos(ray * math.pi / 4), 12) * distance + 0.5)
                line = math.floor(y + round(math.sin(ray * math.pi / 4), 12) * distance + 0.5)
                if 0 <= line < 20 and 0 <= column < 26 and mask[line, column]:
                    last = distance
            assert found[row, ray] == pytest.approx(last)
    assert marched_rays(np.zeros((4, 4), dtype=bool), points, 5).max() == pytest.approx(NO_RAY)
    assert marched_rays(mask, points[:0], 5).shape == (0, 5)


def test_the_contour_rule_on_a_square() -> None:
    """What the original computes there."""
    contour = largest_contour(square_mask(10, 64))
    assert len(contour) == 80
    rays = contour_rays(contour, np.array([[32.0, 32.0]]), 36)[0]
    # The original's rays at 0, 10 and 40 degrees from y towards x; cutting degrees makes the other way round differ.
    assert rays[[9, 8, 5]].tolist() == pytest.approx([10, 10.1980, 13.4536], abs=1e-4)
    assert float(rays.sum()) == pytest.approx(406.0816, abs=1e-3)
    assert float(polar_centreness(torch.tensor(rays[None]))) == pytest.approx(0.862145, abs=1e-6)
    outside = contour_rays(contour, np.array([[80.0, 32.0]]), 36)[0]
    assert outside[0] == pytest.approx(NO_RAY)
    assert outside[18] == pytest.approx(math.hypot(58, 1)), "a pixel away, but of the same degree"


def test_the_contour_rule_beside_a_plain_loop() -> None:
    random = np.random.default_rng(5)
    contour, points = random.integers(0, 40, (60, 2)), random.integers(0, 40, (5, 2)) + 0.25
    found = contour_rays(contour, points, 36)
    for row, (x, y) in enumerate(points):
        by_degree: dict[int, float] = {}
        for px, py in contour.tolist():
            degree = int(math.degrees(math.atan2(px - x, py - y)) % 360)
            by_degree[degree] = max(by_degree.get(degree, 0), math.hypot(px - x, py - y))
        for ray in range(36):
            wanted = 90 - 10 * ray  # the original counts from y towards x
            near = [(wanted + shift) % 360 for shift in (0, 1, -1, 2, -2, 3, -3)]
            expected = next((by_degree[degree] for degree in near if degree in by_degree), NO_RAY)
            assert found[row, ray] == pytest.approx(expected, rel=1e-6)


def test_largest_contours() -> None:
    one = np.zeros((5, 6), dtype=bool)
    assert len(largest_contour(one)) == 0
    one[2, 3] = True
    assert largest_contour(one).tolist() == [[3, 2]]
    assert contour_centre(largest_contour(one)).tolist() == [3, 2]
    line = np.zeros((3, 9), dtype=bool)
    line[1, 2:7] = True
    assert len(largest_contour(line)) == 2 * 5 - 2, "its inner pixels are passed on the way there and back"
    assert contour_centre(largest_contour(line)).tolist() == [4, 1]
    both = disc_mask(9, 40) & ~disc_mask(5, 40)
    both[0:3, 0:3] = True  # a smaller part, and first
    contour = largest_contour(both)
    on_it = np.zeros_like(both)
    on_it[contour[:, 1], contour[:, 0]] = True
    disc = disc_mask(9, 40)
    inner = disc & np.roll(disc, 1, 0) & np.roll(disc, -1, 0) & np.roll(disc, 1, 1) & np.roll(disc, -1, 1)
    assert np.array_equal(on_it, disc & ~inner)
    assert abs(np.diff(contour, axis=0)).max() == 1
    assert contour_centre(contour).tolist() == [20, 20]
    assert mass_centre(disc).tolist() == [20, 20]
    assert mass_centre(both)[0] < 20


# The targets of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_rays_of_a_batch_are_those_of_its_masks(root: Path, rule: str) -> None:
    """Of masks on a grid of stride 1, on which every pixel can be seen."""
    config = config_of(root, targets=rule, model={"mask_head": {**HEADS["rays"], "targets": rule, "stride": 1}})
    (batch,) = first_batches(config, 1)
    targets, step = batch.targets, fresh_step(config)
    assert targets is not None
    assert targets.rays is not None
    assert not targets.rays.everywhere
    assert torch.equal(targets.rays.centres_xy, (targets.boxes_xyxy[:, :2] + targets.boxes_xyxy[:, 2:]) / 2)
    owners = set(targets.rays.instance_index.tolist())
    assert owners <= set(targets.mask_instance.tolist())
    assert len(owners) > 1
    locations = step.model.locations((64, 64), device=torch.device("cpu")).xy
    rows = zip(targets.rays.instance_index, targets.rays.location_index, targets.rays.distances, strict=True)
    for instance, location, distances in rows:
        mask = targets.masks[targets.mask_instance == instance][0].numpy()
        point = locations[location][None].double().numpy()
        expected = marched_rays(mask, point, 12) if rule == "mask" else contour_rays(largest_contour(mask), point, 12)
        assert distances.tolist() == expected[0].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_masks_of_all_move_centres_and_centreness(root: Path, rule: str) -> None:
    config = config_of(root, "full", rule)
    (batch,) = first_batches(config, 1)
    assert batch.targets is not None
    rays = batch.targets.rays
    assert rays is not None
    assert rays.everywhere
    of_boxes = (batch.targets.boxes_xyxy[:, :2] + batch.targets.boxes_xyxy[:, 2:]) / 2
    assert float((rays.centres_xy - of_boxes).abs().max()) > 2
    if rule == "contour":
        assert torch.equal(rays.centres_xy, rays.centres_xy.round())
    step = fresh_step(config)
    assignment = step.plan(batch).assignment
    assert torch.equal(assignment.instance_index, rays.instance_index)
    torch.testing.assert_close(assignment.centreness, polar_centreness(rays.distances))
    locations = step.model.locations((64, 64), device=torch.device("cpu"))
    off = (locations.xy[assignment.location_index] - rays.centres_xy[assignment.instance_index]).abs()
    assert (off < 1.5 * locations.stride[assignment.location_index, None]).all()


@pytest.mark.parametrize("supervision", ["mixed", "box-only", "none"])
def test_boxes_alone_keep_the_assignment_of_every_other_head(root: Path, supervision: str) -> None:
    config = config_of(root, supervision)
    usual = tiny_config(root, model={"mask_head": HEADS["rays"]}, **SUPERVISION[supervision])
    plans = [fresh_step(each).plan(first_batches(each, 1)[0]) for each in (config, usual)]
    for name in ("location_index", "instance_index", "centreness"):
        assert torch.equal(getattr(plans[0].assignment, name), getattr(plans[1].assignment, name))


# The step -------------------------------------------------------------------------------------------------------------


def terms_of(step: TrainStep, batch: Batch, warmup: float = 0.7) -> dict[str, float]:
    plan = step.plan(batch)
    terms = step(batch, plan, plan.counts, warmup=warmup, processes=1)
    return {name: float(value.detach()) for name, value in terms.weighted.items()}


@pytest.mark.parametrize("supervision", SUPERVISION)
def test_the_loss_of_a_step_beside_a_plain_loop(root: Path, supervision: str) -> None:
    config = config_of(root, supervision)
    step = fresh_step(config)
    for parameter in step.model.mask_head.parameters():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    (batch,) = first_batches(config, 1)
    assert batch.targets is not None
    found, rays = terms_of(step, batch), batch.targets.rays
    if rays is None:
        assert supervision == "box-only"
        assert found["rays"] == 0 < found["projection"]
        return
    plan = step.plan(batch)
    assert plan.rays is not None
    outputs = step.model(batch.images, batch.image_sizes_hw)
    predicted = step.model.mask_head.distances(outputs, plan.rays)
    loss = weights = 0.0
    given = batch.targets.supervision == Supervision.MASK  # pseudo masks are learned as `objective.pseudo` says
    for row in given[rays.instance_index].nonzero()[:, 0].tolist():
        pairs = list(zip(predicted[row].tolist(), rays.distances[row].tolist(), strict=True))
        weight = math.sqrt(min(pair[1] for pair in pairs) / max(pair[1] for pair in pairs))
        loss += weight * math.log(sum(map(max, pairs)) / sum(map(min, pairs)))
        weights += weight
    used = [int(kind) != Supervision.BOX or config.objective.box != "none" for kind in batch.targets.supervision]
    counts = dict(zip(step.count_names, plan.counts.tolist(), strict=True))
    quota = torch.bincount(plan.assignment.instance_index, minlength=len(used)).tolist()  # fewer than the most of 64
    number = sum(count for count, is_used in zip(quota, used, strict=True) if is_used)
    share = sum(quota[n] for n in given.nonzero()[:, 0].tolist()) / number
    assert counts["masks"] == number
    assert counts["rays"] == pytest.approx(weights)
    assert found["rays"] == pytest.approx(share * loss / weights, rel=1e-5)
    assert (found["dice"] > 0) == (supervision == "pseudo")
    assert set(plan.quotas[given].tolist()) == {0}, "no mask is drawn that no loss looks at"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("supervision", SUPERVISION)
def test_it_learns(root: Path, supervision: str, rule: str) -> None:
    config = config_of(root, supervision, rule)
    step = fresh_step(config)
    (batch,) = first_batches(config, 1)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.005)
    plan, totals = step.plan(batch), []
    for _ in range(14):
        terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks = (terms.weighted[name].detach() for name in ("rays", "projection", "pairwise"))
        totals.append(float(torch.stack(list(masks)).sum()))
    assert totals[-1] < 0.95 * totals[0]


@pytest.mark.parametrize("supervision", SUPERVISION)
def test_parts_of_a_batch_change_nothing(root: Path, supervision: str) -> None:
    whole = config_of(root, supervision)
    same_in_two_parts(fresh_step(whole), whole, config_of(root, supervision, optim={"accumulation": 2}))


@pytest.mark.parametrize("supervision", SUPERVISION)
def test_two_processes_are_one(root: Path, supervision: str) -> None:
    config = config_of(root, supervision)
    module = fresh_step(config)
    losses, gradient = losses_and_gradients(module, first_batches(config, 1))
    batches = [first_batches(config, 1, processes=2, rank=rank)[0] for rank in range(2)]
    plans = [module.plan(batch) for batch in batches]
    counts = torch.stack([plan.counts for plan in plans]).sum(0)
    module.zero_grad()
    found = torch.zeros_like(losses)
    for batch, plan in zip(batches, plans, strict=True):
        terms = module(batch, plan, counts, warmup=0.7, processes=2)
        (terms.total / 2).backward()  # as data parallelism takes means
        found += torch.stack([terms.weighted[name].detach() for name in module.loss_names]).double() / 2
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)
    both = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None])
    assert float((both - gradient).norm()) <= 1e-6 * float(gradient.norm())


@pytest.mark.parametrize("supervision", ["mixed", "full"])
@pytest.mark.parametrize("empty", [[0], [0, 1, 2, 3]])
def test_images_without_instances(root: Path, supervision: str, empty: list[int]) -> None:
    module, config = fresh_step(config_of(root, supervision)), config_of(root, supervision)
    losses, _ = losses_and_gradients(module, [without_instances(first_batches(config, 1)[0], empty)])
    assert torch.isfinite(losses).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient: it would hang data parallelism"
        assert torch.isfinite(parameter.grad).all()


def test_rays_of_other_positives_are_refused(root: Path) -> None:
    config = config_of(root, "full")
    (batch,) = first_batches(config, 1)
    targets, step = batch.targets, fresh_step(config)
    assert targets is not None
    assert targets.rays is not None
    wrong = replace(targets.rays, location_index=targets.rays.location_index + 1)
    with pytest.raises(ValueError, match="not those of the assignment's positives"):
        step.plan(replace(batch, targets=replace(targets, rays=wrong)))
    with pytest.raises(ValueError, match="needs targets with rays"):
        step.plan(replace(batch, targets=replace(targets, rays=None)))


def of_host_syncs() -> Batch:
    """The batch of tests/test_host_syncs.py, its three masks noise in their boxes."""
    batch, noise = make_batch(MIXED), np.random.default_rng(1)
    assert batch.targets is not None
    corners = batch.targets.boxes_xyxy[batch.targets.mask_instance, :2].floor().int().tolist()
    rasters = [(noise.random((20, 20)) < 0.5, (int(x), int(y))) for x, y in corners]
    detector = FCOSDetector.model_validate(TINY["model"]["detector"])
    positives = partial(positives_of, assign=fcos_assignment(detector), strides=tuple(detector.strides))
    rule = RayRule(count=12, contour=False, everywhere=False, positives=positives)
    return replace(batch, targets=replace(batch.targets, rays=ray_targets(batch.targets, rasters, rule, (64, 64), 2)))


def test_a_step_reads_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # fake tensors know no pinned memory
    mode, batch, cuda = FakeTensorMode(), of_host_syncs(), torch.device("cuda:0")
    assert batch.targets is not None
    assert batch.targets.rays is not None
    assert len(batch.targets.rays.instance_index) > 0
    step = fake_step(mode, config_of(tmp_path), cuda)
    with plan_of(mode, step, batch, cuda) as (on_device, plan, transfers, sent):
        assert transfers.names == ["aten._to_copy.default"] * sent, "what is sent, and that is all"
        terms = step(on_device, plan, plan.counts, warmup=0.5, processes=1)
        assert len(transfers.names) == sent
        assert terms.total.device == cuda


def test_a_step_that_is_not_finite_is_replayed(root: Path, tmp_path: Path) -> None:
    config = config_of(root)
    state = training.prepare(config, build_data(config), Accelerator(cpu=True))
    next(state.step_module.model.mask_head.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match=r"step 1: the loss is not finite \(.*rays nan.*--replay"):
        training.optimizer_step(state, first_batches(config, 1), out=tmp_path)
    (path,) = tmp_path.glob("nonfinite_step_*.pt")
    assert "rays nan" in replay_step(path)


def test_identities_hold_what_a_run_reads(root: Path) -> None:
    def identity(supervision: str = "mixed", mask: str = "dice", **head: Any) -> str:
        chosen = SUPERVISION[supervision]
        objective = {**chosen.get("objective", {}), "mask": mask}
        model = {"mask_head": {**HEADS["rays"], **head}}
        return digest(tiny_config(root, **{**chosen, "objective": objective, "model": model}).identity())

    usual = identity()
    assert usual == identity(targets="contour") == identity(targets="mask", start="box")
    names = [usual, identity(start="stride"), identity(mask="rays"), identity(mask="rays", targets="contour")]
    assert len(set(names)) == 4
    assert identity("box-only") == identity("box-only", mask="rays", targets="contour")


def test_it_is_evaluated_and_resumes_to_the_bit(root: Path, tmp_path: Path) -> None:
    config = config_of(root, runtime={"checkpoint_every": 2, "workers": 2})
    same_after_a_cut(config, tmp_path)
    assert any(line["losses"]["rays"] > 0 for line in read_log(tmp_path / "whole" / "log.jsonl") if "losses" in line)


@pytest.mark.parametrize("rule", RULES)
def test_withheld_masks_change_nothing(tmp_path: Path, rule: str) -> None:
    own = config_of(tmp_path, targets=rule)
    changed = {"model": own.model, "objective": own.objective}
    clean = everything(make_data(tmp_path / "clean", poisoned=False).model_copy(update=changed))
    poisoned = everything(make_data(tmp_path / "poisoned", poisoned=True).model_copy(update=changed))
    rays = [[batch.targets.rays for batch in side if batch.targets] for side in (clean[0], poisoned[0])]
    for mine, theirs in zip(*rays, strict=True):
        assert mine is not None
        assert theirs is not None
        for name in ("centres_xy", "instance_index", "location_index", "distances"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert sum(len(each.instance_index) for each in rays[0] if each) > 0
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])
    whole = [
        everything(
            with_source(make_data(tmp_path / name, poisoned=name == "poisoned").model_copy(update=changed), "masks")
        )
        for name in ("clean", "poisoned")
    ]
    assert whole[0][1] != whole[1][1], "the poison is one"


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UserError, match=r"objective.mask = 'rays' needs model.mask_head.kind = 'rays' on .*'fcos'"):
        tiny_config(Path(), objective={"mask": "rays"})
    with pytest.raises(UserError, match=r"targets = 'contour' needs rays that divide 360, not 7"):
        tiny_config(Path(), model={"mask_head": {**HEADS["rays"], "rays": 7, "targets": "contour"}})
