"""What every section of a report page gets: the study, its numbers, and the figures and measurements kept beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from semiseg.config.read import read_json
from semiseg.errors import UserError
from semiseg.files import write_bytes, write_text
from semiseg.report.aggregate import ReportInput, TableNumbers
from semiseg.report.stored import StoredDetections
from semiseg.report.tables import escape_markdown

MEASURED_NAME = "measured.json"


@dataclass
class FigureFiles:
    """Writes figures into the report's folder and gives the Markdown that shows them.

    Attributes:
        earlier: blocks of the page that was there before, if it is of the same runs.
    """

    folder: Path
    earlier: Sequence[str] = ()

    def show(self, name: str, png: bytes | None, *, alt: str, caption: str = "", absent: str = "") -> list[str]:
        """Blocks that show a figure, written as `name`.png.

        `png` None: the figure of an earlier report is kept and shown, if there is one; `absent` says why.
        """
        path, shown = self.folder / f"{name}.png", f"![{escape_markdown(alt)}](figures/{name}.png)"
        if png is not None:
            write_bytes(path, png)
        elif not absent:
            return []
        elif not path.is_file():
            return [f"*No figure ({alt}): {absent}.*"]
        elif shown in self.earlier:
            # It shows the runs of this page: nothing has changed but that their folders are gone.
            below = self.earlier[self.earlier.index(shown) + 1 :][:1]
            return [shown, *(block for block in below if block.startswith("*"))]
        else:
            caption = f"{alt[:1].upper()}{alt[1:]}: kept from an earlier report, because {absent}."
        return [shown, *([f"*{escape_markdown(caption)}*"] if caption else [])]


class Measured:
    """What was measured on the detections of the runs of a report, kept so that it outlives the run folders.

    `measured.json` maps part -> key -> JSON value. A key names what the value follows from (`Result.trained_as`, and
    any setting of the measurement), so that a value never has to be measured twice; delete the file to measure anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with suppress(UserError):  # damaged: measured anew
                self._parts = {name: kept for name, kept in read_json(path).items() if isinstance(kept, dict)}

    def get(self, part: str, key: str, measure: Callable[[], Any | None]) -> Any | None:
        """The kept value, else that of `measure`, which gives plain JSON values or None where it cannot measure."""
        kept = self._parts.setdefault(part, {})
        if key not in kept and (value := measure()) is not None:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        return kept.get(key)

    def save(self) -> None:
        """Writes the file if there is something to keep."""
        parts = {name: dict(sorted(kept.items())) for name, kept in sorted(self._parts.items()) if kept}
        if parts:
            write_text(self._path, json.dumps(parts, separators=(",", ":"), ensure_ascii=False) + "\n")


@dataclass
class PageContext:
    """One report being written.

    Attributes:
        report: what it is made from.
        tables: the numbers of its tables.
        printed: the paper's numbers.
        figures, measured: the report's folder, by kind of file.
    """

    report: ReportInput
    tables: Sequence[TableNumbers]
    printed: pd.DataFrame
    figures: FigureFiles
    measured: Measured

    @functools.cached_property
    def stored(self) -> StoredDetections:
        """The detections of the runs and their matchings, as far as they are on this machine."""
        return StoredDetections(self.report)
