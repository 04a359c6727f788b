"""The edges of a study's pairwise losses against the colour threshold, as they were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EdgeSettings = tuple[int, int, float]  # size and dilation of the neighbourhood, colour threshold


@dataclass(frozen=True)
class EdgeCurve:
    """Shares are 0..1: of all edges those that count, and of these the truly positive ones.

    Attributes:
        points: settings -> the two shares; several thresholds for each neighbourhood in use.
        classes: settings in use -> class -> the two shares among the edges of its instances.
        rows: table -> row -> its settings, for rows that use the pairwise loss.
        sentence: how it was measured.
    """

    points: Mapping[EdgeSettings, tuple[float, float]]
    classes: Mapping[EdgeSettings, Mapping[str, tuple[float, float]]]
    rows: Mapping[str, Mapping[str, EdgeSettings]]
    sentence: str
