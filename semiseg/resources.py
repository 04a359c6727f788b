"""Where named files are found (splits, studies, printed numbers), and how files are written: whole or not at all.

The rules of writing, for files and folders alike:

* What is written lies in a hidden folder `.semiseg-` and 32 digits beside its place until it is whole and on the disk;
  then it is renamed. A kill, a full disk or a power cut leaves what was there before, or all of the new.
* A hidden folder belongs to the process that holds the lock on its file `lock`. One whose lock is free is what a killed
  process left; the next that writes there removes it. Nothing else is ever removed, whatever it is called.
* A folder that takes the place of another needs two renames. Between them the old one lies in the hidden folder, and
  whoever removes that puts it back first.
* What stands in the way (no space, a limit, no permission) is one sentence that names the file or folder.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from semiseg.errors import UserError, UserNotice

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"  # in a model folder
LOCK_NAME = ".train.lock"  # in a run's folder, held by the process that trains it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a limit on the size of files
_HIDDEN, _LOCK, _ASIDE = ".semiseg-", "lock", "aside"
_HIDDEN_NAME = re.compile(re.escape(_HIDDEN) + "[0-9a-f]{32}")
_SETTLED: set[Path] = set()  # folders whose leftovers this process has removed: a listing per file would be quadratic
Kind = Literal["splits", "experiments", "bases", "launch", "published"]

# kind -> (folder below the working project or the packaged copy, suffix, the word for one of them)
_PLACES: dict[Kind, tuple[str, str, str]] = {
    "splits": ("splits", ".toml", "class split"),
    "experiments": ("experiments", ".toml", "study"),
    "bases": ("experiments/bases", ".toml", "base of settings"),
    "launch": ("experiments/launch", ".yaml", "launch file"),
    "published": ("reports/published", ".csv", "table of printed numbers"),
}


def available_cores() -> int:
    """Processor cores that this process may use: of its affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    return sorted({path.stem for root in roots for path in root.glob(f"*{suffix}") if path.is_file()})


def packaged_root() -> Path:
    """The folder that holds the shipped `splits/`, `experiments/` and `reports/published/`.

    In a wheel they lie inside the package, in a source tree (editable installation) beside it.
    """
    package = Path(__file__).parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def require_folder(path: Path) -> None:
    """Looks, before any work, whether files can be written into a folder that may not exist yet.

    Raises:
        UserError: it or a folder above it is a file, or writing is not permitted.
    """
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise UserError(
            f"{path}: no folder can be made: {there} is a file" if there != path else f"{path}: is no folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: no permission to write there")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder, until the end of the block or of this process.

    Raises:
        UserError: another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / LOCK_NAME))
        except TimeoutError:
            raise UserError(f"{folder}: another process is training this run; wait for it or end it first") from None
        yield


@contextmanager
def lock(path: Path, *, waiting: str | None = None) -> Iterator[None]:
    """Locks a file, which is there only so long, until the end of the block or of this process, however it ends.

    On a file system without locks it goes on without one, with a warning.

    Args:
        waiting: said while another process holds it; None = do not wait.

    Raises:
        TimeoutError: another process holds it and `waiting` is None.
    """
    try:
        locked = _lock_file(path, warn=True)
    except TimeoutError:
        if waiting is None:
            raise
        logger.warning(waiting)
        locked = _lock_file(path, warn=True, wait=True)
    try:
        yield
    finally:
        _unlock(path, locked)


def make_once(folder: Path, make: Callable[[], None], *, ready: Callable[[], bool], waiting: str) -> bool:
    """Calls `make` unless the folder is ready; of processes that ask at once one makes it, and the others wait for it.

    What killed processes left beside the folder is removed. Where the file system has no locks, each makes it.

    Args:
        waiting: said while another process is at work.

    Returns:
        Whether it was made here.
    """
    parent, path = folder.parent, folder.parent / ".lock"
    settle(parent)
    if ready():
        if path.exists():
            with suppress(OSError), lock(path):  # removes it, unless it is held
                pass
        return False
    parent_is_new = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock(path, waiting=waiting):
            if ready():
                return False
            make()
            return True
    except BaseException:
        if parent_is_new:
            with suppress(OSError):  # others may have something there
                parent.rmdir()
        raise


def _lock_file(path: Path, *, warn: bool = False, wait: bool = False) -> FileLock | None:
    """Makes and locks a file until `_unlock` or the end of the process; None where the file system has no locks.

    Raises:
        TimeoutError: another process holds it, without `wait`.
    """
    from filelock import FileLock  # not above: only who writes waits for it

    # No file that stands for a lock where there are none: a killed process would leave it for ever.
    file = FileLock(path, fallback_to_soft=False)
    try:
        file.acquire(blocking=wait)
    except OSError as error:
        if error.filename is not None or isinstance(error, TimeoutError):  # no matter of a system without locks
            raise
        if warn:
            message = f"{path.parent}: cannot be locked ({error}); let one process at a time work there"
            warnings.warn(message, UserNotice, stacklevel=5)
        return None
    return file


