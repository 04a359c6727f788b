"""The worst masks of a table's main row, sorted by the cause of their failure: a crop around each object."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from pycocotools import mask as rle

from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, TableNumbers
from semiseg.report.drawing import GREY, ORANGE, Drawing, new_figure, png
from semiseg.report.picture_choice import class_name, judged, read_image, runs_of_one_seed
from semiseg.report.pictures import Pictures, plain_lines
from semiseg.report.stored import StoredDetections

PER_CAUSE = 6
CROP = 1.6  # side of a tile, in longer sides of the object's box
_TILE_INCHES = 1.45
_GAP_INCHES = 0.04  # on each side of a tile
_HEADING_INCHES = 0.4
_TITLE_INCHES = 0.34


@dataclass(frozen=True)
class _Tile:
    """One failed instance: pixels (H, W, 3), its mask, the predicted one (H, W) bool, its box (x, y, w, h)."""

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    box: Sequence[float]
    title: str


def failure_picture(
    report: ReportInput,
    numbers: TableNumbers,
    stored: StoredDetections,
    causes_of: Callable[[pd.DataFrame], pd.Series],
    causes: Sequence[str],
) -> Pictures:
    """Draws the PER_CAUSE worst failures of each cause by mask IoU, of one run.

    Args:
        causes_of: gives the cause of each line of `match_instances`, "" without a failure.
        causes: all causes, in the order of the picture.
    """
    table = numbers.table
    try:
        seed, runs = runs_of_one_seed(report, table)
        row = numbers.main_row(runs)
        truth = stored.truth()
        if truth is None:
            raise UserError("the validation set with its masks is not on this machine")
        results, found = stored.of(runs[row]), stored.instances(runs[row])
        if results is None or found is None:
            raise UserError("the run folder with the detections is not on this machine")
        matches = judged(table, truth, found)
        failed = matches.assign(cause=causes_of(matches)).query("cause != ''")
        label = next(r.label for r in table.rows if r.name == row)
        if failed.empty:
            raise UserError(f"no mask of {label}, seed {seed}, has failed")
        worst = worst_failures(failed, causes)
        tiles = {cause: _tiles(report, truth, results, lines) for cause, lines in worst.items()}
    except UserError as error:
        return Pictures(None, str(error))
    shares = {cause: int((failed["cause"] == cause).sum()) for cause in causes}
    note = (
        f"The failures of {label}, seed {seed}: of each cause the {PER_CAUSE} with the lowest mask IoU at most; above "
        "them its share of all failures. "
        "White line: the object's mask; orange: the predicted mask. Each tile is 1.6 times as wide as the object's box."
    )
    return Pictures(_draw(tiles, shares), note)


def worst_failures(failed: pd.DataFrame, causes: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Cause -> its PER_CAUSE lines with the lowest mask IoU, ties by annotation id; causes without any are left out."""
    ordered = failed.sort_index().sort_values("mask_iou", kind="stable")
    found = {cause: ordered[ordered["cause"] == cause].head(PER_CAUSE) for cause in causes}
    return {cause: lines for cause, lines in found.items() if len(lines)}


def _tiles(report: ReportInput, truth: Any, results: Sequence[Mapping[str, Any]], lines: pd.DataFrame) -> list[_Tile]:
    tiles = []
    for key, line in lines.iterrows():
        annotation = truth.anns[key]
        name = class_name(truth, annotation["category_id"])
        shown = math.floor(100 * line["mask_iou"]) / 100  # a failure is never shown as 0.50
        tiles.append(
            _Tile(
                image=read_image(report.val_images, truth, annotation["image_id"]),
                truth=truth.annToMask(annotation).astype(bool),
                predicted=rle.decode(results[line["detection"]]["segmentation"]).astype(bool),
                box=annotation["bbox"],
                title=f"{name if len(name) <= 16 else name[:15] + '…'}, IoU {shown:.2f}\n"
                f"image {annotation['image_id']}",
            )
        )
    return tiles


