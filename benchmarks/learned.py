"""Rows `learned_step` and `learned_shapes`: a training step with learned affinity beside one of projection + pairwise.

Not how much faster, but how much slower: of ResNet-50 as in row `step`, and of the network of Shapes. Half of the
instances have masks, the gate is half open. The losses that both steps have must agree.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.inputs import half_open
from benchmarks.measure import Close, Place, Row, Side, Sizes, Task
from benchmarks.step import LOSS_TOLERANCE, training_batch
from semiseg.config import RunConfig
from semiseg.engine.build import build_step
from semiseg.losses.boxinst import box_cells, cell_profiles
from semiseg.losses.detection import LOSSES as DETECTION_LOSSES
from semiseg.models.build import mask_stride
from semiseg.structures.inputs import Batch, Supervision
from semiseg.studies.file import load_study, study_runs

COMPARED = (*DETECTION_LOSSES, "dice", "projection")


def config_of(side: Side, sizes: Sizes) -> RunConfig:
    """The row of the study of Tables 6 and 7, of COCO or of Shapes, without initial weights."""
    study = load_study("shapes" if sizes["shapes"] else "coco_voc_splits")
    wanted = "learned" if side == "ours" else "projection+pairwise"
    config = next(run.config for run in study_runs(study) if run.row == wanted)
    model = config.model.with_backbone_weights("random")
    return config.model_copy(update={"model": model, "init_from": None})


def mixed_batch(sizes: Sizes, stride: int) -> Batch:
    """`training_batch` with a mask, its whole box, for every other instance."""
    batch = training_batch(sizes)
    assert batch.targets is not None
    supervision = torch.arange(batch.targets.num_instances) % 2
    with_mask = supervision.nonzero()[:, 0]
    grid = (-(-sizes["height"] // stride), -(-sizes["width"] // stride))
    cells = box_cells(batch.targets.boxes_xyxy[with_mask], stride=stride, grid_hw=grid)
    rows, columns = cell_profiles(cells, grid)
    targets = replace(
        batch.targets,
        supervision=torch.where(supervision == 1, int(Supervision.MASK), int(Supervision.BOX)),
        masks=rows[:, :, None] & columns[:, None, :],
        mask_instance=with_mask,
        mask_weight=torch.ones(len(with_mask)),
        mask_stride=stride,
    )
    return replace(batch, targets=targets)


def prepare(side: Side, sizes: Sizes, place: Place) -> Task:
    """Ours is the step with learned affinity."""
    torch.manual_seed(0)
    config = config_of(side, sizes)
    step = build_step(config, num_classes=sizes["classes"]).to(memory_format=torch.channels_last).train()
    if step.affinity is not None:
        half_open(step.affinity)
    stride = mask_stride(config.model)
    assert stride is not None
    batch = mixed_batch(sizes, stride)

    def run() -> Tensor:
        step.zero_grad(set_to_none=True)
        plan = step.plan(batch)
        terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        return torch.stack([terms.weighted[name].detach() for name in COMPARED])

    return Task(run, lambda losses: {"losses": losses})


LEARNED_STEP = Row(
    name="learned_step",
    sizes={"images": 2, "height": 512, "width": 640, "boxes": 8, "classes": 80, "shapes": 0},
    tiny={"height": 128, "width": 160, "boxes": 2},
    passes=6,
    quick_passes=2,
    prepare=prepare,
    agree=Close(LOSS_TOLERANCE),
)
LEARNED_SHAPES = Row(
    name="learned_shapes",
    sizes={"images": 4, "height": 128, "width": 128, "boxes": 4, "classes": 12, "shapes": 1},
    tiny={"images": 1},
    passes=40,
    quick_passes=10,
    prepare=prepare,
    agree=Close(LOSS_TOLERANCE),
)
