"""Assignment: the reference's numbers, the straightforward formulation, and cases one can work out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import straightforward as plain
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.fcos import make_locations
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment

GOLDEN = Path(__file__).parent / "golden" / "model_assignment.npz"
NONE = torch.zeros(0, dtype=torch.int64)
CPU = torch.device("cpu")
RANGES = [64.0, 128.0, 256.0, 512.0]


def make_targets(
    boxes: Tensor, image_index: Tensor, crowd: Tensor | None = None, crowd_image: Tensor | None = None
) -> Targets:
    count = boxes.shape[0]
    return Targets(
        boxes_xyxy=boxes,
        labels=torch.zeros(count, dtype=torch.int64),
        image_index=image_index,
        supervision=torch.zeros(count, dtype=torch.int64),
        masks=torch.zeros(0, 1, 1, dtype=torch.bool),
        mask_instance=NONE,
        mask_weight=torch.zeros(0),
        crowd_boxes_xyxy=torch.zeros(0, 4) if crowd is None else crowd,
        crowd_image_index=NONE if crowd_image is None else crowd_image,
        mask_stride=4,
    )


def as_dict(assignment: Assignment) -> dict[tuple[int, int], int]:
    """{(image, location): instance}."""
    columns = (assignment.image_index, assignment.location_index, assignment.instance_index)
    return {(image, location): instance for image, location, instance in torch.stack(columns, dim=1).tolist()}


def assign_stride8(targets: Targets, sizes_hw: list[tuple[int, int]], *, num_images: int = 1) -> Assignment:
    """One level of stride 8."""
    return assign(targets, sizes_hw=sizes_hw, strides=[8], num_images=num_images, level_ranges=[], centre_radius=1.5)


@pytest.mark.parametrize(("name", "expected_positives"), [("pad", 72), ("ceil", 72), ("big", 131)])
def test_equals_the_reference(name: str, expected_positives: int) -> None:
    golden = {
        key.removeprefix(f"{name}_"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(name)
    }
    sizes = [(height, width) for height, width in golden["feature_sizes"].tolist()]
    locations = make_locations(sizes, [8, 16, 32, 64, 128], CPU)
    targets = make_targets(golden["boxes"], golden["box_image"])
    found = assign(
        targets,
        sizes_hw=sizes,
        strides=[8, 16, 32, 64, 128],
        num_images=int(golden["box_image"].max()) + 1,
        level_ranges=RANGES,
        centre_radius=1.5,
    )
    assert found.image_index.shape[0] == expected_positives
    # the reference lists its positives by level, image, location; ours are by image, location
    place = golden["level"] * 10**8 + golden["image"] * 10**6
    ours = locations.level[found.location_index] * 10**8 + found.image_index * 10**6 + found.location_index
    order = ours.argsort()
    torch.testing.assert_close(ours[order] // 10**6, place // 10**6, rtol=0, atol=0)
    torch.testing.assert_close(locations.xy[found.location_index[order]], golden["xy"], rtol=0, atol=0)
    torch.testing.assert_close(found.instance_index[order], golden["instance"], rtol=0, atol=0)
    torch.testing.assert_close(found.box_distances[order], golden["distances"], rtol=0, atol=0)
    torch.testing.assert_close(found.centreness[order], golden["centreness"], rtol=0, atol=1.2e-7)
    assert not found.ignored.any()


@pytest.mark.parametrize("radius", [0.7, 1.5, 2.0, 40.0])
@pytest.mark.parametrize("sizes", [[(16, 16), (8, 8), (4, 4), (2, 2)], [(9, 25), (5, 13), (3, 7), (2, 4)]])
def test_equals_the_straightforward_formulation_on_crowded_images(sizes: list[tuple[int, int]], radius: float) -> None:
    generator = torch.Generator().manual_seed(4)
    strides = [8, 16, 32, 64]
    corner = torch.rand(60, 2, generator=generator) * 100
    # whole pixels, so that ties of area and points exactly on a border occur
    boxes = torch.cat([corner, corner + 2 + torch.rand(60, 2, generator=generator) * 90], dim=1).round()
    image_index = torch.arange(3).repeat_interleave(20)
    found = assign(
        make_targets(boxes, image_index),
        sizes_hw=sizes,
        strides=strides,
        num_images=3,
        level_ranges=[24, 48, 96],
        centre_radius=radius,
    )
    locations = make_locations(sizes, strides, CPU)
    xy, ranges = locations.xy.double(), (-1.0, 24.0, 48.0, 96.0, math.inf)
    expected: dict[tuple[int, int], int] = {}
    for image in range(3):
        own = boxes[image_index == image].double()
        matched = plain.assign(xy, locations.stride.double(), locations.level, own, ranges=ranges, radius=radius)
        expected |= {(image, r): 20 * image + n for r, n in enumerate(matched.tolist()) if n >= 0}
    assert len(expected) > 50
    assert as_dict(found) == expected
    places = found.image_index * 1000 + found.location_index
    assert torch.equal(places, places.sort().values), "positives are ordered by image, then location"


def test_smallest_box_wins_and_at_equal_areas_the_first() -> None:
    large, small = [0.0, 0.0, 30.0, 30.0], [6.0, 6.0, 18.0, 18.0]  # both hold (12, 12) in their centre square
    for boxes, winner in (([large, small], 1), ([small, large], 0), ([small, small, large], 0)):
        targets = make_targets(torch.tensor(boxes), torch.zeros(len(boxes), dtype=torch.int64))
        found = as_dict(assign_stride8(targets, [(4, 4)]))
        assert found[(0, 5)] == winner  # location 5 is (12, 12)


@pytest.mark.parametrize(("far_side", "levels"), [(87.0, {0}), (88.0, {0, 1}), (89.0, {1})])
def test_both_ends_of_a_range_are_included(far_side: float, levels: set[int]) -> None:
    # two levels of one location each, (24, 24), which sees the far side 64 away at x2 = 88
    targets = make_targets(torch.tensor([[1.0, 1.0, far_side, 50.0]]), torch.tensor([0]))
    found = assign(
        targets, sizes_hw=[(1, 1), (1, 1)], strides=[48, 48], num_images=1, level_ranges=[64.0], centre_radius=1.5
    )
    assert set(found.location_index.tolist()) == levels


def test_border_of_the_centre_square_is_outside() -> None:
    # x = 4, 12, 20, 28, 36; y = 4; centre x = 24: the square reaches from 12 to 36, both excluded
    targets = make_targets(torch.tensor([[0.0, 0.0, 48.0, 8.0]]), torch.tensor([0]))
    found = assign_stride8(targets, [(1, 5)])
    assert found.location_index.tolist() == [2, 3]
    torch.testing.assert_close(found.box_distances[0], torch.tensor([20.0, 4.0, 28.0, 4.0]) / 8)
    torch.testing.assert_close(found.centreness[0], torch.tensor(math.sqrt(20 / 28)))


def test_crowd_is_ignored_but_not_where_a_box_is_positive() -> None:
    crowd = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 9.0, 9.0]])  # holds 4, 12 squared; holds (4, 4)
    targets = make_targets(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), crowd, torch.tensor([0, 2]))
    found = assign_stride8(targets, [(4, 4)], num_images=3)
    assert as_dict(found) == {(0, 0): 0}
    assert found.ignored.nonzero().tolist() == [[0, 1], [0, 4], [0, 5], [2, 0]]


def test_crowd_on_every_level() -> None:
    sizes, strides = [(4, 6), (2, 3)], [8, 16]
    crowd = torch.tensor([[5.0, 3.0, 37.0, 25.0]])
    found = assign(
        make_targets(torch.zeros(0, 4), NONE, crowd, torch.tensor([1])),
        sizes_hw=sizes,
        strides=strides,
        num_images=2,
        level_ranges=[64.0],
        centre_radius=1.5,
    )
    x, y = make_locations(sizes, strides, CPU).xy.unbind(1)
    assert found.ignored[1].tolist() == ((x > 5) & (x < 37) & (y > 3) & (y < 25)).tolist()
    assert found.ignored[1].sum() == 4 * 3 + 2 * 2
    assert not found.ignored[0].any()


def test_images_without_boxes() -> None:
    levels: dict[str, Any] = {"sizes_hw": [(4, 4), (2, 2)], "strides": [8, 16], "level_ranges": [64.0]}
    one = make_targets(torch.tensor([[0.0, 0.0, 20.0, 20.0]]), torch.tensor([1]))
    found = assign(one, num_images=3, centre_radius=1.5, **levels)
    assert set(found.image_index.tolist()) == {1}
    none = assign(make_targets(torch.zeros(0, 4), NONE), num_images=2, centre_radius=1.5, **levels)
    assert none.box_distances.shape == (0, 4)
    assert none.ignored.shape == (2, 20)
    assert not none.ignored.any()


def test_assignment_does_not_know_of_masks() -> None:
    """The first instance of an image with an empty mask costs nothing: supervision never enters."""
    boxes, image_index = torch.tensor([[3.0, 3.0, 30.0, 40.0], [20.0, 20.0, 60.0, 60.0]]), torch.zeros(2).long()
    plain = make_targets(boxes, image_index)
    with_empty_mask = Targets(
        **{
            **plain.__dict__,
            "supervision": torch.tensor([1, 0]),
            "masks": torch.zeros(1, 16, 16, dtype=torch.bool),
            "mask_instance": torch.tensor([0]),
            "mask_weight": torch.ones(1),
        }
    )
    first, second = (assign_stride8(targets, [(8, 8)]) for targets in (plain, with_empty_mask))
    assert as_dict(first) == as_dict(second)
    assert set(first.instance_index.tolist()) == {0, 1}
