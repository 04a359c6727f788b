"""`semiseg train` and `semiseg evaluate`: a single run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from semiseg.config import RunConfig, load_run_config, parse_run
from semiseg.config.former import with_present_keys
from semiseg.config.model import RefinerName
from semiseg.config.read import read_json
from semiseg.errors import UserError
from semiseg.files import require_folder, require_there, write_text
from semiseg.project import find
from semiseg.results import MAX_DETS, ap_in_words, limit_in_words

if TYPE_CHECKING:
    from semiseg.evaluation.at_score import AtScore
    from semiseg.evaluation.coco_metrics import Metrics

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a value of the configuration. Repeatable.")
]
Progress = Annotated[bool | None, typer.Option(help="Show progress bars. Default: on a terminal.")]
Refine = Annotated[
    RefinerName | None,
    typer.Option(help="Make the masks by the colours of the image, too. Default: as the model was configured."),
]

CrowdMeaning = Annotated[
    Literal["ignore", "objects"] | None,
    typer.Option(
        "--crowds",
        help="What annotations with iscrowd 1 are: left out as regions of many objects (ignore), or objects as all "
        "others. Default: as the run has it, else ignore.",
    ),
]

Annotations = Annotated[
    Path | None, typer.Option(help="COCO json to evaluate on. Default: the run's own validation data.")
]
SplitGroups = Annotated[
    str | None, typer.Option(metavar="SPLIT", help="Also say the numbers of this split's unseen and seen classes.")
]
Fast = Annotated[bool, typer.Option("--fast", help="Match by hotcoco, if installed: the same numbers.")]
MaxDets = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Measure the best so many detections of each image and class, COCO's maxDets. "
        "Default: 100, as COCO does, or as many as the model keeps of an image if these are more.",
    ),
]


def _black_below_white(values: tuple[float, float] | None) -> tuple[float, float] | None:
    from semiseg.data.reading import wrong_range

    if values is not None and (wrong := wrong_range(values)):
        raise typer.BadParameter(wrong)
    return values


def _smaller_first(areas: tuple[float, float] | None) -> tuple[float, float] | None:
    if areas is not None and not 0 < areas[0] < areas[1] < float("inf"):
        raise typer.BadParameter(f"[{areas[0]:g}, {areas[1]:g}]: allowed: two areas, the smaller one first")
    return areas


ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        callback=_black_below_white,
        help="Stored values that are black and white, of images with more than 8 bits. Default: the run's, or the "
        "model's, or 0 and 65535.",
    ),
]
AreaLimits = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="SMALL LARGE",
        callback=_smaller_first,
        help="Areas in pixels up to which objects are small (APs) and from which large (APl). Default: the run's, or "
        "COCO's 1024 and 9216.",
    ),
]
AtLeast = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Also say precision, recall, F1 and confusions of detections of at least this score."
    ),
]
Upright = Annotated[bool, typer.Option("--upright", help="Apply EXIF orientations: boxes are of upright images.")]


def train(
    config: Annotated[Path | None, typer.Argument(help="Configuration of the run, TOML or JSON.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or begin one there.")] = False,
    replay: Annotated[
        Path | None, typer.Option(help="Run a step again that was not finite, from the file it left.")
    ] = None,
    progress: Progress = None,
) -> None:
    """Train and evaluate a single run.

    The numbers of its validation images are written into its folder. Without a terminal it prints a line a minute.

    On several GPUs: accelerate launch --config_file experiments/launch/eight_gpus.yaml -m semiseg train ...

    Examples:

    semiseg train run.toml --out runs/mine --set optim.steps=200

    semiseg train run.toml --out runs/mine --resume

    semiseg train --replay runs/mine/nonfinite_step_00000120_rank0.pt
    """
    if replay is not None:
        if config is not None or out is not None:
            raise UserError("--replay FILE holds the whole step; leave out CONFIG and --out")
        from semiseg.engine.replay import replay_step

        typer.echo(replay_step(replay))
        return
    if config is None or out is None:
        raise UserError("train needs CONFIG and --out (or --replay FILE); see 'semiseg train --help'")
    values = read_config(config, overrides or [])
    from semiseg.engine.run import execute_run
    from semiseg.evaluation.coco_metrics import describe_ignored

    typed = shlex.join(["semiseg", *sys.argv[1:]])
    result = execute_run(values, out=out, resume=resume, progress=progress, command=typed)
    if result:
        measured = ap_in_words(result["metrics"])
        if measured and result["metrics"].get("segm") is None:
            measured += ", mask AP not measured: objects without a mask"
        if ignored := describe_ignored(result["metrics"]):
            measured += f" ({ignored})"
        if limit := limit_in_words(result["metrics"].get("max_dets", MAX_DETS)):
            measured += f" ({limit})"
        typer.echo(f"{measured or 'no ground truth to measure AP'} after {result['steps']} steps; written to {out}")


def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a run, or a model folder.")] = None,
    annotations: Annotations = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, with --annotations.")] = None,
    split: SplitGroups = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers, per class too, to this JSON file.")] = None,
    detections: Annotated[Path | None, typer.Option(help="Write the detections as COCO results.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Measure these COCO results, such as a run's detections.json, and no network.")
    ] = None,
    refine: Refine = None,
    crowds: CrowdMeaning = None,
    area_limits: AreaLimits = None,
    at_score: AtLeast = None,
    value_range: ValueRange = None,
    upright: Upright = False,
    fast: Fast = False,
    max_dets: MaxDets = None,
    progress: Progress = None,
) -> None:
    """Evaluate a model or a finished run.

    Box and mask AP by the official COCO evaluation, on all, seen and unseen classes. A json without annotations, such
    as COCO's image_info_test-dev2017.json, is only predicted: upload what --detections writes.

    Examples:

    semiseg evaluate runs/mine --split shapes_few_seen

    semiseg evaluate --results detections.json --annotations val.json --images val --refine grabcut
    """
    if split is not None:
        find("splits", split)  # a misspelt name is said before the work, not after it
    _require_files(folder, annotations, images, results, written=(out, detections))
    from semiseg.data.reading import Reading
    from semiseg.engine.logs import shows_bars
    from semiseg.engine.run import evaluate_run

    metrics = evaluate_run(
        folder,
        annotations=annotations,
        images=images,
        results=results,
        refine=refine,
        detections=detections,
        crowds=crowds,
        fast=fast,
        progress=shows_bars(progress),
        reading=Reading(value_range, upright),
        area_limits=area_limits,
        score=at_score,
        max_dets=max_dets,
    )
    if metrics is None:
        return
    _say_numbers(metrics, split, detections)
    if out is not None:
        numbers = metrics.to_dict() | ({} if refine is None else {"refine": refine})
        write_text(out, json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")


def _say_numbers(metrics: Metrics, split: str | None, detections: Path | None) -> None:
    typer.echo(_metrics_table(metrics, split), nl=False)
    if limit := limit_in_words(metrics.max_dets):
        typer.echo(limit)
    if metrics.at_score is not None:
        typer.echo(_counts_table(metrics.at_score), nl=False)
    if not any(metrics.instances.values()):
        written = f"; the detections are in {detections}" if detections is not None else ""
        typer.echo(f"no ground truth to measure AP on {metrics.images} images{written}")


def _counts_table(counts: AtScore) -> str:
    """Precision, recall, F1 and the most frequent confusions of detections of at least a score."""
    from semiseg.report.tables import text_table

    of = "masks" if counts.of == "segm" else "boxes"
    lines = []
    for name in (None, *counts.objects):
        numbers = ["–" if value is None else f"{value:.1f}" for value in counts.percent(name)]  # noqa: RUF001
        lines.append([name or "all", *map(str, counts.counts(name)), *numbers])
    head = (f"score >= {counts.score:g}", "objects", "detections", "found", "precision", "recall", "F1")
    text = (
        f"\nfound: by a detection of the class, {of} with an IoU of at least {counts.iou:g}\n{text_table(head, lines)}"
    )
    pairs = [(number, of, other) for of, row in counts.confused.items() for other, number in row.items()]
    if pairs:
        shown = [f"{of} as {other} {number}" for number, of, other in sorted(pairs, key=lambda pair: -pair[0])[:10]]
        more = f", and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
        text += f"taken for another class: {', '.join(shown)}{more}\n"
    return text


def _require_files(
    folder: Path | None,
    annotations: Path | None,
    images: Path | None,
    results: Path | None,
    *,
    written: tuple[Path | None, ...],
) -> None:
    """A UserError, before the work, if an evaluation lacks something to read or a place to write."""
    if (annotations is None) != (images is None):
        if annotations is not None and not annotations.is_file():
            raise UserError(f"{annotations}: no such annotation file")
        raise UserError("give both --annotations and --images, or neither")
    for path in written:
        if path is not None:
            require_folder(path.parent)
            if path.is_dir():
                raise UserError(f"{path}: is a folder, expected a file to write")
    if folder is None and (results is None or annotations is None):
        raise UserError("give the folder of a run or a model, or --results with --annotations and --images")
    if folder is not None:
        require_there(folder)
    if results is not None and not results.is_file():
        raise UserError(f"{results}: no such file of detections")


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration from TOML, or from the JSON that runs write."""
    if path.suffix != ".json":
        return load_run_config(path, list(overrides))
    values = read_json(path)
    # A run's own config.json holds the configuration beside its identity.
    if {"config", "identity"} <= set(values) and isinstance(values["config"], dict):
        values = with_present_keys(values["config"])
    return parse_run(values, where=str(path), overrides=overrides)