def _unlock(path: Path, locked: FileLock | None) -> None:
    """Removes the file and ends its lock, in this order: who has opened it meanwhile finds it gone and makes another.

    Windows removes no file that is open; there filelock does it afterwards.
    """
    with suppress(OSError):
        path.unlink()
    if locked is not None:
        locked.release()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder of this process in `parent`, which is made if need be; removed with its content at the end.

    Its file `lock` is locked as long as the process lives. The first time a process writes into `parent`, it removes
    what dead processes left there (see `settle`).
    """
    parent.mkdir(parents=True, exist_ok=True)
    if (settled := parent.resolve()) not in _SETTLED:
        _SETTLED.add(settled)
        settle(parent)
    folder, locked = _make_hidden(parent)
    try:
        yield folder
    finally:
        with suppress(OSError):
            _dissolve(folder, locked)


def settle(parent: Path) -> None:
    """Ends what killed processes left of their writing in `parent`: a replaced folder is put back, the rest removed.

    Only hidden folders of this module whose lock is free are touched. Where the file system has no locks, or another
    user's folder may not be changed, they are left alone. Whoever finds that there is nothing to write asks for it too:
    a process killed at its last moment leaves the whole file and, beside it, its hidden folder.
    """
    for folder in parent.glob(f"{_HIDDEN}*"):
        if not _HIDDEN_NAME.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError):  # also of a lock that is held
            if not (folder / _LOCK).exists():
                folder.rmdir()  # its process was killed before it had locked it, or when all else was removed
            elif locked := _lock_file(folder / _LOCK):
                _dissolve(folder, locked)


def _make_hidden(parent: Path) -> tuple[Path, FileLock | None]:
    while True:
        folder = parent / f"{_HIDDEN}{uuid.uuid4().hex}"
        folder.mkdir()
        with suppress(FileNotFoundError, TimeoutError):  # another process settled it before it was locked
            locked = _lock_file(folder / _LOCK)
            if locked is None:
                (folder / _LOCK).touch()
            return folder, locked


def _dissolve(folder: Path, locked: FileLock | None) -> None:
    """Puts back the folder that was moved aside, if its place is free, and removes everything else, the lock last."""
    aside = folder / _ASIDE
    for old in aside.iterdir() if aside.is_dir() else ():
        if not os.path.lexists(folder.parent / old.name):
            os.rename(old, folder.parent / old.name)
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _unlock(folder / _LOCK, locked)
    folder.rmdir()


@contextmanager
def told_writing(path: Path) -> Iterator[None]:
    """Turns what can go wrong in writing `path` into a `UserError` that names it: a full disk, a limit, no permission.

    Errors that say nothing of writing, such as a missing file that is read meanwhile, pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and _HIDDEN not in str(error.filename):
            raise
        reason = error.strerror or str(error)
        raise UserError(f"{path}: {reason[:1].lower()}{reason[1:]}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file as `whole_file` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into; at the end of the block it is flushed to the disk and gets its name. Makes missing folders.

    Whenever this is interrupted, `path` is what it was or whole, also after a power cut.
    """
    with told_writing(path), temporary_folder(path.parent) as hidden:
        with (hidden / "new").open("wb") as file:
            yield file
        put_in_place(hidden / "new", path)


def put_in_place(new: Path, path: Path) -> None:
    """Gives a file that is written and closed its name, flushed to the disk before and after."""
    _flush(new)
    os.replace(new, path)
    _flush(path.parent)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to write into; at the end of the block it is flushed to the disk and gets the name `folder`.

    After an error or an interruption nothing is left, and `folder` is what it was or whole, also after a power cut.
    With `replace`, a process killed between the two renames leaves the old folder aside: `settle` puts it back.

    Args:
        replace: take the place of a folder that is there; else, if another process has made it meanwhile, its is kept.
    """
    with told_writing(folder), temporary_folder(folder.parent) as hidden:
        new = hidden / "new"
        new.mkdir()
        yield new
        with ThreadPoolExecutor(16) as pool:  # one after the other, thousands of pictures would take minutes
            list(pool.map(_flush, [new, *new.rglob("*")]))
        try:
            os.rename(new, folder)  # also onto an empty folder
        except OSError:
            if not folder.is_dir():
                raise
            if replace:
                (hidden / _ASIDE).mkdir()
                os.rename(folder, hidden / _ASIDE / folder.name)
                os.rename(new, folder)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(opened)


def weights_file(source: Path) -> Path:
    """The file that `init_from` means: a checkpoint, or the weights of a model folder or of a run's folder."""
    if not source.is_dir():
        return source
    folders = [folder for folder in (source, source / "model") if (folder / WEIGHTS_NAME).exists()]
    return (folders[0] if folders else source) / WEIGHTS_NAME
