"""From recorded runs to the numbers of a report: means and deviations over seeds, gaps closed, paired differences.

Everything is in percent AP. A *cell* is (table, row, seed); a run may fill cells of several tables (the box-supervised
and the full-masks runs do not depend on the split). Nothing here knows how a study plans its runs. Whether a difference
is resolved is said over seeds by Student's t, over images by the bootstrap (`uncertainty.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # scipy.stats.t.ppf, without the second that scipy.stats takes to load

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import METRIC_NAMES, Metrics
from semiseg.evaluation.matching import Interval
from semiseg.results import Result
from semiseg.structures.objects import Crowds

NEITHER, BEST, LEARNED, UPPER_BOUND = "neither", "projection+pairwise", "learned", "full-masks"

GROUPS = ("all", "unseen", "seen")
TABLE_METRICS = ("AP", "AP50", "AP75")
METRIC_COLUMNS = tuple(f"{group}_{metric}" for group in GROUPS for metric in TABLE_METRICS)
TEXT_COLUMNS = ("row", "projection", "pairwise")
CSV_COLUMNS = (*TEXT_COLUMNS, "seeds", *METRIC_COLUMNS, *(f"{column}_std" for column in METRIC_COLUMNS))
_MEASURED = [f"{group}_{metric}" for group in GROUPS for metric in METRIC_NAMES]
_RESOLVES_NOTHING = {1: "one seed cannot resolve small differences", 2: "two seeds have no interval"}


@dataclass(frozen=True)
class ReportRow:
    """One row of a table."""

    name: str  # as in the CSV, e.g. "projection+pairwise"
    projection: str  # "yes", "no" or "" (does not apply): whether box-supervised instances get this term
    pairwise: str  # likewise
    label: str  # what people read in tables and figures
    meaning: str = ""  # what the row trains with, in words
    every_mask: bool = False  # whether it has the mask of every object: a bound for rows that lack some


@dataclass(frozen=True)
class ReportTable:
    """One table: rows measured on the class groups of one split."""

    name: str  # also its file name: letters, digits, "_" and "-"
    title: str
    split: str  # "" where the rows do not depend on a split; then every class is a seen one
    split_digest: str  # likewise
    seen: tuple[str, ...]  # class names with masks
    unseen: tuple[str, ...]  # with boxes only
    # Number or name of the paper's table whose printed numbers stand beside ours, as in the CSV; or None
    published: str | None
    rows: tuple[ReportRow, ...]
    # Pairs of rows whose difference is shown; empty = the usual ones (`compared_pairs`)
    compare: tuple[tuple[str, str], ...] = ()
    alike: bool = True  # whether the rows differ in supervision and mask losses alone, not in network, data or schedule
    # Settings in which the rows are meant to differ beside these, such as "model.backbone"
    varied: tuple[str, ...] = ()

    @property
    def main_groups(self) -> tuple[str, ...]:
        """The class groups that the table is about, the first of all "unseen", where there are such."""
        return ("unseen", "all") if self.unseen else ("all",)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Class group -> its classes, without groups that have none."""
        groups = {"all": self.seen + self.unseen, "unseen": self.unseen, "seen": self.seen}
        return {name: classes for name, classes in groups.items() if classes}


