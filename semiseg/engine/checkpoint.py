"""What is written during and after training: checkpoints (to continue) and model folders (to use).

Everything is written under a temporary name and renamed, so that an interruption leaves the old state or the new one.
Only tensors and plain values are stored and loaded (`weights_only`): a file cannot run code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semiseg.config import ModelConfig, Section, Side
from semiseg.config_files import parse_config
from semiseg.engine.logs import LOG_NAME, read_log
from semiseg.errors import UserError
from semiseg.resources import WEIGHTS_NAME, weights_file, write_text

CHECKPOINT_PATTERN = "step_*.pt"
MODEL_FORMAT = 1
# Settings that change neither the names and shapes of the weights nor what is computed from them: of training, of
# post-processing, and `mask_stride`, which only says how far the mask logits are upsampled.
FREE_SETTINGS = {
    *("weights", "frozen_stages", "centre_radius", "mask_stride", "max_mask_positives"),
    *("score_threshold", "candidates_per_level", "nms_threshold", "max_detections"),
}
BATCH_NORMS = ("bn", "sync_bn", "frozen_bn")  # one function in evaluation, with the same weights
BATCHES_SEEN = ".num_batches_tracked"  # counter of `bn` and `sync_bn`; nothing is computed from it


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder says of its model beside the weights.

    Attributes:
        config: sizes, normalisation and thresholds of the network.
        class_names: name of each label.
        category_ids: id of each label in the annotation file that it was trained on.
        short_side, long_side: the resize rule of its validation, in pixels.
    """

    config: ModelConfig
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    short_side: int
    long_side: int


class _Description(Section):
    """`config.json` of a model folder."""

    format: int
    model: dict[str, Any]
    class_names: list[str]
    category_ids: list[int]
    short_side: Side
    long_side: Side


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a temporary file of the same folder, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a file of `save_tensors` on the CPU; a broken one is a `UserError`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # on a damaged file torch's reader may raise anything, an OSError too
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a checkpoint file") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: no permission to read it") from None
        raise UserError(f"{path}: not a readable checkpoint: damaged, or not written by torch.save") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint: holds {type(state).__name__}, expected a table")
    return state


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Writes `step_NNNNNNNN.pt` and removes all but the newest `keep`."""
    path = folder / f"step_{step:08d}.pt"
    save_tensors(path, state)
    for old in sorted(folder.glob(CHECKPOINT_PATTERN))[:-keep]:
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    return max(folder.glob(CHECKPOINT_PATTERN), default=None)


def remove_leftovers(out: Path) -> None:
    """Removes what a killed process left half-written in a run's folder; nobody else may be writing there."""
    for path in (*out.glob(".*.tmp"), *out.glob(f"checkpoints/.{CHECKPOINT_PATTERN}.tmp*")):
        path.unlink(missing_ok=True)
    for path in (*out.glob(".model.*"), *out.glob(".best.*")):
        shutil.rmtree(path, ignore_errors=True)


def save_model(folder: Path, state: dict[str, Tensor], info: ModelInfo) -> None:
    """Writes a model folder: `model.safetensors` and `config.json`; an existing one is replaced as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary / WEIGHTS_NAME)
        description = {
            "format": MODEL_FORMAT,
            "model": info.config.model_dump(mode="json"),
            "class_names": list(info.class_names),
            "category_ids": list(info.category_ids),
            "short_side": info.short_side,
            "long_side": info.long_side,
        }
        (temporary / "config.json").write_text(json.dumps(description, indent=2, ensure_ascii=False), encoding="utf-8")
        temporary.chmod(0o755)  # others may use the model: temporary folders and safetensors are the owner's alone
        (temporary / WEIGHTS_NAME).chmod(0o644)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old{os.getpid()}")
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model_folder(folder: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """Reads a model folder: its weights (CPU) and its description.

    The description's `config.weights` is None: a model built from it needs no file or download of the backbone's
    initial weights, which would be overwritten.
    """
    info = read_model_info(folder)
    try:
        return load_file(folder / WEIGHTS_NAME), info
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model folder: {WEIGHTS_NAME} is missing") from None
    except Exception as error:
        raise UserError(f"{folder}: not a readable model folder, or damaged ({type(error).__name__})") from error


def read_model_info(folder: Path) -> ModelInfo:
    """The description of a model folder without its weights, as in `load_model_folder`."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model folder: {path.name} is missing") from None
    except Exception as error:
        raise UserError(f"{folder}: not a readable model folder, or damaged ({type(error).__name__})") from error
    if isinstance(values, dict) and {"identity", "config"} <= set(values):
        raise UserError(f"{folder}: {_unfinished(folder)}; 'semiseg train {path} --out {folder} --resume' continues it")
    if not isinstance(values, dict) or values.get("format") != MODEL_FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: format {found!r} is not known, expected {MODEL_FORMAT}")
    said = parse_config(_Description, values, where=str(path))
    return ModelInfo(
        config=parse_config(ModelConfig, {**said.model, "weights": "random"}, where=str(path)),
        class_names=tuple(said.class_names),
        category_ids=tuple(said.category_ids),
        short_side=said.short_side,
        long_side=said.long_side,
    )


