"""One process of `test_distributed`: gradients and losses of one optimizer step, written by the main process.

usage: accelerate launch --cpu --num_processes N -m tests.distributed_worker DATA_ROOT OUT [EMPTY_RANK]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_training_loader
from semiseg.engine.evaluate import predict_table
from semiseg.engine.run import build_evaluation_loader
from semiseg.engine.session import start_accelerator
from tests.test_train import without_instances
from tests.tiny import tiny_config


def main(root: Path, out: Path, empty_rank: int | None) -> None:
    config = tiny_config(root)
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    data = build_data(config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    state = training.prepare(config, data, accelerator)
    state.wrapped.train()
    loader = build_training_loader(
        config, data, steps=1, start_step=0, processes=processes, rank=rank, pin_memory=False
    )
    parts = list(loader)
    if empty_rank is not None:
        # On one process alone, the empty rank's images are the second half of the batch.
        share = config.optim.batch_size // 2
        mine = list(range(share)) if processes > 1 else list(range(empty_rank * share, (empty_rank + 1) * share))
        if processes == 1 or rank == empty_rank:
            parts = [without_instances(part, mine) for part in parts]
    plans = [state.step_module.plan(part) for part in parts]
    counts = accelerator.reduce(torch.stack([plan.counts for plan in plans]).sum(0), reduction="sum")
    losses, weighted = training._forward_backward(state, parts, plans, counts)
    numbers = accelerator.reduce(torch.stack([losses, weighted]).double(), reduction="mean")
    gradient = torch.cat([p.grad.flatten() for p in state.step_module.parameters() if p.requires_grad])
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
    detections = predict_table(
        state.step_module.model, evaluation, data.val, accelerator, config=config.model, progress=False
    )
    if accelerator.is_main_process:
        torch.save(
            {"processes": processes, "numbers": numbers, "gradient": gradient.clone(), "detections": detections}, out
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
