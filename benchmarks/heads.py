"""Rows `mask_rcnn_step` and `mask_rcnn_detect`: our Mask R-CNN beside torchvision's own, with its weights. Row
`crop_losses`: the losses of masks in regions of their own.

The training step is forward, losses and backward of one image with a frozen batch norm, as released weights have it;
the update, the same for both, is left out. What is drawn differs, so the timed steps are not compared: one more is, in
which nothing is drawn (all anchors and all regions take part) and both networks are given the same proposals. Those of
the networks themselves are compared by `mask_rcnn_detect`, whose detections follow from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_codec
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from benchmarks import straightforward as plain
from benchmarks.inputs import coco_like_boxes, picture
from benchmarks.masks import LOGIT_DEVIATION, SHARE_OF_EDGES, normal_quantiles
from benchmarks.measure import Close, Place, Result, Row, Side, Sizes, Task
from benchmarks.plain_step import DILATION, SIZE
from benchmarks.step import CloseGradients, gradients_result
from semiseg.config import InferenceConfig, ModelConfig
from semiseg.engine.detection import detector_step
from semiseg.engine.predict import coco_results, each_image
from semiseg.engine.step import TrainStep
from semiseg.interop.torchvision import convert_state
from semiseg.losses.affinity import inside_of_neighbours
from semiseg.losses.boxinst import cell_profiles, pairwise_loss, projection_loss
from semiseg.losses.crops import bag_loss, cross_entropy_loss
from semiseg.losses.terms import Objective
from semiseg.models.build import build_model
from semiseg.models.detectors.regions import RegionDetector
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch, Targets
from semiseg.structures.masks import MASK_BITS, EncodedMasks

# Losses by our names and by torchvision's.
NAMES = {
    "objectness": "loss_objectness",
    "anchor_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "bce": "loss_mask",
}
EVERYTHING = 10**9  # of a draw: all take part
BOX_DISTANCE, SCORE_DISTANCE = 0.05, 1e-3  # pixels, and of a detection's score
SHARE_FOUND, SHARE_OF_PIXELS = 0.98, 1e-3  # of the detections that both sides have, of their masks' pixels that differ


def torchvision_network(size_hw: tuple[int, int], *, classes: int, frozen: bool, **limits: int) -> MaskRCNN:
    """torchvision's ResNet-50 network with weights that give many detections, of boxes and masks of many kinds.

    Args:
        size_hw: of the images, which it is not to resize.
        frozen: the batch norm of released weights, of epsilon 0; else torch's.
        limits: further arguments of torchvision's.
    """
    torch.manual_seed(3)
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3)
    model = MaskRCNN(body, num_classes=classes + 1, min_size=min(size_hw), max_size=max(size_hw), **limits)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
                module.eps = 0.0 if frozen else module.eps
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                value.normal_(std=0.1)
            elif name.endswith("bn3.weight"):
                value.mul_(0.3)  # keeps the activations of the residual stages near 1
        model.rpn.head.cls_logits.weight.mul_(30)
        model.rpn.head.bbox_pred.weight.mul_(10)
        model.roi_heads.box_predictor.cls_score.weight.mul_(40)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(20)
        model.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(5)
    return model.eval()


def network_of(sizes: Sizes) -> MaskRCNN:
    """torchvision's network of a row: with as many proposals of a level as of an image, as ours has them."""
    kept = {
        f"rpn_{part}_nms_top_n_{mode}": sizes["proposals"] for part in ("pre", "post") for mode in ("train", "test")
    }
    size_hw, detections = (sizes["height"], sizes["width"]), sizes.get("detections", 100)
    return torchvision_network(
        size_hw, classes=sizes["classes"], frozen=True, box_detections_per_img=detections, **kept
    )


