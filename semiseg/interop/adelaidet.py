"""Released CondInst and BoxInst checkpoints: read, recognised, renamed to this package's model.

Their networks take BGR images; here the stem's input channels are turned around, so that the model takes RGB as every
other does. Source of the names: the checkpoints themselves (METHOD section 3).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.config import ModelConfig
from semiseg.engine.checkpoint import BATCHES_SEEN, load_tensors
from semiseg.errors import UserError
from semiseg.interop.adelaidet_names import TRAINING_ONLY, file_name, recognise
from semiseg.models.build import build_model

STEM = "backbone.conv1.weight"


@dataclass(frozen=True)
class Converted:
    """A released checkpoint as weights and configuration of this package."""

    weights: dict[str, Tensor]  # the state dict of `build_model(config, num_classes=num_classes)`, float32
    config: ModelConfig  # of the network; its backbone's `weights` is "random", since nothing else is to be loaded
    num_classes: int  # C
    dropped: tuple[str, ...]  # keys of the file that only training needs


def convert_checkpoint(path: Path) -> Converted:
    """Reads a released `.pth`, see `read_state`, and converts it, see `convert_state`; no code of the file runs."""
    return convert_state(read_state(path), where=str(path))


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file: the table itself, or its entry `model`; a UserError if it holds none."""
    try:
        with warnings.catch_warnings():  # torch warns of a pickle's protocol before it refuses it
            warnings.simplefilter("ignore", UserWarning)
            held = load_tensors(path)
    except UserError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise UserError(
                f"{path}: not a torch file of tensors and plain values; anything else could run code and is not read"
            ) from None
        raise
    state: Any = held.get("model", held)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: 'model' is not a state dict, names to tensors")
    if not state:
        raise UserError(f"{path}: holds no tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: not a state dict: {key!r} is {type(value).__name__}, expected a tensor")
    return dict(state)


def convert_state(state: Mapping[str, Tensor], *, where: str) -> Converted:
    """Converts a state dict in the released spelling; a UserError of `where` if it is of another network."""
    config, num_classes = recognise(state, where=where)
    with torch.device("meta"):  # names and shapes only
        expected = build_model(config, num_classes=num_classes).state_dict()
    names = {key: file_name(key, neck=config.neck.kind) for key in expected}
    left = sorted(set(state) - set(names.values()))
    dropped = tuple(key for key in left if TRAINING_ONLY.fullmatch(key))
    _refuse_unmatched(
        unknown=[key for key in left if key not in dropped],
        missing=[name for key, name in names.items() if name not in state and not key.endswith(BATCHES_SEEN)],
        reshaped=[
            f"{name} {tuple(state[name].shape)}, expected {tuple(expected[key].shape)}"
            for key, name in names.items()
            if name in state and state[name].shape != expected[key].shape
        ],
        where=where,
    )
    weights = {
        key: state[name].detach().to(expected[key].dtype, copy=True)
        if name in state
        else torch.zeros(expected[key].shape, dtype=expected[key].dtype)
        for key, name in names.items()
    }
    weights[STEM] = weights[STEM].flip(1)  # (64, 3, 7, 7): BGR to RGB
    return Converted(weights=weights, config=config, num_classes=num_classes, dropped=dropped)


def _refuse_unmatched(*, unknown: list[str], missing: list[str], reshaped: list[str], where: str) -> None:
    kinds = (("unknown", unknown), ("missing", missing), ("of another shape", reshaped))
    told = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds if keys]
    if told:
        raise UserError(f"{where}: its keys are not those of the network that they look like; {'; '.join(told)}")
