"""Looks at all image files of an annotation file, many at once: their headers, or the whole of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from semiseg.data.images import check_header
from semiseg.data.problems import BadValue, Kind, Problem
from semiseg.errors import UserError

AT_ONCE = 256  # handed to the threads at a time, so that memory stays flat

# (path, its (height, width) in pixels by the annotation file) -> a problem that is no error; an error is a `BadValue`.
Look = Callable[[Path, tuple[int, int]], Problem | None]


def image_problems(entries: Sequence[dict[str, Any]], folder: Path, look: Look, *, title: str) -> Iterator[Problem]:
    """Looks at the images on all cores, with a progress bar; yields what is wrong in the file's order.

    Args:
        entries: `images` of the annotation file.
        folder: `file_name` is relative to it.
        look: called once per image, in threads.
        title: of the progress bar.
    """

    def problem_of(entry: dict[str, Any]) -> Problem | None:
        path = folder / entry["file_name"]
        try:
            return look(path, (entry["height"], entry["width"]))
        except BadValue as bad:
            return bad.at(str(path))

    bar = tqdm(total=len(entries), desc=title, unit=" images", delay=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as threads, bar:
        for first in range(0, len(entries), AT_ONCE):
            for problem in threads.map(problem_of, entries[first : first + AT_ONCE]):
                bar.update()
                if problem is not None:
                    yield problem


def require_sizes(entries: Sequence[dict[str, Any]], folder: Path) -> None:
    """Compares the size in every image's header with the annotations; nothing is decoded.

    Raises:
        UserError: names the first image that is of another size, or no image, and says how many there are.
    """

    def look(path: Path, size_hw: tuple[int, int]) -> None:
        check_header(path, size_hw=size_hw)

    found = list(image_problems(entries, folder, look, title="sizes of images"))
    if not found:
        return
    first = found[0]
    sizes = sum(problem.kind == Kind.IMAGE_SIZE for problem in found)
    told = [f"{sizes} of another size"] * bool(sizes) + [f"{len(found) - sizes} unreadable"] * (sizes < len(found))
    raise UserError(
        f"{first.place}: {first.text}; of {len(entries)} images {' and '.join(told)}: `semiseg data check` lists them"
    )
