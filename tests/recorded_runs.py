"""Recorded runs for the tests of reports: a test names what it is about, the rest is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semiseg.evaluation.coco_metrics import METRIC_NAMES
from semiseg.results import Result


def recorded_run(row: str, seed: int = 0, **changes: Any) -> Result:
    """The record of a run called ROW-SEED; `changes` are laid over its fields."""
    fields: dict[str, Any] = {
        "run_id": f"{row}-{seed}",
        "study": "tiny",
        "row": row,
        "split": "few",
        "split_digest": "d1",
        "seed": seed,
        "config": {},
        "identity": {},
        "data_fingerprint": "data1",
        "metrics": {"instances": {}},
        "steps": 10,
        "seconds": 60.0,
        "device": "cpu",
        "versions": {"torch": "2"},
        "git_revision": "abc",
        "command": ["semiseg", "train"],
        "finished": "2026-01-01T00:00:00+00:00",
    }
    return Result(**{**fields, **changes})


def metrics_of_classes(values: Mapping[str, float]) -> dict[str, Any]:
    """Metrics whose class AP is `values`; AP50 is 10 and AP75 5 above, box AP twice the mask AP."""

    def numbers(value: float) -> dict[str, float | None]:
        return {**dict.fromkeys(METRIC_NAMES), "AP": value, "AP50": value + 10, "AP75": value + 5}

    return {
        "unit": "percent",
        "images": 3,
        "instances": dict.fromkeys(values, 4),
        "bbox": {"groups": {}, "classes": {name: numbers(2 * value) for name, value in values.items()}},
        "segm": {"groups": {}, "classes": {**{name: numbers(value) for name, value in values.items()}, "never": None}},
    }
