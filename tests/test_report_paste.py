"""Tables ready to paste: the best values bold, LaTeX that compiles whatever the names are, printed numbers in cells."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from semiseg.report.aggregate import CSV_COLUMNS, ReportInput, ReportRow, ReportTable, TableNumbers
from semiseg.report.published import beside_printed, read_published
from semiseg.report.tables import best_cells, best_sentence, latex_table, layout, markdown_table, table_cells
from tests.page_reader import unpadded

SIZE_COLUMNS = ("all_APs", "all_APm", "all_APl")
PUBLISHED = Path(__file__).parent.parent / "reports" / "published" / "boxinst.csv"
EVIL = (
    "猫",
    "café",
    'say "hi"',
    "a|b",
    "snake_case",
    "<b>bold</b>",
    "50 % & more",
    "#1 {$x$} ~^\\",
    "[opt] *star*",
    "*",
)


def table_of(rows: tuple[ReportRow, ...], *, unseen: tuple[str, ...] = (), published: str | None = None) -> ReportTable:
    return ReportTable("t", "T_1 <b> 50 %\nsecond line", "s" * bool(unseen), "d", ("ring",), unseen, published, rows)


def rows_of(*names: str, bounds: tuple[str, ...] = ()) -> tuple[ReportRow, ...]:
    return tuple(ReportRow(name, "", "", name, every_mask=name in bounds) for name in names)


def summary_of(table: ReportTable, values: list[dict[str, float]]) -> pd.DataFrame:
    lines = [{"row": row.name, "seeds": 2, **line} for row, line in zip(table.rows, values, strict=True)]
    numbers = [*CSV_COLUMNS[4:], *SIZE_COLUMNS, *(f"{column}_std" for column in SIZE_COLUMNS)]
    frame = pd.DataFrame(lines, columns=["row", "projection", "pairwise", "seeds", *numbers])
    return frame.astype(dict.fromkeys(numbers, float))


def best_rows(table: ReportTable, values: list[float | None]) -> set[int]:
    summary = summary_of(table, [{} if value is None else {"all_AP": value} for value in values])
    best = best_cells(summary, table, layout(table, summary))
    assert {column for _, column in best} <= {2}  # behind the row and its seeds
    return {row for row, _ in best}


def test_the_best_of_a_column_at_the_printed_precision() -> None:
    table = table_of(rows_of("a", "b", "c"))
    assert best_rows(table, [10.0, 20.0, 15.0]) == {1}
    assert best_rows(table, [20.04, 19.96, 19.94]) == {0, 1}
    assert best_rows(table, [None, 5.0, 4.0]) == {1}
    assert best_rows(table, [None, 5.0, None]) == set()
    assert best_rows(table, [None, None, None]) == set()
    assert best_rows(table, [0.0, 0.0, 0.0]) == {0, 1, 2}
    assert best_sentence(table) == "Bold: the highest value of a column"


def test_rows_with_every_mask_are_no_competitors_of_rows_that_lack_some() -> None:
    table = table_of(rows_of("a", "b", "bound", bounds=("bound",)))
    assert best_rows(table, [10.0, 20.0, 40.0]) == {1}
    assert best_sentence(table) == (
        "Bold: the highest value of a column among the rows that lack masks, so without bound"
    )
    bounds = table_of(rows_of("a", "b", bounds=("a", "b")))
    assert best_rows(bounds, [10.0, 20.0]) == {1}
    assert "without" not in best_sentence(bounds)
    assert best_rows(table_of(rows_of("a", "bound", bounds=("bound",))), [10.0, 40.0]) == set()


def test_every_column_has_its_own_best() -> None:
    table = table_of(rows_of("a", "b"), unseen=("café",))
    summary = summary_of(table, [{"all_AP": 1.0, "seen_AP75": 7.0}, {"all_AP": 2.0, "seen_AP75": 6.0}])
    assert best_cells(summary, table, layout(table, summary)) == {(1, 4), (0, 12)}


def test_bold_is_for_the_number_and_never_for_a_name() -> None:
    lines = [["**a** <b>", "10.5 ± 0.3 (9.1)"], ["b", "10.5"], ["c", "—"]]
    text = markdown_table(("row", "AP"), lines, bold={(0, 1), (1, 1)})
    assert unpadded(text).splitlines()[2:] == [
        "| \\*\\*a\\*\\* &lt;b&gt; | **10.5** ± 0.3 (9.1) |",
        "| b | **10.5** |",
        "| c | — |",
    ]


def check_tabular(text: str) -> list[str]:
    """The lines of the body of a tabular, after a look at braces, columns, signs and environments."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[-1] == "\\end{tabular}"
    begin = re.fullmatch(r"\\begin\{tabular\}\{([lcr]+)\}", lines[0])
    assert begin is not None
    columns = len(begin.group(1))
    body = [line for line in lines[1:-1] if not re.match(r"\\(top|mid|bottom)rule", line)]
    for line in body:
        assert line.endswith(" \\\\")
        plain = re.sub(
            r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}", "", line[:-3]
        )
        plain = re.sub(r"\\[&%$#_{}]", "", plain)
        assert plain.count("&") + 1 == columns
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") % 2 == 0
        assert not re.search(r"[%#~^<>|]", plain)
        assert not line.startswith(("[", "*"))
        assert "_" not in plain
    return body


