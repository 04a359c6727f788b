"""The sections of one table: its numbers, the printed ones, gaps, differences and boxes."""

from __future__ import annotations

import pandas as pd

from semiseg.report.aggregate import NEITHER, UPPER_BOUND, ReportInput, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.published import beside_printed, data_name, printed_difference, published_section
from semiseg.report.statements import gap_caution
from semiseg.report.tables import (
    MINUS,
    best_cells,
    best_sentence,
    escape_markdown,
    layout,
    markdown_table,
    number,
    signed,
    whole_percent,
)


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
        f"{classes}; mask AP in percent; — = not measured.{bold} Files: {files}.",
        markdown_table(headings, cells, texts=shown.texts, bold=best),
        *published_section(report, numbers, page.printed),
        *_gap_section(numbers),
        *uncertainty_section(numbers),
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
    text = "The gap is full-masks minus neither on unseen classes, over the seeds that both and the row have."
    if caution := gap_caution(numbers):
        text += f" **Note:** {caution}; shares of it say little."
    shares = numbers.images.shares if numbers.images is not None else {}
    lines = []
    for gap in numbers.gaps:
        share = "no gap" if gap.percent is None else whole_percent(gap.percent)
        if gap.percent is not None and len(gap.per_seed) > 1:
            share += f" ± {pd.Series(gap.per_seed).std(ddof=1):.0f}"
        gain = number(gap.reached - gap.start, sign=True)
        interval = [_range(shares.get(gap.row), sign=False, digits=0)] if shares else []
        lines.append([labels[gap.row], number(gap.start), number(gap.reached), gain, share, *interval])
    headings = ("row", "neither AP", "row AP", "gain", "gap closed", *(["95 % over images"] if shares else []))
    return [heading, text, markdown_table(headings, lines)]


def _range(interval: tuple[float, float] | None, *, sign: bool = True, digits: int = 1) -> str:
    if interval is None:
        return "—"
    return " … ".join(signed(end, digits) if sign else f"{end:.{digits}f}".replace("-", MINUS) for end in interval)


def uncertainty_section(numbers: TableNumbers) -> list[str]:
    """The AP of every row with its interval over images; nothing where it was not measured."""
    images = numbers.images
    if images is None:
        return []
    groups = _groups(numbers)
    lines = []
    for row in numbers.table.rows:
        intervals = {group: images.cells.get((row.name, group)) for group in groups}
        means = [
            f"{number(numbers.mean(row.name, f'{group}_AP'))} [{found[0]:.1f}, {found[1]:.1f}]" if found else "—"
            for group, found in intervals.items()
        ]
        lines.append([row.label, *means])
    text = (
        f"In brackets the 95 % interval over {images.resamples} resamples of the {images.images} images with "
        "replacement, of the mean over seeds."
    )
    return ["### Uncertainty over validation images", text, markdown_table(("row", *groups.values()), lines)]


def _groups(numbers: TableNumbers) -> dict[str, str]:
    """Class group -> heading."""
    if not numbers.table.unseen:
        return {"all": "AP"}
    return {group: f"{group} AP" for group in ("all", "unseen", "seen")}


def difference_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    """Every compared pair of rows: the difference, its intervals and whether it is resolved."""
    table = numbers.table
    if not numbers.differences:
        return []
    labels = {row.name: row.label for row in table.rows}
    columns = {
        "difference": [f"{labels[item.second]} − {labels[item.first]}" for item in numbers.differences],  # noqa: RUF001
        "classes": [item.group for item in numbers.differences],
        "AP": [number(item.mean, item.std, sign=True) for item in numbers.differences],
        "95 % over seeds": [_range(item.interval) for item in numbers.differences],
        "95 % over images": [_range(item.image_interval) for item in numbers.differences],
        "reading": [item.reading for item in numbers.differences],
    }
    if not table.unseen:
        del columns["classes"]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"—"}}  # intervals that nothing has
    if table.published:
        whose = "printed" if report.paper_data else f"{data_name(printed, table)}, printed"
        columns[whose] = [
            printed_difference(printed, table.published, item.first, item.second, item.group)
            for item in numbers.differences
        ]
    text = (
        "Differences of AP, paired by seed: mean ± standard deviation. A difference is called resolved if every 95 % "
        "interval that there is leaves out 0: over seeds (Student's t, at least three) and over validation images (the "
        "same resamples for both rows; about these networks alone). No correction for the number of pairs."
    )
    lines = list(map(list, zip(*columns.values(), strict=True)))
    return [
        "### Which differences are resolved",
        text,
        markdown_table(list(columns), lines, texts=1 + bool(table.unseen)),
    ]


def _box_section(numbers: TableNumbers) -> list[str]:
    groups = _groups(numbers)
    lines = [
        [row.label, *(number(line[f"{group}_AP"], line[f"{group}_AP_std"]) for group in groups)]
        for row, (_, line) in zip(numbers.table.rows, numbers.box_summary.iterrows(), strict=True)
    ]
    text = [] if numbers.table.alike else ["Rows differ in network, data or schedule: so may their boxes."]
    headings = ("row", *(heading.replace("AP", "box AP") for heading in groups.values()))
    return ["### Box AP", *text, markdown_table(headings, lines)]
