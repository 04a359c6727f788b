"""The training log: JSON lines (the record that reports read), TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from semiseg.resources import write_text

LOG_NAME = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, up to the first that is none: one cut off by an interruption is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not {"step", "seconds"} <= set(line):
            break
        lines.append(line)
    return lines


class TrainingLog:
    """Writes one record every so many steps to `log.jsonl`, TensorBoard and a progress bar.

    When a run continues from step k, lines of later steps are removed first: they belong to lost work that is
    about to be done again.
    """

    def __init__(self, out: Path, *, steps: int, start_step: int, tensorboard: bool, progress: bool) -> None:
        self.path = out / LOG_NAME
        kept = [line for line in read_log(self.path) if line["step"] <= start_step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0  # of training so far, over all interruptions
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            # Imported late: it costs a second, and only runs that write event files need it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step)
        self._bar = tqdm(
            total=steps, initial=start_step, unit="step", disable=not progress, file=sys.stderr, dynamic_ncols=True
        )

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self) -> None:
        """One step further on the progress bar."""
        self._bar.update(1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; nested tables of numbers become TensorBoard tags `table/name`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if "losses" in record:
            self._bar.set_postfix_str(f"loss {sum(record['weighted'].values()):.3f}")
        if self._writer is None:
            return
        for name, value in record.items():
            if isinstance(value, dict):
                for key, number in value.items():
                    if isinstance(number, int | float):
                        self._writer.add_scalar(f"{name}/{key}", number, record["step"])
            elif isinstance(value, int | float) and name not in ("step", "steps"):
                self._writer.add_scalar(name, value, record["step"])
