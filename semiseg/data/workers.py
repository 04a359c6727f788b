"""Processes of one's own that load or draw: how they start, what signals mean to all of them, what they may lack,
and how they give freed memory back.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Literal, TypeVar

from semiseg.errors import UserError

StartMethod = Literal["fork", "forkserver", "spawn"]
# Forked workers share what this process has imported. Others import torch again, 0.5 GB each, and Python's own choice
# differs between its versions. Elsewhere than on Linux forking is unsafe: None leaves the choice to the platform.
START_METHOD: StartMethod | None = "fork" if sys.platform == "linux" else None
Item = TypeVar("Item")
Result = TypeVar("Result")
TOGETHER_SECONDS = 2.0  # signals so close to each other are one


def available_cores() -> int:
    """Processor cores that this process may use: of its affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_signals_to_the_main_process(worker: int = 0) -> None:
    """Ctrl-C and a batch system's SIGTERM reach workers too, which must outlive the step that is being finished.

    That the main process then takes a batch no more, while it is handed over, is nothing to print a traceback for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    usual = sys.excepthook  # what Python's thread for handing over files calls
    sys.excepthook = lambda kind, *error: None if issubclass(kind, ConnectionError | EOFError) else usual(kind, *error)


def live_as_long_as_the_main_process() -> None:
    """In a pool's process: leaves signals to the main process and ends with it, also when that is killed."""
    leave_signals_to_the_main_process()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


class StopOnSignal(ExitStack):
    """Turns SIGINT and SIGTERM into a flag, so that what is under way is finished and saved before the process ends.

    A second one acts at once, unless it comes together with the first: a batch system signals a launcher and its
    processes alike, and the launcher passes the signal on. Later ones do not disturb what the second has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self._at_once = False
        self._acts_from = math.inf  # time at which another signal is a second one

    def __enter__(self) -> StopOnSignal:
        with suppress(ValueError):  # not the main thread (a notebook's executor): the caller keeps its own handling
            for number in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, number, signal.signal(number, self._request))
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        now, again = time.monotonic(), self.requested
        if not again:
            self.requested, self._acts_from = True, now + TOGETHER_SECONDS
        elif now >= self._acts_from:
            self._acts_from = math.inf
            raise KeyboardInterrupt
        if self._at_once:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this context the first signal acts at once, too, and one that came before: for waiting between steps."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False


def results_of(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], *, at_a_time: int = 1
) -> Generator[Result, None, None]:
    """`pool.map`, in which Ctrl-C and SIGTERM act between two results, and what has not begun is given up.

    Inside the pool's own code, an interrupt can leave a lock held for which the pool's end then waits for ever: while
    thousands of items were handed over, one in fifty did.
    """
    with StopOnSignal() as stop:
        try:
            for result in pool.map(work, items, chunksize=at_a_time):
                if stop.requested:
                    raise KeyboardInterrupt
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def workers_lack(spare_files: int = 0) -> Iterator[None]:
    """Makes what a loader's processes cannot get in this context, spare files first, or their end, a `UserError`."""
    try:
        with ExitStack() as opened:
            for _ in range(spare_files):
                opened.enter_context(open(os.devnull, "rb", buffering=0))
        yield
    except (ConnectionError, EOFError):
        raise UserError(describe_lack(RuntimeError("one of them has ended"))) from None
    except (RuntimeError, OSError) as error:
        raise UserError(describe_lack(error)) from None


def describe_lack(error: Exception) -> str:
    """A sentence for what a process that loads could not get, or died of, with what helps."""
    reason = str((isinstance(error, OSError) and error.strerror) or error).strip().rstrip(".")
    remedy = "give them more shared memory (a container's --shm-size or --ipc=host) or more memory"
    if "open files" in reason:
        remedy = "raise the limit of open files (ulimit -n)"
    return f"the loader's workers failed ({reason}): {remedy}, or set runtime.workers = 0; see docs/MACHINES.md"


def return_freed_memory() -> None:
    """Gives the C library's free memory back to the system, where that is glibc; elsewhere does nothing.

    Not for free: what is given back is taken again a page fault at a time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
