"""Post-processing on predictions made by hand: thresholds, levels, NMS, clipping, masks, batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from torch import Tensor

from benchmarks import straightforward as plain
from semiseg.engine.predict import ImageDetections, coco_results, encode_masks, encode_placed
from semiseg.models import paste
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.detectors.select import select_detections
from semiseg.models.paste import (
    MaskPredictor,
    iter_masks,
    paste_masks,
    paste_probabilities,
    placed_masks,
    to_output_boxes,
)
from semiseg.structures.grids import Regions, WholeMap
from semiseg.structures.masks import PlacedMask
from semiseg.structures.outputs import Candidates, DenseOutputs, Detections, MaskLogits, MaskQueries, Outputs
from tests.tiny import make_queries

SIZES, STRIDES = [(4, 6), (2, 3)], [8, 16]  # an input of 32 x 48: locations 0..23 and 24..29
SETTINGS = {"score_threshold": 0.05, "candidates_per_level": 1000, "nms_threshold": 0.6, "max_detections": 100}


def empty_outputs(batch: int = 1, classes: int = 3) -> DenseOutputs:
    """Predictions of which none passes the threshold."""
    generator = torch.Generator().manual_seed(1)
    return DenseOutputs(
        class_logits=torch.full((batch, 30, classes), -20.0),
        box_distances=torch.ones(batch, 30, 4),
        centreness_logits=torch.full((batch, 30), 20.0),
        locations=make_locations(SIZES, STRIDES, torch.device("cpu")),
        mask_inputs=torch.randn(batch, 1, 8, 12, generator=generator),
    )


def put(outputs: DenseOutputs, image: int, location: int, label: int, probability: float, box: list[float]) -> None:
    """Makes the location predict a box (input pixels) with this class probability; centreness is 1."""
    x, y = outputs.locations.xy[location].tolist()
    distances = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y])
    outputs.box_distances[image, location] = distances / outputs.locations.stride[location]
    outputs.class_logits[image, location, label] = math.log(probability / (1 - probability))


@torch.no_grad()
def postprocess(
    model: MaskPredictor,
    outputs: DenseOutputs,
    image_sizes_hw: Tensor,
    output_sizes_hw: Tensor,
    **limits: Any,
) -> list[Detections]:
    """The detections of every image with all their masks, in output pixels; for output sizes (B, 2)."""
    chosen = select_detections(outputs, image_sizes_hw, **limits)
    results = []
    for found, input_size, output_size in zip(chosen, image_sizes_hw.tolist(), output_sizes_hw.tolist(), strict=True):
        input_hw, output_hw = (input_size[0], input_size[1]), (output_size[0], output_size[1])
        masks = torch.zeros(len(found), *output_hw, dtype=torch.bool)
        for mask, placed in zip(masks, iter_masks(model, outputs, found.queries, input_hw, output_hw), strict=True):
            placed.write(mask)
        results.append(
            Detections(
                boxes=to_output_boxes(found.boxes_xyxy, input_hw, output_hw),
                scores=found.scores,
                labels=found.labels,
                masks=masks,
            )
        )
    return results


def whole(logits: Tensor, stride: int) -> WholeMap:
    return WholeMap(stride, (logits.shape[1], logits.shape[2]))


class FeatureMasks:
    """Stands for a model: the mask of a query is its image's feature map, shifted by the location's number."""

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        maps = outputs.mask_inputs[queries.image_index, 0]
        logits = maps + (queries.location_index[:, None, None] - 12) / 12
        return MaskLogits(logits, queries.image_index, queries.instance_index, WholeMap(4, (8, 12)))


def select(outputs: DenseOutputs, sizes: list[tuple[int, int]] | None = None, **changes: float) -> list[Candidates]:
    image_sizes = torch.tensor(sizes or [(32, 48)] * outputs.class_logits.shape[0])
    return select_detections(outputs, image_sizes, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def test_score_is_the_root_of_probability_times_centreness() -> None:
    outputs = empty_outputs()
    put(outputs, 0, 8, 1, 0.5, [5.0, 3.0, 30.0, 22.0])
    outputs.centreness_logits[0, 8] = math.log(0.32 / 0.68)
    (found,) = select(outputs)
    torch.testing.assert_close(found.scores, torch.tensor([0.4]))
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[5.0, 3.0, 30.0, 22.0]]))
    assert found.labels.tolist() == [1]
    assert found.queries.location_index.tolist() == [8]
    outputs.centreness_logits[0, 8] = math.log(0.09 / 0.91)  # 0.5 x 0.09 is below 0.05
    assert len(select(outputs)[0]) == 0


def test_candidates_are_limited_per_level_and_detections_per_image() -> None:
    outputs = empty_outputs()
    for number, location in enumerate((0, 3, 5, 24, 29)):  # far apart: NMS keeps them all
        x, y = outputs.locations.xy[location].tolist()
        put(outputs, 0, location, 0, 0.5 + 0.1 * number, [x - 3, y - 3, x + 3, y + 3])
    assert select(outputs)[0].queries.location_index.tolist() == [29, 24, 5, 3, 0]
    assert select(outputs, candidates_per_level=1)[0].queries.location_index.tolist() == [29, 5]
    assert select(outputs, max_detections=2)[0].queries.location_index.tolist() == [29, 24]
    assert select(outputs)[0].queries.instance_index.tolist() == [0, 1, 2, 3, 4]


def test_equal_scores_come_by_location_then_class() -> None:
    outputs = empty_outputs()
    for location, label in ((5, 2), (5, 0), (0, 1)):
        x, y = outputs.locations.xy[location].tolist()
        put(outputs, 0, location, label, 0.5, [x - 3, y - 3, x + 3, y + 3])
    (found,) = select(outputs)
    assert found.queries.location_index.tolist() == [0, 5, 5]
    assert found.labels.tolist() == [1, 0, 2]


def test_nms_is_per_class_also_for_boxes_beyond_the_image() -> None:
    """Unclipped boxes have negative sides; an offset per class that forgets this mixes neighbouring classes."""
    outputs = empty_outputs()
    put(outputs, 0, 6, 0, 0.9, [8.0, 8.0, 47.0, 47.0])
    put(outputs, 0, 7, 2, 0.8, [8.0, 8.0, 47.0, 47.0])  # the same box in another class: stays
    # moved by 48, the largest coordinate and one more, this box of class 1 would lie on the one of class 0
    put(outputs, 0, 0, 1, 0.6, [-40.0, -40.0, 4.0, 4.0])
    put(outputs, 0, 1, 1, 0.5, [-40.0, -40.0, 5.0, 4.0])  # the same object again: goes
    assert select(outputs)[0].queries.location_index.tolist() == [6, 7, 0]


def test_nms_uses_unclipped_boxes() -> None:
    outputs = empty_outputs()
    put(outputs, 0, 0, 0, 0.9, [-30.0, 0.0, 10.0, 10.0])
    put(outputs, 0, 1, 0, 0.8, [0.0, 0.0, 12.0, 10.0])  # clipped they would overlap by 100 / 120
    assert len(select(outputs)[0]) == 2


def test_cells_that_the_image_alone_would_not_have_are_left_out() -> None:
    """Alone, an image is padded to a multiple of 32: its cells up to there compete, as in the reference."""
    outputs = empty_outputs()
    put(outputs, 0, 4, 0, 0.9, [0.0, 0.0, 40.0, 20.0])  # at (36, 4): its cell covers 32..40
    put(outputs, 0, 1, 1, 0.8, [0.0, 0.0, 20.0, 20.0])
    put(outputs, 0, 26, 2, 0.7, [33.0, 1.0, 47.0, 20.0])  # at (40, 8) of stride 16
    assert select(outputs)[0].queries.location_index.tolist() == [4, 1, 26]
    assert select(outputs, [(32, 36)])[0].queries.location_index.tolist() == [4, 1, 26]
    assert select(outputs, [(32, 33)])[0].queries.location_index.tolist() == [4, 1]  # 26 has no area in the image
    assert select(outputs, [(32, 32)])[0].queries.location_index.tolist() == [1]  # padded to 32: no cell at 32..40
    assert select(outputs, [(32, 20)])[0].queries.location_index.tolist() == [1]


def test_boxes_from_the_images_own_padding_count_where_they_reach_into_it() -> None:
    outputs = empty_outputs()
    put(outputs, 0, 3, 0, 0.9, [2.0, 2.0, 30.0, 20.0])  # at (28, 4), in the padding of an image 20 wide
    put(outputs, 0, 9, 1, 0.8, [25.0, 9.0, 31.0, 15.0])  # at (28, 12): wholly in the padding
    assert select(outputs, [(32, 20)])[0].queries.location_index.tolist() == [3]


def test_an_image_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(7)
    outputs = dataclasses.replace(
        empty_outputs(batch=3),
        class_logits=torch.randn(3, 30, 3, generator=generator),
        box_distances=torch.rand(3, 30, 4, generator=generator) * 3,
    )
    sizes, output_sizes = torch.tensor([[32, 48], [20, 40], [32, 30]]), torch.tensor([[64, 96], [20, 40], [15, 45]])
    together = postprocess(FeatureMasks(), outputs, sizes, output_sizes, **SETTINGS)
    for number in range(3):
        fields = ("class_logits", "box_distances", "centreness_logits", "mask_inputs")
        alone = dataclasses.replace(outputs, **{name: getattr(outputs, name)[number, None] for name in fields})
        (single,) = postprocess(
            FeatureMasks(),
            alone,
            sizes[number, None],
            output_sizes[number, None],
            **SETTINGS,
        )
        assert len(single) > 5
        assert single.masks.shape[1:] == tuple(output_sizes[number].tolist())
        for name in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(single, name), getattr(together[number], name))


def test_no_detections() -> None:
    (found,) = postprocess(
        FeatureMasks(),
        empty_outputs(),
        torch.tensor([[32, 48]]),
        torch.tensor([[50, 70]]),
        **SETTINGS,
    )
    assert len(found) == 0
    assert found.masks.shape == (0, 50, 70)
    assert found.boxes.shape == (0, 4)
    assert found.labels.dtype == torch.int64


def whole_masks(placed_masks: Iterable[PlacedMask], output_hw: tuple[int, int]) -> Tensor:
    """(N, H, W) bool."""
    masks = []
    for placed in placed_masks:
        masks.append(torch.zeros(output_hw, dtype=torch.bool))
        placed.write(masks[-1])
    return torch.stack(masks)


def test_what_is_refined_comes_in_chunks_of_the_image_s_size() -> None:
    outputs, output_hw = empty_outputs(), (60, 90)
    count = 7
    queries = make_queries([0] * count, torch.arange(count) * 4)
    wanted = whole_masks(iter_masks(FeatureMasks(), outputs, queries, (30, 45), output_hw), output_hw)
    assert 0.2 < wanted.float().mean() < 0.8
    for chunk_pixels, expected in ((60 * 90 * 3, [3, 3, 1]), (1, [1] * 7)):
        seen: list[Tensor] = []

        def above_half(numbers: Tensor, probabilities: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(numbers)
            return probabilities > 0.5

        refined = iter_masks(
            FeatureMasks(), outputs, queries, (30, 45), output_hw, refine=above_half, chunk_pixels=chunk_pixels
        )
        assert torch.equal(whole_masks(refined, output_hw), wanted)
        assert [len(numbers) for numbers in seen] == expected
        assert torch.equal(torch.cat(seen), torch.arange(count))


def test_masks_are_made_where_they_are_and_encoded_one_at_a_time() -> None:
    """What evaluate and predict hold of an image's masks is one, as large as the object."""
    outputs, output_hw = empty_outputs(), (900, 1250)
    queries = make_queries([0] * 3, torch.arange(3) * 9)

    class Spots(FeatureMasks):
        def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
            predicted = super().predict_masks(outputs, queries)
            spot = torch.full_like(predicted.logits, -9.0)
            spot[:, 3:5, 4:6] = 9.0
            spot[1] = -9.0
            return dataclasses.replace(predicted, logits=spot)

    made = list(iter_masks(Spots(), outputs, queries, (30, 45), output_hw))
    assert made[1].inside.shape == (0, 0)
    assert all(0 < placed.inside.numel() < 0.2 * 900 * 1250 for placed in (made[0], made[2]))
    assert 0.2 < made[0].inside.float().mean() < 1
    found = ImageDetections(
        number=0,
        output_hw=output_hw,
        boxes_xyxy=torch.zeros(3, 4),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        labels=torch.tensor([1, 0, 1]),
        masks=iter(made),
    )
    results = coco_results(found, image_id=4, category_ids=(10, 20))
    assert [result["category_id"] for result in results] == [20, 10, 20]
    for result, mask in zip(results, whole_masks(made, output_hw), strict=True):
        assert np.array_equal(rle_codec.decode(result["segmentation"]), mask.numpy())


