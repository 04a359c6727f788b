"""Outlines of detections: within the stated error of their masks, few points, and read back as annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_codec
from scipy import ndimage
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.data.coco import image_records, read_coco
from semiseg.data.outlines import STEP, simplified_outlines
from semiseg.data.shapes import compose
from semiseg.structures.rasterise import outlines_to_rle


def border_distance(mask: np.ndarray, outlines: list[np.ndarray]) -> float:
    """How far the points of an outline, and places between them, are from the border of the mask, in pixels."""
    fine = 16  # places of a pixel in each direction
    padded = np.pad(mask, 2)
    large = np.kron(padded, np.ones((fine, fine), bool))
    border = large & ~ndimage.binary_erosion(large)
    distances = ndimage.distance_transform_edt(~border) / fine
    worst = 0.0
    for ring in outlines:
        for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            places = start + np.linspace(0, 1, 20)[:, None] * (end - start)
            cells = np.floor((places + 2) * fine).astype(int).clip(0, np.array(large.shape[::-1]) - 1)
            worst = max(worst, float(distances[cells[:, 1], cells[:, 0]].max()))
    return worst


@pytest.mark.parametrize("error", [0.36, 1.0, 2.5])
def test_an_outline_keeps_its_error_and_few_points(error: float) -> None:
    points = exact = 0
    for seed in range(3):
        for item in compose(seed, 0, 96)[1]:
            mask = ndimage.binary_fill_holes(item.visible)
            outlines = simplified_outlines(item.visible, error=error)
            assert border_distance(mask, outlines) <= error + 2 / 16
            drawn = rle_codec.decode(
                {
                    "size": list(mask.shape),
                    "counts": outlines_to_rle([ring.reshape(-1) for ring in outlines], mask.shape),
                }
            )
            difference = (drawn.astype(bool) != mask).sum()
            assert difference <= error * 2 * (mask & ~ndimage.binary_erosion(mask)).sum()
            points += sum(map(len, outlines))
            exact += sum(map(len, simplified_outlines(item.visible, error=0)))
    assert points <= exact * {0.36: 1, 1.0: 0.4, 2.5: 0.25}[error]


def test_parts_are_polygons_holes_are_filled_and_nothing_is_none() -> None:
    mask = np.zeros((20, 30), bool)
    assert simplified_outlines(mask, error=1.0) == []
    mask[3:10, 4:20], mask[5:7, 8:12], mask[12:14, 1:3], mask[19, 29] = True, False, True, True
    outlines = simplified_outlines(mask, error=STEP)
    assert [len(ring) for ring in outlines] == [8, 8, 4]
    assert outlines[0].min(0).tolist() == [4, 3]
    assert outlines[0].max(0).tolist() == [20, 10]
    assert outlines[2].max(0).tolist() == [30, 20]  # the pixel in the corner
    for ring in simplified_outlines(mask, error=50.0):
        assert len(ring) >= 3
    whole = simplified_outlines(np.ones((5, 7), bool), error=1.0)
    assert [ring.max(0).tolist() for ring in whole] == [[7, 5]]


def test_the_verb_writes_what_training_reads(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    masks = [item.visible for item in compose(1, 0, 96)[1][:3]]
    images = [{"id": 1, "file_name": "a.png", "height": 96, "width": 96}]
    (folder / "images.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 7, "name": "thing"}]})
    )
    results = []
    for score, mask in zip((0.9, 0.5, 0.3), masks, strict=True):
        rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
        rle["counts"] = rle["counts"].decode()
        x, y, w, h = rle_codec.toBbox(rle).tolist()
        results.append({"image_id": 1, "category_id": 7, "bbox": [x, y, w, h], "score": score, "segmentation": rle})
    (folder / "results.json").write_text(json.dumps(results))

    def call(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["data", "outlines", str(folder), "--out", str(tmp_path / "o.json"), *arguments])
        return done.exit_code, done.output

    assert call() == (0, f"{tmp_path / 'o.json'}: 2 of 3 detections, as outlines\n")
    (record,) = image_records(read_coco(tmp_path / "o.json"))
    assert [each["has_mask"] for each in record["objects"]] == [True, True]
    content = json.loads((tmp_path / "o.json").read_text())
    assert [each["score"] for each in content["annotations"]] == [0.9, 0.5]
    assert [each["area"] for each in content["annotations"]] == [int(mask.sum()) for mask in masks[:2]]
    assert call()[0] == 2
    assert "o.json: is there already; --force replaces it" in call()[1]
    assert call("--force", "--score", "0.2")[1].endswith("3 of 3 detections, as outlines\n")
    (folder / "results.json").write_text("[{}]")
    assert "results.json: result 0: 'image_id' is missing" in call("--force")[1]
    assert len(json.loads((tmp_path / "o.json").read_text())["annotations"]) == 3
