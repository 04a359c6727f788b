"""What goes into the model and the losses: Supervision, Targets, Batch.

Frames: boxes are xyxy in absolute pixels of the *input* (the resized, unpadded image); images are RGB uint8.
The mask grid has a stride s: cell (i, j) stands for the input pixel (s*i + s//2, s*j + s//2) in (row, column) order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from semiseg.structures.grids import MaskGrid, Regions
from semiseg.structures.masks import EncodedMasks
from semiseg.structures.rays import RayTargets
from semiseg.structures.transfer import map_tensors


class Supervision(IntEnum):
    """What is known of one training instance beyond its class and box."""

    BOX = 0  # nothing: the mask was withheld or never annotated
    MASK = 1  # its annotated mask
    PSEUDO = 2  # a mask that a teacher or an imported prediction supplied, with a weight
    CUT = 3  # less than BOX: a random crop has cut its box, of which it need not touch every side any more


def has_mask(supervision: Tensor) -> Tensor:
    """Of values of `Supervision` (N,), (N,) bool."""
    return (supervision == Supervision.MASK) | (supervision == Supervision.PSEUDO)


def require(condition: bool, message: str) -> None:
    """The check of the contracts: a broken one is a programming error, so a ValueError."""
    if not condition:
        raise ValueError(message)


def grid_size(size_hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of the grid of the given stride that covers `size_hw` input pixels: ceil division."""
    return -(-size_hw[0] // stride), -(-size_hw[1] // stride)


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch, flat over its images.

    Attributes:
        boxes_xyxy: (N, 4) float32, input pixels of the instance's image.
        labels: (N,) int64 in 0..C-1.
        image_index: (N,) int64 in 0..B-1, ascending.
        supervision: (N,) int64, values of `Supervision`.
        masks: (M, h, w) bool on the mask grid of the *padded* batch, (h, w) = grid_size(padded size, mask_stride).
        mask_instance: (M,) int64, index into the N instances; exactly those whose supervision is MASK or PSEUDO.
        mask_weight: (M,) float32, weight of each mask in the losses that compare with it (1 for annotated masks).
        crowd_boxes_xyxy: (K, 4) float32, input pixels: regions that are neither object nor background.
        crowd_image_index: (K,) int64 in 0..B-1.
        mask_stride: stride of the mask grid in input pixels; None = every mask has a grid of its own: then `masks` is
            (M, 0, 0), and `encoded` has them.
        rays: how far the masks reach, where the objective is learned from that.
        mask_known: (M, h, w) bool, the cells of which the masks say something; None = all, or see `encoded_known`.
        encoded_known: the same in place of it where masks are encoded.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    image_index: Tensor
    supervision: Tensor
    masks: Tensor
    mask_instance: Tensor
    mask_weight: Tensor
    crowd_boxes_xyxy: Tensor
    crowd_image_index: Tensor
    mask_stride: int | None
    encoded: EncodedMasks | None = None
    rays: RayTargets | None = None
    mask_known: Tensor | None = None
    encoded_known: EncodedMasks | None = None

    def __post_init__(self) -> None:
        count, mask_count = self.boxes_xyxy.shape[0], self.masks.shape[0]
        require(self.boxes_xyxy.shape == (count, 4), "boxes_xyxy must be (N, 4)")
        for name in ("labels", "image_index", "supervision"):
            require(getattr(self, name).shape == (count,), f"{name} must be (N,)")
        require(self.masks.ndim == 3, "masks must be (M, h, w)")
        require((self.encoded is None) == (self.mask_stride is not None), "encoded masks, or a stride")
        for name in ("mask_instance", "mask_weight"):
            require(getattr(self, name).shape == (mask_count,), f"{name} must be (M,)")
        require(self.crowd_boxes_xyxy.shape == (self.crowd_image_index.shape[0], 4), "crowd boxes must be (K, 4)")

    @property
    def num_instances(self) -> int:
        return self.boxes_xyxy.shape[0]

    def masks_on(self, grid: MaskGrid) -> Tensor:
        """The masks' cells (M, h, w) bool on the grid of the N instances' masks."""
        if isinstance(grid, Regions):
            if self.encoded is None:
                raise ValueError("masks that are sampled already cannot be cut out")
            return self.encoded.at(*grid.of(self.mask_instance).centres())
        own = (self.mask_stride, (self.masks.shape[1], self.masks.shape[2]))
        require(own == (grid.stride, grid.size_hw), f"the masks have stride and size {own}, but their grid is {grid}")
        return self.masks

    def known_on(self, grid: MaskGrid) -> Tensor | None:
        """Of which of `masks_on(grid)` the masks say something; None = of all."""
        if isinstance(grid, Regions) and self.encoded_known is not None:
            return self.encoded_known.at(*grid.of(self.mask_instance).centres())
        return self.mask_known

    def crowds_of(self, image: int) -> Tensor:
        """(k, 4) the crowd boxes of an image."""
        return self.crowd_boxes_xyxy[self.crowd_image_index == image]

    def of_queries(self, instance: Tensor, image_index: Tensor) -> Targets:
        """Each of Q instances (Q,), in images (Q,) ascending, as an instance of its own; the masks stay encoded."""
        require(self.encoded is not None, "masks that are sampled already cannot be cut out")
        assert self.encoded is not None
        row = torch.zeros_like(self.labels)
        row[self.mask_instance] = torch.arange(len(self.mask_instance), device=row.device)
        supervision = self.supervision[instance]
        with_mask = torch.nonzero(has_mask(supervision))[:, 0]
        rows = row[instance[with_mask]]
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[instance],
            labels=self.labels[instance],
            image_index=image_index,
            supervision=supervision,
            masks=self.masks[rows],
            mask_instance=with_mask,
            mask_weight=self.mask_weight[rows],
            encoded=self.encoded.of(rows),
            encoded_known=None if self.encoded_known is None else self.encoded_known.of(rows),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Batch:
    """A padded batch of images with its targets.

    Attributes:
        images: (B, 3, H, W) uint8, RGB; padded right and bottom with raw 0 so that H and W divide by the model's
            size divisor. From a loader they are channels last in memory, as decoded; `to` makes them contiguous.
        image_sizes_hw: (B, 2) int64, height and width before padding.
        image_ids: COCO's image ids, one per image.
        bottom_rows_without_affinity: (B,) int64, input rows at the bottom whose colours are not to be trusted (COCO:
            10 rows of the original image, scaled; METHOD section 2).
        targets: the ground truth, or None for prediction.
        seeds: of the samples, one per image, from which a detector draws what it learns from; empty = it draws nothing.
    """

    images: Tensor
    image_sizes_hw: Tensor
    image_ids: tuple[int, ...]
    bottom_rows_without_affinity: Tensor
    targets: Targets | None
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = self.images.shape[0]
        require(self.images.dtype == torch.uint8 and self.images.ndim == 4, "images must be (B, 3, H, W) uint8")
        require(self.image_sizes_hw.shape == (count, 2), "image_sizes_hw must be (B, 2)")
        require(len(self.image_ids) == count, "one image id per image")
        require(len(self.seeds) in (0, count), "one seed per image")
        require(self.bottom_rows_without_affinity.shape == (count,), "bottom_rows_without_affinity must be (B,)")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on that device, its images contiguous there: results do not depend on the loader's layout."""
        moved = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, images=moved.images.contiguous())

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when `pin_memory` is on."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


