"""A converted BoxInst ResNet-50 against the detections of the reference, whole, where its golden numbers are at hand.

They are too large for this repository. `SEMISEG_GOLDEN=FOLDER pytest -s tests/test_interop_golden.py` compares with the
folder that holds them: `weights.py` (rebuilds the checkpoint), `batch.npz` and `boxinst_r50_eval.npz`.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.structures.outputs import Detections

FOLDER, PEERS = (os.environ.get(name) for name in ("SEMISEG_GOLDEN", "SEMISEG_GOLDEN_PEERS"))
LARGEST_BOX_DIFFERENCE = 0.01  # px
LARGEST_SCORE_DIFFERENCE = 1e-4
SMALLEST_SHARE_OF_EQUAL_PIXELS = 0.999

pytestmark = pytest.mark.skipif(FOLDER is PEERS is None, reason="no folder of golden numbers is named")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if FOLDER is None:
        pytest.skip("SEMISEG_GOLDEN names no folder of golden numbers")
    folder = tmp_path_factory.mktemp("golden")
    checkpoint = folder / "boxinst_r50.pth"
    subprocess.run([sys.executable, str(Path(FOLDER or "") / "weights.py"), "boxinst_r50", str(checkpoint)], check=True)
    told = CliRunner().invoke(app, ["convert", "adelaidet", str(checkpoint), str(folder / "model")])
    assert told.exit_code == 0, told.output
    return folder / "model"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name in ("batch.npz", "boxinst_r50_eval.npz"):
        with np.load(Path(FOLDER or "") / name) as file:
            values |= {key: torch.from_numpy(file[key]) for key in file.files}
    return values


def match(found: Detections, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Which of ours each of the reference's N detections is, (N,); neighbouring scores may have changed places."""
    assert len(found.scores) == len(scores)
    distance = (found.boxes[None] - boxes[:, None]).abs().amax(dim=2)  # (theirs, ours)
    distance[labels[:, None] != found.labels[None]] = torch.inf
    difference = (found.scores[None] - scores[:, None]).abs()
    distance[difference > LARGEST_SCORE_DIFFERENCE] = torch.inf
    partner = distance.argmin(dim=1)
    assert len(set(partner.tolist())) == len(scores), "two of the reference's detections are one of ours"
    box_error = distance.amin(dim=1).max()
    print(f"{len(scores)} detections: boxes {float(box_error):.2e} px, ", end="")
    print(f"scores {float((found.scores[partner] - scores).abs().max()):.2e}")
    assert box_error <= LARGEST_BOX_DIFFERENCE
    return partner


def test_detections_and_masks_of_the_reference(converted: Path, golden: dict[str, Tensor]) -> None:
    model = semiseg.load_model(converted)
    images = [golden[f"image{number}_bgr_u8_chw"].flip(0) for number in range(2)]
    sizes = [tuple(golden[f"image{number}_orig_hw"].tolist()) for number in range(2)]
    for name, threshold in (("det", 0.05), ("detB", 0.62)):
        for number, found in enumerate(semiseg.detect(model, images, output_sizes=sizes, score_threshold=threshold)):
            theirs = {part: golden[f"{name}{number}_{part}"] for part in ("boxes", "scores", "classes", "mask_area")}
            partner = match(found, theirs["boxes"], theirs["scores"], theirs["classes"])
            areas = found.masks[partner].flatten(1).sum(dim=1)
            wrong = float((areas - theirs["mask_area"]).abs().sum() / theirs["mask_area"].sum())
            print(f"  mask areas differ by {wrong:.1e} of their sum")
            assert wrong <= 1 - SMALLEST_SHARE_OF_EQUAL_PIXELS
            if name == "det":
                compare_masks(found.masks[partner], golden[f"det{number}_masks_packed"], sizes[number][1])


def compare_masks(ours: Tensor, packed: Tensor, width: int) -> None:
    """The reference's first masks are packed along the rows."""
    theirs = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)[..., :width]).bool()
    differing = (ours[: len(theirs)] != theirs).flatten(1).sum(dim=1)
    pixels = theirs[0].numel()
    print(f"  {int(differing.sum())} of {theirs.numel()} mask pixels differ, at most {int(differing.max())} in a mask")
    assert int(differing.max()) <= (1 - SMALLEST_SHARE_OF_EQUAL_PIXELS) * pixels


def test_detections_and_masks_of_yolact(tmp_path: Path) -> None:
    """Its golden numbers may lie in another folder, `SEMISEG_GOLDEN_PEERS`, with a `weights.py` and `stretch.py`."""
    if PEERS is None:
        pytest.skip("SEMISEG_GOLDEN_PEERS names no folder of golden numbers")
    checkpoint = tmp_path / "yolact.pth"
    subprocess.run([sys.executable, str(Path(PEERS) / "weights.py"), "yolact_r50_550", str(checkpoint)], check=True)
    told = CliRunner().invoke(app, ["convert", "yolact", str(checkpoint), str(tmp_path / "model")])
    assert told.exit_code == 0, told.output
    stretch = runpy.run_path(str(Path(PEERS) / "stretch.py"))["stretch_u8"]
    with np.load(Path(PEERS) / "batch.npz") as given, np.load(Path(PEERS) / "yolact_r50_550_eval.npz") as values:
        for number in range(2):
            own = {key.removeprefix(f"u8{number}_"): values[key] for key in values.files if f"u8{number}_" in key}
            image = torch.from_numpy(stretch(given[f"image{number}_bgr_u8_chw"], 550)[::-1].copy())
            size = tuple(own["orig_hw"].tolist())
            (found,) = semiseg.detect(semiseg.load_model(tmp_path / "model"), [image], output_sizes=[size])
            boxes, scores, labels = (torch.from_numpy(own[key]) for key in ("boxes_out_float", "scores", "classes"))
            partner = match(found, boxes, scores, labels)
            areas = found.masks[partner].flatten(1).sum(dim=1)
            assert int((areas - torch.from_numpy(own["mask_area"])).abs().max()) <= 4
