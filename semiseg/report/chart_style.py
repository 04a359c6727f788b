"""What the charts of one page share: a row's colour, dashes and marker, short labels, one legend for all panels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import LineStyleType

from semiseg.report.aggregate import ReportTable
from semiseg.report.drawing import PURPLE, ROW_COLOURS, VERMILLION, plain

GROUP_COLOURS = {"unseen": VERMILLION, "seen": PURPLE}  # never a row's on a page with unseen classes
GRID = "#dddddd"

_DASHES: tuple[LineStyleType, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class RowStyle:
    """How a row is drawn in every chart of a page; lines that cross differ by more than their colour."""

    colour: str
    dashes: LineStyleType
    marker: str


def row_styles(tables: Sequence[ReportTable]) -> dict[str, RowStyle]:
    """Row name -> its style, in the order in which the tables of a page name the rows first."""
    grouped = any(table.unseen for table in tables)
    colours = [colour for colour in ROW_COLOURS if not grouped or colour not in GROUP_COLOURS.values()]
    names = dict.fromkeys(row.name for table in tables for row in table.rows)
    return {
        name: RowStyle(
            colours[number % len(colours)],
            # Where the colours begin anew, the dashes do not begin at the same place.
            _DASHES[(number + number // len(colours)) % len(_DASHES)],
            _MARKERS[number % len(_MARKERS)],
        )
        for number, name in enumerate(names)
    }


def panels_of(figure: Figure, count: int, *, across: int, sharey: bool = False) -> list[Axes]:
    """`count` panels in lines of `across`; those that the last line has too many of are not shown."""
    across = min(across, count)
    panels = figure.subplots(math.ceil(count / across), across, sharey=sharey, squeeze=False).ravel().tolist()
    for panel in panels[count:]:
        panel.set_visible(False)
    return panels[:count]


def one_legend(
    figure: Figure,
    panels: Iterable[Axes],
    *,
    columns: int,
    place: Literal["outside lower center", "outside upper center"] = "outside lower center",
) -> None:
    """One legend for all panels, outside of them, each label once."""
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc=place, ncols=columns, frameon=False, fontsize=8.5, handlelength=3
    )


def quiet(panel: Axes) -> None:
    """No frame above and at the right; the grid lies below the data."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)


def wrapped(text: str, width: int = 12) -> str:
    """Breaks long labels after "+", "-" or at spaces so that they do not run into each other."""
    lines = [""]
    for part in _parts(plain(text)):
        if len(lines[-1]) + len(part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def shortened(text: str, width: int = 32) -> str:
    """A label of at most `width` columns, the last of them "…" where it was longer; wide signs take two columns."""
    text = " ".join(text.split())
    ends, end = [], 0
    for sign in text:
        end += 0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        ends.append(end)
    if end > width:
        text = text[: sum(place < width for place in ends)].rstrip() + "…"
    return plain(text)


def _parts(text: str) -> Iterable[str]:
    part = ""
    for sign in text:
        part += sign
        if sign in "+- ":
            yield part
            part = ""
    yield part
