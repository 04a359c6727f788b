"""The sections of a report about one table, and its answer: numbers, printed ones, gaps, differences, AP by what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from semiseg.evaluation.matching import IOU_THRESHOLDS, RESAMPLES, Interval
from semiseg.evaluation.voc_metrics import VOC_THRESHOLDS
from semiseg.report.aggregate import (
    BEST,
    LEARNED,
    NEITHER,
    UPPER_BOUND,
    ReportInput,
    ReportRow,
    ReportTable,
    TableNumbers,
    over_seeds,
    recorded_metrics,
)
from semiseg.report.context import PageContext
from semiseg.report.figures import (
    TrainingCurves,
    class_gaps,
    read_curves,
    row_styles,
    shown_row,
    sorted_classes,
    training_figure,
)
from semiseg.report.published import beside_printed, data_name, printed_difference, published_section
from semiseg.report.tables import (
    MINUS,
    best_cells,
    best_sentence,
    escape_markdown,
    layout,
    markdown_table,
    number,
    number_cells,
    signed,
    whole_percent,
)
from semiseg.report.uncertainty import thresholds_of

SMALL_GAP = 5.0  # AP; shares of a smaller gap that is not resolved over seeds say little
_PRINTED_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def answer(tables: Sequence[TableNumbers]) -> str:
    """How much of the gap on unseen classes the method closes, or, without such, which rows are best."""
    asked = [numbers for numbers in tables if _asks_for_the_gap(numbers.table)]
    text = "; ".join(_gap_clause(numbers, BEST) for numbers in asked or ())
    if asked:
        text = f"of the gap between neither and full-masks on unseen classes projection + pairwise closes {text}"
        learned = [numbers for numbers in asked if LEARNED in {row.name for row in numbers.table.rows}]
        if learned:
            text += f". Learned affinity closes {'; '.join(_gap_clause(numbers, LEARNED) for numbers in learned)}"
    else:
        titles = [f"{escape_markdown(numbers.table.title)}: " if len(tables) > 1 else "" for numbers in tables]
        text = "; ".join(title + _best_clause(numbers) for title, numbers in zip(titles, tables, strict=True))
    notes = []
    if any(gap.row == BEST and gap.image_interval for numbers in asked for gap in numbers.gaps):
        notes.append("in brackets: 95 % interval over images")
    if max((int(numbers.summary["seeds"].max()) for numbers in asked or tables), default=0) == 1:
        notes.append("one seed: differences over seeds are not resolved")
    if notes:
        text += f" ({'; '.join(notes)})"
    return f"{text[:1].upper()}{text[1:]}."


def _asks_for_the_gap(table: ReportTable) -> bool:
    return bool(table.unseen) and {NEITHER, BEST, UPPER_BOUND} <= {row.name for row in table.rows}


def _gap_clause(numbers: TableNumbers, row: str) -> str:
    table = numbers.table
    where = f"with {len(table.seen)} of {len(table.seen) + len(table.unseen)} classes seen"
    gap = next((gap for gap in numbers.gaps if gap.row == row), None)
    if gap is None:
        missing = [name for name in (NEITHER, row, UPPER_BOUND) if numbers.mean(name, "unseen_AP") is None]
        lacking = f"{', '.join(missing)} not measured on unseen classes" if missing else "no seed has all three rows"
        return f"{where} a share that is not known yet ({lacking})"
    values = f"{gap.start:.1f} → {gap.reached:.1f} AP, full-masks {gap.goal:.1f}"
    if gap.percent is None:
        return f"{where} nothing: there is no gap, full-masks is not above neither ({values})"
    share = whole_percent(gap.percent)
    if gap.image_interval is not None:
        share += " [{:.0f}, {:.0f}]".format(*gap.image_interval).replace("-", MINUS)
    text = f"{where} {share} ({values})"
    steps = {"the step": (NEITHER, row), "what is left to full-masks": (row, UPPER_BOUND)}
    for words, pair in steps.items():
        step = numbers.between(*pair, "unseen")
        if step.resolved is False:
            text += f", {words} is {step.reading}"
    caution = gap_caution(numbers)
    return text if caution is None else f"{text}, but {caution}"


def gap_caution(numbers: TableNumbers) -> str | None:
    """Why shares of the gap between neither and full-masks should not be taken at their word, or None."""
    whole = numbers.between(NEITHER, UPPER_BOUND, "unseen")
    if whole.mean is None or whole.mean <= 0:
        return None
    if whole.resolved is False:
        return f"the gap itself ({whole.mean:.1f} AP) is {whole.reading}"
    if whole.interval is None and whole.mean < SMALL_GAP:
        return f"the gap itself is only {whole.mean:.1f} AP: too few seeds to resolve it"
    return None


def _best_clause(numbers: TableNumbers) -> str:
    """The best row among those that lack masks, how far it is from the next, and rows with every mask beside it."""
    means = {row: mean for row in numbers.table.rows if (mean := numbers.mean(row.name, "all_AP")) is not None}
    if not means:
        return "not answered yet (nothing was measured)"
    ordered = sorted(means, key=lambda row: -means[row])
    others = [row for row in ordered if not row.every_mask] or ordered
    best = others[0]
    text = f"highest mean mask AP: {_with_ap(best, means[best])}"
    if len(others) > 1:
        step = numbers.between(best.name, others[1].name, "all")
        text += f", then {_with_ap(others[1], means[others[1]])} ({number(step.mean, sign=True)}, {step.reading})"
    bounds = [row for row in ordered if row not in others]
    if bounds:
        text += f"; with every mask: {', '.join(_with_ap(row, means[row]) for row in bounds)}"
    return text


def _with_ap(row: ReportRow, mean: float) -> str:
    return f"{escape_markdown(row.label)} {number(mean)}"


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
        *published_section(report, numbers, page.printed),
        *_gap_section(numbers),
        *uncertainty_section(report, numbers),
        *difference_section(report, numbers, page.printed),
        *_box_section(numbers),
        *_edge_section(report, numbers),
        *_voc_section(report, numbers),
    ]


def _gap_section(numbers: TableNumbers) -> list[str]:
    labels = {row.name: row.label for row in numbers.table.rows}
    if not numbers.table.unseen or not {NEITHER, UPPER_BOUND} <= set(labels):
        return []
    heading = "### How much of the gap on unseen classes each row closes"
    if not numbers.gaps:
        return [heading, "Not measured: it needs `neither` and `full-masks` with a common seed."]
    text = "The gap is full-masks minus neither on unseen classes, over the seeds that both and the row have."
    if caution := gap_caution(numbers):
        text += f" **Note:** {caution}; shares of it say little."
    measured = any(gap.image_interval for gap in numbers.gaps)
    lines = []
    for gap in numbers.gaps:
        share = "no gap" if gap.percent is None else whole_percent(gap.percent)
        if gap.percent is not None and len(gap.per_seed) > 1:
            share += f" ± {pd.Series(gap.per_seed).std(ddof=1):.0f}"
        gain = number(gap.reached - gap.start, sign=True)
        interval = [_range(gap.image_interval, sign=False, digits=0)] if measured else []
        lines.append([labels[gap.row], number(gap.start), number(gap.reached), gain, share, *interval])
    headings = ("row", "neither AP", "row AP", "gain", "gap closed", *(["95 % over images"] if measured else []))
    return [heading, text, markdown_table(headings, lines)]


def _range(interval: Interval | None, *, sign: bool = True, digits: int = 1) -> str:
    if interval is None:
        return "—"
    return " … ".join(signed(end, digits) if sign else f"{end:.{digits}f}".replace("-", MINUS) for end in interval)


def uncertainty_section(report: ReportInput, numbers: TableNumbers) -> list[str]:
    """The AP of every row with its interval over images; nothing where it was not measured."""
    if not numbers.intervals:
        return []
    groups = _groups(numbers)
    lines = []
    for row in numbers.table.rows:
        intervals = {group: numbers.interval(row.name, group=group) for group in groups}
        means = [
            f"{number(numbers.mean(row.name, f'{group}_AP'))} [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "—"
            for group, ends in intervals.items()
        ]
        lines.append([row.label, *means])
    images = report.cells(numbers.table)[0][-1].metrics["images"]
    drawn = f"{RESAMPLES} resamples of the {images} images with replacement"
    text = f"In brackets the 95 % interval over {drawn}, of the mean over seeds."
    return ["### Uncertainty over validation images", text, markdown_table(("row", *groups.values()), lines)]


def _groups(numbers: TableNumbers) -> dict[str, str]:
    """Class group -> heading."""
    if not numbers.table.unseen:
        return {"all": "AP"}
    return {group: f"{group} AP" for group in ("all", "unseen", "seen")}


def difference_section(report: ReportInput, numbers: TableNumbers, printed: pd.DataFrame) -> list[str]:
    """Every compared pair of rows: the difference, its intervals and whether it is resolved."""
    table, differences = numbers.table, numbers.differences
    if not differences:
        return []
    labels = {row.name: row.label for row in table.rows}
    columns = {
        "difference": [f"{labels[item.second]} − {labels[item.first]}" for item in differences],  # noqa: RUF001
        "classes": [item.group for item in differences],
        "AP": [number(item.mean, item.std, sign=True) for item in differences],
        "95 % over seeds": [_range(item.interval) for item in differences],
        "95 % over images": [_range(item.image_interval) for item in differences],
        "reading": [item.reading for item in differences],
    }
    if not table.unseen:
        del columns["classes"]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"—"}}  # intervals that nothing has
    if table.published:
        whose = "printed" if report.paper_data else f"{data_name(printed, table)}, printed"
        columns[whose] = [printed_difference(printed, table.published, item) for item in differences]
    text = (
        "Differences of AP, paired by seed: mean ± standard deviation. A difference is called resolved if every 95 % "
        "interval that there is leaves out 0: over seeds (Student's t, at least three) and over validation images (the "
        "same resamples for both rows; about these networks alone). No correction for the number of pairs."
    )
    shown = markdown_table(list(columns), zip(*columns.values(), strict=True), texts=2 if table.unseen else 1)
    return ["### Which differences are resolved", text, shown]


def _box_section(numbers: TableNumbers) -> list[str]:
    groups = _groups(numbers)
    lines = number_cells(numbers.table, numbers.box_summary, [f"{group}_AP" for group in groups])
    text = [] if numbers.table.alike else ["Rows differ in network, data or schedule: so may their boxes."]
    headings = ("row", *(heading.replace("AP", "box AP") for heading in groups.values()))
    return ["### Box AP", *text, markdown_table(headings, lines)]


def _edge_section(report: ReportInput, numbers: TableNumbers) -> list[str]:
    shown = {"learned_auc": "AUC, learned", "colour_auc": "AUC, colour", "calibration_error": "calibration error"}
    lines = []
    for row in numbers.table.rows:
        runs = [run.edges for name, _, run in report.cells(numbers.table) if name == row.name and run.edges]
        for group in ("seen", "unseen"):
            measured = pd.DataFrame([edges[group] for edges in runs if group in edges], columns=list(shown))
            if len(measured):
                means, deviations = measured.mean(), measured.std()
                lines.append([row.label, group, *(number(means[key], deviations[key]) for key in shown)])
    if not lines:
        return []
    text = (
        "Edges between cells at the validation objects of seen and of unseen classes, in percent. AUC: how often an "
        "edge that separates instances has the higher score, or the greater distance of colours, than one that does "
        "not. Calibration error: how far the learned probabilities lie from what is true, by twentieths."
    )
    return ["### Learned edges", text, markdown_table(("row", "classes", *shown.values()), lines, texts=2)]


def _voc_section(report: ReportInput, numbers: TableNumbers) -> list[str]:
    lines = []
    for row in numbers.table.rows:
        found = [run.metrics.get("voc") for name, _, run in report.cells(numbers.table) if name == row.name]
        runs = [numbers_of for numbers_of in found if numbers_of]
        if runs:
            measured = pd.DataFrame(runs)
            means, deviations = measured.mean(), measured.std()
            lines.append([row.label, *(number(means[key], deviations[key]) for key in VOC_THRESHOLDS)])
    if not lines:
        return []
    text = (
        "Mask AP as BBTP's and SDI's papers count it: void pixels and difficult objects left out, all points of recall."
    )
    return ["### By VOC's own rules", text, markdown_table(("row", *VOC_THRESHOLDS), lines)]


def class_section(_: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP per class."""
    table, gaps, main = numbers.table, class_gaps(numbers), shown_row(numbers)
    labels = {row.name: row.label for row in table.rows}
    classes = numbers.classes.loc[sorted_classes(numbers)]
    headings = ["class", *(["group"] if table.unseen else []), *labels.values(), *(["gap"] if gaps is not None else [])]
    lines = []
    for name, values in zip(classes.index, classes.to_numpy(), strict=True):
        group = ["unseen" if name in table.unseen else "seen"] if table.unseen else []
        gap = [] if gaps is None else [number(gaps[name], sign=True)]
        lines.append([str(name), *group, *map(number, values), *gap])
    text = []
    if main is not None:
        by = f"AP of {labels[main]}" if gaps is None else f"full-masks minus {labels[main]} (gap)"
        text = [escape_markdown(f"Mask AP in percent, mean over seeds; sorted by {by}.")]
    return ["### Per class", *text, markdown_table(headings, lines, texts=2 if table.unseen else 1)]


