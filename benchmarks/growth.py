"""How time and memory grow with the number of instances, the size of the images and the number of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.masks import AFFINITY, DYNAMIC_HEAD, MASK_LOSSES
from benchmarks.measure import Row, Sizes, measure_row
from benchmarks.step import STEP, CloseGradients
from semiseg.errors import UserError

KEYS = ["seconds", "baseline_seconds", "memory_mb", "baseline_memory_mb", "same_result"]
# -> prefix of the key, and a colour of Okabe and Ito: distinguishable with any colour vision
LINES = {"ours": ("", "#0072B2"), "straightforward": ("baseline_", "#E69F00")}
PASSES = 4


class Axis(NamedTuple):
    """One row of the benchmark measured at several sizes.

    Attributes:
        name: of what grows, with its unit.
        points: value on the axis and the sizes that differ there from the row's own.
    """

    name: str
    row: Row
    points: Sequence[tuple[int, Sizes]]


_INSTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHORT_SIDES = (200, 400, 800, 1600)
_CLASSES = (1, 10, 80, 365, 1203)
_SMALL_STEP: Sizes = {"images": 1, "height": 256, "width": 320}  # classes are a matter of the head, not of the image

AXES: tuple[Axis, ...] = (
    Axis("instances", MASK_LOSSES, [(n, {"instances": n}) for n in _INSTANCES]),
    Axis("instances", DYNAMIC_HEAD, [(n, {"instances": n}) for n in _INSTANCES]),
    Axis("instances per image", AFFINITY, [(n, {"boxes": n}) for n in _INSTANCES[:7]]),
    Axis("short side, pixels", MASK_LOSSES, [(n, {"rows": n // 4, "columns": n * 38 // 100}) for n in _SHORT_SIDES]),
    Axis(
        "classes",
        # One ReLU of the mask branch in the 80 cells of P5 moved a gradient by 1.7e-2 of its norm, see `step`.
        replace(STEP, agree=CloseGradients(every=3e-2)),
        [(n, {**_SMALL_STEP, "classes": n}) for n in _CLASSES],
    ),
)
# Two points of one axis at the smallest sizes, for tests.
TINY_AXES = (Axis("instances", MASK_LOSSES, [(n, {**MASK_LOSSES.sizes_at("tiny"), "instances": n}) for n in (2, 4)]),)


def measure_growth(axes: Sequence[Axis], *, tell: Callable[[str], None], own_processes: bool = True) -> pd.DataFrame:
    """A line for every point: axis, row, value and `KEYS`, which are empty where memory ran out.

    Args:
        tell: gets one line before each.
        own_processes: False is for tests, with a single pass.
    """
    lines: list[dict[str, Any]] = []
    for axis in axes:
        for value, changed in axis.points:
            tell(f"{axis.row.name}, {axis.name}: {value}")
            line: dict[str, Any] = {"axis": axis.name, "row": axis.row.name, "value": value, **dict.fromkeys(KEYS)}
            try:
                sizes, passes = {**axis.row.sizes, **changed}, PASSES if own_processes else 1
                measured = measure_row(axis.row, sizes=sizes, passes=passes, own_processes=own_processes)
                line |= {key: measured[key] for key in KEYS}
            except UserError as error:  # ended by the system; the other points are still worth having
                tell(str(error))
            lines.append(line)
    return pd.DataFrame(lines)


def write_growth(points: pd.DataFrame, folder: Path, *, title: str) -> None:
    """Writes growth.csv and growth.png: one column per axis, seconds above and memory below, both logarithmic.

    Args:
        title: on what machine.
    """
    points.to_csv(folder / "growth.csv", index=False, float_format="%.4g")
    groups = list(points.groupby(["axis", "row"], sort=False))
    figure = Figure(figsize=(3.2 * len(groups), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(groups), squeeze=False)
    for column, ((axis, row), group) in enumerate(groups):
        values = group["value"].tolist()
        ticks = values if len(values) < 6 else values[::2]
        for panel, key in zip(panels[:, column], ("seconds", "memory_mb"), strict=True):
            for label, (prefix, colour) in LINES.items():
                line = group[f"{prefix}{key}"].astype(float)
                panel.loglog(values, line, marker="o", markersize=4, color=colour, label=label)
            panel.set_xticks(ticks, labels=[str(value) for value in ticks])
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
        panels[0][column].set_title(row)
        panels[1][column].set_xlabel(axis)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("MB over the inputs")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(folder / "growth.png", metadata={"Software": None})
