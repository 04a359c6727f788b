"""Aggregation over seeds and the tables as files, against numbers computed by hand."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from semiseg.errors import UserError
from semiseg.report.aggregate import (
    CSV_COLUMNS,
    ReportInput,
    ReportRow,
    ReportTable,
    compared_pairs,
    difference,
    gap_closed,
    measurements,
    summarise,
    table_numbers,
)
from semiseg.report.page import report_text
from semiseg.report.published import read_published
from semiseg.report.sections import _edge_section, answer, gap_caution
from semiseg.report.tables import (
    csv_table,
    escape_latex,
    escape_markdown,
    latex_table,
    layout,
    markdown_table,
    number,
    signed,
    table_cells,
    text_table,
    whole_percent,
)
from tests.recorded_runs import metrics_of_classes, recorded_run

ROWS = (
    ReportRow("neither", "no", "no", "neither"),
    ReportRow("projection", "yes", "no", "projection"),
    ReportRow("projection+pairwise", "yes", "yes", "projection + pairwise"),
    ReportRow("box-supervised", "yes", "yes", "box-supervised"),
    ReportRow("full-masks", "", "", "full-masks"),
)
TABLE = ReportTable("table6", "Table 6: few", "few", "d1", ("ring",), ("cross", "猫"), "6", ROWS)


def report_of(unseen_ap: Mapping[str, Sequence[float | None]], *, table: ReportTable = TABLE) -> ReportInput:
    """Row -> AP of "cross" per seed (None = not measured); "猫" is 2 higher, "ring" always 50."""
    results = {
        (table.name, row, seed): recorded_run(
            row, seed, metrics=metrics_of_classes({"ring": 50.0, "cross": value, "猫": value + 2})
        )
        for row, values in unseen_ap.items()
        for seed, value in enumerate(values)
        if value is not None
    }
    return ReportInput(
        study="tiny",
        title="Tiny",
        question="Does it work?",
        seeds=tuple(range(max(map(len, unseen_ap.values())))),
        tables=(table,),
        results=results,
        data="Made up.",
        schedule="None.",
        pretraining=None,
        run_command="semiseg run tiny",
        report_command="semiseg report tiny",
    )


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_columns_and_numbers_by_hand() -> None:
    report = report_of({"neither": [19.0, 22.0], "projection": [29.0], "full-masks": [39.0, 42.0]})
    text = csv_table(summarise(measurements(report, TABLE), TABLE))
    metrics = "all_AP,all_AP50,all_AP75,unseen_AP,unseen_AP50,unseen_AP75,seen_AP,seen_AP50,seen_AP75"
    deviations = ",".join(f"{name}_std" for name in metrics.split(","))
    assert text.splitlines()[0] == f"row,projection,pairwise,seeds,{metrics},{deviations}"
    lines = lines_of(text)
    assert [line["row"] for line in lines] == [row.name for row in ROWS]
    neither = lines[0]
    assert (neither["projection"], neither["pairwise"], neither["seeds"]) == ("no", "no", "2")
    # Unseen: seed 0 has (19 + 21) / 2 = 20, seed 1 has 23: mean 21.5, sample deviation 3 / sqrt(2).
    assert neither["unseen_AP"] == "21.50"
    assert neither["unseen_AP_std"] == "2.12"
    # All: (50 + 40) / 3 = 30 and (50 + 46) / 3 = 32.
    assert (neither["all_AP"], neither["all_AP_std"]) == ("31.00", "1.41")
    assert (neither["unseen_AP50"], neither["unseen_AP75"]) == ("31.50", "26.50")
    assert (neither["seen_AP"], neither["seen_AP_std"]) == ("50.00", "0.00")
    projection = lines[1]
    assert (projection["seeds"], projection["unseen_AP"], projection["unseen_AP_std"]) == ("1", "30.00", "")
    missing = lines[2]
    assert missing == {**dict.fromkeys(CSV_COLUMNS, ""), "row": "projection+pairwise"} | {
        "projection": "yes",
        "pairwise": "yes",
        "seeds": "0",
    }


def test_nothing_measured_still_gives_every_row() -> None:
    lines = lines_of(csv_table(table_numbers(report_of({"neither": [None]}), TABLE).summary))
    assert [line["seeds"] for line in lines] == ["0"] * 5
    assert {line["all_AP"] for line in lines} == {""}


def test_groups_without_ground_truth_are_empty_and_ignored() -> None:
    table = ReportTable("t", "T", "few", "d", ("ring",), ("never",), None, ROWS[:1])
    line = lines_of(csv_table(summarise(measurements(report_of({"neither": [20.0]}, table=table), table), table)))[0]
    assert (line["unseen_AP"], line["seen_AP"], line["all_AP"]) == ("", "50.00", "50.00")


def test_box_numbers_are_the_boxes() -> None:
    numbers = table_numbers(report_of({"neither": [20.0]}), TABLE)
    assert numbers.box_summary["unseen_AP"].iloc[0] == 42
    assert numbers.classes.loc["cross", "neither"] == 20
    assert numbers.classes["full-masks"].isna()["cross"]


def test_gap_closed_uses_common_seeds_only() -> None:
    report = report_of({"neither": [20.0, 24.0], "projection": [30.0, None], "full-masks": [40.0, 44.0]})
    measured = measurements(report, TABLE)
    gap = gap_closed(measured, "projection")
    assert gap is not None
    assert (gap.start, gap.reached, gap.goal, gap.percent, gap.per_seed) == (21, 31, 41, 50, (50,))
    ends = [gap_closed(measured, name) for name in ("neither", "full-masks")]
    assert [gap and gap.percent for gap in ends] == [0, 100]
    assert gap_closed(measured, "box-supervised") is None
    flat = measurements(report_of({"neither": [40.0], "full-masks": [30.0]}), TABLE)
    gap = gap_closed(flat, "full-masks")
    assert gap is not None
    assert gap.percent is None


def test_differences_are_paired_and_judged_by_the_t_interval() -> None:
    report = report_of({"neither": [20.0, 30.0, 40.0], "projection": [22.0, 31.0, 43.0], "full-masks": [21.0, 33.0]})
    measured = measurements(report, TABLE)
    found = difference(measured, "neither", "projection", group="unseen")
    assert found.values == (2, 1, 3)
    assert (found.mean, found.std) == (2, 1)
    half = 4.30265273 / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert found.interval == pytest.approx((2 - half, 2 + half))
    assert found.resolved is False
    assert found.reading == "not resolved over seeds"
    tight = difference(
        measurements(report_of({"neither": [1, 2, 3], "projection": [3, 4, 5.1]}), TABLE),
        "neither",
        "projection",
        group="unseen",
    )
    assert tight.resolved is True
    assert tight.reading == "resolved: higher"
    down = difference(
        measurements(report_of({"neither": [3, 4, 5.1], "projection": [1, 2, 3]}), TABLE),
        "neither",
        "projection",
        group="unseen",
    )
    assert down.reading == "resolved: lower"
    two = difference(measured, "neither", "full-masks", group="all")
    assert len(two.values) == 2
    assert two.resolved is None
    assert "no claim" in two.reading
    assert difference(measured, "neither", "box-supervised", group="all").reading == "not measured"


@pytest.mark.parametrize(("count", "quantile"), [(3, 4.30265273), (5, 2.77644511), (31, 2.04227246), (60, 2.00099538)])
def test_interval_width(count: int, quantile: float) -> None:
    ones = [float(number % 2) for number in range(count)]
    report = report_of({"neither": [10.0] * count, "projection": [10 + value for value in ones]})
    found = difference(measurements(report, TABLE), "neither", "projection", group="unseen")
    assert found.interval is not None
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(quantile * pd.Series(ones).std() / math.sqrt(count))


def test_compared_pairs() -> None:
    pairs = compared_pairs(TABLE)
    assert pairs[:4] == [(a.name, b.name) for a, b in pairwise(ROWS)]
    assert set(pairs[4:]) == {
        ("neither", "projection+pairwise"),
        ("projection+pairwise", "full-masks"),
        ("neither", "full-masks"),
    }
    assert compared_pairs(ReportTable("t", "T", "s", "d", (), (), None, ROWS[:1])) == []


FULL = {
    "neither": [20.0, 21.0, 22.0],
    "projection": [25.0, 26.0, 27.5],
    "projection+pairwise": [30.0, 31.0, 32.5],
    "box-supervised": [28.0, 29.0, 30.0],
    "full-masks": [40.0, 41.0, 42.0],
}


def test_answer_says_how_much_of_the_gap_is_closed() -> None:
    numbers = table_numbers(report_of(FULL), TABLE)
    assert answer([numbers]) == (
        "Of the gap between neither and full-masks on unseen classes projection + pairwise closes with 1 of 3 classes "
        "seen 51 % (22.0 → 32.2 AP, full-masks 42.0)."
    )
    assert gap_caution(numbers) is None


WITH_LEARNED = replace(
    TABLE, rows=(*ROWS[:3], ReportRow("learned", "yes", "learned", "projection + learned affinity"), *ROWS[3:])
)


def test_answer_says_what_learned_edges_close_beside_those_of_colour() -> None:
    numbers = table_numbers(report_of(FULL | {"learned": [38.0, 39.0, 40.0]}, table=WITH_LEARNED), WITH_LEARNED)
    assert answer([numbers]) == (
        "Of the gap between neither and full-masks on unseen classes projection + pairwise closes with 1 of 3 classes "
        "seen 51 % (22.0 → 32.2 AP, full-masks 42.0). Learned affinity closes with 1 of 3 classes seen 90 % (22.0 → "
        "40.0 AP, full-masks 42.0)."
    )
    assert ("projection+pairwise", "learned") in compared_pairs(WITH_LEARNED)
    assert ("learned", "full-masks") in compared_pairs(WITH_LEARNED)


def test_quality_of_edges_stands_where_it_was_measured() -> None:
    report = report_of(FULL | {"learned": [38.0, 39.0]}, table=WITH_LEARNED)
    assert _edge_section(report, table_numbers(report, WITH_LEARNED)) == []
    for key, run in report.results.items():
        if key[1] == "learned":
            values = {"edges": 9.0, "learned_auc": 90.0 + key[2], "colour_auc": 80.0, "calibration_error": 2.5}
            report = replace(report, results={**report.results, key: replace(run, edges={"unseen": values})})
    heading, _, table = _edge_section(report, table_numbers(report, WITH_LEARNED))
    assert heading == "### Learned edges"
    cells = [cell.strip() for cell in table.split("\n")[2].strip("|").split("|")]
    assert cells == ["projection + learned affinity", "unseen", "90.5 ± 0.7", "80.0 ± 0.0", "2.5 ± 0.0"]


def test_answer_claims_nothing_that_the_runs_do_not_show() -> None:
    one = {name: values[:1] for name, values in FULL.items()}
    assert answer([table_numbers(report_of(one), TABLE)]).endswith(
        "(one seed: differences over seeds are not resolved)."
    )
    noisy = FULL | {"projection+pairwise": [10.0, 22.0, 40.0]}
    assert "the step is not resolved over seeds, what is left to full-masks is not resolved over seeds" in answer(
        [table_numbers(report_of(noisy), TABLE)]
    )
    flat = FULL | {"full-masks": [19.0, 20.0, 20.0]}
    assert "closes with 1 of 3 classes seen nothing: there is no gap" in answer([table_numbers(report_of(flat), TABLE)])
    wide = FULL | {"full-masks": [20.0, 41.0, 22.0]}
    assert "not resolved over seeds" in (gap_caution(table_numbers(report_of(wide), TABLE)) or "")
    small = one | {"full-masks": [23.0]}
    assert "only 3.0 AP" in (gap_caution(table_numbers(report_of(small), TABLE)) or "")
    gone = {name: values for name, values in FULL.items() if name != "full-masks"}
    assert "not known yet (full-masks not measured" in answer([table_numbers(report_of(gone), TABLE)])


def test_people_see_mean_and_deviation() -> None:
    report = report_of({"neither": [19.0, 22.0], "projection": [29.0]})
    shown = layout(TABLE, table_numbers(report, TABLE).summary)
    cells = table_cells(table_numbers(report, TABLE).summary, TABLE, shown)
    assert cells[0][:5] == ["neither", "no", "no", "2", "31.0 ± 1.4"]
    assert cells[1][7] == "30.0"
    assert cells[4] == ["full-masks", "—", "—", "0", *["—"] * 9]
    assert all(len(line) == len(shown.headings) for line in cells)
    latex = latex_table(TABLE, shown, cells)
    assert latex.count("toprule") == latex.count("midrule") == latex.count("bottomrule") == 1
    assert "31.0 $\\pm$ 1.4 &" in latex
    rows = [line for line in latex.splitlines() if line.startswith(("neither", "full-masks"))]
    assert [row.count("&") for row in rows] == [12, 12]


@pytest.mark.parametrize(
    ("name", "markdown", "latex"),
    [
        ("a|b", r"a\|b", r"a\textbar{}b"),
        ("potted_plant", r"potted\_plant", r"potted\_plant"),
        ("<b>&", "&lt;b&gt;&amp;", r"\textless{}b\textgreater{}\&"),
        ("猫 café", "猫 café", "猫 café"),
        ("50 % of $x$", r"50 % of \$x\$", r"50 \% of \$x\$"),
        ("two\nlines", "two lines", "two lines"),
        (
            r"back\slash {~^}",
            r"back\\slash {\~^}",
            r"back\textbackslash{}slash \{\textasciitilde{}\textasciicircum{}\}",
        ),
        (
            "`code` *star* [link]",
            r"\`code\` \*star\* \[link\]",
            r"\textasciigrave{}code\textasciigrave{} *star* [link]",
        ),
    ],
)
def test_names_are_escaped(name: str, markdown: str, latex: str) -> None:
    assert escape_markdown(name) == markdown
    assert escape_latex(name) == latex


def test_markdown_and_text_tables() -> None:
    table = markdown_table(("a|b", "n"), [["x", "1"], ["y", "2"]])
    assert [line.replace(" ", "") for line in table.split("\n")] == [
        "|a\\|b|n|",
        "|:-------|----:|",
        "|x|1|",
        "|y|2|",
        "",
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    text = text_table(("name", "n"), [["猫", "1"], ["long name", "22"]])
    assert text == "name        n\n猫          1\nlong name  22\n"
    assert text_table(("row", "n"), []) == "row  n\n"


def test_published_numbers_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_published(tmp_path / "no.csv")
    (tmp_path / "bad.csv").write_text("table,row\n6,neither\n")
    with pytest.raises(UserError, match="column 'classes' is missing"):
        read_published(tmp_path / "bad.csv")


def test_the_answer_says_what_is_measured_once() -> None:
    other = replace(TABLE, name="table7")
    report = report_of(FULL)
    results = {**report.results, **{("table7", *key[1:]): run for key, run in report.results.items()}}
    both = replace(report, tables=(TABLE, other), results=results)
    assert answer([table_numbers(both, table) for table in both.tables]) == (
        "Of the gap between neither and full-masks on unseen classes projection + pairwise closes with 1 of 3 classes "
        "seen 51 % (22.0 → 32.2 AP, full-masks 42.0); with 1 of 3 classes seen 51 % (22.0 → 32.2 AP, full-masks 42.0)."
    )


def test_people_read_a_true_minus() -> None:
    minus = "\N{MINUS SIGN}"
    assert (signed(-0.25, 2), signed(1.0), signed(0.0)) == (f"{minus}0.25", "+1.0", "+0.0")
    assert whole_percent(-40.4) == f"{minus}40 %"
    assert number(-1.0, 0.5, sign=True) == f"{minus}1.0 ± 0.5"
    assert number(-1.0) == f"{minus}1.0"


def test_a_seed_stands_beside_the_recorded_means_and_is_marked_beyond_two_deviations() -> None:
    # "cross" and "猫", 2 above it, are unseen: means 21 and 41 with deviations 1 and 10.
    recorded = report_of({"neither": [19.0, 20.0, 21.0], "full-masks": [30.0, 40.0, 50.0], "projection": [9.0]})
    own = report_of({"neither": [22.1], "full-masks": [59.0], "projection": [9.0], "box-supervised": [9.0]})
    plain = report_text(own).splitlines()
    told = report_text(own, recorded).splitlines()
    assert [line[: len(alone)] for line, alone in zip(told, plain, strict=False)] == plain
    behind = [line[len(alone) :].split() for line, alone in zip(told, plain, strict=False)]
    marks = dict(zip([row.name for row in TABLE.rows], behind[2:], strict=True))
    assert behind[1] == ["recorded", "unseen", "AP"]
    assert marks["neither"] == ["21.0", "±", "1.0", "!"]
    assert marks["full-masks"] == ["41.0", "±", "10.0"]
    assert marks["projection"] == ["10.0"]  # of one seed
    assert marks["box-supervised"] == ["—"]
    assert told[-1].startswith("recorded: mean ± deviation over 3 seeds of ")
    other = replace(TABLE, name="table7")
    assert report_text(own, report_of({"neither": [19.0, 20.0]}, table=other)).startswith(report_text(own))