def ellipses(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of the ellipses that touch the sides of their boxes (N, 4)."""
    x, y = torch.arange(size_hw[1]) + 0.5, torch.arange(size_hw[0]) + 0.5
    centre, half = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2
    across = ((x - centre[:, :1]) / half[:, :1]) ** 2
    down = ((y - centre[:, 1:]) / half[:, 1:]) ** 2
    return across[:, None, :] + down[:, :, None] < 1


def encoded(masks: Tensor) -> EncodedMasks:
    """Masks (M, H, W) bool as the loader would give them."""
    columns = masks.transpose(1, 2).flatten(1).int()
    before = F.pad(columns, (1, 0))[:, :-1]
    mask, pixel = (columns != before).nonzero().unbind(1)
    size = torch.tensor([masks.shape[1:]] * len(masks))
    return EncodedMasks((mask << MASK_BITS) + pixel, size, size, torch.zeros(len(masks), dtype=torch.bool))


def masked_targets(boxes_xyxy: Tensor, labels: Tensor, masks: Tensor) -> Targets:
    """The objects of one image, all with masks."""
    count = len(boxes_xyxy)
    return Targets(
        boxes_xyxy=boxes_xyxy,
        labels=labels,
        image_index=torch.zeros(count, dtype=torch.int64),
        supervision=torch.ones(count, dtype=torch.int64),
        masks=torch.zeros(count, 0, 0, dtype=torch.bool),
        mask_instance=torch.arange(count),
        mask_weight=torch.ones(count),
        crowd_boxes_xyxy=torch.zeros(0, 4),
        crowd_image_index=torch.zeros(0, dtype=torch.int64),
        mask_stride=None,
        encoded=encoded(masks),
    )


# mask_rcnn_step ------------------------------------------------------------------------------------------------------


def objects(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An image (3, H, W) uint8, and boxes (N, 4), labels (N,) and masks (N, H, W) bool of its objects."""
    size_hw = (sizes["height"], sizes["width"])
    boxes = coco_like_boxes(sizes["boxes"], size_hw, seed=5)
    labels = torch.randint(sizes["classes"], (len(boxes),), generator=torch.Generator().manual_seed(6))
    return picture(size_hw, seed=0), boxes, labels, ellipses(boxes, size_hw)


def given_proposals(boxes_xyxy: Tensor, sizes: Sizes) -> Tensor:
    """(K, 4) boxes beside the objects', from good to bad, and some anywhere."""
    generator = torch.Generator().manual_seed(8)
    size_hw = (sizes["height"], sizes["width"])
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).repeat(1, 2)
    moved = [
        boxes_xyxy + share * sides * (torch.rand(boxes_xyxy.shape, generator=generator) - 0.5)
        for share in (0.1, 0.2, 0.4, 0.8)
    ]
    proposals = torch.cat([*moved, coco_like_boxes(sizes["boxes"], size_hw, seed=9)])
    return proposals.clamp(min=0).minimum(torch.tensor([size_hw[1], size_hw[0]] * 2))


def our_network(model: MaskRCNN) -> tuple[Segmenter, ModelConfig]:
    """torchvision's network, converted, and its configuration."""
    converted = convert_state(model.state_dict(), kept=None, where="torchvision's network")
    network = build_model(converted.config, num_classes=converted.num_classes)
    network.load_state_dict(converted.weights)
    return network.to(memory_format=torch.channels_last), converted.config


def our_step(network: Segmenter, config: ModelConfig, *, drawn: int | None = None) -> TrainStep:
    """The training step of a network, with masks in proposals; `drawn` of each draw, whatever they are."""
    changed: dict[str, Any] = {"mask_regions": "proposals"}
    if drawn is not None:
        changed |= {"anchors_drawn": drawn, "regions_drawn": drawn, "positive_anchors": 1.0, "positive_regions": 1.0}
    config = config.model_copy(update={"detector": config.detector.model_copy(update=changed)})
    objective = Objective(mask="bce", box="none", affinity_threshold=0.3, affinity_size=3, affinity_dilation=2)
    return TrainStep(
        network,
        detector=detector_step(config, network),
        objective=objective,
        max_mask_positives=config.mask_head.max_positives,
    )


def prepare_step(side: Side, sizes: Sizes, place: Place) -> Task:
    """`mask_rcnn_step`."""
    model = network_of(sizes)
    if side == "straightforward":
        return Task(_their_run(model, sizes), lambda _: _their_result(model, sizes))
    network, config = our_network(model)
    assert isinstance(network.detector, RegionDetector)
    network.detector.training_proposals = sizes["proposals"]
    return Task(_our_run(our_step(network, config), sizes), lambda _: _our_result(network, config, sizes))


