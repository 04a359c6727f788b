"""Ground truth and every row's detections side by side on the same images; an object keeps its colour across rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

RANDOM, GAIN, LOSS, FAILURE = "random", "largest gain", "largest loss", "worst failure"
RANDOM_IMAGES, EXTREME_IMAGES, PICTURE_SEED = 4, 3, 0
SCORE_THRESHOLD = 0.4
UNMATCHED = (187, 187, 187)
_TILE, _GAP, _LINE = 200, 8, 16  # pixels: width of a picture, room around it, height of a line of words


def picture_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Ground truth and all rows side by side."""
    name = numbers.table.name
    if not page.report.pictures:
        page.figures.remove(f"{name}_pictures")
        return []
    content, note = draw_pictures(page.report, numbers, page.stored)
    alt = f"ground truth and detections, {name}"
    return ["### Pictures", *page.figures.show(f"{name}_pictures", content, alt=alt, caption=note, absent=note)]


def draw_pictures(report: ReportInput, numbers: TableNumbers, stored: StoredDetections) -> tuple[bytes | None, str]:
    """The images of `choose_images` for all rows of one seed, as PNG with its caption, or None and what is missing.

    The seed is the one with the most recorded rows, the first of equals.
    """
    table = numbers.table
    recorded = {seed: {row: run for row, of, run in report.cells(table) if of == seed} for seed in report.seeds}
    seed, runs = max(recorded.items(), key=lambda item: len(item[1]))
    if not runs:
        return None, "none of its runs is recorded"
    truth = stored.truth
    if truth is None:
        return None, "the validation set with its masks is not on this machine"
    if all(annotation["iscrowd"] for annotation in truth.anns.values()):
        return None, "the validation set has no objects"
    detections = {row: results for row, run in runs.items() if (results := stored.of(run)) is not None}
    if len(detections) < len(runs):  # a picture without a row would replace a better one of an earlier report
        return None, "the run folders with the detections are not on this machine"
    compared = [numbers.main_row(runs)]
    compared += [row for row in runs if row not in compared][:1]
    matches = [frame for row in compared if (frame := stored.instances(runs[row])) is not None]
    main, *others = (judged(table, truth, frame) for frame in matches)
    gains = image_gains(main, others[0]) if others else {}
    labels = {row.name: row.label for row in table.rows}
    strips = []
    for image, words in choose_images(truth, gains, worst_failures(main), seed=PICTURE_SEED).items():
        try:
            pixels = read_image(report, truth, image)
        except UserError as error:
            return None, str(error)
        annotations = [a for a in truth.imgToAnns[image] if not a["iscrowd"]]
        columns = {"ground truth": truth_objects(truth, annotations)}
        for row, results in detections.items():
            on_image = [result for result in results if result["image_id"] == image]
            columns[labels[row]] = detected_objects(annotations, on_image)
        strips.append((words, [(label, _tile(pixels, objects)) for label, objects in columns.items()]))
    return contact_sheet(strips), _note(table, seed, *(labels[row] for row in compared))


def _note(table: ReportTable, seed: int, main: str, other: str = "") -> str:
    """The rule by which the images were chosen, and how to read the picture."""
    rule = f"Drawn at random with seed {PICTURE_SEED}"
    if other:
        objects = "objects of unseen classes" if table.unseen else "objects"
        rule += (
            f"; then of the others those with the largest gain and loss of {main} against {other} in the mean mask IoU "
            f"of their {objects} (in points; not found counts 0)"
        )
    return (
        f"{rule}; then the worst failure of {main} by each cause, unless its image is there already. Runs of seed "
        f"{seed}. Gains, losses and failures count every detection; those with a score above {SCORE_THRESHOLD} are "
        "drawn, in the colour of the object that the box covers best (IoU at least 0.5), grey if none."
    )


