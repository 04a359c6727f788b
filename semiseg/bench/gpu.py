"""The rows of a GPU: the same work as on the CPU, and the training step in bf16 against float32.

What the losses and the mask head compute on the GPU is compared with the straightforward formulation on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from semiseg.bench import affinity, dynamic_head, mask_losses
from semiseg.bench.row import Close, Place, Prepare, Row, Sizes, Task, array
from semiseg.bench.step import our_step, step_run
from semiseg.engine.build import compile_network

# Dense bf16 matrix peak in TFLOP/s, as the makers' data sheets give it; by a part of the device's name, longer first.
MATRIX_PEAKS = {
    "H100 PCIe": 756,
    "H200": 989,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
BF16_LOSSES = 0.05  # of the largest loss: bf16 has 8 bits of mantissa, and other positives may be sampled


@dataclass(frozen=True)
class CheckedOnCpu:
    """A side that runs on the GPU and shows as its result what the same side computes on the CPU."""

    prepare: Prepare

    def __call__(self, sizes: Sizes, place: Place) -> Task:
        task = self.prepare(sizes, place)

        def result(_: Any) -> dict[str, Any]:
            on_cpu = self.prepare(sizes, replace(place, device=torch.device("cpu")))
            return on_cpu.result(on_cpu.run())

        return replace(task, result=result)


def on_gpu(row: Row) -> Row:
    """A row of the CPU with both sides on the GPU; the reference for its result stays on the CPU."""
    return replace(row, name=f"{row.name}_gpu", device="cuda", straightforward=CheckedOnCpu(row.straightforward))


def matrix_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, None if it is not listed."""
    found = [peak for part, peak in MATRIX_PEAKS.items() if part in name]
    return found[0] * 1e12 if found else None


def _fast_step(sizes: Sizes, place: Place) -> Task:
    step = our_step(sizes).to(place.device).to(memory_format=torch.channels_last).train()
    if place.device.type == "cuda":  # on a CPU the row serves tests, for which compiling takes too long
        compile_network(step.model)
    run = step_run(step, sizes, place.device, bfloat16=True)
    run()  # compiles
    return Task(run, lambda losses: {"losses": array(losses)})


def _eager_step(sizes: Sizes, place: Place) -> Task:
    step = our_step(sizes).to(place.device).train()
    run = step_run(step, sizes, place.device, bfloat16=False)
    return Task(run, lambda losses: {"losses": array(losses)})


def step_facts(sizes: Sizes, seconds: float) -> dict[str, float]:
    """Images per second; FLOPs of a step's products and convolutions, and the share of the matrix peak that they are.

    Counted on the GPU where there is one, else on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = step_run(our_step(sizes).to(device).train(), sizes, device, bfloat16=False)
    with FlopCounterMode(display=False) as counter:
        run()
    flops = float(counter.get_total_flops())
    facts = {"images_per_second": sizes["images"] / seconds, "flops_per_step": flops}
    peak = matrix_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return facts if peak is None else {**facts, "share_of_matrix_peak": flops / seconds / peak}


STEP_ROW = Row(
    name="step_gpu",
    sizes={"images": 8, "height": 800, "width": 1216, "boxes": 8, "classes": 80},
    quick={"images": 4},
    tiny={"images": 2, "height": 64, "width": 96, "boxes": 2},
    passes=12,
    quick_passes=6,
    ours=_fast_step,
    straightforward=_eager_step,
    agree=Close(BF16_LOSSES),
    device="cuda",
    facts=step_facts,
)

GPU_ROWS: tuple[Row, ...] = (
    on_gpu(mask_losses.ROW),
    on_gpu(affinity.ROW),
    on_gpu(dynamic_head.ROW),
    STEP_ROW,
)
