"""Processes of their own for tests, forked by the standard library's server.

The server has imported what trains, which takes longer than all the rest of a small run, and has computed nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PROJECT = Path(__file__).parent.parent
PRELOADED = ["semiseg.engine.run", "semiseg.commands.train"]
CONTEXT = multiprocessing.get_context("forkserver")


def start(
    function: Callable[..., object],
    *arguments: object,
    output: Path,
    folder: Path = PROJECT,
    environment: Mapping[str, str] = os.environ,
) -> ForkServerProcess:
    """Starts a function of a module in a process, and process group, of its own.

    Args:
        output: file for what both print.
        folder: the current one of the process.
        environment: the whole of it, but that no GPU is seen.
    """
    variables = {**environment, "CUDA_VISIBLE_DEVICES": ""}
    process = CONTEXT.Process(target=_become, args=(output, folder, variables, function, *arguments))
    process.start()
    return process


def call_main(module: str, *arguments: str) -> None:
    """`python -m MODULE ARGUMENTS`."""
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def _become(
    output: Path, folder: Path, variables: dict[str, str], function: Callable[..., object], *arguments: object
) -> None:
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # by these variables too
    function(*arguments)
