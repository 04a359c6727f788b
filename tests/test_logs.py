"""What a training shows while it runs: a bar, plain lines, or nothing."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from semiseg.engine import logs
from semiseg.engine.logs import TrainingLog


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
