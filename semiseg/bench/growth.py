"""How time and memory grow with the number of instances, the size of the images and the number of classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semiseg.bench import affinity, dynamic_head, mask_losses, step
from semiseg.bench.measure import Measurement, measure_sizes
from semiseg.bench.row import Row, Sizes
from semiseg.errors import UserError
from semiseg.resources import write_bytes, write_text

COLUMNS = ("axis", "row", "value", "seconds", "baseline_seconds", "memory_mb", "baseline_memory_mb", "same_result")
OURS, STRAIGHTFORWARD = "#0072B2", "#E69F00"  # Okabe and Ito: distinguishable with any colour vision
PASSES = 4


@dataclass(frozen=True)
class Axis:
    """One row of the benchmark measured at several sizes.

    Attributes:
        name: of what grows, with its unit.
        row: what is measured.
        points: value on the axis and the sizes that differ there from the row's own.
    """

    name: str
    row: Row
    points: Sequence[tuple[int, Sizes]]


@dataclass(frozen=True)
class Point:
    """One measured size; None where the straightforward formulation or ours ran out of memory."""

    axis: Axis
    value: int
    measured: Measurement | None


_INSTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHORT_SIDES = (200, 400, 800, 1600)
_CLASSES = (1, 10, 80, 365, 1203)
_SMALL_STEP: Sizes = {"images": 1, "height": 256, "width": 320}  # classes are a matter of the head, not of the image
# One ReLU of the mask branch in the 80 cells of P5 moved a gradient by 1.7e-2 of its norm, see `step`.
_STEP = replace(step.ROW, agree=step.CloseGradients(every=3e-2))

AXES: tuple[Axis, ...] = (
    Axis("instances", mask_losses.ROW, [(n, {"instances": n}) for n in _INSTANCES]),
    Axis("instances", dynamic_head.ROW, [(n, {"instances": n}) for n in _INSTANCES]),
    Axis("instances per image", affinity.ROW, [(n, {"boxes": n}) for n in _INSTANCES[:7]]),
    Axis(
        "short side, pixels",
        mask_losses.ROW,
        [(side, {"rows": side // 4, "columns": side * 38 // 100}) for side in _SHORT_SIDES],
    ),
    Axis("classes", _STEP, [(n, {**_SMALL_STEP, "classes": n}) for n in _CLASSES]),
)


def tiny_axes() -> tuple[Axis, ...]:
    """Two points of one axis at the smallest sizes, for tests."""
    tiny = mask_losses.ROW.sizes_at("tiny")
    return (Axis("instances", mask_losses.ROW, [(n, {**tiny, "instances": n}) for n in (2, 4)]),)


def measure_growth(
    axes: Sequence[Axis], *, tell: Callable[[str], None], passes: int = PASSES, own_processes: bool = True
) -> list[Point]:
    """Measures every point; `tell` gets one line before each."""
    points = []
    for axis in axes:
        for value, changed in axis.points:
            tell(f"{axis.row.name}, {axis.name}: {value}")
            sizes = {**axis.row.sizes, **changed}
            measured: Measurement | None = None
            try:
                measured = measure_sizes(axis.row, sizes, passes=passes, own_processes=own_processes)
            except UserError as error:  # ended by the system; the other points are still worth having
                tell(str(error))
            points.append(Point(axis, value, measured))
    return points


def write_growth(points: Sequence[Point], folder: Path, *, title: str) -> None:
    """Writes growth.csv and growth.png; `title` says on what machine."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in points:
        names = [point.axis.name, point.axis.row.name, point.value]
        one = point.measured
        if one is None:
            writer.writerow([*names, "", "", "", "", ""])
            continue
        numbers = (one.seconds, one.baseline_seconds, one.memory_mb, one.baseline_memory_mb)
        writer.writerow([*names, *(f"{number:.4g}" for number in numbers), one.same_result])
    write_text(folder / "growth.csv", buffer.getvalue())
    write_bytes(folder / "growth.png", growth_figure(points, title=title))


def growth_figure(points: Sequence[Point], *, title: str) -> bytes:
    """PNG: one column per axis, seconds above and memory below, both logarithmic."""
    columns = [list(group) for _, group in groupby(points, key=lambda point: (point.axis.name, point.axis.row.name))]
    figure = Figure(figsize=(3.2 * len(columns), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(columns), squeeze=False)
    for column, group in enumerate(columns):
        measured = [(point.value, point.measured) for point in group if point.measured is not None]
        values = [value for value, _ in measured]
        _lines(panels[0][column], values, [(one.seconds, one.baseline_seconds) for _, one in measured])
        _lines(panels[1][column], values, [(one.memory_mb, one.baseline_memory_mb) for _, one in measured])
        panels[0][column].set_title(group[0].axis.row.name)
        panels[1][column].set_xlabel(group[0].axis.name)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("MB over the inputs")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(panel: Axes, values: Sequence[int], pairs: Sequence[tuple[float, float]]) -> None:
    for number, (label, colour) in enumerate((("ours", OURS), ("straightforward", STRAIGHTFORWARD))):
        panel.plot(values, [pair[number] for pair in pairs], marker="o", markersize=4, color=colour, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = values if len(values) < 6 else values[::2]
    panel.set_xticks(ticks, labels=[str(value) for value in ticks])
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.3)
