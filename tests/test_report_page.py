"""The whole report from a tiny made-up study: files, references, idempotence, and what it must say."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from semiseg.evaluation.coco_metrics import evaluate_detections
from semiseg.report import figures, html, pictures
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.page import build_report, report_text
from semiseg.results import Result
from tests.page_reader import assert_whole, read_page, unpadded
from tests.recorded_runs import recorded_run

PUBLISHED = Path(__file__).parent.parent / "reports" / "published" / "boxinst.csv"
CLASSES = ("a_ring", "b|<b>", "猫 $x$")
NAMES = ("neither", "projection", "projection+pairwise", "box-supervised", "full-masks")
ROWS = tuple(
    ReportRow(name, term, pair, name.replace("+", " + "))
    for name, term, pair in zip(NAMES, ("no", "yes", "yes", "yes", ""), ("no", "no", "yes", "yes", ""), strict=True)
)
TABLES = (
    ReportTable("table6", "Table 6: one_seen", "few", "d6", CLASSES[:1], CLASSES[1:], "6", ROWS),
    ReportTable("table7", "Table 7: two seen", "many", "d7", CLASSES[:2], CLASSES[2:], "7", ROWS),
)
CUT = {"neither": 12, "projection": 9, "projection+pairwise": 6, "box-supervised": 7, "full-masks": 2}
SIZE = 64


def encode(mask: np.ndarray) -> dict[str, Any]:
    value = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def object_mask(x: int, missing: int) -> np.ndarray:
    """A 20 x 20 square of which the last columns are missing."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[10:30, x : x + 20 - missing] = True
    return mask


