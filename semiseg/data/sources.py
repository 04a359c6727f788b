"""Where a run's data comes from: every source ends as a COCO json and a folder of images, made on first use.

The only place that looks at `data.format` and `data.root`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from semiseg.config import DataConfig
from semiseg.data.reading import Reading
from semiseg.data.shapes import ensure_shapes, shapes_folder
from semiseg.data.voc import ensure_voc, voc_files
from semiseg.errors import UserError
from semiseg.project import cache_root

HUB_PREFIX = "hf:"
COCO_SITE = "http://images.cocodataset.org"
# The archive of COCO's site that holds what a key of the configuration names, at the key's default.
OFFICIAL_ARCHIVES = {
    "train_images": f"{COCO_SITE}/zips/train2017.zip",
    "val_images": f"{COCO_SITE}/zips/val2017.zip",
    "train_annotations": f"{COCO_SITE}/annotations/annotations_trainval2017.zip",
    "val_annotations": f"{COCO_SITE}/annotations/annotations_trainval2017.zip",
}

SetName = Literal["train", "val"]
BOTH: tuple[SetName, ...] = ("train", "val")


class AnnotatedImages(NamedTuple):
    """A COCO instances json, and the folder to which its file names are relative."""

    annotations: Path
    images: Path


def ensure_files(config: DataConfig, sets: Sequence[SetName] = BOTH) -> dict[str, AnnotatedImages]:
    """Those `sets` of a data configuration, drawn or converted on first use, or a `UserError`: what to download."""
    if (hub_name := _hub_name(config)) is not None:
        folder = _ensure_hub(hub_name, config.hub.train_split, config.hub.val_split)
        return {name: AnnotatedImages(folder / f"{name}.json", folder / name) for name in sets}
    if config.format == "shapes":
        for name in sets:
            ensure_shapes(Path(config.root), **_shapes_parameters(config, name))
    elif config.format == "voc":
        for name in sets:
            ensure_voc(Path(config.root), getattr(config.voc, f"{name}_set"))
    else:
        _require_coco(config, sets)
    files = expected_files(config)
    return {name: files[name] for name in sets}


def expected_files(config: DataConfig) -> dict[str, AnnotatedImages]:
    """Where `ensure_files` has or would have the two sets; nothing is made.

    Of a data set of the Hub these are the files of its newest conversion.
    """
    root = Path(config.root)
    files: dict[str, AnnotatedImages] = {}
    for name in BOTH:
        if (hub_name := _hub_name(config)) is not None:
            from semiseg.data.hub import converted_folder

            folder = converted_folder(hub_name, train_split=config.hub.train_split, val_split=config.hub.val_split)
            paths = folder / f"{name}.json", folder / name
        elif config.format == "shapes":
            folder = shapes_folder(root, **_shapes_parameters(config, name))
            paths = folder / "annotations.json", folder / "images"
        elif config.format == "voc":
            paths = voc_files(root, getattr(config.voc, f"{name}_set"))
        else:
            paths = root / getattr(config, f"{name}_annotations"), root / getattr(config, f"{name}_images")
        files[name] = AnnotatedImages(*paths)
    return files


def cache_folder(config: DataConfig) -> Path:
    """Where the Arrow tables of the data lie."""
    if (hub_name := _hub_name(config)) is not None:
        from semiseg.data.hub import hub_folder

        return hub_folder(hub_name) / "arrow"
    return tables_folder(Path(config.root))


def tables_folder(data: Path) -> Path:
    """Where the Arrow tables of the annotations in a folder lie."""
    return cache_root(data) / "arrow"


def reading_of(config: DataConfig) -> Reading:
    """How the pixels of the images are meant."""
    low_high = config.value_range
    return Reading(None if low_high is None else (low_high[0], low_high[1]), config.upright)


def _hub_name(config: DataConfig) -> str | None:
    """The data set of the Hub that `data.root` names, if it does."""
    if not config.root.startswith(HUB_PREFIX):
        return None
    if config.format != "coco":
        raise UserError(f"data.root = {config.root!r} needs data.format = 'coco', not {config.format!r}")
    return config.root.removeprefix(HUB_PREFIX)


@lru_cache(maxsize=4)  # a study asks for every one of its runs; a process looks at a data set once
def _ensure_hub(name: str, train_split: str, val_split: str) -> Path:
    from semiseg.data.hub import ensure_hub  # not above: few need its libraries

    return ensure_hub(name, train_split=train_split, val_split=val_split)


def _shapes_parameters(config: DataConfig, name: SetName) -> dict[str, int]:
    images, seed = (getattr(config.shapes, f"{name}_{key}") for key in ("images", "seed"))
    return {"images": images, "image_size": config.shapes.image_size, "seed": seed}


def _require_coco(config: DataConfig, sets: Sequence[SetName]) -> None:
    """Looks for files and folders of a COCO layout; whether every image is there is seen with the table.

    One sentence says all that is missing: the archives of COCO's site where the names are theirs, else the keys.
    """
    keys = [f"{name}_{kind}" for name in sets for kind in ("images", "annotations")]
    missing = {key: path for key in keys if not _is_there(Path(config.root) / (path := getattr(config, key)), key)}
    if not missing:
        return
    here, names = Path(config.root).is_dir(), ", ".join(missing.values())
    text = f"{config.root}: not there: {names}; " if here else f"{config.root}: no such folder; "
    if all(path == DataConfig.model_fields[key].default for key, path in missing.items()):
        archives = ", ".join(dict.fromkeys(OFFICIAL_ARCHIVES[key] for key in missing))
        text += f"download {archives} and unpack there, or name another folder with '--set data.root=DIR'"
    elif not here:
        text += f"data.root is to name the one that holds {names}"
    else:
        text += f"put that there, or change data.root or {', '.join(f'data.{key}' for key in missing)}"
    raise UserError(text)


def _is_there(path: Path, key: str) -> bool:
    """A file of annotations, or a folder that is not empty."""
    if key.endswith("annotations"):
        return path.is_file()
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:  # a listing of all images would take seconds
        return next(entries, None) is not None
