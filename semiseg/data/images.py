"""Image files: one as RGB uint8, whatever its mode; or a look at all of an annotation file, many at once."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from semiseg.data.problems import BadValue, Kind, Problem
from semiseg.data.reading import AS_STORED, Greys, Reading, greys_of, remedy, scaled
from semiseg.data.workers import results_of
from semiseg.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# What an image file may be. Pillow reads more, and hands some of it (PostScript) to other programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA")
# Modes of 16 and more bits per channel, which Pillow would clip at 255 instead of scaling; all are grey, F is float.
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
DEEP_COLOURS = ";16"  # in the raw mode of a file with 16 bits per channel that Pillow gives as 8, the upper ones
IMAGES_AT_ONCE = 256  # handed to the threads at a time, so that memory stays flat
PNG_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow has found any
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
# EXIF orientation -> what a viewer does to the stored pixels.
_TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}
# Pillow's remarks on large or odd files name no file but a line of its own; what cannot be read is an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Header(NamedTuple):
    """What an image's header says beside its size."""

    turned: bool  # a viewer turns or mirrors the stored pixels (Pillow does so with TIFFs by itself: those are upright)
    deep: bool  # more than 8 bits a channel


def read_image(
    path: Path,
    *,
    size_hw: tuple[int, int] | None = None,
    reading: Reading = AS_STORED,
    seen: Callable[[Greys], object] | None = None,
) -> Tensor:
    """The image as (3, H, W) uint8 RGB, in memory as it was decoded: the three colours of a pixel side by side.

    By default pixels are taken as stored: like the COCO tools, and unlike a photo viewer, no EXIF rotation is applied,
    because annotations are in the frame of the stored pixels. Grey, palette, CMYK and 16-bit images become RGB; an
    alpha channel is dropped; of an animation the first picture is taken.

    Args:
        size_hw: the (height, width) that the annotations state.
        reading: which values are black and white in files with more than 8 bits, and whether pixels are turned upright.
        seen: is told of such a file what of its values is left.

    A UserError if it is missing, damaged, of another size, or of values that the reading does not know.
    """
    try:
        return _decode(path, size_hw, reading, seen)
    except BadValue as bad:
        raise UserError(f"{path}: {bad.text}") from None


