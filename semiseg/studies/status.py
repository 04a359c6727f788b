"""Where a study's runs stand: done, started or missing; as the table of `semiseg status` and `run --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from semiseg.config.read import read_json
from semiseg.engine.logs import format_seconds
from semiseg.errors import UserError
from semiseg.report.tables import text_table
from semiseg.results import RESULT_NAME, Result, checked, latest, read
from semiseg.studies.file import PRETRAIN_ROW, Study, StudyRun, study_runs
from semiseg.studies.identity import RESULTS_NAME, PlannedRun, data_digest, fitted_run, plan, planned_steps
from semiseg.studies.machines import last_step

ALONE = "one after the other, by the step as the newest recorded runs of these rows took on"
_FROM_RESULT = (
    "data_fingerprint", "metrics", "steps", "seconds", "device", "versions", "git_revision", "finished", "processes",
    "val_fingerprint", "edges",
)  # fmt: skip
WITHOUT_DATA = "which of them are done cannot be told without the data"


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands: "recorded" is finished, but its folder is not here."""

    run: StudyRun  # a `PlannedRun`, unless its state is unknown: without the data it has no identity
    state: Literal["done", "recorded", "started", "missing", "unknown"]
    step: int | None = None  # of a started run whose log has begun, and steps
    steps: int | None = None
    finished: str | None = None  # ISO time of the end

    def __str__(self) -> str:
        if self.finished is not None:
            return f"{self.state} {datetime.fromisoformat(self.finished).astimezone():%Y-%m-%d %H:%M}"
        return self.state if self.steps is None else f"step {self.step} of {self.steps}"


def run_status(run: PlannedRun, recorded: Mapping[str, Result]) -> RunStatus:
    """Where a run stands, by its folder and the record."""
    if (run.folder / RESULT_NAME).is_file():
        return RunStatus(run, "done", finished=finished_values(run)["finished"])
    if run.run_id in recorded:
        return RunStatus(run, "recorded", finished=recorded[run.run_id].finished)
    if (run.folder / "identity.json").is_file():
        step, steps = last_step(run.folder / "log.jsonl") or (None, None)
        return RunStatus(run, "started", step=step, steps=steps)
    return RunStatus(run, "missing")


def finished_values(run: PlannedRun) -> dict[str, Any]:
    """What the run's folder says of its end; a UserError if that is nothing, or nothing whole."""
    path = run.folder / RESULT_NAME
    if not path.is_file():
        raise UserError(f"{path}: the run ended without a readable result")
    with suppress(UserError, KeyError, TypeError, ValueError):
        values = read_json(path)
        datetime.fromisoformat(values["finished"])
        return values
    raise UserError(f"{path}: not a readable result; remove it, and the run is evaluated again")


def read_result(run: PlannedRun, *, typed: Sequence[str]) -> Result:
    """The record of a finished run of a study, from its folder; the split must not have changed while it trained."""
    path, values = run.folder / RESULT_NAME, finished_values(run)
    if run.split is not None and values.get("split_digest") != run.identity["split"]:
        raise UserError(f"{path}: the class split {run.split!r} was changed while the run trained; remove {run.folder}")
    about = {name: getattr(run, name) for name in ("run_id", "identity", "study", "row", "split", "seed", "init_run")}
    # Paths of initial weights belong to one machine; what they are is in the identity.
    about["config"] = run.config.model_dump(mode="json", exclude={"init_from"})
    return finished_result(path, values, about | {"split_digest": run.identity["split"], "command": list(typed)})


def finished_result(path: Path, values: Mapping[str, Any], about: Mapping[str, Any]) -> Result:
    """The record of a run, of what `path`, its result.json, holds and what else is known about it."""
    return checked({**about, **{name: values[name] for name in _FROM_RESULT if name in values}}, where=str(path))


