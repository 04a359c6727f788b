"""Augmentations: views of images beside plain loops, the rules for cut objects by hand, chance from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from torchvision.transforms.v2 import functional

from semiseg.config.read import digest
from semiseg.data.augment import _COLOURS, Augmentation, View, _ious
from semiseg.data.dataset import Instances
from semiseg.data.transforms import Resize
from semiseg.engine.build import build_data, build_training_loader, train_dataset
from semiseg.errors import UserError
from semiseg.losses.terms import Objective, instance_terms
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import Batch, Supervision, Targets
from semiseg.structures.rasterise import outlines_to_rle
from tests.coco_files import ellipse, make_coco
from tests.test_data_dataset import batch_of, make_dataset, same
from tests.test_poison import everything, make_data
from tests.test_train import first_batches, fresh_step, losses_and_gradients, same_in_two_parts
from tests.tiny import HEADS, model_of, tiny_config

BOX, MASK, PSEUDO, CUT = (int(kind) for kind in Supervision)
EVERYTHING: dict[str, Any] = {
    "photometric": 0.5,
    "expand": 2.0,
    "crop": "ssd",
    "rotations": [0, 90, 180, 270],
    "scale": [0.75, 1.25],
    "least_box": 0.05,
}


def encode(mask: np.ndarray) -> bytes:
    counts: bytes = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts


def decode(rle: Any, size_hw: tuple[int, int]) -> np.ndarray:
    decoded: np.ndarray = rle_codec.decode({"size": list(size_hw), "counts": rle})
    return decoded.astype(np.bool_)


def known(
    boxes: Sequence[Sequence[float]],
    kinds: Sequence[int],
    masks: Sequence[Any] = (),
    crowds: Sequence[Sequence[float]] = (),
) -> Instances:
    """Instances of class = their number; `masks` are those of the ones that have one, in their order."""
    with_mask = [index for index, kind in enumerate(kinds) if kind in (MASK, PSEUDO)]
    return Instances(
        boxes_xyxy=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=list(range(len(kinds))),
        supervision=list(kinds),
        masks=list(masks),
        mask_instance=with_mask,
        crowd_boxes_xyxy=np.array(crowds, dtype=np.float64).reshape(-1, 4),
        mask_weight=[0.5 if kinds[index] == PSEUDO else 1.0 for index in with_mask],
        mask_known=[None] * len(with_mask),
    )


def box_of(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(side) for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


# One view -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("window", [(0, 0, 6, 4), (1, 0, 4, 3), (-2, -1, 7, 6), (4, 2, 9, 5), (8, 8, 10, 11)])
def test_image_masks_and_points_of_a_view_are_a_plain_loop(window: tuple[int, int, int, int], turns: int) -> None:
    """Pixel by pixel, a quarter turn to the left taking the last column to the first row."""
    image = torch.arange(72, dtype=torch.uint8).view(3, 4, 6)
    mask = np.random.default_rng(1).random((4, 6)) < 0.5
    view = View((4, 6), window, turns=turns, fill=(201, 202, 203))
    x0, y0, x1, y1 = window
    places = [[(y, x) for x in range(x0, x1)] for y in range(y0, y1)]
    for _ in range(turns):
        places = [[row[-1 - k] for row in places] for k in range(len(places[0]))]
    assert view.size_hw == (len(places), len(places[0]))
    found, seen = view.image(image), decode(view._raster(encode(mask)), view.size_hw)
    for i, row in enumerate(places):
        for j, (y, x) in enumerate(row):
            inside = 0 <= y < 4 and 0 <= x < 6
            assert found[:, i, j].tolist() == (image[:, y, x].tolist() if inside else [201, 202, 203])
            assert seen[i, j] == (inside and mask[y, x])
            assert view._points(np.array([x + 0.5, y + 0.5])).tolist() == [j + 0.5, i + 0.5]


def test_an_outline_and_its_pixels_stay_together() -> None:
    outline = [8.0, 6, 30, 6, 30, 26, 8, 26]
    mask = decode(outlines_to_rle([np.array(outline)], (32, 40)), (32, 40))
    for turns in range(4):
        view = View((32, 40), (-5, 10, 25, 50), turns=turns)
        (moved,) = view._mask([outline])
        drawn = decode(outlines_to_rle([np.array(moved)], view.size_hw), view.size_hw)
        assert (drawn == decode(view._raster(encode(mask)), view.size_hw)).all()


def test_the_rules_for_cut_objects() -> None:
    """A window of 40 x 40 pixels at (10, 10) of an image of 60 x 60."""
    corner = np.zeros((60, 60), dtype=np.bool_)  # an L: its lower bar reaches beyond the window, its upright does not
    corner[20:45, 30:35] = True
    corner[40:45, 30:58] = True
    hidden = np.zeros((60, 60), dtype=np.bool_)  # only beyond the window, though its box's centre is in it
    hidden[52:58, 20:30] = True
    hidden[30, 28:30] = False
    boxes: list[list[float]] = [
        [20, 20, 40, 40],  # 0 inside, a box alone
        [30, 20, 58, 45],  # 1 the L, its mask annotated
        [30, 20, 58, 45],  # 2 the same as a box alone
        [30, 20, 58, 45],  # 3 the same with a pseudo mask
        [40, 40, 70, 48],  # 4 its centre is beyond the window
        [20, 30, 30, 58],  # 5 of its mask nothing is visible
        [12, 12, 13.5, 30],  # 6 too narrow: 1.5 of 40 pixels are less than a twentieth
        [52, 52, 58, 58],  # 7 not in the window at all
    ]
    kinds = [BOX, MASK, BOX, PSEUDO, BOX, MASK, BOX, BOX]
    masks = [encode(corner), encode(corner), encode(hidden)]
    crowds = [[0, 0, 20, 15], [52, 0, 60, 60]]
    view = View((60, 60), (10, 10, 50, 50), least_box=0.05)
    told = np.random.default_rng(3).random((60, 60)) < 0.5  # of the pseudo mask
    given = replace(known(boxes, kinds, masks, crowds), mask_known=[None, encode(told), None])
    found = view.instances(given)
    assert found.labels == [0, 1, 2, 3]
    assert found.supervision == [BOX, MASK, CUT, PSEUDO]
    assert found.boxes_xyxy.tolist() == [[10, 10, 30, 30], [20, 10, 40, 35], [20, 10, 40, 35], [20, 10, 40, 35]]
    assert found.mask_instance == [1, 3]
    assert found.mask_weight == [1.0, 0.5]
    assert all((decode(mask, (40, 40)) == corner[10:50, 10:50]).all() for mask in found.masks)
    assert found.mask_known[0] is None
    assert (decode(found.mask_known[1], (40, 40)) == told[10:50, 10:50]).all()
    # Nothing is learnt in what is left of a crowd and of 4 and 6; 5 and 7 are not to be seen.
    assert found.crowd_boxes_xyxy.tolist() == [[0, 0, 10, 5], [30, 30, 40, 38], [2, 2, 3.5, 20]]


def test_a_cut_box_ends_where_the_visible_mask_does() -> None:
    """The upper bar of a T is cut off at its right: what is left of it and of the box ends there, not the box below."""
    shape = np.zeros((40, 40), dtype=np.bool_)
    shape[5:10, 0:40] = True
    shape[5:35, 25:35] = True
    view = View((40, 40), (0, 0, 22, 40))
    box: list[list[float]] = [[0, 5, 40, 35]]
    found = view.instances(known(box, [MASK], [encode(shape)]))
    assert found.boxes_xyxy.tolist() == [[0, 5, 22, 10]]
    alone = view.instances(known(box, [BOX]))
    assert alone.boxes_xyxy.tolist() == [[0, 5, 22, 35]]  # which would teach rows that nothing is in
    assert alone.supervision == [CUT]
    outline = [[0.0, 5, 40, 5, 40, 10, 0, 10], [25.0, 5, 35, 5, 35, 35, 25, 35]]
    assert view.instances(known(box, [MASK], [outline])).boxes_xyxy.tolist() == [[0, 5, 22, 10]]


@pytest.mark.parametrize("window", [(0, 0, 40, 30), (-4, -2, 50, 60)])
def test_what_is_not_cut_stays_as_it_is(window: tuple[int, int, int, int]) -> None:
    """Boxes beyond the image, without width or with an empty mask are the annotator's, not the crop's."""
    boxes: list[list[float]] = [[-3, 2, 44, 20], [5, 5, 5, 9], [7, 7, 12, 12]]
    found = View((30, 40), window).instances(known(boxes, [BOX, BOX, MASK], [encode(np.zeros((30, 40)))]))
    assert found.supervision == [BOX, BOX, MASK]
    assert (found.boxes_xyxy - boxes == [-window[0], -window[1]] * 2).all()
    assert len(found.crowd_boxes_xyxy) == 0


def test_rows_without_affinity_stay_those_of_the_original() -> None:
    for window, expected in {(0, 0, 40, 30): 10, (0, 0, 40, 20): 0, (3, 5, 9, 22): 2, (0, -9, 40, 45): 25}.items():
        assert View((30, 40), window).bottom_rows(10) == expected
    assert View((30, 40), (0, 0, 40, 45)).bottom_rows(0) == 0
    assert View((30, 40), (0, 26, 40, 45)).bottom_rows(10) == 19  # all that there are


# What is drawn --------------------------------------------------------------------------------------------------------

BOXES = np.array([[10.0, 20, 40, 50], [60, 10, 90, 30]])


def drawn(count: int = 600, boxes: np.ndarray = BOXES, **options: Any) -> list[View]:
    augmentation = Augmentation(**options)
    return [augmentation((80, 100), boxes, seed) for seed in range(count)]


def test_nothing_is_drawn_without_being_asked_for() -> None:
    assert set(drawn(50)) == {View((80, 100), (0, 0, 100, 80))}


def test_expansion() -> None:
    views = drawn(expand=4.0)
    whole = sum(view.window == (0, 0, 100, 80) for view in views)
    assert 240 < whole < 360
    widths = [view.size_hw[1] / 100 for view in views]
    assert max(widths) > 3.8
    assert max(widths) <= 4
    for view in views:
        x0, y0, x1, y1 = view.window
        assert x0 <= 0
        assert y0 <= 0
        assert x1 >= 100
        assert y1 >= 80
        assert abs((x1 - x0) / 100 - (y1 - y0) / 80) < 0.02
    assert min(view.window[0] for view in views) < -150


def test_random_crops_are_anywhere_and_of_any_shape() -> None:
    views = drawn(crop="random", crop_least=0.5)
    windows = np.array([view.window for view in views])
    sides = windows[:, 2:] - windows[:, :2]
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] <= (100, 80)).all()
    assert (sides >= (50, 40)).all()
    assert sides.min(0).tolist() == [50, 40]
    assert windows[:, 0].max() > 40


def test_ssd_crops_hold_an_object_and_its_share() -> None:
    views = drawn(1200, crop="ssd")
    whole = sum(view.window == (0, 0, 100, 80) for view in views)
    assert 150 < whole < 500  # a sixth, and where no crop with such an overlap was found
    overlaps = []
    for view in views:
        x0, y0, x1, y1 = view.window
        centres = (BOXES[:, :2] + BOXES[:, 2:]) / 2
        assert ((centres > (x0, y0)) & (centres < (x1, y1))).all(1).any()
        assert (y1 - y0) / (x1 - x0) <= 2
        assert (x1 - x0) / (y1 - y0) <= 2
        overlaps.append(_ious(view.window, BOXES).max())
    assert {int(10 * overlap) for overlap in overlaps} >= {1, 2, 3, 4, 5, 6, 7}
    assert {view.window for view in drawn(50, np.zeros((0, 4)), crop="ssd")} == {(0, 0, 100, 80)}
    everywhere = np.array([[0.0, 0, 100, 80]])  # with IoUs of 0.7 and 0.9 only large crops
    areas = [float(_ious(view.window, everywhere)[0]) for view in drawn(boxes=everywhere, crop="ssd")]
    assert sum(area >= 0.7 for area in areas) > 250


def test_overlaps_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [2, 2, 2, 2]])
    assert _ious((0, 0, 10, 20), boxes).tolist() == [0.5, 50 / 250, 0, 0]


def test_quarter_turns_are_all_drawn() -> None:
    turns = [view.turns for view in drawn(rotations=[0, 90, 270])]
    assert {turn: turns.count(turn) > 150 for turn in set(turns)} == {0: True, 1: True, 3: True}


def test_the_scale_changes_neither_flip_nor_side() -> None:
    usual, scaled = Resize((64, 128), 999, flip=0.5), Resize((64, 128), 999, flip=0.5, scale=(0.5, 2.0))
    ratios = []
    for seed in range(300):
        before, after = usual((100, 150), seed), scaled((100, 150), seed)
        assert before.flipped == after.flipped
        ratios.append(after.input_hw[0] / before.input_hw[0])
    assert min(ratios) == pytest.approx(0.5, abs=0.02)
    assert max(ratios) == pytest.approx(2, abs=0.02)
    assert np.mean(ratios) == pytest.approx(1.25, abs=0.1)


def test_colours() -> None:
    counts = [len(view.colours) for view in drawn(photometric=0.5)]
    assert np.mean(counts) == pytest.approx(2, abs=0.2)
    orders = {tuple(name for name, _ in view.colours) for view in drawn(photometric=1.0)}
    assert orders == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    contrast = _COLOURS["contrast"](image, 1.3).int() - functional.adjust_contrast(image, 1.3).int()
    assert contrast.abs().max() <= 1
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    assert torch.equal(_COLOURS["contrast"](grey, 1.4), grey)
    assert torch.equal(_COLOURS["brightness"](grey, 1.1), torch.full_like(grey, 110))
    for name, neutral in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0)):
        assert (_COLOURS[name](image, neutral).int() - image.int()).abs().max() <= 1


def test_colours_do_not_depend_on_the_number_of_threads() -> None:
    image = torch.randint(256, (3, 300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = next(view for view in drawn(photometric=1.0) if view.colours[-1][0] == "contrast")
    view = replace(view, original_hw=(300, 400), window=(-9, 0, 380, 300))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(view.image(image.permute(1, 2, 0).contiguous().permute(2, 0, 1)))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert not torch.equal(results[0], replace(view, colours=()).image(image))


# Through the data set -------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_masks_they_came_with() -> None:
    """Whatever is drawn: with an annotated mask the box is what is visible of it, and without one it holds that."""
    shapes = [ellipse(60, 80, box_xyxy=(10, 8, 45, 40)), ellipse(60, 80, box_xyxy=(40, 20, 76, 56))]
    boxes, masks = [box_of(shape) for shape in shapes], [encode(shape) for shape in shapes]
    augmentation, seen = Augmentation(expand=2.0, crop="random", rotations=(0, 90, 180, 270)), 0
    for seed in range(300):
        view = augmentation((60, 80), np.array(boxes), seed)
        found = view.instances(known(boxes, [MASK, MASK], masks))
        alone = view.instances(known(boxes, [BOX, BOX]))
        for box, mask in zip(found.boxes_xyxy, found.masks, strict=True):
            assert box.tolist() == box_of(decode(mask, view.size_hw))
            seen += 1
        own = dict(zip(alone.labels, alone.boxes_xyxy, strict=True))
        for label, box in zip(found.labels, found.boxes_xyxy, strict=True):
            assert (box[:2] >= own[label][:2]).all()
            assert (box[2:] <= own[label][2:]).all()
    assert seen > 250


def test_an_augmentation_of_nothing_changes_no_bit(tmp_path: Path) -> None:
    data = make_dataset(make_coco(tmp_path))
    keys = [(row, seed) for row in range(4) for seed in range(3)]
    assert same(batch_of(data, *keys), batch_of(replace(data, augmentation=Augmentation()), *keys))
    config = tiny_config(tmp_path / "shapes")
    assert train_dataset(config, build_data(config)).augmentation is None


def test_a_sample_follows_from_its_seed_alone(tmp_path: Path) -> None:
    """Whatever batch it is in and whoever loads it; and the same seed takes the same size and flip as without."""
    config = tiny_config(tmp_path, data={"augment": EVERYTHING, "flip": 0.5})
    data = build_data(config)
    dataset = train_dataset(config, data)
    together = dataset.batch([(3, 11), (5, 12)], size_divisor=32)
    (alone,) = (dataset.batch([(5, 12)], size_divisor=32) for _ in range(1))
    assert together.targets is not None
    assert alone.targets is not None
    height, width = alone.image_sizes_hw[0].tolist()
    assert torch.equal(together.image_sizes_hw[1], alone.image_sizes_hw[0])
    assert torch.equal(together.images[1, :, :height, :width], alone.images[0, :, :height, :width])
    assert torch.equal(together.targets.boxes_xyxy[together.targets.image_index == 1], alone.targets.boxes_xyxy)

    def loaded(workers: int, start_step: int) -> list[Batch]:
        own = config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": workers})})
        options: dict[str, Any] = {"processes": 1, "rank": 0, "pin_memory": False}
        return list(build_training_loader(own, data, steps=3, start_step=start_step, **options))

    here = loaded(0, 0)
    assert all(same(one, other) for one, other in zip(here, loaded(1, 0), strict=True))
    assert all(same(one, other) for one, other in zip(here[1:], loaded(0, 1), strict=True))


class Nowhere(Augmentation):
    """A corner in which nothing is."""

    def __call__(self, size_hw: tuple[int, int], boxes_xyxy: np.ndarray, seed: int) -> View:
        return View(size_hw, (-40, -40, 0, 0), fill=(5, 5, 5))


@pytest.mark.parametrize("head", HEADS)
def test_an_image_that_loses_all_its_objects_is_an_image_without(tmp_path: Path, head: str) -> None:
    config = tiny_config(tmp_path, model=model_of(head))
    dataset = replace(train_dataset(config, build_data(config)), augmentation=Nowhere())
    batch = dataset.batch([(0, 1), (1, 2)], size_divisor=32)
    assert batch.targets is not None
    assert batch.targets.num_instances == len(batch.targets.masks) == len(batch.targets.crowd_boxes_xyxy) == 0
    losses, _ = losses_and_gradients(fresh_step(config), [batch])
    assert torch.isfinite(losses).all()


OBJECTIVES: dict[str, dict[str, Any]] = {
    "dynamic": {"affinity": "learned", "box": "projection+learned"},
    "prototypes": {"mask": "crop_bce"},
    "rays": {"mask": "rays"},
    "regions": {"mask": "bce", "box": "mil+smooth"},
    "yolact": {"mask": "crop_bce"},
    "mask_rcnn": {"mask": "bce"},
}


@pytest.mark.parametrize("head", OBJECTIVES)
def test_every_head_trains_on_them(tmp_path: Path, head: str) -> None:
    """In parts as in one, with objects of every kind in its batch."""
    scale = {"scale": [1.0, 1.0]} if head == "yolact" else {}  # cells in parts: of each batch's own padded size
    whole, halves = (
        tiny_config(
            tmp_path,
            model=model_of(head),
            objective=OBJECTIVES[head],
            data={"augment": {**EVERYTHING, "crop": "random", **scale}, "stretch": head == "yolact"},
            optim={"batch_size": 4, "accumulation": parts},
        )
        for parts in (1, 2)
    )
    same_in_two_parts(fresh_step(whole), whole, halves)
    kinds = set()
    for batch in first_batches(whole, 4):
        assert batch.targets is not None
        kinds |= set(batch.targets.supervision.tolist())
        losses, _ = losses_and_gradients(fresh_step(whole), [batch])
        assert torch.isfinite(losses).all()
    assert kinds == {BOX, MASK, CUT}


def test_withheld_masks_change_nothing(tmp_path: Path) -> None:
    augmented = tiny_config(tmp_path, data={"augment": EVERYTHING}).data.augment
    found = []
    for poisoned in (False, True):
        config = make_data(tmp_path / str(poisoned), poisoned=poisoned)
        found.append(
            everything(config.model_copy(update={"data": config.data.model_copy(update={"augment": augmented})}))
        )
    (batches, losses, gradient), (others, other_losses, other_gradient) = found
    for mine, theirs in zip(batches, others, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert mine.targets is not None
        assert theirs.targets is not None
        for field in fields(Targets):
            own = getattr(mine.targets, field.name)
            assert not isinstance(own, torch.Tensor) or torch.equal(own, getattr(theirs.targets, field.name))
    assert losses == other_losses
    assert torch.equal(gradient, other_gradient)


def test_a_cut_box_teaches_no_mask() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        boxes_xyxy=torch.tensor([[4.0, 4, 30, 30], [4, 4, 30, 30]]),
        labels=torch.zeros(2, dtype=torch.int64),
        image_index=torch.zeros(2, dtype=torch.int64),
        supervision=torch.tensor([CUT, BOX]),
        masks=torch.zeros(0, 8, 8, dtype=torch.bool),
        mask_instance=none,
        mask_weight=torch.zeros(0),
        crowd_boxes_xyxy=torch.zeros(0, 4),
        crowd_image_index=none,
        mask_stride=4,
    )
    for box in ("projection+pairwise", "box_as_mask", "mil+smooth"):
        goal = Objective(mask="dice", box=box, affinity_threshold=0.3, affinity_size=3, affinity_dilation=2)
        found = instance_terms(targets, WholeMap(4, (8, 8)), objective=goal)
        assert found.used.tolist() == [False, True]
        assert found.box_only.all()


# The configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"augment": {"rotations": [0, 45]}},
            r"rotations has 45: .* a box alone does not tell .*; allowed: 0, 90,",
        ),
        ({"augment": {"rotations": []}}, r"data\.augment\.rotations"),
        ({"augment": {"scale": [2.0, 1.0]}}, r"from the smaller to the larger factor, not \[2\.0, 1\.0\]"),
        ({"augment": {"scale": [0.25, 1.0]}}, r"short side of 64 x 0\.25 pixels, allowed: at least 32"),
        ({"augment": {"expand": 0.5}}, r"data\.augment\.expand.*greater than or equal to 1"),
        ({"augment": {"crops": "ssd"}}, r"unknown key 'data\.augment\.crops'\. Did you mean 'crop'"),
        ({"augment": {"crop": "any"}}, r"'none', 'random' or 'ssd'"),
        (
            {"augment": {"rotations": [90]}, "bottom_rows_without_affinity": 10},
            r"bottom_rows_without_affinity must be 0, not 10",
        ),
    ],
)
def test_what_does_not_fit_is_told(data: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_config(Path(), data=data)


def test_each_key_is_another_run_and_none_at_its_default() -> None:
    usual = digest(tiny_config(Path()).identity())
    defaults = {"photometric": 0.0, "expand": 1.0, "crop": "none", "rotations": [0], "scale": [1.0, 1.0]}
    for augment in ({}, defaults, {"crop_least": 0.5}):  # the last is not read
        assert digest(tiny_config(Path(), data={"augment": augment}).identity()) == usual
    changed: list[dict[str, Any]] = [{key: value} for key, value in EVERYTHING.items()]
    changed += [{"crop": "random"}, {"crop": "random", "crop_least": 0.5}]
    ids = {digest(tiny_config(Path(), data={"augment": augment}).identity()) for augment in changed}
    assert len(ids | {usual}) == len(changed) + 1
