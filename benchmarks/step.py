"""Row `step`: forward and backward of one training step of BoxInst, ResNet-50; the update is the same for both.
Row `step_gpu`: the step in bf16, channels-last and compiled, against float32.

Straightforward: `plain_step`. Both start from the same random weights.

How close the gradients can be: among the millions of numbers before ReLUs, up to 4e-6 beside a deviation of 1, two to
six have another sign in float32 than in float64, on either side, and others with another number of threads. With the
signs of either float32 run, float64 gives its gradients to 3e-5 of their norms; with its own signs, only to 2e-2: in
the coarsest level of a small image one ReLU is a good part of a gradient. Such a distance is no error of a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inputs import coco_like_boxes, picture, shared_out
from benchmarks.measure import Close, Place, Result, Row, Side, Sizes, Task
from benchmarks.plain_step import DILATION, MAX_POSITIVES, SIZE, THRESHOLD, PlainCondInst, plain_losses
from semiseg.config import ModelConfig
from semiseg.engine.build import compile_network
from semiseg.engine.detection import detector_step
from semiseg.engine.step import TrainStep
from semiseg.losses.detection import LOSSES as DETECTION_LOSSES
from semiseg.losses.terms import Objective
from semiseg.models.build import build_model
from semiseg.structures.inputs import Batch, Targets

LOSSES = (*DETECTION_LOSSES, "projection", "pairwise")
RESIDUAL_SCALE = 0.2  # of the last norm of a residual block, so that activations stay small without trained norms
LEAST_NORM = 1e-12  # of a gradient: that of a level without positives is 0
SUMS_PER_GRADIENT = 64
LOSS_TOLERANCE = 1e-5  # of the largest; they differed by at most 4e-7
BF16_LOSSES = 0.05  # of the largest loss: bf16 has 8 bits of mantissa, and other positives may be sampled
# Dense bf16 matrix peak in TFLOP/s, as the makers' data sheets give it; by a part of the device's name, longer first.
MATRIX_PEAKS = {
    "H100 PCIe": 756,
    "H200": 989,
    "H100": 989,
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


@dataclass(frozen=True)
class CloseGradients:
    """Steps agree if their losses do, no gradient is further than `every` of its norm, and half of them are nearer.

    Attributes:
        every: bound of the distance of any parameter's gradient, in the norm of the straightforward one.
        half: bound for half of the gradients. A wrong loss shows in most of them, a ReLU near 0 only on small maps: of
            8 x 8 cells with a batch norm behind, one that flips moved half of all gradients by 0.8 %, one by 2.3 %
            (AVX-512, channels-last beside contiguous; the losses agreed to 2e-7).
    """

    every: float
    half: float = 2e-3  # the median was at most 1e-3

    def __call__(self, ours: Result, straightforward: Result) -> bool:
        """Whether they agree; both as `step_result` returns them."""
        losses = [{"names": side["names"], "losses": side["losses"]} for side in (ours, straightforward)]
        if not Close(LOSS_TOLERANCE)(*losses):
            return False
        norms = np.linalg.norm(straightforward["sums"], axis=1).clip(min=LEAST_NORM)
        distances = np.linalg.norm(ours["sums"] - straightforward["sums"], axis=1) / norms
        return bool((distances <= self.every).all() and np.median(distances) <= self.half)  # not if any is NaN


def prepare_step(side: Side, sizes: Sizes, place: Place) -> Task:
    """`step`: ours in the default layout of a run."""
    step = our_step(sizes)
    if side == "ours":
        step = step.to(place.device).to(memory_format=torch.channels_last).train()
        run = step_run(step, sizes, place.device, bfloat16=False)
        return Task(run, lambda losses: step_result(losses, step.model))
    model = PlainCondInst(sizes["classes"])
    model.load_state_dict(step.model.state_dict())
    model.to(place.device).train()
    batch = training_batch(sizes).to(place.device)
    targets = batch.targets
    assert targets is not None
    inputs = (batch.images, targets.boxes_xyxy, targets.labels, targets.image_index)

    def plain_run() -> Tensor:
        model.zero_grad(set_to_none=True)
        losses = plain_losses(model, *inputs)
        values = torch.stack([losses[name] for name in LOSSES])
        values.sum().backward()
        return values.detach()

    return Task(plain_run, lambda losses: step_result(losses, model))


def prepare_gpu_step(side: Side, sizes: Sizes, place: Place) -> Task:
    """`step_gpu`: bf16, channels-last and compiled against float32."""
    step, fast = our_step(sizes).to(place.device).train(), side == "ours"
    if fast:
        step = step.to(memory_format=torch.channels_last)
    run = step_run(step, sizes, place.device, bfloat16=fast)
    if fast and place.device.type == "cuda":  # on a CPU the row serves tests, for which compiling takes too long
        compile_network(step.model)
        run()
    return Task(run, lambda losses: {"losses": losses})


def our_step(sizes: Sizes) -> TrainStep:
    """The step of the default configuration with random weights, the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig().with_backbone_weights("random")
    model = build_model(config, num_classes=sizes["classes"])
    for name, values in model.backbone.named_buffers():
        if name.endswith("bn3.weight"):
            values.fill_(RESIDUAL_SCALE)
    objective = Objective(
        mask="dice",
        box="projection+pairwise",
        affinity_threshold=THRESHOLD,
        affinity_size=SIZE,
        affinity_dilation=DILATION,
    )
    return TrainStep(
        model, detector=detector_step(config, model), objective=objective, max_mask_positives=MAX_POSITIVES
    )


