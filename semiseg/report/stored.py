"""The stored detections of a report's runs and the objects to measure them on, read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import check_results, load_ground_truth, prepare_masks
from semiseg.report.aggregate import ReportInput
from semiseg.report.tables import escape_markdown

_KEPT = 2  # runs whose detections stay in memory: a row's beside those of full-masks


class StoredDetections:
    """What `PageContext.measured` measures on, for one section of one table."""

    def __init__(self, report: ReportInput) -> None:
        self._report = report
        self._truth: COCO | None = None
        self._kept: dict[str, list[dict[str, Any]]] = {}

    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks; None if they or some masks are not there."""
        path = self._report.val_annotations
        if self._truth is None and path is not None and path.is_file():
            truth = load_ground_truth(path)
            self._truth = truth if prepare_masks(truth) else None
        return self._truth

    def of(self, run_id: str) -> list[dict[str, Any]] | None:
        """The COCO results of a run; None if they are not there or do not belong to these validation data."""
        truth, folder = self.truth(), self._report.run_folders.get(run_id)
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
            del self._kept[oldest]
        return results


def missing_note(missing: Sequence[str]) -> list[str]:
    """A block that names recorded runs whose detections are not at hand, such as "neither seed 1"; none if all are."""
    if not missing:
        return []
    told = ", ".join(escape_markdown(name) for name in missing)
    return [f"Without {told}: the detections of these runs are not on this machine."]