def _our_run(step: TrainStep, sizes: Sizes) -> Callable[[], Tensor]:
    image, *of_objects = objects(sizes)
    step.train()
    batch = Batch(
        images=image[None],
        image_sizes_hw=torch.tensor([image.shape[1:]]),
        image_ids=(0,),
        bottom_rows_without_affinity=torch.zeros(1, dtype=torch.int64),
        targets=masked_targets(*of_objects),
        seeds=(1,),
    )

    def run() -> Tensor:
        step.zero_grad(set_to_none=True)
        plan = step.plan(batch, batch)
        terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        return torch.stack([terms.weighted[name].detach() for name in NAMES])

    return run


def _their_run(model: MaskRCNN, sizes: Sizes) -> Callable[[], Tensor]:
    image, boxes, labels, masks = objects(sizes)
    target = {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
    model.train()

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        losses = model([image.float() / 255], [target])
        values = torch.stack([losses[name] for name in NAMES.values()])
        values.sum().backward()
        return values.detach()

    return run


def _our_result(network: Segmenter, config: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """Losses and gradients where nothing is drawn, of given proposals."""
    proposals = given_proposals(objects(sizes)[1], sizes)
    network.detector.proposals = lambda outputs, *, number: [proposals]  # type: ignore[assignment]
    losses = _our_run(our_step(network, config, drawn=EVERYTHING), sizes)()
    return gradients_result(losses, _gradients(network))


def _their_result(model: MaskRCNN, sizes: Sizes) -> dict[str, Any]:
    """As `_our_result`, under our names."""
    proposals = given_proposals(objects(sizes)[1], sizes)
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction = EVERYTHING, 1.0
    model.rpn.filter_proposals = lambda *_: ([proposals], [])
    losses = _their_run(model, sizes)()
    gradients = dict(model.state_dict()) | _gradients(model)  # the conversion needs the norms' variances
    converted = convert_state(gradients, kept=None, where="torchvision's gradients")
    with torch.device("meta"):
        trained = dict(build_model(converted.config, num_classes=sizes["classes"]).named_parameters())
    return gradients_result(losses, {name: converted.weights[name] for name in trained})


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, zeros for a parameter that is not trained."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


MASK_RCNN_STEP = Row(
    name="mask_rcnn_step",
    sizes={"height": 800, "width": 1216, "boxes": 8, "classes": 80, "proposals": 2000},
    quick={"height": 512, "width": 640},
    tiny={"height": 64, "width": 96, "boxes": 2, "classes": 3, "proposals": 100},
    passes=4,
    quick_passes=2,
    prepare=prepare_step,
    agree=CloseGradients(every=5e-2, half=1.5e-2),
)


# mask_rcnn_detect ----------------------------------------------------------------------------------------------------


def prepare_detect(side: Side, sizes: Sizes, place: Place) -> Task:
    """`mask_rcnn_detect`."""
    image, model = picture((sizes["height"], sizes["width"]), seed=0), network_of(sizes)
    if side == "straightforward":
        return Task(lambda: _their_detections(model, image))
    network = our_network(model)[0].eval().requires_grad_(False)
    limits = InferenceConfig(
        candidates_per_level=sizes["proposals"], nms_threshold=0.5, max_detections=sizes["detections"]
    )
    size_hw, ids = (image.shape[1], image.shape[2]), range(1, sizes["classes"] + 1)

    def run() -> list[dict[str, Any]]:
        (found,) = each_image(
            network,
            [image],
            lambda detections: coco_results(detections, image_id=1, category_ids=ids),
            output_sizes=[size_hw],
            limits=limits,
        )
        return found

    def result(found: list[dict[str, Any]]) -> dict[str, Any]:
        corners = [[x, y, x + width, y + height] for x, y, width, height in (each["bbox"] for each in found)]
        return {
            "boxes": np.array(corners),
            "scores": np.array([each["score"] for each in found]),
            "labels": np.array([each["category_id"] for each in found]),
            "rles": [each["segmentation"] for each in found],
        }

    return Task(run, result)


@torch.inference_mode()
def _their_detections(model: MaskRCNN, image: Tensor) -> dict[str, Any]:
    """Boxes, scores, labels from 1 on, and RLEs."""
    (found,) = model([image.float() / 255])
    masks = (found["masks"][:, 0] > 0.5).numpy()
    rles = [rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return {"boxes": found["boxes"], "scores": found["scores"], "labels": found["labels"], "rles": rles}


def same_detections(ours: Result, theirs: Result) -> bool:
    """Whether nearly every detection has a partner of its label, box and score, and the masks of partners are alike."""
    distance = np.abs(ours["boxes"][None] - theirs["boxes"][:, None]).max(2)
    distance[ours["labels"][None] != theirs["labels"][:, None]] = np.inf
    distance[np.abs(ours["scores"][None] - theirs["scores"][:, None]) > SCORE_DISTANCE] = np.inf
    partner, near = distance.argmin(1), distance.min(1) <= BOX_DISTANCE
    if len(ours["rles"]) != len(theirs["rles"]) or len(set(partner[near])) < SHARE_FOUND * len(partner):
        return False
    pairs = [[ours["rles"][partner[number]], theirs["rles"][number]] for number in np.flatnonzero(near)]
    union = sum(int(rle_codec.area(rle_codec.merge(pair))) for pair in pairs)
    both = sum(int(rle_codec.area(rle_codec.merge(pair, intersect=True))) for pair in pairs)
    return union > 0 and union - both <= SHARE_OF_PIXELS * union


MASK_RCNN_DETECT = Row(
    name="mask_rcnn_detect",
    sizes={"height": 800, "width": 1216, "classes": 80, "proposals": 1000, "detections": 100},
    quick={"height": 512, "width": 640},
    tiny={"height": 64, "width": 96, "classes": 3, "proposals": 100, "detections": 20},
    passes=10,
    quick_passes=2,
    prepare=prepare_detect,
    agree=same_detections,
)


# crop_losses ---------------------------------------------------------------------------------------------------------


def prepare_crops(side: Side, sizes: Sizes, place: Place) -> Task:
    """`crop_losses`: the first half of the instances has masks, the second boxes alone."""
    logits, masks, cells, edges = crop_inputs(sizes)
    half = sizes["instances"] // 2
    index = torch.arange(len(cells))
    rows, columns = cell_profiles(cells, (logits.shape[1], logits.shape[2]))
    box_masks = (rows[:, :, None] & columns[:, None, :]).float()

    def run() -> dict[str, Tensor | None]:
        logits.grad = None
        given, boxed = logits[:half], logits[half:]
        if side == "ours":
            losses = {
                "bce": cross_entropy_loss(given, masks),
                "projection": projection_loss(boxed, cells),
                "mil": bag_loss(boxed, cells),
            }
            sums, counts = pairwise_loss(boxed, cells, edges, index, size=SIZE, dilation=DILATION)
        else:
            losses = {
                "bce": plain.cross_entropy(given, masks),
                "projection": plain.projection(boxed, box_masks),
                "mil": plain.bags(boxed, cells),
            }
            sums, counts = plain.pairwise_sums(boxed, box_masks, edges, size=SIZE, dilation=DILATION)
        means = {name: each.mean() for name, each in losses.items()} | {"pairwise": sums.sum() / counts.sum()}
        torch.stack(list(means.values())).sum().backward()
        return {**{name: each.detach() for name, each in means.items()}, "gradient": logits.grad}

    return Task(run)


def crop_inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (Q, h, w) that want a gradient; of the half with masks (Q / 2, h, w) in [0, 1]; of the other boxes as
    cells (Q / 2, 4) and edges (Q / 2, K, h, w) bool.

    A box fills its region but for a tenth on each side, as with margin 1.25.
    """
    generator = torch.Generator().manual_seed(10)
    count, half, side = sizes["instances"], sizes["instances"] // 2, sizes["cells"]
    logits = torch.stack([normal_quantiles((side, side), generator) for _ in range(count)]).mul_(LOGIT_DEVIATION)
    masks = torch.rand(count - half, side, side, generator=generator)
    border = round(side / 10)
    cells = torch.tensor([[border, side - border] * 2] * half)
    row_in, column_in = (torch.ones(half, side, dtype=torch.bool) for _ in range(2))
    inside = inside_of_neighbours(row_in, column_in, size=SIZE, dilation=DILATION)
    edges = inside & (torch.rand(inside.shape, generator=generator) < SHARE_OF_EDGES)
    return logits.requires_grad_(), masks, cells, edges


CROP_LOSSES = Row(
    name="crop_losses",
    sizes={"instances": 64, "cells": 28},
    tiny={"instances": 4, "cells": 14},
    passes=40,
    quick_passes=20,
    prepare=prepare_crops,
    agree=Close(2e-5),
)
