"""Every mask head with every kind of supervision, and each beside plain loops and known values."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import semiseg
from semiseg.config import RunConfig
from semiseg.config.read import read_json
from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_step
from semiseg.engine.checkpoint import check_initial, load_model_folder, load_tensors
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from semiseg.losses.boxinst import projection_loss
from semiseg.losses.regions import region_cells
from semiseg.models.build import build_model
from semiseg.models.masks.prototypes import PrototypeMasks, inside_boxes, weighted_sums
from semiseg.models.masks.rays import RayMasks, draw_rays
from semiseg.models.masks.regions import RegionMasks
from semiseg.models.region_features import region_features
from semiseg.models.segmenter import Segmenter
from semiseg.structures.grids import Regions, WholeMap
from semiseg.structures.outputs import DenseOutputs, MaskQueries
from tests.distributed_worker import LEARNED
from tests.test_poison import everything, make_data
from tests.test_train import (
    first_batches,
    fresh_step,
    learned,
    losses_and_gradients,
    same_in_two_parts,
    without_instances,
)
from tests.tiny import DETECTORS, HEADS, make_queries, model_of, tiny_config

OTHERS = [*(name for name in HEADS if name != "dynamic"), *DETECTORS]
SUPERVISION: dict[str, dict[str, Any]] = {
    "full": {"supervision": {"source": "masks", "split": None}},
    "mixed": {},
    "box-only": {"supervision": {"source": "boxes", "split": None}},
    "none": {"objective": {"box": "none"}},
    "pseudo": {"supervision": {"pseudo": "grabcut"}, "objective": {"pseudo": "dice+projection"}},
}
USED = {
    "full": {"dice"},
    "mixed": {"dice", "projection", "pairwise"},
    "box-only": {"projection", "pairwise"},
    "none": {"dice"},
    "pseudo": {"dice", "projection"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def config_of(root: Path, head: str, model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return tiny_config(root, model={**model_of(head), **(model or {})}, **sections)


# Every head, every kind of supervision -------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", SUPERVISION)
@pytest.mark.parametrize("head", OTHERS)
def test_it_learns(root: Path, head: str, supervision: str) -> None:
    config = config_of(root, head, **SUPERVISION[supervision])
    step = fresh_step(config)
    (batch,) = first_batches(config, 1)
    totals = learned(step, batch)
    masks = {name: value for name, value in totals[0].items() if name in ("dice", "projection", "pairwise")}
    assert {name for name, value in masks.items() if value > 0} == USED[supervision]
    assert sum(totals[-1][name] for name in masks) < 0.95 * sum(masks.values())


@pytest.mark.parametrize("supervision", SUPERVISION)
@pytest.mark.parametrize("head", OTHERS)
def test_parts_of_a_batch_change_nothing(root: Path, head: str, supervision: str) -> None:
    whole = config_of(root, head, **SUPERVISION[supervision])
    halves = config_of(root, head, optim={"accumulation": 2}, **SUPERVISION[supervision])
    same_in_two_parts(fresh_step(whole), whole, halves)


@pytest.mark.parametrize("empty", [[0], [0, 1, 2, 3]])
@pytest.mark.parametrize("head", OTHERS)
def test_images_without_instances(root: Path, head: str, empty: list[int]) -> None:
    config = config_of(root, head)
    module = fresh_step(config)
    losses, _ = losses_and_gradients(module, [without_instances(first_batches(config, 1)[0], empty)])
    assert torch.isfinite(losses).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient: it would hang data parallelism"
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(("head", "cells"), [("dynamic", 16), ("rays", 16), ("regions", 14)])
def test_a_dilation_beyond_the_masks_is_refused(root: Path, head: str, cells: int) -> None:
    """As far as that can be told from the configuration: one cell less has edges, and where none is read it is free."""
    for box, dilation in (("projection+pairwise", cells - 1), ("projection", cells)):
        build_step(config_of(root, head, objective={"box": box, "affinity_dilation": dilation}), num_classes=3)
    for objective in ({"box": "projection+pairwise"}, {"box": "projection", "mask": "labelled"}):
        config = config_of(root, head, objective={**objective, "affinity_dilation": cells})
        with pytest.raises(UserError, match=f"affinity_dilation = {cells}: .* allowed: less than the {cells} cells"):
            build_step(config, num_classes=3)


def same_after_a_cut(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The metrics of a run of four steps in `whole`, whose copy in `cut` goes on from step 2 to the same weights."""
    execute_run(config, out=folder / "whole", progress=False)
    shutil.copytree(folder / "whole", folder / "cut")
    for name in ("checkpoints/step_00000004.pt", "result.json"):
        (folder / "cut" / name).unlink()
    shutil.rmtree(folder / "cut" / "model")
    execute_run(config, out=folder / "cut", progress=False)
    whole, cut = (load_tensors(folder / name / "checkpoints" / "step_00000004.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    results = [read_json(folder / name / "result.json")["metrics"] for name in ("whole", "cut")]
    assert results[0] == results[1]
    metrics: dict[str, Any] = results[0]
    return metrics


@pytest.mark.parametrize("head", OTHERS)
def test_it_is_evaluated_and_resumes_to_the_bit(root: Path, tmp_path: Path, head: str) -> None:
    config = config_of(root, head, runtime={"checkpoint_every": 2})
    metrics = same_after_a_cut(config, tmp_path)
    assert metrics["segm"] is not None
    picture = torch.zeros(3, 40, 56, dtype=torch.uint8)
    (detections,) = semiseg.detect(semiseg.load_model(tmp_path / "whole"), [picture], score_threshold=0.0)
    assert detections.masks.shape[1:] == (40, 56)
    assert any(line["losses"]["dice"] > 0 for line in read_log(tmp_path / "whole" / "log.jsonl") if "losses" in line)


def test_it_starts_from_a_detector_with_another_mask_head(root: Path, tmp_path: Path) -> None:
    execute_run(tiny_config(root, optim={"steps": 1}), out=tmp_path / "detector", progress=False)
    config = config_of(root, "regions", init_from=str(tmp_path / "detector"))
    state = training.prepare(config, build_data(config), Accelerator(cpu=True))
    given, own = load_model_folder(tmp_path / "detector" / "model")[0], state.step_module.model.state_dict()
    shared = [name for name in own if not name.startswith(("mask_head.", "neck."))]
    assert len(shared) > 40
    assert all(torch.equal(own[name], given[name]) for name in shared)
    blocks = "neck.fpn.inner_blocks"  # from stride 4 here, from 8 there: the finest serves the regions alone
    assert [int(name.split(".")[3]) for name in own if name.startswith(blocks) and name.endswith("weight")] == [
        0,
        1,
        2,
        3,
    ]
    for level in range(3):
        assert torch.equal(own[f"{blocks}.{level + 1}.0.weight"], given[f"{blocks}.{level}.0.weight"])
    execute_run(config_of(root, "regions", optim={"steps": 1}), out=tmp_path / "finer", progress=False)
    coarser = config_of(root, "rays", init_from=str(tmp_path / "finer"))
    own = training.prepare(coarser, build_data(coarser), Accelerator(cpu=True)).step_module.model.state_dict()
    given = load_model_folder(tmp_path / "finer" / "model")[0]
    assert torch.equal(own[f"{blocks}.0.0.weight"], given[f"{blocks}.1.0.weight"])
    with pytest.raises(UserError, match=r"weights are of another network(?s:.*)neck\.channels = 16 +# now 32$"):
        check_initial(tmp_path / "detector", config_of(root, "rays", model={"neck": {"channels": 32}}).model)


@pytest.mark.parametrize("head", OTHERS)
def test_withheld_masks_change_nothing(tmp_path: Path, head: str) -> None:
    changed = {"model": config_of(tmp_path, head).model}
    clean = everything(make_data(tmp_path / "clean", poisoned=False).model_copy(update=changed))
    poisoned = everything(make_data(tmp_path / "poisoned", poisoned=True).model_copy(update=changed))
    targets = [batch.targets for batch in clean[0] if batch.targets]
    assert 0 < sum(len(each.mask_instance) for each in targets) < sum(each.num_instances for each in targets)
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])