def pad_images(images: Sequence[Tensor], size_divisor: int) -> tuple[Tensor, Tensor]:
    """B images (3, H_i, W_i) uint8 of any memory layout as a contiguous `empty_batch`, and their sizes (B, 2) int64."""
    sizes_hw = [(image.shape[-2], image.shape[-1]) for image in images]
    stacked, places = empty_batch(sizes_hw, size_divisor, device=images[0].device)
    for place, image in zip(places, images, strict=True):
        place.copy_(image)
    return stacked, torch.tensor(sizes_hw, dtype=torch.int64)


def empty_batch(
    sizes_hw: Sequence[tuple[int, int]],
    size_divisor: int,
    *,
    channels_last: bool = False,
    shared: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, list[Tensor]]:
    """A padded batch whose images are still to be written.

    Args:
        sizes_hw: (height, width) of B images.
        size_divisor: the padded height and width divide by it.
        channels_last: the three colours of a pixel side by side in memory, as images are decoded; else contiguous.
        shared: in memory that another process can be given without a copy; on the CPU only.

    Returns:
        (B, 3, H, W) uint8, the padding 0, and B views of it, (3, H_i, W_i): the images' places.
    """
    height, width = (-(-max(sides) // size_divisor) * size_divisor for sides in zip(*sizes_hw, strict=True))
    flat = _bytes(3 * len(sizes_hw) * height * width, torch.device(device), shared)
    if channels_last:
        stacked = flat.view(len(sizes_hw), height, width, 3).permute(0, 3, 1, 2)
    else:
        stacked = flat.view(len(sizes_hw), 3, height, width)
    places = []
    for slot, (rows, columns) in zip(stacked, sizes_hw, strict=True):
        slot[:, rows:] = 0
        slot[:, :rows, columns:] = 0
        places.append(slot[:, :rows, :columns])
    return stacked, places


def _bytes(count: int, device: torch.device, shared: bool) -> Tensor:
    """(count,) uint8, whose values are still to be written."""
    if shared:
        # As torch's own collate function does in a worker. The name is private, so it may go; the public way is half as
        # fast, since it writes every page twice.
        fresh = getattr(torch.UntypedStorage, "_new_shared", None)
        if fresh is None:
            slow: Tensor = torch.empty(count, dtype=torch.uint8).share_memory_()
            return slow
        return torch.empty(0, dtype=torch.uint8).set_(fresh(count))
    if device.type == "cpu":  # numpy asks Linux for large pages, so a fresh batch costs far fewer page faults
        return torch.from_numpy(np.empty(count, dtype=np.uint8))
    return torch.empty(count, dtype=torch.uint8, device=device)
