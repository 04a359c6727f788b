"""Edges of the pairwise loss against the colour threshold: measured by class, kept beside a study, shown on a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semiseg.commands.study_data import record_edge_curve, recorded_edge_curve
from semiseg.engine.edges import EdgeShare, Neighbourhood, measure_edges
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable, table_numbers
from semiseg.report.context import FigureFiles, PageContext
from semiseg.report.diagnostics import edge_curve_section
from semiseg.report.edge_curve import EdgeCurve
from semiseg.report.measured import Measured
from semiseg.report.published import printed_positive_edges, read_published
from semiseg.study import Study, load_study
from tests.coco_files import CocoFiles, box_annotation, ellipse, make_coco, rle_annotation
from tests.test_edges import STUDY, smooth

PUBLISHED = Path(__file__).parent.parent / "reports" / "published" / "boxinst.csv"
ANNOTATIONS = [
    rle_annotation(1, image_id=1, category_id=1, mask=ellipse(46, 37, box_xyxy=(3, 5, 30, 41)), compressed=True),
    rle_annotation(2, image_id=2, category_id=3, mask=ellipse(40, 50, box_xyxy=(10, 2, 50, 40)), compressed=False),
    rle_annotation(3, image_id=2, category_id=1, mask=ellipse(40, 50, box_xyxy=(2, 2, 20, 30)), compressed=True),
]


def make_files(folder: Path, annotations: list[dict[str, Any]]) -> CocoFiles:
    return smooth(make_coco(folder, sizes_hw=[(46, 37), (40, 50)], annotations=annotations))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CocoFiles:
    return make_files(tmp_path_factory.mktemp("curve"), ANNOTATIONS)


def test_each_class_has_the_shares_of_its_own_instances(files: CocoFiles, tmp_path: Path) -> None:
    def measure(of: CocoFiles) -> dict[tuple[Neighbourhood, float], EdgeShare]:
        found = measure_edges(
            of.annotations, of.images, neighbourhoods=[Neighbourhood(3, 1), Neighbourhood(5, 2)],
            thresholds=(0.3, 0.0, 0.1), stride=2, short_side=0, long_side=1333, bottom_rows=3,
        )  # fmt: skip
        return {(share.neighbourhood, share.threshold): share for share in found.shares}

    whole = measure(files)
    assert [threshold for _, threshold in whole][:3] == [0.3, 0.0, 0.1]
    for category in (1, 3):
        only = [annotation for annotation in ANNOTATIONS if annotation["category_id"] == category]
        alone = measure(make_files(tmp_path / str(category), only))
        name = {item["id"]: item["name"] for item in files.content["categories"]}[category]
        for key, share in alone.items():
            assert whole[key].by_class[name] == (share.share, share.positive)
            assert set(share.by_class) == {name}
            assert share.edges < whole[key].edges


def write_study(folder: Path, files: CocoFiles) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tau.toml").write_text(STUDY.replace("ROOT", str(files.annotations.parent)))
    return load_study(str(folder / "tau.toml"))


def test_a_study_keeps_its_curve(files: CocoFiles, tmp_path: Path) -> None:
    study, path = write_study(tmp_path, files), tmp_path / "edge_curve.json"
    assert recorded_edge_curve(study, tmp_path) is None
    record_edge_curve(study, tmp_path)
    curve = recorded_edge_curve(study, tmp_path)
    assert curve is not None
    assert curve.rows == {"tau": {"0.0": (3, 2, 0.0), "0.1": (3, 2, 0.1)}}
    assert sorted(curve.points) == [(3, 2, round(0.05 * number, 2)) for number in range(11)]
    counting = [share for _, (share, _) in sorted(curve.points.items())]
    assert counting[0] == 1
    assert counting == sorted(counting, reverse=True)
    assert counting[-1] < 0.9
    assert set(curve.classes) == {(3, 2, 0.0), (3, 2, 0.1)}
    assert {pair[0] for pair in curve.classes[3, 2, 0.0].values()} == {1.0}
    assert "2 validation images with 3 instances" in curve.sentence
    before = path.stat().st_mtime_ns
    record_edge_curve(study, tmp_path)
    assert path.stat().st_mtime_ns == before
    path.write_text("{")
    with pytest.raises(UserError, match=r"edge_curve\.json: not readable; remove it"):
        recorded_edge_curve(study, tmp_path)
    content = {"shares": [{"size": 3}], "sentence": "", "classes": {}}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"edge_curve\.json: not readable"):
        recorded_edge_curve(study, tmp_path)
    record_edge_curve(study, tmp_path)
    assert recorded_edge_curve(study, tmp_path) == curve


def test_data_that_cannot_be_measured_leave_the_curve_out(tmp_path: Path) -> None:
    boxes = [box_annotation(1, image_id=1, category_id=1, box_xywh=[1, 1, 20, 20])]
    study = write_study(tmp_path / "boxes", make_files(tmp_path / "data", boxes))
    record_edge_curve(study, tmp_path)
    record_edge_curve(load_study("coco_table3"), tmp_path)  # its images are not here
    assert not (tmp_path / "edge_curve.json").exists()


def make_page(folder: Path, curve: EdgeCurve | None, names: tuple[str, ...]) -> PageContext:
    rows = (ReportRow("0.0", "", "", "0.0"), ReportRow("0.1", "", "", "0.1"))
    tables = tuple(ReportTable(name, name, "", "", ("a|b", "c"), (), None, rows) for name in names)
    report = ReportInput("s", "T", "Q?", (0,), tables, {}, "", "", None, "", "", edge_curve=curve)
    numbers = [table_numbers(report, table) for table in tables]
    return PageContext(report, numbers, read_published(PUBLISHED), FigureFiles(folder), Measured(folder / "m.json"))


def test_the_section_shows_each_set_of_edges_once(tmp_path: Path) -> None:
    points = {(3, 2, 0.0): (1.0, 0.9), (3, 2, 0.1): (0.6, 0.98), (3, 2, 0.2): (0.5, 0.99)}
    classes = {(3, 2, 0.0): {"a|b": (1.0, 0.9)}, (3, 2, 0.1): {"a|b": (0.6, 0.98), "c": (0.25, 1.0)}}
    both = {"0.0": (3, 2, 0.0), "0.1": (3, 2, 0.1)}
    curve = EdgeCurve(points, classes, {"one": both, "two": both, "three": {"0.1": (3, 2, 0.1)}}, "Measured here.")
    page = make_page(tmp_path, curve, ("one", "two", "three", "four"))
    first, second, third, fourth = (edge_curve_section(page, numbers) for numbers in page.tables)
    assert second == fourth == []
    text = "\n".join(first)
    assert "At τ = 0 100.0 % of the edges count, and 90.0 % of these are truly positive; at τ = 0.1 60.0 % of" in text
    assert "Measured here. The paper prints, for COCO, 94.1 % at τ = 0, 98.3 % at τ = 0.1" in text
    assert "| a\\|b | 100.0 % | 90.0 % | 60.0 % | 98.0 % |" in text
    assert "| c | — | — | 25.0 % | 100.0 % |" in text
    assert "98.0 % of these are truly positive (of all edges 90.0 %)." in third[1]
    assert {path.name for path in tmp_path.glob("*_edges.*")} == {
        f"{name}_edges.{kind}" for name in ("one", "three") for kind in ("png", "svg")
    }
    unmeasured = replace(page.report, edge_curve=None)
    page.report = unmeasured
    assert edge_curve_section(page, page.tables[0]) == []


def test_printed_shares_stand_in_the_notes() -> None:
    assert printed_positive_edges(read_published(PUBLISHED)) == [(0.0, 94.1), (0.1, 98.3), (0.2, 98.4)]
    nothing = pd.DataFrame({"table": ["tau"], "row": ["full"], "note": ["reference row"]})
    assert printed_positive_edges(nothing) == []
