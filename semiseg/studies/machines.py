"""The machines that a study's runs share: cores, GPUs, and accelerate's launch files.

On one machine the study starts its runs with a launch file. Several machines have nobody who could start all of them:
there the study writes what each run is, says what to type on every machine, and records what has ended.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from semiseg.data.workers import available_cores
from semiseg.errors import UserError
from semiseg.project import find
from semiseg.studies.identity import PlannedRun, write_run_files


@dataclass(frozen=True)
class Machine:
    """What the runs share: cores that this process may use, and ids for CUDA_VISIBLE_DEVICES (none: the CPU only)."""

    cores: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one run gets of the machine: processes that train it together, threads of each, ids of GPUs.

    Attributes:
        launch: accelerate's configuration file that starts several processes; None = by their number alone.
    """

    processes: int
    threads: int
    gpus: tuple[str, ...]
    launch: Path | None = None


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
        settings = ["--config_file", str(share.launch)]
    else:
        # `--cpu` would start a single process without a word, so gloo is asked for as in `child_environment`. Port 0
        # is a free one, which lets several such runs go side by side.
        settings = ["--multi_gpu", "--num_processes", str(share.processes), "--num_machines", "1"]
        settings += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [command[0], "-m", "accelerate.commands.launch", *settings, *command[1:], *arguments]


def child_environment(share: Share, *, threads: int) -> dict[str, str]:
    """The environment of a run; a smaller OMP_NUM_THREADS of the user's own stays.

    Args:
        threads: wanted by the configuration, 0 = the share's.
    """
    own = os.environ.get("OMP_NUM_THREADS", "")
    limit = min(share.threads, int(own)) if own.isdigit() and int(own) else share.threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or limit), "PYTHONUNBUFFERED": "1"}
    if share.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    elif share.processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


@dataclass(frozen=True)
class LaunchFile:
    """What a study needs to know of a launch file.

    Attributes:
        processes: of all machines together.
        environment: what accelerate's launcher would set of it for a single process, which is started without one.
    """

    path: Path
    processes: int
    machines: int
    environment: dict[str, str] = field(default_factory=dict)


def read_launch_file(name_or_path: str) -> LaunchFile:
    """Reads a launch file, by accelerate's own reader: a path, or the name of a file in `experiments/launch/`.

    Raises:
        UserError: no such file, or one that accelerate does not take, or for something else than plain processes.
    """
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
    """What to type on every machine to train these runs, in this order; writes the files that they need."""
    lines = []
    for run in runs:
        launcher = ["accelerate", "launch", "--config_file", str(launch.path), "--machine_rank", "RANK"]
        lines.append(shlex.join([*launcher, "-m", "semiseg", *write_run_files(run)]))
    return lines
