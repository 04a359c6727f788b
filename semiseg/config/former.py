"""Keys of before the parts of a network had tables of their own: an old key is an error that names the new one.

What was recorded keeps its meaning: identities of runs are taken under the former names, so that a run has the same one
whenever it was recorded (`as_recorded`), and recorded configurations are read under today's (`with_present_keys`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from semiseg.config.model import ModelConfig
from semiseg.config.section import kind_of, tables_of

# Former key -> key of today; `model.backbone` was "small" or "resnet" and the depth.
FORMER_KEYS = {
    "data.val_short_side": "inference.short_side",
    "data.val_long_side": "inference.long_side",
    "model.score_threshold": "inference.score_threshold",
    "model.candidates_per_level": "inference.candidates_per_level",
    "model.nms_threshold": "inference.nms_threshold",
    "model.max_detections": "inference.max_detections",
    "model.backbone": "model.backbone.kind",
    "model.weights": "model.backbone.weights",
    "model.small_widths": "model.backbone.widths",
    "model.backbone_norm": "model.backbone.norm",
    "model.frozen_stages": "model.backbone.frozen_stages",
    "model.stride_in_1x1": "model.backbone.stride_in_1x1",
    "model.deformable_interval": "model.backbone.deformable_interval",
    "model.neck": "model.neck.kind",
    "model.neck_channels": "model.neck.channels",
    "model.neck_repeats": "model.neck.repeats",
    "model.neck_norm": "model.neck.norm",
    "model.strides": "model.detector.strides",
    "model.level_ranges": "model.detector.level_ranges",
    "model.tower_convs": "model.detector.tower_convs",
    "model.tower_groups": "model.detector.tower_groups",
    "model.centre_radius": "model.detector.centre_radius",
    "model.mask_branch_channels": "model.mask_head.branch_channels",
    "model.mask_branch_convs": "model.mask_head.branch_convs",
    "model.mask_branch_norm": "model.mask_head.branch_norm",
    "model.mask_channels": "model.mask_head.feature_channels",
    "model.mask_feature_stride": "model.mask_head.feature_stride",
    "model.mask_stride": "model.mask_head.stride",
    "model.dynamic_channels": "model.mask_head.channels",
    "model.dynamic_layers": "model.mask_head.layers",
    "model.max_mask_positives": "model.mask_head.max_positives",
}
# What no training reads, by its recorded names: see `engine.run_folder.adopt_training`.
INFERENCE_KEYS = {former for former, present in FORMER_KEYS.items() if present.startswith("inference.")}

# Part of the network -> its kinds, the usual one first.
_PARTS = {
    part: {kind_of(table): table for table in tables_of(ModelConfig.model_fields[part].annotation)}
    for part in ("backbone", "neck", "detector", "mask_head")
}
USUAL_KINDS = {f"model.{part}": next(iter(kinds)) for part, kinds in _PARTS.items()}
_FIRST_SECTIONS = ("data", "supervision", "objective", "model", "optim")
# Keys of these that came after results had been recorded: at these values they are left out of a run's identity, so
# that runs from before keep theirs.
ADDED_LATER: dict[str, dict[str, Any]] = {
    "data": {"crowds": "ignore", "stretch": False, "upright": False, "value_range": None},
    "supervision": {"pseudo": None},
    "optim": {"patience": 0},
    "objective": {"affinity": "colour", "level_set": 0.0, "pseudo": "dice"},
    "model": {
        "deformable_interval": 0,
        "neck": "fpn",
        "neck_repeats": 6,
        "neck_norm": "bn",
        "mask_head.targets": "mask",
    },
}


def describe_former(path: str, value: Any) -> str | None:
    """What a former key with such a value is now, in a sentence; None if it is no former key."""
    if path not in FORMER_KEYS:
        return None
    if path == "model.backbone" and isinstance(value, str) and re.fullmatch(r"resnet\d+", value):
        return f"Write model.backbone.kind = 'resnet' and model.backbone.depth = {value.removeprefix('resnet')}."
    return f"It is {FORMER_KEYS[path]!r} now."


def leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted path -> value of nested tables."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return flat


def with_present_keys(values: Any) -> Any:
    """A recorded configuration under today's keys, without what its kinds do not read; one of today as it is."""
    try:
        return _moved(values) if isinstance(values["model"]["backbone"], str) else values
    except (AttributeError, KeyError, TypeError, ValueError):  # damaged: whoever reads it says where
        return values


