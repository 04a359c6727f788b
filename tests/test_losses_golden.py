"""The losses and their gradients against the reference's numbers (tests/golden/README.md), to 1e-5 or better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from semiseg.losses.affinity import affinity_edges, colour_affinity, downsample_images, neighbour_offsets, rgb_to_lab
from semiseg.losses.boxinst import box_cells, cell_profiles, edge_counts, pairwise_loss, projection_loss
from semiseg.losses.detection import detection_losses, generalised_iou
from semiseg.losses.dice import dice_loss
from semiseg.structures.outputs import Assignment, DenseOutputs, Locations

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"losses_{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """The largest difference, relative to the largest expected number (losses and gradients near 0 have no scale)."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().double()
    assert (actual.detach().double() - expected.double()).abs().max() <= tolerance * scale


def with_gradient(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def test_golden_files_are_small() -> None:
    files = sorted(GOLDEN.glob("losses_*.npz"))
    assert len(files) == 6
    assert max(file.stat().st_size for file in files) <= 50_000


def test_boxes_on_the_grid() -> None:
    golden = load("masks")
    cells = box_cells(golden["boxes_xyxy"], stride=4, grid_hw=(40, 52))
    rows, columns = cell_profiles(cells, (40, 52))
    assert torch.equal(rows[:, :, None] & columns[:, None, :], golden["bitmasks"])
    assert cells[4].tolist() == [15, 15, 15, 15]  # the box without a cell


def test_projection_and_dice() -> None:
    golden = load("masks")
    cells = box_cells(golden["boxes_xyxy"], stride=4, grid_hw=(40, 52))[golden["picked"]]
    logits = with_gradient(golden["logits"])
    loss = projection_loss(logits, cells)
    assert_close(loss, golden["projection"])
    assert loss[2] == 2
    (gradient,) = torch.autograd.grad(loss.sum() / 6, logits)
    assert_close(gradient, golden["projection_grad"])
    loss = dice_loss(logits, golden["bitmasks"][golden["picked"]])
    assert_close(loss, golden["dice"])
    (gradient,) = torch.autograd.grad(loss.sum() / 6, logits)
    assert_close(gradient[:2], golden["dice_grad"])


@pytest.mark.parametrize(
    ("key", "size", "dilation"), [("k3d2_bottom0", 3, 2), ("k3d1_bottom5", 3, 1), ("k5d1_bottom5", 5, 1)]
)
@pytest.mark.parametrize("instance", [0, 3, 5])
def test_pairwise_gradient(key: str, size: int, dilation: int, instance: int) -> None:
    golden = load("pairwise")
    row0, _, column0, _ = golden[f"window{instance}"].tolist()
    cells = box_cells(golden["boxes_xyxy"], stride=4, grid_hw=(40, 52))[[instance]]
    cells = cells - torch.tensor([row0, row0, column0, column0])
    logits = with_gradient(golden[f"logits{instance}"][None])
    used = golden[f"edges{instance}_{key}"][None]  # in the window only those with their centre in the box
    sums, counts = pairwise_loss(logits, cells, used, torch.tensor([0]), size=size, dilation=dilation)
    assert counts.tolist() == [int(used.sum())] == edge_counts(cells, used, torch.tensor([0])).tolist()
    (gradient,) = torch.autograd.grad(sums.sum() / golden[f"total_edges_{key}"], logits)
    assert_close(gradient[0], golden[f"grad{instance}_{key}"])


@pytest.mark.parametrize("kind", ["edge", "extreme"])
def test_pairwise_value_of_every_edge(kind: str) -> None:
    golden = load("pairwise")
    values, logits = golden[f"{kind}_values"], golden[f"{kind}_logits" if kind == "extreme" else "edge_values_logits"]
    height, width = logits.shape
    whole = torch.tensor([[0, height, 0, width]])
    checked = 0
    for k, (dy, dx) in enumerate(neighbour_offsets(3, 2)):
        for i, j in ((i, j) for i in range(height) for j in range(width)):
            if not (0 <= i + dy < height and 0 <= j + dx < width) or (i + j) % 3:
                continue  # a third of the edges, in every direction, is enough
            one = torch.zeros(1, 8, height, width, dtype=torch.bool)
            one[0, k, i, j] = True
            loss, _ = pairwise_loss(logits[None], whole, one, torch.tensor([0]), size=3, dilation=2)
            assert loss.item() == pytest.approx(values[k, i, j].item(), rel=1e-6, abs=1e-35)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("file", "size", "dilation", "bottom"),
    [("affinity", 3, 2, 0), ("affinity", 3, 2, 5), ("affinity_wide", 3, 1, 0), ("affinity_wide", 5, 1, 5)],
)
def test_colour_affinity(file: str, size: int, dilation: int, bottom: int) -> None:
    golden = load(file)
    image = golden["image_rgb"].permute(2, 0, 1)[None]
    size_hw = torch.tensor([image.shape[-2:]])
    bottom_rows = torch.tensor([bottom])
    expected = golden[f"k{size}d{dilation}_bottom{bottom}"]
    actual = colour_affinity(image, size_hw, bottom_rows, stride=4, size=size, dilation=dilation)[0]
    edges = affinity_edges(image, size_hw, bottom_rows, stride=4, size=size, dilation=dilation, threshold=0.3)[0]
    margin = size // 2 * dilation  # the file's image ends there, the reference's went on
    assert_close(actual[:, margin:, margin:], expected[:, margin:, margin:])
    assert torch.equal(edges[:, margin:, margin:], expected[:, margin:, margin:] >= 0.3)
    assert torch.equal(
        actual == 0,
        ~affinity_edges(image, size_hw, bottom_rows, stride=4, size=size, dilation=dilation, threshold=0)[0],
    )


