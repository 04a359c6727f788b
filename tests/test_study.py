"""Studies: which runs a file asks for, what makes two runs the same, and how the missing ones are run."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from semiseg.data.workers import TOGETHER_SECONDS, StopOnSignal
from semiseg.engine.logs import format_seconds
from semiseg.errors import UserError
from semiseg.results import Result, latest, read
from semiseg.studies.file import Study, load_study, study_runs
from semiseg.studies.identity import PlannedRun, matching_results, plan
from semiseg.studies.machines import (
    LaunchFile,
    Machine,
    Share,
    child_environment,
    last_step,
    launch_command,
    reason,
    share_of,
)
from semiseg.studies.run import Execution, StudyProgress, run_missing
from semiseg.studies.status import run_status, runs_to_do
from tests.study_files import write_study

STUDY = """
title = "T"
question = "Q?"
seeds = [0, 1]
[splits]
few = "few"
many = "many"
[base]
data = { root = "coco", train_annotations = "train.json", val_annotations = "val.json" }
optim.steps = 3
[pretrain]
optim.steps = 4
[[rows]]
name = "neither"
set = { objective.box = "none" }
[[rows]]
name = "boxes"
set = { supervision.source = "boxes" }
[[rows]]
name = "full"
set = { supervision.source = "masks" }
[[tables]]
name = "table6"
title = "6"
split = "few"
rows = ["neither", "boxes", "full"]
[[tables]]
name = "table7"
title = "7"
split = "many"
rows = ["neither", "boxes", "full"]
"""
MACHINE = Machine(cores=8, gpus=())
ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study, two splits and annotation files of three classes; the current folder of the test."""
    write_study(tmp_path, STUDY, splits={"few": 'seen = ["cat"]', "many": 'unseen = ["cow"]'})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def execution(**changes: Any) -> Execution:
    command = (sys.executable, str(Path(__file__).parent / "fake_train.py"))
    return Execution(**{"command": command, "machine": MACHINE, "poll_seconds": 0.02, "line_seconds": 0.05, **changes})


def run(study: Study, **changes: Any) -> list[str]:
    """Runs what is missing and gives the labels of what was trained."""
    stream = io.StringIO()
    done = run_missing(
        plan(study), name=study.name, results=Path("results.jsonl"), how=execution(**changes), stream=stream
    )
    return [item.label for item in done]


def first_call(item: PlannedRun) -> dict[str, Any]:
    """What the stand-in wrote of the first time that it was started for a run."""
    call: dict[str, Any] = json.loads((item.folder / "calls.jsonl").read_text().splitlines()[0])
    return call


def ids(study: Study) -> dict[str, str]:
    return {item.label: item.run_id for item in plan(study)}


def test_each_run_is_planned_once_for_all_tables(project: Path) -> None:
    planned = plan(load_study("study"))
    assert [item.label for item in planned] == [
        "pretrain-s0", "pretrain-s1",
        "neither-few-s0", "boxes-s0", "full-s0", "neither-many-s0",
        "neither-few-s1", "boxes-s1", "full-s1", "neither-many-s1",
    ]  # fmt: skip
    assert len({item.run_id for item in planned}) == len({item.folder for item in planned}) == 10
    by_label = {item.label: item for item in planned}
    few, boxes, start = by_label["neither-few-s1"], by_label["boxes-s1"], by_label["pretrain-s1"]
    assert few.config.init_from == str(start.folder / "model") == f"runs/study/pretrain-s1-{start.run_id}/model"
    assert (few.init_run, few.config.supervision.split, few.config.seed, few.config.optim.steps) == (
        start.run_id, "few", 1, 3,
    )  # fmt: skip
    assert (boxes.identity["split"], boxes.config.supervision.split) == (None, None)
    assert (start.config.supervision.source, start.config.objective.box) == ("boxes", "none")
    assert (start.config.optim.steps, start.init_run) == (4, None)