def _moved(values: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(values)
    moved = {}
    for former, present in FORMER_KEYS.items():
        section, key = former.split(".")
        if key in result.get(section, {}):
            moved[present] = result[section].pop(key)
    if moved["model.backbone.kind"].startswith("resnet"):
        moved["model.backbone.depth"] = int(moved["model.backbone.kind"].removeprefix("resnet"))
        moved["model.backbone.kind"] = "resnet"
    kinds = {part: moved.get(f"model.{part}.kind", next(iter(known))) for part, known in _PARTS.items()}
    for path, value in moved.items():
        *tables, key = path.split(".")
        if tables[0] == "model" and key not in _PARTS[tables[1]][kinds[tables[1]]].model_fields:
            continue
        table = result
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return result


def as_recorded(values: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The values of a run under the names of its identity.

    Sections and kinds that came after the first recorded runs are in it where they are not at their defaults.
    `changed` are those of `values` that are not the defaults of their section and kind.
    """
    result = {name: dict(values[name]) for name in _FIRST_SECTIONS} | {"seed": values["seed"]}
    for part in _PARTS:
        del result["model"][part]
    result["model"] |= {"small_widths": [24, 48, 96, 160], "stride_in_1x1": False}  # of kinds that lack them, too
    present, chosen = leaves(values), leaves({key: value for key, value in changed.items() if key != "seed"})
    for part in ("detector", "mask_head"):
        if present[f"model.{part}.kind"] != next(iter(_PARTS[part])):
            result["model"][f"{part}.kind"] = present[f"model.{part}.kind"]
    for former, path in FORMER_KEYS.items():
        if path in present:
            section, key = former.split(".")
            result[section][key] = present[path]
    if present["model.backbone.kind"] == "resnet":
        result["model"]["backbone"] = f"resnet{present['model.backbone.depth']}"
    for path in chosen.keys() - {*FORMER_KEYS.values(), "model.backbone.depth"}:
        section, _, key = path.partition(".")
        if section == "model" or section not in _FIRST_SECTIONS:
            result.setdefault(section, {})[key] = chosen[path]
    return result


def without_unread(identity: dict[str, Any], *, initial: bool) -> dict[str, Any]:
    """An identity in which every key that nothing reads, under the kinds that are chosen, has one fixed value.

    Any values would do; these are what the recorded runs have, which so keep their identities. For their sake
    `ADDED_LATER` is left out here, too. `identity` is of `RunConfig.identity`, or of a version of it that kept these
    keys, and changed in place.
    """
    data, supervision, objective, model, optim = (
        identity[name] for name in ("data", "supervision", "objective", "model", "optim")
    )
    from_masks = supervision["source"] != "boxes"
    pseudo = supervision.get("pseudo") is not None
    coloured = objective["box"] == "projection+pairwise" or objective.get("affinity") == "learned"
    coloured = coloured or (pseudo and "pairwise" in objective.get("pseudo", ""))
    edges = coloured or (from_masks and objective["mask"] == "labelled")
    step, bifpn = optim["schedule"] == "step", model.get("neck") == "bifpn"
    for section, key, is_read, value in (
        (objective, "mask", from_masks, "dice"),
        (objective, "pseudo", pseudo, "dice"),
        (objective, "affinity_threshold", coloured, 0.1),
        (objective, "affinity_size", edges, 5),
        (objective, "affinity_dilation", edges, 2),
        (objective, "pairwise_warmup_steps", edges, 250),
        (data, "bottom_rows_without_affinity", edges, 0),
        (model, "weights", not initial, "random"),
        (model, "max_mask_positives", from_masks or pseudo or objective["box"] != "none", 5),
        (model, "mask_head.targets", from_masks and objective["mask"] == "rays", "mask"),
        (model, "small_widths", model["backbone"] == "small", [24, 48, 96, 160]),
        (model, "neck_repeats", bifpn, 6),
        (model, "neck_norm", bifpn, "bn"),
        (optim, "momentum", optim["optimizer"] == "sgd", 0.9),
        (optim, "milestones", step, [2 / 3, 8 / 9]),
        (optim, "warmup_steps", step, None),
        (optim, "warmup_factor", step and optim["warmup_steps"] != 0, 0.001),
        (optim, "accumulation", False, 1),  # only cuts a step, see `engine.processes.normalised_together`
    ):
        if key in section and not is_read:
            section[key] = value
    for name, added in ADDED_LATER.items():
        for key, value in added.items():
            if identity[name].get(key, ...) == value:
                del identity[name][key]
    return identity
