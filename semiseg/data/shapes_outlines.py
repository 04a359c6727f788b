"""The families of shapes, one function each: an outline in its own frame, a few units wide, y down.

Only the proportions vary here; size, rotation, stretch and mirror image are the scene's business. Families differ in
structure (holes, concavities, lobes, thin parts), so that masks of some say little about the masks of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from semiseg.data.shapes_draws import Draws
from semiseg.data.shapes_raster import Outline, Ring


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
    "arrow": arrow,
    "boomerang": boomerang,
    "bowtie": bowtie,
    "crescent": crescent,
    "cross": cross,
    "dumbbell": dumbbell,
    "key": key,
    "leaf": leaf,
    "mushroom": mushroom,
    "ring": ring,
    "snake": snake,
    "star": star,
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
