"""Shipped splits, studies and printed numbers work from an installed wheel in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.committed import committed_reports

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, unpacked, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("semiseg-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def call(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-m", "semiseg", *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_files_work_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import semiseg; print(semiseg.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(installed), "the wheel's copy is not the one that is imported"
    assert call(installed, tmp_path, "split", "list").count("shipped") == 15
    assert "20 seen, 60 unseen" in call(installed, tmp_path, "split", "show", "coco_voc20_seen")
    assert "11 of 11 runs to train" in call(installed, tmp_path, "run", "shapes", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    record = Path("reports", "shapes", "results.jsonl")
    (tmp_path / record).parent.mkdir(parents=True)
    recorded = committed_reports() / "shapes" / "results.jsonl"
    first = recorded.read_bytes().split(b"\n")[0]  # of many: a page of few figures
    (tmp_path / record).write_bytes(first + b"\n")
    # The report reads the shipped printed numbers: Table 6 prints 19.9 AP for `neither` on unseen classes.
    call(installed, tmp_path, "report", "shapes")
    for name in ("report.md", "index.html"):
        assert "19.9" in (tmp_path / "reports" / "shapes" / name).read_text()


def test_the_wheel_ships_what_the_tree_has(installed: Path) -> None:
    for name in ("splits", "experiments", "reports/published"):
        tree, shipped = (
            sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
            for folder in (REPOSITORY / name, installed / "semiseg" / "_shipped" / name)
        )
        assert tree
        assert shipped == tree
