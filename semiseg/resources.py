"""Where named files are found (splits, studies, printed numbers), and how files are written: whole or not at all."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from semiseg.errors import UserError

Kind = Literal["splits", "experiments", "published"]

# kind -> (folder below the working project or the packaged copy, suffix, the word for one of them)
_PLACES: dict[Kind, tuple[str, str, str]] = {
    "splits": ("splits", ".toml", "class split"),
    "experiments": ("experiments", ".toml", "study"),
    "published": ("reports/published", ".csv", "table of printed numbers"),
}


def find(kind: Kind, name: str) -> Path:
    """The file that `name` means: a path, else a file of the working project, else of the packaged copy.

    The suffix may be left out. The working project is the current folder with its `splits/`, `experiments/` and
    `reports/published/`.

    Raises:
        UserError: no such file; the message lists the available names.
    """
    folder, suffix, noun = _PLACES[kind]
    file_name = name if name.endswith(suffix) else name + suffix
    for candidate in (Path(file_name), Path(folder) / file_name, packaged_root() / folder / file_name):
        if candidate.is_file():
            return candidate
    known = available(kind)
    stem = Path(file_name).name.removesuffix(suffix)
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"{name}: no such {noun}: neither the file {file_name} nor a name in {folder}/."
        f"{hint} Available: {', '.join(known) or 'none'}"
    )


def available(kind: Kind) -> list[str]:
    """Names that `find` knows beside paths: of the working project and of the packaged copy, sorted, without suffix."""
    folder, suffix, _ = _PLACES[kind]
    roots = (Path(folder), packaged_root() / folder)
    return sorted({path.stem for root in roots for path in root.glob(f"*{suffix}")})


def packaged_root() -> Path:
    """The folder that holds the shipped `splits/`, `experiments/` and `reports/published/`.

    In a wheel they lie inside the package, in a source tree (editable installation) beside it.
    """
    package = Path(__file__).parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file under a temporary name and renames it, so that it is never half-written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name in the same folder and renames it; makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
