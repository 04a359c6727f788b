"""How the pictures of Shapes are drawn, the same on every platform: chance, outlines, their filling, and paint.

A family of shapes, one function each, draws in its own frame, a few units wide, y down. Only the proportions vary here;
size, rotation, stretch and mirror image are the scene's business. Families differ in structure (holes, concavities,
lobes, thin parts), so that masks of some say little about the masks of others. Colour says nothing about the class;
some textures go with a family.

Pixels are float64 RGB in 0..255, channels first. Only arithmetic and square roots touch whole images (no matrix
products, no transcendental functions), so that no platform rounds otherwise.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

SAMPLES = 4  # per pixel side: 16 samples in a pixel
UNIT = 16  # fixed point: vertices are rounded to 1/16 of a sample, 1/64 of a pixel

Ring = NDArray[np.float64]  # (V, 2) closed polygon, (x, y)
Pixels = NDArray[np.float64]  # (3, H, W) RGB
Colour = NDArray[np.float64]  # (3, 1, 1) RGB
Texture = Literal["plain", "gradient", "stripes", "dots", "checker", "toadstool"]
Item = TypeVar("Item")

# Four families of twelve are patterned, so that neither colour affinity nor "one colour = one object" holds for them.
FAMILY_TEXTURE: dict[str, Texture] = {
    "bowtie": "checker",
    "leaf": "stripes",
    "mushroom": "toadstool",
    "snake": "stripes",
}
RIMMED = 0.3  # share of the objects that have a darker or lighter rim
PALETTE_COLOURS = 5


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
    return Outline([_mirrored([(-1.0, -shaft), (neck, -shaft), (neck - barb, -head), (1.0, 0.0)])])


def boomerang(draws: Draws) -> Outline:
    """Two arms that meet at an angle of 55 to 100 degrees."""
    half_angle, width = math.radians(draws.uniform(32, 48)), draws.uniform(0.38, 0.48)
    arm = np.array([math.cos(half_angle), math.sin(half_angle)])
    across = np.array([-arm[1], arm[0]]) * width
    crotch = width / math.sin(half_angle)  # where the inner sides of the arms cross
    return Outline([_mirrored([(0.0, 0.0), arm, arm - across, (crotch, 0.0)])])


def bowtie(draws: Draws) -> Outline:
    """Two triangles that meet at a waist."""
    waist, left, right = draws.uniform(0.18, 0.28), draws.uniform(0.6, 0.85), draws.uniform(0.6, 0.85)
    return Outline([_mirrored([(-1.0, -left), (0.0, -waist), (1.0, -right)])])


def crescent(draws: Draws) -> Outline:
    """A disc from which a shifted disc is bitten."""
    radius, shift = draws.uniform(0.72, 0.85), draws.uniform(0.5, 0.65)
    x = (1 - radius**2 + shift**2) / (2 * shift)
    y = math.sqrt(1 - x**2)
    outer, inner = math.atan2(y, x), math.atan2(y, x - shift)
    arcs = _arc(1.0, outer, 2 * math.pi - outer), _arc(radius, 2 * math.pi - inner, inner, shift)
    return Outline([np.concatenate(arcs)])


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
    return Outline([_mirrored(upper), _box(0.85, -stalk, 1 + length, stalk)])


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
    angles = math.pi * (waves * t + 2 * draws.uniform(0, 1))
    slope = math.pi * waves * height * np.cos(angles)
    line = np.stack((t, height * np.sin(angles)), axis=1)
    normal = np.stack((-slope, np.ones_like(slope)), axis=1) * (half_width / np.sqrt(1 + slope**2))[:, None]
    return Outline([np.concatenate((line + normal, (line - normal)[::-1]))])


def star(draws: Draws) -> Outline:
    """Four to six points."""
    points, inner = draws.integer(4, 6), draws.uniform(0.52, 0.64)
    polar = [(inner if k % 2 else 1.0, math.pi * k / points) for k in range(2 * points)]
    return Outline([np.array([(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in polar])])


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


def turned(ring: Ring, angle: float, stretch: float = 1.0) -> Ring:
    """The ring with its y axis scaled by `stretch`, turned by an angle."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x_axis, y_axis = np.array((cosine, sine)), np.array((-sine, cosine)) * stretch
    return x_axis * ring[:, :1] + y_axis * ring[:, 1:]


