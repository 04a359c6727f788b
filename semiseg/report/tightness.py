"""How tightly the masks of each row fill the boxes of what they found: table, dots per class and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from semiseg.evaluation.tightness import ClassTightness, class_tightness, true_tightness
from semiseg.report.aggregate import GROUPS, ReportInput, ReportRow, ReportTable, TableNumbers
from semiseg.report.chart_style import RowStyle, row_styles
from semiseg.report.context import PageContext
from semiseg.report.drawing import Drawing, chart, new_figure, plain
from semiseg.report.stored import missing_note
from semiseg.report.tables import escape_markdown, markdown_table, number
from semiseg.results import Result

_TRUTH = "ground truth"

PerClass = Mapping[str, Sequence[float]]  # class -> number of objects, projection error in percent


@dataclass(frozen=True)
class RowTightness:
    """The projection errors of one row.

    Attributes:
        label: as people read it.
        errors: percent: one line per seed (index), one column per class of the table; NaN where no object was found.
        objects: that were found, in the same places.
    """

    label: str
    errors: pd.DataFrame
    objects: pd.DataFrame

    def group(self, classes: Sequence[str]) -> pd.Series:
        """Means over classes, one per seed."""
        return self.errors[list(classes)].mean(axis=1)


def tightness_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The projection error of every row by class; nothing where detections or masks were never at hand."""
    table = numbers.table
    measured = {row.name: found for row in table.rows if (found := _row_tightness(page, table, row)) is not None}
    if not measured:
        return []
    rows, styles = list(measured.values()), row_styles(page.report.tables)
    truth = _true_masks(page, table)
    return [
        "### How tightly the masks fill their boxes",
        _order(rows, table),
        "The projection error is 1 − Dice between the projections of mask and box, averaged over x and y: the "  # noqa: RUF001
        "projection loss, measured on the stored binary masks. The box is that of the object, which the loss is "
        "trained with, and all detections count that found one (box IoU of at least 0.5, matched as COCO does). 0 % = "
        "the mask reaches from side to side of the box and no further. Numbers are means over classes.",
        _table(rows, truth, table),
        *missing_note(_missing(page.report, rows, table)),
        *page.figures.show(
            f"{table.name}_tightness",
            tightness_figure(rows, [styles[name] for name in measured], table),
            alt=f"projection error by class and row, {table.name}",
            caption="Projection error in percent, mean over seeds; less is tighter.",
        ),
    ]


def _missing(report: ReportInput, rows: Sequence[RowTightness], table: ReportTable) -> list[str]:
    """Rows and seeds that were recorded but not measured."""
    seeds = {row.label: row.errors.index for row in rows}
    return [
        f"{row.label} seed {seed}"
        for row in table.rows
        for seed in report.seeds
        if (table.name, row.name, seed) in report.results and seed not in seeds.get(row.label, ())
    ]


def _order(rows: Sequence[RowTightness], table: ReportTable) -> str:
    """The rows by their error, the tightest first."""
    group, classes = ("unseen", table.unseen) if table.unseen else ("all", table.seen)
    means = {row.label: float(row.group(classes).mean()) for row in rows}
    found = sorted((mean, label) for label, mean in means.items() if not math.isnan(mean))
    if not found:
        return f"No object of {group} classes was found by any row."
    text = f"By mean projection error on {group} classes: {escape_markdown(found[0][1])} {found[0][0]:.1f} %"
    for (before, _), (mean, label) in pairwise(found):
        sign = "=" if f"{before:.1f}" == f"{mean:.1f}" else "<"
        text += f" {sign} {escape_markdown(label)} {mean:.1f} %"
    return text + "."


def _table(rows: Sequence[RowTightness], truth: RowTightness | None, table: ReportTable) -> str:
    classes = {"all": (*table.unseen, *table.seen), "unseen": table.unseen, "seen": table.seen}
    groups = GROUPS if table.unseen else GROUPS[:1]
    lines = []
    for row in (*rows, *([truth] if truth else [])):
        values = [row.group(classes[group]) for group in groups]
        cells = [number(value.mean(), value.std(ddof=1) if len(value) > 1 else None) for value in values]
        lines.append([row.label, *cells, f"{row.objects.sum(axis=1).mean():.0f}"])
    headings = [f"{group}: error (%)" for group in groups] if table.unseen else ["error (%)"]
    return markdown_table(("row", *headings, "objects found"), lines)