def write_data(folder: Path) -> Path:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        for place, category in enumerate((1, 2, 3) if number else ()):
            x = 21 * place
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, 10, 20, 20],
                    "area": 400,
                    "iscrowd": 0,
                    "segmentation": encode(object_mask(x, 0)),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    path = folder / "val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def make_run(folder: Path, annotations: Path, row: str, split: str | None, seed: int) -> Result:
    """Detections that miss more of each mask in weaker rows, with a log, in the folder of a run."""
    run_id = f"{row}-{split}-{seed}"
    truth = json.loads(annotations.read_text())["annotations"]
    detections = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "score": 0.9 - 0.01 * number,
            "segmentation": encode(object_mask(int(annotation["bbox"][0]), CUT[row] + seed * (number % 3 == 0))),
        }
        for number, annotation in enumerate(truth)
    ]
    out = folder / run_id
    out.mkdir(parents=True)
    (out / "detections.json").write_text(json.dumps(detections))
    losses = {"classification": 0.5, "pairwise": 0.1 if "pairwise" in row else 0.0}
    lines = [json.dumps({"step": step, "losses": losses}) for step in (1, 2, 3)]
    (out / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    metrics = evaluate_detections(annotations, detections, class_names=CLASSES, image_ids=range(5))
    return recorded_run(
        row,
        seed,
        run_id=run_id,
        split=split,
        split_digest=split and {"few": "d6", "many": "d7"}[split],
        metrics=metrics.to_dict(),
        git_revision="abc123",
        command=["python", "-m", "semiseg", "train", "a b"],
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    folder = tmp_path_factory.mktemp("study")
    annotations = write_data(folder)
    runs: dict[str, Result] = {}
    results = {}
    for table in TABLES:
        for row in ROWS:
            split = None if row.name in ("box-supervised", "full-masks") else table.split
            for seed in range(3):
                key = f"{row.name}-{split}-{seed}"
                if key not in runs:
                    runs[key] = make_run(folder / "runs", annotations, row.name, split, seed)
                results[table.name, row.name, seed] = runs[key]
    return ReportInput(
        study="tiny",
        title="Tiny <study> with a | in its title",
        question="Does it\nwork?",
        seeds=(0, 1, 2),
        tables=TABLES,
        results=results,
        data="Five made-up images.",
        schedule="3 steps.",
        pretraining="A detector trained for 5 steps on boxes.",
        run_command="semiseg run tiny",
        report_command="semiseg report tiny",
        run_folders={run_id: folder / "runs" / run_id for run_id in runs},
        val_annotations=annotations,
        val_images=folder,
    )


@pytest.fixture(scope="module")
def report(study: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(study, out=tmp_path_factory.mktemp("report"), published=PUBLISHED)


@pytest.fixture
def quickly_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: every figure is made, but not drawn."""
    white = io.BytesIO()
    Image.new("1", (4, 4), 1).save(white, format="png")
    monkeypatch.setattr(pictures, "png", lambda image, *, colours: white.getvalue())
    monkeypatch.setattr(figures, "chart", lambda figure: white.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_are_there_and_every_reference_is_right(report: Path) -> None:
    files = set(contents(report.parent))
    tables = {f"tables/{name}.{kind}" for name in ("table6", "table7") for kind in ("csv", "md", "tex")}
    kinds = ("losses", "pictures")
    figures = {f"figures/{name}_{kind}.png" for name in ("table6", "table7") for kind in kinds}
    figures.add("figures/ap.png")
    assert files == {"index.html", "measured.json", "report.md", *tables, *figures}
    text = unpadded(report.read_text(encoding="utf-8"))
    references = re.findall(r"(?<!\\)\]\(([^)]*)\)", text)
    assert set(references) == files - {"index.html", "measured.json", "report.md"}
    assert sum(path.stat().st_size for path in (report.parent / "figures").iterdir()) < 1_500_000
    for path in (report.parent / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] > 400


def test_the_page_for_browsers_is_whole_and_in_the_order_of_the_text(report: Path) -> None:
    text = unpadded(report.read_text(encoding="utf-8"))
    content = report.with_name("index.html").read_text(encoding="utf-8")
    page = read_page(content)
    assert_whole(page, report.parent)
    told = re.findall(r"^(#+) (.*)$", text, re.MULTILINE)
    headings = page.one("main").all("h1", "h2", "h3")
    assert [(len(sign), unescape(re.sub(r"\\(.)", r"\1", words))) for sign, words in told] == [
        (int(heading.tag[1]), heading.text) for heading in headings
    ]
    assert [link.text for link in page.one("nav").all("a")] == [heading.text for heading in headings[1:]]
    assert page.one("h1").text == "Tiny <study> with a | in its title"
    parts = [element for element in page.one("main").walk() if element.tag in ("p", "table", "h2")]
    assert [part.tag for part in parts[:7]] == ["p", "p", "p", "p", "h2", "p", "table"]
    assert [part.text.split(".")[0] for part in parts[:2]] == ["Question", "Answer"]
    assert len(page.all("table")) == len(re.findall(r"^\|[ :]-", text, re.MULTILINE))
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    kinds = [image.attributes["src"].partition(";")[0] for image in page.all("img")]
    assert kinds == ["data:image/png"] * len(pictures)
    classes = {line.all("th", "td")[0].text for line in page.all("tr")}
    assert set(CLASSES) <= classes
    embedded = [report.parent / name for name in pictures]
    size = sum(path.stat().st_size for path in (report, *embedded, Path(html.__file__).with_name("page.css")))
    assert len(content.encode()) < 1.4 * size


def test_rebuilding_changes_no_byte_and_no_input(study: ReportInput, report: Path) -> None:
    inputs = study.val_images
    assert inputs is not None
    before, results = contents(inputs), copy.deepcopy(dict(study.results))
    first = contents(report.parent)
    build_report(study, out=report.parent, published=PUBLISHED)
    assert contents(report.parent) == first
    assert contents(inputs) == before
    assert study.results == results


def test_the_page_says_what_it_must(report: Path) -> None:
    text = unpadded(report.read_text(encoding="utf-8"))
    assert text.startswith(
        "# Tiny &lt;study&gt; with a \\| in its title\n\n**Question.** Does it work?\n\n**Answer.** "
    )
    assert "closes" in text.split("**Answer.**")[1].split("\n")[0]
    assert "stands in for the ImageNet weights" in text
    assert "**The COCO numbers are from another data set** (ResNet-50-FPN, 1x, coco val2017)" in text
    for printed in ("19.9 38.3 18.5", "30.9 50.1 32.4", "25.5 45.5 25.1", "35.9 60.9 36.3"):
        pattern = r" \| ".join(rf"[*\d.]+ ± [\d.]+ \({value}\)" for value in printed.split())
        assert len(re.findall(pattern, text)) == 1, printed
    assert "35.6 / 56.3 / 37.8" in text  # the paper's own upper bound, Table 2
    assert "box-supervised (unseen): printed identical to Table 6 although the unseen classes differ" in text
    assert "Drawn at random with seed 0; then of the others those with the largest gain" in text
    assert "count every detection; those with a score above 0.4 are drawn" in text
    assert "semiseg train 'a b'" in text
    for digest in ("`d6`", "`d7`", "`data1`", "`abc123`"):
        assert digest in text
    assert "Incomplete" not in text
    assert "Mixed" not in text


def test_markdown_tables_are_rectangular_and_names_are_escaped(report: Path) -> None:
    text = unpadded(report.read_text(encoding="utf-8"))
    widths: list[int] = []
    blocks = 0
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1, widths
            blocks, widths = blocks + 1, []
    assert blocks >= 2 * 5 + 1
    assert "| a\\_ring | seen |" in text
    assert "| b\\|&lt;b&gt; | unseen |" in text
    assert "| 猫 \\$x\\$ | unseen |" in text


def test_csv_of_both_tables_reads_the_shared_runs(report: Path) -> None:
    rows = [(report.parent / "tables" / f"{name}.csv").read_text().splitlines() for name in ("table6", "table7")]
    for line in (4, 5):  # box-supervised and full-masks: one run, two tables
        few, many = (table[line].split(",") for table in rows)
        assert few[:7] == many[:7]
        assert few[7:13] != many[7:13]
    assert rows[0][5].startswith("full-masks,,,3,")


@pytest.mark.usefixtures("quickly_drawn")
def test_missing_cells_are_named_with_the_command(study: ReportInput, tmp_path: Path) -> None:
    results = {
        key: value
        for key, value in study.results.items()
        if key[1] != "neither" and key != ("table7", "projection", 2) and key[2] < 3
    }
    partial = replace(study, results=results)
    text = unpadded(build_report(partial, out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8"))
    assert "table6 lacks `neither` seed 0, 1, 2. `semiseg run tiny` fills them" in text
    assert "table7 lacks `neither` seed 0, 1, 2; `projection` seed 2." in text
    assert "a share that is not known yet (neither not measured on unseen classes)" in text
    assert (tmp_path / "tables" / "table6.csv").read_text().splitlines()[1] == "neither,no,no,0" + "," * 18
    empty = replace(study, results={})
    text = unpadded(build_report(empty, out=tmp_path / "empty", published=PUBLISHED).read_text(encoding="utf-8"))
    for reference in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (tmp_path / "empty" / reference).is_file()


@pytest.mark.usefixtures("quickly_drawn")
def test_mixed_code_data_and_splits_are_warned_of(study: ReportInput, tmp_path: Path) -> None:
    results = dict(study.results)
    key = ("table6", "neither", 1)
    results[key] = replace(results[key], git_revision="def456", data_fingerprint="data2", split_digest="old")
    mixed = replace(study, results=results, run_folders={})
    text = unpadded(build_report(mixed, out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8"))
    assert "**Mixed code (git revisions).** `abc123`: 23 runs; `def456`: neither (few) seed 1." in text
    assert "**Mixed data.** `data1`: 23 runs; `data2`: neither (few) seed 1." in text
    assert "the class groups of `few` (d6), but" in text
    assert "`few (old)`: neither (few) seed 1." in text
    assert "Mixed devices" not in text


def test_without_run_folders_a_report_of_the_same_runs_is_rebuilt_to_the_byte(
    study: ReportInput, report: Path, tmp_path: Path
) -> None:
    shutil.copytree(report.parent, tmp_path, dirs_exist_ok=True)
    build_report(replace(study, run_folders={}, val_annotations=None), out=tmp_path, published=PUBLISHED)
    assert contents(tmp_path) == contents(report.parent)


def test_figures_of_runs_that_are_gone_are_kept(study: ReportInput, report: Path, tmp_path: Path) -> None:
    shutil.copytree(report.parent, tmp_path, dirs_exist_ok=True)
    # A run was recorded anew since: the figures do not show it.
    again = {key: replace(run, run_id=f"{run.run_id}-again") for key, run in study.results.items() if key[2] == 0}
    study = replace(study, results={**study.results, **again})
    one_gone = dict(list(study.run_folders.items())[1:])
    for folders in (one_gone, {}):
        gone = replace(study, run_folders=folders)
        text = unpadded(build_report(gone, out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8"))
        kept, before = (contents(folder / "figures") for folder in (tmp_path, report.parent))
        assert kept == before
        assert "neither seed 0" in text.split("Without ")[1].split(": the detections of these runs")[0]
        assert (
            "kept from an earlier report, because the run folders with the detections are not on this machine" in text
        )
        assert "figures/table6_losses.png" in text


@pytest.mark.usefixtures("quickly_drawn")
def test_without_run_folders_and_an_earlier_report_there_are_no_pictures(study: ReportInput, tmp_path: Path) -> None:
    gone = replace(study, run_folders={})
    fresh = build_report(gone, out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8")
    assert "pictures.png" not in fresh
    assert "*No figure (ground truth and detections, table6): the run folders" in fresh


@pytest.mark.usefixtures("quickly_drawn")
def test_a_report_without_pictures_has_none_and_keeps_none(study: ReportInput, tmp_path: Path) -> None:
    build_report(study, out=tmp_path, published=PUBLISHED)
    drawn = sorted(path.name for path in (tmp_path / "figures").glob("*_pictures.png"))
    assert drawn
    text = build_report(replace(study, pictures=False), out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8")
    assert not list((tmp_path / "figures").glob("*_pictures.png"))
    assert "pictures.png" not in text
    assert "### Pictures" not in text
    assert "Failures" in text


@pytest.mark.usefixtures("quickly_drawn")
def test_a_table_without_unseen_classes_says_nothing_of_them(study: ReportInput, tmp_path: Path) -> None:
    table = replace(TABLES[0], split="", split_digest="", seen=CLASSES, unseen=(), published="3")
    results = {key: value for key, value in study.results.items() if key[0] == "table6"}
    plain = replace(study, tables=(table,), results=results, question="")
    text = unpadded(build_report(plain, out=tmp_path, published=PUBLISHED).read_text(encoding="utf-8"))
    assert "Question" not in text
    assert "**Answer.** Highest mean mask AP: " in text
    assert "gap closed" not in text
    assert "unseen" not in text
    assert "Solid boxes" not in text
    assert "All 3 classes; mask AP in percent" in text
    heading = (
        "| row | projection | pairwise | seeds | AP (COCO, printed) | AP50 (COCO, printed) | AP75 (COCO, printed) |"
    )
    assert heading in text
    assert "full-masks: not in the paper's table" in text
    assert "Split" not in text
    assert "| unseen |" not in text
    assert re.search(r" \(21.2\) \| .* \(45.2\) \| .* \(17.7\) \|", text)
    line = (tmp_path / "tables" / "table6.csv").read_text().splitlines()[1].split(",")
    assert line[4:7] == line[10:13]
    assert line[7:10] == [""] * 3


def test_names_of_data_files_are_the_same_letters_on_the_page(study: ReportInput, tmp_path: Path) -> None:
    names = ("猫 café", "\"a\" 'b'", "a|b_c_", "<b> $x$", "&amp; `code` \\")
    rows = tuple(replace(row, label=name) for row, name in zip(ROWS, names, strict=True))
    tables = tuple(replace(table, rows=rows, title=" ".join(names)) for table in TABLES)
    strange = replace(study, tables=tables, title=names[2], question=names[3], run_folders={}, data=names[4])
    build_report(strange, out=tmp_path, published=PUBLISHED)
    page = read_page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert_whole(page, tmp_path)
    assert page.one("h1").text == names[2]
    assert page.one("head").one("title").text == names[2]
    assert page.one("main").all("p")[0].text == f"Question. {names[3]}"
    assert [h.text for h in page.all("h2")][:2] == [" ".join(names)] * 2
    assert f"Data. {names[4]}" in [item.text for item in page.all("li")]
    assert [line.all("th", "td")[0].text for line in page.all("table")[0].all("tr")] == ["row", *names]


def test_terminal_text(study: ReportInput) -> None:
    text = report_text(study)
    assert text.count("projection + pairwise  ") == 2
    assert text.startswith("Table 6: one_seen\nrow ")
