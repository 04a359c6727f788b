"""Training as a whole: resume, accumulation, empties, non-finite losses, and the leak barrier, on a tiny real run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import semiseg
from semiseg.config import RunConfig
from semiseg.config.read import digest
from semiseg.data.images import open_image
from semiseg.data.shapes import ensure_shapes
from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_step, build_training_loader
from semiseg.engine.checkpoint import load_tensors, save_checkpoint
from semiseg.engine.logs import read_log
from semiseg.engine.predict import load_model
from semiseg.engine.replay import replay_step
from semiseg.engine.run import evaluate_run, execute_run
from semiseg.engine.session import accelerate_for_one_run, start_accelerator
from semiseg.engine.step import TrainStep
from semiseg.errors import StepError, UserError, UserNotice
from semiseg.splits import load_split
from semiseg.structures.inputs import Batch, Targets
from tests.tiny import COUNT_NAMES, LOSS_NAMES, dynamic, fcos, some_masks, some_rays, tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def first_batches(config: RunConfig, count: int, *, processes: int = 1, rank: int = 0) -> list[Batch]:
    loader = build_training_loader(
        config, build_data(config), steps=count, start_step=0, processes=processes, rank=rank, pin_memory=False
    )
    return list(loader)


def fresh_step(config: RunConfig) -> TrainStep:
    torch.manual_seed(0)
    return build_step(config, num_classes=12).train()


def losses_and_gradients(module: TrainStep, parts: list[Batch], *, processes: int = 1) -> tuple[Tensor, Tensor]:
    """The weighted losses and the flat gradient of one optimizer step over `parts`."""
    module.zero_grad()
    plans = [module.plan(part) for part in parts]
    counts = torch.stack([plan.counts for plan in plans]).sum(0)
    total = torch.zeros(len(module.loss_names), dtype=torch.float64)
    for part, plan in zip(parts, plans, strict=True):
        terms = module(part, plan, counts, warmup=0.7, processes=processes)
        terms.total.backward()
        total += torch.stack([terms.weighted[name].detach() for name in module.loss_names]).double()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None])
    return total, gradient


def without_instances(batch: Batch, images: list[int]) -> Batch:
    """The batch with the instances of some images taken away."""
    targets = batch.targets
    assert targets is not None
    kept = ~torch.isin(targets.image_index, torch.tensor(images))
    number = torch.cumsum(kept, 0) - 1
    kept_masks = kept[targets.mask_instance]
    changed = Targets(
        boxes_xyxy=targets.boxes_xyxy[kept],
        labels=targets.labels[kept],
        image_index=targets.image_index[kept],
        supervision=targets.supervision[kept],
        mask_instance=number[targets.mask_instance[kept_masks]],
        **some_masks(targets, kept_masks),
        crowd_boxes_xyxy=targets.crowd_boxes_xyxy,
        crowd_image_index=targets.crowd_image_index,
        mask_stride=targets.mask_stride,
        rays=some_rays(targets.rays, kept),
    )
    return replace(batch, targets=changed)


def test_four_steps_equal_two_and_resume_and_two(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "runtime": {"workers": 2, "checkpoint_every": 2},
        "model": {"mask_head.branch_norm": "bn"},
    }
    config = tiny_config(root, **options, optim={"ema_decay": 0.9, "optimizer": "adamw", "schedule": "one_cycle"})
    execute_run(config, out=tmp_path / "whole", progress=False)
    whole = load_tensors(tmp_path / "whole" / "checkpoints" / "step_00000002.pt")

    class Stop(BaseException):  # no error of a step
        pass

    # The second run is cut off hard after its third step: its last checkpoint is that of step 2.
    original = training.optimizer_step

    def cut_off(state, parts, **keywords):  # type: ignore[no-untyped-def]
        if state.step == 3:
            raise Stop
        return original(state, parts, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "optimizer_step", cut_off)
        with pytest.raises(Stop):
            execute_run(config, out=tmp_path / "cut", progress=False)
    assert [line["step"] for line in read_log(tmp_path / "cut" / "log.jsonl")] == [1, 2, 3]
    continues = rf"{tmp_path}/cut: the run has not ended \(step 2 of 4\); 'semiseg train .*cut/config.json --out .*cut "
    for use in (load_model, evaluate_run):
        with pytest.raises(UserError, match=continues + "--resume' continues it"):
            use(tmp_path / "cut")
    execute_run(config, out=tmp_path / "cut", progress=False)

    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["losses"] == theirs["losses"]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]
    results = [json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("whole", "cut")]
    assert results[0] == results[1]
    # The averaged weights are a third thing beside the start and the end.
    assert not torch.equal(whole["ema"]["detector.class_logits.weight"], whole["model"]["detector.class_logits.weight"])


def test_bf16_trains_beside_fp32_in_one_process_and_resumes_exactly(root: Path, tmp_path: Path) -> None:
    """As a notebook compares them: fp32, bf16, and fp32 again, which is the first to the bit."""
    AcceleratorState._reset_state()  # other tests of this process leave theirs
    values = tiny_config(root, runtime={"checkpoint_every": 2}).model_dump(mode="json", exclude_none=True)
    for name, precision in (("first", "no"), ("bf16", "bf16"), ("again", "no")):
        values["runtime"]["precision"] = precision
        assert semiseg.train(values, out=tmp_path / name)["steps"] == 4
    losses = {name: read_log(tmp_path / name / "log.jsonl") for name in ("first", "bf16", "again")}
    assert [line["losses"] for line in losses["first"]] == [line["losses"] for line in losses["again"]]
    for line in losses["bf16"]:
        assert all(math.isfinite(value) for value in line["losses"].values())
    for name, value in losses["bf16"][0]["losses"].items():
        assert value == pytest.approx(losses["first"][0]["losses"][name], rel=0.02), name
    assert losses["bf16"][0]["losses"] != losses["first"][0]["losses"], "something was rounded"

    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "bf16" / "checkpoints" / "step_00000002.pt", cut / "checkpoints")
    shutil.copy(tmp_path / "bf16" / "config.json", cut)
    values["runtime"]["precision"] = "bf16"
    semiseg.train(values, out=cut)
    assert [line["losses"] for line in read_log(cut / "log.jsonl")] == [line["losses"] for line in losses["bf16"][2:]]
    files = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("first", "again", "bf16", "cut")
    ]
    assert files[0] == files[1] != files[2] == files[3]
    assert evaluate_run(cut, progress=False) is not None
    assert not is_initialized(), "accelerate is left as it was found"


def test_an_accelerator_of_the_callers_own_keeps_its_precision(root: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    own = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UserError, match=r"an Accelerator of its own with mixed precision 'bf16', but .* is 'no'"):
        execute_run(tiny_config(root), out=tmp_path / "run", progress=False)
    assert own.mixed_precision == "bf16"
    AcceleratorState._reset_state()


@pytest.mark.skipif(sys.platform != "linux", reason="forked workers")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_data_do_not_come_saves_and_the_run_continues_exactly(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that never opens stands for storage that does not answer."""
    config = tiny_config(tmp_path, runtime={"workers": workers})
    execute_run(config, out=tmp_path / "whole", progress=False)
    data, out = build_data(config), tmp_path / "cut"
    loader = build_training_loader(config, data, steps=4, start_step=0, processes=1, rank=0, pin_memory=False)
    assert loader.sampler is not None
    keys = list(loader.sampler)
    image = data.train.images_folder / data.train.rows[keys[2][0][0]]["file_name"]  # of the third step, new in it

    def open_or_wait(file: Path) -> Image.Image:
        if file == image:
            time.sleep(1000)
        return open_image(file)

    ended = threading.Event()

    def stop_when_two_steps_are_done() -> None:
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 2:
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_when_two_steps_are_done)
    watcher.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("semiseg.data.images.open_image", open_or_wait)
            with pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 4; '--resume' continues"):
                execute_run(config, out=out, progress=False)
    finally:
        ended.set()
        watcher.join()
    execute_run(config, out=out, progress=False)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]


