"""Sentences that hold for any input, tried on many drawn ones: the same ones every time."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from semiseg.data.check import check_annotations
from semiseg.data.coco import image_records, read_coco, read_segmentation
from semiseg.data.problems import BadValue, Kind
from semiseg.data.transforms import Geometry, resized_size
from semiseg.errors import UserError
from semiseg.results import Result, append, read
from semiseg.structures.rasterise import read_cells, run_lengths
from tests.coco_files import encode, make_coco
from tests.full_masks import decompress_runs
from tests.test_results import RESULT

REPRODUCIBLE = settings(
    derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)

numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e300, 0.02])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
sides = st.integers(1, 3000)
sizes_hw = st.tuples(sides, sides)


# --- The json of a data set


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_coco(tmp_path_factory.mktemp("coco"), sizes_hw=[(26, 28), (30, 26)]).content


def mutate(node: Any, data: st.DataObject) -> Any:
    """The content with one value somewhere in it removed, doubled or put in another's place."""
    here = node
    while True:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.integers(0, 4)):
            here = here[key]
            continue
        match data.draw(st.sampled_from(["remove", "double", "change", "change"])):
            case "remove":
                del here[key]
            case "double" if isinstance(here, list):
                here.append(here[key])
            case _:
                here[key] = data.draw(values)
        return node


def complaint_of_the_reader(path: Path) -> str | None:
    try:
        list(image_records(read_coco(path)))
    except UserError as error:
        return str(error)
    return None


