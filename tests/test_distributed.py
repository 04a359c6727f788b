"""Two processes (gloo) give the losses, gradients and detections of one, and stop together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from semiseg.engine.build import build_data
from tests.tiny import tiny_config

PROJECT = Path(__file__).parent.parent


def launch(root: Path, out: Path, *, processes: int) -> dict[str, Any]:
    # accelerate's `--cpu` would start one process without a word; without a GPU `--multi_gpu` means gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["-m", "tests.distributed_worker", str(root), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    build_data(tiny_config(folder))  # generated once, before two processes ask for it
    results = [launch(folder, folder / f"{processes}.pt", processes=processes) for processes in (1, 2)]
    assert [result["processes"] for result in results] == [1, 2]
    return results


@pytest.mark.parametrize("case", ["all", "empty"])
def test_two_processes_give_the_losses_and_gradients_of_one(one_and_two: list[dict[str, Any]], case: str) -> None:
    one, two = (result[case] for result in one_and_two)
    torch.testing.assert_close(two["numbers"], one["numbers"], rtol=1e-6, atol=1e-7)
    assert float(one["gradient"].abs().max()) > 1e-3
    difference = float((two["gradient"] - one["gradient"]).abs().max())
    assert difference <= 1e-6 * float(one["gradient"].abs().max())


def test_the_empty_rank_changes_something(one_and_two: list[dict[str, Any]]) -> None:
    one = one_and_two[0]
    assert not torch.allclose(one["all"]["numbers"], one["empty"]["numbers"])


def test_detections_are_gathered_once_per_image(one_and_two: list[dict[str, Any]]) -> None:
    one, two = (result["detections"] for result in one_and_two)
    assert len({item["image_id"] for item in one}) == 4
    assert two == one
    assert [sorted(result["image_ids"]) for result in one_and_two] == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_the_update(
    one_and_two: list[dict[str, Any]],
) -> None:
    stopped = one_and_two[1]["stopped"]
    assert stopped["unchanged"] == [True, True]
    assert len(set(stopped["sentences"])) == 1
    assert "classification nan" in stopped["sentences"][0]
    assert "_rank1.pt" in stopped["sentences"][0]
