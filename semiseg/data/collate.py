"""Keys -> Batch: images padded to one size, instances flat over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from semiseg.data.dataset import InstanceDataset, Key
from semiseg.data.workers import workers_lack
from semiseg.structures.inputs import Batch, Sample, Targets, empty_batch, grid_size
from semiseg.structures.masks import joined


def load_batch(dataset: InstanceDataset, keys: Sequence[Key], *, size_divisor: int) -> Batch:
    """The batch of the samples `dataset[key]`, without a copy of each image on the way, and with the same errors.

    All annotations come first, then image after image is written into the batch while it is in cache. Height and width
    of the padded batch divide by `size_divisor`.
    """
    rows = [dataset.choose(key) for key in keys]
    sizes_hw = [geometry.input_hw for _, _, geometry in rows]
    shared = get_worker_info() is not None
    with workers_lack() if shared else nullcontext():
        images, views = empty_batch(sizes_hw, size_divisor, channels_last=True, shared=shared)
    samples = [dataset.sample(*row, view) for row, view in zip(rows, views, strict=True)]
    batch = Batch(
        images=images,
        image_sizes_hw=torch.tensor(sizes_hw, dtype=torch.int64),
        image_ids=tuple(sample.image_id for sample in samples),
        bottom_rows_without_affinity=torch.tensor([s.bottom_rows_without_affinity for s in samples]),
        targets=_targets(samples, dataset.mask_stride, (images.shape[-2], images.shape[-1])),
    )
    for (row, _, geometry), view in zip(rows, views, strict=True):
        dataset.read_image(row, geometry, out=view)
    return batch


def _targets(samples: Sequence[Sample], stride: int | None, padded_hw: tuple[int, int]) -> Targets:
    counts = torch.tensor([len(sample.labels) for sample in samples])
    first_instance = (counts.cumsum(0) - counts).tolist()
    crowd_counts = torch.tensor([len(sample.crowd_boxes_xyxy) for sample in samples])
    image_numbers = torch.arange(len(samples))
    return Targets(
        boxes_xyxy=torch.cat([sample.boxes_xyxy for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        image_index=image_numbers.repeat_interleave(counts),
        supervision=torch.cat([sample.supervision for sample in samples]),
        masks=_masks([sample.masks for sample in samples], stride, padded_hw),
        mask_instance=torch.cat([s.mask_instance + first for s, first in zip(samples, first_instance, strict=True)]),
        mask_weight=torch.ones(sum(len(sample.masks) for sample in samples)),
        crowd_boxes_xyxy=torch.cat([sample.crowd_boxes_xyxy for sample in samples]),
        crowd_image_index=image_numbers.repeat_interleave(crowd_counts),
        mask_stride=stride,
        encoded=joined([s.encoded for s in samples if s.encoded is not None]) if stride is None else None,
    )


def _masks(masks: Sequence[Tensor], stride: int | None, padded_hw: tuple[int, int]) -> Tensor:
    """The masks of all images, padded to the grid of the batch."""
    padded = torch.zeros(sum(map(len, masks)), *(grid_size(padded_hw, stride) if stride else (0, 0)), dtype=torch.bool)
    start = 0
    for one in masks:
        count, height, width = one.shape
        padded[start : start + count, :height, :width] = one
        start += count
    return padded
