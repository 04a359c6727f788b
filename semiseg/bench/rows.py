"""All rows of the benchmark, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from semiseg.bench import affinity, data, dynamic_head, evaluation, mask_losses, postprocess, step
from semiseg.bench.gpu import GPU_ROWS
from semiseg.bench.row import Row
from semiseg.errors import UserError

ROWS: tuple[Row, ...] = (
    mask_losses.ROW,
    affinity.ROW,
    dynamic_head.ROW,
    step.ROW,
    postprocess.ROW,
    evaluation.ROW,
    data.ROW,
)
# Rows that need something that not every machine has.
OPTIONAL_ROWS: tuple[Row, ...] = (evaluation.HOTCOCO_ROW, *GPU_ROWS)


def available_rows() -> tuple[Row, ...]:
    """The rows that this machine can measure: those of a GPU and of optional packages only where these are."""
    return ROWS + tuple(row for row in OPTIONAL_ROWS if _lacks(row) is None)


def chosen_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """The available rows of these names, in the order of the table; without names all.

    Raises:
        UserError: a name that is no row, or whose row cannot be measured here.
    """
    here = available_rows()
    known = [row.name for row in here]
    wrong = [name for name in names if name not in known]
    if wrong:
        lacks = {row.name: _lacks(row) for row in OPTIONAL_ROWS}.get(wrong[0])
        reason = "no such row" if lacks is None else f"this machine has no {lacks}"
        raise UserError(f"--only {wrong[0]}: {reason}; rows here: {', '.join(known)}")
    return tuple(row for row in here if not names or row.name in names)


def _lacks(row: Row) -> str | None:
    """What the row needs and this machine has not."""
    if row.device == "cuda" and not torch.cuda.is_available():
        return "GPU"
    return row.package if row.package is not None and find_spec(row.package) is None else None