@pytest.mark.parametrize("head", OTHERS)
def test_a_detector_alone_trains_nothing_of_it(root: Path, head: str) -> None:
    config = config_of(root, head, supervision={"source": "boxes", "split": None}, objective={"box": "none"})
    module = fresh_step(config)
    losses, _ = losses_and_gradients(module, first_batches(config, 1))
    of_detector = len(module.detector.loss_names)
    assert losses[of_detector:].count_nonzero() == 0 < losses[:of_detector].min()
    assert not any(parameter.requires_grad for parameter in module.model.mask_head.parameters())


def test_learned_affinity_takes_features_of_whole_images(root: Path) -> None:
    losses, _ = losses_and_gradients(
        fresh_step(config_of(root, "prototypes", objective=LEARNED)),
        first_batches(config_of(root, "prototypes", objective=LEARNED), 1),
    )
    assert losses[-1] > 0
    for head in ("rays", "regions"):
        with pytest.raises(UserError, match=f"needs a mask head with features of whole images, not '{head}'"):
            fresh_step(config_of(root, head, objective=LEARNED))


@pytest.mark.parametrize(
    ("head", "wrong", "told"),
    [
        ("prototypes", {"stride": 3}, "feature_stride must be 4, 8 or 16 and half of it a multiple of stride"),
        ("prototypes", {"branch_channels": 8}, "unknown key 'model.mask_head.branch_channels'"),
        ("rays", {"tower_groups": 5}, "neck.channels must divide by mask_head.tower_groups"),
        ("rays", {"rays": 2}, "'model.mask_head.rays'.*greater than or equal to 3"),
        ("regions", {"feature_stride": 2}, "feature_stride must be 4, 8 or 16"),
        ("regions", {"margin": 0.9}, "'model.mask_head.margin'.*greater than or equal to 1"),
        ("dynamic", {"kind": "boxes"}, "'model.mask_head.kind'.*'dynamic', 'prototypes', 'rays'"),
    ],
)
def test_what_does_not_fit_is_told(head: str, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_config(Path(), model={"mask_head": {**HEADS[head], **wrong}})


# Each beside plain loops and known values ----------------------------------------------------------------------------


def network(head: str, **changed: Any) -> Segmenter:
    torch.manual_seed(1)
    model = build_model(tiny_config(Path(), model={"mask_head": HEADS[head] | changed}).model, num_classes=3)
    for parameter in model.mask_head.parameters():
        parameter.data.normal_(std=0.3)
    return model


def outputs_of(model: Segmenter) -> DenseOutputs:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    outputs: DenseOutputs = model(images, torch.tensor([[64, 96], [60, 90]]))
    return outputs


def queries_at(boxes: Tensor, labels: list[int] | None = None) -> MaskQueries:
    """Locations of all three levels (96, 24 and 6 cells) and of the corners, the images not in their order."""
    locations, images = torch.tensor([0, 95, 50, 96, 119, 125]), torch.tensor([1, 0, 1, 0, 0, 1])
    return MaskQueries(images, locations, torch.arange(6), boxes, torch.tensor(labels or [0] * 6))


BOXES = torch.tensor(
    [[4.0, 4, 40, 30], [0, 0, 96, 64], [30, 10, 31, 50], [60, 40, 90, 60], [-8, -8, 20, 20], [2, 2, 9, 9]]
)


@pytest.mark.parametrize("start", ["box", "nothing"])
def test_prototypes_are_weighted_by_a_convolution_of_the_box_tower(start: str) -> None:
    model = network("prototypes", start=start).train()
    head = model.mask_head
    assert isinstance(head, PrototypeMasks)
    outputs, queries = outputs_of(model), queries_at(BOXES)
    masks = model.predict_masks(outputs, queries)
    assert masks.grid == WholeMap(4, (16, 24))
    features = outputs.mask_inputs.weight_features.transpose(1, 2)  # (B, F', R)
    maps = [
        part.unflatten(2, size)
        for part, size in zip(features.split([96, 24, 6], 2), [(8, 12), (4, 6), (2, 3)], strict=True)
    ]
    everywhere = torch.cat([head.weights(each).flatten(2) for each in maps], dim=2).tanh()
    for query in range(6):
        image, location = int(queries.image_index[query]), int(queries.location_index[query])
        weights = everywhere[image, :, location]
        expected = sum(
            weight * each for weight, each in zip(weights, outputs.mask_inputs.prototypes[image], strict=True)
        )
        if start == "box":
            expected = expected + torch.tensor(
                [[box_logit(BOXES[query], row, column) for column in range(24)] for row in range(16)]
            )
        torch.testing.assert_close(masks.logits[query], expected, rtol=1e-4, atol=1e-5)
    assert outputs.mask_inputs.prototypes.min() == 0 < outputs.mask_inputs.prototypes.max()

    model.eval()
    cut = model.predict_masks(outputs_of(model), queries).logits
    for query, (x0, y0, x1, y1) in enumerate(BOXES.tolist()):
        for row in range(16):
            for column in range(24):
                y, x = 4 * row + 2, 4 * column + 2
                inside = x0 - 4 <= x <= x1 + 4 and y0 - 4 <= y <= y1 + 4
                assert bool(cut[query, row, column].isfinite()) == inside


def box_logit(box: Tensor, row: int, column: int) -> float:
    """What a cell of stride 4 has from the box: how many cells inside it is, from -4 to 1."""
    x0, y0, x1, y1 = box.tolist()
    y, x = 4 * row + 2.5, 4 * column + 2.5
    inner: float = min(x - x0, x1 - x, y - y0, y1 - y) / 4
    return min(max(inner, -4.0), 1.0)


def test_known_sums_of_prototypes() -> None:
    prototypes = torch.tensor([[[[1.0, 0], [0, 2]], [[3, 1], [0, 0]]]])
    sums = weighted_sums(prototypes, torch.tensor([[0.5, -0.25]]), make_queries([0], [0]))
    torch.testing.assert_close(sums, torch.tensor([[[-0.25, -0.25], [0.0, 1.0]]]))
    assert inside_boxes(torch.tensor([[4.0, 4, 8, 8]]), 4, (4, 4))[0].sum() == 9


def test_a_mask_that_fills_its_box_is_only_anchored_outside_of_it() -> None:
    """Why prototypes are not cut in training, and why regions have a margin: a full box satisfies what ends there."""
    boxes = torch.tensor([[8.0, 8, 40, 40]])
    sums = {}
    for margin in (1.0, 1.25):
        regions = network("regions", margin=margin).mask_grid(boxes, (64, 64))
        assert isinstance(regions, Regions)
        sums[margin] = float(projection_loss(torch.full((1, 14, 14), 20.0), region_cells(boxes, regions)))
    assert sums[1.0] == pytest.approx(0, abs=1e-5)
    assert sums[1.25] == pytest.approx(2 * (1 - 2 * 12 / (12 + 14)), abs=1e-4)  # 12 of 14 rows and columns


def ray_numbers(model: Segmenter, outputs: DenseOutputs) -> Tensor:
    """(B, rays, R): the convolution of the tower everywhere, times its level's scale."""
    head = model.mask_head
    assert isinstance(head, RayMasks)
    features = outputs.mask_inputs.transpose(1, 2)
    maps = [
        part.unflatten(2, size)
        for part, size in zip(features.split([96, 24, 6], 2), [(8, 12), (4, 6), (2, 3)], strict=True)
    ]
    return torch.cat([(head.level_scales[n] * head.rays(each)).flatten(2) for n, each in enumerate(maps)], dim=2)


def test_rays_of_the_original_are_a_convolution_in_strides() -> None:
    model = network("rays", start="stride")
    model.requires_grad_(False)
    outputs, queries = outputs_of(model), queries_at(BOXES)
    distances = model.mask_head.distances(outputs, queries)
    expected = ray_numbers(model, outputs).exp() * outputs.locations.stride
    expected = expected[queries.image_index, :, queries.location_index]
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)


