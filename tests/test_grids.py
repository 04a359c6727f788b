"""Masks on regions: cells of given masks and boxes, edges and pasting, beside plain loops and the whole map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from torch import Tensor

from semiseg.data.dataset import Mask, _cells, _encoded
from semiseg.data.transforms import Geometry
from semiseg.losses.affinity import affinity_edges, neighbour_inside, neighbour_offsets
from semiseg.losses.boxinst import box_cells
from semiseg.losses.regions import region_cells, region_edges, region_inside
from semiseg.models.paste import paste_masks
from semiseg.structures.grids import Regions
from semiseg.structures.masks import EncodedMasks

ORIGINAL, INPUT = (30, 41), (48, 65)


def kept_masks() -> list[Mask]:
    """Outlines and run lengths, one of them empty, one that reaches the border."""
    random = np.random.default_rng(0)
    noise = random.random((3, *ORIGINAL)) < np.array([0.5, 0.0, 0.9])[:, None, None]
    noise[0, :, :3] = noise[0, :, -3:] = True
    encoded = [rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"] for mask in noise]
    polygons = [[[2.0, 3.0, 30.5, 4.0, 28.0, 25.0, 5.0, 20.0]], [[0.0, 0.0, 41.0, 0.0, 41.0, 30.0, 0.0, 30.0]]]
    return [
        encoded[0],
        polygons[0],
        encoded[1],
        polygons[1],
        encoded[2],
    ]


@pytest.mark.parametrize("flipped", [False, True])
def test_encoded_masks_have_the_cells_that_a_worker_samples(flipped: bool) -> None:
    geometry = Geometry(ORIGINAL, INPUT, flipped)
    masks = kept_masks()
    encoded = _encoded([masks[:2], [], masks[2:]], [geometry] * 3)
    assert len(encoded) == len(masks)
    for stride in (1, 2, 4):
        wanted = _cells([masks], [geometry], stride, INPUT)
        height, width = wanted.shape[1:]
        rows, columns = (torch.arange(n) * stride + stride // 2 + 0.5 for n in (height, width))
        found = encoded.at(rows.expand(len(masks), -1), columns.expand(len(masks), -1))
        assert torch.equal(found, wanted)
        assert 0.1 < found.float().mean() < 0.9
    everywhere = torch.arange(-9.0, 90.0).expand(len(masks), -1)
    around = encoded.at(everywhere, everywhere)
    assert not around[:, :9].any(), "above the image"
    assert not around[:, :, 9 + INPUT[1] :].any(), "right of it"


def regions() -> Regions:
    boxes = [[3.2, 4.7, 20.1, 19.9], [-6.0, -3.0, 10.0, 60.0], [40.0, 30.0, 70.0, 52.0], [10.0, 10.0, 10.6, 10.9]]
    return Regions(torch.tensor(boxes), (7, 5))


def centres(region: list[float], size_hw: tuple[int, int]) -> list[list[tuple[float, float]]]:
    x0, y0, x1, y1 = region
    height, width = size_hw
    return [
        [(y0 + (y1 - y0) * (i + 0.5) / height, x0 + (x1 - x0) * (j + 0.5) / width) for j in range(width)]
        for i in range(height)
    ]


def test_a_box_has_the_cells_whose_pixel_is_in_it() -> None:
    boxes = torch.tensor(
        [[5.0, 6.0, 17.0, 18.5], [0.0, 0.0, 64.0, 48.0], [0.0, 0.0, 4.0, 4.0], [10.2, 10.2, 10.5, 10.8]]
    )
    found = region_cells(boxes, regions())
    for n, (box, region) in enumerate(zip(boxes.tolist(), regions().boxes_xyxy.tolist(), strict=True)):
        inside = {
            (i, j)
            for i, row in enumerate(centres(region, (7, 5)))
            for j, (y, x) in enumerate(row)
            if math.floor(box[0]) <= math.floor(x) < math.floor(box[2] + 1)
            and math.floor(box[1]) <= math.floor(y) < math.floor(box[3] + 1)
        }
        row0, row1, column0, column1 = found[n].tolist()
        assert {(i, j) for i in range(row0, row1) for j in range(column0, column1)} == inside, n
    assert found[2].tolist()[1] == found[2].tolist()[0], "a box beside its region has no cell"
    assert (found[3, 1::2] > found[3, ::2]).all(), "cells of less than a pixel"


def whole_as_region(count: int, size_hw: tuple[int, int], stride: int) -> Regions:
    """Regions whose cells are those of the map of that stride."""
    height, width = size_hw
    box = torch.tensor([[0.0, 0.0, float(width), float(height)]])
    return Regions(box.expand(count, 4), (height // stride, width // stride))


@pytest.mark.parametrize("stride", [2, 4])
def test_a_region_over_the_whole_input_has_the_map_s_edges_and_box_cells(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([[200, 30, 90], [190, 40, 90], [10, 20, 220]], dtype=torch.uint8)
    coarse = few[torch.randint(0, 3, (2, 6, 8), generator=generator)].permute(0, 3, 1, 2)
    images = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)  # of one colour in every cell: means are exact
    sizes, bottom, index = torch.tensor([[41, 60], [48, 64]]), torch.tensor([5, 0]), torch.tensor([1, 0, 1])
    region = whole_as_region(3, (48, 64), stride)
    inside = neighbour_inside(sizes, bottom, stride=stride, grid_hw=region.size_hw, size=3, dilation=2)
    # A cell of the map is judged by the pixel s*i + s//2, which holds the centre of a region's cell, too.
    assert torch.equal(region_inside(region, index, sizes, bottom, size=3, dilation=2), inside[index])
    wanted = affinity_edges(images, sizes, bottom, stride=stride, threshold=1e-4, size=3, dilation=2)
    found = region_edges(images, region, index, sizes, bottom, threshold=1e-4, size=3, dilation=2)
    assert torch.equal(found, wanted[index])
    assert 0.05 < found.float().mean() < inside.float().mean()
    boxes = torch.rand(3, 4, generator=generator) * 20 + torch.tensor([0.0, 0.0, 30.0, 20.0])
    assert torch.equal(region_cells(boxes, region), box_cells(boxes, stride=stride, grid_hw=region.size_hw))


def test_edges_of_a_region_by_hand() -> None:
    """Left half red, right half blue: edges along the halves count, those across do not, nor those out of the image."""
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, :, :16], images[:, 2, :, 16:] = 200, 200
    region = Regions(torch.tensor([[8.0, 8.0, 24.0, 24.0], [24.0, 0.0, 40.0, 16.0]]), (4, 4))
    edges = region_edges(
        images, region, torch.zeros(2).long(), torch.tensor([[32, 32]]), torch.tensor([0]),
        size=3, dilation=1, threshold=0.5,
    )  # fmt: skip
    right, down = neighbour_offsets(3, 1).index((0, 1)), neighbour_offsets(3, 1).index((1, 0))
    assert edges[0, right].tolist() == [[True, False, True, False]] * 4
    assert edges[0, down].tolist() == [[True] * 4] * 3 + [[False] * 4]
    assert edges[1, right].tolist() == [[True, False, False, False]] * 4


def pasted_slowly(logits: Tensor, region: list[float], input_hw: tuple[int, int], output_hw: tuple[int, int]) -> Tensor:
    """Bilinear between the cells' centres, 0 one cell beyond the region, pixel by pixel."""
    x0, y0, x1, y1 = region
    probability = np.pad(logits.double().sigmoid().numpy(), 1)
    height, width = logits.shape
    result = np.zeros(output_hw)
    for row in range(output_hw[0]):
        for column in range(output_hw[1]):
            y = (row + 0.5) * input_hw[0] / output_hw[0]
            x = (column + 0.5) * input_hw[1] / output_hw[1]
            v, u = (y - y0) / (y1 - y0) * height + 0.5, (x - x0) / (x1 - x0) * width + 0.5  # in padded cells
            if not (0 <= v < height + 1 and 0 <= u < width + 1):
                continue
            i, j = math.floor(v), math.floor(u)
            a, b = v - i, u - j
            result[row, column] = (1 - a) * ((1 - b) * probability[i, j] + b * probability[i, j + 1]) + a * (
                (1 - b) * probability[i + 1, j] + b * probability[i + 1, j + 1]
            )
    return torch.from_numpy(result > 0.5)


