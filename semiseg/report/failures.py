"""Why masks fail although the box was found: each failed instance has one cause, by rules that the page prints."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from semiseg.report.aggregate import TableNumbers
from semiseg.report.context import PageContext, StoredDetections
from semiseg.report.tables import escape_markdown, markdown_table
from semiseg.results import Result
from semiseg.splits import normalise

FAILED_IOU = 0.5  # of the masks: what COCO's easiest threshold misses
# Cause -> rule in words, in the order in which the rules are asked; the first that applies is the cause.
CAUSES: Mapping[str, str] = {
    "merged": "more than 25 % of the mask on other instances, of any class, also if it leaks",
    "box": "IoU of the mask and the detection's own box above 0.9: the mask fills its box",
    "leak": "more than 25 % of the mask outside the object",
    "part missing": "less than half of the object covered",
    "other": "none of these",
}
_VERSION = "v1"  # of the rules, in the key of what is kept


def class_name(truth: COCO, category_id: Any) -> str:
    """The name of a category as splits write it."""
    return normalise(str(truth.cats[category_id]["name"]))


def causes_of_failure(matches: pd.DataFrame) -> pd.Series:
    """The cause of each failed line of `match_instances`; "" for instances that were not found or have not failed."""
    rules = [
        matches["on_others"] > 0.25,
        matches["mask_box_iou"] > 0.9,
        matches["outside"] > 0.25,
        matches["recall"] < 0.5,
    ]
    first = np.select(rules, list(CAUSES)[:-1], "other")
    failed = (matches["detection"] >= 0) & (matches["mask_iou"] < FAILED_IOU)
    return pd.Series(np.where(failed, first, ""), index=matches.index, dtype=object)


def failure_counts(truth: COCO, matches: pd.DataFrame) -> dict[str, list[int]]:
    """Class -> number of instances, of found ones, and of failures by cause, of `match_instances` of a run."""
    causes = causes_of_failure(matches)
    columns = {"instances": 1, "found": matches["detection"] >= 0, **{cause: causes == cause for cause in CAUSES}}
    counts = pd.DataFrame(columns, index=matches.index).groupby(matches["category"]).sum()
    names = [class_name(truth, category) for category in counts.index]
    return dict(zip(names, counts.to_numpy().tolist(), strict=True))


def failure_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """How many found objects have a failed mask and why, for every row."""
    report, table = page.report, numbers.table
    labels = {row.name: row.label for row in table.rows}
    counted: dict[str, list[np.ndarray]] = {row.name: [] for row in table.rows}
    missing = []
    for row, seed, run in report.cells(table):
        key = f"{run.trained_as}/{_VERSION}"
        counts = page.measured.get("failures", key, functools.partial(_counts, page.stored, run))
        if counts is None:
            missing.append(f"{escape_markdown(labels[row])} seed {seed}")
        else:
            judged = [values for name, values in counts.items() if not table.unseen or name in table.unseen]
            counted[row].append(np.array(judged, dtype=np.int64).reshape(-1, 2 + len(CAUSES)).sum(0))
    lines = [[row.label, *_cells(counted[row.name])] for row in table.rows]
    whose = "Objects of unseen classes" if table.unseen else "Objects"
    rules = "; ".join(f"**{cause}**: {rule}" for cause, rule in CAUSES.items())
    text = (
        f"{whose} whose box was found (IoU of at least 0.5) but whose mask has an IoU below 0.5, by the first of these "
        f"rules that applies: {rules}. Means over the runs; in brackets the share of all, found and failed objects."
    )
    gone = f"Without {', '.join(missing)}: the detections of these runs are not on this machine."
    return [
        "### Failures",
        text,
        markdown_table(("row", "runs", "found", "failed", *CAUSES), lines),
        *([gone] if missing else []),
    ]


def _counts(stored: StoredDetections, run: Result) -> dict[str, list[int]] | None:
    truth, matches = stored.truth, stored.instances(run)
    return None if truth is None or matches is None else failure_counts(truth, matches)


def _cells(runs: Sequence[np.ndarray]) -> list[str]:
    """Number of runs; then means over them, each with its share of the column that it is part of."""
    if not runs:
        return ["0", *["—"] * (2 + len(CAUSES))]
    instances, detected, *causes = np.mean(runs, axis=0)
    failed = sum(causes)
    cells = [_with_share(detected, instances), _with_share(failed, detected)]
    return [str(len(runs)), *cells, *(_with_share(count, failed) for count in causes)]


def _with_share(count: float, of: float) -> str:
    number = f"{count:.1f}".removesuffix(".0")
    return f"{number} ({100 * count / of:.0f} %)" if of else number
