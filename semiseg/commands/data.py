"""`semiseg data`: check annotations, draw the embedded data set, measure what colours give away about masks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from semiseg.errors import UserError
from semiseg.files import require_folder, write_text


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


def affinity(
    annotations: Annotated[Path, typer.Argument(help="COCO instances json with masks.")],
    images: Annotated[Path, typer.Argument(help="Folder of the images.")],
    stride: Annotated[int, typer.Option(min=1, help="Of the mask grid, in pixels.")] = 4,
    size: Annotated[
        list[int] | None, typer.Option(help="Side of the neighbourhood, in cells. Repeatable. Default: 3 and 5.")
    ] = None,
    dilation: Annotated[
        list[int] | None, typer.Option(help="Distance between neighbours, in cells. Repeatable. Default: 1 and 2.")
    ] = None,
    thresholds: Annotated[
        list[float] | None, typer.Option("--threshold", help="Similarity from which an edge counts. Repeatable.")
    ] = None,
    short_side: Annotated[
        int, typer.Option(min=0, help="Resize images as for the network (800 for COCO). 0 = stored size.")
    ] = 0,
    long_side: Annotated[int, typer.Option(min=1, help="Upper limit of the longer side, with --short-side.")] = 1333,
    bottom_rows: Annotated[
        int, typer.Option(min=0, help="Rows at the bottom without affinity, as in training (10 for COCO).")
    ] = 0,
    max_images: Annotated[int | None, typer.Option(min=1, help="Look at the first so many images only.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to this JSON file too.")
    ] = None,
) -> None:
    """Measure how many edges of the pairwise loss are truly positive.

    For every neighbourhood and threshold: the share of edges whose colours are similar enough to count, and the share
    of these whose two cells have the same label in the instance's mask.

    Example: semiseg data affinity data/coco/annotations/instances_val2017.json data/coco/val2017 --short-side 800
    --bottom-rows 10 --max-images 500
    """
    sizes, dilations, thresholds = size or [3, 5], dilation or [1, 2], thresholds or [0.0, 0.1, 0.2, 0.3]
    for side in sizes:
        _require(side >= 3 and side % 2 == 1, f"--size {side}: expected an odd number, such as 3 or 5")
    for distance in dilations:
        _require(distance >= 1, f"--dilation {distance}: expected a positive number of cells")
    for threshold in thresholds:
        _require(0 <= threshold <= 1, f"--threshold {threshold:g}: expected a number from 0 to 1")
    if json_file is not None:
        require_folder(json_file.parent)
    from semiseg.engine.edges import Neighbourhood, measure_edges

    measured = measure_edges(
        annotations,
        images,
        neighbourhoods=[Neighbourhood(*pair) for pair in product(sorted(set(sizes)), sorted(set(dilations)))],
        thresholds=sorted(set(thresholds)),
        stride=stride,
        short_side=short_side,
        long_side=long_side,
        bottom_rows=bottom_rows,
        max_images=max_images,
        progress=True,
    )
    typer.echo(measured.render())
    if json_file is not None:
        write_text(json_file, json.dumps(measured.to_dict(), indent=1) + "\n")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
