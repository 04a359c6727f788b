"""What comes out of the model and its neighbours: outputs, assignment, mask queries and logits, detections.

Letters: B images, R locations (all levels of one image, level-major, then row-major), C classes, P positives,
Q mask queries, N detections.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from semiseg.structures.grids import MaskGrid, Regions
from semiseg.structures.inputs import require


@dataclass(frozen=True)
class Locations:
    """The R places of one padded image at which the head predicts; the same for every image of a batch."""

    xy: Tensor  # (R, 2) float32, input pixels: stride * index + stride // 2, x before y
    stride: Tensor  # (R,) float32, stride of the location's level in input pixels
    level: Tensor  # (R,) int64, index of the level, 0 = the finest
    counts: tuple[int, ...]  # how many locations each level has, as the host knows it

    def __post_init__(self) -> None:
        count = self.xy.shape[0]
        require(self.xy.shape == (count, 2), "xy must be (R, 2)")
        require(self.stride.shape == (count,) and self.level.shape == (count,), "stride and level must be (R,)")
        require(sum(self.counts) == count, "counts must add up to R")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the network predicts for a batch, the same in training and evaluation; each detector adds its own."""

    locations: Locations  # the R places of the levels at which the detector predicts
    padded_hw: tuple[int, int] | None = None  # height and width of the padded images; None = none asked for them
    # From what the mask head makes the masks that it is asked for: its own structure, which nobody else looks into
    mask_inputs: Any = None


@dataclass(frozen=True)
class DenseOutputs(Outputs):
    """FCOS's predictions, one at every location."""

    class_logits: Tensor  # (B, R, C)
    box_distances: Tensor  # (B, R, 4) left, top, right, bottom >= 0 in units of the location's stride
    centreness_logits: Tensor  # (B, R)

    def __post_init__(self) -> None:
        batch, count = self.class_logits.shape[:2]
        require(self.box_distances.shape == (batch, count, 4), "box_distances must be (B, R, 4)")
        require(self.centreness_logits.shape == (batch, count), "centreness_logits must be (B, R)")
        require(self.locations.xy.shape[0] == count, "one location per prediction")


@dataclass(frozen=True)
class Assignment:
    """FCOS's: P locations, flat over the batch, that are positive for an instance, and those that are ignored."""

    image_index: Tensor  # (P,) int64; positives are ordered by image, then location
    location_index: Tensor  # (P,) int64 in 0..R-1
    instance_index: Tensor  # (P,) int64, index into Targets' instances
    box_distances: Tensor  # (P, 4) targets in units of the location's stride
    centreness: Tensor  # (P,) targets in [0, 1]
    ignored: Tensor  # (B, R) bool: locations in a crowd box that are not positive; neither object nor background

    def __post_init__(self) -> None:
        count = self.image_index.shape[0]
        require(self.location_index.shape == (count,), "location_index must be (P,)")
        require(self.instance_index.shape == (count,), "instance_index must be (P,)")
        require(self.box_distances.shape == (count, 4), "box_distances must be (P, 4)")
        require(self.centreness.shape == (count,), "centreness must be (P,)")
        require(self.ignored.ndim == 2 and self.ignored.dtype == torch.bool, "ignored must be (B, R) bool")


@dataclass(frozen=True)
class MaskQueries:
    """The instances whose mask is wanted: sampled positives in training, kept detections in prediction."""

    image_index: Tensor  # (Q,) int64
    location_index: Tensor  # (Q,) int64 in 0..R-1
    instance_index: Tensor  # (Q,) int64: in training the target instance, in prediction the detection's own number
    boxes_xyxy: Tensor  # (Q, 4) float32, input pixels, of that instance or detection
    labels: Tensor  # (Q,) int64, its class
    # How many queries each image has, where `image_index` ascends and the numbers are known on the host; else None
    counts: tuple[int, ...] | None = None
    shape_index: Tensor | None = None  # (Q,) int64, which of its location's anchors; None = there is only one

    def __post_init__(self) -> None:
        count = self.image_index.shape[0]
        require(self.shape_index is None or self.shape_index.shape == (count,), "shape_index must be (Q,)")
        for name in ("location_index", "instance_index", "labels"):
            require(getattr(self, name).shape == (count,), f"{name} must be (Q,)")
        require(self.boxes_xyxy.shape == (count, 4), "boxes_xyxy must be (Q, 4)")
        require(self.counts is None or sum(self.counts) == count, "counts must add up to Q")


@dataclass(frozen=True)
class MaskLogits:
    """One mask per query."""

    logits: Tensor  # (Q, h, w)
    image_index: Tensor  # (Q,) int64
    instance_index: Tensor  # (Q,) int64, see `MaskQueries`
    grid: MaskGrid  # where the cells stand: targets, losses and pasting ask it and nothing else
    # (Q, K, 2) x, y in input pixels, of a head whose masks are polygons: what `inference.decoding = "polarmask"` fills
    outlines_xy: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.logits.shape[0]
        require(self.logits.ndim == 3, "logits must be (Q, h, w)")
        require(self.logits.shape[1:] == self.grid.size_hw, "logits must have the cells of their grid")
        if isinstance(self.grid, Regions):
            require(len(self.grid.boxes_xyxy) == count, "one region per mask")
        for name in ("image_index", "instance_index"):
            require(getattr(self, name).shape == (count,), f"{name} must be (Q,)")


@dataclass(frozen=True)
class Candidates:
    """The chosen detections of one image, best first, before their masks."""

    scores: Tensor  # (N,) float32 in [0, 1], descending
    # Their boxes and labels, and where their masks come from; `instance_index` is 0..N-1. Boxes may reach beyond the
    # unpadded image, but each has some area inside.
    queries: MaskQueries

    def __len__(self) -> int:
        return self.scores.shape[0]

    @property
    def boxes_xyxy(self) -> Tensor:
        """(N, 4) float32, input pixels."""
        return self.queries.boxes_xyxy

    @property
    def labels(self) -> Tensor:
        """(N,) int64 in 0..C-1."""
        return self.queries.labels


@dataclass(frozen=True)
class Detections:
    """The detected instances of one image, best first."""

    boxes: Tensor  # (N, 4) float32 xyxy in output pixels, clipped to the output
    scores: Tensor  # (N,) float32 in [0, 1], descending
    labels: Tensor  # (N,) int64 in 0..C-1
    masks: Tensor  # (N, height, width) bool in output pixels

    def __post_init__(self) -> None:
        count = self.boxes.shape[0]
        require(self.boxes.shape == (count, 4), "boxes must be (N, 4)")
        require(self.scores.shape == (count,) and self.labels.shape == (count,), "scores and labels must be (N,)")
        require(self.masks.shape[0] == count and self.masks.dtype == torch.bool, "masks must be (N, H, W) bool")

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def to(self, device: torch.device | str) -> Detections:
        return Detections(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})
