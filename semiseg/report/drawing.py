"""Figures as bytes: PNG with few colours, and SVG with letters as letters; the colours and labels that charts share."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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
ROW_COLOURS = (GREY, SKY, BLUE, ORANGE, GREEN, VERMILLION, PURPLE, BLACK)

STYLE = Path(__file__).with_name("charts.mplstyle")
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic")


@dataclass(frozen=True)
class Drawing:
    """A drawn figure: the bytes of its PNG and, unless it is a picture of pixels, of its SVG."""

    png: bytes
    svg: bytes | None = None


def new_figure(width: float, height: float) -> Figure:
    """A figure of inches, drawn off screen, with letters of other scripts where a font for them is installed.

    For functions under `matplotlib.rc_context(fname=STYLE)`.
    """
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in _FONTS if name in installed] or ["sans-serif"]
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def chart(figure: Figure) -> Drawing:
    """A figure of lines and letters: PNG and SVG, the same bytes for the same numbers."""
    canvas, svg = FigureCanvasAgg(figure), io.BytesIO()
    with _quiet_about_fonts():
        canvas.draw()
        figure.set_layout_engine("none")  # it has laid out; that takes longer than drawing
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    content = re.sub(rb"(\.\d\d)\d+", rb"\1", svg.getvalue())  # hundredths of a point are enough
    # Where none of the fonts is installed, letters without serifs.
    content = re.sub(rb"(<text style=\"[^\"]*font(?:-family)?: [^;\"]*')", rb"\1, sans-serif", content)
    return Drawing(png(Image.fromarray(np.asarray(canvas.buffer_rgba()))), content)


def png(image: Image.Image, *, colours: int = 128) -> bytes:
    """An image with a palette: a third of the bytes, and no time stamp or version inside."""
    small = io.BytesIO()
    reduced = image.convert("RGB").quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


@contextlib.contextmanager
def _quiet_about_fonts() -> Iterator[None]:
    """No font of a script here: boxes instead, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def plain(text: str) -> str:
    """A name as it is: `$` does not start mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def wrapped(text: str, width: int = 12) -> str:
    """Breaks long labels after "+", "-" or at spaces so that they do not run into each other."""
    lines = [""]
    for part in re.findall(r"[^+\- ]*[+\- ]|[^+\- ]+", plain(text)):
        if len(lines[-1]) + len(part.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


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
