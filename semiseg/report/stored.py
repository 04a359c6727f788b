"""The stored detections of a report's runs and the objects to measure them on, read when they are asked for.

They are those of the recorded training: a folder may hold another training of the same run, whose numbers are others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import Metrics, check_results, load_ground_truth, prepare_masks
from semiseg.evaluation.instances import match_instances
from semiseg.evaluation.matching import Matches, average_precision, match
from semiseg.report.aggregate import ReportInput
from semiseg.report.measured import Measured
from semiseg.report.tables import escape_markdown
from semiseg.results import Result

_KEPT_DETECTIONS = 200_000  # of all runs together that stay in memory: some hundred megabytes
_SAME = 0.01  # AP; detections whose AP differs more from the recorded one are not those of the training

RunMatches = Mapping[str, Matches]  # "bbox" and, where every object has a mask, "segm"


class StoredDetections:
    """What `PageContext.measured` measures on: read and matched once while a page is written.

    By `Result.trained_as`, so that two trainings of one run are never taken for each other.
    """

    def __init__(self, report: ReportInput, measured: Measured) -> None:
        """`measured` keeps which files were found to be those of a training: only new ones are evaluated for that."""
        self._report, self._measured = report, measured
        self._truth: COCO | None = None
        self._truth_digest = b""
        self._has_masks = False
        self._kept: dict[str, list[dict[str, Any]]] = {}
        self._matches: dict[str, RunMatches | None] = {}
        self._instances: dict[str, pd.DataFrame] = {}

    def objects(self) -> COCO | None:
        """The validation objects, whether they have masks or not; None if they are not there."""
        path = self._report.val_annotations
        if self._truth is None and path is not None and path.is_file():
            self._truth_digest = hashlib.sha256(path.read_bytes()).digest()
            self._truth = load_ground_truth(path)
            self._has_masks = prepare_masks(self._truth)
        return self._truth

    def truth(self) -> COCO | None:
        """The validation objects, ready for an evaluation of masks; None if they or some masks are not there."""
        truth = self.objects()
        return truth if self._has_masks else None

    def of(self, run: Result) -> list[dict[str, Any]] | None:
        """The COCO results of a run.

        None if they are not there, cannot be read, or give other class APs on these validation data than recorded, so
        that they are not those of this training.
        """
        truth, folder, key = self.objects(), self._report.run_folders.get(run.run_id), run.trained_as
        if truth is None or folder is None:
            return None
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)  # the youngest again
            return self._kept[key]
        try:
            content = (folder / "detections.json").read_bytes()
            results: list[dict[str, Any]] = json.loads(content)
            check_results(truth, results)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):  # gone, cut off, or of other data
            return None
        if not self._are_recorded(run, results, content):
            return None
        self._kept[key] = results
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _KEPT_DETECTIONS:
            del self._kept[next(iter(self._kept))]  # the oldest
        return results

    def _are_recorded(self, run: Result, results: Sequence[Mapping[str, Any]], content: bytes) -> bool:
        """Whether these are the detections of the training; `content` is their file."""
        key = run.trained_as
        files = hashlib.sha256(self._truth_digest + hashlib.sha256(content).digest()).hexdigest()[:12]

        def evaluate() -> bool | None:
            if key not in self._matches:
                found = self._match(results)
                is_same = found is not None and all(_as_recorded(run, *item) for item in found.items())
                self._matches[key] = found if is_same else None
            return True if self._matches[key] is not None else None

        return bool(self._measured.get("detections", f"{key}|{files}", evaluate))

    def _match(self, results: Sequence[Mapping[str, Any]]) -> RunMatches | None:
        """None where there is nothing to match with."""
        truth = self.objects()
        if truth is None or not truth.dataset["annotations"] or not truth.imgs:
            return None
        types = ("bbox", "segm") if self._has_masks else ("bbox",)
        try:
            return {iou_type: match(truth, results, iou_type) for iou_type in types}
        except (UserError, ValueError, KeyError, TypeError):  # boxes or masks that are none
            return None

    def matches(self, run: Result) -> RunMatches | None:
        """The matching of a run; None as in `of`."""
        key = run.trained_as
        if key not in self._matches:
            results = self.of(run)
            if key not in self._matches:  # else matched to see whose they are
                self._matches[key] = None if results is None else self._match(results)
        return self._matches[key]

    def instances(self, run: Result) -> pd.DataFrame | None:
        """`match_instances` of a run; None as in `of`, or if some masks are not there."""
        key = run.trained_as
        if key not in self._instances:
            truth, results = self.truth(), self.of(run)
            if truth is None or results is None:
                return None
            self._instances[key] = match_instances(truth, results)
        return self._instances[key]


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


def missing_note(missing: Sequence[str]) -> list[str]:
    """A block that names recorded runs whose detections are not at hand, such as "neither seed 1"; none if all are."""
    if not missing:
        return []
    told = ", ".join(escape_markdown(name) for name in missing)
    return [f"Without {told}: the detections of these runs are not on this machine."]