def shapes_of(kind: str, number: int, size_hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Logits (M, h, w) of objects of all sizes, also none; smooth, noisy, without middle values, at one half."""
    height, width = size_hw
    x, y = torch.arange(width)[None, None] / width, torch.arange(height)[None, :, None] / height
    centre, radius = torch.rand(2, number, 2, 1, 1, generator=generator)
    radius = 0.02 + 0.3 * radius
    logits: Tensor = 4 * (1 - ((x - centre[:, 0]) / radius[:, 0]) ** 2 - ((y - centre[:, 1]) / radius[:, 1]) ** 2)
    if kind == "noisy":
        return logits + torch.randn(logits.shape, generator=generator)
    if kind == "hard":
        return torch.where(logits > 0, 100.0, -100.0)
    if kind == "near one half":
        return 0.002 * torch.randn(logits.shape, generator=generator)
    return logits


@pytest.mark.parametrize("kind", ["smooth", "noisy", "hard", "near one half"])
@pytest.mark.parametrize("output_hw", [(52, 71), (400, 300), (31, 977), (640, 7), (20, 21)])
@pytest.mark.parametrize("small_image", [0, paste.SMALL_IMAGE])
def test_masks_where_they_are_equal_those_of_the_whole_image(
    kind: str, output_hw: tuple[int, int], small_image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, on maps and regions: whatever of the image is pasted, and however an RLE is made of it."""
    monkeypatch.setattr(paste, "SMALL_IMAGE", small_image)
    generator, input_hw = torch.Generator().manual_seed(len(kind)), (52, 71)
    corner = torch.rand(4, 2, generator=generator) * torch.tensor([70.0, 50.0]) - 8
    boxes = torch.cat([corner, corner + 1 + 40 * torch.rand(4, 2, generator=generator)], dim=1)
    image = torch.tensor([[0.0, 0.0, 71.0, 52.0]]).expand(4, 4)
    compared = 0
    for stride in (1, 2, 4, 8):
        size = (-(-52 // stride) + 1, -(-71 // stride) + 2)
        logits = shapes_of(kind, 4, size, generator)
        for grid in (
            WholeMap(stride, size),
            Regions(boxes, size),
            Regions(boxes, size, whole_pixels=True),
            Regions(image, size, whole_image=True),
        ):
            wanted = paste_probabilities(logits, grid, input_hw, output_hw) > 0.5
            if isinstance(grid, WholeMap) and kind != "near one half":  # where its own rounding differs
                assert torch.equal(wanted, plain.paste_masks(logits, stride, input_hw, output_hw))
            made = list(placed_masks(logits, grid, input_hw, output_hw))
            assert torch.equal(whole_masks(made, output_hw), wanted)
            assert torch.equal(paste_masks(logits, grid, input_hw, output_hw), wanted)
            rles = rle_codec.encode(np.asfortranarray(wanted.permute(1, 2, 0).numpy().astype(np.uint8)))
            assert [encode_placed(placed, output_hw)["counts"] for placed in made] == [
                rle["counts"].decode() for rle in rles
            ]
            compared += int(wanted.sum())
    assert compared > 100


def test_a_mask_over_whole_columns_is_one_run() -> None:
    inside = torch.ones(6, 3, dtype=torch.bool)
    inside[2, 1] = False
    for top, height in ((0, 6), (0, 7), (2, 8), (1, 9)):
        full = torch.zeros(height, 5, dtype=torch.bool)
        placed = PlacedMask(inside, top, 1)
        placed.write(full)
        expected = rle_codec.encode(np.asfortranarray(full.numpy().astype(np.uint8)))["counts"].decode()
        assert encode_placed(placed, (height, 5)) == {"size": [height, 5], "counts": expected}


def test_masks_are_encoded_as_pycocotools_encodes_them() -> None:
    generator = torch.Generator().manual_seed(3)
    height, width = 7, 5
    masks = torch.rand(60, height, width, generator=generator) < torch.linspace(0, 1, 60)[:, None, None]
    assert not masks[0].any()
    assert masks[-1].all()
    corners = torch.zeros(5, height, width, dtype=torch.bool)
    for number, (y, x) in enumerate(((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (3, 2))):
        corners[number, y, x] = True
    stripes = torch.zeros(2, height, width, dtype=torch.bool)
    stripes[0, :, 1], stripes[1, :, 3:] = True, True  # whole columns: runs that end where a column does
    every = torch.cat([masks, corners, stripes])
    expected = rle_codec.encode(np.asfortranarray(every.permute(1, 2, 0).numpy().astype(np.uint8)))
    assert len(expected) == 67
    assert encode_masks(every) == [
        {"size": [height, width], "counts": item["counts"].decode("ascii")} for item in expected
    ]
    assert encode_masks(every[:0]) == []


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_pasting_is_upsampling_cropping_and_resizing(stride: int) -> None:
    logits = torch.randn(3, 64 // stride, 96 // stride, generator=torch.Generator().manual_seed(stride)) * 2

    for output_hw in ((100, 33), (52, 72)):
        expected = plain.paste_masks(logits, stride, (52, 72), output_hw)
        assert torch.equal(paste_masks(logits, whole(logits, stride), (52, 72), output_hw), expected)


def test_masks_are_pasted_at_their_own_stride_and_a_crop_is_refused() -> None:
    class Given:
        def __init__(self, logits: Tensor, stride: int) -> None:
            self.logits, self.stride = logits, stride

        def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
            grid = whole(self.logits, self.stride)
            return MaskLogits(self.logits, queries.image_index, queries.instance_index, grid)

    queries = make_queries([0], [0])
    logits = torch.full((1, 4, 6), -9.0)
    logits[:, 2:, 3:] = 9.0
    mask = whole_masks(iter_masks(Given(logits, 8), empty_outputs(), queries, (32, 48), (32, 48)), (32, 48))
    assert torch.equal(mask, paste_masks(logits, whole(logits, 8), (32, 48), (32, 48)))
    assert mask[0, 20:, 28:].all()
    assert not mask[0, :16].any()
    for crop, stride in ((logits[:, 2:], 8), (logits[:, :, 1:], 8), (logits, 4)):
        with pytest.raises(ValueError, match=r"do not cover the input \(32, 48\)"):
            list(iter_masks(Given(crop, stride), empty_outputs(), queries, (32, 48), (32, 48)))
    with pytest.raises(ValueError, match="stride must be a positive int"):
        whole(logits, 0)


def test_pasted_mask_of_a_half_plane_ends_where_it_should() -> None:
    # cells of stride 4 are pixels 2, 6, 10, ...; inside from column 3 (pixel 14) on: the step is half way, at 12
    logits = torch.full((1, 8, 8), -9.0)
    logits[..., 3:] = 9.0
    mask = paste_masks(logits, whole(logits, 4), (32, 32), (32, 32))
    assert mask[0, 5].nonzero()[:, 0].tolist() == list(range(13, 32))  # pixel 12 itself is exactly one half
    assert paste_masks(logits, whole(logits, 4), (32, 32), (32, 64))[0, 5].nonzero()[0].item() == 25


def test_boxes_are_scaled_then_clipped() -> None:
    boxes = torch.tensor([[-5.0, 10.0, 20.0, 40.0], [4.0, 2.0, 8.0, 6.0]])
    expected = torch.tensor([[0.0, 5.0, 30.0, 16.0], [8.0, 1.0, 16.0, 3.0]])
    torch.testing.assert_close(to_output_boxes(boxes, (32, 15), (16, 30)), expected)
