"""Two and four processes (gloo) give the losses, weights and detections of one, stop together and continue each other.

The images have one size and the mask branch's norm does not depend on the batch, or always sees the same images
together: then the way a step is cut into processes and parts changes nothing but the order of additions.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from semiseg.engine.build import build_data
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from tests.distributed_worker import CUTS, STEPS, cuts_of, group, member, small_run
from tests.forked import call_main
from tests.tiny import tiny_config

CASES = [(norm, processes, images) for processes in CUTS for norm, images in cuts_of(processes)]
GRADIENT = ("gradient", "gradient is not finite (1 parameters, first detector.class_logits.bias)")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the groups of 1, 2 and 4 processes returned."""
    folder = tmp_path_factory.mktemp("distributed")
    build_data(small_run(folder))  # generated once, before several processes ask for it
    for processes in CUTS:
        group(processes, member, processes, folder, outputs=folder)
    found = {number: torch.load(folder / f"{number}.pt", weights_only=False) for number in CUTS}
    assert [group["processes"] for group in found.values()] == [1, 2, 4]
    return found


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize(("norm", "processes", "images"), CASES)
def test_losses_and_weights_do_not_depend_on_processes_and_parts(
    groups: dict[int, dict[str, Any]], norm: str, processes: int, images: int
) -> None:
    reference = 2 if norm == "bn" else 0  # with bn, the same pairs of images must be normalised together
    one, other = groups[1]["steps"][norm, reference], groups[processes]["steps"][norm, images]
    assert (one["parts"], other["parts"]) == (4 if norm == "bn" else 1, 8 // processes // images if images else 1)
    assert one["losses"].shape[0] == STEPS
    # Products with the prototypes of an image are rounded by how many instances of it a process has.
    torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-5 if norm == "prototypes" else 1e-6, atol=1e-7)
    assert largest(other["weights"] - one["weights"]) <= 1e-6 * largest(one["weights"])
    if norm == "learned":
        torch.testing.assert_close(other["gate"], one["gate"], rtol=1e-6, atol=0)
        assert one["gate"][1:].sum() > 140


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_do_not_depend_on_processes(groups: dict[int, dict[str, Any]], processes: int) -> None:
    one, other = groups[1]["gradient"], groups[processes]["gradient"]
    assert largest(one) > 1e-3
    assert largest(other - one) <= 1e-6 * largest(one)


def test_the_steps_hold_the_mixtures_that_they_are_about(groups: dict[int, dict[str, Any]]) -> None:
    """In the groups, some processes have no instance, or none with a mask, while others do."""
    whole, last_empty, first_half_boxes, nothing_masked = groups[4]["steps"]["gn", 0]["held"]
    assert all(instances > masks > 0 for instances, masks in whole)
    assert [instances > 0 for instances, _ in last_empty] == [True, True, True, False]
    assert [masks > 0 for _, masks in first_half_boxes] == [False, False, True, True]
    assert all(instances > 0 for instances, _ in first_half_boxes)
    assert [instances > 0 for instances, _ in nothing_masked] == [False, False, True, True]
    assert sum(masks for _, masks in nothing_masked) == 0
    two, one = (groups[number]["steps"]["gn", 0]["held"] for number in (2, 1))
    assert [instances > 0 for instances, _ in two[3]] == [False, True]
    for step in range(STEPS):
        sums = [tuple(map(sum, zip(*held[step], strict=True))) for held in (one, two)]
        assert sums[0] == sums[1] == tuple(map(sum, zip(*groups[4]["steps"]["gn", 0]["held"][step], strict=True)))
    # The steps that lack something are other steps: a comparison of zeros would hold for anything.
    assert all(largest(loss) > 0.1 for loss in groups[1]["steps"]["gn", 0]["losses"])


@pytest.mark.parametrize("processes", [2, 4])
def test_detections_are_gathered_once_per_image_on_the_main_process(
    groups: dict[int, dict[str, Any]], processes: int
) -> None:
    one, several = groups[1], groups[processes]
    assert len({item["image_id"] for item in one["detections"]}) == 4
    assert several["detections"] == one["detections"]
    assert sorted(several["image_ids"]) == sorted(one["image_ids"]) == [1, 2, 3, 4]
    assert several["lengths"] == [(len(one["detections"]), 4)] + [(0, 0)] * (processes - 1)


def test_unequal_lists_reach_the_main_process_in_the_order_of_the_processes(groups: dict[int, dict[str, Any]]) -> None:
    assert groups[1]["gathered"] == [["0.0"]]
    everything = [f"{rank}.{number}" for rank in range(4) for number in range(rank + 1)]
    assert groups[4]["gathered"] == [everything, [], [], []]


def test_machines_that_do_not_share_the_folder_are_told_so(groups: dict[int, dict[str, Any]]) -> None:
    assert groups[1]["disagreement"] == ["they agree"]
    told = "runs/mine: not the same on every machine (found: step_0.pt, step_1.pt); share the folder"
    assert groups[2]["disagreement"] == [told, told]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_signal_to_one_process_reaches_all_at_the_one_place_where_a_host_waits(
    groups: dict[int, dict[str, Any]], processes: int
) -> None:
    signal = groups[processes]["signal"]
    assert signal["stop"] == [True] * processes
    assert signal["step"] == 1, "the step was finished"
    # One number, seen as a call of Python and as an operation; batches are sent, which waits for nothing.
    place = ("engine/train.py", "_on_any_rank")
    for waits in signal["waits"]:
        assert {key: n for key, n in waits.items() if key[2] != "to another device"} == {
            (*place, "__int__"): 1,
            (*place, "_local_scalar_dense"): 1,
        }


@pytest.mark.parametrize(("what", "told"), [("loss", "loss is not finite (classification nan"), GRADIENT])
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_not_finite_on_one_process_stops_all_before_the_update(
    groups: dict[int, dict[str, Any]], processes: int, what: str, told: str
) -> None:
    stopped = groups[processes]["stopped"][what]
    assert stopped["unchanged"] == [True] * processes
    assert len(stopped["sentences"]) == processes
    assert len(set(stopped["sentences"])) == 1
    assert told in stopped["sentences"][0]
    assert f"_rank{processes - 1}.pt" in stopped["sentences"][0]


def test_a_run_is_continued_on_other_processes(tmp_path: Path) -> None:
    """One process to the end; two processes in two parts each from its second step: the same run, the same weights."""
    config = tiny_config(tmp_path, runtime={"checkpoint_every": 2})
    execute_run(config, out=tmp_path / "whole", progress=False)
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "step_00000002.pt", cut / "checkpoints")
    shutil.copy(tmp_path / "whole" / "config.json", cut)
    command = [
        "train",
        str(cut / "config.json"),
        "--out",
        str(cut),
        "--resume",
        "--set",
        "runtime.images_per_process=1",
    ]
    group(2, call_main, "semiseg.__main__", *command, outputs=tmp_path)
    assert "after 4 steps" in (tmp_path / "2-0.txt").read_text()
    result = json.loads((cut / "result.json").read_text())
    assert (result["processes"], result["metrics"]["images"]) == (2, 4)
    assert result["command"] == shlex.join(["semiseg", *command])
    assert [line["step"] for line in read_log(cut / "log.jsonl")] == [3, 4]
    whole = read_log(tmp_path / "whole" / "log.jsonl")[2:]
    for mine, theirs in zip(read_log(cut / "log.jsonl"), whole, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-6, abs=1e-7)
        assert mine["counts"] == theirs["counts"]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
