"""The bar charts of a report, made from aggregated numbers: AP of rows, gaps closed, AP of classes, AP by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from semiseg.report.aggregate import NEITHER, UPPER_BOUND, GapClosed, ReportTable, TableNumbers
from semiseg.report.chart_style import (
    GRID,
    GROUP_COLOURS,
    RowStyle,
    one_legend,
    panels_of,
    quiet,
    row_styles,
    shortened,
    wrapped,
)
from semiseg.report.drawing import BLACK, GREEN, GREY, Drawing, chart, new_figure, plain
from semiseg.report.tables import whole_percent

_SHARES = (-150.0, 250.0)  # % shown of the gap; shares beyond (of a gap near 0) are drawn at the rim
_PALE = 0.35  # opacity of bars that are not of the unseen classes
Styles = Mapping[str, RowStyle]


def ap_figure(tables: Sequence[ReportTable], measured: Mapping[str, pd.DataFrame]) -> Drawing:
    """Bars of mask AP per row, one panel per table: unseen classes solid, all classes pale beside them.

    Error bars are standard deviations over seeds, dots single seeds. Without unseen classes the bars are solid.
    """
    styles = row_styles(tables)
    across = min(2, len(tables))
    figure = new_figure(5.2 * across + 0.4, 0.4 + 3.8 * -(-len(tables) // across))
    panels = panels_of(figure, len(tables), across=across, sharey=True)
    for panel, table in zip(panels, tables, strict=True):
        frame = measured[table.name]
        groups = ((-0.2, "unseen", False), (0.2, "all", True)) if table.unseen else ((0.0, "all", False),)
        for offset, group, pale in groups:
            _bars(panel, table, frame, styles, column=f"{group}_AP", offset=offset, pale=pale)
        panel.set_xticks(range(len(table.rows)), [wrapped(row.label) for row in table.rows], fontsize=8.5)
        panel.set_xlim(-0.6, len(table.rows) - 0.4)
        panel.tick_params(labelleft=True)
        panel.set_title(wrapped(plain(table.title), 58), fontsize=10)
        panel.set_ylabel("mask AP (%)")
        panel.yaxis.grid(color=GRID, linewidth=0.6)
        quiet(panel)
    panels[0].set_ylim(0, 1.14 * max(1.0, *(panel.dataLim.y1 for panel in panels)))
    if any(table.unseen for table in tables):
        kinds = {"unseen classes": False, "all classes": True}
        if not all(table.unseen for table in tables):
            kinds = {"unseen classes (where there are none: all)": False, "all classes": True}
        handles = [Patch(label=name, **_fill(GREY, pale=pale)) for name, pale in kinds.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return chart(figure)


def _fill(colour: str, *, pale: bool) -> dict[str, Any]:
    return {"facecolor": (colour, _PALE) if pale else colour, "edgecolor": colour, "linewidth": 1}


def _bars(
    panel: Axes, table: ReportTable, frame: pd.DataFrame, styles: Styles, *, column: str, offset: float, pale: bool
) -> None:
    for number, row in enumerate(table.rows):
        values = frame.loc[frame["row"] == row.name, column].dropna().to_numpy()
        if not len(values):
            panel.text(number + offset, 0.4, "not\nmeasured", ha="center", va="bottom", fontsize=7, rotation=90)
            continue
        mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
        panel.bar(number + offset, mean, 0.36, **_fill(styles[row.name].colour, pale=pale))
        top = max(mean, values.max())
        if std is not None:
            panel.errorbar(number + offset, mean, yerr=std, color=BLACK, capsize=3, linewidth=1)
            spread = np.linspace(-0.1, 0.1, len(values))
            panel.plot(number + offset + spread, values, "o", color="white", markeredgecolor=BLACK, markersize=3.5)
            top = max(top, mean + std)
        panel.annotate(
            f"{mean:.1f}", (number + offset, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )


def gap_figure(tables: Sequence[ReportTable], gaps: Mapping[str, Sequence[GapClosed]]) -> Drawing | None:
    """How much of the gap between neither and full-masks on unseen classes each row closes; None without a gap."""
    ends = (NEITHER, UPPER_BOUND)  # 0 and 100 % by definition
    found = {
        name: [gap for gap in measured if gap.percent is not None and gap.row not in ends]
        for name, measured in gaps.items()
    }
    shown = [table for table in tables if found[table.name]]
    if not shown:
        return None
    styles = row_styles(tables)
    across = min(2, len(shown))
    longest = max(len(found[table.name]) for table in shown)
    figure = new_figure(5.2 * across + 0.4, (1.6 + 0.45 * longest) * -(-len(shown) // across))
    for panel, table in zip(panels_of(figure, len(shown), across=across), shown, strict=True):
        _gap_bars(panel, table, found[table.name], styles)
    return chart(figure)


def _gap_bars(panel: Axes, table: ReportTable, found: Sequence[GapClosed], styles: Styles) -> None:
    labels = {row.name: row.label for row in table.rows}
    limits = np.clip([0, 100, *(share for gap in found for share in (gap.percent, *gap.per_seed))], *_SHARES)
    width = float(np.ptp(limits))
    for place, gap in enumerate(found):
        shares, percent = np.clip(gap.per_seed, *_SHARES), gap.percent or 0.0
        panel.barh(place, np.clip(percent, *_SHARES), 0.6, color=styles[gap.row].colour)
        if len(shares) > 1:
            panel.plot(shares, [place] * len(shares), "o", color="white", markeredgecolor=BLACK, markersize=4)
        text = f"{whole_percent(percent)}  ({gap.start:.1f} → {gap.reached:.1f} AP)"
        panel.text(float(limits.max()) + 0.06 * width, place, text, va="center", fontsize=8)
    panel.set_yticks(range(len(found)), [shortened(labels[gap.row]) for gap in found], fontsize=8.5)
    panel.invert_yaxis()
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.axvline(100, color=BLACK, linewidth=1, linestyle="--")
    panel.set_xlim(float(limits.min()) - 0.04 * width, float(limits.max()) + 0.7 * width)  # room for the text
    panel.set_xticks([tick for tick in range(-300, 301, 50) if limits.min() <= tick <= limits.max()])
    ends_text = f"neither ({found[0].start:.1f} AP) to full-masks ({found[0].goal:.1f} AP)"
    panel.set_xlabel(f"% of the gap on unseen classes,\n{ends_text}", fontsize=9)
    panel.set_title(wrapped(plain(table.title), 58), fontsize=10)
    quiet(panel)


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


def class_figure(numbers: TableNumbers, styles: Styles) -> Drawing | None:
    """Mask AP per class in the order of `sorted_classes`: bar = the shown row, marks = the first row and full-masks.

    None where nothing was measured.
    """
    table, classes, main = numbers.table, numbers.classes, shown_row(numbers)
    if main is None:
        return None
    ordered = classes.loc[sorted_classes(numbers)]
    words = ("unseen", "seen") if table.unseen else ("", "")
    groups = [(word, [*names]) for word, names in zip(words, (table.unseen, table.seen), strict=True) if names]
    many = len(classes) > 30
    figure = new_figure(7.2, 1.7 + (0.19 if many else 0.27) * len(classes))
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[len(names) + 0.6 for _, names in groups]
    )[:, 0]
    for panel, (word, names) in zip(panels, groups, strict=True):
        _class_bars(panel, table, ordered.loc[[name for name in ordered.index if name in names]], main, word, styles)
        panel.tick_params(axis="y", labelsize=7 if many else 8)
    panels[-1].set_xlim(left=0)  # at the end: it fixes the right limit, which is that of all panels
    panels[-1].set_xlabel("mask AP (%)")
    figure.align_ylabels(panels)
    one_legend(figure, panels, columns=2, place="outside upper center")
    return chart(figure)


def _class_bars(panel: Axes, table: ReportTable, classes: pd.DataFrame, main: str, word: str, styles: Styles) -> None:
    labels = {row.name: row.label for row in table.rows}
    places = list(range(len(classes)))
    colour = GROUP_COLOURS[word] if word else styles[main].colour
    bar_label = shortened(labels[main], 40) + f", {word} classes" * bool(word)
    panel.barh(places, classes[main].fillna(0), 0.66, color=colour, label=bar_label)
    goal = GREEN if word or UPPER_BOUND not in styles else styles[UPPER_BOUND].colour
    marks = ((table.rows[0].name, "o", BLACK), (UPPER_BOUND, "D", goal))
    if UPPER_BOUND in classes and main != UPPER_BOUND:
        panel.hlines(places, classes[main], classes[UPPER_BOUND], color=BLACK, linewidth=0.8)
    for name, sign, edge in marks:
        if name in classes and name != main and classes[name].notna().any():
            panel.plot(
                classes[name],
                places,
                sign,
                color="white",
                markeredgecolor=edge,
                markeredgewidth=1.2,
                markersize=4.5,
                label=shortened(labels[name], 40),
            )
    panel.set_yticks(places, [shortened(str(name)) for name in classes.index])
    panel.set_ylim(len(classes) - 0.4, -0.6)
    panel.set_ylabel(f"{word} classes" if word and len(classes) > 3 else word)
    panel.xaxis.grid(color=GRID, linewidth=0.6)
    quiet(panel)


def size_figure(
    table: ReportTable, measured: Mapping[str, pd.DataFrame], names: Mapping[str, str], styles: Styles
) -> Drawing | None:
    """Bars of mask AP by object size, one per row, one panel per class group; error bars are std over seeds.

    Args:
        measured: words of the class group -> one line per run: column "row", and one per metric of `names`.
        names: metric, e.g. "APs" -> words under its bars. None is returned if there are none.
    """
    if not names:
        return None
    figure = new_figure(5.2 * len(measured) + 0.4, 3.8)
    panels = panels_of(figure, len(measured), across=2, sharey=True)
    width = 0.82 / len(table.rows)
    for panel, (group, frame) in zip(panels, measured.items(), strict=True):
        for number, row in enumerate(table.rows):
            values = frame.loc[frame["row"] == row.name, list(names)]
            places = np.arange(len(names)) + width * (number - (len(table.rows) - 1) / 2)
            label, fill = shortened(row.label, 40), _fill(styles[row.name].colour, pale=False)
            panel.bar(places, values.mean().fillna(0), 0.92 * width, label=label, **fill)
            if len(values) > 1:
                spread = values.std(ddof=1)
                panel.errorbar(places, values.mean(), yerr=spread, fmt="none", color=BLACK, capsize=2, linewidth=1)
        panel.set_xticks(range(len(names)), list(names.values()), fontsize=8.5)
        panel.set_title(group, fontsize=10)
        panel.yaxis.grid(color=GRID, linewidth=0.6)
        quiet(panel)
    panels[0].set_ylabel("mask AP (%)")
    panels[0].set_ylim(bottom=0)
    one_legend(figure, panels, columns=3)
    return chart(figure)
