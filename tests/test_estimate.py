"""The dry run: which runs it lists, and where its hours come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from semiseg import study_estimate
from semiseg.cli import app
from semiseg.commands.study_dry_run import two_digits
from semiseg.config import RunConfig
from semiseg.config_files import merge, parse_config
from semiseg.engine import estimate
from semiseg.engine.estimate import StepTime, made_up_batch, measure_step, step_key
from semiseg.engine.run import device_name
from semiseg.structures.inputs import Supervision
from semiseg.study import load_study
from semiseg.study_estimate import estimate_steps
from semiseg.study_plan import plan
from tests.study_files import add_study_data
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent


def here() -> str:
    """This machine's name in results, which has the number of threads: other tests change that."""
    return device_name(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def coco_config(**sections: Any) -> RunConfig:
    return parse_config(RunConfig, sections, where="test")


def test_a_real_step_of_the_tiny_run_is_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    step = measure_step(config, num_classes=12, processes=1, seconds=20)
    assert (step.images, step.device, step.how) == (4, here(), "")
    assert list(tmp_path.iterdir()) == []
    compiled = measure_step(tiny_config(tmp_path, runtime={"compile": True}), num_classes=12, processes=1, seconds=0)
    assert compiled.how == "not compiled"


@pytest.mark.parametrize("source", ["boxes", "masks", "split", "as_annotated"])
def test_made_up_batches_have_the_configured_sizes_and_supervision(source: str) -> None:
    supervision = {"source": source} | ({"split": "coco_voc20_seen"} if source == "split" else {})
    config = coco_config(supervision=supervision, data={"short_sides": [96, 128], "long_side": 160})
    batch = made_up_batch(config, images=12, shrink=1, seed=3)
    sizes = batch.image_sizes_hw
    assert set(sizes.amin(1).tolist()) <= {96, 120}, "128 would make the long side 171"
    assert int(sizes.amax()) <= 160
    assert batch.images.shape[0] == 12
    assert all(side % 32 == 0 for side in batch.images.shape[2:])
    assert 0 < int((sizes[:, 0] > sizes[:, 1]).sum()) < 6, "most images are wider than high"
    targets = batch.targets
    assert targets is not None
    assert targets.num_instances == 12 * 7
    shown = sizes[targets.image_index]
    assert (targets.boxes_xyxy[:, 2:] <= shown.flip(1)).all()
    assert (targets.boxes_xyxy[:, 2:] > targets.boxes_xyxy[:, :2]).all()
    with_mask = int((targets.supervision == Supervision.MASK).sum())
    assert with_mask == len(targets.masks) == {"boxes": 0, "masks": 84, "split": 48, "as_annotated": 84}[source]
    again = made_up_batch(config, images=12, shrink=1, seed=3)
    assert torch.equal(again.images, batch.images)
    assert not torch.equal(made_up_batch(config, images=12, shrink=1, seed=4).images, batch.images)
    halved = made_up_batch(config, images=2, shrink=2, seed=3)
    assert set(halved.image_sizes_hw.amin(1).tolist()) <= {48, 60}


def test_masks_fill_the_ellipse_of_their_box() -> None:
    config = coco_config(supervision={"source": "masks"}, data={"short_sides": [256], "long_side": 400})
    targets = made_up_batch(config, images=4, shrink=1, seed=0).targets
    assert targets is not None
    for box, mask in zip(targets.boxes_xyxy, targets.masks, strict=True):
        cells = float(((box[2:] - box[:2]) / 4).prod())
        if cells > 150:
            assert float(mask.sum()) / cells == pytest.approx(0.785, abs=0.1)  # pi / 4


def timed(monkeypatch: pytest.MonkeyPatch, times: list[float]) -> list[tuple[int, ...]]:
    """Steps take the given times; the sizes of the batches that they were given."""
    seen: list[tuple[int, ...]] = []

    def step(run: Any, parts: Any, device: torch.device) -> float:
        seen.append(tuple(parts[0].images.shape))
        return times[len(seen) - 1]

    monkeypatch.setattr(estimate, "_timed", step)
    monkeypatch.setattr(estimate, "_step", lambda *_, **__: None)
    return seen


def test_the_shortest_step_of_each_batch_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    # Batches in turn, after one to warm up: the second takes 3, 2 and 2.5 s, the first 4 and 8 s.
    seen = timed(monkeypatch, [0.5, 3.0, 4.0, 2.0, 8.0, 2.5])
    step = measure_step(coco_config(), num_classes=80, processes=2, seconds=1e9)
    # Eight images of up to 800 by 1067 per process; 200 by 267 at a quarter of their sides, of which five are 300 000
    # pixels.
    assert step.seconds == pytest.approx((2.0 + 4.0) / 2 * 8 / 5 * 16)
    assert (step.images, step.how) == (8, "5 images at a time, images of 1/4 of the sides, in proportion")
    assert len(seen) == 6
    assert {shape[0] for shape in seen} == {5}
    assert all(192 <= min(shape[2:]) <= max(shape[2:]) <= 288 for shape in seen)


def test_a_step_that_takes_too_long_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = timed(monkeypatch, [5.0])
    config = coco_config(data={"short_sides": [128], "long_side": 128}, optim={"steps": 9, "batch_size": 6})
    assert measure_step(config, num_classes=80, processes=2, seconds=4).seconds == 5.0
    assert [shape[0] for shape in seen] == [3]


def test_runs_whose_steps_take_equally_long_share_a_measurement() -> None:
    runs = plan_free("shapes_tau", "shapes_neighbourhood")
    keys = {row: step_key(config, 1) for row, config in runs.items()}
    assert len({keys[row] for row in ("0.0", "0.1", "0.2", "0.3", "size5-dilation1", "size5-dilation2")}) == 1
    assert len({keys[row] for row in ("pretrain", "full", "0.1", "size3-dilation1")}) == 4
    config = runs["0.1"]
    assert step_key(config, 1) != step_key(config, 2)
    change: dict[str, Any]
    for change in ({"model": {"weights": "x.pt"}}, {"seed": 4}, {"optim": {"learning_rate": 1.0, "steps": 7}}):
        changed = parse_config(RunConfig, merge(config.model_dump(mode="json"), change), where="test")
        assert step_key(changed, 1) == step_key(config, 1), change
    for change in (
        {"runtime": {"precision": "bf16"}},
        {"runtime": {"compile": True}},
        {"optim": {"batch_size": 8}},
        {"supervision": {"source": "masks"}},
        {"model": {"neck_channels": 64}},
        {"data": {"short_sides": [96]}},
        {"data": {"shapes": {"image_size": 64}}},
    ):
        changed = parse_config(RunConfig, merge(config.model_dump(mode="json"), change), where="test")
        assert step_key(changed, 1) != step_key(config, 1), change


def plan_free(*names: str) -> dict[str, RunConfig]:
    """Row -> configuration of the runs of studies."""
    from semiseg.study import study_runs

    return {run.row: run.config for name in names for run in study_runs(load_study(str(find(name)), seeds=[0]))}


def find(name: str) -> Path:
    return ROOT / "experiments" / f"{name}.toml"


def finished(folder: Path, config: RunConfig, **result: Any) -> None:
    folder.mkdir(parents=True)
    values = {"device": here(), "processes": 1, "train_seconds": 50.0, "steps": 100, **result}
    (folder / "result.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))


def measured(monkeypatch: pytest.MonkeyPatch, seconds: float | Exception) -> list[str]:
    """Replaces the measurement; the backbones that were measured."""
    calls: list[str] = []

    def step(config: RunConfig, **_: Any) -> StepTime:
        calls.append(config.model.backbone)
        if isinstance(seconds, Exception):
            raise seconds
        return StepTime(seconds, 4, here(), "one image at a time, in proportion")

    monkeypatch.setattr(study_estimate, "measure_step", step)
    return calls


def test_finished_runs_of_the_same_kind_here_say_how_long_steps_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(monkeypatch, 9.0)
    config = tiny_config(tmp_path)
    other = tiny_config(tmp_path, model={"neck_channels": 32})
    finished(tmp_path / "runs/a/one", config)
    finished(tmp_path / "runs/b/two", config, train_seconds=30.0)
    finished(tmp_path / "runs/b/three", config, processes=2, train_seconds=1.0)
    finished(tmp_path / "runs/b/four", config, device="NVIDIA H200", train_seconds=1.0)
    finished(tmp_path / "runs/b/five", config, steps=0)
    finished(tmp_path / "runs/b/six", config)
    (tmp_path / "runs/b/six/result.json").write_text("{")
    told: list[str] = []
    found = estimate_steps(
        [config, other, config], processes=1, runs_folder=tmp_path / "runs", num_classes=12, seconds=60, say=told.append
    )
    assert [step.seconds for step in found] == [0.4, 9.0, 0.4]
    assert found[0].source == f"steps as in the logs of finished runs on {here()}"
    assert found[1].source == f"steps measured on {here()} with made-up images (one image at a time, in proportion)"
    assert calls == ["small"]
    assert told == ["measuring a step (1 of 1): small, split"]


def test_threads_are_no_other_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 9.0)
    config = tiny_config(tmp_path)
    finished(tmp_path / "runs/a/one", config, device="cpu (x86_64, 77 threads)")
    monkeypatch.setattr(study_estimate, "device_name", lambda device: "cpu (x86_64, 2 threads)")
    found = estimate_steps(
        [config], processes=1, runs_folder=tmp_path / "runs", num_classes=12, seconds=60, say=lambda text: None
    )
    assert found[0].seconds == 0.5
    assert "77 threads" in found[0].source


def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"processes": 1, "runs_folder": tmp_path, "num_classes": None, "say": lambda text: None}
    calls = measured(monkeypatch, 9.0)
    config = tiny_config(tmp_path)
    found = estimate_steps([config], seconds=0.0, **arguments)[0]
    assert (found.seconds, calls) == (None, [])
    assert "the 0 s for measuring were over" in found.source
    measured(monkeypatch, torch.OutOfMemoryError())
    found = estimate_steps([config], seconds=60.0, **arguments)[0]
    assert found.seconds is None
    assert found.source.startswith("a step of 4 images does not fit on cpu")


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
    return tmp_path


