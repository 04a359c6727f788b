"""How many edges of the pairwise loss are truly positive, measured from ground-truth masks as training sees them.

An edge is a cell of the mask grid inside an instance's box and one of its neighbours that is no padding; it counts if
the colour similarity of the two reaches the threshold, and it is truly positive if both have the same label in the
instance's mask. The paper's slides print the proportion of the second among the first (94.1 %, 98.3 % and 98.4 % at the
thresholds 0, 0.1 and 0.2 on COCO).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

from semiseg.data.coco import CocoFile, image_records, read_coco
from semiseg.data.dataset import InstanceDataset, build_rule
from semiseg.data.table import FEATURES, Table
from semiseg.data.transforms import EvalTransform, Geometry, Transform
from semiseg.errors import UserError
from semiseg.losses.affinity import colour_affinity, neighbour_inside, neighbour_offsets
from semiseg.losses.boxinst import box_cells
from semiseg.structures.inputs import Sample

_CHUNK = 256  # images whose annotations are prepared together


@dataclass(frozen=True, order=True)
class Neighbourhood:
    """Which neighbours a cell has: size² - 1 of them, `dilation` cells apart."""

    size: int
    dilation: int


@dataclass(frozen=True)
class EdgeShare:
    """The edges of one neighbourhood whose similarity reaches one threshold.

    Attributes:
        size, dilation: of the neighbourhood.
        edges: all edges of the neighbourhood, whatever their similarity.
        share: the part of them that counts, 0..1; NaN without edges.
        positive: the part of the counting ones that is truly positive, 0..1; NaN without any.
    """

    size: int
    dilation: int
    threshold: float
    edges: int
    share: float
    positive: float


@dataclass(frozen=True)
class EdgeMeasurement:
    """What `measure_edges` found.

    Attributes:
        images, instances: how many images were looked at, and instances with a mask in them.
        shares: by neighbourhood, then by threshold, in the order asked for.
    """

    images: int
    instances: int
    shares: tuple[EdgeShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a share that is not measured is None."""
        values = asdict(self)
        for share in values["shares"]:
            share |= {name: None for name in ("share", "positive") if math.isnan(share[name])}
        return values

    def render(self) -> str:
        """A text table, one line per neighbourhood and threshold."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        lines = [f"{images}, {self.instances} instances with a mask", ""]
        lines.append(f"{'neighbourhood':<22}{'similarity':>12}{'of all edges':>16}{'truly positive':>16}")
        for share in self.shares:
            neighbourhood = f"{share.size} x {share.size}, dilation {share.dilation}"
            numbers = f"{_percent(share.share):>16}{_percent(share.positive):>16}"
            lines.append(f"{neighbourhood:<22}{f'>= {share.threshold:g}':>12}{numbers}")
        return "\n".join(lines)


def measure_edges(
    annotations: Path,
    images: Path,
    *,
    neighbourhoods: Sequence[Neighbourhood],
    thresholds: Sequence[float],
    stride: int,
    short_side: int,
    long_side: int,
    bottom_rows: int,
    max_images: int | None = None,
    progress: bool = False,
) -> EdgeMeasurement:
    """Measures the instances that have a mask; crowd regions count nowhere.

    Args:
        annotations: COCO instances json.
        images: folder of its images.
        neighbourhoods: of the pairwise loss.
        thresholds: similarities 0..1 from which an edge counts.
        stride: of the mask grid, in pixels of the resized image.
        short_side, long_side: images are resized as for the network; short_side 0 = stored resolution.
        bottom_rows: of the stored image, whose colours are not to be trusted (10 for COCO).
        max_images: only so many, by ascending id; None = all.

    Raises:
        UserError: bad annotations, an image that is missing or damaged, or no mask to measure with.
    """
    transform: Transform = EvalTransform(short_side=short_side, long_side=long_side) if short_side else _Stored()
    coco = read_coco(annotations)
    chosen = sorted(coco.images, key=lambda image: image["id"])[:max_images]
    samples = _samples(replace(coco, images=chosen), images, transform, stride=stride, bottom_rows=bottom_rows)
    counts = [_Counts(neighbourhood, thresholds, stride) for neighbourhood in neighbourhoods]
    instances = 0
    for sample in tqdm(
        samples, total=len(chosen), desc="measuring edges", unit="img", disable=None if progress else True
    ):
        instances += len(sample.masks)
        if len(sample.masks):
            for count in counts:
                count.add(sample)
    if not instances:
        raise UserError(f"{annotations}: no instance with a mask in the {len(chosen)} images looked at")
    return EdgeMeasurement(len(chosen), instances, tuple(share for count in counts for share in count.shares()))


@dataclass(frozen=True)
class _Stored:
    """No resize, no flip."""

    def __call__(self, size_hw: tuple[int, int], seed: int) -> Geometry:
        return Geometry(size_hw, size_hw, flipped=False)


def _samples(coco: CocoFile, images: Path, transform: Transform, *, stride: int, bottom_rows: int) -> Iterator[Sample]:
    """The images with every mask, by the data set that trains; without a table on disk."""
    records = image_records(coco)
    while chunk := list(islice(records, _CHUNK)):
        table = Table(
            rows=datasets.Dataset.from_list(chunk, features=FEATURES),
            class_names=coco.class_names,
            category_ids=coco.category_ids,
            images_folder=images,
            annotations_file=coco.path,
            fingerprint="",
        )
        dataset = InstanceDataset(
            table,
            rule=build_rule("masks", None),
            transform=transform,
            mask_stride=stride,
            bottom_rows_without_affinity=bottom_rows,
        )
        for index in range(len(dataset)):
            yield dataset[index, 0]


class _Counts:
    """Running counts of one neighbourhood by how many of the thresholds an edge reaches: (T + 1,) int64.

    `reaching` of all edges, `positive` of the truly positive ones.
    """

    def __init__(self, neighbourhood: Neighbourhood, thresholds: Sequence[float], stride: int) -> None:
        self.neighbourhood = neighbourhood
        self.thresholds = tuple(thresholds)
        self.stride = stride
        self.rising = torch.tensor(sorted(self.thresholds), dtype=torch.float32)
        self.reaching = torch.zeros(len(self.thresholds) + 1, dtype=torch.int64)
        self.positive = torch.zeros_like(self.reaching)

    def add(self, sample: Sample) -> None:
        """One image with at least one mask."""
        size, dilation = self.neighbourhood.size, self.neighbourhood.dilation
        sizes_hw = torch.tensor([sample.image.shape[-2:]])
        bottom = torch.tensor([sample.bottom_rows_without_affinity])
        grid_hw = (sample.masks.shape[1], sample.masks.shape[2])
        similar = colour_affinity(
            sample.image[None], sizes_hw, bottom, stride=self.stride, size=size, dilation=dilation
        )[0]
        inside = neighbour_inside(sizes_hw, bottom, stride=self.stride, grid_hw=grid_hw, size=size, dilation=dilation)[
            0
        ]
        all_cells = box_cells(sample.boxes_xyxy[sample.mask_instance], stride=self.stride, grid_hw=grid_hw)
        for cells, mask in zip(all_cells, sample.masks, strict=True):
            row0, row1, column0, column1 = cells.tolist()
            window = (slice(None), slice(row0, row1), slice(column0, column1))
            reached = torch.bucketize(similar[window][inside[window]], self.rising, right=True)
            same = self._same(mask, cells.tolist())[inside[window]]
            self.reaching += torch.bincount(reached, minlength=len(self.reaching))
            self.positive += torch.bincount(reached[same], minlength=len(self.reaching))

    def _same(self, mask: Tensor, cells: list[int]) -> Tensor:
        """(K, rows, columns) bool: whether each cell of the box has the label of its k-th neighbour."""
        row0, row1, column0, column1 = cells
        reach = self.neighbourhood.size // 2 * self.neighbourhood.dilation
        padded = torch.nn.functional.pad(mask, (reach, reach, reach, reach))
        centre = mask[row0:row1, column0:column1]
        return torch.stack(
            [
                padded[reach + dy + row0 : reach + dy + row1, reach + dx + column0 : reach + dx + column1] == centre
                for dy, dx in neighbour_offsets(self.neighbourhood.size, self.neighbourhood.dilation)
            ]
        )

    def shares(self) -> list[EdgeShare]:
        return [self._share(threshold) for threshold in self.thresholds]

    def _share(self, threshold: float) -> EdgeShare:
        first = sorted(self.thresholds).index(threshold) + 1  # an edge that reaches so many thresholds reaches this one
        edges, counting = int(self.reaching.sum()), int(self.reaching[first:].sum())
        positive = _ratio(int(self.positive[first:].sum()), counting)
        size, dilation = self.neighbourhood.size, self.neighbourhood.dilation
        return EdgeShare(size, dilation, threshold, edges, _ratio(counting, edges), positive)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
