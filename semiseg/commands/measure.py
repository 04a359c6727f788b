"""Measuring a data set's difficulty with the colour similarity of the losses themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from semiseg.evaluation.difficulty import Difficulty, measure_difficulty
from semiseg.losses.affinity import colour_affinity
from semiseg.structures.inputs import pad_images


def measure(
    annotations: Path,
    images: Path,
    *,
    stride: int,
    size: int,
    dilation: int,
    thresholds: Sequence[float],
    max_images: int | None,
    progress: bool,
) -> Difficulty:
    """`evaluation.difficulty.measure_difficulty` with `losses.affinity.colour_affinity`."""

    def affinity(image: np.ndarray) -> np.ndarray:
        pixels, sizes = pad_images([torch.from_numpy(np.array(image)).permute(2, 0, 1)], stride)
        bottom = torch.zeros(1, dtype=torch.int64)
        return colour_affinity(pixels, sizes, bottom, stride=stride, size=size, dilation=dilation)[0].numpy()

    return measure_difficulty(
        annotations,
        images,
        affinity=affinity,
        stride=stride,
        size=size,
        dilation=dilation,
        thresholds=thresholds,
        max_images=max_images,
        progress=progress,
    )
