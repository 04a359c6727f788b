"""Cells read from run lengths are those of the decoded raster, bit for bit; so is all of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.transforms.v2 import functional

from semiseg.data.dataset import InstanceDataset, build_rule
from semiseg.data.images import read_image
from semiseg.data.table import load_table
from semiseg.data.transforms import Geometry
from semiseg.structures.rasterise import cell_centres, outlines_to_rle, read_cells, run_lengths
from tests.coco_files import CocoFiles, encode, make_coco
from tests.full_masks import decompress_runs, polygons_to_mask, resized_mask, rle_to_mask, sample_cells


def counts_of(mask: np.ndarray) -> bytes:
    counts: str = encode(mask, compressed=True)["counts"]
    return counts.encode()


def random_masks(random: np.random.Generator, size_hw: tuple[int, int]) -> list[np.ndarray]:
    """Nothing, everything, noise of several densities, a corner, a frame with a hole."""
    height, width = size_hw
    masks = [random.random(size_hw) < share for share in (0, 1, 0.5, 0.05, 0.95)]
    corner, frame = np.zeros(size_hw, bool), np.ones(size_hw, bool)
    corner[random.integers(height) :, random.integers(width) :] = True
    frame[height // 4 : height // 2, width // 4 : width // 2] = False
    return [*masks, corner, frame]


def test_run_lengths_of_several_masks() -> None:
    random = np.random.default_rng(0)
    # Runs up to 400 000 pixels take four characters, and alternate with short ones, so differences are negative too.
    masks = [*random_masks(random, (23, 31)), *random_masks(random, (700, 600))]
    rles = [counts_of(mask) for mask in masks]
    runs, bounds = run_lengths(rles)
    assert len(bounds) == len(masks) + 1
    assert max(map(len, rles)) > 10_000
    for number, rle in enumerate(rles):
        assert runs[bounds[number] : bounds[number + 1]].tolist() == decompress_runs(rle)


def test_cells_of_rows_and_columns_in_any_order() -> None:
    random = np.random.default_rng(1)
    for trial in range(150):
        size_hw = int(random.integers(1, 40)), int(random.integers(1, 40))
        masks = random_masks(random, size_hw)
        if trial % 2:
            rows, columns = (random.integers(0, side, int(random.integers(0, 30))) for side in size_hw)
        else:
            rows, columns = (cell_centres(side, int(random.integers(1, 9))) for side in size_hw)
        cells = list(read_cells([counts_of(m) for m in masks], size_hw, rows=rows, columns=columns))
        assert np.array_equal(np.stack(cells), np.stack([mask[rows][:, columns] for mask in masks]))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_original_pixels_are_those_of_torchvisions_resize(side: str) -> None:
    random = np.random.default_rng(2)
    for old, new in random.integers(1, 1400, (150, 2)).tolist():
        geometry = Geometry((old, 5), (new, 5), False) if side == "rows" else Geometry((5, old), (5, new), True)
        found = geometry.source_rows(np.arange(new)) if side == "rows" else geometry.source_columns(np.arange(new))
        for bit in range(11):
            pattern = (np.arange(old) >> bit & 1).astype(bool)
            mask = np.repeat(pattern[:, None], 5, axis=1)
            resized = resized_mask(mask if side == "rows" else mask.T, geometry)
            assert (pattern[found] == (resized[:, 0] if side == "rows" else resized[0])).all(), (old, new)


# ---- the old way, whole samples --------------------------------------------------------------------------------


SIZES = ((61, 83), (64, 64), (47, 96), (90, 33), (5, 70))
# Enlarged so far that cells repeat pixels, reduced, odd, at its own size.
INPUTS = ((150, 211), (33, 47), (97, 64))


class OneGeometry:
    """A transform without choice."""

    def __init__(self, input_hw: tuple[int, int] | None, flipped: bool) -> None:
        self.input_hw, self.flipped = input_hw, flipped

    def __call__(self, size_hw: tuple[int, int], seed: int) -> Geometry:
        return Geometry(size_hw, self.input_hw or size_hw, self.flipped)


def outlines(random: np.random.Generator, size_hw: tuple[int, int], count: int) -> list[list[float]]:
    """Some reach over the border."""
    height, width = size_hw
    found = []
    for _ in range(count):
        centre, radius = random.random(2) * (width, height), random.random(2) * (width, height) * 0.6
        angles = np.sort(random.random(int(random.integers(3, 30)))) * 2 * np.pi
        points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radius
        found.append(points.clip([-width, -height], [2 * width, 2 * height]).round(2).reshape(-1).tolist())
    return found


def make_files(folder: Path) -> CocoFiles:
    """Images of odd sizes with outlines, several to an object, and RLE in turn; one image has none."""
    random = np.random.default_rng(3)
    annotations: list[dict[str, Any]] = []
    for image_id, size_hw in enumerate(SIZES[:-1], start=1):
        masks = [m for m in random_masks(random, size_hw) if m.any()]
        segmentations: list[Any] = [outlines(random, size_hw, 1 + number % 3) for number in range(6)]
        segmentations[3:3] = [encode(mask, compressed=bool(number % 2)) for number, mask in enumerate(masks)]
        for segmentation in segmentations:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [1, 1, 4, 3],
                    "area": 12,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
    return make_coco(folder, sizes_hw=SIZES, class_names=("thing",), annotations=annotations)


def cells_the_plain_way(annotation: dict[str, Any], geometry: Geometry, stride: int) -> np.ndarray:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        scale = np.array(geometry.input_hw)[::-1], np.array(geometry.original_hw)[::-1]
        mapped = [np.array(outline).reshape(-1, 2) * scale[0] / scale[1] for outline in segmentation]
        if geometry.flipped:
            for points in mapped:
                points[:, 0] = geometry.input_hw[1] - points[:, 0]
        return sample_cells(polygons_to_mask([p.reshape(-1).tolist() for p in mapped], geometry.input_hw), stride)
    height, width = segmentation["size"]
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return sample_cells(resized_mask(coco_mask.decode(segmentation).astype(bool), geometry), stride)


def image_the_plain_way(path: Path, geometry: Geometry) -> torch.Tensor:
    """Channel by channel in memory at every step."""
    image = read_image(path).contiguous()
    resized: torch.Tensor = functional.resize(image, list(geometry.input_hw), antialias=True)
    return functional.horizontal_flip(resized) if geometry.flipped else resized


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_batches_are_those_of_the_plain_way(tmp_path: Path, stride: int, flipped: bool) -> None:
    files = make_files(tmp_path)
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache")
    compared = 0
    for input_hw in (*INPUTS, None):
        transform = OneGeometry(input_hw, flipped)
        data = InstanceDataset(table, rule=build_rule("masks", None), transform=transform, mask_stride=stride)
        keys = [(row, 0) for row in range(len(SIZES))]
        samples, batch = [data.batch([key], size_divisor=1) for key in keys], data.batch(keys, size_divisor=16)
        assert batch.targets is not None
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        arrived = batch.to("cpu")
        assert arrived.images.is_contiguous()
        assert torch.equal(arrived.images, batch.images)
        masks = iter(batch.targets.masks)
        for row, sample in enumerate(samples):
            geometry = transform(SIZES[row], 0)
            image = image_the_plain_way(files.images / table.rows[row]["file_name"], geometry)
            assert torch.equal(sample.images[0], image)
            assert sample.targets is not None
            padded = torch.zeros_like(batch.images[row])
            padded[:, : image.shape[1], : image.shape[2]] = image
            assert torch.equal(batch.images[row], padded)
            annotations = [a for a in files.content["annotations"] if a["image_id"] == row + 1]
            for cells, annotation in zip(sample.targets.masks, annotations, strict=True):
                expected = torch.from_numpy(cells_the_plain_way(annotation, geometry, stride))
                assert torch.equal(cells, expected)
                whole = torch.zeros_like(batch.targets.masks[0])
                whole[: expected.shape[0], : expected.shape[1]] = expected
                assert torch.equal(next(masks), whole)
                compared += 1
        assert next(masks, None) is None
    assert compared == 4 * 4 * (6 + 6)


def test_an_image_smaller_than_a_cells_centre_has_only_empty_cells() -> None:
    rows = columns = cell_centres(2, 8)
    assert len(rows) == 0
    (cells,) = read_cells([counts_of(np.ones((2, 2), bool))], (2, 2), rows=rows, columns=columns)
    assert cells.shape == (0, 0)
    assert list(read_cells([], (9, 9), rows=cell_centres(9, 2), columns=cell_centres(9, 2))) == []


def test_several_outlines_are_one_mask() -> None:
    squares = [np.array([0.0, 0, 4, 0, 4, 4, 0, 4]), np.array([2.0, 2, 8, 2, 8, 8, 2, 8])]
    mask = rle_to_mask(outlines_to_rle(squares, (8, 8)), (8, 8))
    assert mask.sum() == 16 + 36 - 4
    assert mask[3, 3]
    assert mask[0, 0]
    assert mask[7, 7]
    assert not mask[7, 0]


def test_cells_are_the_pixels_at_their_centres() -> None:
    # 5 x 9 pixels at stride 4: centres at row 2 and columns 2 and 6; those at row 6 and column 10 are beyond.
    assert cell_centres(5, 4).tolist() == [2]
    assert cell_centres(9, 4).tolist() == [2, 6]
    assert cell_centres(5, 1).tolist() == [0, 1, 2, 3, 4]
    assert cell_centres(1, 4).tolist() == []
    mask = np.zeros((5, 9), bool)
    mask[2, 6] = True
    (cells,) = read_cells([counts_of(mask)], (5, 9), rows=cell_centres(5, 4), columns=cell_centres(9, 4))
    assert cells.tolist() == [[False, True]]
