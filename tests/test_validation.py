"""The validation loss: that of one step over the whole validation set, and nothing of the training changes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semiseg.config.read import digest
from semiseg.engine import train as training
from semiseg.engine.build import build_data, train_dataset
from semiseg.engine.checkpoint import load_model_folder
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.engine.session import start_accelerator
from semiseg.engine.validation import validation_losses
from semiseg.errors import UserError
from semiseg.models.segmenter import Segmenter
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


def trained(root: Path, out: Path, scores: list[float], **optim: Any) -> tuple[int, list[dict[str, torch.Tensor]], Any]:
    """Steps done, the weights at each validation, and the state, of a run whose n-th step has the n-th score."""
    config = tiny_config(
        root, optim={"steps": len(scores), **optim}, runtime={"evaluate_every": 1, "checkpoint_every": 1}
    )
    seen: list[dict[str, torch.Tensor]] = []

    def validate(model: Segmenter) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"mask_AP": scores[len(validations(out))]}

    accelerator = start_accelerator(config.runtime, seed=0)
    state = training.train(config, build_data(config), accelerator, out=out, progress=False, validate=validate)
    return state.step, seen, state.step_module.model.state_dict()


def validations(out: Path) -> list[float]:
    return [line["validation"]["mask_AP"] for line in read_log(out / "log.jsonl") if "validation" in line]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("scores", "steps", "best"),
    [([1, 3, 2, 3, 9, 9], 4, 2), ([1, 2, 1, 3, 2, 2.5], 6, 4), ([1, 2, 3, 4, 5, 6], 6, 6), ([0, 0, 0, 0, 0, 0], 3, 1)],
)
def test_patience_ends_a_training_with_its_best_weights(
    root: Path, tmp_path: Path, scores: list[float], steps: int, best: int
) -> None:
    done, seen, model = trained(root, tmp_path, scores, patience=2)
    assert (done, len(seen), validations(tmp_path)) == (steps, steps, scores[:steps])
    assert same(model, seen[best - 1])
    again, more, same_model = trained(root, tmp_path, scores, patience=2)  # as after an interruption of what follows
    assert (again, more) == (steps, [])
    assert same(same_model, model)


def test_without_patience_all_steps_are_done_and_the_last_weights_stay(root: Path, tmp_path: Path) -> None:
    done, seen, model = trained(root, tmp_path, [3, 2, 1, 1])
    assert (done, len(seen)) == (4, 3)  # the end is measured by whoever called
    assert not any(same(model, weights) for weights in seen)


def test_patience_is_another_run_and_needs_validations(root: Path) -> None:
    runs = [
        tiny_config(root, optim={"patience": n}, runtime={"evaluate_every": every})
        for n, every in ((0, 2), (2, 2), (2, 3))
    ]
    assert len({digest(run.identity()) for run in (*runs, tiny_config(root))}) == 3
    assert runs[0].identity() == tiny_config(root).identity()
    with pytest.raises(UserError, match=r"optim\.patience counts validations: runtime\.evaluate_every must not be 0"):
        tiny_config(root, optim={"patience": 2})


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