def _mirrored(upper: Sequence[tuple[float, float] | Ring] | Ring) -> Ring:
    """The ring of an upper boundary (V, 2), left to right, and its mirror image below the x axis."""
    points = np.array(upper)
    return np.concatenate((points, points[::-1] * (1, -1)))


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
    starts, ends = np.concatenate(fixed), np.concatenate([np.roll(ring, -1, axis=0) for ring in fixed])
    centres = np.arange(rows * SAMPLES) * UNIT + UNIT // 2  # of the samples' rows and columns
    edge, row = np.nonzero((starts[:, 1:] <= centres) != (ends[:, 1:] <= centres))
    (x, y), (dx, dy) = starts[edge].T, (ends - starts)[edge].T
    # The first sample column at or right of the crossing; from there on, every sample of the row counts. y runs down,
    # so a ring of positive area goes down on its right side: +1 where an edge goes up.
    column = -(-((x - UNIT // 2) * dy + (centres[row] - y) * dx) // (UNIT * dy))
    width = columns * SAMPLES + 1
    steps = np.bincount(row // SAMPLES * width + column, np.where(dy > 0, -1, 1), minlength=rows * width)
    windings = np.cumsum(steps.reshape(rows, width), axis=1)[:, :-1]  # of the samples, added up in each pixel row
    counts = windings.reshape(rows, columns, SAMPLES).sum(axis=2)
    return Patch(int(top), int(left), np.clip(counts, 0, SAMPLES * SAMPLES).astype(np.uint8))


def _area(ring: Ring) -> float:
    """Twice the signed area."""
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))


@dataclass(frozen=True)
class Frame:
    """An object's own axes."""

    x: float  # pixel of the origin
    y: float
    angle: float  # of the x axis, in radians
    scale: float  # pixels per unit
    flip: float = 1.0  # -1 where the y axis is mirrored

    def coordinates(self, patch: Patch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(h, w) positions of the pixel centres of a patch along the two axes, in pixels."""
        rows, columns = patch.coverage.shape
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        dx = (np.arange(columns) + (patch.left + 0.5 - self.x))[None, :]
        dy = (np.arange(rows) + (patch.top + 0.5 - self.y))[:, None]
        return dx * cosine + dy * sine, self.flip * (dy * cosine - dx * sine)


class Picture:
    """A picture in the making.

    Objects and clutter share a few colours, so that neighbours sometimes look the same. The background is a gradient
    with large and small noise, blobs, patterned patches and lines in the colours of objects.

    `pixels` is what is painted so far, (3, size, size).
    """

    def __init__(self, draws: Draws, size: int) -> None:
        self._draws = draws
        self._palette = [self._any_colour() for _ in range(PALETTE_COLOURS)]
        first = self._pick()
        second = np.clip(first + 70 * draws.field(3, 1, 1), 0, 255)
        frame = Frame(size / 2, size / 2, draws.uniform(0, 2 * math.pi), float(size))
        whole = Patch(0, 0, np.zeros((size, size), dtype=np.uint8))
        self.pixels: Pixels = first + (second - first) * np.clip(frame.coordinates(whole)[0] / (1.2 * size) + 0.5, 0, 1)
        self.pixels += _smooth_noise(draws, size, cells=4, channels=3) * draws.uniform(5, 35)
        self.pixels += _smooth_noise(draws, size, cells=16, channels=1) * draws.uniform(0, 10)
        for _ in range(draws.integer(0, 2)):
            self._add_clutter(size)

    def add_double(self, patch: Patch) -> Colour:
        """Paints a blob where an object will cross it and returns its colour, for the object to take as well."""
        draws, (rows, columns) = self._draws, patch.coverage.shape
        x = patch.left + columns * draws.uniform(0.1, 0.9)
        y = patch.top + rows * draws.uniform(0.1, 0.9)
        colour = self._pick()
        blob = np.array((x, y)) + _blob(draws, draws.uniform(0.25, 0.5) * max(rows, columns))
        self._blend(fill(Outline([blob])).inside(self.pixels.shape[1:]), colour)
        return colour

    def add_object(self, patch: Patch, frame: Frame, *, family: str, colour: Colour | None) -> None:
        """Paints one object over what is there, in the given colour or else one unlike what is behind it.

        Its patch lies inside the image; its texture follows its frame, and some families have one of their own.
        """
        draws = self._draws
        behind = self.pixels[:, *patch.window][:, patch.mask].mean(axis=1).reshape(3, 1, 1)
        if colour is None or float(np.abs(colour - behind).max()) < 30:  # a doubled one must not vanish altogether
            colour = self._pick_unlike(behind, 55)
        texture = _pick_texture(draws, family)
        if texture == "gradient":
            second = np.clip(colour + 30 * draws.field(3, 1, 1), 0, 255)
        else:
            second = self._pick_unlike(colour, 60)
        surface = colour + (second - colour) * _texture(draws, texture, patch, frame)
        if draws.chance(RIMMED):
            surface = _with_rim(draws, surface, patch.mask)
        self._blend(patch, surface)

    def finished(self) -> NDArray[np.uint8]:
        """(H, W, 3): with the noise of a camera, rounded."""
        _, height, width = self.pixels.shape
        field, grain = self._draws.field, self._draws.uniform(1, 7)
        noisy = self.pixels + 0.7 * grain * field(1, height, width) + 0.5 * grain * field(3, height, width)
        return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8).transpose(1, 2, 0).copy()

    def _add_clutter(self, size: int) -> None:
        draws, unit = self._draws, size / 128
        x, y, angle = draws.uniform(0, size), draws.uniform(0, size), draws.uniform(0, 2 * math.pi)
        roll = draws.uniform(0, 1)
        if roll < 0.35:
            length, width = draws.uniform(20, 80) * unit, draws.uniform(0.6, 2.2) * unit
            ring = _box(-length, -width, length, width)
        else:
            ring = _blob(draws, draws.uniform(5, 26) * unit)
        patch = fill(Outline([np.array((x, y)) + turned(ring, angle)])).inside((size, size))
        surface = self._pick()
        if roll > 0.85:
            texture: Texture = draws.choice(("stripes", "dots", "checker"))
            frame = Frame(x, y, angle, 16.0 * unit)
            surface = surface + (self._pick() - surface) * _texture(draws, texture, patch, frame)
        self._blend(patch, surface, draws.uniform(0.4, 1.0))

    def _blend(self, patch: Patch, surface: Pixels, strength: float = 1.0) -> None:
        part = self.pixels[:, *patch.window]  # a view
        part += (surface - part) * (patch.coverage * (strength / SAMPLES**2))

    def _pick(self) -> Colour:
        """One of the shared colours in half of the cases, else any."""
        draws = self._draws
        return draws.choice(self._palette) + 2 * draws.field(3, 1, 1) if draws.chance(0.5) else self._any_colour()

    def _pick_unlike(self, other: Colour, distance: float) -> Colour:
        """A colour at least so far (largest difference of a channel) from another one, or the farthest of ten."""
        tries: list[Colour] = []
        while len(tries) < 10 and (not tries or np.abs(tries[-1] - other).max() < distance):
            tries.append(self._pick())
        return max(tries, key=lambda colour: float(np.abs(colour - other).max()))

    def _any_colour(self) -> Colour:
        uniform = self._draws.uniform
        hue, saturation, value = uniform(0, 1), uniform(0.1, 0.95), uniform(0.2, 1.0)
        return 255.0 * np.array(colorsys.hsv_to_rgb(hue, saturation, value)).reshape(3, 1, 1)


def _pick_texture(draws: Draws, family: str) -> Texture:
    if family in FAMILY_TEXTURE and draws.chance(0.85):
        return FAMILY_TEXTURE[family]
    roll = draws.uniform(0, 1)
    if roll < 0.5:
        return "plain"
    return "gradient" if roll < 0.85 else draws.choice(("stripes", "dots", "checker"))


def _texture(draws: Draws, texture: Texture, patch: Patch, frame: Frame) -> NDArray[np.float64]:
    """(h, w) share of the second colour, 0..1, with transitions one pixel wide."""
    u, v = frame.coordinates(patch)
    period = min(max(draws.uniform(0.3, 0.5) * frame.scale, 6.0), 0.4 * frame.scale + 6.0)
    if texture == "plain":
        return np.zeros(u.shape)
    if texture == "gradient":
        return np.clip(u / (2 * frame.scale) + 0.5, 0, 1)
    if texture == "stripes":
        return _bands(u, period)
    if texture == "checker":
        first, second = _bands(u, 1.3 * period), _bands(v, 1.3 * period)
        return first + second - 2 * first * second
    dots = _dots(u, v, period)
    return np.where(v > 0, 1.0, dots) if texture == "toadstool" else dots


def _bands(u: NDArray[np.float64], period: float) -> NDArray[np.float64]:
    phase = u / period
    wave = np.abs(2 * (phase - np.floor(phase)) - 1)
    return np.clip((wave - 0.5) * period / 2 + 0.5, 0, 1)


def _dots(u: NDArray[np.float64], v: NDArray[np.float64], period: float) -> NDArray[np.float64]:
    across, down = u / period, v / period
    distance = np.sqrt((across - np.rint(across)) ** 2 + (down - np.rint(down)) ** 2)
    return np.clip((0.3 - distance) * period + 0.5, 0, 1)


def _with_rim(draws: Draws, surface: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    shade = draws.uniform(0.35, 0.75)
    rim = surface * shade if draws.chance(0.7) else 255 - (255 - surface) * shade
    return np.where(inner, surface, rim)


def _blob(draws: Draws, radius: float) -> Ring:
    """A smooth irregular closed curve around the origin."""
    flat = draws.uniform(0.4, 1.0)
    waves = [(k, draws.uniform(0, 0.3 / k), draws.uniform(0, 2 * math.pi)) for k in (2, 3, 5)]
    angles = np.arange(32) * (math.pi / 16)
    radii = radius * (1 + sum(size * np.cos(k * angles + phase) for k, size, phase in waves))
    return np.stack((radii * np.cos(angles), flat * radii * np.sin(angles)), axis=1)


def _smooth_noise(draws: Draws, size: int, *, cells: int, channels: int) -> Pixels:
    """(channels, size, size) noise in -1..1, interpolated between (cells + 1)² random values."""
    values = draws.field(channels, cells + 1, cells + 1)
    position = (np.arange(size) + 0.5) * (cells / size)
    low = np.floor(position).astype(np.int64)
    part = position - low
    columns = values[:, :, low] + (values[:, :, low + 1] - values[:, :, low]) * part
    noise: Pixels = columns[:, low] + (columns[:, low + 1] - columns[:, low]) * part[:, None]
    return noise
