"""A run as processes: its share of the machine, its start, its end and why it failed; accelerate's launch files.

On one machine the study starts its runs itself; on several it says what to type on each, and records what has ended.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from semiseg.data.workers import available_cores
from semiseg.errors import UserError
from semiseg.files import lock_folder
from semiseg.project import find
from semiseg.studies.identity import PlannedRun, write_run_files


@dataclass(frozen=True)
class Machine:
    """What the runs share: cores that this process may use, ids for CUDA_VISIBLE_DEVICES (none: the CPU only)."""

    cores: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class LaunchFile:
    """What a study needs to know of a launch file, or of the number of processes where there is none."""

    path: Path | None = None
    processes: int = 1  # of a run, on all machines together
    machines: int = 1
    # What accelerate's launcher would set of it for a single process, which is started without one.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """What one run gets of the machine: threads of each of its processes, and ids of GPUs."""

    launch: LaunchFile
    threads: int
    gpus: tuple[str, ...]


def this_machine() -> Machine:
    """Cores by this process's affinity, GPUs by CUDA_VISIBLE_DEVICES or all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Importing torch takes seconds: only where there can be a GPU at all.
    if visible == "" or not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        return Machine(available_cores(), ())
    import torch

    count = torch.cuda.device_count()
    ids = visible.split(",") if visible else map(str, range(count))
    return Machine(available_cores(), tuple(ids)[:count])


def share_of(machine: Machine, *, slot: int, side_by_side: int, launch: LaunchFile) -> Share:
    """Equal shares, for the run at index `slot` of those side by side; more runs than groups of GPUs take turns."""
    processes = launch.processes
    threads = max(1, machine.cores // (side_by_side * processes))
    if not machine.gpus:
        return Share(launch, threads, ())
    if processes > len(machine.gpus):
        asked = f"{launch.path}: num_processes {processes}" if launch.path else f"--processes {processes}"
        raise UserError(f"{asked}: there are {len(machine.gpus)} GPUs, one process uses one")
    first = slot % (len(machine.gpus) // processes) * processes
    return Share(launch, threads, machine.gpus[first : first + processes])


def launch_command(command: Sequence[str], arguments: Sequence[str], *, share: Share) -> list[str]:
    """The command line of a run, of a command such as (python, "-m", "semiseg") and its arguments.

    Several processes go through accelerate. One does not: accelerate's launcher of one process passes no signal on.
    """
    if share.launch.processes == 1:
        return [*command, *arguments]
    if share.launch.path is not None:
        settings = ["--config_file", str(share.launch.path)]
    else:
        # `--cpu` would start a single process without a word, so gloo is asked for as in `child_environment`. Port 0
        # is a free one, which lets several such runs go side by side.
        settings = ["--multi_gpu", "--num_processes", str(share.launch.processes), "--num_machines", "1"]
        settings += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [command[0], "-m", "accelerate.commands.launch", *settings, *command[1:], *arguments]


def child_environment(share: Share, *, threads: int) -> dict[str, str]:
    """The environment of a run with so many threads, 0 = the share's or a smaller OMP_NUM_THREADS of the user's own."""
    own = os.environ.get("OMP_NUM_THREADS", "")
    limit = min(share.threads, int(own)) if own.isdecimal() and int(own) else share.threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or limit), "PYTHONUNBUFFERED": "1"}
    if share.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    elif share.launch.processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def read_launch_file(name_or_path: str) -> LaunchFile:
    """Reads a launch file, found by `project.find`, with accelerate's own reader; it must start plain processes."""
    path = find("launch", name_or_path)
    # Takes seconds, as it imports torch: only who names a file waits for it.
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        loaded = load_config_from_file(str(path))
        kind = str(getattr(loaded.distributed_type, "value", loaded.distributed_type))
        processes, machines = int(loaded.num_processes), int(loaded.num_machines)
        precision = str(getattr(loaded.mixed_precision, "value", loaded.mixed_precision) or "no").lower()
        gpus = "" if loaded.use_cpu else str(getattr(loaded, "gpu_ids", None) or "all")
    except Exception as error:  # a reader of YAML may raise anything on a damaged file
        raise UserError(f"{path}: accelerate does not take it as a configuration: {error}".split("\n")[0]) from None
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"{path}: distributed_type is {kind!r}; allowed: 'NO', 'MULTI_GPU', 'MULTI_CPU'")
    if processes < 1 or machines < 1 or processes % machines:
        raise UserError(
            f"{path}: num_processes {processes} must be a positive multiple of num_machines {machines}, as it counts "
            "the processes of all machines"
        )
    if processes == 1:
        chosen = {} if gpus == "all" else {"CUDA_VISIBLE_DEVICES": gpus}
        return LaunchFile(path, processes, machines, {"ACCELERATE_MIXED_PRECISION": precision, **chosen})
    if kind != "MULTI_GPU":
        raise UserError(f"{path}: num_processes {processes} needs distributed_type MULTI_GPU, else one is started")
    return LaunchFile(path, processes, machines)


def lines_for_machines(runs: Sequence[PlannedRun], launch: LaunchFile) -> list[str]:
    """What to type on every machine to train these runs, as nobody can start them from one; writes their files."""
    launcher = ["accelerate", "launch", "--config_file", str(launch.path), "--machine_rank", "RANK", "-m", "semiseg"]
    return [
        f"# {len(runs)} runs on {launch.machines} machines: in this folder, on each machine, in this order, with "
        "RANK 0 on that of main_process_ip;",
        "# afterwards the same 'semiseg run' records them and reports",
        *(shlex.join([*launcher, *write_run_files(run)]) for run in runs),
    ]


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
        """Starts the run, which has `grace_seconds` for its checkpoint; a UserError if another process trains it."""
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

    def failure(self) -> str:
        """Why the run failed, in a sentence."""
        return reason(self.poll() or 0, _end_of(self.output, self._offset).decode("utf-8", "replace"))


def reason(code: int, output: str) -> str:
    """Why a process failed, in a sentence: the signal that killed it, its own sentence or its exception.

    The output of a launcher has the codes of the processes that failed.
    """
    codes = [int(text) for text in _EXIT_CODE.findall(output)]
    # One that fails takes the others along, which are then ended by SIGTERM or complain of their lost connection.
    killed = [item for item in codes if item < 0 and item != -signal.SIGTERM]
    refused = [item for item in codes if item == 2]
    code = (killed or refused or codes or [code])[-1]
    if code < 0:
        name = {-item.value: item.name for item in signal.Signals}.get(code, f"signal {-code}")
        likely = ": the memory was probably not enough" if name == "SIGKILL" else ""
        return f"killed by {name} ({(signal.strsignal(-code) or 'unknown').lower()}){likely}"
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
