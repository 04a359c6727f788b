"""The processes of a run: accelerate's view of devices and ranks, and seeds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    set_seed,
)

from semiseg.config import RuntimeConfig
from semiseg.data.workers import available_cores
from semiseg.errors import UserError, UserNotice

# How long processes wait for one another. NCCL's ten minutes can pass while the main process converts annotations or
# runs the COCO evaluation; a process that died is noticed by the launcher, not by this.
PATIENCE = timedelta(hours=2)

Fact = TypeVar("Fact")


def start_accelerator(runtime: RuntimeConfig, *, seed: int) -> Accelerator:
    """One process's view of the run; the same call for one CPU, one GPU and `accelerate launch`.

    Threads and seeds are set here, so that whatever is built next is reproducible. What a run computes follows from
    its configuration alone, never from flags of the launcher: another precision of the launcher's, or of an Accelerator
    of this process's own, is a UserError.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", runtime.precision):
        raise UserError(
            f"accelerate was launched with mixed precision {launched!r}, but runtime.precision is "
            f"{runtime.precision!r}: choose it in the configuration and launch with '--mixed_precision no'"
        )
    if is_initialized() and AcceleratorState().mixed_precision != runtime.precision:
        raise UserError(
            f"this process has an Accelerator of its own with mixed precision {AcceleratorState().mixed_precision!r}, "
            f"but runtime.precision is {runtime.precision!r}: train in another process, or with that precision"
        )
    message = describe_crowding(
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        cores=available_cores(),
        gpus=torch.cuda.device_count(),
    )
    if message and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(message, UserNotice, stacklevel=2)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=runtime.precision,
        # Said here because accelerate would otherwise divide the loss by the launcher's flag of this name.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            # Gradients are views into the reduction buckets: one copy of them less in memory.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    set_seed(seed)
    return accelerator


@contextmanager
def accelerate_for_one_run() -> Iterator[None]:
    """Decorates what starts an accelerator: the next run of this process may then have another precision.

    accelerate keeps a process's precision for good. Where nobody had set one before, it is forgotten at the end, and
    devices and process groups are kept.
    """
    was_initialised = is_initialized()
    try:
        yield
    finally:
        if not was_initialised:
            AcceleratorState._reset_state()  # private: pyproject.toml bounds the version


def describe_crowding(processes: int, *, cores: int, gpus: int) -> str | None:
    """A sentence if a machine has fewer GPUs, or without any fewer cores, than processes of a run; else None."""
    there, what = (gpus, "GPU") if gpus else (cores, "core")
    if processes <= there:
        return None
    consequence = "one process uses one, so this fails or shares it" if gpus else "they will wait for each other"
    return f"{processes} processes on {there} {what}{'s' * (there > 1)}: {consequence}; take at most {there}"


def gather_to_main(items: list[Any]) -> list[Any]:
    """The items of all processes in the order of the processes, on the main process; nothing on the others.

    Unlike accelerate's own `gather_object`, which hands everything to everyone: of detections with masks that would be
    gigabytes per machine.
    """
    state = PartialState()
    if state.num_processes == 1:
        return items
    gathered: list[list[Any]] | None = [[]] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(items, gathered, dst=0)
    return [item for share in gathered or [] for item in share]


def same_on_all_ranks(fact: Fact, *, where: Path | str, remedy: str = "share the folder") -> Fact:
    """What every process finds in `where`; a UserError on all of them if machines do not see the same files."""
    values = gather_object([fact])
    if len(set(values)) > 1:
        message = ", ".join(sorted({str(item) for item in values}))
        raise UserError(f"{where}: not the same on every machine (found: {message}); {remedy}")
    return fact