@dataclass(frozen=True)
class ReportInput:
    """All that a report is made from; the caller has read it from the study and its recorded results."""

    study: str
    title: str
    question: str  # one sentence
    seeds: tuple[int, ...]  # those the study asks for
    tables: tuple[ReportTable, ...]
    # (table name, row name, seed) -> the run that fills this cell; missing keys are missing cells
    results: Mapping[tuple[str, str, int], Result]
    data: str  # in words for the protocol, a sentence or two
    schedule: str  # likewise
    pretraining: str | None  # the detector that the rows start from, in words, or None if there is none
    run_command: str  # what fills missing cells; "" if nothing does
    report_command: str  # what rebuilds the report
    pretraining_results: tuple[Result, ...] = ()  # runs whose weights the rows start from, for the provenance
    initial: str = "random weights"  # the weights that the rows start from if there is no such detector
    paper_data: bool = False  # whether these are the data of the printed numbers
    # The files that the results were read from, as the page names them
    records: tuple[str, ...] = ("`results.jsonl` beside this file",)
    notes: tuple[str, ...] = ()  # what else a reader must know before the numbers, a sentence or two each, in Markdown
    # Run id -> folder with log.jsonl and detections.json; folders may be gone
    run_folders: Mapping[str, Path] = field(default_factory=dict)
    val_annotations: Path | None = None  # for the pictures, as is the other; may be None or gone
    val_images: Path | None = None
    val_crowds: Crowds = "ignore"  # what their `iscrowd` 1 means
    pixels_of: Callable[[Path], np.ndarray] | None = None  # image file -> (H, W, 3) uint8 RGB as its run saw it
    pictures: bool = True  # False: none, and an earlier report's are removed, as where photographs must not be copied

    def cells(self, table: ReportTable) -> list[tuple[str, int, Result]]:
        """(row name, seed, run) of every recorded cell of a table, in the order of rows and seeds."""
        keys = [(table.name, row.name, seed) for row in table.rows for seed in self.seeds]
        return [
            (row, seed, run) for name, row, seed in keys if (run := self.results.get((name, row, seed))) is not None
        ]

    def runs(self) -> list[Result]:
        """The runs behind the cells, each once, in the order of tables, rows and seeds."""
        return list({run.run_id: run for table in self.tables for *_, run in self.cells(table)}.values())


def recorded_metrics(result: Result) -> Metrics:
    """The numbers of a run; a `UserError` that names it if they cannot be read."""
    try:
        return Metrics.from_dict(result.metrics)
    except UserError as error:
        raise UserError(f"recorded run {result.run_id} ({result.row}, seed {result.seed}): {error}") from None


def measurements(report: ReportInput, table: ReportTable, *, iou_type: str = "segm") -> pd.DataFrame:
    """One line per measured cell of a table: row, seed, and `METRIC_NAMES` of each of GROUPS (NaN = not measured)."""
    lines = []
    for row, seed, result in report.cells(table):
        line: dict[str, object] = {"row": row, "seed": seed}
        metrics = recorded_metrics(result)
        for group, classes in table.groups.items():
            line |= {f"{group}_{metric}": value for metric, value in metrics.group(iou_type, classes).items()}
        lines.append(line)
    return pd.DataFrame(lines, columns=["row", "seed", *_MEASURED]).astype(dict.fromkeys(_MEASURED, float))


def class_measurements(report: ReportInput, table: ReportTable) -> pd.DataFrame:
    """Mean mask AP over seeds: one line per class of the table (index), one column per row; NaN = not measured."""
    classes = [*table.unseen, *table.seen]
    lines = []
    for row, _, result in report.cells(table):
        segm = recorded_metrics(result).segm
        measured = {name: numbers["AP"] for name, numbers in segm.classes.items() if numbers} if segm else {}
        lines.append({"row": row, **measured})
    frame = pd.DataFrame(lines, columns=["row", *classes]).astype(dict.fromkeys(classes, float))
    return frame.groupby("row")[classes].mean().reindex([row.name for row in table.rows]).T


def over_seeds(measured: pd.DataFrame, table: ReportTable) -> pd.DataFrame:
    """Mean of every column but `row`, and as `_std` its sample deviation (n - 1), by row of the table; NaN = none."""
    grouped = measured.groupby("row")
    joined = grouped.mean().join(grouped.std(ddof=1).add_suffix("_std"))
    return joined.reindex([row.name for row in table.rows])


def summarise(measured: pd.DataFrame, table: ReportTable) -> pd.DataFrame:
    """One line per row of the table, in its order: TEXT_COLUMNS, seeds, and `measurements` over them (`over_seeds`)."""
    rows = pd.DataFrame([(row.name, row.projection, row.pairwise) for row in table.rows], columns=TEXT_COLUMNS)
    counts = measured.groupby("row")["seed"].nunique().reindex(rows["row"], fill_value=0).rename("seeds")
    numbers = over_seeds(measured.drop(columns="seed"), table)
    return rows.set_index("row").join([counts, numbers]).reset_index()


