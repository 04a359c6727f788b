"""Mask R-CNN beside torchvision's own on the same weights, and its parts beside plain loops and known values."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.ops import box_iou
from typer.testing import CliRunner

import semiseg
from benchmarks import straightforward as plain
from benchmarks.heads import ellipses, masked_targets, torchvision_network
from semiseg.cli import app
from semiseg.engine.detection import mean_region_losses
from semiseg.engine.predict import LoadedModel
from semiseg.errors import UserError
from semiseg.interop.torchvision import MASKS, SCORES, convert_state
from semiseg.losses import two_stage
from semiseg.losses.affinity import inside_of_neighbours
from semiseg.losses.boxinst import pairwise_loss, projection_loss
from semiseg.losses.crops import bag_loss, cross_entropy_loss, smoothness_loss
from semiseg.losses.regions import region_cells, soft_masks
from semiseg.models.detectors.boxes import decode_boxes, encode_boxes, in_crowds, match
from semiseg.models.detectors.region_targets import Draw, assign_anchors, sample_regions
from semiseg.models.detectors.regions import RegionDetector, RegionOutputs
from semiseg.structures.grids import Regions
from semiseg.structures.outputs import MaskQueries
from tests.test_poison import everything, make_data
from tests.test_train import (
    first_batches,
    fresh_step,
    learned,
    losses_and_gradients,
    same_in_two_parts,
    without_instances,
)
from tests.tiny import DETECTORS, HEADS, tiny_config

CLASSES = 6
PROPOSALS = 150  # fewer than usual: the second stage looks at each
SIZE = (96, 128)
EVERYTHING = Draw(10**9, 1.0)


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of the files that torchvision once wrote."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}.", key)
        renamed[key] = value
    return renamed


def theirs(*, frozen: bool) -> MaskRCNN:
    """torchvision's network of the benchmark, for these images."""
    limits = {f"rpn_{part}_nms_top_n_{mode}": PROPOSALS for part in ("pre", "post") for mode in ("train", "test")}
    return torchvision_network(SIZE, classes=CLASSES, frozen=frozen, **limits)


@pytest.fixture(scope="module", params=[True, False], ids=["released", "batch norm"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MaskRCNN, LoadedModel]:
    """torchvision's network and ours, converted from its file by the command."""
    folder = tmp_path_factory.mktemp("torchvision")
    model = theirs(frozen=request.param)
    state = dict(model.state_dict())
    torch.save(released_names(state) if request.param else state, folder / "maskrcnn.pth")
    names = [f"class {number}" for number in range(CLASSES)]
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
    images = [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}]
    annotations = folder / "classes.json"
    annotations.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    arguments = ["convert", "torchvision", str(folder / "maskrcnn.pth"), str(folder / "model")]
    told = CliRunner().invoke(app, [*arguments, "--annotations", str(annotations)])
    assert told.exit_code == 0, told.output
    ours = semiseg.load_model(folder / "model", device="cpu")
    limits = ours.info.inference.model_copy(update={"candidates_per_level": PROPOSALS})
    return model, replace(ours, info=replace(ours.info, inference=limits))


@pytest.fixture(scope="module")
def image() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    return (F.interpolate(coarse, SIZE, mode="bilinear")[0] * 255).to(torch.uint8)


def test_detections_and_masks_are_torchvisions(both: tuple[MaskRCNN, LoadedModel], image: Tensor) -> None:
    model, ours = both
    with torch.no_grad():
        (expected,) = model([image.float() / 255])
    (found,) = semiseg.detect(ours, [image])
    assert len(found) == len(expected["scores"]) > 20
    distance = (found.boxes[None] - expected["boxes"][:, None]).abs().amax(2)
    distance[found.labels[None] + 1 != expected["labels"][:, None]] = torch.inf
    partner = distance.argmin(1)
    assert len(set(partner.tolist())) == len(partner)
    assert float(distance.amin(1).max()) < 0.05
    torch.testing.assert_close(found.scores[partner], expected["scores"], rtol=0, atol=5e-4)
    masks = expected["masks"][:, 0] > 0.5
    assert int(masks.sum()) > 1000
    assert int((masks ^ found.masks[partner]).sum()) <= 1e-3 * int(masks.sum())


