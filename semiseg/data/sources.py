"""Where a run's data comes from: every source ends as a COCO json and a folder of images, made on first use.

The only place that looks at `data.format` and `data.root`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from semiseg.config import DataConfig
from semiseg.data.shapes import ensure_shapes, shapes_folder
from semiseg.data.voc import ensure_voc, voc_files
from semiseg.errors import UserError

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
    """One set of images with its annotations.

    Attributes:
        annotations: COCO instances json.
        images: folder to which its file names are relative.
    """

    annotations: Path
    images: Path


def ensure_files(config: DataConfig, sets: Sequence[SetName] = BOTH) -> dict[str, AnnotatedImages]:
    """The sets "train" and "val" of a data configuration, drawn or converted on first use.

    Args:
        sets: those that must be there; the answer has them alone.

    Raises:
        UserError: something is not there; the message says what to download and where to put it.
    """
    root = Path(config.root)
    if _is_on_hub(config):
        files = _hub_files(_ensure_hub(config.root, config.hub.train_split, config.hub.val_split))
    elif config.format == "shapes":
        for name in sets:
            ensure_shapes(root, **_shapes_parameters(config, name))
        files = expected_files(config)
    elif config.format == "voc":
        files = {name: AnnotatedImages(*ensure_voc(root, getattr(config.voc, f"{name}_set"))) for name in sets}
    else:
        _require_coco(config, sets)
        files = expected_files(config)
    return {name: files[name] for name in sets}


def expected_files(config: DataConfig) -> dict[str, AnnotatedImages]:
    """Where `ensure_files` has or would have the two sets; nothing is made.

    Of a data set of the Hub these are the files of its newest conversion.
    """
    root = Path(config.root)
    if _is_on_hub(config):
        from semiseg.data.hub import converted_folder

        name, splits = config.root.removeprefix(HUB_PREFIX), config.hub
        return _hub_files(converted_folder(name, train_split=splits.train_split, val_split=splits.val_split))
    if config.format == "shapes":
        folders = {name: shapes_folder(root, **_shapes_parameters(config, name)) for name in BOTH}
        return {name: AnnotatedImages(path / "annotations.json", path / "images") for name, path in folders.items()}
    if config.format == "voc":
        return {name: AnnotatedImages(*voc_files(root, getattr(config.voc, f"{name}_set"))) for name in BOTH}
    return {
        "train": AnnotatedImages(root / config.train_annotations, root / config.train_images),
        "val": AnnotatedImages(root / config.val_annotations, root / config.val_images),
    }


def cache_folder(config: DataConfig) -> Path:
    """Where the Arrow tables of the data lie."""
    if _is_on_hub(config):
        from semiseg.data.hub import hub_folder

        return hub_folder(config.root.removeprefix(HUB_PREFIX)) / "arrow"
    return Path(config.root) / "arrow"


def _is_on_hub(config: DataConfig) -> bool:
    if not config.root.startswith(HUB_PREFIX):
        return False
    if config.format != "coco":
        raise UserError(f"data.root = {config.root!r} needs data.format = 'coco', not {config.format!r}")
    return True


@lru_cache(maxsize=4)  # a study asks for every one of its runs; a process looks at a data set once
def _ensure_hub(root: str, train_split: str, val_split: str) -> Path:
    from semiseg.data.hub import ensure_hub

    return ensure_hub(root.removeprefix(HUB_PREFIX), train_split=train_split, val_split=val_split)


def _hub_files(folder: Path) -> dict[str, AnnotatedImages]:
    return {name: AnnotatedImages(folder / f"{name}.json", folder / name) for name in BOTH}


def _shapes_parameters(config: DataConfig, name: SetName) -> dict[str, int]:
    images, seed = (getattr(config.shapes, f"{name}_{key}") for key in ("images", "seed"))
    return {"images": images, "image_size": config.shapes.image_size, "seed": seed}


def _require_coco(config: DataConfig, sets: Sequence[SetName]) -> None:
    """Looks for files and folders of a COCO layout; whether every image is there is seen with the table.

    Raises:
        UserError: one sentence on all that is missing: the archives of COCO's site where the names are theirs, else
            the keys that name it.
    """
    root = Path(config.root)
    keys = [f"{name}_{kind}" for name in sets for kind in ("images", "annotations")]
    missing = {key: name for key in keys if not _is_there(root / (name := getattr(config, key)), key)}
    if not missing:
        return
    told = f"{config.root}: {_listed(missing.values())} {'is' if len(missing) == 1 else 'are'} missing: "
    if all(name == DataConfig.model_fields[key].default for key, name in missing.items()):
        archives = dict.fromkeys(OFFICIAL_ARCHIVES[key] for key in missing)
        them = "it" if len(archives) == 1 else "them"
        told += f"download {_listed(archives)} and unpack {them} into {config.root}, or name another folder"
        raise UserError(f"{told} with '--set data.root=DIR'")
    keys = [f"data.{key}" for key in missing]
    raise UserError(f"{told}put {'it' if len(keys) == 1 else 'them'} there, or change data.root or {_listed(keys)}")


def _is_there(path: Path, key: str) -> bool:
    """A file of annotations, or a folder that is not empty."""
    if key.endswith("annotations"):
        return path.is_file()
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return next(entries, None) is not None


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
