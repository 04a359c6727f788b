"""Trains and evaluates what is missing of a study, several runs side by side, and records each finished one once.

Interrupting loses at most the steps since a run's last checkpoint; the same command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from semiseg.config.read import digest
from semiseg.data.sources import ensure_files
from semiseg.data.workers import StopOnSignal
from semiseg.engine.logs import format_seconds
from semiseg.errors import UserError
from semiseg.results import ap_in_words, append, latest, read
from semiseg.studies.child import Child
from semiseg.studies.file import PRETRAIN_ROW
from semiseg.studies.identity import RESULT_NAME, PlannedRun
from semiseg.studies.machines import LaunchFile, Machine, lines_for_machines, share_of, this_machine
from semiseg.studies.progress import StudyProgress
from semiseg.studies.recorded import read_result
from semiseg.studies.status import finished_values, runs_to_do


@dataclass(frozen=True)
class Execution:
    """How a study is executed; nothing here is part of a run's identity.

    Attributes:
        jobs: independent runs side by side.
        processes, launch: of each run, see `machines.Share`.
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
    command: tuple[str, ...] = (sys.executable, "-m", "semiseg")
    machine: Machine = field(default_factory=this_machine)
    poll_seconds: float = 0.2
    grace_seconds: float = 60.0
    line_seconds: float = 20.0


def run_missing(
    planned: Sequence[PlannedRun], *, name: str, results: Path, how: Execution, stream: TextIO | None = None
) -> list[PlannedRun]:
    """Runs what is missing and records it in `results`; the runs that were trained now.

    Raises:
        UserError: runs failed (the others have been finished first), or a run is being trained elsewhere.
        KeyboardInterrupt: SIGINT or SIGTERM; the running ones were given time to write a checkpoint.
    """
    todo = _todo(planned, results, how)
    if todo:
        for config in {digest(run.config.data.model_dump()): run.config.data for run in todo}.values():
            ensure_files(config)  # here, where people see how far it is
        progress = StudyProgress(todo, name=name, line_seconds=how.line_seconds, stream=stream or sys.stderr)
        # Counted over the whole plan, not over what is left of it: a continued study gives each run the same number
        # of threads, which the last bits of its numbers depend on.
        pretrainings = sum(run.row == PRETRAIN_ROW for run in planned)
        _Study(how, results, progress, list(todo), pretrainings, rows=len(planned) - pretrainings).run()
    return todo


def lines_to_type(planned: Sequence[PlannedRun], file: LaunchFile, *, results: Path, how: Execution) -> list[str]:
    """What to type on several machines, whose runs nobody can start from one of them; nothing if all are done."""
    lines = lines_for_machines(_todo(planned, results, how), file)
    if not lines:
        return []
    return [
        f"# {len(lines)} runs on {file.machines} machines: in this folder, on each machine, in this order, with RANK 0 "
        "on that of main_process_ip;",
        "# afterwards the same 'semiseg run' records them and reports",
        *lines,
    ]


def _todo(planned: Sequence[PlannedRun], results: Path, how: Execution) -> list[PlannedRun]:
    """What is missing; first records what has ended without being: an earlier call was killed, or it ran on its own."""
    for run in planned:
        if (run.folder / RESULT_NAME).is_file():
            append(results, read_result(run, typed=how.typed))
    return runs_to_do(planned, latest(read(results)), reproduce=how.reproduce)


@dataclass
class _Study:
    """The state of one call of `run_missing`.

    Attributes:
        failures: run_id -> why it failed.
        skipped: how many runs were not begun, since what they start from failed.
        pretrainings, rows: how many runs the whole plan has of each.
    """

    how: Execution
    results: Path
    progress: StudyProgress
    waiting: list[PlannedRun]
    pretrainings: int
    rows: int
    running: list[Child] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: int = 0

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
            skipped = f"; {self.skipped} runs that start from them were not begun" if self.skipped else ""
            reasons = "; ".join(self.failures.values())
            raise UserError(f"{len(self.failures)} of the study's runs failed{skipped}: {reasons}")

    def _start_ready(self) -> None:
        unfinished = {run.run_id for run in self.waiting} | {child.run.run_id for child in self.running}
        for run in list(self.waiting):
            if run.init_run in self.failures:
                self.waiting.remove(run)
                self.skipped += 1
            elif run.init_run not in unfinished and len(self.running) < self.how.jobs:
                self.waiting.remove(run)
                self._start(run)

    def _start(self, run: PlannedRun) -> None:
        slot = min(set(range(self.how.jobs)) - {child.slot for child in self.running})
        how = self.how
        together = min(how.jobs, self.pretrainings if run.row == PRETRAIN_ROW else self.rows)
        share = share_of(how.machine, slot=slot, side_by_side=together, processes=how.processes, launch=how.launch)
        try:
            child = Child(run, command=how.command, share=share, slot=slot, grace_seconds=how.grace_seconds)
            self.running.append(child)
        except UserError as error:
            self.failures[run.run_id] = f"{run.label}: {error}"

    def _collect_ended(self) -> None:
        for child in list(self.running):
            code, run = child.poll(), child.run
            if code is None:
                continue
            self.running.remove(child)
            try:
                if code != 0:
                    child.kill()  # what a dead launcher has left
                    raise UserError(child.complaint())
                append(self.results, read_result(run, typed=self.how.typed))
            except UserError as error:
                self.failures[run.run_id] = f"{run.label}: {error} (log: {child.output})"
                self.progress.end(child, message=f"{run.label} failed: {error}", finished=False)
            else:
                measured = ap_in_words(finished_values(run)["metrics"])
                message = f"{run.label} done in {format_seconds(time.monotonic() - child.started)}"
                self.progress.end(child, message=f"{message}: {measured}" if measured else message, finished=True)

    def _stop(self) -> None:
        self.progress.say("stopping: the running ones finish their step and write a checkpoint")
        for child in self.running:
            child.interrupt()
        deadline = time.monotonic() + self.how.grace_seconds
        with suppress(KeyboardInterrupt):  # a second signal ends the wait
            while any(child.poll() is None for child in self.running) and time.monotonic() < deadline:
                time.sleep(self.how.poll_seconds)
        for child in self.running:
            if child.poll() == 0:  # it ended well while it was being stopped
                with suppress(UserError):
                    append(self.results, read_result(child.run, typed=self.how.typed))
