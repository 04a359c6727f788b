"""Questions about finished runs, asked of their stored detections: each script has its usage in its first lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import check_results, load_ground_truth, prepare_masks


def run_script(main: Callable[[], None]) -> None:
    """What `semiseg` does with errors: one sentence, and exit code 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def read_truth(annotations: Path) -> COCO:
    """Objects that all have masks, crowd aside.

    Raises:
        UserError: the file cannot be read, or an object has no mask.
    """
    truth = load_ground_truth(annotations)
    if not prepare_masks(truth):
        raise UserError(f"{annotations}: every object needs a mask")
    return truth


def read_detections(path: Path, truth: COCO) -> list[dict[str, Any]]:
    """The `detections.json` of a run folder.

    Raises:
        UserError: the file cannot be read, or is of other images or classes.
    """
    try:
        results: list[dict[str, Any]] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    check_results(truth, results)
    return results