def test_only_named_rows_and_the_pretraining_they_start_from(project: Path) -> None:
    labels = [item.label for item in plan(load_study("study", seeds=[5]), only=["full"])]
    assert labels == ["pretrain-s5", "full-s5"]
    with pytest.raises(UserError, match=r"--only 'fll': .*no such row\. Did you mean 'full'\?"):
        plan(load_study("study"), only=["fll"])


def test_what_makes_a_run_another_run(project: Path) -> None:
    before = ids(load_study("study"))

    def changed(*overrides: str) -> set[str]:
        now = ids(load_study("study", overrides))
        return {label for label in now if now[label] != before[label]}

    everything, rows = set(before), {label for label in before if not label.startswith("pretrain")}
    assert changed() == set()
    assert changed("runtime.workers=9") == set()
    assert changed("data.flip=0.1") == everything
    assert changed("rows.optim.steps=7") == rows
    assert changed("pretrain.optim.steps=7") == everything  # the rows start from other weights
    Path("splits/few.toml").write_text('name = "renamed"\nunseen = ["cow", "dog"]')
    assert changed() == set()  # the same split in other words
    Path("splits/few.toml").write_text('seen = ["dog"]')
    assert changed() == {"neither-few-s0", "neither-few-s1"}
    Path("coco/val.json").write_text(Path("coco/val.json").read_text().replace("8", "9"))
    assert changed() == everything


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('rows = ["neither", "boxes", "full"]', 'rows = ["nether"]', r"unknown row 'nether'\. Did you mean 'neither'"),
        ('split = "many"', 'split = "may"', r"unknown split 'may'\. Did you mean 'many'"),
        ('name = "full"', 'name = "boxes"', r"row 'boxes' is there twice"),
        ('rows = ["neither", "boxes", "full"]', 'rows = ["boxes", "boxes"]', r"table 'table6': a row is there twice"),
        ('name = "full"', 'name = "pretrain"', r"'pretrain' is no name for a row"),
        ('name = "table7"', 'name = "table 7"', r"table 'table 7': a table's name is of letters, digits, '_' and '-'"),
        ('name = "table7"', 'name = "<b>"', r"table '<b>': a table's name is of letters"),
        ('name = "full"', 'name = "fu\\nll"', r"'rows\.2\.name': .*\(value: 'fu\\nll'\)"),
        ('{ supervision.source = "masks" }', '{ supervision = "x" }', r"row 'full': .*'supervision'.*'x'"),
        ('{ supervision.source = "masks" }', "{ supervision = 3 }", r"row 'full': .*'supervision'.*3"),
        ("[base]", '[base]\nsupervision = "x"', r"\[pretrain\]: 'supervision': expected a table of values, not 'x'"),
        ('["neither", "boxes", "full"]', '["neither", "boxes"]', r"row 'full' is in no table"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seed '1' is there twice"),
        ("seeds = [0, 1]", "seed = [1]", r"unknown key 'seed'\. Did you mean 'seeds'"),
        ("optim.steps = 3", "optim.stps = 3", r"\[pretrain\]: unknown key 'optim\.stps'\. Did you mean 'steps'"),
        ("[base]", "[set]\nseed = 1\n[base]", r"\[set\] sets 'seed', but the seeds of a study are its own 'seeds'"),
        ('set = { supervision.source = "masks" }', "set = { sed = 1 }", r"row 'full': unknown key 'sed'"),
        ("[pretrain]", '[pretrain]\nsupervision.source = "masks"', r"may use 'boxes' only"),
        ("optim.steps = 3", 'optim.steps = 3\ninit_from = "x"', r"its weights come from the \[pretrain\] run"),
    ],
)
def test_errors_in_study_files(project: Path, old: str, new: str, told: str) -> None:
    assert old in STUDY
    Path("experiments/study.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match=told):
        study_runs(load_study("study"))


def test_overrides_that_a_study_cannot_take(project: Path) -> None:
    for overrides, told in (
        (["seed=3"], "--seeds"),
        (["rows.seed=3"], "--seeds"),
        (["rows=3"], r"--set rows=3: expected the form rows\.a\.b=value$"),
        (["pretrain"], r"--set pretrain: expected the form pretrain\.a\.b=value$"),
        (["rows.=3"], r"--set rows\.=3: expected the form rows\.a\.b=value$"),
    ):
        with pytest.raises(UserError, match=told):
            load_study("study", overrides)
    Path("experiments/study.toml").write_text(STUDY.replace("[pretrain]\noptim.steps = 4", ""))
    with pytest.raises(UserError, match=r"has no \[pretrain\]"):
        load_study("study", ["pretrain.optim.steps=3"])
    assert all(item.init_run is None for item in plan(load_study("study")))


def test_a_base_is_a_table_of_settings_in_a_file_of_its_own(project: Path) -> None:
    """By name or path; what the study sets is laid over it, and the runs are those of the settings written out."""
    before = ids(load_study("study", seeds=[0]))
    settings = """
        data = { root = "coco", train_annotations = "train.json", val_annotations = "val.json" }
        optim = { steps = 99, batch_size = 16 }
    """
    Path("experiments/bases").mkdir()
    for path in (Path("experiments/bases/own.toml"), Path("elsewhere.toml")):
        path.write_text(settings)
        base = path.stem if "bases" in path.parts else str(path)
        text = STUDY[: STUDY.index("[base]")] + "[set]\noptim.steps = 3\n" + STUDY[STUDY.index("[pretrain]") :]
        Path("experiments/study.toml").write_text(f'base = "{base}"\n{text}')
        assert ids(load_study("study", seeds=[0])) == before
        path.unlink()
    with pytest.raises(UserError, match=r"elsewhere\.toml: no such base of settings: .* Available: .*shapes"):
        load_study("study")
    for wrong, told in {
        settings.replace("steps", "stps"): r"unknown key 'optim\.stps'\. Did you mean 'steps'\?",
        settings.replace("99", "'x'"): r"'optim\.steps': .* valid integer .*\(value: 'x'\)",
    }.items():
        Path("elsewhere.toml").write_text(wrong)
        with pytest.raises(UserError, match=r"^elsewhere\.toml: " + told):
            load_study("study")
    Path("elsewhere.toml").write_text(settings.replace("steps = 99,", ""))  # a part; the study sets the steps
    assert ids(load_study("study", seeds=[0])) == before


def test_missing_data_are_named(project: Path) -> None:
    Path("coco/train.json").unlink()
    with pytest.raises(
        UserError, match=r"coco: not there: .*train\.json; put that there, or change .*data\.train_annotations"
    ):
        plan(load_study("study"))


def test_a_study_is_run_once_in_order_and_recorded(project: Path) -> None:
    study = load_study("study")
    assert len(run(study, jobs=3)) == 10
    results = read(Path("results.jsonl"))
    assert len(results) == 10
    by_label = {item.label: item for item in plan(study)}
    recorded = latest(results)
    for item in by_label.values():
        calls = [json.loads(line) for line in (item.folder / "calls.jsonl").read_text().splitlines()]
        assert len(calls) == 2, f"{item.label} was begun more than once"
        found = recorded[item.run_id]
        assert (found.row, found.split, found.seed, found.init_run) == (item.row, item.split, item.seed, item.init_run)
        assert "init_from" not in found.config
        if item.init_run is not None:
            start = next(other for other in by_label.values() if other.run_id == item.init_run)
            assert calls[0]["time"] >= json.loads((start.folder / "calls.jsonl").read_text().splitlines()[1])["time"]
            assert calls[0]["threads"] == "2"  # 8 cores // 3 side by side
        else:
            assert calls[0]["threads"] == "4"  # two pretrainings at most go side by side
    assert run(study) == []
    assert len(read(Path("results.jsonl"))) == 10


def test_one_pretraining_alone_uses_the_whole_machine(project: Path) -> None:
    study = load_study("study", seeds=[0])
    run(study, jobs=4)
    threads = {
        item.label: json.loads((item.folder / "calls.jsonl").read_text().splitlines()[0])["threads"]
        for item in plan(study)
    }
    assert threads.pop("pretrain-s0") == "8"
    assert set(threads.values()) == {"2"}


def test_results_belong_to_the_study_as_it_is_now_written(project: Path) -> None:
    study = load_study("study", seeds=[0])
    run(study)
    results = read(Path("results.jsonl"))
    for name in ("train", "val"):
        Path(f"coco/{name}.json").unlink()  # the report needs recorded results only
    assert set(matching_results(study, results)) == {
        ("pretrain", None, 0), ("neither", "few", 0), ("neither", "many", 0), ("boxes", None, 0), ("full", None, 0),
    }  # fmt: skip
    assert set(matching_results(load_study("study", ["rows.optim.steps=9"], seeds=[0]), results)) == {
        ("pretrain", None, 0)
    }
    assert matching_results(load_study("study", ["pretrain.optim.steps=9"], seeds=[0]), results) == {}
    Path("splits/few.toml").write_text('seen = ["dog"]')
    assert ("neither", "few", 0) not in matching_results(study, results)
    assert ("neither", "many", 0) in matching_results(study, results)


def test_recorded_elsewhere_counts_as_done_unless_reproduced(project: Path) -> None:
    study = load_study("study", seeds=[0])
    run(study)
    os.rename("runs", "gone")
    assert run(study) == []
    recorded = latest(read(Path("results.jsonl")))
    statuses = [run_status(item, recorded) for item in plan(study)]
    assert all(status.state == "recorded" for status in statuses)
    # A new row needs the pretraining's weights, which no record holds; the other rows are not trained again.
    without_full = {key: value for key, value in recorded.items() if value.row != "full"}
    assert [item.label for item in runs_to_do(plan(study), without_full, reproduce=False)] == ["pretrain-s0", "full-s0"]
    assert len(run(study, reproduce=True)) == 5
    assert run(study, reproduce=True) == []
    assert len(read(Path("results.jsonl"))) == 10
    assert len(latest(read(Path("results.jsonl")))) == 5


def test_a_finished_run_is_recorded_even_if_its_parent_was_killed(project: Path) -> None:
    study = load_study("study", seeds=[0])
    run(study)
    Path("results.jsonl").unlink()
    assert run(study) == []
    assert len(read(Path("results.jsonl"))) == 5


def test_the_same_run_of_two_studies_is_trained_once(project: Path) -> None:
    run(load_study("study", seeds=[0]))
    Path("experiments/second.toml").write_text(STUDY)
    second = load_study("second", seeds=[0])
    assert run(second) == []
    assert not Path("runs/second").exists()
    found: dict[Any, Result] = matching_results(second, read(Path("results.jsonl")))
    assert {result.study for result in found.values()} == {"second"}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "fail",
            r"neither-few-s0: val\.json: annotation 3 is broken \(log: runs/study/neither-few-s0-\w+/output\.txt\)",
        ),
        ("crash", r"neither-few-s0: it ended with RuntimeError: out of luck \(log: "),
        ("silent", r"neither-few-s0: .*result\.json: the run ended without a readable result"),
    ],
)
def test_a_failing_run_is_told_and_the_others_are_finished(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: str, told: str
) -> None:
    study = load_study("study", seeds=[0])
    monkeypatch.setenv("FAKE", f"{kind}:neither-few")
    with pytest.raises(UserError, match="1 of the study's runs failed: " + told):
        run(study, jobs=2)
    assert {result.row for result in read(Path("results.jsonl"))} == {"pretrain", "neither", "boxes", "full"}
    assert len(read(Path("results.jsonl"))) == 4
    monkeypatch.delenv("FAKE")
    assert run(study) == ["neither-few-s0"]


