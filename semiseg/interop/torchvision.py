"""torchvision's Mask R-CNN with a ResNet and FPN: its state dicts under present and released names.

Released weights run with a frozen batch norm whose epsilon is 0: their file has no counters of batches. A network of
torchvision's own with batch norm has epsilon 1e-5 and counters. Here every frozen norm adds 1e-5, for which the weights
of the former make up. Source of the names: torchvision 0.29's models and the files themselves.
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

EPSILON = 1e-5  # of a frozen norm here
RENAMED = (  # pattern of a key in released files, and today's
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
)
PARTS = (  # beginning of our names, and of torchvision's
    ("backbone.", "backbone.body."),
    ("neck.fpn.", "backbone.fpn."),
    ("detector.anchors.", "rpn.head."),
    ("detector.regions.", "roi_heads.box_head."),
    ("detector.boxes.", "roi_heads.box_predictor."),
    ("mask_head.tower.", "roi_heads.mask_head."),
    ("mask_head.deconv.", "roi_heads.mask_predictor.conv5_mask."),
    ("mask_head.masks.", "roi_heads.mask_predictor.mask_fcn_logits."),
)
SCORES = "roi_heads.box_predictor.cls_score.weight"
BOXES = "roi_heads.box_predictor.bbox_pred.weight"
MASKS = "roi_heads.mask_predictor.mask_fcn_logits.weight"


def convert_state(state: Mapping[str, Tensor], *, kept: tuple[int, ...] | None, where: str) -> Converted:
    """Converts a state dict; a UserError of `where` if it is of another network.

    Args:
        kept: the labels of the file (from 1 on; 0 is the background) that become our classes, in this order; None =
            all. The background's boxes and masks, which nobody asks for, are left out, too.
    """
    renamed = {_today(key): value for key, value in state.items()}
    depth = _recognise(renamed, where)
    number = len(renamed[SCORES])
    labels = kept or tuple(range(1, number))
    for key, per_class, first in ((MASKS, 1, []), (SCORES, 1, [0]), (BOXES, 4, [0])):
        rows = [per_class * label + each for label in (*first, *labels) for each in range(per_class)]
        for name in (key, key.replace(".weight", ".bias")):
            if name in renamed and renamed[name].ndim > 0 and len(renamed[name]) == per_class * number:
                renamed[name] = renamed[name][rows]
    config = _config(renamed, depth, where)
    expected = shapes_of(config, num_classes=len(labels))
    names = {key: _file_name(key) for key in expected}
    counters = [key for key in renamed if key.endswith(BATCHES_SEEN)]
    left = sorted(set(renamed) - set(names.values()) - set(counters))
    weights = fitted(renamed, names, expected, left, where=where)
    if not counters:
        _without_epsilon(weights, where)
    return Converted(weights=weights, config=config, num_classes=len(labels), dropped=tuple(counters))


def _without_epsilon(weights: dict[str, Tensor], where: str) -> None:
    """Gives norms whose epsilon is 0 weights with which an epsilon of 1e-5 computes the same."""
    for key, variance in weights.items():
        if key.endswith("running_var"):
            if not bool((variance > 0).all()):
                raise UserError(
                    f"{where}: {_file_name(key)} has a variance that is not above 0, nor is there an epsilon"
                )
            name = key.removesuffix("running_var") + "weight"
            exact = variance.double()
            weights[name] = (weights[name].double() * ((exact + EPSILON) / exact).sqrt()).to(variance.dtype)


def _today(key: str) -> str:
    for pattern, template in RENAMED:
        key = re.sub(f"^{pattern}$", template, key)
    return re.sub(
        r"^roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.", key
    )


def _file_name(key: str) -> str:
    for ours, theirs in PARTS:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise AssertionError(f"{key}: no rule names it")


def _recognise(state: Mapping[str, Tensor], where: str) -> int:
    """The depth of the ResNet; a UserError where it is not a Mask R-CNN of torchvision's first version."""
    keys = (SCORES, MASKS, "rpn.head.cls_logits.weight", "backbone.body.conv1.weight")
    require_keys(state, keys, network="a Mask R-CNN of torchvision", where=where)
    fits = state[SCORES].ndim == 2 and state[MASKS].ndim == 4 and len(state[SCORES]) == len(state[MASKS])
    if not fits or len(state[SCORES]) < 2:
        counts = f"{tuple(state[SCORES].shape)} and {tuple(state[MASKS].shape)}"
        raise UserError(
            f"{where}: {SCORES} and {MASKS} are {counts}, expected as many classes in both, one beside the background"
        )
    return depth_by_keys(state, r"backbone\.body\.layer([1-4])\.(\d+)\.", (1, 2, 3, 4), where=where)


def _config(state: Mapping[str, Tensor], depth: int, where: str) -> ModelConfig:
    convs = {int(found[1]) for key in state if (found := re.match(r"roi_heads\.mask_head\.(\d+)\.", key))}
    values: dict[str, Any] = {
        "backbone": {"depth": depth, "weights": "random"},
        "neck": {"coarse": "pool"},
        "detector": {"kind": "regions", "aligned": False},
        "mask_head": {
            "kind": "regions",
            "margin": 1.0,
            "aligned": False,
            "class_agnostic": False,
            "convs": len(convs),
        },
    }
    return parse_config(ModelConfig, values, where=f"{where}: the model recognised")
