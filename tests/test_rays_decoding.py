"""PolarMask's own decoding (`inference.decoding`) against its numbers, and polygons against plain loops."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semiseg.config import InferenceConfig, RunConfig
from semiseg.config.read import digest
from semiseg.engine.checkpoint import ModelInfo, load_model_folder, save_model
from semiseg.engine.predict import collected, find_instances
from semiseg.errors import UserError
from semiseg.losses.detection import detection_losses
from semiseg.losses.rays import polar_centreness
from semiseg.models.build import build_model
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.detectors.select import select_detections
from semiseg.models.masks.rays import ray_ends
from semiseg.models.paste import fill_outlines, to_output_boxes
from semiseg.structures.outputs import Assignment, Candidates, DenseOutputs
from tests.tiny import DETECTORS, HEADS, tiny_config

FOLDER = Path(__file__).parent / "golden"
OURS = [(9 - ray) % 36 for ray in range(36)]  # the original counts from y towards x
STRIDES = (8, 16, 32, 64, 128)
INPUT_HW, OUTPUT_HW = (256, 320), (160, 200)
LIMITS = {"score_threshold": 0.05, "candidates_per_level": 1000, "nms_threshold": 0.5, "max_detections": 100}


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as file:
        return {key: np.array(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return read("rays_decoding.npz")


def maps(kind: str, channels: int) -> Tensor:
    """(R, channels) of a map that is drawn for each level of 256 x 384 pixels (tests/golden/README.md)."""
    levels = []
    for level, stride in enumerate(STRIDES):
        shape = (1, channels, 256 // stride, 384 // stride)
        seed = zlib.crc32(f"polar_a.{kind}{level}".encode())
        drawn = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if kind in ("box", "ray"):
            drawn = np.exp((0.5 if kind == "box" else 0.3) * drawn + 3 + np.float32(0.4) * level)
        levels.append(torch.from_numpy(drawn)[0].flatten(1).T)
    return torch.cat(levels)


def dense_outputs(class_logits: Tensor) -> DenseOutputs:
    sizes = [(256 // stride, 384 // stride) for stride in STRIDES]
    locations = make_locations(sizes, STRIDES, torch.device("cpu"))
    boxes = maps("box", 4) / locations.stride[:, None]
    return DenseOutputs(
        class_logits=class_logits[None],
        box_distances=boxes[None],
        centreness_logits=maps("ctr", 1).T,
        locations=locations,
    )


@pytest.fixture(scope="module")
def decoded() -> tuple[Candidates, Tensor]:
    """What we choose from the golden maps, and the outlines of its masks."""
    logits = 1.1 * maps("dcls", 80) - 5.2
    logits[:, 6:] -= 15
    outputs = dense_outputs(logits)
    limits = InferenceConfig(decoding="polarmask", nms_threshold=0.5).model_dump(include={*LIMITS, "decoding"})
    (found,) = select_detections(outputs, torch.tensor([INPUT_HW]), size_divisor=128, **limits)
    place = found.queries.location_index
    return found, ray_ends(maps("ray", 36)[place][:, OURS], outputs.locations.xy[place])


# The original's detections --------------------------------------------------------------------------------------------


def test_the_file_is_small() -> None:
    assert (FOLDER / "rays_decoding.npz").stat().st_size <= 50_000


def in_the_image(golden: dict[str, np.ndarray]) -> np.ndarray:
    """(100,) bool: detections whose box has an area; the others were predicted in the padding."""
    low, high = golden["det_boxes"][:, :2], golden["det_boxes"][:, 2:]
    inside = np.asarray((high > low).all(1))
    assert inside.sum() == 91
    return inside


def test_boxes_scores_and_order(golden: dict[str, np.ndarray], decoded: tuple[Candidates, Tensor]) -> None:
    """All but theirs beside the image, of which nothing is left in it."""
    (found, _), inside = decoded, in_the_image(golden)
    assert found.labels.tolist() == golden["det_labels"][inside].tolist()
    assert 1.5 * found.scores.numpy() == pytest.approx(golden["det_scores"][inside], abs=1e-6)
    boxes = to_output_boxes(found.boxes_xyxy, INPUT_HW, OUTPUT_HW)
    assert boxes.numpy() == pytest.approx(golden["det_boxes"][inside], abs=1e-3)


def test_masks(golden: dict[str, np.ndarray], decoded: tuple[Candidates, Tensor]) -> None:
    """Rays along an axis may end on a whole pixel; theirs are then cut by rounding to the one before."""
    masks = fill_outlines(decoded[1], INPUT_HW, OUTPUT_HW)
    theirs = np.unpackbits(golden["det_masks_packed_first30"], axis=-1)[..., :200].astype(bool)
    points = torch.from_numpy(golden["det_polygons_cut"]).transpose(1, 2)
    cut = fill_outlines(points.float(), OUTPUT_HW, OUTPUT_HW)
    assert np.array_equal(cut[:30].numpy(), theirs)
    assert cut.sum((1, 2)).tolist() == golden["det_mask_area"].tolist()
    differing = (masks != cut[torch.from_numpy(in_the_image(golden))]).sum((1, 2))
    assert (int((differing > 0).sum()), int(differing.max()), int(differing.sum())) == (12, 17, 85)


def test_ends_of_rays(golden: dict[str, np.ndarray]) -> None:
    ends = ray_ends(torch.from_numpy(golden["decode_rays"][:, OURS]), torch.from_numpy(golden["decode_points"]))
    inside = torch.minimum(ends.clamp(min=0), torch.tensor([319.0, 255.0]))
    theirs = torch.from_numpy(golden["decode_polygon"])[:, :, OURS].transpose(1, 2)
    torch.testing.assert_close(inside, theirs, rtol=0, atol=1e-3)


# What is not the original's: the loss of boxes ------------------------------------------------------------------------


def original_box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """-ln IoU of boxes by their distances left, top, right, bottom, both pixels at the ends of a side counted."""
    width, height = (torch.minimum(predicted[:, a], target[:, a]) + torch.minimum(predicted[:, b], target[:, b]) + 1
                     for a, b in ((0, 2), (1, 3)))  # fmt: skip
    areas = sum((each[:, 0] + each[:, 2] + 1) * (each[:, 1] + each[:, 3] + 1) for each in (predicted, target))
    return -(width * height / (areas - width * height)).log()


def test_the_loss_of_boxes(golden: dict[str, np.ndarray]) -> None:
    """Theirs by its formula with our weights and divisor; ours is FCOS's, at the stated distance (docs/NUMERICS.md)."""
    predicted, target = (torch.from_numpy(golden[f"box_{name}_ltrb"]) for name in ("pred", "target"))
    predicted.requires_grad_()
    loss = original_box_loss(predicted, target).mean()
    assert float(loss.detach()) == pytest.approx(float(golden["box_iou_loss_mean"]), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient.numpy() == pytest.approx(golden["box_iou_grad"], abs=1e-6)
    known = read("rays.npz")
    place, target = torch.from_numpy(known["positive_location"]), torch.from_numpy(known["positive_distances"])
    weight, outputs = polar_centreness(torch.from_numpy(known["positive_rays"])), dense_outputs(maps("cls", 80) - 5)
    theirs = (original_box_loss(maps("box", 4)[place], target) * weight).sum() / weight.sum()
    assert float(theirs) == pytest.approx(float(golden["head_loss_bbox"]), rel=1e-5)
    stride, nothing = outputs.locations.stride[place, None], torch.zeros_like(place)
    ignored = torch.zeros(1, len(outputs.locations.xy), dtype=torch.bool)
    assignment = Assignment(nothing, place, nothing, target / stride, weight, ignored)
    ours = detection_losses(outputs, assignment, torch.tensor([0]))["box"] / weight.sum()
    assert float(ours) == pytest.approx(0.770, abs=1e-3)


# Choice ---------------------------------------------------------------------------------------------------------------


def choose(
    decoding: str, boxes: list[list[float]], probabilities: list[float], centreness: float, **limits: Any
) -> Any:
    """Detections of one class, from as many locations in a row of an input of 40 x 64 pixels, at stride 8."""
    locations = make_locations([(5, 8)], [8], torch.device("cpu"))
    logits, distances = torch.full((40, 1), -20.0), torch.zeros(40, 4)
    for place, (box, probability) in enumerate(zip(boxes, probabilities, strict=True)):
        x, y = locations.xy[place].tolist()
        distances[place] = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y]) / 8
        logits[place] = torch.tensor(probability).logit()
    centre = torch.tensor(centreness).logit().expand(1, 40)
    outputs = DenseOutputs(
        class_logits=logits[None], box_distances=distances[None], centreness_logits=centre, locations=locations
    )
    return select_detections(outputs, torch.tensor([[40, 64]]), decoding=decoding, **{**LIMITS, **limits})[0]