def objects() -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and masks of four objects, one of them larger than every anchor's reach, two that overlap."""
    boxes = torch.tensor([[8.0, 10, 60, 70], [40, 30, 110, 90], [70, 5, 100, 40], [2, 60, 30, 94]])
    return boxes, torch.tensor([0, 3, 3, 5]), ellipses(boxes, SIZE)


def their_losses(model: MaskRCNN, image: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """torchvision's losses with samplers that take everything, and its proposals."""
    boxes, labels, masks = objects()
    kept: list[Tensor] = []
    select = model.roi_heads.select_training_samples

    def selected(proposals: list[Tensor], targets: Any) -> Any:
        kept.extend(proposal.clone() for proposal in proposals)
        return select(proposals, targets)

    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction = 10**9, 1.0
    model.roi_heads.select_training_samples = selected
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    target = {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
    losses = model([image.float() / 255], [target])
    model.eval()
    model.roi_heads.select_training_samples = select
    return losses, kept


def test_training_losses_are_torchvisions(both: tuple[MaskRCNN, LoadedModel], image: Tensor) -> None:
    model, ours = both
    expected, proposals = their_losses(model, image)
    network = ours.network
    detector = network.detector
    assert isinstance(detector, RegionDetector)
    targets = masked_targets(*objects())
    sizes_hw = network.level_sizes(SIZE)
    assignment = assign_anchors(
        targets,
        sizes_hw=sizes_hw,
        num_images=1,
        seeds=(1,),
        first_stride=4,
        sides=detector.sides,
        ratios=detector.ratios,
        positive_iou=0.7,
        negative_iou=0.3,
        draw=EVERYTHING,
    )
    outputs = network(image[None], torch.tensor([SIZE]))
    assert isinstance(outputs, RegionOutputs)
    # they hang on the last bits of the first stage's predictions
    outputs = replace(outputs, proposals=tuple(proposals))
    sampled = partial(sample_regions, iou=0.5, draw=EVERYTHING)
    count = {"anchors": torch.tensor(float(len(assignment.anchor_index))), "images": torch.tensor(1.0)}
    found = mean_region_losses(outputs, assignment, targets, count, processes=1, model=network, sampled=sampled)
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    for name, their_name in zip(two_stage.LOSSES, names, strict=True):
        torch.testing.assert_close(found[name], expected[their_name].detach(), rtol=1e-5, atol=0)
    regions = sampled(outputs, assignment, targets)
    positive = regions.instance >= 0
    queries = targets.of_queries(regions.instance[positive], torch.zeros(int(positive.sum()), dtype=torch.int64))
    grid = Regions(torch.cat(regions.boxes_xyxy)[positive], (28, 28), whole_pixels=True)
    zeros = torch.zeros_like(queries.labels)
    asked = MaskQueries(zeros, zeros, torch.arange(len(zeros)), grid.boxes_xyxy, queries.labels)
    logits = network.predict_masks(outputs, asked).logits
    assert queries.encoded is not None
    loss = cross_entropy_loss(logits, soft_masks(queries.encoded, grid)).mean()
    torch.testing.assert_close(loss, expected["loss_mask"].detach(), rtol=1e-5, atol=0)


# Its parts -----------------------------------------------------------------------------------------------------------


def test_deltas_of_a_known_box() -> None:
    anchor, box = torch.tensor([[30.0, 30, 70, 70]]), torch.tensor([[30.0, 40, 80, 70]])
    deltas = encode_boxes(box, anchor, (10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(deltas, torch.tensor([[1.25, 1.25, 1.115718, -1.438410]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(decode_boxes(deltas, anchor, (10.0, 10.0, 5.0, 5.0)), box)
    huge = decode_boxes(torch.tensor([[0.0, 0, 1e6, 0]]), anchor, (1.0, 1.0, 1.0, 1.0))
    assert float(huge[0, 2] - huge[0, 0]) == pytest.approx(40 * 62.5)


@pytest.mark.parametrize("best_too", [True, False])
def test_matches_are_those_of_a_plain_loop(best_too: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(60, 2, generator=generator) * 40
    candidates = torch.cat([corners, corners + 4 + torch.rand(60, 2, generator=generator) * 30], dim=1)
    for number, shift in enumerate((2, 3, 4, 5, 6, 8)):  # near, and less and less so
        candidates[40 + number] = candidates[3] + shift
    boxes = torch.cat([candidates[[3, 17]] + 0.5, torch.tensor([[200.0, 200, 210, 210]])])  # one that nobody meets
    iou = box_iou(boxes, candidates)
    expected = []
    for k in range(60):
        best = int(iou[:, k].argmax())
        value = float(iou[best, k])
        kind = best if value >= 0.7 else -1 if value < 0.3 else -2
        if best_too and any(0 < float(iou[g, k]) == float(iou[g].max()) for g in range(3)):
            kind = best
        expected.append(kind)
    found = match(candidates, boxes, positive_iou=0.7, negative_iou=0.3, best_too=best_too)
    assert found.tolist() == expected
    assert {-2, -1, 0, 1} <= set(expected)
    assert match(candidates, boxes[:0], positive_iou=0.7, negative_iou=0.3, best_too=best_too).tolist() == [-1] * 60


def test_what_lies_in_a_crowd_is_no_background() -> None:
    crowd = torch.tensor([[0.0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 8, 8], [6.0, 0, 12, 10], [5.0, 0, 15.1, 10], [20.0, 20, 30, 30]])
    assert in_crowds(candidates, crowd).tolist() == [True, True, False, False]
    assert not in_crowds(candidates, crowd[:0]).any()


def anchors_drawn(seed: int, draw: Draw, crowd: Tensor | None = None) -> Any:
    targets = masked_targets(*objects())
    if crowd is not None:
        zeros = torch.zeros(len(crowd), dtype=torch.int64)
        targets = replace(targets, crowd_boxes_xyxy=crowd, crowd_image_index=zeros)
    return assign_anchors(
        targets,
        sizes_hw=[(24, 32), (12, 16), (6, 8), (3, 4)],
        num_images=1,
        seeds=(seed,),
        first_stride=4,
        sides=[8, 16, 32, 64],
        ratios=[0.5, 1.0, 2.0],
        positive_iou=0.7,
        negative_iou=0.3,
        draw=draw,
    )


def test_what_is_drawn_follows_from_the_seed() -> None:
    draw = Draw(20, 0.25)
    one, same, other = (anchors_drawn(seed, draw) for seed in (5, 5, 6))
    assert torch.equal(one.anchor_index, same.anchor_index)
    assert not torch.equal(one.anchor_index, other.anchor_index)
    assert len(one.anchor_index) == 20
    assert 0 < int((one.anchor_instance >= 0).sum()) <= 5
    everything = anchors_drawn(5, EVERYTHING)
    kind = dict(zip(everything.anchor_index.tolist(), everything.anchor_instance.tolist(), strict=True))
    assert {index: kind[index] for index in one.anchor_index.tolist()} == dict(
        zip(one.anchor_index.tolist(), one.anchor_instance.tolist(), strict=True)
    )
    assert set(range(4)) <= set(kind.values()), "the best anchors of every object are positive"
    inside = anchors_drawn(5, EVERYTHING, torch.tensor([[0.0, 0, 128, 96]]))
    assert bool((inside.anchor_instance >= 0).any())
    assert len(inside.anchor_index) < len(everything.anchor_index)


def test_the_sums_of_both_stages_are_those_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(2)

    def smooth(difference: float) -> float:
        return 4.5 * difference**2 if abs(difference) < 1 / 9 else abs(difference) - 1 / 18

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    logits, deltas, wanted, positive = draw(7), draw(7, 4) * 0.3, draw(7, 4) * 0.3, torch.arange(7) % 3 == 0
    found = two_stage.anchor_losses(logits, deltas, wanted, positive)
    bce = sum(math.log1p(math.exp(-x if p else x)) for x, p in zip(logits.tolist(), positive.tolist(), strict=True))
    assert float(found["objectness"]) == pytest.approx(bce, rel=1e-5)
    box = sum(smooth(float(deltas[k, n] - wanted[k, n])) for k in range(7) if positive[k] for n in range(4))
    assert float(found["anchor_box"]) == pytest.approx(box, rel=1e-5)
    scores, moves, label, image = (
        draw(7, 4),
        draw(7, 4, 4),
        torch.tensor([0, 2, 3, 0, 1, 0, 0]),
        torch.tensor([0] * 3 + [2] * 4),
    )
    sums = two_stage.region_losses(scores, moves, wanted, label, image, 3)
    expected_class = expected_box = 0.0
    for k in range(7):
        share = 1 / (3 if k < 3 else 4)
        expected_class -= share * float(scores[k].log_softmax(0)[label[k]])
        if label[k] > 0:
            expected_box += share * sum(smooth(float(moves[k, label[k], n] - wanted[k, n])) for n in range(4))
    assert float(sums["classification"]) == pytest.approx(expected_class, rel=1e-5)
    assert float(sums["box"]) == pytest.approx(expected_box, rel=1e-5)


# Losses in crops -----------------------------------------------------------------------------------------------------


def constant(value: float) -> Tensor:
    return torch.full((1, 28, 28), value)


BOX_CELLS = torch.tensor([[7, 21, 7, 21]])  # rows and columns 7 to 20


def test_bags_of_known_masks() -> None:
    box = torch.full((1, 28, 28), -4.0)
    box[:, 7:21, 7:21] = 4
    diagonal = torch.full((1, 28, 28), -4.0)
    diagonal[:, range(7, 21), range(7, 21)] = 4  # bags do not fill a mask
    known = [
        (constant(0), 0.693147),
        (constant(2), 1.126928),
        (constant(-2), 1.126928),
        (box, 0.018150),
        (diagonal, 0.018150),
    ]
    for logits, expected in known:
        assert float(bag_loss(logits, BOX_CELLS)) == pytest.approx(expected, abs=1e-6)


def test_a_bag_is_one_cell_of_the_gradient() -> None:
    logits = torch.randn(3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cells = torch.tensor([[1, 5, 2, 6], [0, 9, 0, 7], [4, 4, 3, 3]])
    loss, values = bag_loss(logits, cells), logits.detach()
    torch.testing.assert_close(loss.detach(), plain.bags(values, cells))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert int(gradient[0].count_nonzero()) <= 16
    assert torch.autograd.gradcheck(lambda x: bag_loss(x, cells), logits)


def test_smoothness_pushes_masks_from_the_border() -> None:
    assert float(smoothness_loss(constant(40))) == pytest.approx(0.052934, abs=1e-6)
    assert float(smoothness_loss(constant(-40))) == pytest.approx(0, abs=1e-12)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = F.pad(logits.detach().sigmoid(), (1, 1, 1, 1))
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    for q in range(2):
        cells = [(i, j) for i in range(1, 6) for j in range(1, 5)]
        expected = sum(float(p[q, i, j] - p[q, i + a, j + b]) ** 2 for i, j in cells for a, b in steps) / (20 * 8)
        assert float(smoothness_loss(logits.detach())[q]) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(smoothness_loss, logits)


def test_cross_entropy_counts_all_of_a_region_and_the_box_of_a_map() -> None:
    logits = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    each = F.binary_cross_entropy_with_logits(logits, masks.double(), reduction="none")
    torch.testing.assert_close(cross_entropy_loss(logits, masks), plain.cross_entropy(logits, masks.double()))
    cells = torch.tensor([[1, 3, 2, 5], [0, 6, 0, 8]])
    expected = torch.stack([each[0, 0:4, 1:6].mean(), each[1].mean()])
    torch.testing.assert_close(cross_entropy_loss(logits, masks, cells), expected)


def test_cells_of_a_bag_are_those_whose_centre_is_in_the_box() -> None:
    regions = Regions(torch.tensor([[0.0, 0.0, 28.0, 28.0]]), (28, 28))
    box = torch.tensor([[7.6, 7.4, 20.4, 20.6]])
    assert region_cells(box, regions, pixels=False).tolist() == [[7, 21, 8, 20]]
    assert region_cells(box, regions).tolist() == [[7, 21, 7, 21]]


def test_a_file_of_another_network_is_told() -> None:
    state = dict(theirs(frozen=True).state_dict())
    without = {key: value for key, value in state.items() if key != SCORES}
    with pytest.raises(UserError, match=f"x.pth: not a Mask R-CNN of torchvision: no key {SCORES}"):
        convert_state(without, kept=None, where="x.pth")
    with pytest.raises(UserError, match=r"1 unknown: roi_heads\.extra"):
        convert_state({**state, "roi_heads.extra": torch.zeros(1)}, kept=None, where="x.pth")
    flat = "backbone.body.bn1.running_var"
    with pytest.raises(UserError, match=r"body\.bn1\.running_var has a variance that is not above 0"):
        convert_state({**state, flat: torch.zeros_like(state[flat])}, kept=None, where="x.pth")
    with pytest.raises(UserError, match="expected as many classes in both"):
        convert_state({**state, MASKS: state[MASKS][1:]}, kept=None, where="x.pth")
    with pytest.raises(UserError, match=r"1 of another shape: rpn\.head\.conv\.0\.0\.bias"):
        convert_state({**state, "rpn.head.conv.0.0.bias": torch.zeros(3)}, kept=None, where="x.pth")


# Masks in proposals --------------------------------------------------------------------------------------------------

IN_PROPOSALS: dict[str, Any] = {
    "model": {**DETECTORS["mask_rcnn"], "mask_head": {**HEADS["regions"], "margin": 1.0, "aligned": False}},
    "objective": {"mask": "bce", "box": "mil+smooth"},
}
IN_PROPOSALS["model"]["detector"] = {**IN_PROPOSALS["model"]["detector"], "mask_regions": "proposals"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def test_masks_are_learned_in_proposals(root: Path) -> None:
    config = tiny_config(root, **IN_PROPOSALS)
    step = fresh_step(config)
    (batch,) = first_batches(config, 1)
    totals = learned(step, batch)
    assert {name for name, value in totals[0].items() if value > 0} == {*two_stage.LOSSES, "bce", "mil", "smoothness"}
    assert totals[-1]["bce"] + totals[-1]["mil"] < 0.95 * (totals[0]["bce"] + totals[0]["mil"])


def test_the_masks_of_an_image_share_the_weight_of_its_objects(root: Path) -> None:
    """Whatever the number of regions: the losses of all masks alike are those of one."""
    config = tiny_config(root, **IN_PROPOSALS)
    step = fresh_step(config)
    with torch.no_grad():
        for parameter in step.model.mask_head.parameters():
            parameter.zero_()
    (batch,) = first_batches(config, 1)
    plan = step.plan(batch)
    terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
    assert float((terms.weighted["bce"] + terms.weighted["mil"]).detach()) == pytest.approx(math.log(2), rel=1e-5)
    assert float(terms.unweighted["bce"].detach()) > 0


@pytest.mark.parametrize("supervision", ["split", "masks", "boxes"])
def test_parts_of_a_batch_change_nothing_in_proposals(root: Path, supervision: str) -> None:
    kept: dict[str, Any] = {} if supervision == "split" else {"supervision": {"source": supervision, "split": None}}
    whole = tiny_config(root, **IN_PROPOSALS, **kept)
    halves = tiny_config(root, **IN_PROPOSALS, **kept, optim={"accumulation": 2})
    same_in_two_parts(fresh_step(whole), whole, halves)


def test_images_without_instances_in_proposals(root: Path) -> None:
    config = tiny_config(root, **IN_PROPOSALS)
    for empty in ([0], [0, 1, 2, 3]):
        module = fresh_step(config)
        losses, _ = losses_and_gradients(module, [without_instances(first_batches(config, 1)[0], empty)])
        assert torch.isfinite(losses).all()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_withheld_masks_change_nothing_in_proposals(tmp_path: Path) -> None:
    changed = {name: getattr(tiny_config(tmp_path, **IN_PROPOSALS), name) for name in ("model", "objective")}
    runs = [make_data(tmp_path / str(poisoned), poisoned=poisoned) for poisoned in (False, True)]
    clean, poisoned = (everything(run.model_copy(update=changed)) for run in runs)
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])


@pytest.mark.parametrize("objective", [{"box": "projection+pairwise"}, {"mask": "labelled", "box": "none"}])
def test_edges_in_proposals_are_refused(root: Path, objective: dict[str, str]) -> None:
    config = tiny_config(root, **{**IN_PROPOSALS, "objective": objective})
    with pytest.raises(UserError, match="mask_regions = 'proposals' learns masks in boxes that follow"):
        fresh_step(config)


def test_a_detector_with_regions_has_no_other_mask_head() -> None:
    with pytest.raises(UserError, match=r"makes masks in boxes: mask_head\.kind must be 'regions', not 'rays'"):
        tiny_config(Path(), model={**DETECTORS["mask_rcnn"], "mask_head": HEADS["rays"]})


@pytest.mark.parametrize("head", ["dynamic", "rays", "regions"])
def test_crop_losses_teach_every_head(root: Path, head: str) -> None:
    model = {"mask_head": HEADS[head]}
    whole, halves = (
        tiny_config(root, model=model, objective=IN_PROPOSALS["objective"], optim={"accumulation": parts})
        for parts in (1, 2)
    )
    same_in_two_parts(fresh_step(whole), whole, halves)
    step = fresh_step(whole)
    (batch,) = first_batches(whole, 1)
    plan = step.plan(batch)
    terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
    count = dict(zip(step.count_names, plan.counts.tolist(), strict=True))
    assert 0 < count["bce"] == count["mask_masks"] < count["masks"]
    assert 0 < count["mil"] == count["smoothness"] == count["box_masks"]
    shares = {"bce": 1.0, "mil": 1.0, "smoothness": 0.05}
    for name, weight in shares.items():
        expected = weight * terms.unweighted[name] * count[name] / count["masks"]
        torch.testing.assert_close(terms.weighted[name], expected.detach(), rtol=1e-6, atol=0)


def test_a_wanted_score_is_the_threshold_of_class_probabilities() -> None:
    regions = tiny_config(Path(), model=DETECTORS["mask_rcnn"]).model
    assert regions.threshold_of(0.5) == 0.5
    assert tiny_config(Path()).model.threshold_of(0.5) == 0.25


def test_stripes_satisfy_no_loss_of_a_box() -> None:
    """Every other row of cells: without edges between the cells of a pair as good a minimum as the object itself."""
    rows = torch.arange(28)[None, :, None].expand(1, 28, 28)
    stripes = torch.where(rows % 2 == 0, 8.0, -8.0)
    cells, index = torch.tensor([[0, 28, 0, 28]]), torch.zeros(1, dtype=torch.int64)
    assert float(projection_loss(stripes, cells)) < 0.4
    costs = {}
    for dilation in (2, 1):
        inside = torch.ones(1, 28, dtype=torch.bool)
        edges = inside_of_neighbours(inside, inside, size=3, dilation=dilation)
        sums, counts = pairwise_loss(stripes, cells, edges, index, size=3, dilation=dilation)
        costs[dilation] = float(sums / counts)
    assert costs[2] < 0.01
    assert costs[1] > 3


@pytest.mark.parametrize(("head", "dilation"), [("dynamic", 2), ("prototypes", 2), ("regions", 1)])
def test_cells_of_regions_are_held_to_the_next_ones(root: Path, head: str, dilation: int) -> None:
    assert fresh_step(tiny_config(root, model={"mask_head": HEADS[head]})).objective.affinity_dilation == dilation
