"""One run as a process of its own: its command, its share of the machine, its progress, its end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from semiseg.errors import UserError
from semiseg.resources import available_cores, write_text
from semiseg.study_plan import PlannedRun

OUTPUT_NAME = "output.txt"
_TAIL_BYTES = 65536


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
        launch: accelerate's configuration file that starts the processes; None = by their number alone.
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
    """The command line of a run; several processes go through accelerate, and one that has a launch file.

    Args:
        command: python and what it runs, such as (python, "-m", "semiseg").
    """
    if share.launch is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(share.launch)]
        return [command[0], *launcher, *command[1:], *arguments]
    if share.processes == 1:
        return [*command, *arguments]
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
    """A running run. Its folder is locked as long as the process lives, even if this one is killed."""

    def __init__(self, run: PlannedRun, *, command: Sequence[str], share: Share, slot: int) -> None:
        self.run = run
        self.slot = slot
        self.started = time.monotonic()
        self.output = run.folder / OUTPUT_NAME
        write_run_files(run)
        lock = _lock(run.folder)
        arguments = ["train", str(run.folder / "train.json"), "--out", str(run.folder), "--resume"]
        try:
            with self.output.open("ab") as output:
                self._offset = output.tell()
                self._process = subprocess.Popen(
                    launch_command(command, arguments, share=share),
                    env=child_environment(share, threads=run.config.runtime.threads),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C reaches this process alone, which passes it on: the workers of a loader must outlive
                    # the step that is being finished.
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )
        finally:
            lock.close()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    def step(self) -> tuple[int, int] | None:
        """(step, steps) of the last log line, None before there is one."""
        return last_step(self.run.folder / "log.jsonl")

    def interrupt(self) -> None:
        """Asks the run to finish its step, write a checkpoint and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends the run and everything it started, at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def complaint(self) -> str:
        """The sentence with which the run failed, else the last lines of what it wrote."""
        with self.output.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._offset, size - _TAIL_BYTES))
            lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = [line.removeprefix("semiseg: ") for line in lines if line.startswith("semiseg: ")]
        return told[-1] if told else " | ".join(lines[-4:]) or f"it ended with exit code {self.poll()} without a word"


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
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _lock(folder: Path) -> IO[bytes]:
    """An exclusive lock on the folder; the child inherits it, so that it outlives an accident of this process."""
    lock = (folder / ".lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder}: another process is training this run; wait for it or end it first") from None
    return lock


def python_command() -> tuple[str, ...]:
    """This very installation of the command line."""
    return (sys.executable, "-m", "semiseg")
