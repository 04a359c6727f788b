"""`semiseg data`: check annotations, draw the embedded data set, measure how hard box supervision is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semiseg.errors import UserError


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
    from semiseg.data.shapes import make_shapes

    make_shapes(out, images=images, image_size=size, seed=seed)
    typer.echo(f"{images} images in {out / 'images'}, their annotations in {out / 'annotations.json'}")


def difficulty(
    annotations: Annotated[Path, typer.Argument(help="COCO instances json, every instance with a mask.")],
    images: Annotated[Path, typer.Argument(help="Folder of the images.")],
    stride: Annotated[int, typer.Option(min=1, help="Of the mask grid, in pixels.")] = 4,
    size: Annotated[int, typer.Option(min=3, help="Side of the neighbourhood, in cells.")] = 3,
    dilation: Annotated[int, typer.Option(min=1, help="Distance between neighbours, in cells.")] = 2,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Similarity from which an edge counts. Repeatable.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Look at the first so many images only.")] = None,
) -> None:
    """Measure how hard box supervision is.

    How much the boxes and colours of a data set give away about its masks.

    Example: semiseg data difficulty annotations.json images --stride 2 --threshold 0 --threshold 0.3
    """
    from semiseg.commands.measure import measure

    if size % 2 == 0:
        raise UserError(f"--size {size}: expected an odd number, such as 3 or 5")
    wrong = [value for value in threshold or () if not 0 <= value <= 1]
    if wrong:
        raise UserError(f"--threshold {wrong[0]:g}: expected a number from 0 to 1")
    measured = measure(
        annotations,
        images,
        stride=stride,
        size=size,
        dilation=dilation,
        thresholds=sorted(threshold or [0.0, 0.1, 0.2, 0.3, 0.5]),
        max_images=max_images,
        progress=True,
    )
    typer.echo(measured.render())
