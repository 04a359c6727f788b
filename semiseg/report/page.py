"""Writes a report from recorded results alone: report.md, tables/*.csv|md|tex, figures/*.png.

The same results give the same bytes. Results, run folders and data are only read. Pictures and training curves need
the run folders; where these are gone, the files of an earlier report stay, with their captions if it is a report of
the same runs, else the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from semiseg.report.aggregate import (
    ReportInput,
    ReportTable,
    TableNumbers,
    table_numbers,
)
from semiseg.report.figures import ap_figure, class_figure, gap_figure, loss_figure
from semiseg.report.pictures import draw_pictures
from semiseg.report.provenance import provenance, warnings
from semiseg.report.published import data_name, edge_section, printed_difference, published_section, read_published
from semiseg.report.statements import (
    answer,
    box_statement,
    gap_caution,
    gap_cells,
    reading,
    row_order,
)
from semiseg.report.tables import (
    csv_table,
    escape_markdown,
    latex_table,
    layout,
    markdown_table,
    number,
    table_cells,
    text_table,
)
from semiseg.resources import write_bytes, write_text


@dataclass
class _Figures:
    """Writes figures into the report's folder and gives the Markdown that shows them.

    Attributes:
        earlier: blocks of the page that was there before, if it is of the same runs.
    """

    folder: Path
    earlier: list[str]
    shown: list[str] = field(default_factory=list)

    def show(self, name: str, content: bytes | None, *, alt: str, caption: str = "", absent: str = "") -> list[str]:
        """`content` None: the figure of an earlier report is kept and shown, if there is one; `absent` says why."""
        path, shown = self.folder / name, f"![{escape_markdown(alt)}](figures/{name})"
        if content is not None:
            write_bytes(path, content)
        elif not path.is_file():
            return [f"*No figure ({alt}): {absent}.*"] if absent else []
        elif absent and shown in self.earlier:
            # It shows the runs of this page: nothing has changed but that their folders are gone.
            below = self.earlier[self.earlier.index(shown) + 1 :][:1]
            return [shown, *(block for block in below if block.startswith("*"))]
        elif absent:
            caption = f"{alt[:1].upper()}{alt[1:]}: kept from an earlier report, because {absent}."
        else:
            return []
        return [shown, *([f"*{escape_markdown(caption)}*"] if caption else [])]


def build_report(report: ReportInput, *, out: Path, published: Path) -> Path:
    """Writes the report of a study; cells without a run stay empty and are named.

    Args:
        out: the report's folder, e.g. `reports/shapes`; other files in it are left alone.
        published: CSV of the printed numbers (`reports/published/boxinst.csv`).

    Returns:
        path of report.md, which is written last.
    """
    printed = read_published(published)
    tables = [table_numbers(report, table) for table in report.tables]
    for numbers in tables:
        _write_tables(numbers, out / "tables")
    figures = _Figures(out / "figures", _earlier_blocks(report, out / "report.md"))
    blocks = [
        f"# {escape_markdown(report.title)}",
        f"**Question.** {escape_markdown(report.question)}",
        f"**Answer.** {answer(tables)}",
        *(f"> {warning}" for warning in warnings(report)),
        *_overview(report, tables, figures),
        *_protocol(report),
    ]
    for numbers in tables:
        blocks += _table_section(report, numbers, printed, figures)
    blocks += _difficulty(report)
    blocks += provenance(report)
    write_text(out / "report.md", "\n\n".join(block.rstrip("\n") for block in blocks) + "\n")
    return out / "report.md"


def report_text(report: ReportInput) -> str:
    """The tables as aligned text for the terminal, one after the other with its title."""
    texts = []
    for table in report.tables:
        summary = table_numbers(report, table).summary
        shown = layout(table, summary)
        texts.append(f"{table.title}\n{text_table(shown.headings, table_cells(summary, table, shown))}")
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
    write_text(folder / f"{table.name}.md", markdown_table(shown.headings, cells, texts=shown.texts))
    write_text(folder / f"{table.name}.tex", latex_table(table, shown, cells))


def _overview(report: ReportInput, tables: Sequence[TableNumbers], figures: _Figures) -> list[str]:
    if not tables:
        return []
    measured = {numbers.table.name: numbers.measured for numbers in tables}
    gaps = {numbers.table.name: numbers.gaps for numbers in tables}
    bars = ap_figure(report.tables, measured) if any(len(frame) for frame in measured.values()) else None
    caption = "Mask AP in percent. Error bars: standard deviation over seeds, dots: single seeds (where several)."
    gap_caption = "Share of the gap between neither and full-masks on unseen classes; dots: single seeds."
    groups = "on unseen and on all classes" if any(table.unseen for table in report.tables) else "on all classes"
    return [
        *figures.show("ap.png", bars, alt=f"mask AP of every row {groups}", caption=caption),
        *figures.show("gap.png", gap_figure(report.tables, gaps), alt="gap closed by every row", caption=gap_caption),
    ]


def _protocol(report: ReportInput) -> list[str]:
    seeds = ", ".join(map(str, report.seeds))
    lines = [f"- **Data.** {escape_markdown(report.data)}"]
    for table in report.tables:
        if not table.split:
            continue
        lines.append(
            f"- **Split `{table.split}`** ({escape_markdown(table.name)}): masks for {_names(table.seen)}; "
            f"boxes only for {_names(table.unseen)}."
        )
    start = (
        f"Every row starts from {escape_markdown(report.initial)}."
        if report.pretraining is None
        else f"{escape_markdown(report.pretraining)} This pretraining is part of the protocol: it stands in for the "
        "ImageNet weights that the paper starts from."
    )
    groups = "; groups of classes are read from the same evaluation" * any(table.unseen for table in report.tables)
    lines += [
        f"- **Start.** {start}",
        f"- **Schedule.** {escape_markdown(report.schedule)}",
        f"- **Seeds.** {seeds}. A seed draws the initial weights, the order of the images and the augmentation; rows "
        "of one seed are compared in pairs. Deviations are sample standard deviations over seeds (n − 1).",  # noqa: RUF001
        f"- **Rows.** {_rows_in_words(report)}",
        f"- **Measure.** COCO AP of masks in percent (pycocotools), on the validation images{groups}.",
    ]
    return ["## Protocol", "\n".join(lines)]


def _rows_in_words(report: ReportInput) -> str:
    differ = "its mask loss" if all(table.alike for table in report.tables) else "its masks, mask loss and network"
    told = {row.name: row.meaning for table in report.tables for row in table.rows if row.meaning}
    words = "".join(f"\n  - `{name}`: {escape_markdown(meaning)}" for name, meaning in told.items())
    return f"All rows get the boxes and classes of every object and differ in {differ}.{words}"


def _table_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame, figures: _Figures) -> list[str]:
    table, shown = numbers.table, layout(numbers.table, numbers.summary)
    cells = table_cells(numbers.summary, table, shown)
    files = ", ".join(f"[{kind}](tables/{table.name}.{kind})" for kind in ("csv", "md", "tex"))
    classes = f"{len(table.seen)} seen and {len(table.unseen)} unseen classes"
    if not table.unseen:
        classes = f"All {len(table.seen)} classes"
    return [
        f"## {escape_markdown(table.title)}",
        f"{classes}; mask AP in percent; — = not measured. Files: {files}.",
        markdown_table(shown.headings, cells, texts=shown.texts),
        row_order(numbers),
        *published_section(report, numbers, printed),
        *edge_section(report, numbers, printed),
        *_gap_section(numbers),
        *_difference_section(report, numbers, printed),
        *_box_section(numbers),
        *_class_section(numbers, figures),
        *_loss_section(report, table, figures),
        *_picture_section(report, table, figures),
    ]


def _gap_section(numbers: TableNumbers) -> list[str]:
    if not numbers.table.unseen:
        return []
    labels = {row.name: row.label for row in numbers.table.rows}
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


def _difference_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    table = numbers.table
    if not numbers.differences:
        return []
    labels = {row.name: row.label for row in table.rows}
    lines = []
    for item in numbers.differences:
        interval = item.interval
        lines.append(
            [
                f"{labels[item.second]} − {labels[item.first]}",  # noqa: RUF001
                *([item.group] if table.unseen else []),
                number(item.mean, item.std, sign=True),
                "—" if interval is None else f"{interval[0]:+.1f} … {interval[1]:+.1f}",
                reading(item),
                printed_difference(printed, table.published, item.first, item.second, item.group),
            ]
        )
    text = (
        "Differences of AP, paired by seed: mean ± standard deviation over seeds. A difference is called resolved if "
        "the 95 % interval of its mean (Student's t) leaves out 0, which takes at least three seeds; the pairs are "
        "judged one by one, without correction for their number. The spread over validation images is not part of it."
    )
    classes = ["classes"] if table.unseen else []
    whose = "printed" if report.paper_data else f"{data_name(printed, table)}, printed"
    headings = ("difference", *classes, "AP", "95 % interval", "reading", whose)
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


def _class_section(numbers: TableNumbers, figures: _Figures) -> list[str]:
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
        *figures.show(
            f"{table.name}_classes.png", class_figure(table, numbers.classes), alt=f"mask AP per class, {table.name}"
        ),
    ]


def _loss_section(report: ReportInput, table: ReportTable, figures: _Figures) -> list[str]:
    recorded = {
        row.name: [run for seed in report.seeds if (run := report.results.get((table.name, row.name, seed)))]
        for row in table.rows
    }
    logs = {
        row: [report.run_folders[run.run_id] / "log.jsonl" for run in runs if run.run_id in report.run_folders]
        for row, runs in recorded.items()
    }
    # A figure that lacks runs would replace a better one of an earlier report.
    complete = all(
        len(logs[row]) == len(runs) and all(path.is_file() for path in logs[row]) for row, runs in recorded.items()
    )
    shown = figures.show(
        f"{table.name}_losses.png",
        loss_figure(table, logs) if complete else None,
        alt=f"training losses, {table.name}",
        caption="Loss terms before weighting, over the steps of the rows' own training; one line per run.",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]


def _picture_section(report: ReportInput, table: ReportTable, figures: _Figures) -> list[str]:
    pictures = draw_pictures(report, table)
    shown = figures.show(
        f"{table.name}_pictures.png",
        pictures.png,
        alt=f"ground truth and detections, {table.name}",
        caption=pictures.note,
        absent=pictures.note,
    )
    return ["### Pictures", *shown]


def _difficulty(report: ReportInput) -> list[str]:
    if not report.difficulty:
        return []
    return ["## How hard the data are", "\n".join(f"- {escape_markdown(line)}" for line in report.difficulty)]


def _names(classes: Sequence[str]) -> str:
    if not classes:
        return "no class"
    noun = "class" if len(classes) == 1 else "classes"
    return f"{len(classes)} {noun} ({escape_markdown(', '.join(classes))})"