def test_finished_run_is_not_trained_again_and_a_folder_holds_one_run(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root, optim={"steps": 1})
    first = execute_run(config, out=tmp_path, progress=False)
    stamp = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert execute_run(config, out=tmp_path, progress=False) == first
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    other = tiny_config(root, optim={"steps": 1}, seed=5)
    with pytest.raises(UserError, match=r"holds another run \(its seed is 0, wanted 5\)"):
        execute_run(other, out=tmp_path, progress=False)
    another_split = tiny_config(root, optim={"steps": 1}, supervision={"split": "shapes_many_seen"})
    with pytest.raises(UserError, match=r"holds another run \(its inputs.split is "):
        execute_run(another_split, out=tmp_path, progress=False)


def test_accumulation_changes_neither_losses_nor_gradients(root: Path) -> None:
    whole = tiny_config(root)
    halves = tiny_config(root, optim={"accumulation": 2})
    same_in_two_parts(fresh_step(whole), whole, halves)


def learned(step: TrainStep, batch: Batch, *, steps: int = 14) -> list[dict[str, float]]:
    """The weighted losses of each of so many steps on one batch."""
    plan = step.plan(batch)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.005)
    losses = []
    for _ in range(steps):
        terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: float(value.detach()) for name, value in terms.weighted.items()})
    return losses


