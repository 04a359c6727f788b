"""The optimiser and its learning rate, from the configuration."""

from __future__ import annotations

import torch
from torch import nn

from semiseg.config import OptimConfig
from semiseg.engine.schedules import one_cycle, step_schedule

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, config: OptimConfig, *, scaled: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters; those of norms get no weight decay (METHOD section 3).

    Args:
        scaled: a scaler (of fp16) will leave out updates. torch's fused SGD does so as well, but if the first is left
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
    factor = step_schedule(
        step,
        steps,
        milestones=config.milestones,
        warmup_steps=config.warmup_steps,
        warmup_factor=config.warmup_factor,
    )
    return config.learning_rate * factor
