"""Predicting image files: read ahead in threads, predict in batches, draw in threads, write results as they come.

Memory does not grow with the number of detections nor, but for one image being read, with the size of the images:
originals are let go as soon as they are resized, masks become RLE one at a time, results go to disk. Images that are
cut into tiles are kept as they were decoded, one and the next.
"""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from semiseg.config.model import RefinerName
from semiseg.config.read import read_json
from semiseg.data.images import read_image
from semiseg.data.reading import Greys, Reading
from semiseg.data.transforms import Geometry, Resize
from semiseg.engine.checkpoint import ModelInfo, write_json
from semiseg.engine.predict import LoadedModel, coco_results, each_image
from semiseg.engine.tiles import Tiling, find_in_tiles
from semiseg.errors import UserError
from semiseg.files import require_nothing_else, whole_file, write_bytes
from semiseg.overlays import Drawn, draw_detections, prepare_drawing, written_name

RESULTS_NAME, IMAGES_NAME, OVERLAYS_NAME = "results.json", "images.json", "overlays"
JPEG_QUALITY = 92
LONGEST_NAME = 200  # bytes of a file's name, with room for a suffix and for the mark of a temporary file


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How files are predicted."""

    short_side: int  # of the resize rule, in pixels
    long_side: int
    score_threshold: float  # for class probability x centreness; a detection's score is the square root of that
    drawn_score: float | None  # detections with at least this score are drawn; None = no overlays
    batch_size: int  # images, or tiles, predicted at a time; those of equal padded size share a forward
    workers: int  # threads that read and draw
    stretch: bool = False  # height and width both become the short side
    refine: RefinerName = "none"  # what makes masks of probabilities, by the colours of the image
    value_range: tuple[float, float] | None = None  # of `Reading`
    labels: Literal["full", "score", "none"] = "full"  # of drawings: class and score, the score, or nothing
    tiling: Tiling | None = None  # of images that are larger than a tile, in pixels of the original

    def geometry(self, size_hw: tuple[int, int]) -> Geometry:
        """How an image becomes what the network sees."""
        return Resize([self.short_side], self.long_side, stretch=self.stretch)(size_hw, 0)

    def resized_tile(self, tile: Tensor) -> Tensor:
        """A tile (3, h, w) at the scale of a full one, which is resized as an image of its size is."""
        assert self.tiling is not None
        side, size_hw = self.tiling.side, (tile.shape[1], tile.shape[2])
        full = self.geometry((side, side)).input_hw[0]
        height, width = (max((2 * length * full + side) // (2 * side), 1) for length in size_hw)
        return Geometry(size_hw, (height, width), flipped=False).image(tile)


@dataclass
class Outcome:
    """The images that were predicted, and how many detections, drawn ones of these, and files that cannot be read."""

    images: list[dict[str, Any]] = field(default_factory=list)  # COCO's entries
    detections: int = 0
    drawn: int = 0
    unreadable: int = 0
    greys: dict[str, Greys] = field(default_factory=dict)  # of the images with more than 8 bits a channel, by name


@dataclass(frozen=True)
class _ImageFile:
    """One file's image, ready for the network and, unless there are no overlays, for drawing."""

    entry: dict[str, Any]  # COCO's, of the original
    original_hw: tuple[int, int]
    input: Tensor  # (3, H, W) uint8, not resized if it is to be cut into tiles
    tiled: bool
    greys: list[Greys]  # of an image with more than 8 bits
    picture: Image.Image | None
    original: Tensor | None  # (3, H, W) uint8, where masks are refined by its colours


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

    An image's id is its index in the list of files, from 1. EXIF orientation is applied: boxes and masks are in the
    frame of the upright image, whose size `images.json` states. Files of the same names in `out` are replaced; at a
    KeyboardInterrupt, too, they are written for the images done so far. `report` is given a sentence for each file that
    cannot be read. A UserError if the folder holds one of the images, or what no prediction wrote, unless it has its
    own name beside the files of one.
    """
    _prepare_folder(out, files)
    overlays = {} if options.drawn_score is None else dict(enumerate(overlay_paths(files, out / OVERLAYS_NAME), 1))
    bar = tqdm(total=len(files), desc="predicting", unit="image", disable=not progress, file=sys.stderr)
    outcome, drawings, stopped = Outcome(), list[Future[None]](), False
    with bar, whole_file(out / RESULTS_NAME) as file, ThreadPoolExecutor(options.workers) as pool:
        try:
            for batch in _read_ahead(files, options, pool):
                readable = []
                for reading in batch:
                    try:
                        readable.append(reading.result())
                    except UserError as error:
                        outcome.unreadable += 1
                        with tqdm.external_write_mode(file=sys.stderr):
                            report(str(error))
                batch_results = _predict(model, readable, options)
                wait(drawings)  # those of a batch are made while the next one is predicted
                for item, results in zip(readable, batch_results, strict=True):
                    for result in results:  # to disk as they come, one a line
                        file.write((",\n" if outcome.detections else "[\n").encode() + json.dumps(result).encode())
                        outcome.detections += 1
                    outcome.images.append(item.entry)
                    outcome.greys.update((item.entry["file_name"], each) for each in item.greys)
                    if options.drawn_score is not None:
                        visible = [result for result in results if result["score"] >= options.drawn_score]
                        outcome.drawn += len(visible)
                        overlay = overlays[item.entry["id"]]
                        drawings.append(pool.submit(_draw, item, visible, model.info, overlay, options.labels))
                bar.update(len(batch))
        except KeyboardInterrupt:
            stopped = True
        for drawing in drawings:
            drawing.result()  # raises what stopped it
        file.write(b"\n]\n" if outcome.detections else b"[]\n")
        file.flush()
        classes = zip(model.info.category_ids, model.info.class_names, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in classes]
        write_json(out / IMAGES_NAME, {"images": outcome.images, "annotations": [], "categories": categories})
    if stopped:
        raise KeyboardInterrupt(
            f"stopped after {len(outcome.images)} of {len(files)} images, whose results are in {out}"
        )
    return outcome


def _prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Removes the drawings of a prediction before; refuses a folder in which something else would be lost."""
    drawings = (out / OVERLAYS_NAME).resolve()
    for path in files:
        if path.resolve().parent == out.resolve() or drawings in path.resolve().parents:
            raise UserError(f"{out}: holds {path}, which is to be predicted; give another folder as --out")
    present = [out / name for name in (RESULTS_NAME, IMAGES_NAME) if (out / name).exists()]
    if not present:  # a killed prediction may have left drawings alone
        require_nothing_else(out, writer="prediction", known={OVERLAYS_NAME})
        return
    with suppress(UserError):
        values = read_json(out / IMAGES_NAME)
        if values.get("annotations") == [] and {"images", "categories"} <= values.keys():
            for drawing in drawings.rglob("*.jpg"):
                drawing.unlink()
            return
    raise UserError(f"{present[0]}: is not of a prediction, and would be lost; give another folder as --out")