def same_in_two_parts(module: TrainStep, whole: RunConfig, halves: RunConfig) -> None:
    """Losses and gradients of a step of four images, and of the same in two parts."""
    losses, gradient = losses_and_gradients(module, first_batches(whole, 1))
    parts = first_batches(halves, 1)
    assert len(parts) == 2
    assert parts[0].images.shape[0] == 2
    assert len(losses) == len(module.loss_names)
    split_losses, split_gradient = losses_and_gradients(module, parts)
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=1e-6)
    difference = split_gradient - gradient
    assert float(difference.norm()) <= 1e-6 * float(gradient.norm())
    # One number of thousands may be rounded worse: 1.2e-6 was seen with AVX-512 without AMX, 0.6e-6 elsewhere.
    assert float(difference.abs().max()) <= 3e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("empty", [[0], [0, 1, 2, 3]])
def test_images_and_batches_without_instances(root: Path, empty: list[int]) -> None:
    config = tiny_config(root)
    module = fresh_step(config)
    batch = without_instances(first_batches(config, 1)[0], empty)
    losses, _ = losses_and_gradients(module, [batch])
    assert torch.isfinite(losses).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient: it would hang data parallelism"
        assert torch.isfinite(parameter.grad).all()
    if len(empty) == 4:
        by_name = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
        assert by_name["classification"] > 0, "background is still learnt"
        assert all(value == 0 for name, value in by_name.items() if name != "classification")


@pytest.mark.parametrize("mask_feature_stride", [4, 8])
def test_a_training_without_masks_leaves_out_what_only_masks_need(root: Path, mask_feature_stride: int) -> None:
    config = tiny_config(
        root,
        supervision={"source": "boxes", "split": None},
        objective={"box": "none"},
        model={"mask_head.feature_stride": mask_feature_stride},
    )
    batch = first_batches(config, 1)[0]
    module = fresh_step(config)
    called: list[str] = []
    dynamic(module.model).branch.register_forward_hook(lambda *_: called.append("mask branch"))
    losses, _ = losses_and_gradients(module, [batch])
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert not called
    assert all(gradient is not None for gradient in gradients.values()), "one would hang data parallelism"

    whole = fresh_step(config)
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    dynamic(whole.model).learns = True
    whole_losses, _ = losses_and_gradients(whole, [batch])
    torch.testing.assert_close(losses, whole_losses, rtol=0, atol=0)
    for name, parameter in whole.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)
        else:
            assert parameter.grad is not None
            assert not parameter.grad.any(), f"{name} is left out, but learns from boxes"

    module.eval()
    assert module.model(batch.images, batch.image_sizes_hw).mask_inputs.mask_features.any(), (
        "prediction still has masks"
    )
    assert called


