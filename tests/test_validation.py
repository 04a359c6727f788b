"""The validation loss: that of one step over the whole validation set, and nothing of the training changes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semiseg.engine import train as training
from semiseg.engine.build import build_data, train_dataset
from semiseg.engine.checkpoint import load_model_folder
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.engine.session import start_accelerator
from semiseg.engine.validation import validation_losses
from tests.test_train import fresh_step
from tests.tiny import model_of, tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def plainly(module: Any, batch: Any, *, warmup: float) -> dict[str, float]:
    """One batch of everything, straight through the step."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    with torch.no_grad():
        plan = module.plan(batch)
        terms = module(batch, plan, plan.counts, warmup=warmup, processes=1)
    losses = {f"loss_{name}": float(terms.unweighted[name]) for name in module.loss_names}
    return {"loss": float(sum(terms.weighted.values())), **losses}


@pytest.mark.parametrize("model", ["dynamic", "rays", "mask_rcnn", "yolact"])
def test_it_is_the_loss_of_a_step_over_the_whole_set(root: Path, model: str) -> None:
    config = tiny_config(root, data={"flip": 0.0}, runtime={"images_per_process": 3}, model=model_of(model))
    data = build_data(config)
    data = replace(data, val=data.train)
    keys = [(index, 0) for index in range(len(data.train))]
    batch = train_dataset(config, data).batch(keys, size_divisor=config.model.size_divisor)
    module = fresh_step(config)
    accelerator = start_accelerator(config.runtime, seed=0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = validation_losses(config, data, module, module.model, accelerator, warmup=0.4)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found == pytest.approx(plainly(module, batch, warmup=0.4), rel=1e-4, abs=1e-5)
    assert found["loss"] > 0


def test_a_run_logs_it_and_trains_as_without(root: Path, tmp_path: Path) -> None:
    found = []
    for name, every in (("with", 2), ("without", 0)):
        execute_run(
            tiny_config(root, optim={"steps": 4}, runtime={"evaluate_every": every}),
            out=tmp_path / name,
            progress=False,
        )
        found.append(load_model_folder(tmp_path / name / "model")[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    (line,) = [line for line in read_log(tmp_path / "with" / "log.jsonl") if "validation" in line]
    assert line["validation"]["loss"] > 0
    assert {f"loss_{name}" for name in ("classification", "box", "dice", "projection", "pairwise")} <= set(
        line["validation"]
    )


def test_the_averaged_weights_are_judged_where_there_are_any(root: Path) -> None:
    config = tiny_config(root, optim={"ema_decay": 0.9})
    data = build_data(config)
    accelerator = start_accelerator(config.runtime, seed=0)
    state = training.prepare(config, data, accelerator)
    assert state.ema is not None
    own, averaged = state.step_module.model, training.trained_model(state)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.5)
    given = [
        validation_losses(config, data, state.step_module, model, accelerator, warmup=1.0) for model in (own, averaged)
    ]
    assert given[0]["loss"] != given[1]["loss"]
    assert state.step_module.model is own
