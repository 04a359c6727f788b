"""What a study's configurations mean, in words for its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from semiseg.config import DataConfig, RunConfig
from semiseg.report.aggregate import UPPER_BOUND
from semiseg.report.provenance import flat_settings, settings, unmeant
from semiseg.studies.file import StudyRow
from semiseg.studies.identity import planned_steps

_MASK_LOSS = {"dice": "Dice", "labelled": "projection and pairwise terms with labelled edges"}
_BOX_LOSS = {
    "none": "no mask loss",
    "projection": "BoxInst's projection term",
    "projection+pairwise": "BoxInst's projection and pairwise terms",
    "box_as_mask": "Dice with the filled box as mask",
}
# What the words for a row's supervision say already; everything else in `set` follows as it is written.
_IN_WORDS = {"supervision.source", "supervision.split", "objective.mask", "objective.box"}


def row_meaning(row: StudyRow, config: RunConfig, *, in_every_table: bool) -> str:
    """What a row trains with: its masks, the loss that objects without one get, and what else it sets.

    Args:
        in_every_table: the same run is a row of several tables.
    """
    mask, box = _MASK_LOSS[config.objective.mask], _BOX_LOSS[config.objective.box]
    text = {
        "split": f"masks of seen classes, {mask}; {box} for objects of unseen classes",
        "boxes": f"no mask of any class, {box} for all objects",
        "masks": f"masks of every class, {mask}",
        "as_annotated": f"masks where they are annotated, {mask}; {box} for the other objects",
    }[config.supervision.source]
    others = [f"{path} = {value}" for path, value in flat_settings(row.set).items() if path not in _IN_WORDS]
    if others:
        text += f"; with {', '.join(others)}"
    if row.name == UPPER_BOUND:
        text += ": the upper bound, which the paper leaves out"
    return text + (" (the same run in every table)" if in_every_table else "")


def is_alike(configs: Sequence[RunConfig]) -> bool:
    """Whether runs differ in supervision, mask losses and seed alone."""
    values = [config.model_dump(mode="json") for config in configs]
    same_data = all(item["data"] == values[0]["data"] for item in values)
    return same_data and not unmeant([settings(item) for item in values])


def is_paper_data(data: DataConfig, classes: int) -> bool:
    """Whether these are the data that the paper's numbers were measured on: COCO 2017 or PASCAL VOC 2012, by name."""
    official = DataConfig()
    coco = data.format == "coco" and data.val_annotations == official.val_annotations and classes == 80
    return coco or (data.format == "voc" and data.voc.val_set == official.voc.val_set)


def data_sentence(data: DataConfig) -> str:
    """The data sets, for the protocol."""
    if data.format == "shapes":
        shapes = data.shapes
        return (
            f"Shapes, the embedded data set: {shapes.train_images} training and {shapes.val_images} validation images "
            f"of {shapes.image_size} by {shapes.image_size} pixels, drawn from the seeds {shapes.train_seed} and "
            f"{shapes.val_seed}."
        )
    if data.format == "voc":
        return f"PASCAL VOC 2012: training on {data.voc.train_set}, validation on {data.voc.val_set}."
    return f"COCO format: training on {data.train_images}, validation on {data.val_images}."


def schedule_sentence(configs: Sequence[RunConfig]) -> str:
    """Length, optimiser, backbone and mask losses; what differs between the rows is left to their own description."""
    images = _each(config.optim.batch_size for config in configs)
    parts = [
        f"{_each(_length(config) for config in configs)} of {images} images",
        _each(config.optim.optimizer for config in configs),
        f"rate {_each(f'{config.optim.learning_rate:g}' for config in configs)} "
        f"({_each(config.optim.schedule for config in configs)})",
    ]
    model = [
        f"backbone {_each(_backbone(config) for config in configs)}",
        f"masks at stride {_each(config.model.mask_head.stride for config in configs)}",
        f"τ = {_each(f'{config.objective.affinity_threshold:g}' for config in configs)}",
    ]
    return f"{', '.join(parts)}; {', '.join(model)}."


def _backbone(config: RunConfig) -> str:
    backbone = config.model.backbone
    return f"resnet{backbone.depth}" if backbone.kind == "resnet" else backbone.kind


def _each(values: Iterable[Any]) -> str:
    """The values, each once: "resnet50 or resnet101 by row" where rows differ."""
    *others, last = dict.fromkeys(str(value) for value in values)
    return f"{', '.join(others)} or {last} by row" if others else last


def pretraining_sentence(config: RunConfig) -> str:
    """What all rows of a seed start from."""
    sides = " or ".join(str(side) for side in config.data.short_sides)
    return (
        f"Every row starts from the detector that its seed pretrained on boxes alone, without any mask "
        f"({_length(config)} of {config.optim.batch_size} images with short sides of {sides} pixels, "
        f"rate {config.optim.learning_rate:g})."
    )


def initial_weights_in_words(configs: Sequence[RunConfig]) -> str:
    """What the rows start from where a study has no pretraining of its own."""
    names = {"imagenet": "ImageNet weights of its backbone", "random": "random weights"}
    weights = [
        "the weights of a given model" if config.init_from is not None
        else names.get(config.model.backbone.weights, "given weights of its backbone")
        for config in configs
    ]  # fmt: skip
    return " or ".join(dict.fromkeys(weights))


def _length(config: RunConfig) -> str:
    """Steps, or epochs where the number of steps needs the data set."""
    steps = planned_steps(config)
    return f"{steps} steps" if steps is not None else f"{config.optim.epochs:g} epochs"
