"""Peak memory of a piece of work over what was there before: resident memory on the CPU, allocated on a GPU."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from semiseg.data.freed_memory import return_freed_memory

MEBIBYTE = 2**20
_PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """MiB at the highest point: over what was there at the start, and of the whole process (on a GPU: of torch)."""

    added: float
    total: float


def peak_memory_mb(device: torch.device) -> Callable[[], Peak]:
    """Starts a measurement; the function that it returns ends it.

    On Linux the kernel's high-water mark of resident memory (VmHWM) is reset, so only what happens in between counts;
    where it cannot be reset it may show an earlier peak. Elsewhere the highest resident memory of the process's life
    is compared with itself, which misses whatever stays below an earlier peak. On a GPU: torch's allocated bytes.
    """
    peak: Callable[[], int]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    elif (_PROCESS / "status").exists():
        release_freed_memory()
        _reset_high_water_mark()
        before, peak = _status_bytes("VmRSS"), lambda: _status_bytes("VmHWM")
    else:
        release_freed_memory()
        before, peak = _highest_ever(), _highest_ever

    def end() -> Peak:
        highest = peak()
        return Peak(added=max(highest - before, 0) / MEBIBYTE, total=highest / MEBIBYTE)

    return end


def release_freed_memory() -> None:
    """Collects garbage and hands the C library's free memory back to the system, where that is glibc."""
    gc.collect()
    return_freed_memory()


def _reset_high_water_mark() -> None:
    with contextlib.suppress(OSError):  # read-only /proc of some containers: the mark stays where it was
        (_PROCESS / "clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _highest_ever() -> int:
    import resource  # Unix has it

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux kilobytes
