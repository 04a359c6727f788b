"""Where the numbers of a report come from, and the warnings that follow from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import PurePath

from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.report.configurations import configuration_warnings, differences_section
from semiseg.report.tables import code, escape_markdown, markdown_table
from semiseg.results import Result, same_validation_data

# What runs under one table should have in common, in words, with what tells it.
_COMMON: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("code (git revisions)", lambda run: run.git_revision or "outside git"),
    ("versions", lambda run: ", ".join(f"{name} {value}" for name, value in sorted(run.versions.items()))),
    ("devices", lambda run: re.sub(r", \d+ threads", "", run.device)),  # threads change the last bits only
)


def warnings(report: ReportInput) -> list[str]:
    """What a reader must know before the numbers: missing cells, and runs that do not belong together."""
    runs = [*report.runs(), *report.pretraining_results]
    found = [text for table in report.tables if (text := _incomplete(report, table))]
    found += report.notes
    found += _data_warning(runs)
    found += [text for table in report.tables for text in configuration_warnings(report, table)]
    found += [
        f"**Mixed {what}.** {_places(runs, key)}. Numbers of different {what} are not strictly comparable."
        for what, key in _COMMON
        if len({key(run) for run in runs}) > 1
    ]
    return found + [text for table in report.tables for text in _split_warnings(report, table)]


def table_warnings(report: ReportInput, table: ReportTable) -> list[str]:
    """One line above a table that repeats in words which of the page's warnings are about it; nothing if none is."""
    runs = table_runs(report, table)
    found = ["cells are missing"] if report.missing(table) else []
    found += [f"mixed {what}" for what, key in _COMMON if len({key(run) for run in runs}) > 1]
    found += ["mixed data"] if _data_warning(runs) else []
    found += ["configurations that differ in more than they should"] if configuration_warnings(report, table) else []
    found += ["another class split"] if _split_warnings(report, table) else []
    return [f"> **Mind the warnings at the top of the page:** {'; '.join(found)}."] if found else []


def table_runs(report: ReportInput, table: ReportTable) -> list[Result]:
    """The runs behind the cells of a table, in the order of rows and seeds."""
    cells = ((table.name, row.name, seed) for row in table.rows for seed in report.seeds)
    return [run for cell in cells if (run := report.results.get(cell)) is not None]


def _incomplete(report: ReportInput, table: ReportTable) -> str:
    by_row: dict[str, list[int]] = {}
    for row, seed in report.missing(table):
        by_row.setdefault(row, []).append(seed)
    if not by_row:
        return ""
    cells = "; ".join(f"{code(row)} seed {', '.join(map(str, seeds))}" for row, seeds in by_row.items())
    fills = f" {code(report.run_command)} fills them, then {code(report.report_command)}." * bool(report.run_command)
    return f"**Incomplete.** {escape_markdown(table.name)} lacks {cells}.{fills}"


def _data_warning(runs: Sequence[Result]) -> list[str]:
    if len({run.data_fingerprint for run in runs}) <= 1:
        return []
    places = _places(runs, lambda run: run.data_fingerprint)
    if all(same_validation_data(runs[0], run) for run in runs):
        told = "The validation data are the same, the training data are not: differences in AP may be due to that."
        return [f"**Mixed training data.** {places}. {told}"]
    return [f"**Mixed data.** {places}. Numbers of different data are not strictly comparable."]


def _split_warnings(report: ReportInput, table: ReportTable) -> list[str]:
    trained = [run for run in table_runs(report, table) if run.split_digest not in (None, table.split_digest)]
    if not table.split or not trained:
        return []
    here = [run for run in trained if _name(run.split) == _name(table.split)]
    elsewhere = [run for run in trained if run not in here]
    found = []
    if here:
        digests = ", ".join(sorted({str(run.split_digest) for run in here}))
        found.append(
            f"**Changed split.** Runs of {escape_markdown(table.name)} were trained with another content of the split "
            f"{code(table.split)} ({digests}) than today's ({table.split_digest}): {_cells(here)}."
        )
    if elsewhere:
        found.append(
            f"**Other split.** {escape_markdown(table.name)} shows the class groups of {code(table.split)}, but these "
            f"runs were trained with masks of other classes: "
            f"{_places(elsewhere, lambda run: str(run.split))}."
        )
    return found


def _name(split: str | None) -> str:
    """A split's name, of its path too."""
    return PurePath(split or "").stem


def _places(runs: Sequence[Result], key: Callable[[Result], str]) -> str:
    """Which runs have which value: the most frequent value only by its count."""
    by_value: dict[str, list[Result]] = {}
    for run in runs:
        by_value.setdefault(key(run), []).append(run)
    ordered = sorted(by_value.items(), key=lambda item: -len(item[1]))
    parts = [f"{code(ordered[0][0])}: {_runs(len(ordered[0][1]))}"]
    return "; ".join([*parts, *(f"{code(value)}: {_cells(members)}" for value, members in ordered[1:])])


