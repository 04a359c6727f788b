"""Learned affinity: edges and labels cell by cell, its losses beside plain loops, its gate, and a training with it."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import gradcheck

from benchmarks import straightforward as plain
from benchmarks.inputs import half_open
from examples.analysis import learned_edges, run_script
from semiseg.config import RunConfig
from semiseg.config.read import read_json
from semiseg.engine import edges
from semiseg.engine import train as training
from semiseg.engine.build import build_data
from semiseg.engine.checkpoint import load_tensors, save_tensors
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run, measure_edges
from semiseg.errors import UserError, UserNotice
from semiseg.losses.affinity import neighbour_offsets
from semiseg.losses.boxinst import edge_sums
from semiseg.losses.learned import COLOUR_COUNTS, AffinityTargets, LearnedEdges, affinity_loss, affinity_targets
from semiseg.models.affinity import AffinityBranch
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import Batch, Supervision, Targets
from semiseg.studies.report import report_row
from tests.distributed_worker import LEARNED
from tests.test_losses_boxinst import CELLS, IMAGE_INDEX, box_masks, random_edges, random_logits, random_masks
from tests.test_terms import BOX, GRID, MASK, MIXED, STRIDE, make_batch, of_all_neighbours
from tests.test_train import first_batches, fresh_step, losses_and_gradients, same_in_two_parts, without_instances
from tests.tiny import COUNT_NAMES, LOSS_NAMES, tiny_config

MAP = WholeMap(STRIDE, GRID)


def random_labels(size: int) -> Tensor:
    """(B, K / 2, h, w) in [0, 1] for the boxes of `test_losses_boxinst`."""
    shape = (2, size * size // 2, *random_logits().shape[1:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_edges_with_labels_cost_what_their_ends_are_apart(size: int, dilation: int) -> None:
    logits, edges, labels = random_logits().requires_grad_(), random_edges(size, dilation), random_labels(size)
    sums = edge_sums(logits, CELLS, edges, IMAGE_INDEX, costs=(1 - labels, labels), size=size, dilation=dilation)
    counts = (edges[IMAGE_INDEX] & box_masks()[:, None].bool()).nonzero(as_tuple=True)
    same = plain.edge_losses(logits, size=size, dilation=dilation)[counts]
    y = of_all_neighbours(labels, size, dilation)[IMAGE_INDEX][counts]
    each = (1 - y) * same - y * torch.log1p(-torch.exp(-same))
    expected = torch.zeros(len(logits), dtype=torch.float64).index_add(0, counts[0], each)
    torch.testing.assert_close(sums, expected, rtol=1e-10, atol=1e-11)
    factors = torch.arange(1.0, 6, dtype=torch.float64)
    (mine,) = torch.autograd.grad((sums * factors).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * factors).sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)


def test_labels_that_are_right_make_the_loss_of_labelled_edges() -> None:
    logits, masks, edges = random_logits(scale=12), random_masks(), random_edges(3, 2)
    one = torch.zeros(1, dtype=torch.int64)
    for n in range(len(logits)):
        wrong = torch.zeros(1, 4, *logits.shape[1:], dtype=torch.bool)
        for k, (down, right) in enumerate(neighbour_offsets(3, 2)[:4]):
            moved = torch.roll(masks[n], (-down, -right), (0, 1))  # what comes round from the other side has no edge
            wrong[0, k] = masks[n] ^ moved
        of_image = edges[IMAGE_INDEX[n]][None]
        arguments = logits[n][None], CELLS[n][None], of_image, one
        labelled = edge_sums(*arguments, masks[n][None], size=3, dilation=2)
        learned = edge_sums(*arguments, costs=(1 - wrong.double(), wrong.double()), size=3, dilation=2)
        torch.testing.assert_close(learned, labelled, rtol=1e-12, atol=1e-13)


def test_gradcheck_of_soft_edges() -> None:
    labels, edges = random_labels(3), random_edges(3, 2)

    def loss(logits: Tensor) -> Tensor:
        return edge_sums(logits, CELLS, edges, IMAGE_INDEX, costs=(1 - labels, labels), size=3, dilation=2)

    assert gradcheck(loss, (random_logits().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_soft_edges_stay_finite(dtype: torch.dtype) -> None:
    logits = random_logits(scale=1e4, dtype=dtype).requires_grad_()
    labels = random_labels(3).round().float()
    sums = edge_sums(logits, CELLS, random_edges(3, 2), IMAGE_INDEX, costs=(1 - labels, labels), size=3, dilation=2)
    assert sums.dtype == torch.float32
    sums.sum().backward()
    assert torch.isfinite(sums).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def with_crowd(batch: Batch) -> tuple[Batch, Targets]:
    assert batch.targets is not None
    crowd = torch.tensor([[20.0, 0.0, 31.0, 8.0]])
    targets = replace(batch.targets, crowd_boxes_xyxy=crowd, crowd_image_index=torch.tensor([1]))
    return replace(batch, targets=targets), targets


def prepared(batch: Batch, targets: Targets, size: int, dilation: int, threshold: float = 0.3) -> AffinityTargets:
    return affinity_targets(batch, targets, MAP, size=size, dilation=dilation, threshold=threshold)


def cell_by_cell(batch: Batch, targets: Targets, size: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """`known`, `different` where known, and the edges of one box, from the words of their definitions."""
    offsets = neighbour_offsets(size, dilation)
    known = torch.zeros(2, len(offsets), *GRID, dtype=torch.bool)
    different, alone = known.clone(), known.clone()
    boxes = [plain.box_mask(box, GRID, STRIDE).bool() for box in targets.boxes_xyxy]
    crowds = [plain.box_mask(box, GRID, STRIDE).bool() for box in targets.crowd_boxes_xyxy]
    masks = dict(zip(targets.mask_instance.tolist(), targets.masks, strict=True))
    for image in range(2):
        mine = [n for n, of in enumerate(targets.image_index.tolist()) if of == image]
        here = [crowd for crowd, of in zip(crowds, targets.crowd_image_index.tolist(), strict=True) if of == image]
        height, width = batch.image_sizes_hw[image].tolist()
        height -= int(batch.bottom_rows_without_affinity[image])

        def inside(cell: tuple[int, int], height: int = height, width: int = width) -> bool:
            row, column = cell
            return (
                0 <= row < GRID[0]
                and 0 <= column < GRID[1]
                and row * STRIDE + STRIDE // 2 < height
                and column * STRIDE + STRIDE // 2 < width
            )

        for k, (down, right) in enumerate(offsets):
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    a, b = (row, column), (row + down, column + right)
                    if not (inside(a) and inside(b)):
                        continue
                    around = [{n for n in mine if boxes[n][cell]} for cell in (a, b)]
                    crowded = [any(crowd[cell] for crowd in here) for cell in (a, b)]
                    place = (image, k, row, column)
                    either = around[0] | around[1]
                    if any(n in masks for n in either) and all(n in masks for n in either) and not any(crowded):
                        known[place] = True
                        different[place] = any(bool(masks[n][a] ^ masks[n][b]) for n in mine if n in masks)
                    alone[place] = len(either) == 1 and not any(crowded)
    return known, different, alone


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("supervision", [MIXED, [MASK] * 7, [BOX] * 7, [MASK, BOX, BOX, MASK, MASK, MASK, BOX]])
def test_known_edges_and_their_labels(size: int, dilation: int, supervision: list[Supervision]) -> None:
    batch, targets = with_crowd(make_batch(supervision))
    found = prepared(batch, targets, size, dilation)
    known, different, alone = (each[:, : size * size // 2] for each in cell_by_cell(batch, targets, size, dilation))
    assert torch.equal(found.known, known)
    assert torch.equal(found.different & found.known, different)
    assert torch.equal(found.of_one_box, alone)
    assert alone.any()
    assert known.any() == (MASK in supervision)


def test_overlapping_masks_separate_only_where_one_of_them_ends() -> None:
    batch = make_batch([MASK] * 7)
    assert batch.targets is not None
    masks = torch.zeros_like(batch.targets.masks)
    masks[0, :, :4], masks[1, :, 2:6] = True, True  # of image 0; the columns 2 and 3 are in both
    targets = replace(batch.targets, masks=masks)
    found = prepared(batch, targets, 3, 1)
    to_the_left = found.different[0, 3, 4, 1:]  # offset (0, -1); the first cell has none
    assert to_the_left.tolist() == [False, True, False, True, False, True, False]


def test_colour_counts_are_the_rules_answers() -> None:
    batch, targets = with_crowd(make_batch(MIXED))
    found = prepared(batch, targets, 3, 2)
    similar = [
        plain.similarity(
            batch.images[b], tuple(batch.image_sizes_hw[b].tolist()), bottom=0, stride=STRIDE, size=3, dilation=2
        )
        for b in range(2)
    ]
    alike = (torch.stack(similar) >= 0.3)[:, :4]
    expected = [
        int((found.known & answer & truth).sum())
        for answer in (alike, ~alike)
        for truth in (~found.different, found.different)
    ]
    assert found.colour_counts().tolist() == expected
    assert min(expected) > 0


def test_the_branchs_loss_is_the_cross_entropy_of_the_known_edges() -> None:
    batch, targets = with_crowd(make_batch(MIXED))
    found = prepared(batch, targets, 3, 2)
    logits = torch.randn(found.known.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    each = [
        -(logits[place].sigmoid() if found.different[place] else 1 - logits[place].sigmoid()).log()
        for place in map(tuple, found.known.nonzero().tolist())
    ]
    torch.testing.assert_close(affinity_loss(logits, found), torch.stack(each).sum(), rtol=1e-5, atol=0)
    affinity_loss(logits, replace(found, known=torch.zeros_like(found.known))).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


# The gate -------------------------------------------------------------------------------------------------------------


def gate(cross_entropy_per_edge: float, answers: list[float], *, steps: int = 5) -> float:
    branch = AffinityBranch(4, factor=1, edges=4)
    assert branch.trust() == 0, "nothing is known yet"
    for _ in range(steps):
        branch.observe(torch.tensor(cross_entropy_per_edge * sum(answers)), torch.tensor(answers))
    return float(branch.trust())


def test_the_gate_opens_as_far_as_the_branch_is_better_than_colour() -> None:
    colour = [800.0, 100.0, 20.0, 80.0]
    surest = sum(-n * torch.tensor(n / pair).log() for n, pair in zip(colour, (900, 900, 100, 100), strict=True))
    per_edge = float(surest) / 1000
    assert gate(per_edge, colour) == pytest.approx(0, abs=1e-6)
    assert gate(2 * per_edge, colour) == 0, "worse than colour"
    assert gate(0.6931, colour) == 0, "a branch that says 1/2 everywhere teaches nothing"
    assert gate(0.85 * per_edge, colour) == pytest.approx(0.5, abs=1e-5)
    assert gate(0.1 * per_edge, colour) == 1
    assert gate(0.85 * per_edge, [10 * n for n in colour]) == pytest.approx(0.5, abs=1e-5), "whatever the number"


def test_the_gate_stays_shut_without_edges_or_where_colour_is_always_right() -> None:
    assert gate(0.0, [0.0, 0.0, 0.0, 0.0]) == 0
    assert gate(0.01, [900.0, 0.0, 0.0, 100.0]) == 0


def test_the_gate_forgets() -> None:
    branch = AffinityBranch(4, factor=1, edges=4)
    answers = torch.tensor([50.0, 50.0, 50.0, 50.0])
    for _ in range(20):
        branch.observe(torch.tensor(300.0), answers)
    assert branch.trust() == 0
    for _ in range(500):
        branch.observe(torch.tensor(10.0), answers)
    assert branch.trust() == 1


# A training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def learned_config(root: Path, **sections: Any) -> RunConfig:
    return tiny_config(root, objective=LEARNED, **sections)


def half_opened(config: RunConfig) -> Any:
    module = fresh_step(config)
    assert module.affinity is not None
    half_open(module.affinity)
    assert float(module.affinity.trust()) == pytest.approx(0.5, abs=1e-5)
    return module


def test_shut_it_is_projection_and_pairwise(root: Path) -> None:
    parts = first_batches(tiny_config(root), 1)
    without, module = fresh_step(tiny_config(root)), fresh_step(learned_config(root))
    losses, gradient = losses_and_gradients(without, parts)
    assert set(without.state_dict()) == {name for name in module.state_dict() if not name.startswith("affinity.")}
    plan = module.plan(parts[0])
    terms = module(parts[0], plan, plan.counts, warmup=0.7, processes=1)
    mine = {name: float(value.detach()) for name, value in terms.weighted.items()}
    assert mine.pop("pairwise_learned") == pytest.approx(float(losses[LOSS_NAMES.index("pairwise")]), rel=1e-6)
    assert [mine[name] for name in LOSS_NAMES if name != "pairwise"] == [
        loss for name, loss in zip(LOSS_NAMES, losses.tolist(), strict=True) if name != "pairwise"
    ]
    assert float(terms.weighted["affinity"].detach()) > 0
    assert plan.counts[: len(COUNT_NAMES)].tolist() == without.plan(parts[0]).counts.tolist()
    module.zero_grad()
    (terms.total - terms.weighted["affinity"]).backward()
    gradients = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients, gradient, rtol=1e-5, atol=1e-7)


def test_open_it_takes_colours_place(root: Path) -> None:
    parts = first_batches(learned_config(root), 1)
    module = fresh_step(learned_config(root))
    plan = module.plan(parts[0])
    shut = module(parts[0], plan, plan.counts, warmup=0.7, processes=1).weighted
    terms = half_opened(learned_config(root))(parts[0], plan, plan.counts, warmup=0.7, processes=1)
    share = float(plan.counts[COUNT_NAMES.index("box_masks")] / plan.counts[COUNT_NAMES.index("masks")])
    assert 0 < share < 1
    expected = 0.7 * share * terms.unweighted["pairwise_learned"]
    torch.testing.assert_close(terms.weighted["pairwise_learned"], expected, rtol=1e-4, atol=0)
    assert float(expected.detach()) != float(shut["pairwise_learned"].detach())
    assert float(terms.weighted["pairwise"]) == 0


def test_costs_of_edges_are_shares_of_means_that_the_branch_moves() -> None:
    batch, targets = with_crowd(make_batch(MIXED))
    wanted = prepared(batch, targets, 3, 2)
    shape = wanted.known.shape
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    numbers = torch.tensor(50.0), torch.tensor(20.0)
    same, different = LearnedEdges(logits, torch.tensor(0.25)).costs(wanted, *numbers)
    assert not same.requires_grad
    assert not different.requires_grad
    kinds = set()
    for place in map(tuple, torch.ones(shape).nonzero().tolist()):
        y, alike, own = (
            float(logits.detach()[place].sigmoid()),
            bool(wanted.alike[place]),
            bool(wanted.of_one_box[place]),
        )
        kinds.add((alike, own))
        coloured = (0.75 if own else 1.0) * 20 / 50 * alike
        assert float(same[place]) == pytest.approx(coloured + 2 * 0.25 * (1 - y) * own, rel=1e-5)
        assert float(different[place]) == pytest.approx(2 * 0.25 * y * own, rel=1e-5)
    assert len(kinds) == 4
    same, different = LearnedEdges(logits, torch.tensor(0.0)).costs(wanted, *numbers)
    assert torch.equal(same, wanted.alike * torch.tensor(0.4))
    assert not different.any()


def test_accumulation_changes_neither_losses_nor_gradients_of_learned_edges(root: Path) -> None:
    whole, halves = learned_config(root), learned_config(root, optim={"accumulation": 2})
    module = half_opened(whole)
    assert len(module.loss_names) == len(LOSS_NAMES) + 2
    same_in_two_parts(module, whole, halves)


@pytest.mark.parametrize("empty", [[0], [0, 1, 2, 3]])
def test_learned_edges_of_images_without_instances(root: Path, empty: list[int]) -> None:
    config = learned_config(root)
    module = half_opened(config)
    losses, _ = losses_and_gradients(module, [without_instances(first_batches(config, 1)[0], empty)])
    assert torch.isfinite(losses).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient: it would hang data parallelism"
        assert torch.isfinite(parameter.grad).all()


def test_in_bf16_the_losses_are_nearly_those_of_float32(root: Path) -> None:
    parts = first_batches(learned_config(root), 1)
    weighted = {}
    for enabled in (False, True):
        module = half_opened(learned_config(root))
        plan = module.plan(parts[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = module(parts[0], plan, plan.counts, warmup=0.7, processes=1)
        terms.total.backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
        weighted[enabled] = {name: float(value.detach()) for name, value in terms.weighted.items()}
    assert weighted[True]["pairwise_learned"] > 0 < weighted[True]["affinity"]
    assert weighted[True] == pytest.approx(weighted[False], rel=0.02)
    assert weighted[True] != weighted[False], "something was rounded"


def test_a_training_resumes_with_its_gate(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = learned_config(root, runtime={"checkpoint_every": 2, "log_every": 1})
    execute_run(config, out=tmp_path / "whole", progress=False)
    original = training.optimizer_step

    def cut_off(state, parts, **keywords):  # type: ignore[no-untyped-def]
        if state.step == 3:
            raise RuntimeError("cut off")
        return original(state, parts, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "optimizer_step", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            execute_run(config, out=tmp_path / "cut", progress=False)
    execute_run(config, out=tmp_path / "cut", progress=False)
    whole, cut = (load_tensors(tmp_path / name / "checkpoints" / "step_00000004.pt") for name in ("whole", "cut"))
    for part in ("model", "affinity"):
        assert all(torch.equal(value, cut[part][name]) for name, value in whole[part].items()), part
    seen = [sum(line["counts"][name] for name in COLOUR_COUNTS) for line in read_log(tmp_path / "cut" / "log.jsonl")]
    shares = [line["learned_share"] for line in read_log(tmp_path / "cut" / "log.jsonl")]
    branch = AffinityBranch(1, factor=1, edges=1)
    branch.sums.copy_(whole["affinity"]["sums"])
    assert shares[-1] == pytest.approx(float(branch.trust()), abs=1e-6)
    decayed = sum(count * 0.98 ** (3 - step) for step, count in enumerate(seen))
    assert float(whole["affinity"]["sums"][1:].sum()) == pytest.approx(decayed, rel=1e-6)
    numbers = [read_json(tmp_path / name / "result.json")["edges"] for name in ("whole", "cut")]
    assert numbers[0] == numbers[1]
    assert set(numbers[0]["unseen"]) == {"edges", "different", "learned_auc", "colour_auc", "calibration_error"}
    monkeypatch.setattr("sys.argv", ["learned_edges", str(tmp_path / "whole"), str(tmp_path / "edges.png")])
    learned_edges.main()
    assert json.loads(capsys.readouterr().out) == numbers[0], "of the checkpoint, as at the end of the run"
    assert (tmp_path / "edges.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", [*sys.argv, "--images", "9"])
    with pytest.raises(SystemExit, match="2"):
        run_script(learned_edges.main)
    assert capsys.readouterr().err == "--images is 9, allowed: 1 to 4\n"
    path = tmp_path / "cut" / "checkpoints" / "step_00000004.pt"
    for what, told in (({}, "no checkpoint of this run"), ({"sums": torch.full((5,), math.nan)}, "1 of its weights")):
        save_tensors(path, {**cut, "affinity": {**cut["affinity"], **what} if what else {}})
        (tmp_path / "cut" / "result.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"step_00000004.pt: {told}"):
            execute_run(config, out=tmp_path / "cut", progress=False)
    model = load_tensors_of_model(tmp_path / "whole" / "model")
    assert not [name for name in model if "affinity" in name], "the branch is a part of the training alone"


# Its quality on validation objects ------------------------------------------------------------------------------------


def test_quality_is_counted_over_all_pairs_of_edges() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(120, 280, (60,), generator=draw)
    truth = torch.rand(60, generator=draw) < 0.3
    counts = torch.stack([torch.bincount(scores[truth == kind], minlength=edges.BINS) for kind in (False, True)])
    pairs = [(a, b) for a in scores[truth].tolist() for b in scores[~truth].tolist()]
    auc = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    found = edges._quality(counts.double(), counts.flip(0).double())
    assert found["learned_auc"] == pytest.approx(100 * auc, abs=1e-3)
    assert found["colour_auc"] == pytest.approx(100 - 100 * auc, abs=1e-3)
    assert found["edges"] == 60
    assert found["different"] == pytest.approx(100 * float(truth.sum()) / 60, abs=1e-3)


def test_probabilities_that_come_true_are_calibrated() -> None:
    logits = ((torch.arange(edges.BINS) + 0.5) / edges.BINS * 2 - 1) * edges.LARGEST_LOGIT
    y = logits.double().sigmoid()
    for shift, error in ((0.0, 0.0), (0.1, 10.0)):  # a tenth of all edges are different beyond what is said
        counts = torch.stack([1 - y - shift, y + shift])
        assert edges._quality(counts, counts)["calibration_error"] == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("split", ["shapes_few_seen", None])
def test_quality_of_the_colours_themselves(root: Path, split: str | None) -> None:
    """A branch that says what colour says has colour's AUC, of each group; the groups' edges are apart."""
    source = "split" if split else "masks"
    config = learned_config(root, supervision={"source": source, "split": split})
    data, accelerator = build_data(config), Accelerator(cpu=True)
    module = fresh_step(config)
    assert module.affinity is not None

    def as_colour(features: Tensor, lab: Tensor, distances: Tensor) -> Tensor:
        bins = (distances / edges.LARGEST_DISTANCE * edges.BINS).long()
        return ((bins + 0.5) / edges.BINS * 2 - 1) * edges.LARGEST_LOGIT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.affinity, "forward", as_colour)
        found = measure_edges(config, data, module, accelerator)
    assert found is not None
    assert set(found) == ({"seen", "unseen"} if split else {"seen"})
    for values in found.values():
        assert values["learned_auc"] == values["colour_auc"] > 60
        assert values["edges"] > 100
        assert 0 < values["different"] < 100
    assert module.training


def load_tensors_of_model(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_learned_edges_need_the_branch(root: Path) -> None:
    with pytest.raises(UserError, match=r"box = 'projection\+learned' needs affinity = 'learned'"):
        tiny_config(root, objective={"box": "projection+learned"})


@pytest.mark.parametrize("box", ["projection", "projection+pairwise"])
def test_a_branch_whose_edges_no_loss_takes_is_said(root: Path, box: str) -> None:
    config = tiny_config(root, objective={"box": box, "affinity": "learned"})
    told = f"objective.affinity = 'learned': objective.box = {box!r} takes none of the learned edges"
    with pytest.warns(UserNotice, match=re.escape(told)):
        training.prepare(config, build_data(config), Accelerator(cpu=True))


def test_without_a_mask_it_says_so_and_colour_stays(root: Path, tmp_path: Path) -> None:
    config = learned_config(root, supervision={"source": "boxes", "split": None})
    with pytest.warns(UserNotice, match="no training instance has a mask, so that no edge is learned"):
        state = training.prepare(config, build_data(config), Accelerator(cpu=True))
    state.wrapped.train()
    report = training.optimizer_step(state, first_batches(config, 1), out=tmp_path)
    weighted = dict(zip(state.step_module.loss_names, report.weighted.tolist(), strict=True))
    assert weighted["affinity"] == weighted["pairwise"] == 0 < weighted["pairwise_learned"]
    assert state.step_module.affinity is not None
    assert float(state.step_module.affinity.trust()) == 0


def test_a_detector_alone_has_no_edges(root: Path) -> None:
    config = tiny_config(
        root, supervision={"source": "boxes", "split": None}, objective={"box": "none", "affinity": "learned"}
    )
    module = fresh_step(config)
    assert module.affinity is None
    losses, _ = losses_and_gradients(module, first_batches(config, 1))
    assert len(losses) == len(LOSS_NAMES)


def test_a_report_says_that_the_edges_are_learned(root: Path) -> None:
    row = report_row("learned", "projection + learned affinity", "M.", learned_config(root))
    assert (row.projection, row.pairwise) == ("yes", "learned")