@settings(REPRODUCIBLE, max_examples=60)
@given(data=st.data())
def test_the_reader_and_the_check_agree_on_any_annotations(content: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        if all(isinstance(part, list) and part for part in changed.values()) and changed:
            changed = mutate(changed, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        told, report = complaint_of_the_reader(path), check_annotations(path, None)
    errors = [finding for finding in report.errors if finding.kind != Kind.NO_OBJECTS]
    assert (told is not None) == bool(errors), (told, report.render())
    assert told is None or "\n" not in told


@REPRODUCIBLE
@given(data=st.data())
def test_a_json_with_damaged_bytes_is_never_more_than_a_sentence(content: dict[str, Any], data: st.DataObject) -> None:
    text = bytearray(json.dumps(content, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_bytes(text)
        told, report = complaint_of_the_reader(path), check_annotations(path, None)
    assert (told is not None) == any(finding.kind != Kind.NO_OBJECTS for finding in report.errors)


# --- Geometry


@settings(REPRODUCIBLE, max_examples=80)
@given(size_hw=sizes_hw, short=st.integers(1, 1500), more=st.integers(0, 1500))
def test_a_resized_image_keeps_its_ratio_and_its_limits(size_hw: tuple[int, int], short: int, more: int) -> None:
    resized = resized_size(size_hw, short, short + more)
    scale = min(short / min(size_hw), (short + more) / max(size_hw))
    assert all(
        (new == max(1, new) and abs(new - side * scale) <= 0.5001) or new == 1
        for new, side in zip(resized, size_hw, strict=True)
    )
    assert min(resized) <= short
    assert max(resized) <= short + more
    assert min(resized) == short or max(resized) == short + more
    assert resized_size(size_hw[::-1], short, short + more) == resized[::-1]


@REPRODUCIBLE
@given(original=sizes_hw, new=sizes_hw, flipped=st.booleans(), data=st.data())
def test_boxes_come_back_from_a_geometry_and_its_inverse(
    original: tuple[int, int], new: tuple[int, int], flipped: bool, data: st.DataObject
) -> None:
    height, width = original
    shares = data.draw(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5))
    corners = np.array(shares, dtype=np.float64).reshape(-1, 2, 2) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    there, back = Geometry(original, new, flipped), Geometry(new, original, flipped)
    mapped = there.boxes(boxes).double().numpy()
    assert (mapped[:, :2] <= mapped[:, 2:]).all()
    assert (mapped >= 0).all()
    assert (mapped <= [new[1], new[0], new[1], new[0]]).all()
    assert np.allclose(back.boxes(mapped).numpy(), boxes, rtol=1e-5, atol=1e-5 * max(original))
    (outline,) = there.polygons([boxes.reshape(-1).tolist()])
    (again,) = back.polygons([outline.tolist()])
    assert np.allclose(again, boxes.reshape(-1), rtol=1e-9, atol=1e-9 * max(original))


@REPRODUCIBLE
@given(original=sizes_hw, new=sizes_hw)
def test_every_cell_reads_a_pixel_of_its_own_place(original: tuple[int, int], new: tuple[int, int]) -> None:
    columns = np.arange(new[1])
    read_at = Geometry(original, new, flipped=False).source_columns(columns)
    centres = (columns + 0.5) * original[1] / new[1]
    assert ((read_at >= 0) & (read_at < original[1])).all()
    assert (np.abs(read_at + 0.5 - centres) <= 0.501).all()
    assert (Geometry(original, new, flipped=True).source_columns(columns) == read_at[::-1]).all()


# --- Run lengths

masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))


def drawn_mask(height: int, width: int, seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < share


@settings(REPRODUCIBLE, max_examples=60)
@given(size=masks, seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4), data=st.data())
def test_cells_are_those_of_the_decoded_mask(
    size: tuple[int, int, int, float], seeds: list[int], data: st.DataObject
) -> None:
    height, width, _, share = size
    drawn = [drawn_mask(height, width, seed, share) for seed in seeds]
    rles = []
    for mask in drawn:
        one, other = (read_segmentation(encode(mask, form), size_hw=(height, width))[1] for form in (True, False))
        assert one is not None
        assert one == other
        rles.append(one)
    lengths, bounds = run_lengths(rles)
    assert [lengths[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [decompress_runs(rle) for rle in rles]
    rows, columns = (
        np.array(data.draw(st.lists(st.integers(0, side - 1), max_size=9)), dtype=np.int64) for side in (height, width)
    )
    cells = read_cells(rles, (height, width), rows=rows, columns=columns)
    for mask, found in zip(drawn, cells, strict=True):
        assert np.array_equal(found, mask[rows][:, columns])


@settings(REPRODUCIBLE, max_examples=80)
@given(
    size_hw=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    counts=st.lists(st.integers(-1, 20), max_size=8) | st.text("01234oPQ`\u00e9", max_size=8) | values,
)
def test_an_rle_that_is_taken_fills_its_image_in_pycocotools_too(size_hw: tuple[int, int], counts: Any) -> None:
    try:
        _, rle = read_segmentation({"size": list(size_hw), "counts": counts}, size_hw=size_hw)
    except BadValue:
        return
    assert rle is not None
    runs = decompress_runs(rle)
    assert sum(runs) == size_hw[0] * size_hw[1]
    assert coco_mask.area({"size": list(size_hw), "counts": rle}) == sum(runs[1::2])


# --- Records

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r\u2028\u2029\x85\x1c\x00\\"'), max_size=8
)


@REPRODUCIBLE
@given(names=st.lists(st.tuples(texts, texts, st.integers(0, 2**32 - 1), st.none() | texts), max_size=4))
def test_results_with_any_text_are_recorded_once_and_read_back(names: list[tuple[str, str, int, str | None]]) -> None:
    results: list[Result] = [
        replace(
            RESULT,
            run_id=str(number),
            row=row,
            seed=seed,
            split=split,
            command=[name],
            metrics={name: {row: 1.5}, "instances": {name: 3}},
        )
        for number, (row, name, seed, split) in enumerate(names)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        assert all(append(path, result) for result in results)
        assert read(path) == results
        assert not any(append(path, result) for result in results)
        assert path.read_bytes().count(b"\n") == len(results) if results else not path.exists()


@pytest.mark.filterwarnings("ignore:.*cut off by an interruption; ignored")
@settings(REPRODUCIBLE, max_examples=60)
@given(data=st.data())
def test_a_damaged_record_is_left_out_or_told(data: st.DataObject) -> None:
    content = asdict(RESULT)
    content[data.draw(st.sampled_from(list(content)))] = data.draw(values)
    text = bytearray(json.dumps(content).encode())
    if data.draw(st.booleans()):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        path.write_bytes(text + b"\n")
        try:
            found = read(path)
        except UserError:
            return
        fresh = Path(folder) / "fresh.jsonl"
        assert all(append(fresh, result) for result in found)  # what is read can be written
        assert read(fresh) == found
