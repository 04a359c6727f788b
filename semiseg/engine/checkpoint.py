"""What is written during and after training: checkpoints (to continue) and model folders (to use).

Everything is written by the rules of `semiseg.files`: an interruption leaves the old state or the new one.
Only tensors and plain values are stored and loaded (`weights_only`): a file cannot run code. A file whose content has
changed since it was written is refused: checkpoints have checksums inside, a model folder has one of its weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save
from torch import Tensor, nn

from semiseg.config import InferenceConfig, ModelConfig
from semiseg.config.former import leaves, with_present_keys
from semiseg.config.read import file_digest, parse_config
from semiseg.config.section import Section
from semiseg.engine.logs import LOG_NAME, read_log
from semiseg.errors import UserError
from semiseg.files import settle, whole_file, whole_folder, write_text
from semiseg.models.segmenter import with_present_names
from semiseg.project import WEIGHTS_NAME, weights_file

CHECKPOINT_NAME = re.compile(r"step_(\d{8,})\.pt")
MODEL_FORMAT = 2  # 1: keys of before the parts had tables, sizes of validation beside them
DESCRIPTION_NAME, SCORE_NAME = "config.json", "best.json"  # in a model folder; the latter only in a run's best/
# Settings that change neither the names and shapes of the weights nor what is computed from them: of training, and the
# stride of the mask logits, which only says how far they are upsampled.
FREE_SETTINGS = {
    *("backbone.weights", "backbone.frozen_stages"),
    *("detector.centre_radius", "mask_head.stride", "mask_head.max_positives", "mask_head.targets"),
}
PYRAMID_LEVEL = re.compile(r"(neck\.fpn\.(?:inner|layer)_blocks\.)(\d+)\.")
BATCH_NORMS = ("bn", "sync_bn", "frozen_bn")  # one function in evaluation, with the same weights
BATCHES_SEEN = ".num_batches_tracked"  # counter of `bn` and `sync_bn`; nothing is computed from it


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder says of its model beside the weights."""

    config: ModelConfig  # the parts of the network and its normalisation
    inference: InferenceConfig  # image size and limits of its validation
    class_names: tuple[str, ...]  # name of each label
    category_ids: tuple[int, ...]  # id of each label in the annotation file that it was trained on
    value_range: tuple[float, float] | None = None  # `data.value_range` of its training


class _Description(Section):
    """`config.json` of a model folder; those from before `weights_sha256` was kept have none."""

    format: int
    model: ModelConfig
    inference: InferenceConfig
    class_names: list[str]
    category_ids: list[int]
    weights_sha256: str | None = None
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _rays_are_predicted(self) -> _Description:
        if self.inference.decoding == "polarmask":
            self.model.require_rays("inference.decoding = 'polarmask'")
        return self

    @model_validator(mode="after")
    def _labels_are_told_apart(self) -> _Description:
        names, ids = self.class_names, self.category_ids
        if not names or len(names) != len(ids):
            raise ValueError(f"{len(names)} class_names and {len(ids)} category_ids: needs one of each for every class")
        broken = [name for name in names if name.encode("utf-8", "replace").decode("utf-8") != name]
        if broken:
            raise ValueError(f"'class_names' has {broken[0]!r}, allowed: texts of whole characters")
        for what, values in (("class_names", names), ("category_ids", ids)):
            value, count = Counter(values).most_common(1)[0]
            if count > 1:
                raise ValueError(f"{what!r} has {value!r} {count} times; classes must differ")
        return self


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """torch.save as `whole_file`."""
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # What stopped the file (a full disk, too little memory, a signal) is lost in torch's own error.
            raise error.__context__ or error from None


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a file of `save_tensors` on the CPU; a broken one is a `UserError`, also if a single bit of it changed."""
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums in it
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
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
    remove_old_checkpoints(folder, keep=keep)
    return path


def remove_old_checkpoints(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep`: one more is there where a process was killed just after it had written one."""
    for old in _checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)), key=named_step)


def named_step(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.stem.removeprefix("step_"))


