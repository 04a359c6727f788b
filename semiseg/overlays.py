"""Detections drawn over their image, for `predict` and for the pictures of reports: masks, outlines, boxes, labels.

Frames: original = the image that boxes and masks refer to; drawing = the picture that comes out, the same image scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from pycocotools import mask as rle_codec

from semiseg.structures.rasterise import read_cells

# Okabe and Ito 2008, distinguishable with any colour vision; black, which photographs are full of, is left out.
COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
SMALLEST_SIDE = 480  # of the drawing's shorter side: smaller images are enlarged by a whole factor
LARGEST_SIDE = 2048  # of the drawing's longer side: larger images are reduced
MASK_OPACITY = 0.45
SMALLEST_LETTERS = 8  # pixels: of a label that would else cover objects
MOST_COVERED = 0.1  # of a box, by a label

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in drawing pixels, half open


@dataclass(frozen=True)
class Drawn:
    """One object to draw."""

    box_xywh: Sequence[float]  # original pixels, as COCO files have it
    rle: Mapping[str, Any] | None  # COCO's compressed RLE, of the original's size; None = no mask
    text: str  # beside the box; "" = no label
    colour: Colour | None = None  # None = one that differs from those of boxes it overlaps


def drawing_size(original_hw: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the drawing of an image of that size; at least 1 x 1."""
    (height, width), shorter, longer = original_hw, min(original_hw), max(original_hw)
    if longer > LARGEST_SIDE:
        return max(round(height * LARGEST_SIDE / longer), 1), max(round(width * LARGEST_SIDE / longer), 1)
    factor = min(-(-SMALLEST_SIDE // shorter), LARGEST_SIDE // longer)
    return height * factor, width * factor


def prepare_drawing(image: np.ndarray) -> Image.Image:
    """The image (H, W, 3) uint8 RGB at its drawing's size, so that the large one need not be kept."""
    height, width = drawing_size((image.shape[0], image.shape[1]))
    return Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)


def draw_detections(
    picture: Image.Image, original_hw: tuple[int, int], detections: Sequence[Drawn], *, smallest_text: int = 13
) -> Image.Image:
    """A new picture with the detections on it.

    Better detections lie over worse ones. Labels are moved so that they neither leave the picture nor cover one another
    or more than `MOST_COVERED` of a box; one for which there is no such place is written smaller, then left out, the
    best first.
    The picture may have any size; `original_hw` is the frame of the detections, which come best first. Letters are at
    least `smallest_text` pixels high where there is room, else `SMALLEST_LETTERS`.
    """
    scale_x, scale_y = picture.width / original_hw[1], picture.height / original_hw[0]
    boxes = [_scaled(item.box_xywh, scale_x, scale_y, picture.size) for item in detections]
    colours = [item.colour or chosen for item, chosen in zip(detections, choose_colours(boxes), strict=True)]
    line = max(round(min(picture.size) / 450), 1)
    drawing = picture.copy()
    for item, colour in reversed(list(zip(detections, colours, strict=True))):
        if item.rle is not None:
            _paint_mask(drawing, item.rle, colour, line=line + 1)
    pen = ImageDraw.Draw(drawing)
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=line)
    _write_labels(pen, [item.text for item in detections], boxes, colours, smallest_text)
    return drawing


def choose_colours(boxes: Sequence[Box]) -> list[Colour]:
    """A colour for each box: the next in turn that no box before it has which overlaps it, or else the next."""
    chosen: list[int] = []
    for index, box in enumerate(boxes):
        taken = {chosen[other] for other in range(index) if _overlap(box, boxes[other])}
        turns = [(index + shift) % len(COLOURS) for shift in range(len(COLOURS))]
        chosen.append(next((colour for colour in turns if colour not in taken), turns[0]))
    return [COLOURS[colour] for colour in chosen]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _scaled(box_xywh: Sequence[float], scale_x: float, scale_y: float, size_wh: tuple[int, int]) -> Box:
    """Whole pixels of the drawing, at least one, inside it."""
    x, y, width, height = box_xywh
    x0, y0 = min(max(round(x * scale_x), 0), size_wh[0] - 1), min(max(round(y * scale_y), 0), size_wh[1] - 1)
    x1, y1 = min(round((x + width) * scale_x), size_wh[0]), min(round((y + height) * scale_y), size_wh[1])
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _paint_mask(drawing: Image.Image, rle: Mapping[str, Any], colour: Colour, *, line: int) -> None:
    """Tints a mask of the original's size in the drawing, with an outline `line` pixels wide inside it."""
    x, y, width, height = map(int, rle_codec.toBbox(rle))
    if width == 0 or height == 0:
        return
    scale_x, scale_y = drawing.width / rle["size"][1], drawing.height / rle["size"][0]
    box = _scaled((x, y, width, height), scale_x, scale_y, drawing.size)
    counts = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
    rows, columns = np.arange(y, y + height), np.arange(x, x + width)
    part = np.ascontiguousarray(read_cells([counts], rle["size"], rows=rows, columns=columns)[0]) * np.uint8(255)
    scaled = Image.fromarray(part).resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR)
    inside = ImageOps.expand(scaled.point(lambda value: 255 * (value >= 128)), line)
    core = inside.filter(ImageFilter.MinFilter(2 * line + 1))
    opacity = np.where(np.asarray(core) > 0, round(255 * MASK_OPACITY), np.asarray(inside)).astype(np.uint8)
    drawing.paste(colour, box[:2], ImageOps.crop(Image.fromarray(opacity), line))


