"""Rows of the table + the supervision rule -> a batch. THE leak barrier: withheld masks end here.

`withhold` is the only place that decides which masks a training may see. It runs before anything is decoded and
passes on only what is kept; crowd regions pass on their box alone, for every class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from semiseg.data.augment import Augmentation, View
from semiseg.data.pseudo import PseudoMask, PseudoMasks
from semiseg.data.rays import Raster, RayRule, ray_targets
from semiseg.data.table import Table
from semiseg.data.transforms import Geometry, Transform
from semiseg.data.workers import workers_lack
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch, Supervision, Targets, empty_batch, grid_size
from semiseg.structures.masks import MASK_BITS, EncodedMasks
from semiseg.structures.rasterise import cell_centres, outlines_to_rle, read_cells, run_lengths

Key = tuple[int, int]  # (row index, sample seed)
Source = Literal["split", "masks", "boxes", "as_annotated"]
Mask = Sequence[Sequence[float]] | bytes  # still encoded: outlines, or the counts of a compressed RLE


class Split(Protocol):
    """What a rule needs of a class split."""

    def keeps_mask(self, class_name: str, annotation_id: int) -> bool: ...


# (class name, annotation id) -> whether a training may see the mask of that instance, if it has one.
MaskRule = Callable[[str, int], bool]


def build_rule(source: Source, split: Split | None) -> MaskRule:
    """The rule of a supervision source; `split` is used by the source `split` alone.

    `masks` and `as_annotated` are one rule: an annotation without a mask has nothing but its box under any of them.
    """
    if source != "split":
        return partial(_keep_all_or_none, source != "boxes")
    if split is None:
        raise UserError("supervision.source = 'split' needs supervision.split, the name or path of a class split")
    return split.keeps_mask


def _keep_all_or_none(keep: bool, class_name: str, annotation_id: int) -> bool:
    return keep


@dataclass(frozen=True)
class Instances:
    """What is left of one image's annotations behind the barrier; boxes in original pixels, or in those of a view.

    `masks[i]` belongs to instance `mask_instance[i]`; exactly those whose supervision is MASK or PSEUDO have one.
    """

    boxes_xyxy: np.ndarray
    labels: list[int]
    supervision: list[int]
    masks: list[Mask]
    mask_instance: list[int]
    crowd_boxes_xyxy: np.ndarray
    mask_weight: list[float]  # of each mask
    mask_known: list[bytes | None]  # RLE of the pixels that the mask says something of; None = all


def withhold(
    objects: Sequence[dict[str, Any]],
    *,
    class_names: Sequence[str],
    rule: MaskRule,
    pseudo: Mapping[int, PseudoMask] | None = None,
) -> Instances:
    """The leak barrier: `objects` of a table row -> what the rule lets a training know.

    The rule decides per instance; the value of a withheld mask is not looked at. Instances that are left with a box
    alone get the pseudo mask of their annotation id, if there is one.
    """
    given = pseudo or {}
    crowd = [item["box_xyxy"] for item in objects if item["is_crowd"]]
    instances = [item for item in objects if not item["is_crowd"]]
    keeps = [item["has_mask"] and rule(class_names[item["label"]], item["annotation_id"]) for item in instances]
    found = [None if keep else given.get(item["annotation_id"]) for item, keep in zip(instances, keeps, strict=True)]
    kinds = [
        Supervision.MASK if keep else Supervision.BOX if mask is None else Supervision.PSEUDO
        for keep, mask in zip(keeps, found, strict=True)
    ]
    with_mask = [index for index, kind in enumerate(kinds) if kind != Supervision.BOX]
    return Instances(
        boxes_xyxy=np.array([item["box_xyxy"] for item in instances], dtype=np.float64).reshape(-1, 4),
        labels=[item["label"] for item in instances],
        supervision=[int(kind) for kind in kinds],
        masks=[mask.rle_counts if (mask := found[i]) else _annotated(instances[i]) for i in with_mask],
        mask_instance=with_mask,
        crowd_boxes_xyxy=np.array(crowd, dtype=np.float64).reshape(-1, 4),
        mask_weight=[mask.weight if (mask := found[i]) else 1.0 for i in with_mask],
        mask_known=[mask.known_counts if (mask := found[i]) else None for i in with_mask],
    )


def _annotated(item: dict[str, Any]) -> Mask:
    mask: Mask = item["rle_counts"] or item["polygons"]
    return mask


@dataclass(frozen=True)
class InstanceDataset:
    """The images of a table under a supervision rule; a key (row index, sample seed) means one of them.

    All chance in a sample comes from its seed, so it is the same on every worker, rank and resume.
    """

    table: Table
    _: KW_ONLY
    rule: MaskRule
    transform: Transform
    mask_stride: int | None  # of the mask grid, in input pixels; None = masks stay encoded, for grids of their own
    bottom_rows_without_affinity: int = 0  # rows of the *original* whose colours are not to be trusted (COCO: 10)
    rays: RayRule | None = None  # what of rays is learned from, if anything
    pseudo: PseudoMasks | None = None  # masks for instances that the rule leaves with a box alone
    augmentation: Augmentation | None = None  # what makes another image of one before it is resized

    def __len__(self) -> int:
        return len(self.table.rows)

    def has_masks(self) -> bool:
        """Whether the rule leaves any instance its annotated mask; looks no further than the first."""
        names = self.table.class_names
        return any(withhold(row["objects"], class_names=names, rule=self.rule).masks for row in self.table.rows)

    def _withheld(self, row: dict[str, Any], index: int) -> Instances:
        pseudo = None if self.pseudo is None else self.pseudo.of(index)
        return withhold(row["objects"], class_names=self.table.class_names, rule=self.rule, pseudo=pseudo)

    def batch(self, keys: Sequence[Key], *, size_divisor: int) -> Batch:
        """The images of some keys with their instances; height and width of the padded batch divide by `size_divisor`.

        All annotations come first, then image after image is written into the batch while it is in cache. Raises
        `UserError` if an image is missing, damaged or not of the size that the annotations state.
        """
        rows = [self.table.rows[index] for index, _ in keys]
        instances = [self._withheld(row, index) for row, (index, _) in zip(rows, keys, strict=True)]
        seen = [self._view(*each) for each in zip(rows, instances, keys, strict=True)]
        instances = [own if view is None else view.instances(own) for own, view in zip(instances, seen, strict=True)]
        stored = [(row["height"], row["width"]) for row in rows]
        whole = [size if view is None else view.size_hw for size, view in zip(stored, seen, strict=True)]
        geometries = [self.transform(size, seed) for size, (_, seed) in zip(whole, keys, strict=True)]
        shared, sizes_hw = get_worker_info() is not None, [geometry.input_hw for geometry in geometries]
        with workers_lack() if shared else nullcontext():
            images, places = empty_batch(sizes_hw, size_divisor, channels_last=True, shared=shared)
        padded_hw = (images.shape[-2], images.shape[-1])
        count = self.bottom_rows_without_affinity
        rows_without = [count if view is None else view.bottom_rows(count) for view in seen]
        bottom = [n * each.input_hw[0] // each.original_hw[0] for n, each in zip(rows_without, geometries, strict=True)]
        batch = Batch(
            images=images,
            image_sizes_hw=torch.tensor(sizes_hw, dtype=torch.int64),
            image_ids=tuple(row["image_id"] for row in rows),
            bottom_rows_without_affinity=torch.tensor(bottom, dtype=torch.int64),
            targets=self._targets(instances, geometries, padded_hw),
            seeds=tuple(seed for _, seed in keys),
        )
        for row, view, geometry, place in zip(rows, seen, geometries, places, strict=True):
            image = self.table.image(row)
            geometry.image(image if view is None else view.image(image), place)
        return batch

    def _view(self, row: dict[str, Any], instances: Instances, key: Key) -> View | None:
        if self.augmentation is None:
            return None
        return self.augmentation((row["height"], row["width"]), instances.boxes_xyxy, key[1])

    def _targets(
        self, images: Sequence[Instances], geometries: Sequence[Geometry], padded_hw: tuple[int, int]
    ) -> Targets:
        targets = _targets(images, geometries, self.mask_stride, padded_hw)
        if self.rays is None:
            return targets
        rasters = [raster for each in zip(images, geometries, strict=True) for raster in _rasters(*each)]
        return replace(targets, rays=ray_targets(targets, rasters, self.rays, padded_hw, len(images)))


def _targets(
    images: Sequence[Instances], geometries: Sequence[Geometry], stride: int | None, padded_hw: tuple[int, int]
) -> Targets:
    first_instance = accumulate((len(item.labels) for item in images), initial=0)
    numbers = torch.arange(len(images))
    mask_instance = [
        first + index for item, first in zip(images, first_instance, strict=False) for index in item.mask_instance
    ]
    return Targets(
        boxes_xyxy=_boxes([item.boxes_xyxy for item in images], geometries),
        labels=torch.tensor([label for item in images for label in item.labels], dtype=torch.int64),
        image_index=numbers.repeat_interleave(torch.tensor([len(item.labels) for item in images])),
        supervision=torch.tensor([kind for item in images for kind in item.supervision], dtype=torch.int64),
        masks=_cells([item.masks for item in images], geometries, stride, padded_hw),
        mask_instance=torch.tensor(mask_instance, dtype=torch.int64),
        mask_weight=torch.tensor([weight for item in images for weight in item.mask_weight], dtype=torch.float32),
        crowd_boxes_xyxy=_boxes([item.crowd_boxes_xyxy for item in images], geometries),
        crowd_image_index=numbers.repeat_interleave(torch.tensor([len(item.crowd_boxes_xyxy) for item in images])),
        mask_stride=stride,
        encoded=_encoded([item.masks for item in images], geometries) if stride is None else None,
        **_known(images, geometries, stride, padded_hw),
    )


def _known(
    images: Sequence[Instances], geometries: Sequence[Geometry], stride: int | None, padded_hw: tuple[int, int]
) -> dict[str, Any]:
    """`Targets.mask_known` or `encoded_known`; nothing where every mask of the batch is known everywhere."""
    if all(known is None for item in images for known in item.mask_known):
        return {}
    everywhere = [outlines_to_rle([_frame(geometry.original_hw)], geometry.original_hw) for geometry in geometries]
    rles = [[known or whole for known in item.mask_known] for item, whole in zip(images, everywhere, strict=True)]
    if stride is None:
        return {"encoded_known": _encoded(rles, geometries)}
    return {"mask_known": _cells(rles, geometries, stride, padded_hw)}


def _frame(size_hw: tuple[int, int]) -> np.ndarray:
    """The outline of a whole image."""
    height, width = size_hw
    return np.array([0, 0, width, 0, width, height, 0, height], dtype=np.float64)


def _boxes(boxes_xyxy: Sequence[np.ndarray], geometries: Sequence[Geometry]) -> Tensor:
    """The boxes of each image, one after the other: (N, 4) float32 input pixels."""
    return torch.cat([item.boxes(boxes) for boxes, item in zip(boxes_xyxy, geometries, strict=True)])


def _cells(
    masks: Sequence[Sequence[Mask]], geometries: Sequence[Geometry], stride: int | None, padded_hw: tuple[int, int]
) -> Tensor:
    """(M, h, w) bool: the masks of each image at the centres of the batch's cells; False beyond the image.

    Outlines are rasterised at the input's resolution. An RLE is read at the original pixels that hold the centres.
    Without a stride there are no cells.
    """
    count = sum(map(len, masks))
    if stride is None:
        return torch.zeros(count, 0, 0, dtype=torch.bool)
    cells = torch.zeros(count, *grid_size(padded_hw, stride), dtype=torch.bool)
    for part, own, geometry in zip(cells.split([len(own) for own in masks]), masks, geometries, strict=True):
        rows, columns = (cell_centres(side, stride) for side in geometry.input_hw)
        inside = part.numpy()[:, : len(rows), : len(columns)]
        rles = _rles(own, geometry)
        drawn = [index for index, mask in enumerate(own) if not isinstance(mask, bytes)]
        inside[drawn] = read_cells([rles[index] for index in drawn], geometry.input_hw, rows=rows, columns=columns)
        stored = [index for index, mask in enumerate(own) if isinstance(mask, bytes)]
        rows, columns = geometry.source_rows(rows), geometry.source_columns(columns)
        inside[stored] = read_cells([rles[index] for index in stored], geometry.original_hw, rows=rows, columns=columns)
    return cells


def _rasters(instances: Instances, geometry: Geometry) -> list[Raster]:
    """The masks of one image in input pixels, each as far as its box and a pixel around it."""
    rasters: list[Raster] = []
    boxes = geometry.boxes(instances.boxes_xyxy[instances.mask_instance]).tolist()
    for mask, rle, box in zip(instances.masks, _rles(instances.masks, geometry), boxes, strict=True):
        height, width = geometry.input_hw
        columns = np.arange(max(int(box[0]) - 1, 0), min(int(box[2]) + 2, width))
        rows = np.arange(max(int(box[1]) - 1, 0), min(int(box[3]) + 2, height))
        if isinstance(mask, bytes):
            at = {"rows": geometry.source_rows(rows), "columns": geometry.source_columns(columns)}
            cells = read_cells([rle], geometry.original_hw, **at)
        else:
            cells = read_cells([rle], geometry.input_hw, rows=rows, columns=columns)
        rasters.append((cells[0], (int(columns[0]), int(rows[0]))))
    return rasters


def _rles(masks: Sequence[Mask], geometry: Geometry) -> list[bytes]:
    """The counts of each mask on its raster: outlines at the input's resolution, an RLE as it is, on the original's."""
    polygons = iter(geometry.polygons([polygon for mask in masks if not isinstance(mask, bytes) for polygon in mask]))
    return [
        mask if isinstance(mask, bytes) else outlines_to_rle([next(polygons) for _ in mask], geometry.input_hw)
        for mask in masks
    ]


def _encoded(masks: Sequence[Sequence[Mask]], geometries: Sequence[Geometry]) -> EncodedMasks:
    """The masks of each image as they are, on the rasters of `_rles`."""
    rles = [rle for own, geometry in zip(masks, geometries, strict=True) for rle in _rles(own, geometry)]
    outlined = torch.tensor([not isinstance(mask, bytes) for own in masks for mask in own], dtype=torch.bool)
    counts = torch.tensor([len(own) for own in masks])
    original = torch.tensor([item.original_hw for item in geometries]).repeat_interleave(counts, dim=0)
    size = torch.tensor([item.input_hw for item in geometries]).repeat_interleave(counts, dim=0)
    flipped = torch.tensor([item.flipped for item in geometries]).repeat_interleave(counts)
    lengths, bounds = run_lengths(rles)
    changes = np.zeros_like(lengths)
    for index, (first, end) in enumerate(pairwise(bounds)):
        # The last run ends with the raster, where nothing is asked for.
        changes[first:end] = np.cumsum(lengths[first:end]) + (index << MASK_BITS)
    return EncodedMasks(
        changes=torch.from_numpy(changes),
        raster_hw=torch.where(outlined[:, None], size, original),
        input_hw=size,
        flipped=~outlined & flipped,
    )
