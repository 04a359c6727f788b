"""The record of finished runs: append-only, read back whole, robust against interruptions."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from semiseg.engine.run import git_revision
from semiseg.errors import UserError
from semiseg.results import Result, append, latest, read

RESULT = Result(
    run_id="0123",
    study="s",
    row="neither",
    split="few",
    split_digest="ab",
    seed=0,
    config={"optim": {"steps": 5}},
    identity={"config": "x", "split": "ab", "data": "d", "init": None},
    data_fingerprint="f",
    metrics={"segm": {"groups": {"all": {"AP": 12.345678901234567, "APl": None}}}, "instances": {"café": 3}},
    steps=5,
    seconds=1.5,
    device="cpu",
    versions={"torch": "2"},
    git_revision=None,
    command=["semiseg", "run", "s"],
    finished="2025-01-01T00:00:00+00:00",
)


def test_what_is_appended_is_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    assert read(path) == []
    other = replace(RESULT, run_id="4567", split=None, init_run="0123", processes=2)
    assert append(path, RESULT)
    assert append(path, other)
    assert read(path) == [RESULT, other]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_the_same_result_is_recorded_once_and_a_newer_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    newer = replace(RESULT, finished="2025-02-01T00:00:00+00:00", device="gpu")
    assert append(path, RESULT)
    before = path.read_bytes()
    assert not append(path, RESULT)
    assert path.read_bytes() == before
    assert append(path, newer)
    assert path.read_bytes().startswith(before)
    assert latest(read(path)) == {"0123": newer}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"identity": 3}, r"'identity' is 3"),
        ({"metrics": None}, r"'metrics' is None"),
        ({"finished": "yesterday"}, "yesterday"),
        ({"finished": 5}, "fromisoformat"),
        ({"versions": None}, r"'versions' is None"),
    ],
)
def test_values_of_another_kind_are_told(tmp_path: Path, change: dict, told: str) -> None:
    path = tmp_path / "results.jsonl"
    append(path, replace(RESULT, **change))
    with pytest.raises(UserError, match=rf"results\.jsonl, line 1: not a result of this version \(.*{told}"):
        read(path)


def test_a_line_cut_off_is_ignored_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    with path.open("a") as file:
        file.write('{"run_id": "99", "stu')
    with pytest.warns(UserWarning, match=r"results\.jsonl, line 2: cut off"):
        assert read(path) == [RESULT]
    other = replace(RESULT, run_id="4567")
    with pytest.warns(UserWarning, match="line 2"):
        append(path, other)
    with pytest.warns(UserWarning, match="line 2"):
        assert read(path) == [RESULT, other]


def test_lines_of_another_version_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    line = json.loads(path.read_text(encoding="utf-8"))
    for text, told in (
        (json.dumps({**line, "colour": 1}), r"line 1: not a result of this version \(colour\)"),
        (json.dumps({"run_id": "1"}), r"line 1: not a result of this version \(.*missing"),
        ("[1]", r"line 1: not a result of this version \(no table\)"),
    ):
        path.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=told):
            read(path)


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append(tmp_path / "results.jsonl", replace(RESULT, seconds=float("nan")))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_revision_is_dirty_by_the_package_alone(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True)

    package, record = tmp_path / "package", tmp_path / "reports" / "results.jsonl"
    for path in (package / "code.py", record):
        path.parent.mkdir()
        path.write_text("1\n")
    assert git_revision(package) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = git_revision(package)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{12}", clean)
    record.write_text("2\n")  # as a study does while it runs
    assert git_revision(package) == clean
    (package / "code.py").write_text("2\n")
    assert git_revision(package) == f"{clean}-dirty"