def test_scores_and_threshold() -> None:
    box = [[1.0, 2.0, 20.0, 30.0]]
    polar = choose("polarmask", box, [0.6], 0.25)
    assert polar.scores.tolist() == pytest.approx([0.6 * 0.75 / 1.5])
    assert choose("usual", box, [0.6], 0.25).scores.tolist() == pytest.approx([0.15**0.5])
    # The threshold asks the class alone, of the usual score the product.
    assert len(choose("polarmask", box, [0.06], 0.1)) == 1
    assert len(choose("polarmask", box, [0.04], 0.99)) == 0
    assert len(choose("usual", box, [0.06], 0.1)) == 0


def test_boxes_end_in_the_image_and_count_both_ends() -> None:
    # Of 10 x 10 and 5 x 10 pixels as the original counts: IoU one half, which stays; without the + 1 it is 36 / 81.
    pair = [[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 4.0, 9.0]]
    assert len(choose("polarmask", pair, [0.9, 0.8], 0.5)) == 2
    assert len(choose("polarmask", pair, [0.9, 0.8], 0.5, nms_threshold=0.49)) == 1
    assert len(choose("usual", pair, [0.9, 0.8], 0.5, nms_threshold=0.49)) == 2
    # Alike in the image, not beyond it.
    beyond = [[-50.0, 2.0, 90.0, 30.0], [-2.0, 2.0, 66.0, 30.0]]
    clipped = choose("polarmask", beyond, [0.9, 0.8], 0.5)
    assert clipped.boxes_xyxy.tolist() == [[0, 2, 63, 30]]
    assert len(choose("usual", beyond, [0.9, 0.8], 0.5)) == 2
    assert len(choose("polarmask", [], [], 0.5)) == 0


