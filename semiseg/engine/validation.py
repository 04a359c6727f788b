"""The training's losses on the validation set: those of one step whose batch is the whole set."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from semiseg.config import RunConfig
from semiseg.data.dataset import build_rule
from semiseg.engine.build import RunData, build_evaluation_loader
from semiseg.engine.rays import build_ray_rule
from semiseg.engine.step import TrainStep
from semiseg.models.segmenter import Segmenter


@torch.no_grad()
def validation_losses(
    config: RunConfig, data: RunData, module: TrainStep, model: Segmenter, accelerator: Accelerator, *, warmup: float
) -> dict[str, float]:
    """`loss`, the weighted sum, and `loss_NAME` of every term, unweighted; the same on all processes.

    Objects teach what they would in training, by the run's class split and objective: those of unseen classes as boxes
    alone. Images are resized as for the evaluation, batch norms use their running statistics. The set is read twice,
    since every denominator counts over all of it.
    """
    loader = build_evaluation_loader(
        data.val,
        model=config.model,
        inference=config.inference,
        runtime=config.runtime,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        rule=build_rule(config.supervision.source, data.split),
        rays=build_ray_rule(config, data.val),
        bottom_rows_without_affinity=config.data.bottom_rows_without_affinity,
    )
    device = accelerator.device
    counts = torch.zeros(len(module.count_names), dtype=torch.float64, device=device)
    for batch in loader:
        counts += module.plan(batch.to(device), batch).counts
    counts = accelerator.reduce(counts, reduction="sum")
    sums = torch.zeros(2, len(module.loss_names), dtype=torch.float64, device=device)
    trained, modes = module.model, (module.training, model.training)
    module.model = model
    try:
        module.train()  # heads leave out in evaluation what only losses need
        _with_running_statistics(module)
        with accelerator.autocast():
            for batch in loader:
                sent = batch.to(device)
                terms = module(sent, module.plan(sent, batch), counts, warmup=warmup, processes=1)
                for row, values in zip(sums, (terms.unweighted, terms.weighted), strict=True):
                    row += torch.stack([values[name] for name in module.loss_names])
    finally:
        module.model = trained
        module.train(modes[0])
        model.train(modes[1])
    unweighted, weighted = accelerator.reduce(sums, reduction="sum").tolist()
    return {"loss": sum(weighted)} | {
        f"loss_{name}": value for name, value in zip(module.loss_names, unweighted, strict=True)
    }


def _with_running_statistics(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm):
            part.eval()
