"""What the processes of `test_distributed` do, in groups of 1, 2 and 4."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object

from benchmarks.inputs import half_open
from semiseg.config import RunConfig
from semiseg.data.workers import StopOnSignal
from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_evaluation_loader, build_training_loader
from semiseg.engine.evaluate import predict_table
from semiseg.engine.session import gather_to_main, same_on_all_ranks, start_accelerator
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch, Supervision
from semiseg.structures.transfer import send
from tests.forked import start
from tests.host_syncs import HostSyncs
from tests.test_train import without_instances
from tests.tiny import DETECTORS, HEADS, fcos, model_of, some_masks, tiny_config

BATCH, STEPS = 8, 4
LEARNED = {"box": "projection+learned", "affinity": "learned"}

# processes -> values of images_per_process
CUTS = {1: (0, 2), 2: (0, 2), 4: (0, 1)}

# What is taken from the images of a step, by their place in it: (no instances at all, boxes only).
# Two steps as they are; one whose last quarter is empty; one whose first half has no masks; and one whose first half is
# empty while nothing has a mask.
TAKEN: tuple[tuple[range, range], ...] = (
    (range(0), range(0)),
    (range(6, 8), range(0)),
    (range(0), range(4)),
    (range(4), range(4, 8)),
)


def cuts_of(processes: int) -> list[tuple[str, int]]:
    """(norm of the mask branch, images_per_process) of the runs of a group.

    `bn` normalises over the images of one process and part, two of them in each group. `learned` is `gn` with learned
    affinity, its gate half open; the other mask heads have no norm over images and go in groups of 1 and 2.
    """
    others = [(head, 0) for head in (*HEADS, *DETECTORS) if head != "dynamic" and processes < 4]
    return [("frozen_bn", 0), ("bn", 2), ("learned", 0), *others, *(("gn", images) for images in CUTS[processes])]


def small_run(root: Path, **sections: Any) -> RunConfig:
    """Four steps of eight of the 32 images, each once."""
    optim = {"batch_size": BATCH, "steps": STEPS, "clip_norm": 1.0}
    return tiny_config(root, data={"shapes": {"train_images": BATCH * STEPS}}, optim=optim, **sections)


def without_masks(batch: Batch, images: list[int]) -> Batch:
    """The batch with the instances of some images supervised by their boxes alone."""
    targets = batch.targets
    assert targets is not None
    chosen = torch.isin(targets.image_index, torch.tensor(images, dtype=torch.int64))
    kept = ~chosen[targets.mask_instance]
    changed = replace(
        targets,
        supervision=torch.where(chosen, torch.full_like(targets.supervision, Supervision.BOX), targets.supervision),
        mask_instance=targets.mask_instance[kept],
        **some_masks(targets, kept),
    )
    return replace(batch, targets=changed)


def taken_away(batch: Batch, *, step: int, first: int) -> Batch:
    """A part whose images have the places `first`, `first` + 1, ... in the step, as `TAKEN` wants it."""
    empty, boxes_only = ([n - first for n in places] for places in TAKEN[step])
    return without_masks(without_instances(batch, empty), boxes_only)


def several_steps(root: Path, out: Path, *, norm: str, images_per_process: int) -> dict[str, Any]:
    """Losses of every step, the weights after the last, and how many instances and masks each process had."""
    learned = norm == "learned"
    config = small_run(
        root,
        model=model_of(norm)
        if norm in (*HEADS, *DETECTORS)
        else {"mask_head": {"branch_norm": "gn" if learned else norm}},
        objective=LEARNED if learned else {},
        runtime={"images_per_process": images_per_process},
    )
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    processes, rank = accelerator.num_processes, accelerator.process_index
    data = build_data(config)
    state = training.prepare(config, data, accelerator)
    if state.step_module.affinity is not None:
        half_open(state.step_module.affinity)
    state.wrapped.train()
    loader = build_training_loader(
        config, data, steps=STEPS, start_step=0, processes=processes, rank=rank, pin_memory=False
    )
    batches, losses, held = iter(loader), [], []
    size = BATCH // (processes * state.parts)
    for step in range(STEPS):
        places = [(part * processes + rank) * size for part in range(state.parts)]
        parts = [taken_away(next(batches), step=step, first=first) for first in places]
        report = training.optimizer_step(state, parts, out=out)
        assert report is not None
        both = torch.stack([report.losses, report.weighted]).double()
        losses.append(accelerator.reduce(both, reduction="mean").clone())
        targets = [part.targets for part in parts if part.targets is not None]
        held.append(
            gather_object([(sum(t.num_instances for t in targets), sum(len(t.mask_instance) for t in targets))])
        )
    weights = torch.cat([value.detach().flatten() for value in state.step_module.parameters()])
    gate = None if state.step_module.affinity is None else state.step_module.affinity.sums
    return {"gate": gate, "parts": state.parts, "losses": torch.stack(losses), "weights": weights, "held": held}


def first_gradient(root: Path) -> torch.Tensor:
    """The gradient of the first step, averaged by data parallelism: what the weights cannot show to six digits."""
    config = small_run(root)
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    processes, rank = accelerator.num_processes, accelerator.process_index
    data = build_data(config)
    state = training.prepare(config, data, accelerator)
    parts = list(
        build_training_loader(config, data, steps=1, start_step=0, processes=processes, rank=rank, pin_memory=False)
    )
    plans = [state.step_module.plan(part) for part in parts]
    counts = accelerator.reduce(torch.stack([plan.counts for plan in plans]).sum(0), reduction="sum")
    training._forward_backward(state, parts, plans, counts)
    return torch.cat([p.grad.flatten() for p in state.step_module.parameters() if p.grad is not None]).clone()


def stop_by_last_process(state: training.TrainState, parts: list[Batch], out: Path, *, what: str) -> dict[str, Any]:
    """What every process says, and whether its weights stay, when something of the last one is not finite."""
    bias = fcos(state.step_module.model).class_logits.bias
    assert bias is not None
    if state.accelerator.is_last_process and what == "loss":
        with torch.no_grad():
            bias.fill_(float("nan"))
    if state.accelerator.is_last_process and what == "gradient":
        hook = bias.register_hook(lambda gradient: gradient * float("inf"))
    before = [parameter.clone() for parameter in state.step_module.parameters()]
    sentence = "it went on"
    try:
        training.optimizer_step(state, parts, out=out)
    except UserError as error:
        sentence = str(error)
    if state.accelerator.is_last_process and what == "gradient":
        hook.remove()
    state.optimizer.zero_grad()
    pairs = zip(before, state.step_module.parameters(), strict=True)
    unchanged = all(torch.allclose(old, new, rtol=0, atol=0, equal_nan=True) for old, new in pairs)
    return {"sentences": gather_object([sentence]), "unchanged": gather_object([unchanged])}


def stop_on_signal(state: training.TrainState, parts: list[Batch], out: Path) -> dict[str, Any]:
    """What every process reports of a step during which the last one got a signal, and where its host waited."""
    stop, waits = StopOnSignal(), HostSyncs()
    stop.requested = state.accelerator.is_last_process
    with pytest.MonkeyPatch.context() as patch, ExitStack() as counting:

        def send_and_count(structure: Any, device: torch.device) -> Any:
            counting.enter_context(waits)  # what comes before is on the host
            return send(structure, device)

        patch.setattr("semiseg.engine.step.send", send_and_count)
        report = training.optimizer_step(state, parts, out=out, stop=stop)
    return {"stop": gather_object([report.stop]), "waits": gather_object([waits.places()]), "step": state.step}


def detections_and_stop(root: Path, out: Path) -> dict[str, Any]:
    """Detections of the validation images, then a step whose loss is not finite on the last process."""
    config = small_run(root, inference={"score_threshold": 0.001, "short_side": 64, "long_side": 64})
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    processes, rank = accelerator.num_processes, accelerator.process_index
    data = build_data(config)
    state = training.prepare(config, data, accelerator)
    evaluation = build_evaluation_loader(
        data.val,
        model=config.model,
        inference=config.inference,
        runtime=config.runtime.model_copy(update={"images_per_process": 1}),
        processes=processes,
        rank=rank,
    )
    found, image_ids = predict_table(
        state.step_module.model, evaluation, data.val, accelerator, limits=config.inference, progress=False
    )
    training_loader = build_training_loader(
        config, data, steps=1, start_step=0, processes=processes, rank=rank, pin_memory=False
    )
    parts = list(training_loader)
    return {
        "detections": found,
        "image_ids": image_ids,
        "lengths": gather_object([(len(found), len(image_ids))]),
        "signal": stop_on_signal(state, parts, out),
        "stopped": {what: stop_by_last_process(state, parts, out, what=what) for what in ("gradient", "loss")},
    }


def gathering() -> dict[str, Any]:
    """What each process gets of unequal lists, and says of a folder that is not the same everywhere."""
    rank = start_accelerator(tiny_config(Path()).runtime, seed=0).process_index
    gathered = gather_to_main([f"{rank}.{number}" for number in range(rank + 1)])
    sentence = "they agree"
    try:
        assert same_on_all_ranks(True, where=Path("runs/mine")) is True
        same_on_all_ranks(f"step_{rank}.pt", where=Path("runs/mine"))
    except UserError as error:
        sentence = str(error)
    assert same_on_all_ranks(None, where="the run's 'split'") is None
    return {"gathered": gather_object([gathered]), "disagreement": gather_object([sentence])}


def group(processes: int, function: Callable[..., object], *arguments: object, outputs: Path, **how: Any) -> None:
    """Runs a function in each process of a group, with the environment that a launcher gives it.

    Args:
        outputs: folder for what each prints.
        how: see `forked.start`.

    Raises:
        AssertionError: one has failed.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        variables.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    started = {}
    for rank in map(str, range(processes)):
        environment = {**variables, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else variables
        output = outputs / f"{processes}-{rank}.txt"
        started[output] = start(function, *arguments, output=output, environment=environment, **how)
    for process in started.values():
        process.join()
    for output, process in started.items():
        assert process.exitcode == 0, output.read_text()[-3000:]


def member(processes: int, folder: Path) -> None:
    """One process of a group. The main one writes FOLDER/{1,2,4}.pt; FOLDER holds the images, drawn before."""
    results: dict[str, Any] = {
        "steps": {
            (norm, images): several_steps(folder, folder, norm=norm, images_per_process=images)
            for norm, images in cuts_of(processes)
        },
        "gradient": first_gradient(folder),
        **gathering(),
        **detections_and_stop(folder, folder),
    }
    if os.environ.get("RANK", "0") == "0":
        torch.save({"processes": processes, **results}, folder / f"{processes}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