def step_run(step: TrainStep, sizes: Sizes, device: torch.device, *, bfloat16: bool) -> Callable[[], Tensor]:
    """Forward and backward of one training step, its plan included; returns the losses, still on the device."""
    loaded = training_batch(sizes)
    batch = loaded.to(device)

    def run() -> Tensor:
        step.zero_grad(set_to_none=True)
        plan = step.plan(batch, loaded)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        return torch.stack([terms.weighted[name].detach() for name in LOSSES])

    return run


def training_batch(sizes: Sizes) -> Batch:
    """Images whose instances have boxes alone."""
    images, count = sizes["images"], sizes["images"] * sizes["boxes"]
    size_hw = (sizes["height"], sizes["width"])
    generator = torch.Generator().manual_seed(6)
    return Batch(
        images=torch.stack([picture(size_hw, seed=index) for index in range(images)]),
        image_sizes_hw=torch.tensor([size_hw] * images),
        image_ids=tuple(range(images)),
        bottom_rows_without_affinity=torch.zeros(images, dtype=torch.int64),
        targets=Targets(
            boxes_xyxy=coco_like_boxes(count, size_hw, seed=5),
            labels=torch.randint(sizes["classes"], (count,), generator=generator),
            image_index=shared_out(count, images),
            supervision=torch.zeros(count, dtype=torch.int64),
            masks=torch.zeros(0, size_hw[0] // 4, size_hw[1] // 4, dtype=torch.bool),
            mask_instance=torch.zeros(0, dtype=torch.int64),
            mask_weight=torch.zeros(0),
            crowd_boxes_xyxy=torch.zeros(0, 4),
            crowd_image_index=torch.zeros(0, dtype=torch.int64),
            mask_stride=4,
        ),
    )


def step_result(losses: Tensor, model: nn.Module) -> dict[str, Any]:
    """As `gradients_result`, of the parameters that have a gradient."""
    return gradients_result(losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def gradients_result(losses: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    """The losses, and of every gradient, by name, `signed_sums` (parameters, sums)."""
    names = sorted(gradients)
    return {"losses": losses, "names": names, "sums": torch.stack([signed_sums(gradients[name]) for name in names])}


def signed_sums(gradient: Tensor) -> Tensor:
    """(64,) float64 sums of all numbers of a gradient of any shape, each with a random sign, the same at every call.

    The distance of two gradients' sums is about their own distance, so that a few numbers stand for millions
    (Charikar et al. 2002, count sketch). It is that exactly for a gradient of at most 64 numbers.
    """
    generator = torch.Generator().manual_seed(7)
    values = gradient.cpu().double().flatten()
    values = values * (2 * torch.randint(2, values.shape, generator=generator) - 1)
    return F.pad(values, (0, -len(values) % SUMS_PER_GRADIENT)).view(-1, SUMS_PER_GRADIENT).sum(0)


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


def matrix_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, None if it is not listed."""
    return next((peak * 1e12 for part, peak in MATRIX_PEAKS.items() if part in name), None)


STEP = Row(
    name="step",
    sizes={"images": 2, "height": 512, "width": 640, "boxes": 8, "classes": 80},
    tiny={"height": 128, "width": 160, "boxes": 2},
    passes=6,
    quick_passes=2,
    prepare=prepare_step,
    agree=CloseGradients(every=1e-2),  # the furthest was at 3e-3
    tiny_agree=CloseGradients(every=5e-2, half=1.5e-2),
)
STEP_GPU = Row(
    name="step_gpu",
    sizes={"images": 8, "height": 800, "width": 1216, "boxes": 8, "classes": 80},
    quick={"images": 4},
    tiny={"images": 1, "height": 64, "width": 64, "boxes": 2},
    passes=12,
    quick_passes=6,
    prepare=prepare_gpu_step,
    agree=Close(BF16_LOSSES),
    device="cuda",
    facts=step_facts,
)