def dry_run(*options: str) -> str:
    result = CliRunner().invoke(app, ["run", "study", "--dry-run", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(text: str, row: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(row)).split()


def test_the_list_without_the_data(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.5)
    text = dry_run("--processes", "4")
    assert cells(text, "boxes") == ["boxes", "0", "unknown", "7200", "16", "=", "4", "x", "4", "none", "1.0"]
    lines = text.splitlines()
    assert "2 of 2 runs to train, if none is done" in lines
    missing = [
        line for line in lines if line.startswith("which of them are done cannot be told without the data: coco")
    ]
    assert len(missing) == 1
    assert "train.json" in missing[0]
    assert "about 2.0 hours in all, one run after the other" in lines
    assert sorted(path.name for path in project.iterdir()) == ["experiments"]


def test_estimates_have_two_digits_and_long_ones_days(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [two_digits(value) for value in (0.0523, 0.996, 1.04, 9.96, 42.6, 99.6, 42749.2, 0)] == [
        *("0.052", "1.0", "1.0", "10", "43", "100", "43000", "0"),
    ]  # fmt: skip
    measured(monkeypatch, 124.0)
    text = dry_run()
    assert cells(text, "boxes")[-1] == "250"
    assert "about 500 hours (21 days) in all, one run after the other" in text.splitlines()
    measured(monkeypatch, 24.9)
    assert "about 100 hours in all" in dry_run()


def test_the_list_with_the_data_counts_what_is_left(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.5)
    add_study_data(project)
    planned = plan(load_study("study"))
    begun = planned[0].folder
    begun.mkdir(parents=True)
    (begun / "identity.json").write_text("{}")
    (begun / "log.jsonl").write_text(json.dumps({"step": 3600, "steps": 7200}) + "\n")
    text = dry_run()
    assert cells(text, "boxes")[2:] == ["step", "3600", "of", "7200", "7200", "16", "none", "0.50", planned[0].run_id]
    assert cells(text, "full")[2:] == ["missing", "7200", "16", "none", "1.0", planned[1].run_id]
    assert "2 of 2 runs to train\nabout 1.5 hours in all" in text
    assert "without the data" not in text
    (project / "experiments" / "study.toml").write_text(STUDY.replace("steps = 7200", "epochs = 2"))
    text = dry_run()
    assert cells(text, "full")[2:7] == ["missing", "2", "epochs", "16", "none"]
    assert "hours in all" not in text


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


def test_without_an_estimate_nothing_is_measured_and_torch_stays_away(project: Path) -> None:
    code = (
        "import sys; from semiseg.cli import app\n"
        "try: app(['run', 'study', '--dry-run', '--no-estimate'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "hours" not in done.stdout
    assert "2 of 2 runs to train" in done.stdout


def test_errors_of_the_study_are_still_errors(project: Path) -> None:
    path = project / "experiments" / "study.toml"
    path.write_text(STUDY.replace('source = "boxes"', 'source = "split"'))
    result = CliRunner().invoke(app, ["run", "study", "--dry-run", "--no-estimate"])
    assert result.exit_code == 2
    path.write_text(STUDY)
    result = CliRunner().invoke(app, ["run", "study", "--dry-run", "--no-estimate", "--processes", "3"])
    assert result.exit_code == 2
    assert "has no equal shares for 3 processes" in result.output