# Polygons -------------------------------------------------------------------------------------------------------------


def filled(points: list[tuple[int, int]], size_hw: tuple[int, int]) -> np.ndarray:
    """Pixel by pixel: on a side, or with an odd number of sides to the left of it."""
    mask = np.zeros(size_hw, dtype=bool)
    sides = list(zip(points, points[1:] + points[:1], strict=True))
    for y in range(size_hw[0]):
        for x in range(size_hw[1]):
            left = 0
            for (x0, y0), (x1, y1) in sides:
                if min(y0, y1) <= y < max(y0, y1):
                    left += (x - x0) * abs(y1 - y0) > (y - y0) * (x1 - x0) * (1 if y1 > y0 else -1)
            mask[y, x] = left % 2
    for start, end in sides:
        (x0, y0), (x1, y1) = (end, start) if end[0] < start[0] else (start, end)
        steps = max(abs(x1 - x0), abs(y1 - y0))
        for step in range(steps + 1):
            across, down = (step * abs(way) / max(steps, 1) for way in (x1 - x0, y1 - y0))
            along = [int(np.ceil(way - 0.5)) for way in (across, down)]  # halves stay behind
            mask[y0 + along[1] * (1 if y1 >= y0 else -1), x0 + along[0]] = True
    return mask


def fill(points: Any, size_hw: tuple[int, int]) -> np.ndarray:
    return fill_outlines(torch.tensor(points, dtype=torch.float32)[None], size_hw, size_hw)[0].numpy()


def test_polygons_beside_plain_loops_and_opencv() -> None:
    """Whatever they are: crossing themselves, of points that repeat or lie on a line."""
    random = np.random.default_rng(1)
    for _ in range(150):
        points = random.integers(0, random.integers(2, 24), (random.integers(1, 9), 2))
        found = fill(points, (24, 25))
        assert np.array_equal(found, filled([(int(x), int(y)) for x, y in points], (24, 25))), points
        assert found[points[:, 1], points[:, 0]].all()
    cv2 = pytest.importorskip("cv2")
    for _ in range(300):
        points = random.integers(0, 40, (random.integers(1, 12), 2))
        theirs = np.zeros((40, 41), dtype=np.uint8)
        cv2.drawContours(theirs, [points.astype(np.int32)[:, None]], -1, 1, -1)
        assert np.array_equal(fill(points, (40, 41)), theirs.astype(bool)), points


