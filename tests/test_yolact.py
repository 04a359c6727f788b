"""YOLACT's detector beside a plain network of its released names, plain loops and known values; its losses' goldens."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.config.model import AnchorDetector
from semiseg.data.transforms import Resize
from semiseg.engine.predict import LoadedModel
from semiseg.errors import UserError
from semiseg.interop.yolact import CLASSES, convert_state
from semiseg.models.detectors.anchors import fast_nms, square_anchors
from semiseg.models.masks.prototypes import inside_parts
from tests.tiny import tiny_config

GOLDEN = Path(__file__).parent / "golden"
SIDE, SCALES = 110, (1.0, 0.5**0.5, 2**0.5)  # a fifth of 550: levels of 14, 7, 4, 2 and 1 cells
NUM_CLASSES = 4


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
