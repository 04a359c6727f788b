"""Writes a report from recorded results and stored detections: its page, its text, its tables and its figures.

`index.html` is the page that people open, `report.md` the same text; `tables/*.csv|md|tex`, `figures/*.png`.

The same results give the same bytes. Results, run folders and data are only read. What is measured on detections is
kept in measured.json; pictures and training curves need the run folders: where these are gone, the files of an earlier
report stay, with their captions if it is a report of the same runs, else the page says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from semiseg.files import write_text
from semiseg.report.aggregate import ReportInput, TableNumbers, table_numbers
from semiseg.report.context import MEASURED_NAME, FigureFiles, Measured, PageContext
from semiseg.report.failures import failure_section
from semiseg.report.figures import ap_figure
from semiseg.report.html import PAGE_NAME, render_page
from semiseg.report.pictures import picture_section
from semiseg.report.provenance import protocol, provenance, warnings
from semiseg.report.published import read_published
from semiseg.report.sections import (
    answer,
    class_section,
    size_section,
    table_section,
    threshold_section,
    training_section,
)
from semiseg.report.tables import (
    best_cells,
    csv_table,
    escape_markdown,
    latex_table,
    layout,
    markdown_table,
    number,
    table_cells,
    text_table,
)
from semiseg.report.uncertainty import with_image_intervals

# What a page says of each table, in this order.
SECTIONS: tuple[Callable[[PageContext, TableNumbers], list[str]], ...] = (
    table_section,
    class_section,
    threshold_section,
    size_section,
    training_section,
    picture_section,
    failure_section,
)


def build_report(report: ReportInput, *, out: Path, published: Path) -> Path:
    """Writes the report of a study into a folder; cells without a run stay empty and are named.

    Args:
        published: CSV of the printed numbers (`reports/published/boxinst.csv`).

    Returns:
        path of report.md; `index.html`, which is written last, lies beside it.
    """
    page = PageContext(
        report,
        [table_numbers(report, table) for table in report.tables],
        read_published(published),
        FigureFiles(out / "figures", _earlier_blocks(report, out / "report.md")),
        Measured(out / MEASURED_NAME),
    )
    page.tables = with_image_intervals(page)
    for numbers in page.tables:
        _write_tables(numbers, out / "tables")
    measured = {numbers.table.name: numbers.measured for numbers in page.tables}
    bars = ap_figure(report.tables, measured) if any(len(frame) for frame in measured.values()) else None
    groups = "on unseen and on all classes" if any(table.unseen for table in report.tables) else "on all classes"
    caption = "Mask AP in percent; error bars: standard deviation over seeds, dots: single seeds."
    blocks = [
        f"# {escape_markdown(report.title)}",
        f"**Question.** {escape_markdown(report.question)}",
        f"**Answer.** {answer(page.tables)}",
        *(f"> {warning}" for warning in warnings(report)),
        *page.figures.show("ap", bars, alt=f"mask AP of every row {groups}", caption=caption),
        *(block for numbers in page.tables for section in SECTIONS for block in section(page, numbers)),
        *protocol(report),
        *provenance(report),
    ]
    page.measured.save()
    text = "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"
    write_text(out / "report.md", text)
    write_text(out / PAGE_NAME, render_page(text, out))
    return out / "report.md"


def report_text(report: ReportInput) -> str:
    """The tables as aligned text for the terminal, one after the other with its title."""
    texts = []
    for table in report.tables:
        summary = table_numbers(report, table).summary
        shown = layout(table, summary)
        texts.append(f"{table.title}\n{text_table(shown.headings, table_cells(summary, table, shown))}")
    return "\n".join(texts)


def beside_recorded(report: ReportInput, recorded: ReportInput) -> str:
    """AP of every row beside its mean ± deviation over the seeds of another record of these tables, for the terminal.

    What lies further than two deviations from the mean is marked. "" where no row has both.
    """
    others = {table.name: table_numbers(recorded, table).summary for table in recorded.tables}
    texts = []
    for table in report.tables:
        if table.name not in others:
            continue
        value, spread = f"{table.main_groups[0]}_AP", f"{table.main_groups[0]}_AP_std"
        own = table_numbers(report, table).summary[["row", value]]
        both = own.merge(others[table.name][["row", value, spread]], on="row", suffixes=("", "_recorded")).dropna()
        labels = {row.name: row.label for row in table.rows}
        lines = [
            [labels[row], number(ap), number(mean, std), "!" if abs(ap - mean) > 2 * std else ""]
            for row, ap, mean, std in both.itertuples(index=False)
        ]
        if lines:
            texts.append(f"{table.title}\n{text_table(('row', f'{table.main_groups[0]} AP', 'recorded', ''), lines)}")
    return "\n".join(texts)


def _earlier_blocks(report: ReportInput, page: Path) -> list[str]:
    """The blocks of a page that is already there; none if it is of other runs."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    runs = provenance(report)[-1]  # with the id and the command of each
    return text.split("\n\n") if runs in text else []


def _write_tables(numbers: TableNumbers, folder: Path) -> None:
    table, shown = numbers.table, layout(numbers.table, numbers.summary)
    cells = table_cells(numbers.summary, table, shown)
    write_text(folder / f"{table.name}.csv", csv_table(numbers.summary))
    best = best_cells(numbers.summary, table, shown)
    write_text(folder / f"{table.name}.md", markdown_table(shown.headings, cells, texts=shown.texts, bold=best))
    write_text(folder / f"{table.name}.tex", latex_table(table, shown, cells, bold=best))