def test_rays_end_in_the_box_and_begin_with_its_ellipse() -> None:
    model = network("rays")
    model.requires_grad_(False)
    outputs = outputs_of(model)
    centres = outputs.locations.xy[queries_at(BOXES).location_index]
    reach = torch.tensor([[3.0, 9, 30, 20], [20, 5, 4, 8], [9, 9, 9, 9], [2, 30, 40, 4], [15, 6, 7, 8], [0, 8, 9, 9]])
    queries = queries_at(torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], dim=1))
    numbers = ray_numbers(model, outputs)[queries.image_index, :, queries.location_index]
    distances = model.mask_head.distances(outputs, queries)
    for query in range(6):
        left, top, right, bottom = (value + 2 for value in reach[query].tolist())  # and half a cell
        for ray in range(12):
            x, y = math.cos(ray * math.pi / 6), math.sin(ray * math.pi / 6)
            across = math.inf if abs(x) < 1e-9 else (right if x > 0 else left) / abs(x)
            down = math.inf if abs(y) < 1e-9 else (bottom if y > 0 else top) / abs(y)
            room, number = min(across, down), float(numbers[query, ray])
            low, high = 0.0, 1000.0  # of the ellipse's radius, by halving
            half_x, half_y = (left + right) / 2, (top + bottom) / 2
            px, py = (left - right) / 2 / half_x, (top - bottom) / 2 / half_y
            shrunk = min(1.0, 0.95 / max(math.hypot(px, py), 1e-9))
            for _ in range(60):
                middle = (low + high) / 2
                away = math.hypot(px * shrunk + middle * x / half_x, py * shrunk + middle * y / half_y)
                low, high = (middle, high) if away < 1 else (low, middle)
            first = min(max(0.95 * low / room, 0.02), 0.97)
            share = 1 / (1 + (1 - first) / first * math.exp(-number))
            assert float(distances[query, ray]) == pytest.approx(room * share, rel=1e-3)
            assert float(distances[query, ray]) < room
    outside = queries_at(torch.tensor([[200.0, 200, 220, 210]] * 6))
    assert torch.isfinite(model.mask_head.distances(outputs, outside)).all()
    for parameter in model.mask_head.parameters():
        parameter.data.zero_()
    fresh = network("rays", rays=360)
    for parameter in fresh.mask_head.parameters():
        parameter.data.zero_()
    box = torch.tensor([[-28.0, -12, 36, 12]]) + torch.tensor([4.0, 4]).repeat(
        2
    )  # around a location of the first level
    around = MaskQueries(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), box, torch.tensor([0]))
    ends = fresh.mask_head.distances(outputs_of(fresh), around)[0]
    assert ends[[0, 180]].tolist() == pytest.approx([0.95 * 38, 0.95 * 30], abs=0.6)
    assert ends[22] < 0.8 * math.hypot(38, 14), "where the corner of the box is"


