"""What a row of the benchmark is: two ways to do the same work on the same seeded inputs, and when they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Side = Literal["ours", "straightforward"]
Sizes = Mapping[str, int]
Result = dict[str, Any]  # name -> array, or a list of texts or numbers
Agree = Callable[[Result, Result], bool]  # ours, straightforward


@dataclass(frozen=True)
class Place:
    """Where a side is measured: the device, and a folder of its own for files, removed afterwards."""

    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Task:
    """One side of a row with its inputs built.

    Attributes:
        run: the work that is timed and whose memory is measured; may be called again and again.
        result: turns what `run` returned into something comparable, outside the measurement.
        units: of work in one run; the seconds of the table are per unit.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Result]
    units: int = 1


Prepare = Callable[[Sizes, Place], Task]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; its functions belong to a module, so that a row travels to another process.

    Attributes:
        name: in the table and the JSON.
        sizes: of the full measurement; `quick` and `tiny` replace some of them. Tiny ones warm up libraries before the
            memory of the first full pass is measured, and serve tests.
        passes, quick_passes: at full size. The first gives the memory; the seconds are the median of the others, or
            the first one's if there is no other.
        ours, straightforward: build the inputs from the sizes, seeded, and return the work.
        agree: whether both results are the same, within the tolerance of the row.
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
    ours: Prepare
    straightforward: Prepare
    agree: Agree
    device: str = "cpu"
    package: str | None = None
    facts: Callable[[Sizes, float], dict[str, float]] | None = None

    def sizes_at(self, scale: Literal["full", "quick", "tiny"]) -> Sizes:
        """The sizes of one of the three scales; quick ones apply to nothing else."""
        return {**self.sizes, **{"full": {}, "quick": self.quick, "tiny": self.tiny}[scale]}

    def task(self, side: Side, sizes: Sizes, folder: Path) -> Task:
        """The inputs and the work of one side; `folder` is empty."""
        prepare = self.ours if side == "ours" else self.straightforward
        return prepare(sizes, Place(torch.device(self.device), folder))


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


def array(values: Tensor) -> np.ndarray:
    """A tensor of any device as float64."""
    return values.detach().cpu().double().numpy()