def _cells(runs: Sequence[Result]) -> str:
    """Row, split and seed of the first six."""
    names = ", ".join(
        f"{escape_markdown(run.row)}{f' ({escape_markdown(run.split)})' if run.split else ''} seed {run.seed}"
        for run in runs[:6]
    )
    return names + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")


def provenance(report: ReportInput) -> list[str]:
    """The section that says by what, when and from which data every number was made.

    Long lists are blocks of their own below a heading; the last block has the id and the command of every run.
    """
    runs, pretraining = report.runs(), list(report.pretraining_results)
    every = [*pretraining, *runs]
    hours = sum(run.seconds for run in every) / 3600
    trained = f"Trained by {code(report.run_command)}, this page by" if report.run_command else "This page by"
    facts = [
        f"- Recorded results: {', '.join(report.records)}; {_runs(len(runs))} and {len(pretraining)} of pretraining, "
        f"{_hours(hours)} hours of training and evaluation in all.",
        f"- {trained} {code(report.report_command)}.",
        *(f"- Split {code(table.split)}: digest `{table.split_digest}`." for table in report.tables if table.split),
        _fact("Data fingerprint (training and validation)", [run.data_fingerprint for run in every]),
        _fact("Validation data", [run.val_fingerprint for run in every if run.val_fingerprint]),
        _fact("Seeds", [str(seed) for seed in report.seeds]),
        _fact("Git revision", [run.git_revision or "outside git" for run in every]),
        _fact("Device", [run.device for run in every]),
        _fact("Versions", [", ".join(f"{name} {v}" for name, v in sorted(run.versions.items())) for run in every]),
    ]
    blocks = ["## Provenance", "\n".join(fact for fact in facts if fact)]
    blocks += differences_section(report) + _class_lists(report)
    if every:
        headings = ("run", "row", "split", "seed", "steps", "seconds", "git", "finished", "started from")
        blocks += ["### Hours", *_hours_by_row(every)]
        blocks += ["### Runs", markdown_table(headings, [_run_cells(run) for run in every], texts=3)]
        commands = "\n".join(f"{run.run_id}  {_command(run)}" for run in every)
        blocks += ["### Commands of the runs", f"```text\n{commands}\n```"]
    return blocks


def _class_lists(report: ReportInput) -> list[str]:
    """Which classes of each split have masks and which only boxes; the classes alone where nothing is split."""
    lines: dict[str, None] = {}
    for table in report.tables:
        seen, unseen = (escape_markdown(", ".join(names)) or "none" for names in (table.seen, table.unseen))
        if table.split:
            digest = f"{code(table.split)} (digest {code(table.split_digest)})"
            lines[f"- {digest}: {len(table.seen)} seen: {seen}; {len(table.unseen)} unseen: {unseen}."] = None
        elif not any(other.split for other in report.tables):
            lines[f"- {len(table.seen)} classes: {seen}."] = None
    return ["### Classes", "\n".join(lines)] if lines else []


def _hours_by_row(runs: Sequence[Result]) -> list[str]:
    """Hours of training and evaluation per row; times the processes where some runs had several."""
    by_row: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        by_row.setdefault((run.row, run.split or "—"), []).append(run)
    several = any(run.processes > 1 for run in runs)

    def cells(members: Sequence[Result]) -> list[str]:
        hours = [run.seconds / 3600 for run in members]
        shared = [run.seconds * run.processes / 3600 for run in members]
        return [
            str(len(members)),
            _hours(sum(hours) / len(hours)),
            _hours(sum(hours)),
            *([_hours(sum(shared))] * several),
        ]

    headings = ("row", "split", "runs", "hours per run", "hours", *(["process hours"] * several))
    lines = [[*key, *cells(members)] for key, members in by_row.items()]
    return [markdown_table(headings, [*lines, ["all", "", *cells(runs)]], texts=2)]


def _hours(hours: float) -> str:
    """Three digits that count, or whole hours."""
    return f"{hours:.0f}" if hours >= 100 else f"{hours:.3g}"


def _run_cells(run: Result) -> list[str]:
    return [
        run.run_id,
        run.row,
        run.split or "—",
        str(run.seed),
        str(run.steps),
        f"{run.seconds:.0f}",
        (run.git_revision or "—")[:16],
        run.finished,
        run.init_run or "—",
    ]


def _command(run: Result) -> str:
    text = run.command if isinstance(run.command, str) else shlex.join(run.command)
    return " ".join(text.split()).replace("```", "'''")


def _fact(name: str, values: Sequence[str]) -> str:
    different = list(dict.fromkeys(values))
    return f"- {name}: {'; '.join(map(code, different))}." if different else ""


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
