"""YOLACT's detector beside a plain network of its released names, plain loops and known values; its losses' goldens."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.config.model import AnchorDetector
from semiseg.config.read import merge
from semiseg.data.transforms import Resize
from semiseg.engine.anchor_step import semantic_targets
from semiseg.engine.build import build_step
from semiseg.engine.predict import LoadedModel
from semiseg.engine.predict_files import PredictOptions, predict_files
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from semiseg.interop.yolact import CLASSES, convert_state
from semiseg.losses.anchors import box_loss, class_loss, hardest_background, semantic_loss
from semiseg.losses.boxinst import cell_profiles
from semiseg.losses.regions import crop_cells
from semiseg.models.detectors.anchor_targets import AnchorAssignment, assign_squares, best_free_anchors
from semiseg.models.detectors.anchors import WEIGHTS, fast_nms, square_anchors
from semiseg.models.detectors.boxes import decode_boxes
from semiseg.models.masks.prototypes import inside_parts
from semiseg.structures.grids import Regions
from semiseg.structures.inputs import Targets
from tests.distributed_worker import LEARNED
from tests.test_train import first_batches, fresh_step, losses_and_gradients
from tests.tiny import DETECTORS, nested, tiny_config

GOLDEN = Path(__file__).parent / "golden"
SIDE, SCALES = 110, (1.0, 0.5**0.5, 2**0.5)  # a fifth of 550: levels of 14, 7, 4, 2 and 1 cells
NUM_CLASSES = 4
CPU = torch.device("cpu")


# The network ---------------------------------------------------------------------------------------------------------


def released(num_classes: int) -> dict[str, Tensor]:
    """A checkpoint with the names of released ones, its weights such that there are many detections."""
    shapes = json.loads(gzip.decompress((GOLDEN / "yolact_keys_r50.json.gz").read_bytes()))
    generator = torch.Generator().manual_seed(4)
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        if "conf_layer" in key:
            shape = [3 * (num_classes + 1), *shape[1:]]
        if "semantic_seg_conv" in key:
            shape = [num_classes, *shape[1:]]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif key.endswith("running_var") or ((".bn" in key or "downsample.1" in key) and key.endswith("weight")):
            scale = 0.3 if "bn3.weight" in key else 1.0
            state[key] = scale * (0.5 + torch.rand(shape, generator=generator))
        else:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 400
            factor = {"conf_": 0.2, "bbox_": 0.1, "mask_": 0.05, "10": 0.2}.get(key.split(".")[-2][:5], 1.4)
            state[key] = torch.randn(shape, generator=generator) * (factor / math.sqrt(fan_in))
    return state


def plain_network(state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """The released network, written down from its key names: classes, boxes, weights of prototypes, prototypes."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"])

    mean, std = torch.tensor([123.68, 116.78, 103.94]), torch.tensor([58.4, 57.12, 57.38])
    x = (image.float() - mean[:, None, None]) / std[:, None, None]
    x = F.max_pool2d(norm(conv(x[None], "backbone.conv1", 2), "backbone.bn1").relu(), 3, 2, 1)
    maps = []
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            name, stride = f"backbone.layers.{stage}.{block}", 2 if stage and not block else 1
            y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2").relu()
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            shortcut = x if block else norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (y + shortcut).relu()
        maps.append(x)
    levels: list[Tensor] = []
    merged = x
    for number, feature in enumerate(maps[:0:-1]):
        lateral = conv(feature, f"fpn.lat_layers.{number}")
        merged = lateral + F.interpolate(merged, lateral.shape[-2:], mode="bilinear") if number else lateral
        levels.insert(0, conv(merged, f"fpn.pred_layers.{number}").relu())
    for number in range(2):
        levels.append(conv(levels[-1], f"fpn.downsample_layers.{number}", 2))
    x = levels[0]
    for number in (0, 2, 4):
        x = conv(x, f"proto_net.{number}").relu()
    x = conv(F.interpolate(x, scale_factor=2, mode="bilinear").relu(), "proto_net.8").relu()
    result = {"prototypes": conv(x, "proto_net.10").relu()[0]}
    towers = [conv(level, "prediction_layers.0.upfeature.0").relu() for level in levels]
    for name, numbers in (("conf", NUM_CLASSES + 1), ("bbox", 4), ("mask", 32)):
        each = [conv(tower, f"prediction_layers.0.{name}_layer") for tower in towers]
        result[name] = torch.cat([one[0].permute(1, 2, 0).reshape(-1, numbers) for one in each])
    return result


