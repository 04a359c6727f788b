"""The charts of a report, made from aggregated numbers and from the logs of runs, as PNG with few colours."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.font_manager
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType
from PIL import Image

from semiseg.config.read import read_json_lines
from semiseg.errors import UserError
from semiseg.report.aggregate import UPPER_BOUND, ReportTable, TableNumbers

# Okabe and Ito 2008: distinguishable with any colour vision.
GREY, BLACK = "#8C8C8C", "#000000"
ROW_COLOURS = (GREY, "#56B4E9", "#0072B2", "#E69F00", "#009E73", BLACK, "#D55E00", "#CC79A7")

STYLE = Path(__file__).with_name("charts.mplstyle")
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic")

CURVE_POINTS = 60  # longer curves are averaged in bins
_PALE = 0.35  # opacity of bars that are not of the unseen classes
_DASHES: tuple[LineStyleType, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
Styles = Mapping[str, Mapping[str, Any]]  # row name -> matplotlib's keywords of its lines
_SEEDS: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "white", "markeredgecolor": BLACK}


def new_figure(width: float, height: float) -> Figure:
    """A figure of inches, for functions under `rc_context(fname=STYLE)`; with fonts of other scripts if installed."""
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in _FONTS if name in installed] or ["sans-serif"]
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def chart(figure: Figure) -> bytes:
    """A figure of lines and letters as PNG, the same bytes for the same numbers."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font of a script here: boxes instead
        canvas.draw()
    return png(Image.fromarray(np.asarray(canvas.buffer_rgba())))


def png(image: Image.Image, *, colours: int = 128) -> bytes:
    """An image with a palette: a third of the bytes, and no time stamp or version inside."""
    small = io.BytesIO()
    reduced = image.convert("RGB").quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def plain(text: str) -> str:
    """A name as it is: `$` does not start mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def wrapped(text: str, width: int = 12) -> str:
    """Breaks long labels at spaces and hyphens so that they do not run into each other."""
    return textwrap.fill(plain(text), width, break_long_words=False)


def row_styles(tables: Sequence[ReportTable]) -> Styles:
    """How each row is drawn in every chart of a page; lines that cross differ by more than their colour."""
    count = len(ROW_COLOURS)
    names = dict.fromkeys(row.name for table in tables for row in table.rows)
    return {
        name: {
            "color": ROW_COLOURS[index % count],
            # Where the colours begin anew, the dashes do not begin at the same place.
            "linestyle": _DASHES[(index + index // count) % len(_DASHES)],
        }
        for index, name in enumerate(names)
    }


def _panels(count: int, *, across: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """`count` panels of a size in inches in lines of `across`; those that the last line has too many of are hidden."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = new_figure(size[0] * across + 0.4, size[1] * down + 0.5)
    panels = figure.subplots(down, across, sharey=sharey, squeeze=False).ravel().tolist()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _fill(colour: str, *, pale: bool) -> dict[str, Any]:
    return {"facecolor": (colour, _PALE) if pale else colour, "edgecolor": colour, "linewidth": 1}


@rc_context(fname=STYLE)
def ap_figure(tables: Sequence[ReportTable], measured: Mapping[str, pd.DataFrame]) -> bytes:
    """Bars of mask AP per row, one panel per table: unseen classes solid, all classes pale beside them.

    Error bars are standard deviations over seeds, dots single seeds. Without unseen classes the bars are solid.
    """
    styles = row_styles(tables)
    figure, panels = _panels(len(tables), across=2, size=(5.2, 3.8), sharey=True)
    for panel, table in zip(panels, tables, strict=True):
        groups = ((-0.2, "unseen", False), (0.2, "all", True)) if table.unseen else ((0.0, "all", False),)
        for offset, group, pale in groups:
            for index, row in enumerate(table.rows):
                frame = measured[table.name]
                values = frame.loc[frame["row"] == row.name, f"{group}_AP"].dropna().to_numpy()
                _bar(panel, index + offset, values, _fill(styles[row.name]["color"], pale=pale))
        panel.set_xticks(range(len(table.rows)), [wrapped(row.label) for row in table.rows])
        panel.set_xlim(-0.6, len(table.rows) - 0.4)
        panel.tick_params(labelleft=True)
        panel.set_title(wrapped(table.title, 58))
        panel.set_ylabel("mask AP (%)")
        panel.grid(axis="y")
    panels[0].set_ylim(0, 1.14 * max(1.0, *(panel.dataLim.y1 for panel in panels)))
    if any(table.unseen for table in tables):
        solid = "unseen classes" if all(table.unseen for table in tables) else "unseen classes (where none: all)"
        handles = [Patch(label=solid, **_fill(GREY, pale=False)), Patch(label="all classes", **_fill(GREY, pale=True))]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return chart(figure)