def compared_pairs(table: ReportTable) -> list[tuple[str, str]]:
    """The table's own pairs; else each row with the next one and the comparisons that the table stands or falls with.

    These are, with unseen classes, those between neither, the method and full-masks; without, each row with the first.
    """
    names = [row.name for row in table.rows]
    if table.compare:
        return list(table.compare)
    if table.unseen:
        extra = [(NEITHER, BEST), (BEST, UPPER_BOUND), (LEARNED, UPPER_BOUND), (NEITHER, UPPER_BOUND)]
    else:
        extra = [(names[0], name) for name in names[1:]]
    pairs = list(pairwise(names))
    return pairs + [pair for pair in extra if pair not in pairs and set(pair) <= set(names)]


@dataclass(frozen=True)
class GapClosed:
    """How much of the way from `neither` to `full-masks` on unseen classes a row goes."""

    row: str
    start: float  # mean unseen AP of neither over the seeds that neither, the row and full-masks have
    reached: float  # of the row
    goal: float  # of full-masks
    per_seed: tuple[float, ...]  # percent for each of these seeds whose own gap is positive
    # 95 % interval of the percentage over images, where the gap itself is resolved over them
    image_interval: Interval | None = None

    @property
    def percent(self) -> float | None:
        """None if full-masks is not above neither: there is no gap to close."""
        return 100 * (self.reached - self.start) / (self.goal - self.start) if self.goal > self.start else None


def gap_closed(measured: pd.DataFrame, row: str) -> GapClosed | None:
    """None if neither, full-masks or the row itself was not measured with a common seed."""
    common = _paired(measured, NEITHER, UPPER_BOUND, row, group="unseen")
    if common.empty:
        return None
    gaps = common[UPPER_BOUND] - common[NEITHER]
    per_seed = (100 * (common[row] - common[NEITHER]) / gaps)[gaps > 0]
    mean = common.mean()
    return GapClosed(row, mean[NEITHER], mean[row], mean[UPPER_BOUND], tuple(per_seed))


@dataclass(frozen=True)
class Difference:
    """`second` minus `first` in one metric, seed by seed."""

    first: str
    second: str
    group: str
    values: tuple[float, ...]  # one difference per seed measured for both rows
    # 95 % interval of the mean over resampled validation images; None where it was not measured
    image_interval: Interval | None = None

    @property
    def mean(self) -> float | None:
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for fewer than two."""
        return float(pd.Series(self.values).std(ddof=1)) if len(self.values) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the mean over seeds by Student's t; None for fewer than three seeds."""
        mean, std, count = self.mean, self.std, len(self.values)
        if mean is None or std is None or count < 3:
            return None
        half = float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count)
        return mean - half, mean + half

    @property
    def unresolved_over(self) -> tuple[str, ...]:
        """What the intervals that contain 0 are over: "seeds", "images", both or nothing."""
        intervals = {"seeds": self.interval, "images": self.image_interval}
        return tuple(name for name, ends in intervals.items() if ends is not None and ends[0] <= 0 <= ends[1])

    @property
    def resolved(self) -> bool | None:
        """Whether every interval that there is leaves out 0; None when there is none.

        What the interval over images resolves alone, with fewer than three seeds, it resolves for these networks only.
        """
        if self.interval is None and self.image_interval is None:
            return None
        return not self.unresolved_over

    @property
    def reading(self) -> str:
        """What one may conclude from it."""
        count = len(self.values)
        if count == 0:
            return "not measured"
        if self.resolved is None:
            return f"{_RESOLVES_NOTHING[count]}: no claim"
        if not self.resolved:
            return f"not resolved over {' and '.join(self.unresolved_over)}"
        direction = "higher" if (self.mean or 0) > 0 else "lower"
        return f"resolved: {direction}" if self.interval is not None else f"resolved over images only: {direction}"


