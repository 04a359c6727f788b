"""Where the numbers of a report come from, and the warnings that follow from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from semiseg.report.aggregate import ReportInput
from semiseg.report.tables import escape_markdown, markdown_table
from semiseg.results import Result


def warnings(report: ReportInput) -> list[str]:
    """What a reader must know before the numbers: missing cells, and runs that do not belong together."""
    found = []
    for table in report.tables:
        by_row: dict[str, list[int]] = {}
        for row, seed in report.missing(table):
            by_row.setdefault(row, []).append(seed)
        if by_row:
            cells = "; ".join(f"{_code(row)} seed {', '.join(map(str, seeds))}" for row, seeds in by_row.items())
            found.append(
                f"**Incomplete.** {escape_markdown(table.name)} lacks {cells}. `{report.run_command}` fills them, "
                f"then `{report.report_command}`."
            )
    runs = [*report.runs(), *report.pretraining_results]
    found += [
        f"**Mixed {what}.** {_places(runs, key)}. Numbers of different {what} are not strictly comparable."
        for what, key in (
            ("data", lambda run: run.data_fingerprint),
            ("code (git revisions)", lambda run: run.git_revision or "outside git"),
            ("versions", lambda run: ", ".join(f"{name} {value}" for name, value in sorted(run.versions.items()))),
            ("devices", lambda run: re.sub(r", \d+ threads", "", run.device)),  # threads change the last bits only
        )
        if len({key(run) for run in runs}) > 1
    ]
    for table in report.tables:
        digests = {
            run.split_digest
            for row in table.rows
            for seed in report.seeds
            if (run := report.results.get((table.name, row.name, seed))) and run.split_digest is not None
        }
        if digests - {table.split_digest}:
            found.append(
                f"**Changed split.** Runs of {escape_markdown(table.name)} were trained with another content of the "
                f"split {_code(table.split)} ({', '.join(sorted(digests - {table.split_digest}))}) than today's "
                f"({table.split_digest})."
            )
    return found


def _places(runs: Sequence[Result], key: Callable[[Result], str]) -> str:
    """Which runs have which value: the most frequent value only by its count."""
    by_value: dict[str, list[Result]] = {}
    for run in runs:
        by_value.setdefault(key(run), []).append(run)
    ordered = sorted(by_value.items(), key=lambda item: -len(item[1]))
    parts = [f"{_code(ordered[0][0])}: {_runs(len(ordered[0][1]))}"]
    for value, members in ordered[1:]:
        names = ", ".join(
            f"{escape_markdown(run.row)}{f' ({escape_markdown(run.split)})' if run.split else ''} seed {run.seed}"
            for run in members[:6]
        )
        parts.append(f"{_code(value)}: {names}" + (f" and {len(members) - 6} more" if len(members) > 6 else ""))
    return "; ".join(parts)


def provenance(report: ReportInput) -> list[str]:
    """The section that says by what, when and from which data every number was made."""
    runs, pretraining = report.runs(), list(report.pretraining_results)
    every = [*pretraining, *runs]
    facts = [
        f"- Recorded results: `results.jsonl` beside this file; {len(runs)} runs and {len(pretraining)} of "
        f"pretraining, {sum(run.seconds for run in every) / 60:.1f} minutes of training and evaluation in all.",
        f"- Trained by `{report.run_command}`, this page by `{report.report_command}`.",
        *(f"- Split `{table.split}`: digest `{table.split_digest}`." for table in report.tables if table.split),
        _fact("Data fingerprint", [run.data_fingerprint for run in every]),
        _fact("Git revision", [run.git_revision or "outside git" for run in every]),
        _fact("Device", [run.device for run in every]),
        _fact("Versions", [", ".join(f"{name} {v}" for name, v in sorted(run.versions.items())) for run in every]),
    ]
    blocks = ["## Provenance", "\n".join(fact for fact in facts if fact)]
    if every:
        headings = ("run", "row", "split", "seed", "steps", "seconds", "git", "finished", "started from")
        blocks.append(markdown_table(headings, [_run_cells(run) for run in every], texts=3))
        commands = "\n".join(f"{run.run_id}  {_command(run)}" for run in every)
        blocks.append(f"Commands of the runs:\n\n```text\n{commands}\n```")
    return blocks


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
    return f"- {name}: {'; '.join(f'`{value}`' for value in different)}." if different else ""


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
