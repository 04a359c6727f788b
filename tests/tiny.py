"""The smallest run that is still the real thing: a few 64-pixel Shapes images and a network of a few channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from semiseg.config import RunConfig
from semiseg.config_files import merge, parse_config

TINY: dict[str, Any] = {
    "data": {
        "format": "shapes",
        "shapes": {"image_size": 64, "train_images": 12, "val_images": 4, "train_seed": 901, "val_seed": 902},
        "short_sides": [64],
        "long_side": 64,
        "val_short_side": 64,
        "val_long_side": 64,
        "bottom_rows_without_affinity": 0,
    },
    "supervision": {"source": "split", "split": "shapes_few_seen"},
    "model": {
        "backbone": "small",
        "weights": "random",
        "small_widths": [8, 8, 16, 16],
        "backbone_norm": "frozen_bn",
        "frozen_stages": 0,
        "neck_channels": 16,
        "strides": [8, 16, 32],
        "level_ranges": [24, 48],
        "tower_convs": 1,
        "tower_groups": 4,
        "mask_branch_channels": 8,
        "mask_branch_convs": 1,
        "mask_branch_norm": "gn",
        "mask_channels": 4,
        "mask_stride": 4,
    },
    "optim": {"optimizer": "sgd", "learning_rate": 0.01, "schedule": "constant", "steps": 4, "batch_size": 4},
    "runtime": {"workers": 0, "threads": 1, "tensorboard": False, "log_every": 1},
}


def tiny_config(root: Path, **sections: dict[str, Any] | int | str | None) -> RunConfig:
    """The tiny run with its data under `root` and the given sections laid over it."""
    values = merge(TINY, {"data": {"root": str(root)}})
    return parse_config(RunConfig, merge(values, sections), where="tiny")
