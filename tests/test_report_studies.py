"""Reports of studies without class splits: Tables 2 to 5 and the two ablations, and what their configurations mean."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semiseg.commands.known_classes import COCO_CLASSES
from semiseg.config import DataConfig, RunConfig
from semiseg.config.read import digest
from semiseg.data.shapes import SHAPES_CLASSES
from semiseg.evaluation.coco_metrics import METRIC_NAMES
from semiseg.report.aggregate import compared_pairs, table_numbers
from semiseg.report.published import read_published
from semiseg.report.sections import answer
from semiseg.report.tables import layout
from semiseg.results import Result, append
from semiseg.studies.file import Study, StudyRun, load_study, study_runs
from semiseg.studies.identity import run_identity
from semiseg.studies.report import build, is_paper_data, report_input, row_meaning, schedule_sentence
from tests.committed import committed_reports
from tests.page_reader import unpadded
from tests.recorded_runs import recorded_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def record(study: Study, folder: Path, ap: dict[str, float], *, classes: tuple[str, ...]) -> None:
    """One recorded run per row and seed with the given mask AP, a bit more with each seed; boxes have 50."""
    for run in study_runs(study):
        if run.row in ap or (run.init is None and run.row == "pretrain"):
            append(folder / "results.jsonl", _result(run, ap.get(run.row, 0.0) + 0.1 * run.seed, classes))


def _result(run: StudyRun, ap: float, classes: tuple[str, ...]) -> Result:
    identity = run_identity(run, data=lambda _: "d", split=lambda _: None, weights=str)
    numbers = {**dict.fromkeys(METRIC_NAMES), "AP": ap, "AP50": ap + 20, "AP75": ap, "APs": ap / 2, "APm": ap}
    boxes = {**numbers, "AP": 50.0}
    metrics = {
        "unit": "percent",
        "images": 3,
        "instances": dict.fromkeys(classes, 4),
        "bbox": {"groups": {}, "classes": dict.fromkeys(classes, boxes)},
        "segm": {"groups": {}, "classes": dict.fromkeys(classes, numbers)},
    }
    return recorded_run(
        run.row, run.seed, run_id=digest(identity), split=None, split_digest=None, identity=identity, metrics=metrics
    )


def section(text: str, heading: str) -> str:
    """The part of a page below a heading, up to the next one."""
    return re.split(r"\n#+ ", text.split(heading, 1)[1], maxsplit=1)[0]


def page(name: str, ap: dict[str, float], folder: Path, **changes: Any) -> str:
    study = load_study(name, **changes)
    classes = COCO_CLASSES if name.startswith("coco") else tuple(SHAPES_CLASSES)
    record(study, folder, ap, classes=classes)
    _, path = build(report_input(study, folder, command=["semiseg", "run", name]), folder)
    return unpadded(path.read_text(encoding="utf-8"))


TAU = {"full": 41.0, "0.0": 2.0, "0.1": 33.0, "0.2": 32.0, "0.3": 31.5}


def test_the_threshold_study_on_shapes(tmp_path: Path) -> None:
    text = page("shapes_tau", TAU, tmp_path)
    told = "Highest mean mask AP: tau = 0.1 33.1, then tau = 0.2 32.1 (−1.0, resolved: lower); with every mask: "  # noqa: RUF001
    assert f"**Answer.** {told}labelled edges (masks) 41.1." in text
    assert "### The printed numbers of BoxInst" in text
    assert "**The COCO numbers are from another data set** (ResNet-50-FPN, 1x, coco val2017)" in text
    assert "| row | seeds | AP (COCO, printed) | " in text, "no column of terms: all alike"
    assert "| APm (COCO, printed) |\n" in text, "no APl"
    assert "| tau = 0.1 | 3 | **33.1** ± 0.1 (30.7) |" in text
    assert "| labelled edges (masks) | 3 | 41.1 ± 0.1 (35.4) |" in text
    assert "- 0.1: 98.3% of the selected edges are truly positive" in section(text, "### The printed numbers")
    differences = section(text, "### Which differences are resolved")
    assert "| tau = 0.1 − labelled edges (masks) | −8.0 ± 0.0 |" in differences  # noqa: RUF001
    assert differences.count("labelled edges (masks) |") == 4
    for word in ("unseen", "full-masks", "gap", "Table tau", "classes |"):
        assert word not in text, word


def test_the_neighbourhood_study(tmp_path: Path) -> None:
    rows = {"size3-dilation1": 30.0, "size3-dilation2": 29.0, "size5-dilation1": 30.5, "size5-dilation2": 28.0}
    text = page("shapes_neighbourhood", rows, tmp_path, seeds=[0])
    assert "Highest mean mask AP: 5 x 5, dilation 1 30.5, then 3 x 3, dilation 1 30.0 (−0.5, one seed cannot" in text  # noqa: RUF001
    assert "(one seed: differences over seeds are not resolved)." in text
    notes = section(text, "### The printed numbers of BoxInst")
    assert "- size3-dilation1, size3-dilation2, size5-dilation1, size5-dilation2: tau=0.1" in notes


def test_a_report_that_has_its_measurements_does_without_torch(tmp_path: Path) -> None:
    study = load_study("shapes_table2", seeds=[0])
    record(study, tmp_path, {"dice": 43.0, "redesigned": 40.0}, classes=tuple(SHAPES_CLASSES))
    folder = str(tmp_path)
    code = f"import os, sys; from semiseg.cli import app; os.chdir({folder!r})\n"
    code += f"try: app(['report', 'shapes_table2', '--seeds', '0', '--out', {folder!r}])\n"
    code += "finally: print(sorted({'torch', 'datasets', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip() == "['matplotlib']", done.stderr
    assert (tmp_path / "index.html").is_file()


def test_tables_2_and_3_are_told_row_by_row(tmp_path: Path) -> None:
    text = page("shapes_table2", {"dice": 43.0, "redesigned": 40.0}, tmp_path / "2")
    assert "Highest mean mask AP: Dice 43.1, then projection + pairwise, labelled edges 40.1 (−3.0" in text  # noqa: RUF001
    assert "| Dice | — | — | 3 | **43.1** ± 0.1 (35.6) |" in text
    assert "full-masks" not in text
    ap = {"box-mask": 4.0, "projection": 14.0, "projection+pairwise": 33.0, "full-masks": 43.0}
    text = page("shapes_table3", ap, tmp_path / "3")
    assert (
        "**Answer.** Highest mean mask AP: projection + pairwise 33.1, then projection 14.1 (−19.0, resolved: lower); "  # noqa: RUF001
        "with every mask: full-masks 43.1." in text
    )
    assert "- full-masks: not in the paper's table; for all classes its Table 2 prints 35.6 / 56.3 / 37.8" in text
    assert "  - `projection`: no mask of any class, BoxInst's projection term for all objects\n" in text
    assert "`full-masks`: masks of every class, Dice: the upper bound, which the paper leaves out" in text


def test_an_answer_names_the_tables_it_is_about() -> None:
    report = report_input(load_study("shapes_fractions"), committed_reports() / "shapes_fractions", command=[])
    text = answer([table_numbers(report, table) for table in report.tables])
    assert text.startswith(
        "1 % of the masks: highest mean mask AP: projection + learned affinity 41.0, then projection"
    )
    assert (
        "; 50 % of the masks: highest mean mask AP: projection + learned affinity 48.5, then masks alone 45.3" in text
    )


def test_table_4_on_coco_itself(tmp_path: Path) -> None:
    ap = {"condinst-r50": 37.0, "boxinst-r50-3x": 32.0, "boxinst-r101-3x": 33.5, "boxinst-r101-1x-noaug": 31.0}
    text = page("coco_table4", ap, tmp_path)
    assert "Highest mean mask AP: BoxInst, R-101, 3x 33.5, then BoxInst, R-50, 3x 32.0 (−1.5, " in text  # noqa: RUF001
    assert "with every mask: CondInst, R-50, 3x 37.0 (one seed" in text
    assert "Every row starts from ImageNet weights of its backbone." in text
    printed = section(text, "### The printed numbers of BoxInst")
    assert "another data set" not in printed
    table = section(text, "## " + load_study("coco_table4").tables[0].title)
    assert "| APm (printed, difference) | printed for |" in table
    assert "| 31.0 (31.6, −0.6) | 51.0 (54.0, −3.0) | 31.0 (31.9, −0.9) |" in table  # noqa: RUF001
    assert re.search(r"\| BoxInst, R-101, 1x, one size \|.*\| coco val2017 \|\n", table)
    assert re.search(r"\| CondInst, R-50, 3x \|.*\| 37.0 \(37.8, −0.8\) \|.*\| coco test-dev \|\n", table)  # noqa: RUF001
    assert "not trained here" not in printed
    differences = section(text, "### Which differences are resolved")
    assert "| CondInst, R-50, 3x − BoxInst, R-50, 3x | +5.0 |" in differences  # noqa: RUF001
    assert differences.count("no claim") == 2
    assert "Rows differ in network, data or schedule: so may their boxes." in text
    steps, images = "270000 steps, 800000 steps, 96108 steps or 90000 steps", "16 images, 8 images or 32 images"
    assert f"{steps} by row of {images} by row, sgd" in text
    assert "backbone resnet50 or resnet101 by row" in text
    words = "with model.backbone.depth = 101, model.neck.kind = bifpn, model.neck.channels = 160"
    assert words.replace("_", r"\_") in text


def test_table_5_is_beside_voc_numbers(tmp_path: Path) -> None:
    study = load_study("voc_table5")
    record(study, tmp_path, {"boxinst-r50": 31.0}, classes=("cat", "dog"))
    report = report_input(study, tmp_path, command=["semiseg", "run", "voc_table5"])
    assert report.paper_data
    assert [table.published for table in report.tables] == ["5"]
    _, path = build(report_input(study, tmp_path, command=["semiseg", "run", "voc_table5"]), tmp_path)
    text = unpadded(path.read_text(encoding="utf-8"))
    assert "31.0 (32.2, −1.2) | 51.0 (58.1, −7.1) | 31.0 (31.0, +0.0) |" in text  # noqa: RUF001
    assert "SDI (VGG-16): — / 44.8 / 16.3" in text


def test_printed_pairs_may_be_named_in_the_study_file(tmp_path: Path) -> None:
    study = load_study("coco_table4")
    record(study, tmp_path, {"condinst-r50": 37.0}, classes=COCO_CLASSES)
    table = report_input(study, tmp_path, command=["semiseg", "run", "x"]).tables[0]
    assert compared_pairs(table) == [tuple(pair) for pair in study.tables[0].compare]
    assert len(compared_pairs(table)) == 12
    assert table.alike is False
    own = load_study("coco_neighbourhood")
    record(own, tmp_path, {"size3-dilation1": 1.0}, classes=COCO_CLASSES)
    table = report_input(own, tmp_path, command=["semiseg", "run", "x"]).tables[0]
    names = [row.name for row in table.rows]
    assert compared_pairs(table) == [
        (names[0], names[1]), (names[1], names[2]), (names[2], names[3]), (names[0], names[2]), (names[0], names[3]),
    ]  # fmt: skip
    assert table.alike


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    study = load_study("shapes_tau")
    report = report_input(study, tmp_path, command=["semiseg", "run", "shapes_tau"])
    numbers = table_numbers(report, report.tables[0])
    assert answer([numbers]) == "Not answered yet (nothing was measured)."
    assert layout(report.tables[0], numbers.summary).headings == ("row", "seeds", "AP", "AP50", "AP75")


def test_what_a_row_trains_with_in_words() -> None:
    study = load_study("shapes_seeds")
    rows = {row.name: row for row in study.rows}
    configs = {run.row: run.config for run in study_runs(study)}
    told = {name: row_meaning(row, configs[name], in_every_table=False) for name, row in rows.items()}
    assert told["neither"] == "masks of seen classes, Dice; no mask loss for objects of unseen classes"
    assert told["boxes-as-masks"] == "no mask of any class, Dice with the filled box as mask for all objects"
    shared = row_meaning(rows["box-supervised"], configs["box-supervised"], in_every_table=True)
    assert shared.endswith("for all objects (the same run in every table)")
    assert all(table.alike for table in report_input(study, committed_reports() / study.name, command=[]).tables)


def test_only_the_official_validation_images_are_the_papers() -> None:
    assert is_paper_data(DataConfig(), 80)
    assert not is_paper_data(DataConfig(), 12)
    assert not is_paper_data(DataConfig(val_annotations="mine.json"), 80)
    assert not is_paper_data(DataConfig(format="shapes"), 80)
    assert schedule_sentence([RunConfig()]).startswith("90000 steps of 16 images, sgd, rate 0.01 (step); backbone resn")


def test_studies_with_impossible_pairs_are_told(tmp_path: Path) -> None:
    text = (ROOT / "experiments" / "coco_table2.toml").read_text()
    for pair, told in (
        ('["dice", "redesined"]', "unknown row 'redesined'. Did you mean 'redesigned'"),
        ('["dice"]', "compare"),
    ):
        (tmp_path / "study.toml").write_text(f"{text}compare = [{pair}]\n")
        with pytest.raises(Exception, match=re.escape(told)):
            load_study(str(tmp_path / "study.toml"))


def test_printed_numbers_of_both_data_sets_are_there() -> None:
    printed = read_published(ROOT / "reports" / "published" / "boxinst.csv")
    assert set(printed.loc[printed["table"] == "5", "evaluation_set"]) == {"voc val2012"}
