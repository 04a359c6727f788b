"""Studies on other numbers of processes and machines: which runs are meant, how they start, what one types."""

from __future__ import annotations

import io
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tomlkit
import torch
from safetensors.torch import load_file

from semiseg.commands.train import read_config
from semiseg.config.read import merge
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from semiseg.project import find
from semiseg.results import latest, read
from semiseg.studies.file import Study, load_study
from semiseg.studies.identity import PlannedRun, matching_results, plan
from semiseg.studies.machines import (
    LaunchFile,
    Machine,
    last_step,
    launch_command,
    lines_for_machines,
    read_launch_file,
    share_of,
)
from semiseg.studies.run import Execution, run_missing, runs_to_train
from semiseg.studies.status import read_result
from tests.distributed_worker import group
from tests.study_files import write_study
from tests.test_cli import call
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent
STEPS = 24

STUDY = """
title = "T"
question = "Q?"
[base]
data = { root = "coco", train_annotations = "train.json", val_annotations = "val.json" }
optim = { steps = 6, batch_size = 4, learning_rate = 0.5 }
[pretrain]
optim.batch_size = 8
[[rows]]
name = "boxes"
set = { supervision.source = "boxes" }
[[rows]]
name = "full"
set = { supervision.source = "masks" }
[[tables]]
name = "table"
title = "T"
rows = ["boxes", "full"]
"""
LINEAR = ("runtime.batch_rule=linear", "runtime.images_per_process=2")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study of one pretraining and two rows; the current folder of the test."""
    write_study(tmp_path, STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(planned: list[PlannedRun]) -> dict[str, str]:
    return {item.label: item.run_id for item in planned}


def train(item: PlannedRun) -> None:
    """Runs the stand-in of `semiseg train` as a line for a machine has it."""
    arguments = ["train", str(item.folder / "train.json"), "--out", str(item.folder), "--resume"]
    script = Path(__file__).parent / "fake_train.py"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), *arguments], check=True, env=environment)


def test_under_keep_the_processes_do_not_matter_without_batch_norm(project: Path) -> None:
    norm = "model.mask_head.branch_norm=gn"
    study = load_study("study", [norm])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(plan(study, processes=4)) == ids(plan(study)) == ids(plan(study, processes=2))
    few = load_study("study", [norm, "runtime.images_per_process=1"])
    assert ids(plan(few, processes=2)) == ids(plan(study))
    with pytest.raises(UserError, match="batch_size = 8 has no equal shares for 3 processes: take 2 or 4 of them"):
        plan(study, processes=3)


@pytest.mark.filterwarnings("ignore:runtime.batch_rule")  # each pytest.warns below looks for one of several
def test_under_linear_other_processes_mean_other_runs(project: Path) -> None:
    study, linear = load_study("study"), load_study("study", LINEAR)
    assert ids(plan(study, only=["full"]))["full-s0"] == ids(plan(study))["full-s0"]
    with pytest.warns(
        UserWarning, match=r"8 processes, images_per_process = 2: .*rate 0\.5 -> 2, optim\.steps 6 -> 2, .* 4 -> 16"
    ):
        eight = plan(linear, processes=8)
    assert set(ids(eight).values()).isdisjoint(ids(plan(study)).values())
    pretrain, boxes = eight[0], eight[1]
    assert (pretrain.config.optim.batch_size, pretrain.config.optim.steps) == (16, 3)
    assert (boxes.config.optim.batch_size, boxes.config.optim.learning_rate, boxes.config.optim.steps) == (16, 2.0, 2)
    assert boxes.config.init_from == str(pretrain.folder / "model")
    # Two processes of two images are the rows' own batch, but half of the pretraining's, which they start from.
    with pytest.warns(UserWarning, match=r"batch_size 8 -> 4"):
        two = plan(linear, processes=2)
    assert [item.config.optim.batch_size for item in two] == [4, 4, 4]
    assert two[1].config.optim.steps == 6
    assert two[1].run_id != plan(study)[1].run_id


@pytest.mark.filterwarnings("ignore:runtime.batch_rule")
def test_recorded_results_belong_to_the_processes_that_they_were_trained_on(project: Path) -> None:
    linear = load_study("study", LINEAR)
    planned = plan(linear, processes=4)
    lines_for_machines(planned, LaunchFile(Path("two.yaml"), 4, 2))
    results = []
    for item in planned:
        train(item)
        results.append(replace(read_result(item, typed=("semiseg",)), processes=4))

    def matched(study: Study, processes: int) -> list[str]:
        found = matching_results(study, [replace(result, processes=processes) for result in results])
        return sorted(result.row for result in found.values())

    assert matched(linear, 4) == ["boxes", "full", "pretrain"]
    assert matched(linear, 8) == []
    # Four processes of two images are what the pretraining's batch of eight is without the rule, too.
    assert matched(load_study("study"), 4) == ["pretrain"]


def test_a_launch_file_starts_each_run(project: Path) -> None:
    path = Path("mine.yaml")
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: 'no'\n")
    assert read_launch_file("mine.yaml") == LaunchFile(path, processes=4, machines=1)
    shipped = read_launch_file("eight_gpus")
    assert (shipped.path, shipped.processes, shipped.machines) == (find("launch", "eight_gpus"), 8, 1)
    eight = Machine(cores=16, gpus=tuple("01234567"))
    share = share_of(eight, slot=1, side_by_side=2, launch=read_launch_file("mine.yaml"))
    assert (share.gpus, share.threads) == (("4", "5", "6", "7"), 2)
    assert launch_command(("python", "-m", "semiseg"), ["train", "x"], share=share) == [
        "python", "-m", "accelerate.commands.launch", "--config_file", "mine.yaml", "-m", "semiseg", "train", "x",
    ]  # fmt: skip
    alone = share_of(eight, slot=1, side_by_side=2, launch=read_launch_file("one_gpu"))
    assert launch_command(("python", "-m", "semiseg"), ["train", "x"], share=alone) == [
        "python", "-m", "semiseg", "train", "x",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"mine\.yaml: num_processes 4: there are 2 GPUs"):
        share_of(Machine(8, ("0", "1")), slot=0, side_by_side=1, launch=read_launch_file("mine.yaml"))


def test_a_single_process_gets_what_its_launch_file_sets(project: Path) -> None:
    """It is started without accelerate's launcher, which would pass no signal on."""
    base = "distributed_type: 'NO'\nnum_processes: 1\n"
    for text, environment in (
        ("gpu_ids: all\nmixed_precision: 'no'", {"ACCELERATE_MIXED_PRECISION": "no"}),
        ("gpu_ids: 3\nmixed_precision: bf16", {"ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "3"}),
        ("use_cpu: true", {"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": ""}),
    ):
        Path("mine.yaml").write_text(base + text)
        assert read_launch_file("mine.yaml").environment == environment


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("num_processes: 2", "mine.yaml: accelerate does not take it as a configuration: "),
        ("distributed_type: [", "mine.yaml: accelerate does not take it as a configuration: "),
        ("distributed_type: MULTI_GPU", r"num_processes -1 must be a positive multiple of num_machines 1"),
        (
            "distributed_type: MULTI_GPU\nnum_processes: 9\nnum_machines: 2",
            "num_processes 9 must be a positive multiple",
        ),
        ("distributed_type: FSDP\nnum_processes: 2", "distributed_type is 'FSDP'; allowed: 'NO', 'MULTI_GPU', "),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", "num_processes 2 needs distributed_type MULTI_GPU"),
        ("distributed_type: 'NO'\nnum_processes: 2", "num_processes 2 needs distributed_type MULTI_GPU"),
    ],
)
def test_a_launch_file_that_is_none_is_told_in_a_sentence(project: Path, text: str, told: str) -> None:
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_launch_file("mine")
    assert "\n" not in str(caught.value)


