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
from semiseg.overlays import COLOURS, Drawn, can_write, draw_detections, fitted, load_font
from semiseg.report.aggregate import ReportInput, ReportTable, TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.drawing import png
from semiseg.report.stored import StoredDetections
from semiseg.report.tables import signed
from semiseg.results import Result
from semiseg.splits import normalise

RANDOM, GAIN, LOSS = "random", "largest gain", "largest loss"
RANDOM_IMAGES, EXTREME_IMAGES = 4, 3
SCORE_THRESHOLD = 0.4
UNMATCHED = (187, 187, 187)
_TILE, _GAP, _LINE = 200, 8, 16  # pixels: width of a picture, room around it, height of a line of words
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Pictures:
    """A drawn picture, or the reason why there is none.

    Attributes:
        png: the picture, or None.
        note: the caption: by which rule, of which runs; or in one sentence why there is none.
    """

    png: bytes | None
    note: str


@dataclass(frozen=True)
class ChosenImage:
    """One validation image to show.

    Attributes:
        group: RANDOM, GAIN or LOSS.
        gain: mean mask IoU of the main row minus that of the other row on the image's instances; None without them.
    """

    image_id: Any
    group: str
    gain: float | None

    @property
    def label(self) -> str:
        """Its group, gain in points of IoU, and id."""
        gain = "" if self.gain is None else f" ({signed(100 * self.gain, 0)})"
        return f"{self.group}{gain}, image {self.image_id}"


def picture_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """Ground truth and all rows side by side."""
    name, pictures = numbers.table.name, draw_pictures(page.report, numbers, page.stored)
    shown = page.figures.show(
        f"{name}_pictures",
        pictures.png,
        alt=f"ground truth and detections, {name}",
        caption=pictures.note,
        absent=pictures.note,
    )
    return ["### Pictures", *shown]


def draw_pictures(report: ReportInput, numbers: TableNumbers, stored: StoredDetections) -> Pictures:
    """Draws the images of `choose_images` for all rows of one seed, or says in one sentence what is missing for it."""
    table = numbers.table
    try:
        seed, runs = runs_of_one_seed(report, table)
        main = numbers.main_row(runs)
        other = other_row(table, main, runs)
        truth = truth_of(stored)
        if not pick_images(truth, seed=report.picture_seed):
            raise UserError("the validation set has no objects")
        matches = [judged(table, truth, there(stored.instances(runs[row]))) for row in (main, other) if row]
        chosen = choose_images(truth, image_gains(*matches) if other else {}, seed=report.picture_seed)
        images = {image.image_id: read_image(report.val_images, truth, image.image_id) for image in chosen}
        detections = {
            row: [
                result
                for result in there(stored.of(run))
                if result["image_id"] in images and result["score"] > SCORE_THRESHOLD
            ]
            for row, run in runs.items()
        }
    except UserError as error:
        return Pictures(None, str(error))
    strips = []
    for image in chosen:
        annotations = [a for a in truth.imgToAnns[image.image_id] if not a["iscrowd"]]
        columns = {"ground truth": truth_objects(table, truth, annotations)}
        for row in table.rows:
            if row.name in detections:
                own = [result for result in detections[row.name] if result["image_id"] == image.image_id]
                columns[row.label] = found_objects(table, truth, annotations, own)
        tiles = [(label, _tile(images[image.image_id], objects)) for label, objects in columns.items()]
        strips.append((image.label, tiles))
    return Pictures(contact_sheet(strips), _note(report, table, chosen, seed, (main, other)))


def there(found: _Read | None) -> _Read:
    """A picture without a row would replace a better one of an earlier report: all of them are needed."""
    if found is None:
        raise UserError("the run folders with the detections are not on this machine")
    return found


def truth_of(stored: StoredDetections) -> COCO:
    """The validation objects with masks, which pictures are drawn from."""
    if (truth := stored.truth()) is None:
        raise UserError("the validation set with its masks is not on this machine")
    return truth


def _note(
    report: ReportInput,
    table: ReportTable,
    chosen: Sequence[ChosenImage],
    seed: int,
    compared: tuple[str, str | None],
) -> str:
    """The rule by which the images were chosen, and how to read the picture."""
    main, other = (next((row.label for row in table.rows if row.name == name), "") for name in compared)
    rule = f"Drawn at random with seed {report.picture_seed}: {sum(image.group == RANDOM for image in chosen)} images"
    if other:
        objects = "objects of unseen classes" if table.unseen else "objects"
        rule += (
            f"; then those with the largest gain and loss of {main} against {other} in the mean mask IoU of their "
            f"{objects} (in points; not found counts 0)"
        )
    solid = " Solid boxes: unseen classes, dashed: seen classes." if table.unseen else ""
    return (
        f"{rule}. Runs of seed {seed}; detections with a score above {SCORE_THRESHOLD}, in the colour of the object "
        f"that the box covers best (IoU at least 0.5), grey if none.{solid}"
    )


