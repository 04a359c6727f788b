"""What a row of the benchmark is, and measuring it: each side in a process of its own, taking turns.

The processes are forked from a server that has imported everything and computed nothing: each starts with the same
state of the allocator, and no import is paid twice. `torch.utils.benchmark.Timer` is not used: it does the work twice
before each number, and the first pass, with its fresh memory, is one that counts here.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from semiseg.data.workers import return_freed_memory
from semiseg.errors import UserError

Side = Literal["ours", "straightforward"]
Scale = Literal["full", "quick", "tiny"]
Sizes = Mapping[str, int]
Result = dict[str, Any]  # name -> float64 array, or a list of texts or numbers
SIDES: tuple[Side, Side] = ("ours", "straightforward")
LEAST_MEMORY_MB = 0.1  # below the resolution of the measurement; keeps ratios finite
MEBIBYTE = 2**20
PRELOADED = ["benchmarks.rows"]  # what the server of the processes has imported


class Place(NamedTuple):
    """Where a side is measured: the device, and a folder of its own for files, removed afterwards."""

    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Task:
    """One side of a row with its inputs built.

    Attributes:
        run: the work that is timed and whose memory is measured; may be called again and again.
        result: turns what `run` returned into something comparable by name, outside the measurement.
        units: of work in one run; the seconds of the table are per unit.
    """

    run: Callable[[], Any]
    result: Callable[[Any], dict[str, Any]] = lambda returned: returned
    units: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; its functions belong to a module, so that a row travels to another process.

    Attributes:
        name: in the table and the JSON.
        sizes: of the full measurement; `quick` and `tiny` replace some of them. Tiny ones warm up libraries before the
            memory of the first full pass is measured, and serve tests.
        passes, quick_passes: at full size. The first gives the memory; the seconds are the median of the others, or
            the first one's if there is no other.
        prepare: builds the inputs of a side, seeded, and returns its work.
        agree: whether the results of ours and of the straightforward side are the same, within the row's tolerance.
        tiny_agree: the same at tiny sizes, where rounding shows more; None = `agree`.
        device: "cpu" or "cuda".
        package: an optional package that the row needs.
        facts: from sizes and seconds to further keys of the JSON, such as images per second.
    """

    name: str
    sizes: Sizes
    quick: Sizes = field(default_factory=dict)
    tiny: Sizes
    passes: int
    quick_passes: int
    prepare: Callable[[Side, Sizes, Place], Task]
    agree: Callable[[Result, Result], bool]
    tiny_agree: Callable[[Result, Result], bool] | None = None
    device: str = "cpu"
    package: str | None = None
    facts: Callable[[Sizes, float], dict[str, float]] | None = None

    def sizes_at(self, scale: Scale) -> Sizes:
        """The sizes of one of the three scales; quick ones apply to nothing else."""
        return {**self.sizes, **{"full": {}, "quick": self.quick, "tiny": self.tiny}[scale]}


@dataclass(frozen=True)
class Close:
    """Arrays agree if no element differs by more than `tolerance` of the largest; everything else must be equal."""

    tolerance: float

    def __call__(self, ours: Result, straightforward: Result) -> bool:
        if ours.keys() != straightforward.keys():
            return False
        return all(self._same(ours[name], value) for name, value in straightforward.items())

    def _same(self, ours: Any, other: Any) -> bool:
        if not isinstance(other, np.ndarray):
            return bool(ours == other)
        if ours.shape != other.shape or not (np.isfinite(ours).all() and np.isfinite(other).all()):
            return False
        largest = np.abs(other).max(initial=0.0)
        return bool(np.abs(ours - other).max(initial=0.0) <= self.tolerance * largest)


class Pass(NamedTuple):
    """One execution: wall seconds per unit of work, MiB of its peak over the inputs and of the whole process."""

    seconds: float
    added_mb: float
    total_mb: float