def test_nonfinite_loss_stops_before_the_update_and_replays(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    data, accelerator = build_data(config), start_accelerator(config.runtime, seed=0)
    state = training.prepare(config, data, accelerator)
    with torch.no_grad():
        next(dynamic(state.step_module.model).branch.parameters()).fill_(float("nan"))
    before = [parameter.clone() for parameter in state.step_module.parameters()]
    with pytest.raises(UserError, match=r"step 1: the loss is not finite \(.*dice nan.*--replay") as caught:
        training.optimizer_step(state, first_batches(config, 1), out=tmp_path)
    for old, new in zip(before, state.step_module.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    path = tmp_path / "nonfinite_step_00000001_rank0.pt"
    assert str(path) in str(caught.value)
    saved = load_tensors(path)
    assert saved["step"] == 0
    assert len(saved["image_ids"][0]) == 4
    text = replay_step(path)
    assert "step 1 of 4 on images" in text
    assert "dice nan" in text
    assert "weights that are not finite: 1, first mask_head.branch" in text


def overflow_gradient(module: TrainStep) -> None:
    """Finite losses with a gradient beyond float32: tiny features that the next layer multiplies by as much."""
    head = fcos(module.model)
    assert head.class_logits.bias is not None
    with torch.no_grad():
        weight = head.class_tower[-2].weight
        assert isinstance(weight, Tensor)
        weight.fill_(2e-39)
        head.class_logits.weight.mul_(3e38).mul_(10)
        head.class_logits.bias.fill_(2.0)  # many classes found everywhere: a large sum of slopes


@pytest.mark.parametrize(("precision", "clip_norm"), [("no", None), ("no", 1.0), ("bf16", None)])
def test_a_finite_loss_with_another_gradient_stops_before_the_update_and_replays(
    root: Path, tmp_path: Path, precision: str, clip_norm: float | None
) -> None:
    AcceleratorState._reset_state()
    config = tiny_config(root, optim={"clip_norm": clip_norm}, runtime={"precision": precision})
    path = tmp_path / "nonfinite_step_00000001_rank0.pt"
    with accelerate_for_one_run():
        state = training.prepare(config, build_data(config), start_accelerator(config.runtime, seed=0))
        overflow_gradient(state.step_module)
        before = [parameter.clone() for parameter in state.step_module.parameters()]
        with pytest.raises(UserError) as caught:
            training.optimizer_step(state, first_batches(config, 1), out=tmp_path)
    assert all(map(torch.equal, before, state.step_module.parameters()))
    assert state.step == 0
    told = re.fullmatch(
        r"step 1: the gradient is not finite \((\d+) parameters, first (\S+)\); the weights were not updated; "
        rf"'semiseg train --replay {path}' runs the step again",
        str(caught.value),
    )
    assert told is not None, caught.value
    text = replay_step(path)
    assert "weights that are not finite: 0\n" in text
    assert text.endswith(f"gradients that are not finite: {told[1]}, first {told[2]}")
    assert "nan" not in text


def test_under_a_scaler_such_an_update_is_left_out_and_training_goes_on(root: Path, tmp_path: Path) -> None:
    """fp16 needs a GPU; its scaler does not."""
    config = tiny_config(root)
    accelerator = start_accelerator(config.runtime, seed=0)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    state = training.prepare(config, build_data(config), accelerator)
    bias = fcos(state.step_module.model).class_logits.bias
    assert bias is not None
    hook = bias.register_hook(lambda gradient: gradient * float("inf"))
    before = [parameter.clone() for parameter in state.step_module.parameters()]
    for number, batch in enumerate(first_batches(config, 3), start=1):
        if number == 3:
            hook.remove()
        training.optimizer_step(state, [batch], out=tmp_path)
        now = list(state.step_module.parameters())
        assert all(map(torch.equal, before, now)) == (number < 3)
        assert accelerator.scaler.get_scale() == 2.0 ** (16 - min(number, 2))
        assert state.step == number
    assert all(torch.isfinite(parameter).all() for parameter in now)
    assert list(tmp_path.iterdir()) == []


def test_clipping_bounds_the_update(root: Path, tmp_path: Path) -> None:
    plain = {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    config = tiny_config(root, optim={**plain, "clip_norm": 1e-3})
    state = training.prepare(config, build_data(config), start_accelerator(config.runtime, seed=0))
    before = torch.cat([parameter.detach().flatten() for parameter in state.step_module.parameters()]).double()
    training.optimizer_step(state, first_batches(config, 1), out=tmp_path)
    after = torch.cat([parameter.detach().flatten() for parameter in state.step_module.parameters()]).double()
    # With SGD at rate 1 the update is the gradient, whose norm was far above the bound.
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_log_has_every_term_weighted_and_unweighted_and_the_counts(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root, optim={"steps": 4}, runtime={"log_every": 2, "evaluate_every": 2, "tensorboard": True})
    execute_run(config, out=tmp_path, progress=False)
    lines = read_log(tmp_path / "log.jsonl")
    records = [line for line in lines if "losses" in line]
    assert [line["step"] for line in records] == [2, 4]
    for line in records:
        assert tuple(line["losses"]) == LOSS_NAMES
        assert tuple(line["weighted"]) == LOSS_NAMES
        assert tuple(line["counts"]) == COUNT_NAMES
    # W = min(10 000, 4 / 9) < 1: the pairwise term is warm from the first step on, times the share of box instances.
    counts = records[0]["counts"]
    assert 0 < counts["box_masks"] < counts["masks"]
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [2]
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 2
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert list((tmp_path / "tensorboard").iterdir())


def test_init_from_takes_weights_only(root: Path, tmp_path: Path) -> None:
    boxes_alone = {"supervision": {"source": "boxes"}, "objective": {"box": "none"}}
    execute_run(tiny_config(root, **boxes_alone), out=tmp_path / "pretrain", progress=False)
    config = tiny_config(root, init_from=str(tmp_path / "pretrain" / "model"))
    data, accelerator = build_data(config), start_accelerator(config.runtime, seed=0)
    state = training.prepare(config, data, accelerator)
    assert state.step == 0
    assert not state.optimizer.state_dict()["state"]
    pretrained = load_tensors(save_checkpoint(tmp_path, {"model": {}}, step=1, keep=1))
    assert pretrained == {"model": {}}
    ten = replace(data, train=replace(data.train, class_names=data.train.class_names[:10]))
    with pytest.warns(UserWarning, match=r"has other classes: .*class_logits\.weight.* start"):
        training.prepare(config, ten, accelerator)
    wider = tiny_config(root, init_from=config.init_from, model={"neck.channels": 32})
    with pytest.raises(
        UserError, match=r"of another network; to start from them set\n\n\[model\]\nneck\.channels = 16  # now 32$"
    ):
        training.prepare(wider, data, accelerator)


def test_another_threshold_in_a_study_is_another_evaluation_and_no_other_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder takes the end of the training; what is trained otherwise, or was validated meanwhile, trains anew."""

    def planned(name: str, **sections: Any) -> tuple[RunConfig, Path]:
        config, out = tiny_config(root, **sections), tmp_path / "runs" / name
        out.mkdir(parents=True)
        (out / "identity.json").write_text(json.dumps({"identity": {"config": digest(config.identity())}}))
        return config, out

    first, trained = planned("one/a", inference={"score_threshold": 0.0})
    execute_run(first, out=trained, progress=False)
    monkeypatch.setattr(training, "optimizer_step", None)  # a training fails
    keys = {"inference": {"short_side": 96, "long_side": 96, "score_threshold": 0.2, "max_detections": 3}}
    config, out = planned("two/b", **keys)
    assert config.identity() != first.identity()
    with pytest.warns(UserWarning, match=f"{out}: trained already as {trained}"):
        result = execute_run(config, out=out, progress=False)
    assert result["steps"] == 4
    assert read_log(out / "log.jsonl") == read_log(trained / "log.jsonl")
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (trained, out)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert load_model(out).info.inference.score_threshold == 0.2
    detections = [json.loads((folder / "detections.json").read_text()) for folder in (trained, out)]
    assert len(detections[1]) < len(detections[0])

    for name, sections in (
        ("two/seed", {"seed": 5, **keys}),
        ("two/loss", {"objective": {"affinity_threshold": 0.2}, **keys}),
        ("two/validated", {"runtime": {"evaluate_every": 2}, **keys}),
    ):
        config, out = planned(name, **sections)
        with pytest.raises(StepError, match="NoneType"):
            execute_run(config, out=out, progress=False)


@pytest.mark.parametrize(
    ("source", "box", "told"),
    [
        ("masks", "projection", r"/train\.json: (\d+) of (\d+) objects have no mask; they learn from their boxes"),
        ("masks", "none", r"/train\.json: (\d+) of (\d+) objects have no mask; they are left out of the mask losses"),
        ("split", "projection", r"/train\.json: (\d+) of (\d+) objects of seen classes have no mask; they learn from"),
        ("as_annotated", "projection", None),
        ("boxes", "projection", None),
    ],
)
def test_fewer_masks_than_asked_for_are_said(
    root: Path, tmp_path: Path, source: str, box: str, told: str | None
) -> None:
    """By a notice before the training, where masks were asked for and are not there."""
    folder = ensure_shapes(root, images=4, image_size=64, seed=902)
    content = json.loads((folder / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    seen = load_split("shapes_few_seen", list(names.values())).seen
    of_seen = [item for item in content["annotations"] if names[item["category_id"]] in seen]
    for annotation in of_seen[::2]:
        del annotation["segmentation"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    files = {"train_annotations": "train.json", "val_annotations": str(folder / "annotations.json")}
    images = {"train_images": str(folder / "images"), "val_images": str(folder / "images")}
    config = tiny_config(
        tmp_path, data={"format": "coco", **files, **images}, supervision={"source": source},
        objective={"box": box}, optim={"steps": 1},
    )  # fmt: skip
    objects = content["annotations"] if source == "masks" else of_seen
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        execute_run(config, out=tmp_path / "out", progress=False)
    notices = [str(one.message) for one in caught if issubclass(one.category, UserNotice)]
    sentences = [notice for notice in notices if "classes to learn from" not in notice]  # four images lack some classes
    if told is None:
        assert sentences == []
        return
    (sentence,) = sentences
    match = re.search(told, sentence)
    assert match, sentence
    assert (int(match[1]), int(match[2])) == (sum("segmentation" not in item for item in objects), len(objects))
    assert 0 < int(match[1]) < int(match[2])


def test_a_batch_made_for_prediction_is_not_trained_on(root: Path) -> None:
    config = tiny_config(root)
    batch = replace(first_batches(config, 1)[0], targets=None)
    with pytest.raises(ValueError, match="a training batch needs targets"):
        fresh_step(config).plan(batch)