def test_what_starts_from_a_failed_run_is_not_begun(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "fail:pretrain")
    with pytest.raises(UserError, match="1 of the study's runs failed; 4 runs that start from them were not begun"):
        run(load_study("study", seeds=[0]))


@pytest.mark.parametrize(
    ("number", "launch"),
    [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, ROOT / "experiments/launch/one_gpu.yaml")],
)
def test_interrupting_saves_and_the_same_command_continues(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, launch: Path | None
) -> None:
    study = load_study("study", seeds=[0])
    monkeypatch.setenv("FAKE", "slow:neither-few")
    slow = next(item for item in plan(study) if item.label == "neither-few-s0")

    def interrupt_when_it_trains() -> None:
        while last_step(slow.folder / "log.jsonl") is None:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    handlers = signal.getsignal(number)
    threading.Thread(target=interrupt_when_it_trains, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="the same command continues"):
        run(study, launch=LaunchFile(launch))
    assert signal.getsignal(number) == handlers
    assert not psutil.pid_exists(first_call(slow)["pid"])
    assert run_status(slow, {}).state == "started"
    assert (run_status(slow, {}).step, run_status(slow, {}).steps) == (1, 3)
    monkeypatch.delenv("FAKE")
    assert run(study)[0] == "neither-few-s0"
    calls = [json.loads(line) for line in (slow.folder / "calls.jsonl").read_text().splitlines()]
    assert [call.get("start") for call in calls] == [0, 1, None]


