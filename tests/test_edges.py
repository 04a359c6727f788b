"""The measured edges against straightforward counts, against what training uses, and the verb that prints them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import straightforward as plain
from examples.analysis.edges import EdgeMeasurement, Neighbourhood, main, measure_edges
from semiseg.config import RunConfig
from semiseg.config.read import parse_config
from semiseg.data.images import read_image
from semiseg.data.table import load_table
from semiseg.engine.build import RunData, build_objective, train_dataset
from semiseg.errors import UserError
from semiseg.losses.terms import instance_terms, loss_edges
from semiseg.structures.grids import WholeMap
from tests.coco_files import CocoFiles, box_annotation, ellipse, make_coco, polygon_annotation, rle_annotation
from tests.full_masks import sample_cells

THRESHOLDS = (0.0, 0.1, 0.3)


def measure(files: CocoFiles, **changes: Any) -> EdgeMeasurement:
    """At the stored resolution, stride 4, 3 x 3 with dilation 2, unless changed."""
    given: dict[str, Any] = {
        "neighbourhoods": [Neighbourhood(3, 2)],
        "thresholds": THRESHOLDS,
        "stride": 4,
        "short_side": 0,
        "long_side": 1333,
        "bottom_rows": 0,
    }
    return measure_edges(files.annotations, files.images, **{**given, **changes})


def smooth(files: CocoFiles, seed: int = 0) -> CocoFiles:
    """Images of slowly changing colours with some noise, so that every threshold divides the edges."""
    random = np.random.default_rng(seed)
    for image in files.content["images"]:
        y, x = np.mgrid[: image["height"], : image["width"]]
        base = np.stack([90 + 9 * np.sin(x / 9), 120 + 7 * np.cos(y / 7), 140 + 5 * np.sin((x + y) / 11)], axis=2)
        noisy = base + random.integers(-3, 4, base.shape)
        Image.fromarray(noisy.astype(np.uint8)).save(files.images / image["file_name"])
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CocoFiles:
    """Two images, 46 x 37 and 40 x 50 (sides that the grid does not divide), RLE and polygon masks, a crowd, a box."""
    first = ellipse(46, 37, box_xyxy=(3, 5, 30, 41))
    second = ellipse(40, 50, box_xyxy=(10, 2, 50, 40))
    annotations = [
        rle_annotation(1, image_id=1, category_id=1, mask=first, compressed=True),
        rle_annotation(2, image_id=2, category_id=3, mask=second, compressed=False),
        polygon_annotation(3, image_id=2, category_id=1, points=[2, 2, 20, 6, 9, 33]),
        box_annotation(4, image_id=2, category_id=1, box_xywh=[1, 1, 30, 30]),
        rle_annotation(5, image_id=1, category_id=1, mask=~first, compressed=True, iscrowd=1),
    ]
    folder = tmp_path_factory.mktemp("edges")
    return smooth(make_coco(folder, sizes_hw=[(46, 37), (40, 50)], annotations=annotations))


def plain_counts(
    files: CocoFiles, *, stride: int, size: int, dilation: int, thresholds: tuple[float, ...], bottom_rows: int
) -> dict[float, tuple[int, int, int]]:
    """threshold -> (all, counting, positive) edges, image by image, at the stored resolution."""
    counts = {threshold: [0, 0, 0] for threshold in thresholds}
    from pycocotools.coco import COCO

    coco = COCO(str(files.annotations))
    for annotation in files.content["annotations"]:
        if annotation["iscrowd"] or "segmentation" not in annotation:
            continue
        info = coco.imgs[annotation["image_id"]]
        image = read_image(files.images / info["file_name"])
        height, width = image.shape[1:]
        mask = coco.annToMask(annotation)
        x, y, w, h = annotation["bbox"]
        rows, columns = -(-height // stride), -(-width // stride)
        padded = torch.zeros(3, rows * stride, columns * stride, dtype=torch.uint8)
        padded[:, :height, :width] = image
        similar = plain.similarity(
            padded, (height, width), bottom=bottom_rows, stride=stride, size=size, dilation=dilation
        )
        labels = torch.from_numpy(sample_cells(mask.astype(bool), stride)).double()
        same = labels == plain.neighbours(labels[None, None], size=size, dilation=dilation)[0, 0]
        box = torch.tensor([x, y, x + w, y + h], dtype=torch.float64)
        every = (similar > 0) & plain.box_mask(box, (rows, columns), stride).bool()
        for threshold, count in counts.items():
            counting = every & (similar >= threshold)
            for index, edges in enumerate((every, counting, counting & same)):
                count[index] += int(edges.sum())
    return {threshold: (count[0], count[1], count[2]) for threshold, count in counts.items()}


@pytest.mark.parametrize(
    ("stride", "size", "dilation", "bottom_rows"), [(4, 3, 2, 0), (2, 3, 1, 10), (3, 5, 2, 5), (1, 3, 1, 0)]
)
def test_equals_straightforward_counts(
    files: CocoFiles, stride: int, size: int, dilation: int, bottom_rows: int
) -> None:
    found = measure(files, stride=stride, neighbourhoods=[Neighbourhood(size, dilation)], bottom_rows=bottom_rows)
    expected = plain_counts(
        files, stride=stride, size=size, dilation=dilation, thresholds=THRESHOLDS, bottom_rows=bottom_rows
    )
    assert (found.images, found.instances) == (2, 3)
    for share in found.shares:
        every, counting, positive = expected[share.threshold]
        assert share.edges == every > 0
        assert share.share == counting / every
        assert share.positive == positive / counting
    assert found.shares[0].share == 1
    assert 0.1 < found.shares[2].share < 0.9, "a case with both kinds of edges"
    assert found.shares[0].positive < 1


def test_sees_what_training_sees(files: CocoFiles, tmp_path: Path) -> None:
    """Resized, with bottom rows: the same edges as those of a padded training batch, counted with the same labels."""
    values = {
        "data": {"short_sides": [64], "long_side": 90, "flip": 0.0, "bottom_rows_without_affinity": 10},
        "supervision": {"source": "boxes"},
        "objective": {"affinity_threshold": 0.1},
    }
    config = parse_config(RunConfig, values, where="test")
    table = load_table(files.annotations, files.images, cache=tmp_path)
    boxes = train_dataset(config, RunData(table, table, None))
    masks = train_dataset(
        config.model_copy(update={"supervision": config.supervision.model_copy(update={"source": "masks"})}),
        RunData(table, table, None),
    )
    batch, with_masks = (data.batch([(0, 0), (1, 0)], size_divisor=32) for data in (boxes, masks))
    assert batch.targets is not None
    objective, grid = (
        build_objective(config.objective),
        WholeMap(4, (batch.images.shape[-2] // 4, batch.images.shape[-1] // 4)),
    )
    instances = instance_terms(batch.targets, grid, objective=objective)
    edges = loss_edges(batch, batch.targets, instances, objective=objective)["pairwise"]
    targets = with_masks.targets
    assert targets is not None
    counting = positive = 0
    for row, instance in enumerate(targets.mask_instance.tolist()):
        image, mask = int(targets.image_index[instance]), targets.masks[row]
        box = plain.box_mask(targets.boxes_xyxy[instance], (mask.shape[0], mask.shape[1]), 4).bool()
        same = mask == plain.neighbours(mask[None, None].double(), size=3, dilation=2)[0, 0].bool()
        counting += int((edges[image] & box).sum())
        positive += int((edges[image] & box & same).sum())
    found = measure(files, short_side=64, long_side=90, bottom_rows=10, thresholds=[0.1]).shares[0]
    assert round(found.share * found.edges) == counting > 500
    assert found.positive == positive / counting
    assert positive < counting


def test_several_neighbourhoods_are_those_one_by_one(files: CocoFiles) -> None:
    wanted = [Neighbourhood(3, 1), Neighbourhood(5, 2)]
    together = measure(files, neighbourhoods=wanted).shares
    assert together == tuple(share for one in wanted for share in measure(files, neighbourhoods=[one]).shares)


def test_limits_and_nothing_to_measure(files: CocoFiles, tmp_path: Path) -> None:
    assert measure(files, max_images=1).images == 1
    assert measure(files, max_images=1).instances == 1
    flat = make_coco(
        tmp_path / "flat",
        sizes_hw=[(32, 32)],
        annotations=[polygon_annotation(1, image_id=1, category_id=1, points=[0, 0, 32, 0, 32, 32, 0, 32])],
    )
    Image.new("RGB", (32, 32), (9, 9, 9)).save(flat.images / "001.png")
    assert [(share.share, share.positive) for share in measure(flat).shares] == [(1.0, 1.0)] * 3
    # Every row at the bottom is left out: no edge at all.
    share = measure(flat, bottom_rows=32).shares[0]
    assert share.edges == 0
    assert math.isnan(share.share)
    assert math.isnan(share.positive)
    boxes = flat.rewrite(lambda content: content["annotations"][0].pop("segmentation"))
    with pytest.raises(UserError, match="no instance with a mask in the 1 images looked at"):
        measure(boxes)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(32, 32)])
    (files.images / "001.png").unlink()
    with pytest.raises(UserError, match=r"001\.png: no such image file"):
        measure(files)


def test_the_script_prints_and_writes_the_numbers(
    files: CocoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    arguments = [str(files.annotations), str(files.images), "--stride", "2", "--json", str(out)]
    main([*arguments, "--threshold", "0.1", "0", "--bottom-rows", "10"])
    output = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [(item["size"], item["dilation"], item["threshold"]) for item in written["shares"]] == [
        (size, dilation, threshold) for size in (3, 5) for dilation in (1, 2) for threshold in (0.0, 0.1)
    ]
    found = measure(files, stride=2, bottom_rows=10, neighbourhoods=[Neighbourhood(5, 2)], thresholds=[0.1]).shares[0]
    assert written["shares"][-1]["positive"] == found.positive
    line = next(line for line in output.splitlines() if line.startswith("5 x 5, dilation 2") and "0.1" in line)
    assert f"{100 * found.positive:.1f} %" in line


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--size", "4"], "--size 4: expected an odd number"),
        (["--size", "1"], "--size 1: expected an odd number"),
        (["--dilation", "0"], "--dilation 0: expected a positive number"),
        (["--threshold", "1.5"], "--threshold 1.5: expected a number from 0 to 1"),
    ],
)
def test_impossible_options_are_told(files: CocoFiles, option: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        main([str(files.annotations), str(files.images), *option])
