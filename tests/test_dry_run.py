"""The dry run: which runs it lists, and where its times come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semiseg.studies.file import load_study
from semiseg.studies.identity import PlannedRun, plan
from semiseg.studies.status import seconds_per_step
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


def finish(run: PlannedRun, folder: str, **result: Any) -> None:
    """Leaves what a finished run of the same configuration does, in a folder of another study."""
    path = Path("runs") / "other" / folder
    path.mkdir(parents=True)
    finished = "2025-01-01T00:00:00+00:00"
    values = {"device": CPU, "processes": 1, "train_seconds": 50.0, "steps": 100, "finished": finished, **result}
    (path / "result.json").write_text(json.dumps(values))
    (path / "config.json").write_text(json.dumps({"config": run.config.model_dump(mode="json")}))


def test_the_list_without_the_data(project: Path) -> None:
    text = dry_run("--processes", "4")
    assert cells(text, "boxes") == ["boxes", "0", "unknown", "7200", "16", "—"]
    lines = text.splitlines()
    assert "2 of 2 runs to train, if none is done" in lines
    (missing,) = [line for line in lines if line.startswith("which of them are done cannot be told without the data")]
    assert "coco: " in missing
    assert "train.json" in missing
    assert lines[-1] == "no times: no run of the same kind is finished in runs/"
    assert sorted(path.name for path in project.iterdir()) == ["experiments"]


def test_times_are_those_of_the_newest_finished_run_of_the_same_kind(project: Path) -> None:
    add_study_data(project)
    boxes, full = plan(load_study("study"))
    longer = plan(load_study("study", ["optim.steps=99", "optim.learning_rate=1.0"], seeds=[7]))[0]
    finish(longer, "one")
    finish(boxes, "two", train_seconds=30.0, finished="2024-01-01T00:00:00+00:00")
    finish(boxes, "three", processes=2, train_seconds=1.0, finished="2026-01-01T00:00:00+00:00")
    finish(plan(load_study("study", ["model.neck.channels=64"]))[0], "four", finished="2026-01-01T00:00:00+00:00")
    finish(boxes, "five", steps=0)
    finish(boxes, "six")
    Path("runs/other/six/result.json").write_text("{")
    assert set(seconds_per_step(1).values()) == {(0.5, CPU)}
    text = dry_run()
    assert cells(text, "boxes")[2:] == ["missing", "7200", "16", "1", "h", "00", "min", boxes.run_id]
    assert cells(text, "full")[2:] == ["missing", "7200", "16", "—", full.run_id]
    assert "2 of 2 runs to train\nabout 1 h 00 min for 1 of them: training alone, one run after the other" in text
    assert text.rstrip().endswith(f"took on {CPU}")
    assert "without the data" not in text


def test_what_is_left_of_a_run_that_has_begun_is_counted(project: Path) -> None:
    add_study_data(project)
    begun = plan(load_study("study"))[0]
    finish(begun, "one")
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
