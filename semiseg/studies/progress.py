"""What people see while a study runs: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from semiseg.engine.logs import format_seconds
from semiseg.studies.child import Child
from semiseg.studies.identity import PlannedRun, planned_steps

# A guess for runs whose length is only known once they have started, until one of them has said it.
_UNKNOWN_STEPS = 1000


class StudyProgress:
    """Follows the runs of a study; the time left is that of all images to train on, at the mean rate so far."""

    def __init__(self, runs: Sequence[PlannedRun], *, name: str, line_seconds: float, stream: TextIO) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._steps = {run.run_id: planned_steps(run.config) for run in runs}
        self._done: dict[str, int] = {}
        self._first: dict[str, int] = {}  # step of each run at the first look, done in an earlier attempt
        self._ended: set[str] = set()
        self._name = name
        self._line_seconds = line_seconds
        self._started = self._last_line = time.monotonic()
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console, transient=True, auto_refresh=False, disable=not self._console.is_interactive,
        )  # fmt: skip
        self._overall = self._bars.add_task(name, total=self._total(), note="")
        self._children: dict[str, TaskID] = {}
        self._bars.start()

    def update(self, running: Sequence[Child]) -> None:
        """Looks at the logs of the running children and shows what has changed."""
        for child in running:
            run_id, step = child.run.run_id, child.step()
            if step is not None:
                self._first.setdefault(run_id, step[0])
                self._done[run_id], self._steps[run_id] = step
            if run_id not in self._children:
                self._children[run_id] = self._bars.add_task(f"  {child.run.label}", total=None, note="")
            self._bars.update(
                self._children[run_id],
                total=self._steps[run_id], completed=self._done.get(run_id, 0), note=self._stage(run_id),
            )  # fmt: skip
        self._bars.update(
            self._overall, total=self._total(), completed=self._images(self._done), note="; ".join(self._summary())
        )
        self._bars.refresh()
        if self._bars.disable and time.monotonic() - self._last_line >= self._line_seconds:
            self._last_line = time.monotonic()
            self.say(self._line(running))

    def end(self, child: Child, *, message: str, finished: bool) -> None:
        """A run has ended: its bar goes, and one line says how."""
        run_id = child.run.run_id
        if run_id in self._children:
            self._bars.remove_task(self._children.pop(run_id))
        self._ended.add(run_id)
        steps = self._steps[run_id] or self._done.get(run_id, 0)
        # A failed run's missing steps are no longer ahead.
        self._steps[run_id] = self._done[run_id] = steps if finished else self._done.get(run_id, 0)
        self.say(message)

    def say(self, message: str) -> None:
        """One line, above the bars if there are any."""
        self._console.print(f"semiseg: {message}")

    def close(self) -> None:
        """Takes the bars away."""
        self._bars.stop()

    def _seconds_left(self) -> float | None:
        """For all runs, at the mean rate so far; None before the first step."""
        done = self._images(self._done) - self._images(self._first)
        left = self._total() - self._images(self._done)
        return left * (time.monotonic() - self._started) / done if done > 0 else None

    def _total(self) -> int:
        guess = max((steps for steps in self._steps.values() if steps is not None), default=_UNKNOWN_STEPS)
        return self._images({run_id: guess if steps is None else steps for run_id, steps in self._steps.items()})

    def _images(self, steps: dict[str, int]) -> int:
        """Images of so many steps of each run: runs differ in their batch size, and images cost more alike."""
        return sum(count * self._runs[run_id].config.optim.batch_size for run_id, count in steps.items())

    def _stage(self, run_id: str) -> str:
        if run_id not in self._done:
            return "starts"
        return "evaluates" if self._done[run_id] == self._steps[run_id] else ""

    def _summary(self) -> list[str]:
        left = self._seconds_left()
        summary = [f"{len(self._ended)} of {len(self._runs)} runs done"]
        return summary if left is None else [*summary, f"about {format_seconds(left)} left"]

    def _line(self, running: Sequence[Child]) -> str:
        """All of it in one line."""
        done, *left = self._summary()
        stages = []
        for run_id, label in ((child.run.run_id, child.run.label) for child in running):
            stages.append(f"{label} {self._stage(run_id) or f'step {self._done[run_id]} of {self._steps[run_id]}'}")
        return "; ".join([f"{self._name}: {done}", *([", ".join(stages), *left] if stages else [])])
