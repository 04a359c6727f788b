"""Side-by-side pictures: ground truth and every row's detections on the same validation images.

Which images and rows: `picture_choice.py`. An instance keeps its colour across the columns: a detection takes the
colour of the ground-truth box that it overlaps most (IoU at least 0.5), or grey if it overlaps none.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox, TransformedBbox
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportTable, TableNumbers
from semiseg.report.drawing import (
    BLUE,
    DPI,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Drawing,
    new_figure,
    plain,
    png,
    quiet_about_fonts,
)
from semiseg.report.picture_choice import (
    EXTREME_IMAGES,
    RANDOM,
    ChosenImage,
    choose_images,
    class_name,
    image_gains,
    judged,
    other_row,
    pick_images,
    read_image,
    runs_of_one_seed,
)
from semiseg.report.stored import StoredDetections
from semiseg.report.tables import signed

SCORE_THRESHOLD = 0.4
INSTANCE_COLOURS = (ORANGE, SKY, GREEN, VERMILLION, PURPLE, BLUE, "#F0E442", "#7F3C8D", "#11A579", "#A5AA99")
UNMATCHED = "#BBBBBB"
_Read = TypeVar("_Read")
_SIDE, _SMALL_SIDE = 176, 148  # width of a picture in pixels: up to six columns, and more
_MARGIN, _GAP = 36, 8  # pixels: room for the labels of lines; between pictures


@dataclass(frozen=True)
class Pictures:
    """A drawn picture, or the reason why there is none.

    Attributes:
        drawing: the picture, or None.
        note: the caption: by which rule, of which runs; or in one sentence why there is none.
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


def draw_pictures(report: ReportInput, numbers: TableNumbers, stored: StoredDetections) -> Pictures:
    """Draws the images of `choose_images` for all rows of one seed, or says in one sentence what is missing for it."""
    table = numbers.table
    try:
        seed, runs = runs_of_one_seed(report, table)
        main = numbers.main_row(runs)
        other = other_row(table, main, runs)
        if (truth := stored.truth()) is None:
            raise UserError("the validation set with its masks is not on this machine")
        if not pick_images(truth, seed=report.picture_seed):
            raise UserError("the validation set has no objects")
        matches = [judged(table, truth, _there(stored.instances(runs[row]))) for row in (main, other) if row]
        chosen = choose_images(truth, image_gains(*matches) if other else {}, seed=report.picture_seed)
        images = {image.image_id: read_image(report.val_images, truth, image.image_id) for image in chosen}
        detections = {
            row: [
                found
                for found in _there(stored.of(run))
                if found["image_id"] in images and found["score"] > SCORE_THRESHOLD
            ]
            for row, run in runs.items()
        }
    except UserError as error:
        return Pictures(None, str(error))
    drawing = _draw(table, truth, chosen, images, detections)
    return Pictures(drawing, _note(report, table, chosen, seed, (main, other)))


def _there(found: _Read | None) -> _Read:
    """A picture without a row would replace a better one of an earlier report: all of them are needed."""
    if found is None:
        raise UserError("the run folders with the detections are not on this machine")
    return found


def _note(
    report: ReportInput,
    table: ReportTable,
    chosen: Sequence[ChosenImage],
    seed: int,
    compared: tuple[str, str | None],
) -> str:
    """The rule by which the images were chosen, and how to read the picture."""
    count = sum(image.group == RANDOM for image in chosen)
    main, other = (next((row.label for row in table.rows if row.name == name), "") for name in compared)
    rule = f"{count} validation {'image' if count == 1 else 'images'} drawn at random with seed {report.picture_seed}"
    if other:
        objects = "the image's objects of unseen classes" if table.unseen else "the image's objects"
        rule += (
            f"; of the other images those {EXTREME_IMAGES} with the largest gain and those {EXTREME_IMAGES} with the "
            f"largest loss of {main} against {other}: the difference of the mean mask IoU over {objects} (in points, "
            "an object that is not found counts 0; ties by id)"
        )
    solid = " Solid boxes: unseen classes, dashed: seen classes." if table.unseen else ""
    return (
        f"{rule[:1].upper()}{rule[1:]}. Runs of seed {seed}; detections with a score above {SCORE_THRESHOLD}. "
        "A detection has the colour of the object that its box covers best (IoU at least 0.5), grey if none. "
        "Where scores would lie on each other, the lower one moves to the lower left corner or is left out." + solid
    )


