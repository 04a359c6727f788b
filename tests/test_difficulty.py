"""The measurement itself against cases one can count, and Shapes against what is demanded of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from semiseg.data.shapes import ensure_shapes
from semiseg.errors import UserError
from semiseg.evaluation.difficulty import Difficulty, measure_difficulty, same_label


@pytest.fixture(scope="module")
def shapes_difficulty(tmp_path_factory: pytest.TempPathFactory) -> Difficulty:
    folder = ensure_shapes(tmp_path_factory.mktemp("data"), images=100, image_size=128, seed=100)
    return measure_difficulty(
        folder / "annotations.json",
        folder / "images",
        affinity=_affinity_stride2,
        stride=2,
        size=3,
        dilation=1,
        thresholds=(0, 0.1, 0.3),
    )


def test_boxes_of_shapes_say_little_about_masks(shapes_difficulty: Difficulty) -> None:
    assert shapes_difficulty.overall.low_fill >= 0.2
    assert shapes_difficulty.instances_per_image[0] >= 2
    assert all(row.instances >= 10 for row in shapes_difficulty.classes.values())
    assert len(shapes_difficulty.classes) == 12
    assert 0.7 < shapes_difficulty.overall.visible < 0.97
    assert shapes_difficulty.overall.foreign > 0.05


def test_colours_of_shapes_say_much_but_not_all(shapes_difficulty: Difficulty) -> None:
    edges = shapes_difficulty.edges
    assert edges[0].share == 1
    assert 0.85 <= edges[0].positive <= 0.97
    assert 0.97 <= edges[0.1].positive < 0.995
    assert 0.97 <= edges[0.3].positive < 1
    assert 0.3 < edges[0.3].share < edges[0.1].share < 0.8


def test_counts_by_hand(tmp_path: Path) -> None:
    """4 x 4 pixels, stride 1, all eight neighbours: 24 horizontal, 24 vertical and 36 diagonal ordered pairs.

    Columns 0, 1 are the first object, in a box over everything: 8 horizontal and 12 diagonal pairs cross its edge.
    Column 2 is the second, in a box of columns 2 and 3.
    """
    first, second = np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4), dtype=np.uint8)
    first[:, :2], second[:, 2] = 1, 1
    pixels = np.full((4, 4, 3), 200, dtype=np.uint8)
    pixels[:, :2] = 0
    file = _write(tmp_path, pixels, [(1, first, [0, 0, 4, 4]), (2, second, [2, 0, 2, 4])])
    found = measure_difficulty(
        file, tmp_path, affinity=_same_colour_stride1, stride=1, size=3, dilation=1, thresholds=(0, 0.5)
    )
    # Box 2: the boundary runs between columns 2 and 3 and between 1 and 2. By centre: column 2 has 4 + 4 horizontal,
    # 3 + 3 vertical and 12 diagonal pairs; of those the vertical ones have the same label. Column 3 has 4 horizontal
    # ones (all crossing), 6 vertical ones and 6 diagonal ones (all crossing).
    all_2, positive_2 = (8 + 6 + 12) + (4 + 6 + 6), 6 + 6
    assert found.edges[0].positive == pytest.approx((64 + positive_2) / (84 + all_2))
    # Same colour: never across columns 1 | 2. In box 1 that leaves the positive ones, 64. In box 2, 4 horizontal and 6
    # diagonal pairs go.
    assert found.edges[0.5].share == pytest.approx((64 + all_2 - 10) / (84 + all_2))
    assert found.edges[0.5].positive == pytest.approx((64 + positive_2) / (64 + all_2 - 10))
    assert found.overall.fill == pytest.approx(0.5)
    assert found.overall.low_fill == 0
    assert found.classes["b"].foreign == 0
    assert found.classes["a"].foreign == pytest.approx(0.25)
    assert math.isnan(found.overall.visible)
    assert found.instances_per_image == (2, 2, 2)
    assert "a                                1          50.0 %           0.0 %          25.0 %" in found.render()


@pytest.mark.parametrize(("shape", "stride"), [((9, 12), 2), ((13, 10), 4), ((7, 7), 1)])
def test_same_label_in_plain_loops(shape: tuple[int, int], stride: int) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5
    same, inside = same_label(mask, stride=stride, size=3, dilation=2)
    rows, columns = (-(-n // stride) for n in shape)
    shifts = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if (dy, dx) != (0, 0)]
    assert same.shape == inside.shape == (8, rows, columns)
    for k, (dy, dx) in enumerate(shifts):
        for i in range(rows):
            for j in range(columns):
                y, x, v, u = (stride * n + stride // 2 for n in (i, j, i + dy, j + dx))
                expected = y < shape[0] and x < shape[1] and 0 <= v < shape[0] and 0 <= u < shape[1]
                assert inside[k, i, j] == expected
                if expected:
                    assert same[k, i, j] == (mask[y, x] == mask[v, u])


def test_crowd_and_box_only_instances_count_nowhere(tmp_path: Path) -> None:
    mask = np.ones((4, 4), dtype=np.uint8)
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    file = _write(tmp_path, pixels, [(1, mask, [0, 0, 4, 4]), (1, mask, [0, 0, 4, 4]), (1, mask, [0, 0, 4, 4])])
    document = json.loads(file.read_text())
    document["annotations"][0]["iscrowd"] = 1
    del document["annotations"][1]["segmentation"]
    file.write_text(json.dumps(document))
    found = _measure(file, tmp_path)
    assert found.overall.instances == 1
    assert found.overall.foreign == 0
    document["annotations"] = document["annotations"][:2]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="no instance with a mask"):
        _measure(file, tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    mask = np.ones((4, 4), dtype=np.uint8)
    file = _write(tmp_path, np.zeros((4, 5, 3), dtype=np.uint8), [(1, mask, [0, 0, 4, 4])])
    with pytest.raises(UserError, match=r"0\.png: is 5 x 4 pixels, but annotated as 4 x 4"):
        _measure(file, tmp_path)
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: not a readable image"):
        _measure(file, tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not a readable COCO"):
        _measure(file, tmp_path)


def _measure(file: Path, folder: Path) -> Difficulty:
    return measure_difficulty(
        file, folder, affinity=_same_colour_stride1, stride=1, size=3, dilation=1, thresholds=(0,)
    )


def _write(folder: Path, pixels: NDArray[np.uint8], objects: list) -> Path:
    Image.fromarray(pixels).save(folder / "0.png")
    annotations = []
    for number, (category, mask, box) in enumerate(objects, start=1):
        rle = coco_mask.encode(np.asfortranarray(mask))
        rle["counts"] = rle["counts"].decode()
        annotations.append(
            {"id": number, "image_id": 1, "category_id": category, "bbox": box, "segmentation": rle, "iscrowd": 0}
        )
    document = {
        "images": [{"id": 1, "file_name": "0.png", "height": 4, "width": 4}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder / "a.json"


def _same_colour_stride1(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return _similarity(image.astype(float), dilation=1)


def _affinity_stride2(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Colour affinity in plain numpy: 2 x 2 average, truncated, CIE Lab (D65), exp(-distance / 2)."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    pooled = np.floor(image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean(axis=(1, 3))) / 255
    linear = np.where(pooled > 0.04045, ((pooled + 0.055) / 1.055) ** 2.4, pooled / 12.92)
    to_xyz = np.array([[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169], [0.019334, 0.119193, 0.950227]])
    ratio = linear @ to_xyz.T / (0.95047, 1.0, 1.08883)
    x, y, z = np.moveaxis(np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116), 2, 0)
    return _similarity(np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1), dilation=1)


def _similarity(values: NDArray[np.float64], *, dilation: int) -> NDArray[np.float64]:
    height, width = values.shape[:2]
    d = dilation
    padded = np.pad(values, ((d, d), (d, d), (0, 0)))
    shifts = [(dy, dx) for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]
    gaps = [padded[d + dy : d + dy + height, d + dx : d + dx + width] - values for dy, dx in shifts]
    return np.stack([np.exp(-np.linalg.norm(gap, axis=-1) / 2) for gap in gaps])
