"""Colour affinity: against the straightforward formulation, for every offset, with padding and bottom rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import straightforward as plain
from semiseg.losses.affinity import (
    SRGB_TO_XYZ,
    WHITE_XYZ,
    affinity_edges,
    colour_affinity,
    downsample_images,
    neighbour_inside,
    neighbour_offsets,
    rgb_to_lab,
)
from semiseg.structures.inputs import pad_images


def random_images(*sizes_hw: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes_hw]


def test_offsets_are_row_major_and_opposite() -> None:
    assert neighbour_offsets(3, 2) == [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]
    for size in (3, 5, 7):
        offsets = neighbour_offsets(size, 3)
        assert len(offsets) == size**2 - 1
        assert [(-dy, -dx) for dy, dx in offsets] == offsets[::-1]


def test_lab_of_known_colours() -> None:
    # L 100 for white, 0 for black; the textbook values of sRGB's red and blue at D65.
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=torch.uint8)
    lab = rgb_to_lab(colours.T[None, :, :, None])[0, :, :, 0].T
    expected = torch.tensor([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    torch.testing.assert_close(lab, expected, atol=0.02, rtol=0)
    assert lab.dtype == torch.float32


def test_pooling_truncates_and_takes_padding_as_black() -> None:
    image = torch.full((1, 3, 4, 6), 7, dtype=torch.uint8)
    image[:, :, 0, 0] = (
        10  # mean of the first block (15*7 + 10) / 16 = 7.19 -> 7; of the second, half padding: 3.5 -> 3
    )
    assert downsample_images(image, stride=4).tolist() == [[[[7, 3]]] * 3]


@pytest.mark.parametrize(("stride", "size", "dilation"), [(4, 3, 2), (2, 3, 1), (2, 5, 2), (1, 3, 1)])
def test_equals_the_straightforward_formulation(stride: int, size: int, dilation: int) -> None:
    sizes = [(13 * stride // 2, 9 * stride), (8 * stride, 7 * stride + 1)]
    images, sizes_hw = pad_images(random_images(*sizes), 4 * stride)
    # Colours close together, so that affinities are spread over (0, 1) and not all 0.
    images = images // 24 + 100 * (images > 0)
    bottom = torch.tensor([0, stride + 1])
    similar = colour_affinity(images, sizes_hw, bottom, stride=stride, size=size, dilation=dilation)
    grid_hw = (similar.shape[2], similar.shape[3])
    inside = neighbour_inside(sizes_hw, bottom, stride=stride, grid_hw=grid_hw, size=size, dilation=dilation)
    edges = affinity_edges(images, sizes_hw, bottom, stride=stride, size=size, dilation=dilation, threshold=0.3)
    for b, size_hw in enumerate(sizes):
        expected = plain.similarity(
            images[b], size_hw, bottom=int(bottom[b]), stride=stride, size=size, dilation=dilation
        )
        assert torch.equal(inside[b], expected > 0)
        assert 0.05 < (expected > 0.3).double().mean() < 0.95, "a case with both kinds of edges"
        torch.testing.assert_close(similar[b].double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(edges[b], expected >= 0.3)


def test_threshold_zero_keeps_every_inner_edge_and_no_other() -> None:
    images, sizes_hw = pad_images(random_images((30, 21), (17, 32)), 32)
    bottom = torch.tensor([3, 0])
    edges = affinity_edges(images, sizes_hw, bottom, stride=2, size=3, dilation=2, threshold=0)
    inside = neighbour_inside(sizes_hw, bottom, stride=2, grid_hw=(16, 16), size=3, dilation=2)
    assert torch.equal(edges, inside)
    # Only neighbours are judged: the last row of cells (31 px, below 30 - 3) still has its neighbours above.
    assert inside[0, 1, 15].sum() == 0
    assert inside[0, 1, 14].sum() == 10  # row 12 is pixel 25 < 27; columns 0..9 are pixels 1..19 < 21: 10 of them
    assert inside[0, 6].any(1).tolist() == [True] * 11 + [False] * 5  # two below: rows 2..12


def test_an_image_does_not_see_the_others_of_its_batch() -> None:
    images = random_images((24, 40), (32, 16))
    together, sizes_hw = pad_images(images, 8)
    bottom = torch.zeros(2, dtype=torch.int64)
    both = colour_affinity(together, sizes_hw, bottom, stride=4, size=3, dilation=2)
    for b, image in enumerate(images):
        alone, size_hw = pad_images([image], 8)
        single = colour_affinity(alone, size_hw, bottom[:1], stride=4, size=3, dilation=2)
        height, width = single.shape[2:]
        assert torch.equal(both[b, :, :height, :width], single[0])
        assert both[b].sum() == both[b, :, : height + 2, : width + 2].sum()


def test_grid_smaller_than_the_step() -> None:
    images, sizes_hw = pad_images(random_images((8, 4)), 4)
    similar = colour_affinity(images, sizes_hw, torch.zeros(1, dtype=torch.int64), stride=4, size=3, dilation=3)
    assert similar.shape == (1, 8, 2, 1)
    assert not similar.any()


def test_lab_of_dark_colours_is_on_the_straight_part_of_its_curve() -> None:
    """Below (6/29)^3 of white the cube root is replaced by a line: CIE's own fractions, 24389/27 and 216/24389."""
    dark = torch.tensor([[1, 1, 1], [5, 5, 5], [9, 9, 9], [0, 0, 20], [15, 0, 0]], dtype=torch.uint8)
    found = rgb_to_lab(dark.T[None, :, :, None])[0, :, :, 0].T
    linear = dark.double() / 255 / 12.92
    linear[dark > 10] = ((dark[dark > 10].double() / 255 + 0.055) / 1.055) ** 2.4
    xyz = linear @ torch.tensor(SRGB_TO_XYZ, dtype=torch.float64).T / torch.tensor(WHITE_XYZ, dtype=torch.float64)
    assert float(xyz.max()) < 216 / 24389
    x, y, z = (24389 / 27 * xyz / 116 + 16 / 116).unbind(1)
    expected = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-4)  # 7.787 has four digits
