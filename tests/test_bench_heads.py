"""The benchmark's rows of mask heads: their sides agree, and a wrong result is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import heads
from benchmarks.__main__ import main
from benchmarks.measure import Place
from benchmarks.rows import NAMED_ROWS
from semiseg.engine.predict import encode_masks

NAMES = ("mask_rcnn_step", "mask_rcnn_detect", "crop_losses", "step_prototypes", "step_rays", "step_regions")


def test_the_rows_of_mask_heads_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.name for row in NAMED_ROWS][-len(NAMES) :] == list(NAMES)
    chosen = [text for name in NAMES for text in ("--only", name)]
    assert main(["--tiny", *chosen, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"]: row["same_result"] for row in rows} == dict.fromkeys(NAMES, True)


def found() -> dict[str, Any]:
    """Three detections, of which the first two have one label."""
    masks = torch.zeros(3, 40, 50, dtype=torch.bool)
    masks[0, 2:30, 3:40] = masks[1, 5:20, 5:20] = masks[2, 10:39, 8:49] = True
    boxes = np.array([[3.0, 2, 40, 30], [5, 5, 20, 20], [8, 10, 49, 39]])
    return {
        "boxes": boxes,
        "scores": np.array([0.9, 0.8, 0.7]),
        "labels": np.array([1, 1, 2]),
        "rles": encode_masks(masks),
    }


def test_detections_are_the_same_in_any_order_and_nothing_else() -> None:
    theirs = found()
    order = [2, 0, 1]
    moved = {name: [values[k] for k in order] for name, values in theirs.items()}
    ours = {name: values if name == "rles" else np.array(values) for name, values in moved.items()}
    assert heads.same_detections(ours, theirs)
    for name, wrong in (("boxes", 1.0), ("scores", 0.01), ("labels", 1)):
        assert not heads.same_detections({**ours, name: np.add(ours[name], wrong)}, theirs), name
    assert not heads.same_detections({**ours, "rles": ours["rles"][::-1]}, theirs)
    assert not heads.same_detections({name: values[:2] for name, values in ours.items()}, theirs)


def test_the_row_of_crops_notices_a_wrong_gradient(tmp_path: Path) -> None:
    task = heads.prepare_crops("ours", heads.CROP_LOSSES.sizes_at("tiny"), Place(torch.device("cpu"), tmp_path))
    right = {name: value.numpy() for name, value in task.run().items()}
    assert heads.CROP_LOSSES.agree(right, right)
    for name, values in right.items():
        changed = values.copy()
        changed.flat[np.abs(values).argmax()] *= 1.01
        assert not heads.CROP_LOSSES.agree({**right, name: changed}, right), name
