"""`semiseg pseudo`: masks for boxes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from semiseg.commands.train import CrowdMeaning, Progress, Upright, ValueRange
from semiseg.config.run import Maker
from semiseg.errors import UserError, UserNotice
from semiseg.files import require_folder, require_there

if TYPE_CHECKING:
    from semiseg.data.reading import Reading
    from semiseg.data.table import Table


def pseudo(
    annotations: Annotated[Path, typer.Argument(help="COCO json; of its annotations only the boxes are looked at.")],
    images: Annotated[Path, typer.Argument(help="Folder of its images.")],
    out: Annotated[Path, typer.Option(help="COCO json to write, for supervision.pseudo.")],
    maker: Annotated[
        Literal["grabcut", "crf", "model"],
        typer.Option(help="What makes the masks: GrabCut or a dense CRF of each box, or a trained model."),
    ],
    model: Annotated[Path | None, typer.Option(help="Of --maker model: its folder, or that of a finished run.")] = None,
    refine: Annotated[
        Maker | None, typer.Option(help="Of --maker model: make its masks follow the colours, too.")
    ] = None,
    agree: Annotated[
        bool,
        typer.Option("--agree", help="Of --maker model: lower the weight of masks that GrabCut does not agree with."),
    ] = False,
    crowds: CrowdMeaning = None,
    value_range: ValueRange = None,
    upright: Upright = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Images at a time. Default: one for each core.")] = None,
    device: Annotated[str | None, typer.Option(help="Of --maker model: cpu, cuda, ... Default: a GPU if any.")] = None,
    progress: Progress = None,
) -> None:
    """Make masks for the boxes of a data set.

    Train on them with --set supervision.pseudo=FILE: instances that have a box alone then learn from these masks. No
    mask of the annotations is looked at. Can be interrupted at any time; the same command continues.

    Examples:

    semiseg pseudo data/mine/train.json data/mine/train --maker grabcut --out data/mine/pseudo.json

    semiseg pseudo data/mine/train.json data/mine/train --maker model --model runs/mine --out data/mine/pseudo.json
    """
    if (maker == "model") != (model is not None) or (maker != "model" and (refine or agree)):
        raise UserError("--model, --refine and --agree go with --maker model, which needs --model")
    require_folder(out.absolute().parent)
    if model is not None:
        require_there(model)
    from semiseg.data.reading import Reading
    from semiseg.engine.logs import shows_bars
    from semiseg.engine.predict import LoadedModel, load_model
    from semiseg.engine.pseudo import make_pseudo

    chosen: Maker | LoadedModel
    if maker == "model":
        assert model is not None
        chosen = load_model(model, device=device)
        value_range = value_range or chosen.info.value_range
    else:
        chosen = maker
    table = _table(annotations, images, Reading(value_range, upright), crowds or "ignore")
    counts = make_pseudo(
        table, out, maker=chosen, refine=refine, agree=agree, workers=workers, progress=shows_bars(progress)
    )
    typer.echo(f"{out}: {', '.join(f'{count} {source}' for source, count in sorted(counts.items()))}")


def _table(annotations: Path, images: Path, reading: Reading, crowds: Literal["ignore", "objects"]) -> Table:
    """The table of the boxes; what is to be known of it is said."""
    from semiseg.data.sources import tables_folder
    from semiseg.data.table import load_table
    from semiseg.engine.run import warn_of_images

    cache = tables_folder(annotations.parent)
    table = load_table(annotations, images, cache=cache, reading=reading, crowds=crowds)
    for notice in table.notices():
        warnings.warn(notice, UserNotice, stacklevel=3)
    warn_of_images(table)
    return table
