"""What each way to say a mask could reach, beside what can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.analysis.ceilings import filled_box, main, measure, rays, region, summary, whole_map
from tests.coco_files import make_coco, polygon_annotation


def iou(drawn: torch.Tensor, mask: np.ndarray) -> float:
    return float((drawn.numpy() & mask).sum() / (drawn.numpy() | mask).sum())


def test_a_rectangle_on_the_cells_is_said_without_loss() -> None:
    mask = np.zeros((40, 48), dtype=bool)
    mask[8:24, 12:40] = True
    box = torch.tensor([12.0, 8, 40, 24])
    assert iou(filled_box(mask, box), mask) == 1
    assert iou(whole_map(mask, box, stride=1), mask) == 1
    assert iou(region(mask, box, cells=56, margin=1.0), mask) > 0.98
    assert iou(rays(mask, box, count=360, from_mass=True), mask) > 0.9
    coarse, fine = (iou(whole_map(mask, box, stride=stride), mask) for stride in (8, 2))
    assert coarse < fine < 1.001


def test_a_hole_is_not_said_by_rays() -> None:
    rows, columns = np.mgrid[:64, :64] - 31.5
    radius = np.hypot(rows, columns)
    ring = (radius < 25) & (radius > 12)
    box = torch.tensor([7.0, 7, 57, 57])
    assert iou(rays(ring, box, count=36, from_mass=False), ring) == pytest.approx(1 - 12**2 / 25**2, abs=0.02)
    assert iou(whole_map(ring, box, stride=2), ring) > 0.9
    assert iou(filled_box(ring, box), ring) == pytest.approx(ring.sum() / 2500)


def test_the_ceiling_is_the_share_of_thresholds_that_are_reached() -> None:
    mean, ceiling = summary(np.array([1.0, 0.74, 0.3]))
    assert mean == pytest.approx(100 * 2.04 / 3)
    assert ceiling == pytest.approx(100 * (10 + 5 + 0) / 30)


def test_the_script_measures_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = polygon_annotation(1, image_id=1, category_id=1, points=[8, 8, 40, 8, 40, 40, 8, 40])
    files = make_coco(tmp_path, annotations=[square])
    assert measure(files.annotations)["filled box"] == (100, 100)
    main([str(files.annotations), "--csv", str(tmp_path / "ceilings.csv")])
    assert "| filled box " in capsys.readouterr().out
    assert (tmp_path / "ceilings.csv").read_text().splitlines()[:2] == ["way,iou,ceiling", "filled box,100.0,100.0"]