class Worker:
    """One side of a row with its inputs built, after a pass at tiny sizes that makes libraries load what they need."""

    def __init__(self, row: Row, side: Side, sizes: Sizes, folder: Path) -> None:
        self._device = torch.device(row.device)
        for name in ("warm_up", "inputs"):
            (folder / side / name).mkdir(parents=True)
        tiny = row.sizes_at("tiny")
        if sizes != tiny:
            row.prepare(side, tiny, Place(self._device, folder / side / "warm_up")).run()
        self._task = row.prepare(side, sizes, Place(self._device, folder / side / "inputs"))
        self._returned: Any = None

    def measure(self) -> Pass:
        """Does the work once."""
        self._returned = None
        peak = peak_memory(self._device)
        started = time.perf_counter()
        self._returned = self._task.run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - started
        return Pass(seconds / self._task.units, *peak())

    def result(self) -> Result:
        """What the last pass computed; tensors as float64 arrays."""
        result = self._task.result(self._returned)
        return {name: array(value) if isinstance(value, Tensor) else value for name, value in result.items()}


def array(values: Tensor) -> np.ndarray:
    """A tensor of any device as float64."""
    return values.detach().cpu().double().numpy()


_workers: dict[Side, Worker] = {}  # of this process: in one that measures there is one


def _build(row: Row, side: Side, sizes: Sizes, folder: Path) -> None:
    _workers[side] = Worker(row, side, sizes, folder)


def _measure(side: Side) -> Pass:
    return _workers[side].measure()


def _result(side: Side) -> Result:
    return _workers.pop(side).result()


def measure_row(row: Row, *, sizes: Sizes, passes: int, own_processes: bool = True) -> dict[str, Any]:
    """Measures both sides of a row and compares what they computed.

    Args:
        own_processes: False measures in this process: memory is then what is left by whatever ran before.

    Returns:
        The row of the JSON: name, seconds, baseline_seconds, speedup, memory_mb, baseline_memory_mb, memory_ratio (ours
        / straightforward), same_result; passes, the peaks of the whole processes, sizes, facts of the row. Seconds are
        medians per unit of work, MB are MiB over the inputs.

    Raises:
        UserError: a measuring process was ended from outside, such as for want of memory.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="semiseg-bench-")))
        processes = {side: stack.enter_context(_executor(own_processes)) for side in SIDES}
        seen: dict[Side, list[Pass]] = {side: [] for side in SIDES}
        try:
            for side in SIDES:
                processes[side].submit(_build, row, side, sizes, folder).result()
            for _ in range(passes):
                for side in SIDES:
                    seen[side].append(processes[side].submit(_measure, side).result())
            results = [processes[side].submit(_result, side).result() for side in SIDES]
        except BrokenProcessPool:
            raise UserError(
                f"{row.name}: the measuring process was ended from outside, as the system does when memory runs out"
            ) from None
    ours, plain = (seen[side] for side in SIDES)
    seconds, plain_seconds = (statistics.median(one.seconds for one in side[1:] or side) for side in (ours, plain))
    memory, plain_memory = (max(side[0].added_mb, LEAST_MEMORY_MB) for side in (ours, plain))
    return {
        "name": row.name,
        "seconds": seconds,
        "baseline_seconds": plain_seconds,
        "speedup": plain_seconds / seconds,
        "memory_mb": memory,
        "baseline_memory_mb": plain_memory,
        "memory_ratio": memory / plain_memory,
        "same_result": row.agree(*results),
        "passes": passes,
        "process_mb": max(one.total_mb for one in ours),
        "baseline_process_mb": max(one.total_mb for one in plain),
        "sizes": dict(sizes),
        **(row.facts(sizes, seconds) if row.facts else {}),
    }


def _executor(own_process: bool) -> Executor:
    if not own_process:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(1, mp_context=context)


def peak_memory(device: torch.device) -> Callable[[], tuple[float, float]]:
    """Starts a measurement; what it returns ends it and gives the MiB of the peak over the start, and in all.

    On Linux the high-water mark of resident memory is reset, so only what happens in between counts. Where it cannot
    be reset, the highest resident memory of the process's life is compared with itself, which misses whatever stays
    below an earlier peak. On a GPU: torch's allocated bytes.
    """
    peak: Callable[[], int]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    else:
        gc.collect()
        return_freed_memory()
        before, peak = _highest_resident(), _highest_resident
        with contextlib.suppress(OSError):  # other systems, and the read-only /proc of some containers
            Path("/proc/self/clear_refs").write_text("5")
            before = psutil.Process().memory_info().rss

    def end() -> tuple[float, float]:
        highest = peak()
        return max(highest - before, 0) / MEBIBYTE, highest / MEBIBYTE

    return end


def _highest_resident() -> int:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, Linux kilobytes
