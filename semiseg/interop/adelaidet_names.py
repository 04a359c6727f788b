"""Key names of the released CondInst and BoxInst checkpoints, and what their keys and shapes say of the network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from semiseg.config import ModelConfig
from semiseg.config.model import DynamicMaskHead, FCOSDetector
from semiseg.config.read import parse_config
from semiseg.errors import UserError
from semiseg.interop.checkpoints import resnet_depth
from semiseg.models.masks.dynamic import filter_shapes, num_filter_numbers

BACKBONE = "backbone.bottom_up."  # behind it `backbone.` where the neck is a BiFPN
HEAD = "proposal_generator.fcos_head."
STAGES = (2, 3, 4, 5)  # res2..res5 are layer1..layer4
DEFORMABLE_STAGES = (3, 4, 5)
FIRST_LEVEL = 3  # P3
# What only training needs: counters, constants of the mask head, the auxiliary semantic loss.
TRAINING_ONLY = re.compile(
    r"mask_head\._iter|mask_head\.sizes_of_interest|mask_branch\.(seg_head|logits)\..+|pixel_mean|pixel_std"
    r"|backbone\.bottom_up\..+\.norm\.num_batches_tracked"
)


def file_name(key: str, *, neck: str) -> str:
    """The name that a parameter or buffer of our model, with `fpn` or `bifpn`, has in a released checkpoint."""
    for pattern, template in _rules(_backbone_prefix(neck)):
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(template)
    raise AssertionError(f"{key}: no rule names it")


def _backbone_prefix(neck: str) -> str:
    return f"{BACKBONE}backbone." if neck == "bifpn" else BACKBONE


def _rules(bottom: str) -> Iterable[tuple[str, str]]:
    """(pattern of our key, template of the file's), of which the first that matches counts."""
    yield r"backbone\.conv1\.(\w+)", rf"{bottom}stem.conv1.\1"
    yield r"backbone\.bn1\.(\w+)", rf"{bottom}stem.conv1.norm.\1"
    for number, stage in enumerate(STAGES, start=1):
        ours, theirs = rf"backbone\.layer{number}\.(\d+)\.", rf"{bottom}res{stage}.\1."
        yield ours + r"conv2\.offset\.(\w+)", theirs + r"conv2_offset.\2"
        yield ours + r"conv(\d)\.(\w+)", theirs + r"conv\2.\3"
        yield ours + r"bn(\d)\.(\w+)", theirs + r"conv\2.norm.\3"
        yield ours + r"downsample\.0\.(\w+)", theirs + r"shortcut.\2"
        yield ours + r"downsample\.1\.(\w+)", theirs + r"shortcut.norm.\2"
    for number in range(3):
        yield rf"neck\.fpn\.inner_blocks\.{number}\.0\.(\w+)", rf"backbone.fpn_lateral{FIRST_LEVEL + number}.\1"
        yield rf"neck\.fpn\.layer_blocks\.{number}\.0\.(\w+)", rf"backbone.fpn_output{FIRST_LEVEL + number}.\1"
        yield rf"neck\.extra\.{number}\.(\w+)", rf"backbone.top_block.p{FIRST_LEVEL + 3 + number}.\1"
    yield r"neck\.p6\.0\.(\w+)", rf"{BACKBONE}res6.reduction.\1"
    yield r"neck\.p6\.1\.(\w+)", rf"{BACKBONE}res6.reduction.norm.\1"
    yield r"neck\.blocks\.(\d+)\.(weights_\w+)", r"backbone.repeated_bifpn.\1.\2"
    yield r"neck\.blocks\.(\d+)\.((?:outputs|lateral)_\w+)\.0\.(\w+)", r"backbone.repeated_bifpn.\1.\2.\3"
    yield r"neck\.blocks\.(\d+)\.((?:outputs|lateral)_\w+)\.1\.(\w+)", r"backbone.repeated_bifpn.\1.\2.norm.\3"
    for our_part, their_part in (
        ("class_tower", "cls_tower"),
        ("box_tower", "bbox_tower"),
        ("class_logits", "cls_logits"),
        ("box_distances", "bbox_pred"),
        ("centreness", "ctrness"),
    ):
        yield rf"detector\.{our_part}\.(.+)", rf"{HEAD}{their_part}.\1"
    yield r"detector\.level_scales\.(\d+)", rf"{HEAD}scales.\1.scale"
    yield r"mask_head\.branch\.(.+)", r"mask_branch.\1"
    yield r"mask_head\.(controller\..+)", r"\1"


def recognise(state: Mapping[str, Tensor], *, where: str) -> tuple[ModelConfig, int]:
    """The network that a released checkpoint is of, and its number of classes, from key names and shapes.

    Where a key that would say something is absent, the usual size stands in: the comparison of all keys, which comes
    after this, names it. A variant that our configuration cannot say is a UserError of `where`.
    """
    _require_parts(state, where)
    neck = "bifpn" if any(key.startswith("backbone.repeated_bifpn.") for key in state) else "fpn"
    width_key = "repeated_bifpn.0.outputs_f0_0_7" if neck == "bifpn" else "fpn_output3"
    mask_convs = _count(state, r"mask_branch\.tower\.(\d+)\.0\.\w+")
    values: dict[str, Any] = {
        "backbone": {
            "depth": _depth(state, _backbone_prefix(neck), where),
            "weights": "random",
            "stride_in_1x1": True,
            "deformable_interval": _deformable_interval(state, _backbone_prefix(neck), where),
        },
        "neck": {
            "kind": neck,
            "channels": _width(state, f"backbone.{width_key}.weight", 160 if neck == "bifpn" else 256),
        },
        "detector": {"tower_convs": _count(state, re.escape(HEAD) + r"(?:cls|bbox)_tower\.(\d+)\.weight", step=3)},
        "mask_head": {
            "branch_channels": _width(state, "mask_branch.refine.0.0.weight", 128),
            "branch_convs": mask_convs,
            "feature_channels": _width(state, f"mask_branch.tower.{mask_convs}.weight", 16),
        },
        "pixel_std": [1.0, 1.0, 1.0],
    }
    if neck == "bifpn":
        values["neck"]["repeats"] = _count(state, r"backbone\.repeated_bifpn\.(\d+)\..+")
    config = parse_config(ModelConfig, values, where=f"{where}: the model recognised")
    _check_constants(state, config, where)
    return config, _width(state, f"{HEAD}cls_logits.weight", 80)


def _require_parts(state: Mapping[str, Tensor], where: str) -> None:
    parts = (BACKBONE, HEAD, "mask_branch.", "controller.")
    absent = [f"{part}*" for part in parts if not any(key.startswith(part) for key in state)]
    if absent:
        first = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"{where}: not a released CondInst or BoxInst checkpoint: no keys {', '.join(absent)}; its first keys are "
            f"{first}"
        )


