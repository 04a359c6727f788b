"""The sentences of a report that are computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from semiseg.report.aggregate import BEST, NEITHER, UPPER_BOUND, GapClosed, ReportRow, ReportTable, TableNumbers
from semiseg.report.tables import MINUS, escape_markdown, number, whole_percent

SMALL_GAP = 5.0  # AP; shares of a smaller gap that is not resolved over seeds say little


def answer(tables: Sequence[TableNumbers]) -> str:
    """How much of the gap on unseen classes the method closes, or, without such, which rows are best."""
    asked = [numbers for numbers in tables if _asks_for_the_gap(numbers.table)]
    clauses = [_gap_clause(numbers) for numbers in asked] or [_best_clause(numbers) for numbers in tables]
    text = "; ".join(clauses)
    if asked:
        text = f"of the gap between neither and full-masks on unseen classes projection + pairwise closes {text}"
    notes = []
    if any(numbers.images is not None and numbers.images.shares for numbers in asked):
        notes.append("in brackets: 95 % interval over images")
    if max((int(numbers.summary["seeds"].max()) for numbers in asked or tables), default=0) == 1:
        notes.append("one seed: differences over seeds are not resolved")
    if notes:
        text += f" ({'; '.join(notes)})"
    return f"{text[:1].upper()}{text[1:]}."


def _asks_for_the_gap(table: ReportTable) -> bool:
    return bool(table.unseen) and {NEITHER, BEST, UPPER_BOUND} <= {row.name for row in table.rows}


def _gap_clause(numbers: TableNumbers) -> str:
    table = numbers.table
    where = f"with {len(table.seen)} of {len(table.seen) + len(table.unseen)} classes seen"
    gap = next((gap for gap in numbers.gaps if gap.row == BEST), None)
    if gap is None:
        missing = [row for row in (NEITHER, BEST, UPPER_BOUND) if numbers.mean(row, "unseen_AP") is None]
        lacking = f"{', '.join(missing)} not measured on unseen classes" if missing else "no seed has all three rows"
        return f"{where} a share that is not known yet ({lacking})"
    values = f"{gap.start:.1f} → {gap.reached:.1f} AP, full-masks {gap.goal:.1f}"
    if gap.percent is None:
        return f"{where} nothing: there is no gap, full-masks is not above neither ({values})"
    text = f"{where} {_share_closed(gap, numbers)} ({values})"
    steps = {"the step": (NEITHER, BEST), "what is left to full-masks": (BEST, UPPER_BOUND)}
    for words, pair in steps.items():
        step = numbers.between(*pair, "unseen")
        if step.resolved is False:
            text += f", {words} is {step.reading}"
    caution = gap_caution(numbers)
    return text if caution is None else f"{text}, but {caution}"


def _share_closed(gap: GapClosed, numbers: TableNumbers) -> str:
    """The percentage of the gap that a row closes, in brackets its interval over images: "63 % [58, 68]"."""
    text = whole_percent(gap.percent or 0.0)
    found = None if numbers.images is None else numbers.images.shares.get(gap.row)
    return text if found is None else f"{text} [{found[0]:.0f}, {found[1]:.0f}]".replace("-", MINUS)


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