def _read_ahead(
    files: Sequence[Path], options: PredictOptions, pool: ThreadPoolExecutor
) -> Iterator[list[Future[_ImageFile]]]:
    """Yields the files in batches, one by one where tiles are cut; while one is used, the next is read."""
    ahead: list[Future[_ImageFile]] = []
    size = options.batch_size if options.tiling is None else 1
    for start in range(0, len(files) + size, size):
        batch = enumerate(files[start : start + size], start=start + 1)
        current, ahead = ahead, [pool.submit(_read, image_id, path, options) for image_id, path in batch]
        if current:
            yield current


def _read(image_id: int, path: Path, options: PredictOptions) -> _ImageFile:
    greys: list[Greys] = []
    image = read_image(path, reading=Reading(options.value_range, upright=True), seen=greys.append)
    height, width = image.shape[1:]
    tiled = options.tiling is not None and not options.tiling.fits((height, width))
    picture = None if options.drawn_score is None else prepare_drawing(image.permute(1, 2, 0).numpy())
    # Names that are not UTF-8 stay readable in the JSON, if not openable.
    name = os.fsencode(path.as_posix()).decode("utf-8", errors="backslashreplace")
    entry = {"id": image_id, "file_name": name, "width": width, "height": height}
    original = image if options.refine != "none" else None
    shown = image if tiled else options.geometry((height, width)).image(image)
    return _ImageFile(entry, (height, width), shown, tiled, greys, picture, original)


def _predict(model: LoadedModel, batch: Sequence[_ImageFile], options: PredictOptions) -> list[list[dict[str, Any]]]:
    """Each image's detections as COCO results."""
    ids, category_ids = [item.entry["id"] for item in batch], model.info.category_ids
    limits = model.info.inference.model_copy(
        update={"score_threshold": options.score_threshold, "refine": options.refine}
    )
    if options.tiling is not None and any(item.tiled for item in batch):
        found = (
            find_in_tiles(
                model.network,
                item.input,
                tiling=options.tiling,
                limits=limits,
                resized=options.resized_tile,
                batch_size=options.batch_size,
            )
            for item in batch
        )
        each = zip(found, ids, strict=True)
        return [coco_results(one, image_id=image_id, category_ids=category_ids) for one, image_id in each]
    originals = [item.original for item in batch if item.original is not None]  # of all or of none
    return each_image(
        model.network,
        [item.input for item in batch],
        lambda detections: coco_results(detections, image_id=ids[detections.number], category_ids=category_ids),
        output_sizes=[item.original_hw for item in batch],
        limits=limits,
        originals=originals.__getitem__ if originals else None,
    )


def _draw(item: _ImageFile, results: Sequence[dict[str, Any]], info: ModelInfo, overlay: Path, labels: str) -> None:
    assert item.picture is not None
    names = dict(zip(info.category_ids, written_names(info), strict=True))
    drawn = []
    for result in results:
        name, score = names[result["category_id"]], f"{result['score']:.2f}"
        text = {"full": f"{name} {score}", "score": score, "none": ""}[labels]
        drawn.append(Drawn(result["bbox"], result["segmentation"], text))
    content = io.BytesIO()
    picture = draw_detections(item.picture, item.original_hw, drawn)
    picture.save(content, format="JPEG", quality=JPEG_QUALITY, subsampling=0)  # full colour: text stays sharp
    write_bytes(overlay, content.getvalue())


def written_names(info: ModelInfo) -> list[str]:
    """Class names as overlays show them."""
    return list(map(written_name, info.class_names, info.category_ids))


def overlay_paths(files: Sequence[Path], folder: Path) -> list[Path]:
    """Each file's overlay, different for all: its path from the files' common folder, `photo.jpg` for photo.png.

    Where two are alike (photo.png beside photo.tif) or one is too long, all are numbers.
    """
    paths = [Path(os.path.abspath(path)) for path in files]
    common = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(common).with_suffix("").as_posix() for path in paths]
    # Different also for file systems that ignore case and forms of accents, and not too long for any.
    alike = {unicodedata.normalize("NFC", name).casefold() for name in names}
    if len(alike) < len(names) or any(len(os.fsencode(Path(name).name)) > LONGEST_NAME for name in names):
        names = [f"{number:06d}" for number in range(1, len(files) + 1)]
    return [folder / f"{name}.jpg" for name in names]
