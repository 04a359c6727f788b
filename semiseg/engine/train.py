"""The training loop: one plain loop over optimizer steps, for any number of processes.

A step: plan every part -> sum the counts over parts and processes -> forward and backward each part -> clip -> check
that losses and gradient are finite -> update. What may stop it: a signal (saved first), a loss or gradient that is not
finite (written to a file first).
"""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from semiseg.config import RunConfig
from semiseg.data.workers import StopOnSignal
from semiseg.engine.build import (
    RunData,
    build_step,
    build_training_loader,
    compile_network,
    require_normalisable,
    train_dataset,
    without_initial_weights,
)
from semiseg.engine.checkpoint import (
    ModelInfo,
    check_initial,
    initial_weights,
    latest_checkpoint,
    load_initial,
    load_model_folder,
    load_tensors,
    named_step,
    remove_old_checkpoints,
    require_finite,
    save_checkpoint,
    save_model,
)
from semiseg.engine.logs import LOG_NAME, TrainingLog, read_log, start_trackers
from semiseg.engine.optim import build_optimizer, learning_rate, pairwise_warmup
from semiseg.engine.processes import parts_per_step
from semiseg.engine.replay import write_nonfinite_step
from semiseg.engine.session import same_on_all_ranks
from semiseg.engine.step import StepPlan, TrainStep
from semiseg.engine.validation import validation_losses
from semiseg.errors import StepError, UserError, UserNotice, lack_of_memory
from semiseg.files import write_text
from semiseg.losses.learned import COLOUR_COUNTS
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch

# Scores a model on the validation set: {"mask_AP": ..., ...} on the main process, None on the others.
Validate = Callable[[Segmenter], dict[str, float] | None]


@dataclass
class TrainState:
    """Everything that one process of a run holds; built by `prepare`, changed only by `optimizer_step`."""

    config: RunConfig
    accelerator: Accelerator
    step_module: TrainStep
    wrapped: nn.Module  # the same under data parallelism and mixed precision
    optimizer: Any
    ema: AveragedModel | None  # running average of the model's weights, or None
    steps: int
    parts: int  # accumulation parts of this process per step
    step: int = 0  # optimizer steps done


@dataclass(frozen=True)
class StepReport:
    """Numbers of one optimizer step, still on the device: this process's share, to be averaged over processes."""

    losses: Tensor  # (len(TrainStep.loss_names),) unweighted
    weighted: Tensor  # (len(TrainStep.loss_names),)
    counts: Tensor  # (len(TrainStep.count_names),) of the whole step, over all processes
    stop: bool  # whether a signal has reached any process; the same on all of them


@dataclass
class _Window:
    """What has been seen since the last log line."""

    losses: list[Tensor] = field(default_factory=list)
    weighted: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    data_seconds: float = 0.0

    def add(self, report: StepReport) -> None:
        self.losses.append(report.losses)
        self.weighted.append(report.weighted)
        self.counts.append(report.counts)