def _bar(panel: Axes, x: float, values: np.ndarray, fill: Mapping[str, Any]) -> None:
    if not len(values):
        panel.text(x, 0.4, "not\nmeasured", ha="center", va="bottom", fontsize=7, rotation=90)
        return
    mean, top = float(values.mean()), float(values.max())
    panel.bar(x, mean, 0.36, **fill)
    if len(values) > 1:
        std = float(values.std(ddof=1))
        panel.errorbar(x, mean, yerr=std, color=BLACK, capsize=3, linewidth=1)
        panel.plot(x + np.linspace(-0.1, 0.1, len(values)), values, markersize=3.5, **_SEEDS)
        top = max(top, mean + std)
    panel.annotate(f"{mean:.1f}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)


def shown_row(numbers: TableNumbers) -> str | None:
    """The row whose classes are drawn: the main one of those that were measured; None where nothing was."""
    measured = [str(name) for name in numbers.classes.columns if numbers.classes[name].notna().any()]
    return numbers.main_row(measured) if measured else None


def class_gaps(numbers: TableNumbers) -> pd.Series | None:
    """Full-masks minus the shown row per class, in AP; None where a table does not have both."""
    main, classes = shown_row(numbers), numbers.classes
    if main is None or main == UPPER_BOUND or UPPER_BOUND not in classes or classes[UPPER_BOUND].isna().all():
        return None
    return classes[UPPER_BOUND] - classes[main]


def sorted_classes(numbers: TableNumbers) -> list[str]:
    """The classes, unseen ones first, each group by its gap, the widest first; without a gap by AP, the best first."""
    table, main, gaps = numbers.table, shown_row(numbers), class_gaps(numbers)
    if main is None:
        return [*table.unseen, *table.seen]
    by = numbers.classes[main] if gaps is None else gaps
    groups = (by.loc[list(names)].sort_values(ascending=False, kind="stable") for names in (table.unseen, table.seen))
    return [str(name) for group in groups for name in group.index]


@dataclass(frozen=True)
class TrainingCurves:
    """What a run's log holds."""

    losses: pd.DataFrame  # unweighted; index step, one column per term
    # Mask AP on all validation classes in percent, index step; empty where it was measured at the end only
    mask_ap: pd.Series


@rc_context(fname=STYLE)
def training_figure(table: ReportTable, curves: Mapping[str, Sequence[TrainingCurves]], styles: Styles) -> bytes | None:
    """Unweighted loss terms and, where measured on the way, validation mask AP over steps; None without any losses."""
    runs = [(row, curve) for row in table.rows for curve in curves.get(row.name, ())]
    lines: dict[str, list[tuple[str, str, pd.Series]]] = {}  # heading of a panel -> label, row, line
    for row, curve in runs:
        for term in curve.losses.columns[(curve.losses != 0).any()]:
            heading = plain(str(term).replace("_", " "))
            lines.setdefault(heading, []).append((row.label, row.name, curve.losses[term]))
    if not lines:
        return None
    validated = [(row.label, row.name, curve.mask_ap) for row, curve in runs if len(curve.mask_ap)]
    if validated:
        lines["validation mask AP (%)"] = validated
    figure, panels = _panels(len(lines), across=3, size=(3.5, 2.5))
    for panel, (heading, drawn) in zip(panels, lines.items(), strict=True):
        for label, name, line in drawn:
            marks: dict[str, Any] = {"marker": "o", "markersize": 3.5} if drawn is validated else {}
            panel.plot(
                line.index.to_numpy(), line.to_numpy(), label=wrapped(label, 40), linewidth=1.1, **styles[name], **marks
            )
        panel.set_title(heading)
        panel.margins(x=0.03)
        panel.set_xlabel("step")
    entries = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in entries for handle, label in zip(*pair, strict=True)}  # each label once
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return chart(figure)


def read_curves(path: Path, *, final: tuple[int, float | None]) -> TrainingCurves | None:
    """The curves of a run's log.jsonl; None if it cannot be read or holds no losses.

    Losses of long logs are averaged in bins, CURVE_POINTS at most. A line cut off by an interruption ends the reading.
    `final`: the last step and the mask AP recorded after it, percent, which the log does not hold; None where masks
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
