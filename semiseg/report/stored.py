"""The stored detections of a report's runs and the objects to measure them on, read when they are asked for.

They are those of the recorded training: a folder may hold another training of the same run, whose numbers are others.
"""

from __future__ import annotations

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
        self._truth: COCO | None = None
        self._has_masks = False
        self._last: tuple[str, list[dict[str, Any]]] = ("", [])  # those of all runs would not fit into memory
        self._matches: dict[str, RunMatches | None] = {}
        self._instances: dict[str, pd.DataFrame] = {}

    def _objects(self) -> COCO | None:
        """The validation objects, whether they have masks or not."""
        path = self._report.val_annotations
        if self._truth is None and path is not None and path.is_file():
            self._truth = load_ground_truth(path)
            self._has_masks = prepare_masks(self._truth)
        return self._truth

    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks; None also if some masks are not there."""
        truth = self._objects()
        return truth if self._has_masks else None

    def of(self, run: Result) -> list[dict[str, Any]] | None:
        """The COCO results of a run."""
        return None if self.matches(run) is None else self._read(run)

    def matches(self, run: Result) -> RunMatches | None:
        """The matching of a run."""
        key = run.trained_as
        if key not in self._matches:
            found = self._match(run)
            is_recorded = found is not None and all(_as_recorded(run, *item) for item in found.items())
            self._matches[key] = found if is_recorded else None
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
        truth, folder = self._objects(), self._report.run_folders.get(run.run_id)
        if truth is None or folder is None:
            return None
        if self._last[0] != run.trained_as:
            try:
                results: list[dict[str, Any]] = json.loads((folder / "detections.json").read_bytes())
                check_results(truth, results)
            except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):  # cut off, or of other data
                return None
            self._last = (run.trained_as, results)
        return self._last[1]

    def _match(self, run: Result) -> RunMatches | None:
        truth, results = self._objects(), self._read(run)
        if truth is None or results is None or not truth.dataset["annotations"] or not truth.imgs:
            return None
        types = ("bbox", "segm") if self._has_masks else ("bbox",)
        try:
            return {iou_type: match(truth, results, iou_type) for iou_type in types}
        except (UserError, ValueError, KeyError, TypeError):  # boxes or masks that are none
            return None


def _as_recorded(run: Result, iou_type: str, matches: Matches) -> bool:
    """Whether a matching gives the class APs of a record."""
    try:
        metrics = Metrics.from_dict(run.metrics)
    except UserError:
        return False
    recorded = metrics.bbox if iou_type == "bbox" else metrics.segm
    if recorded is None or set(recorded.classes) != set(matches.classes):
        return False
    for name, mean in zip(matches.classes, average_precision(matches).mean(axis=1).tolist(), strict=True):
        numbers = recorded.classes[name]
        known = math.nan if numbers is None or numbers["AP"] is None else numbers["AP"]
        if not np.isclose(mean, known, rtol=0, atol=_SAME, equal_nan=True):
            return False
    return True
