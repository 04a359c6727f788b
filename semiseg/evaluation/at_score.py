"""What is found, missed and confused where detections of at least one score are taken: precision, recall, F1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.matching import match_cells
from semiseg.evaluation.precision import names_of_classes
from semiseg.results import MAX_DETS

Annotation = Mapping[str, Any]


@dataclass(frozen=True)
class AtScore:
    """The detections of at least a score, each matched with at most one object of its image, crowd left out.

    `objects`, `detections` and `found` count by class; a detection that lies on a crowd region of its class is in none.
    """

    score: float
    iou: float  # from which a detection may be an object's
    of: Literal["segm", "bbox"]  # whose IoU
    objects: Mapping[str, int]
    detections: Mapping[str, int]
    found: Mapping[str, int]
    # Class of an object -> class of the detection that lies on it, though it is of another -> how many
    confused: Mapping[str, Mapping[str, int]]

    def counts(self, name: str | None = None) -> tuple[int, int, int]:
        """(objects, detections, found) of a class, or of all together."""
        parts = (self.objects, self.detections, self.found)
        objects, detections, found = (sum(each.values()) if name is None else each[name] for each in parts)
        return objects, detections, found

    def percent(self, name: str | None = None) -> tuple[float | None, float | None, float | None]:
        """Precision, recall and their harmonic mean F1 of a class, or of all together; None without a denominator."""
        objects, detections, found = self.counts(name)
        parts = ((found, detections), (found, objects), (2 * found, objects + detections))
        precision, recall, f1 = (100 * part / whole if whole else None for part, whole in parts)
        return precision, recall, f1


def at_score(
    truth: COCO,
    results: Sequence[Mapping[str, Any]],
    iou_type: Literal["segm", "bbox"],
    *,
    score: float,
    iou: float = 0.5,
    max_dets: int = MAX_DETS,
) -> AtScore:
    """Matches the detections of at least a score: within each class as COCO does, then what is left across classes.

    A detection that found no object of its class is confused with the object of another class on which it lies with
    the highest IoU, the best scores first, if that was not found either and the IoU is large enough.

    Args:
        truth, results, iou_type, max_dets: as of `matching.match_cells`.
    """
    taken = [result for result in results if result["score"] >= score]
    names = dict(zip(sorted(truth.cats), names_of_classes(truth), strict=True))
    objects, detections, found = (dict.fromkeys(names.values(), 0) for _ in range(3))
    lost: dict[Any, list[int]] = {}  # image -> numbers of detections without an object, and below of objects
    missed: dict[Any, list[int]] = {}
    for cell in match_cells(truth, taken, iou_type, [iou], max_dets=max_dets):
        name, image = names[cell["category_id"]], cell["image_id"]
        counted, matched = ~cell["dtIgnore"][0].astype(bool), cell["dtMatches"][0] > 0
        own = [key for key, ignored in zip(cell["gtIds"], cell["gtIgnore"], strict=True) if not ignored]
        objects[name] += len(own)
        detections[name] += int(counted.sum())
        found[name] += int((counted & matched).sum())
        reached = set(cell["dtMatches"][0][counted & matched].astype(int).tolist())
        missed.setdefault(image, []).extend(key for key in own if key not in reached)
        lost.setdefault(image, []).extend(np.array(cell["dtIds"], int)[counted & ~matched].tolist())
    confused = Counter[tuple[str, str]]()
    for image, keys in lost.items():
        of_image = [taken[key - 1] for key in keys]
        pairs = _across_classes(of_image, [truth.anns[key] for key in missed[image]], truth, iou_type, iou)
        confused.update((names[annotation["category_id"]], names[one["category_id"]]) for one, annotation in pairs)
    table: dict[str, dict[str, int]] = {}
    for (of, taken_for), count in sorted(confused.items()):
        table.setdefault(of, {})[taken_for] = count
    return AtScore(score, iou, iou_type, objects, detections, found, table)


def _across_classes(
    detections: list[Mapping[str, Any]], objects: list[Annotation], truth: COCO, iou_type: str, iou: float
) -> list[tuple[Mapping[str, Any], Annotation]]:
    """Pairs of an image's detections and objects, the best scores first, each in one pair at most."""
    if not detections or not objects:
        return []
    detections = sorted(detections, key=lambda detection: -detection["score"])
    if iou_type == "segm":
        shapes = [each["segmentation"] for each in detections], [truth.annToRLE(each) for each in objects]
    else:
        shapes = [each["bbox"] for each in detections], [each["bbox"] for each in objects]
    overlap = np.asarray(rle.iou(*shapes, [0] * len(objects)), dtype=np.float64)
    pairs = []
    for detection, row in zip(detections, overlap, strict=True):
        best = int(row.argmax())
        if row[best] >= iou:
            pairs.append((detection, objects[best]))
            overlap[:, best] = -1
    return pairs
