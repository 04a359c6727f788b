"""The sections of one table that need the folders of its runs: training curves and pictures."""

from __future__ import annotations

from semiseg.report.aggregate import TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.figures import loss_figure
from semiseg.report.pictures import draw_pictures


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term."""
    report, table = page.report, numbers.table
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
    shown = page.figures.show(
        f"{table.name}_losses",
        loss_figure(table, logs) if complete else None,
        alt=f"training losses, {table.name}",
        caption="Loss terms before weighting, over the steps of the rows' own training; one line per run.",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]


def picture_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Ground truth and all rows side by side."""
    report, table = page.report, numbers.table
    pictures = draw_pictures(report, table)
    shown = page.figures.show(
        f"{table.name}_pictures",
        pictures.drawing,
        alt=f"ground truth and detections, {table.name}",
        caption=pictures.note,
        absent=pictures.note,
    )
    return ["### Pictures", *shown]
