"""The charts of a report, made from aggregated numbers and from the logs of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType

from semiseg.config_files import read_json_lines
from semiseg.errors import UserError
from semiseg.report.aggregate import NEITHER, UPPER_BOUND, GapClosed, ReportTable, TableNumbers
from semiseg.report.drawing import (
    BLACK,
    GREEN,
    GREY,
    PURPLE,
    ROW_COLOURS,
    STYLE,
    VERMILLION,
    chart,
    new_figure,
    plain,
    shortened,
    wrapped,
)
from semiseg.report.tables import whole_percent

GROUP_COLOURS = {"unseen": VERMILLION, "seen": PURPLE}  # never a row's on a page with unseen classes
CURVE_POINTS = 60  # longer curves are averaged in bins
_SHARES = (-150.0, 250.0)  # % shown of the gap; shares beyond (of a gap near 0) are drawn at the rim
_PALE = 0.35  # opacity of bars that are not of the unseen classes
_DASHES: tuple[LineStyleType, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SEEDS: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "white", "markeredgecolor": BLACK}


@dataclass(frozen=True)
class RowStyle:
    """How a row is drawn in every chart of a page; lines that cross differ by more than their colour."""

    colour: str
    dashes: LineStyleType
    marker: str


Styles = Mapping[str, RowStyle]


def row_styles(tables: Sequence[ReportTable]) -> dict[str, RowStyle]:
    """Row name -> its style, in the order in which the tables of a page name the rows first."""
    grouped = any(table.unseen for table in tables)
    colours = [colour for colour in ROW_COLOURS if not grouped or colour not in GROUP_COLOURS.values()]
    names = dict.fromkeys(row.name for table in tables for row in table.rows)
    return {
        name: RowStyle(
            colours[index % len(colours)],
            # Where the colours begin anew, the dashes do not begin at the same place.
            _DASHES[(index + index // len(colours)) % len(_DASHES)],
            _MARKERS[index % len(_MARKERS)],
        )
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


def _legend(figure: Figure, panels: Iterable[Axes], *, columns: int = 3, above: bool = False) -> None:
    """One legend for all panels, outside of them, each label once."""
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    place: Literal["outside upper center", "outside lower center"] = "outside lower center"
    if above:
        place = "outside upper center"
    figure.legend(list(handles.values()), list(handles), loc=place, ncols=columns)


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
            for place, row in enumerate(table.rows):
                frame = measured[table.name]
                values = frame.loc[frame["row"] == row.name, f"{group}_AP"].dropna().to_numpy()
                _bar(panel, place + offset, values, _fill(styles[row.name].colour, pale=pale))
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


def _bar(panel: Axes, place: float, values: np.ndarray, fill: Mapping[str, Any]) -> None:
    if not len(values):
        panel.text(place, 0.4, "not\nmeasured", ha="center", va="bottom", fontsize=7, rotation=90)
        return
    mean, top = float(values.mean()), float(values.max())
    panel.bar(place, mean, 0.36, **fill)
    if len(values) > 1:
        std = float(values.std(ddof=1))
        panel.errorbar(place, mean, yerr=std, color=BLACK, capsize=3, linewidth=1)
        panel.plot(place + np.linspace(-0.1, 0.1, len(values)), values, markersize=3.5, **_SEEDS)
        top = max(top, mean + std)
    panel.annotate(f"{mean:.1f}", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)


@rc_context(fname=STYLE)
def gap_figure(tables: Sequence[ReportTable], gaps: Mapping[str, Sequence[GapClosed]]) -> bytes | None:
    """How much of the gap between neither and full-masks on unseen classes each row closes; None without a gap."""
    ends = (NEITHER, UPPER_BOUND)  # 0 and 100 % by definition
    drawn = {
        table.name: [gap for gap in gaps[table.name] if gap.percent is not None and gap.row not in ends]
        for table in tables
    }
    shown = [table for table in tables if drawn[table.name]]
    if not shown:
        return None
    height = 1.4 + 0.45 * max(map(len, drawn.values()))
    figure, panels = _panels(len(shown), across=2, size=(5.2, height))
    for panel, table in zip(panels, shown, strict=True):
        _gap_bars(panel, table, drawn[table.name], row_styles(tables))
    return chart(figure)


def _gap_bars(panel: Axes, table: ReportTable, gaps: Sequence[GapClosed], styles: Styles) -> None:
    labels = {row.name: row.label for row in table.rows}
    limits = np.clip([0, 100, *(share for gap in gaps for share in (gap.percent, *gap.per_seed))], *_SHARES)
    low, high = float(limits.min()), float(limits.max())
    for place, gap in enumerate(gaps):
        shares, percent = np.clip(gap.per_seed, *_SHARES), gap.percent or 0.0
        panel.barh(place, np.clip(percent, *_SHARES), 0.6, color=styles[gap.row].colour)
        if len(shares) > 1:
            panel.plot(shares, [place] * len(shares), markersize=4, **_SEEDS)
        text = f"{whole_percent(percent)}  ({gap.start:.1f} → {gap.reached:.1f} AP)"
        panel.text(high + 0.06 * (high - low), place, text, va="center", fontsize=8)
    panel.set_yticks(range(len(gaps)), [shortened(labels[gap.row]) for gap in gaps])
    panel.invert_yaxis()
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.axvline(100, color=BLACK, linewidth=1, linestyle="--")
    panel.set_xlim(low - 0.04 * (high - low), high + 0.7 * (high - low))  # room for the text
    panel.set_xticks([tick for tick in range(-300, 301, 50) if low <= tick <= high])
    ends = f"neither ({gaps[0].start:.1f} AP) to full-masks ({gaps[0].goal:.1f} AP)"
    panel.set_xlabel(f"% of the gap on unseen classes,\n{ends}")
    panel.set_title(wrapped(table.title, 58))


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


@rc_context(fname=STYLE)
def class_figure(numbers: TableNumbers, styles: Styles) -> bytes | None:
    """Mask AP per class in the order of `sorted_classes`: bar = the shown row, marks = the first row and full-masks.

    None where nothing was measured.
    """
    table, classes, main = numbers.table, numbers.classes, shown_row(numbers)
    if main is None:
        return None
    ordered = classes.loc[sorted_classes(numbers)]
    groups = {word: names for word, names in (("unseen", table.unseen), ("seen", table.seen)) if names}
    many = len(classes) > 30
    figure = new_figure(7.2, 1.7 + (0.19 if many else 0.27) * len(classes))
    heights = [len(names) + 0.6 for names in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (group, names) in zip(panels, groups.items(), strict=True):
        own = ordered.loc[[name for name in ordered.index if name in names]]
        _class_bars(panel, table, own, main, group if table.unseen else "", styles)
        panel.tick_params(axis="y", labelsize=7 if many else 8)
    panels[-1].set_xlim(left=0)  # at the end: it fixes the right limit, which is that of all panels
    panels[-1].set_xlabel("mask AP (%)")
    figure.align_ylabels(panels)
    _legend(figure, panels, columns=2, above=True)
    return chart(figure)


def _class_bars(panel: Axes, table: ReportTable, classes: pd.DataFrame, main: str, group: str, styles: Styles) -> None:
    labels = {row.name: shortened(row.label, 40) for row in table.rows}
    places = list(range(len(classes)))
    label = f"{labels[main]}, {group} classes" if group else labels[main]
    colour = GROUP_COLOURS[group] if group else styles[main].colour
    panel.barh(places, classes[main].fillna(0), 0.66, color=colour, label=label)
    if UPPER_BOUND in classes and main != UPPER_BOUND:
        panel.hlines(places, classes[main], classes[UPPER_BOUND], color=BLACK, linewidth=0.8)
    goal = GREEN if group or UPPER_BOUND not in styles else styles[UPPER_BOUND].colour
    for name, sign, edge in ((table.rows[0].name, "o", BLACK), (UPPER_BOUND, "D", goal)):
        if name in classes and name != main and classes[name].notna().any():
            edges: dict[str, Any] = {"color": "white", "markeredgecolor": edge, "markeredgewidth": 1.2}
            panel.plot(classes[name], places, sign, label=labels[name], **edges)
    panel.set_yticks(places, [shortened(str(name)) for name in classes.index])
    panel.set_ylim(len(classes) - 0.4, -0.6)
    panel.set_ylabel(f"{group} classes" if group and len(classes) > 3 else group)
    panel.grid(axis="x")


@rc_context(fname=STYLE)
def size_figure(
    table: ReportTable, measured: Mapping[str, pd.DataFrame], names: Mapping[str, str], styles: Styles
) -> bytes | None:
    """Bars of mask AP by object size, one per row, one panel per class group; error bars are std over seeds.

    Args:
        measured: words of the class group -> one line per run: column "row", and one per metric of `names`.
        names: metric, e.g. "APs" -> words under its bars. None is returned if there are none.
    """
    if not names:
        return None
    figure, panels = _panels(len(measured), across=2, size=(5.2, 3.3), sharey=True)
    width = 0.82 / len(table.rows)
    for panel, (group, frame) in zip(panels, measured.items(), strict=True):
        for index, row in enumerate(table.rows):
            values = frame.loc[frame["row"] == row.name, list(names)]
            places = np.arange(len(names)) + width * (index - (len(table.rows) - 1) / 2)
            fill = _fill(styles[row.name].colour, pale=False)
            panel.bar(places, values.mean().fillna(0), 0.92 * width, label=shortened(row.label, 40), **fill)
            if len(values) > 1:
                spread = values.std(ddof=1)
                panel.errorbar(places, values.mean(), yerr=spread, fmt="none", color=BLACK, capsize=2, linewidth=1)
        panel.set_xticks(range(len(names)), list(names.values()))
        panel.set_title(group)
        panel.grid(axis="y")
    panels[0].set_ylabel("mask AP (%)")
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels)
    return chart(figure)


@rc_context(fname=STYLE)
def threshold_figure(table: ReportTable, measured: Mapping[str, pd.DataFrame], styles: Styles) -> bytes | None:
    """Mask AP over the IoU that a match takes: a line per row, the mean over seeds, in a band of +- std.

    Args:
        measured: words of a class group, one panel each -> one line per run: column "row", and one per IoU threshold.
            None is returned if no run was measured.
    """
    if all(frame.empty for frame in measured.values()):
        return None
    figure, panels = _panels(len(measured), across=2, size=(5.0, 3.7), sharey=True)
    for panel, (group, frame) in zip(panels, measured.items(), strict=True):
        for row in table.rows:
            values, style = frame.loc[frame["row"] == row.name].drop(columns="row"), styles[row.name]
            thresholds, mean = values.columns.to_numpy(dtype=float), values.mean().to_numpy()
            if len(values) > 1:
                std = values.std(ddof=1).to_numpy()
                panel.fill_between(thresholds, mean - std, mean + std, color=style.colour, alpha=0.15, linewidth=0)
            if len(values):
                look: dict[str, Any] = {"color": style.colour, "linestyle": style.dashes, "marker": style.marker}
                # Marks at 0 are whole.
                panel.plot(thresholds, mean, clip_on=False, label=shortened(row.label, 40), **look)
        panel.set_title(group)
        panel.set_xlabel("mask IoU of a match at least")
        panel.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9])
        panel.grid()
    panels[0].set_ylabel("mask AP (%)")
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels)
    return chart(figure)


@dataclass(frozen=True)
class TrainingCurves:
    """What a run's log holds.

    Attributes:
        losses: unweighted; index step, one column per term.
        mask_ap: mask AP on all validation classes in percent, index step; empty where it was measured at the end only.
    """

    losses: pd.DataFrame
    mask_ap: pd.Series


@rc_context(fname=STYLE)
def training_figure(table: ReportTable, curves: Mapping[str, Sequence[TrainingCurves]], styles: Styles) -> bytes | None:
    """Unweighted loss terms and, where measured on the way, validation mask AP over steps; one line per run.

    Args:
        curves: row name -> its runs. None is returned if they hold no losses.
    """
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
            style = styles[name]
            marks = {"marker": style.marker, "markersize": 3.5} if drawn is validated else {}
            look: dict[str, Any] = {"color": style.colour, "linestyle": style.dashes, "linewidth": 1.1, **marks}
            panel.plot(line.index.to_numpy(), line.to_numpy(), label=shortened(label, 40), **look)
        panel.set_title(heading)
        panel.margins(x=0.03)
        panel.set_xlabel("step")
    _legend(figure, panels)
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
