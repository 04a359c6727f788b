"""A row of the table + the supervision rule -> Sample. THE leak barrier: withheld masks end here.

`withhold` is the only place that decides which masks a training may see. It runs before anything is decoded and
passes on only what is kept; crowd regions pass on their box alone, for every class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from semiseg.data.images import read_image
from semiseg.data.rasterise import cell_centres, outlines_to_rle, read_cells, run_lengths
from semiseg.data.table import Table
from semiseg.data.transforms import Geometry, Transform
from semiseg.errors import UserError
from semiseg.structures.inputs import Sample, Supervision, grid_size
from semiseg.structures.masks import MASK_BITS, EncodedMasks

Key = tuple[int, int]  # (row index, sample seed)
Source = Literal["split", "masks", "boxes", "as_annotated"]


class Split(Protocol):
    """What a rule needs of a class split."""

    def keeps_mask(self, class_name: str, annotation_id: int) -> bool: ...


# (class name, annotation id) -> whether a training may see the mask of that instance, if it has one.
MaskRule = Callable[[str, int], bool]


def keep_all_masks(class_name: str, annotation_id: int) -> bool:
    """Every instance keeps the mask it has; one without a `segmentation` has only its box."""
    return True


def keep_no_masks(class_name: str, annotation_id: int) -> bool:
    """No instance keeps its mask."""
    return False


def build_rule(source: Source, split: Split | None) -> MaskRule:
    """The rule of a supervision source; `split` is used by the source `split` alone.

    `masks` and `as_annotated` are one rule: an annotation without a mask has nothing but its box under any of them.
    """
    if source == "boxes":
        return keep_no_masks
    if source in ("masks", "as_annotated"):
        return keep_all_masks
    if split is None:
        raise UserError("supervision.source = 'split' needs supervision.split, the name or path of a class split")
    return split.keeps_mask


@dataclass(frozen=True)
class KeptMask:
    """A mask that may be used, still encoded: outlines, or RLE counts where `polygons` is empty."""

    polygons: Sequence[Sequence[float]]
    rle_counts: bytes | None


@dataclass(frozen=True)
class Instances:
    """What is left of one image's annotations behind the barrier; boxes in original pixels.

    `masks[i]` belongs to instance `mask_instance[i]`; exactly the instances with supervision MASK have one.
    """

    boxes_xyxy: np.ndarray
    labels: list[int]
    supervision: list[int]
    masks: list[KeptMask]
    mask_instance: list[int]
    crowd_boxes_xyxy: np.ndarray


def withhold(objects: Sequence[dict[str, Any]], *, class_names: Sequence[str], rule: MaskRule) -> Instances:
    """The leak barrier: annotations of one image -> what the rule lets a training know.

    Args:
        objects: `objects` of a table row.
        class_names: name of each label.
        rule: decides per instance; the value of a withheld mask is not looked at.
    """
    crowd = [item["box_xyxy"] for item in objects if item["is_crowd"]]
    instances = [item for item in objects if not item["is_crowd"]]
    keeps = [item["has_mask"] and rule(class_names[item["label"]], item["annotation_id"]) for item in instances]
    with_mask = [index for index, kept in enumerate(keeps) if kept]
    return Instances(
        boxes_xyxy=np.array([item["box_xyxy"] for item in instances], dtype=np.float64).reshape(-1, 4),
        labels=[item["label"] for item in instances],
        supervision=[int(Supervision.MASK if kept else Supervision.BOX) for kept in keeps],
        masks=[KeptMask(instances[index]["polygons"], instances[index]["rle_counts"]) for index in with_mask],
        mask_instance=with_mask,
        crowd_boxes_xyxy=np.array(crowd, dtype=np.float64).reshape(-1, 4),
    )


class InstanceDataset(torch.utils.data.Dataset[Sample]):
    """Map-style data set: key (row index, sample seed) -> Sample.

    All chance in a sample comes from its seed, so it is the same on every worker, rank and resume.
    """

    def __init__(
        self,
        table: Table,
        *,
        rule: MaskRule,
        transform: Transform,
        mask_stride: int | None,
        bottom_rows_without_affinity: int = 0,
    ) -> None:
        """Joins the annotations with what a training may see of them.

        Args:
            table: the annotations.
            rule: which instances keep their mask.
            transform: chooses resize and flip.
            mask_stride: stride of the mask grid in input pixels; None = masks stay encoded, for grids of their own.
            bottom_rows_without_affinity: rows of the *original* image whose colours are not to be trusted (COCO: 10).
        """
        self.table = table
        self.rule = rule
        self.transform = transform
        self.mask_stride = mask_stride
        self.bottom_rows_without_affinity = bottom_rows_without_affinity

    def __len__(self) -> int:
        return len(self.table.rows)

    def __getitem__(self, key: Key) -> Sample:
        """Raises `UserError` if the image is missing, damaged or not of the size that the annotations state."""
        row, instances, geometry = self.choose(key)
        return self.sample(row, instances, geometry, self.read_image(row, geometry))

    def choose(self, key: Key) -> tuple[dict[str, Any], Instances, Geometry]:
        """The row of the image without its objects, what the rule leaves of these, and the resize and flip."""
        index, seed = key
        row = self.table.rows[index]
        instances = withhold(row.pop("objects"), class_names=self.table.class_names, rule=self.rule)
        return row, instances, self.transform((row["height"], row["width"]), seed)

    def read_image(self, row: dict[str, Any], geometry: Geometry, out: Tensor | None = None) -> Tensor:
        """The image as (3, H, W) uint8 after resize and flip, written to `out` where that is given."""
        image = read_image(self.table.images_folder / row["file_name"], size_hw=geometry.original_hw)
        return geometry.image(image, out)

    def sample(self, row: dict[str, Any], instances: Instances, geometry: Geometry, image: Tensor) -> Sample:
        """The sample with that image, whose pixels may still be missing."""
        bottom = self.bottom_rows_without_affinity * geometry.input_hw[0] // geometry.original_hw[0]
        return Sample(
            image=image,
            image_id=row["image_id"],
            boxes_xyxy=geometry.boxes(instances.boxes_xyxy),
            labels=torch.tensor(instances.labels, dtype=torch.int64),
            supervision=torch.tensor(instances.supervision, dtype=torch.int64),
            masks=_cells(instances.masks, geometry, self.mask_stride),
            encoded=_encoded(instances.masks, geometry) if self.mask_stride is None else None,
            mask_instance=torch.tensor(instances.mask_instance, dtype=torch.int64),
            crowd_boxes_xyxy=geometry.boxes(instances.crowd_boxes_xyxy),
            mask_stride=self.mask_stride,
            bottom_rows_without_affinity=bottom,
        )


def _cells(masks: Sequence[KeptMask], geometry: Geometry, stride: int | None) -> Tensor:
    """(M, h, w) bool: each mask at the centres of its cells; a cell whose centre lies beyond the image is False.

    Outlines are rasterised at the input's resolution. An RLE is read at the original pixels that hold the centres.
    Without a stride there are no cells.
    """
    if stride is None:
        return torch.zeros(len(masks), 0, 0, dtype=torch.bool)
    height, width = geometry.input_hw
    rows, columns = cell_centres(height, stride), cell_centres(width, stride)
    cells = torch.zeros(len(masks), *grid_size(geometry.input_hw, stride), dtype=torch.bool)
    inside = cells.numpy()[:, : len(rows), : len(columns)]
    outlined = [number for number, kept in enumerate(masks) if kept.rle_counts is None]
    rles = _rasterised([masks[number].polygons for number in outlined], geometry)
    for number, mask in zip(outlined, read_cells(rles, geometry.input_hw, rows=rows, columns=columns), strict=True):
        inside[number] = mask
    encoded = {number: kept.rle_counts for number, kept in enumerate(masks) if kept.rle_counts is not None}
    rows, columns = geometry.source_rows(rows), geometry.source_columns(columns)
    read = read_cells(list(encoded.values()), geometry.original_hw, rows=rows, columns=columns)
    for number, mask in zip(encoded, read, strict=True):
        inside[number] = mask
    return cells


def _rasterised(masks: Sequence[Sequence[Sequence[float]]], geometry: Geometry) -> list[bytes]:
    """The outlines of each mask, in original pixels -> its counts at the input's resolution."""
    outlines = iter(geometry.polygons([polygon for mask in masks for polygon in mask]))
    return [outlines_to_rle([next(outlines) for _ in mask], geometry.input_hw) for mask in masks]


def _encoded(masks: Sequence[KeptMask], geometry: Geometry) -> EncodedMasks:
    """The masks as they are: outlines rasterised at the input's resolution, an RLE on the original's."""
    outlines = iter(_rasterised([kept.polygons for kept in masks if kept.rle_counts is None], geometry))
    rles = [next(outlines) if kept.rle_counts is None else kept.rle_counts for kept in masks]
    outlined = torch.tensor([kept.rle_counts is None for kept in masks], dtype=torch.bool)[:, None]
    original, size = torch.tensor(geometry.original_hw), torch.tensor(geometry.input_hw)
    changes = [torch.zeros(0, dtype=torch.int64)]
    if rles:
        lengths, bounds = run_lengths(rles)
        for number, (first, end) in enumerate(pairwise(bounds)):
            # The last run ends with the raster, where nothing is asked for.
            changes.append(torch.from_numpy(np.cumsum(lengths[first:end])) + (number << MASK_BITS))
    return EncodedMasks(
        changes=torch.cat(changes),
        raster_hw=torch.where(outlined, size, original),
        input_hw=size.expand(len(masks), 2).clone(),
        flipped=~outlined[:, 0] & geometry.flipped,
    )
