"""One picture of the Shapes data set: which objects, where, who hides whom; then the drawing.

What is visible of each object is decided before anything is drawn, so everything drawn is annotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiseg.data.shapes_outlines import FAMILIES, Draws, Outline, Patch, fill
from semiseg.data.shapes_paint import Frame, Palette, add_noise, paint_background, paint_double, paint_object

FEWEST, MOST = 2, 4  # objects in a picture; now and then less, if no place is found
MIN_VISIBLE_PIXELS = 24
MIN_VISIBLE_SHARE = 0.7
SIDES = (0.32, 0.56)  # longer side of an object's box, as a share of the image's side
ANGLES = (0.0, 50.0)  # degrees; half of the objects are mirrored as well. Slanting shapes fill less of their box
INSIDE = 0.4  # the centre's least distance from the image's edge, as a share of the object's side
DOUBLED = 0.33  # share of the objects that lie on a blob of their own colour
TRIES = 8  # positions tried for each object
LABELS = tuple(sorted(FAMILIES))  # label -> family


@dataclass
class SceneObject:
    """One annotated object."""

    label: int  # index into `LABELS`
    frame: Frame
    patch: Patch  # what it covers, inside the image
    visible: NDArray[np.bool_]  # (H, W), the pixels that show it; those of different objects are disjoint
    full_area: int  # pixels of the whole object, parts outside the image included

    @property
    def visible_share(self) -> float:
        """The number of the visible pixels over that of the whole object."""
        return int(self.visible.sum()) / self.full_area


def compose(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
    """Picture `index` of the data set with this seed: (size, size, 3) RGB and its objects, from back to front."""
    draws = Draws(seed, index)
    objects = _place_objects(draws, size)
    palette = Palette(draws)
    pixels = paint_background(draws, palette, size)
    doubled = [paint_double(draws, palette, pixels, o.patch) if draws.chance(DOUBLED) else None for o in objects]
    for item, colour in zip(objects, doubled, strict=True):
        paint_object(draws, palette, pixels, item.patch, item.frame, family=LABELS[item.label], colour=colour)
    return add_noise(draws, pixels), objects


def _place_objects(draws: Draws, size: int) -> list[SceneObject]:
    """Objects from back to front, each leaving enough of those behind it in sight."""
    count = draws.integer(FEWEST, MOST)
    share = draws.uniform(MIN_VISIBLE_SHARE, 1.0)  # some pictures are crowded, some are not
    sides = [size * draws.uniform(*SIDES) for _ in range(count)]
    sides.sort(key=lambda side: side * draws.uniform(0.3, 1.0), reverse=True)
    placed: list[SceneObject] = []
    spare = [size * SIDES[0]] * 8  # for pictures in which too few found a place
    for index, side in enumerate(sides + spare):
        if index >= count and len(placed) >= FEWEST:
            break
        label = draws.integer(0, len(LABELS) - 1)
        for _ in range(TRIES):
            candidate = _draw_object(draws, size, label, side)
            if _try_to_place(candidate, placed, share):
                break
    return placed


def _draw_object(draws: Draws, size: int, label: int, side: float) -> SceneObject:
    outline = FAMILIES[LABELS[label]](draws)
    flip = draws.uniform(0.8, 1.0) * draws.choice((-1.0, 1.0))  # and stretch, of the y axis
    angle = math.radians(draws.uniform(*ANGLES))
    margin = INSIDE * side
    centre = draws.uniform(margin, size - margin), draws.uniform(margin, size - margin)
    outline, frame = _positioned(outline, angle, flip, side, centre)
    whole = fill(outline)
    patch = whole.inside((size, size))
    visible = np.zeros((size, size), dtype=np.bool_)
    visible[patch.window] = patch.mask
    return SceneObject(label, frame, patch, visible, int(whole.mask.sum()))


def _positioned(
    outline: Outline, angle: float, flip: float, side: float, centre: tuple[float, float]
) -> tuple[Outline, Frame]:
    """The outline with its y axis scaled by `flip`, turned, and scaled so that its box's longer side is `side`."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x_axis, y_axis = np.array((cosine, sine)), np.array((-sine, cosine)) * flip
    turned = outline.mapped(lambda ring: ring[:, :1] * x_axis + ring[:, 1:] * y_axis)
    points = np.concatenate(turned.solids)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = side / float((high - low).max())
    shift = np.array(centre) - scale * (low + high) / 2
    frame = Frame(float(shift[0]), float(shift[1]), cosine, sine, scale, math.copysign(1.0, flip))
    return turned.mapped(lambda ring: ring * scale + shift), frame


def _try_to_place(candidate: SceneObject, placed: list[SceneObject], share: float) -> bool:
    """Adds the candidate in front of the others, unless too little of anything would be seen."""
    left = [item.visible & ~candidate.visible for item in placed]
    for visible, item in zip([*left, candidate.visible], [*placed, candidate], strict=True):
        if np.count_nonzero(visible) < max(MIN_VISIBLE_PIXELS, share * item.full_area):
            return False
    for item, visible in zip(placed, left, strict=True):
        item.visible = visible
    placed.append(candidate)
    return True