def test_masks_of_rays_are_distances_to_their_polygon() -> None:
    model = network("rays")
    model.requires_grad_(False)
    outputs, queries = outputs_of(model), queries_at(BOXES)
    distances, masks = model.mask_head.distances(outputs, queries), model.predict_masks(outputs, queries)
    centres = outputs.locations.xy[queries.location_index].tolist()
    for query in range(6):
        ends = [
            (float(d) * math.cos(k * math.pi / 6), float(d) * math.sin(k * math.pi / 6))
            for k, d in enumerate(distances[query].clamp(min=0.01))
        ]
        for row, column in ((0, 0), (7, 11), (15, 23), (3, 20), (2, 3), (9, 17)):
            dx, dy = 4 * column + 2 - centres[query][0], 4 * row + 2 - centres[query][1]
            side = int(math.atan2(dy, dx) % (2 * math.pi) / (2 * math.pi) * 12) % 12
            (x0, y0), (x1, y1) = ends[side], ends[(side + 1) % 12]
            away = ((x1 - x0) * (dy - y0) - (y1 - y0) * (dx - x0)) / math.hypot(x1 - x0, y1 - y0)
            if away < 0:  # beyond: along the ray
                offset = (x0 * y1 - y0 * x1) / math.hypot(x1 - x0, y1 - y0)
                away /= max((offset - away) / math.hypot(dx, dy), 0.02)
            assert float(masks.logits[query, row, column]) == pytest.approx(away, rel=1e-2, abs=1e-2)