def packed(counts: Mapping[str, int]) -> list[list[str]]:
    """The causes in lines of at most PER_CAUSE tiles, in their order; a cause is never divided.

    Args:
        counts: cause -> number of its tiles, at most PER_CAUSE.
    """
    lines: list[list[str]] = []
    for cause, count in counts.items():
        if lines and sum(counts[other] for other in lines[-1]) + count <= PER_CAUSE:
            lines[-1].append(cause)
        else:
            lines.append([cause])
    return lines


def _draw(tiles: Mapping[str, Sequence[_Tile]], counts: Mapping[str, int]) -> Drawing:
    """A line of tiles for each cause, several causes in a line where they have few; a rule joins those of a cause."""
    lines = packed({cause: len(shown) for cause, shown in tiles.items()})
    height = _HEADING_INCHES + _TITLE_INCHES + _TILE_INCHES
    across = max(sum(len(tiles[cause]) for cause in line) for line in lines) * _TILE_INCHES
    down = height * len(lines) + _GAP_INCHES
    figure = new_figure(across, down)
    figure.set_layout_engine("none")
    for number, line in enumerate(lines):
        left, top = 0.0, down - number * height
        for cause in line:
            right = left + len(tiles[cause]) * _TILE_INCHES
            share = f"{counts[cause]} of {sum(counts.values())} ({100 * counts[cause] / sum(counts.values()):.0f} %)"
            start, rule = (left + _GAP_INCHES) / across, (top - _HEADING_INCHES) / down
            words: dict[str, Any] = {"x": start, "ha": "left", "va": "bottom"}
            figure.text(y=(top - 0.22) / down, s=cause, fontsize=9, fontweight="bold", **words)
            figure.text(y=(top - _HEADING_INCHES + 0.03) / down, s=share, fontsize=8, **words)
            figure.add_artist(Line2D([start, (right - _GAP_INCHES) / across], [rule, rule], color=GREY, linewidth=1))
            for place, tile in enumerate(tiles[cause]):
                corner = left + place * _TILE_INCHES + _GAP_INCHES, top - height + _GAP_INCHES
                side = _TILE_INCHES - 2 * _GAP_INCHES
                panel = figure.add_axes((corner[0] / across, corner[1] / down, side / across, side / down))
                panel.set_axis_off()
                _draw_tile(panel, tile)
            left = right
    return Drawing(png(figure, colours=160))


def _draw_tile(panel: Axes, tile: _Tile) -> None:
    """The predicted mask in orange over a grey image, the outline of the object in white with a dark edge."""
    pixels = tile.image.astype(np.float64).mean(2, keepdims=True).repeat(3, 2)
    if tile.predicted.shape == pixels.shape[:2]:
        pixels[tile.predicted] = 0.4 * pixels[tile.predicted] + 0.6 * 255 * np.array(to_rgb(ORANGE))
    left, top, side = crop_window(tile.box, width=pixels.shape[1], height=pixels.shape[0])
    panel.imshow(pixels.astype(np.uint8), interpolation="antialiased")
    if tile.truth.any():
        # A frame of background closes outlines at the border of the image.
        framed = np.pad(tile.truth, 1).astype(float)
        xs, ys = np.arange(-1, tile.truth.shape[1] + 1), np.arange(-1, tile.truth.shape[0] + 1)
        for width, colour in ((2.2, "black"), (1.1, "white")):
            panel.contour(xs, ys, framed, levels=[0.5], colors=colour, linewidths=width)
    panel.set_xlim(left - 0.5, left + side - 0.5)
    panel.set_ylim(top + side - 0.5, top - 0.5)
    panel.set_aspect("equal")
    panel.set_title(plain_lines(tile.title), fontsize=7, pad=2)


def crop_window(box: Sequence[float], *, width: int, height: int) -> tuple[float, float, float]:
    """Left, top and side in pixels of the square around a box (x, y, w, h), moved into the image where it fits."""
    side = CROP * max(box[2], box[3], 1.0)
    corner = []
    for start, extent, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        low = start + extent / 2 - side / 2
        corner.append(min(max(low, 0.0), limit - side) if side <= limit else (limit - side) / 2)
    return corner[0], corner[1], side