def plain_detections(state: dict[str, Tensor], image: Tensor, output_hw: tuple[int, int]) -> list[tuple[Any, ...]]:
    """(score, label, box, mask) in the output's pixels, best first, by loops over anchors and classes."""
    said = plain_network(state, image)
    anchors = [
        ((column + 0.5) / cells, (row + 0.5) / cells, side * scale / SIDE)
        for cells, side in zip((14, 7, 4, 2, 1), (4, 9, 19, 38, 76), strict=True)
        for row in range(cells)
        for column in range(cells)
        for scale in SCALES
    ]
    x, y, side = torch.tensor(anchors).T
    dx, dy, dw, dh = said["bbox"].T
    x, y = x + 0.1 * dx * side, y + 0.1 * dy * side
    width, height = side * (0.2 * dw).exp(), side * (0.2 * dh).exp()
    boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)
    scores = said["conf"].softmax(1)[:, 1:]
    candidates = [number for number in range(len(boxes)) if scores[number].max() > 0.05]
    found = []
    for label in range(NUM_CLASSES):
        best = sorted(candidates, key=lambda number: -float(scores[number, label]))[:200]
        overlap = box_iou(boxes[best], boxes[best])
        for rank, number in enumerate(best):
            if not (overlap[rank, :rank] > 0.5).any():
                found.append((float(scores[number, label]), label, number))
    result = []
    size = torch.tensor([output_hw[1], output_hw[0]] * 2)
    for score, label, number in sorted(found, reverse=True)[:100]:
        mask = torch.einsum("k,khw->hw", said["mask"][number].tanh(), said["prototypes"]).sigmoid()
        rows, columns = mask.shape
        for row in range(rows):
            for column in range(columns):
                left, top, right, bottom = (boxes[number] * torch.tensor([columns, rows] * 2)).tolist()
                if not (left - 1 <= column < right + 1 and top - 1 <= row < bottom + 1):
                    mask[row, column] = 0
        mask = F.interpolate(mask[None, None], output_hw, mode="bilinear")[0, 0] > 0.5
        result.append((score, label, torch.minimum((boxes[number] * size).clamp(min=0), size), mask))
    return result


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], LoadedModel]:
    """A released checkpoint and our network, converted from its file by the command."""
    folder = tmp_path_factory.mktemp("yolact")
    state = released(NUM_CLASSES)
    torch.save(state, folder / "yolact.pth")
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(NUM_CLASSES)]
    images = [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}]
    (folder / "classes.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    arguments = ["convert", "yolact", str(folder / "yolact.pth"), str(folder / "model"), "--side", str(SIDE)]
    told = CliRunner().invoke(app, [*arguments, "--annotations", str(folder / "classes.json")])
    assert told.exit_code == 0, told.output
    assert "num_batches_tracked of frozen norms (53)" in told.output
    return state, semiseg.load_model(folder / "model", device="cpu")


def test_detections_and_masks_are_the_released_networks(both: tuple[dict[str, Tensor], LoadedModel]) -> None:
    state, ours = both
    generator = torch.Generator().manual_seed(5)
    image = (F.interpolate(torch.rand(1, 3, 12, 12, generator=generator), (SIDE, SIDE))[0] * 255).to(torch.uint8)
    assert ours.info.inference.stretch
    (found,) = semiseg.detect(ours, [image], output_sizes=[(90, 130)])
    with torch.no_grad():
        expected = plain_detections(state, image, (90, 130))
    score, label, box, mask = (list(part) for part in zip(*expected, strict=True))
    assert len(found) == len(expected) > 30
    boxes, masks = torch.stack(box), torch.stack(mask)
    distance = (found.boxes[None] - boxes[:, None]).abs().amax(2)
    distance[found.labels[None] != torch.tensor(label)[:, None]] = torch.inf
    partner = distance.argmin(1)
    assert len(set(partner.tolist())) == len(partner)
    assert float(distance.amin(1).max()) < 0.05
    torch.testing.assert_close(found.scores[partner], torch.tensor(score), rtol=0, atol=2e-4)
    assert int(masks.sum()) > 1000
    assert int((found.masks[partner] != masks).flatten(1).sum(1).max()) <= 4


def test_a_file_of_another_network_is_told() -> None:
    state = {key: value.to("meta") for key, value in released(2).items()}
    with pytest.raises(UserError, match=f"file: not a YOLACT with a ResNet: no key {CLASSES}; its first keys"):
        convert_state({"backbone.conv1.weight": state["backbone.conv1.weight"]}, side=550, where="file")
    more = {**state, "backbone.layers.1.0.conv2.conv_offset_mask.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"file: its keys are not those .* 1 unknown: backbone\.layers\.1\.0\.conv2"):
        convert_state(more, side=550, where="file")
    assert convert_state(state, side=700, where="file").config.detector == AnchorDetector(
        anchor_sides=[30, 61, 122, 244, 488]
    )


# Its parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "count"), [(550, 19248), (700, 30963)])
def test_anchors_of_the_released_networks(side: int, count: int) -> None:
    sizes = [(-(-side // stride),) * 2 for stride in (8, 16, 32, 64, 128)]
    sides = [size * side // 550 for size in (24, 48, 96, 192, 384)]
    anchors = square_anchors(sizes, (side, side), sides, SCALES, torch.device("cpu"))
    assert len(anchors) == count
    cells = sizes[0][0]
    for number, (row, column, scale) in {0: (0, 0, 0), 4: (0, 1, 1), 3 * cells + 2: (1, 0, 2)}.items():
        x, y = (column + 0.5) / cells * side, (row + 0.5) / cells * side
        half = sides[0] * SCALES[scale] / 2
        assert anchors[number].tolist() == pytest.approx([x - half, y - half, x + half, y + half], abs=1e-4)
    wide = square_anchors([(2, 3)], (20, 60), [8], [1.0], torch.device("cpu"))
    assert wide[5].tolist() == [46, 11, 54, 19]


def test_fast_nms_lets_dropped_boxes_drop_others() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [2.5, 0, 12.5, 10], [5, 0, 15, 10]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.2, 0.1, 0.3]])
    assert nms(boxes, scores[0], 0.5).tolist() == [0, 2]
    index, label, score = fast_nms(boxes, scores, threshold=0.5, per_class=2)
    assert list(zip(index.tolist(), label.tolist(), strict=True)) == [(0, 0), (2, 1), (0, 1)]
    assert score.tolist() == pytest.approx([0.9, 0.3, 0.2])
    index, label, _ = fast_nms(boxes, scores[:1], threshold=0.5, per_class=3)
    assert index.tolist() == [0]
    assert [len(part) for part in fast_nms(boxes[:0], scores[:, :0], threshold=0.5, per_class=3)] == [0, 0, 0]


def test_cells_beside_a_box_in_parts() -> None:
    inside = inside_parts(torch.tensor([[4.0, 1, 6, 2], [6, 2, 4, 1]]), (4, 8))
    assert torch.equal(inside[0], inside[1])
    assert inside[0].any(0).nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert inside[0].any(1).nonzero()[:, 0].tolist() == [0, 1, 2]


def test_stretched_images_have_one_size() -> None:
    chosen = Resize([64, 96], 70, stretch=True)
    assert {chosen((40, 100), seed).input_hw for seed in range(20)} == {(64, 64), (96, 96)}


@pytest.mark.parametrize("kind", ["dynamic", "rays", "regions"])
def test_anchors_have_no_other_mask_head(kind: str) -> None:
    with pytest.raises(UserError, match=f"detector 'anchors' weighs prototypes: .* must be 'prototypes', not '{kind}'"):
        tiny_config(Path(), model={"detector": {"kind": "anchors"}, "mask_head": {"kind": kind}})


@pytest.mark.parametrize("objective", [LEARNED, {"level_set": 1.0}])
def test_masks_in_parts_have_no_loss_of_whole_maps(objective: dict[str, Any]) -> None:
    config = tiny_config(Path(), model=DETECTORS["yolact"], objective=objective)
    with pytest.raises(UserError, match=r"needs .* whole images, not 'prototypes' with cells in parts"):
        build_step(config, num_classes=3)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"neck": {"form": "yolact", "coarse": "pool"}}, "form 'yolact' makes its coarse levels by convolutions"),
        ({"mask_head.cells": "parts", "mask_head.stride": 2}, "stride must be half of feature_stride"),
        ({"detector.anchor_sides": [8]}, "anchor_sides needs 3 values for 3 strides"),
        ({"detector.negative_iou": 0.6}, "negative_iou must not be above positive_iou"),
    ],
)
def test_what_does_not_fit_is_told(model: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_config(Path(), model=merge(DETECTORS["yolact"], nested(model)))


def test_it_trains_and_is_evaluated_on_stretched_images_of_odd_size(tmp_path: Path) -> None:
    """70 pixels have levels of 9, 5 and 3 cells and masks of 18 x 18; nothing is padded."""
    sides: dict[str, Any] = {
        "data": {"short_sides": [70], "stretch": True},
        "inference": {"short_side": 70, "stretch": True},
    }
    config = tiny_config(tmp_path, model=DETECTORS["yolact"], optim={"steps": 2}, **sides)
    (batch,) = first_batches(config, 1)
    assert batch.images.shape[-2:] == (70, 70)
    result = execute_run(config, out=tmp_path / "run", progress=False)
    assert result is not None
    loaded = semiseg.load_model(tmp_path / "run", device="cpu")
    outputs = loaded.network(batch.images[:1], batch.image_sizes_hw[:1])
    assert outputs.mask_inputs.prototypes.shape[-2:] == (18, 18)
    Image.new("RGB", (100, 40)).save(tmp_path / "wide.png")
    options = PredictOptions(
        short_side=70, long_side=70, stretch=True, score_threshold=0.0, drawn_score=None, batch_size=1, workers=1
    )
    (tmp_path / "out").mkdir()
    predict_files(loaded, [tmp_path / "wide.png"], out=tmp_path / "out", options=options, progress=False, report=print)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found) > 0
    assert all(each["segmentation"]["size"] == [40, 100] for each in found)


