"""Charts of a report: what is drawn, in which order and style, and that all of it lies within the picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from semiseg.report import figures, sections
from semiseg.report.aggregate import ReportRow, ReportTable, TableNumbers
from semiseg.report.figures import (
    CURVE_POINTS,
    TrainingCurves,
    class_gaps,
    read_curves,
    row_styles,
    shown_row,
    sorted_classes,
    training_figure,
    wrapped,
)

NAMES = ("neither", "projection", "projection+pairwise", "full-masks")
ROWS = tuple(ReportRow(name, "", "", name.replace("+", " + "), every_mask=name == "full-masks") for name in NAMES)
TABLE = ReportTable("t", "T", "s", "d", ("cross",), ("ring", "star"), None, ROWS)
PLAIN = ReportTable("p", "P", "", "", ("cross", "ring", "star"), (), None, ROWS)
STYLES = row_styles([TABLE])


@pytest.fixture
def as_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as matplotlib has them instead of bytes."""
    monkeypatch.setattr(figures, "chart", lambda figure: figure)


def class_frame(method: list[float], full: list[float]) -> pd.DataFrame:
    columns = {"neither": 5.0, "projection": 7.0, "projection+pairwise": method, "full-masks": full}
    return pd.DataFrame(columns, index=["ring", "star", "cross"], dtype=float)


def numbers_of(table: ReportTable, classes: pd.DataFrame) -> TableNumbers:
    """Numbers of a table of which only the AP of classes was measured."""
    unseen = classes.loc[[*table.unseen]].mean() if table.unseen else np.nan
    summary = pd.DataFrame({"row": classes.columns, "unseen_AP": unseen, "all_AP": classes.mean()})
    nothing = pd.DataFrame()
    return TableNumbers(table, nothing, summary, nothing, classes)


def drawn(figure: object) -> Figure:
    """A chart under `as_figures`."""
    assert isinstance(figure, Figure)
    return figure


def everything_is_inside(figure: Figure) -> None:
    """No letter and no mark lies outside of the picture."""
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_classes_are_sorted_by_their_gap_within_their_group() -> None:
    classes = class_frame([30, 20, 1], [35, 40, 90])
    assert shown_row(numbers_of(TABLE, classes)) == "projection+pairwise"
    gaps = class_gaps(numbers_of(TABLE, classes))
    assert gaps is not None
    assert gaps.to_dict() == {"ring": 5, "star": 20, "cross": 89}
    assert sorted_classes(numbers_of(TABLE, classes)) == ["star", "ring", "cross"]  # the seen one last, though widest
    assert sorted_classes(numbers_of(PLAIN, classes)) == ["cross", "star", "ring"]


PLAIN_ROWS = tuple(ReportRow(name, "", "", name) for name in ("first", "second", "third"))
BOUNDS = tuple(ReportRow(name, "", "", name, every_mask=True) for name in ("full-masks", "other masks"))


@pytest.mark.parametrize(
    ("rows", "ap", "main"),
    [
        (ROWS, {"neither": 9, "projection": 8, "projection+pairwise": 1, "full-masks": 10}, "projection+pairwise"),
        (PLAIN_ROWS, {"first": 9, "second": 1, "third": 2}, "third"),
        (PLAIN_ROWS, {"first": 9, "second": 1}, "second"),
        (PLAIN_ROWS, {"first": 9}, "first"),
        ((PLAIN_ROWS[0], BOUNDS[0]), {"first": 1, "full-masks": 9}, "first"),
        ((BOUNDS[0], *PLAIN_ROWS), {"full-masks": 9, "first": 3, "second": 1, "third": 2}, "first"),
        (BOUNDS, {"full-masks": 9, "other masks": 1}, "other masks"),
        (BOUNDS, {"full-masks": 9}, "full-masks"),
    ],
)
def test_one_row_is_the_one_that_a_page_is_about(rows: tuple[ReportRow, ...], ap: dict[str, float], main: str) -> None:
    table = ReportTable("p", "P", "", "", ("ring", "star"), (), None, rows)
    numbers = numbers_of(table, pd.DataFrame(ap, index=["ring", "star"], dtype=float))
    assert numbers.main_row(ap) == shown_row(numbers) == main
    assert numbers_of(table, pd.DataFrame(columns=[*ap], dtype=float)).main_row(ap) in ap


def test_the_best_row_is_that_on_unseen_classes_where_there_are_any() -> None:
    table = ReportTable("p", "P", "s", "d", ("ring",), ("star",), None, PLAIN_ROWS)
    classes = pd.DataFrame({"first": 9.5, "second": [0.0, 9.0], "third": [99.0, 8.0]}, index=["ring", "star"])
    assert shown_row(numbers_of(table, classes)) == "second"
    assert shown_row(numbers_of(replace(table, seen=("ring", "star"), unseen=()), classes)) == "third"


def test_classes_without_a_gap_are_sorted_by_ap_and_those_not_measured_come_last() -> None:
    classes = class_frame([30, 20, 1], [np.nan] * 3)
    assert class_gaps(numbers_of(PLAIN, classes)) is None
    assert sorted_classes(numbers_of(PLAIN, classes)) == ["ring", "star", "cross"]
    assert sorted_classes(numbers_of(PLAIN, class_frame([np.nan, 20, 1], [30, 21, 9]))) == ["cross", "star", "ring"]
    empty = class_frame([np.nan] * 3, [np.nan] * 3).mul(np.nan)
    assert sorted_classes(numbers_of(TABLE, empty)) == ["ring", "star", "cross"]


