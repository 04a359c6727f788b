"""The curves of a report: training losses and validation AP over steps, AP over IoU thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from semiseg.config_files import read_json_lines
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportTable
from semiseg.report.chart_style import GRID, RowStyle, one_legend, panels_of, quiet, shortened
from semiseg.report.drawing import Drawing, chart, new_figure, plain

CURVE_POINTS = 60  # longer curves are averaged in bins


@dataclass(frozen=True)
class TrainingCurves:
    """What a run's log holds.

    Attributes:
        losses: unweighted; index step, one column per term.
        mask_ap: mask AP on all validation classes in percent, index step; empty where it was measured at the end only.
    """

    losses: pd.DataFrame
    mask_ap: pd.Series


def training_figure(
    table: ReportTable, curves: Mapping[str, Sequence[TrainingCurves]], styles: Mapping[str, RowStyle]
) -> Drawing | None:
    """Unweighted loss terms and, where measured on the way, validation mask AP over steps; one line per run.

    Args:
        curves: row name -> its runs. None is returned if they hold no losses.
    """
    drawn = [(row, curve) for row in table.rows for curve in curves.get(row.name, ())]
    lines: dict[str, list[tuple[str, str, pd.Series]]] = {}  # heading of a panel -> label, row, line
    for row, curve in drawn:
        for term in curve.losses.columns:
            if (curve.losses[term] != 0).any():
                heading = plain(str(term).replace("_", " "))
                lines.setdefault(heading, []).append((row.label, row.name, curve.losses[term]))
    if not lines:
        return None
    validated = [(row.label, row.name, curve.mask_ap) for row, curve in drawn if len(curve.mask_ap)]
    if validated:
        lines["validation mask AP (%)"] = validated
    across = min(3, len(lines))
    figure = new_figure(3.5 * across, 2.5 * math.ceil(len(lines) / across) + 0.6)
    panels = panels_of(figure, len(lines), across=across)
    for number, (panel, (heading, found)) in enumerate(zip(panels, lines.items(), strict=True)):
        for label, name, line in found:
            style, marked = styles[name], found is validated
            panel.plot(
                line.index.to_numpy(),
                line.to_numpy(),
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.1,
                marker=style.marker if marked else "",
                markersize=3.5,
                label=shortened(label, 40),
            )
        panel.set_title(heading, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.margins(x=0.03)
        if number >= len(panels) - across:  # nothing stands below
            panel.set_xlabel("step", fontsize=8)
        quiet(panel)
    one_legend(figure, panels, columns=3)
    return chart(figure)


def read_curves(path: Path, *, final: tuple[int, float | None]) -> TrainingCurves | None:
    """The curves of a run's log.jsonl; None if it cannot be read or holds no losses.

    Losses of long logs are averaged in bins, CURVE_POINTS at most. A line cut off by an interruption ends the reading.

    Args:
        final: the last step and the mask AP recorded after it, percent, which the log does not hold; None where masks
            could not be measured, and then the log's "mask_AP" is that of boxes and not used.
    """
    losses: list[dict[str, Any]] = []
    validations: dict[int, float] = {}
    with suppress(UserError):  # a log that cannot be read
        for _, record in read_json_lines(path):
            if isinstance(record, ValueError):
                break
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                continue
            terms, validation = record.get("losses"), record.get("validation")
            if isinstance(terms, dict) and all(type(value) in (int, float) for value in terms.values()):
                losses.append({"step": record["step"], **terms})
            if isinstance(validation, dict) and type(validation.get("mask_AP")) in (int, float):
                validations[record["step"]] = validation["mask_AP"]
    if not losses:
        return None
    step, last = final
    if last is None:
        validations = {}
    elif validations:
        validations[step] = last
    frame = pd.DataFrame(losses).fillna(0.0)
    bins = math.ceil(len(frame) / math.ceil(len(frame) / CURVE_POINTS))  # alike but for one line
    binned = frame.groupby(np.arange(len(frame)) * bins // len(frame)).mean().set_index("step")
    return TrainingCurves(binned, pd.Series(validations, dtype=float).sort_index())


def threshold_figure(
    table: ReportTable, measured: Mapping[str, pd.DataFrame], styles: Mapping[str, RowStyle]
) -> Drawing | None:
    """Mask AP over the IoU that a match takes: a line per row, the mean over seeds, in a band of +- std.

    Args:
        measured: words of a class group, one panel each -> one line per run: column "row", and one per IoU threshold.
            None is returned if no run was measured.
    """
    if not measured or all(frame.empty for frame in measured.values()):
        return None
    figure = new_figure(5.0 * len(measured) + 0.4, 4.2)
    panels = panels_of(figure, len(measured), across=2, sharey=True)
    for panel, (group, frame) in zip(panels, measured.items(), strict=True):
        for row in table.rows:
            values = frame.loc[frame["row"] == row.name].drop(columns="row")
            if len(values):
                _threshold_line(panel, values, styles[row.name], shortened(row.label, 40))
        panel.set_title(group, fontsize=10)
        panel.set_xlabel("mask IoU of a match at least")
        panel.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9])
        panel.grid(color=GRID, linewidth=0.6)
        quiet(panel)
    panels[0].set_ylabel("mask AP (%)")
    panels[0].set_ylim(bottom=0)
    one_legend(figure, panels, columns=3)
    return chart(figure)


def _threshold_line(panel: Axes, values: pd.DataFrame, style: RowStyle, label: str) -> None:
    thresholds, mean = values.columns.to_numpy(dtype=float), values.mean().to_numpy()
    if len(values) > 1:
        std = values.std(ddof=1).to_numpy()
        panel.fill_between(thresholds, mean - std, mean + std, color=style.colour, alpha=0.15, linewidth=0)
    panel.plot(
        thresholds,
        mean,
        color=style.colour,
        linestyle=style.dashes,
        marker=style.marker,
        markersize=4.5,
        linewidth=1.5,
        clip_on=False,  # marks at 0 are whole
        label=label,
    )
