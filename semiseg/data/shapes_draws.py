"""Random choices that are the same on every platform and numpy version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


class Draws:
    """Draws made of uniform numbers alone: numpy fixes the bit stream of PCG64 and the mapping to [0, 1), not more.

    Each pair of the non-negative seed and index has a stream of its own.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def integer(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return low + int((high - low + 1) * self._generator.random())

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.integer(0, len(items) - 1)]

    def field(self, *shape: int) -> NDArray[np.float64]:
        """An array of numbers in [-1, 1)."""
        return 2.0 * self._generator.random(shape) - 1.0
