"""The record of finished runs: append-only, read back whole, robust against interruptions."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from semiseg.config.former import with_present_keys
from semiseg.engine.logs import read_log
from semiseg.engine.run import git_revision
from semiseg.errors import UserError
from semiseg.results import EDGE_NUMBERS, Result, append, latest, read
from tests.committed import committed_records

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
        ({"identity": 3}, "'identity': .*object .*3"),
        ({"metrics": None}, "'metrics': .*object .*None"),
        ({"metrics": {}}, "'metrics': 'instances' is null, allowed: a table of class = number of objects"),
        ({"metrics": {"instances": 5}}, "'metrics': 'instances' is 5, allowed"),
        ({"metrics": {"instances": ["a"]}}, r"'metrics': 'instances' is \["),
        ({"metrics": {"instances": {"a": "x"}}}, "'metrics': 'instances' is "),
        (
            {"edges": {"seen": {}}},
            "'edges': 'seen' is {}, allowed: 'seen' and 'unseen' with calibration_error, ",
        ),
        ({"edges": {"all": dict.fromkeys(EDGE_NUMBERS, 1.0)}}, "'edges': 'all' is .*, allowed: 'seen' and 'unseen'"),
        ({"edges": {"seen": dict.fromkeys({*EDGE_NUMBERS, "x"}, 1.0)}}, "'edges': 'seen' is .*, allowed"),
        ({"edges": {"seen": dict.fromkeys(EDGE_NUMBERS, "1")}}, "'edges.seen.*number"),
        ({"finished": "yesterday"}, "'finished': .*yesterday"),
        ({"finished": "2025-01-01T00:00:00"}, "'finished': expected a time with its zone"),  # could not be compared
        ({"finished": 5}, "'finished': .*string"),
        ({"versions": {"torch": 2}}, "'versions.torch': .*string"),
        ({"run_id": ["a"]}, "'run_id': .*string"),
        ({"row": None}, "'row': .*string"),
        ({"split": 3}, "'split': .*string"),
        ({"seed": "0"}, "'seed': .*integer"),
        ({"seed": True}, "'seed': .*integer"),
        ({"seed": 2**32}, "'seed': "),
        ({"steps": 5.5}, "'steps': .*integer"),
        ({"steps": 10**40}, "'steps': "),
        ({"processes": 0}, "'processes': "),
        ({"seconds": "long"}, "'seconds': .*number"),
        ({"command": "semiseg run s"}, "'command': .*array"),
    ],
)
def test_values_of_another_kind_are_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**asdict(RESULT), **change}) + "\n")
    with pytest.raises(UserError, match=rf"results\.jsonl, line 1: not a result of this version \(.*{told}"):
        read(path)
    with pytest.raises(UserError, match=f"not a result of this version .*{told}"):  # nor is such a line written
        append(tmp_path / "new.jsonl", replace(RESULT, **change))
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n", "\x00"])
def test_a_sign_that_ends_lines_elsewhere_is_text_like_any_other(tmp_path: Path, sign: str) -> None:
    path, result = tmp_path / "results.jsonl", replace(RESULT, row=f"a{sign}b", command=[sign])
    assert append(path, result)
    assert not append(path, result)
    assert read(path) == [result]
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "seconds": 1.0, "name": sign} for step in (1, 2)]
    log.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert read_log(log) == lines


@pytest.mark.parametrize("damaged", ["1" * 5000, "[" * 100_000, '"\\ud800"', "\x00"])
def test_a_whole_line_that_no_reader_takes_is_refused(tmp_path: Path, damaged: str) -> None:
    """Numbers of thousands of digits, deep nesting, halves of a character: a result would be missing in the tables."""
    path = tmp_path / "results.jsonl"
    append(path, RESULT)
    line = path.read_text(encoding="utf-8")
    path.write_text(line.replace('"seed": 0', f'"seed": {damaged}') + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.jsonl, line 1: damaged \(.*\); mend or remove this line"):
        read(path)


def test_every_beginning_of_a_line_is_known_as_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, replace(RESULT, row="\u2028é", command=["\ud800"], seconds=1.5e-7))
    line = path.read_bytes()
    for length in range(1, len(line) - 1):
        path.write_bytes(line[:length])
        with pytest.warns(UserWarning, match=r"results\.jsonl, line 1: cut off by an interruption; ignored"):
            assert read(path) == []


def test_an_argument_that_is_not_utf8_loses_its_sign_and_not_the_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert append(path, replace(RESULT, command=["semiseg", "caf\udce9"]))
    assert read(path) == [replace(RESULT, command=["semiseg", "caf?"])]


@pytest.mark.parametrize(
    "line", ['{"step": "7", "seconds": 1}', '{"step": 7, "seconds": null}', '{"step": true, "seconds": 1}', "[7]", "7"]
)
def test_a_log_ends_at_its_first_line_of_another_kind(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "seconds": 0.5}}\n\n{line}\n{{"step": 8, "seconds": 2}}\n')
    assert read_log(path) == [{"step": 1, "seconds": 0.5}]


def test_the_recorded_runs_are_read_as_they_are() -> None:
    paths = committed_records()
    assert len(paths) >= 6
    for path in paths:
        written = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        expected = [{"edges": None, **values, "config": with_present_keys(values["config"])} for values in written]
        assert [asdict(result) for result in read(path)] == expected


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
        (json.dumps({**line, "colour": 1}), r"line 1: not a result of this version \('colour': Unexpected"),
        (json.dumps({"run_id": "1"}), r"line 1: not a result of this version \(.*required"),
        ("[1]", r"line 1: not a result of this version \(no table\)"),
    ):
        path.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=told):
            read(path)


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="JSON compliant"):
        append(tmp_path / "results.jsonl", replace(RESULT, seconds=float("nan")))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_revision_is_dirty_by_the_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as git sets for its hooks
    assert git_revision(package) == f"{clean}-dirty"


def test_a_package_installed_below_a_project_has_not_the_revision_of_the_project(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True)

    installed, beside = tmp_path / ".venv" / "lib" / "package", tmp_path / "package"
    for path in (installed / "code.py", beside / "code.py", tmp_path / "mine.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    git("init", "-q")
    git("add", "mine.py", ".venv")
    git("commit", "-qm", "mine")
    assert git_revision(installed) is None  # even where somebody keeps his environment in git
    assert git_revision(beside) is None  # unpacked at the top, but git does not keep it
    git("add", "package")
    git("commit", "-qm", "kept")
    assert git_revision(beside) is not None