def test_signals_that_come_together_are_one_and_a_second_one_acts_at_once() -> None:
    """As when a batch system signals a launcher and its processes, and the launcher passes its own signal on."""
    with StopOnSignal() as stop, pytest.MonkeyPatch.context() as patch:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now + TOGETHER_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # does not disturb what the second one has begun


def test_a_run_that_is_being_trained_is_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the study that began it was killed: the process that trains it holds the lock."""
    study = load_study("study", seeds=[0])
    pretrain = plan(study)[0]
    monkeypatch.setenv("FAKE", "slow:pretrain")
    code = "import test_study as t\nfrom semiseg.studies.file import load_study\nt.run(load_study('study', seeds=[0]))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        while last_step(pretrain.folder / "log.jsonl") is None:
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        before = {path.name: path.read_bytes() for path in pretrain.folder.iterdir() if path.is_file()}
        with pytest.raises(UserError, match="another process is training this run"):
            run(study)
        assert {path.name: path.read_bytes() for path in pretrain.folder.iterdir() if path.is_file()} == before
    finally:
        parent.kill()
        os.kill(first_call(pretrain)["pid"], signal.SIGKILL)


def test_what_a_run_started_is_ended_even_if_its_launcher_is_gone(project: Path) -> None:
    """A launcher that was killed says so, and its process, in a session of its own, does not go on."""
    study = load_study("study", seeds=[0])
    script = Path("launcher.py")
    script.write_text(
        "import os, pathlib, signal, subprocess, sys\n"
        "code = 'import time; time.sleep(600)'\n"
        "started = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "pathlib.Path('pid').write_text(str(started.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    told = r"pretrain-s0: killed by SIGKILL \(killed\): the memory was probably not enough \(log: runs/.*output\.txt\)"
    with pytest.raises(UserError, match=told):
        run(study, command=(sys.executable, str(script)))
    pid = int(Path("pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# What accelerate's launcher writes of two processes of which the second died.
LAUNCHED = """
Traceback (most recent call last):
  File "launch.py", line 1033, in launch_command
    multi_gpu_launcher(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
semiseg FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : machine
  rank      : 0 (local_rank: 0)
  exitcode  : {} (pid: 11)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 12) (SIGNAL)
