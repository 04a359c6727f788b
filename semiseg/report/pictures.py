"""Side-by-side pictures: ground truth and every row's detections on the same validation images.

An object keeps its colour across the columns: a detection takes the colour of the ground-truth box that it overlaps
most (IoU at least 0.5), or grey if it overlaps none.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, UnidentifiedImageError
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.overlays import COLOURS, Drawn, draw_detections, fitted, load_font, written_name
from semiseg.report.aggregate import ReportInput, ReportTable, TableNumbers
from semiseg.report.context import PageContext, StoredDetections
from semiseg.report.failures import CAUSES, causes_of_failure, class_name
from semiseg.report.figures import png
from semiseg.report.tables import signed
from semiseg.results import Result

RANDOM, GAIN, LOSS, FAILURE = "random", "largest gain", "largest loss", "worst failure"
RANDOM_IMAGES, EXTREME_IMAGES = 4, 3
SCORE_THRESHOLD = 0.4
UNMATCHED = (187, 187, 187)
_TILE, _GAP, _LINE = 200, 8, 16  # pixels: width of a picture, room around it, height of a line of words
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Pictures:
    """A drawn picture and its caption; or None and, in one sentence, why there is none."""

    png: bytes | None
    note: str


@dataclass(frozen=True)
class ChosenImage:
    """One validation image to show.

    Attributes:
        group: RANDOM, GAIN, LOSS or FAILURE.
        detail: its gain in points of IoU, or the cause of the failure.
    """

    image_id: Any
    group: str
    detail: str = ""

    @property
    def label(self) -> str:
        """What stands above it."""
        return f"{self.group}{f' ({self.detail})' if self.detail else ''}, image {self.image_id}"


def picture_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Ground truth and all rows side by side."""
    name, pictures = numbers.table.name, draw_pictures(page.report, numbers, page.stored)
    alt = f"ground truth and detections, {name}"
    shown = page.figures.show(f"{name}_pictures", pictures.png, alt=alt, caption=pictures.note, absent=pictures.note)
    return ["### Pictures", *shown]


def draw_pictures(report: ReportInput, numbers: TableNumbers, stored: StoredDetections) -> Pictures:
    """Draws the images of `choose_images` for all rows of one seed, or says in one sentence what is missing for it."""
    table = numbers.table
    try:
        seed, runs = runs_of_one_seed(report, table)
        main = numbers.main_row(runs)
        other = other_row(table, main, runs)
        truth = _required(stored.truth, "the validation set with its masks is")
        if not pick_images(truth, seed=report.picture_seed):
            raise UserError("the validation set has no objects")
        # A picture without a row would replace a better one of an earlier report: all of them are needed.
        detections = {
            row: _required(stored.of(run), "the run folders with the detections are") for row, run in runs.items()
        }
        own, others = (
            None if row is None else judged(table, truth, _required(stored.instances(runs[row]), "detections are"))
            for row in (main, other)
        )
        gains = {} if own is None or others is None else image_gains(own, others)
        failures = {} if own is None else worst_failures(own)
        chosen = choose_images(truth, gains, failures, seed=report.picture_seed)
        strips = []
        for image in chosen:
            pixels = read_image(report.val_images, truth, image.image_id)
            annotations = [a for a in truth.imgToAnns[image.image_id] if not a["iscrowd"]]
            columns = {"ground truth": truth_objects(truth, annotations)}
            for row in table.rows:
                if row.name in detections:
                    on_image = [result for result in detections[row.name] if result["image_id"] == image.image_id]
                    columns[row.label] = detected_objects(annotations, on_image)
            strips.append((image.label, [(label, _tile(pixels, objects)) for label, objects in columns.items()]))
    except UserError as error:
        return Pictures(None, str(error))
    labels = {row.name: row.label for row in table.rows}
    return Pictures(contact_sheet(strips), _note(report, table, seed, labels[main], labels.get(other or "", "")))


