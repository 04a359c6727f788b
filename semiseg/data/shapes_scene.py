"""One picture of the Shapes data set: which objects, where, who hides whom; then the drawing.

What is visible of each object is decided before anything is drawn, so everything drawn is annotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiseg.data.shapes_draws import Draws
from semiseg.data.shapes_outlines import FAMILIES
from semiseg.data.shapes_paint import Frame, Palette, add_noise, paint_background, paint_double, paint_object
from semiseg.data.shapes_raster import Outline, Patch, Ring, fill

FEWEST, MOST = 2, 4  # objects in a picture; now and then less, if no place is found
MIN_VISIBLE_PIXELS = 24
MIN_VISIBLE_SHARE = 0.7
SIDES = (0.32, 0.56)  # longer side of an object's box, as a share of the image's side
ANGLES = (0.0, 50.0)  # degrees; half of the objects are mirrored as well. Slanting shapes fill less of their box
INSIDE = 0.4  # the centre's least distance from the image's edge, as a share of the object's side
DOUBLED = 0.33  # share of the objects that lie on a blob of their own colour
TRIES = 8  # positions tried for each object
LABELS = tuple(sorted(FAMILIES))  # label -> family


@dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Attributes:
        label: index into the sorted family names.
        visible: (H, W) bool, the pixels that show it; those of different objects are disjoint.
        visible_share: their number over that of the whole object, parts outside the image included.
    """

    label: int
    visible: NDArray[np.bool_]
    visible_share: float


@dataclass
class _Placed:
    label: int
    frame: Frame
    patch: Patch  # inside the image
    visible: NDArray[np.bool_]  # (H, W)
    full_area: int


def compose(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """Picture `index` of the data set with this seed: (size, size, 3) RGB and its objects, from back to front."""
    draws = Draws(seed, index)
    placed = _place_objects(draws, size)
    palette = Palette(draws)
    pixels = paint_background(draws, palette, size)
    colours = [paint_double(draws, palette, pixels, p.patch) if draws.chance(DOUBLED) else None for p in placed]
    for item, colour in zip(placed, colours, strict=True):
        family = LABELS[item.label]
        paint_object(draws, palette, pixels, item.patch, item.frame, family=family, colour=colour)
    objects = [SceneObject(p.label, p.visible, int(p.visible.sum()) / p.full_area) for p in placed]
    return add_noise(draws, pixels), objects


def _place_objects(draws: Draws, size: int) -> list[_Placed]:
    """Objects from back to front, each leaving enough of those behind it in sight."""
    wanted = draws.integer(FEWEST, MOST)
    share = draws.uniform(MIN_VISIBLE_SHARE, 1.0)  # some pictures are crowded, some are not
    sides = [size * draws.uniform(*SIDES) for _ in range(wanted)]
    sides.sort(key=lambda side: side * draws.uniform(0.3, 1.0), reverse=True)
    placed: list[_Placed] = []
    spare = [size * SIDES[0]] * 8  # for pictures in which too few found a place
    for number, side in enumerate(sides + spare):
        if number >= wanted and len(placed) >= FEWEST:
            break
        label = draws.integer(0, len(LABELS) - 1)
        for _ in range(TRIES):
            candidate = _draw_object(draws, size, label, side)
            if _try_to_place(candidate, placed, share):
                break
    return placed


def _draw_object(draws: Draws, size: int, label: int, side: float) -> _Placed:
    outline = FAMILIES[LABELS[label]](draws)
    scales = (1.0, draws.uniform(0.8, 1.0) * draws.choice((-1.0, 1.0)))
    angle = math.radians(draws.uniform(*ANGLES))
    margin = INSIDE * side
    x, y = draws.uniform(margin, size - margin), draws.uniform(margin, size - margin)
    outline, frame = _positioned(outline, angle, scales, side, (x, y))
    whole = fill(outline)
    patch = whole.inside((size, size))
    visible = np.zeros((size, size), dtype=np.bool_)
    visible[patch.window] = patch.mask
    return _Placed(label, frame, patch, visible, int(whole.mask.sum()))


def _turned(ring: Ring, angle: float, scales: tuple[float, float]) -> Ring:
    """A ring scaled along its own axes, then turned."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x_axis, y_axis = np.array((cosine, sine)) * scales[0], np.array((-sine, cosine)) * scales[1]
    return ring[:, :1] * x_axis + ring[:, 1:] * y_axis


def _positioned(
    outline: Outline, angle: float, scales: tuple[float, float], side: float, centre: tuple[float, float]
) -> tuple[Outline, Frame]:
    """The outline stretched, turned and scaled so that the longer side of its box is `side`, around `centre`."""
    solids, holes = ([_turned(ring, angle, scales) for ring in rings] for rings in (outline.solids, outline.holes))
    points = np.concatenate(solids)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = side / float((high - low).max())
    shift = np.array(centre) - scale * (low + high) / 2
    moved = Outline([ring * scale + shift for ring in solids], [ring * scale + shift for ring in holes])
    flip = 1.0 if scales[1] > 0 else -1.0
    return moved, Frame(float(shift[0]), float(shift[1]), math.cos(angle), math.sin(angle), scale, flip)


def _try_to_place(candidate: _Placed, placed: list[_Placed], share: float) -> bool:
    """Adds the candidate in front of the others, unless too little of anything would be seen."""
    left = [item.visible & ~candidate.visible for item in placed]
    everything = [(candidate.visible, candidate.full_area)]
    everything += [(visible, item.full_area) for visible, item in zip(left, placed, strict=True)]
    for visible, full_area in everything:
        pixels = int(np.count_nonzero(visible))
        if pixels < max(MIN_VISIBLE_PIXELS, share * full_area):
            return False
    for item, visible in zip(placed, left, strict=True):
        item.visible = visible
    placed.append(candidate)
    return True
