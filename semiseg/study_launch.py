"""Launch files: accelerate's own configuration of processes and machines, used for each run of a study.

On one machine the study starts its runs with it. Several machines have nobody who could start all of them: there the
study writes what each run is, says what to type on every machine, and records what has ended.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from semiseg.errors import UserError
from semiseg.resources import find
from semiseg.results import Result
from semiseg.study_child import write_run_files
from semiseg.study_plan import PlannedRun
from semiseg.study_run import runs_to_do


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
    """Reads a launch file, by accelerate's own reader.

    Args:
        name_or_path: a path, or the name of a file in `experiments/launch/`.

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
    if kind != "MULTI_GPU" and processes > 1:
        raise UserError(f"{path}: num_processes {processes} needs distributed_type MULTI_GPU, else one is started")
    if processes > 1:
        return LaunchFile(path, processes, machines)
    chosen = {} if gpus == "all" else {"CUDA_VISIBLE_DEVICES": gpus}
    return LaunchFile(path, processes, machines, {"ACCELERATE_MIXED_PRECISION": precision, **chosen})


def lines_for_machines(
    planned: Sequence[PlannedRun], recorded: Mapping[str, Result], launch: LaunchFile, *, reproduce: bool
) -> list[str]:
    """What to type on every machine to train what is missing, in this order; writes the files that the runs need."""
    lines = []
    for run in runs_to_do(planned, recorded, reproduce=reproduce):
        write_run_files(run)
        launcher = ["accelerate", "launch", "--config_file", str(launch.path), "--machine_rank", "RANK"]
        command = ["-m", "semiseg", "train", str(run.folder / "train.json"), "--out", str(run.folder), "--resume"]
        lines.append(shlex.join([*launcher, *command]))
    return lines
