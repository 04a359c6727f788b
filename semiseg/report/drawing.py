"""Figures as bytes: PNG with few colours, and SVG with letters as letters (`inline_svg` puts it into a page)."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import matplotlib.font_manager
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
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


def lay_out(figure: Figure) -> None:
    """Gives everything its place, once: the layout takes longer than drawing, and every format would ask for it."""
    if not isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        return
    with quiet_about_fonts():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")


def png(figure: Figure, *, colours: int = 128) -> bytes:
    """Draws a figure and reduces it to a palette: a third of the bytes, and no time stamp or version inside."""
    lay_out(figure)
    canvas = FigureCanvasAgg(figure)
    with quiet_about_fonts():
        canvas.draw()
    small = io.BytesIO()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def svg(figure: Figure) -> bytes:
    """Draws a figure as SVG with letters as letters, without a time stamp; ids follow from the content alone."""
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "semiseg"}), quiet_about_fonts():
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # Where none of the fonts is installed, letters without serifs.
    return re.sub(rb"(<text style=\"[^\"]*font(?:-family)?: [^;\"]*')", rb"\1, sans-serif", drawn.getvalue())


@contextlib.contextmanager
def quiet_about_fonts() -> Iterator[None]:
    """No font of a script here: boxes instead, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def plain(text: str) -> str:
    """A name as it is: `$` does not start mathematics."""
    return " ".join(text.split()).replace("$", r"\$")
