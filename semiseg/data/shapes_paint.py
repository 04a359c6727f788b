"""Colours, textures and cluttered backgrounds. Colour says nothing about the class; some textures go with a family.

Pixels are float64 RGB in 0..255, channels first. Only arithmetic and square roots touch whole images (no matrix
products, no transcendental functions), so that the result is the same on every platform.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from semiseg.data.shapes_outlines import SAMPLES, Draws, Outline, Patch, Ring, fill

Pixels = NDArray[np.float64]  # (3, H, W) RGB
Colour = NDArray[np.float64]  # (3, 1, 1) RGB
Texture = Literal["plain", "gradient", "stripes", "dots", "checker", "toadstool"]

# Four families of twelve are patterned, so that neither colour affinity nor "one colour = one object" holds for them.
FAMILY_TEXTURE: dict[str, Texture] = {
    "bowtie": "checker",
    "leaf": "stripes",
    "mushroom": "toadstool",
    "snake": "stripes",
}
RIMMED = 0.3  # share of the objects that have a darker or lighter rim
PALETTE_COLOURS = 5


@dataclass(frozen=True)
class Frame:
    """An object's own axes."""

    x: float  # pixel of the origin
    y: float
    cosine: float  # of the x axis
    sine: float
    scale: float  # pixels per unit
    flip: float = 1.0  # -1 where the y axis is mirrored

    def coordinates(self, patch: Patch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(h, w) positions of the pixel centres of a patch along the two axes, in pixels."""
        rows, columns = patch.coverage.shape
        dx = (np.arange(columns) + (patch.left + 0.5 - self.x))[None, :]
        dy = (np.arange(rows) + (patch.top + 0.5 - self.y))[:, None]
        return dx * self.cosine + dy * self.sine, self.flip * (dy * self.cosine - dx * self.sine)


class Palette:
    """The colours of one picture: objects and clutter share a few, so that neighbours sometimes look the same."""

    def __init__(self, draws: Draws) -> None:
        self._shared = [self._any(draws) for _ in range(PALETTE_COLOURS)]

    def pick(self, draws: Draws) -> Colour:
        """One of the shared colours in half of the cases, else any."""
        return draws.choice(self._shared) + 2 * draws.field(3, 1, 1) if draws.chance(0.5) else self._any(draws)

    def pick_unlike(self, draws: Draws, other: Colour, distance: float) -> Colour:
        """A colour at least so far (largest difference of a channel) from another one, or the farthest of ten."""
        tries: list[Colour] = []
        while len(tries) < 10 and (not tries or np.abs(tries[-1] - other).max() < distance):
            tries.append(self.pick(draws))
        return max(tries, key=lambda colour: float(np.abs(colour - other).max()))

    @staticmethod
    def _any(draws: Draws) -> Colour:
        hue, saturation, value = draws.uniform(0, 1), draws.uniform(0.1, 0.95), draws.uniform(0.2, 1.0)
        return 255.0 * np.array(colorsys.hsv_to_rgb(hue, saturation, value)).reshape(3, 1, 1)


def paint_background(draws: Draws, palette: Palette, size: int) -> Pixels:
    """A gradient with large and small noise, blobs, patterned patches and lines in the colours of objects."""
    unit = size / 128
    first = palette.pick(draws)
    second = np.clip(first + 70 * draws.field(3, 1, 1), 0, 255)
    angle = draws.uniform(0, 2 * math.pi)
    frame = Frame(size / 2, size / 2, math.cos(angle), math.sin(angle), float(size))
    whole = Patch(0, 0, np.zeros((size, size), dtype=np.uint8))
    along = np.clip(frame.coordinates(whole)[0] / (1.2 * size) + 0.5, 0, 1)
    pixels = first + (second - first) * along
    pixels += _smooth_noise(draws, size, cells=4, channels=3) * draws.uniform(5, 35)
    pixels += _smooth_noise(draws, size, cells=16, channels=1) * draws.uniform(0, 10)
    for _ in range(draws.integer(0, 2)):
        _paint_clutter(draws, palette, pixels, unit)
    return pixels


def paint_double(draws: Draws, palette: Palette, pixels: Pixels, patch: Patch) -> Colour:
    """Paints a blob where an object will cross it and returns its colour, for the object to take as well."""
    rows, columns = patch.coverage.shape
    side = max(rows, columns)
    x = patch.left + columns * draws.uniform(0.1, 0.9)
    y = patch.top + rows * draws.uniform(0.1, 0.9)
    colour = palette.pick(draws)
    blob = np.array((x, y)) + _blob(draws, draws.uniform(0.25, 0.5) * side)
    _blend(pixels, fill(Outline([blob])).inside(pixels.shape[1:]), colour, 1.0)
    return colour


def paint_object(
    draws: Draws, palette: Palette, pixels: Pixels, patch: Patch, frame: Frame, *, family: str, colour: Colour | None
) -> None:
    """Paints one object over what is there, in the given colour or else one unlike what is behind it.

    Its patch lies inside the image; its texture follows its frame, and some families have one of their own.
    """
    behind = pixels[:, *patch.window][:, patch.mask].mean(axis=1).reshape(3, 1, 1)
    if colour is None or float(np.abs(colour - behind).max()) < 30:  # a doubled one must not vanish altogether
        colour = palette.pick_unlike(draws, behind, 55)
    texture = _pick_texture(draws, family)
    if texture == "gradient":
        second = np.clip(colour + 30 * draws.field(3, 1, 1), 0, 255)
    else:
        second = palette.pick_unlike(draws, colour, 60)
    surface = colour + (second - colour) * _texture(draws, texture, patch, frame)
    if draws.chance(RIMMED):
        surface = _with_rim(draws, surface, patch.mask)
    _blend(pixels, patch, surface, 1.0)


def add_noise(draws: Draws, pixels: Pixels) -> NDArray[np.uint8]:
    """The finished picture (H, W, 3): with the noise of a camera, rounded to uint8."""
    _, height, width = pixels.shape
    grain = draws.uniform(1, 7)
    noisy = pixels + 0.7 * grain * draws.field(1, height, width) + 0.5 * grain * draws.field(3, height, width)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8).transpose(1, 2, 0).copy()


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


def _paint_clutter(draws: Draws, palette: Palette, pixels: Pixels, unit: float) -> None:
    size = pixels.shape[1]
    x, y, angle = draws.uniform(0, size), draws.uniform(0, size), draws.uniform(0, 2 * math.pi)
    roll = draws.uniform(0, 1)
    if roll < 0.35:
        length, width = draws.uniform(20, 80) * unit, draws.uniform(0.6, 2.2) * unit
        ring = np.array([(-length, -width), (length, -width), (length, width), (-length, width)])
    else:
        ring = _blob(draws, draws.uniform(5, 26) * unit)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    moved = ring[:, :1] * turn[0] + ring[:, 1:] * turn[1] + (x, y)
    patch = fill(Outline([moved])).inside((size, size))
    colour = palette.pick(draws)
    frame = Frame(x, y, math.cos(angle), math.sin(angle), 16.0 * unit)
    texture: Texture = draws.choice(("stripes", "dots", "checker")) if roll > 0.85 else "plain"
    surface = colour
    if texture != "plain":
        surface = colour + (palette.pick(draws) - colour) * _texture(draws, texture, patch, frame)
    _blend(pixels, patch, surface, draws.uniform(0.4, 1.0))


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


def _blend(pixels: Pixels, patch: Patch, surface: Pixels, strength: float) -> None:
    part = pixels[:, *patch.window]  # a view
    part += (surface - part) * (patch.coverage * (strength / SAMPLES**2))