def _write_labels(
    pen: ImageDraw.ImageDraw,
    texts: Sequence[str],
    boxes: Sequence[Box],
    colours: Sequence[Colour],
    smallest_text: int,
) -> None:
    width, height = pen.im.size
    usual = min(max(round(min(width, height) / 50), smallest_text), 24)
    sizes = dict.fromkeys(max(round(usual * share), min(SMALLEST_LETTERS, usual)) for share in (1, 0.75, 0.5))
    placed: list[Box] = []
    for text, box, colour in zip(texts, boxes, colours, strict=True):
        for font in map(load_font, sizes if text else ()):
            shown = fitted(text, font, width - 4)
            left, top, right, bottom = font.getbbox(shown)
            size = int(right - left) + 5, int(bottom - top) + 5
            label = place_label(size, box, placed, (width, height), objects=boxes)
            if label is not None:
                placed.append(label)
                pen.rectangle((label[0], label[1], label[2] - 1, label[3] - 1), fill=colour)
                brightness = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
                ink = (0, 0, 0) if brightness > 110 else (255, 255, 255)
                pen.text((label[0] + 2 - left, label[1] + 2 - top), shown, fill=ink, font=font)
                break


def place_label(
    size_wh: tuple[int, int],
    box: Box,
    placed: Sequence[Box],
    picture_wh: tuple[int, int],
    *,
    objects: Sequence[Box] = (),
) -> Box | None:
    """Where a label of that size goes in the picture: the first of places above, below and in its box that is free.

    That is one that covers no part of another label and at most `MOST_COVERED` of any object's box; None = there is
    none.
    """
    width, height = size_wh
    x0, y0, x1, y1 = box
    corners = [(x0, y0 - height), (x0, y1), (x0, y0), (x1 - width, y0 - height), (x1 - width, y1), (x0, y1 - height)]
    corners += [(x, y) for y in range(y0, y1, height) for x in (x1 - width, x0, x1, x0 - width)]
    corner = np.array(corners)
    x, y = (corner[:, axis].clip(max=picture_wh[axis] - size_wh[axis]).clip(min=0) for axis in (0, 1))
    places = np.stack([x, y, x + width, y + height], axis=1)
    free = ~_shared(places, placed).any(axis=1)
    sides = np.array(objects, dtype=np.int64).reshape(-1, 4)
    areas = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])
    free &= (_shared(places, sides) <= MOST_COVERED * areas).all(axis=1)
    return tuple(places[free.argmax()].tolist()) if free.any() else None


def _shared(places: np.ndarray, others: Sequence[Box] | np.ndarray) -> np.ndarray:
    """(P, N) pixels that places (P, 4) and others (N, 4) have in common."""
    ours, theirs = places[:, None], np.array(others, dtype=np.int64).reshape(-1, 4)
    sides = np.minimum(ours[..., 2:], theirs[:, 2:]) - np.maximum(ours[..., :2], theirs[:, :2])
    common: np.ndarray = sides.clip(min=0).prod(axis=2)
    return common


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of it as is not wider, with dots at its end."""
    if font.getlength(text) <= width:
        return text
    length = next((count for count in range(len(text), 0, -1) if font.getlength(text[:count] + "…") <= width), 0)
    return text[:length] + "…"


def written_name(name: str, category_id: Any) -> str:
    """A class name as drawings show it: where the font lacks a sign for one of its letters, `class` and its id."""
    font = load_font(16)
    unknown = bytes(font.getmask("\U0010ffff"))
    written = all(letter.isspace() or bytes(font.getmask(letter)) != unknown for letter in name)
    return name if written else f"class {category_id}"


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic and more; `size` in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
