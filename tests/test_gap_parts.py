"""Where the AP goes: masks exchanged between stored detections, against slow references and limit cases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.box_matching import box_matches
from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth, prepare_masks
from semiseg.evaluation.gap_parts import class_ap, with_masks_of, with_true_masks
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable, table_numbers
from semiseg.report.context import FigureFiles, PageContext
from semiseg.report.gap_parts import GapParts, gap_parts_figure, gap_parts_section, gap_sentence
from semiseg.report.measured import Measured
from tests.recorded_runs import recorded_run

SIZE = 48
CLASSES = ("cat", "dog", "nowhere")  # the last without objects


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[round(y) : round(y + height), round(x) : round(x + width)] = True
    return mask


def detection(
    image: int, category: int, box: list[float], score: float, mask: np.ndarray | None = None
) -> dict[str, Any]:
    mask = rectangle(*box) if mask is None else mask
    return {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": encode(mask)}


def objects() -> list[dict[str, Any]]:
    """Six objects of two classes in three images, and a crowd region."""
    places = [(0, 1, (2, 2)), (0, 1, (26, 2)), (0, 2, (2, 26)), (1, 1, (4, 4)), (1, 2, (26, 26)), (2, 2, (10, 10))]
    found: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category, "bbox": [x, y, 16, 14], "area": 224, "iscrowd": 0}
        for image, category, (x, y) in places
    ]
    found.append({"image_id": 2, "category_id": 1, "bbox": [30, 30, 16, 16], "area": 256, "iscrowd": 1})
    return [
        {**item, "id": number, "segmentation": encode(rectangle(*item["bbox"]))} for number, item in enumerate(found)
    ]


def write_truth(folder: Path, annotations: list[dict[str, Any]]) -> Path:
    content = {
        "images": [{"id": number, "width": SIZE, "height": SIZE} for number in range(4)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }
    path = folder / "val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def truth_file(tmp_path: Path) -> Path:
    return write_truth(tmp_path, objects())


@pytest.fixture
def truth(truth_file: Path) -> COCO:
    found = load_ground_truth(truth_file)
    assert prepare_masks(found)
    return found


def noisy(seed: int, *, count: int = 60) -> list[dict[str, Any]]:
    """Detections near objects and elsewhere, with masks that are not their boxes."""
    draw = np.random.default_rng(seed)
    near, found = [item for item in objects() if not item["iscrowd"]], []
    for _ in range(count):
        item = near[draw.integers(len(near))]
        x, y, width, height = (float(side + draw.integers(-3, 4)) for side in item["bbox"])
        box = [min(max(x, 0.0), 30.0), min(max(y, 0.0), 30.0), width, height]
        category = item["category_id"] if draw.random() < 0.8 else int(draw.integers(1, 4))
        mask = rectangle(*box) & (draw.random((SIZE, SIZE)) < 0.9)
        found.append(detection(item["image_id"], category, box, float(draw.integers(1, 40)) / 40, mask))
    return found


def box_iou(first: list[float], second: list[float]) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def slow_pairs(results: list[dict[str, Any]], partners: list[dict[str, Any]]) -> list[int | None]:
    """By score, each takes the free partner of its image and class with the highest IoU from 0.5."""
    taken: set[int] = set()
    pairs: list[int | None] = [None] * len(results)
    for number in sorted(range(len(results)), key=lambda n: -results[n]["score"]):
        offered = [
            (box_iou(results[number]["bbox"], partner["bbox"]), partner.get("score", 0.0), -place)
            for place, partner in enumerate(partners)
            if place not in taken and all(partner[key] == results[number][key] for key in ("image_id", "category_id"))
        ]
        if offered and max(offered)[0] >= 0.5:
            place = -max(offered)[2]
            pairs[number] = place
            taken.add(place)
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_detections_find_objects_as_a_slow_reference_says(truth: COCO, seed: int) -> None:
    results = noisy(seed)
    whole = [item for item in objects() if not item["iscrowd"]]
    expected = slow_pairs(results, whole)
    found = box_matches(truth, results)
    assert found == [None if number is None else whole[number]["id"] + 1 for number in expected]
    assert sum(match is not None for match in found) >= 4
    changed = with_true_masks(truth, results)
    for before, after, match in zip(results, changed, found, strict=True):
        assert {key: after[key] for key in ("bbox", "score")} == {key: before[key] for key in ("bbox", "score")}
        if match is None:
            assert after["segmentation"] == before["segmentation"]
        else:
            expected_mask = rectangle(*whole[match - 1]["bbox"])
            assert (rle.decode(after["segmentation"]).astype(bool) == expected_mask).all()


@pytest.mark.parametrize("seed", range(5))
def test_masks_go_to_partners_as_a_slow_reference_says(seed: int) -> None:
    full, donors = noisy(seed), noisy(seed + 100, count=45)
    before = json.dumps([full, donors])
    pairs, changed = slow_pairs(full, donors), with_masks_of(full, donors)
    assert changed.own == [partner is None for partner in pairs]
    assert 5 < sum(changed.own) < 55
    for result, after, partner in zip(full, changed.results, pairs, strict=True):
        giver = result if partner is None else donors[partner]
        assert after == {**result, "segmentation": giver["segmentation"]}
    assert json.dumps([full, donors]) == before


def test_what_lies_on_crowd_or_has_no_object_finds_nothing(truth: COCO) -> None:
    on_crowd, elsewhere = detection(2, 1, [30, 30, 16, 16], 0.9), detection(3, 1, [5, 5, 9, 9], 0.8)
    wrong_class = detection(2, 1, [10, 10, 16, 14], 0.7)
    assert box_matches(truth, [on_crowd, elsewhere, wrong_class]) == [None, None, None]
    assert box_matches(truth, []) == []
    assert with_true_masks(truth, []) == []
    assert with_masks_of([], [elsewhere]).results == []
    alone = with_masks_of([elsewhere], [])
    assert alone.results == [elsewhere]
    assert alone.own == [True]


def test_ap_is_that_of_the_evaluation(truth: COCO, truth_file: Path) -> None:
    results = noisy(3)
    metrics = evaluate_detections(truth_file, results, class_names=CLASSES, groups={}, image_ids=range(4))
    assert metrics.segm is not None
    expected = {name: numbers and numbers["AP"] for name, numbers in metrics.segm.classes.items()}
    found = class_ap(truth, results)
    assert found == expected
    assert found["nowhere"] is None
    assert 0 < (found["cat"] or 0) < 100
    assert class_ap(truth, []) == {"cat": 0.0, "dog": 0.0, "nowhere": None}


# --- the section -----------------------------------------------------------------------------------------------------


def perfect() -> list[dict[str, Any]]:
    """Every object found, in the order of falling scores, and one false alarm between them."""
    whole = [item for item in objects() if not item["iscrowd"]]
    found = [
        detection(item["image_id"], item["category_id"], item["bbox"], 0.95 - 0.1 * number)
        for number, item in enumerate(whole)
    ]
    return [*found, detection(3, 2, [5, 5, 12, 12], 0.5)]


def worse_masks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every mask the upper 70 %."""
    masks = [rectangle(x, y, width, 0.7 * height) for x, y, width, height in (item["bbox"] for item in results)]
    return [{**item, "segmentation": encode(mask)} for item, mask in zip(results, masks, strict=True)]


