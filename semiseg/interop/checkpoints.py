"""Released checkpoints of others: read without running their code, and fitted to a network by their keys."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.config import ModelConfig
from semiseg.engine.checkpoint import BATCHES_SEEN, load_tensors
from semiseg.errors import UserError
from semiseg.models.build import build_model

RESNETS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101}  # blocks of the stages -> depth


@dataclass(frozen=True)
class Converted:
    """A released checkpoint as weights and configuration of this package."""

    weights: dict[str, Tensor]  # the state dict of `build_model(config, num_classes=num_classes)`, float32
    config: ModelConfig  # of the network; its backbone's `weights` is "random", since nothing else is to be loaded
    num_classes: int  # C
    dropped: tuple[str, ...]  # keys of the file that only training needs


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
        _require_numbers(value, f"{path}: {key}")
    return dict(state)


def require_keys(state: Mapping[str, Tensor], keys: Iterable[str], *, network: str, where: str) -> None:
    """A UserError if one of the keys that every such network has is absent."""
    for key in keys:
        if key not in state:
            first = ", ".join(list(state)[:3]) or "none"
            raise UserError(f"{where}: not {network}: no key {key}; its first keys are {first}")


def resnet_depth(blocks: Sequence[int], *, what: str, where: str) -> int:
    """The depth of a ResNet with so many blocks in its stages, which `what` names in the UserError if there is none."""
    if tuple(blocks) not in RESNETS:
        known = " and ".join(f"{'-'.join(map(str, count))} (resnet{depth})" for count, depth in RESNETS.items())
        raise UserError(f"{where}: {what} {'-'.join(map(str, blocks))} blocks; known are {known}")
    return RESNETS[tuple(blocks)]


def depth_by_keys(state: Iterable[str], pattern: str, stages: Sequence[int], *, where: str) -> int:
    """The same by the numbers of stage and block that a pattern's two groups take at the beginning of keys."""
    blocks = [(int(found[1]), int(found[2])) for key in state if (found := re.match(pattern, key))]
    counts = [1 + max((last for stage, last in blocks if stage == number), default=-1) for number in stages]
    return resnet_depth(counts, what="the backbone has", where=where)


def shapes_of(config: ModelConfig, *, num_classes: int) -> dict[str, Tensor]:
    """The state dict of the network, without memory: names, shapes and types."""
    with torch.device("meta"):
        weights: dict[str, Tensor] = build_model(config, num_classes=num_classes).state_dict()
    return weights


def fitted(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    left: Iterable[str],
    *,
    where: str,
) -> dict[str, Tensor]:
    """The expected weights from a file's, copied in the expected type; counters of batches that it lacks are 0.

    Args:
        names: of each expected weight in the file.
        left: keys of the file that nothing takes.
        where: begins the UserError that lists keys which are unknown, missing or of another shape.
    """
    _refuse_unmatched(
        unknown=list(left),
        missing=[name for key, name in names.items() if name not in state and not key.endswith(BATCHES_SEEN)],
        reshaped=[
            f"{name} {tuple(state[name].shape)}, expected {tuple(expected[key].shape)}"
            for key, name in names.items()
            if name in state and state[name].shape != expected[key].shape
        ],
        where=where,
    )
    return {
        key: state[name].detach().to(expected[key].dtype, copy=True)
        if name in state
        else torch.zeros(expected[key].shape, dtype=expected[key].dtype)
        for key, name in names.items()
    }


def _require_numbers(weight: Tensor, what: str) -> None:
    """Refuses a weight that no network could compute with."""
    if weight.layout != torch.strided or weight.is_complex():
        kind = f"{str(weight.dtype).removeprefix('torch.')}, {str(weight.layout).removeprefix('torch.')}"
        raise UserError(f"{what} is {kind}; expected a dense tensor of real numbers")
    if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
        raise UserError(f"{what} has values that are not finite")


def _refuse_unmatched(*, unknown: list[str], missing: list[str], reshaped: list[str], where: str) -> None:
    kinds = (("unknown", unknown), ("missing", missing), ("of another shape", reshaped))
    told = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds if keys]
    if told:
        raise UserError(f"{where}: its keys are not those of the network that they look like; {'; '.join(told)}")
