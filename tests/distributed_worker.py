"""One process of `test_distributed`: losses and gradients of one optimizer step, detections, a loss that is not finite.

usage: accelerate launch --multi_gpu --num_processes N -m tests.distributed_worker DATA_ROOT OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_evaluation_loader, build_training_loader
from semiseg.engine.evaluate import predict_table
from semiseg.engine.session import start_accelerator
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch
from tests.test_train import without_instances
from tests.tiny import tiny_config


def gradients(state: training.TrainState, parts: list[Batch]) -> dict[str, Any]:
    """Losses (mean over processes) and gradients (averaged by data parallelism) of one step."""
    accelerator = state.accelerator
    state.optimizer.zero_grad()
    plans = [state.step_module.plan(part) for part in parts]
    counts = accelerator.reduce(torch.stack([plan.counts for plan in plans]).sum(0), reduction="sum")
    losses, weighted = training._forward_backward(state, parts, plans, counts)
    numbers = accelerator.reduce(torch.stack([losses, weighted]).double(), reduction="mean")
    flat = torch.cat([p.grad.flatten() for p in state.step_module.parameters() if p.grad is not None])
    return {"numbers": numbers.clone(), "gradient": flat.clone()}


def stop_by_last_process(state: training.TrainState, parts: list[Batch], out: Path) -> dict[str, Any]:
    """What every process says, and whether its weights stay, when the loss of the last one is not finite."""
    accelerator = state.accelerator
    bias = state.step_module.model.head.class_logits.bias
    assert bias is not None
    if accelerator.is_last_process:
        with torch.no_grad():
            bias.fill_(float("nan"))
    before = [parameter.clone() for parameter in state.step_module.parameters()]
    sentence = "it went on"
    try:
        training.optimizer_step(state, parts, out=out)
    except UserError as error:
        sentence = str(error)
    pairs = zip(before, state.step_module.parameters(), strict=True)
    unchanged = all(torch.allclose(old, new, rtol=0, atol=0, equal_nan=True) for old, new in pairs)
    return {"sentences": gather_object([sentence]), "unchanged": gather_object([unchanged])}


def main(root: Path, out: Path) -> None:
    config = tiny_config(root, model={"score_threshold": 0.001})
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    data = build_data(config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    state = training.prepare(config, data, accelerator)
    state.wrapped.train()
    parts = list(
        build_training_loader(config, data, steps=1, start_step=0, processes=processes, rank=rank, pin_memory=False)
    )
    # The second half of the batch is rank 1's: without instances there, one rank of two has none at all.
    share = config.optim.batch_size // 2
    emptied = {1: list(range(share, 2 * share)), 2: list(range(share)) if rank == 1 else []}[processes]
    results = {
        "processes": processes,
        "all": gradients(state, parts),
        "empty": gradients(state, [without_instances(part, emptied) for part in parts]),
    }
    evaluation = build_evaluation_loader(
        data.val,
        short_side=64,
        long_side=64,
        mask_stride=4,
        size_divisor=32,
        batch_size=1,
        workers=0,
        processes=processes,
        rank=rank,
    )
    results["detections"], results["image_ids"] = predict_table(
        state.step_module.model, evaluation, data.val, accelerator, config=config.model, progress=False
    )
    results["stopped"] = stop_by_last_process(state, parts, out.parent)
    if accelerator.is_main_process:
        torch.save(results, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
