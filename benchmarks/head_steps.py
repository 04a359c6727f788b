"""Rows `step_prototypes`, `step_rays` and `step_regions`: row `step` with another mask head on FCOS.

Straightforward: the same network and detector, but masks one query after the other from features that are computed
everywhere, and their losses on whole masks with all neighbours (`straightforward.py`). What the rows differ by is
therefore the mask head and its losses within a step, not the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from benchmarks import straightforward as plain
from benchmarks.measure import Place, Row, Side, Sizes, Task
from benchmarks.plain_step import DILATION, SIZE, THRESHOLD
from benchmarks.step import LOSSES, CloseGradients, step_result, training_batch
from semiseg.config import ModelConfig
from semiseg.config.read import parse_config
from semiseg.engine.detection import detector_step
from semiseg.engine.step import StepPlan, TrainStep
from semiseg.losses.boxinst import cell_profiles
from semiseg.losses.terms import Objective
from semiseg.models.build import build_model
from semiseg.models.masks.prototypes import INSIDE, OUTSIDE, PrototypeMasks
from semiseg.models.masks.rays import FIRST_SHARE, SHARES, SHORTEST, STEEPEST, RayMasks, rooms
from semiseg.models.masks.regions import RegionMasks
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch
from semiseg.structures.masks import EncodedMasks
from semiseg.structures.outputs import MaskQueries, Outputs

SMALL = {"kind": "small", "norm": "frozen_bn"}  # backbone of the tiny sizes
LARGE_SIDE, LEVELS, CELLS = 224, 4, 14  # of a box whose features are of stride 16; levels from stride 4 on; of a region


def our_step(kind: str, sizes: Sizes) -> TrainStep:
    """The step of the default network with this mask head and random weights, the same at every call."""
    torch.manual_seed(0)
    backbone = SMALL if sizes["small"] else {"weights": "random"}
    config = parse_config(ModelConfig, {"backbone": backbone, "mask_head": {"kind": kind}}, where="benchmark")
    model = build_model(config, num_classes=sizes["classes"])
    for name, values in model.backbone.named_buffers():
        if name.endswith("bn3.weight"):
            values.fill_(0.2)  # keeps activations small without trained norms
    objective = Objective(
        mask="dice",
        box="projection+pairwise",
        affinity_threshold=THRESHOLD,
        affinity_size=SIZE,
        affinity_dilation=DILATION,
    )
    step = TrainStep(
        model,
        detector=detector_step(config, model),
        objective=objective,
        max_mask_positives=config.mask_head.max_positives,
    )
    return step.to(memory_format=torch.channels_last).train()


def batch_of(kind: str, sizes: Sizes) -> Batch:
    """`training_batch`, whose masks (there are none) are on no grid where the head has none."""
    batch = training_batch(sizes)
    if kind != "regions":
        return batch
    none = torch.zeros(0, 2, dtype=torch.int64)
    encoded = EncodedMasks(none[:, 0], none, none, torch.zeros(0, dtype=torch.bool))
    assert batch.targets is not None
    targets = replace(batch.targets, mask_stride=None, masks=torch.zeros(0, 0, 0, dtype=torch.bool), encoded=encoded)
    return replace(batch, targets=targets)


def prepare(kind: str, side: Side, sizes: Sizes, place: Place) -> Task:
    """Forward, losses and backward of one step."""
    step, batch = our_step(kind, sizes), batch_of(kind, sizes)
    losses_of = our_losses if side == "ours" else plain_losses

    def run() -> Tensor:
        step.zero_grad(set_to_none=True)
        losses = losses_of(step, batch)
        values = torch.stack([losses[name] for name in LOSSES])
        values.sum().backward()
        return values.detach()

    return Task(run, lambda losses: step_result(losses, step.model))


def our_losses(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    """Those of a step, as they are added up."""
    plan = step.plan(batch, batch)
    losses: dict[str, Tensor] = step(batch, plan, plan.counts, warmup=1.0, processes=1).weighted
    return losses


def plain_losses(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    """The same with masks one after the other and losses of whole masks."""
    plan, targets = step.plan(batch, batch), batch.targets
    assert targets is not None
    outputs = step.model(batch.images, batch.image_sizes_hw)
    count = dict(zip(step.count_names, plan.counts.unbind(), strict=True))
    losses = dict(step.detector.losses(outputs, plan.assignment, targets, count, processes=1))
    queries = step.detector.sample(outputs, plan.assignment, targets, plan.quotas, counts=plan.queries)
    logits = plain_masks(step.model, outputs, queries)
    sums, counts, projection = _mask_losses(logits, queries, plan)
    losses["projection"] = projection.mean()
    losses["pairwise"] = sums.sum() / counts.sum().clamp(min=1)
    return losses


def _mask_losses(logits: Tensor, queries: MaskQueries, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor]:
    wanted, instance = plan.mask_targets, queries.instance_index
    rows, columns = cell_profiles(wanted.cells[instance], (logits.shape[1], logits.shape[2]))
    box_masks = (rows[:, :, None] & columns[:, None, :]).float()
    edges = wanted.edges["pairwise"][wanted.edge_index(queries.image_index, instance)]  # one copy for each mask
    sums, counts = plain.pairwise_sums(logits, box_masks, edges, size=SIZE, dilation=DILATION)
    return sums, counts, plain.projection(logits, box_masks)


def plain_masks(model: Segmenter, outputs: Outputs, queries: MaskQueries) -> Tensor:
    """Mask logits (Q, h, w) of a model of one of the three kinds, one query after the other."""
    if isinstance(model.mask_head, RegionMasks):
        return _plain_regions(model.mask_head, outputs.mask_inputs, queries)
    if isinstance(model.mask_head, PrototypeMasks):
        return _plain_prototypes(model, model.mask_head, outputs, queries)
    assert isinstance(model.mask_head, RayMasks)
    return _plain_rays(model, model.mask_head, outputs, queries)


def _plain_prototypes(model: Segmenter, head: PrototypeMasks, outputs: Outputs, queries: MaskQueries) -> Tensor:
    prototypes = outputs.mask_inputs.prototypes
    grid_hw = (prototypes.shape[2], prototypes.shape[3])
    sizes_hw = model.level_sizes((grid_hw[0] * head.edge_stride, grid_hw[1] * head.edge_stride))
    weights = _convolved(head.weights, outputs.mask_inputs.weight_features, sizes_hw, queries).tanh()
    depths = plain.box_depths(queries.boxes_xyxy, head.stride, grid_hw).clamp(OUTSIDE, INSIDE)
    return plain.prototype_masks(prototypes, weights, queries.image_index) + depths


def _plain_rays(model: Segmenter, head: RayMasks, outputs: Outputs, queries: MaskQueries) -> Tensor:
    location, padded_hw = queries.location_index, outputs.padded_hw
    assert padded_hw is not None
    centres = outputs.locations.xy[location]
    numbers = _convolved(head.rays, outputs.mask_inputs, model.level_sizes(padded_hw), queries)
    numbers = head.level_scales[outputs.locations.level[location], None] * numbers
    room, ellipse = rooms(centres, queries.boxes_xyxy, numbers.shape[1], margin=head.stride / 2)
    distances = room * (numbers + (FIRST_SHARE * ellipse / room).clamp(*SHARES).logit()).sigmoid()
    grid_hw = (padded_hw[0] // head.stride, padded_hw[1] // head.stride)
    masks = plain.ray_masks(distances, centres, head.stride, grid_hw, shortest=SHORTEST, steepest=STEEPEST)
    return masks / (head.softness * head.stride)


def _convolved(conv: nn.Conv2d, features: Tensor, sizes_hw: list[tuple[int, int]], queries: MaskQueries) -> Tensor:
    assert conv.bias is not None
    return plain.convolved_at(conv.weight, conv.bias, features, sizes_hw, queries.image_index, queries.location_index)


def _plain_regions(head: RegionMasks, levels: tuple[Tensor, ...], queries: MaskQueries) -> Tensor:
    masks = []
    for box, image in zip(queries.boxes_xyxy, queries.image_index.tolist(), strict=True):
        side = float((box[2:] - box[:2]).prod().sqrt())
        finer = int(torch.log2(torch.tensor(side / LARGE_SIDE * 4) + 1e-6).floor().clamp(0, LEVELS - 1))
        centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * head.margin / 2
        roi = torch.cat((centre - half, centre + half))[None]
        features = roi_align(levels[finer][image : image + 1], [roi], CELLS, 1 / (4 * 2**finer), 2, aligned=True)
        doubled = F.conv_transpose2d(head.tower(features), head.deconv.weight, head.deconv.bias, stride=2)
        masks.append(head.masks(doubled.relu())[0, 0])
    return torch.stack(masks)


def _row(kind: str) -> Row:
    made: Callable[..., Any] = partial(prepare, kind)
    return Row(
        name=f"step_{kind}",
        sizes={"images": 2, "height": 512, "width": 640, "boxes": 8, "classes": 80, "small": 0},
        tiny={"height": 64, "width": 96, "boxes": 2, "classes": 3, "small": 1},
        passes=4,
        quick_passes=2,
        prepare=made,
        agree=CloseGradients(every=5e-2, half=1.5e-2),
    )


STEPS = tuple(_row(kind) for kind in ("prototypes", "rays", "regions"))
