"""What every section of a report page gets: the study, its numbers, and where figures and measurements are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from semiseg.files import write_bytes
from semiseg.report.aggregate import ReportInput, TableNumbers
from semiseg.report.measured import Measured
from semiseg.report.stored import StoredDetections
from semiseg.report.tables import escape_markdown


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


@dataclass
class PageContext:
    """One report being written.

    Attributes:
        report: what it is made from.
        tables: the numbers of its tables.
        printed: the paper's numbers.
        figures, measured: the report's folder, by kind of file.
        stored: the detections of the runs and their matchings, as far as they are on this machine.
    """

    report: ReportInput
    tables: Sequence[TableNumbers]
    printed: pd.DataFrame
    figures: FigureFiles
    measured: Measured = field(repr=False)
    stored: StoredDetections = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stored = StoredDetections(self.report)
