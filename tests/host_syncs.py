"""Counts what would make a GPU wait for the host, on any device: where it happens in semiseg, and by which operation.

with HostSyncs() as found: ...; found.places() -> {("models/detectors/assign.py", "_smallest_box", "nonzero"): 1, ...}
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parent.parent / "semiseg"

# aten operations whose output size or value must be known to the host.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "allclose"}
# Calls of Python that read values, and those that send Python's values to a device.
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SENDS = {"tensor", "as_tensor", "new_tensor", "asarray"}

ImageDetections = tuple[str, str, str]  # file below the package, function, operation


class HostSyncs:
    """A context that counts; `places()` afterwards."""

    def __init__(self) -> None:
        self.count: Counter[ImageDetections] = Counter()
        self._modes = (_Calls(self.count), _Operations(self.count))

    def __enter__(self) -> HostSyncs:
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # type: ignore[no-untyped-call]  # torch's

    def places(self) -> dict[ImageDetections, int]:
        return dict(self.count)

    def table(self) -> str:
        """A line per place, for people."""
        return "\n".join(
            f"{n:3d}  {file}:{function}  {what}" for (file, function, what), n in sorted(self.count.items())
        )


class _Calls(TorchFunctionMode):
    """Sees the methods of tensors, `tolist` among them, which on a CPU reaches no aten operation."""

    def __init__(self, count: Counter[ImageDetections]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = (resolve_name(function) or getattr(function, "__name__", "")).split(".")[-1]
        kwargs = kwargs or {}
        if name in READS or (name in SENDS and not any(isinstance(value, torch.Tensor) for value in args[-1:])):
            self.count[*_place(), name] += 1
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees aten operations, those of the backward included."""

    def __init__(self, count: Counter[ImageDetections]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = count

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name in WAITING:
            self.count[*_place(), name] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and _has_mask(args[1]):
            self.count[*_place(), f"{name} by a mask"] += 1
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.count[*_place(), "repeat_interleave without output_size"] += 1
        elif name == "_to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.count[*_place(), "to another device"] += 1
        return operation(*args, **kwargs)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _place() -> tuple[str, str]:
    """File and function of the innermost frame in the package; those of a backward have none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return str(path.relative_to(PACKAGE)), frame.f_code.co_name
        frame = frame.f_back
    return "-", "-"
