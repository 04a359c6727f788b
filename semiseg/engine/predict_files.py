"""Predicting image files: read ahead in threads, predict in batches, draw in threads, write results as they come.

Memory does not grow with the number of detections nor, but for one image being read, with the size of the images:
originals are let go as soon as they are resized, full-size masks become RLE a few at a time, results go to disk.
"""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from semiseg.data.images import read_image
from semiseg.data.transforms import EvalTransform
from semiseg.engine.checkpoint import ModelInfo, write_json
from semiseg.engine.predict import LoadedModel, coco_results, find_instances
from semiseg.errors import UserError
from semiseg.files import whole_file, write_bytes
from semiseg.overlays import Drawn, can_write, draw_detections, prepare_drawing

RESULTS_NAME, IMAGES_NAME, OVERLAYS_NAME = "results.json", "images.json", "overlays"
JPEG_QUALITY = 92
LONGEST_NAME = 200  # bytes of a file's name, with room for a suffix and for the mark of a temporary file


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How files are predicted.

    Attributes:
        short_side, long_side: the resize rule, in pixels.
        score_threshold: for class probability x centreness; a detection's score is the square root of that.
        drawn_score: detections with at least this score are drawn; None = no overlays.
        batch_size: images predicted at a time; those of equal padded size share a forward.
        workers: threads that read and draw.
    """

    short_side: int
    long_side: int
    score_threshold: float
    drawn_score: float | None
    batch_size: int
    workers: int


@dataclass
class Outcome:
    """What has been done: images, their detections, how many of these are drawn, and the files that cannot be read."""

    images: int = 0
    detections: int = 0
    drawn: int = 0
    unreadable: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _ImageFile:
    """One file's image, ready for the network and for drawing; `message` instead, if it cannot be read."""

    image_id: int
    path: Path
    original_hw: tuple[int, int] = (0, 0)
    input: Tensor | None = None  # (3, H, W) uint8
    picture: Image.Image | None = None
    message: str | None = None


def predict_files(
    model: LoadedModel,
    files: Sequence[Path],
    *,
    out: Path,
    options: PredictOptions,
    progress: bool,
    report: Callable[[str], None],
) -> Outcome:
    """Predicts every file that can be read; writes `results.json`, `images.json` and `overlays/` into a folder.

    An image's id is the place of its file in the list, from 1. EXIF orientation is applied: boxes and masks are in the
    frame of the upright image, whose size `images.json` states.

    Args:
        out: is made if need be; files of the same names in it are replaced.
        report: is told a sentence for each file that cannot be read; the others are done all the same.

    Raises:
        UserError: an overlay would replace one of the images.
        KeyboardInterrupt: with both files written for the images done so far.
    """
    overlays = [out / OVERLAYS_NAME / name for name in overlay_names(files)]
    if options.drawn_score is not None:
        _keep_inputs(files, overlays)
    bar = tqdm(total=len(files), desc="predicting", unit="image", disable=not progress, file=sys.stderr)
    stopped = False
    with bar, whole_file(out / RESULTS_NAME) as file, ThreadPoolExecutor(options.workers) as pool:
        job = _Job(model, options, overlays, ResultFiles(file, out, model.info))
        try:
            try:
                for batch in _read_ahead(files, options, pool):
                    for item in batch:
                        if item.message is not None:
                            job.outcome.unreadable.append(item.path)
                            with tqdm.external_write_mode(file=sys.stderr):
                                report(item.message)
                    job.predict([item for item in batch if item.message is None], pool)
                    bar.update(len(batch))
                job.wait_for_drawings()
            except KeyboardInterrupt:
                stopped = True
            job.finish()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if stopped:
        done = f"stopped after {job.outcome.images} of {len(files)} images, whose results are in {out}"
        raise KeyboardInterrupt(done)
    return job.outcome


class _Job:
    """The state of one prediction: what is written and done so far, and the drawings on their way."""

    def __init__(self, model: LoadedModel, options: PredictOptions, overlays: list[Path], written: ResultFiles) -> None:
        self.model = model
        self.options = options
        self.overlays = overlays
        self.written = written
        self.outcome = Outcome()
        self._drawings: list[Future[None]] = []
        self._names = dict(zip(model.info.category_ids, written_names(model.info), strict=True))

    def predict(self, batch: Sequence[_ImageFile], pool: ThreadPoolExecutor) -> None:
        """One batch through the network; its drawings are done while the next one is predicted."""
        results: dict[int, list[dict[str, Any]]] = {}
        limits = self.model.info.inference.model_copy(update={"score_threshold": self.options.score_threshold})
        with torch.inference_mode():
            for found in find_instances(
                self.model.network,
                [item.input for item in batch if item.input is not None],
                output_sizes=[item.original_hw for item in batch],
                limits=limits,
            ):
                image_id, category_ids = batch[found.number].image_id, self.model.info.category_ids
                results[found.number] = coco_results(found, image_id=image_id, category_ids=category_ids)
        self.wait_for_drawings()
        for number, item in enumerate(batch):
            self.written.add(item.image_id, item.path, item.original_hw, results[number])
            self.outcome.images += 1
            self.outcome.detections += len(results[number])
            if item.picture is not None and self.options.drawn_score is not None:
                drawn = [result for result in results[number] if result["score"] >= self.options.drawn_score]
                self.outcome.drawn += len(drawn)
                self._drawings.append(pool.submit(self._draw, item, drawn))

    def finish(self) -> None:
        """Waits for the drawings and ends the two files."""
        self.wait_for_drawings()
        self.written.finish()

    def wait_for_drawings(self) -> None:
        """Until all that are on their way lie in their files."""
        while self._drawings:
            self._drawings[0].result()
            self._drawings.pop(0)

    def _draw(self, item: _ImageFile, results: Sequence[dict[str, Any]]) -> None:
        assert item.picture is not None
        drawn = [
            Drawn((x, y, x + width, y + height), result["segmentation"], f"{name} {result['score']:.2f}")
            for result in results
            for (x, y, width, height), name in [(result["bbox"], self._names[result["category_id"]])]
        ]
        content = io.BytesIO()
        picture = draw_detections(item.picture, item.original_hw, drawn)
        picture.save(content, format="JPEG", quality=JPEG_QUALITY, subsampling=0)  # full colour: text stays sharp
        write_bytes(self.overlays[item.image_id - 1], content.getvalue())


