"""Runs on a processor start as forks of one process that has imported everything: four seconds less for each.

That process is multiprocessing's fork server. It computes nothing, so it has no threads and no state that a run could
inherit, and every run is a process of its own as before. With GPUs, or several processes per run, runs start as
commands (`study_child`): there a few seconds do not matter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

IMPORTED_BEFORE = ["semiseg.engine.run"]


def can_fork() -> bool:
    """Whether runs can start as forks here: on Linux, as the loader's workers do."""
    return sys.platform == "linux"


def start_server() -> None:
    """Starts the server, which imports while this process does something else; does nothing if there is one."""
    forkserver.set_forkserver_preload(IMPORTED_BEFORE)
    forkserver.ensure_running()


class ForkedRun:
    """`semiseg ARGUMENTS` as a fork of the server, with the part of Popen's interface that a study needs."""

    def __init__(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], output: Path, inherited: int
    ) -> None:
        """Starts it in a session of its own.

        Args:
            environment: of the run, with OMP_NUM_THREADS.
            output: to which file the run's words are appended.
            inherited: an open file that the run holds as long as it lives.
        """
        start_server()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(list(arguments), dict(environment), os.getcwd(), str(output), _OpenFile(inherited))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        os.kill(self.pid, number)

    def wait(self) -> int | None:
        """Returns the exit code when it has ended."""
        self._process.join()
        return self._process.exitcode


@dataclass(frozen=True)
class _OpenFile:
    """An open file by its number, which is another one in the fork."""

    number: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.number),)


def _received(duplicate: Any) -> _OpenFile:
    return _OpenFile(duplicate.detach())


def _run(arguments: list[str], environment: dict[str, str], folder: str, output: str, inherited: _OpenFile) -> None:
    """The fork: makes itself what a command of this name would be."""
    os.setsid()
    os.chdir(folder)  # the server's is where this process was when it began
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert os.fstat(inherited.number)  # nobody closes it before the process ends
    with open(output, "ab", buffering=0) as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the variable was read when the server imported torch
    sys.argv = ["semiseg", *arguments]
    runpy.run_module("semiseg", run_name="__main__", alter_sys=True)  # as `python -m semiseg`
