"""What is drawn by chance, the same on every platform: outlines of families of shapes, and their filling.

A family, one function each, draws in its own frame, a few units wide, y down. Only the proportions vary here; size,
rotation, stretch and mirror image are the scene's business. Families differ in structure (holes, concavities, lobes,
thin parts), so that masks of some say little about the masks of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

SAMPLES = 4  # per pixel side: 16 samples in a pixel
UNIT = 16  # fixed point: vertices are rounded to 1/16 of a sample, 1/64 of a pixel

Ring = NDArray[np.float64]  # (V, 2) closed polygon, (x, y)
Item = TypeVar("Item")


class Draws:
    """Draws made of uniform numbers alone: numpy fixes the bit stream of PCG64 and the mapping to [0, 1), not more.

    Each pair of the non-negative seed and index has a stream of its own.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def integer(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return low + int((high - low + 1) * self._generator.random())

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.integer(0, len(items) - 1)]

    def field(self, *shape: int) -> NDArray[np.float64]:
        """An array of numbers in [-1, 1)."""
        return 2.0 * self._generator.random(shape) - 1.0


@dataclass(frozen=True)
class Outline:
    """The boundary of a shape: the union of the solid rings, in any direction, without the holes, each inside one."""

    solids: Sequence[Ring]
    holes: Sequence[Ring] = ()

    def mapped(self, function: Callable[[Ring], Ring]) -> Outline:
        return Outline([function(ring) for ring in self.solids], [function(ring) for ring in self.holes])


def arrow(draws: Draws) -> Outline:
    """A shaft with a large barbed head."""
    shaft, head, barb = draws.uniform(0.18, 0.26), draws.uniform(0.65, 0.9), draws.uniform(0.0, 0.15)
    neck = draws.uniform(-0.1, 0.2)
    upper = [(-1.0, -shaft), (neck, -shaft), (neck - barb, -head), (1.0, 0.0)]
    return Outline([_mirrored(upper)])


def boomerang(draws: Draws) -> Outline:
    """Two arms that meet at an angle of 55 to 100 degrees."""
    half_angle, width = math.radians(draws.uniform(32, 48)), draws.uniform(0.38, 0.48)
    arm = np.array([math.cos(half_angle), math.sin(half_angle)])
    across = np.array([-arm[1], arm[0]]) * width
    inner = arm - across
    crotch = width / math.sin(half_angle)  # where the inner sides of the arms cross
    ring = [(0.0, 0.0), tuple(arm), tuple(inner), (crotch, 0.0), (inner[0], -inner[1]), (arm[0], -arm[1])]
    return Outline([np.array(ring)])


def bowtie(draws: Draws) -> Outline:
    """Two triangles that meet at a waist."""
    waist, left, right = draws.uniform(0.18, 0.28), draws.uniform(0.6, 0.85), draws.uniform(0.6, 0.85)
    upper = [(-1.0, -left), (0.0, -waist), (1.0, -right)]
    return Outline([_mirrored(upper)])


def crescent(draws: Draws) -> Outline:
    """A disc from which a shifted disc is bitten."""
    radius, shift = draws.uniform(0.72, 0.85), draws.uniform(0.5, 0.65)
    x = (1 - radius**2 + shift**2) / (2 * shift)
    y = math.sqrt(1 - x**2)
    outer, inner = math.atan2(y, x), math.atan2(y, x - shift)
    return Outline(
        [np.concatenate((_arc(1.0, outer, 2 * math.pi - outer), _arc(radius, 2 * math.pi - inner, inner, shift)))]
    )


def cross(draws: Draws) -> Outline:
    """Two crossing bars."""
    a, b, long = draws.uniform(0.3, 0.4), draws.uniform(0.3, 0.4), draws.uniform(0.8, 1.0)
    centre = draws.uniform(-0.3, 0.3)
    return Outline([_box(-1.0, -a, 1.0, a), _box(centre - b, -long, centre + b, long)])


