"""What every section of a page gets: the study, its numbers, stored detections, figures and measurements beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from semiseg.config.read import read_json
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import Metrics, check_results, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import match_instances
from semiseg.evaluation.matching import Matches, average_precision, match
from semiseg.files import write_bytes, write_text
from semiseg.report.aggregate import ReportInput, TableNumbers
from semiseg.report.tables import escape_markdown
from semiseg.results import Result

MEASURED_NAME = "measured.json"
_SAME = 0.01  # AP; detections whose AP differs more from the recorded one are not those of the training


@dataclass
class FigureFiles:
    """Writes figures into the report's folder and gives the Markdown that shows them."""

    folder: Path
    earlier: Sequence[str] = ()  # blocks of the page that was there before, if it is of the same runs

    def remove(self, name: str) -> None:
        """Removes the file of a figure that an earlier report had."""
        (self.folder / f"{name}.png").unlink(missing_ok=True)

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


class StoredDetections:
    """The detections of a report's runs and the objects to measure them on, each run matched once.

    They are those of the recorded training (`Result.trained_as`): a folder may hold another training of the same run,
    whose numbers are others. What is not at hand is None: validation objects that are gone or lack masks, and
    detections that are gone, cannot be read, or give other class APs than recorded.
    """

    def __init__(self, report: ReportInput) -> None:
        self._report = report
        self._last: tuple[str, list[dict[str, Any]]] = ("", [])  # those of all runs would not fit into memory
        self._matches: dict[str, Matches | None] = {}
        self._instances: dict[str, pd.DataFrame] = {}

    @functools.cached_property
    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks."""
        path = self._report.val_annotations
        if path is None or not path.is_file():
            return None
        classes = {name for run in self._report.results.values() for name in run.metrics["instances"]}
        truth = load_ground_truth(path, classes=classes, crowds=self._report.val_crowds)
        return truth if prepare_masks(truth) else None

    def of(self, run: Result) -> list[dict[str, Any]] | None:
        """The COCO results of a run."""
        return None if self.matches(run) is None else self._read(run)

    def matches(self, run: Result) -> Matches | None:
        """The matching of a run's masks."""
        key = run.trained_as
        if key not in self._matches:
            self._matches[key] = self._match(run)
        return self._matches[key]

    def instances(self, run: Result) -> pd.DataFrame | None:
        """`match_instances` of a run."""
        key, results = run.trained_as, self.of(run)
        if self.truth is None or results is None:
            return None
        if key not in self._instances:
            self._instances[key] = match_instances(self.truth, results, max_dets=run.max_dets)
        return self._instances[key]

    def _read(self, run: Result) -> list[dict[str, Any]] | None:
        folder = self._report.run_folders.get(run.run_id)
        if self.truth is None or folder is None:
            return None
        if self._last[0] != run.trained_as:
            try:
                results: list[dict[str, Any]] = json.loads((folder / "detections.json").read_bytes())
                check_results(self.truth, results)
            except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):  # cut off, or of other data
                return None
            self._last = (run.trained_as, results)
        return self._last[1]

    def _match(self, run: Result) -> Matches | None:
        results = self._read(run)
        if self.truth is None or results is None or not self.truth.dataset["annotations"]:
            return None
        try:
            metrics = Metrics.from_dict(run.metrics)
            matches, recorded = match(self.truth, results, "segm", max_dets=metrics.max_dets), metrics.segm
        except (UserError, ValueError, KeyError, TypeError):  # masks that are none; an unreadable record
            return None
        if recorded is None or set(recorded.classes) != set(matches.classes):
            return None
        expected = [(recorded.classes[name] or {}).get("AP") for name in matches.classes]
        measured = average_precision(matches).mean(axis=1)
        same = np.allclose(measured, np.array(expected, dtype=float), rtol=0, atol=_SAME, equal_nan=True)
        return matches if same else None


@dataclass
class PageContext:
    """One report being written."""

    report: ReportInput
    tables: Sequence[TableNumbers]
    printed: pd.DataFrame  # the paper's numbers (`published.py`)
    figures: FigureFiles
    measured: Measured

    @functools.cached_property
    def stored(self) -> StoredDetections:
        """The detections of the runs and their matchings, as far as they are on this machine."""
        return StoredDetections(self.report)