def _unfinished(run: Path) -> str:
    """How far the run of a folder without a model has come: to its last checkpoint, from which it continues."""
    log, saved = read_log(run / LOG_NAME), latest_checkpoint(run / "checkpoints")
    step = int(saved.stem.removeprefix("step_")) if saved else 0
    length = f" of {log[-1]['steps']}" if log and "steps" in log[-1] else ""
    return f"the run has not ended (step {step}{length})"


def check_initial(source: Path, config: ModelConfig) -> None:
    """Refuses weights of a network that computes something else, though they may fit in names and shapes.

    A model folder says what network its weights are of; a checkpoint file does not and is not checked.

    Raises:
        UserError: lists every setting that differs as a line of TOML to paste, and what it is now.
    """
    path = weights_file(source)
    if path.name != WEIGHTS_NAME:
        return
    theirs = read_model_info(path.parent).config
    values = {name: getattr(theirs, name) for name in differing_settings(theirs, config)}
    if not values:
        return
    if theirs.backbone == "small" and config.weights == "imagenet":  # else the lines would not be accepted
        values["weights"] = "random"
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    width = max(map(len, lines))
    told = [
        f"{line:<{width}}  # now {json.dumps(getattr(config, name))}" for name, line in zip(values, lines, strict=True)
    ]
    raise UserError(
        "\n".join([f"{source}: its weights are of another network; to start from them set", "", "[model]", *told])
    )


def differing_settings(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Names of the settings by which two networks compute different things from weights of the first."""
    free = set(FREE_SETTINGS)
    if theirs.neck != "bifpn":
        free |= {"neck_repeats", "neck_norm"}
    if theirs.backbone != "small":
        free.add("small_widths")
    values = [(name, getattr(theirs, name), getattr(ours, name)) for name in ModelConfig.model_fields]
    return [
        name
        for name, one, other in values
        if name not in free and one != other and not (name.endswith("_norm") and {one, other} <= set(BATCH_NORMS))
    ]


def initial_weights(source: Path) -> dict[str, Tensor]:
    """Weights to start from: a model folder, or a checkpoint file (its EMA weights where it has them)."""
    path = weights_file(source)
    if path.name == WEIGHTS_NAME:
        return load_model_folder(path.parent)[0]
    state = load_tensors(path)
    if "model" not in state:
        raise UserError(f"{path}: holds no 'model' to start from; its keys are {', '.join(sorted(state)[:8])}")
    return state["ema"] if state.get("ema") else state["model"]


def load_initial(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> list[str]:
    """Copies weights into the model; returns the keys left as they were because the number of classes differs.

    Weights of frozen batch norms fit trained ones and the reverse: what only the latter have is a counter.

    Raises:
        UserError: if any other key is missing, unknown or of another shape.
    """
    own = model.state_dict()
    reshaped = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    unmatched = sorted(key for key in set(own) ^ set(weights) if not key.endswith(BATCHES_SEEN))
    wrong = unmatched + [key for key in reshaped if "class_logits" not in key]
    if wrong:
        raise UserError(f"{where}: {len(wrong)} weights do not fit the model, first: {', '.join(wrong[:5])}")
    model.load_state_dict({key: value for key, value in weights.items() if key not in reshaped}, strict=False)
    return reshaped


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