def dumbbell(draws: Draws) -> Outline:
    """Two discs joined by a thin bar."""
    left, right, bar = draws.uniform(0.4, 0.48), draws.uniform(0.4, 0.48), draws.uniform(0.09, 0.13)
    discs = [_ellipse(-1 + left, 0, left, left), _ellipse(1 - right, 0, right, right)]
    return Outline([*discs, _box(-1 + left, -bar, 1 - right, bar)])


def key(draws: Draws) -> Outline:
    """A ring with a thin shaft and two teeth."""
    bow, hole, shaft = draws.uniform(0.54, 0.64), draws.uniform(0.3, 0.4), draws.uniform(0.13, 0.18)
    tooth, gap = draws.uniform(0.25, 0.35), draws.uniform(0.3, 0.4)
    teeth = [_box(0.85, 0.0, 1.0, tooth), _box(0.85 - gap, 0.0, 1.0 - gap, tooth)]
    start = -1 + bow * (1.1 + hole)  # the shaft must not reach into the hole
    solids = [_ellipse(-1 + bow, 0, bow, bow), _box(start, -shaft, 1.0, shaft), *teeth]
    return Outline(solids, [_ellipse(-1 + bow, 0, bow * hole, bow * hole)])


def leaf(draws: Draws) -> Outline:
    """A lens with a sharp end and a thin stalk."""
    half_width, stalk, length = draws.uniform(0.5, 0.64), draws.uniform(0.08, 0.11), draws.uniform(0.3, 0.6)
    radius = (1 + half_width**2) / (2 * half_width)
    half_angle = math.asin(1 / radius)
    upper = _arc(radius, -math.pi / 2 - half_angle, -math.pi / 2 + half_angle)
    upper[:, 1] += radius - half_width
    return Outline([_mirrored([(x, y) for x, y in upper]), _box(0.85, -stalk, 1 + length, stalk)])


def mushroom(draws: Draws) -> Outline:
    """A cap on a stem."""
    cap, dome, stem = draws.uniform(0.8, 1.0), draws.uniform(0.75, 0.95), draws.uniform(0.2, 0.28)
    ring = _arc(1.0, math.pi, 2 * math.pi) * (cap, dome)
    foot = [(-stem, -0.05), (stem, -0.05), (stem * 1.3, 0.95), (-stem * 1.3, 0.95)]
    return Outline([ring, np.array(foot)])


def ring(draws: Draws) -> Outline:
    """An ellipse with a large hole."""
    flat, hole, shift = draws.uniform(0.8, 1.0), draws.uniform(0.36, 0.46), draws.uniform(-0.15, 0.15)
    return Outline([_ellipse(0, 0, 1, flat)], [_ellipse(shift, 0, hole, flat * hole)])


def snake(draws: Draws) -> Outline:
    """A thick wave of one to one and a half periods."""
    waves, height, half_width = draws.uniform(1.1, 1.3), draws.uniform(0.36, 0.46), draws.uniform(0.24, 0.29)
    t = np.linspace(-1, 1, 41)
    phase = draws.uniform(0, 1)
    angles = math.pi * (waves * t + 2 * phase)
    slope = math.pi * waves * height * np.cos(angles)
    line = np.stack((t, height * np.sin(angles)), axis=1)
    normal = np.stack((-slope, np.ones_like(slope)), axis=1) * (half_width / np.sqrt(1 + slope**2))[:, None]
    return Outline([np.concatenate((line + normal, (line - normal)[::-1]))])


def star(draws: Draws) -> Outline:
    """Four to six points."""
    points, inner = draws.integer(4, 6), draws.uniform(0.52, 0.64)
    angles = [math.pi * k / points for k in range(2 * points)]
    radii = [1.0 if k % 2 == 0 else inner for k in range(2 * points)]
    return Outline([np.array([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)])])


FAMILIES: dict[str, Callable[[Draws], Outline]] = {
    family.__name__: family
    for family in (arrow, boomerang, bowtie, crescent, cross, dumbbell, key, leaf, mushroom, ring, snake, star)
}


def _arc(radius: float, start: float, end: float, x: float = 0.0, points: int = 28) -> Ring:
    angles = start + (end - start) * np.arange(points) / (points - 1)
    return np.stack((x + radius * np.cos(angles), radius * np.sin(angles)), axis=1)


