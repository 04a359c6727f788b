"""Tables as files: CSV for programs (exact columns), Markdown and LaTeX (booktabs) for people, text for terminals."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from semiseg.report.aggregate import CSV_COLUMNS, METRIC_COLUMNS, TABLE_METRICS, ReportTable

MINUS = "\N{MINUS SIGN}"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    # Signs of our own labels that pdfLaTeX does not know.
    "−": "$-$",  # noqa: RUF001
    "τ": r"$\tau$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
}

Cells = Collection[tuple[int, int]]  # line and column of a table


@dataclass(frozen=True)
class Layout:
    """Which columns of a table people see."""

    terms: bool  # whether the columns of the two terms are shown
    columns: tuple[str, ...]  # of the summary
    grouped: bool  # whether there are several class groups, which the headings then name

    @property
    def texts(self) -> int:
        """How many columns hold words."""
        return 3 if self.terms else 1

    @property
    def headings(self) -> tuple[str, ...]:
        """One heading per column; the first of a group's names the group."""
        terms = ("projection", "pairwise") if self.terms else ()
        names = [column.split("_") for column in self.columns]
        numbers = [f"{group} AP" if self.grouped and metric == "AP" else metric for group, metric in names]
        return ("row", *terms, "seeds", *numbers)


def layout(table: ReportTable, summary: pd.DataFrame) -> Layout:
    """With unseen classes the three class groups; without, all classes and sizes, and no column that says nothing."""
    if table.unseen:
        return Layout(True, METRIC_COLUMNS, grouped=True)
    sizes = [column for column in ("all_APs", "all_APm", "all_APl") if summary[column].notna().any()]
    terms = len({(row.projection, row.pairwise) for row in table.rows}) > 1
    return Layout(terms, (*(f"all_{name}" for name in TABLE_METRICS), *sizes), grouped=False)


def csv_table(summary: pd.DataFrame) -> str:
    """The CSV of a table: CSV_COLUMNS, percent with two decimals, empty = not measured."""
    text: str = summary[list(CSV_COLUMNS)].to_csv(index=False, float_format="%.2f", na_rep="", lineterminator="\n")
    return text


def number_cells(table: ReportTable, summary: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    """One list of texts per row: its label and "mean ± std" of these columns."""
    return [
        [row.label, *(number(line[column], line[f"{column}_std"]) for column in columns)]
        for row, (_, line) in zip(table.rows, summary.iterrows(), strict=True)
    ]


def table_cells(summary: pd.DataFrame, table: ReportTable, shown: Layout) -> list[list[str]]:
    """One list of texts per row, under the layout's headings: label, terms, seeds and "mean ± std"."""
    cells = number_cells(table, summary, shown.columns)
    return [
        [label, *((row.projection or "—", row.pairwise or "—") if shown.terms else ()), str(seeds), *numbers]
        for row, seeds, (label, *numbers) in zip(table.rows, summary["seeds"], cells, strict=True)
    ]


def best_cells(summary: pd.DataFrame, table: ReportTable, shown: Layout) -> frozenset[tuple[int, int]]:
    """(line, column) under the layout's headings of the highest value of each column, as printed; ties are all best.

    Rows with every mask are no competitors of rows that lack some (`left_out`). A column with a single competitor has
    no best one.
    """
    competing = [row.name not in left_out(table) for row in table.rows]
    best: set[tuple[int, int]] = set()
    for index, column in enumerate(shown.columns, start=shown.texts + 1):
        printed = summary.loc[competing, column].dropna().map("{:.1f}".format).astype(float)
        if len(printed) > 1:
            best |= {(int(row), index) for row in printed.index[printed == printed.max()]}
    return frozenset(best)


def left_out(table: ReportTable) -> tuple[str, ...]:
    """Names of the rows that are no competitors: those with every mask beside rows that lack some."""
    bounds = tuple(row.name for row in table.rows if row.every_mask)
    return bounds if len(bounds) < len(table.rows) else ()


def best_sentence(table: ReportTable) -> str:
    """What bold numbers mean, as plain text."""
    labels = [row.label for row in table.rows if row.name in left_out(table)]
    if not labels:
        return "Bold: the highest value of a column"
    return f"Bold: the highest value of a column among the rows that lack masks, so without {', '.join(labels)}"


def number(mean: float | None, std: float | None = None, *, sign: bool = False) -> str:
    """A percentage with one decimal, "± std" if there is one, "—" if it was not measured."""
    if mean is None or math.isnan(mean):
        return "—"
    text = signed(mean) if sign else f"{mean:.1f}".replace("-", MINUS)
    return text if std is None or math.isnan(std) else f"{text} ± {std:.1f}"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, a true minus for people: "+1.2"."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def whole_percent(value: float) -> str:
    """A share without decimals: "63 %"."""
    return f"{value:.0f} %".replace("-", MINUS)


def markdown_table(
    headings: Sequence[str], lines: Iterable[Sequence[str]], *, texts: int = 1, bold: Cells = frozenset()
) -> str:
    """A GitHub table; cells are escaped; the first `texts` columns are left-aligned; in `bold` cells the number is."""
    escaped = _emphasised([[escape_markdown(cell) for cell in line] for line in lines], "**{}**", bold)
    frame = pd.DataFrame(escaped, columns=[escape_markdown(heading) for heading in headings])
    sides = ["left" if column < texts else "right" for column in range(len(headings))]
    return f"{frame.to_markdown(index=False, tablefmt='pipe', colalign=sides, disable_numparse=True)}\n"


def text_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns for the terminal: the first to the left, the others to the right."""
    rows = list(lines)
    if not rows:
        return "  ".join(headings) + "\n"
    names = pd.Index(headings[1:], name=headings[0])
    frame = pd.DataFrame([row[1:] for row in rows], index=[row[0] for row in rows], columns=names)
    with pd.option_context("display.unicode.east_asian_width", True):
        return f"{frame.to_string()}\n"


def latex_table(table: ReportTable, shown: Layout, lines: Iterable[Sequence[str]], *, bold: Cells = frozenset()) -> str:
    """A booktabs tabular, to be set in a table environment of one's own; `bold` as in `markdown_table`."""
    escaped = _emphasised([[escape_latex(cell) for cell in line] for line in lines], r"\textbf{{{}}}", bold)
    for line in escaped:
        if line[0].startswith(("[", "*")):  # behind the end of a line they would be taken as its options
            line[0] = f"{{}}{line[0]}"
    frame = pd.DataFrame(escaped, columns=list(shown.headings))
    sides = "l" * shown.texts + "r" * (len(shown.headings) - shown.texts)
    tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format=sides)
    title, best = (" ".join(text.split()) for text in (table.title, best_sentence(table)))
    return (
        f"% {title}: mask AP in percent (mean $\\pm$ standard deviation over seeds). {best}.\n"
        f"% Needs \\usepackage{{booktabs}}; letters beyond Latin need XeLaTeX or LuaLaTeX.\n{tabular}"
    )


def _emphasised(lines: list[list[str]], form: str, bold: Cells) -> list[list[str]]:
    """The lines with the number of each bold cell in a form, and what follows it, such as "± 0.3", as it is."""
    for row, column in bold:
        value, space, rest = lines[row][column].partition(" ")
        lines[row][column] = f"{form.format(value)}{space}{rest}"
    return lines


def escape_markdown(text: str) -> str:
    """Names as they are: on one line, without Markdown or HTML meaning."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)


def code(text: str) -> str:
    """A name as code, letter by letter: between more backticks than any row of them in it."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def escape_latex(text: str) -> str:
    """Names as they are; letters beyond ASCII stay (UTF-8 is LaTeX's default)."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