def prepare(config: RunConfig, data: RunData, accelerator: Accelerator) -> TrainState:
    """Builds model and optimiser, loads initial weights (`init_from`), and wraps them for the processes at hand."""
    if config.runtime.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would go on in float32 without a word
        raise UserError("runtime.precision = 'fp16' needs a GPU; choose 'no' or 'bf16'")
    num_classes = len(data.train.class_names)
    if config.init_from is None:
        with accelerator.main_process_first():  # one download for all
            step_module = build_step(config, num_classes=num_classes)
    else:
        other_head = check_initial(Path(config.init_from), config.model)
        step_module = build_step(without_initial_weights(config), num_classes=num_classes)
        weights = initial_weights(Path(config.init_from))
        afresh = load_initial(step_module.model, weights, where=config.init_from, other_head=other_head)
        if afresh and accelerator.is_main_process:
            message = f"{config.init_from} has other classes: {', '.join(afresh)} start afresh"
            warnings.warn(message, UserNotice, stacklevel=2)
    if accelerator.is_main_process and step_module.affinity is not None:
        learning, box = "objective.affinity = 'learned'", config.objective.box
        if not train_dataset(config, data).has_masks():
            message = f"{learning}: no training instance has a mask, so that no edge is learned"
            warnings.warn(message, UserNotice, stacklevel=2)
        if box != "projection+learned":
            message = f"{learning}: objective.box = {box!r} takes none of the learned edges, 'projection+learned' does"
            warnings.warn(message, UserNotice, stacklevel=2)
    require_normalisable(config, data, step_module.model, accelerator)
    if config.runtime.channels_last:
        step_module.to(memory_format=torch.channels_last)
    if config.runtime.compile:
        compile_network(step_module.model)
    optimizer = build_optimizer(step_module, config.optim, scaled=accelerator.scaler is not None)
    wrapped, prepared = accelerator.prepare(step_module, optimizer)
    decay = config.optim.ema_decay
    ema = None
    if decay is not None:
        ema = AveragedModel(step_module.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    steps = config.optim.num_steps(len(data.train.rows))
    parts = parts_per_step(config, accelerator.num_processes)
    return TrainState(config, accelerator, step_module, wrapped, prepared, ema, steps, parts)


def train(
    config: RunConfig,
    data: RunData,
    accelerator: Accelerator,
    *,
    out: Path,
    progress: bool | None,
    validate: Validate | None = None,
) -> TrainState:
    """Trains to the end of the run, continuing from the latest checkpoint under `out` where there is one.

    Args:
        out: the run's folder.
        progress: of `TrainingLog`.
        validate: called every `runtime.evaluate_every` steps on all processes; the best weights by its "mask_AP" are
            kept in `best/`. One that was interrupted after its step's checkpoint is done before the next step.

    Raises:
        UserError: on a loss or gradient of any process that is not finite, and then on all of them; the file named in
            the message replays the step. Also if the processes do not find the same checkpoint, and for norms that
            could not be computed.
        StepError: for any other error of a step.
        KeyboardInterrupt: after SIGINT or SIGTERM, with a checkpoint written.
    """
    state = prepare(config, data, accelerator)
    restore(state, out / "checkpoints")
    opened = open_log(state, out, progress=progress) if accelerator.is_main_process else nullcontext()
    state.wrapped.train()
    with StopOnSignal() as stop, opened as log:
        batches, window = _batches(state, data), _Window()
        while state.step < state.steps:
            if validate and state.step > 0 and state.step % config.runtime.evaluate_every == 0:
                window.started += _validate(state, validate, data, log, out)  # no part of the time of training
                if _has_lost_patience(state, out):
                    break
            report = _next_step(batches, state, window, stop, out)
            if report is None:
                _stop(state, out)
            window.add(report)
            if log:
                log.advance()
            if state.step % config.runtime.log_every == 0 or state.step == state.steps:
                _log_window(state, window, log)
                window = _Window()
            if report.stop:
                _stop(state, out)
            # The last step is saved too: an interruption of the evaluation that follows costs no training.
            if state.step % config.runtime.checkpoint_every == 0 or state.step == state.steps:
                _save(state, out)
        if any(gather_object([stop.requested])):  # since the last step
            _stop(state, out)
        if validate and config.optim.patience:
            _validate(state, validate, data, log, out)
            _take_best(state, out)
    return state


def _batches(state: TrainState, data: RunData) -> Iterator[Batch]:
    """This process's parts of the steps that are left."""
    accelerator = state.accelerator
    loader = build_training_loader(
        state.config,
        data,
        steps=state.steps,
        start_step=state.step,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


@contextmanager
def _named(state: TrainState, out: Path) -> Iterator[None]:
    """Has every error of a step say its number; one that nobody expected is written to a file, with its traceback.

    Raises:
        UserError: for a UserError, and where memory is short.
        StepError: for the rest, but for an OSError, which names its file.
    """
    step, rank = state.step + 1, state.accelerator.process_index
    try:
        yield
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(f"step {step}: ") else f"step {step}: {told}") from error
    except OSError:
        raise
    except Exception as error:
        if (lack := lack_of_memory(error)) is not None:
            remedy = "fewer images at a time (runtime.images_per_process) or smaller ones (data.short_sides) need less"
            raise UserError(f"step {step}: {lack}; {remedy}") from error
        path = out / f"error_step_{step:08d}_rank{rank}.txt"
        write_text(path, traceback.format_exc())
        reason = (str(error).strip().splitlines() or [""])[0]
        raise StepError(f"step {step}: {type(error).__name__}: {reason}; {path} has the whole error") from error


def _stop(state: TrainState, out: Path) -> NoReturn:
    """Ends the run as a signal wants it, with a checkpoint."""
    _save(state, out)
    raise KeyboardInterrupt(f"stopped after step {state.step} of {state.steps}; '--resume' continues")


def open_log(state: TrainState, out: Path, *, progress: bool | None) -> TrainingLog:
    """The run's log, continued from the step that the run continues from."""
    return TrainingLog(
        out,
        steps=state.steps,
        start_step=state.step,
        tensorboard=state.config.runtime.tensorboard,
        trackers=start_trackers(state.config, run_name=out.name),
        progress=progress,
    )


def _validate(state: TrainState, validate: Validate, data: RunData, log: TrainingLog | None, out: Path) -> float:
    """Scores the current weights, by their losses too, and keeps them as `best/` if none before were better.

    Gives the seconds that it took. What is logged already, before an interruption, is not done again.

    What was better before is what the log says, not what is in `best/`: after an interruption that may be of steps that
    are about to be done again. The log is written last: without its line all of this is done again.
    """
    began = time.perf_counter()
    if _is_validated(state, out):
        return 0.0
    config, model = state.config, trained_model(state)
    metrics = validate(model)
    warmup = pairwise_warmup(state.step, state.steps, warmup_steps=config.objective.pairwise_warmup_steps)
    losses = validation_losses(config, data, state.step_module, model, state.accelerator, warmup=warmup)
    if metrics is None or log is None:
        return time.perf_counter() - began
    scores = (score for step, score in _validations(out).items() if step < state.step)
    metrics = {**metrics, **losses}
    if metrics.get("mask_AP", -1.0) > max(scores, default=-1.0):  # absent where no class has ground truth
        score = {"step": state.step, **metrics}
        save_model(out / "best", model.state_dict(), model_info(config, data), score=score)
    log.write({"step": state.step, "steps": state.steps, "seconds": log.seconds, "validation": metrics})
    return time.perf_counter() - began


def _validations(out: Path) -> dict[int, float]:
    """Step -> mask AP of each validation in the log."""
    lines = [line for line in read_log(out / LOG_NAME) if "validation" in line]
    return {line["step"]: line["validation"].get("mask_AP", -1.0) for line in lines}


def _has_lost_patience(state: TrainState, out: Path) -> bool:
    """Whether the last `optim.patience` validations were none better than one before; the same on all processes.

    If so, a checkpoint is written: an interruption of the evaluation that follows costs no training.
    """
    patience, scores = state.config.optim.patience, list(_validations(out).values())
    lost = 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])
    lost = bool(broadcast_object_list([lost])[0])
    if lost:
        _save(state, out)
    return lost


