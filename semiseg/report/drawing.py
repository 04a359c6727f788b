"""Figures as PNG with few colours; the colours and labels that charts share."""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito 2008: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
VERMILLION, PURPLE, GREY, BLACK = "#D55E00", "#CC79A7", "#8C8C8C", "#000000"
ROW_COLOURS = (GREY, SKY, BLUE, ORANGE, GREEN, BLACK, VERMILLION, PURPLE)

STYLE = Path(__file__).with_name("charts.mplstyle")
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic")


def new_figure(width: float, height: float) -> Figure:
    """A figure of inches, drawn off screen, with letters of other scripts where a font for them is installed.

    For functions under `matplotlib.rc_context(fname=STYLE)`.
    """
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in _FONTS if name in installed] or ["sans-serif"]
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def chart(figure: Figure) -> bytes:
    """A figure of lines and letters as PNG, the same bytes for the same numbers."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font of a script here: boxes instead
        canvas.draw()
    return png(Image.fromarray(np.asarray(canvas.buffer_rgba())))


def png(image: Image.Image, *, colours: int = 128) -> bytes:
    """An image with a palette: a third of the bytes, and no time stamp or version inside."""
    small = io.BytesIO()
    reduced = image.convert("RGB").quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def plain(text: str) -> str:
    """A name as it is: `$` does not start mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def wrapped(text: str, width: int = 12) -> str:
    """Breaks long labels at spaces and hyphens so that they do not run into each other."""
    return textwrap.fill(plain(text), width, break_long_words=False)


def shortened(text: str, width: int = 32) -> str:
    """A label of at most `width` columns, the last of them "…" where it was longer; wide signs take two columns."""
    text = " ".join(text.split())
    ends, end = [], 0
    for sign in text:
        end += 0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        ends.append(end)
    if end > width:
        text = text[: sum(place < width for place in ends)].rstrip() + "…"
    return plain(text)
