"""What people see while a study runs: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from semiseg.engine.logs import format_seconds
from semiseg.studies.child import Child, last_step
from semiseg.studies.identity import PlannedRun, planned_steps

# A guess for runs whose length is only known once they have started, until one of them has said it.
_UNKNOWN_STEPS = 1000


@dataclass
class _Run:
    """How far a run is.

    Attributes:
        images: of a step: runs differ in their batch size, and images cost more alike.
        steps: None until they are known.
        first: step at the first look, done in an earlier attempt; None before it.
    """

    label: str
    images: int
    steps: int | None
    step: int = 0
    first: int | None = None
    ended: bool = False

    def stage(self) -> str:
        if self.first is None:
            return "starts"
        return "evaluates" if self.step == self.steps else f"step {self.step} of {self.steps}"


class StudyProgress:
    """Follows the runs of a study; the time left is that of all images to train on, at the mean rate so far."""

    def __init__(self, runs: Sequence[PlannedRun], *, name: str, line_seconds: float, stream: TextIO) -> None:
        self._runs = {
            run.run_id: _Run(run.label, run.config.optim.batch_size, planned_steps(run.config)) for run in runs
        }
        self._name = name
        self._line_seconds = line_seconds
        self._started = self._last_line = time.monotonic()
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        columns = (BarColumn(), TextColumn("{task.description}", markup=False))
        self._is_terminal = self._console.is_interactive
        self._bar = Progress(
            *columns, console=self._console, transient=True, auto_refresh=False, disable=not self._is_terminal
        )
        self._task = self._bar.add_task(name)
        self._bar.start()

    def update(self, running: Sequence[Child]) -> None:
        """Looks at the logs of the running children and shows what has changed."""
        for child in running:
            run, now = self._runs[child.run.run_id], last_step(child.run.folder / "log.jsonl")
            if now is not None:
                run.step, run.steps = now
                run.first = run.step if run.first is None else run.first
        done, total = self._images()
        self._bar.update(self._task, description=self._line(running), total=total, completed=done)
        self._bar.refresh()
        if not self._is_terminal and time.monotonic() - self._last_line >= self._line_seconds:
            self._last_line = time.monotonic()
            self.say(self._line(running))

    def end(self, child: Child, *, message: str, finished: bool) -> None:
        """A run has ended, and one line says how."""
        run = self._runs[child.run.run_id]
        run.ended = True
        # A failed run's missing steps are no longer ahead.
        run.steps = run.step = (run.steps or run.step) if finished else run.step
        self.say(message)

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(f"semiseg: {message}")

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _images(self) -> tuple[int, int]:
        """Images of all steps that are done, and of all steps."""
        runs = self._runs.values()
        guess = max((run.steps for run in runs if run.steps is not None), default=_UNKNOWN_STEPS)
        total = sum(run.images * (guess if run.steps is None else run.steps) for run in runs)
        return sum(run.images * run.step for run in runs), total

    def _line(self, running: Sequence[Child]) -> str:
        """All of it in one line."""
        runs, (done, total) = self._runs.values(), self._images()
        line = f"{self._name}: {sum(run.ended for run in runs)} of {len(runs)} runs done"
        now = done - sum(run.images * (run.first or 0) for run in runs)
        if now > 0:  # before the first step there is no rate
            line += f", about {format_seconds((total - done) * (time.monotonic() - self._started) / now)} left"
        stages = [f"{run.label} {run.stage()}" for run in (self._runs[child.run.run_id] for child in running)]
        return f"{line}; {', '.join(stages)}" if stages else line
