"""The smallest run that is still the real thing: a few 64-pixel Shapes images and a network of a few channels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.config import ModelConfig, RunConfig
from semiseg.config.read import merge, parse_config
from semiseg.losses.detection import COUNTS, LOSSES
from semiseg.losses.terms import MASK_COUNTS, MASK_LOSSES
from semiseg.models.detectors.fcos import FCOSHead
from semiseg.models.masks.dynamic import DynamicMasks
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Targets
from semiseg.structures.masks import MASK_BITS, EncodedMasks
from semiseg.structures.outputs import MaskQueries
from semiseg.structures.rays import RayTargets

TINY: dict[str, Any] = {
    "data": {
        "format": "shapes",
        "shapes": {"image_size": 64, "train_images": 12, "val_images": 4, "train_seed": 901, "val_seed": 902},
        "short_sides": [64],
        "long_side": 64,
        "bottom_rows_without_affinity": 0,
    },
    "supervision": {"source": "split", "split": "shapes_few_seen"},
    "model": {
        "backbone": {"kind": "small", "widths": [8, 8, 16, 16], "norm": "frozen_bn"},
        "neck": {"channels": 16},
        "detector": {"strides": [8, 16, 32], "level_ranges": [24, 48], "tower_convs": 1, "tower_groups": 4},
        "mask_head": {"branch_channels": 8, "branch_convs": 1, "branch_norm": "gn", "feature_channels": 4},
    },
    "inference": {"short_side": 64, "long_side": 64},
    "optim": {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "constant", "steps": 4, "batch_size": 4},
    "runtime": {"workers": 0, "threads": 1, "tensorboard": False, "log_every": 1},
}


# The other mask heads at that size, to be laid over `TINY` as model.mask_head.
HEADS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "prototypes": {"kind": "prototypes", "prototypes": 6, "channels": 8, "convs": 1},
    "rays": {"kind": "rays", "rays": 12, "tower_convs": 1, "tower_groups": 4},
    "regions": {"kind": "regions", "channels": 8, "convs": 1, "norm": "gn", "size": 7},
}


# Whole networks at that size: a detector of another kind with its mask head.
DETECTORS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {
        "neck": {"coarse": "pool"},
        "detector": {
            "kind": "regions",
            "strides": [4, 8, 16, 32],
            "anchor_sides": [8, 16, 32, 64],
            "anchors_drawn": 64,
            "regions_drawn": 32,
            "training_proposals": 60,
            "region_size": 3,
            "hidden": 16,
        },
        "mask_head": HEADS["regions"],
    },
    "yolact": {
        "neck": {"form": "yolact"},
        "detector": {"kind": "anchors", "strides": [8, 16, 32], "anchor_sides": [12, 24, 48]},
        "mask_head": {**HEADS["prototypes"], "cells": "parts"},
    },
}


def model_of(name: str) -> dict[str, Any]:
    """What the network of this name in `HEADS` or `DETECTORS` has, to be laid over `TINY` as model."""
    return DETECTORS[name] if name in DETECTORS else {"mask_head": HEADS[name]}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of values given by dotted keys: {"neck.channels": 8} -> {"neck": {"channels": 8}}."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        *tables, key = path.split(".")
        table = result
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return result


def model_config(*tables: Mapping[str, Any]) -> ModelConfig:
    """A network from values with dotted keys or nested ones, each table laid over those before it."""
    return parse_config(ModelConfig, functools.reduce(merge, map(nested, tables), {}), where="test")


def tiny_config(root: Path, **sections: dict[str, Any] | int | str | None) -> RunConfig:
    """The tiny run with its data under `root` and the given sections laid over it, their keys dotted or not."""
    values = merge(TINY, {"data": {"root": str(root)}})
    tables = {name: nested(value) if isinstance(value, dict) else value for name, value in sections.items()}
    return parse_config(RunConfig, merge(values, tables), where="tiny")


def some_masks(targets: Targets, kept: Tensor) -> dict[str, Any]:
    """`masks`, `encoded` and `mask_weight` of those masks of the targets that are kept (M,) bool."""
    encoded = targets.encoded
    if encoded is not None:
        mask, changes = encoded.changes >> MASK_BITS, encoded.changes & (2**MASK_BITS - 1)
        number = torch.cumsum(kept, 0) - 1
        encoded = EncodedMasks(
            changes=((number[mask] << MASK_BITS) + changes)[kept[mask]],
            raster_hw=encoded.raster_hw[kept],
            input_hw=encoded.input_hw[kept],
            flipped=encoded.flipped[kept],
        )
    return {"masks": targets.masks[kept], "encoded": encoded, "mask_weight": targets.mask_weight[kept]}


LOSS_NAMES = LOSSES + MASK_LOSSES  # of a step with FCOS and no option
COUNT_NAMES = COUNTS + MASK_COUNTS


def some_rays(rays: RayTargets | None, kept: Tensor) -> RayTargets | None:
    """The rays of those of the instances that are kept (N,) bool, which are numbered anew."""
    if rays is None:
        return None
    number, ours = torch.cumsum(kept, 0) - 1, kept[rays.instance_index]
    return RayTargets(
        rays.centres_xy[kept],
        number[rays.instance_index[ours]],
        rays.location_index[ours],
        rays.distances[ours],
        rays.everywhere,
    )


def make_queries(image_index: Sequence[int] | Tensor, location_index: Sequence[int] | Tensor) -> MaskQueries:
    """Queries of a head that asks for neither boxes nor labels; the instances are numbered."""
    image, location = torch.as_tensor(image_index).long(), torch.as_tensor(location_index).long()
    boxes = torch.zeros(len(image), 4)
    return MaskQueries(image, location, torch.arange(len(image)), boxes, torch.zeros_like(image))


def box_targets(boxes: Sequence[Sequence[float]], image_index: Sequence[int], *, mask_stride: int = 4) -> Targets:
    """Instances of class 0 with boxes alone."""
    count, none = len(boxes), torch.zeros(0, dtype=torch.int64)
    return Targets(
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(count, dtype=torch.int64),
        image_index=torch.tensor(image_index, dtype=torch.int64),
        supervision=torch.zeros(count, dtype=torch.int64),
        masks=torch.zeros(0, 16, 16, dtype=torch.bool),
        mask_instance=none,
        mask_weight=torch.zeros(0),
        crowd_boxes_xyxy=torch.zeros(0, 4),
        crowd_image_index=none,
        mask_stride=mask_stride,
    )


def fcos(model: Segmenter) -> FCOSHead:
    """The detector of a model that has FCOS."""
    assert isinstance(model.detector, FCOSHead)
    return model.detector


def dynamic(model: Segmenter) -> DynamicMasks:
    """The mask head of a model whose masks are CondInst's."""
    assert isinstance(model.mask_head, DynamicMasks)
    return model.mask_head
