"""Contours, rays, positives and the polar loss against the original's numbers (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from semiseg.config.model import FCOSDetector
from semiseg.data.rays import RayRule, contour_centre, contour_rays, largest_contour, ray_targets
from semiseg.engine.detection import fcos_assignment
from semiseg.engine.rays import positives_of, with_rays
from semiseg.losses.rays import polar_centreness, polar_iou_loss, ray_loss_sum
from semiseg.structures.inputs import Supervision
from semiseg.structures.rays import RayTargets
from tests.tiny import box_targets

FILE = Path(__file__).parent / "golden" / "rays.npz"
OURS = [(9 - ray) % 36 for ray in range(36)]  # the original counts from y towards x


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return {key: np.array(file[key]) for key in file.files}


def masks_of(golden: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(np.unpackbits(golden["masks_packed"], axis=-1).astype(bool))


def test_the_file_is_small() -> None:
    assert FILE.stat().st_size <= 50_000


def test_contours_and_centres(golden: dict[str, np.ndarray]) -> None:
    contours = [largest_contour(mask) for mask in masks_of(golden)]
    assert [len(contour) for contour in contours] == golden["contour_points"].tolist()
    assert [contour_centre(contour).tolist() for contour in contours] == golden["mass_centre_xy"].tolist()


def test_rays_at_places(golden: dict[str, np.ndarray]) -> None:
    square = np.zeros((64, 64), dtype=bool)
    square[12:33, 14:35] = True
    crescent = np.unpackbits(golden["crescent_packed"], axis=-1).astype(bool)
    assert contour_centre(largest_contour(crescent)).tolist() == golden["crescent_centre_xy"].tolist()
    shapes = {"square": (square, ("centre", "corner", "outside", "half")), "crescent": (crescent, ("in", "hole"))}
    for name, (mask, places) in shapes.items():
        for place in places:
            at = golden[f"{name}_at_{place}"].astype(np.float64)[None]
            found = contour_rays(largest_contour(mask), at, 36)[0]
            assert found == pytest.approx(golden[f"{name}_rays_{place}"][OURS], abs=1e-4), (name, place)


def test_positives_their_rays_and_centreness(golden: dict[str, np.ndarray]) -> None:
    count, detector = len(golden["boxes"]), FCOSDetector()
    targets = replace(
        box_targets(golden["boxes"].tolist(), [0] * count),
        supervision=torch.full((count,), int(Supervision.MASK)),
        masks=torch.ones(count, 1, 1, dtype=torch.bool),
        mask_instance=torch.arange(count),
        mask_weight=torch.ones(count),
    )
    assign, strides = fcos_assignment(detector), tuple(detector.strides)
    rule = RayRule(
        count=36, contour=True, everywhere=True, positives=partial(positives_of, assign=assign, strides=strides)
    )
    rays = ray_targets(targets, [(mask, (0, 0)) for mask in masks_of(golden)], rule, (256, 384), 1)
    assert rays.location_index.tolist() == golden["positive_location"].tolist()
    assert rays.instance_index.tolist() == golden["positive_instance"].tolist()
    torch.testing.assert_close(rays.distances, torch.tensor(golden["positive_rays"][:, OURS]), rtol=0, atol=1e-4)
    targets = replace(targets, rays=rays)
    sizes = [(int(height), int(width)) for height, width in golden["level_hw"]]
    assignment, queries = with_rays(assign(targets, sizes_hw=sizes, num_images=1), targets)
    starts = np.cumsum([0] + [height * width for height, width in sizes])
    stride = np.array(strides)[np.searchsorted(starts, golden["positive_location"], side="right") - 1]
    found = assignment.box_distances.numpy() * stride[:, None]
    assert found == pytest.approx(golden["positive_distances"], abs=1e-4)
    loss = F.binary_cross_entropy_with_logits(torch.tensor(golden["centreness_logits"]), assignment.centreness)
    assert float(loss) == pytest.approx(float(golden["centreness_loss"]), rel=1e-6)
    assert torch.equal(polar_centreness(rays.distances), assignment.centreness)
    assert torch.equal(queries.location_index, rays.location_index)


def test_the_polar_loss(golden: dict[str, np.ndarray]) -> None:
    predicted = torch.tensor(golden["predicted"]).requires_grad_()
    target = torch.tensor(golden["target"])
    weight = polar_centreness(target)
    assert weight.numpy() == pytest.approx(golden["polar_centreness"], rel=1e-6)
    assert polar_iou_loss(predicted, target).detach().numpy() == pytest.approx(golden["losses"], abs=1e-6)
    nothing = torch.zeros(len(target), dtype=torch.int64)
    targets = RayTargets(torch.zeros(1, 2), nothing, nothing, target, everywhere=True)
    loss = ray_loss_sum(predicted, targets, torch.ones(1)) / weight.sum()
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient.numpy() == pytest.approx(golden["gradient"], abs=1e-6 * float(abs(golden["gradient"]).max()))