def test_drawn_rays_of_a_disc_a_square_and_their_gradient() -> None:
    grid, centre = WholeMap(1, (64, 64)), torch.tensor([[30.0, 33.0]])
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    away = torch.hypot(x - 30.0, y - 33.0)
    disc = draw_rays(torch.full((1, 360), 20.0), centre, grid)[0]
    truth = away < 20
    assert int(((disc > 0) & truth).sum()) / int(((disc > 0) | truth).sum()) > 0.99
    torch.testing.assert_close(disc[away > 0], (20 - away)[away > 0], rtol=0, atol=0.02)
    angles = torch.arange(36) * (2 * math.pi / 36)
    square = 10 / torch.maximum(angles.cos().abs(), angles.sin().abs())
    drawn = draw_rays(1.05 * square[None], centre, grid)[0]
    filled = ((x - 30).abs() < 10.5) & ((y - 33).abs() < 10.5)
    assert int(((drawn > 0) & filled).sum()) / int(((drawn > 0) | filled).sum()) > 0.97
    assert drawn[33, 28:40].tolist() == pytest.approx([8.5, 9.5] + [10.5 - n for n in range(10)], abs=1e-3)
    spike = torch.full((1, 36), 2.0)
    spike[0, 0] = 20.0
    assert 0 < float(draw_rays(spike, centre, grid)[0, 33, 40]) < 0.5, "the middle of a spike is near its outline"
    assert float(draw_rays(spike, centre, grid)[0, 33, 53]) == pytest.approx(-3, abs=0.2)
    distances = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9 + 1
    centres = torch.tensor([[3.2, 5.1], [6.3, 2.4]], dtype=torch.float64)
    assert gradcheck(lambda values: draw_rays(values, centres, WholeMap(2, (5, 6))), distances.requires_grad_())


