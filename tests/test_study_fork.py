"""Runs that start as forks of one process are what they would be as commands."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from semiseg.results import read
from semiseg.study import load_study
from semiseg.study_child import Machine, Share, child_environment, forks, python_command
from semiseg.study_fork import ForkedRun, can_fork
from semiseg.study_plan import plan
from semiseg.study_run import Execution, run_missing
from tests.tiny import TINY, tiny_config

pytestmark = pytest.mark.skipif(not can_fork(), reason="forking is safe on Linux alone")
MACHINE = Machine(cores=1, gpus=())
SHARE = Share(processes=1, threads=1, gpus=())


def study_text(base: dict) -> str:
    """A study of one row from a pretraining, its base in TOML's inline form."""
    tables = "".join(f"[base.{name}]\n{''.join(lines(values))}" for name, values in base.items())
    rows = '[pretrain]\noptim.steps = 2\n[[rows]]\nname = "full"\nset = { supervision.source = "masks" }\n'
    table = '[[tables]]\nname = "t"\ntitle = "T"\nrows = ["full"]\n'
    return f'title = "T"\nquestion = "Q?"\nseeds = [0]\n{tables}{rows}{table}'


def lines(values: dict) -> list[str]:
    return [
        f"{name} = {{ {', '.join(f'{k} = {json.dumps(v)}' for k, v in value.items())} }}\n"
        if isinstance(value, dict)
        else f"{name} = {json.dumps(value)}\n"
        for name, value in values.items()
    ]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def forked(folder: Path, arguments: list[str], inherited: int) -> ForkedRun:
    environment = child_environment(SHARE, threads=0)
    return ForkedRun(arguments, environment=environment, output=folder / "output.txt", inherited=inherited)


def test_only_single_processes_without_a_gpu_are_forked() -> None:
    assert forks(SHARE)
    assert not forks(Share(processes=2, threads=1, gpus=()))
    assert not forks(Share(processes=1, threads=1, gpus=("0",)))
    assert not forks(Share(processes=1, threads=1, gpus=(), launch=Path("launch.yaml")))


def test_a_fork_computes_what_a_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {name: values for name, values in TINY.items() if name != "supervision"}
    found = {}
    for kind, command in (("fork", None), ("command", python_command())):
        project = tmp_path / kind
        (project / "experiments").mkdir(parents=True)
        text = study_text({**base, "data": {**base["data"], "root": str(tmp_path / "data")}})
        (project / "experiments" / "s.toml").write_text(text)
        monkeypatch.chdir(project)
        planned = plan(load_study("s"))
        how = Execution(command=command, machine=MACHINE, poll_seconds=0.02)
        run_missing(planned, name="s", results=Path("results.jsonl"), how=how)
        row = planned[-1].folder
        assert "mask AP" in (row / "output.txt").read_text()
        result = json.loads((row / "result.json").read_text())
        files = [(row / name).read_bytes() for name in ("model/model.safetensors", "detections.json", "config.json")]
        found[kind] = (result["metrics"], result["command"], result["device"], files)
        assert len(read(Path("results.jsonl"))) == 2
    assert found["fork"] == found["command"]


def test_a_fork_ends_with_the_sentence_and_code_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "lock").open("wb") as lock:
        run = forked(tmp_path, ["train", "missing.toml", "--out", "run"], lock.fileno())
    assert run.wait() == run.poll() == 2
    assert (tmp_path / "output.txt").read_text().startswith("semiseg: missing.toml: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fork_is_stopped_by_signals_and_holds_its_lock_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "data", optim={"steps": 10_000})
    (tmp_path / "run.json").write_text(config.model_dump_json())
    lock = (tmp_path / "lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    run = forked(tmp_path, ["train", "run.json", "--out", "run"], lock.fileno())
    lock.close()
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    assert run.poll() is None
    assert os.getpgid(run.pid) == run.pid, "Ctrl-C in the terminal reaches the study alone"
    with (tmp_path / "lock").open("wb") as second:
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.send_signal(number)
        assert run.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if number == signal.SIGINT:
        assert list((tmp_path / "run" / "checkpoints").iterdir())
