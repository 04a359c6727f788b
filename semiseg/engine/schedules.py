"""Schedules as pure functions of the step: no counters, so that resuming and accumulation cannot change them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def step_schedule(
    step: int, steps: int, *, milestones: Sequence[float], warmup_steps: int | None, warmup_factor: float
) -> float:
    """Factor of the learning rate at `step` (from 0): linear warm-up, then divided by ten at each milestone.

    Args:
        milestones: fractions of the run; the paper's 1x has 60 000 and 80 000 of 90 000.
        warmup_steps: None means 1000, at most a ninth of the run, so that short runs leave the warm-up.
        warmup_factor: factor at step 0.
    """
    warmup = min(1000, steps // 9) if warmup_steps is None else warmup_steps
    drops = sum(step >= round(milestone * steps) for milestone in milestones)
    factor = 0.1**drops
    if step < warmup:
        factor *= warmup_factor + (1 - warmup_factor) * step / warmup
    return factor


def one_cycle(step: int, steps: int, *, rise: float = 0.2, start: float = 0.04, end: float = 1e-4) -> float:
    """Factor of the learning rate at `step`: cosine rise from `start` to 1 over the share `rise`, cosine fall to `end`.

    Source: Smith and Topin, Super-Convergence (2018), with cosine arms.
    """
    peak = rise * steps
    low, progress = (start, step / peak) if step < peak else (end, (steps - step) / (steps - peak))
    return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * progress))


def pairwise_warmup(step: int, steps: int, *, warmup_steps: int | None) -> float:
    """Factor of the pairwise loss at `step` (from 0): min((step + 1) / W, 1), W = min(10 000, steps / 9).

    Deviation: the reference's W is 10 000 whatever the length of the run (docs/NUMERICS.md).
    """
    warmup = min(10_000, steps / 9) if warmup_steps is None else warmup_steps
    return min((step + 1) / warmup, 1.0) if warmup > 0 else 1.0
