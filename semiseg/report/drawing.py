"""Figures as bytes: PNG with few colours, and SVG with letters as letters (`inline_svg` puts it into a page)."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import matplotlib
import matplotlib.font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito 2008: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
VERMILLION, PURPLE, GREY, BLACK = "#D55E00", "#CC79A7", "#8C8C8C", "#000000"
ROW_COLOURS = (GREY, SKY, BLUE, ORANGE, GREEN, VERMILLION, PURPLE, BLACK)

DPI = 110
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic")


@dataclass(frozen=True)
class Drawing:
    """A drawn figure: the bytes of its PNG and, unless it is a picture of pixels, of its SVG."""

    png: bytes
    svg: bytes | None = None


def new_figure(width: float, height: float) -> Figure:
    """A figure of inches, drawn off screen, with letters of other scripts where a font for them is installed."""
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in _FONTS if name in installed] or ["sans-serif"]
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def chart(figure: Figure) -> Drawing:
    """A figure of lines and letters: PNG and SVG, the same bytes for the same numbers."""
    return Drawing(png(figure), svg(figure))


def png(figure: Figure, *, colours: int = 128) -> bytes:
    """Draws a figure and reduces it to a palette: a third of the bytes, and no time stamp or version inside."""
    raw = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font of that script here: boxes instead
        figure.savefig(raw, format="png", dpi=DPI)
    small = io.BytesIO()
    image = Image.open(raw).convert("RGB").quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def svg(figure: Figure) -> bytes:
    """Draws a figure as SVG with letters as letters, without a time stamp; ids follow from the content alone."""
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "semiseg"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # Where none of the fonts is installed, letters without serifs.
    return re.sub(rb"(<text style=\"[^\"]*font(?:-family)?: [^;\"]*')", rb"\1, sans-serif", drawn.getvalue())


def plain(text: str) -> str:
    """A name as it is: `$` does not start mathematics."""
    return " ".join(text.split()).replace("$", r"\$")
