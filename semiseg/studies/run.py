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

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from semiseg.config.read import digest
from semiseg.data.sources import ensure_files
from semiseg.data.workers import StopOnSignal
from semiseg.engine.logs import format_seconds
from semiseg.errors import UserError
from semiseg.results import RESULT_NAME, ap_in_words, append, latest, read
from semiseg.studies.file import PRETRAIN_ROW
from semiseg.studies.identity import PlannedRun, planned_steps
from semiseg.studies.machines import Child, LaunchFile, Machine, last_step, share_of, this_machine
from semiseg.studies.status import read_result, runs_to_do


@dataclass(frozen=True)
class Execution:
    """How a study is executed; nothing here is part of a run's identity."""

    jobs: int = 1  # independent runs side by side
    launch: LaunchFile = field(default_factory=LaunchFile)  # of each run
    reproduce: bool = False  # train also what is recorded but was not trained in this folder
    typed: tuple[str, ...] = ()  # the command that the user typed, for the record
    command: tuple[str, ...] = (sys.executable, "-m", "semiseg")  # what runs the command line of a child
    machine: Machine = field(default_factory=this_machine)
    poll_seconds: float = 0.2
    grace_seconds: float = 60.0  # an interrupted run's time for its checkpoint
    line_seconds: float = 20.0  # between two lines of progress where there is no terminal


def run_missing(
    planned: Sequence[PlannedRun], *, name: str, results: Path, how: Execution, stream: TextIO | None = None
) -> list[PlannedRun]:
    """Runs what is missing and records it in `results`; the runs that were trained now.

    Where runs fail it is a UserError, after the others have been finished; SIGINT or SIGTERM is a KeyboardInterrupt,
    after the running ones had time to write a checkpoint.
    """
    todo = runs_to_train(planned, results=results, how=how)
    if todo:
        for config in {digest(run.config.data.model_dump()): run.config.data for run in todo}.values():
            ensure_files(config)  # here, where people see how far it is
        progress = StudyProgress(todo, name=name, line_seconds=how.line_seconds, stream=stream or sys.stderr)
        # Counted over the whole plan, not over what is left of it: a continued study gives each run the same number
        # of threads, which the last bits of its numbers depend on.
        pretrainings = sum(run.row == PRETRAIN_ROW for run in planned)
        _Study(how, results, progress, list(todo), pretrainings, rows=len(planned) - pretrainings).run()
    return todo


def runs_to_train(planned: Sequence[PlannedRun], *, results: Path, how: Execution) -> list[PlannedRun]:
    """What is missing; first records what has ended without being: an earlier call was killed, or it ran on its own."""
    for run in planned:
        if (run.folder / RESULT_NAME).is_file():
            append(results, read_result(run, typed=how.typed))
    return runs_to_do(planned, latest(read(results)), reproduce=how.reproduce)


@dataclass
class _Study:
    """The state of one call of `run_missing`."""

    how: Execution
    results: Path
    progress: StudyProgress
    waiting: list[PlannedRun]
    pretrainings: int  # that the whole plan has, and rows
    rows: int
    running: list[Child] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # run_id -> why it failed
    skipped: int = 0  # not begun, since what they start from failed

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
        how = self.how
        slot = min(set(range(how.jobs)) - {child.slot for child in self.running})
        together = min(how.jobs, self.pretrainings if run.row == PRETRAIN_ROW else self.rows)
        share = share_of(how.machine, slot=slot, side_by_side=together, launch=how.launch)
        try:
            self.running.append(
                Child(run, command=how.command, share=share, slot=slot, grace_seconds=how.grace_seconds)
            )
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
                    raise UserError(child.failure())
                result = read_result(run, typed=self.how.typed)
                append(self.results, result)
            except UserError as error:
                self.failures[run.run_id] = f"{run.label}: {error} (log: {child.output})"
                self.progress.end(child, message=f"{run.label} failed: {error}", finished=False)
            else:
                measured = ap_in_words(result.metrics)
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


class StudyProgress:
    """What people see: a bar with the time left on a terminal, a line now and then elsewhere.

    The time left is that of all images to train on, at the mean rate so far: runs differ in their batch size, and
    images cost more alike.
    """

    def __init__(self, runs: Sequence[PlannedRun], *, name: str, line_seconds: float, stream: TextIO) -> None:
        planned = {run.run_id: planned_steps(run.config) for run in runs}
        longest = max((steps for steps in planned.values() if steps is not None), default=1000)
        self._name = name
        self._images = {run.run_id: run.config.optim.batch_size for run in runs}  # of a step
        # Steps done, and in all; one of unknown length is as long as the longest until its log says more.
        self._steps = {run_id: (0, longest if steps is None else steps) for run_id, steps in planned.items()}
        self._first: dict[str, int] = {}  # step of a run at the first look, done in an earlier attempt
        self._ended = 0
        self._line_seconds = line_seconds
        self._started = self._last_line = time.monotonic()
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        columns = (BarColumn(), TextColumn("{task.description}", markup=False))
        bar = self._console.is_interactive
        self._bar = Progress(*columns, console=self._console, transient=True, auto_refresh=False, disable=not bar)
        self._task = self._bar.add_task(name)
        self._bar.start()

    def update(self, running: Sequence[Child]) -> None:
        """Looks at the logs of the running children and shows what has changed."""
        for child in running:
            now = last_step(child.run.folder / "log.jsonl")
            if now is not None:
                self._steps[child.run.run_id] = now
                self._first.setdefault(child.run.run_id, now[0])
        done, total = self._images_done()
        line = self._line(running)
        self._bar.update(self._task, description=line, total=total, completed=done)
        self._bar.refresh()
        if self._bar.disable and time.monotonic() - self._last_line >= self._line_seconds:
            self._last_line = time.monotonic()
            self.say(line)

    def end(self, child: Child, *, message: str, finished: bool) -> None:
        """A run has ended, and one line says how."""
        step, steps = self._steps[child.run.run_id]
        last = steps if finished else step  # a failed run's missing steps are no longer ahead
        self._steps[child.run.run_id] = last, last
        self._ended += 1
        self.say(message)

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(f"semiseg: {message}")

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _images_done(self) -> tuple[int, int]:
        """Images of all steps that are done, and of all steps."""
        sizes = [(self._images[run_id], *steps) for run_id, steps in self._steps.items()]
        return sum(images * step for images, step, _ in sizes), sum(images * steps for images, _, steps in sizes)

    def _line(self, running: Sequence[Child]) -> str:
        line = f"{self._name}: {self._ended} of {len(self._steps)} runs done"
        done, total = self._images_done()
        now = done - sum(self._images[run_id] * step for run_id, step in self._first.items())
        if now > 0:  # before the first step there is no rate
            line += f", about {format_seconds((total - done) * (time.monotonic() - self._started) / now)} left"
        stages = []
        for run in [child.run for child in running]:
            step, steps = self._steps[run.run_id]
            stage = "evaluates" if step == steps else f"step {step} of {steps}"
            stages.append(f"{run.label} {stage if run.run_id in self._first else 'starts'}")
        return f"{line}; {', '.join(stages)}" if stages else line
