"""Tiles: where they lie, what is united across them, beside true objects and plain loops over whole masks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from torch import Tensor
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.engine import predict as predict_module
from semiseg.engine import tiles as tiles_module
from semiseg.engine.predict import ImageDetections, collected, find_instances
from semiseg.engine.tiles import Tiling, find_in_tiles
from semiseg.models.paste import Window
from semiseg.structures.masks import PlacedMask
from semiseg.structures.outputs import Detections
from tests.coco_files import picture
from tests.model_folders import make_model

LIMITS = semiseg.RunConfig().inference


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 112, 113, 160, 1000])
@pytest.mark.parametrize(("side", "overlap"), [(64, 16), (64, 0), (64, 63), (32, 5)])
def test_tiles_cover_the_image_and_overlap(length: int, side: int, overlap: int) -> None:
    tiling = Tiling(side, overlap)
    starts = [window.left for window in tiling.windows((1, length))]
    covered = np.zeros(length, bool)
    for window in tiling.windows((1, length)):
        assert window.right - window.left == min(side, length)
        assert 0 <= window.left < window.right <= length
        covered[window.left : window.right] = True
    assert covered.all()
    assert all(0 < second - first <= side - overlap for first, second in pairwise(starts))
    assert len(starts) == max(1, math.ceil((length - overlap) / (side - overlap)))
    assert tiling.fits((1, length)) == (len(starts) == 1) == (length <= side)


class Objects:
    """A network that sees of true objects what lies in the tile: the value of a pixel is its object's number."""

    def __init__(self, labels: Sequence[int], *, least: int = 1) -> None:
        self.labels, self.least = labels, least

    def each_image(self, network: Any, images: Sequence[Tensor], make: Any, **options: Any) -> list[Any]:
        assert len(images) <= 3, "tiles at a time"
        assert [tuple(image.shape[1:]) for image in images] == options["output_sizes"]
        return [make(self.seen(number, image[0])) for number, image in enumerate(images)]

    def seen(self, number: int, shown: Tensor) -> ImageDetections:
        masks = [(value, shown == value) for value in shown.unique().tolist() if value]
        masks = [(value, mask) for value, mask in masks if mask.sum() >= self.least]
        boxes = [[float(side) for side in bounds(mask)] for _, mask in masks]
        return ImageDetections(
            number,
            (shown.shape[0], shown.shape[1]),
            torch.tensor(boxes).reshape(-1, 4)[:, [2, 0, 3, 1]],
            # what a tile sees more of, it is surer of
            torch.tensor([min(float(mask.sum()) / 10000 + 0.1, 1.0) for _, mask in masks]),
            torch.tensor([self.labels[value - 1] for value, _ in masks], dtype=torch.int64),
            iter([PlacedMask(mask, 0, 0) for _, mask in masks]),
        )


