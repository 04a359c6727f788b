"""Where named files are found: class splits, studies, launch files, printed numbers and weights; and the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from semiseg.errors import UserError, near_hint

WEIGHTS_NAME = "model.safetensors"  # in a model folder
Kind = Literal["splits", "experiments", "bases", "launch", "published"]

# kind -> (folder below the working project or the packaged copy, suffix, the word for one of them)
_FOLDERS: dict[Kind, tuple[str, str, str]] = {
    "splits": ("splits", ".toml", "class split"),
    "experiments": ("experiments", ".toml", "study"),
    "bases": ("experiments/bases", ".toml", "base of settings"),
    "launch": ("experiments/launch", ".yaml", "launch file"),
    "published": ("reports/published", ".csv", "table of printed numbers"),
}


def cache_root(data: Path) -> Path:
    """Below which is kept what is made of the data in a folder: there, or in SEMISEG_CACHE, for data read only.

    What lies there has a digest in its name, so that several data sets may share it.
    """
    return Path(os.environ.get("SEMISEG_CACHE") or data)


def find(kind: Kind, name: str) -> Path:
    """The file that `name` means: a path, else a file of the working project, else of the packaged copy.

    The suffix may be left out. The working project is the current folder. If there is none: a UserError with the names.
    """
    folder, suffix, noun = _FOLDERS[kind]
    file_name = name if name.endswith(suffix) else name + suffix
    for candidate in (Path(file_name), Path(folder) / file_name, packaged_root() / folder / file_name):
        if candidate.is_file():
            return candidate
    known = available(kind)
    beside = [path.stem for path in sorted(Path(file_name).parent.glob(f"*{suffix}"))]
    hint = near_hint(Path(file_name).name.removesuffix(suffix), [*beside, *known], otherwise="")
    raise UserError(
        f"{name}: no such {noun}: neither the file {file_name} nor a name in {folder}/."
        f"{hint} Available: {', '.join(known) or 'none'}"
    )


def available(kind: Kind) -> list[str]:
    """The names that `find` knows beside paths, sorted, without suffix."""
    folder, suffix, _ = _FOLDERS[kind]
    roots = (Path(folder), packaged_root() / folder)
    return sorted({path.stem for root in roots for path in root.glob(f"*{suffix}") if path.is_file()})


def packaged_root() -> Path:
    """The folder of the shipped files: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def weights_file(source: Path) -> Path:
    """The file that `init_from` means: a checkpoint, or the weights of a model folder or of a run's folder."""
    if not source.is_dir():
        return source
    folders = [folder for folder in (source, source / "model") if (folder / WEIGHTS_NAME).exists()]
    return (folders[0] if folders else source) / WEIGHTS_NAME