def threshold_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP at some of the IoU thresholds that a match takes."""
    table, lines = numbers.table, []
    for row, _, result in page.report.cells(table):
        if (by_class := thresholds_of(page, result)) is not None:
            line: dict[str, object] = {"row": row}
            for group in table.main_groups:
                means = _threshold_means(by_class, table.groups[group])
                line |= {f"{group}: IoU {threshold:.1f}": means[threshold] for threshold in _PRINTED_THRESHOLDS}
            lines.append(line)
    if not lines:
        return []
    headings = list(lines[0])
    cells = number_cells(table, over_seeds(pd.DataFrame(lines), table), headings[1:])
    text = "Mask AP in percent by the IoU that a match takes."
    return ["### AP against IoU threshold", text, markdown_table(headings, cells)]


def _threshold_means(by_class: Mapping[str, Sequence[float | None]], classes: Sequence[str]) -> dict[float, float]:
    """IoU threshold -> mean over those classes that have objects; NaN where none has."""
    lines = {name: by_class[name] for name in classes if name in by_class}
    means = pd.DataFrame(lines, index=IOU_THRESHOLDS, dtype=float).mean(axis=1)
    return dict(zip(IOU_THRESHOLDS, means.tolist(), strict=True))


def size_section(_: PageContext, numbers: TableNumbers) -> list[str]:
    """Mask AP by object size, for the sizes that the validation objects have."""
    table, summary = numbers.table, numbers.summary
    measured = {
        size: words
        for size, words in _SIZES.items()
        if summary[[f"{g}_{size}" for g in table.groups]].notna().any(axis=None)
    }
    if not measured:
        return []
    columns = {
        f"{group}_{size}": f"{group}: {words}" for group in table.main_groups for size, words in measured.items()
    }
    text = "Mask AP in percent by mask area: small below 32² pixels of the original image, medium below 96², large."
    cells = number_cells(table, summary, list(columns))
    return ["### AP by object size", text, markdown_table(("row", *columns.values()), cells)]


def training_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The curves of every loss term, and of the validation AP where it was measured on the way."""
    report, table = page.report, numbers.table
    curves: dict[str, list[TrainingCurves]] = {row.name: [] for row in table.rows}
    complete = True  # a figure that lacks runs would replace a better one of an earlier report
    for row, _, run in report.cells(table):
        masks = recorded_metrics(run).group("segm", table.seen + table.unseen)["AP"]
        folder = report.run_folders.get(run.run_id)
        curve = None if folder is None else read_curves(folder / "log.jsonl", final=(run.steps, masks))
        if curve is None:
            complete = False
        else:
            curves[row].append(curve)
    shown = page.figures.show(
        f"{table.name}_losses",
        training_figure(table, curves, row_styles(report.tables)) if complete else None,
        alt=f"training losses, {table.name}",
        caption="Loss terms before weighting, averaged over some steps, and mask AP where it was measured on the way.",
        absent="the run folders with the logs are not on this machine",
    )
    return ["### Training", *shown]
