"""What every section of a report page gets: the study, its numbers, and where figures and measurements are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from semiseg.evaluation.matching import Matches
from semiseg.report.aggregate import ReportInput, TableNumbers
from semiseg.report.drawing import Drawing
from semiseg.report.stored import StoredDetections
from semiseg.report.tables import escape_markdown
from semiseg.resources import write_bytes, write_text

MEASURED_NAME = "measured.json"


class Measured:
    """What was measured on the detections of runs, kept beside the report so that it outlives the run folders.

    `measured.json` maps part -> key -> JSON value. A key names what the value follows from (`Result.trained_as`, and
    any setting of the measurement), so that a value never has to be measured twice; delete the file to measure anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path.is_file():
            try:
                self._parts = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                self._parts = {}  # damaged: measured anew

    def get(self, part: str, key: str, measure: Callable[[], Any | None]) -> Any | None:
        """The kept value, else that of `measure`, which gives plain JSON values or None where it cannot measure."""
        kept = self._parts.setdefault(part, {})
        if key not in kept:
            value = measure()
            if value is None:
                return None
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
            self._changed = True
        return kept[key]

    def save(self) -> None:
        """Writes the file if something was added."""
        if self._changed:
            parts = {name: dict(sorted(kept.items())) for name, kept in sorted(self._parts.items()) if kept}
            write_text(self._path, json.dumps(parts, separators=(",", ":"), ensure_ascii=False) + "\n")
            self._changed = False


@dataclass
class FigureFiles:
    """Writes figures into the report's folder and gives the Markdown that shows them.

    Attributes:
        earlier: blocks of the page that was there before, if it is of the same runs.
    """

    folder: Path
    earlier: Sequence[str] = ()

    def show(self, name: str, drawn: Drawing | None, *, alt: str, caption: str = "", absent: str = "") -> list[str]:
        """Blocks that show a figure; its files are `name`.png and, for what is drawn of lines, `name`.svg.

        `drawn` None: the figure of an earlier report is kept and shown, if there is one; `absent` says why.
        """
        path, shown = self.folder / f"{name}.png", f"![{escape_markdown(alt)}](figures/{name}.png)"
        if drawn is not None:
            write_bytes(path, drawn.png)
            if drawn.svg is not None:
                write_bytes(path.with_suffix(".svg"), drawn.svg)
        elif not path.is_file():
            return [f"*No figure ({alt}): {absent}.*"] if absent else []
        elif absent and shown in self.earlier:
            # It shows the runs of this page: nothing has changed but that their folders are gone.
            below = self.earlier[self.earlier.index(shown) + 1 :][:1]
            return [shown, *(block for block in below if block.startswith("*"))]
        elif absent:
            caption = f"{alt[:1].upper()}{alt[1:]}: kept from an earlier report, because {absent}."
        else:
            return []
        return [shown, *([f"*{escape_markdown(caption)}*"] if caption else [])]


@dataclass
class PageContext:
    """One report being written.

    Attributes:
        report: what it is made from.
        tables: the numbers of its tables.
        printed: the paper's numbers.
        figures, measured: the report's folder, by kind of file.
        matches: run id -> IoU type -> matching, as far as a section needed it (`uncertainty.matches_of`).
        stored: the detections of the runs, as far as they are on this machine.
    """

    report: ReportInput
    tables: Sequence[TableNumbers]
    printed: pd.DataFrame
    figures: FigureFiles
    measured: Measured = field(repr=False)
    matches: dict[str, dict[str, Matches] | None] = field(default_factory=dict, repr=False)
    stored: StoredDetections = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Nothing is read before it is asked for."""
        self.stored = StoredDetections(self.report)
