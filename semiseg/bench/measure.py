"""Measuring a row: each side in a process of its own, taking turns, so that a busy moment of the machine hits both.

The processes are forked from a server that has imported everything and computed nothing: each starts with the same
state of the allocator, and no import is paid twice.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import torch

from semiseg.bench.memory import Peak, peak_memory_mb
from semiseg.bench.row import Result, Row, Side, Sizes
from semiseg.errors import UserError

SIDES: tuple[Side, Side] = ("ours", "straightforward")
LEAST_MEMORY_MB = 0.1  # below the resolution of the measurement; keeps ratios finite
Scale = Literal["full", "quick", "tiny"]


@dataclass(frozen=True)
class Pass:
    """One execution: wall seconds per unit of work, and the MiB of its peak."""

    seconds: float
    memory: Peak


@dataclass(frozen=True)
class Measurement:
    """The line of one row: seconds are medians, memory is MiB over the inputs, of the whole process for `total_mb`."""

    name: str
    sizes: Sizes
    passes: int
    seconds: float
    baseline_seconds: float
    memory_mb: float
    baseline_memory_mb: float
    total_mb: float
    baseline_total_mb: float
    same_result: bool
    facts: dict[str, float]

    @property
    def speedup(self) -> float:
        return self.baseline_seconds / self.seconds

    @property
    def memory_ratio(self) -> float:
        return self.memory_mb / self.baseline_memory_mb


class Worker(Protocol):
    """One side of a row with its inputs built, wherever it runs."""

    def measure(self) -> Pass: ...

    def result(self) -> Result: ...


class LocalWorker:
    """A side in this process: for tests, and inside the processes of `measure_row`."""

    def __init__(self, row: Row, side: Side, sizes: Sizes, folder: Path) -> None:
        self._device = torch.device(row.device)
        folders = [folder / side / name for name in ("warm_up", "inputs")]
        for one in folders:
            one.mkdir(parents=True)
        tiny = row.sizes_at("tiny")
        if sizes != tiny:
            row.task(side, tiny, folders[0]).run()
        self._task = row.task(side, sizes, folders[1])
        self._returned: Any = None

    def measure(self) -> Pass:
        self._returned = None
        peak = peak_memory_mb(self._device)
        self._wait()
        started = time.perf_counter()
        self._returned = self._task.run()
        self._wait()
        seconds = time.perf_counter() - started
        return Pass(seconds / self._task.units, peak())

    def result(self) -> Result:
        """What the last pass computed."""
        return self._task.result(self._returned)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _RemoteWorker:
    """The same in another process, which builds its inputs at once."""

    def __init__(self, row: Row, connection: Connection, process: Any) -> None:
        self._row, self._connection, self._process = row, connection, process
        self._receive()

    def measure(self) -> Pass:
        measured: Pass = self._ask("measure")
        return measured

    def result(self) -> Result:
        result: Result = self._ask("result")
        return result

    def _ask(self, what: str) -> Any:
        self._connection.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            value, error = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise UserError(
                f"bench {self._row.name}: the measuring process ended with code {code}; "
                f"{-signal.SIGKILL} is what the system does when memory runs out"
            ) from None
        if error is not None:
            raise RuntimeError(f"bench {self._row.name} failed in its process:\n{error}")
        return value


def serve(row: Row, side: Side, sizes: Sizes, folder: Path, connection: Connection) -> None:
    """The measuring process: answers one request after the other with (value, None) or (None, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    try:
        worker = LocalWorker(row, side, sizes, folder)
        connection.send((None, None))
        while True:
            answer = worker.measure() if connection.recv() == "measure" else worker.result()
            connection.send((answer, None))
    except EOFError:
        pass
    except BaseException:
        connection.send((None, traceback.format_exc()))


@contextmanager
def remote_worker(row: Row, side: Side, sizes: Sizes, folder: Path) -> Iterator[Worker]:
    """A process that holds one side; ended on leaving."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["semiseg.bench.rows"])
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(row, side, sizes, folder, there), daemon=True)
    process.start()
    there.close()
    try:
        yield _RemoteWorker(row, here, process)
    finally:
        here.close()  # which ends it, unless it is at work
        process.join(timeout=1)
        process.terminate()
        process.join()


@contextmanager
def local_worker(row: Row, side: Side, sizes: Sizes, folder: Path) -> Iterator[Worker]:
    """The same without a process: memory is then what is left of it after whatever ran before."""
    yield LocalWorker(row, side, sizes, folder)


def measure_row(row: Row, *, scale: Scale, own_processes: bool = True) -> Measurement:
    """Measures both sides of a row and compares what they computed.

    Args:
        scale: "tiny" is for tests; its numbers mean nothing.
        own_processes: False measures in this process.

    Raises:
        UserError: a measuring process was ended from outside, such as for want of memory.
    """
    passes = {"full": row.passes, "quick": row.quick_passes, "tiny": 1}[scale]
    return measure_sizes(row, row.sizes_at(scale), passes=passes, own_processes=own_processes)


def measure_sizes(row: Row, sizes: Sizes, *, passes: int, own_processes: bool = True) -> Measurement:
    """`measure_row` at any sizes."""
    start: Callable[..., Any] = remote_worker if own_processes else local_worker
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="semiseg-bench-")))
        workers = {side: stack.enter_context(start(row, side, sizes, folder)) for side in SIDES}
        seen: dict[Side, list[Pass]] = {side: [] for side in SIDES}
        for _ in range(passes):
            for side in SIDES:
                seen[side].append(workers[side].measure())
        same = row.agree(workers["ours"].result(), workers["straightforward"].result())
    seconds = {side: statistics.median(one.seconds for one in seen[side][1:] or seen[side]) for side in SIDES}
    memory = {side: max(seen[side][0].memory.added, LEAST_MEMORY_MB) for side in SIDES}
    total = {side: max(one.memory.total for one in seen[side]) for side in SIDES}
    return Measurement(
        name=row.name,
        sizes=sizes,
        passes=passes,
        seconds=seconds["ours"],
        baseline_seconds=seconds["straightforward"],
        memory_mb=memory["ours"],
        baseline_memory_mb=memory["straightforward"],
        total_mb=total["ours"],
        baseline_total_mb=total["straightforward"],
        same_result=same,
        facts=row.facts(sizes, seconds["ours"]) if row.facts else {},
    )