def _decode(
    path: Path, size_hw: tuple[int, int] | None, reading: Reading, seen: Callable[[Greys], object] | None = None
) -> Tensor:
    with _opened(path, size_hw, reading) as image:
        deep_colours = image.mode not in DEEP_MODES and _is_deep(image)  # while the file is not loaded
        if reading.upright:
            image.load()  # Pillow turns TIFFs by itself while it loads them, and then takes the orientation away
            if (turn := UPRIGHT.get(_orientation(image))) is not None:
                image = image.transpose(turn)
            if size_hw is not None and image.size[::-1] != tuple(size_hw):  # said behind the pixels of a PNG
                raise BadValue(Kind.IMAGE_SIZE, "its EXIF orientation turns it to another size than annotated")
        pixels, greys = _rgb(image, reading, deep_colours=deep_colours, counted=seen is not None)
        if seen is not None and greys is not None:
            seen(greys)
    import torch  # not above: reading headers needs none

    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_problems(
    entries: Sequence[dict[str, Any]],
    folder: Path,
    look: Callable[[Path, tuple[int, int]], Iterable[Problem]],
    *,
    title: str,
) -> Iterator[Problem]:
    """Looks at the images on all cores, with a progress bar; yields what is wrong in the file's order.

    `look` is called in threads with each image's path and the (height, width) that its entry states; it gives problems
    that are no errors, or raises `BadValue`.
    """

    def problems_of(entry: dict[str, Any]) -> list[Problem]:
        path = folder / entry["file_name"]
        try:
            return list(look(path, (entry["height"], entry["width"])))
        except BadValue as bad:
            return [bad.at(str(path))]

    bar = tqdm(total=len(entries), desc=title, unit=" images", delay=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as threads, bar:
        for first in range(0, len(entries), IMAGES_AT_ONCE):
            for problems in results_of(threads, problems_of, entries[first : first + IMAGES_AT_ONCE]):
                bar.update()
                yield from problems


def require_sizes(entries: Sequence[dict[str, Any]], folder: Path, reading: Reading = AS_STORED) -> dict[str, Header]:
    """Compares the size in every image's header with the annotations; the error names the first that is wrong.

    Returns:
        file name -> header of the images that are turned or deep.
    """
    unusual: dict[str, Header] = {}

    def look(path: Path, size_hw: tuple[int, int]) -> tuple[()]:
        header = check_header(path, size_hw, reading)
        if any(header):
            unusual[str(path)] = header
        return ()

    problems = list(image_problems(entries, folder, look, title="headers of images"))
    if not problems:
        named = ((entry["file_name"], unusual.get(str(folder / entry["file_name"]))) for entry in entries)
        return {name: header for name, header in named if header is not None}
    sizes = sum(problem.kind == Kind.IMAGE_SIZE for problem in problems)
    counts = {"of another size": sizes, "unreadable": len(problems) - sizes}
    text = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    first = problems[0]
    raise UserError(f"{first.where}: {first.text}; of {len(entries)} images {text}: `semiseg data check` lists them")


def check_header(path: Path, size_hw: tuple[int, int] | None, reading: Reading = AS_STORED) -> Header:
    """Looks at an image file's header alone: raises `BadValue` if it is missing, no image, or of another size."""
    with _opened(path, size_hw, reading) as image:
        return Header(turned=_turn(image) is not None, deep=_is_deep(image))


def decoding_problems(path: Path, size_hw: tuple[int, int], reading: Reading = AS_STORED) -> list[Problem]:
    """Decodes an image in full, or raises `BadValue`; what is left out or lost in doing so are notices."""
    found: list[Problem] = []

    def seen(greys: Greys) -> None:
        if greys.few:
            advice = remedy([greys], "data.value_range = [{low}, {high}] (--value-range {low} {high})")
            found.append(Problem(Kind.FEW_GREYS, str(path), f"{greys}; {advice}"))

    _decode(path, size_hw, reading, seen)
    with _opened(path, None, reading) as image:
        orientation = _orientation(image) if _turn(image) is not None else 1
    if orientation != 1 and not reading.upright:
        text = f"EXIF orientation {orientation}; training takes the pixels as stored, `predict` turns them upright"
        found.append(Problem(Kind.EXIF, str(path), text))
    return found


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Pillow's image of a file of one of `FORMATS`, its header read; raises what Pillow raises."""
    return Image.open(file, formats=_installed_formats())


@cache
def _installed_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: Path, size_hw: tuple[int, int] | None, reading: Reading) -> Iterator[Image.Image]:
    """The image, its size compared; whatever goes wrong, also inside the block, is a `BadValue`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no file")  # a pipe would be waited for
        with open_image(path) as image:
            _require_size(image, size_hw, reading)
            if reading.value_range is None and image.mode == "F":
                raise ValueError(
                    "its values are floating-point numbers, allowed: integers of 8 or 16 bits, or a value range "
                    "(data.value_range, --value-range) that says which are black and white"
                )
            if reading.value_range is not None and image.mode not in DEEP_MODES and _is_deep(image):
                raise ValueError(
                    "a value range is for grey values, and this file has colours of 16 bits, of which only the upper 8 "
                    "are read; store it in 8 bits"
                )
            yield image
    except FileNotFoundError:
        raise BadValue(Kind.IMAGE_MISSING, "no such image file") from None
    except PermissionError:
        raise BadValue(Kind.IMAGE_UNREADABLE, "no permission to read the image") from None
    except BadValue:
        raise
    except Exception as error:  # on a damaged file Pillow's readers raise whatever they happen to meet
        detail = "not an image or damaged" if isinstance(error, UnidentifiedImageError) else str(error)
        text = f"the image cannot be decoded: {detail or type(error).__name__}"
        raise BadValue(Kind.IMAGE_UNREADABLE, text) from None


def _require_size(image: Image.Image, size_hw: tuple[int, int] | None, reading: Reading) -> None:
    """`BadValue` if the image, turned upright where the reading says so, is of another size."""
    if size_hw is None:
        return
    sideways = _turn(image) in TRANSPOSED
    size = image.size[::-1] if sideways and reading.upright else image.size
    if size[::-1] == tuple(size_hw):
        return
    turned = ", turned upright as its EXIF orientation says," if size != image.size else ""
    text = (
        f"the image{turned} is {size[0]} x {size[1]} (width x height), but its annotations say "
        f"{size_hw[1]} x {size_hw[0]}"
    )
    if sideways and size == tuple(size_hw) and reading.upright:
        text += ": they are of the pixels as stored, which data.upright = false takes"
    elif sideways and size == tuple(size_hw):
        text += (
            "; its EXIF orientation is not applied: data.upright = true (--upright) does, for annotations of upright "
            "images"
        )
    raise BadValue(Kind.IMAGE_SIZE, text)


def _orientation(image: Image.Image) -> int:
    """1..8; EXIF data that nobody can read says 1, as does that behind the pixels of a PNG, until it is loaded."""
    if image.format == "PNG" and not image.info.keys() & PNG_EXIF:
        return 1  # Pillow would decode the pixels to look behind them
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises what it happens to meet in damaged data
        return 1


def _turn(image: Image.Image) -> int | None:
    """The EXIF orientation, where it turns or mirrors the pixels; None for TIFFs, which Pillow turns by itself."""
    orientation = 1 if image.format == "TIFF" else _orientation(image)
    return orientation if orientation in UPRIGHT else None


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel, of an image that is not loaded yet."""
    raw = (part[3] for part in getattr(image, "tile", ()))
    return image.mode in DEEP_MODES or any(DEEP_COLOURS in str(arguments) for arguments in raw)


def _rgb(image: Image.Image, reading: Reading, *, deep_colours: bool, counted: bool) -> tuple[np.ndarray, Greys | None]:
    """(H, W, 3) uint8, and what is left of the values of an image of more than 8 bits, if that is counted."""
    if image.mode in DEEP_MODES:
        stored = np.asarray(image)
        if reading.value_range is not None:
            grey = scaled(stored, reading.value_range)
        else:
            values = stored.astype(np.int64)
            if values.min() < 0 or values.max() >= 2**16:
                raise ValueError(
                    f"grey values from {values.min()} to {values.max()}, allowed: 0 to 65535, or those of a value "
                    "range (data.value_range, --value-range)"
                )
            grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), greys_of(stored, grey) if counted else None
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if not (deep_colours and counted):
        return pixels, None
    # The lower bits are gone: values that never reach the upper two say that they were all there was.
    kept, high = int(np.count_nonzero(np.bincount(pixels.ravel(), minlength=256))), int(pixels.max())
    stored_values = None if high < 2**6 else kept
    return pixels, Greys(int(pixels.min()) * 2**8, high * 2**8 + 2**8 - 1, stored_values, kept)
