"""How far the numbers of a report can be trusted: AP of resampled validation images, from matchings done once.

Everything goes through the measurements that lie beside the report, so that a page can be rebuilt where the detections
are gone. What cannot be measured is None, and the page says less.
"""

from __future__ import annotations

import json
import math

import numpy as np

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import Metrics, check_results, load_ground_truth, prepare_masks
from semiseg.evaluation.matching import Matches, average_precision, match
from semiseg.report.context import PageContext
from semiseg.results import Result

_SAME = 0.01  # AP; detections whose AP differs more from the recorded one are not those of the run


def matches_of(page: PageContext, result: Result) -> dict[str, Matches] | None:
    """The matching of a run, "bbox" and, where every object has a mask, "segm"; made once while a page is written.

    None where its detections or the annotations are not on this machine, cannot be read, or give other class APs than
    recorded, so that they are not those that the run was evaluated with.
    """
    if result.run_id not in page.matches:
        page.matches[result.run_id] = _match_run(page, result)
    return page.matches[result.run_id]


def thresholds_of(page: PageContext, result: Result) -> dict[str, dict[str, list[float | None]]] | None:
    """AP of a run in percent, "bbox" and "segm" -> class -> at IoU 0.5, 0.55, ... 0.95 (`matching.IOU_THRESHOLDS`).

    An AP is None for a class without objects, the whole where it cannot be measured; "segm" is missing where objects
    have no masks.
    """

    def measure() -> dict[str, dict[str, list[float | None]]] | None:
        found = matches_of(page, result)
        if found is None:
            return None
        return {
            iou_type: {
                name: [None if math.isnan(value) else round(value, 3) for value in line]
                for name, line in zip(matches.classes, average_precision(matches).tolist(), strict=True)
            }
            for iou_type, matches in found.items()
        }

    return page.measured.get("thresholds", result.run_id, measure)


def _match_run(page: PageContext, result: Result) -> dict[str, Matches] | None:
    folder, annotations = page.report.run_folders.get(result.run_id), page.report.val_annotations
    if folder is None or annotations is None:
        return None
    try:
        detections = json.loads((folder / "detections.json").read_text(encoding="utf-8"))
        truth = load_ground_truth(annotations)
        check_results(truth, detections)
        if not truth.dataset["annotations"] or not truth.imgs:
            return None
        types = ("bbox", "segm") if prepare_masks(truth) else ("bbox",)
        found = {iou_type: match(truth, detections, iou_type) for iou_type in types}
        return found if all(_as_recorded(result, *item) for item in found.items()) else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _as_recorded(result: Result, iou_type: str, matches: Matches) -> bool:
    metrics = Metrics.from_dict(result.metrics)
    recorded = metrics.bbox if iou_type == "bbox" else metrics.segm
    if recorded is None or set(recorded.classes) != set(matches.classes):
        return False
    for name, mean in zip(matches.classes, average_precision(matches).mean(axis=1).tolist(), strict=True):
        numbers = recorded.classes[name]
        known = math.nan if numbers is None or numbers["AP"] is None else numbers["AP"]
        if not np.isclose(mean, known, rtol=0, atol=_SAME, equal_nan=True):
            return False
    return True
