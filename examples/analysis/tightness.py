"""How tightly predicted masks fill the boxes of what they found: the projection loss, measured on stored detections.

    python -m examples.analysis.tightness val.json runs/mine/detections.json

The error is 1 - Dice between the projections of mask and box, averaged over x and y; 0 for a mask that reaches from
side to side of the box and no further.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from examples.analysis import read_detections, read_truth, run_script
from semiseg.evaluation.instances import box_matches
from semiseg.evaluation.precision import names_of_classes


@dataclass(frozen=True)
class ClassTightness:
    """The projection error of one class.

    Attributes:
        objects: those that were found.
        error: mean over them, 0..1; None without any.
    """

    objects: int
    error: float | None


def class_tightness(truth: COCO, results: Sequence[Mapping[str, Any]]) -> dict[str, ClassTightness]:
    """Projection error of the masks of all detections that found an object (`box_matches`), per class.

    The box is that of the object, not of the detection: it is what the projection loss compares with in training, and
    a box that is a little off must not count as a loose mask.

    Args:
        truth: from `coco_metrics.load_ground_truth`.
        results: COCO results with masks of the size of their images.
    """
    errors = [
        (result["category_id"], projection_error(rle.decode(result["segmentation"]), truth.anns[match]["bbox"]))
        for result, match in zip(results, box_matches(truth, results), strict=True)
        if match is not None
    ]
    return _by_class(truth, errors)


def true_tightness(truth: COCO) -> dict[str, ClassTightness]:
    """The same of the objects' own masks: not 0 where boxes and outlines do not fit to the pixel. Without crowd.

    Args:
        truth: from `coco_metrics.load_ground_truth`, after `prepare_masks`.
    """
    objects = [annotation for annotation in truth.anns.values() if not annotation["iscrowd"]]
    return _by_class(
        truth, [(each["category_id"], projection_error(truth.annToMask(each), each["bbox"])) for each in objects]
    )


def _by_class(truth: COCO, errors: Iterable[tuple[int, float]]) -> dict[str, ClassTightness]:
    """Means of (category id, error)."""
    collected: dict[int, list[float]] = {category: [] for category in sorted(truth.cats)}
    for category, error in errors:
        collected[category].append(error)
    return {
        name: ClassTightness(len(found), math.fsum(found) / len(found) if found else None)
        for name, found in zip(names_of_classes(truth), collected.values(), strict=True)
    }


def projection_error(mask: NDArray[Any], box_xywh: Sequence[float]) -> float:
    """1 - Dice between the projections of a mask and of a box, averaged over x and y.

    Args:
        mask: (H, W), not 0 inside. Its projection on x are the columns, on y the rows that have a pixel inside.
        box_xywh: pixels of the image. Its projection are the columns and rows that it touches, inside the image.

    Returns:
        0..1; 0 for a mask that reaches from side to side and no further, 1 for an empty one.
    """
    x, y, width, height = box_xywh
    inside = np.asarray(mask) != 0
    errors = [
        _dice_error(inside.any(axis=0), _touched(x, x + width, inside.shape[1])),
        _dice_error(inside.any(axis=1), _touched(y, y + height, inside.shape[0])),
    ]
    return float(np.mean(errors))


def _touched(low: float, high: float, size: int) -> NDArray[np.bool_]:
    """(size,) whether the interval covers a part of each pixel; a point covers the one that it lies in."""
    low, high = round(low, 3), round(high, 3)  # 0.1 + 0.9 ends where it should
    first = min(max(math.floor(low), 0), size - 1)
    last = min(max(math.ceil(high), first + 1), size)
    places = np.arange(size)
    return (places >= first) & (places < last)


def _dice_error(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Neither of the two may be all false together; `second` never is."""
    return 1 - 2 * int((first & second).sum()) / (int(first.sum()) + int(second.sum()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints objects found and mean error by class, and that of the objects' own masks."""
    parser = argparse.ArgumentParser(description="Measures how tightly masks fill their boxes.")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("detections", type=Path)
    given = parser.parse_args(arguments)
    truth = read_truth(given.annotations)
    true = true_tightness(truth)
    print(f"{'class':<24}{'found':>8}{'error':>10}{'true masks':>12}")
    for name, found in class_tightness(truth, read_detections(given.detections, truth)).items():
        shown = ["-" if error is None else f"{100 * error:.1f} %" for error in (found.error, true[name].error)]
        print(f"{name:<24}{found.objects:>8}{shown[0]:>10}{shown[1]:>12}")


if __name__ == "__main__":
    run_script(main)
