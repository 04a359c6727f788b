"""How many edges of the pairwise loss are truly positive, measured from ground-truth masks as training sees them.

    python -m examples.analysis.edges val.json images --stride 4 --short-side 800 --bottom-rows 10 --max-images 500

An edge is a cell of the mask grid inside an instance's box and one of its neighbours that is no padding; it counts if
the colour similarity of the two reaches the threshold, and it is truly positive if both have the same label in the
instance's mask. The paper's slides print the proportion of the second among the first (94.1 %, 98.3 % and 98.4 % at the
thresholds 0, 0.1 and 0.2 on COCO).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

from examples.analysis import run_script
from semiseg.data.coco import CocoFile, image_records, read_coco
from semiseg.data.dataset import InstanceDataset, build_rule
from semiseg.data.table import FEATURES, Table
from semiseg.data.transforms import Geometry, Resize, Transform
from semiseg.errors import UserError
from semiseg.files import require_folder, write_text
from semiseg.losses.affinity import colour_affinity, neighbour_inside, neighbour_offsets
from semiseg.losses.boxinst import box_cells
from semiseg.structures.inputs import Batch

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
    transform: Transform = Resize([short_side], long_side) if short_side else _Stored()
    coco = read_coco(annotations)
    chosen = sorted(coco.images, key=lambda image: image["id"])[:max_images]
    samples = _samples(replace(coco, images=chosen), images, transform, stride=stride, bottom_rows=bottom_rows)
    at_least, instances = torch.tensor(thresholds, dtype=torch.float32), 0
    counts = torch.zeros(len(neighbourhoods), 3, len(thresholds), dtype=torch.int64)
    for sample in tqdm(
        samples, total=len(chosen), desc="measuring edges", unit="img", disable=None if progress else True
    ):
        masks = 0 if sample.targets is None else len(sample.targets.masks)
        instances += masks
        if masks:
            counts += torch.stack([_counted(sample, item, at_least, stride=stride) for item in neighbourhoods])
    if not instances:
        raise UserError(f"{annotations}: no instance with a mask in the {len(chosen)} images looked at")
    shares = [
        EdgeShare(item.size, item.dilation, threshold, edges, _ratio(reached, edges), _ratio(positive, reached))
        for item, numbers in zip(neighbourhoods, counts.transpose(1, 2).tolist(), strict=True)
        for threshold, (edges, reached, positive) in zip(thresholds, numbers, strict=True)
    ]
    return EdgeMeasurement(len(chosen), instances, tuple(shares))


@dataclass(frozen=True)
class _Stored:
    """No resize, no flip."""

    def __call__(self, size_hw: tuple[int, int], seed: int) -> Geometry:
        return Geometry(size_hw, size_hw, flipped=False)


def _samples(coco: CocoFile, images: Path, transform: Transform, *, stride: int, bottom_rows: int) -> Iterator[Batch]:
    """Every image with all its masks, by the data set that trains; without a table on disk."""
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
            yield dataset.batch([(index, 0)], size_divisor=1)


def _counted(image: Batch, neighbourhood: Neighbourhood, thresholds: Tensor, *, stride: int) -> Tensor:
    """(3, T) int64 of one image with masks: edges, those that reach each threshold, those of them truly positive."""
    size, dilation = neighbourhood.size, neighbourhood.dilation
    sizes_hw, bottom, targets = image.image_sizes_hw, image.bottom_rows_without_affinity, image.targets
    assert targets is not None
    grid_hw = (targets.masks.shape[1], targets.masks.shape[2])
    given = {"stride": stride, "size": size, "dilation": dilation}
    (similar,) = colour_affinity(image.images, sizes_hw, bottom, **given)
    (inside,) = neighbour_inside(sizes_hw, bottom, grid_hw=grid_hw, **given)
    reach = size // 2 * dilation
    shifts = [(reach + dy, reach + dx) for dy, dx in neighbour_offsets(size, dilation)]
    boxes = box_cells(targets.boxes_xyxy[targets.mask_instance], stride=stride, grid_hw=grid_hw)
    counts = torch.zeros(3, len(thresholds), dtype=torch.int64)
    for (row0, row1, column0, column1), mask in zip(boxes.tolist(), targets.masks, strict=True):
        window = (slice(None), slice(row0, row1), slice(column0, column1))
        padded = torch.nn.functional.pad(mask, (reach, reach, reach, reach))
        neighbours = torch.stack([padded[y + row0 : y + row1, x + column0 : x + column1] for y, x in shifts])
        same = (neighbours == mask[window[1:]])[inside[window]]
        reached = similar[window][inside[window]][:, None] >= thresholds  # (edges, T)
        counts += torch.stack([torch.full_like(counts[0], len(reached)), reached.sum(0), reached[same].sum(0)])
    return counts


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, for every neighbourhood and threshold, which share of the edges counts, and which of these is positive.

    Raises:
        UserError: as `measure_edges`, or an option that says nothing.
    """
    parser = argparse.ArgumentParser(description="Measures how many edges of the pairwise loss are truly positive.")
    parser.add_argument("annotations", type=Path, help="COCO instances json with masks")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("--stride", type=int, default=4, help="of the mask grid, in pixels")
    parser.add_argument("--size", type=int, nargs="+", default=[3, 5], help="sides of the neighbourhoods, in cells")
    parser.add_argument("--dilation", type=int, nargs="+", default=[1, 2], help="distances of neighbours, in cells")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3], help="similarities")
    parser.add_argument("--short-side", type=int, default=0, help="as for the network (800 for COCO); 0 = stored size")
    parser.add_argument("--long-side", type=int, default=1333, help="upper limit of the longer side")
    parser.add_argument("--bottom-rows", type=int, default=0, help="rows without affinity (10 for COCO)")
    parser.add_argument("--max-images", type=int, help="look at the first so many only")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    given = parser.parse_args(arguments)
    wrong = [f"--size {side}: expected an odd number, such as 3" for side in given.size if side < 3 or side % 2 == 0]
    wrong += [f"--dilation {cells}: expected a positive number of cells" for cells in given.dilation if cells < 1]
    wrong += [
        f"--threshold {value:g}: expected a number from 0 to 1" for value in given.threshold if not 0 <= value <= 1
    ]
    if wrong:
        raise UserError(wrong[0])
    if given.json is not None:
        require_folder(given.json.parent)
    measured = measure_edges(
        given.annotations,
        given.images,
        neighbourhoods=[Neighbourhood(*pair) for pair in product(sorted(set(given.size)), sorted(set(given.dilation)))],
        thresholds=sorted(set(given.threshold)),
        stride=given.stride,
        short_side=given.short_side,
        long_side=given.long_side,
        bottom_rows=given.bottom_rows,
        max_images=given.max_images,
        progress=True,
    )
    print(measured.render())
    if given.json is not None:
        write_text(given.json, json.dumps(measured.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
