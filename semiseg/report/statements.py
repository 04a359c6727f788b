"""The sentences of a report that are computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from semiseg.report.aggregate import (
    BEST,
    NEITHER,
    UPPER_BOUND,
    GapClosed,
    ReportRow,
    ReportTable,
    TableNumbers,
)
from semiseg.report.differences import Difference
from semiseg.report.tables import MINUS, escape_markdown, number, whole_percent

SMALL_GAP = 5.0  # AP; shares of a smaller gap that is not resolved over seeds say little
_RESOLVES_NOTHING = {1: "one seed cannot resolve small differences", 2: "two seeds have no interval"}
_CHAINS = ("2", "3")  # tables whose rows add to each other
_BOX_SPREAD = 2.0  # AP; rows whose boxes differ by more are not compared on masks alone


def answer(tables: Sequence[TableNumbers]) -> str:
    """One sentence: how much of the gap on unseen classes the method closes, or, without such, how the rows compare."""
    with_unseen = [numbers for numbers in tables if _asks_for_the_gap(numbers.table)]
    clauses = _gap_clauses(with_unseen) or [_rows_clause(numbers) for numbers in tables]
    text = "; ".join(clauses)
    counts = {len(gap.per_seed) for numbers in with_unseen for gap in numbers.gaps if gap.row == BEST}
    if not with_unseen:
        counts = {int(numbers.summary["seeds"].max()) for numbers in tables} - {0}
    over_images = [numbers for numbers in with_unseen or tables if numbers.images is not None]
    notes = []
    if counts and max(counts) == 1:
        notes.append("one seed" if over_images else "one seed: small differences are not resolved")
    if any(numbers.images.shares for numbers in over_images if numbers.images is not None) and with_unseen:
        notes.append("in brackets: 95 % interval over images")
    elif over_images and notes:
        notes.append("resolved or not over validation images alone")
    text += f" ({'; '.join(notes)})" * bool(notes)
    return f"{text[:1].upper()}{text[1:]}."


def _asks_for_the_gap(table: ReportTable) -> bool:
    return bool(table.unseen) and {NEITHER, BEST, UPPER_BOUND} <= {row.name for row in table.rows}


def _rows_clause(numbers: TableNumbers) -> str:
    """A table without unseen classes: its rows in turn if each adds to the one before, else the best of them."""
    rows = [row for row in numbers.table.rows if numbers.mean(row.name, "all_AP") is not None]
    if not rows:
        return "not answered yet (nothing was measured)"
    if numbers.table.published in _CHAINS or len(rows) == 1:
        return _chain_clause(numbers, rows)
    return _best_clause(numbers, rows)


def _chain_clause(numbers: TableNumbers, rows: Sequence[ReportRow]) -> str:
    """Label and AP of every row, with its difference to the one before."""
    parts = [f"mask AP: {_told(rows[0].label)} {_ap(numbers, rows[0])}"]
    for first, second in pairwise(rows):
        step = numbers.between(first.name, second.name, "all")
        parts.append(f"{_told(second.label)} {_ap(numbers, second)} ({_step(step)})")
    return " → ".join(parts)


def _best_clause(numbers: TableNumbers, rows: Sequence[ReportRow]) -> str:
    """The best row among those that lack masks, how far it is from the next, and rows with every mask beside it."""
    others = [row for row in rows if not row.every_mask] or list(rows)
    ordered = sorted(others, key=lambda row: -(numbers.mean(row.name, "all_AP") or 0.0))
    best = ordered[0]
    text = f"highest mean mask AP: {_told(best.label)} ({_ap(numbers, best)})"
    if len(ordered) > 1:
        text += f", then {_told(ordered[1].label)} ({_behind(numbers, ordered[1], best)})"
    if len(ordered) > 2:
        text += f"; lowest: {_told(ordered[-1].label)} ({_behind(numbers, ordered[-1], best)})"
    bounds = [row for row in rows if row.every_mask and row not in others]
    if bounds:
        text += "; with every mask: " + ", ".join(f"{_told(row.label)} {_ap(numbers, row)}" for row in bounds)
    return text


def _told(label: str) -> str:
    return escape_markdown(label)


def _ap(numbers: TableNumbers, row: ReportRow) -> str:
    return number(numbers.mean(row.name, "all_AP"))


def _behind(numbers: TableNumbers, row: ReportRow, best: ReportRow) -> str:
    """AP of a row, and its paired difference to the best one."""
    return f"{_ap(numbers, row)}; {_step(numbers.between(best.name, row.name, 'all'))}"


def _step(step: Difference) -> str:
    """A paired difference with whether it is resolved; seeds that only one of the rows has do not count."""
    if step.mean is None:
        return "no seed in common"
    words = {None: "", True: ", resolved", False: ", not resolved"}
    return f"{number(step.mean, sign=True)}{words[step.resolved]}"


def _gap_clauses(tables: Sequence[TableNumbers]) -> list[str]:
    """A clause per table; what is measured is said in full by the first that has an answer."""
    clauses: list[str] = []
    told = False
    for numbers in tables:
        clauses.append(_gap_clause(numbers, short=told))
        told = told or any(gap.row == BEST and gap.percent is not None for gap in numbers.gaps)
    return clauses


def _gap_clause(numbers: TableNumbers, *, short: bool) -> str:
    table = numbers.table
    start = f"with {len(table.seen)} of {_classes(len(table.seen) + len(table.unseen))} seen"
    gap = next((gap for gap in numbers.gaps if gap.row == BEST), None)
    if gap is None:
        missing = [row for row in (NEITHER, BEST, UPPER_BOUND) if numbers.mean(row, "unseen_AP") is None]
        lacking = f"{', '.join(missing)} not measured on unseen classes" if missing else "no seed has all three rows"
        return f"{start}, not answered yet ({lacking})"
    values = f"{gap.start:.1f} → {gap.reached:.1f} AP, full-masks {gap.goal:.1f}"
    if gap.percent is None:
        return f"{start}, there is no gap to close, full-masks is not above neither on unseen classes ({values})"
    closes, of_what = (
        ("", "")
        if short
        else (
            "projection + pairwise closes ",
            " of the gap between neither and full-masks on unseen classes",
        )
    )
    text = f"{start}, {closes}{share_closed(gap, numbers)}{of_what} ({values})"
    step = numbers.between(NEITHER, BEST, "unseen")
    if step.resolved is False:
        text += f", a step that is {_not_resolved(step)}"
    left = numbers.between(BEST, UPPER_BOUND, "unseen")
    if left.resolved is False:
        text += f", and what is left to full-masks is {_not_resolved(left)}"
    return text + (f", but {caution}" if (caution := gap_caution(numbers)) else "")


def gap_caution(numbers: TableNumbers) -> str | None:
    """Why shares of the gap between neither and full-masks should not be taken at their word, or None."""
    whole = numbers.between(NEITHER, UPPER_BOUND, "unseen")
    if whole.mean is None or whole.mean <= 0:
        return None
    if whole.resolved is False:
        return f"the gap itself ({whole.mean:.1f} AP) is {_not_resolved(whole)}"
    if whole.interval is None and whole.mean < SMALL_GAP:
        return f"the gap itself is only {whole.mean:.1f} AP, which {_seeds(len(whole.values))} cannot resolve"
    return None


def share_closed(gap: GapClosed, numbers: TableNumbers) -> str:
    """The percentage of the gap that a row closes, in brackets its interval over images: "63 % [58, 68]"."""
    text = "no gap" if gap.percent is None else whole_percent(gap.percent)
    found = None if gap.percent is None or numbers.images is None else numbers.images.shares.get(gap.row)
    return text if found is None else f"{text} [{found[0]:.0f}, {found[1]:.0f}]".replace("-", MINUS)


def _not_resolved(step: Difference) -> str:
    """What its intervals do not leave 0 out of: "not resolved over 3 seeds and over images"."""
    words = {"seeds": f"over {_seeds(len(step.values))}", "images": "over validation images"}
    return "not resolved " + " and ".join(words[name] for name in step.unresolved_over)


def row_order(numbers: TableNumbers) -> str:
    """The rows by their mean AP on unseen classes, on all where there are none."""
    labels = {row.name: row.label for row in numbers.table.rows}
    group = "unseen" if numbers.table.unseen else "all"
    means = {name: mean for name in labels if (mean := numbers.mean(name, f"{group}_AP")) is not None}
    if not means:
        return f"Nothing was measured on {group} classes."
    ordered = sorted(means, key=lambda name: means[name])
    text = f"By mean AP on {group} classes: {escape_markdown(labels[ordered[0]])} ({means[ordered[0]]:.1f})"
    for lower, name in pairwise(ordered):
        sign = "=" if f"{means[lower]:.1f}" == f"{means[name]:.1f}" else "<"
        step = "; step not resolved" if numbers.between(lower, name, group).resolved is False else ""
        text += f" {sign} {escape_markdown(labels[name])} ({means[name]:.1f}{step})"
    return f"{text}."


def reading(difference: Difference) -> str:
    """What one may conclude from a paired difference over seeds and over images."""
    count = len(difference.values)
    if count == 0:
        return "not measured"
    if difference.resolved is None:
        return f"{_RESOLVES_NOTHING[count]}: no claim"
    if not difference.resolved:
        return f"not resolved over {' and '.join(difference.unresolved_over)}"
    direction = "higher" if (difference.mean or 0) > 0 else "lower"
    if difference.interval is None:
        return f"resolved over images only: {direction}"
    return f"resolved: {direction}"


def box_statement(numbers: TableNumbers) -> str:
    """Whether the rows detect equally well, so that mask AP compares masks."""
    values = numbers.box_summary["all_AP"].dropna()
    if not numbers.table.alike:
        return "Rows differ in network, data or schedule: differences in mask AP are due to boxes and masks."
    text = "Boxes and classes are supervised alike in every row, so that differences in mask AP should be due to masks."
    if len(values) > 1:
        spread = float(values.max() - values.min())
        text += f" Mean box AP on all classes differs by {spread:.1f} AP between the best and the worst row"
        text += f": more than {_BOX_SPREAD:.0f} AP, so part is due to detection." if spread > _BOX_SPREAD else "."
    return text


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count} classes"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
