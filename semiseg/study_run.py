"""Trains and evaluates what is missing of a study, several runs side by side, and records each finished one once.

Interrupting loses at most the steps since a run's last checkpoint; the same command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from semiseg.config_files import digest, read_json
from semiseg.data.sources import ensure_files
from semiseg.data.workers import StopOnSignal
from semiseg.engine.logs import format_seconds
from semiseg.errors import UserError
from semiseg.results import Result, append, latest, read
from semiseg.study import PRETRAIN_ROW
from semiseg.study_child import Child, Machine, last_step, python_command, share_of, this_machine
from semiseg.study_plan import PlannedRun
from semiseg.study_progress import StudyProgress

RESULT_NAME = "result.json"  # the engine writes it last: a folder with it is finished


@dataclass(frozen=True)
class Execution:
    """How a study is executed; nothing here is part of a run's identity.

    Attributes:
        jobs: independent runs side by side.
        processes: per run; more than one go through accelerate.
        launch: accelerate's configuration file for each run, of as many processes on this machine.
        reproduce: train also what is recorded but was not trained in this folder.
        typed: the command that the user typed, for the record.
        command: what runs the command line of a child.
        grace_seconds: an interrupted run's time for its checkpoint.
        line_seconds: between two lines of progress where there is no terminal.
    """

    jobs: int = 1
    processes: int = 1
    launch: Path | None = None
    reproduce: bool = False
    typed: tuple[str, ...] = ()
    command: tuple[str, ...] = field(default_factory=python_command)
    machine: Machine = field(default_factory=this_machine)
    poll_seconds: float = 0.2
    grace_seconds: float = 60.0
    line_seconds: float = 20.0


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
        return RunStatus(run, "done", when=_held_result(run)["finished"])
    if run.run_id in recorded:
        return RunStatus(run, "done", when=recorded[run.run_id].finished, recorded_only=True)
    if (run.folder / "identity.json").is_file():
        step, steps = last_step(run.folder / "log.jsonl") or (None, None)
        return RunStatus(run, "started", step=step, steps=steps)
    return RunStatus(run, "missing")


def runs_to_do(planned: Sequence[PlannedRun], recorded: Mapping[str, Result], *, reproduce: bool) -> list[PlannedRun]:
    """The rows that are missing, and before them the pretrainings that these start from and whose weights are missing.

    Args:
        reproduce: what is only recorded counts as missing.
    """
    statuses = {run.run_id: run_status(run, recorded) for run in planned}

    def is_missing(run: PlannedRun) -> bool:
        status = statuses[run.run_id]
        if status.recorded_only:
            # A record holds no weights to start from.
            return reproduce or run.row == PRETRAIN_ROW
        return status.state != "done"

    rows = [run for run in planned if run.row != PRETRAIN_ROW and is_missing(run)]
    needed = {run.init for run in rows}
    return [run for run in planned if run.run_id in needed and is_missing(run)] + rows


def run_missing(
    planned: Sequence[PlannedRun], *, name: str, results: Path, how: Execution, stream: TextIO | None = None
) -> list[PlannedRun]:
    """Runs what is missing and records it in `results`; the runs that were trained now.

    Raises:
        UserError: runs failed (the others have been finished first), or a run is being trained elsewhere.
        KeyboardInterrupt: SIGINT or SIGTERM; the running ones were given time to write a checkpoint.
    """
    record_ended(planned, results=results, typed=how.typed)
    todo = runs_to_do(planned, latest(read(results)), reproduce=how.reproduce)
    if todo:
        for config in {digest(run.config.data.model_dump()): run.config.data for run in todo}.values():
            ensure_files(config)  # here, where people see how far it is
        _Study(planned, todo, name=name, results=results, how=how, stream=stream or sys.stderr).run()
    return todo


def record_ended(planned: Sequence[PlannedRun], *, results: Path, typed: Sequence[str]) -> None:
    """Records what has ended without being recorded: an earlier call was killed, or it was trained on its own."""
    for run in planned:
        if (run.folder / RESULT_NAME).is_file():
            append(results, read_result(run, typed=typed))


class _Study:
    """The state of one call of `run_missing`."""

    def __init__(
        self,
        planned: Sequence[PlannedRun],
        todo: Sequence[PlannedRun],
        *,
        name: str,
        results: Path,
        how: Execution,
        stream: TextIO,
    ) -> None:
        self.how = how
        self.results = results
        self.waiting = list(todo)
        self.running: list[Child] = []
        self.failures: dict[str, str] = {}
        self.skipped: list[PlannedRun] = []
        self.progress = StudyProgress(todo, name=name, line_seconds=how.line_seconds, stream=stream)
        # Counted over the whole plan, not over what is left of it: a continued study gives each run the same number
        # of threads, which the last bits of its numbers depend on.
        rows = sum(run.row != PRETRAIN_ROW for run in planned)
        self.side_by_side = {True: min(how.jobs, len(planned) - rows), False: min(how.jobs, rows)}

    def run(self) -> None:
        with StopOnSignal() as stop:
            try:
                while self.waiting or self.running:
                    if stop.requested:
                        self._stop()
                        raise KeyboardInterrupt("stopped; the same command continues where it ended")
                    self._start_ready()
                    self._collect_ended()
                    self.progress.update(self.running)
                    time.sleep(self.how.poll_seconds)
            finally:
                for child in self.running:
                    child.kill()
                self.progress.close()
        if self.failures:
            skipped = f"; {len(self.skipped)} runs that start from them were not begun" if self.skipped else ""
            told = "; ".join(self.failures.values())
            raise UserError(f"{len(self.failures)} of the study's runs failed{skipped}: {told}")

    def _start_ready(self) -> None:
        unfinished = {run.run_id for run in self.waiting} | {child.run.run_id for child in self.running}
        for run in list(self.waiting):
            if run.init in self.failures:
                self.waiting.remove(run)
                self.skipped.append(run)
            elif run.init not in unfinished and len(self.running) < self.how.jobs:
                self.waiting.remove(run)
                self._start(run)

    def _start(self, run: PlannedRun) -> None:
        slot = min(set(range(self.how.jobs)) - {child.slot for child in self.running})
        side_by_side = self.side_by_side[run.row == PRETRAIN_ROW]
        how = self.how
        share = share_of(how.machine, slot=slot, side_by_side=side_by_side, processes=how.processes, launch=how.launch)
        try:
            child = Child(run, command=how.command, share=share, slot=slot, grace_seconds=how.grace_seconds)
            self.running.append(child)
        except UserError as error:
            self.failures[run.run_id] = f"{run.label}: {error}"

    def _collect_ended(self) -> None:
        for child in list(self.running):
            code = child.poll()
            if code is None:
                continue
            self.running.remove(child)
            if code != 0:
                child.kill()  # what a dead launcher has left
            failure = self._record(child) if code == 0 else child.complaint()
            if failure is None:
                self.progress.end(child, message=_told_end(child), finished=True)
            else:
                self.failures[child.run.run_id] = f"{child.run.label}: {failure} (log: {child.output})"
                self.progress.end(child, message=f"{child.run.label} failed: {failure}", finished=False)

    def _record(self, child: Child) -> str | None:
        """Records a run that ended well; what is wrong with its result, or None."""
        try:
            append(self.results, read_result(child.run, typed=self.how.typed))
        except UserError as error:
            return str(error)
        return None

    def _stop(self) -> None:
        self.progress.say("stopping: the running ones finish their step and write a checkpoint")
        for child in self.running:
            child.interrupt()
        deadline = time.monotonic() + self.how.grace_seconds
        with suppress(KeyboardInterrupt):  # a second signal ends the wait
            while any(child.poll() is None for child in self.running) and time.monotonic() < deadline:
                time.sleep(self.how.poll_seconds)
        for child in list(self.running):
            if child.poll() == 0:
                # It ended well while it was being stopped.
                self._record(child)


def read_result(run: PlannedRun, *, typed: Sequence[str]) -> Result:
    """The record of a finished run, from its folder.

    Raises:
        UserError: the result is missing or not whole, or the split was changed while it trained.
    """
    path, values = run.folder / RESULT_NAME, _held_result(run)
    if run.split is not None and values.get("split_digest") != run.split_digest:
        raise UserError(f"{path}: the class split {run.split!r} was changed while the run trained; remove {run.folder}")
    try:
        return Result(
            run_id=run.run_id,
            study=run.study,
            row=run.row,
            split=run.split,
            split_digest=run.split_digest,
            seed=run.seed,
            # Paths of initial weights belong to one machine; what they are is in the identity.
            config=run.config.model_dump(mode="json", exclude={"init_from"}),
            identity=run.identity,
            data_fingerprint=values["data_fingerprint"],
            metrics=values["metrics"],
            steps=values["steps"],
            seconds=values["seconds"],
            device=values["device"],
            versions=values["versions"],
            git_revision=values["git_revision"],
            command=list(typed),
            finished=values["finished"],
            init_run=run.init,
            processes=values.get("processes", 1),
            val_fingerprint=values.get("val_fingerprint"),
        )
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None


def _held_result(run: PlannedRun) -> dict[str, Any]:
    """What the run's folder says of its end."""
    path = run.folder / RESULT_NAME
    if not path.is_file():
        raise UserError(f"{path}: the run ended without a readable result")
    try:
        values = read_json(path)
        datetime.fromisoformat(values["finished"])
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a readable result; remove it, and the run is evaluated again") from None
    return values


def _told_end(child: Child) -> str:
    metrics = _held_result(child.run)["metrics"]
    kinds = {what: metrics.get(kind) or {} for what, kind in (("mask", "segm"), ("box", "bbox"))}
    found = {what: kind.get("groups", {}).get("all", {}).get("AP") for what, kind in kinds.items()}
    numbers = ", ".join(f"{what} AP {value:.1f}" for what, value in found.items() if value is not None)
    took = format_seconds(time.monotonic() - child.started)
    return f"{child.run.label} done in {took}" + (f": {numbers}" if numbers else "")


def finished_at(when: str | None) -> str:
    """An ISO time as a short local one for tables; "" for None."""
    return "" if when is None else datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M")
