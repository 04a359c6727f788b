"""The stored detections of a report's runs and the objects to measure them on, read when they are asked for.

They are those of the recorded training: a folder may hold another training of the same run, whose numbers are others.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import Metrics, check_results, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import match_instances
from semiseg.evaluation.matching import Matches, average_precision, match
from semiseg.report.aggregate import ReportInput
from semiseg.results import Result

_SAME = 0.01  # AP; detections whose AP differs more from the recorded one are not those of the training

RunMatches = Mapping[str, Matches]  # "bbox" and, where every object has a mask, "segm"


class StoredDetections:
    """Detections and their matchings, each run matched once while a page is written.

    By `Result.trained_as`, so that two trainings of one run are never taken for each other. What is not at hand is
    None: validation objects that are gone, and detections that are gone, cannot be read, or give other class APs than
    recorded.
    """

    def __init__(self, report: ReportInput) -> None:
        self._report = report
        self._last: tuple[str, list[dict[str, Any]]] = ("", [])  # those of all runs would not fit into memory
        self._matches: dict[str, RunMatches | None] = {}
        self._instances: dict[str, pd.DataFrame] = {}

    @functools.cached_property
    def _objects(self) -> tuple[COCO, bool] | None:
        """The validation objects, and whether all have masks."""
        path = self._report.val_annotations
        if path is None or not path.is_file():
            return None
        truth = load_ground_truth(path)
        return truth, prepare_masks(truth)

    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks; None also if some masks are not there."""
        return self._objects[0] if self._objects is not None and self._objects[1] else None

    def of(self, run: Result) -> list[dict[str, Any]] | None:
        """The COCO results of a run."""
        return None if self.matches(run) is None else self._read(run)

    def matches(self, run: Result) -> RunMatches | None:
        """The matching of a run."""
        key = run.trained_as
        if key not in self._matches:
            self._matches[key] = self._match(run)
        return self._matches[key]

    def instances(self, run: Result) -> pd.DataFrame | None:
        """`match_instances` of a run; None also if some masks are not there."""
        key = run.trained_as
        if key not in self._instances:
            truth, results = self.truth(), self.of(run)
            if truth is None or results is None:
                return None
            self._instances[key] = match_instances(truth, results)
        return self._instances[key]

    def _read(self, run: Result) -> list[dict[str, Any]] | None:
        folder = self._report.run_folders.get(run.run_id)
        if self._objects is None or folder is None:
            return None
        if self._last[0] != run.trained_as:
            try:
                results: list[dict[str, Any]] = json.loads((folder / "detections.json").read_bytes())
                check_results(self._objects[0], results)
            except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):  # cut off, or of other data
                return None
            self._last = (run.trained_as, results)
        return self._last[1]

    def _match(self, run: Result) -> RunMatches | None:
        results = self._read(run)
        if self._objects is None or results is None:
            return None
        truth, has_masks = self._objects
        if not truth.dataset["annotations"] or not truth.imgs:
            return None
        try:
            matches = {kind: match(truth, results, kind) for kind in (("bbox", "segm") if has_masks else ("bbox",))}
            recorded = Metrics.from_dict(run.metrics)
        except (UserError, ValueError, KeyError, TypeError):  # boxes or masks that are none; an unreadable record
            return None
        return matches if all(_as_recorded(recorded, kind, matches[kind]) for kind in matches) else None


def _as_recorded(recorded: Metrics, iou_type: str, matches: Matches) -> bool:
    """Whether a matching gives the class APs of a record."""
    metrics = recorded.bbox if iou_type == "bbox" else recorded.segm
    if metrics is None or set(metrics.classes) != set(matches.classes):
        return False
    expected = [(metrics.classes[name] or {}).get("AP") for name in matches.classes]
    values = [math.nan if value is None else value for value in expected]
    measured = average_precision(matches).mean(axis=1)
    return bool(np.allclose(measured, values, rtol=0, atol=_SAME, equal_nan=True))