@pytest.mark.parametrize("output_hw", [(40, 56), (57, 101), (13, 20)])
def test_regions_are_pasted_where_they_stand(output_hw: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    grid = Regions(torch.tensor([[3.3, 5.1, 30.7, 33.3], [-9.0, 20.0, 25.0, 61.0], [50.0, 2.0, 55.0, 4.5]]), (6, 9))
    logits = torch.randn(3, 6, 9, generator=generator) * 4
    found = paste_masks(logits, grid, (40, 56), output_hw)
    for mask, one, region in zip(found, logits, grid.boxes_xyxy.tolist(), strict=True):
        assert (mask != pasted_slowly(one, region, (40, 56), output_hw)).sum() <= 1  # 0.5 by rounding
    assert found[:2].flatten(1).any(1).all()
    assert paste_masks(logits[:0], grid.of(slice(0, 0)), (40, 56), output_hw).shape == (0, *output_hw)


def test_full_regions_are_their_boxes() -> None:
    grid = Regions(torch.tensor([[8.0, 4.0, 24.0, 12.0]]), (4, 4))
    mask = paste_masks(torch.full((1, 4, 4), 9.0), grid, (32, 32), (32, 32))[0]
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    assert (rows, columns) == (list(range(4, 12)), list(range(8, 24)))


def test_encoded_masks_follow_their_regions() -> None:
    """A box of pixels 10..19 x 5..14 on regions that hold it, half of it and none of it."""
    outline = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
    encoded: EncodedMasks = _encoded([[[outline]] * 3], [Geometry((30, 40), (30, 40), False)])
    grid = Regions(torch.tensor([[10.0, 5.0, 20.0, 15.0], [0.0, 5.0, 20.0, 15.0], [21.0, 16.0, 40.0, 30.0]]), (5, 4))
    found = encoded.at(*grid.centres())
    assert found[0].all()
    assert found[1].tolist() == [[False, False, True, True]] * 5
    assert not found[2].any()