def written_names(info: ModelInfo) -> list[str]:
    """Class names as overlays show them: of a script that the font has not, `class` and the category's id."""
    pairs = zip(info.class_names, info.category_ids, strict=True)
    return [name if can_write(name) else f"class {category_id}" for name, category_id in pairs]


class ResultFiles:
    """`results.json` (COCO results) and `images.json` (COCO images and categories).

    Results go to disk as they come, one a line; the caller gives the file its name after `finish`.
    """

    def __init__(self, file: IO[bytes], out: Path, info: ModelInfo) -> None:
        self.out = out
        self.categories = [
            {"id": number, "name": name} for number, name in zip(info.category_ids, info.class_names, strict=True)
        ]
        self.images: list[dict[str, Any]] = []
        self._file = file
        self._before = "[\n"  # of the next result

    def add(self, image_id: int, path: Path, original_hw: tuple[int, int], results: Sequence[dict[str, Any]]) -> None:
        """One image and its detections."""
        height, width = original_hw
        # Names that are not UTF-8 stay readable in the JSON, if not openable.
        name = os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")
        self.images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for result in results:
            self._file.write((self._before + json.dumps(result)).encode())
            self._before = ",\n"

    def finish(self) -> None:
        """Ends the results and writes `images.json`, which describes them."""
        self._file.write(b"\n]\n" if self._before == ",\n" else b"[]\n")
        self._file.flush()
        write_json(self.out / IMAGES_NAME, {"images": self.images, "annotations": [], "categories": self.categories})


def overlay_names(files: Sequence[Path]) -> list[str]:
    """Name of each file's overlay, different for all: `photo.jpg` for photo.png.

    Where two files have the same name, all keep their folders from their common one on; where also those are the same
    (photo.png beside photo.tif), the suffix; where a name is too long or not to be told apart, all are numbers.
    """
    paths = [Path(os.path.abspath(path)) for path in files]
    common = os.path.commonpath([path.parent for path in paths])
    relative = [path.relative_to(common) for path in paths]
    forms = (
        [path.stem for path in paths],
        [str(path.with_suffix("")) for path in relative],
        [str(path) for path in relative],
    )
    numbers = [f"{number:06d}" for number in range(1, len(files) + 1)]
    return [f"{name}.jpg" for name in next((names for names in forms if _usable(names)), numbers)]


def _usable(names: Sequence[str]) -> bool:
    """Different also for file systems that ignore case and forms of accents, and not too long for any."""
    alike = {unicodedata.normalize("NFC", name).casefold() for name in names}
    return len(alike) == len(names) and all(len(os.fsencode(Path(name).name)) <= LONGEST_NAME for name in names)


def _keep_inputs(files: Sequence[Path], overlays: Sequence[Path]) -> None:
    lost = {os.path.realpath(path) for path in files} & {os.path.realpath(path) for path in overlays}
    if lost:
        raise UserError(f"{min(lost)}: its overlay would replace it; choose another --out")


def _read_ahead(files: Sequence[Path], options: PredictOptions, pool: ThreadPoolExecutor) -> Iterator[list[_ImageFile]]:
    """Yields the files in batches; while one is used, the next is read."""
    numbered = list(enumerate(files, start=1))
    starts = range(0, len(files), options.batch_size)

    def submit(start: int) -> list[Future[_ImageFile]]:
        chosen = numbered[start : start + options.batch_size]
        return [pool.submit(_read, image_id, path, options) for image_id, path in chosen]

    ahead = submit(0)
    for start in starts:
        current, ahead = ahead, submit(start + options.batch_size)
        yield [future.result() for future in current]


def _read(image_id: int, path: Path, options: PredictOptions) -> _ImageFile:
    try:
        image = read_image(path, upright=True)
    except UserError as error:
        return _ImageFile(image_id, path, message=str(error))
    original_hw = (image.shape[1], image.shape[2])
    geometry = EvalTransform(short_side=options.short_side, long_side=options.long_side)(original_hw, 0)
    return _ImageFile(
        image_id,
        path,
        original_hw,
        input=geometry.image(image),
        picture=None if options.drawn_score is None else prepare_drawing(image.permute(1, 2, 0).numpy()),
    )
