"""What people see while a study runs: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

from semiseg.engine.logs import format_seconds
from semiseg.study_child import Child
from semiseg.study_plan import PlannedRun, planned_steps

# A guess for runs whose length is only known once they have started, until one of them has told it.
_UNKNOWN_STEPS = 1000


class StudyProgress:
    """Follows the runs of a study; the overall time left is that of all images to train on, at the mean rate so far."""

    def __init__(self, runs: Sequence[PlannedRun], *, name: str, line_seconds: float, stream: TextIO) -> None:
        self._stream = stream
        self._bars = stream.isatty()
        self._runs = {run.run_id: run for run in runs}
        self._steps = {run.run_id: planned_steps(run.config) for run in runs}
        self._batch = {run.run_id: run.config.optim.batch_size for run in runs}
        self._done: dict[str, int] = {}
        self._ended: set[str] = set()
        self._first: dict[str, int] = {}
        self._children: dict[int, tqdm] = {}
        self._name = name
        self._line_seconds = line_seconds
        self._started = self._told = time.monotonic()
        self._overall = tqdm(
            total=self._total(), desc=name, unit="img", position=0, smoothing=0.0, dynamic_ncols=True,
            file=stream, disable=not self._bars,
        )  # fmt: skip

    def update(self, running: Sequence[Child]) -> None:
        """Looks at the logs of the running children and shows what has changed."""
        for child in running:
            found = child.step()
            if found is not None:
                self._first.setdefault(child.run.run_id, found[0])
                self._done[child.run.run_id], self._steps[child.run.run_id] = found
        if self._bars:
            for child in running:
                self._show_child(child)
            self._overall.total = self._total()
            self._overall.initial = self._images(self._first)
            self._overall.n = self._images(self._done)
            self._overall.set_postfix_str(f"{len(self._ended)} of {len(self._runs)} runs", refresh=False)
            self._overall.refresh()
        elif time.monotonic() - self._told >= self._line_seconds:
            self._told = time.monotonic()
            self.say(self._line(running))

    def end(self, child: Child, *, message: str, finished: bool) -> None:
        """A run has ended: its bar goes, and one line says how."""
        bar = self._children.pop(child.slot, None)
        if bar is not None:
            bar.close()
        run_id = child.run.run_id
        self._ended.add(run_id)
        steps = self._steps[run_id] or self._done.get(run_id, 0)
        # A failed run's missing steps are no longer ahead.
        self._steps[run_id] = steps if finished else self._done.get(run_id, 0)
        self._done[run_id] = self._steps[run_id] or 0
        self.say(message)

    def say(self, message: str) -> None:
        """One line, above the bars if there are any."""
        tqdm.write(f"semiseg: {message}", file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        """Takes the bars away."""
        for bar in self._children.values():
            bar.close()
        self._children.clear()
        self._overall.leave = False
        self._overall.close()

    def seconds_left(self) -> float | None:
        """For all runs, at the mean rate so far; None before the first step."""
        done = self._images(self._done) - self._images(self._first)
        left = self._total() - self._images(self._done)
        return left * (time.monotonic() - self._started) / done if done > 0 else None

    def _total(self) -> int:
        known = [steps for steps in self._steps.values() if steps is not None]
        guess = max(known, default=_UNKNOWN_STEPS)
        return self._images({run_id: guess if steps is None else steps for run_id, steps in self._steps.items()})

    def _images(self, steps: dict[str, int]) -> int:
        """Images of so many steps of each run: runs differ in their batch size, and images cost more alike."""
        return sum(number * self._batch[run_id] for run_id, number in steps.items())

    def _show_child(self, child: Child) -> None:
        found = child.step()
        bar = self._children.get(child.slot)
        if bar is None:
            bar = self._children[child.slot] = tqdm(
                total=self._steps[child.run.run_id], desc=f"  {child.run.label}", unit="step", leave=False,
                position=child.slot + 1, smoothing=0.0, dynamic_ncols=True, file=self._stream,
            )  # fmt: skip
        if found is None:
            return
        if bar.n == 0 and bar.initial == 0:
            # The rate counts from the first look at the log: what lies before it is start-up or an earlier attempt.
            bar.initial, bar.start_t = found[0], time.time()
        bar.n, bar.total = found
        bar.set_postfix_str("evaluating" if found[0] == found[1] else "", refresh=False)
        bar.refresh()

    def _line(self, running: Sequence[Child]) -> str:
        places = []
        for child in running:
            steps = self._steps[child.run.run_id]
            step = self._done.get(child.run.run_id)
            place = "starts" if step is None else "evaluates" if step == steps else f"step {step} of {steps}"
            places.append(f"{child.run.label} {place}")
        left = self.seconds_left()
        told = [f"{self._name}: {len(self._ended)} of {len(self._runs)} runs done"]
        told += [", ".join(places)] if places else []
        told += [f"about {format_seconds(left)} left"] if places and left is not None else []
        return "; ".join(told)
