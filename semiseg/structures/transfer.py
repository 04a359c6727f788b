"""Sending structures from the host to a device without waiting for it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Structure = TypeVar("Structure")


def send(structure: Structure, device: torch.device) -> Structure:
    """The same structure (dataclasses, dictionaries and tuples of tensors and of what else they hold).

    On a GPU the copies are queued behind the work at hand and the host goes on: memory that is not pinned yet is
    pinned first, since a copy from other memory would make the host wait. On the CPU nothing is copied.
    """
    return structure if device.type == "cpu" else _send(structure, device)


def _send(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        pinned = item.pin_memory() if device.type == "cuda" and item.device.type == "cpu" else item
        return pinned.to(device, non_blocking=True)
    if isinstance(item, tuple):
        return tuple(_send(value, device) for value in item)
    if isinstance(item, dict):
        return {key: _send(value, device) for key, value in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        changed = {field.name: _send(getattr(item, field.name), device) for field in fields(item)}
        return replace(item, **changed)
    return item