def truth_objects(table: ReportTable, truth: COCO, annotations: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """The objects of an image, each with its class."""
    return [
        Drawn(
            _corners(annotation["bbox"]),
            truth.annToRLE(annotation) if annotation.get("segmentation") else None,
            drawn_name(truth, annotation["category_id"]),
            COLOURS[index % len(COLOURS)],
            dashed=_is_dashed(table, truth, annotation),
        )
        for index, annotation in enumerate(annotations)
    ]


def found_objects(
    table: ReportTable, truth: COCO, annotations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> list[Drawn]:
    """The detections of an image, best first, in the colours of its objects."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    drawn = []
    for result in sorted(results, key=lambda result: -result["score"]):
        overlaps = rle.iou(np.array([result["bbox"]], dtype=np.float64), boxes, [0] * len(boxes))
        best = int(np.argmax(overlaps)) if len(boxes) else -1
        colour = COLOURS[best % len(COLOURS)] if best >= 0 and overlaps[0, best] >= 0.5 else UNMATCHED
        box, text = _corners(result["bbox"]), f"{result['score']:.2f}"
        dashed = _is_dashed(table, truth, result)
        drawn.append(Drawn(box, result["segmentation"], text, colour, dashed))
    return drawn


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _is_dashed(table: ReportTable, truth: COCO, item: Mapping[str, Any]) -> bool:
    return bool(table.unseen) and class_name(truth, item["category_id"]) not in table.unseen


def _tile(image: np.ndarray, objects: Sequence[Drawn]) -> Image.Image:
    """An image with its objects, half without colour, so that colours mean objects."""
    pixels = Image.blend(Image.fromarray(image), Image.fromarray(image).convert("L").convert("RGB"), 0.5)
    height = max(round(_TILE * image.shape[0] / image.shape[1]), 1)
    picture = pixels.resize((_TILE, height), Image.Resampling.BICUBIC)
    return draw_detections(picture, (image.shape[0], image.shape[1]), objects, smallest_text=9)


def contact_sheet(strips: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> bytes:
    """A PNG of pictures in lines, each line with words above it and each picture with a title, which may have lines.

    Args:
        strips: words and titled pictures of every line.
    """
    heads = [_LINE * (1 + max(title.count("\n") + 1 for title, _ in tiles)) for _, tiles in strips]
    heights = [max(picture.height for _, picture in tiles) for _, tiles in strips]
    width = max(sum(picture.width + _GAP for _, picture in tiles) for _, tiles in strips) + _GAP
    sheet = Image.new("RGB", (width, sum(heads) + sum(heights) + _GAP * (len(strips) + 1)), "white")
    pen, bold, font = ImageDraw.Draw(sheet), load_font(13), load_font(11)
    top = _GAP
    for (words, tiles), head, height in zip(strips, heads, heights, strict=True):
        pen.text((_GAP, top), fitted(words, bold, width - 2 * _GAP), fill="black", font=bold)
        left = _GAP
        for title, picture in tiles:
            for number, line in enumerate(title.split("\n"), start=1):
                pen.text((left, top + _LINE * number), fitted(line, font, picture.width), fill="black", font=font)
            sheet.paste(picture, (left, top + head))
            left += picture.width + _GAP
        top += head + height + _GAP
    return png(sheet, colours=160)


def class_name(truth: COCO, category_id: Any) -> str:
    """The name of a category as splits write it."""
    return normalise(str(truth.cats[category_id]["name"]))


def drawn_name(truth: COCO, category_id: Any) -> str:
    """The same in letters that the font of pictures has, else by its number."""
    name = class_name(truth, category_id)
    return name if can_write(name) else f"class {category_id}"


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


def choose_images(truth: COCO, gains: Mapping[Any, float], *, seed: int) -> list[ChosenImage]:
    """Images with objects drawn at random, then those with the largest gain and with the largest loss.

    No image is chosen twice: the groups are filled in this order. Ties go to the smaller id. Only a positive gain is
    a gain, only a negative one a loss.
    """
    drawn = pick_images(truth, seed=seed)
    chosen = [ChosenImage(image_id, RANDOM, gains.get(image_id)) for image_id in drawn]
    for group, sign in ((GAIN, 1), (LOSS, -1)):
        taken = {image.image_id for image in chosen}
        left = [image_id for image_id in sorted(gains) if image_id not in taken and sign * gains[image_id] > 0]
        largest = sorted(left, key=lambda image_id: -sign * gains[image_id])[:EXTREME_IMAGES]
        chosen += [ChosenImage(image_id, group, gains[image_id]) for image_id in largest]
    return chosen


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