def _draw(
    table: ReportTable,
    truth: COCO,
    chosen: Sequence[ChosenImage],
    images: Mapping[Any, np.ndarray],
    detections: Mapping[str, list[dict[str, Any]]],
) -> Drawing:
    rows = [row for row in table.rows if row.name in detections]
    columns = ["ground truth", *(row.label for row in rows)]
    side = _SIDE if len(columns) <= 6 else _SMALL_SIDE
    titles = ["\n".join(plain(line) for line in textwrap.wrap(column, side // 7)) for column in columns]
    head = 8 + 15 * max(title.count("\n") + 1 for title in titles)
    heights = [round(side * shape[0] / shape[1]) for shape in (images[image.image_id].shape for image in chosen)]
    figure, sheet = _sheet(_MARGIN + (side + _GAP) * len(columns), head + sum(height + _GAP for height in heights))
    for number, title in enumerate(titles):
        middle = _MARGIN + (side + _GAP) * number + side / 2
        sheet.text(middle, head - 5, title, fontsize=8, ha="center", va="bottom")
    top = head
    for image, height in zip(chosen, heights, strict=True):
        pixels = images[image.image_id]
        annotations = [a for a in truth.imgToAnns[image.image_id] if not a["iscrowd"]]
        shown = [_truth_instances(table, truth, annotations)]
        for row in rows:
            found = [d for d in detections[row.name] if d["image_id"] == image.image_id]
            found.sort(key=lambda d: d["score"])
            shown.append(_found_instances(table, truth, annotations, found))
        label = sheet.text(_MARGIN - 5, top + height / 2, plain_lines(line_label(image)), fontsize=7)
        label.set(rotation="vertical", ha="right", va="center", multialignment="center")
        for number, instances in enumerate(shown):
            place = Bbox.from_bounds(_MARGIN + (side + _GAP) * number, top, side, height)
            _draw_panel(sheet, place, pixels, instances)
        top += height + _GAP
    return Drawing(png(figure, colours=160))


def _sheet(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty figure whose coordinates are its pixels, from the upper left corner.

    One for all pictures: a matplotlib panel for each takes several times as long to lay out and to draw.
    """
    figure = new_figure(width / DPI, height / DPI)
    figure.set_layout_engine("none")
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    sheet.set_xlim(0, width)
    sheet.set_ylim(height, 0)
    sheet.autoscale(False)
    return figure, sheet


def line_label(image: ChosenImage) -> str:
    """What stands beside the pictures of an image: its group, id and gain in points of IoU."""
    gain = "" if image.gain is None else f" ({signed(100 * image.gain, 0)})"
    return f"{image.group}{gain}\nimage {image.image_id}"


def plain_lines(text: str) -> str:
    """`plain` for each line of a text."""
    return "\n".join(plain(line) for line in text.split("\n"))


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
        for name in [class_name(truth, annotation["category_id"])]
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
                unseen=not table.unseen or class_name(truth, detection["category_id"]) in table.unseen,
            )
        )
    return instances


def _label(sheet: Axes, instance: _Instance) -> tuple[Text, Bbox]:
    """The text beside a box, not yet on the sheet, and its extent in pixels."""
    text = Text(0, 0, plain(instance.text), fontsize=5, color="black", va="top", transform=sheet.transData)
    text.set_figure(sheet.figure)
    with quiet_about_fonts():
        extent = text.get_window_extent()
    text.set_bbox({"facecolor": instance.colour, "edgecolor": "none", "pad": 0.4, "alpha": 0.85})
    return text, extent


def label_corners(
    boxes: Sequence[Bbox], sizes: Sequence[tuple[float, float]], inside: Bbox
) -> list[tuple[float, float] | None]:
    """Where the label of each box stands: in its upper left corner, else in its lower left one; None: nowhere.

    No two labels overlap: the last box, which is that of the highest score, chooses first.

    Args:
        boxes, inside: in pixels, y downwards; labels stay inside of `inside`.
        sizes: width and height of the labels, in pixels.
    """
    taken: list[Bbox] = []
    corners: list[tuple[float, float] | None] = []
    for box, (width, height) in zip(reversed(boxes), reversed(sizes), strict=True):
        left = max(inside.x0, min(box.x0, inside.x1 - width))
        free = None
        for top in (box.y0, box.y1 - height):
            own = Bbox.from_bounds(left, max(inside.y0, min(top, inside.y1 - height)), width, height)
            if not any(_overlap(own, other) for other in taken):
                taken.append(own)
                free = (own.x0, own.y0)
                break
        corners.append(free)
    return corners[::-1]


def _overlap(first: Bbox, second: Bbox) -> bool:
    return bool(first.x0 < second.x1 and second.x0 < first.x1 and first.y0 < second.y1 and second.y0 < first.y1)


def _draw_panel(sheet: Axes, place: Bbox, image: np.ndarray, instances: Sequence[_Instance]) -> None:
    """Masks in colour over a greyed image, boxes on top, so that colours mean instances only."""
    grey = image.astype(np.float64).mean(2, keepdims=True).repeat(3, 2)
    shown = 0.5 * image + 0.5 * grey
    for instance in instances:
        if instance.mask is not None and instance.mask.shape == shown.shape[:2]:
            shown[instance.mask] = 0.35 * shown[instance.mask] + 0.65 * 255 * np.array(to_rgb(instance.colour))
    extent = (place.x0, place.x1, place.y1, place.y0)
    sheet.imshow(shown.astype(np.uint8), interpolation="antialiased", extent=extent, aspect="auto")
    across, down = place.width / image.shape[1], place.height / image.shape[0]
    inside = TransformedBbox(place, sheet.transData)
    boxes = [
        Bbox.from_bounds(place.x0 + across * x, place.y0 + down * y, across * width, down * height)
        for x, y, width, height in (instance.box for instance in instances)
    ]
    labels = [_label(sheet, instance) for instance in instances]
    corners = label_corners(boxes, [(label.width, label.height) for _, label in labels], place)
    for instance, box, (text, _), corner in zip(instances, boxes, labels, corners, strict=True):
        outline = Rectangle((box.x0, box.y0), box.width, box.height, fill=False, color=instance.colour)
        outline.set(linewidth=1, linestyle="-" if instance.unseen else (0, (3, 2)))
        sheet.add_patch(outline).set_clip_box(inside)
        if corner is not None:
            text.set_position(corner)
            text.set_clip_box(inside)
            sheet.add_artist(text)
    frame = Rectangle((place.x0, place.y0), place.width, place.height, fill=False, color="black", linewidth=0.8)
    sheet.add_patch(frame).set_zorder(3)
