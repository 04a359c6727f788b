"""The sections of one table: its numbers, the printed ones, gaps, differences, boxes and classes."""

from __future__ import annotations

import pandas as pd

from semiseg.report.aggregate import NEITHER, UPPER_BOUND, ReportInput, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.published import beside_printed, data_name, printed_difference, published_section
from semiseg.report.statements import box_statement, gap_caution, gap_cells, reading, row_order
from semiseg.report.tables import (
    MINUS,
    best_cells,
    best_sentence,
    escape_markdown,
    layout,
    markdown_table,
    number,
    signed,
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
    lines = [
        [*gap_cells(gap, labels[gap.row]), *([_range(shares.get(gap.row), sign=False, digits=0)] if shares else [])]
        for gap in numbers.gaps
    ]
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
        f"In brackets {_image_words(numbers)}. AP of several seeds is averaged within a resample. The interval says "
        "how much depends on which images were looked at, for these trained networks; training again with other seeds "
        "is not part of it. With few images AP of a resample tends to lie above AP of all images, and so do the "
        "brackets. Rows are compared below on the same resamples: their differences are surer than the brackets of two "
        "rows suggest."
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
    start = (
        "Differences of AP, paired by seed: mean ± standard deviation over seeds. A difference is called resolved if "
    )
    one_by_one = " The pairs are judged one by one, without correction for their number."
    if not over_images:
        rule = "the 95 % interval of its mean over seeds (Student's t) leaves out 0, which takes at least three seeds."
        return f"{start}{rule}{one_by_one} The spread over validation images is not part of it."
    if not over_seeds:
        rule = (
            "its 95 % interval over validation images leaves out 0 (paired: both rows on the same resamples). An "
            "interval over seeds takes at least three: what is resolved is so for these trained networks, and another "
            "seed may give another difference."
        )
    else:
        rule = (
            "two 95 % intervals of its mean leave out 0: that over seeds (Student's t, at least three seeds) and that "
            "over validation images (paired: both rows on the same resamples, seeds averaged in each). Where there is "
            "only one of them, it decides, and the reading says so."
        )
    return f"{start}{rule}{one_by_one}"


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