def save_model(
    folder: Path, state: dict[str, Tensor], info: ModelInfo, *, score: Mapping[str, Any] | None = None
) -> None:
    """Writes a model folder, in place of an existing one: its two files, and beside them the score if there is one."""
    with whole_folder(folder, replace=True) as new:
        weights = save({key: value.detach().cpu().contiguous() for key, value in state.items()})
        description = {
            "format": MODEL_FORMAT,
            "model": info.config.model_dump(mode="json"),
            "inference": info.inference.model_dump(mode="json"),
            "class_names": list(info.class_names),
            "category_ids": list(info.category_ids),
            **({} if info.value_range is None else {"value_range": list(info.value_range)}),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        (new / WEIGHTS_NAME).write_bytes(weights)
        (new / DESCRIPTION_NAME).write_text(_json(description), encoding="utf-8")
        if score is not None:
            (new / SCORE_NAME).write_text(_json(score), encoding="utf-8")


def holds_no_more_than_a_model(folder: Path) -> bool:
    """Whether `save_model` would take away a model at most: no folder, an empty one, or one with its files alone."""
    if not folder.exists():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {WEIGHTS_NAME, DESCRIPTION_NAME, SCORE_NAME}


def load_model_folder(folder: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """Reads a model folder: its weights (CPU) and its description.

    The description's `config.weights` is None: a model built from it needs no file or download of the backbone's
    initial weights, which would be overwritten.
    """
    said, info = _read_description(folder)
    path = folder / WEIGHTS_NAME
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model folder: {WEIGHTS_NAME} is missing") from None
    except Exception as error:
        raise UserError(f"{folder}: not a readable model folder, or damaged ({type(error).__name__})") from error
    if said.weights_sha256 not in (None, file_digest(path, 64)):
        raise UserError(
            f"{path}: not the weights that {DESCRIPTION_NAME} describes: damaged, or exchanged; without its "
            "'weights_sha256' they are taken as they are"
        )
    require_finite(weights, where=path)
    return weights, info


def require_finite(weights: Mapping[str, Tensor], *, where: Path) -> None:
    """A `UserError` if any of the weights is not a finite number: what they compute is not, either."""
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(f"{where}: {len(broken)} of its weights are not finite numbers, first: {broken[0]}")


def read_model_info(folder: Path) -> ModelInfo:
    """The description of a model folder without its weights, as in `load_model_folder`."""
    return _read_description(folder)[1]


def _read_description(folder: Path) -> tuple[_Description, ModelInfo]:
    if not folder.exists():
        settle(folder.parent)  # a process that was to replace it may have been killed between two renames
    path = folder / DESCRIPTION_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = f"not a model folder: {path.name} is missing" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {missing}") from None
    except Exception as error:
        raise UserError(f"{folder}: not a readable model folder, or damaged ({type(error).__name__})") from error
    if isinstance(values, dict) and {"identity", "config"} <= set(values):
        raise UserError(f"{folder}: {_unfinished(folder)}; 'semiseg train {path} --out {folder} --resume' continues it")
    format_ = values.get("format") if isinstance(values, dict) else None
    if format_ == 1:
        values = _of_first_format(values)
    elif format_ != MODEL_FORMAT:
        raise UserError(f"{path}: format {format_!r} is not known, expected {MODEL_FORMAT}")
    said = parse_config(_Description, values, where=str(path))
    return said, ModelInfo(
        config=said.model.with_backbone_weights("random"),
        inference=said.inference,
        class_names=tuple(said.class_names),
        category_ids=tuple(said.category_ids),
        value_range=None if said.value_range is None else (said.value_range[0], said.value_range[1]),
    )


def _of_first_format(values: dict[str, Any]) -> dict[str, Any]:
    """A description of the first format in the present one; what is wrong with it is left for the reader to say."""
    sizes = {f"val_{name}": values[name] for name in ("short_side", "long_side") if name in values}
    present = with_present_keys({"model": values.get("model"), "data": sizes})
    rest = {name: value for name, value in values.items() if name not in ("short_side", "long_side")}
    return {**rest, "format": MODEL_FORMAT, "model": present["model"], "inference": present.get("inference")}


def _unfinished(run: Path) -> str:
    """How far the run of a folder without a model has come: to its last checkpoint, from which it continues."""
    log, saved = read_log(run / LOG_NAME), latest_checkpoint(run / "checkpoints")
    step = named_step(saved) if saved else 0
    length = f" of {log[-1]['steps']}" if log and "steps" in log[-1] else ""
    return f"the run has not ended (step {step}{length})"


def check_initial(source: Path, config: ModelConfig) -> bool:
    """Refuses weights of a network that computes something else, though they may fit in names and shapes.

    Only the kind of the mask head may differ: whether it does is returned, and that head then starts afresh. The
    UserError has every setting that differs as a line of TOML to paste. A model folder says what network its
    weights are of; a checkpoint file does not and is not checked.
    """
    path = weights_file(source)
    if path.name != WEIGHTS_NAME:
        return False
    theirs = read_model_info(path.parent).config
    other_head = theirs.mask_head.kind != config.mask_head.kind
    if other_head:
        theirs = theirs.model_copy(update={"mask_head": config.mask_head})
    wanted, now = (leaves(item.model_dump(mode="json")) for item in (theirs, config))
    names = differing_settings(theirs, config)
    if not names:
        return other_head
    lines = [f"{name} = {json.dumps(wanted[name])}" for name in names]
    width = max(map(len, lines))
    shown = [f"{line:<{width}}  # now {json.dumps(now.get(name))}" for name, line in zip(names, lines, strict=True)]
    raise UserError(
        "\n".join([f"{source}: its weights are of another network; to start from them set", "", "[model]", *shown])
    )


def differing_settings(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Names of the settings by which two networks compute different things from weights of the first."""
    wanted, now = (leaves(item.model_dump(mode="json")) for item in (theirs, ours))
    return [
        name
        for name, value in wanted.items()
        if name not in FREE_SETTINGS
        and now.get(name) != value
        and not (name.endswith("norm") and {value, now.get(name)} <= set(BATCH_NORMS))
    ]


def initial_weights(source: Path) -> dict[str, Tensor]:
    """Weights to start from: a model folder, or a checkpoint file (its EMA weights where it has them)."""
    path = weights_file(source)
    if path.name == WEIGHTS_NAME:
        return load_model_folder(path.parent)[0]
    state = load_tensors(path)
    if "model" not in state:
        raise UserError(f"{path}: holds no 'model' to start from; its keys are {', '.join(sorted(state)[:8])}")
    weights = state["ema"] if state.get("ema") else state["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: its 'model' is no table of weights")
    require_finite(weights, where=path)
    return weights


def load_initial(model: nn.Module, weights: dict[str, Tensor], *, where: str, other_head: bool = False) -> list[str]:
    """Copies weights into the model; returns the keys left as they were because the number of classes differs.

    Of another mask head nothing is taken. A UserError if any other key is missing, unknown or of another shape. Weights
    of frozen batch norms fit trained ones and the reverse: what only the latter have is a counter.
    """
    own, weights = model.state_dict(), with_present_names(weights)
    if other_head:
        more = pyramid_levels(weights) - pyramid_levels(own)
        weights = {_moved_level(key, more): value for key, value in weights.items() if _is_shared(key, more)}
        own = {key: value for key, value in own.items() if _is_shared(key, -more)}
    reshaped = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    unmatched = sorted(key for key in set(own) ^ set(weights) if not key.endswith(BATCHES_SEEN))
    wrong = unmatched + [key for key in reshaped if "class_logits" not in key]
    if wrong:
        raise UserError(f"{where}: {len(wrong)} weights do not fit the model, first: {', '.join(wrong[:5])}")
    model.load_state_dict({key: value for key, value in weights.items() if key not in reshaped}, strict=False)
    return reshaped


def pyramid_levels(names: Iterable[str]) -> int:
    """How many levels of the backbone the FPN with these names of weights takes."""
    return 1 + max((int(match[2]) for match in map(PYRAMID_LEVEL.match, names) if match), default=-1)


def _is_shared(name: str, more: int) -> bool:
    """Not of the mask head, nor of so many finest levels of the pyramid, which serve a mask head alone."""
    level = PYRAMID_LEVEL.match(name)
    return not name.startswith("mask_head.") and (level is None or int(level[2]) >= more)


def _moved_level(name: str, more: int) -> str:
    """The name in an FPN that takes fewer levels by so many: levels are counted from the finest."""
    return PYRAMID_LEVEL.sub(lambda level: f"{level[1]}{int(level[2]) - more}.", name)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `whole_file`."""
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
