"""Released YOLACT checkpoints with a ResNet: renamed to this package's model, whose images are RGB as theirs.

Source of the names: the checkpoints themselves. Not converted are networks with DarkNet and those of YOLACT++.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from semiseg.config import ModelConfig
from semiseg.config.read import parse_config
from semiseg.engine.checkpoint import BATCHES_SEEN
from semiseg.errors import UserError
from semiseg.interop.checkpoints import Converted, depth_by_keys, fitted, require_keys, shapes_of

USUAL_SIDE = 550  # of the image, for which the anchors have these sides; those of other networks are in proportion
ANCHOR_SIDES = (24, 48, 96, 192, 384)
SHAPES = 3  # anchors of a location
CLASSES = "prediction_layers.0.conf_layer.weight"
RULES = (  # (pattern of our key, template of the file's), of which the first that matches counts
    (r"backbone\.layer(?P<stage>\d)\.(.+)", r"backbone.layers.{stage}.\2"),
    (r"(backbone\..+)", r"\1"),
    (r"neck\.fpn\.inner_blocks\.(?P<level>\d)\.0\.(\w+)", r"fpn.lat_layers.{level}.\2"),
    (r"neck\.fpn\.layer_blocks\.(?P<level>\d)\.0\.(\w+)", r"fpn.pred_layers.{level}.\2"),
    (r"neck\.extra\.(\d)\.(\w+)", r"fpn.downsample_layers.\1.\2"),
    (r"detector\.tower\.(\w+)", r"prediction_layers.0.upfeature.0.\1"),
    (r"detector\.boxes\.(\w+)", r"prediction_layers.0.bbox_layer.\1"),
    (r"detector\.classes\.(\w+)", r"prediction_layers.0.conf_layer.\1"),
    (r"detector\.semantic\.(\w+)", r"semantic_seg_conv.\1"),
    (r"mask_head\.weights\.(\w+)", r"prediction_layers.0.mask_layer.\1"),
    (r"mask_head\.before\.(?P<conv>\d)\.0\.(\w+)", r"proto_net.{conv}.\2"),
    (r"mask_head\.after\.0\.0\.(\w+)", r"proto_net.8.\1"),
    (r"mask_head\.prototypes\.(\w+)", r"proto_net.10.\1"),
)


def file_name(key: str) -> str:
    """The name that a parameter or buffer of our model has in a released checkpoint."""
    for pattern, template in RULES:
        found = re.fullmatch(pattern, key)
        if found:
            named = {name: int(number) for name, number in found.groupdict().items()}
            # stages count from 0, levels from the coarsest, and every convolution of the prototypes has a ReLU behind
            numbers = {"stage": named.get("stage", 1) - 1, "level": 2 - named.get("level", 0)}
            return found.expand(template).format(**numbers, conv=2 * named.get("conv", 0))
    raise AssertionError(f"{key}: no rule names it")


def convert_state(state: Mapping[str, Tensor], *, side: int, where: str) -> Converted:
    """Converts a state dict; a UserError of `where` if it is of another network.

    Args:
        side: of the square to which images are stretched, which the file does not say.
    """
    depth, num_classes = _recognise(state, where)
    config = _config(depth, side, where)
    expected = shapes_of(config, num_classes=num_classes)
    names = {key: file_name(key) for key in expected}
    left = sorted(set(state) - set(names.values()))
    counters = tuple(key for key in left if key.endswith(BATCHES_SEEN))
    weights = fitted(state, names, expected, [key for key in left if key not in counters], where=where)
    return Converted(weights=weights, config=config, num_classes=num_classes, dropped=counters)


def _recognise(state: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Depth of the ResNet and number of classes."""
    keys = (CLASSES, "proto_net.0.weight", "fpn.lat_layers.0.weight", "backbone.conv1.weight")
    require_keys(state, keys, network="a YOLACT with a ResNet", where=where)
    if state[CLASSES].ndim != 4 or len(state[CLASSES]) % SHAPES or len(state[CLASSES]) < 2 * SHAPES:
        raise UserError(f"{where}: {CLASSES} is {tuple(state[CLASSES].shape)}, expected {SHAPES} anchors of a location")
    depth = depth_by_keys(state, r"backbone\.layers\.([0-3])\.(\d+)\.", (0, 1, 2, 3), where=where)
    return depth, len(state[CLASSES]) // SHAPES - 1


def _config(depth: int, side: int, where: str) -> ModelConfig:
    values: dict[str, Any] = {
        "backbone": {"depth": depth, "weights": "random"},
        "neck": {"form": "yolact"},
        "detector": {"kind": "anchors", "anchor_sides": [size * side // USUAL_SIDE for size in ANCHOR_SIDES]},
        "mask_head": {"kind": "prototypes", "cells": "parts", "start": "nothing"},
        "pixel_mean": [123.68, 116.78, 103.94],
        "pixel_std": [58.40, 57.12, 57.38],
    }
    return parse_config(ModelConfig, values, where=f"{where}: the model recognised")