def test_anchors_weigh_prototypes_of_any_kind_of_cells(tmp_path: Path) -> None:
    """With cells at pixels of the stride inputs are padded as for every other head, and edges may be learned."""
    head = {**DETECTORS["yolact"]["mask_head"], "cells": "strided"}
    config = tiny_config(tmp_path, model={**DETECTORS["yolact"], "mask_head": head}, objective=LEARNED)
    assert config.model.size_divisor == 32
    losses, _ = losses_and_gradients(fresh_step(config), first_batches(config, 1))
    assert torch.isfinite(losses).all()
    assert losses[-1] > 0


# Its losses, beside the released implementation's numbers -------------------------------------------------------------


def draw(key: str, *shape: int) -> Tensor:
    """The numbers that `golden/README.md` says are drawn for a key."""
    seed = zlib.crc32(f"yolact_loss_a.{key}".encode()) & 0xFFFFFFFF
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def golden_numbers() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "yolact_losses.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_numbers()


@pytest.fixture(scope="module")
def targets(golden: dict[str, np.ndarray]) -> Targets:
    return golden_targets(golden)


def golden_targets(golden: dict[str, np.ndarray]) -> Targets:
    """Two images of 160 x 160 pixels, every object with its mask; the last of the first image is a crowd."""
    boxes = [torch.from_numpy(golden[f"gt{image}_boxes_rel"]) * 160 for image in range(2)]
    labels = [torch.from_numpy(golden[f"gt{image}_labels"]) for image in range(2)]
    masks = [torch.from_numpy(np.unpackbits(golden[f"gt{image}_masks_packed"], axis=-1)) for image in range(2)]
    count = len(boxes[0]) - 1 + len(boxes[1])
    return Targets(
        boxes_xyxy=torch.cat([boxes[0][:-1], boxes[1]]),
        labels=torch.cat([labels[0][:-1], labels[1]]),
        image_index=torch.tensor([0] * (len(boxes[0]) - 1) + [1] * len(boxes[1])),
        supervision=torch.ones(count, dtype=torch.int64),
        masks=torch.cat([masks[0][:-1], masks[1]]).bool(),
        mask_instance=torch.arange(count),
        mask_weight=torch.ones(count),
        crowd_boxes_xyxy=boxes[0][-1:],
        crowd_image_index=torch.zeros(1, dtype=torch.int64),
        mask_stride=1,
    )


