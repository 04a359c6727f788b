"""The stored detections of a report's runs and the objects to measure them on, read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.box_matching import box_matches
from semiseg.evaluation.coco_metrics import check_results, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import match_instances
from semiseg.report.aggregate import ReportInput
from semiseg.report.tables import escape_markdown

_KEPT = 2  # runs whose detections stay in memory in any case: a row's beside those of full-masks
_KEPT_DETECTIONS = 200_000  # of all runs together that stay: some hundred megabytes


class StoredDetections:
    """What `PageContext.measured` measures on: read and matched once while a page is written."""

    def __init__(self, report: ReportInput) -> None:
        self._report = report
        self._truth: COCO | None = None
        self._has_masks = False
        self._kept: dict[str, list[dict[str, Any]]] = {}
        self._found: dict[str, list[int | None]] = {}
        self._instances: dict[str, pd.DataFrame] = {}

    def objects(self) -> COCO | None:
        """The validation objects, whether they have masks or not; None if they are not there."""
        path = self._report.val_annotations
        if self._truth is None and path is not None and path.is_file():
            self._truth = load_ground_truth(path)
            self._has_masks = prepare_masks(self._truth)
        return self._truth

    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks; None if they or some masks are not there."""
        truth = self.objects()
        return truth if self._has_masks else None

    def of(self, run_id: str) -> list[dict[str, Any]] | None:
        """The COCO results of a run; None if they are not there or do not belong to these validation data."""
        truth, folder = self.objects(), self._report.run_folders.get(run_id)
        if truth is None or folder is None:
            return None
        if run_id in self._kept:
            self._kept[run_id] = self._kept.pop(run_id)  # the youngest again
            return self._kept[run_id]
        try:
            results = json.loads((folder / "detections.json").read_bytes())
            check_results(truth, results)
        except (OSError, ValueError, TypeError, UserError):  # gone, cut off, or of other data
            return None
        self._kept[run_id] = results
        for oldest in list(self._kept)[:-_KEPT]:
            if sum(len(kept) for kept in self._kept.values()) > _KEPT_DETECTIONS:
                del self._kept[oldest]
        return results

    def found(self, run_id: str) -> list[int | None] | None:
        """`box_matches` of a run; None as in `of`."""
        if run_id not in self._found:
            truth, results = self.objects(), self.of(run_id)
            if truth is None or results is None:
                return None
            self._found[run_id] = box_matches(truth, results)
        return self._found[run_id]

    def instances(self, run_id: str) -> pd.DataFrame | None:
        """`match_instances` of a run; None as in `of`, or if some masks are not there."""
        if run_id not in self._instances:
            truth, results, found = self.truth(), self.of(run_id), self.found(run_id)
            if truth is None or results is None or found is None:
                return None
            self._instances[run_id] = match_instances(truth, results, found)
        return self._instances[run_id]


def missing_note(missing: Sequence[str]) -> list[str]:
    """A block that names recorded runs whose detections are not at hand, such as "neither seed 1"; none if all are."""
    if not missing:
        return []
    told = ", ".join(escape_markdown(name) for name in missing)
    return [f"Without {told}: the detections of these runs are not on this machine."]