def test_polygons_one_can_fill_in_the_head() -> None:
    assert fill([[1, 1], [3, 1], [3, 3], [1, 3]], (5, 5)).sum() == 9, "both ends of each side"
    assert np.argwhere(fill([[2, 3]] * 4, (5, 5))).tolist() == [[3, 2]]
    assert np.argwhere(fill([[0, 2], [4, 2]], (5, 5))).tolist() == [[2, x] for x in range(5)]
    assert fill_outlines(torch.zeros(0, 36, 2), (8, 8), (4, 6)).shape == (0, 4, 6)
    # Brought into the image, then scaled, then cut: 7 x 1.5 = 10.5, 7 x 0.5 = 3.5.
    outline = torch.tensor([[[-5.0, -5.0], [99.0, -5.0], [99.0, 99.0], [-5.0, 99.0]]])
    mask = fill_outlines(outline, (8, 8), (4, 12))[0]
    assert mask[:, :11].all()
    assert not mask[:, 11].any()
    # A whole pixel but for rounding.
    assert np.argwhere(fill([[2.99999, 1.99999]], (5, 5))).tolist() == [[2, 3]]


# In use ---------------------------------------------------------------------------------------------------------------


def polar_config(decoding: str = "polarmask", **model: Any) -> RunConfig:
    return tiny_config(Path(), model=model or {"mask_head": HEADS["rays"]}, inference={"decoding": decoding})


@pytest.mark.parametrize("decoding", ["usual", "polarmask"])
def test_images_are_decoded_as_configured(decoding: str) -> None:
    config = polar_config(decoding)
    torch.manual_seed(3)
    model = build_model(config.model, num_classes=3).eval().requires_grad_(False)
    model.detector.class_logits.bias.fill_(-1.0)  # type: ignore[union-attr, operator]
    model.detector.box_distances.bias.fill_(2.0)  # type: ignore[union-attr, operator]
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    limits = config.inference.model_copy(update={"max_detections": 7})
    (instances,) = find_instances(model, [image], output_sizes=[(50, 80)], limits=limits)
    found = collected(instances)
    assert len(found) == 7
    sizes = torch.tensor([[64, 96]])
    outputs = model(image[None], sizes)
    (chosen,) = model.candidates(outputs, sizes, **limits.model_dump(include={*LIMITS, "decoding"}))
    assert torch.equal(found.scores, chosen.scores)
    predicted = model.predict_masks(outputs, chosen.queries)
    assert predicted.outlines_xy is not None
    polygons = fill_outlines(predicted.outlines_xy, (64, 96), (50, 80))
    assert torch.equal(found.masks, polygons) == (decoding == "polarmask")
    both, either = (found.masks & polygons).sum((1, 2)), (found.masks | polygons).sum((1, 2))
    assert float((both / either).min()) > 0.6, "the same shapes"


def test_without_detections() -> None:
    config = polar_config()
    model = build_model(config.model, num_classes=3).eval().requires_grad_(False)
    limits = config.inference.model_copy(update={"score_threshold": 1.0})
    (instances,) = find_instances(
        model, [torch.zeros(3, 64, 64, dtype=torch.uint8)], output_sizes=[(9, 8)], limits=limits
    )
    assert collected(instances).masks.shape == (0, 9, 8)


def test_other_heads_and_detectors_are_refused(tmp_path: Path) -> None:
    wanted = (
        r"inference.decoding = 'polarmask' needs model.mask_head.kind = 'rays' on model.detector.kind = 'fcos', not "
    )
    with pytest.raises(UserError, match=wanted + "'dynamic' on 'fcos'"):
        polar_config(mask_head=HEADS["dynamic"])
    with pytest.raises(UserError, match=wanted + "'regions' on 'regions'"):
        polar_config(**DETECTORS["mask_rcnn"])
    with pytest.raises(UserError, match=r"inference.decoding.*'usual' or 'polarmask'"):
        polar_config("polar")
    config = tiny_config(Path())
    info = ModelInfo(config.model, config.inference, ("a",), (1,))
    save_model(tmp_path / "model", build_model(config.model, num_classes=1).state_dict(), info)
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["inference"]["decoding"] = "polarmask"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=wanted):
        load_model_folder(tmp_path / "model")


def test_identities_and_thresholds() -> None:
    usual, polar = polar_config("usual"), polar_config()
    assert "decoding" not in str(usual.identity())
    assert digest(usual.identity()) != digest(polar.identity())
    assert polar.identity()["inference"] == {"decoding": "polarmask"}
    assert usual.model.threshold_of(0.5) == 0.25
    assert polar.model.threshold_of(0.5, "polarmask") == 0.5