def _ellipse(x: float, y: float, half_width: float, half_height: float) -> Ring:
    return _arc(1.0, 0.0, 2 * math.pi * 35 / 36, points=36) * (half_width, half_height) + (x, y)


def _box(left: float, top: float, right: float, bottom: float) -> Ring:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _mirrored(upper: list[tuple[float, float]]) -> Ring:
    """The ring of an upper boundary, left to right, and its mirror image below the x axis."""
    return np.array([*upper, *((x, -y) for x, y in reversed(upper))])


@dataclass(frozen=True)
class Patch:
    """What a shape covers, on the window of pixels around it; the window may reach beyond the image."""

    top: int  # image pixel of the window's first row
    left: int
    coverage: NDArray[np.uint8]  # (h, w), samples inside the shape, 0..SAMPLES²

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(h, w) bool: the pixels of which at least half is covered."""
        return 2 * self.coverage >= SAMPLES * SAMPLES

    def inside(self, size_hw: tuple[int, int]) -> Patch:
        """The part of the patch that lies in an image of the given size; may be empty."""
        rows, columns = self.coverage.shape
        top, bottom = (int(row) for row in np.clip((self.top, self.top + rows), 0, size_hw[0]))
        left, right = (int(column) for column in np.clip((self.left, self.left + columns), 0, size_hw[1]))
        return Patch(top, left, self.coverage[top - self.top : bottom - self.top, left - self.left : right - self.left])

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the window in an image that contains it."""
        rows, columns = self.coverage.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


def fill(outline: Outline) -> Patch:
    """Counts the samples of each pixel (pixel (r, c) spans [c, c+1) x [r, r+1)) that lie in an outline, in pixels.

    Integers alone decide. The counts of the rings are added and cut at a full pixel, so that solids may overlap; only
    in a pixel that the boundaries of two of them cross can the sum be more than the union.
    """
    # Solids clockwise on the screen (positive area with y down), holes the other way.
    rings = [ring if _area(ring) > 0 else ring[::-1] for ring in outline.solids]
    rings += [ring if _area(ring) <= 0 else ring[::-1] for ring in outline.holes]
    points = np.concatenate(rings)
    left, top = np.floor(points.min(axis=0)).astype(int)
    columns, rows = np.floor(points.max(axis=0)).astype(int) + 1 - (left, top)
    fixed = [np.rint((ring - (left, top)) * (SAMPLES * UNIT)).astype(np.int64) for ring in rings]
    row, column, sign = _crossings(np.concatenate(fixed), np.concatenate([np.roll(ring, -1, axis=0) for ring in fixed]))
    # From a crossing on, every sample of the row counts.
    width = columns * SAMPLES + 1
    steps = np.bincount(row // SAMPLES * width + column, sign, minlength=rows * width)
    windings = np.cumsum(steps.reshape(rows, width), axis=1)[:, :-1]  # of the samples, added up in each pixel row
    counts = windings.reshape(rows, columns, SAMPLES).sum(axis=2)
    return Patch(int(top), int(left), np.clip(counts, 0, SAMPLES * SAMPLES).astype(np.uint8))


def _area(ring: Ring) -> float:
    """Twice the signed area."""
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))


def _crossings(
    starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where edges cross sample rows: row, first sample column at or right of the crossing, direction."""
    down = ends[:, 1] > starts[:, 1]
    upper, lower = np.where(down[:, None], starts, ends), np.where(down[:, None], ends, starts)
    half = UNIT // 2  # sample r has its centre at r * UNIT + half
    first, last = (-((half - end[:, 1]) // UNIT) for end in (upper, lower))
    counts = last - first
    edge = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    dx, dy = (lower - upper)[edge].T
    x0, y0 = upper[edge].T
    numerator = (x0 - half) * dy + (row * UNIT + half - y0) * dx
    column = -(-numerator // (UNIT * dy))
    # y runs down, so a ring of positive area goes down on its right side: +1 where an edge goes up.
    return row, column, np.where(down[edge], -1, 1)
