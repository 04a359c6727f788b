"""Tables as files: CSV for programs (exact columns), Markdown and LaTeX (booktabs) for people, text for terminals."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

import pandas as pd

from semiseg.report.aggregate import METRIC_COLUMNS, ReportRow, ReportTable

HEADINGS = (
    *("row", "projection", "pairwise", "seeds"),
    *("all AP", "AP50", "AP75", "unseen AP", "AP50", "AP75", "seen AP", "AP50", "AP75"),
)

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


def csv_table(summary: pd.DataFrame) -> str:
    """The CSV of a table: `summarise`'s columns, percent with two decimals, empty = not measured."""
    buffer = io.StringIO()
    summary.to_csv(buffer, index=False, float_format="%.2f", na_rep="", lineterminator="\n")
    return buffer.getvalue()


def table_cells(summary: pd.DataFrame, rows: Sequence[ReportRow]) -> list[list[str]]:
    """One list of texts per row, under HEADINGS: labels, terms, seeds and "mean ± std" with one decimal."""
    return [
        [
            row.label,
            row.projection or "—",
            row.pairwise or "—",
            str(line["seeds"]),
            *(number(line[column], line[f"{column}_std"]) for column in METRIC_COLUMNS),
        ]
        for row, (_, line) in zip(rows, summary.iterrows(), strict=True)
    ]


def number(mean: float | None, std: float | None = None, *, sign: bool = False) -> str:
    """A percentage with one decimal, "± std" if there is one, "—" if it was not measured."""
    if mean is None or math.isnan(mean):
        return "—"
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if std is None or math.isnan(std) else f"{text} ± {std:.1f}"


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A GitHub table; cells are escaped; the first `texts` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < texts else "---:" for column in range(len(headings))]
    body = [[escape_markdown(cell) for cell in line] for line in (headings, *lines)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (body[0], rule, *body[1:]))


def latex_table(table: ReportTable, lines: Iterable[Sequence[str]]) -> str:
    """A booktabs tabular with class groups as column groups, to be set in a table environment of one's own."""
    title = " ".join(table.title.split())
    rows = "".join(" & ".join(escape_latex(cell) for cell in line) + " \\\\\n" for line in lines)
    return (
        f"% {title}: mask AP in percent (mean $\\pm$ standard deviation over seeds). Needs \\usepackage{{booktabs}}.\n"
        "\\begin{tabular}{lccrrrrrrrrrr}\n"
        "\\toprule\n"
        " & & & & \\multicolumn{3}{c}{all classes} & \\multicolumn{3}{c}{unseen classes}"
        " & \\multicolumn{3}{c}{seen classes} \\\\\n"
        "\\cmidrule(lr){5-7} \\cmidrule(lr){8-10} \\cmidrule(lr){11-13}\n"
        "row & projection & pairwise & seeds"
        + " & AP & AP$_{50}$ & AP$_{75}$" * 3
        + " \\\\\n\\midrule\n"
        + rows
        + "\\bottomrule\n\\end{tabular}\n"
    )


def text_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns for the terminal: the first to the left, the others to the right."""
    body = [list(headings), *([*line] for line in lines)]
    widths = [max(_width(line[column]) for line in body) for column in range(len(headings))]
    padded = [
        [
            cell + " " * (width - _width(cell)) if column == 0 else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in body
    ]
    rule = ["-" * width for width in widths]
    return "".join("  ".join(line).rstrip() + "\n" for line in (padded[0], rule, *padded[1:]))


def escape_markdown(text: str) -> str:
    """Names as they are: on one line, without Markdown or HTML meaning."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Names as they are; letters beyond ASCII stay (UTF-8 is LaTeX's default)."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: East Asian wide signs take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
