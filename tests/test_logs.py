"""What a training shows while it runs: a bar, plain lines, or nothing."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semiseg.engine import logs
from semiseg.engine.logs import TrainingLog
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from tests.tiny import tiny_config


def shown(
    out: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    progress: bool | None,
    seconds: float,
) -> str:
    """Standard error of a run of steps 41 to 50 that takes so many seconds a step and logs every fifth."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with TrainingLog(out, steps=50, start_step=40, tensorboard=False, progress=progress) as log:
        for step in range(41, 51):
            now[0] += seconds
            log.advance()
            if step % 5 == 0:
                weighted = {"box": 1.0, "mask": step / 100}
                log.write(
                    {
                        "step": step,
                        "seconds": 1.0,
                        "losses": weighted,
                        "weighted": weighted,
                        "images_per_second": 12.345,
                    }
                )
    return capfd.readouterr().err


def test_without_a_terminal_a_line_a_minute(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first after 5 s, the next ones 60 s later, with what the last record says: steps of 21 s, 1, 4, 7 and 10.
    assert shown(tmp_path, capfd, monkeypatch, progress=None, seconds=21.0).splitlines() == [
        "step 41 of 50, about 3 min left",
        "step 44 of 50, about 2 min left",
        "step 47 of 50, loss 1.450, 12.3 images/s, about 63 s left",
        "step 50 of 50, loss 1.450, 12.3 images/s, about 0 s left",
    ]
    assert shown(tmp_path, capfd, monkeypatch, progress=None, seconds=0.4) == ""  # over before the first line


def test_no_progress_says_nothing_and_progress_draws_a_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(tmp_path, capfd, monkeypatch, progress=False, seconds=21.0) == ""
    bar = shown(tmp_path, capfd, monkeypatch, progress=True, seconds=21.0)
    assert re.search(r"\d+%.*\| 50/50 ", bar)
    assert "step 41 of 50" not in bar


def test_on_a_terminal_a_bar_and_no_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "shows_bars", lambda progress: True)
    told = shown(tmp_path, capfd, monkeypatch, progress=None, seconds=21.0)
    assert "50/50" in told
    assert "step 41 of 50" not in told


def test_a_tracker_hears_the_configuration_and_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values, step: heard.append(("log", (step, values))), finish=lambda: heard.append(("finish", None))
    )

    def init(**how: Any) -> SimpleNamespace:
        heard.append(("init", how))
        return run

    update = SimpleNamespace(update=lambda values, **_: heard.append(("config", values)))
    wandb = SimpleNamespace(init=init, config=update)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_config(
        tmp_path, optim={"steps": 3}, runtime={"trackers": ["wandb"], "log_every": 2, "evaluate_every": 2}
    )
    assert config.identity() == tiny_config(tmp_path, optim={"steps": 3}).identity()
    with pytest.raises(UserError, match=r"runtime\.trackers: 'wandb' is not installed: pip install wandb"):
        execute_run(config, out=tmp_path / "run", progress=False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard", "wandb"])
    execute_run(config, out=tmp_path / "run", progress=False)
    kinds = [kind for kind, _ in heard]
    assert kinds == ["init", "config", "log", "log", "log", "finish"]
    assert heard[0][1] == {"project": "semiseg", "name": "run"}
    assert heard[1][1]["optim.steps"] == "3"
    assert [step for _, (step, _) in heard[2:5]] == [2, 2, 3]
    assert {"losses/dice", "weighted/dice", "learning_rate", "images_per_second"} <= set(heard[2][1][1])
    assert {"validation/mask_AP", "validation/loss"} <= set(heard[3][1][1])
    assert all(isinstance(value, int | float) for _, (_, values) in heard[2:5] for value in values.values())
