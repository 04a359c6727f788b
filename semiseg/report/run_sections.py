"""The sections of one table that need the folders of its runs: training curves and pictures."""

from __future__ import annotations

from semiseg.evaluation.coco_metrics import Metrics
from semiseg.report.aggregate import TableNumbers
from semiseg.report.chart_style import row_styles
from semiseg.report.context import PageContext
from semiseg.report.curve_figures import TrainingCurves, read_curves, training_figure
from semiseg.report.pictures import draw_pictures


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term, and of the validation AP where it was measured on the way."""
    report, table = page.report, numbers.table
    curves: dict[str, list[TrainingCurves]] = {row.name: [] for row in table.rows}
    complete = True  # a figure that lacks runs would replace a better one of an earlier report
    for row in table.rows:
        for seed in report.seeds:
            if (run := report.results.get((table.name, row.name, seed))) is None:
                continue
            masks = Metrics.from_dict(run.metrics).group("segm", table.seen + table.unseen)["AP"]
            folder = report.run_folders.get(run.run_id)
            found = None if folder is None else read_curves(folder / "log.jsonl", final=(run.steps, masks))
            complete = complete and found is not None
            curves[row.name] += [found] if found is not None else []
    validated = any(len(curve.mask_ap) for found in curves.values() for curve in found)
    shown = page.figures.show(
        f"{table.name}_losses",
        training_figure(table, curves, row_styles(report.tables)) if complete else None,
        alt=f"training losses{' and validation AP' if validated else ''}, {table.name}",
        caption="Loss terms before weighting, over the steps of the rows' own training, averaged over some steps; one "
        f"line per run.{' Validation mask AP is that of all classes.' if validated else ''}",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]


def picture_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Ground truth and all rows side by side."""
    table = numbers.table
    pictures = draw_pictures(page.report, numbers, page.stored)
    shown = page.figures.show(
        f"{table.name}_pictures",
        pictures.drawing,
        alt=f"ground truth and detections, {table.name}",
        caption=pictures.note,
        absent=pictures.note,
    )
    return ["### Pictures", *shown]
