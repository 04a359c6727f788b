"""Made-up work for the benchmark's processes, in a file that imports little: each of them imports it."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch

from benchmarks.measure import Place, Side, Sizes, Task


def task(value: float, seconds: float = 0.0) -> Task:
    """Work that waits and computes one number."""

    def run() -> dict[str, np.ndarray]:
        time.sleep(seconds)
        return {"value": np.array([value])}

    return Task(run)


def fast(side: Side, sizes: Sizes, place: Place) -> Task:
    return task(1.0, seconds=0.001 if side == "ours" else 0.01)


def slow(side: Side, sizes: Sizes, place: Place) -> Task:
    return task(1.0, seconds=0.01 if side == "ours" else 0.001)


def wrong(side: Side, sizes: Sizes, place: Place) -> Task:
    return task(1.1 if side == "ours" else 1.0)


def hungry(side: Side, sizes: Sizes, place: Place) -> Task:
    """Work whose straightforward side holds `megabytes` for a moment."""
    megabytes = sizes["megabytes"] if side == "straightforward" else 0
    return Task(lambda: {"side": side, "total": float(torch.ones(megabytes * 2**18).sum())})


def dying(side: Side, sizes: Sizes, place: Place) -> Task:
    return Task(lambda: os.kill(os.getpid(), signal.SIGKILL)) if sizes["megabytes"] > 1 else task(1.0)


def both_sides(ours: dict[str, object], straightforward: dict[str, object]) -> bool:
    return (ours["side"], straightforward["side"]) == ("ours", "straightforward")
