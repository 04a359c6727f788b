"""Rows `evaluation` and `evaluation_hotcoco`: box and mask AP, from a file of ground
truth and detections.

Straightforward: one plain pycocotools evaluation of all classes for each of the two IoU types.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO

from benchmarks import straightforward as plain
from benchmarks.measure import Close, Place, Row, Side, Sizes, Task
from semiseg.evaluation.coco_metrics import METRIC_NAMES, Metrics, evaluate_detections
from semiseg.evaluation.precision import Backend

HEIGHT, WIDTH = 480, 640
INSTANCES = 7  # annotated per image, COCO's average
SHAPES = 2048  # different outlines: drawing one for each of half a million detections would take longer than the rest
NEAR = 2  # detections around each instance; all others lie anywhere
OUTLINE_POINTS = 12


def prepare(backend: Backend, side: Side, sizes: Sizes, place: Place) -> Task:
    """Both rows."""
    names = [f"class {label:04d}" for label in range(sizes["classes"])]
    annotations, results = _inputs(sizes, names, place.folder)
    image_ids = range(1, sizes["images"] + 1)

    def ours() -> Metrics:
        return evaluate_detections(annotations, results, class_names=names, image_ids=image_ids, backend=backend)

    if side == "ours":
        return Task(ours, _as_summary)
    boxes = [{key: value for key, value in result.items() if key != "segmentation"} for result in results]
    masks = [{key: value for key, value in result.items() if key != "bbox"} for result in results]

    def straightforward() -> dict[str, np.ndarray]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
        return {
            iou_type: plain.coco_summary(truth, [dict(result) for result in results], iou_type)
            for iou_type, results in (("bbox", boxes), ("segm", masks))
        }

    return Task(straightforward)


def _as_summary(metrics: Metrics) -> dict[str, np.ndarray]:
    """As pycocotools' summary: fractions, -1 where nothing was measured."""
    assert metrics.segm is not None
    both = {"bbox": metrics.bbox, "segm": metrics.segm}
    values = {name: [one.groups["all"][metric] for metric in METRIC_NAMES] for name, one in both.items()}
    return {name: np.array([-1.0 if v is None else v / 100 for v in row]) for name, row in values.items()}


def _inputs(sizes: Sizes, names: list[str], folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A ground-truth file, and as many detections per image as the sizes say; the same at every call."""
    random = np.random.default_rng(8)
    truth, near = _outlines(random)
    truth_rles, near_rles = (rle_codec.frPyObjects(outlines, HEIGHT, WIDTH) for outlines in (truth, near))
    near_texts = [rle["counts"].decode("ascii") for rle in near_rles]
    truth_boxes, near_boxes = rle_codec.toBbox(truth_rles).tolist(), rle_codec.toBbox(near_rles).tolist()
    areas = [int(rle_codec.area(rle)) for rle in truth_rles]  # not at once: pycocotools counts to 255 there
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, sizes["images"] + 1):
        shapes, labels = random.integers(SHAPES, size=INSTANCES), random.integers(sizes["classes"], size=INSTANCES)
        for shape, label in zip(shapes.tolist(), labels.tolist(), strict=True):
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
            mask = {"bbox": truth_boxes[shape], "area": areas[shape], "segmentation": [truth[shape]]}
            annotations.append({**ids, **mask})
        others = sizes["detections"] - NEAR * INSTANCES
        detected = [*shapes.tolist() * NEAR, *random.integers(SHAPES, size=others).tolist()]
        classes = [*labels.tolist() * NEAR, *random.integers(sizes["classes"], size=others).tolist()]
        scores = np.concatenate((random.uniform(0.2, 1, NEAR * INSTANCES), random.uniform(0.05, 0.6, others)))
        for shape, label, score in zip(detected, classes, scores.tolist(), strict=True):
            rle = {"size": [HEIGHT, WIDTH], "counts": near_texts[shape]}
            box = {"image_id": image_id, "category_id": label + 1, "bbox": near_boxes[shape], "score": score}
            results.append({**box, "segmentation": rle})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    images = [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, sizes["images"] + 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, results


def _outlines(random: np.random.Generator) -> tuple[list[list[float]], list[list[float]]]:
    """Outlines [x0, y0, ...] of instances, and of what a detector might find there instead."""
    angles = np.linspace(0, 2 * math.pi, OUTLINE_POINTS, endpoint=False)
    ring = np.stack((np.cos(angles), np.sin(angles)), axis=1)  # (points, 2)
    radius = np.exp(random.normal(math.log(25), 0.8, (SHAPES, 1, 1))).clip(4, 200)
    centre = random.uniform((0, 0), (WIDTH, HEIGHT), (SHAPES, 2))[:, None]
    uneven = random.uniform(0.7, 1.3, (SHAPES, OUTLINE_POINTS, 1))
    truth = centre + radius * uneven * ring
    near = truth + radius * random.normal(0, 0.12, (SHAPES, 1, 2)) + radius * random.normal(0, 0.06, truth.shape)
    outlines = (points.clip(0, (WIDTH, HEIGHT)).reshape(SHAPES, -1).tolist() for points in (truth, near))
    return next(outlines), next(outlines)


EVALUATION = Row(
    name="evaluation",
    sizes={"images": 5000, "detections": 100, "classes": 80},
    quick={"images": 40},
    tiny={"images": 3, "detections": 20, "classes": 4},
    passes=1,
    quick_passes=3,
    prepare=partial(prepare, "pycocotools"),
    agree=Close(1e-9),
)
# The optional backend, which checks itself against pycocotools on some of the images; with more images in the quick
# form, so that this is not most of its work.
EVALUATION_HOTCOCO = replace(
    EVALUATION,
    name="evaluation_hotcoco",
    quick={"images": 200},
    quick_passes=1,
    prepare=partial(prepare, "hotcoco"),
    package="hotcoco",
)