def _numbers(state: Iterable[str], pattern: str) -> set[int]:
    """The numbers that the pattern's group takes among the keys."""
    return {int(match[1]) for key in state if (match := re.fullmatch(pattern, key))}


def _count(state: Iterable[str], pattern: str, *, step: int = 1) -> int:
    """How many parts are numbered 0, step, 2 * step, ... up to the largest number that occurs."""
    return max(_numbers(state, pattern), default=-step) // step + 1


def _width(state: Mapping[str, Tensor], key: str, usual: int) -> int:
    """Output channels of a convolution, or the usual number where the file lacks it."""
    return state[key].shape[0] if key in state and state[key].ndim > 0 else usual


def _depth(state: Mapping[str, Tensor], bottom: str, where: str) -> int:
    prefix = re.escape(bottom)
    blocks = tuple(_count(state, rf"{prefix}res{n}\.(\d+)\..+") for n in STAGES)
    return resnet_depth(blocks, what=f"the stages {bottom}res2 to res5 have", where=where)


def _deformable_interval(state: Mapping[str, Tensor], bottom: str, where: str) -> int:
    """0 without deformable blocks, n if they are the blocks 0, n, 2n, ... of every stage from res3 on."""
    prefix = re.escape(bottom)
    found = {n: sorted(_numbers(state, rf"{prefix}res{n}\.(\d+)\.conv2_offset\.weight")) for n in STAGES}
    if not any(found.values()):
        return 0
    blocks = {n: _count(state, rf"{prefix}res{n}\.(\d+)\..+") for n in DEFORMABLE_STAGES}
    for interval in range(1, max(blocks.values()) + 1):
        if found == {2: [], **{n: list(range(0, blocks[n], interval)) for n in DEFORMABLE_STAGES}}:
            return interval
    told = "; ".join(f"res{n}: {_listed(numbers)}" for n, numbers in found.items())
    raise UserError(
        f"{where}: deformable blocks {told}; model.backbone.deformable_interval can only say the blocks 0, n, 2n, ... "
        "of each of res3, res4 and res5"
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _check_constants(state: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    """Refuses constants that a file may carry, and a mask head's size, that differ from those of this method."""
    head, detector = config.mask_head, config.detector
    assert isinstance(head, DynamicMaskHead)
    assert isinstance(detector, FCOSDetector)
    boundaries = detector.level_ranges
    ranges: list[float] = [*boundaries, 2 * boundaries[-1]]
    # the released files are of BGR models
    expected: dict[str, list[float]] = {
        "mask_head.sizes_of_interest": ranges,
        "pixel_mean": config.pixel_mean[::-1],
        "pixel_std": config.pixel_std,
    }
    for key, values in expected.items():
        found = state[key].flatten().tolist() if key in state else values
        if len(found) != len(values) or any(abs(a - b) > 1e-3 for a, b in zip(found, values, strict=True)):
            raise UserError(f"{where}: {key} is {found}, expected {values}")
    shapes = filter_shapes(head.feature_channels, head.channels, head.layers)
    numbers = _width(state, "controller.weight", num_filter_numbers(shapes))
    if numbers != num_filter_numbers(shapes):
        raise UserError(
            f"{where}: the controller writes {numbers} numbers per instance, but a mask head of "
            f"{head.layers} layers of {head.channels} channels on {head.feature_channels} mask "
            f"channels and two coordinates has {num_filter_numbers(shapes)}"
        )
