"""The optimiser, and its schedules as pure functions of the step: neither resuming nor accumulation changes them."""

from __future__ import annotations

import math

import torch
from torch import nn

from semiseg.config import OptimConfig

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: OptimConfig, *, scaled: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters; those of norms get no weight decay (METHOD section 3).

    `scaled`: a scaler (of fp16) will leave out updates. torch's fused SGD does so as well, but if the first is left
    out, it goes on with a momentum that was never written.
    """
    norm_parameters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in norm_parameters], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) in norm_parameters], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=not scaled)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(config: OptimConfig, *, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0)."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "one_cycle":
        return config.learning_rate * one_cycle(step, steps)
    return config.learning_rate * _step_factor(config, step, steps)


def _step_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up from `warmup_factor`, then divided by ten at each milestone; the paper's 1x: 60 000 and 80 000.

    Without `warmup_steps` the warm-up is 1000 steps, at most a ninth of the run, so that short runs leave it.
    """
    warmup = min(1000, steps // 9) if config.warmup_steps is None else config.warmup_steps
    factor = 0.1 ** sum(step >= round(milestone * steps) for milestone in config.milestones)
    if step < warmup:
        factor *= config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    return float(factor)


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
