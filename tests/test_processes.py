"""The batch and learning-rate rule: what changes with the number of processes, and what does not."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from semiseg.config import RunConfig, RuntimeConfig
from semiseg.config.read import parse_config
from semiseg.engine.processes import describe_change, fit_to_processes, images_in_evaluation, parts_per_step
from semiseg.engine.run import execute_run
from semiseg.engine.session import describe_crowding, start_accelerator
from semiseg.errors import UserError
from tests.tiny import tiny_config

PROJECT = Path(__file__).parent.parent
LAUNCH = PROJECT / "experiments" / "launch"


def config(**sections: dict[str, Any]) -> RunConfig:
    return parse_config(RunConfig, {"optim": {"steps": 90_000}, **sections}, where="test")


def linear(images: int, **optim: object) -> RunConfig:
    runtime = {"batch_rule": "linear", "images_per_process": images}
    return config(optim={"steps": 90_000, **optim}, runtime=runtime)


@pytest.mark.parametrize(
    ("images", "accumulation", "processes", "parts"),
    [
        (0, 1, 1, 1),  # no limit: 16 images at once
        (0, 2, 4, 2),
        (2, 1, 8, 1),  # the paper's: 8 x 2
        (2, 1, 4, 2),
        (2, 1, 1, 8),
        (3, 1, 4, 2),  # 4 images: 3 do not cut them equally, 2 do
        (5, 1, 1, 4),
        (1, 1, 2, 8),
        (8, 4, 1, 4),  # what is asked for is enough
        (16, 1, 16, 1),
    ],
)
def test_keep_cuts_the_share_of_a_process_into_equal_parts_that_fit(
    images: int, accumulation: int, processes: int, parts: int
) -> None:
    run = config(optim={"steps": 5, "accumulation": accumulation}, runtime={"images_per_process": images})
    assert parts_per_step(run, processes) == parts
    assert 16 % (parts * processes) == 0
    assert fit_to_processes(run, processes) is run
    assert run.identity() == config(optim={"steps": 5, "accumulation": accumulation}).identity()
    assert describe_change(run, fit_to_processes(run, processes), processes) is None


@pytest.mark.parametrize(
    ("accumulation", "processes", "told"),
    [
        (1, 3, "optim.batch_size = 16 has no equal shares for 3 processes: take 2 or 4 of them, or set "
               "optim.batch_size to a multiple of 3, or runtime.batch_rule = 'linear' with runtime.images_per_process"),
        (1, 24, "for 24 processes: take 16 of them, or set optim.batch_size to a multiple of 24"),
        (4, 8, "for 8 processes in 4 parts each: take 4 of them, or set optim.batch_size to a multiple of 32"),
    ],
)  # fmt: skip
def test_a_batch_without_equal_shares_is_refused_with_the_ways_out(
    accumulation: int, processes: int, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        parts_per_step(config(optim={"steps": 5, "accumulation": accumulation}), processes)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("processes", "batch", "rate", "steps"), [(4, 8, 0.005, 180_000), (16, 32, 0.02, 45_000), (7, 14, 0.00875, 102_858)]
)
def test_linear_keeps_the_images_and_scales_the_rate(processes: int, batch: int, rate: float, steps: int) -> None:
    run = linear(2)
    fitted = fit_to_processes(run, processes)
    assert (fitted.optim.batch_size, fitted.optim.steps) == (batch, steps)
    assert fitted.optim.learning_rate == pytest.approx(rate, rel=1e-12)
    # At least as many images, and less than a batch more.
    assert 0 <= steps * batch - 90_000 * 16 < batch
    assert parts_per_step(fitted, processes) == 1
    assert fitted.identity() != run.identity()
    assert fit_to_processes(fitted, processes) is fitted, "what is settled is not scaled again"
    assert parse_config(RunConfig, fitted.model_dump(), where="test") == fitted


def test_linear_on_the_processes_of_the_configuration_is_the_run_itself() -> None:
    run = linear(2)
    assert fit_to_processes(run, 8) is run
    assert run.identity() == config().identity()


def test_linear_scales_warm_ups_given_in_steps_and_leaves_what_follows_from_the_steps() -> None:
    run = linear(4, warmup_steps=1000, milestones=[0.5], accumulation=2)
    run = run.model_copy(update={"objective": run.objective.model_copy(update={"pairwise_warmup_steps": 10_001})})
    fitted = fit_to_processes(run, 8)
    assert (fitted.optim.steps, fitted.optim.warmup_steps, fitted.objective.pairwise_warmup_steps) == (
        45_000, 500, 5001,
    )  # fmt: skip
    assert (fitted.optim.milestones, fitted.optim.accumulation) == ([0.5], 2)
    assert parts_per_step(fitted, 8) == 2
    assert describe_change(run, fitted, 8) == (
        "runtime.batch_rule = 'linear', 8 processes, images_per_process = 4: optim.learning_rate 0.01 -> 0.02, "
        "optim.warmup_steps 1000 -> 500, optim.steps 90000 -> 45000, optim.batch_size 16 -> 32, "
        "objective.pairwise_warmup_steps 10001 -> 5001; "
        "this is another run than on other numbers of processes, with results of its own"
    )
    default = fit_to_processes(linear(4), 8)
    assert (default.optim.warmup_steps, default.objective.pairwise_warmup_steps) == (None, None)
    no_warmup = fit_to_processes(linear(4, warmup_steps=0), 8)
    assert no_warmup.optim.warmup_steps == 0


def test_linear_with_epochs_counts_them_as_they_are() -> None:
    run = linear(4, steps=None, epochs=12.0)
    fitted = fit_to_processes(run, 8)
    assert (fitted.optim.epochs, fitted.optim.steps) == (12.0, None)
    assert (run.optim.num_steps(117_266), fitted.optim.num_steps(117_266)) == (87_950, 43_975)


def test_linear_refuses_parts_that_do_not_divide_the_share() -> None:
    with pytest.raises(UserError, match=r"images_per_process = 3 must divide by optim\.accumulation = 2"):
        fit_to_processes(linear(3, accumulation=2), 8)


@pytest.mark.parametrize(("limit", "images"), [(0, 8), (2, 2), (8, 8), (64, 8)])
def test_images_in_evaluation(limit: int, images: int) -> None:
    assert images_in_evaluation(config(runtime={"images_per_process": limit}).runtime) == images


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("cpu", 1, 2), ("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("two_machines", 2, 16)],
)
def test_launch_files_are_accelerates_own(name: str, machines: int, processes: int) -> None:
    loaded = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert isinstance(loaded, ClusterConfig)
    assert (loaded.num_machines, loaded.num_processes) == (machines, processes)
    assert loaded.distributed_type.value == ("NO" if processes == 1 else "MULTI_GPU")
    assert loaded.mixed_precision == "no", "the precision is the configuration's: engine/session.py refuses another"
    assert (loaded.use_cpu, loaded.dynamo_config) == (False, {})
    # The default study batch can be shared by each of them.
    assert parts_per_step(config(), processes) == 1


def test_the_guard_looks_at_every_launch_file() -> None:
    assert sorted(path.name for path in LAUNCH.iterdir()) == [
        *("cpu.yaml", "eight_gpus.yaml", "one_gpu.yaml", "two_machines.yaml"),
    ]  # fmt: skip


def test_more_processes_than_the_machine_can_hold_are_told() -> None:
    assert describe_crowding(1, cores=1, gpus=0) is None
    assert describe_crowding(2, cores=2, gpus=0) is None
    assert describe_crowding(8, cores=4, gpus=8) is None  # one core may feed several GPUs
    assert (
        describe_crowding(4, cores=2, gpus=0) == "4 processes on 2 cores: they will wait for each other; take at most 2"
    )
    told = describe_crowding(2, cores=16, gpus=1)
    assert told == "2 processes on 1 GPU: one process uses one, so this fails or shares it; take at most 1"


def test_a_crowded_machine_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    with pytest.warns(UserWarning, match="^10000 processes on "):
        start_accelerator(RuntimeConfig(), seed=0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_accelerator(RuntimeConfig(), seed=0)


def test_a_run_under_linear_is_the_run_with_its_values_written_out(tmp_path: Path) -> None:
    runtime = {"batch_rule": "linear", "images_per_process": 2}
    # The configuration has batches of 4 at rate 0.01; one process of two images makes twice the steps at half the rate.
    scaled = tiny_config(tmp_path, optim={"steps": 1}, runtime=runtime)
    with pytest.warns(
        UserWarning, match=r"1 process, images_per_process = 2: .*steps 1 -> 2, optim\.batch_size 4 -> 2; "
    ):
        result = execute_run(scaled, out=tmp_path / "run", progress=False)
    assert result["steps"] == 2
    written = tiny_config(tmp_path, optim={"steps": 2, "batch_size": 2, "learning_rate": 0.005})
    assert execute_run(written, out=tmp_path / "run", progress=False) == result, "the finished run is this one"
    kept = tiny_config(tmp_path, optim={"steps": 1})
    with pytest.raises(UserError, match=r"holds another run \(its optim\.batch_size is 2, wanted 4\)"):
        execute_run(kept, out=tmp_path / "run", progress=False)


def test_the_documented_table_and_launch_files_are_the_real_ones() -> None:
    text = (PROJECT / "docs" / "MACHINES.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"(?m)^\| \d.*$", text)]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 8, 16, 24]
    keep = config(runtime={"images_per_process": 2})
    for gpus, images, parts, *scaled in rows:
        processes = int(gpus)
        fitted = fit_to_processes(linear(2), processes).optim
        values = (fitted.batch_size, fitted.learning_rate, fitted.steps)
        assert tuple(map(float, scaled)) == pytest.approx(values, rel=1e-12)
        if images == "refused":
            with pytest.raises(UserError):
                parts_per_step(keep, processes)
        else:
            assert (int(parts), int(images)) == (parts_per_step(keep, processes), 16 // processes // int(parts))
    named = set(re.findall(r"experiments/launch/\w+\.yaml", text))
    assert len(named) == 3
    assert all((PROJECT / name).is_file() for name in named)
