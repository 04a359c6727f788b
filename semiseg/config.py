"""Strict, typed configuration of one run. Unknown key, wrong type, impossible value: an error naming the path.

Configuration stops at the builders (`build_model`, `build_loader`, ...): below them everything is an explicit keyword
argument. Derived values (number of classes, warm-up lengths, number of steps) are properties or come from the data,
never typed twice. The digest of a run covers what can change its numbers and nothing else (`RunConfig.identity`).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from semiseg.errors import UserError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=32)]  # of an image in pixels; 32 is the coarsest stride of the backbone
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Config = TypeVar("Config", bound=BaseModel)


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, values are frozen, types are not coerced from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ShapesConfig(Section):
    """The embedded data set; ignored unless `data.format = "shapes"`."""

    image_size: Side = 128
    train_images: PositiveInt = 4000
    val_images: PositiveInt = 200
    train_seed: Seed = 1
    val_seed: Seed = 2


class DataConfig(Section):
    """Where images and annotations are and how they become batches.

    `root` holds the data set and its Arrow cache. For COCO the four names are relative to `root`.
    """

    format: Literal["shapes", "coco"] = "coco"
    root: str = "data/coco"
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    shapes: ShapesConfig = ShapesConfig()
    short_sides: Annotated[list[Side], Field(min_length=1)] = [640, 672, 704, 736, 768, 800]
    long_side: Side = 1333
    val_short_side: Side = 800
    val_long_side: Side = 1333
    flip: Probability = 0.5
    bottom_rows_without_affinity: Annotated[int, Field(ge=0)] = 10


class SupervisionConfig(Section):
    """Which training instances keep their mask.

    source: `split` (classes of `split`'s seen side keep theirs, by its mask fraction where it gives one),
        `masks` (every annotated mask), `boxes` (none), `as_annotated` (an instance uses the mask it has).
    split: name or path of a class split; also defines the seen and unseen class groups of the evaluation.
    """

    source: Literal["split", "masks", "boxes", "as_annotated"] = "as_annotated"
    split: str | None = None

    @model_validator(mode="after")
    def _split_is_named(self) -> SupervisionConfig:
        if self.source == "split" and self.split is None:
            raise ValueError("source = 'split' needs 'split', the name or path of a class split")
        return self


class ObjectiveConfig(Section):
    """Which mask loss an instance gets, by its supervision, and the constants of the BoxInst losses (METHOD section 2).

    box: `box_as_mask` trains the Dice loss on the filled box (the first row of the paper's Table 3).
    """

    mask: Literal["dice", "labelled"] = "dice"
    box: Literal["none", "projection", "projection+pairwise", "box_as_mask"] = "projection+pairwise"
    affinity_threshold: Probability = 0.3
    affinity_size: Literal[3, 5, 7] = 3
    affinity_dilation: Annotated[int, Field(ge=1, le=64)] = 2
    pairwise_warmup_steps: Annotated[int, Field(ge=0)] | None = None


Norm = Literal["bn", "sync_bn", "gn", "frozen_bn"]


class ModelConfig(Section):
    """FCOS + CondInst; the defaults are the paper's ResNet-50-FPN.

    backbone: `small` is the two-blocks-per-stage network for Shapes, its widths in `small_widths`.
    weights: of the backbone: `imagenet` (torchvision's), `random`, or a path to a state dict.
    frozen_stages: how many of (stem + first stage, second, ...) are not trained; 1 is the paper's.
    stride_in_1x1: bottlenecks stride in their first 1x1 (the reference's weights), not in the 3x3 (torchvision's).
    strides: of the levels that predict; mask_feature_stride: of the mask branch; mask_stride: of the mask logits.
    level_ranges: boundaries of max(l, t, r, b) in pixels between consecutive levels, one fewer than levels.
    """

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "small"] = "resnet50"
    weights: str = "imagenet"
    small_widths: list[PositiveInt] = [24, 48, 96, 160]
    backbone_norm: Norm = "frozen_bn"
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1
    stride_in_1x1: bool = False
    neck_channels: PositiveInt = 256
    strides: list[PositiveInt] = [8, 16, 32, 64, 128]
    level_ranges: list[PositiveInt] = [64, 128, 256, 512]
    tower_convs: Annotated[int, Field(ge=0)] = 4
    tower_groups: PositiveInt = 32
    centre_radius: Annotated[float, Field(gt=0)] = 1.5
    mask_branch_channels: PositiveInt = 128
    mask_branch_convs: Annotated[int, Field(ge=0)] = 4
    mask_branch_norm: Norm = "bn"
    mask_channels: PositiveInt = 16
    mask_feature_stride: PositiveInt = 8
    mask_stride: PositiveInt = 4
    dynamic_channels: PositiveInt = 8
    dynamic_layers: PositiveInt = 3
    max_mask_positives: PositiveInt = 64
    pixel_mean: list[float] = [123.675, 116.28, 103.53]
    pixel_std: list[Annotated[float, Field(gt=0)]] = [58.395, 57.12, 57.375]
    score_threshold: Probability = 0.05
    candidates_per_level: PositiveInt = 1000
    nms_threshold: Probability = 0.6
    max_detections: PositiveInt = 100

    @model_validator(mode="after")
    def _weights_exist(self) -> ModelConfig:
        if self.backbone == "small" and self.weights == "imagenet":
            raise ValueError("backbone 'small' has no ImageNet weights: set weights to 'random' or a path")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if len(self.level_ranges) != len(self.strides) - 1:
            raise ValueError(f"level_ranges needs {len(self.strides) - 1} values for {len(self.strides)} strides")
        if sorted(self.level_ranges) != self.level_ranges:
            raise ValueError("level_ranges must ascend")
        if any(b != 2 * a for a, b in pairwise(self.strides)):
            raise ValueError("each of strides must be twice the one before")
        if self.strides[0] not in (4, 8) or len(self.strides) < 3:
            raise ValueError("strides must start at 4 or 8 and have at least 3 levels")
        if self.mask_feature_stride not in (4, 8, 16) or self.mask_feature_stride % self.mask_stride:
            raise ValueError("mask_feature_stride must be 4, 8 or 16 and a multiple of mask_stride")
        if self.neck_channels % self.tower_groups:
            raise ValueError("neck_channels must divide by tower_groups")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3:
            raise ValueError("pixel_mean and pixel_std have three values, in RGB order")
        return self

    @property
    def size_divisor(self) -> int:
        """Padded images divide by it: the coarsest stride of the backbone, 32."""
        return 32


class OptimConfig(Section):
    """Optimiser and schedule; the defaults are the paper's 1x. Exactly one of steps and epochs gives the length.

    schedule: `step` divides the rate by ten at `milestones` (fractions of the run); `one_cycle` rises and falls
        along a cosine. warmup_steps only for `step`; None = 1000, at most a ninth of the run.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["step", "one_cycle", "constant"] = "step"
    milestones: list[Probability] = [2 / 3, 8 / 9]
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> OptimConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} must divide by accumulation {self.accumulation}")
        return self

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps of the run: given, or from epochs (an epoch shows each of `num_images` images once)."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_images / self.batch_size))


class RuntimeConfig(Section):
    """How a run is executed; nothing here is part of its identity."""

    workers: Annotated[int, Field(ge=0)] = 2
    threads: Annotated[int, Field(ge=0)] = 0  # per process; 0 = torch's own choice
    precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # steps; 0 = only at the end
    tensorboard: bool = True
    channels_last: bool = False


class RunConfig(Section):
    """Everything that one training run needs.

    init_from: path of a checkpoint or model folder whose weights the run starts from (weights only).
    """

    data: DataConfig = DataConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig(steps=90_000)
    runtime: RuntimeConfig = RuntimeConfig()
    seed: Seed = 0
    init_from: str | None = None

    @model_validator(mode="after")
    def _frozen_weights_are_good_ones(self) -> RunConfig:
        if self.model.weights == "random" and self.init_from is None and self.model.frozen_stages > 0:
            raise ValueError(
                "model.frozen_stages > 0 would freeze random weights: set model.frozen_stages = 0, "
                "or give model.weights or init_from"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What can change the numbers of the run: the config without paths, workers, logging and the split's name.

        A file of backbone weights is named by its content. The caller adds the digests of split, data and `init_from`.
        """
        values = self.model_dump(mode="json", exclude={"runtime", "init_from"})
        for name in ("root", "train_images", "train_annotations", "val_images", "val_annotations"):
            del values["data"][name]
        if values["data"]["format"] != "shapes":
            del values["data"]["shapes"]
        del values["supervision"]["split"]
        if self.model.weights not in ("imagenet", "random"):
            values["model"]["weights"] = file_digest(Path(self.model.weights))
        if self.runtime.precision != "no":
            values["precision"] = self.runtime.precision
        return values


def digest(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path, length: int = 16) -> str:
    """Hex digest of a file's content; a missing file is a `UserError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:length]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file; a syntax error or an unreadable file is a `UserError` that names it."""
    try:
        return tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds a table; anything else is a `UserError` that names it."""
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a table of values, not {type(values).__name__}")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark at the start
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's TOML file and applies `a.b=c` overrides."""
    return parse_config(RunConfig, apply_overrides(read_toml(path), overrides), where=str(path))


def parse_config(kind: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """Validates `values`; every error becomes one sentence with place, value and the allowed or nearest ones."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, item, where) for item in error.errors())) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set; c is read as a TOML value, or as text if it is none."""
    result = copy.deepcopy(values)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not all(key.strip().split(".")):
            raise UserError(f"--set {item!r}: expected the form a.b=value")
        table = result
        *parents, last = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {item!r}: {parent!r} is a value, not a table")
        table[last] = _toml_value(text.strip())
    return result


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `change` laid over it, key by key; lists and values are replaced whole.

    Raises:
        UserError: a key is a table in one of them and a value in the other.
    """
    result = dict(base)
    for key, value in change.items():
        tables = [isinstance(item, dict) for item in (result.get(key, value), value)]
        if any(tables) and not all(tables):
            wrong = value if tables[0] else result[key]
            raise UserError(f"{key!r}: expected a table of values, not {wrong!r}")
        result[key] = merge(result[key], value) if all(tables) and key in result else value
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        allowed = _keys_at(kind, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Allowed here: {', '.join(allowed)}."
        return f"{where}: unknown key {path!r}.{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if not path:
        return f"{where}: {message}"
    shown = "" if isinstance(item["input"], dict) else f" (value: {item['input']!r})"
    return f"{where}: {path!r}: {message}{shown}"


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)
