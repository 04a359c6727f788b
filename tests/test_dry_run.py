"""The dry run: which runs it lists, and where its times come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semiseg.results import append
from semiseg.studies.file import load_study
from semiseg.studies.identity import PlannedRun, plan
from tests.recorded_runs import recorded_run
from tests.study_files import add_study_data
from tests.test_cli import call

ROOT = Path(__file__).parent.parent
CPU = "cpu (x86_64, 2 threads)"
STUDY = """
title = "T"
question = "Q?"
[base]
data = { root = "coco", train_annotations = "train.json", val_annotations = "val.json" }
optim.steps = 7200
[[rows]]
name = "boxes"
set.supervision.source = "boxes"
[[rows]]
name = "full"
set.supervision.source = "masks"
[[tables]]
name = "t"
title = "T"
rows = ["boxes", "full"]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def dry_run(*options: str) -> str:
    return call("run", "study", "--dry-run", *options)


def cells(text: str, row: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(row)).split()


def record(run: PlannedRun, **values: Any) -> None:
    """Records a finished run of the study."""
    append(
        Path("reports/study/results.jsonl"),
        recorded_run(run.row, run.seed, run_id="elsewhere", device=CPU, seconds=50.0, steps=100, **values),
    )


def test_the_list_without_the_data(project: Path) -> None:
    text = dry_run("--processes", "4")
    assert cells(text, "boxes") == ["boxes", "0", "unknown", "7200", "16", "—"]
    lines = text.splitlines()
    assert "2 of 2 runs to train, if none is done" in lines
    (missing,) = [line for line in lines if line.startswith("which of them are done cannot be told without the data")]
    assert "coco: " in missing
    assert "train.json" in missing
    assert lines[-1] == "no times: no run of these rows is recorded"
    assert sorted(path.name for path in project.iterdir()) == ["experiments"]


def test_times_are_those_of_the_newest_recorded_run_of_the_row(project: Path) -> None:
    add_study_data(project)
    boxes, full = plan(load_study("study"))
    record(boxes, processes=1, finished="2024-01-01T00:00:00+00:00", git_revision="old")
    record(replace(boxes, seed=7), processes=1, finished="2025-01-01T00:00:00+00:00")
    record(boxes, processes=2, finished="2026-01-01T00:00:00+00:00")
    text = dry_run()
    assert cells(text, "boxes")[2:] == ["missing", "7200", "16", "1", "h", "00", "min", boxes.run_id]
    assert cells(text, "full")[2:] == ["missing", "7200", "16", "—", full.run_id]
    assert "2 of 2 runs to train\nabout 1 h 00 min for 1 of them: one after the other, by the step as" in text
    assert text.rstrip().endswith(f"took on {CPU}")
    assert "without the data" not in text


def test_what_is_left_of_a_run_that_has_begun_is_counted(project: Path) -> None:
    add_study_data(project)
    begun = plan(load_study("study"))[0]
    record(begun, processes=1)
    begun.folder.mkdir(parents=True)
    (begun.folder / "identity.json").write_text("{}")
    (begun.folder / "log.jsonl").write_text(json.dumps({"step": 3600, "steps": 7200}) + "\n")
    text = dry_run()
    shown = ["step", "3600", "of", "7200", "7200", "16", "30", "min", begun.run_id]
    assert cells(text, "boxes")[2:] == shown
    (project / "experiments" / "study.toml").write_text(STUDY.replace("steps = 7200", "epochs = 2"))
    assert cells(dry_run(), "full")[2:7] == ["missing", "2", "epochs", "16", "—"]


def test_a_list_of_nothing_names_reproduce(project: Path) -> None:
    add_study_data(project)
    for run in plan(load_study("study")):
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text(json.dumps({"finished": "2025-01-01T00:00:00+00:00"}))
    assert dry_run().splitlines() == [
        "0 of 2 runs to train",
        "all are done or recorded; '--reproduce' lists those that were recorded elsewhere",
    ]
    assert dry_run("--reproduce").splitlines() == ["0 of 2 runs to train"]


def test_nothing_is_measured_and_torch_stays_away(project: Path) -> None:
    code = (
        "import sys; from semiseg.cli import app\n"
        "try: app(['run', 'study', '--dry-run'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs to train" in done.stdout


def test_errors_of_the_study_are_still_errors(project: Path) -> None:
    path = project / "experiments" / "study.toml"
    path.write_text(STUDY.replace('source = "boxes"', 'source = "split"'))
    call("run", "study", "--dry-run", code=2)
    path.write_text(STUDY)
    told = call("run", "study", "--dry-run", "--processes", "3", code=2)
    assert "has no equal shares for 3 processes" in told