def _take_best(state: TrainState, out: Path) -> None:
    """Gives the model the weights of the best validation; the last ones stay where nothing could be measured."""
    state.accelerator.wait_for_everyone()
    same_on_all_ranks((out / "best").is_dir(), where=out)
    if (out / "best").is_dir():
        trained_model(state).load_state_dict(load_model_folder(out / "best")[0])


def _is_validated(state: TrainState, out: Path) -> bool:
    """Whether the main process has the current step's validation in its log; the same answer on all processes."""
    return bool(broadcast_object_list([state.step in _validations(out)])[0])


def optimizer_step(state: TrainState, parts: list[Batch], *, out: Path, stop: StopOnSignal | None = None) -> StepReport:
    """One update from `parts`, this process's accumulation parts as loaded.

    A signal to any process changes nothing in the step; that one came is reported to all of them.
    """
    accelerator, config, module = state.accelerator, state.config, state.step_module
    sent = [batch.to(accelerator.device, non_blocking=True) for batch in parts]
    plans = [module.plan(there, here) for there, here in zip(sent, parts, strict=True)]
    counts = torch.stack([plan.counts for plan in plans]).sum(0)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts, reduction="sum")
    rate = learning_rate(config.optim, step=state.step, steps=state.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    losses, weighted = _forward_backward(state, sent, plans, counts)
    broken, stopped = _on_any_rank(state, weighted, _clipped_norm(state), stop)
    if broken:
        what = _what_broke(state, sent, plans, counts, weighted)
        _stop_nonfinite(state, parts, counts, weighted, what, out)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    _observe_edges(state, losses, counts)
    if state.ema is not None:
        state.ema.update_parameters(state.step_module.model)
    state.step += 1
    return StepReport(losses, weighted, counts, stopped)


def _observe_edges(state: TrainState, losses: Tensor, counts: Tensor) -> None:
    """Tells the branch of learned affinity how it and colour judged the whole step's edges; nothing is read back."""
    module = state.step_module
    if module.affinity is None:
        return
    mean = losses[module.loss_names.index("affinity")]
    if state.accelerator.num_processes > 1:
        mean = state.accelerator.reduce(mean, reduction="mean")
    first = module.count_names.index("affinity")
    module.affinity.observe(mean * counts[first], counts[first + 1 : first + 1 + len(COLOUR_COUNTS)])


def _forward_backward(
    state: TrainState, parts: list[Batch], plans: list[StepPlan], counts: Tensor, *, exchange: bool = True
) -> tuple[Tensor, Tensor]:
    """Losses of this process's parts, unweighted and weighted; `exchange` averages the gradient over the processes."""
    accelerator = state.accelerator
    warmup = pairwise_warmup(state.step, state.steps, warmup_steps=state.config.objective.pairwise_warmup_steps)
    losses, weighted = [], []
    for number, (batch, plan) in enumerate(zip(parts, plans, strict=True), start=1):
        # Gradients are exchanged once a step, with the last part.
        with nullcontext() if exchange and number == len(parts) else accelerator.no_sync(state.wrapped):
            terms = state.wrapped(batch, plan, counts, warmup=warmup, processes=accelerator.num_processes)
            accelerator.backward(terms.total)
        names = state.step_module.loss_names
        losses.append(torch.stack([terms.unweighted[name].detach() for name in names]))
        weighted.append(torch.stack([terms.weighted[name].detach() for name in names]))
    return torch.stack(losses).sum(0), torch.stack(weighted).sum(0)


def _clipped_norm(state: TrainState) -> Tensor:
    """The norm of the gradient, still on the device; the gradient is clipped where `optim.clip_norm` says so."""
    limit = state.config.optim.clip_norm
    if limit is not None:
        return cast(Tensor, state.accelerator.clip_grad_norm_(state.wrapped.parameters(), limit))
    return nn.utils.get_total_norm([p.grad for p in state.wrapped.parameters() if p.grad is not None])


def _on_any_rank(state: TrainState, weighted: Tensor, norm: Tensor, stop: StopOnSignal | None) -> tuple[bool, bool]:
    """Whether on any process a loss or the gradient is not finite, and whether any of them was told to stop.

    The one place of a step where the host waits for the device: what follows changes the weights. (Under fp16 the
    scaler waits, too: it leaves out updates whose gradient is not finite, which is its way to find a scale.)
    """
    broken = (~torch.isfinite(weighted)).any()
    if state.accelerator.scaler is None:
        broken = broken | ~torch.isfinite(norm)
    flags = torch.stack([broken, torch.full_like(broken, stop is not None and stop.requested)]).int()
    if state.accelerator.num_processes > 1:
        flags = state.accelerator.reduce(flags, reduction="sum")
    code = int((flags[0] > 0) + 2 * (flags[1] > 0))  # one number, to be read once
    return code % 2 == 1, code >= 2


def _what_broke(
    state: TrainState, sent: list[Batch], plans: list[StepPlan], counts: Tensor, weighted: Tensor
) -> str | None:
    """What of this process's share of the step is not finite; None if only that of others."""
    values = dict(zip(state.step_module.loss_names, weighted.tolist(), strict=True))
    losses = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    if any(gather_object([losses != ""])):
        return f"the loss is not finite ({losses})" if losses else None
    # The gradient at hand is that of all processes: whose share of it broke it is seen without the exchange.
    state.optimizer.zero_grad(set_to_none=True)
    _forward_backward(state, sent, plans, counts, exchange=False)
    parameters = state.step_module.named_parameters()
    names = [
        name.removeprefix("model.") for name, p in parameters if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if any(gather_object([bool(names)])):
        return f"the gradient is not finite ({len(names)} parameters, first {names[0]})" if names else None
    return "the norm of the gradient is not finite"


def _stop_nonfinite(
    state: TrainState, parts: list[Batch], counts: Tensor, weighted: Tensor, what: str | None, out: Path
) -> NoReturn:
    """Writes the step where it broke, then stops every process with the same sentence."""
    messages = []
    if what is not None:
        path = write_nonfinite_step(out, state, parts, counts, weighted)
        messages.append(
            f"step {state.step + 1}: {what}; the weights were not updated; "
            f"'semiseg train --replay {path}' runs the step again"
        )
    raise UserError(gather_object(messages)[0])


def _next_step(
    batches: Iterator[Batch], state: TrainState, window: _Window, stop: StopOnSignal, out: Path
) -> StepReport | None:
    """Loads and does the next step; None if a signal came before it was loaded."""
    with _named(state, out):
        parts = _next_parts(batches, state, window, stop)
        return None if parts is None else optimizer_step(state, parts, out=out, stop=stop)


def _next_parts(batches: Iterator[Batch], state: TrainState, window: _Window, stop: StopOnSignal) -> list[Batch] | None:
    """This process's parts of the next step; None if a signal came first.

    One of several processes must wait for them whatever comes: the others may be in the step already.
    """
    waited = time.perf_counter()
    if state.accelerator.num_processes > 1:
        parts = [next(batches) for _ in range(state.parts)]
    else:
        try:
            with stop.at_once():
                parts = [next(batches) for _ in range(state.parts)]
        except KeyboardInterrupt:
            return None
    window.data_seconds += time.perf_counter() - waited
    return parts


def _log_window(state: TrainState, window: _Window, log: TrainingLog | None) -> None:
    """Averages the window over its steps and over the processes, and writes one record."""
    steps = len(window.losses)
    means = torch.stack([torch.stack(window.losses).mean(0), torch.stack(window.weighted).mean(0)]).double()
    if state.accelerator.num_processes > 1:
        means = state.accelerator.reduce(means, reduction="mean")
    if log is None:
        return
    module = state.step_module
    losses, weighted = means.tolist()
    counts = torch.stack(window.counts).mean(0).tolist()
    elapsed = time.perf_counter() - window.started
    log.seconds += elapsed
    log.write(
        {
            "step": state.step,
            "steps": state.steps,
            "seconds": round(log.seconds, 3),
            "images_per_second": round(steps * state.config.optim.batch_size / elapsed, 2),
            "data_seconds": round(window.data_seconds, 3),
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "losses": dict(zip(module.loss_names, losses, strict=True)),
            "weighted": dict(zip(module.loss_names, weighted, strict=True)),
            "counts": dict(zip(module.count_names, counts, strict=True)),
        }
        | ({} if module.affinity is None else {"learned_share": float(module.affinity.trust())})
    )


def restore(state: TrainState, folder: Path) -> None:
    """Continues exactly where the latest checkpoint of `folder` was written; does nothing if there is none."""
    path = latest_checkpoint(folder)
    same_on_all_ranks(path.name if path else None, where=folder)
    if path is None:
        return
    advice = "remove it to continue from the checkpoint before, or from the start"
    try:
        saved = load_tensors(path)
        if saved["step"] != named_step(path) or saved["step"] > state.steps:
            raise UserError(f"{path}: says that it is of step {saved['step']!r}, expected its name's, of {state.steps}")
        _load(state, saved)
        for part in (trained_model(state), state.step_module):  # also what is not evaluated, such as a gate's sums
            require_finite(part.state_dict(), where=path)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: no checkpoint of this run ({type(error).__name__}); {advice}") from error
    if state.accelerator.is_main_process:
        remove_old_checkpoints(folder, keep=state.config.runtime.keep_checkpoints)


def _load(state: TrainState, saved: dict[str, Any]) -> None:
    state.step_module.model.load_state_dict(saved["model"])
    if state.step_module.affinity is not None:
        state.step_module.affinity.load_state_dict(saved["affinity"])
    state.optimizer.load_state_dict(saved["optimizer"])
    if state.accelerator.scaler is not None and saved["scaler"]:
        state.accelerator.scaler.load_state_dict(saved["scaler"])
    if state.ema is not None:
        state.ema.module.load_state_dict(saved["ema"])
        state.ema.n_averaged.fill_(saved["step"])
    state.step = int(saved["step"])


def _save(state: TrainState, out: Path) -> None:
    """Writes a checkpoint on the main process; the others wait, so that none runs ahead of a stop."""
    if state.accelerator.is_main_process:
        scaler, affinity = state.accelerator.scaler, state.step_module.affinity
        saved = {
            "model": state.step_module.model.state_dict(),
            "affinity": affinity.state_dict() if affinity is not None else {},
            "optimizer": state.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "ema": state.ema.module.state_dict() if state.ema is not None else {},
            "step": state.step,
        }
        save_checkpoint(out / "checkpoints", saved, step=state.step, keep=state.config.runtime.keep_checkpoints)
    state.accelerator.wait_for_everyone()


def trained_model(state: TrainState) -> Segmenter:
    """The model to evaluate and to keep: the averaged weights where there are any."""
    return cast(Segmenter, state.ema.module) if state.ema is not None else state.step_module.model


def save_trained(state: TrainState, data: RunData, folder: Path) -> None:
    """Writes the final model folder (main process)."""
    if state.accelerator.is_main_process:
        save_model(folder, trained_model(state).state_dict(), model_info(state.config, data))
    state.accelerator.wait_for_everyone()


def model_info(config: RunConfig, data: RunData) -> ModelInfo:
    """What the model folder says beside the weights."""
    return ModelInfo(
        config=config.model,
        class_names=data.train.class_names,
        category_ids=data.train.category_ids,
        inference=config.inference,
        value_range=data.train.reading.value_range,
    )
