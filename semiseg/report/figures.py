"""The figures of a report, made from aggregated numbers and training logs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from semiseg.report.aggregate import BEST, NEITHER, UPPER_BOUND, GapClosed, ReportTable
from semiseg.report.drawing import BLACK, BLUE, GREEN, ORANGE, ROW_COLOURS, Drawing, chart, new_figure, plain

_SHARES = (-150.0, 250.0)  # % shown of the gap; shares beyond (of a gap near 0) are drawn at the rim
CURVE_POINTS = 150  # longer curves are averaged in bins


def ap_figure(tables: Sequence[ReportTable], measured: Mapping[str, pd.DataFrame]) -> Drawing:
    """Bars of unseen and all mask AP per row, one panel per table; error bars are std, dots single seeds."""
    figure = new_figure(5.2 * len(tables) + 0.4, 4.2)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for panel, table in zip(panels, tables, strict=True):
        frame = measured[table.name]
        groups = ((-0.2, "unseen", BLUE), (0.2, "all", ORANGE)) if table.unseen else ((0.0, "all", ORANGE),)
        for offset, group, colour in groups:
            _bars(panel, table, frame, column=f"{group}_AP", offset=offset, colour=colour, label=f"{group} classes")
        panel.set_xticks(range(len(table.rows)), [_wrapped(row.label) for row in table.rows], fontsize=8.5)
        panel.set_title(_wrapped(plain(table.title), 58), fontsize=10)
        _quiet(panel)
        panel.yaxis.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylim(0, 1.14 * max(1.0, *(panel.dataLim.y1 for panel in panels)))
    panels[0].set_ylabel("mask AP (%)")
    _legend(figure, panels, place="outside lower center", columns=2)
    return chart(figure)


def _bars(
    panel: Axes, table: ReportTable, frame: pd.DataFrame, *, column: str, offset: float, colour: str, label: str
) -> None:
    for number, row in enumerate(table.rows):
        values = frame.loc[frame["row"] == row.name, column].dropna().to_numpy()
        name = label if number == 0 else None
        if not len(values):
            panel.bar(number + offset, 0, 0.38, color=colour, label=name)
            panel.text(number + offset, 0.4, "not\nmeasured", ha="center", va="bottom", fontsize=5.5, color="#555555")
            continue
        mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
        panel.bar(number + offset, mean, 0.38, color=colour, label=name)
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
    found_by_table = {
        name: [gap for gap in found if gap.percent is not None and gap.row not in ends] for name, found in gaps.items()
    }
    shown = [table for table in tables if found_by_table[table.name]]
    if not shown:
        return None
    longest = max(len(found_by_table[table.name]) for table in shown)
    figure = new_figure(5.2 * len(shown) + 0.4, 1.6 + 0.45 * longest)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, table in zip(panels, shown, strict=True):
        labels = {row.name: row.label for row in table.rows}
        found = found_by_table[table.name]
        limits = np.clip([0, 100, *(share for gap in found for share in (gap.percent, *gap.per_seed))], *_SHARES)
        text_place = float(limits.max()) + 0.06 * float(np.ptp(limits))
        for place, gap in enumerate(found):
            shares, percent = np.clip(gap.per_seed, *_SHARES), gap.percent or 0.0
            panel.barh(place, np.clip(percent, *_SHARES), 0.6, color=BLUE)
            if len(shares) > 1:
                panel.plot(shares, [place] * len(shares), "o", color="white", markeredgecolor=BLACK, markersize=4)
            text = f"{percent:.0f} %  ({gap.start:.1f} → {gap.reached:.1f} AP)"
            panel.text(text_place, place, text, va="center", fontsize=8)
        panel.set_yticks(range(len(found)), [plain(labels[gap.row]) for gap in found], fontsize=8.5)
        panel.invert_yaxis()
        panel.axvline(0, color=BLACK, linewidth=0.8)
        panel.axvline(100, color=GREEN, linewidth=1.2, linestyle="--")
        panel.set_xlim(
            float(limits.min()) - 0.04 * float(np.ptp(limits)), float(limits.max()) + 0.7 * float(np.ptp(limits))
        )  # room for the text
        panel.set_xticks([tick for tick in range(-300, 301, 50) if limits.min() <= tick <= limits.max()])
        ends_text = f"neither ({found[0].start:.1f} AP) to full-masks ({found[0].goal:.1f} AP)"
        panel.set_xlabel(f"% of the gap on unseen classes,\n{ends_text}", fontsize=9)
        panel.set_title(_wrapped(plain(table.title), 58), fontsize=10)
        _quiet(panel)
    return chart(figure)


def class_figure(table: ReportTable, classes: pd.DataFrame) -> Drawing | None:
    """Mask AP per class, sorted, unseen and seen apart: bar = the method, marks = the first row and full-masks.

    Args:
        classes: `class_measurements`. None is returned where nothing was measured.
    """
    measured = [name for name in classes.columns if classes[name].notna().any()]
    if not measured:
        return None
    main = _main_row(table, classes[measured].mean())
    marks = ((table.rows[0].name, "o", BLACK), (UPPER_BOUND, "D", GREEN))
    labels = {row.name: row.label for row in table.rows}
    words = ("unseen", "seen") if table.unseen else ("", "")
    groups = [(word, [*names]) for word, names in zip(words, (table.unseen, table.seen), strict=True) if names]
    figure = new_figure(7.2, 1.7 + 0.27 * len(classes))
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[len(names) + 0.6 for _, names in groups]
    )[:, 0]
    for panel, (word, names) in zip(panels, groups, strict=True):
        ordered = classes.loc[names].sort_values(main, ascending=False, na_position="last", kind="stable")
        places = range(len(ordered))
        colour = BLUE if word == "unseen" else ORANGE
        panel.barh(
            places, ordered[main].fillna(0), 0.66, color=colour, label=plain(labels[main]) + f" ({word})" * bool(word)
        )
        for name, sign, edge in marks:
            if name in measured and name != main:
                panel.plot(
                    ordered[name],
                    places,
                    sign,
                    color="white",
                    markeredgecolor=edge,
                    markersize=5,
                    label=plain(labels[name]),
                )
        panel.set_yticks(places, [plain(str(name)) for name in ordered.index], fontsize=8)
        panel.set_ylim(len(ordered) - 0.4, -0.6)
        panel.set_ylabel(word)
        panel.xaxis.grid(color="#dddddd", linewidth=0.6)
        _quiet(panel)
    panels[-1].set_xlim(left=0)  # at the end: it fixes the right limit, which is that of all panels
    panels[-1].set_xlabel("mask AP (%)")
    handles = {
        text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return chart(figure)


def _main_row(table: ReportTable, means: pd.Series) -> str:
    """The row that the bars show: the method, else the best of those that lack masks, the first row aside."""
    names = list(means.index)
    others = [row.name for row in table.rows[1:] if row.name in names]
    boxes = [row.name for row in table.rows[1:] if row.name in others and not row.every_mask]
    return BEST if BEST in names else str(means[boxes or others or names].idxmax())


def loss_figure(table: ReportTable, logs: Mapping[str, Sequence[Path]]) -> Drawing | None:
    """Unweighted loss terms over steps, one panel per term, one line per run in its row's colour.

    Args:
        logs: row name -> log.jsonl of its runs. None is returned if they hold no losses.
    """
    curves = [
        (number, row, curve)
        for number, row in enumerate(table.rows)
        for path in logs.get(row.name, ())
        if (curve := read_losses(path)) is not None
    ]
    terms = list(dict.fromkeys(term for *_, curve in curves for term in curve.columns if (curve[term] != 0).any()))
    if not terms:
        return None
    across = min(3, len(terms))
    down = math.ceil(len(terms) / across)
    figure = new_figure(3.5 * across, 2.5 * down + 0.6)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, term in zip(panels, terms, strict=False):
        for number, row, curve in curves:
            if term in curve and (curve[term] != 0).any():
                colour = ROW_COLOURS[number % len(ROW_COLOURS)]
                panel.plot(curve.index, curve[term], color=colour, linewidth=1, label=plain(row.label))
        panel.set_title(plain(term.replace("_", " ")), fontsize=9)
        panel.tick_params(labelsize=8)
        _quiet(panel)
    for panel in panels[len(terms) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(terms) - across) : len(terms)]:
        panel.set_xlabel("step", fontsize=8)
    handles = {
        text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return chart(figure)


def read_losses(path: Path) -> pd.DataFrame | None:
    """Unweighted losses of a run's log.jsonl: index step, one column per term; None if there are none.

    Long logs are averaged in CURVE_POINTS bins. A line cut off by an interruption ends the reading.
    """
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(record, dict) and isinstance(record.get("losses"), dict) and "step" in record:
            lines.append({"step": record["step"], **record["losses"]})
    if not lines:
        return None
    frame = pd.DataFrame(lines).fillna(0.0)
    return frame.groupby(np.arange(len(frame)) // math.ceil(len(frame) / CURVE_POINTS)).mean().set_index("step")


def _legend(
    figure: Figure,
    panels: Iterable[Axes],
    *,
    place: Literal["outside lower center", "outside upper center"],
    columns: int,
) -> None:
    """One legend for all panels, each label once."""
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(list(handles.values()), list(handles), loc=place, ncols=columns, frameon=False, fontsize=8.5)


def _wrapped(text: str, width: int = 12) -> str:
    """Breaks long labels after "+", "-" or at spaces so that they do not run into each other."""
    lines = [""]
    for part in _parts(plain(text)):
        if len(lines[-1]) + len(part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _parts(text: str) -> Iterable[str]:
    part = ""
    for sign in text:
        part += sign
        if sign in "+- ":
            yield part
            part = ""
    yield part


def _quiet(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
