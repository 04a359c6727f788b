"""What the boxes of a data set give away about its masks: how much of a box its object fills, and what else is in it.

    python -m examples.analysis.box_fill data/coco/annotations/instances_val2017.json --max-images 500

What its colours give away is measured by `examples/analysis/edges.py`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.analysis import run_script
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import load_ground_truth
from semiseg.evaluation.precision import names_of_classes

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ClassFill:
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
class BoxFill:
    """What `measure_box_fill` found.

    Attributes:
        images: number of images looked at.
        instances_per_image: mean, smallest and largest number.
        overall, classes: fill and occlusion, of all instances and by class name.
    """

    images: int
    instances_per_image: tuple[float, int, int]
    overall: ClassFill
    classes: Mapping[str, ClassFill]

    def render(self) -> str:
        """A text table."""
        mean, least, most = self.instances_per_image
        lines = [f"{self.images} images, {mean:.1f} instances per image ({least} to {most})", ""]
        heads = ("fill", "fill < half", "others in box", "visible")
        lines.append(f"{'class':<24}{'instances':>10}" + "".join(f"{head:>16}" for head in heads))
        for name, row in [*self.classes.items(), ("all", self.overall)]:
            shares = (row.fill, row.low_fill, row.foreign, row.visible)
            lines.append(f"{name:<24}{row.instances:>10}" + "".join(f"{_percent(share):>16}" for share in shares))
        return "\n".join(lines)


def measure_box_fill(annotations_file: Path, *, max_images: int | None = None) -> BoxFill:
    """Measures an annotated data set in pixels of its stored images, which are not read.

    Args:
        max_images: only so many, by ascending id; None = all.

    Raises:
        UserError: nothing to measure.
    """
    coco = load_ground_truth(annotations_file)
    names = dict(zip(sorted(coco.cats), names_of_classes(coco), strict=True))
    image_ids = sorted(coco.getImgIds())[:max_images]
    rows: dict[int, list[_Row]] = {category_id: [] for category_id in sorted(coco.getCatIds())}
    numbers = []
    for image_id in image_ids:
        anns = [a for a in coco.imgToAnns[image_id] if a.get("segmentation") and not a.get("iscrowd", 0)]
        numbers.append(len(anns))
        if not anns:
            continue
        masks = [coco.annToMask(ann).astype(bool) for ann in anns]
        occupied = np.stack(masks).sum(axis=0)
        for ann, mask in zip(anns, masks, strict=True):
            rows[ann["category_id"]].append(_measure_instance(ann, mask, occupied))
    if not any(numbers):
        raise UserError(f"{annotations_file}: no instance with a mask in the {len(image_ids)} images looked at")
    return BoxFill(
        images=len(image_ids),
        instances_per_image=(statistics.fmean(numbers), min(numbers), max(numbers)),
        overall=_summary([row for items in rows.values() for row in items]),
        classes={names[category_id]: _summary(items) for category_id, items in rows.items()},
    )


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


def _summary(rows: Sequence[_Row]) -> ClassFill:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else float("nan")

    return ClassFill(
        instances=len(rows),
        fill=mean([row.fill for row in rows]),
        low_fill=mean([float(row.fill < 0.5) for row in rows]),
        foreign=mean([row.foreign for row in rows]),
        visible=mean([row.visible for row in rows if not math.isnan(row.visible)]),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measures how much of their boxes objects fill.")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--max-images", type=int, help="look at the first so many images only")
    given = parser.parse_args(arguments)
    print(measure_box_fill(given.annotations, max_images=given.max_images).render())


if __name__ == "__main__":
    run_script(main)
