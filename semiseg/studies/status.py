"""Where a study's runs stand: done, started or missing; as the table of `semiseg status` and `run --dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from semiseg.config import RunConfig
from semiseg.config.read import digest, parse_config, read_json
from semiseg.engine.logs import format_seconds
from semiseg.engine.processes import parts_per_step
from semiseg.errors import UserError
from semiseg.report.tables import text_table
from semiseg.results import Result, latest, read
from semiseg.studies.child import last_step
from semiseg.studies.file import PRETRAIN_ROW, Study, StudyRun, study_runs
from semiseg.studies.identity import (
    RESULT_NAME,
    RESULTS_NAME,
    RUNS_FOLDER,
    PlannedRun,
    fitted_run,
    missing_data,
    plan,
    planned_steps,
)

TRAINING_ALONE = "training alone, one run after the other, as the newest finished runs of the same kind took on"
WITHOUT_DATA = "which of them are done cannot be told without the data"


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        run: a `PlannedRun`, unless its state is unknown: without the data it has no identity.
        step, steps: of a started run whose log has begun, else None.
        when: ISO time of the end of a finished run.
        recorded_only: finished and recorded, but its folder is not here.
    """

    run: StudyRun
    state: Literal["done", "started", "missing", "unknown"]
    step: int | None = None
    steps: int | None = None
    when: str | None = None
    recorded_only: bool = False

    def __str__(self) -> str:
        """The state in a table."""
        if self.when is not None:
            finished = datetime.fromisoformat(self.when).astimezone()
            return f"{'recorded' if self.recorded_only else 'done'} {finished:%Y-%m-%d %H:%M}"
        return self.state if self.steps is None else f"step {self.step} of {self.steps}"


def run_status(run: PlannedRun, recorded: Mapping[str, Result]) -> RunStatus:
    """Where a run stands, by its folder and the record."""
    if (run.folder / RESULT_NAME).is_file():
        return RunStatus(run, "done", when=finished_values(run)["finished"])
    if run.run_id in recorded:
        return RunStatus(run, "done", when=recorded[run.run_id].finished, recorded_only=True)
    if (run.folder / "identity.json").is_file():
        step, steps = last_step(run.folder / "log.jsonl") or (None, None)
        return RunStatus(run, "started", step=step, steps=steps)
    return RunStatus(run, "missing")


def finished_values(run: PlannedRun) -> dict[str, Any]:
    """What the run's folder says of its end.

    Raises:
        UserError: nothing, or nothing that is whole.
    """
    path = run.folder / RESULT_NAME
    if not path.is_file():
        raise UserError(f"{path}: the run ended without a readable result")
    try:
        values = read_json(path)
        datetime.fromisoformat(values["finished"])
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a readable result; remove it, and the run is evaluated again") from None
    return values


def runs_to_do(planned: Sequence[PlannedRun], recorded: Mapping[str, Result], *, reproduce: bool) -> list[PlannedRun]:
    """The rows that are missing, and before them the pretrainings that these start from and whose weights are missing.

    Args:
        reproduce: what is only recorded counts as missing.
    """

    def is_missing(run: PlannedRun) -> bool:
        status = run_status(run, recorded)
        if status.recorded_only:
            return reproduce or run.row == PRETRAIN_ROW  # a record holds no weights to start from
        return status.state != "done"

    rows = [run for run in planned if run.row != PRETRAIN_ROW and is_missing(run)]
    needed = {run.init_run for run in rows}
    return [run for run in planned if run.run_id in needed and is_missing(run)] + rows


def status_text(study: Study, folder: Path, *, processes: int) -> str:
    """Every run with its state; without the data the runs alone, and what is missing.

    Args:
        folder: of the study's record.
    """
    missing = missing_data(study)
    if missing is not None:
        statuses = _unknown(study, processes=processes)
        total = f"{len(statuses)} runs; {WITHOUT_DATA}: {missing}"
    else:
        recorded = latest(read(folder / RESULTS_NAME))
        statuses = [run_status(run, recorded) for run in plan(study, processes=processes)]
        counts = Counter(status.state for status in statuses)
        total = ", ".join(f"{counts[state]} {state}" for state in ("done", "started", "missing"))
    return f"{_table(statuses, processes)[0]}{study.name}: {total}"


