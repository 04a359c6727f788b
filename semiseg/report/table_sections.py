"""The sections of one table: its numbers, the printed ones, gaps, differences, boxes and classes."""

from __future__ import annotations

import pandas as pd

from semiseg.report.aggregate import NEITHER, UPPER_BOUND, ReportInput, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.figures import class_figure
from semiseg.report.provenance import table_warnings
from semiseg.report.published import beside_printed, data_name, edge_section, printed_difference, published_section
from semiseg.report.statements import box_statement, gap_caution, gap_cells, reading, row_order
from semiseg.report.tables import best_cells, best_sentence, escape_markdown, layout, markdown_table, number


def table_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The table itself, beside the printed numbers, and what it says of gaps and differences."""
    report, table, shown = page.report, numbers.table, layout(numbers.table, numbers.summary)
    headings, cells = beside_printed(report, numbers, page.printed, shown)
    best = best_cells(numbers.summary, table, shown)
    bold = f" {escape_markdown(best_sentence(table))}." if best else ""
    files = ", ".join(f"[{kind}](tables/{table.name}.{kind})" for kind in ("csv", "md", "tex"))
    classes = f"{len(table.seen)} seen and {len(table.unseen)} unseen classes"
    if not table.unseen:
        classes = f"All {len(table.seen)} classes"
    return [
        f"## {escape_markdown(table.title)}",
        *table_warnings(report, table),
        f"{classes}; mask AP in percent; — = not measured.{bold} Files: {files}.",
        markdown_table(headings, cells, texts=shown.texts, bold=best),
        row_order(numbers),
        *published_section(report, numbers, page.printed),
        *edge_section(report, numbers, page.printed),
        *_gap_section(numbers),
        *difference_section(report, numbers, page.printed),
        *_box_section(numbers),
    ]


def _gap_section(numbers: TableNumbers) -> list[str]:
    labels = {row.name: row.label for row in numbers.table.rows}
    if not numbers.table.unseen or not {NEITHER, UPPER_BOUND} <= set(labels):
        return []
    heading = "### How much of the gap on unseen classes each row closes"
    if not numbers.gaps:
        return [heading, "Not measured: it needs `neither` and `full-masks` with a common seed."]
    goal = numbers.gaps[0]
    text = (
        f"The gap is full-masks ({goal.goal:.1f}) minus neither ({goal.start:.1f}) = {goal.goal - goal.start:+.1f} AP "
        "on unseen classes, over the seeds that both and the row have."
    )
    if caution := gap_caution(numbers):
        text += f" **Note:** {caution}; shares of it say little."
    lines = [gap_cells(gap, labels[gap.row]) for gap in numbers.gaps]
    return [heading, text, markdown_table(("row", "neither AP", "row AP", "gain", "gap closed"), lines)]


def difference_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    """Every compared pair of rows: the difference, its interval and whether it is resolved."""
    table = numbers.table
    if not numbers.differences:
        return []
    labels = {row.name: row.label for row in table.rows}
    lines = []
    for item in numbers.differences:
        interval, pair = item.interval, (item.first, item.second)
        lines.append(
            [
                f"{labels[item.second]} − {labels[item.first]}",  # noqa: RUF001
                *([item.group] if table.unseen else []),
                number(item.mean, item.std, sign=True),
                "—" if interval is None else f"{interval[0]:+.1f} … {interval[1]:+.1f}",
                reading(item),
                *([printed_difference(printed, table.published, *pair, item.group)] if table.published else []),
            ]
        )
    text = (
        "Differences of AP, paired by seed: mean ± standard deviation over seeds. A difference is called resolved if "
        "the 95 % interval of its mean (Student's t) leaves out 0, which takes at least three seeds; the pairs are "
        "judged one by one, without correction for their number. The spread over validation images is not part of it."
    )
    classes = ["classes"] if table.unseen else []
    whose = "printed" if report.paper_data else f"{data_name(printed, table)}, printed"
    headings = ("difference", *classes, "AP", "95 % interval", "reading", *([whose] if table.published else []))
    return ["### Which differences are resolved", text, markdown_table(headings, lines, texts=1 + len(classes))]


def _box_section(numbers: TableNumbers) -> list[str]:
    table = numbers.table
    groups = ("all", "unseen", "seen") if table.unseen else ("all",)
    lines = [
        [row.label, *(number(line[f"{group}_AP"], line[f"{group}_AP_std"]) for group in groups)]
        for row, (_, line) in zip(table.rows, numbers.box_summary.iterrows(), strict=True)
    ]
    headings = ("row", *(f"{group} box AP" for group in groups)) if table.unseen else ("row", "box AP")
    return [
        f"### Box AP{': is the detection equally good?' if table.alike else ''}",
        box_statement(numbers),
        markdown_table(headings, lines),
    ]


def class_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP per class: table and bars."""
    table = numbers.table
    groups = [["unseen" if name in table.unseen else "seen"] if table.unseen else [] for name in numbers.classes.index]
    lines = [
        [str(name), *group, *(number(value) for value in line)]
        for name, group, line in zip(numbers.classes.index, groups, numbers.classes.to_numpy(), strict=True)
    ]
    headings = ("class", *(["group"] if table.unseen else []), *(row.label for row in table.rows))
    return [
        "### Per class",
        markdown_table(headings, lines, texts=2 if table.unseen else 1),
        *page.figures.show(
            f"{table.name}_classes", class_figure(table, numbers.classes), alt=f"mask AP per class, {table.name}"
        ),
    ]
