"""The printed numbers of the paper beside ours: what they are, where they come from, what must be said with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import METRIC_NAMES
from semiseg.report.aggregate import TABLE_METRICS, UPPER_BOUND, Difference, ReportInput, ReportTable, TableNumbers
from semiseg.report.tables import Layout, escape_markdown, number, table_cells

_COLUMNS = ("table", "row", "classes", *METRIC_NAMES, "method", "backbone", "schedule", "evaluation_set", "note")


def read_published(path: Path) -> pd.DataFrame:
    """The printed numbers (`reports/published/README.md`), every cell as text."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable CSV: {error}") from None
    if missing := [name for name in _COLUMNS if name not in frame]:
        raise UserError(f"{path}: column {missing[0]!r} is missing")
    return frame


def beside_printed(
    report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame, shown: Layout
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table with the printed number in parentheses behind ours.

    Where the data are the paper's, our mean minus the printed number stands behind it. A table of our own stays as it
    is, and so does a cell that the paper does not print.
    """
    table = numbers.table
    headings, lines = list(shown.headings), table_cells(numbers.summary, table, shown)
    whose = "printed, difference" if report.paper_data else f"{data_name(printed, table)}, printed"
    for index, column in enumerate(shown.columns, start=shown.texts + 1):
        group, _, metric = column.partition("_")
        texts = [_printed_value(printed, table.published, row.name, group, metric) for row in table.rows]
        if any(texts):
            headings[index] += f" ({whose})"
        for row, line, text in zip(table.rows, lines, texts, strict=True):
            mean = numbers.mean(row.name, column)
            if text and report.paper_data and mean is not None:
                text += f", {number(mean - float(text), sign=True)}"
            if text:
                line[index] += f" ({text})"
    # Rows of one table may be measured on different images.
    sets = [_printed_value(printed, table.published, row.name, "all", "evaluation_set") for row in table.rows]
    if len({name for name in sets if name}) > 1:
        headings.append("printed for")
        lines = [[*line, name or "—"] for line, name in zip(lines, sets, strict=True)]
    return headings, lines


def published_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    """What the numbers in parentheses are for, and the notes to them; nothing for a table of our own."""
    table = numbers.table
    if table.published is None:
        return []
    rows = printed[printed["table"] == table.published]
    notes = [f"- {escape_markdown(note)}" for note in _notes(printed, table)]
    return [
        "### The printed numbers of BoxInst",
        _context(report, rows, data_name(printed, table)),
        *(["Notes to the printed numbers:\n\n" + "\n".join(notes)] if notes else []),
    ]


def printed_difference(printed: pd.DataFrame, table: str, item: Difference) -> str:
    """The same difference in printed AP, "—" if the paper has not both."""
    first, second = (_printed_value(printed, table, row, item.group, "AP") for row in (item.first, item.second))
    return number(float(second) - float(first), sign=True) if first and second else "—"


def data_name(printed: pd.DataFrame, table: ReportTable) -> str:
    """The data set of a table's printed numbers: "COCO" or "VOC"; "COCO" for a table of our own."""
    sets = printed.loc[printed["table"] == table.published, "evaluation_set"]
    names = {str(text).split()[0].upper() for text in sets if text}
    return names.pop() if len(names) == 1 else "COCO"


def _context(report: ReportInput, rows: pd.DataFrame, data: str) -> str:
    values = (filter(None, rows[name].unique()) for name in ("backbone", "schedule", "evaluation_set"))
    where = escape_markdown(", ".join(filter(None, map(" / ".join, values))))
    if report.paper_data:
        return f"In parentheses: the printed number, for {where}, and ours minus it."
    return (
        f"In parentheses: the printed number. **The {data} numbers are from another data set** ({where}), network and "
        "schedule: context for the order and size of the steps, no goal."
    )


def _notes(printed: pd.DataFrame, table: ReportTable) -> list[str]:
    rows = printed[printed["table"] == table.published]
    names = {row.name for row in table.rows}
    ours, others = rows[rows["row"].isin(names)], rows[~rows["row"].isin(names)]
    notes = []
    for note, lines in ours[ours["note"] != ""].groupby("note", sort=False):
        about = lines["row"] + (" (" + lines["classes"] + ")" if table.unseen else "")
        notes.append(f"{', '.join(about)}: {note}")
    dice = [_printed_value(printed, "2", "dice", "all", metric) for metric in TABLE_METRICS]
    if UPPER_BOUND in names and not (rows["row"] == UPPER_BOUND).any() and all(dice):
        notes.append(
            f"full-masks: not in the paper's table; for all classes its Table 2 prints {' / '.join(dice)} with Dice "
            "on all masks"
        )
    for _, line in others.iterrows():
        how = ", ".join(line[name] for name in ("backbone", "schedule", "note") if line[name])
        values = " / ".join(line[name] or "—" for name in TABLE_METRICS)
        notes.append(f"not trained here: {line['method']} ({how}): {values}")
    return notes


def _printed_value(printed: pd.DataFrame, table: str | None, row: str, group: str, metric: str) -> str:
    """A printed number of a row, "" if it is not in the paper."""
    line = printed[(printed["table"] == table) & (printed["row"] == row) & (printed["classes"] == group)]
    return "" if line.empty else str(line.iloc[0][metric])
