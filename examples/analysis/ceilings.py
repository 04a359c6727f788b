"""What a mask head could reach: every object's own mask, said as the head says masks and drawn as predictions are.

    python -m examples.analysis.ceilings data/shapes/shapes-200x128px-seed2-*/annotations.json --csv ceilings.csv

For each way to say a mask: the mean IoU of what is drawn with the mask itself, and the ceiling, the mean over the IoU
thresholds .50, .55, ... .95 of the share of objects that reach them (the mask AP of a network that finds every object
and makes no other mistake comes near it).
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.analysis import read_truth, run_script
from semiseg.data.rays import marched_rays, mass_centre
from semiseg.files import write_text
from semiseg.models.masks.rays import draw_rays
from semiseg.models.paste import paste_masks
from semiseg.report.tables import markdown_table
from semiseg.structures.grids import Regions, WholeMap
from semiseg.structures.inputs import grid_size

SURE = 20.0  # logit of a cell that is inside, and the negative of one that is not
THRESHOLDS = np.arange(10) * 0.05 + 0.5


def filled_box(mask: np.ndarray, box: Tensor) -> Tensor:
    """The pixels whose centres lie in the box."""
    rows, columns = (torch.arange(side) + 0.5 for side in mask.shape)
    down, across = (rows >= box[1]) & (rows < box[3]), (columns >= box[0]) & (columns < box[2])
    return down[:, None] & across


def whole_map(mask: np.ndarray, box: Tensor, *, stride: int) -> Tensor:
    """Cells of this stride, as CondInst and YOLACT have them."""
    size = (mask.shape[0], mask.shape[1])
    grid = WholeMap(stride, grid_size(size, stride))
    padded = np.pad(mask, ((0, stride), (0, stride)))
    cells = torch.from_numpy(padded[stride // 2 :: stride, stride // 2 :: stride][: grid.size_hw[0], : grid.size_hw[1]])
    return paste_masks(torch.where(cells, SURE, -SURE)[None], grid, size, size)[0]


def region(mask: np.ndarray, box: Tensor, *, cells: int, margin: float) -> Tensor:
    """Cells of the enlarged box, as Mask R-CNN has them."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * margin / 2
    grid = Regions(torch.cat([centre - half, centre + half])[None], (cells, cells))
    rows, columns = (centres[0].floor().long() for centres in grid.centres())
    height, width = mask.shape
    exists = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    inside = torch.from_numpy(mask)[rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)] & exists
    return paste_masks(torch.where(inside, SURE, -SURE)[None], grid, (height, width), (height, width))[0]


def rays(mask: np.ndarray, box: Tensor, *, count: int, from_mass: bool) -> Tensor:
    """So many rays, as PolarMask has them, from the mask's centre of mass or the box's centre."""
    point = mass_centre(mask) if from_mass else ((box[:2] + box[2:]) / 2 - 0.5).double().numpy()
    distances = torch.from_numpy(marched_rays(mask, point[None], count))
    grid = WholeMap(1, (mask.shape[0], mask.shape[1]))
    return draw_rays(distances, torch.from_numpy(point[None]).float(), grid)[0] > 0


Way = Callable[[np.ndarray, Tensor], Tensor]
WAYS: Mapping[str, Way] = {
    "filled box": filled_box,
    "whole map, stride 2": lambda mask, box: whole_map(mask, box, stride=2),
    "whole map, stride 4": lambda mask, box: whole_map(mask, box, stride=4),
    "36 rays from the box's centre": lambda mask, box: rays(mask, box, count=36, from_mass=False),
    "36 rays from the mask's centre": lambda mask, box: rays(mask, box, count=36, from_mass=True),
    "28 x 28 cells of the box": lambda mask, box: region(mask, box, cells=28, margin=1.0),
    "28 x 28 cells of 1.25 times the box": lambda mask, box: region(mask, box, cells=28, margin=1.25),
}


def measure(annotations: Path) -> dict[str, tuple[float, float]]:
    """Mean IoU and ceiling in percent of each way, over all objects of a COCO json, crowd aside."""
    truth = read_truth(annotations)
    ious: dict[str, list[float]] = {name: [] for name in WAYS}
    for annotation in truth.dataset["annotations"]:
        mask = truth.annToMask(annotation).astype(bool)
        if annotation.get("iscrowd", 0) or not mask.any():
            continue
        x, y, width, height = annotation["bbox"]
        box = torch.tensor([x, y, x + width, y + height])
        for name, way in WAYS.items():
            drawn = way(mask, box).numpy()
            ious[name].append(float((drawn & mask).sum() / (drawn | mask).sum()))
    return {name: summary(np.array(values)) for name, values in ious.items()}


def summary(ious: np.ndarray) -> tuple[float, float]:
    """Mean and ceiling of IoUs (N,), in percent."""
    return 100 * float(ious.mean()), 100 * float((ious[:, None] >= THRESHOLDS - 1e-9).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measures what each way to say a mask could reach.")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--csv", type=Path, help="write the numbers there, too")
    given = parser.parse_args(arguments)
    found = measure(given.annotations)
    lines = [(name, f"{iou:.1f}", f"{ceiling:.1f}") for name, (iou, ceiling) in found.items()]
    print(markdown_table(("a mask said as", "mean IoU", "ceiling"), lines, texts=1))
    if given.csv is not None:
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([("way", "iou", "ceiling"), *lines])
        write_text(given.csv, written.getvalue())


if __name__ == "__main__":
    run_script(main)