def runs_to_do(planned: Sequence[PlannedRun], recorded: Mapping[str, Result], *, reproduce: bool) -> list[PlannedRun]:
    """The rows that are missing, and before them the pretrainings that these start from and whose weights are missing.

    With `reproduce` what is only recorded counts as missing.
    """

    def is_missing(run: PlannedRun) -> bool:
        # A record holds no weights for others to start from.
        enough = ("done",) if reproduce or run.row == PRETRAIN_ROW else ("done", "recorded")
        return run_status(run, recorded).state not in enough

    rows = [run for run in planned if run.row != PRETRAIN_ROW and is_missing(run)]
    needed = {run.init_run for run in rows}
    return [run for run in planned if run.run_id in needed and is_missing(run)] + rows


def status_text(study: Study, folder: Path, *, processes: int) -> str:
    """Every run with its state, by the record in a folder; without the data the runs alone, and what is missing."""
    results = read(folder / RESULTS_NAME)
    statuses, missing = _statuses(study, results, only=(), processes=processes)
    states = [status.state for status in statuses]
    total = ", ".join(f"{states.count(state)} {state}" for state in ("done", "recorded", "started", "missing"))
    if missing is not None:
        total = f"{len(statuses)} runs; {WITHOUT_DATA}: {missing}"
    return f"{_table(statuses, results, processes)[0]}{study.name}: {total}"


def dry_run_text(study: Study, folder: Path, *, only: Sequence[str], processes: int, reproduce: bool) -> str:
    """The runs that would be trained, by the record in a folder; without the data all, and what is missing."""
    results = read(folder / RESULTS_NAME)
    every, missing = _statuses(study, results, only=only, processes=processes)
    planned = [status.run for status in every if isinstance(status.run, PlannedRun)]
    to_do = runs_to_do(planned, latest(results), reproduce=reproduce)
    statuses = [status for status in every if missing or status.run in to_do]
    table, times = _table(statuses, results, processes)
    lines = [f"{len(statuses)} of {len(every)} runs to train"]
    if missing is not None:
        lines = [f"{lines[0]}, if none is done", f"{WITHOUT_DATA}: {missing}"]
    if statuses:
        lines.append(times)
    elif not reproduce:
        lines.append("all are done or recorded; '--reproduce' lists those that were recorded elsewhere")
    return table + "\n".join(lines)


def _statuses(
    study: Study, results: Sequence[Result], *, only: Sequence[str], processes: int
) -> tuple[list[RunStatus], str | None]:
    """The study's runs with their states, and what is missing of the data, without which the states are unknown."""
    runs = study_runs(study, only=only)
    try:
        for run in runs:
            data_digest(run.config.data)
    except UserError as missing:
        return [RunStatus(fitted_run(run, processes), "unknown") for run in runs], str(missing)
    recorded = latest(results)
    return [run_status(run, recorded) for run in plan(study, only=only, processes=processes)], None


def _table(statuses: Sequence[RunStatus], results: Sequence[Result], processes: int) -> tuple[str, str]:
    """The table of runs, "" for none, and a sentence on the time that is left of those that are not done here.

    A run takes as long as the newest recorded one of its row on as many processes, by the step.
    """
    of_row = {result.row: result for result in results if result.processes == processes and result.steps}
    lines, left = [], {}
    for status in statuses:
        run, steps, result = status.run, planned_steps(status.run.config), of_row.get(status.run.row)
        if steps is not None and result is not None and status.state != "done":
            left[run.key] = (steps - (status.step or 0)) * result.seconds / result.steps
        time = format_seconds(left[run.key]) if run.key in left else "—"
        length = f"{run.config.optim.epochs:g} epochs" if steps is None else str(steps)
        run_id = run.run_id if isinstance(run, PlannedRun) else ""
        batch = str(run.config.optim.batch_size)
        lines.append([run.row, run.split or "", str(run.seed), str(status), length, batch, time, run_id])
    columns = ("row", "split", "seed", "state", "steps", "batch", "time", "run")
    sentence = "no times: no run of these rows is recorded"
    if left:
        devices = sorted({of_row[row].device for row, *_ in left})
        total = f"about {format_seconds(sum(left.values()))} for {len(left)} of them"
        sentence = f"{total}: {ALONE} {', '.join(devices)}"
    return text_table(columns, lines) if lines else "", sentence
