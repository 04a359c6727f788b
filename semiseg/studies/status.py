"""Where a study's runs stand: done, started or missing; as the tables of `semiseg status` and `run --dry-run`."""

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
from semiseg.studies.file import PRETRAIN_ROW, Study
from semiseg.studies.identity import (
    RESULT_NAME,
    RESULTS_NAME,
    RUNS_FOLDER,
    PlannedRun,
    missing_data,
    plan,
    planned_steps,
)
from semiseg.studies.machines import this_machine

TRAINING_ALONE = "training alone, one run after the other, as the newest finished runs of the same kind took on"


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        step, steps: of a started run whose log has begun, else None.
        when: ISO time of the end of a finished run.
        recorded_only: finished and recorded, but its folder is not here.
    """

    run: PlannedRun
    state: Literal["done", "started", "missing"]
    step: int | None = None
    steps: int | None = None
    when: str | None = None
    recorded_only: bool = False

    @property
    def shown(self) -> str:
        """The state in a table."""
        if self.state == "started" and self.steps is not None:
            return f"step {self.step} of {self.steps}"
        return "done (recorded)" if self.recorded_only else self.state


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
    needed = {run.init for run in rows}
    return [run for run in planned if run.run_id in needed and is_missing(run)] + rows


def status_text(study: Study, folder: Path, *, processes: int) -> str:
    """Every run with its state; without the data the runs alone, and what is missing.

    Args:
        folder: of the study's record.
    """
    missing = missing_data(study)
    planned = plan(study, processes=processes, by_name=missing is not None)
    columns = ("row", "split", "seed", "state", "finished", "run")
    if missing is not None:
        table = text_table(columns, [[*_name(run), "unknown", "", ""] for run in planned])
        return f"{table}{study.name}: {len(planned)} runs; {_unknown(missing)}"
    recorded = latest(read(folder / RESULTS_NAME))
    statuses = [run_status(run, recorded) for run in planned]
    rows = [[*_name(item.run), item.shown, _time(item.when), item.run.run_id] for item in statuses]
    counts = Counter(item.state for item in statuses)
    totals = ", ".join(f"{counts[state]} {state}" for state in ("done", "started", "missing"))
    return f"{text_table(columns, rows)}{study.name}: {totals}"


def _name(run: PlannedRun) -> list[str]:
    return [run.row, run.split or "", str(run.seed)]


def _time(when: str | None) -> str:
    """An ISO time as a short local one; "" for None."""
    return "" if when is None else datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M")


def _unknown(missing: str) -> str:
    return f"which of them are done cannot be told without the data: {missing}"


def dry_run_text(study: Study, folder: Path, *, only: Sequence[str], processes: int, reproduce: bool) -> str:
    """The runs that would be trained; without the data all of them, and what is missing.

    Args:
        folder: of the study's record.
    """
    missing = missing_data(study, only=only)
    planned = plan(study, only=only, processes=processes, by_name=missing is not None)
    recorded = latest(read(folder / RESULTS_NAME))
    todo = planned if missing else runs_to_do(planned, recorded, reproduce=reproduce)
    known = seconds_per_step(RUNS_FOLDER, processes)
    gpus = str(processes) if this_machine().gpus else "none"
    rows: list[list[str]] = []
    times: list[tuple[float, str]] = []  # seconds that are left of a run, and the device they are known from
    for run in todo:
        status, steps = run_status(run, recorded), planned_steps(run.config)
        time = "—"
        if steps is not None and (kind := _kind(run.config, processes)) in known:
            seconds, device = known[kind]
            times.append(((steps - (status.step or 0)) * seconds, device))
            time = format_seconds(times[-1][0])
        state, run_id = ("unknown", "") if missing else (status.shown, run.run_id)
        length = f"{run.config.optim.epochs:g} epochs" if steps is None else str(steps)
        rows.append([*_name(run), state, length, _batch(run.config, processes), gpus, time, run_id])
    columns = ("row", "split", "seed", "state", "steps", "batch", "GPUs", "time", "run")
    lines = [f"{len(todo)} of {len(planned)} runs to train{', if none is done' if missing else ''}"]
    if missing:
        lines.append(_unknown(missing))
    if times:
        total, devices = format_seconds(sum(left for left, _ in times)), sorted({device for _, device in times})
        lines.append(f"about {total} for {len(times)} of them: {TRAINING_ALONE} {', '.join(devices)}")
    elif todo:
        lines.append(f"no times: no run of the same kind is finished in {RUNS_FOLDER}/")
    elif not reproduce:
        lines.append("all are done or recorded; '--reproduce' lists those that were recorded elsewhere")
    return (text_table(columns, rows) if rows else "") + "\n".join(lines)


def _batch(config: RunConfig, processes: int) -> str:
    """Images per step: in all, and as processes x accumulation parts x images where that is not one."""
    parts, batch = parts_per_step(config, processes), config.optim.batch_size
    factors = [str(processes)] if processes > 1 else []
    factors += [f"{parts} parts"] if parts > 1 else []
    return f"{batch} = {' x '.join([*factors, str(batch // processes // parts)])}" if factors else str(batch)


def seconds_per_step(runs_folder: Path, processes: int) -> dict[str, tuple[float, str]]:
    """Kind of run -> seconds of a step and device, of the newest finished run of that kind on so many processes."""
    newest: dict[str, tuple[str, float, str]] = {}
    for path in runs_folder.glob(f"*/*/{RESULT_NAME}"):
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