def test_lab() -> None:
    golden = load("affinity")
    pooled = downsample_images(golden["image_rgb"].permute(2, 0, 1)[None], stride=4)
    assert_close(rgb_to_lab(pooled)[0], golden["lab"], 1e-7)


def dense(class_logits: Tensor, box_distances: Tensor, centreness_logits: Tensor) -> DenseOutputs:
    count = class_logits.shape[1]
    places = Locations(torch.zeros(count, 2), torch.ones(count), torch.zeros(count, dtype=torch.int64), counts=(count,))
    return DenseOutputs(class_logits, box_distances, centreness_logits, locations=places)


def test_generalised_iou() -> None:
    golden = load("fcos")
    predicted = with_gradient(golden["iou_pred"])
    value = generalised_iou(predicted, golden["iou_target"])
    assert_close(value, golden["gious"])
    loss = ((1 - value) * golden["iou_weight"]).sum()
    assert_close(loss, golden["giou_loss"])
    assert_close(torch.autograd.grad(loss, predicted)[0], golden["giou_grad"])


def test_focal() -> None:
    golden = load("focal")
    logits, targets = with_gradient(golden["logits"][None]), golden["targets"]
    row, label = targets.nonzero().unbind(1)
    assert len(row) == len(row.unique())  # one class per location, as the detector has it
    zeros = torch.zeros(len(row), 4) + 1
    assignment = Assignment(
        torch.zeros_like(row), row, torch.arange(len(row)), zeros, zeros[:, 0], torch.zeros(1, 50, dtype=torch.bool)
    )
    outputs = dense(logits, torch.ones(1, 50, 4), torch.zeros(1, 50))
    loss = detection_losses(outputs, assignment, label)["classification"]
    assert_close(loss, golden["sum"])
    assert_close(torch.autograd.grad(loss, logits)[0][0], golden["grad"])


def test_detector() -> None:
    golden = load("fcos")
    positives = len(golden["reg"])
    assert positives == 72
    class_logits = with_gradient(golden["top_logits"][None])
    box, centreness = with_gradient(golden["reg"][None]), with_gradient(golden["ctr"][None])
    index = torch.arange(positives)
    none_ignored = torch.zeros(1, positives, dtype=torch.bool)
    everywhere = torch.zeros(1, positives, 80)
    assignment = Assignment(
        torch.zeros_like(index), index, index, golden["reg_targets"], golden["centreness"], none_ignored
    )
    labels = torch.zeros(positives, dtype=torch.int64)
    loss = detection_losses(dense(everywhere, box, centreness), assignment, labels)
    box_loss = loss["box"] / golden["centreness"].sum()
    centreness_loss = loss["centreness"] / positives
    assert_close(box_loss, golden["loss_loc"])
    assert_close(centreness_loss, golden["loss_ctr"])
    assert_close(torch.autograd.grad(box_loss, box)[0][0], golden["reg_grad"])
    assert_close(torch.autograd.grad(centreness_loss, centreness)[0][0], golden["ctr_grad"])
    labels = golden["top_labels"]
    (index,) = torch.where(labels != 80)
    count = len(labels)
    ones = torch.ones(len(index), 4)
    assignment = Assignment(
        torch.zeros_like(index), index, index, ones, ones[:, 0], torch.zeros(1, count, dtype=torch.bool)
    )
    outputs = dense(class_logits, torch.ones(1, count, 4), torch.zeros(1, count))
    class_loss = detection_losses(outputs, assignment, labels)["classification"] / positives
    assert_close(torch.autograd.grad(class_loss, class_logits)[0][0], golden["top_grad"])
