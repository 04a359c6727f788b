"""The measurement itself against cases one can count, and Shapes against what is demanded of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from examples.analysis.box_fill import main, measure_box_fill
from examples.analysis.edges import EdgeShare, Neighbourhood, measure_edges
from semiseg.data.shapes import ensure_shapes
from semiseg.errors import UserError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("data"), images=100, image_size=128, seed=100)


def test_boxes_of_shapes_say_little_about_masks(shapes: Path) -> None:
    fill = measure_box_fill(shapes / "annotations.json")
    assert fill.overall.low_fill >= 0.2
    assert fill.instances_per_image[0] >= 2
    assert all(row.instances >= 10 for row in fill.classes.values())
    assert len(fill.classes) == 12
    assert 0.7 < fill.overall.visible < 0.97
    assert fill.overall.foreign > 0.05


def test_colours_of_shapes_say_much_but_not_all(shapes: Path) -> None:
    found = edges_of(shapes / "annotations.json", shapes / "images", stride=2, thresholds=(0, 0.1, 0.3))
    every, some, few = found
    assert every.share == 1
    assert 0.85 <= every.positive <= 0.97
    assert 0.97 <= some.positive < 0.995
    assert 0.97 <= few.positive < 1
    assert 0.3 < few.share < some.share < 0.8


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 x 4 pixels, stride 1, all eight neighbours: 24 horizontal, 24 vertical and 36 diagonal ordered pairs.

    Columns 0, 1 are the first object, in a box over everything: 8 horizontal and 12 diagonal pairs cross its edge.
    Column 2 is the second, in a box of columns 2 and 3.
    """
    first, second = np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4), dtype=np.uint8)
    first[:, :2], second[:, 2] = 1, 1
    pixels = np.full((4, 4, 3), 200, dtype=np.uint8)
    pixels[:, :2] = 0
    file = _write(tmp_path, pixels, [(1, first, [0, 0, 4, 4]), (2, second, [2, 0, 2, 4])])
    every, alike = edges_of(file, tmp_path, stride=1, thresholds=(0, 0.5))
    # Box 2: the boundary runs between columns 2 and 3 and between 1 and 2. By centre: column 2 has 4 + 4 horizontal,
    # 3 + 3 vertical and 12 diagonal pairs; of those the vertical ones have the same label. Column 3 has 4 horizontal
    # ones (all crossing), 6 vertical ones and 6 diagonal ones (all crossing).
    all_2, positive_2 = (8 + 6 + 12) + (4 + 6 + 6), 6 + 6
    assert every.edges == 84 + all_2
    assert every.positive == pytest.approx((64 + positive_2) / (84 + all_2))
    # Same colour: never across columns 1 | 2. In box 1 that leaves the positive ones, 64. In box 2, 4 horizontal and 6
    # diagonal pairs go.
    assert alike.share == pytest.approx((64 + all_2 - 10) / (84 + all_2))
    assert alike.positive == pytest.approx((64 + positive_2) / (64 + all_2 - 10))
    found = measure_box_fill(file)
    assert found.overall.fill == pytest.approx(0.5)
    assert found.overall.low_fill == 0
    assert found.classes["b"].foreign == 0
    assert found.classes["a"].foreign == pytest.approx(0.25)
    assert math.isnan(found.overall.visible)
    assert found.instances_per_image == (2, 2, 2)
    assert "a                                1          50.0 %           0.0 %          25.0 %" in found.render()
    main([str(file), "--max-images", "1"])
    assert capsys.readouterr().out == f"{found.render()}\n"


def test_crowd_and_box_only_instances_count_nowhere(tmp_path: Path) -> None:
    mask = np.ones((4, 4), dtype=np.uint8)
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    file = _write(tmp_path, pixels, [(1, mask, [0, 0, 4, 4]), (1, mask, [0, 0, 4, 4]), (1, mask, [0, 0, 4, 4])])
    document = json.loads(file.read_text())
    document["annotations"][0]["iscrowd"] = 1
    del document["annotations"][1]["segmentation"]
    file.write_text(json.dumps(document))
    found = measure_box_fill(file)
    assert found.overall.instances == 1
    assert found.overall.foreign == 0
    document["annotations"] = document["annotations"][:2]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="no instance with a mask"):
        measure_box_fill(file)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not "):
        measure_box_fill(tmp_path / "a.json")


def edges_of(annotations: Path, images: Path, *, stride: int, thresholds: Sequence[float]) -> tuple[EdgeShare, ...]:
    """All eight neighbours, at the stored resolution."""
    return measure_edges(
        annotations,
        images,
        neighbourhoods=[Neighbourhood(3, 1)],
        thresholds=thresholds,
        stride=stride,
        short_side=0,
        long_side=0,
        bottom_rows=0,
    ).shares


def _write(folder: Path, pixels: NDArray[np.uint8], objects: list[Any]) -> Path:
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
