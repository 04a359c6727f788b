"""Side-by-side pictures: ground truth and every row's detections on the same validation images.

An instance keeps its colour across the columns: a detection takes the colour of the ground-truth box that it overlaps
most (IoU at least 0.5), or grey if it overlaps none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import load_ground_truth
from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.report.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, Drawing, new_figure, plain, png
from semiseg.splits import normalise

IMAGES = 4
SCORE_THRESHOLD = 0.4
INSTANCE_COLOURS = (ORANGE, SKY, GREEN, VERMILLION, PURPLE, BLUE, "#F0E442", "#7F3C8D", "#11A579", "#A5AA99")
UNMATCHED = "#BBBBBB"
_PANEL_INCHES = 1.75


@dataclass(frozen=True)
class Pictures:
    """A drawn picture, or the reason why there is none.

    Attributes:
        drawing: the picture, or None.
        note: the caption: which images, seed and score threshold; or why it could not be drawn.
    """

    drawing: Drawing | None
    note: str


@dataclass(frozen=True)
class _Instance:
    """One object to draw: box (x, y, w, h) in pixels, mask (H, W) bool or None, text beside the box.

    `unseen` objects have a solid box: those of unseen classes, and all where a table has none.
    """

    box: Sequence[float]
    mask: np.ndarray | None
    text: str
    colour: str
    unseen: bool


def draw_pictures(report: ReportInput, table: ReportTable) -> Pictures:
    """Draws IMAGES validation images, picked by `picture_seed` from those with objects, for all rows of one seed."""
    if report.val_annotations is None or report.val_images is None or not report.val_annotations.is_file():
        return Pictures(None, "the validation set is not on this machine")
    if (runs := _runs_with_detections(report, table)) is None:
        return Pictures(None, "the run folders with the detections are not on this machine")
    seed, paths = runs
    try:
        truth = load_ground_truth(report.val_annotations)
        image_ids = pick_images(truth, seed=report.picture_seed)
        if not image_ids:
            return Pictures(None, "the validation set has no objects")
        images = {image_id: _read_image(report.val_images, truth, image_id) for image_id in image_ids}
        detections = {row: _read_detections(path, set(image_ids)) for row, path in paths.items()}
    except (UserError, OSError, UnidentifiedImageError, json.JSONDecodeError, KeyError, TypeError) as error:
        return Pictures(None, f"images or detections could not be read ({type(error).__name__})")
    content = _draw(table, truth, image_ids, images, detections)
    unit = "image" if len(image_ids) == 1 else "images"
    note = (
        f"{len(image_ids)} validation {unit} drawn at random with seed {report.picture_seed} "
        f"(ids {', '.join(map(str, image_ids))}); runs of seed {seed}; detections with a score above "
        f"{SCORE_THRESHOLD}. A detection has the colour of the object that its box covers best (IoU at least 0.5), "
        "grey if none." + " Solid boxes: unseen classes, dashed: seen classes." * bool(table.unseen)
    )
    return Pictures(content, note)


def pick_images(truth: COCO, *, seed: int, count: int = IMAGES) -> list[int]:
    """Ids of images with at least one object, drawn without replacement; the same for the same file and seed."""
    candidates = sorted({a["image_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]} & set(truth.imgs))
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def _runs_with_detections(report: ReportInput, table: ReportTable) -> tuple[int, dict[str, Path]] | None:
    """The seed with the most recorded rows (the first of equals) and the detections of every one of them by row name.

    None if one of them is gone: a picture without a row would replace a better one of an earlier report.
    """
    recorded = {
        seed: {row.name: found for row in table.rows if (found := report.results.get((table.name, row.name, seed)))}
        for seed in report.seeds
    }
    seed = max(report.seeds, key=lambda seed: len(recorded[seed]), default=None)
    if seed is None or not recorded[seed]:
        return None
    folders = {row: report.run_folders.get(result.run_id) for row, result in recorded[seed].items()}
    paths = {row: folder / "detections.json" for row, folder in folders.items() if folder is not None}
    return (seed, paths) if len(paths) == len(folders) and all(path.is_file() for path in paths.values()) else None


def _read_image(folder: Path, truth: COCO, image_id: int) -> np.ndarray:
    with Image.open(folder / truth.imgs[image_id]["file_name"]) as image:
        return np.asarray(image.convert("RGB"))


def _read_detections(path: Path, image_ids: set[int]) -> list[dict[str, Any]]:
    results = json.loads(path.read_text(encoding="utf-8"))
    return [d for d in results if d["image_id"] in image_ids and d["score"] > SCORE_THRESHOLD]


def _draw(
    table: ReportTable,
    truth: COCO,
    image_ids: Sequence[int],
    images: Mapping[int, np.ndarray],
    detections: Mapping[str, list[dict[str, Any]]],
) -> Drawing:
    rows = [row for row in table.rows if row.name in detections]
    columns = ["ground truth", *(plain(row.label) for row in rows)]
    tallest = max(image.shape[0] / image.shape[1] for image in images.values())
    figure = new_figure(_PANEL_INCHES * len(columns), (_PANEL_INCHES * tallest + 0.05) * len(image_ids) + 0.3)
    panels = figure.subplots(len(image_ids), len(columns), squeeze=False)
    for line, image_id in zip(panels, image_ids, strict=True):
        annotations = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        _draw_panel(line[0], images[image_id], _truth_instances(table, truth, annotations))
        for panel, row in zip(line[1:], rows, strict=True):
            found = sorted((d for d in detections[row.name] if d["image_id"] == image_id), key=lambda d: d["score"])
            _draw_panel(panel, images[image_id], _found_instances(table, truth, annotations, found))
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column, fontsize=8)
    return Drawing(png(figure, colours=200))


def _class_name(truth: COCO, category_id: int) -> str:
    return normalise(str(truth.cats[category_id]["name"]))


def _truth_instances(table: ReportTable, truth: COCO, annotations: Sequence[Mapping[str, Any]]) -> list[_Instance]:
    return [
        _Instance(
            box=annotation["bbox"],
            mask=truth.annToMask(annotation).astype(bool) if annotation.get("segmentation") else None,
            text=name,
            colour=INSTANCE_COLOURS[number % len(INSTANCE_COLOURS)],
            unseen=not table.unseen or name in table.unseen,
        )
        for number, annotation in enumerate(annotations)
        for name in [_class_name(truth, annotation["category_id"])]
    ]


def _found_instances(
    table: ReportTable, truth: COCO, annotations: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> list[_Instance]:
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    instances = []
    for detection in found:
        overlaps = rle.iou(np.array([detection["bbox"]], dtype=np.float64), boxes, [0] * len(boxes))
        best = int(np.argmax(overlaps)) if len(boxes) else -1
        matched = best >= 0 and overlaps[0, best] >= 0.5
        instances.append(
            _Instance(
                box=detection["bbox"],
                mask=rle.decode(detection["segmentation"]).astype(bool),
                text=f"{detection['score']:.2f}",
                colour=INSTANCE_COLOURS[best % len(INSTANCE_COLOURS)] if matched else UNMATCHED,
                unseen=not table.unseen or _class_name(truth, detection["category_id"]) in table.unseen,
            )
        )
    return instances


def _draw_panel(panel: Axes, image: np.ndarray, instances: Sequence[_Instance]) -> None:
    """Masks in colour over a greyed image, boxes on top, so that colours mean instances only."""
    grey = image.astype(np.float64).mean(2, keepdims=True).repeat(3, 2)
    shown = 0.5 * image + 0.5 * grey
    for instance in instances:
        if instance.mask is not None and instance.mask.shape == shown.shape[:2]:
            shown[instance.mask] = 0.35 * shown[instance.mask] + 0.65 * 255 * np.array(to_rgb(instance.colour))
    panel.imshow(shown.astype(np.uint8), interpolation="antialiased")
    for instance in instances:
        x, y, width, height = instance.box
        style = "-" if instance.unseen else (0, (3, 2))
        panel.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), width, height, fill=False, color=instance.colour, linewidth=1, linestyle=style
            )
        )
        panel.text(
            *(x, max(0.0, y), plain(instance.text)),
            fontsize=5,
            color="black",
            va="top",
            clip_on=True,
            bbox={"facecolor": instance.colour, "edgecolor": "none", "pad": 0.4, "alpha": 0.85},
        )
    panel.set_xlim(-0.5, image.shape[1] - 0.5)
    panel.set_ylim(image.shape[0] - 0.5, -0.5)
    panel.set_xticks([])
    panel.set_yticks([])