def dry_run_text(study: Study, folder: Path, *, only: Sequence[str], processes: int, reproduce: bool) -> str:
    """The runs that would be trained; without the data all of them, and what is missing.

    Args:
        folder: of the study's record.
    """
    missing = missing_data(study, only=only)
    if missing is not None:
        statuses = _unknown(study, processes=processes, only=only)
        lines = [f"{len(statuses)} of {len(statuses)} runs to train, if none is done", f"{WITHOUT_DATA}: {missing}"]
    else:
        recorded, planned = latest(read(folder / RESULTS_NAME)), plan(study, only=only, processes=processes)
        statuses = [run_status(run, recorded) for run in runs_to_do(planned, recorded, reproduce=reproduce)]
        lines = [f"{len(statuses)} of {len(planned)} runs to train"]
    table, times = _table(statuses, processes)
    if statuses:
        lines.append(times)
    elif not reproduce:
        lines.append("all are done or recorded; '--reproduce' lists those that were recorded elsewhere")
    return table + "\n".join(lines)


def _unknown(study: Study, *, processes: int, only: Sequence[str] = ()) -> list[RunStatus]:
    return [RunStatus(fitted_run(run, processes), "unknown") for run in study_runs(study, only=only)]


def _table(statuses: Sequence[RunStatus], processes: int) -> tuple[str, str]:
    """The table of runs, "" for none, and a sentence on the time that is left of those that are not done here."""
    known = seconds_per_step(processes)
    lines, left = [], []  # left: seconds of a run, and the device that they are known from
    for status in statuses:
        run, kind, time = status.run, _kind(status.run.config, processes), "—"
        steps = planned_steps(run.config)
        if steps is not None and kind in known and (status.state != "done" or status.recorded_only):
            seconds, device = known[kind]
            left.append(((steps - (status.step or 0)) * seconds, device))
            time = format_seconds(left[-1][0])
        length = f"{run.config.optim.epochs:g} epochs" if steps is None else str(steps)
        run_id = run.run_id if isinstance(run, PlannedRun) else ""
        batch = str(run.config.optim.batch_size)
        lines.append([run.row, run.split or "", str(run.seed), str(status), length, batch, time, run_id])
    columns = ("row", "split", "seed", "state", "steps", "batch", "time", "run")
    sentence = f"no times: no run of the same kind is finished in {RUNS_FOLDER}/"
    if left:
        total, devices = format_seconds(sum(seconds for seconds, _ in left)), sorted({device for _, device in left})
        sentence = f"about {total} for {len(left)} of them: {TRAINING_ALONE} {', '.join(devices)}"
    return text_table(columns, lines) if lines else "", sentence


def seconds_per_step(processes: int) -> dict[str, tuple[float, str]]:
    """Kind of run -> seconds of a step and device, of the newest finished run of that kind on so many processes."""
    newest: dict[str, tuple[str, float, str]] = {}
    for path in RUNS_FOLDER.glob(f"*/*/{RESULT_NAME}"):
        try:
            result = read_json(path)
            config = parse_config(RunConfig, read_json(path.parent / "config.json")["config"], where=str(path.parent))
            if result.get("processes", 1) == processes:
                measured = (str(result["finished"]), result["train_seconds"] / result["steps"], str(result["device"]))
                kind = _kind(config, processes)
                newest[kind] = max(measured, newest.get(kind, measured))
        except (UserError, KeyError, TypeError, ZeroDivisionError):
            continue  # no whole run, or one of another version: it says nothing about this study
    return {kind: (seconds, device) for kind, (_, seconds, device) in newest.items()}


def _kind(config: RunConfig, processes: int) -> str:
    """Equal for runs whose steps take equally long: they differ in seed, length, rates and the split's classes."""
    batch = [config.optim.batch_size, config.optim.optimizer, parts_per_step(config, processes)]
    return digest({**config.identity(initial=True), "seed": 0, "optim": batch})
