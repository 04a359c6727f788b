"""When the benchmark calls two results the same: inputs without ties, and wrong gradients that must not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import growth, masks, step
from benchmarks import straightforward as plain
from benchmarks.measure import Result, Row, Worker

CPU = torch.device("cpu")
GRADIENTS = 20
STEP_OF_GROWTH = next(axis.row for axis in growth.AXES if axis.row.name == "step")


def test_no_two_sigmoids_tie_for_the_maximum_of_a_row_or_column() -> None:
    """At the largest size of the growth measurement; random numbers of the same deviation do tie there."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"instances": 8, "rows": 400, "columns": 608, "images": 2}
    quantiles = masks.loss_inputs(sizes, CPU)[0].detach()
    random = 2 * torch.randn(64, 400, 608, generator=generator)

    def ties(logits: torch.Tensor) -> int:
        largest = [logits.sigmoid().topk(2, dim=dim).values.unbind(dim) for dim in (1, 2)]
        return sum(int((first == second).sum()) for first, second in largest)

    assert ties(quantiles) == 0
    assert ties(random) > 0
    assert quantiles.std().item() == pytest.approx(2, rel=1e-3)
    assert not torch.equal(quantiles[0], quantiles[1])


def test_everything_before_a_relu_of_the_dynamic_head_is_exact() -> None:
    """In float32, at the sizes of the row: the same numbers as in float64, so no sign depends on rounding."""
    sizes = {**masks.DYNAMIC_HEAD.sizes, "instances": 5}
    features, filters, image_index, location_xy, coordinate_range, _ = masks.head_inputs(sizes, CPU)
    rows, columns = torch.meshgrid(torch.arange(sizes["rows"]), torch.arange(sizes["columns"]), indexing="ij")
    cells = torch.stack((columns, rows)) * masks.FEATURE_STRIDE + masks.FEATURE_STRIDE // 2

    def before_relus(dtype: torch.dtype) -> list[torch.Tensor]:
        relative = (location_xy.to(dtype)[:, :, None, None] - cells) / coordinate_range.to(dtype)[:, None, None, None]
        maps = torch.cat((relative, features.detach().to(dtype)[image_index]), dim=1)
        widths = [maps.shape[1], masks.DYNAMIC_CHANNELS, masks.DYNAMIC_CHANNELS, 1]
        weights, biases = plain.cut_filters(filters.detach().to(dtype), widths)
        seen = []
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            seen.append(torch.einsum("noi,nihw->nohw", weight, maps) + bias[:, :, None, None])
            maps = seen[-1].relu()
        return seen

    for single, double in zip(before_relus(torch.float32), before_relus(torch.float64), strict=True):
        assert torch.equal(single.double(), double)
        assert double.std() > 0.5


@pytest.mark.parametrize("row", [masks.MASK_LOSSES, masks.DYNAMIC_HEAD], ids=lambda row: row.name)
def test_a_few_wrong_cells_and_a_wrong_row_do_not_pass(row: Row, tmp_path: Path) -> None:
    worker = Worker(row, "straightforward", row.sizes_at("tiny"), tmp_path)
    worker.measure()
    right = worker.result()
    name = "gradient" if "gradient" in right else "features"
    largest = np.abs(right[name]).max()
    assert row.agree(right, right)
    cells = right[name].copy()
    cells[..., 3, 4:6] += 1e-3 * largest
    assert not row.agree({**right, name: cells}, right)
    line = right[name].copy()
    line[0, ..., 3, :] = 0
    assert not row.agree({**right, name: line}, right)


def steps(**distances: float) -> tuple[Result, Result]:
    """Ours and the straightforward result of a step with 20 gradients; `first` and `most` are relative distances."""
    sums = np.random.default_rng(0).normal(size=(GRADIENTS, step.SUMS_PER_GRADIENT))
    sums *= np.logspace(-6, 3, GRADIENTS)[:, None]  # each counts in its own norm
    moved = sums.copy()
    moved[0] *= 1 + distances.get("first", 0.0)
    moved[1 : GRADIENTS // 2 + 2] *= 1 + distances.get("most", 0.0)
    losses, names = np.ones(5), [str(number) for number in range(GRADIENTS)]
    changed = losses.copy()
    changed[4] += distances.get("loss", 0.0)
    return {"losses": changed, "names": names, "sums": moved}, {"losses": losses, "names": names, "sums": sums}


def test_one_relu_near_0_passes_and_a_wrong_step_does_not() -> None:
    own, small = step.STEP.agree, STEP_OF_GROWTH.agree
    assert own(*steps(first=0.009, most=0.0019, loss=9e-6))
    assert small(*steps(first=0.029, most=0.0019, loss=9e-6))
    assert not own(*steps(first=0.011))
    for wrong in ({"first": 0.031}, {"first": -0.05}, {"most": 0.0021}, {"loss": 1.1e-5}, {"first": np.nan}):
        assert not small(*steps(**wrong)), wrong
    ours, straightforward = steps()
    assert not small({**ours, "names": ours["names"][::-1]}, straightforward)
    straightforward["sums"][3] = 0  # a level without positives: its gradient must be 0 on both sides
    assert not small(ours, straightforward)
    ours["sums"][3] = 0
    assert small(ours, straightforward)


def test_few_wrong_numbers_of_a_large_gradient_show_in_its_sums() -> None:
    """The distance of the sums is about that of the gradients."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(256, 128, 3, 3, generator=generator)
    for channels in (1, 16, 256):
        changed = gradient.clone()
        changed[:channels] = 0
        right, sums = step.signed_sums(gradient), step.signed_sums(changed)
        distance = ((sums - right).norm() / right.norm()).item()
        assert distance == pytest.approx(((changed - gradient).norm() / gradient.norm()).item(), rel=0.4)
        assert distance > 0.03
    small = torch.randn(5, 3, generator=generator)
    assert torch.equal(step.signed_sums(small).abs()[:15].float(), small.flatten().abs())
    assert not step.signed_sums(torch.zeros(0)).any()