============================================================
"""
LOST = '[rank0]: Traceback (most recent call last):\n[rank0]:   File "a"\n[rank0]: RuntimeError: Connection closed\n'


@pytest.mark.parametrize(
    ("code", "output", "told"),
    [
        (-signal.SIGSEGV, "semiseg: a warning\n", "killed by SIGSEGV (segmentation fault)"),
        (-signal.SIGBUS, "", "killed by SIGBUS (bus error)"),
        (-40, "", "killed by signal 40 (real-time signal 6)"),
        (1, LOST + LAUNCHED.format(1, -11), "killed by SIGSEGV (segmentation fault)"),
        (1, LAUNCHED.format(-9, -15), "killed by SIGKILL (killed): the memory was probably not enough"),
        (1, "semiseg: x.json: broken\n" + LOST + LAUNCHED.format(2, 1), "x.json: broken"),
        (1, "semiseg: x.json: broken\nsemiseg: interrupted\n" + LAUNCHED.format(130, 2), "x.json: broken"),
        (1, LOST.replace("rank0", "rank1").replace("Connection closed", "no luck") + LOST + LAUNCHED.format(1, 1),
         "it ended with RuntimeError: no luck"),
        (1, "semiseg: a warning\n" + LOST + "\nDuring handling ...\n" + LOST.replace("Runtime", "Value"),
         "it ended with ValueError: Connection closed"),
        (130, "semiseg: stopped after step 3 of 9\n", "stopped after step 3 of 9"),
        (2, "1 %\r2 %\rsemiseg: a\u2028b\x85c/x.json: broken\n", "a\u2028b\x85c/x.json: broken"),
        (3, "one\ntwo\n", "one | two"),
        (3, "", "it ended with exit code 3 without a word"),
    ],
)  # fmt: skip
def test_why_a_run_failed_is_a_sentence(code: int, output: str, told: str) -> None:
    assert reason(code, output) == told


def test_a_report_with_the_data_at_hand_measures_nothing(project: Path) -> None:
    """Nor does it import what would: torch."""
    run(load_study("study", seeds=[0]))
    code = "import sys; sys.modules['torch'] = None; from semiseg.cli import app; app(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "report", "study", "--seeds", "0", "--out", "."]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("report.md").is_file()


def test_a_split_that_changed_during_training_is_not_recorded(project: Path) -> None:
    study = load_study("study", seeds=[0])
    planned: list[PlannedRun] = plan(study, only=["neither"])
    Path("splits/few.toml").write_text('seen = ["dog"]')
    with pytest.raises(UserError, match=r"the class split 'few' was changed while the run trained"):
        run_missing(planned, name="x", results=Path("results.jsonl"), how=execution(), stream=io.StringIO())
    assert {result.split for result in read(Path("results.jsonl"))} == {None, "many"}


def test_progress_without_a_terminal_is_a_line_now_and_then(project: Path) -> None:
    study = load_study("study", ["optim.steps=30"], seeds=[0])
    stream = io.StringIO()
    run_missing(plan(study), name="study", results=Path("r.jsonl"), how=execution(jobs=2), stream=stream)
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("semiseg: ") for line in lines)
    assert any("of 5 runs done, about " in line and " left; " in line and " of 30" in line for line in lines)
    assert sum(" done in " in line and "mask AP 10.0, box AP 10.0" in line for line in lines) == 5


def test_progress_on_a_terminal_is_a_bar(project: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    children: list[Any] = [
        SimpleNamespace(run=item) for item in plan(load_study("study", ["optim.steps=30"], seeds=[0]))
    ]
    progress = StudyProgress([child.run for child in children], name="study", line_seconds=60, stream=stream)
    progress.update(children[:1])
    for child in children[:4]:
        child.run.folder.mkdir(parents=True)
        for step in (10, 20):
            (child.run.folder / "log.jsonl").write_text(json.dumps({"step": step, "steps": 30}) + "\n")
            progress.update([child])
        progress.end(child, message=f"{child.run.label} done", finished=True)
    progress.update(children[4:])
    progress.close()
    text = stream.getvalue()
    assert "━" in text
    assert "study: 0 of 5 runs done; pretrain-s0 starts" in text
    assert re.search("study: 0 of 5 runs done, about .* left; pretrain-s0 step 20 of 30", text)
    assert "semiseg: pretrain-s0 done\n" in text
    assert re.search("study: 4 of 5 runs done, about .* left; .* starts", text)


def test_the_last_whole_log_line_counts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert last_step(log) is None
    log.write_text('{"step": 1, "steps": 9}\n{"step": 2, "steps": 9}\n{"validation": 3}\n{"step": 3, "st')
    assert last_step(log) == (2, 9)


def test_several_processes_go_through_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; ours must start two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "told = [os.environ[name] for name in ('WORLD_SIZE', 'ACCELERATE_USE_CPU', 'OMP_NUM_THREADS')]\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(' '.join(told))\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not pathlib.Path(sys.argv[1], '0').exists():\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), 11)\n"
    )
    share = share_of(Machine(cores=4, gpus=()), slot=0, side_by_side=1, launch=LaunchFile(processes=2))
    assert share == Share(LaunchFile(processes=2), threads=2, gpus=())
    command = launch_command((sys.executable, str(script)), [str(tmp_path)], share=share)
    done = subprocess.run(command, env=child_environment(share, threads=0), capture_output=True, text=True)
    assert reason(done.returncode, done.stderr) == "killed by SIGSEGV (segmentation fault)"
    assert {(tmp_path / rank).read_text() for rank in ("0", "1")} == {"2 true 1"}


def test_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Machine(cores=16, gpus=("0", "1", "2", "3"))
    one, two = LaunchFile(), LaunchFile(processes=2)
    assert [share_of(gpus, slot=slot, side_by_side=2, launch=two).gpus for slot in (0, 1)] == [("0", "1"), ("2", "3")]
    assert share_of(gpus, slot=5, side_by_side=8, launch=one) == Share(one, 2, ("1",))
    assert share_of(Machine(2, ()), slot=0, side_by_side=4, launch=one).threads == 1
    with pytest.raises(UserError, match="--processes 5: there are 4 GPUs"):
        share_of(gpus, slot=0, side_by_side=1, launch=LaunchFile(processes=5))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child_environment(Share(one, 4, ("2", "3")), threads=0)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert child_environment(Share(one, 4, ()), threads=0)["OMP_NUM_THREADS"] == "4"
    assert child_environment(Share(one, 4, ()), threads=3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert child_environment(Share(one, 4, ()), threads=0)["OMP_NUM_THREADS"] == "2"


def test_durations_for_people() -> None:
    assert [format_seconds(s) for s in (3.2, 89, 200, 3600 * 2 + 300)] == ["3 s", "89 s", "3 min", "2 h 05 min"]


@pytest.mark.parametrize(("name", "count"), [("shapes", 11), ("coco_voc_splits", 10)])
def test_shipped_studies_ask_for_the_rows_of_tables_6_and_7(name: str, count: int) -> None:
    study = load_study(name)
    runs = study_runs(study)
    assert len(runs) == count * len(study.seeds)
    assert [table.number for table in study.tables] == [6, 7]
    rows = ["neither", "projection", "projection+pairwise", "learned", "box-supervised", "full-masks"]
    assert [table.rows for table in study.tables] == [rows, rows]
    boxes = {run.row: run.config.objective.box for run in runs}
    wanted = ["none", "projection", "projection+pairwise", "projection+learned", "projection+pairwise"]
    assert [boxes[row] for row in rows[:5]] == wanted
    sources = {run.row: run.config.supervision.source for run in runs}
    assert [sources[row] for row in rows] == ["split", "split", "split", "split", "boxes", "masks"]


def test_a_line_of_progress_without_running_ones_tells_how_many_are_done() -> None:
    progress = StudyProgress([], name="table", line_seconds=1, stream=io.StringIO())
    assert progress._line([]) == "table: 0 of 0 runs done"


def test_a_row_of_before_may_say_its_terms(tmp_path: Path) -> None:
    """Reports read them off the configuration; what an old study file says of them is passed over."""
    rows = (
        '[[rows]]\nname = "a"\nprojection = true\npairwise = false\n[[tables]]\nname = "t"\ntitle = "t"\nrows = ["a"]\n'
    )
    (tmp_path / "old.toml").write_text('title = "old"\nbase = "shapes"\n' + rows)
    assert [row.name for row in load_study(str(tmp_path / "old.toml")).rows] == ["a"]
