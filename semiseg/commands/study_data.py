"""What a study's data give away about its masks: measured once, kept beside the results, read for the report.

`difficulty.json` is about the embedded data set; `edges.json`, of studies that vary the edges of the pairwise loss, is
about the edges of each of their rows; `edge_curve.json`, of studies that use the pairwise loss, about the edges of its
neighbourhoods against the colour threshold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from semiseg.config import DataConfig, ObjectiveConfig, RunConfig
from semiseg.config_files import file_digest, read_json
from semiseg.data.shapes import ensure_shapes
from semiseg.data.sources import AnnotatedImages, expected_files
from semiseg.errors import UserError
from semiseg.evaluation.difficulty import measure_difficulty
from semiseg.report.edge_curve import EdgeCurve
from semiseg.resources import write_text
from semiseg.study import PRETRAIN_ROW, Study, StudyTable, row_run, study_runs

if TYPE_CHECKING:
    from semiseg.engine.edges import EdgeMeasurement

DIFFICULTY_NAME = "difficulty.json"
EDGES_NAME = "edges.json"
CURVE_NAME = "edge_curve.json"
_CURVE_THRESHOLDS = tuple(round(0.05 * number, 2) for number in range(11))
_MEASURED_IMAGES = 400  # enough for shares of some thousand instances to a tenth of a percent


class EdgeKind(NamedTuple):
    """What decides which edges the pairwise loss of a row looks at."""

    size: int
    dilation: int
    threshold: float


class RowEdges(NamedTuple):
    """Of all edges of a row the share that counts, and of these the truly positive ones, 0..1."""

    share: float
    positive: float


def edge_kind(objective: ObjectiveConfig) -> EdgeKind:
    """The edges of box-supervised instances under an objective."""
    return EdgeKind(objective.affinity_size, objective.affinity_dilation, objective.affinity_threshold)


def table_edges(study: Study, table: StudyTable) -> dict[str, EdgeKind]:
    """Row -> its edges, in a table whose rows differ in them; empty for any other table."""
    kinds = pairwise_edges(study, table)
    return kinds if len(set(kinds.values())) > 1 else {}


def pairwise_edges(study: Study, table: StudyTable) -> dict[str, EdgeKind]:
    """Row -> its edges, of all rows of a table whose box-supervised instances get the pairwise loss."""
    configs = {row: row_run(study, table, row, study.seeds[0]).config for row in table.rows}
    return {
        row: edge_kind(config.objective)
        for row, config in configs.items()
        if config.supervision.source != "masks" and config.objective.box == "projection+pairwise"
    }


def record_difficulty(study: Study, folder: Path) -> None:
    """Measures how hard the embedded data set is, once; does nothing for other data."""
    config = _first_config(study)
    if config.data.format != "shapes":
        return
    objective, stride = config.objective, config.model.mask_stride
    size, dilation, threshold = edge_kind(objective)
    drawn = _shapes(config.data)
    parameters = {
        "data": drawn.images.parent.name,
        "stride": stride,
        "size": size,
        "dilation": dilation,
        "threshold": threshold,
    }
    path = folder / DIFFICULTY_NAME
    if _has_parameters(path, parameters):
        return
    edges = _measure(config, drawn, sorted({EdgeKind(size, dilation, 0.0), edge_kind(objective)}))
    every, used = edges.shares[0], edges.shares[-1]
    measured = measure_difficulty(drawn.annotations, max_images=_MEASURED_IMAGES)
    mean, least, most = measured.instances_per_image
    sentences = [
        f"Measured on {measured.images} training images with {measured.overall.instances} instances, "
        f"{mean:.1f} per image ({least} to {most}).",
        f"Of the edges with their centre in a box {_percent(every.positive)} are truly positive at τ = 0; "
        f"of those that reach τ = {threshold:g} ({_percent(used.share)} of them) {_percent(used.positive)} are.",
        f"{_percent(measured.overall.low_fill)} of the instances fill less than half of their box; "
        f"the mean is {_percent(measured.overall.fill)}.",
    ]
    _write(path, {"parameters": parameters, "sentences": sentences})


def record_edges(study: Study, folder: Path) -> None:
    """Measures, once, the edges of every row of a study that varies them; does nothing where the images are missing.

    On the training images of the embedded data set; else on the validation images, whose annotations are read in
    seconds, resized as they are for the network.
    """
    kinds = sorted({kind for table in study.tables for kind in table_edges(study, table).values()})
    if not kinds:
        return
    config = _first_config(study)
    if config.data.format == "shapes":
        _shapes(config.data)
    if (files := _measured_files(config.data)) is None:
        return
    parameters = {**_edge_parameters(config, files), "kinds": [list(kind) for kind in kinds]}
    path = folder / EDGES_NAME
    if _has_parameters(path, parameters):
        return
    measured = _measure(config, files, kinds)
    wanted = {kind: share for kind in kinds for share in measured.to_dict()["shares"] if _kind_of(share) == kind}
    sentence = _edge_sentence(config, measured)
    _write(path, {"parameters": parameters, "sentence": sentence, "shares": list(wanted.values())})


def record_edge_curve(study: Study, folder: Path) -> None:
    """Measures, once, the edges of a study's pairwise losses against the threshold, on the images of `record_edges`.

    Nothing is drawn or converted for it, and data that cannot be measured (no masks, a missing image) leave it out: the
    report does without.
    """
    kinds = sorted({kind for table in study.tables for kind in pairwise_edges(study, table).values()})
    config = _first_config(study)
    if not kinds or (files := _measured_files(config.data)) is None:
        return
    every = sorted({*_CURVE_THRESHOLDS, *(kind.threshold for kind in kinds)})
    parameters = {
        **_edge_parameters(config, files),
        "kinds": [list(kind) for kind in kinds],
        "thresholds": every,
    }
    path = folder / CURVE_NAME
    if _has_parameters(path, parameters):
        return
    asked = [kind._replace(threshold=threshold) for kind in kinds for threshold in every]
    try:
        measured = _measure(config, files, asked)
    except UserError:
        return
    classes = {
        f"{kind.size} {kind.dilation} {kind.threshold:g}": share.by_class
        for kind in kinds
        for share in measured.shares
        if (*astuple(share.neighbourhood), share.threshold) == kind
    }
    content = {
        "shares": measured.to_dict()["shares"],
        "classes": {key: _rounded(found) for key, found in classes.items()},
    }
    _write(path, {"parameters": parameters, "sentence": _edge_sentence(config, measured), **content})


def recorded_difficulty(folder: Path) -> tuple[str, ...]:
    """The sentences of the measurement, none if there was none."""
    content = _recorded(folder / DIFFICULTY_NAME, "sentences")
    return tuple(content["sentences"]) if content else ()


def recorded_edges(folder: Path) -> tuple[dict[EdgeKind, RowEdges], str]:
    """The measured edges and a sentence that says how they were measured; nothing and "" if they were not."""
    content = _recorded(folder / EDGES_NAME, "shares", "sentence")
    if not content:
        return {}, ""
    try:
        shares = [item for item in content["shares"] if item["positive"] is not None]
        return {_kind_of(item): RowEdges(item["share"], item["positive"]) for item in shares}, content["sentence"]
    except (KeyError, TypeError):
        raise _damaged(folder / EDGES_NAME) from None


def recorded_edge_curve(study: Study, folder: Path) -> EdgeCurve | None:
    """The measured edges against the threshold, with the rows that use them; None if they were not measured."""
    path = folder / CURVE_NAME
    content = _recorded(path, "shares", "sentence")
    if not content:
        return None
    rows = {table.name: pairwise_edges(study, table) for table in study.tables}
    try:
        points = {
            (item["size"], item["dilation"], item["threshold"]): (item["share"], item["positive"])
            for item in content["shares"]
            if item["positive"] is not None
        }
        classes = {
            (int(size), int(dilation), float(threshold)): {name: tuple(pair) for name, pair in found.items()}
            for key, found in content["classes"].items()
            for size, dilation, threshold in [key.split()]
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(path) from None
    return EdgeCurve(points, classes, {name: dict(found) for name, found in rows.items()}, content["sentence"])


def _first_config(study: Study) -> RunConfig:
    return next(run.config for run in study_runs(study) if run.row != PRETRAIN_ROW)


def _shapes(data: DataConfig) -> AnnotatedImages:
    """The training images of the embedded data set, drawn if they are not there."""
    shapes = data.shapes
    ensure_shapes(Path(data.root), images=shapes.train_images, image_size=shapes.image_size, seed=shapes.train_seed)
    return expected_files(data)["train"]


def _measured_files(data: DataConfig) -> AnnotatedImages | None:
    """Training images of the embedded data set, else the validation images; None where they are missing."""
    files = expected_files(data)["train" if data.format == "shapes" else "val"]
    return files if files.annotations.is_file() and files.images.is_dir() else None


def _edge_parameters(config: RunConfig, files: AnnotatedImages) -> dict[str, Any]:
    """What a measurement of edges follows from, whatever edges they are."""
    embedded = config.data.format == "shapes"
    return {
        "data": files.images.parent.name if embedded else file_digest(files.annotations),
        "stride": config.model.mask_stride,
        "sides": [config.data.val_short_side, config.data.val_long_side],
        "bottom_rows": config.data.bottom_rows_without_affinity,
    }


def _edge_sentence(config: RunConfig, measured: EdgeMeasurement) -> str:
    """How edges were measured."""
    words = "training" if config.data.format == "shapes" else "validation"
    resized = f"short side {config.data.val_short_side}, mask grid at stride {config.model.mask_stride}"
    return (
        f"Measured from the ground-truth masks of {measured.images} {words} images with {measured.instances} instances "
        f"({resized})."
    )


def _rounded(by_class: Mapping[str, tuple[float, float]]) -> dict[str, list[float]]:
    """Classes of which an edge counts, to a hundredth of a percent."""
    return {
        name: [round(share, 4), round(positive, 4)]
        for name, (share, positive) in by_class.items()
        if not math.isnan(positive)
    }


def _measure(config: RunConfig, files: AnnotatedImages, kinds: Sequence[EdgeKind]) -> EdgeMeasurement:
    """The first images as the network sees them in evaluation; all thresholds of `kinds` for each neighbourhood."""
    # Not above: it loads torch, which takes seconds and which a report that has its measurements does without.
    from semiseg.engine.edges import Neighbourhood, measure_edges

    return measure_edges(
        files.annotations,
        files.images,
        neighbourhoods=sorted({Neighbourhood(kind.size, kind.dilation) for kind in kinds}),
        thresholds=sorted({kind.threshold for kind in kinds}),
        stride=config.model.mask_stride,
        short_side=config.data.val_short_side,
        long_side=config.data.val_long_side,
        bottom_rows=config.data.bottom_rows_without_affinity,
        max_images=_MEASURED_IMAGES,
    )


def _kind_of(share: Mapping[str, Any]) -> EdgeKind:
    return EdgeKind(share["size"], share["dilation"], share["threshold"])


def _has_parameters(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a measurement with these parameters is there; a damaged file is none."""
    try:
        return path.exists() and read_json(path).get("parameters") == parameters
    except UserError:
        return False


def _recorded(path: Path, *keys: str) -> dict[str, Any]:
    """A measurement's content, {} if there is none."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except UserError:
        raise _damaged(path) from None
    if not all(isinstance(content.get(key), list | str) for key in keys):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: not readable; remove it, 'semiseg run' measures again")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