def other_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same detections with the false alarm first."""
    return [{**item, "score": 0.99 if item["image_id"] == 3 else item["score"]} for item in results]


def make_page(
    folder: Path, annotations: Path, runs: dict[tuple[str, int], list[dict[str, Any]]], **more: Any
) -> PageContext:
    """A page of one table; `runs`: (row, seed) -> its stored detections."""
    names = list(dict.fromkeys(row for row, _ in runs))
    rows = tuple(ReportRow(name, "", "", name, every_mask=name == "full-masks") for name in names)
    table = ReportTable("t", "T", "s", "d", ("cat",), more.get("unseen", ("dog", "nowhere")), None, rows)
    results, folders = {}, {}
    for (row, seed), detections in runs.items():
        run_id = f"{row}-{seed}"
        folders[run_id] = folder / run_id
        folders[run_id].mkdir(parents=True, exist_ok=True)
        (folders[run_id] / "detections.json").write_text(json.dumps(detections))
        metrics = evaluate_detections(annotations, detections, class_names=CLASSES, groups={}, image_ids=range(4))
        results["t", row, seed] = recorded_run(row, seed, metrics=metrics.to_dict())
    report = ReportInput(
        "s", "T", "Q?", tuple(sorted({seed for _, seed in runs})), (table,), results, "", "", None, "", "",
        run_folders=folders, val_annotations=annotations,
    )  # fmt: skip
    measured = Measured(folder / "out" / "measured.json")
    return PageContext(
        report, [table_numbers(report, table)], pd.DataFrame(), FigureFiles(folder / "out" / "figures"), measured
    )


def cells(blocks: list[str], row: str) -> list[str]:
    table = next(block for block in blocks if block.startswith("| row"))
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_parts_are_what_was_made_worse(tmp_path: Path, truth_file: Path) -> None:
    full = perfect()
    runs = {
        ("same", 0): full,
        ("masks", 0): worse_masks(full),
        ("order", 0): other_order(full),
        ("nothing", 0): [],
        ("full-masks", 0): full,
    }
    page = make_page(tmp_path, truth_file, runs)
    blocks = gap_parts_section(page, page.tables[0])
    goal = page.tables[0].mean("full-masks", "unseen_AP") or 0.0
    # AP, true masks, exchanged, gap, box part, mask part, box part by true masks, without partner
    same = f"{goal:.1f}"
    assert cells(blocks, "same") == [same, same, same, "+0.0", "+0.0", "+0.0", "+0.0", "0.0 %"]
    ap = page.tables[0].mean("masks", "unseen_AP") or 0.0
    assert 0 < ap < goal
    lost = f"+{goal - ap:.1f}"
    assert cells(blocks, "masks") == [f"{ap:.1f}", same, f"{ap:.1f}", lost, "+0.0", lost, "+0.0", "0.0 %"]
    ap = page.tables[0].mean("order", "unseen_AP") or 0.0
    assert 0 < ap < goal
    lost = f"+{goal - ap:.1f}"
    assert cells(blocks, "order") == [f"{ap:.1f}", f"{ap:.1f}", same, lost, lost, "+0.0", lost, "0.0 %"]
    assert cells(blocks, "nothing") == [
        "0.0",
        "0.0",
        same,
        f"+{goal:.1f}",
        f"+{goal:.1f}",
        "+0.0",
        f"+{goal:.1f}",
        "100.0 %",
    ]
    assert cells(blocks, "full-masks")[:2] == [same, same]


def test_the_method_is_told_in_short_pieces_that_name_every_column(tmp_path: Path, truth_file: Path) -> None:
    full = perfect()
    page = make_page(tmp_path, truth_file, {("masks", 0): worse_masks(full), ("full-masks", 0): full})
    blocks = gap_parts_section(page, page.tables[0])
    place = next(number for number, block in enumerate(blocks) if block.startswith("| row"))
    pieces = [line for block in blocks[1:place] for line in block.splitlines()]
    assert max(map(len, pieces)) < 330
    told = {words.lower() for piece in pieces for words in re.findall(r"\*\*(.*?)\*\*", piece)}
    headings = [cell.strip() for cell in blocks[place].splitlines()[0].strip("|").split("|")]
    assert told == set(headings) - {"row", "AP"}


def test_seeds_are_paired_and_the_measurement_outlives_the_detections(tmp_path: Path, truth_file: Path) -> None:
    full = perfect()
    runs = {("masks", 0): worse_masks(full), ("masks", 1): full, ("masks", 2): full}
    runs |= {("full-masks", 0): full, ("full-masks", 1): other_order(full)}
    page = make_page(tmp_path, truth_file, runs)
    blocks = gap_parts_section(page, page.tables[0])
    aps = page.tables[0].measured.pivot(index="seed", columns="row", values="unseen_AP")
    gaps = (aps["full-masks"] - aps["masks"])[[0, 1]]
    assert cells(blocks, "masks")[3] == f"{gaps.mean():+.1f} ± {gaps.std(ddof=1):.1f}"
    assert "2 seeds" in blocks[1]
    page.measured.save()
    first = (tmp_path / "out" / "measured.json").read_bytes()
    for folder in page.report.run_folders.values():
        (folder / "detections.json").unlink()
    page.measured = Measured(tmp_path / "out" / "measured.json")
    assert gap_parts_section(page, page.tables[0]) == blocks
    page.measured.save()
    assert (tmp_path / "out" / "measured.json").read_bytes() == first


def test_without_detections_or_a_bound_nothing_is_claimed(tmp_path: Path, truth_file: Path) -> None:
    runs = {("masks", 0): perfect(), ("full-masks", 0): perfect()}
    page = make_page(tmp_path, truth_file, runs)
    damaged = page.report.run_folders["masks-0"] / "detections.json"
    for text in ("[{", json.dumps([{**perfect()[0], "image_id": 77}])):
        damaged.write_text(text)
        assert gap_parts_section(page, page.tables[0])[1].startswith("Not measured: ")
    page.measured.save()
    assert list(json.loads((tmp_path / "out" / "measured.json").read_text())) == ["detections"]
    page = make_page(tmp_path / "other", truth_file, {("masks", 0): perfect(), ("dice", 0): perfect()})
    assert gap_parts_section(page, page.tables[0]) == []


@pytest.mark.parametrize(
    ("masks", "boxes", "expected"),
    [
        (10.1, 0.7, "Of the 10.8 AP that a\\_b lacks on all classes compared with full, 10.1 are masks and 0.7 boxes"),
        (4.4, -0.6, "Of the 3.8 AP that a\\_b lacks on all classes compared with full, its masks make up +4.4, its"),
        (1.0, -0.01, "1.0 are masks and 0.0 boxes and scores (one seed)."),
        (-1.0, 0.2, "(\N{MINUS SIGN}0.8 AP below it, one seed): masks \N{MINUS SIGN}1.0, boxes and scores +0.2."),
    ],
)
def test_the_sentence_says_what_the_gap_is_made_of(masks: float, boxes: float, expected: str) -> None:
    values = pd.DataFrame([{"gap": masks + boxes, "masks": masks, "boxes": boxes, "ap": 1.0}])
    parts = GapParts(ReportRow("a_b", "", "", "a_b"), values)
    assert expected in gap_sentence(parts, classes="all", bound="full")
    drawn = gap_parts_figure([parts], classes="all", bound="full")
    assert drawn == gap_parts_figure([parts], classes="all", bound="full")
    assert drawn.svg is not None
    assert b"masks" in drawn.svg