def test_long_labels_are_broken() -> None:
    assert wrapped("short  $name") == r"short \$name"
    assert wrapped("projection + pairwise") == "projection +\npairwise"


def test_a_row_has_one_style_on_a_page_and_no_other_row_has_it() -> None:
    other = ReportTable("o", "O", "", "", TABLE.seen + TABLE.unseen, (), None, (ReportRow("x", "", "", "x"), ROWS[3]))
    styles = row_styles([TABLE, other])
    assert list(styles) == [*NAMES, "x"]
    assert {name: styles[name] for name in NAMES} == STYLES
    many = tuple(ReportRow(str(number), "", "", str(number)) for number in range(16))
    styles = row_styles([ReportTable("m", "M", "", "", ("ring",), ("star",), None, many)])
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 16


def write_log(path: Path, steps: int, *, validations: dict[int, float]) -> Path:
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "seconds": 1.0, "losses": {"dice": 1 / step, "pairwise_labelled": 0.0}})
        if step in validations:
            lines.append({"step": step, "seconds": 1.0, "validation": {"box_AP": 50.0, "mask_AP": validations[step]}})
    path.write_text("\n".join([*map(json.dumps, lines), '{"step": 9999, "los']))
    return path


def test_curves_of_a_log(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", 125, validations={50: 10.0, 100: 20.0})
    curves = read_curves(path, final=(125, 25.0))
    assert curves is not None
    assert curves.mask_ap.to_dict() == {50: 10.0, 100: 20.0, 125: 25.0}
    assert CURVE_POINTS / 2 < len(curves.losses) <= CURVE_POINTS
    groups = np.array_split(np.arange(1, 126), len(curves.losses))
    assert {len(group) for group in groups} == {2, 3}
    assert curves.losses.index.min() < 3
    assert curves.losses.index.max() > 123
    short = read_curves(write_log(tmp_path / "log.jsonl", 3, validations={}), final=(3, 25.0))
    assert short is not None
    assert short.losses["dice"].to_dict() == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert short.mask_ap.empty  # the last number alone is no curve
    boxes = read_curves(write_log(tmp_path / "log.jsonl", 9, validations={5: 50.0}), final=(9, None))
    assert boxes is not None
    assert boxes.mask_ap.empty  # of boxes, since masks could not be measured


def test_logs_without_losses_give_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "gone.jsonl", final=(3, 1.0)) is None
    for lines in ('[1]\n{"losses": {"dice": 1}}', '{"step": "1", "losses": {"dice": 1}}', "[" * 9999, "1" * 5000):
        (tmp_path / "log.jsonl").write_text(f"{lines}\n")
        assert read_curves(tmp_path / "log.jsonl", final=(3, 1.0)) is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "losses": {"dice": "low"}}\n')
    assert read_curves(tmp_path / "log.jsonl", final=(3, 1.0)) is None
    assert training_figure(TABLE, {}, STYLES) is None


@pytest.mark.usefixtures("as_figures")
def test_training_figure_has_a_panel_per_term_and_one_of_validation_where_measured(tmp_path: Path) -> None:
    validated = read_curves(write_log(tmp_path / "a", 9, validations={4: 10.0}), final=(9, 25.0))
    assert validated is not None
    figure = drawn(training_figure(TABLE, {"neither": [validated] * 2, "full-masks": [validated]}, STYLES))
    everything_is_inside(figure)
    assert [panel.get_title() for panel in figure.axes] == ["dice", "validation mask AP (%)"]
    for panel in figure.axes:
        assert [line.get_color() for line in panel.lines] == [
            STYLES[name]["color"] for name in ("neither",) * 2 + NAMES[3:]
        ]
    assert np.asarray(figure.axes[1].lines[0].get_xdata()).tolist() == [4, 9]
    assert np.asarray(figure.axes[1].lines[0].get_ydata()).tolist() == [10, 25]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["neither", "full-masks"]
    plain = read_curves(write_log(tmp_path / "b", 9, validations={}), final=(9, 25.0))
    assert plain is not None
    figure = drawn(training_figure(TABLE, {"neither": [plain]}, STYLES))
    assert [panel.get_title() for panel in figure.axes] == ["dice"]


def test_drawings_are_the_same_bytes() -> None:
    curves = TrainingCurves(pd.DataFrame({"dice": [2.0, 1.0]}, index=[1, 2]), pd.Series(dtype=float))
    first, second = (training_figure(TABLE, {"neither": [curves]}, STYLES) for _ in range(2))
    assert first is not None
    assert first == second
    assert Image.open(io.BytesIO(first)).size[0] > 350


def test_means_over_classes_leave_out_those_without_objects() -> None:
    by_class: dict[str, list[float | None]] = {"ring": [10.0] * 10, "star": [30.0] * 9 + [None], "cross": [None] * 10}
    means = sections._threshold_means(by_class, ("ring", "star", "cross"))
    assert next(iter(means)) == 0.5
    assert means[0.5] == 20
    assert means[0.95] == 10
    assert np.isnan(list(sections._threshold_means(by_class, ("cross",)).values())).all()
