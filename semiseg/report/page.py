"""Writes a report from recorded results alone: report.md, tables/*.csv|md|tex, figures/*.png.

The same results give the same bytes. Results, run folders and data are only read. Pictures and training curves need
the run folders; where these are gone, the files of an earlier report stay and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from semiseg.report.aggregate import (
    TABLE_METRICS,
    ReportInput,
    ReportTable,
    TableNumbers,
    read_published,
    table_numbers,
)
from semiseg.report.figures import ap_figure, class_figure, gap_figure, loss_figure
from semiseg.report.pictures import draw_pictures
from semiseg.report.provenance import provenance, warnings
from semiseg.report.statements import (
    answer,
    box_statement,
    gap_caution,
    gap_cells,
    reading,
    row_order,
    same_numbers_caution,
)
from semiseg.report.tables import (
    HEADINGS,
    csv_table,
    escape_markdown,
    latex_table,
    markdown_table,
    number,
    table_cells,
    text_table,
)
from semiseg.resources import write_bytes, write_text

_ROW_MEANINGS = {
    "neither": "masks of seen classes, no mask loss for objects of unseen classes",
    "projection": "masks of seen classes, BoxInst's projection term for objects of unseen classes",
    "projection+pairwise": "masks of seen classes, BoxInst's projection and pairwise terms for objects of unseen ones",
    "box-supervised": "no mask of any class, both terms for all (the same run in every table)",
    "full-masks": "masks of every class, the upper bound, which the paper leaves out (the same run in every table)",
}


@dataclass
class _Figures:
    """Writes figures into the report's folder and gives the Markdown that shows them."""

    folder: Path
    shown: list[str] = field(default_factory=list)

    def show(self, name: str, content: bytes | None, *, alt: str, caption: str = "", absent: str = "") -> list[str]:
        """`content` None: the figure of an earlier report is kept and shown, if there is one; `absent` says why."""
        path = self.folder / name
        if content is not None:
            write_bytes(path, content)
        elif not path.is_file():
            return [f"*No figure ({alt}): {absent}.*"] if absent else []
        elif absent:
            caption = f"{alt[:1].upper()}{alt[1:]}: kept from an earlier report, because {absent}."
        else:
            return []
        return [f"![{escape_markdown(alt)}](figures/{name})", *([f"*{escape_markdown(caption)}*"] if caption else [])]


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
    figures = _Figures(out / "figures")
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
    return "\n".join(
        f"{table.title}\n{text_table(HEADINGS, table_cells(table_numbers(report, table).summary, table.rows))}"
        for table in report.tables
    )


def _write_tables(numbers: TableNumbers, folder: Path) -> None:
    cells = table_cells(numbers.summary, numbers.table.rows)
    write_text(folder / f"{numbers.table.name}.csv", csv_table(numbers.summary))
    write_text(folder / f"{numbers.table.name}.md", markdown_table(HEADINGS, cells, texts=3))
    write_text(folder / f"{numbers.table.name}.tex", latex_table(numbers.table, cells))


def _overview(report: ReportInput, tables: Sequence[TableNumbers], figures: _Figures) -> list[str]:
    if not tables:
        return []
    measured = {numbers.table.name: numbers.measured for numbers in tables}
    gaps = {numbers.table.name: numbers.gaps for numbers in tables}
    bars = ap_figure(report.tables, measured) if any(len(frame) for frame in measured.values()) else None
    caption = "Mask AP in percent. Error bars: standard deviation over seeds, dots: single seeds (where several)."
    gap_caption = "Share of the gap between neither and full-masks on unseen classes; dots: single seeds."
    return [
        *figures.show("ap.png", bars, alt="mask AP of every row on unseen and on all classes", caption=caption),
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
        "Every row starts from random weights."
        if report.pretraining is None
        else f"{escape_markdown(report.pretraining)} This pretraining is part of the protocol: it stands in for the "
        "ImageNet weights that the paper starts from."
    )
    lines += [
        f"- **Start.** {start}",
        f"- **Schedule.** {escape_markdown(report.schedule)}",
        f"- **Seeds.** {seeds}. A seed draws the initial weights, the order of the images and the augmentation; rows "
        "of one seed are compared in pairs. Deviations are sample standard deviations over seeds (n − 1).",  # noqa: RUF001
        f"- **Rows.** {_rows_in_words(report)}",
        "- **Measure.** COCO AP of masks in percent (pycocotools), on the validation images; groups of classes are "
        "read from the same evaluation.",
    ]
    return ["## Protocol", "\n".join(lines)]


def _rows_in_words(report: ReportInput) -> str:
    names = list(dict.fromkeys(row.name for table in report.tables for row in table.rows))
    told = [f"`{name}`: {_ROW_MEANINGS[name]}" for name in names if name in _ROW_MEANINGS]
    text = "All rows get the boxes and classes of every object and differ in its mask loss"
    return f"{text}. {'; '.join(told)}." if told else f"{text}."


