"""`semiseg predict`: a model on image files."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from semiseg.commands.train import Progress, Refine, ValueRange
from semiseg.errors import UserError
from semiseg.files import require_folder, require_there

if TYPE_CHECKING:
    from semiseg.engine.predict_files import Outcome, PredictOptions
    from semiseg.engine.tiles import Tiling

# Endings by which a folder's images are known; a file that is named itself may have any.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tga",
)  # fmt: skip
DRAWN_SCORE = 0.4  # as in the pictures of the reports
Labels = Literal["full", "score", "none"]

Score = Annotated[
    float | None, typer.Option(min=0, max=1, help="Keep detections above this score. Default: the model's own limit.")
]
DrawnScore = Annotated[float, typer.Option(min=0, max=1, help="Draw those that have at least this score.")]
LabelsOption = Annotated[
    Labels,
    typer.Option(
        help="What stands beside a drawn object: its class and score, the score alone, or nothing. Where it would "
        "cover objects it is written smaller, and else left out."
    ),
]
ShortSide = Annotated[
    int | None, typer.Option(min=1, help="Shorter side in the network, in pixels. Default: the model's.")
]
LongSide = Annotated[
    int | None, typer.Option(min=1, help="Limit of the longer side. Default: the model's, in proportion.")
]
Tile = Annotated[
    int | None,
    typer.Option(
        min=32,
        help="Look at a larger image in square tiles of so many of its pixels, each resized as an image of that size "
        "is, and put together what the tiles show: for small objects in large images. Default: the image as a whole.",
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Pixels that neighbouring tiles share. At least as many as an object is wide, so that a tile sees it "
        "whole. Default: an eighth of the tile.",
    ),
]


def predict(
    model: Annotated[Path, typer.Argument(help="Model folder, or folder of a finished run.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders of images, or quoted patterns.")],
    out: Annotated[Path, typer.Option(help="Folder for the overlays and the results.")],
    score: Score = None,
    drawn_score: DrawnScore = DRAWN_SCORE,
    overlays: Annotated[bool, typer.Option(help="Draw the detections over the images.")] = True,
    labels: LabelsOption = "full",
    short_side: ShortSide = None,
    long_side: LongSide = None,
    tile: Tile = None,
    overlap: Overlap = None,
    batch: Annotated[int, typer.Option(min=1, help="Images, or tiles, at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")] = None,
    refine: Refine = None,
    value_range: ValueRange = None,
    progress: Progress = None,
) -> None:
    """Predict images.

    DIR/overlays/ shows masks, boxes, classes and scores; DIR/results.json has all detections in COCO's results format,
    DIR/images.json the images and categories that their ids mean. EXIF orientation is applied. Files that cannot be
    read are named and left out; the exit code is then 1.

    Examples:

    semiseg predict runs/mine photo.jpg --out predictions

    semiseg predict runs/mine/model photos 'more/**/*.png' --out predictions --drawn-score 0.6

    semiseg predict runs/mine aerial.tif --out predictions --tile 1024 --overlap 128
    """
    began, tiling, files = time.perf_counter(), _tiling(tile, overlap), _inputs(model, images, out)
    from semiseg.engine.logs import shows_bars
    from semiseg.engine.predict import load_model
    from semiseg.engine.predict_files import PredictOptions, predict_files

    trained = (loaded := load_model(model, device=device)).info.inference
    config, shorter = loaded.info.config, short_side or trained.short_side
    options = PredictOptions(
        short_side=shorter,
        long_side=long_side or round(trained.long_side * shorter / trained.short_side),
        stretch=trained.stretch,
        score_threshold=trained.score_threshold if score is None else config.threshold_of(score, trained.decoding),
        drawn_score=drawn_score if overlays else None,
        batch_size=batch,
        workers=min(os.cpu_count() or 1, 4),
        refine=refine or trained.refine,
        value_range=value_range or loaded.info.value_range,
        tiling=tiling,
        labels=labels,
    )
    outcome = predict_files(loaded, files, out=out, options=options, progress=shows_bars(progress), report=_report)
    done = f"{_counted(len(outcome.images), 'image')}, {_counted(outcome.detections, 'detection')}"
    typer.echo(f"{done}, {time.perf_counter() - began:.1f} s; written to {out}{_drawn(outcome, options)}")
    _report_losses(outcome)


def _report_losses(outcome: Outcome) -> None:
    """Says what of the files is not in the results; exits with 1 if any could not be read."""
    from semiseg.data.reading import describe_few_greys

    if (lost := describe_few_greys(outcome.greys, setting="--value-range {low} {high}")) is not None:
        _report(lost)
    if outcome.unreadable:
        _report(f"{_counted(outcome.unreadable, 'file')} could not be read")
        raise typer.Exit(1)


def _inputs(model: Path, images: list[str], out: Path) -> list[Path]:
    require_folder(out)
    require_there(model)
    return find_images(images)


def _tiling(tile: int | None, overlap: int | None) -> Tiling | None:
    if tile is None:
        if overlap is not None:
            raise UserError("--overlap says what tiles share; give their size with --tile, or leave it out")
        return None
    if overlap is not None and overlap >= tile:
        raise UserError(f"--overlap {overlap}: tiles of {tile} pixels can share 0 to {tile - 1}")
    from semiseg.engine.tiles import Tiling

    return Tiling(tile, tile // 8 if overlap is None else overlap)


def _drawn(outcome: Outcome, options: PredictOptions) -> str:
    if options.drawn_score is None:
        return ""
    return f"; of these {outcome.drawn} reach --drawn-score {options.drawn_score:g} and are drawn"


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The files that the arguments mean, each once, in the order of the arguments, those of one sorted by name.

    A file is taken whatever it is called; of a folder the files with an image's ending, not those of folders in it; a
    pattern (`*`, `?`, `[...]`, `**`) stands for all that it matches. An argument that means nothing is a UserError.
    """
    files: dict[str, Path] = {}
    for argument in arguments:
        path = Path(argument)
        matched = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
        if not matched:
            reason = "no file matches this pattern" if glob.has_magic(argument) else "no such image or folder"
            raise UserError(f"{argument}: {reason}")
        meant = [file for item in matched for file in (_images_in(item) if item.is_dir() else [item])]
        if not meant:
            raise UserError(f"{argument}: holds no images; known are files that end in {', '.join(IMAGE_SUFFIXES)}")
        for file in meant:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def _images_in(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    return sorted(path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES)


def _report(message: str) -> None:
    typer.echo(f"semiseg: {message}", err=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