def _required(value: _Value | None, what: str) -> _Value:
    if value is None:
        raise UserError(f"{what} not on this machine")
    return value


def _note(report: ReportInput, table: ReportTable, seed: int, main: str, other: str) -> str:
    """The rule by which the images were chosen, and how to read the picture."""
    rule = f"Drawn at random with seed {report.picture_seed}"
    if other:
        objects = "objects of unseen classes" if table.unseen else "objects"
        rule += (
            f"; then those with the largest gain and loss of {main} against {other} in the mean mask IoU of their "
            f"{objects} (in points; not found counts 0)"
        )
    return (
        f"{rule}; then the worst failure of {main} by each cause. Runs of seed {seed}; detections with a score above "
        f"{SCORE_THRESHOLD}, in the colour of the object that the box covers best (IoU at least 0.5), grey if none."
    )


def truth_objects(truth: COCO, annotations: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """The objects of an image, each with its class, by its number where the font of pictures lacks its letters."""
    drawn = []
    for index, annotation in enumerate(annotations):
        category = annotation["category_id"]
        text = written_name(class_name(truth, category), category)
        mask = truth.annToRLE(annotation) if annotation.get("segmentation") else None
        drawn.append(Drawn.of_coco(annotation["bbox"], mask, text, COLOURS[index % len(COLOURS)]))
    return drawn


def detected_objects(annotations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """The detections of an image above SCORE_THRESHOLD, best first, in the colours of its objects."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    drawn = []
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] <= SCORE_THRESHOLD:
            break
        overlaps = rle.iou(np.array([result["bbox"]], dtype=np.float64), boxes, [0] * len(boxes))
        best = int(np.argmax(overlaps)) if len(boxes) else -1
        colour = COLOURS[best % len(COLOURS)] if best >= 0 and overlaps[0, best] >= 0.5 else UNMATCHED
        drawn.append(Drawn.of_coco(result["bbox"], result["segmentation"], f"{result['score']:.2f}", colour))
    return drawn


def _tile(image: np.ndarray, objects: Sequence[Drawn]) -> Image.Image:
    """An image with its objects, half without colour, so that colours mean objects."""
    pixels = Image.blend(Image.fromarray(image), Image.fromarray(image).convert("L").convert("RGB"), 0.5)
    height = max(round(_TILE * image.shape[0] / image.shape[1]), 1)
    picture = pixels.resize((_TILE, height), Image.Resampling.BICUBIC)
    return draw_detections(picture, (image.shape[0], image.shape[1]), objects, smallest_text=9)


def contact_sheet(strips: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> bytes:
    """A PNG of pictures in lines, each line with words above it and each picture with a title.

    Args:
        strips: words and titled pictures of every line.
    """
    heights = [max(picture.height for _, picture in tiles) for _, tiles in strips]
    width = max(sum(picture.width + _GAP for _, picture in tiles) for _, tiles in strips) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + (2 * _LINE + _GAP) * len(strips) + _GAP), "white")
    pen, bold, font = ImageDraw.Draw(sheet), load_font(13), load_font(11)
    top = _GAP
    for (words, tiles), height in zip(strips, heights, strict=True):
        pen.text((_GAP, top), fitted(words, bold, width - 2 * _GAP), fill="black", font=bold)
        left = _GAP
        for title, picture in tiles:
            pen.text((left, top + _LINE), fitted(title, font, picture.width), fill="black", font=font)
            sheet.paste(picture, (left, top + 2 * _LINE))
            left += picture.width + _GAP
        top += 2 * _LINE + height + _GAP
    return png(sheet, colours=160)


def runs_of_one_seed(report: ReportInput, table: ReportTable) -> tuple[int, dict[str, Result]]:
    """The seed with the most recorded rows, the first of equals, and the run of each of these rows.

    Raises:
        UserError: none of the table's runs is recorded.
    """
    recorded: dict[int, dict[str, Result]] = {seed: {} for seed in report.seeds}
    for row, seed, run in report.cells(table):
        recorded[seed][row] = run
    seed, runs = max(recorded.items(), key=lambda item: len(item[1]), default=(0, {}))
    if not runs:
        raise UserError("none of its runs is recorded")
    return seed, runs


def other_row(table: ReportTable, main: str, among: Collection[str]) -> str | None:
    """The row that the main one is compared with: the table's first other one; None if there is none."""
    return next((row.name for row in table.rows if row.name in among and row.name != main), None)


def judged(table: ReportTable, truth: COCO, matches: pd.DataFrame) -> pd.DataFrame:
    """The lines of `match_instances` that count: unseen classes, or all where a table has none."""
    if not table.unseen:
        return matches
    wanted = {category for category in truth.cats if class_name(truth, category) in table.unseen}
    return matches[matches["category"].isin(wanted)]


def image_gains(main: pd.DataFrame, other: pd.DataFrame) -> dict[Any, float]:
    """Image id -> how much higher the mean mask IoU of its instances is for `main`; not found counts as 0.

    Args:
        main, other: lines of `match_instances`, judged, of the same instances.
    """
    difference = main["mask_iou"].fillna(0.0) - other["mask_iou"].fillna(0.0)
    # Rounded, so that equal images are equal whatever the order of the additions.
    return {image: round(float(np.mean(values)), 9) for image, values in difference.groupby(main["image"])}


def worst_failures(matches: pd.DataFrame) -> dict[str, Any]:
    """Cause -> image of the failed mask with the lowest IoU, ties by annotation id; without causes that have none.

    Args:
        matches: lines of `match_instances`, judged.
    """
    failed = matches.assign(cause=causes_of_failure(matches)).sort_index().sort_values("mask_iou", kind="stable")
    worst = failed[failed["cause"] != ""].groupby("cause")["image"].first()
    return {cause: worst[cause] for cause in CAUSES if cause in worst}


def choose_images(
    truth: COCO, gains: Mapping[Any, float], failures: Mapping[str, Any], *, seed: int
) -> list[ChosenImage]:
    """Images with objects drawn at random, then those of the largest gain, the largest loss and the worst failures.

    No image is chosen twice: the groups are filled in this order. Ties go to the smaller id. Only a positive gain is
    a gain, only a negative one a loss.
    """
    points = {image: signed(100 * gain, 0) for image, gain in gains.items()}
    chosen = {image: ChosenImage(image, RANDOM, points.get(image, "")) for image in pick_images(truth, seed=seed)}
    for group, sign in ((GAIN, 1), (LOSS, -1)):
        left = [image for image in sorted(gains) if image not in chosen and sign * gains[image] > 0]
        for image in sorted(left, key=lambda image: -sign * gains[image])[:EXTREME_IMAGES]:
            chosen[image] = ChosenImage(image, group, points[image])
    for cause, image in failures.items():
        chosen.setdefault(image, ChosenImage(image, FAILURE, cause))
    return list(chosen.values())


def pick_images(truth: COCO, *, seed: int, count: int = RANDOM_IMAGES) -> list[Any]:
    """Ids of images with at least one object, drawn without replacement; the same for the same file and seed."""
    candidates = sorted({a["image_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]} & set(truth.imgs))
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def read_image(folder: Path | None, truth: COCO, image_id: Any) -> np.ndarray:
    """The pixels of a validation image (H, W, 3) uint8, RGB.

    Raises:
        UserError: the file is gone or no image; without its path, since the sentence stands on the page.
    """
    try:
        Image.init()
        path = (folder or Path()) / truth.imgs[image_id]["file_name"]
        # PostScript would be handed to another program; no data set of a run holds it (data/images.py).
        with Image.open(path, formats=[name for name in Image.OPEN if name != "EPS"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        raise UserError(f"the file of validation image {image_id} is not on this machine or cannot be read") from None