def difference(measured: pd.DataFrame, first: str, second: str, *, group: str) -> Difference:
    """Paired over the seeds that both rows have; `measured` is from `measurements`."""
    values = _paired(measured, first, second, group=group)
    return Difference(first, second, group, tuple(values[second] - values[first]))


def _paired(measured: pd.DataFrame, *rows: str, group: str) -> pd.DataFrame:
    """AP of these rows (columns) by seed, of the seeds that all of them have."""
    values = measured.pivot(index="seed", columns="row", values=f"{group}_AP")
    return values.reindex(columns=list(dict.fromkeys(rows))).dropna()


@dataclass(frozen=True)
class TableNumbers:
    """Everything that a report says of one table in numbers."""

    table: ReportTable
    measured: pd.DataFrame  # `measurements` of masks
    summary: pd.DataFrame  # these over seeds (`summarise`)
    box_summary: pd.DataFrame  # the same of boxes
    classes: pd.DataFrame  # `class_measurements`
    # 95 % intervals over resampled validation images, as far as measured: rows -> class group -> interval. Of (row,):
    # the mean AP over seeds; of (first, second): the mean of second minus first over the seeds that both have; of (row,
    # neither, full-masks): the percentage of the gap on unseen classes that the row closes, where the gap itself is
    # resolved over images.
    intervals: Mapping[tuple[str, ...], Mapping[str, Interval]] = field(default_factory=dict)

    def mean(self, row: str, column: str) -> float | None:
        """A number of the summary, e.g. column "unseen_AP"; None if it was not measured."""
        values = self.summary.loc[self.summary["row"] == row, column].dropna()
        return float(values.iloc[0]) if len(values) else None

    def main_row(self, among: Collection[str]) -> str:
        """The row that the page is about: the method, else the best one by the table's main AP.

        Of the rows named by `among`, those that have every mask, and the first row of the table, with which others are
        compared, count only if there is no other.
        """
        rows = [row for row in self.table.rows if row.name in among]
        lacking = [row for row in rows if not row.every_mask] or rows
        others = [row for row in lacking if row != self.table.rows[0]] or lacking
        candidates = [row for row in rows if row.name == BEST] or others
        column = f"{self.table.main_groups[0]}_AP"
        means = {row.name: mean for row in candidates if (mean := self.mean(row.name, column)) is not None}
        return max(means, key=lambda name: means[name]) if means else candidates[0].name

    def interval(self, *rows: str, group: str) -> Interval | None:
        """That of `intervals`; None where it was not measured."""
        return self.intervals.get(rows, {}).get(group)

    def between(self, first: str, second: str, group: str) -> Difference:
        """Of any two rows."""
        step = difference(self.measured, first, second, group=group)
        return replace(step, image_interval=self.interval(first, second, group=group))

    @property
    def differences(self) -> list[Difference]:
        """Of `compared_pairs`, on unseen and on all classes."""
        pairs = compared_pairs(self.table)
        return [self.between(*pair, group) for group in self.table.main_groups for pair in pairs]

    @property
    def gaps(self) -> list[GapClosed]:
        """Of every row that has the runs for it, in the table's order."""
        gaps = [gap for row in self.table.rows if (gap := gap_closed(self.measured, row.name)) is not None]
        shares = (self.interval(gap.row, NEITHER, UPPER_BOUND, group="unseen") for gap in gaps)
        return [replace(gap, image_interval=share) for gap, share in zip(gaps, shares, strict=True)]


def table_numbers(report: ReportInput, table: ReportTable) -> TableNumbers:
    """Aggregates the recorded runs of one table."""
    measured, boxes = (measurements(report, table, iou_type=iou_type) for iou_type in ("segm", "bbox"))
    summary, box_summary = summarise(measured, table), summarise(boxes, table)
    return TableNumbers(table, measured, summary, box_summary, class_measurements(report, table))