def test_several_machines_are_told_what_to_type_and_the_study_records_what_has_ended(project: Path) -> None:
    Path("two.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2\nmain_process_ip: 192.0.2.1\n"
    )
    results, planned = Path("reports/study/results.jsonl"), plan(load_study("study"), processes=4)
    _, after, *lines = call("run", "study", "--launch", "two.yaml").splitlines()
    assert after == "# afterwards the same 'semiseg run' records them and reports"
    assert len(lines) == 3
    for line, item in zip(lines, planned, strict=True):
        folder = str(item.folder)
        assert shlex.split(line) == [
            "accelerate", "launch", "--config_file", "two.yaml", "--machine_rank", "RANK",
            "-m", "semiseg", "train", f"{folder}/train.json", "--out", folder, "--resume",
        ]  # fmt: skip
        train(item)
    how = Execution(launch=read_launch_file("two.yaml"), typed=("semiseg", "run"))
    assert runs_to_train(planned, results=results, how=how) == []
    assert set(latest(read(results))) == {item.run_id for item in planned}


def test_processes_are_said_once(project: Path) -> None:
    told = call("run", "study", "--launch", "eight_gpus", "--processes", "2", code=2)
    assert "--processes 2: the number of processes is that of --launch eight_gpus; give one of the two" in told


def undisturbed(file: Path) -> None:
    """One process of a training that nothing stops, without a launcher."""
    execute_run(read_config(file, []), out=Path("whole"), progress=False)


def test_an_interrupted_study_of_two_processes_leaves_none_and_continues_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real training, started by the real launcher, by a number and by a file; each process with a worker."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value)
    base = merge(TINY, {"data": {"root": "data"}, "optim": {"steps": STEPS}, "runtime": {"workers": 1}})
    table = {"name": "table", "title": "T", "split": "few", "rows": ["row"]}
    study = {"title": "T", "base": base, "rows": [{"name": "row"}], "splits": {"few": "shapes_few_seen"}}
    Path("experiments").mkdir()
    Path("experiments/study.toml").write_text(tomlkit.dumps({**study, "tables": [table]}))
    planned = plan(load_study("study"), processes=2)
    folder = planned[0].folder

    command = [sys.executable, "-m", "semiseg", "run", "study", "--processes", "2"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while last_step(folder / "log.jsonl") is None:
            assert started.poll() is None
            time.sleep(0.02)
        processes = psutil.Process(started.pid).children(recursive=True)
        started.send_signal(signal.SIGINT)
        _, told = started.communicate()
    finally:
        started.kill()
    assert (started.returncode, len(processes) >= 5) == (130, True), told  # the launcher, two that train, two that load
    assert "semiseg: stopped; the same command continues where it ended" in told
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    (saved,) = [int(path.stem.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*.pt")]
    assert saved < STEPS
    assert f"stopped after step {saved} of {STEPS}" in (folder / "output.txt").read_text()

    how = Execution(launch=read_launch_file("cpu"), machine=Machine(2, ()))
    run_missing(planned, name="study", results=Path("results.jsonl"), how=how, stream=io.StringIO())
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == list(range(1, STEPS + 1))
    group(2, undisturbed, folder / "train.json", outputs=tmp_path, folder=tmp_path)
    weights, whole = (load_file(path / "model" / "model.safetensors") for path in (folder, Path("whole")))
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
