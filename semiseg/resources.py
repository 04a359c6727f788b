"""Where named files are found (splits, studies, printed numbers), and how files are written: whole or not at all."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from semiseg.errors import UserError

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"  # in a model folder
LOCK_NAME = ".train.lock"  # in a run's folder, held by the process that trains it
Kind = Literal["splits", "experiments", "launch", "published"]

# kind -> (folder below the working project or the packaged copy, suffix, the word for one of them)
_PLACES: dict[Kind, tuple[str, str, str]] = {
    "splits": ("splits", ".toml", "class split"),
    "experiments": ("experiments", ".toml", "study"),
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
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / LOCK_NAME))
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
    from filelock import FileLock  # not above: only who writes waits for it

    # No file that stands for a lock where there are none: a killed process would leave it for ever.
    file = FileLock(path, fallback_to_soft=False)
    try:
        file.acquire(blocking=False)
    except TimeoutError:
        if waiting is None:
            raise
        logger.warning(waiting)
        file.acquire()
    except OSError as error:
        if error.filename is not None:  # the file cannot be made, which is no matter of locks
            raise
        warnings.warn(f"{path.parent}: cannot be locked ({error}); let one process at a time work there", stacklevel=4)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who opens it now finds it gone and makes another
        file.release()


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


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it gets that name at the end of the block.

    After an error or an interruption nothing is left. If another process has made `folder` meanwhile, its is kept.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weights_file(source: Path) -> Path:
    """The file that `init_from` means: a checkpoint, or the weights of a model folder or of a run's folder."""
    if not source.is_dir():
        return source
    folders = [folder for folder in (source, source / "model") if (folder / WEIGHTS_NAME).exists()]
    return (folders[0] if folders else source) / WEIGHTS_NAME
