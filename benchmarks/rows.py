"""All rows of the benchmark, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import data, evaluation, head_steps, heads, learned, masks, refine, step
from benchmarks.measure import Place, Row, Side, Sizes, Task
from semiseg.errors import UserError


def on_gpu(row: Row) -> Row:
    """A row of the CPU with both sides on the GPU; the reference for its result is computed on the CPU."""
    return replace(row, name=f"{row.name}_gpu", device="cuda", prepare=partial(_checked_on_cpu, row.prepare))


def _checked_on_cpu(prepare: Callable[..., Task], side: Side, sizes: Sizes, place: Place) -> Task:
    task = prepare(side, sizes, place)

    def result(_: Any) -> dict[str, Any]:
        on_cpu = prepare(side, sizes, place._replace(device=torch.device("cpu")))
        return on_cpu.result(on_cpu.run())

    return replace(task, result=result) if side == "straightforward" else task


ROWS: tuple[Row, ...] = (
    masks.MASK_LOSSES,
    masks.AFFINITY,
    masks.DYNAMIC_HEAD,
    step.STEP,
    masks.POSTPROCESS,
    evaluation.EVALUATION,
    data.DATA,
)
# Rows that are measured only where they are named.
NAMED_ROWS: tuple[Row, ...] = (
    learned.LEARNED_STEP,
    learned.LEARNED_SHAPES,
    refine.CRF,
    refine.GRABCUT,
    heads.MASK_RCNN_STEP,
    heads.MASK_RCNN_DETECT,
    heads.CROP_LOSSES,
    *head_steps.STEPS,
)
# Rows that need something that not every machine has.
OPTIONAL_ROWS: tuple[Row, ...] = (
    evaluation.EVALUATION_HOTCOCO,
    *(on_gpu(row) for row in (masks.MASK_LOSSES, masks.AFFINITY, masks.DYNAMIC_HEAD)),
    step.STEP_GPU,
)


def chosen_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows of these names that this machine can measure, in the order of the table.

    Without names all but `NAMED_ROWS`.

    Raises:
        UserError: a name that is no row, or whose row cannot be measured here.
    """
    here = ROWS + tuple(row for row in OPTIONAL_ROWS if _lacks(row) is None)
    if not names:
        return here
    here += tuple(row for row in NAMED_ROWS if _lacks(row) is None)
    known = [row.name for row in here]
    wrong = [name for name in names if name not in known]
    if wrong:
        lacks = {row.name: _lacks(row) for row in OPTIONAL_ROWS + NAMED_ROWS}.get(wrong[0])
        reason = "no such row" if lacks is None else f"this machine has no {lacks}"
        raise UserError(f"--only {wrong[0]}: {reason}; rows here: {', '.join(known)}")
    return tuple(row for row in here if row.name in names)


def _lacks(row: Row) -> str | None:
    """What the row needs and this machine has not."""
    if row.device == "cuda" and not torch.cuda.is_available():
        return "GPU"
    return row.package if row.package is not None and find_spec(row.package) is None else None
