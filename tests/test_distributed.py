"""Two processes (gloo) give the losses, gradients and detections of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from semiseg.engine.build import build_data
from tests.tiny import tiny_config

PROJECT = Path(__file__).parent.parent


def launch(root: Path, out: Path, *, processes: int, empty_rank: int | None) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", str(port)]
    command += ["-m", "tests.distributed_worker", str(root), str(out)]
    command += [] if empty_rank is None else [str(empty_rank)]
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("empty_rank", [None, 1], ids=["all", "one rank without instances"])
def test_two_processes_equal_one(tmp_path: Path, empty_rank: int | None) -> None:
    build_data(tiny_config(tmp_path))  # generated once, before two processes ask for it
    one, two = (
        launch(tmp_path, tmp_path / f"{processes}.pt", processes=processes, empty_rank=empty_rank)
        for processes in (1, 2)
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["numbers"], one["numbers"], rtol=1e-6, atol=1e-7)
    assert float(one["gradient"].abs().max()) > 1e-3
    difference = float((two["gradient"] - one["gradient"]).abs().max())
    assert difference <= 1e-6 * float(one["gradient"].abs().max())
    assert two["detections"] == one["detections"]
    assert len({item["image_id"] for item in one["detections"]}) == 4
