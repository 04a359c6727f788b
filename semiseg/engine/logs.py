"""The training log: JSON lines (the record that reports read), TensorBoard, and progress for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from semiseg.config import RunConfig
from semiseg.config.former import leaves
from semiseg.config.read import read_json_lines
from semiseg.errors import UserError
from semiseg.files import write_text, writing_errors

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LOG_NAME = "log.jsonl"
FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 60.0  # of progress where there is no terminal: until the first, between two


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, up to the first that is none: one cut off by an interruption is left out."""
    return list(takewhile(_is_record, (line for _, line in read_json_lines(path))))


def _is_record(line: Any) -> bool:
    """Whether a line's values have the kinds that whoever reads the log relies on."""
    if not isinstance(line, dict):
        return False
    step, scores = line.get("step"), line.get("validation", {})
    if type(step) is not int or not isinstance(scores, dict):
        return False
    return all(type(number) in (int, float) for number in (line.get("seconds"), line.get("steps", 0), *scores.values()))


def format_seconds(seconds: float) -> str:
    """A duration for people: 45 s, 3 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shows_bars(progress: bool | None) -> bool:
    """Whether progress bars are drawn: as asked for, and with None on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


class TrainingLog:
    """Writes one record every so many steps to `log.jsonl` and TensorBoard, and shows how far the run is.

    When a run continues from step k, lines of later steps are removed first: they belong to lost work that is
    about to be done again. `progress`: True shows a bar, False nothing, None a bar on a terminal and a plain line a
    minute elsewhere, so that the log file of a job on a cluster tells how far it is.
    """

    def __init__(
        self,
        out: Path,
        *,
        steps: int,
        start_step: int,
        tensorboard: bool,
        progress: bool | None,
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        self._trackers = trackers
        self.path = out / LOG_NAME
        kept = [line for line in read_log(self.path) if line["step"] <= start_step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0  # of training so far, over all interruptions
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            # Imported late: it costs a second, and only runs that write event files need it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        bar = shows_bars(progress)
        self._bar = tqdm(
            total=steps, initial=start_step, unit="step", disable=not bar, file=sys.stderr, dynamic_ncols=True
        )
        self._lines = _Lines(steps=steps, start_step=start_step) if progress is None and not bar else None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        with writing_errors(self.path):
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        for tracker in self._trackers:
            tracker.finish()

    def advance(self) -> None:
        """One step further for whoever watches."""
        self._bar.update(1)
        if self._lines is not None:
            self._lines.advance()

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; nested tables of numbers become tags `table/name` of TensorBoard and of trackers."""
        with writing_errors(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # before a later checkpoint, so that no line before that can be missing
        if "losses" in record:
            loss = f"loss {sum(record['weighted'].values()):.3f}"
            self._bar.set_postfix_str(loss)
            if self._lines is not None:
                self._lines.known = f", {loss}, {record['images_per_second']:.3g} images/s"
        tags = {name: value for name, value in _tags(record).items() if name not in ("step", "steps")}
        if self._writer is not None:
            for name, value in tags.items():
                self._writer.add_scalar(name, value, record["step"])
        for tracker in self._trackers:
            tracker.log(tags, step=record["step"])


def _tags(record: dict[str, Any]) -> dict[str, float]:
    flat = {path.replace(".", "/"): value for path, value in leaves(record).items()}
    return {tag: value for tag, value in flat.items() if isinstance(value, int | float)}


def start_trackers(config: RunConfig, *, run_name: str) -> list[GeneralTracker]:
    """The experiment trackers of `runtime.trackers`, told the configuration; their project is `semiseg`.

    What else they need, such as an account or a server, they take from their own environment variables.
    """
    names = config.runtime.trackers
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = [str(name) for name in get_available_trackers()]
    if missing := [name for name in names if name not in there]:
        raise UserError(f"runtime.trackers: {missing[0]!r} is not installed: pip install {missing[0]}")
    options = {"wandb": {"name": run_name}, "mlflow": {"run_name": run_name}, "swanlab": {"experiment_name": run_name}}
    trackers = [LOGGER_TYPE_TO_CLASS[name]("semiseg", **options.get(name, {})) for name in names]
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration({key: str(value) for key, value in leaves(config.model_dump()).items()})
    return trackers


class _Lines:
    """Progress as plain lines on standard error: the first after some seconds, then one a minute."""

    def __init__(self, *, steps: int, start_step: int) -> None:
        self.known = ""  # what the last record said, for the next line
        self._steps, self._first, self._step = steps, start_step, start_step
        self._began = time.monotonic()
        self._next = self._began + FIRST_LINE_SECONDS

    def advance(self) -> None:
        """Counts a step, and prints a line if it is time for one."""
        self._step += 1
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        left = (now - self._began) / (self._step - self._first) * (self._steps - self._step)
        line = f"step {self._step} of {self._steps}{self.known}, about {format_seconds(left)} left"
        print(line, file=sys.stderr, flush=True)
