"""`semiseg data`: check annotations, draw the embedded data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semiseg.files import require_folder


def check(
    annotations: Annotated[Path, typer.Argument(help="COCO instances json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, to check these too.")] = None,
) -> None:
    """List everything that is wrong with a data set.

    Says before any training what is an error and what would be dropped. Exit code 2 if there are errors.

    Example: semiseg data check data/coco/annotations/instances_val2017.json --images data/coco/val2017
    """
    from semiseg.data.check import check_annotations

    report = check_annotations(annotations, images)
    typer.echo(report.render())
    if report.errors:
        raise typer.Exit(2)


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
