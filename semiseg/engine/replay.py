"""A step that was not finite in its loss or gradient: written to a file before the update, and run again from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semiseg.config import parse_recorded
from semiseg.engine.build import build_step, without_initial_weights
from semiseg.engine.checkpoint import load_tensors, save_tensors
from semiseg.engine.optim import pairwise_warmup
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch, Targets
from semiseg.structures.masks import EncodedMasks
from semiseg.structures.rays import RayTargets

if TYPE_CHECKING:
    from semiseg.engine.train import TrainState


def write_nonfinite_step(out: Path, state: TrainState, parts: list[Batch], counts: Tensor, weighted: Tensor) -> Path:
    """Writes what runs the step again on one CPU: config, weights, batches, global counts; the path of the file."""
    path = out / f"nonfinite_step_{state.step + 1:08d}_rank{state.accelerator.process_index}.pt"
    save_tensors(
        path,
        {
            "config": state.config.model_dump_json(),
            "num_classes": state.step_module.model.num_classes,
            "model": state.step_module.model.state_dict(),
            "affinity": state.step_module.affinity.state_dict() if state.step_module.affinity is not None else {},
            "step": state.step,
            "steps": state.steps,
            "processes": state.accelerator.num_processes,
            "image_ids": [list(batch.image_ids) for batch in parts],
            "losses": dict(zip(state.step_module.loss_names, weighted.tolist(), strict=True)),
            "counts": counts.cpu(),
            "parts": [asdict(batch.to("cpu")) for batch in parts],
        },
    )
    return path


def replay_step(path: Path) -> str:
    """Runs a written step again, forward and backward, and says in a few lines what is not finite."""
    saved = load_tensors(path)
    if not {"config", "num_classes", "model", "step", "steps", "processes", "counts", "parts"} <= set(saved):
        raise UserError(f"{path}: not a replay file; its keys are {', '.join(sorted(map(str, saved))[:8])}")
    config = without_initial_weights(parse_recorded(json.loads(saved["config"]), where=str(path)))
    step_module = build_step(config, num_classes=saved["num_classes"])
    step_module.model.load_state_dict(saved["model"])
    if step_module.affinity is not None:
        step_module.affinity.load_state_dict(saved["affinity"])
    step_module.train()
    warmup = pairwise_warmup(saved["step"], saved["steps"], warmup_steps=config.objective.pairwise_warmup_steps)
    lines = [f"step {saved['step'] + 1} of {saved['steps']} on images {saved['image_ids']}"]
    for number, values in enumerate(saved["parts"]):
        batch = _from_values(values)
        plan = step_module.plan(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.runtime.precision == "bf16"):
            terms = step_module(batch, plan, saved["counts"], warmup=warmup, processes=saved["processes"])
        terms.total.backward()
        values_now = {name: float(value.detach()) for name, value in terms.weighted.items()}
        lines.append(f"part {number}: " + ", ".join(f"{name} {value:.6g}" for name, value in values_now.items()))
    broken = {
        "weights": [name for name, value in step_module.model.named_parameters() if not _finite(value)],
        "gradients": [
            name
            for name, value in step_module.model.named_parameters()
            if value.grad is not None and not _finite(value.grad)
        ],
    }
    for what, names in broken.items():
        lines.append(f"{what} that are not finite: {len(names)}" + (f", first {names[0]}" if names else ""))
    return "\n".join(lines)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _from_values(values: dict[str, Any]) -> Batch:
    targets = dict(values["targets"])
    if targets.get("encoded") is not None:
        targets["encoded"] = EncodedMasks(**targets["encoded"])
    if targets.get("rays") is not None:
        targets["rays"] = RayTargets(**targets["rays"])
    return Batch(**{**values, "image_ids": tuple(values["image_ids"]), "targets": Targets(**targets)})
