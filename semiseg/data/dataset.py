"""A row of the table + the supervision rule -> Sample. THE leak barrier: withheld masks end here.

`withhold` is the only place that decides which masks a training may see. It runs before anything is decoded and
passes on only what is kept; crowd regions pass on their box alone, for every class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
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
    """What is left of one image's annotations behind the barrier; boxes in original pixels.

    `masks[i]` belongs to instance `mask_instance[i]`; exactly the instances with supervision MASK have one.
    """

    boxes_xyxy: np.ndarray
    labels: list[int]
    supervision: list[int]
    masks: list[Mask]
    mask_instance: list[int]
    crowd_boxes_xyxy: np.ndarray


def withhold(objects: Sequence[dict[str, Any]], *, class_names: Sequence[str], rule: MaskRule) -> Instances:
    """The leak barrier: `objects` of a table row -> what the rule lets a training know.

    The rule decides per instance; the value of a withheld mask is not looked at.
    """
    crowd = [item["box_xyxy"] for item in objects if item["is_crowd"]]
    instances = [item for item in objects if not item["is_crowd"]]
    keeps = [item["has_mask"] and rule(class_names[item["label"]], item["annotation_id"]) for item in instances]
    with_mask = [index for index, keep in enumerate(keeps) if keep]
    return Instances(
        boxes_xyxy=np.array([item["box_xyxy"] for item in instances], dtype=np.float64).reshape(-1, 4),
        labels=[item["label"] for item in instances],
        supervision=[int(Supervision.MASK if keep else Supervision.BOX) for keep in keeps],
        masks=[instances[index]["rle_counts"] or instances[index]["polygons"] for index in with_mask],
        mask_instance=with_mask,
        crowd_boxes_xyxy=np.array(crowd, dtype=np.float64).reshape(-1, 4),
    )


@dataclass(frozen=True)
class InstanceDataset(torch.utils.data.Dataset[Sample]):
    """Map-style data set: key (row index, sample seed) -> Sample.

    All chance in a sample comes from its seed, so it is the same on every worker, rank and resume.
    """

    table: Table
    _: KW_ONLY
    rule: MaskRule
    transform: Transform
    mask_stride: int | None  # of the mask grid, in input pixels; None = masks stay encoded, for grids of their own
    bottom_rows_without_affinity: int = 0  # rows of the *original* whose colours are not to be trusted (COCO: 10)

    def __len__(self) -> int:
        return len(self.table.rows)

    def has_masks(self) -> bool:
        """Whether the rule leaves any instance its mask; looks no further than the first."""
        names = self.table.class_names
        return any(withhold(row["objects"], class_names=names, rule=self.rule).masks for row in self.table.rows)

    def __getitem__(self, key: Key) -> Sample:
        """Raises `UserError` if the image is missing, damaged or not of the size that the annotations state."""
        sample, read = self.sample(key)
        return replace(sample, image=read())

    def sample(self, key: Key) -> tuple[Sample, Callable[..., Tensor]]:
        """The sample but for its image, which is blank, and what reads that, see `read_image`."""
        index, seed = key
        row = self.table.rows[index]
        instances = withhold(row["objects"], class_names=self.table.class_names, rule=self.rule)
        geometry = self.transform((row["height"], row["width"]), seed)
        bottom = self.bottom_rows_without_affinity * geometry.input_hw[0] // geometry.original_hw[0]
        sample = Sample(
            image=torch.zeros((), dtype=torch.uint8).expand(3, *geometry.input_hw),
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
        return sample, partial(self.read_image, row["file_name"], geometry)

    def read_image(self, file_name: str, geometry: Geometry, out: Tensor | None = None) -> Tensor:
        """The image as (3, H, W) uint8 after resize and flip, written to `out` where that is given."""
        image = read_image(self.table.images_folder / file_name, size_hw=geometry.original_hw)
        return geometry.image(image, out)


def _cells(masks: Sequence[Mask], geometry: Geometry, stride: int | None) -> Tensor:
    """(M, h, w) bool: each mask at the centres of its cells; a cell whose centre lies beyond the image is False.

    Outlines are rasterised at the input's resolution. An RLE is read at the original pixels that hold the centres.
    Without a stride there are no cells.
    """
    if stride is None:
        return torch.zeros(len(masks), 0, 0, dtype=torch.bool)
    rows, columns = (cell_centres(side, stride) for side in geometry.input_hw)
    cells = torch.zeros(len(masks), *grid_size(geometry.input_hw, stride), dtype=torch.bool)
    inside = cells.numpy()[:, : len(rows), : len(columns)]
    rles = _rles(masks, geometry)
    outlined = [index for index, mask in enumerate(masks) if not isinstance(mask, bytes)]
    inside[outlined] = read_cells([rles[index] for index in outlined], geometry.input_hw, rows=rows, columns=columns)
    encoded = [index for index, mask in enumerate(masks) if isinstance(mask, bytes)]
    rows, columns = geometry.source_rows(rows), geometry.source_columns(columns)
    inside[encoded] = read_cells([rles[index] for index in encoded], geometry.original_hw, rows=rows, columns=columns)
    return cells


def _rles(masks: Sequence[Mask], geometry: Geometry) -> list[bytes]:
    """The counts of each mask on its raster: outlines at the input's resolution, an RLE as it is, on the original's."""
    polygons = iter(geometry.polygons([polygon for mask in masks if not isinstance(mask, bytes) for polygon in mask]))
    return [
        mask if isinstance(mask, bytes) else outlines_to_rle([next(polygons) for _ in mask], geometry.input_hw)
        for mask in masks
    ]


def _encoded(masks: Sequence[Mask], geometry: Geometry) -> EncodedMasks:
    """The masks as they are, on the rasters of `_rles`."""
    outlined = torch.tensor([not isinstance(mask, bytes) for mask in masks], dtype=torch.bool)
    original, size = torch.tensor(geometry.original_hw), torch.tensor(geometry.input_hw)
    lengths, bounds = run_lengths(_rles(masks, geometry))
    changes = np.zeros_like(lengths)
    for index, (first, end) in enumerate(pairwise(bounds)):
        # The last run ends with the raster, where nothing is asked for.
        changes[first:end] = np.cumsum(lengths[first:end]) + (index << MASK_BITS)
    return EncodedMasks(
        changes=torch.from_numpy(changes),
        raster_hw=torch.where(outlined[:, None], size, original),
        input_hw=size.expand(len(masks), 2).clone(),
        flipped=~outlined & geometry.flipped,
    )