def assigned(targets: Targets) -> AnchorAssignment:
    sizes = [(cells, cells) for cells in (20, 10, 5, 3, 2)]
    return assign_squares(
        targets,
        sizes_hw=sizes,
        num_images=2,
        padded_hw=(160, 160),
        sides=(6, 13, 27, 55, 111),
        scales=SCALES,
        positive_iou=0.5,
        negative_iou=0.4,
        negatives=3,
    )


def close(found: Tensor, expected: np.ndarray) -> None:
    wanted = torch.from_numpy(np.asarray(expected))
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_matches_are_the_releaseds(golden: dict[str, np.ndarray], targets: Targets) -> None:
    found = assigned(targets)
    expected = torch.from_numpy(golden["conf_t"].astype(np.int64))
    label = torch.where(found.background, 0, -1)
    label[found.image_index, found.anchor_index] = targets.labels[found.instance_index] + 1
    assert torch.equal(label, expected)
    of_image = found.instance_index - 12 * found.image_index
    own = torch.from_numpy(golden["idx_t"].astype(np.int64))[found.image_index, found.anchor_index]
    assert torch.equal(of_image, own)
    close(found.deltas, golden["loc_t_positives"])
    assert found.negatives == tuple(3 * golden["num_pos"])


def test_losses_and_gradients_are_the_releaseds(golden: dict[str, np.ndarray], targets: Targets) -> None:
    found, count = assigned(targets), len(golden["conf_t"][0])
    place = (found.image_index, found.anchor_index)
    deltas = draw("loc", 2, count, 4).requires_grad_()
    box = box_loss(deltas[place], found.deltas) / len(place[0])
    box.backward()
    close(box, golden["loss_B"])
    assert deltas.grad is not None
    close(deltas.grad[place], golden["grad_B_loc_positives"])
    close(deltas.grad.norm(), golden["grad_B_loc_norm"])

    logits = 1.5 * draw("conf", 2, count, 81)
    logits[..., 0] += 3
    logits.requires_grad_()
    label = torch.from_numpy(golden["conf_t"].astype(np.int64)).clamp(min=0)
    learning = hardest_background(logits, found.background, found.negatives)
    learning[place] = True
    assert np.array_equal(np.packbits(learning.numpy(), axis=-1), golden["ohem_used"])
    of_class = class_loss(logits.flatten(0, 1), label.flatten(), learning.flatten()) / len(place[0])
    of_class.backward()
    close(of_class, golden["loss_C"])
    assert logits.grad is not None
    close(logits.grad[learning][::7], golden["grad_C_conf_used_every7"])
    close(logits.grad.norm(), golden["grad_C_conf_norm"])

    segments = draw("segm", 2, 80, 20, 20).requires_grad_()
    present, known = semantic_targets(replace(targets, crowd_boxes_xyxy=torch.zeros(1, 4)), segments, (160, 160))
    assert known.all()  # without the crowd's box: the released loss takes what is in it for background
    semantic = semantic_loss(segments, present, known) / 2
    semantic.backward()
    close(semantic, golden["loss_S"])
    assert segments.grad is not None
    every = segments.grad.numel() // 2048
    close(segments.grad.flatten()[::every][:512], golden["grad_S_segm_sub"])
    close(segments.grad.norm(), golden["grad_S_segm_norm"])


