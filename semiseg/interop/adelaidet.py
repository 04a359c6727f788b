"""Released CondInst and BoxInst checkpoints: recognised, renamed to this package's model.

Their networks take BGR images; here the stem's input channels are turned around, so that the model takes RGB as every
other does. Source of the names: the checkpoints themselves (METHOD section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from semiseg.interop.adelaidet_names import TRAINING_ONLY, file_name, recognise
from semiseg.interop.checkpoints import Converted, fitted, read_state, shapes_of

STEM = "backbone.conv1.weight"


def convert_checkpoint(path: Path) -> Converted:
    """Reads a released `.pth`, see `read_state`, and converts it, see `convert_state`; no code of the file runs."""
    return convert_state(read_state(path), where=str(path))


def convert_state(state: Mapping[str, Tensor], *, where: str) -> Converted:
    """Converts a state dict in the released spelling; a UserError of `where` if it is of another network."""
    config, num_classes = recognise(state, where=where)
    expected = shapes_of(config, num_classes=num_classes)
    names = {key: file_name(key, neck=config.neck.kind) for key in expected}
    left = sorted(set(state) - set(names.values()))
    dropped = tuple(key for key in left if TRAINING_ONLY.fullmatch(key))
    weights = fitted(state, names, expected, [key for key in left if key not in dropped], where=where)
    weights[STEM] = weights[STEM].flip(1)  # (64, 3, 7, 7): BGR to RGB
    return Converted(weights=weights, config=config, num_classes=num_classes, dropped=dropped)