def _row_tightness(page: PageContext, table: ReportTable, row: ReportRow) -> RowTightness | None:
    """Over the seeds whose detections were measured."""
    found = {}
    for seed in page.report.seeds:
        if (run := page.report.results.get((table.name, row.name, seed))) is None:
            continue

        def measure(run: Result = run) -> PerClass | None:
            stored = page.stored
            truth, results, matches = stored.truth(), stored.of(run), stored.found(run)
            if truth is None or results is None or matches is None:
                return None
            return _plain(class_tightness(truth, results, matches))

        if (value := page.measured.get("tightness", run.trained_as, measure)) is not None:
            found[seed] = value
    return _frames(row.label, found, table)


def _true_masks(page: PageContext, table: ReportTable) -> RowTightness | None:
    """The objects' own masks; the same for all runs, which have the data in common."""
    prints = {run.data_fingerprint for (name, *_), run in page.report.results.items() if name == table.name}
    if len(prints) != 1:
        return None

    def measure() -> PerClass | None:
        truth = page.stored.truth()
        return None if truth is None else _plain(true_tightness(truth))

    value = page.measured.get("tightness", f"{_TRUTH}|{prints.pop()}", measure)
    return _frames(_TRUTH, {} if value is None else {0: value}, table)


def _frames(label: str, found: Mapping[int, PerClass], table: ReportTable) -> RowTightness | None:
    if not found:
        return None
    classes = [*table.unseen, *table.seen]
    objects = [[item.get(name, (0, 0.0))[0] for name in classes] for item in found.values()]
    errors = [[item[name][1] if name in item else math.nan for name in classes] for item in found.values()]
    frames = (pd.DataFrame(values, index=list(found), columns=classes) for values in (errors, objects))
    return RowTightness(label, *frames)


def _plain(measured: Mapping[str, ClassTightness]) -> dict[str, list[float]]:
    """For JSON, without classes of which nothing was found."""
    return {
        name: [value.objects, round(100 * value.error, 3)]
        for name, value in measured.items()
        if value.error is not None
    }


def tightness_figure(rows: Sequence[RowTightness], styles: Sequence[RowStyle], table: ReportTable) -> Drawing:
    """One line per class, one dot per row; unseen and seen classes apart, each sorted by the mean of all rows."""
    means = pd.DataFrame({place: row.errors.mean() for place, row in enumerate(rows)})
    groups = [(word, list(names)) for word, names in (("unseen", table.unseen), ("seen", table.seen)) if names]
    figure = new_figure(7.2, 1.6 + 0.27 * len(means))
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[len(names) + 0.6 for _, names in groups]
    )[:, 0]
    for panel, (word, names) in zip(panels, groups, strict=True):
        ordered = means.loc[names]
        ordered = ordered.loc[ordered.mean(axis=1).sort_values(kind="stable", na_position="last").index]
        places = range(len(ordered))
        for place, (row, style) in enumerate(zip(rows, styles, strict=True)):
            apart = 0.5 * ((place + 0.5) / len(rows) - 0.5)  # rows of a class do not cover each other
            heights = [line + apart for line in places]
            dots = {"marker": style.marker, "color": style.colour}
            panel.plot(ordered[place], heights, linestyle="none", markersize=5, label=plain(row.label), **dots)
        panel.set_yticks(places, [plain(str(name)) for name in ordered.index], fontsize=8)
        panel.set_ylim(len(ordered) - 0.4, -0.6)
        panel.set_ylabel(word if table.unseen else "")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    panels[-1].set_xlim(left=0)  # at the end: it fixes the right limit, which is that of all panels
    panels[-1].set_xlabel("projection error (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return chart(figure)
