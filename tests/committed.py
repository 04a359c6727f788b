"""`reports/` as committed. `semiseg run` and `semiseg report` write a clone's own numbers into its `reports/`."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

PROJECT = Path(__file__).parent.parent
WORKING = PROJECT / "reports"


@cache
def committed_reports() -> Path:
    """A copy of this project's `reports/` as committed, made once."""
    return reports_in_git(PROJECT)


def reports_in_git(project: Path) -> Path:
    """A copy of `reports/` from git's index: the last commit with what is staged for the next one.

    `reports/` itself where git does not keep it, as in an unpacked archive.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    git = ["git", "-C", str(project)]
    try:
        listed = subprocess.run([*git, "ls-files", "-z", "reports"], env=environment, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return project / "reports"
    if not listed.stdout:
        return project / "reports"
    copy = mkdtemp(prefix="semiseg_reports_")
    # Not a `TemporaryDirectory`: a forked child that forgets the object, as multiprocessing does, would remove it.
    atexit.register(_remove, copy, os.getpid())
    command = [*git, "checkout-index", "-z", "--stdin", f"--prefix={copy}/"]
    subprocess.run(command, env=environment, input=listed.stdout, check=True)
    return Path(copy) / "reports"


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def committed_records() -> list[Path]:
    """The `results.jsonl` of every study that is committed."""
    return sorted(committed_reports().glob("*/results.jsonl"))