def test_boxes_crops_and_fast_nms_are_the_releaseds(golden: dict[str, np.ndarray], targets: Targets) -> None:
    anchors = square_anchors([(n, n) for n in (20, 10, 5, 3, 2)], (160, 160), (6, 13, 27, 55, 111), SCALES, CPU)
    boxes = decode_boxes(draw("loc", 2, len(anchors), 4)[0], anchors, WEIGHTS) / 160
    close(boxes[::11], golden["decode_image0_every11"])
    for name, given in (("ones", targets.boxes_xyxy[:4] / 160), ("odd", torch.from_numpy(golden["crop_odd_boxes"]))):
        inside = inside_parts(40 * given, (40, 40))
        if name == "ones":  # in training as in prediction
            grid = Regions(torch.tensor([[0.0, 0.0, 160.0, 160.0]]).expand(4, 4), (40, 40))
            rows, columns = cell_profiles(crop_cells(160 * given, grid)[0], (40, 40))
            assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])
        assert np.array_equal(np.packbits(inside.numpy(), axis=-1), golden[f"crop_{name}"])
    boxes, scores = (torch.from_numpy(golden[f"nms_{name}"]) for name in ("boxes", "scores"))
    index, label, _ = fast_nms(boxes, scores, threshold=0.5, per_class=200)
    assert len(index) == int(golden["nms_kept_fast_all_classes"]) == 413
    assert golden["nms_kept_ordinary_all_classes"] == 480
    assert index[:100].tolist() == golden["nms_out_index"].tolist()
    assert label[:100].tolist() == golden["nms_out_class"].tolist()


