"""Geometry in numbers that one can check in the head: resize, flip, rasterising, cell centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semiseg.data.transforms import Geometry, Resize, resized_size
from semiseg.structures.rasterise import outlines_to_rle
from tests.coco_files import ellipse, encode, picture
from tests.full_masks import rle_to_mask, sample_cells


def mapped_mask(geometry: Geometry, mask: np.ndarray) -> np.ndarray:
    """(H, W) bool original -> (H', W') bool input."""
    rows, columns = (np.arange(side) for side in geometry.input_hw)
    moved: np.ndarray = mask[geometry.source_rows(rows)][:, geometry.source_columns(columns)]
    return moved


def rasterised(geometry: Geometry, outline: list[float]) -> np.ndarray:
    """(H', W') bool of an outline in original pixels."""
    return rle_to_mask(outlines_to_rle(geometry.polygons([outline]), geometry.input_hw), geometry.input_hw)


@pytest.mark.parametrize(
    ("size_hw", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.7
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 800), 800, 1333, (667, 1333)),  # 1600 is too long: 400 * 1333 / 800 = 666.5, half up
        ((128, 128), 128, 128, (128, 128)),
        ((100, 200), 50, 100, (50, 100)),  # the longer side just fits
        ((3, 1000), 10, 100, (1, 100)),  # 0.3 rows: never none
    ],
)
def test_resized_size(size_hw: tuple[int, int], short_side: int, long_side: int, expected: tuple[int, int]) -> None:
    assert resized_size(size_hw, short_side, long_side) == expected
    assert Resize([short_side], long_side)(size_hw, 5) == Geometry(size_hw, expected, False)


def test_points_and_boxes_scale_by_the_exact_ratio_of_each_side() -> None:
    geometry = Geometry((10, 20), (15, 80), flipped=False)  # y * 1.5, x * 4
    boxes = np.array([[1.0, 2.0, 5.0, 10.0], [0, 0, 20, 10]])
    assert geometry.boxes(boxes).tolist() == [[4, 3, 20, 15], [0, 0, 80, 15]]
    mapped = geometry.polygons([[1, 2, 5, 10, 20, 0], [20, 10]])
    assert [outline.tolist() for outline in mapped] == [[4, 3, 20, 15, 80, 0], [80, 15]]
    assert geometry.polygons([]) == []
    flipped = Geometry((10, 20), (15, 80), flipped=True)
    assert flipped.boxes(boxes).tolist() == [[60, 3, 76, 15], [0, 0, 80, 15]]
    assert flipped.polygons([[1, 2, 5, 10]])[0].tolist() == [76, 3, 60, 15]
    assert flipped.boxes(np.zeros((0, 4))).shape == (0, 4)


def test_the_far_edge_lands_on_the_edge() -> None:
    for width in range(1, 400, 7):
        for new_width in (333, 800, 1333):
            geometry = Geometry((10, width), (10, new_width), flipped=False)
            assert geometry.boxes(np.array([[0.0, 0, width, 10]]))[0, 2] == new_width


def test_image_is_untouched_at_its_own_size_and_constant_areas_stay() -> None:
    image = torch.from_numpy(picture(np.random.default_rng(0), 32, 48)).permute(2, 0, 1)
    assert torch.equal(Geometry((32, 48), (32, 48), False).image(image), image)
    halves = torch.zeros(3, 16, 32, dtype=torch.uint8)
    halves[:, :, 16:] = 200
    smaller = Geometry((16, 32), (8, 16), False).image(halves)
    assert smaller.dtype == torch.uint8
    assert type(smaller) is torch.Tensor
    assert (smaller[:, :, :7] == 0).all()
    assert (smaller[:, :, 9:] == 200).all()
    # Antialiased: columns 7 and 8 see one eighth of the other half (triangle of two pixels: 1 3 3 1).
    assert smaller[0, 3, 7:9].tolist() == [25, 175]


def test_resizing_does_not_depend_on_the_number_of_threads() -> None:
    image = torch.from_numpy(picture(np.random.default_rng(1), 300, 400)).permute(2, 0, 1).contiguous()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(Geometry((300, 400), (221, 295), True).image(image))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_flip_is_an_exact_involution() -> None:
    random = np.random.default_rng(2)
    flip = Geometry((40, 56), (40, 56), flipped=True)
    image = torch.from_numpy(picture(random, 40, 56)).permute(2, 0, 1)
    mask = random.random((40, 56)) < 0.5
    points = (random.random((30, 2)) * 1000).round() / 16  # sums of powers of two, as short decimals nearly are
    assert not torch.equal(flip.image(image), image)
    assert torch.equal(flip.image(flip.image(image)), image)
    assert (mapped_mask(flip, mapped_mask(flip, mask)) == mask).all()
    assert (flip.points(flip.points(points)) == points).all()
    boxes = np.concatenate([points[:10], points[:10] + 5.25], axis=1)
    once = flip.boxes(boxes)
    assert (once[:, 2] > once[:, 0]).all()
    assert torch.equal(flip.boxes(once.double().numpy()), torch.from_numpy(boxes).float())


@pytest.mark.parametrize("flipped", [False, True])
def test_image_box_outline_and_rle_of_a_rectangle_stay_together(flipped: bool) -> None:
    x0, y0, x1, y1 = 6, 4, 18, 20
    mask = np.zeros((32, 40), bool)
    mask[y0:y1, x0:x1] = True
    image = torch.from_numpy(mask.astype(np.uint8) * 255)[None].repeat(3, 1, 1)
    geometry = Geometry((32, 40), (64, 60), flipped)  # y * 2, x * 1.5
    (left, top, right, bottom) = geometry.boxes(np.array([[x0, y0, x1, y1]])).long().tolist()[0]
    expected = np.zeros((64, 60), bool)
    expected[top:bottom, left:right] = True
    assert (left, top, right, bottom) == ((33, 8, 51, 40) if flipped else (9, 8, 27, 40))
    assert ((geometry.image(image)[0].numpy() > 127) == expected).all()
    assert (mapped_mask(geometry, mask) == expected).all()
    assert (rasterised(geometry, [x0, y0, x1, y0, x1, y1, x0, y1]) == expected).all()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("input_hw", [(96, 120), (64, 80), (50, 100)])
def test_polygon_and_rle_of_one_shape_give_nearly_the_same_cells(flipped: bool, input_hw: tuple[int, int]) -> None:
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    outline = np.stack([40 + 30 * np.cos(angle), 32 + 24 * np.sin(angle)], 1).reshape(-1).tolist()
    counts = encode(ellipse(64, 80, box_xyxy=(10, 8, 70, 56)), compressed=True)["counts"].encode()
    geometry = Geometry((64, 80), input_hw, flipped)
    by_points = sample_cells(rasterised(geometry, outline), 2)
    by_pixels = sample_cells(mapped_mask(geometry, rle_to_mask(counts, (64, 80))), 2)
    area = np.pi * 30 * 24 * input_hw[0] * input_hw[1] / (64 * 80) / 4  # in cells
    assert abs(int(by_points.sum()) / area - 1) < 0.03
    assert int((by_points ^ by_pixels).sum()) < 0.04 * area


def test_the_choice_comes_from_the_seed_alone() -> None:
    transform = Resize(short_sides=(64, 72, 80), long_side=120, flip=0.25)
    chosen = [transform((60, 90), seed) for seed in range(2000)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the global generators shall not matter)
    assert [transform((60, 90), seed) for seed in range(2000)] == chosen
    assert 420 < sum(geometry.flipped for geometry in chosen) < 580
    counts = [sum(geometry.input_hw[0] == side for geometry in chosen) for side in (64, 72, 80)]
    assert sum(counts) == 2000
    assert min(counts) > 580
