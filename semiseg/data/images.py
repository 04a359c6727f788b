"""Image files: one as RGB uint8, whatever its mode; or a look at all of an annotation file, many at once."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from semiseg.data.problems import BadValue, Kind, Problem
from semiseg.data.workers import results_of
from semiseg.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# What an image file may be. Pillow reads more, and hands some of it (PostScript) to other programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA")
# Modes of 16 and more bits per channel, which Pillow would clip at 255 instead of scaling; all are grey.
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
IMAGES_AT_ONCE = 256  # handed to the threads at a time, so that memory stays flat
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
# EXIF orientation -> what a viewer does to the stored pixels.
_TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}
# Pillow's remarks on large or odd files name no file but a line of its own; what cannot be read is an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: Path, *, size_hw: tuple[int, int] | None = None, upright: bool = False) -> Tensor:
    """The image as (3, H, W) uint8 RGB, in memory as it was decoded: the three colours of a pixel side by side.

    By default pixels are taken as stored: like the COCO tools, and unlike a photo viewer, no EXIF rotation is applied,
    because annotations are in the frame of the stored pixels. Grey, palette, CMYK and 16-bit images become RGB; an
    alpha channel is dropped; of an animation the first picture is taken.

    Args:
        size_hw: the (height, width) of the stored pixels that the annotations state.
        upright: apply the EXIF orientation, as viewers do: for images without annotations.

    A UserError if it is missing, damaged, of another size, or of floating-point values, whose white nothing says.
    """
    try:
        return _decode(path, size_hw, upright=upright)
    except BadValue as bad:
        raise UserError(f"{path}: {bad.text}") from None


def _decode(path: Path, size_hw: tuple[int, int] | None, *, upright: bool) -> Tensor:
    with _opened(path, size_hw) as image:
        if upright:
            image.load()  # Pillow turns TIFFs by itself while it loads them, and then takes the orientation away
            if (turn := UPRIGHT.get(_orientation(image))) is not None:
                image = image.transpose(turn)
        pixels = _rgb(image)
    import torch  # not above: reading headers needs none

    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_problems(
    entries: Sequence[dict[str, Any]],
    folder: Path,
    look: Callable[[Path, tuple[int, int]], Problem | None],
    *,
    title: str,
) -> Iterator[Problem]:
    """Looks at the images on all cores, with a progress bar; yields what is wrong in the file's order.

    `look` is called in threads with each image's path and the (height, width) that its entry states; it gives a problem
    that is no error, or raises `BadValue`.
    """

    def problem_of(entry: dict[str, Any]) -> Problem | None:
        path = folder / entry["file_name"]
        try:
            return look(path, (entry["height"], entry["width"]))
        except BadValue as bad:
            return bad.at(str(path))

    bar = tqdm(total=len(entries), desc=title, unit=" images", delay=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as threads, bar:
        for first in range(0, len(entries), IMAGES_AT_ONCE):
            for problem in results_of(threads, problem_of, entries[first : first + IMAGES_AT_ONCE]):
                bar.update()
                if problem is not None:
                    yield problem


def require_sizes(entries: Sequence[dict[str, Any]], folder: Path) -> None:
    """Compares the size in every image's header with the annotations; the error names the first that is wrong."""
    problems = list(image_problems(entries, folder, check_header, title="sizes of images"))
    if not problems:
        return
    sizes = sum(problem.kind == Kind.IMAGE_SIZE for problem in problems)
    counts = {"of another size": sizes, "unreadable": len(problems) - sizes}
    text = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    first = problems[0]
    raise UserError(f"{first.where}: {first.text}; of {len(entries)} images {text}: `semiseg data check` lists them")


def check_header(path: Path, size_hw: tuple[int, int]) -> None:
    """Looks at an image file's header alone: raises `BadValue` if it is missing, no image, or of another size."""
    with _opened(path, size_hw):
        pass


def decoding_problem(path: Path, size_hw: tuple[int, int]) -> Problem | None:
    """Decodes an image in full, or raises `BadValue`; an EXIF orientation that viewers apply and we not is a notice."""
    _decode(path, size_hw, upright=False)
    with _opened(path, None) as image:
        # Pillow turns TIFFs by itself.
        orientation = 1 if image.format == "TIFF" else _orientation(image)
    if orientation not in UPRIGHT:
        return None
    text = f"EXIF orientation {orientation}; training takes the pixels as stored, `predict` turns them upright"
    return Problem(Kind.EXIF, str(path), text)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Pillow's image of a file of one of `FORMATS`, its header read; raises what Pillow raises."""
    return Image.open(file, formats=_installed_formats())


@cache
def _installed_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(path: Path, size_hw: tuple[int, int] | None) -> Iterator[Image.Image]:
    """The image, its size compared; whatever goes wrong, also inside the block, is a `BadValue`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no file")  # a pipe would be waited for
        with open_image(path) as image:
            if size_hw is not None and (image.height, image.width) != tuple(size_hw):
                raise BadValue(Kind.IMAGE_SIZE, _other_size(image, size_hw))
            if image.mode == "F":
                raise ValueError("its values are floating-point numbers, allowed: integers of 8 or 16 bits")
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


def _orientation(image: Image.Image) -> int:
    """1..8; EXIF data that nobody can read says nothing: 1."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises what it happens to meet in damaged data
        return 1


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    if image.mode in DEEP_MODES:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()}, allowed: 0 to 65535")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _other_size(image: Image.Image, size_hw: tuple[int, int]) -> str:
    (width, height), annotated = image.size, f"{size_hw[1]} x {size_hw[0]}"
    text = f"the image is {width} x {height} (width x height), but its annotations say {annotated}"
    if _orientation(image) in TRANSPOSED and image.size == tuple(size_hw):
        text += "; its EXIF orientation is not applied: store the pixels upright, or annotate the stored ones"
    return text
