"""Supervision per instance, and the leak barrier: withheld masks on disk may be anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semiseg.data import dataset as dataset_module
from semiseg.data.dataset import InstanceDataset, Source, build_rule
from semiseg.data.images import read_image
from semiseg.data.table import load_table
from semiseg.data.transforms import Resize
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch, Supervision, Targets, empty_batch, grid_size, pad_images
from semiseg.structures.rasterise import outlines_to_rle, read_cells
from tests.coco_files import CocoFiles, KeepClasses, encode, make_coco

TRAIN = Resize(short_sides=(48, 64, 72), long_side=120, flip=0.5)
BOX, MASK = int(Supervision.BOX), int(Supervision.MASK)
KEYS = [(row, seed) for row in range(4) for seed in range(5)]


def make_dataset(
    files: CocoFiles,
    source: Source = "as_annotated",
    split: KeepClasses | None = None,
    *,
    transform: Any = TRAIN,
    stride: int = 2,
    bottom_rows: int = 10,
) -> InstanceDataset:
    table = load_table(files.annotations, files.images, cache=files.annotations.parent / "cache")
    return InstanceDataset(
        table,
        rule=build_rule(source, split),
        transform=transform,
        mask_stride=stride,
        bottom_rows_without_affinity=bottom_rows,
    )


def batch_of(data: InstanceDataset, *keys: tuple[int, int]) -> Batch:
    """Images as they are where there is one: its batch is not padded."""
    return data.batch(keys, size_divisor=1)


def targets_of(data: InstanceDataset, *keys: tuple[int, int]) -> Targets:
    targets = batch_of(data, *keys).targets
    assert targets is not None
    return targets


def same(first: Any, second: Any) -> bool:
    """Bit for bit, through nested structures."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Batch | Targets):
        return all(same(getattr(first, field.name), getattr(second, field.name)) for field in fields(first))
    return bool(first == second)


# The classes of image 1's annotations are cat, dog, bird, fish; fish has no mask, and dog 2 is an RLE.
@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("masks", None, [MASK, MASK, MASK, BOX]),
        ("as_annotated", None, [MASK, MASK, MASK, BOX]),
        ("boxes", None, [BOX, BOX, BOX, BOX]),
        ("split", KeepClasses(("dog", "fish")), [BOX, MASK, BOX, BOX]),
        ("split", KeepClasses(("cat", "dog", "bird"), every=2), [BOX, MASK, BOX, BOX]),
    ],
)
def test_rules(tmp_path: Path, source: Source, split: KeepClasses | None, expected: list[int]) -> None:
    sample = targets_of(make_dataset(make_coco(tmp_path), source, split), (0, 0))
    assert sample.supervision.tolist() == expected
    assert sample.mask_instance.tolist() == [index for index, kind in enumerate(expected) if kind == MASK]
    assert sample.labels.tolist() == [0, 1, 2, 3]
    assert sample.crowd_boxes_xyxy.shape == (1, 4)


def test_source_split_needs_a_split() -> None:
    with pytest.raises(UserError, match=r"supervision\.split"):
        build_rule("split", None)


