"""`semiseg split`: list, show and make class splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from semiseg.commands.known_classes import classes_of
from semiseg.config.read import parse_config, read_toml
from semiseg.errors import UserError
from semiseg.files import require_folder, settle
from semiseg.project import available, find
from semiseg.splits import ClassSplit, SplitFile, draw_seen, load_split, make_split, normalise, write_split

SplitName = Annotated[str, typer.Argument(metavar="SPLIT", help="Name or path of a class split.")]


def list_splits() -> None:
    """List the splits of this project and the shipped ones.

    Example: semiseg split list
    """
    from semiseg.report.tables import text_table

    lines = []
    for name in available("splits"):
        path = find("splits", name)
        values = read_toml(path)
        listed = [f"{len(values[side])} {side}" for side in ("seen", "unseen") if isinstance(values.get(side), list)]
        listed += ["mask fractions"] if "fraction" in values else []
        # In a source tree nothing tells the shipped files from a user's own: there, and in a project, the path.
        file = "shipped" if "_shipped" in path.parts else str(path)
        lines.append([name, str(values.get("dataset", "")), ", ".join(listed), file])
    typer.echo(text_table(("split", "data set", "lists", "file"), lines), nl=False)


def show(
    split: SplitName,
    annotations: Annotated[Path | None, typer.Argument(help="COCO json that the split must fit.")] = None,
) -> None:
    """Show which classes are seen and unseen.

    With an annotation file, which the split must fit, also a table of instances per class.

    Example: semiseg split show coco_voc20_seen data/coco/annotations/instances_val2017.json
    """
    path = find("splits", split)
    try:
        classes = classes_of(read_toml(path).get("dataset"), annotations)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    loaded = load_split(split, classes)
    typer.echo(_describe(loaded))
    if annotations is not None:
        typer.echo(_counts(loaded, annotations))


def make(
    name: Annotated[str, typer.Argument(help="Name of the split; written to splits/NAME.toml.")],
    dataset: Annotated[str | None, typer.Option(help="'coco', 'shapes', 'voc', or a word of your own.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO json with the classes, for other data sets.")] = None,
    seen: Annotated[
        list[str] | None, typer.Option(help="Seen classes, comma-separated, or how many to draw. Repeatable.")
    ] = None,
    unseen: Annotated[list[str] | None, typer.Option(help="Unseen classes, comma-separated. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of classes, and of instances under a fraction.")] = 0,
    fraction: Annotated[
        list[str] | None,
        typer.Option(help="Share of instances that keep their mask: 0.3 for all, or CLASS=0.3. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write instead.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Make a class split.

    From names, drawn by a seed, or with a share of the masks of each class.

    Examples:

    semiseg split make pets --dataset coco --seen "cat, dog"

    semiseg split make drawn20 --dataset coco --seen 20 --seed 3

    semiseg split make tenth --dataset coco --fraction 0.1 --fraction person=0.01
    """
    if out is None and (not name or name.startswith(".") or Path(name).name != name):
        raise UserError(
            f"{name!r}: no name for a split: expected one without '/' or a dot in front; --out takes a path"
        )
    path = out or Path("splits") / f"{name}.toml"
    settle(path.parent)
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; '--force' replaces it")
    require_folder(path.absolute().parent)
    classes = classes_of(dataset, annotations)
    count = int(seen[0]) if seen and len(seen) == 1 and seen[0].strip().isdecimal() else None
    if count is not None and unseen:
        raise UserError("--seen with a number draws the seen classes; leave out --unseen")
    if not seen and not unseen and not fraction:
        raise UserError("give --seen or --unseen (names, or --seen a number to draw), or --fraction")
    values = {
        "name": path.stem,
        "dataset": dataset,
        "seen": _names(seen, classes),
        "unseen": _names(unseen, classes),
        "fraction": {"seed": seed, **_fractions(fraction or [])},
    }
    if count is not None:
        values |= {"seen": draw_seen(classes, count=count, seed=seed), "drawn": {"seed": seed, "seen": count}}
    split = make_split(parse_config(SplitFile, values, where=f"split {path.stem!r}"), classes)
    write_split(split, path)
    typer.echo(_describe(split))
    typer.echo(f"written to {path}")


def _describe(split: ClassSplit) -> str:
    lines = [f"{split.name}: {len(split.seen)} seen, {len(split.unseen)} unseen classes (digest {split.digest()})"]
    lines.append(f"seen (masks): {', '.join(split.seen)}")
    if split.unseen:
        lines.append(f"unseen (boxes only): {', '.join(split.unseen)}")
    usual, others = split.usual_fraction()
    if usual < 1.0 or others:
        exceptions = ", ".join(f"{name} {share:g}" for name, share in others.items())
        share = f"all {usual:g}, except {exceptions}" if others else f"all {usual:g}"
        lines.append(f"share of masks kept (seed {split.seed}): {share}")
    return "\n".join(lines)


def _counts(split: ClassSplit, annotations: Path) -> str:
    """How many instances of each class a training under the split sees, and seen classes without a single mask."""
    from semiseg.data.coco import image_records, read_coco
    from semiseg.report.tables import text_table

    coco = read_coco(annotations)
    counts: Counter[tuple[str, str]] = Counter()
    for record in image_records(coco):
        for item in record["objects"]:
            name = coco.class_names[item["label"]]
            with_mask = item["has_mask"] and split.keeps_mask(name, item["annotation_id"])
            kind = "crowd" if item["is_crowd"] else "with mask" if with_mask else "box only"
            counts[name, kind] += 1
    rows = [(name, "seen", [name]) for name in split.seen] + [(name, "unseen", [name]) for name in split.unseen]
    lines = []
    for name, side, classes in (*rows, ("all", "", coco.class_names)):
        masks, boxes, crowd = (sum(counts[c, kind] for c in classes) for kind in ("with mask", "box only", "crowd"))
        lines.append([name, side, *map(str, (masks + boxes, masks, boxes, crowd))])
    table = text_table(("class", "side", "instances", "with mask", "box only", "crowd"), lines)
    without = [name for name in split.seen if counts[name, "with mask"] == 0]
    return f"{table}seen, but without a single mask in {annotations}: {', '.join(without) or 'no class'}"


def _names(values: Sequence[str] | None, classes: Sequence[str]) -> list[str] | None:
    """Class names of an option: each value is a name, or several with commas between."""
    names = []
    for value in values or ():
        names += [value] if normalise(value) in classes else [part for part in value.split(",") if part.strip()]
    return names or None


def _fractions(values: Sequence[str]) -> dict[str, float]:
    """Class -> share of its masks, and "default" -> that of classes that are not named."""
    shares = {}
    for value in values:
        name, sign, share = value.rpartition("=")
        try:
            shares[name if sign else "default"] = float(share)
        except ValueError:
            raise UserError(f"--fraction {value!r}: expected a number from 0 to 1, or CLASS=number") from None
    return shares