def _metrics_table(metrics: Metrics, split: str | None) -> str:
    """The numbers of all classes and of a split's, with what else is to be known of them."""
    from semiseg.evaluation.coco_metrics import METRIC_NAMES, describe_ignored
    from semiseg.evaluation.precision import AREA_LIMITS
    from semiseg.report.tables import text_table
    from semiseg.splits import load_split

    groups = {"all": tuple(metrics.instances)}
    if split is not None:
        loaded = load_split(split, groups["all"])
        groups |= {"unseen": loaded.unseen, "seen": loaded.seen}
    lines = []
    for what, kind in (("mask", "segm"), ("box", "bbox")):
        for group, classes in groups.items():
            numbers = metrics.group(kind, classes)
            values = ["–" if numbers[name] is None else f"{numbers[name]:.1f}" for name in METRIC_NAMES]  # noqa: RUF001
            lines.append([f"{what}, {group} ({len(classes)} classes)", *values])
    table = text_table(("percent", *METRIC_NAMES), lines)
    if metrics.area_limits != AREA_LIMITS:
        small, large = metrics.area_limits
        table += f"APs, APm, APl: of objects up to {small:g} pixels, to {large:g}, and above\n"
    if metrics.voc is not None:
        by_voc = ", ".join(f"{name} {value:.1f}" for name, value in metrics.voc.items())
        table += f"mask AP by VOC's own rules: {by_voc}\n"
    ignored = describe_ignored(metrics.to_dict())
    return table + (f"{ignored}\n" if ignored else "")
