"""What the pictures of a table show: the runs of one seed and validation images by a printed rule."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO

from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.results import Result
from semiseg.splits import normalise

RANDOM, GAIN, LOSS = "random", "largest gain", "largest loss"
RANDOM_IMAGES, EXTREME_IMAGES = 4, 3


@dataclass(frozen=True)
class ChosenImage:
    """One validation image to show.

    Attributes:
        group: RANDOM, GAIN or LOSS.
        gain: mean mask IoU of the main row minus that of the other row on the image's instances; None without them.
    """

    image_id: Any
    group: str
    gain: float | None


def class_name(truth: COCO, category_id: Any) -> str:
    """The name of a category as splits write it."""
    return normalise(str(truth.cats[category_id]["name"]))


def runs_of_one_seed(report: ReportInput, table: ReportTable) -> tuple[int, dict[str, Result]]:
    """The seed with the most recorded rows, the first of equals, and the run of each of these rows.

    Raises:
        UserError: none of the table's runs is recorded.
    """
    recorded = {
        seed: {r.name: run for r in table.rows if (run := report.results.get((table.name, r.name, seed)))}
        for seed in report.seeds
    }
    seed = max(report.seeds, key=lambda seed: len(recorded[seed]), default=None)
    if seed is None or not recorded[seed]:
        raise UserError("none of its runs is recorded")
    return seed, recorded[seed]


def other_row(table: ReportTable, main: str, among: Collection[str]) -> str | None:
    """The row that the main one is compared with: the table's first other one; None if there is none."""
    return next((row.name for row in table.rows if row.name in among and row.name != main), None)


def judged(table: ReportTable, truth: COCO, matches: pd.DataFrame) -> pd.DataFrame:
    """The lines of `match_instances` that count: unseen classes, or all where a table has none."""
    if not table.unseen:
        return matches
    wanted = {category for category in truth.cats if class_name(truth, category) in table.unseen}
    return matches[matches["category"].isin(wanted)]


def image_gains(main: pd.DataFrame, other: pd.DataFrame) -> dict[Any, float]:
    """Image id -> how much higher the mean mask IoU of its instances is for `main`; not found counts as 0.

    Args:
        main, other: lines of `match_instances`, judged, of the same instances.
    """
    difference = main["mask_iou"].fillna(0.0) - other["mask_iou"].fillna(0.0)
    # Rounded, so that equal images are equal whatever the order of the additions.
    return {image: round(float(np.mean(values)), 9) for image, values in difference.groupby(main["image"])}


def choose_images(truth: COCO, gains: Mapping[Any, float], *, seed: int) -> list[ChosenImage]:
    """Images with objects drawn at random, then those with the largest gain and with the largest loss.

    No image is chosen twice: the groups are filled in this order. Ties go to the smaller id. Only a positive gain is
    a gain, only a negative one a loss.
    """
    drawn = pick_images(truth, seed=seed)
    chosen = [ChosenImage(image_id, RANDOM, gains.get(image_id)) for image_id in drawn]
    for group, sign in ((GAIN, 1), (LOSS, -1)):
        taken = {image.image_id for image in chosen}
        left = [image_id for image_id in sorted(gains) if image_id not in taken and sign * gains[image_id] > 0]
        largest = sorted(left, key=lambda image_id: -sign * gains[image_id])[:EXTREME_IMAGES]
        chosen += [ChosenImage(image_id, group, gains[image_id]) for image_id in largest]
    return chosen


def pick_images(truth: COCO, *, seed: int, count: int = RANDOM_IMAGES) -> list[Any]:
    """Ids of images with at least one object, drawn without replacement; the same for the same file and seed."""
    candidates = sorted({a["image_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]} & set(truth.imgs))
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def read_image(folder: Path | None, truth: COCO, image_id: Any) -> np.ndarray:
    """The pixels of a validation image (H, W, 3) uint8, RGB.

    Raises:
        UserError: the file is gone or no image; without its path, since the sentence stands on the page.
    """
    try:
        Image.init()
        path = (folder or Path()) / truth.imgs[image_id]["file_name"]
        # PostScript would be handed to another program; no data set of a run holds it (data/images.py).
        with Image.open(path, formats=[name for name in Image.OPEN if name != "EPS"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        raise UserError(f"the file of validation image {image_id} is not on this machine or cannot be read") from None