@pytest.mark.parametrize("unseen", [(), ("café",)])
def test_latex_holds_together_whatever_the_names_are(unseen: tuple[str, ...]) -> None:
    table = table_of(rows_of(*EVIL), unseen=unseen)
    values = [{"all_AP": float(place), "all_AP_std": 0.5} for place in range(len(EVIL))]
    summary = summary_of(table, values)
    shown = layout(table, summary)
    cells = table_cells(summary, table, shown)
    text = latex_table(table, shown, cells, bold=best_cells(summary, table, shown))
    body = check_tabular(text)
    assert len(body) == len(EVIL) + 1
    assert "\\textbf{9.0} $\\pm$ 0.5 &" in body[-1]
    assert text.count("\\textbf") == 1
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert len(comments) == 2
    assert "T_1 <b> 50 % second line" in comments[0]
    assert comments[1] == "% Needs \\usepackage{booktabs}; letters beyond Latin need XeLaTeX or LuaLaTeX."
    latin = table_of(rows_of("café", "τ ≤ 0.1 − x"))  # noqa: RUF001
    summary = summary_of(latin, [{}, {}])
    text = latex_table(latin, layout(latin, summary), table_cells(summary, latin, layout(latin, summary)))
    assert "$\\tau$ $\\leq$ 0.1 $-$ x & 2 & — &" in text


def numbers_of(table: ReportTable, values: list[dict[str, float]]) -> TableNumbers:
    summary = summary_of(table, values)
    return TableNumbers(table, summary, summary, summary, summary)


def input_of(table: ReportTable, *, paper_data: bool) -> ReportInput:
    return ReportInput(
        study="s", title="S", question="?", seeds=(0,), tables=(table,), results={}, data="", schedule="",
        pretraining=None, run_command="", report_command="", paper_data=paper_data,
    )  # fmt: skip


def test_the_printed_number_stands_behind_ours_and_the_difference_on_the_papers_data_alone() -> None:
    printed = read_published(PUBLISHED)
    table = table_of(rows_of("neither", "own"), unseen=("café",), published="6")
    numbers = numbers_of(table, [{"all_AP": 25.0, "all_AP_std": 1.0, "seen_AP": 3.0}, {"all_AP": 9.0}])
    shown = layout(table, numbers.summary)
    headings, lines = beside_printed(input_of(table, paper_data=False), numbers, printed, shown)
    assert headings[4:8] == [
        "all AP (COCO, printed)",
        "AP50 (COCO, printed)",
        "AP75 (COCO, printed)",
        "unseen AP (COCO, printed)",
    ]
    assert headings[10] == "seen AP", "the paper prints no seen classes"
    assert lines[0][4:8] == ["25.0 ± 1.0 (24.7)", "— (44.6)", "— (24.2)", "— (19.9)"]
    assert lines[0][10] == "3.0"
    assert lines[1][4:6] == ["9.0", "—"]
    headings, lines = beside_printed(input_of(table, paper_data=True), numbers, printed, shown)
    assert headings[4] == "all AP (printed, difference)"
    assert lines[0][4:6] == ["25.0 ± 1.0 (24.7, +0.3)", "— (44.6)"]
    own = table_of(rows_of("neither"), unseen=("café",))
    numbers = numbers_of(own, [{"all_AP": 25.0}])
    headings, lines = beside_printed(input_of(own, paper_data=True), numbers, printed, layout(own, numbers.summary))
    assert tuple(headings) == layout(own, numbers.summary).headings
    assert lines == table_cells(numbers.summary, own, layout(own, numbers.summary))