def _table_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame, figures: _Figures) -> list[str]:
    table = numbers.table
    cells = table_cells(numbers.summary, table.rows)
    files = ", ".join(f"[{kind}](tables/{table.name}.{kind})" for kind in ("csv", "md", "tex"))
    return [
        f"## {escape_markdown(table.title)}",
        f"{len(table.seen)} seen and {len(table.unseen)} unseen classes; mask AP in percent; — = not measured. "
        f"Files: {files}.",
        markdown_table(HEADINGS, cells, texts=3),
        row_order(numbers),
        *_published_section(numbers, printed),
        *_gap_section(numbers),
        *_difference_section(numbers, printed),
        *_box_section(numbers),
        *_class_section(numbers, figures),
        *_loss_section(report, table, figures),
        *_picture_section(report, table, figures),
    ]


def _published_section(numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    table = numbers.table
    if table.published is None:
        return []
    groups = ("all", "unseen") if table.unseen else ("all",)
    lines = [
        [
            row.label,
            *(
                text
                for group in groups
                for text in (
                    " / ".join(number(numbers.mean(row.name, f"{group}_{metric}")) for metric in TABLE_METRICS),
                    _printed(printed, table.published, row.name, group),
                )
            ),
        ]
        for row in table.rows
    ]
    rows = printed[printed["table"] == table.published]
    where = ", ".join(
        " / ".join(dict.fromkeys(value for value in rows[name] if value))
        for name in ("backbone", "schedule", "evaluation_set")
        if name in rows and any(rows[name])
    )
    notes = [f"{line['row']} ({line['classes']}): {line['note']}" for _, line in rows.iterrows() if line["note"]]
    dice = _printed(printed, "2", "dice", "all")
    if dice != "—":
        notes.append(
            f"full-masks: not in the paper's Table {table.published}; for all classes its Table 2 prints {dice} "
            "with Dice on all masks"
        )
    caution = same_numbers_caution(printed) if table.published in ("6", "7") else ""
    return [
        f"### Beside the printed numbers (BoxInst, Table {escape_markdown(table.published)})",
        f"AP / AP50 / AP75. **The COCO numbers are from another data set** ({escape_markdown(where)}), another network "
        "and another schedule: they are context for the order and the size of the steps, not numbers to be reached.",
        markdown_table(
            ("row", *(f"{group}: {whose}" for group in groups for whose in ("ours", "COCO, printed"))), lines
        ),
        *([caution] if caution else []),
        "Notes to the printed numbers:\n\n" + "\n".join(f"- {escape_markdown(note)}" for note in notes)
        if notes
        else "",
    ]


def _printed(printed: pd.DataFrame, table: str, row: str, group: str) -> str:
    """The printed "AP / AP50 / AP75" of a row, "—" if it is not in the paper."""
    found = printed[(printed["table"] == table) & (printed["row"] == row) & (printed["classes"] == group)]
    if found.empty:
        return "—"
    return " / ".join(value or "—" for value in found.iloc[0][list(TABLE_METRICS)])


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


def _difference_section(numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    labels = {row.name: row.label for row in numbers.table.rows}
    lines = []
    for item in numbers.differences:
        interval = item.interval
        lines.append(
            [
                f"{labels[item.second]} − {labels[item.first]}",  # noqa: RUF001
                item.group,
                number(item.mean, item.std, sign=True),
                "—" if interval is None else f"{interval[0]:+.1f} … {interval[1]:+.1f}",
                reading(item),
                _printed_difference(printed, numbers.table.published, item.first, item.second, item.group),
            ]
        )
    text = (
        "Differences of AP, paired by seed: mean ± standard deviation over seeds. A difference is called resolved if "
        "the 95 % interval of its mean (Student's t) leaves out 0, which takes at least three seeds; the pairs are "
        "judged one by one, without correction for their number. The spread over validation images is not part of it."
    )
    headings = ("difference", "classes", "AP", "95 % interval", "reading", "COCO, printed")
    return ["### Which differences are resolved", text, markdown_table(headings, lines, texts=2)]


def _printed_difference(printed: pd.DataFrame, table: str | None, first: str, second: str, group: str) -> str:
    values = []
    for row in (first, second):
        found = printed[(printed["table"] == table) & (printed["row"] == row) & (printed["classes"] == group)]
        if found.empty or not found.iloc[0]["AP"]:
            return "—"
        values.append(float(found.iloc[0]["AP"]))
    return number(values[1] - values[0], sign=True)


def _box_section(numbers: TableNumbers) -> list[str]:
    lines = [
        [row.label, *(number(line[f"{group}_AP"], line[f"{group}_AP_std"]) for group in ("all", "unseen", "seen"))]
        for row, (_, line) in zip(numbers.table.rows, numbers.box_summary.iterrows(), strict=True)
    ]
    return [
        "### Box AP: is the detection equally good?",
        box_statement(numbers),
        markdown_table(("row", "all box AP", "unseen box AP", "seen box AP"), lines),
    ]


def _class_section(numbers: TableNumbers, figures: _Figures) -> list[str]:
    table = numbers.table
    lines = [
        [str(name), "unseen" if name in table.unseen else "seen", *(number(value) for value in line)]
        for name, line in zip(numbers.classes.index, numbers.classes.to_numpy(), strict=True)
    ]
    return [
        "### Per class",
        markdown_table(("class", "group", *(row.label for row in table.rows)), lines, texts=2),
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