def test_values_of_a_sample(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    batch = batch_of(make_dataset(files, transform=Resize([128], 200), stride=4), (0, 0))
    annotations, sample = files.content["annotations"], batch.targets
    assert sample is not None
    assert batch.images.shape == (1, 3, 128, 160)  # 64 x 80, doubled
    for box, annotation in zip(sample.boxes_xyxy.tolist(), annotations[:4], strict=True):
        x, y, width, height = annotation["bbox"]
        assert box == [2 * x, 2 * y, 2 * (x + width), 2 * (y + height)]
    crowd = annotations[-1]["bbox"]
    assert sample.crowd_boxes_xyxy[0, :2].tolist() == [2 * crowd[0], 2 * crowd[1]]
    assert sample.masks.shape == (3, 32, 40)
    assert sample.masks.any((1, 2)).all()
    assert batch.bottom_rows_without_affinity.tolist() == [20]
    # Each mask lies in its box: cell centres are 4 * index + 2.
    for mask, box in zip(sample.masks, sample.boxes_xyxy, strict=False):
        rows, columns = mask.nonzero().T * 4 + 2
        assert box[0] - 1 <= columns.min()
        assert columns.max() <= box[2] + 1
        assert box[1] - 1 <= rows.min()
        assert rows.max() <= box[3] + 1


@pytest.mark.parametrize(("short_side", "expected"), [(64, 10), (72, 11), (40, 6)])  # int(10 * new / 64)
def test_bottom_rows_scale_with_the_image(tmp_path: Path, short_side: int, expected: int) -> None:
    data = make_dataset(make_coco(tmp_path), transform=Resize([short_side], 999))
    assert batch_of(data, (0, 0)).bottom_rows_without_affinity.tolist() == [expected]


def test_boxes_come_from_the_annotation_not_from_the_mask(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [1, 2, 30, 40]
        content["annotations"][1]["segmentation"] = encode(np.zeros((64, 80), bool), compressed=False)

    sample = targets_of(make_dataset(make_coco(tmp_path).rewrite(change), transform=Resize([64], 80)), (0, 0))
    assert sample.boxes_xyxy[0].tolist() == [1, 2, 31, 42]
    assert sample.supervision.tolist() == [MASK, MASK, MASK, BOX]  # an empty mask does not drop the instance
    assert not sample.masks[1].any()


def test_an_image_without_boxes_and_one_with_only_crowd(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        crowd = content["annotations"][-1]
        content["annotations"] = [crowd]

    data = make_dataset(make_coco(tmp_path).rewrite(change))
    only_crowd, empty = targets_of(data, (0, 0)), targets_of(data, (1, 0))
    assert only_crowd.boxes_xyxy.shape == empty.boxes_xyxy.shape == (0, 4)
    assert len(only_crowd.crowd_boxes_xyxy) == 1
    assert len(empty.crowd_boxes_xyxy) == 0
    height, width = batch_of(data, (1, 0)).images.shape[2:]
    assert empty.masks.shape == (0, *grid_size((height, width), 2))
    batch = data.batch([(1, 0), (0, 0), (1, 0)], size_divisor=32)
    targets = batch.targets
    assert targets is not None
    assert targets.num_instances == 0
    assert targets.crowd_image_index.tolist() == [1]
    assert targets.masks.shape == (0, batch.images.shape[2] // 2, batch.images.shape[3] // 2)


def test_the_sample_is_a_function_of_its_key(tmp_path: Path) -> None:
    data = make_dataset(make_coco(tmp_path))
    first = [batch_of(data, key) for key in KEYS]
    torch.manual_seed(1)
    assert all(same(batch_of(data, key), sample) for key, sample in zip(reversed(KEYS), reversed(first), strict=True))
    assert len({sample.images.shape for sample in first[:5]}) > 1


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    data = make_dataset(files)
    Image.new("RGB", (80, 65)).save(files.images / "002.png")
    with pytest.raises(UserError, match=r"002\.png: the image is 80 x 65 .* say 80 x 64"):
        batch_of(data, (1, 0))
    (files.images / "002.png").unlink()
    with pytest.raises(UserError, match=r"002\.png: no such image file"):
        batch_of(data, (1, 0))


# ---- the poison test ---------------------------------------------------------------------------------------------


def poison(files: CocoFiles, folder: Path, withheld: Callable[[dict[str, Any]], bool], how: str) -> CocoFiles:
    """A copy of the json in which every withheld mask is noise, of the same kind or of the other, or is gone."""
    random = np.random.default_rng(99)
    sizes = {image["id"]: (image["height"], image["width"]) for image in files.content["images"]}
    content = json.loads(json.dumps(files.content))
    changed = 0
    for annotation in content["annotations"]:
        if not annotation.get("segmentation") or not withheld(annotation):
            continue
        changed += 1
        height, width = sizes[annotation["image_id"]]
        noise = random.random((height, width)) < 0.5
        outline = (random.random((12, 2)) * (width, height)).reshape(-1).tolist()
        choices = {"rle": encode(noise, compressed=bool(changed % 2)), "polygons": [outline], "gone": None}
        annotation["segmentation"] = choices[how]
        annotation["area"] = float(noise.sum())  # COCO's area is that of the mask
    assert changed >= 1
    folder.mkdir()
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return CocoFiles(path, files.images, content)


def is_withheld(source: Source, split: KeepClasses | None) -> Callable[[dict[str, Any]], bool]:
    """Which masks must not matter: all crowd masks, and those that the rule takes away (category id = 2 label + 1)."""
    names = ("cat", "dog", "bird", "fish")

    def withheld(annotation: dict[str, Any]) -> bool:
        if annotation["iscrowd"] or source == "boxes":
            return True
        name = names[annotation["category_id"] // 2]
        return split is not None and not split.keeps_mask(name, annotation["id"])

    return withheld


RULES: list[tuple[Source, KeepClasses | None]] = [
    ("split", KeepClasses(("cat",))),
    ("split", KeepClasses(("cat", "dog", "bird", "fish"), every=3)),  # a mask fraction
    ("boxes", None),
    ("as_annotated", None),
]


@pytest.mark.parametrize("how", ["rle", "polygons", "gone"])
@pytest.mark.parametrize(("source", "split"), RULES)
def test_withheld_masks_do_not_reach_a_batch(
    tmp_path: Path, source: Source, split: KeepClasses | None, how: str
) -> None:
    clean = make_coco(tmp_path / "clean")
    poisoned = poison(clean, tmp_path / "poisoned", is_withheld(source, split), how)
    assert poisoned.content != clean.content
    first, second = (make_dataset(files, source, split) for files in (clean, poisoned))
    pairs = [(batch_of(first, key), batch_of(second, key)) for key in KEYS]
    assert all(same(a, b) for a, b in pairs)
    assert same(first.batch(KEYS, size_divisor=32), second.batch(KEYS, size_divisor=32))


def test_the_poison_would_be_seen(tmp_path: Path) -> None:
    """The control: under a rule that keeps these masks, the same change does reach the samples."""
    clean = make_coco(tmp_path / "clean")
    poisoned = poison(clean, tmp_path / "poisoned", is_withheld("split", KeepClasses(("cat",))), "rle")
    first, second = (make_dataset(files, "masks") for files in (clean, poisoned))
    assert sum(not same(batch_of(first, key), batch_of(second, key)) for key in KEYS) == len(KEYS)


def test_withheld_masks_are_not_even_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rasterised: list[int] = []
    read: list[int] = []

    def rasterise(polygons: Any, size_hw: tuple[int, int]) -> bytes:
        rasterised.append(len(polygons))
        return outlines_to_rle(polygons, size_hw)

    def read_some(rles: Any, *place: Any, **cells: Any) -> Any:
        if rles:
            read.append(len(rles))
        return read_cells(rles, *place, **cells)

    monkeypatch.setattr(dataset_module, "outlines_to_rle", rasterise)
    monkeypatch.setattr(dataset_module, "read_cells", read_some)
    files = make_coco(tmp_path)
    batch_of(make_dataset(files, "boxes"), (0, 0))
    assert (rasterised, read) == ([], [])
    data = make_dataset(files, "split", KeepClasses(("dog", "fish")))
    batch_of(data, (0, 0))  # dog 2 is an RLE; fish is box-only and crowd
    assert (rasterised, read) == ([], [1])
    batch_of(make_dataset(files, "split", KeepClasses(("cat",))), (0, 0))  # cat 1 is an outline
    assert (rasterised, read) == ([1], [1, 1])


# ---- collate -----------------------------------------------------------------------------------------------------


def test_collate_pads_and_shifts_indices(tmp_path: Path) -> None:
    data = make_dataset(make_coco(tmp_path), transform=Resize([40], 100), stride=4)
    keys = [(2, 0), (0, 0), (3, 0)]  # 40 x 80, 40 x 50, 50 x 40
    samples, batch = [batch_of(data, key) for key in keys], data.batch(keys, size_divisor=32)
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.image_sizes_hw.tolist() == [[40, 80], [40, 50], [50, 40]]
    assert batch.image_ids == (3, 1, 4)
    assert batch.bottom_rows_without_affinity.tolist() == [8, 6, 6]  # 10 * 40/48, 10 * 40/64, 10 * 50/80
    targets = batch.targets
    assert targets is not None
    assert targets.image_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert targets.masks.shape == (9, 16, 24)
    assert targets.mask_instance.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert targets.mask_weight.tolist() == [1.0] * 9
    assert targets.crowd_image_index.tolist() == [1]
    first = 0
    for number, sample in enumerate(samples):
        height, width = sample.images.shape[2:]
        assert torch.equal(batch.images[number, :, :height, :width], sample.images[0])
        assert not batch.images[number, :, height:].any()
        assert not batch.images[number, :, :, width:].any()
        assert sample.targets is not None
        count, rows, columns = sample.targets.masks.shape
        stacked = targets.masks[first : first + count]
        assert torch.equal(stacked[:, :rows, :columns], sample.targets.masks)
        assert stacked.sum() == sample.targets.masks.sum()
        first += count
    for name in ("boxes_xyxy", "labels", "supervision"):
        assert torch.equal(getattr(targets, name), torch.cat([getattr(sample.targets, name) for sample in samples]))


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("short_sides", [(40, 48, 150), (48,)])  # above and below the rows that are flipped at once
def test_a_batch_written_in_place_is_that_of_its_samples(
    tmp_path: Path, short_sides: tuple[int, ...], flip: float
) -> None:
    files = make_coco(tmp_path)
    transform = Resize(short_sides, long_side=300, flip=flip)
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache")
    data = InstanceDataset(table, rule=build_rule("masks", None), transform=transform, mask_stride=4)
    keys = [(row, seed) for seed in range(3) for row in range(len(data))]
    batch = data.batch(keys, size_divisor=32)
    for slot, size, (row, seed) in zip(batch.images, batch.image_sizes_hw, keys, strict=True):
        image = read_image(files.images / table.rows[row]["file_name"])
        image = transform((image.shape[1], image.shape[2]), seed).image(image)
        height, width = image.shape[1:]
        assert size.tolist() == [height, width]
        assert torch.equal(slot[:, :height, :width], image)
        assert not slot[:, height:].any()
        assert not slot[:, :, width:].any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_padding_in_either_layout_and_in_shared_memory(
    channels_last: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 9), (3, 8, 4)]
    images = [torch.randint(1, 256, shape, dtype=torch.uint8, generator=random) for shape in shapes]
    images[1] = images[1].contiguous().permute(0, 2, 1).contiguous().permute(0, 2, 1)  # another layout
    stacked, places = empty_batch([(5, 9), (8, 4)], 4, channels_last=channels_last, shared=shared)
    for place, image in zip(places, images, strict=True):
        place.copy_(image)
    plain, sizes = pad_images(images, 4)
    assert plain.is_contiguous()
    assert torch.equal(plain, stacked)
    assert sizes.tolist() == [[5, 9], [8, 4]]
    assert stacked.shape == (2, 3, 8, 12)
    assert stacked.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert stacked.is_shared() == shared
    if shared:
        monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)  # private, and may go
        assert empty_batch([(5, 9)], 4, channels_last=channels_last, shared=True)[0].is_shared()
    for slot, image in zip(stacked, images, strict=True):
        expected = torch.zeros(3, 8, 12, dtype=torch.uint8)
        expected[:, : image.shape[1], : image.shape[2]] = image
        assert torch.equal(slot, expected)
