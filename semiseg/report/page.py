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
    """Writes a report, `index.html` last; the path of report.md. Cells without a run stay empty and are named."""
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
        *([f"**Question.** {escape_markdown(report.question)}"] if report.question else []),
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


def report_text(report: ReportInput, recorded: ReportInput | None = None) -> str:
    """The tables as aligned text for the terminal, one after the other with its title.

    With another record of them, behind every row stand mean ± deviation of its AP over the seeds there, on unseen
    classes where there are such, and a mark where ours is further away than two deviations.
    """
    recorded_tables = {} if recorded is None else {table.name: table for table in recorded.tables}
    texts = []
    for table in report.tables:
        summary = table_numbers(report, table).summary
        shown = layout(table, summary)
        headings, lines = list(shown.headings), table_cells(summary, table, shown)
        if recorded is not None and table.name in recorded_tables:
            column = f"{table.main_groups[0]}_AP"
            others = table_numbers(recorded, recorded_tables[table.name]).summary.set_index("row")
            others = others[[column, f"{column}_std"]].reindex(summary["row"])
            headings += [f"recorded {table.main_groups[0]} AP", ""]
            for line, own, (mean, std) in zip(lines, summary[column], others.to_numpy(), strict=True):
                line += [number(mean, std), "!" if abs(own - mean) > 2 * std else ""]
        texts.append(f"{table.title}\n{text_table(headings, lines)}")
    if recorded is not None:
        texts.append(
            f"recorded: mean ± deviation over {len(recorded.seeds)} seeds of {recorded.study} (one seed moves by "
            "several AP with processor and chance; '!' is further away than two deviations)\n"
        )
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
