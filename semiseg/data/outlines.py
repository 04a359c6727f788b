"""Detections as outlines: one COCO json of polygons, which labelling tools read for correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray

from semiseg.data.detections import decoded
from semiseg.structures.rasterise import signed_area

Points = NDArray[np.float64]  # (P, 2), x and y in pixels of the image, whose corner is (0, 0)
STEP = 0.5**0.5 / 2  # px: by which a line between pixels cuts their corners


def outline_annotations(
    results: Sequence[Mapping[str, Any]], *, score: float, error: float
) -> Iterator[dict[str, Any]]:
    """COCO annotations of the results (see `coco_results`) with at least this score and a pixel in their mask.

    Args:
        error: pixels by which an outline may be beside the border of its mask.
    """
    number = 0
    for result in results:
        if result["score"] < score:
            continue
        mask = decoded(result["segmentation"])
        outlines = simplified_outlines(mask, error=error)
        if not outlines:
            continue
        number += 1
        yield {
            "id": number,
            "image_id": result["image_id"],
            "category_id": result["category_id"],
            "bbox": result["bbox"],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": [np.round(points, 2).reshape(-1).tolist() for points in outlines],
            "score": result["score"],
        }


def simplified_outlines(mask: NDArray[Any], *, error: float) -> list[Points]:
    """The outer border of each part of a mask (H, W), the largest first; holes are left out, as polygons have none.

    Lines run half-way between the pixels inside and outside and cut corners by at most `STEP`; points whose absence
    moves the line by no more than what is left of `error` are left out (Douglas and Peucker, 1973).
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    part = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.float64), 1)
    lines = contour_generator(z=part).lines(0.5)
    # Around what is inside, lines run the other way than around holes.
    outer = [line for line in lines if isinstance(line, np.ndarray) and signed_area(*line.T) > 0]
    offset = np.array([left, top]) - 0.5  # the part begins one pixel further up and left, pixels lie at their centres
    return [
        _simplified(line[:-1] + offset, max(error - STEP, 0))
        for line in sorted(outer, key=lambda line: signed_area(*line.T))[::-1]
    ]


def _simplified(ring: Points, tolerance: float) -> Points:
    """A closed line without the points that lie within a distance of it; at least a triangle."""
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    kept = np.zeros(len(ring), bool)
    kept[[0, far]] = True
    closed, todo = np.vstack([ring, ring[:1]]), [(0, far), (far, len(ring))]
    while todo:
        first, last = todo.pop()
        between = closed[first + 1 : last]
        if not len(between):
            continue
        distances = _distances(between, closed[first], closed[last])
        middle = first + 1 + int(distances.argmax())
        if distances.max() > tolerance or kept.sum() < 3:
            kept[middle] = True
            todo += [(first, middle), (middle, last)]
    return ring[kept]


def _distances(points: Points, start: Points, end: Points) -> NDArray[np.float64]:
    """From the line between two points, its ends included."""
    along = end - start
    share = ((points - start) @ along / max(float(along @ along), 1e-12)).clip(0, 1)
    distances: NDArray[np.float64] = np.hypot(*(points - start - share[:, None] * along).T)
    return distances
