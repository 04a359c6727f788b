"""Image files that annotations name and that are not there: which they are, and where they lie instead."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from semiseg.errors import UserError

MOST_FILES = 500_000  # that are listed in search of one
KEYS_OF_FOLDERS = "data.train_images or data.val_images, --images"


class _Found(NamedTuple):
    """A file that a name may mean."""

    name: str  # of the annotations
    path: PurePosixPath  # relative to the folder that was searched


def missing_images(folder: Path, file_names: Sequence[str]) -> list[str]:
    """Those of the names, relative to `folder`, that are not there; one listing per folder, not one look per file."""
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in file_names:
        by_folder[os.path.dirname(name)].append(name)
    missing: list[str] = []
    for part, names in by_folder.items():
        present: set[str] = set()
        with suppress(FileNotFoundError, NotADirectoryError):
            present.update(os.listdir(folder / part))
        missing.extend(name for name in names if os.path.basename(name) not in present)
    return missing


def require_images(folder: Path, file_names: Sequence[str], annotations: Path) -> None:
    """A UserError if images of the annotations are missing: how many, and what would find them."""
    missing = missing_images(folder, file_names)
    if missing:
        text = f"{folder}: {len(missing)} of the {len(file_names)} images that {annotations} names are missing"
        remedy = where_instead(folder, missing) or "put them there, or unpack their archive again, in full"
        raise UserError(f"{text}, such as {missing[0]}; {remedy}")


def where_instead(folder: Path, missing: Sequence[str]) -> str | None:
    """What makes the missing names right, in words: another folder of images, or another form of the names.

    Looked for are files of the same base name, below the folder, then beside it: with backslashes and web addresses
    read as paths, %20 and the like decoded, Unicode composed, in any case, at last with any ending. None without one.
    """
    for root in (folder, folder.parent):
        found = _search(root, missing)
        if found:
            return _in_words(folder, root, found, len(missing))
    return None


def _in_words(folder: Path, root: Path, found: Sequence[_Found], missing: int) -> str:
    count = "all" if len(found) == missing else f"{len(found)} of them"
    base = _common_base(folder, root, found)
    if base is not None:
        return f"{count} are there for {base} as the folder of images ({KEYS_OF_FOLDERS})"
    name, path = found[0]
    if root == folder:
        return f"{count} are there under another name: 'file_name' is to be {str(path)!r}, not {name!r}"
    parents = {each.path.parent for each in found}
    place = root / (parents.pop() if len(parents) == 1 else "")
    renamed = path.name if place != root else str(path)
    also = "" if renamed == name else f", and 'file_name' is to be {renamed!r}, not {name!r}"
    return f"{count} are in {place}: name that as the folder of images ({KEYS_OF_FOLDERS}){also}"


def _common_base(folder: Path, root: Path, found: Sequence[_Found]) -> Path | None:
    """The folder relative to which all names are right as they are, if there is one."""
    bases: set[Path] = set()
    for name, path in found:
        parts, own = (root.absolute() / path).parts, PurePosixPath(name).parts
        if ".." in own or own != parts[len(parts) - len(own) :]:
            return None
        bases.add(Path(*parts[: len(parts) - len(own)]))
    if len(bases) != 1:
        return None
    base = bases.pop()
    with suppress(ValueError):  # in the words of whoever named the folder, as far as it goes
        return root / base.relative_to(root.absolute())
    above = len(root.absolute().parts) - len(base.parts)
    return root.parents[above - 1] if above <= len(root.parents) else base


def _search(root: Path, names: Sequence[str]) -> list[_Found]:
    """The file of each name, of those that have one; by the strictest form of a base name that finds any."""
    files: list[PurePosixPath] = list(islice(_files(root), MOST_FILES))
    for level in range(3):
        by_key: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
        for path in files:
            by_key[_key(path.name, level)].append(path)
        found = []
        for name in names:
            for form in _forms(name):
                alike = by_key.get(_key(form.name, level))
                if form.name and alike:
                    found.append(_Found(name, max(alike, key=partial(_shared, form=form))))
                    break
        if found:
            return found
    return []


def _files(root: Path) -> Iterator[PurePosixPath]:
    for place, folders, names in os.walk(root):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        inside = PurePosixPath(Path(place).relative_to(root).as_posix())
        yield from (inside / name for name in names)


def _forms(name: str) -> Iterator[PurePosixPath]:
    """What a name may be as a path, the nearest first."""
    yield PurePosixPath(name)
    path = (urlsplit(name).path if "://" in name else name).replace("\\", "/")
    yield PurePosixPath(path)
    if re.search("%[0-9A-Fa-f]{2}", path):
        yield PurePosixPath(unquote(path).replace("\\", "/"))


def _key(name: str, level: int) -> str:
    """The base name as it is; composed and in small letters; that without its ending."""
    if level == 0:
        return name
    plain = unicodedata.normalize("NFC", name).casefold()
    return plain if level == 1 else PurePosixPath(plain).stem


def _shared(path: PurePosixPath, form: PurePosixPath) -> int:
    """How many parts both have in common from the end."""
    pairs = zip(reversed(path.parts), reversed(form.parts), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), len(form.parts))