def truth_objects(truth: COCO, annotations: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """The objects of an image, each with its class, by its number where the font of pictures lacks its letters."""
    drawn = []
    for index, annotation in enumerate(annotations):
        category = annotation["category_id"]
        text = written_name(class_name(truth, category), category)
        mask = truth.annToRLE(annotation) if annotation.get("segmentation") else None
        drawn.append(Drawn(annotation["bbox"], mask, text, COLOURS[index % len(COLOURS)]))
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
        drawn.append(Drawn(result["bbox"], result["segmentation"], f"{result['score']:.2f}", colour))
    return drawn


def _tile(image: np.ndarray, objects: Sequence[Drawn]) -> Image.Image:
    """An image with its objects, half without colour, so that colours mean objects."""
    pixels = Image.blend(Image.fromarray(image), Image.fromarray(image).convert("L").convert("RGB"), 0.5)
    height = max(round(_TILE * image.shape[0] / image.shape[1]), 1)
    picture = pixels.resize((_TILE, height), Image.Resampling.BICUBIC)
    return draw_detections(picture, (image.shape[0], image.shape[1]), objects, smallest_text=9)


def contact_sheet(strips: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> bytes:
    """A PNG of lines of pictures: the words above each line, and its pictures with their titles."""
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


def judged(table: ReportTable, truth: COCO, matches: pd.DataFrame) -> pd.DataFrame:
    """The lines of `match_instances` that count: unseen classes, or all where a table has none."""
    if not table.unseen:
        return matches
    return matches[matches["category"].map(lambda category: class_name(truth, category)).isin(table.unseen)]


def image_gains(main: pd.DataFrame, other: pd.DataFrame) -> dict[Any, float]:
    """Image id -> how much higher the mean mask IoU of its `judged` instances is for `main`; not found counts as 0."""
    difference = main["mask_iou"].fillna(0.0) - other["mask_iou"].fillna(0.0)
    # Rounded, so that equal images are equal whatever the order of the additions.
    return {image: round(float(np.mean(values)), 9) for image, values in difference.groupby(main["image"])}


def worst_failures(matches: pd.DataFrame) -> dict[str, Any]:
    """Cause -> image of the failed mask with the lowest IoU of those `judged`, ties by annotation id."""
    failed = matches.assign(cause=causes_of_failure(matches)).sort_index().sort_values("mask_iou", kind="stable")
    worst = failed[failed["cause"] != ""].groupby("cause")["image"].first()
    return {cause: worst[cause] for cause in CAUSES if cause in worst}


def choose_images(truth: COCO, gains: Mapping[Any, float], failures: Mapping[str, Any], *, seed: int) -> dict[Any, str]:
    """Id of each chosen image -> what stands above it: group, points of IoU gained or the cause of the failure, id.

    Images with objects drawn at random, then those of the largest gain, the largest loss and the worst failures. No
    image is chosen twice: the groups are filled in this order. Ties go to the smaller id.
    """
    candidates = sorted({a["image_id"] for a in truth.anns.values() if not a["iscrowd"]} & set(truth.imgs))
    groups = dict.fromkeys(random.Random(seed).sample(candidates, min(RANDOM_IMAGES, len(candidates))), RANDOM)
    for group, sign in ((GAIN, 1), (LOSS, -1)):
        left = [image for image in sorted(gains) if image not in groups and sign * gains[image] > 0]
        groups |= dict.fromkeys(sorted(left, key=lambda image: -sign * gains[image])[:EXTREME_IMAGES], group)
    points = {image: f" ({signed(100 * gain, 0)})" for image, gain in gains.items()}
    words = {image: f"{group}{points.get(image, '')}" for image, group in groups.items()}
    for cause, image in failures.items():
        words.setdefault(image, f"{FAILURE} ({cause})")
    return {image: f"{text}, image {image}" for image, text in words.items()}


def read_image(report: ReportInput, truth: COCO, image_id: Any) -> np.ndarray:
    """The pixels of a validation image (H, W, 3) uint8, RGB; a UserError without its path, as it stands on the page."""
    try:
        Image.init()
        path = (report.val_images or Path()) / truth.imgs[image_id]["file_name"]
        if report.pixels_of is not None:
            return report.pixels_of(path)
        # PostScript would be handed to another program; no data set of a run holds it (data/images.py).
        with Image.open(path, formats=[name for name in Image.OPEN if name != "EPS"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, UserError):
        raise UserError(f"the file of validation image {image_id} is not on this machine or cannot be read") from None
