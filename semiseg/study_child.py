"""One run as a process of its own: its command, its share of the machine, its progress, its end."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from semiseg.errors import UserError
from semiseg.resources import available_cores, lock_folder, write_text
from semiseg.study_plan import PlannedRun

OUTPUT_NAME = "output.txt"
_TAIL_BYTES = 65536
_MARK = "SEMISEG_RUN"  # in the environment of all processes of a run, whoever started them
# What torch's launcher says of a process that failed.
_EXIT_CODE = re.compile(r"^ *exitcode *: (-?\d+) \(pid: ", re.MULTILINE)
_RANK = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """What the runs share.

    Attributes:
        cores: processor cores that this process may use.
        gpus: ids for CUDA_VISIBLE_DEVICES; empty = the processor only.
    """

    cores: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one run gets of the machine.

    Attributes:
        processes: that train it together.
        threads: of each process.
        gpus: ids for CUDA_VISIBLE_DEVICES.
        launch: accelerate's configuration file that starts several processes; None = by their number alone.
    """

    processes: int
    threads: int
    gpus: tuple[str, ...]
    launch: Path | None = None


def this_machine() -> Machine:
    """Cores by this process's affinity, GPUs by CUDA_VISIBLE_DEVICES or all of them."""
    cores = available_cores()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Importing torch takes seconds: only where there can be a GPU at all.
    if visible == "" or not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        return Machine(cores, ())
    import torch

    count = torch.cuda.device_count()
    named = tuple(visible.split(",")) if visible else tuple(str(number) for number in range(count))
    return Machine(cores, named[:count])


def share_of(machine: Machine, *, slot: int, side_by_side: int, processes: int, launch: Path | None = None) -> Share:
    """Equal shares; more runs than groups of GPUs share them in turn.

    Args:
        slot: 0..side_by_side - 1, the place of the run among those that go at the same time.
    """
    threads = max(1, machine.cores // (side_by_side * processes))
    if not machine.gpus:
        return Share(processes, threads, (), launch)
    if processes > len(machine.gpus):
        asked = f"--processes {processes}" if launch is None else f"{launch}: num_processes {processes}"
        raise UserError(f"{asked}: there are {len(machine.gpus)} GPUs, one process uses one")
    first = slot % (len(machine.gpus) // processes) * processes
    return Share(processes, threads, machine.gpus[first : first + processes], launch)


def launch_command(command: Sequence[str], arguments: Sequence[str], *, share: Share) -> list[str]:
    """The command line of a run; several processes go through accelerate.

    One does not: accelerate's launcher of one process passes no signal on.

    Args:
        command: python and what it runs, such as (python, "-m", "semiseg").
    """
    if share.processes == 1:
        return [*command, *arguments]
    if share.launch is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(share.launch)]
        return [command[0], *launcher, *command[1:], *arguments]
    # `--cpu` would start a single process without a word, so gloo is asked for as in `child_environment`. Port 0 is a
    # free one, which lets several such runs go side by side.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(share.processes)]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [command[0], *launcher, *settings, *command[1:], *arguments]


def child_environment(share: Share, *, threads: int) -> dict[str, str]:
    """The environment of a run; a smaller OMP_NUM_THREADS of the user's own stays.

    Args:
        threads: wanted by the configuration, 0 = the share's.
    """
    own = os.environ.get("OMP_NUM_THREADS", "")
    limit = threads or (min(share.threads, int(own)) if own.isdigit() and int(own) else share.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(limit), "PYTHONUNBUFFERED": "1"}
    if share.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    elif share.processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


class Child:
    """A running run, of one process or of several under accelerate's launcher.

    The process that trains keeps the run's folder locked, and goes on with it if this one is killed.
    """

    def __init__(
        self, run: PlannedRun, *, command: Sequence[str], share: Share, slot: int, grace_seconds: float
    ) -> None:
        """Starts the run.

        Args:
            grace_seconds: that an interrupted run has for its checkpoint.

        Raises:
            UserError: another process is training it.
        """
        self.run = run
        self.slot = slot
        self.started = time.monotonic()
        self.output = run.folder / OUTPUT_NAME
        self._mark = uuid.uuid4().hex
        run.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(run.folder):  # a look: the child locks it again as soon as it trains
            write_run_files(run)
        arguments = ["train", str(run.folder / "train.json"), "--out", str(run.folder), "--resume"]
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

    def step(self) -> tuple[int, int] | None:
        """(step, steps) of the last log line, None before there is one."""
        return last_step(self.run.folder / "log.jsonl")

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
            found = psutil.process_iter(["environ"])
            left = [process for process in found if (process.info["environ"] or {}).get(_MARK) == self._mark]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if not left:
                break
            psutil.wait_procs(left, timeout=1)

    def complaint(self) -> str:
        """Why the run failed, in a sentence."""
        with self.output.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._offset, size - _TAIL_BYTES))
            output = file.read().decode("utf-8", "replace")
        return reason(self.poll() or 0, output)


def reason(code: int, output: str) -> str:
    """Why a process failed, in a sentence: the signal that killed it, its own sentence or its exception.

    Args:
        code: its exit code, negative for a signal.
        output: what it wrote. Of a launcher it tells of the processes that failed, each with its own code.
    """
    codes = [int(found) for found in _EXIT_CODE.findall(output)]
    # One that fails takes the others along, which are then ended by SIGTERM or complain of their lost connection.
    causes = [found for found in codes if found < 0 and found != -signal.SIGTERM] or [2] * (2 in codes) or codes
    code = causes[-1] if causes else code
    if code < 0:
        return _told_signal(-code)
    # Not splitlines: a path in a sentence may hold U+2028.
    lines = [line.rstrip() for line in re.split("[\r\n]", _RANK.sub("", output)) if line.strip()]
    told = [line.removeprefix("semiseg: ") for line in lines if line.startswith("semiseg: ")]
    errors = _exceptions(lines)
    if errors and code not in (2, 130):
        return f"it ended with {errors[0 if codes else -1]}"
    own = [line for line in told if line != "interrupted"] or told
    return own[-1] if own else " | ".join(lines[-4:]) or f"it ended with exit code {code} without a word"


def _told_signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    meaning = (signal.strsignal(number) or "unknown").lower()
    likely = ": the memory was probably not enough" if name == "SIGKILL" else ""
    return f"killed by {name} ({meaning}){likely}"


def _exceptions(lines: Sequence[str]) -> list[str]:
    """The exceptions of the tracebacks, the launcher's own left out."""
    found, inside = [], False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and not line[0].isspace():
            found.append(line)
            inside = False
    return [line for line in found if not line.startswith("torch.distributed.elastic.")]


def write_run_files(run: PlannedRun) -> None:
    """Writes what a run is, into its folder: `identity.json`, and `train.json`, which `semiseg train` takes."""
    names = ("run_id", "identity", "study", "row", "split", "seed", "init")
    identity = {name: getattr(run, name) for name in names}
    write_text(run.folder / "identity.json", json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
    write_text(run.folder / "train.json", run.config.model_dump_json(indent=1) + "\n")


def last_step(log: Path) -> tuple[int, int] | None:
    """(step, steps) of the last whole line of a training log that has both."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            values = json.loads(line)
            return int(values["step"]), int(values["steps"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def python_command() -> tuple[str, ...]:
    """This very installation of the command line."""
    return (sys.executable, "-m", "semiseg")
