"""The sections of one table: its numbers, the printed ones, gaps, differences, boxes and classes."""

from __future__ import annotations

import pandas as pd

from semiseg.report.aggregate import NEITHER, UPPER_BOUND, ReportInput, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.published import beside_printed, data_name, printed_difference, published_section
from semiseg.report.statements import box_statement, gap_caution, reading, row_order
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
        row_order(numbers),
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
    goal = numbers.gaps[0]
    text = (
        f"The gap is full-masks ({goal.goal:.1f}) minus neither ({goal.start:.1f}) on unseen classes, "
        f"{signed(goal.goal - goal.start)} AP before rounding, over the seeds that both and the row have."
    )
    if caution := gap_caution(numbers):
        text += f" **Note:** {caution}; shares of it say little."
    if shares := numbers.images.shares if numbers.images is not None else {}:
        text += f" The last column is {_image_words(numbers)}."
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


def _image_words(numbers: TableNumbers) -> str:
    """What an interval over images is."""
    assert numbers.images is not None
    return (
        f"the 95 % interval over validation images: from {numbers.images.resamples} resamples of the "
        f"{numbers.images.images} images with replacement, the percentiles 2.5 and 97.5"
    )


def _range(interval: tuple[float, float] | None, *, sign: bool = True, digits: int = 1) -> str:
    if interval is None:
        return "—"
    return " … ".join(signed(end, digits) if sign else f"{end:.{digits}f}".replace("-", MINUS) for end in interval)


def uncertainty_section(numbers: TableNumbers) -> list[str]:
    """The AP of every row with its interval over images; nothing where it was not measured."""
    if numbers.images is None:
        return []
    table, cells = numbers.table, numbers.images.cells
    groups = ("all", "unseen", "seen") if table.unseen else ("all",)
    lines = [
        [
            row.label,
            *(
                f"{number(numbers.mean(row.name, f'{group}_AP'))} [{found[0]:.1f}, {found[1]:.1f}]"
                if (found := cells.get((row.name, group))) is not None
                else "—"
                for group in groups
            ),
        ]
        for row in table.rows
    ]
    text = (
        f"In brackets {_image_words(numbers)}: for these trained networks, seeds averaged within a resample. Rows are "
        "compared below on the same resamples: their differences are surer than the brackets of two rows suggest."
    )
    headings = ("row", *(f"{group} AP" if table.unseen else "AP" for group in groups))
    return ["### Uncertainty over validation images", text, markdown_table(headings, lines)]


def difference_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    """Every compared pair of rows: the difference, its intervals and whether it is resolved."""
    table = numbers.table
    if not numbers.differences:
        return []
    labels = {row.name: row.label for row in table.rows}
    over_seeds = any(item.interval is not None for item in numbers.differences)
    over_images = any(item.image_interval is not None for item in numbers.differences)
    lines = [
        [
            f"{labels[item.second]} − {labels[item.first]}",  # noqa: RUF001
            *([item.group] if table.unseen else []),
            number(item.mean, item.std, sign=True),
            *([_range(item.interval)] if over_seeds or not over_images else []),
            *([_range(item.image_interval)] if over_images else []),
            reading(item),
            *(
                [printed_difference(printed, table.published, item.first, item.second, item.group)]
                if table.published
                else []
            ),
        ]
        for item in numbers.differences
    ]
    classes = ["classes"] if table.unseen else []
    intervals = ["95 % over seeds"] * (over_seeds or not over_images) + ["95 % over images"] * over_images
    whose = "printed" if report.paper_data else f"{data_name(printed, table)}, printed"
    headings = ("difference", *classes, "AP", *intervals, "reading", *([whose] if table.published else []))
    text = _judgement(over_seeds=over_seeds, over_images=over_images)
    return ["### Which differences are resolved", text, markdown_table(headings, lines, texts=1 + len(classes))]


def _judgement(*, over_seeds: bool, over_images: bool) -> str:
    """When a difference is called resolved."""
    seeds = "its 95 % interval over seeds (Student's t, at least three seeds) leaves out 0"
    images = "its 95 % interval over validation images (both rows on the same resamples) leaves out 0"
    rule = {
        (True, True): "two 95 % intervals of its mean leave out 0: that over seeds (Student's t, at least three seeds) "
        "and that over validation images (both rows on the same resamples, seeds averaged)",
        (False, True): f"{images}; so it is for these trained networks: another seed may give another one",
    }.get((over_seeds, over_images), seeds)
    return (
        "Differences of AP, paired by seed: mean ± standard deviation over seeds. A difference is called resolved if "
        f"{rule}. The pairs are judged one by one, without correction for their number."
    )


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
