"""How files are written, whole or not at all, and how processes keep out of each other's way.

* What is written lies in a hidden folder `.semiseg-` and 32 digits beside its place until it is whole and on the disk;
  then it is renamed. A kill, a full disk or a power cut leaves what was there before, or all of the new.
* A hidden folder belongs to the process that holds the lock on its file `lock`. One whose lock is free is what a killed
  process left; the next that writes there removes it, but puts back an old folder that was being replaced.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from semiseg.errors import UserError, UserNotice

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

LOCK_NAME = ".train.lock"  # in a run's folder, held by the process that trains it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a limit on the size of files
_HIDDEN, _LOCK, _ASIDE = ".semiseg-", "lock", "aside"
_HIDDEN_NAME = re.compile(re.escape(_HIDDEN) + "[0-9a-f]{32}")
_SETTLED: set[Path] = set()  # folders whose leftovers this process has removed: a listing per file would be quadratic


def require_folder(path: Path) -> None:
    """A UserError, before any work, if no files can be written into a folder, which need not exist yet."""
    existing = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not existing.is_dir():
        reason = "is no folder" if existing == path else f"no folder can be made: {existing} is a file"
        raise UserError(f"{path}: {reason}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing}: no permission to write there")


def require_nothing_else(folder: Path, *, writer: str, known: Collection[str] = ()) -> None:
    """A UserError if a folder, which need not exist, holds visible things of other names than those that are `known`.

    Hidden files are nobody's concern: nothing replaces or removes one that it has not written itself.
    """
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    refuse_others(folder, [path for path in there if path.name not in {*known} and path.name[0] != "."], writer=writer)


def refuse_others(folder: Path, others: Sequence[Path], *, writer: str) -> None:
    """A UserError that names what a folder holds, if anything, that no `writer` (a word for what is written) wrote."""
    if others:
        names = [f"{path.name}/" if path.is_dir() else path.name for path in others]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{folder}: holds what no {writer} wrote: {listed}; give a new or an empty folder as --out")


def require_there(folder: Path) -> None:
    """A UserError, before torch is imported, which takes seconds, if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")


def lock_folder(folder: Path) -> AbstractContextManager[None]:
    """Keeps other processes from training in a folder; a UserError if one does."""
    refused = f"{folder}: another process is training this run; wait for it or end it first"
    return lock(folder / LOCK_NAME, refused=refused)


@contextmanager
def lock(path: Path, *, waiting: str | None = None, refused: str | None = None) -> Iterator[None]:
    """Locks a file, which is there only so long, until the end of the block or of this process, however it ends.

    Where another process holds it, `waiting` is said and it is waited for, or `refused` is a UserError; with neither it
    is a TimeoutError. On a file system without locks it goes on without one, with a warning.
    """
    try:
        file = _acquire(path, warn=True)
    except TimeoutError:
        if refused is not None:
            raise UserError(refused) from None
        if waiting is None:
            raise
        logger.warning(waiting)
        file = _acquire(path, warn=True, wait=True)
    try:
        yield
    finally:
        _release(path, file)


def make_once(folder: Path, make: Callable[[], None], *, ready: Callable[[], bool], waiting: str) -> bool:
    """Calls `make` unless the folder is ready, and says whether it did.

    Of processes that ask at once one makes it, and the others say `waiting` and wait for it; where the file system has
    no locks, each makes it. What killed processes left beside the folder is removed.
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


def _acquire(path: Path, *, warn: bool = False, wait: bool = False) -> FileLock | None:
    """Makes and locks a file until `_release` or the end of the process; None where the file system has no locks.

    A TimeoutError if another process holds it and it is not to be waited for, a UserError where no file can be.
    """
    from filelock import FileLock  # not above: only who writes waits for it

    # No file that stands for a lock where there are none: a killed process would leave it for ever.
    file = FileLock(path, fallback_to_soft=False)
    try:
        path.touch()
    except FileNotFoundError:  # which filelock takes for a lock of somebody else, and waits for ever
        raise UserError(f"{path.parent}: no file can be made there") from None
    except OSError:  # left to filelock
        pass
    try:
        file.acquire(blocking=wait)
    except OSError as error:
        if error.filename is not None or isinstance(error, TimeoutError):  # no matter of a system without locks
            raise
        if warn:
            message = f"{path.parent}: cannot be locked ({error}); let one process at a time work there"
            warnings.warn(message, UserNotice, stacklevel=4)
        return None
    return file


def _release(path: Path, file: FileLock | None) -> None:
    """Removes the file and ends its lock, in this order: who has opened it meanwhile sees it gone and makes another."""
    with suppress(OSError):  # Windows removes no file that is open; there filelock does it afterwards
        path.unlink()
    if file is not None:
        file.release()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder of this process in `parent`, which is made if need be; removed with its content at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    if parent.resolve() not in _SETTLED:
        settle(parent)
        _SETTLED.add(parent.resolve())
    while True:
        folder = parent / f"{_HIDDEN}{uuid.uuid4().hex}"
        folder.mkdir()
        with suppress(FileNotFoundError, TimeoutError):  # another process settled it before it was locked
            file = _acquire(folder / _LOCK)
            (folder / _LOCK).touch()  # it is not made where there are no locks
            break
    try:
        yield folder
    finally:
        with suppress(OSError):
            _dissolve(folder, file)


def settle(parent: Path) -> None:
    """Ends what killed processes left of their writing in `parent`: a replaced folder is put back, the rest removed.

    Also for who finds that there is nothing to write: a process killed at its last moment leaves its hidden folder.
    """
    for folder in parent.glob(f"{_HIDDEN}*"):
        if not _HIDDEN_NAME.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError):  # also of a lock that is held, and of another user's folder
            if not (folder / _LOCK).exists():
                folder.rmdir()  # its process was killed before it had locked it, or when all else was removed
            elif file := _acquire(folder / _LOCK):
                _dissolve(folder, file)


def _dissolve(folder: Path, file: FileLock | None) -> None:
    """Puts back the folder that was moved aside, if its place is free, and removes everything else, the lock last."""
    aside = folder / _ASIDE
    for old in aside.iterdir() if aside.is_dir() else ():
        if not os.path.lexists(folder.parent / old.name):
            os.rename(old, folder.parent / old.name)
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _release(folder / _LOCK, file)
    folder.rmdir()


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
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
    """Writes a text as UTF-8, as `whole_file` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which gets its name at the end of the block. Makes missing folders.

    Whenever this is interrupted, `path` is what it was or whole, also after a power cut.
    """
    with writing_errors(path), temporary_folder(path.parent) as hidden:
        with (hidden / "new").open("wb") as file:
            yield file
        _flush(hidden / "new")
        os.replace(hidden / "new", path)
        _flush(path.parent)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to write into, which gets the name `folder` at the end of the block; else nothing is left.

    Whenever this is interrupted, `folder` is what it was or whole, also after a power cut. With `replace` it takes the
    place of a folder that is there, which `settle` puts back if the process is killed between the two renames; else, if
    another process has made the folder meanwhile, that is kept.
    """
    with writing_errors(folder), temporary_folder(folder.parent) as hidden:
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