# What the released implementation has not ----------------------------------------------------------------------------


def test_every_object_has_an_anchor_the_best_pair_first() -> None:
    iou = torch.rand(5, 30, generator=torch.Generator().manual_seed(1))
    iou[2] = iou[0]
    pairs = sorted((-float(iou[g, a]), g, a) for g in range(5) for a in range(30))
    taken: dict[int, int] = {}
    for _, own, anchor in pairs:
        if own not in taken and anchor not in taken.values():
            taken[own] = anchor
    assert best_free_anchors(iou).tolist() == [taken[own] for own in range(5)]


def test_boxes_without_masks_and_crowds_are_not_background_of_the_map(targets: Targets) -> None:
    kept = torch.arange(20) % 3 > 0
    some = replace(
        targets,
        supervision=kept.long(),
        masks=targets.masks[kept],
        mask_instance=torch.nonzero(kept)[:, 0],
        mask_weight=torch.ones(int(kept.sum())),
    )
    present, known = semantic_targets(some, torch.zeros(2, 80, 20, 20), (160, 160))
    expected_present, expected_known = torch.zeros_like(present), torch.ones_like(known)
    centres = torch.arange(20) * 8 + 4.0

    def inside(box: Tensor) -> Tensor:
        x0, y0, x1, y1 = box
        rows, columns = ((centres >= low) & (centres <= high) for low, high in ((y0, y1), (x0, x1)))
        return torch.logical_and(rows[:, None], columns)

    expected_known[0, :, inside(targets.crowd_boxes_xyxy[0])] = False
    for number in range(20):
        image, label = int(targets.image_index[number]), int(targets.labels[number])
        if kept[number]:
            corners = [targets.masks[number, 3 + i :: 8, 3 + j :: 8].int() for i in range(2) for j in range(2)]
            expected_present[image, label] |= torch.stack(corners).sum(0) > 2
        else:
            expected_known[image, label, inside(targets.boxes_xyxy[number])] = False
    assert torch.equal(present, expected_present)
    assert torch.equal(known, expected_known | expected_present)
    assert not known.all()


def test_the_map_is_the_same_from_cells_and_from_encoded_masks(tmp_path: Path) -> None:
    found = []
    for cells in ({"cells": "parts"}, {"cells": "strided", "stride": 1}):
        head = {**DETECTORS["yolact"]["mask_head"], **cells}
        config = tiny_config(tmp_path, model={**DETECTORS["yolact"], "mask_head": head})
        (batch,) = first_batches(config, 1)
        assert batch.targets is not None
        assert (batch.targets.encoded is None) == (cells["cells"] == "strided")
        found.append(semantic_targets(batch.targets, torch.zeros(4, 16, 8, 8), (64, 64)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert 0 < int(found[0][0].sum()) < found[0][0].numel()
