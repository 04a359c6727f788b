"""The dynamic mask head and aligned upsampling: the reference's numbers, and the straightforward formulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import straightforward as plain
from semiseg.models.masks.dynamic import dynamic_masks, filter_shapes, num_filter_numbers
from semiseg.models.upsample import aligned_upsample

GOLDEN = Path(__file__).parent / "golden"
RANGES = torch.tensor([64.0, 128.0, 256.0, 512.0, 1024.0])


def load(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


@pytest.mark.parametrize(("name", "mask_channels", "numbers"), [("condinst", 8, 169), ("boxinst", 16, 233)])
def test_equals_the_reference(name: str, mask_channels: int, numbers: int) -> None:
    golden = load(f"model_dynamic_head_{name}")
    shapes = filter_shapes(mask_channels, 8, 3)
    assert num_filter_numbers(shapes) == numbers == golden["filters"].shape[1]
    features = golden["mask_features"].requires_grad_()
    logits = dynamic_masks(
        features,
        golden["filters"],
        golden["image_index"],
        golden["location_xy"],
        RANGES[golden["level"]],
        shapes=shapes,
        stride=8,
    )
    logits = aligned_upsample(logits[:, None], 2)[:, 0]
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-5, atol=2e-6)
    (logits * golden["upstream"]).sum().backward()
    assert features.grad is not None
    # the stored maps are cut out of larger ones: the last row and column also feed cells beyond the cut
    torch.testing.assert_close(features.grad[:, :, :-1, :-1], golden["grad_mask_features"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_equals_the_plain_head_with_its_gradients(num_layers: int) -> None:
    generator = torch.Generator().manual_seed(num_layers)
    shapes = filter_shapes(5, 4, num_layers)
    features = torch.randn(3, 5, 6, 7, generator=generator, dtype=torch.float32).requires_grad_()
    filters = torch.randn(8, num_filter_numbers(shapes), generator=generator).requires_grad_()
    image_index = torch.tensor([2, 0, 2, 0, 2, 0, 0, 2])  # unsorted, and image 1 has none
    location = torch.rand(8, 2, generator=generator) * 50
    range_ = RANGES[torch.arange(8) % 5]
    upstream = torch.randn(8, 6, 7, generator=generator)
    logits = dynamic_masks(features, filters, image_index, location, range_, shapes=shapes, stride=8)
    gradients = torch.autograd.grad((logits * upstream).sum(), [features, filters])
    exact = (features.detach().double().requires_grad_(), filters.detach().double().requires_grad_())
    places = (image_index, location.double(), range_.double())
    expected = plain.dynamic_masks(*exact, *places, channels=4, layers=num_layers, stride=8)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), exact)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=float(wanted.abs().max()) * 1e-5)
    assert not gradients[0][1].any()


def test_no_queries_give_an_empty_map_on_the_graph() -> None:
    shapes = filter_shapes(4, 8, 3)
    features = torch.randn(2, 4, 6, 7, requires_grad=True)
    filters = torch.randn(0, num_filter_numbers(shapes), requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    logits = dynamic_masks(features, filters, none, torch.zeros(0, 2), torch.zeros(0), shapes=shapes, stride=8)
    logits = aligned_upsample(logits[:, None], 2)[:, 0]
    assert logits.shape == (0, 12, 14)
    logits.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()
    assert filters.grad is not None


def test_under_autocast_the_head_keeps_float32() -> None:
    shapes = filter_shapes(8, 8, 3)
    generator = torch.Generator().manual_seed(0)
    features, filters = torch.randn(1, 8, 10, 160, generator=generator), torch.randn(3, 169, generator=generator)
    arguments = (features, filters, torch.zeros(3).long(), torch.tensor([[1270.0, 40.0]] * 3), RANGES[[0, 0, 0]])
    expected = dynamic_masks(*arguments, shapes=shapes, stride=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dynamic_masks(*arguments, shapes=shapes, stride=8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_upsampling_equals_the_reference() -> None:
    golden = load("model_aligned_upsample")
    for factor in (2, 4):
        maps = golden["maps"].clone().requires_grad_()
        result = aligned_upsample(maps, factor)
        torch.testing.assert_close(result, golden[f"out_{factor}"], rtol=1e-6, atol=1e-6)
        (result * golden[f"upstream_{factor}"]).sum().backward()
        torch.testing.assert_close(maps.grad, golden[f"grad_{factor}"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        aligned_upsample(golden["maps"], 8)[..., :40, :40], golden["out_8"], rtol=1e-6, atol=1e-6
    )


def test_upsampling_keeps_cells_on_their_pixels() -> None:
    """Cell i of stride 4 is pixel 4i + 2: a map that says its own pixel says it after upsampling, up to the border."""
    rows = (torch.arange(6) * 4.0 + 2).view(1, 1, 6, 1).expand(1, 1, 6, 5)
    result = aligned_upsample(rows, 4)[0, 0, :, 0]
    assert result.tolist() == [2.0] * 2 + list(range(2, 22)) + [22.0, 22.0]


def test_upsampling_by_one_and_of_one_cell() -> None:
    maps = torch.randn(2, 3, 1, 1)
    assert aligned_upsample(maps, 1) is maps
    torch.testing.assert_close(aligned_upsample(maps, 4), maps.expand(2, 3, 4, 4), rtol=0, atol=0)
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    for factor in (2, 3, 4):
        assert torch.autograd.gradcheck(lambda value, factor=factor: aligned_upsample(value, factor), [maps])