def test_regions_are_the_tower_on_aligned_features_of_the_level_that_fits() -> None:
    model = network("regions", class_agnostic=False)
    head = model.mask_head
    assert isinstance(head, RegionMasks)
    outputs, queries = outputs_of(model), queries_at(BOXES, [2, 0, 1, 1, 0, 2])
    masks = model.predict_masks(outputs, queries)
    assert masks.logits.shape == (6, 14, 14)
    assert isinstance(masks.grid, Regions)
    for query in range(6):
        image = int(queries.image_index[query])
        x0, y0, x1, y1 = BOXES[query].tolist()
        half_x, half_y = 0.625 * (x1 - x0), 0.625 * (y1 - y0)
        left, top = (x0 + x1) / 2 - half_x, (y0 + y1) / 2 - half_y
        assert masks.grid.boxes_xyxy[query].tolist() == pytest.approx([left, top, left + 2 * half_x, top + 2 * half_y])
        features = sampled(outputs.mask_inputs[0][image], left, top, 2 * half_x, 2 * half_y, cells=7, stride=4)
        x = F.conv_transpose2d(head.tower(features[None]), head.deconv.weight, head.deconv.bias, stride=2).relu()
        expected = head.masks(x)[0, int(queries.labels[query])]
        torch.testing.assert_close(masks.logits[query], expected, rtol=1e-3, atol=1e-4)


def sampled(
    features: Tensor, left: float, top: float, width: float, height: float, *, cells: int, stride: int
) -> Tensor:
    """Each cell's mean of 2 x 2 bilinear samples, 0 from one cell beyond the map on."""
    result = torch.zeros(len(features), cells, cells)
    rows, columns = features.shape[-2:]
    for i in range(2 * cells):
        for j in range(2 * cells):
            y = (top + (i + 0.5) * height / (2 * cells)) / stride - 0.5
            x = (left + (j + 0.5) * width / (2 * cells)) / stride - 0.5
            if not (-1 <= y <= rows and -1 <= x <= columns):
                continue
            y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
            i0, j0 = min(int(y), rows - 1), min(int(x), columns - 1)
            i1, j1 = min(i0 + 1, rows - 1), min(j0 + 1, columns - 1)
            upper = features[:, i0, j0] * (1 - (x - j0)) + features[:, i0, j1] * (x - j0)
            lower = features[:, i1, j0] * (1 - (x - j0)) + features[:, i1, j1] * (x - j0)
            result[:, i // 2, j // 2] += (upper * (1 - (y - i0)) + lower * (y - i0)) / 4
    return result


@pytest.mark.parametrize(
    ("side", "level"), [(56, 0), (112, 1), (158.4, 1), (159, 1), (224, 2), (448, 3), (2000, 3), (1, 0)]
)
def test_the_level_of_a_region(side: float, level: int) -> None:
    head = network("regions").mask_head
    assert isinstance(head, RegionMasks)
    levels = [torch.full((1, 1, 2048 // stride, 2048 // stride), float(n)) for n, stride in enumerate((4, 8, 16, 32))]
    half = side * head.margin / 2
    rois = torch.tensor([[0, 1024 - half, 1024 - half, 1024 + half, 1024 + half]])
    found = region_features(levels, rois, strides=head.strides, size=head.size, margin=head.margin)
    assert float(found.max()) == level


def test_one_query_for_each_instance_of_a_head_with_regions(root: Path) -> None:
    config = config_of(root, "regions", **SUPERVISION["full"])
    (batch,) = first_batches(config, 1)
    plan = fresh_step(config).plan(batch)
    assert int(plan.quotas.max()) == 1
    assert (
        int(
            fresh_step(config_of(root, "rays", **SUPERVISION["full"]))
            .plan(first_batches(config_of(root, "rays", **SUPERVISION["full"]), 1)[0])
            .quotas.max()
        )
        > 1
    )
