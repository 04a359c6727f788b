"""One run as a process of its own: its start, its progress, its end, and why it failed."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from semiseg.files import lock_folder
from semiseg.studies.identity import PlannedRun, write_run_files
from semiseg.studies.machines import Share, child_environment, launch_command

OUTPUT_NAME = "output.txt"
_TAIL_BYTES = 65536
_MARK = "SEMISEG_RUN"  # in the environment of all processes of a run, whoever started them
# What torch's launcher says of a process that failed.
_EXIT_CODE = re.compile(r"^ *exitcode *: (-?\d+) \(pid: ", re.MULTILINE)
_RANK = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)
# The last line of a traceback, without what the launcher itself says.
_EXCEPTION = re.compile(
    r"^Traceback \(most recent call last\).*\n(?:\s.*\n)*(?!torch\.distributed\.elastic\.)(\S.*)", re.MULTILINE
)


class Child:
    """A running run, of one process or of several under accelerate's launcher.

    The process that trains keeps the run's folder locked, and goes on with it if this one is killed.
    """

    def __init__(
        self, run: PlannedRun, *, command: Sequence[str], share: Share, slot: int, grace_seconds: float
    ) -> None:
        """Starts the run; a UserError if another process is training it.

        Args:
            grace_seconds: that an interrupted run has for its checkpoint.
        """
        self.run, self.slot, self.started = run, slot, time.monotonic()
        self.output = run.folder / OUTPUT_NAME
        self._mark = uuid.uuid4().hex
        run.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(run.folder):  # a look: the child locks it again as soon as it trains
            arguments = write_run_files(run)
        environment = {
            **child_environment(share, threads=run.config.runtime.threads),
            _MARK: self._mark,
            # torch's launcher passes a signal on and kills what is left after 30 seconds, unless told otherwise.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds)),
        }
        with self.output.open("ab") as output:
            self._offset = output.tell()
            self._process = subprocess.Popen(
                launch_command(command, arguments, share=share),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process alone, which passes it on: the workers of a loader must outlive
                # the step that is being finished.
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Asks the run to finish its step, write a checkpoint and end; a launcher passes this on to its processes."""
        # Not SIGINT, which a shell that starts this in the background makes all processes ignore.
        self._process.terminate()

    def kill(self) -> None:
        """Ends the run and everything it started, at once, even if the process that started it is gone."""
        self._process.kill()
        self._process.wait()
        for _ in range(10):  # new ones may have been started while the others were ended
            # The processes of a launcher are in sessions of their own, and nobody's children once it is gone.
            every = psutil.process_iter(["environ"])
            left = [process for process in every if (process.info["environ"] or {}).get(_MARK) == self._mark]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not left:
                break
            psutil.wait_procs(left, timeout=1)

    def complaint(self) -> str:
        """Why the run failed, in a sentence."""
        return reason(self.poll() or 0, _end_of(self.output, self._offset).decode("utf-8", "replace"))


def reason(code: int, output: str) -> str:
    """Why a process failed, in a sentence: the signal that killed it, its own sentence or its exception.

    Args:
        code: its exit code, negative for a signal.
        output: what it wrote; that of a launcher has the codes of the processes that failed.
    """
    codes = [int(text) for text in _EXIT_CODE.findall(output)]
    # One that fails takes the others along, which are then ended by SIGTERM or complain of their lost connection.
    killed = [item for item in codes if item < 0 and item != -signal.SIGTERM]
    refused = [item for item in codes if item == 2]
    code = (killed or refused or codes or [code])[-1]
    if code < 0:
        return _killed_by(-code)
    # Not splitlines: a path in a sentence may hold U+2028.
    lines = [line.rstrip() for line in re.split("[\r\n]", _RANK.sub("", output)) if line.strip()]
    errors = _EXCEPTION.findall("\n".join(lines))
    if errors and code not in (2, 130):
        return f"it ended with {errors[0 if codes else -1]}"
    sentences = [line.removeprefix("semiseg: ") for line in lines if line.startswith("semiseg: ")]
    sentences = [line for line in sentences if line != "interrupted"] or sentences
    if sentences:
        return sentences[-1]
    return " | ".join(lines[-4:]) or f"it ended with exit code {code} without a word"


def _killed_by(number: int) -> str:
    names = {item.value: item.name for item in signal.Signals}
    name = names.get(number, f"signal {number}")
    meaning = (signal.strsignal(number) or "unknown").lower()
    likely = ": the memory was probably not enough" if name == "SIGKILL" else ""
    return f"killed by {name} ({meaning}){likely}"


def last_step(log: Path) -> tuple[int, int] | None:
    """(step, steps) of the last whole line of a training log that has both."""
    lines = _end_of(log).split(b"\n")[:-1] if log.exists() else []
    for line in reversed(lines):
        try:
            values = json.loads(line)
            return int(values["step"]), int(values["steps"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def _end_of(path: Path, start: int = 0) -> bytes:
    """The last bytes of a file, of those from `start` on."""
    with path.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read()
