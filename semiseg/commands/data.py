"""`semiseg data`: check annotations, divide them, draw the embedded data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from semiseg.commands.train import Upright, ValueRange
from semiseg.errors import UserError
from semiseg.files import require_folder


def check(
    annotations: Annotated[Path, typer.Argument(help="COCO instances json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, to check these too.")] = None,
    value_range: ValueRange = None,
    upright: Upright = False,
) -> None:
    """List everything that is wrong with a data set.

    Says before any training what is an error and what would be dropped. Exit code 2 if there are errors.

    Example: semiseg data check data/coco/annotations/instances_val2017.json --images data/coco/val2017
    """
    from semiseg.data.check import check_annotations
    from semiseg.data.reading import Reading

    report = check_annotations(annotations, images, Reading(value_range, upright))
    typer.echo(report.render())
    if report.errors:
        raise typer.Exit(2)


def split(
    file: Annotated[Path, typer.Argument(help="COCO json.")],
    val: Annotated[float | None, typer.Option(help="Share of the images for validation. Default: 0.2.")] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Instead: so many pairs of files, each image in one validation file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    by_class: Annotated[bool, typer.Option("--by-class", help="That share of every class's objects, too.")] = False,
    group: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field of the images whose equal values stay in one file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new files. Default: that of FILE.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Divide one json into training and validation.

    By whole images, drawn by the seed. Writes NAME_train.json and NAME_val.json, or NAME_fold1_train.json and so on;
    the file itself stays.

    Examples:

    semiseg data split data/pets/annotations.json --val 0.2 --by-class

    semiseg data split data/pets/annotations.json --folds 5 --group patient
    """
    if val is not None and folds is not None:
        raise UserError("--val and --folds: give one of the two")
    share = 0.2 if val is None else val
    if not 0 < share < 1:
        raise UserError(f"--val {share:g}: allowed: a share above 0 and below 1")
    from semiseg.data.partition import divide
    from semiseg.files import write_text

    shares = [1 - share, share] if folds is None else [1 / folds] * folds
    pairs = divide(file, shares, seed=seed, by_class=by_class, group=group)
    folder = file.parent if out is None else out
    named = [("", pairs[1])] if folds is None else [(f"_fold{n}", pair) for n, pair in enumerate(pairs, start=1)]
    files = {
        folder / f"{file.stem}{middle}_{name}.json": content
        for middle, pair in named
        for name, content in zip(("train", "val"), pair, strict=True)
    }
    there = [path for path in files if path.exists()]
    if there and not force:
        raise UserError(f"{there[0]}: is there already; --force replaces it")
    for path, content in files.items():
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
        typer.echo(f"{path}: {len(content['images'])} images, {len(content['annotations'])} annotations")


def shapes(
    out: Annotated[Path, typer.Argument(help="New or empty folder for the data set.")],
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 4000,
    size: Annotated[int, typer.Option(min=32, help="Side of the square images, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Every image depends on the seed and its number alone.")] = 1,
) -> None:
    """Draw Shapes, the embedded data set, in COCO layout. Studies do this by themselves.

    Example: semiseg data shapes data/my_shapes --images 200 --seed 7
    """
    require_folder(out.absolute().parent)
    from semiseg.data.shapes import make_shapes

    make_shapes(out, images=images, image_size=size, seed=seed)
    typer.echo(f"{images} images in {out / 'images'}, their annotations in {out / 'annotations.json'}")
