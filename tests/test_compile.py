"""`runtime.compile`: the same network under the same names."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from semiseg.engine import train as training
from semiseg.engine.build import RunData, build_data, build_step, compile_network
from semiseg.engine.step import TrainStep
from semiseg.structures.inputs import Batch
from tests.test_train import first_batches
from tests.tiny import tiny_config

TRACE = "eager"  # traces as inductor does, but generates no code


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def losses_and_gradients(step: TrainStep, batch: Batch) -> list[Tensor]:
    step.zero_grad()
    plan = step.plan(batch)
    terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
    terms.total.backward()
    gradients = [parameter.grad.clone() for parameter in step.parameters() if parameter.grad is not None]
    return [terms.total.detach(), *gradients]


def test_the_compiled_network_trains_the_same(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    step = build_step(config, num_classes=12).train()
    compiled = copy.deepcopy(step)
    compile_network(compiled.model, backend=TRACE)
    assert list(compiled.state_dict()) == list(step.state_dict())
    (batch,) = first_batches(config, 1)
    for found, expected in zip(losses_and_gradients(compiled, batch), losses_and_gradients(step, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_run_with_it_saves_the_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_network", partial(compile_network, backend="eager"))
    optim = {"steps": 1, "ema_decay": 0.9}
    config = tiny_config(tmp_path, runtime={"compile": True}, optim=optim)
    data: RunData = build_data(config)
    state = training.train(config, data, Accelerator(cpu=True), out=tmp_path / "out", progress=False)
    assert state.step_module.model.backbone._compiled_call_impl is not None
    plain = build_step(config, num_classes=12).model
    assert list(training.trained_model(state).state_dict()) == list(plain.state_dict())
    assert state.step == 1
