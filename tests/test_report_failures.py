"""Causes of failed masks, which images and objects are shown, and what the page says where there is nothing to show."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools import mask as rle

from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth
from semiseg.evaluation.instances import SHARES, match_instances
from semiseg.overlays import COLOURS
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable, table_numbers
from semiseg.report.context import FigureFiles, Measured, PageContext, StoredDetections
from semiseg.report.failures import (
    CAUSES,
    causes_of_failure,
    failure_counts,
    failure_section,
)
from semiseg.report.pictures import (
    FAILURE,
    GAIN,
    LOSS,
    RANDOM,
    UNMATCHED,
    choose_images,
    contact_sheet,
    detected_objects,
    draw_pictures,
    image_gains,
    truth_objects,
    worst_failures,
)
from semiseg.results import Result
from tests.page_reader import unpadded
from tests.recorded_runs import recorded_run

SIZE = 48
NAMES = ("neither", "projection+pairwise", "full-masks")
ROWS = tuple(ReportRow(name, "", "", name, every_mask=name == "full-masks") for name in NAMES)
TABLE = ReportTable("t6", "T", "few", "d", ("cat",), ("dog|<b>",), None, ROWS)
CLASSES = ("cat", "dog|<b>")
CUT = {"neither": 14, "projection+pairwise": 12, "full-masks": 0}  # of 20 columns of each mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def strip(x: int, width: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[10:30, x : x + width] = True
    return mask


def write_data(folder: Path, images: int = 12) -> Path:
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        pixels = np.random.default_rng(image).integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{image}.png")
        for category, x in ((1, 0), (2, 24)):
            mask = {"segmentation": encode(strip(x, 20)), "area": 400, "iscrowd": 0}
            box = {"bbox": [x, 10, 20, 20], "image_id": image, "category_id": category}
            annotations.append({"id": len(annotations), **box, **mask})
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIZE, "height": SIZE} for n in range(images)],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES, start=1)],
    }
    (folder / "val.json").write_text(json.dumps(content))
    return folder / "val.json"


def make_run(folder: Path, annotations: Path, row: str, seed: int, *, found: bool = True) -> Result:
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
            "segmentation": encode(strip(a["bbox"][0], 20 - CUT[row])),
        }
        for a in json.loads(annotations.read_text())["annotations"]
        if found
    ]
    out = folder / f"{row}-{seed}"
    out.mkdir(parents=True)
    (out / "detections.json").write_text(json.dumps(results))
    metrics = evaluate_detections(annotations, results, class_names=CLASSES, image_ids=range(12))
    return recorded_run(row, seed, study="s", metrics=metrics.to_dict())


def make_study(folder: Path, *, found: bool = True) -> ReportInput:
    annotations = write_data(folder)
    runs = [make_run(folder / "runs", annotations, row, seed, found=found) for row in NAMES for seed in (0, 1)]
    return ReportInput(
        study="s",
        title="S",
        question="Q?",
        seeds=(0, 1),
        tables=(TABLE,),
        results={("t6", run.row, run.seed): run for run in runs},
        data="d",
        schedule="s",
        pretraining=None,
        run_command="run",
        report_command="report",
        run_folders={run.run_id: folder / "runs" / run.run_id for run in runs},
        val_annotations=annotations,
        val_images=folder,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    return make_study(tmp_path_factory.mktemp("study"))


def page_of(study: ReportInput, folder: Path) -> PageContext:
    tables = [table_numbers(study, table) for table in study.tables]
    return PageContext(
        study, tables, pd.DataFrame(), FigureFiles(folder / "figures"), Measured(folder / "measured.json")
    )


def line(**values: float) -> dict[str, float]:
    shares = dict.fromkeys(SHARES, 0.4) | {"outside": 0.1, "recall": 0.55, "on_others": 0.0, "mask_box_iou": 0.5}
    return {"detection": 0, **shares, **values}


def test_each_failure_has_the_first_cause_that_applies() -> None:
    lines = {
        "merged": [line(on_others=0.26), line(on_others=0.3, mask_box_iou=0.95, outside=0.6, recall=0.1)],
        "box": [line(mask_box_iou=0.91), line(mask_box_iou=0.95, outside=0.6)],
        "leak": [line(outside=0.26, on_others=0.25, mask_box_iou=0.9, recall=0.2)],
        "part missing": [line(recall=0.49, outside=0.25), line(recall=0.0, outside=0.0, mask_iou=0.0)],
        "other": [line(), line(recall=0.5, outside=0.25)],
        "": [line(mask_iou=0.5, outside=0.6), {"detection": -1, **dict.fromkeys(SHARES, np.nan)}],
    }
    frame = pd.DataFrame([values for group in lines.values() for values in group])
    assert causes_of_failure(frame).tolist() == [cause for cause, group in lines.items() for _ in group]
    assert set(lines) - {""} == set(CAUSES)


def test_gains_count_what_was_not_found_as_nothing() -> None:
    main = pd.DataFrame({"image": [1, 1, 2], "mask_iou": [0.8, np.nan, 0.5]})
    other = pd.DataFrame({"image": [1, 1, 2], "mask_iou": [0.2, 0.4, np.nan]})
    assert image_gains(main, other) == pytest.approx({1: 0.1, 2: 0.5})


def test_images_are_chosen_once_by_group_and_ties_by_id(study: ReportInput) -> None:
    assert study.val_annotations is not None
    truth = load_ground_truth(study.val_annotations)
    drawn = list(choose_images(truth, {}, {}, seed=3))
    assert len(set(drawn)) == 4
    left = [image for image in range(12) if image not in drawn]
    gains = dict.fromkeys(reversed(left), 0.25) | {left[5]: 0.5, left[0]: -0.1, left[7]: -0.3} | {drawn[0]: 0.9}
    failures = {"box": left[5], "leak": left[3], "other": drawn[0]}
    chosen = choose_images(truth, gains, failures, seed=3)
    groups = {
        group: [image for image, words in chosen.items() if words.startswith(group)]
        for group in (RANDOM, GAIN, LOSS, FAILURE)
    }
    assert groups == {RANDOM: drawn, GAIN: [left[5], left[1], left[2]], LOSS: [left[7], left[0]], FAILURE: [left[3]]}
    assert list(chosen) == [image for group in groups.values() for image in group]
    assert chosen[drawn[0]] == f"random (+90), image {drawn[0]}"
    assert chosen[drawn[1]] == f"random, image {drawn[1]}"
    assert chosen[left[3]] == f"worst failure (leak), image {left[3]}"
    # neither a gain nor a loss
    assert list(choose_images(truth, dict.fromkeys(range(12), 0.0), {}, seed=3)) == drawn


def test_the_main_row_lacks_masks(study: ReportInput) -> None:
    numbers = table_numbers(study, TABLE)
    assert numbers.main_row(NAMES) == "projection+pairwise"
    assert numbers.main_row(["neither", "full-masks"]) == "neither"
    assert numbers.main_row(["full-masks"]) == "full-masks"


def test_a_detection_has_the_colour_of_its_object_in_every_row(study: ReportInput) -> None:
    assert study.val_annotations is not None
    truth = load_ground_truth(study.val_annotations)
    objects = truth.imgToAnns[0]
    results = json.loads((study.run_folders["neither-0"] / "detections.json").read_text())[:2]
    assert [item.colour for item in truth_objects(truth, objects)] == [*COLOURS[:2]]
    far = results[0] | {"bbox": [0, 40, 5, 5], "score": 0.6}
    shown = detected_objects(objects, [far, results[0] | {"score": 0.5}, results[1], far | {"score": 0.4}])
    assert [item.colour for item in shown] == [COLOURS[1], UNMATCHED, COLOURS[0]], "the best first"
    assert [item.text for item in shown] == ["0.90", "0.60", "0.50"]


def test_counts_and_table(study: ReportInput, tmp_path: Path) -> None:
    assert study.val_annotations is not None
    truth = load_ground_truth(study.val_annotations)
    results = json.loads((study.run_folders["neither-0"] / "detections.json").read_text())
    expected = [12, 12, 0, 0, 0, 12, 0]  # a mask of six of 20 columns: a part of it is missing
    assert failure_counts(truth, match_instances(truth, results)) == dict.fromkeys(CLASSES, expected)
    assert failure_counts(truth, match_instances(truth, [])) == {name: [12, 0, 0, 0, 0, 0, 0] for name in CLASSES}
    page = page_of(study, tmp_path)
    text = unpadded("\n\n".join(failure_section(page, page.tables[0])))
    cells = "12 (100 %) | 0 (0 %) | 0 (0 %) | 0 (0 %) | 12 (100 %) | 0 (0 %)"
    assert f"| neither | 2 | 12 (100 %) | {cells} |" in text
    assert "| full-masks | 2 | 12 (100 %) | 0 (0 %) | 0 | 0 | 0 | 0 | 0 |" in text
    positions = [text.index(f"**{cause}**: {rule}") for cause, rule in CAUSES.items()]
    assert positions == sorted(positions)
    page.measured.save()
    # Without the run folders the numbers are the same.
    gone = page_of(replace(study, run_folders={}, val_annotations=None), tmp_path)
    again = unpadded("\n\n".join(failure_section(gone, gone.tables[0])))
    assert again == text
    fresh = page_of(replace(study, run_folders={}), tmp_path / "fresh")
    empty = unpadded("\n\n".join(failure_section(fresh, fresh.tables[0])))
    assert "| neither | 0 | — | — | — | — | — | — | — |" in empty
    assert "Without neither seed 0, neither seed 1, " in empty


def test_the_folder_of_another_training_of_the_same_run_is_not_measured(study: ReportInput, tmp_path: Path) -> None:
    """It lies where the recorded one would, and its detections are of the same images and classes."""
    other = tmp_path / "other"
    shutil.copytree(study.run_folders["full-masks-0"], other)
    folders = {**study.run_folders, "projection+pairwise-0": other}
    page = page_of(replace(study, run_folders=folders), tmp_path)
    failures = failure_section(page, page.tables[0])
    assert "| projection+pairwise | 1 | " in unpadded(failures[2])
    assert failures[3].startswith("Without projection+pairwise seed 0: ")
    assert draw_pictures(page.report, page.tables[0], page.stored)[0] is None
    page.measured.save()
    assert "projection+pairwise-0." not in (tmp_path / "measured.json").read_text()


def test_a_validation_set_without_objects_has_no_pictures(study: ReportInput, tmp_path: Path) -> None:
    assert study.val_annotations is not None
    content = json.loads(study.val_annotations.read_text())
    (tmp_path / "val.json").write_text(json.dumps({**content, "annotations": []}))
    page = page_of(replace(study, val_annotations=tmp_path / "val.json"), tmp_path)
    assert draw_pictures(page.report, page.tables[0], page.stored) == (None, "the validation set has no objects")


def test_nothing_found_has_no_failures_and_pictures_without_gains(tmp_path: Path) -> None:
    study = make_study(tmp_path, found=False)
    page = page_of(study, tmp_path / "report")
    text = unpadded("\n\n".join(failure_section(page, page.tables[0])))
    assert "| neither | 2 | 0 (0 %) | 0 | 0 | 0 | 0 | 0 | 0 |" in text
    content, caption = draw_pictures(study, page.tables[0], page.stored)
    assert content is not None
    assert draw_pictures(study, page.tables[0], page.stored) == (content, caption)
    assert "gain and loss of projection+pairwise against neither in the mean mask IoU of their objects" in caption
    rows = {key: run for key, run in study.results.items() if key[1] != "projection+pairwise"}
    some = replace(study, results=rows)
    assert "of neither against full-masks in" in draw_pictures(some, table_numbers(some, TABLE), page.stored)[1]
    rows = {key: run for key, run in study.results.items() if key[1] == "neither"}
    alone = replace(study, results=rows)
    assert "against" not in draw_pictures(alone, table_numbers(alone, TABLE), page.stored)[1]


def test_what_is_missing_for_pictures_is_said_in_one_sentence(study: ReportInput, tmp_path: Path) -> None:
    numbers = table_numbers(study, TABLE)
    one_gone = {key: path for key, path in study.run_folders.items() if key != "full-masks-0"}
    cases = {
        "the run folders with the detections are not on this machine": replace(study, run_folders=one_gone),
        "the validation set with its masks is not on this machine": replace(study, val_annotations=None),
        "cannot be read": replace(study, val_images=tmp_path),
    }
    for sentence, incomplete in cases.items():
        content, note = draw_pictures(incomplete, numbers, StoredDetections(incomplete))
        assert content is None
        assert sentence in note
        assert str(tmp_path) not in note
    unrecorded = replace(study, results={})
    told = draw_pictures(unrecorded, table_numbers(unrecorded, TABLE), StoredDetections(unrecorded))
    assert told == (None, "none of its runs is recorded")


def test_the_worst_failure_of_each_cause() -> None:
    frame = pd.DataFrame(
        [
            line(mask_iou=0.3, outside=0.6) | {"image": 1},
            line(mask_iou=0.1, outside=0.6) | {"image": 2},
            line(mask_iou=0.1, outside=0.6) | {"image": 3},
            line(mask_iou=0.45, mask_box_iou=0.95) | {"image": 4},
            line(mask_iou=0.0, recall=0.0) | {"image": 5, "detection": -1},
            line(mask_iou=0.6, outside=0.6) | {"image": 6},
        ],
        index=[9, 8, 7, 6, 5, 4],
    )
    assert worst_failures(frame) == {"box": 4, "leak": 3}
    assert worst_failures(frame.iloc[-1:]) == {}


def test_a_sheet_holds_every_picture_below_its_words() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, second, third = (Image.new("RGB", (60, 40), colour) for colour in colours)
    content = contact_sheet([("words " * 99, [("a", first), ("b", second)]), ("", [("", third)])])
    assert content == contact_sheet([("words " * 99, [("a", first), ("b", second)]), ("", [("", third)])])
    with Image.open(io.BytesIO(content)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    corners = []
    for colour in colours:
        rows, columns = (pixels == colour).all(2).nonzero()
        assert len(rows) == 60 * 40
        corners.append((int(rows.min()), int(columns.min())))
    (top, left), (same, right), (below, start) = corners
    assert (same, start) == (top, left)
    assert right >= left + 60
    assert below >= top + 40
    dark = pixels.max(axis=2) < 90
    assert dark[:top].any()
    assert not dark[top : top + 40].any()
