"""The tensors of a structure, all at once; sending them from the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Structure = TypeVar("Structure")


def map_tensors(structure: Structure, function: Callable[[Tensor], Tensor]) -> Structure:
    """The same structure (dataclasses, dictionaries and tuples of tensors and other values) with its tensors mapped."""
    mapped: Any = structure
    if isinstance(mapped, Tensor):
        mapped = function(mapped)
    elif isinstance(mapped, tuple):
        mapped = tuple(map_tensors(value, function) for value in mapped)
    elif isinstance(mapped, dict):
        mapped = {key: map_tensors(value, function) for key, value in mapped.items()}
    elif is_dataclass(mapped) and not isinstance(mapped, type):
        values = {field.name: map_tensors(getattr(mapped, field.name), function) for field in fields(mapped)}
        mapped = replace(mapped, **values)
    return cast(Structure, mapped)


def send(structure: Structure, device: torch.device) -> Structure:
    """The same structure on that device, see `map_tensors`.

    On a GPU the copies are queued behind the work at hand and the host goes on: memory that is not pinned yet is
    pinned first, since a copy from other memory would make the host wait. On the CPU nothing is copied.
    """

    def copied(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return pinned.to(device, non_blocking=True)

    return structure if device.type == "cpu" else map_tensors(structure, copied)
