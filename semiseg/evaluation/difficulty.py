"""How hard box supervision is on a data set: what its boxes and the colours around them give away about the masks."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm

from semiseg.errors import UserError

Affinity = Callable[[NDArray[np.uint8]], NDArray[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ClassDifficulty:
    """One class, or all together. Shares are 0..1, NaN without instances; crowd regions count nowhere.

    Attributes:
        instances: their number.
        fill: mean share of the box that the mask covers.
        low_fill: share of the instances whose mask covers less than half of their box.
        foreign: mean share of the box that shows other annotated instances.
        visible: mean share of the object that is in sight, if the annotations say so (Shapes does), else NaN.
    """

    instances: int
    fill: float
    low_fill: float
    foreign: float
    visible: float


@dataclass(frozen=True)
class EdgeDifficulty:
    """The edges (centre cell in the box, neighbour in the image) whose colour similarity reaches one threshold.

    Attributes:
        share: their share of all edges.
        positive: share of them whose two cells have the same label in the instance's mask; NaN without edges.
    """

    share: float
    positive: float


@dataclass(frozen=True)
class Difficulty:
    """What `measure_difficulty` found.

    Attributes:
        images: number of images looked at.
        instances_per_image: mean, smallest and largest number.
        edges: by threshold.
        overall, classes: fill and occlusion, of all instances and by class name.
    """

    images: int
    instances_per_image: tuple[float, int, int]
    edges: Mapping[float, EdgeDifficulty]
    overall: ClassDifficulty
    classes: Mapping[str, ClassDifficulty]

    def render(self) -> str:
        """A text table."""
        mean, least, most = self.instances_per_image
        lines = [f"{self.images} images, {mean:.1f} instances per image ({least} to {most})", ""]
        lines.append(f"{'edges with similarity':<24}{'of all edges':>16}{'truly positive':>16}")
        for threshold, edge in sorted(self.edges.items()):
            lines.append(f"  >= {threshold:<19g}{_percent(edge.share):>16}{_percent(edge.positive):>16}")
        heads = ("fill", "fill < half", "others in box", "visible")
        lines += ["", f"{'class':<24}{'instances':>10}" + "".join(f"{head:>16}" for head in heads)]
        for name, row in [*self.classes.items(), ("all", self.overall)]:
            shares = (row.fill, row.low_fill, row.foreign, row.visible)
            lines.append(f"{name:<24}{row.instances:>10}" + "".join(f"{_percent(share):>16}" for share in shares))
        return "\n".join(lines)


def measure_difficulty(
    annotations_file: Path,
    images_folder: Path,
    *,
    affinity: Affinity,
    stride: int,
    size: int,
    dilation: int,
    thresholds: Sequence[float],
    max_images: int | None = None,
    progress: bool = False,
) -> Difficulty:
    """Measures an annotated data set at the resolution of its files.

    Args:
        affinity: (H, W, 3) uint8 RGB -> (K, h, w) colour similarity 0..1 of each cell to its K = size² - 1
            neighbours, row-major without the centre, (h, w) = ceil((H, W) / stride). Values of neighbours outside
            the image are not used.
        stride, size, dilation: of the mask grid and the neighbourhood.
        thresholds: similarities from which an edge counts.
        max_images: only so many, by ascending id; None = all.

    Raises:
        UserError: nothing to measure, or an image that is missing or of another size than annotated.
    """
    coco = _read_annotations(annotations_file)
    image_ids = sorted(coco.getImgIds())[:max_images]
    edges = _EdgeCounts(thresholds)
    rows: dict[int, list[_Row]] = {category_id: [] for category_id in sorted(coco.getCatIds())}
    numbers = []
    for image_id in tqdm(image_ids, desc="measuring difficulty", unit="img", disable=None if progress else True):
        anns = [a for a in coco.imgToAnns[image_id] if a.get("segmentation") and not a.get("iscrowd", 0)]
        numbers.append(len(anns))
        if not anns:
            continue
        masks = [coco.annToMask(ann).astype(bool) for ann in anns]
        similarity = affinity(_read_image(images_folder, coco.imgs[image_id]))
        _, inside = same_label(masks[0], stride=stride, size=size, dilation=dilation)
        occupied = np.stack(masks).sum(axis=0)
        for ann, mask in zip(anns, masks, strict=True):
            same, _ = same_label(mask, stride=stride, size=size, dilation=dilation)
            edges.add(similarity, used=inside & _box_cells(ann["bbox"], inside.shape[1:], stride), same=same)
            rows[ann["category_id"]].append(_measure_instance(ann, mask, occupied))
    if not any(numbers):
        raise UserError(f"{annotations_file}: no instance with a mask in the {len(image_ids)} images looked at")
    return Difficulty(
        images=len(image_ids),
        instances_per_image=(statistics.fmean(numbers), min(numbers), max(numbers)),
        edges=edges.shares(),
        overall=_summary([row for items in rows.values() for row in items]),
        classes={coco.cats[category_id]["name"]: _summary(items) for category_id, items in rows.items()},
    )


def same_label(mask: Bools, *, stride: int, size: int, dilation: int) -> tuple[Bools, Bools]:
    """Edges of the mask grid: whether both cells have the same label, and whether the neighbour is in the image.

    Args:
        mask: (H, W) bool.

    Returns:
        Two (size² - 1, h, w) bool, neighbours row-major over (dy, dx) without the centre. Cell (i, j) stands for
        pixel (stride·i + stride//2, ...); a cell whose pixel lies beyond the last row or column is outside.
    """
    height, width = mask.shape
    rows, columns = -(-height // stride), -(-width // stride)
    reach = (size // 2) * dilation
    labels = np.zeros((rows + 2 * reach, columns + 2 * reach), dtype=np.int8)  # 0 outside, 1 background, 2 object
    cells = mask[stride // 2 :: stride, stride // 2 :: stride]
    labels[reach : reach + cells.shape[0], reach : reach + cells.shape[1]] = 1 + cells.astype(np.int8)
    centre = labels[reach : reach + rows, reach : reach + columns]
    steps = [dilation * k for k in range(-(size // 2), size // 2 + 1)]
    shifts = [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]
    neighbours = np.stack(
        [labels[reach + dy : reach + dy + rows, reach + dx : reach + dx + columns] for dy, dx in shifts]
    )
    return neighbours == centre, (neighbours > 0) & (centre > 0)


class _EdgeCounts:
    def __init__(self, thresholds: Sequence[float]) -> None:
        self._all = 0
        self._counts = dict.fromkeys(thresholds, (0, 0))  # edges that count, truly positive ones

    def add(self, similarity: NDArray[Any], *, used: Bools, same: Bools) -> None:
        self._all += int(used.sum())
        for threshold, (edges, positive) in self._counts.items():
            counting = used & (similarity >= threshold)
            self._counts[threshold] = (edges + int(counting.sum()), positive + int((counting & same).sum()))

    def shares(self) -> dict[float, EdgeDifficulty]:
        return {
            threshold: EdgeDifficulty(_ratio(edges, self._all), _ratio(positive, edges))
            for threshold, (edges, positive) in self._counts.items()
        }


@dataclass(frozen=True)
class _Row:
    fill: float
    foreign: float
    visible: float


def _measure_instance(ann: Mapping[str, Any], mask: Bools, occupied: NDArray[np.int64]) -> _Row:
    x, y, width, height = ann["bbox"]
    window = slice(math.floor(y), math.ceil(y + height)), slice(math.floor(x), math.ceil(x + width))
    pixels = mask[window].size
    others = int(np.count_nonzero(occupied[window] > mask[window]))
    fill = int(np.count_nonzero(mask)) / max(width * height, 1e-9)
    return _Row(fill, _ratio(others, pixels), float(ann.get("visible", float("nan"))))


def _box_cells(box_xywh: Sequence[float], grid_hw: Sequence[int], stride: int) -> Bools:
    """(h, w) cells in the box: floor(low) <= stride·i + stride//2 < floor(high + 1), as in the losses."""
    x, y, width, height = box_xywh
    rows, columns = (stride * np.arange(n) + stride // 2 for n in grid_hw)
    in_rows = (rows >= math.floor(y)) & (rows < math.floor(y + height + 1))
    in_columns = (columns >= math.floor(x)) & (columns < math.floor(x + width + 1))
    return in_rows[:, None] & in_columns[None, :]


def _summary(rows: Sequence[_Row]) -> ClassDifficulty:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else float("nan")

    return ClassDifficulty(
        instances=len(rows),
        fill=mean([row.fill for row in rows]),
        low_fill=mean([float(row.fill < 0.5) for row in rows]),
        foreign=mean([row.foreign for row in rows]),
        visible=mean([row.visible for row in rows if not math.isnan(row.visible)]),
    )


def _read_annotations(path: Path) -> COCO:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            return COCO(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable COCO annotation file: {error}") from None


def _read_image(folder: Path, info: Mapping[str, Any]) -> NDArray[np.uint8]:
    path = folder / info["file_name"]
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: not a readable image: {error}") from None
    if pixels.shape[:2] != (info["height"], info["width"]):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError(f"{path}: is {found} pixels, but annotated as {info['width']} x {info['height']}")
    return pixels


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
