"""Where a run's data comes from: every source ends as a COCO json and a folder of images, made on first use.

The only place that looks at `data.format` and `data.root`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from semiseg.config import DataConfig
from semiseg.data.shapes import ensure_shapes, shapes_folder

HUB_PREFIX = "hf:"


class AnnotatedImages(NamedTuple):
    """One set of images with its annotations.

    Attributes:
        annotations: COCO instances json.
        images: folder to which its file names are relative.
    """

    annotations: Path
    images: Path


def ensure_files(config: DataConfig) -> dict[str, AnnotatedImages]:
    """The sets "train" and "val" of a data configuration, drawn or converted on first use.

    Raises:
        UserError: something is not there; the message says what to download and where to put it.
    """
    if config.format == "shapes":
        root, shapes = Path(config.root), config.shapes
        ensure_shapes(root, images=shapes.train_images, image_size=shapes.image_size, seed=shapes.train_seed)
        ensure_shapes(root, images=shapes.val_images, image_size=shapes.image_size, seed=shapes.val_seed)
    return expected_files(config)


def expected_files(config: DataConfig) -> dict[str, AnnotatedImages]:
    """Where `ensure_files` has or would have the two sets; nothing is looked at or made."""
    root = Path(config.root)
    if config.format == "shapes":
        shapes = config.shapes
        folders = {
            "train": shapes_folder(
                root, images=shapes.train_images, image_size=shapes.image_size, seed=shapes.train_seed
            ),
            "val": shapes_folder(root, images=shapes.val_images, image_size=shapes.image_size, seed=shapes.val_seed),
        }
        return {name: AnnotatedImages(path / "annotations.json", path / "images") for name, path in folders.items()}
    return {
        "train": AnnotatedImages(root / config.train_annotations, root / config.train_images),
        "val": AnnotatedImages(root / config.val_annotations, root / config.val_images),
    }


def cache_folder(config: DataConfig) -> Path:
    """Where the Arrow tables of the data lie."""
    return Path(config.root) / "arrow"