def bounds(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def in_tiles(network: Objects, image: Tensor, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> Detections:
    monkeypatch.setattr(tiles_module, "each_image", network.each_image)
    return collected(find_in_tiles(None, image, tiling=tiling, limits=LIMITS, batch_size=3))  # type: ignore[arg-type]


def drawn_objects(seed: int, size_hw: tuple[int, int], sides: tuple[int, int], number: int) -> Tensor:
    """(3, H, W) with ellipses and rectangles that do not touch, each of its own value."""
    random, image = np.random.default_rng(seed), np.zeros(size_hw, np.uint8)
    y, x = np.ogrid[: size_hw[0], : size_hw[1]]
    value = 0
    for _ in range(number):
        half_y, half_x = random.uniform(*sides, 2) / 2
        top, left = random.uniform(0, size_hw[0]), random.uniform(0, size_hw[1])
        down, across = abs(y - top) / half_y, abs(x - left) / half_x
        shape = np.maximum(down, across) <= 1 if random.random() < 0.3 else down**2 + across**2 <= 1
        around = np.maximum(abs(y - top) / (half_y + 2), abs(x - left) / (half_x + 2)) <= 1
        if shape.any() and not image[around].any():
            value += 1
            image[shape] = value
    return torch.from_numpy(image).expand(3, -1, -1)


@pytest.mark.parametrize(("seed", "sides"), [(0, (4, 15)), (1, (4, 15)), (2, (20, 60)), (3, (20, 150)), (4, (60, 200))])
def test_objects_are_whole_again(seed: int, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones that some tile sees whole, and ones that none does: the same masks, each once, with the best score."""
    image = drawn_objects(seed, (230, 310), sides, 60)
    number = int(image.max())
    labels = [value % 2 for value in range(number)]
    for tiling in (Tiling(64, 16), Tiling(100, 30), Tiling(64, 40)):
        found = in_tiles(Objects(labels), image, tiling, monkeypatch)
        assert len(found) == number
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        for box, score, label, mask in zip(found.boxes, found.scores, found.labels, found.masks, strict=True):
            value = int(image[0][mask].unique())
            assert torch.equal(mask, image[0] == value)
            assert label == labels[value - 1]
            top, bottom, left, right = bounds(mask)
            assert box.tolist() == [left, top, right, bottom]
            windows = tiling.windows((230, 310))
            most = max(int(mask[w.top : w.bottom, w.left : w.right].sum()) for w in windows)
            assert float(score) == pytest.approx(min(most / 10000 + 0.1, 1))


def test_classes_do_not_mix_and_neighbours_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)
    image[:, 10:30, 30:70], image[:, 30:50, 30:70] = 1, 2  # they touch, over the whole overlap of 32..64
    assert len(in_tiles(Objects([0, 0]), image, Tiling(64, 32), monkeypatch)) == 2
    assert len(in_tiles(Objects([0, 1]), image, Tiling(64, 32), monkeypatch)) == 2


def test_arms_that_one_tile_sees_apart_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U on its side: the left tile sees two arms and no bow; what is one with the bow is one with each other."""

    class Arms(Objects):
        def seen(self, number: int, shown: Tensor) -> ImageDetections:
            if shown[:, -1].sum():  # the bow is not in it
                shown = shown.clone()
                shown[30:][shown[30:] > 0] = 2
            return super().seen(number, shown)

    image = torch.zeros(3, 60, 110, dtype=torch.uint8)
    image[:, 10:20, 20:90], image[:, 40:50, 20:90], image[:, 10:50, 80:90] = 1, 1, 1
    found = in_tiles(Arms([0, 0]), image, Tiling(64, 16), monkeypatch)
    assert len(found) == 1
    assert torch.equal(found.masks[0], image[0] > 0)


def test_a_part_that_is_cut_joins_what_has_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule by hand: tiles 0..64 and 48..112 share 48..64; what is not cut needs an IoU, what is a share."""
    left, right = Window(0, 64, 0, 64), Window(0, 64, 48, 112)

    def one(tile: Window, rows: slice, columns: slice, score: float, label: int = 0) -> Any:
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[rows, columns.start - tile.left : columns.stop - tile.left] = True
        rle = rle_codec.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        window = Window(rows.start, rows.stop, columns.start, columns.stop)
        return tiles_module._Found(tile, label, score, np.zeros(4), rle["counts"], window)

    def united(ours: list[Any], theirs: list[Any]) -> list[list[float]]:
        return [[part.score for part in parts] for parts in tiles_module.unite([ours, theirs], near=1)]

    cut = one(left, slice(0, 10), slice(20, 64), 0.5)
    # 16 x 10 pixels of it are shared; half of them suffice, less do not
    assert united([cut], [one(right, slice(5, 40), slice(48, 90), 0.9)]) == [[0.9, 0.5]]
    assert united([cut], [one(right, slice(6, 40), slice(49, 90), 0.9)]) == [[0.5], [0.9]]
    assert united([cut], [one(right, slice(5, 40), slice(48, 90), 0.9, label=1)]) == [[0.5], [0.9]]
    # of two that have half of it the one that has more
    two = [one(right, slice(0, 6), slice(49, 90), 0.9), one(right, slice(4, 30), slice(49, 90), 0.8)]
    assert united([cut], two) == [[0.9, 0.5], [0.8]]
    # seen whole by both: an IoU of one half
    whole = one(left, slice(20, 30), slice(50, 60), 0.5)
    assert united([whole], [one(right, slice(20, 30), slice(50, 55), 0.9)]) == [[0.9, 0.5]]
    assert united([whole], [one(right, slice(20, 30), slice(50, 54), 0.9)]) == [[0.5], [0.9]]
    assert united([whole], [one(right, slice(10, 40), slice(50, 63), 0.9)]) == [[0.5], [0.9]]
    assert united([], [whole]) == [[0.5]]


# With a network -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    make_model(folder / "model", short_side=64, long_side=64)
    Image.fromarray(picture(np.random.default_rng(3), 100, 150)).save(folder / "large.png")
    Image.fromarray(picture(np.random.default_rng(4), 40, 60)).save(folder / "small.png")
    return folder


def united_slowly(parts: list[tuple[Window, Detections]], size_hw: tuple[int, int], near: int) -> list[set[int]]:
    """The rule of `unite` on whole masks, pair after pair; numbers count the detections of all tiles."""
    every = [(tile, n, found) for tile, found in parts for n in range(len(found))]
    whole = []
    for tile, n, found in every:
        whole.append(np.zeros(size_hw, bool))
        whole[-1][tile.top : tile.bottom, tile.left : tile.right] = found.masks[n].numpy()
    groups = [{number} for number in range(len(every))]
    for (a, (tile, n, found)), (b, (other, m, theirs)) in combinations(enumerate(every), 2):
        if tile == other or found.labels[n] != theirs.labels[m]:
            continue
        shared = np.zeros(size_hw, int)
        for window in (tile, other):
            shared[window.top : window.bottom, window.left : window.right] += 1
        both = int((whole[a] & whole[b]).sum())
        own, their = (int((whole[each] & (shared == 2)).sum()) for each in (a, b))
        same = both > 0 and both >= 0.5 * (own + their - both)
        for one, frame, across, partner, area in ((a, tile, other, b, own), (b, other, tile, a, their)):
            ends = bounds(torch.from_numpy(whole[one])) if whole[one].any() else (0, 0, 0, 0)
            is_cut = (across.top < frame.top and ends[0] < frame.top + near) or (
                across.bottom > frame.bottom and ends[1] > frame.bottom - near
            )
            is_cut |= (across.left < frame.left and ends[2] < frame.left + near) or (
                across.right > frame.right and ends[3] > frame.right - near
            )
            rivals = [
                int((whole[one] & whole[k]).sum())
                for k, (t, i, f) in enumerate(every)
                if t == across and f.labels[i] == found.labels[n]
            ]
            first = [k for k, (t, i, f) in enumerate(every) if t == across and f.labels[i] == found.labels[n]]
            best = first[int(np.argmax(rivals))] == partner
            same |= is_cut and best and both > 0 and both >= 0.5 * area
        if same:
            joined = next(g for g in groups if a in g) | next(g for g in groups if b in g)
            groups = [g for g in groups if not g & joined] + [joined]
    return groups


@pytest.mark.parametrize("overlap", [0, 8, 24])
def test_detections_are_those_of_the_tiles_united(folder: Path, overlap: int) -> None:
    model = semiseg.load_model(folder / "model", device="cpu")
    image = torch.from_numpy(np.array(Image.open(folder / "large.png"))).permute(2, 0, 1)
    tiling, size_hw = Tiling(64, overlap), (100, 150)
    windows = tiling.windows(size_hw)
    crops = [image[:, w.top : w.bottom, w.left : w.right] for w in windows]
    given = {"score_threshold": 0.25}
    of_tiles = list(zip(windows, semiseg.detect(model, crops, **given), strict=True))  # type: ignore[arg-type]
    (found,) = semiseg.detect(model, [image], tile=64, overlap=overlap, **given)  # type: ignore[arg-type]
    groups = united_slowly(of_tiles, size_hw, max(overlap // 16, 1))
    every = [(w, n, one) for w, one in of_tiles for n in range(len(one))]
    wanted = []
    for group in groups:
        mask, boxes = torch.zeros(size_hw, dtype=torch.bool), []
        for w, n, one in (every[number] for number in group):
            mask[w.top : w.bottom, w.left : w.right] |= one.masks[n]
            boxes.append(one.boxes[n] + torch.tensor([w.left, w.top] * 2))
        box = torch.cat([torch.stack(boxes)[:, :2].amin(0), torch.stack(boxes)[:, 2:].amax(0)])
        score = max(float(every[number][2].scores[every[number][1]]) for number in group)
        wanted.append((-score, box.tolist(), mask))
    wanted.sort(key=lambda each: each[:2])
    ours = sorted(
        zip((-found.scores).tolist(), found.boxes.tolist(), found.masks, strict=True), key=lambda each: each[:2]
    )
    assert 10 < len(ours) == len(wanted) < len(every) - 5
    for (score, box, mask), (wanted_score, wanted_box, wanted_mask) in zip(ours, wanted, strict=True):
        assert score == pytest.approx(wanted_score, abs=1e-6)
        assert box == pytest.approx(wanted_box, abs=1e-4)
        assert torch.equal(mask, wanted_mask)


def test_an_image_that_fits_in_a_tile_has_the_detections_of_one_pass(folder: Path) -> None:
    model = semiseg.load_model(folder / "model", device="cpu")
    image = torch.from_numpy(np.array(Image.open(folder / "large.png"))).permute(2, 0, 1)
    (once,), (tiled,) = semiseg.detect(model, [image]), semiseg.detect(model, [image], tile=150)
    assert len(once) > 5
    for name in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(once, name), getattr(tiled, name))


def test_wrong_arguments(folder: Path) -> None:
    model, image = semiseg.load_model(folder / "model", device="cpu"), torch.zeros(3, 8, 8, dtype=torch.uint8)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tile": 8.5}, TypeError, "whole numbers of pixels, not 8.5"),
        ({"tile": 8, "overlap": 8}, ValueError, "overlap from 0 to tile - 1, not 8 and 8"),
        ({"tile": 0}, ValueError, "tile must be at least 1"),
        ({"overlap": 4}, ValueError, "give their size as tile"),
        ({"tile": 8, "output_sizes": [(8, 8)]}, ValueError, "leave out output_sizes"),
    ]
    for options, kind, told in wrong:
        with pytest.raises(kind, match=told):
            semiseg.detect(model, [image], **options)


def predict(folder: Path, *arguments: str, code: int = 0) -> str:
    given = ["predict", str(folder / "model"), str(folder / "large.png"), str(folder / "small.png"), *arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    return result.output


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_tile_has_the_scale_of_a_full_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 x 150 in tiles of 120: they are 100 x 120, and not resized to their own 64 x 77; a small image is as ever."""
    seen: list[tuple[int, ...]] = []

    def note(network: Any, images: list[Tensor], **options: Any) -> Iterator[ImageDetections]:
        assert len(images) <= 2
        seen.extend(tuple(image.shape[1:]) for image in images)
        return find_instances(network, images, **options)

    monkeypatch.setattr(predict_module, "find_instances", note)
    for options, of_tile, tiles in (
        (["--tile", "120"], (53, 64), 2),
        (["--tile", "65", "--short-side", "65"], (65, 65), 2 * 3),  # as it is
    ):
        seen.clear()
        predict(folder, *options, "--overlap", "10", "--out", str(tmp_path / "out"), "--batch", "2")
        assert seen[:-1] == [of_tile] * tiles
    predict(folder, "--out", str(tmp_path / "whole"), "--batch", "1")
    predict(folder, "--out", str(tmp_path / "tiled"), "--tile", "60", "--batch", "2")
    of_small = [
        [result for result in load(tmp_path / name / "results.json") if result["image_id"] == 2]
        for name in ("whole", "tiled")
    ]
    assert of_small[0] == of_small[1] != []


def test_the_command_is_the_api_where_nothing_is_resized(folder: Path, tmp_path: Path) -> None:
    predict(folder, "--out", str(tmp_path), "--tile", "64", "--score", "0.5", "--overlap", "24")
    results = [result for result in load(tmp_path / "results.json") if result["image_id"] == 1]
    image = torch.from_numpy(np.array(Image.open(folder / "large.png"))).permute(2, 0, 1)
    model = semiseg.load_model(folder / "model", device="cpu")
    (found,) = semiseg.detect(model, [image], tile=64, overlap=24, score_threshold=0.25)
    assert [result["score"] for result in results] == found.scores.tolist()
    for result, mask in zip(results, found.masks, strict=True):
        assert result["segmentation"]["size"] == [100, 150]
        assert np.array_equal(rle_codec.decode(result["segmentation"]).astype(bool), mask.numpy())


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    for options, told in (
        (["--overlap", "10"], "give their size with --tile"),
        (["--tile", "64", "--overlap", "64"], "tiles of 64 pixels can share 0 to 63"),
        (["--tile", "8"], "--tile"),
    ):
        assert told in predict(folder, *options, "--out", str(tmp_path / "out"), code=2)
    assert not (tmp_path / "out").exists()


def test_all_orders_of_tiles_unite_the_same() -> None:
    """Which tile comes first decides nothing."""
    image = drawn_objects(5, (120, 120), (10, 90), 12)
    tiles = Tiling(64, 16).windows((120, 120))
    network = Objects([0] * 60)
    parts = [
        tiles_module._kept([tile], network.seen(0, image[0, tile.top : tile.bottom, tile.left : tile.right]))
        for tile in tiles
    ]
    sizes = set()
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        united = tiles_module.unite(order, near=1)
        sizes.add(tuple(sorted(tuple(sorted(part.score for part in group)) for group in united)))
    assert len(sizes) == 1
