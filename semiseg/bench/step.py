"""Row `step`: forward and backward of one training step of BoxInst, ResNet-50; the update is the same for both.

Straightforward: `plain_step`. Both start from the same random weights.

How close the gradients can be: among the millions of numbers before ReLUs, up to 4e-6 beside a deviation of 1, two to
six have another sign in float32 than in float64, on either side, and others with another number of threads. With the
signs of either float32 run, float64 gives its gradients to 3e-5 of their norms; with its own signs, only to 2e-2: in
the coarsest level of a small image one ReLU is a good part of a gradient. Such a distance is no error of a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.bench.inputs import coco_like_boxes, picture, shared_out
from semiseg.bench.plain_network import PlainCondInst
from semiseg.bench.plain_step import MAX_POSITIVES, THRESHOLD, plain_losses
from semiseg.bench.row import Close, Place, Result, Row, Sizes, Task, array
from semiseg.config import ModelConfig
from semiseg.engine.step import TrainStep
from semiseg.losses.terms import DETECTION_LOSSES, Objective
from semiseg.models.build import build_model
from semiseg.structures.inputs import Batch, Targets

LOSSES = (*DETECTION_LOSSES, "projection", "pairwise")
RESIDUAL_SCALE = 0.2  # of the last norm of a residual block, so that activations stay small without trained norms
LEAST_NORM = 1e-12  # of a gradient: that of a level without positives is 0
SUMS_PER_GRADIENT = 64
LOSS_TOLERANCE = 1e-5  # of the largest; they differed by at most 4e-7


@dataclass(frozen=True)
class CloseGradients:
    """Steps agree if their losses do, no gradient is further than `every` of its norm, and half of them are nearer.

    Attributes:
        every: bound of the distance of any parameter's gradient, in the norm of the straightforward one.
        half: bound for half of the gradients. A wrong loss shows in most of them, a ReLU near 0 hardly ever.
    """

    every: float
    half: float = 2e-3  # the median was at most 1e-3

    def __call__(self, ours: Result, straightforward: Result) -> bool:
        """Whether they agree; both as `_result` returns them."""
        losses = [{"names": side["names"], "losses": side["losses"]} for side in (ours, straightforward)]
        if not Close(LOSS_TOLERANCE)(*losses):
            return False
        norms = np.linalg.norm(straightforward["sums"], axis=1).clip(min=LEAST_NORM)
        distances = np.linalg.norm(ours["sums"] - straightforward["sums"], axis=1) / norms
        return bool((distances <= self.every).all() and np.median(distances) <= self.half)  # not if any is NaN


def _ours(sizes: Sizes, place: Place) -> Task:
    step = our_step(sizes).to(place.device).to(memory_format=torch.channels_last).train()  # the default of a run
    run = step_run(step, sizes, place.device, bfloat16=False)
    return Task(run, lambda losses: _result(losses, step.model))


def _straightforward(sizes: Sizes, place: Place) -> Task:
    model = PlainCondInst(sizes["classes"])
    model.load_state_dict(our_step(sizes).model.state_dict())
    model.to(place.device).train()
    batch = training_batch(sizes).to(place.device)
    targets = batch.targets
    assert targets is not None

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        losses = plain_losses(model, batch.images, targets.boxes_xyxy, targets.labels, targets.image_index)
        values = torch.stack([losses[name] for name in LOSSES])
        values.sum().backward()
        return values.detach()

    return Task(run, lambda losses: _result(losses, model))


def our_step(sizes: Sizes) -> TrainStep:
    """The step of the default configuration with random weights, the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig(weights="random")
    model = build_model(config, num_classes=sizes["classes"])
    for name, values in model.backbone.named_buffers():
        if name.endswith("bn3.weight"):
            values.fill_(RESIDUAL_SCALE)
    objective = Objective(
        mask="dice",
        box="projection+pairwise",
        affinity_threshold=THRESHOLD,
        affinity_size=3,
        affinity_dilation=2,
    )
    return TrainStep(model, objective=objective, centre_radius=config.centre_radius, max_mask_positives=MAX_POSITIVES)


def step_run(step: TrainStep, sizes: Sizes, device: torch.device, *, bfloat16: bool) -> Callable[[], Tensor]:
    """Forward and backward of one training step, its draft included; returns the losses, still on the device."""
    loaded = training_batch(sizes)
    batch = loaded.to(device)

    def run() -> Tensor:
        step.zero_grad(set_to_none=True)
        plan = step.plan(batch, step.draft(loaded))
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
        images=torch.stack([picture(size_hw, seed=number) for number in range(images)]),
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


def _result(losses: Tensor, model: nn.Module) -> Result:
    """The losses, and of every gradient, by name, `signed_sums` (parameters, sums)."""
    gradients = {name: p.grad for name, p in sorted(model.named_parameters()) if p.grad is not None}
    sums = torch.stack([signed_sums(gradient) for gradient in gradients.values()])
    return {"losses": array(losses), "names": list(gradients), "sums": array(sums)}


def signed_sums(gradient: Tensor) -> Tensor:
    """(64,) float64 sums of all numbers of a gradient of any shape, each with a random sign, the same at every call.

    The distance of two gradients' sums is about their own distance, so that a few numbers stand for millions
    (Charikar et al. 2002, count sketch). It is that exactly for a gradient of at most 64 numbers.
    """
    generator = torch.Generator().manual_seed(7)
    values = gradient.cpu().double().flatten()
    values = values * (2 * torch.randint(2, values.shape, generator=generator) - 1)
    return F.pad(values, (0, -len(values) % SUMS_PER_GRADIENT)).view(-1, SUMS_PER_GRADIENT).sum(0)


ROW = Row(
    name="step",
    sizes={"images": 2, "height": 512, "width": 640, "boxes": 8, "classes": 80},
    tiny={"height": 128, "width": 160, "boxes": 2},
    passes=6,
    quick_passes=2,
    ours=_ours,
    straightforward=_straightforward,
    agree=CloseGradients(every=1e-2),  # the furthest was at 3e-3
)
