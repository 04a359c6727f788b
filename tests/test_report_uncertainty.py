"""Intervals over validation images in a report: against the bootstrap itself, and what the page says with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from semiseg.evaluation.coco_metrics import evaluate_detections, load_ground_truth
from semiseg.evaluation.matching import RESAMPLES, Interval, Matches, class_bootstrap, match, means_of_groups
from semiseg.report import context as page_context
from semiseg.report.aggregate import (
    BEST,
    NEITHER,
    UPPER_BOUND,
    Difference,
    ReportInput,
    ReportRow,
    ReportTable,
    TableNumbers,
    table_numbers,
)
from semiseg.report.context import FigureFiles, Measured, PageContext
from semiseg.report.sections import answer, difference_section, gap_caution, uncertainty_section
from semiseg.report.uncertainty import thresholds_of, with_image_intervals
from semiseg.results import Result
from tests.page_reader import unpadded
from tests.recorded_runs import recorded_run
from tests.test_bootstrap import encode

CLASSES = ("ring", "cross", "猫")
GROUPS = {"all": CLASSES, "unseen": CLASSES[1:], "seen": CLASSES[:1]}
# How far the detections of a row lie beside the objects, in pixels.
SHIFT = {NEITHER: 4, "projection": 3, BEST: 2, UPPER_BOUND: 1}
ROWS = tuple(ReportRow(name, "", "", name) for name in SHIFT)
TABLE = ReportTable("table6", "Table 6", "few", "d", CLASSES[:1], CLASSES[1:], None, ROWS)
IMAGES = 12


def coco_content() -> dict[str, Any]:
    random = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for image in range(IMAGES):
        for category in (1, 2, 3):
            box = np.array([*random.integers(0, 15, 2), *random.integers(8, 20, 2)])
            found.append(
                {
                    "id": len(found),
                    "image_id": image,
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": int(box[2] * box[3]),
                    "iscrowd": 0,
                    "segmentation": encode(box),
                }
            )
    images = [{"id": number, "file_name": "x", "width": 40, "height": 40} for number in range(IMAGES)]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    return {"images": images, "categories": categories, "annotations": found}


def detections(truth: dict[str, Any], row: str, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng([seed, SHIFT[row]])
    results = []
    for annotation in truth["annotations"]:
        shift = random.integers(-SHIFT[row], SHIFT[row] + 1, 4)
        box = np.maximum(np.array(annotation["bbox"]) + shift, [0, 0, 3, 3])
        place = {key: annotation[key] for key in ("image_id", "category_id")}
        results.append(
            {**place, "bbox": box.tolist(), "score": float(random.random()), "segmentation": encode(box)},
        )
    return results


def make_report(folder: Path, seeds: int) -> ReportInput:
    truth, path = coco_content(), folder / "val.json"
    path.write_text(json.dumps(truth))
    results, folders = {}, {}
    for row in SHIFT:
        for seed in range(seeds):
            found = detections(truth, row, seed)
            metrics = evaluate_detections(path, found, class_names=CLASSES, image_ids=range(IMAGES))
            run = recorded_run(row, seed, metrics=metrics.to_dict())
            results[TABLE.name, row, seed] = run
            folders[run.run_id] = folder / run.run_id
            folders[run.run_id].mkdir()
            (folders[run.run_id] / "detections.json").write_text(json.dumps(found))
    return ReportInput(
        study="tiny",
        title="Tiny",
        question="Does it work?",
        seeds=tuple(range(seeds)),
        tables=(TABLE,),
        results=results,
        data="Made up.",
        schedule="None.",
        pretraining=None,
        run_command="semiseg run tiny",
        report_command="semiseg report tiny",
        run_folders=folders,
        val_annotations=path,
    )


def context(report: ReportInput, out: Path) -> PageContext:
    tables = [table_numbers(report, table) for table in report.tables]
    return PageContext(report, tables, pd.DataFrame(), FigureFiles(out), Measured(out / "measured.json"))


def resampled(report: ReportInput, row: str, seed: int) -> np.ndarray:
    """(resamples, groups) straight from the files."""
    run = report.results[TABLE.name, row, seed]
    found = json.loads((report.run_folders[run.run_id] / "detections.json").read_text())
    assert report.val_annotations is not None
    matches = match(load_ground_truth(report.val_annotations), found, "segm")
    return means_of_groups(class_bootstrap(matches), matches.classes, list(GROUPS.values()))


def share_of(numbers: TableNumbers, row: str) -> Interval | None:
    return next(gap.image_interval for gap in numbers.gaps if gap.row == row)


def percentiles(samples: np.ndarray) -> object:
    """What equals an interval up to the decimals that a page keeps."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return pytest.approx((low, high), abs=6e-4)


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    return make_report(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    return make_report(tmp_path_factory.mktemp("three"), 3)


@pytest.mark.parametrize("which", ["one_seed", "three_seeds"])
def test_intervals_are_the_percentiles_of_paired_resamples(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report: ReportInput = request.getfixturevalue(which)
    (numbers,) = with_image_intervals(context(report, tmp_path))
    assert numbers.intervals
    rows = {row: np.mean([resampled(report, row, seed) for seed in report.seeds], axis=0) for row in SHIFT}
    for column, group in enumerate(GROUPS):
        for row in SHIFT:
            assert numbers.interval(row, group=group) == percentiles(rows[row][:, column])
        step = numbers.between(NEITHER, BEST, group)
        assert step.image_interval == percentiles((rows[BEST] - rows[NEITHER])[:, column])
        back = numbers.between(BEST, NEITHER, group).image_interval
        assert back is not None
        low, high = back
        assert (-high, -low) == step.image_interval
    gap = (rows[UPPER_BOUND] - rows[NEITHER])[:, 1]
    assert np.percentile(gap, 2.5) > 0
    assert {row for row in SHIFT if share_of(numbers, row) is not None} == {"projection", BEST}
    assert share_of(numbers, BEST) == percentiles(100 * (rows[BEST] - rows[NEITHER])[:, 1] / gap)
    (difference,) = [d for d in numbers.differences if (d.first, d.second, d.group) == (NEITHER, BEST, "unseen")]
    assert difference.image_interval == numbers.between(NEITHER, BEST, "unseen").image_interval


def test_a_share_of_a_gap_that_may_be_nothing_has_no_interval(one_seed: ReportInput, tmp_path: Path) -> None:
    swapped = {
        key: one_seed.results[TABLE.name, NEITHER if key[1] == UPPER_BOUND else key[1], 0] for key in one_seed.results
    }
    (numbers,) = with_image_intervals(context(replace(one_seed, results=swapped), tmp_path))
    assert numbers.intervals
    assert not any(share_of(numbers, row) for row in SHIFT)
    assert numbers.between(NEITHER, UPPER_BOUND, "unseen").image_interval == (0, 0)
    assert numbers.between(NEITHER, UPPER_BOUND, "unseen").resolved is False


def test_thresholds_are_the_recorded_ap(one_seed: ReportInput, tmp_path: Path) -> None:
    page = context(one_seed, tmp_path)
    for run in one_seed.runs():
        found = thresholds_of(page, run)
        assert found is not None
        for name, numbers in run.metrics["segm"]["classes"].items():
            values = np.array(found[name], dtype=float)
            assert values.mean() == pytest.approx(numbers["AP"], abs=1e-3)
            assert values[0] == pytest.approx(numbers["AP50"], abs=1e-3)
            assert values[5] == pytest.approx(numbers["AP75"], abs=1e-3)


def test_every_run_is_matched_once_and_not_again_without_its_folder(
    one_seed: ReportInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Matches:
        calls.append(arguments[-1])
        return match(*arguments, **options)

    monkeypatch.setattr(page_context, "match", counted)
    page = context(one_seed, tmp_path)
    page.tables = [*page.tables, *page.tables]
    first, second = with_image_intervals(page)
    assert first.intervals == second.intervals
    curves = [thresholds_of(page, run) for run in one_seed.runs()]
    assert calls == ["segm"] * 4
    page.measured.save()
    content = (tmp_path / "measured.json").read_bytes()
    assert str(tmp_path).encode() not in content
    later = context(replace(one_seed, run_folders={}, val_annotations=None), tmp_path)
    assert with_image_intervals(later)[0].intervals == first.intervals
    assert [thresholds_of(later, run) for run in one_seed.runs()] == curves
    later.measured.save()
    assert (tmp_path / "measured.json").read_bytes() == content
    assert len(calls) == 4


def test_other_detections_of_a_run_are_not_read(one_seed: ReportInput, tmp_path: Path) -> None:
    run = one_seed.results[TABLE.name, BEST, 0]
    results = context(one_seed, tmp_path).stored.of(run)
    assert results
    fewer = tmp_path / "run"
    fewer.mkdir()
    (fewer / "detections.json").write_text(json.dumps(results[: len(results) // 2]))
    assert context(replace(one_seed, run_folders={run.run_id: fewer}), tmp_path).stored.of(run) is None
    truth, path = coco_content(), tmp_path / "val.json"
    path.write_text(json.dumps({**truth, "annotations": truth["annotations"][3:]}))
    assert context(replace(one_seed, val_annotations=path), tmp_path).stored.of(run) is None


def test_what_was_measured_on_one_training_is_not_said_of_another_of_the_same_run(
    one_seed: ReportInput, tmp_path: Path
) -> None:
    page = context(one_seed, tmp_path)
    run = one_seed.runs()[0]
    assert thresholds_of(page, run) is not None
    page.measured.save()
    later = context(replace(one_seed, run_folders={}), tmp_path)
    again = replace(run, metrics={**run.metrics, "images": run.metrics["images"] + 1}, finished="2030-01-01T00:00:00Z")
    assert thresholds_of(later, replace(run, finished="2030-01-01T00:00:00Z")) is not None  # the same numbers
    assert thresholds_of(later, again) is None


def test_without_detections_the_page_says_what_it_said(one_seed: ReportInput, tmp_path: Path) -> None:
    page = context(replace(one_seed, run_folders={}), tmp_path)
    (numbers,) = with_image_intervals(page)
    assert numbers is page.tables[0]
    assert thresholds_of(page, one_seed.runs()[0]) is None
    assert uncertainty_section(one_seed, numbers) == []
    assert answer([numbers]).endswith("(one seed: differences over seeds are not resolved).")
    assert "no claim" in difference_section(one_seed, numbers, pd.DataFrame())[-1]


def test_a_row_without_detections_leaves_the_others_theirs(one_seed: ReportInput, tmp_path: Path) -> None:
    gone = one_seed.results[TABLE.name, BEST, 0].run_id
    folders = {run_id: path for run_id, path in one_seed.run_folders.items() if run_id != gone}
    (numbers,) = with_image_intervals(context(replace(one_seed, run_folders=folders), tmp_path))
    assert numbers.intervals
    assert numbers.interval(BEST, group="all") is None
    assert numbers.between(NEITHER, BEST, "all").resolved is None
    assert numbers.between(NEITHER, "projection", "all").image_interval is not None
    assert f"| {BEST.replace('_', '')} | — | — | — |" in unpadded(uncertainty_section(one_seed, numbers)[-1])


@pytest.mark.parametrize("content", ["[", "[]", '[{"image_id": 0}]', '{"a": 1}'])
def test_detections_that_are_not_those_of_the_run_are_not_measured(
    one_seed: ReportInput, tmp_path: Path, content: str
) -> None:
    run: Result = one_seed.results[TABLE.name, BEST, 0]
    (tmp_path / "detections.json").write_text(content)
    folders = {**one_seed.run_folders, run.run_id: tmp_path}
    assert context(replace(one_seed, run_folders=folders), tmp_path).stored.matches(run) is None


def test_other_annotations_and_objects_without_masks_are_not_measured(one_seed: ReportInput, tmp_path: Path) -> None:
    run, truth = one_seed.results[TABLE.name, BEST, 0], coco_content()
    path = tmp_path / "val.json"
    path.write_text(json.dumps({**truth, "annotations": truth["annotations"][3:]}))
    assert context(replace(one_seed, val_annotations=path), tmp_path).stored.matches(run) is None
    for annotation in truth["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(truth))
    found = json.loads((one_seed.run_folders[run.run_id] / "detections.json").read_text())
    metrics = evaluate_detections(path, found, class_names=CLASSES, image_ids=range(IMAGES))
    assert metrics.segm is None
    page = context(replace(one_seed, val_annotations=path), tmp_path)
    assert thresholds_of(page, replace(run, metrics=metrics.to_dict())) is None


@pytest.mark.parametrize(
    ("values", "image_interval", "resolved", "words"),
    [
        ((), None, None, "not measured"),
        ((2.0,), None, None, "one seed cannot resolve small differences: no claim"),
        ((2.0, 3.0), None, None, "two seeds have no interval: no claim"),
        ((2.0,), (0.5, 3.0), True, "resolved over images only: higher"),
        ((-2.0, -2.0), (-3.0, -0.5), True, "resolved over images only: lower"),
        ((2.0,), (0.0, 3.0), False, "not resolved over images"),
        ((2.0, 2.0, 2.1), None, True, "resolved: higher"),
        ((2.0, 2.0, 2.1), (0.5, 3.0), True, "resolved: higher"),
        ((2.0, 2.0, 2.1), (-0.5, 3.0), False, "not resolved over images"),
        ((2.0, -2.0, 2.1), (0.5, 3.0), False, "not resolved over seeds"),
        ((2.0, -2.0, 2.1), (-0.5, 3.0), False, "not resolved over seeds and images"),
    ],
)
def test_a_difference_is_resolved_only_if_every_interval_leaves_out_zero(
    values: tuple[float, ...], image_interval: tuple[float, float] | None, resolved: bool | None, words: str
) -> None:
    found = Difference("a", "b", "all", values, image_interval)
    assert found.resolved is resolved
    assert found.reading == words


def intervals_with(numbers: TableNumbers, changed: dict[tuple[str, ...], dict[str, Interval]]) -> TableNumbers:
    assert numbers.intervals
    return replace(numbers, intervals={**numbers.intervals, **changed})


def test_what_is_not_resolved_is_marked_wherever_it_is_named(three_seeds: ReportInput, tmp_path: Path) -> None:
    (numbers,) = with_image_intervals(context(three_seeds, tmp_path))
    around = (-1.0, 1.0)
    pairs = [(NEITHER, "projection"), (NEITHER, BEST), (BEST, UPPER_BOUND), (NEITHER, UPPER_BOUND)]
    vague = intervals_with(numbers, {pair: {"unseen": around} for pair in pairs})
    text = answer([vague])
    assert ", the step is not resolved over images, what is left to full-masks is not resolved over images" in text
    assert "the gap itself" in (gap_caution(vague) or "")
    section = difference_section(three_seeds, vague, pd.DataFrame())
    assert "every 95 % interval that there is leaves out 0" in section[1]
    lines = unpadded(section[2]).splitlines()
    line = next(line for line in lines if line.startswith(f"| {BEST} − {NEITHER} | unseen"))  # noqa: RUF001
    assert line.endswith("| −1.0 … +1.0 | not resolved over images |")  # noqa: RUF001
    assert "95 % over seeds | 95 % over images" in lines[0]


def test_one_seed_is_judged_over_images_and_the_page_says_so(one_seed: ReportInput, tmp_path: Path) -> None:
    (numbers,) = with_image_intervals(context(one_seed, tmp_path))
    assert numbers.intervals
    low, high = share_of(numbers, BEST) or (0, 0)
    assert f" % [{low:.0f}, {high:.0f}] (" in answer([numbers])
    assert answer([numbers]).endswith("over images; one seed: differences over seeds are not resolved).")
    section = difference_section(one_seed, numbers, pd.DataFrame())
    assert "95 % over seeds" not in section[2]
    assert "resolved over images only: higher" in section[2]
    cells = uncertainty_section(one_seed, numbers)
    low, high = numbers.interval(BEST, group="seen") or (0, 0)
    assert f"{numbers.mean(BEST, 'seen_AP'):.1f} \\[{low:.1f}, {high:.1f}\\] |" in cells[-1]
    assert f"{RESAMPLES} resamples of the {IMAGES} images" in cells[1]


def test_folders_can_be_gone_while_a_page_is_written(one_seed: ReportInput, tmp_path: Path) -> None:
    run = one_seed.results[TABLE.name, BEST, 0]
    copy = shutil.copytree(one_seed.run_folders[run.run_id], tmp_path / "run")
    page = context(replace(one_seed, run_folders={run.run_id: copy}), tmp_path)
    found = page.stored.matches(run)
    shutil.rmtree(copy)
    assert page.stored.matches(run) is found


def test_two_trainings_of_one_run_have_a_matching_each(one_seed: ReportInput, tmp_path: Path) -> None:
    """The folder holds the detections of one of them; asked first or last, it is not that of the other."""
    run = one_seed.results[TABLE.name, BEST, 0]
    again = replace(run, metrics=one_seed.results[TABLE.name, NEITHER, 0].metrics)
    page = context(one_seed, tmp_path)
    assert page.stored.matches(run) is not None
    assert page.stored.matches(again) is None
    page = context(one_seed, tmp_path)
    assert page.stored.matches(again) is None
    assert page.stored.matches(run) is page.stored.matches(run) is not None
