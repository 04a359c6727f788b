"""Strict, typed configuration of one run. Unknown key, wrong type, impossible value: an error naming the path.

Configuration stops at the builders (`build_model`, `build_loader`, ...): below them everything is an explicit keyword
argument. Derived values (number of classes, warm-up lengths, number of steps) are properties or come from the data,
never typed twice. The digest of a run covers what can change its numbers and nothing else (`RunConfig.identity`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from semiseg.config_files import file_digest, parse_config, read_toml
from semiseg.errors import UserError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Layers = Annotated[int, Field(ge=0, le=100)]  # of a kind; more would be a slip, and take hours to build
Side = Annotated[int, Field(ge=32, le=2**16)]  # of an image in pixels; 32 is the coarsest stride of the backbone
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


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


class VocConfig(Section):
    """Image sets of PASCAL VOC 2012; ignored unless `data.format = "voc"`.

    `train_aug` is the usual 10 582 images: VOC's train and SBD's images outside VOC's val. `main_train` and
    `main_trainval` are detection lists, where most images have boxes only (docs/DATA.md). Any other name is a list in
    `ImageSets/Segmentation`.
    """

    train_set: str = "train_aug"
    val_set: str = "val"


class HubConfig(Section):
    """Splits of a data set on the Hugging Face Hub; ignored unless `data.root` begins with `hf:`."""

    train_split: str = "train"
    val_split: str = "validation"


class DataConfig(Section):
    """Where images and annotations are and how they become batches.

    `root` holds the data set and its Arrow cache. For COCO the four names are relative to `root`. `hf:OWNER/NAME` is a
    data set on the Hugging Face Hub, `hf:FOLDER` one of the same form on disk.
    """

    format: Literal["shapes", "coco", "voc"] = "coco"
    root: str = "data/coco"
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    shapes: ShapesConfig = ShapesConfig()
    voc: VocConfig = VocConfig()
    hub: HubConfig = HubConfig()
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
BIFPN_STRIDES = (8, 16, 32, 64, 128)


class ModelConfig(Section):
    """FCOS + CondInst; the defaults are the paper's ResNet-50-FPN.

    backbone: `small` is the two-blocks-per-stage network for Shapes, its widths in `small_widths`.
    weights: of the backbone: `imagenet` (torchvision's), `random`, or a path to a state dict.
    frozen_stages: how many of (stem + first stage, second, ...) are not trained; 1 is the paper's.
    stride_in_1x1: bottlenecks stride in their first 1x1 (the reference's weights), not in the 3x3 (torchvision's).
    deformable_interval: the 3x3 of every so many bottlenecks of C3..C5 is deformable; 0 = none.
    neck: `fpn`, or `bifpn` with `neck_repeats` repeats and `neck_norm` behind every convolution.
    strides: of the levels that predict; mask_feature_stride: of the mask branch; mask_stride: of the mask logits.
    level_ranges: boundaries of max(l, t, r, b) in pixels between consecutive levels, one fewer than levels.
    """

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "small"] = "resnet50"
    weights: str = "imagenet"
    small_widths: list[PositiveInt] = [24, 48, 96, 160]
    backbone_norm: Norm = "frozen_bn"
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1
    stride_in_1x1: bool = False
    deformable_interval: Annotated[int, Field(ge=0)] = 0
    neck: Literal["fpn", "bifpn"] = "fpn"
    neck_channels: PositiveInt = 256
    neck_repeats: Annotated[Layers, Field(ge=1)] = 6
    neck_norm: Norm = "bn"
    strides: list[PositiveInt] = [8, 16, 32, 64, 128]
    level_ranges: list[PositiveInt] = [64, 128, 256, 512]
    tower_convs: Layers = 4
    tower_groups: PositiveInt = 32
    centre_radius: Annotated[float, Field(gt=0)] = 1.5
    mask_branch_channels: PositiveInt = 128
    mask_branch_convs: Layers = 4
    mask_branch_norm: Norm = "bn"
    mask_channels: PositiveInt = 16
    mask_feature_stride: PositiveInt = 8
    mask_stride: PositiveInt = 4
    dynamic_channels: PositiveInt = 8
    dynamic_layers: Annotated[Layers, Field(ge=1)] = 3
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
    def _bottlenecks_are_there(self) -> ModelConfig:
        for name in ("deformable_interval", "stride_in_1x1"):
            if getattr(self, name) and self.backbone not in ("resnet50", "resnet101"):
                raise ValueError(
                    f"{name} needs a backbone with bottlenecks (resnet50, resnet101), not {self.backbone!r}"
                )
        return self

    @model_validator(mode="after")
    def _neck_has_the_levels(self) -> ModelConfig:
        if self.neck == "bifpn" and tuple(self.strides) != BIFPN_STRIDES:
            raise ValueError(f"neck 'bifpn' needs strides {list(BIFPN_STRIDES)}, not {self.strides}")
        if self.neck == "bifpn" and self.mask_feature_stride < BIFPN_STRIDES[0]:
            raise ValueError(f"neck 'bifpn' has no mask_feature_stride {self.mask_feature_stride}: take 8 or 16")
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
    """How a run is executed; of its identity only `precision`, and what `images_per_process` does to batch norm.

    images_per_process: at most so many images at once in a process, the rest in accumulation parts; 0 = no limit.
        Batch norm normalises those together, so that another limit may be another run (docs/MACHINES.md).
    batch_rule: `keep` takes `optim.batch_size` whatever the number of processes. `linear` takes images_per_process
        times the number of processes, with the learning rate in proportion and as many images in all: another run,
        with numbers of its own.
    compile: the network is compiled by torch before the first step, which takes minutes; for GPUs.
    fast_evaluation: the COCO numbers come from hotcoco (`pip install 'semiseg[fast]'`): the same ones, sooner.
    """

    workers: Annotated[int, Field(ge=0)] = 2
    threads: Annotated[int, Field(ge=0)] = 0  # per process; 0 = torch's own choice
    precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # steps; 0 = only at the end
    tensorboard: bool = True
    channels_last: bool = True
    compile: bool = False
    images_per_process: Annotated[int, Field(ge=0)] = 0
    batch_rule: Literal["keep", "linear"] = "keep"
    fast_evaluation: bool = False

    @model_validator(mode="after")
    def _linear_rule_knows_its_share(self) -> RuntimeConfig:
        if self.batch_rule == "linear" and self.images_per_process == 0:
            raise ValueError("batch_rule = 'linear' needs images_per_process, the images of one process and step")
        return self


# Of the training: raise it with every change of the code after which the same configuration trains to other numbers (a
# mended loss; other assignment, sampling, augmentation, first weights or order of images), so that nobody takes a run
# recorded before for one of today; not for speed or last bits. 1 is left out of identities: runs recorded before there
# was a version keep theirs.
ALGORITHM_VERSION = 1

# Of a run's identity, since they change its numbers, and yet no training reads them: see `engine.run.adopt_training`.
EVALUATION_KEYS = {
    "model": ("score_threshold", "candidates_per_level", "nms_threshold", "max_detections"),
    "data": ("val_short_side", "val_long_side"),
}

# Keys that came after results had been recorded: at these values they are left out of a run's identity, so that runs
# from before keep theirs.
ADDED_LATER: dict[str, dict[str, Any]] = {
    "model": {"deformable_interval": 0, "neck": "fpn", "neck_repeats": 6, "neck_norm": "bn"},
}


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

    def identity(self, *, initial: bool = False) -> dict[str, Any]:
        """What can change the numbers of the run: the config without paths, workers, logging and the split's name.

        A file of backbone weights is named by its content, a key that nothing reads has a fixed value. The caller adds
        the digests of split, data and `init_from`, and `engine.processes.normalised_together`.

        Args:
            initial: the run starts from the weights of another one, so that those of its backbone are not read.
        """
        values = self.model_dump(mode="json", exclude={"runtime", "init_from"})
        for name in ("root", "train_images", "train_annotations", "val_images", "val_annotations", "voc", "hub"):
            del values["data"][name]
        if values["data"]["format"] != "shapes":
            del values["data"]["shapes"]
        del values["supervision"]["split"]
        if not initial and self.model.weights not in ("imagenet", "random"):
            values["model"]["weights"] = file_digest(Path(self.model.weights))
        if self.runtime.precision != "no":
            values["precision"] = self.runtime.precision
        if ALGORITHM_VERSION != 1:
            values["algorithm"] = ALGORITHM_VERSION
        return without_unread(values, initial=initial)


def learns_masks(config: RunConfig) -> bool:
    """Whether an instance can get a mask loss: none can if all masks are withheld and boxes alone have no loss."""
    return config.supervision.source != "boxes" or config.objective.box != "none"


def without_unread(identity: dict[str, Any], *, initial: bool) -> dict[str, Any]:
    """An identity in which every key that nothing reads, under the kinds that are chosen, has one fixed value.

    So it does not depend on them. Any values would do; these are what the recorded runs have, which so keep their
    identities. For their sake `ADDED_LATER` is left out here, too.

    Args:
        identity: of `RunConfig.identity`, or of a version of it that kept these keys; changed in place.
        initial: of `RunConfig.identity`.
    """
    data, supervision, objective, model, optim = (
        identity[name] for name in ("data", "supervision", "objective", "model", "optim")
    )
    from_masks = supervision["source"] != "boxes"
    coloured = objective["box"] == "projection+pairwise"
    edges = coloured or (from_masks and objective["mask"] == "labelled")
    step, bifpn = optim["schedule"] == "step", model.get("neck") == "bifpn"
    for section, key, is_read, value in (
        (objective, "mask", from_masks, "dice"),
        (objective, "affinity_threshold", coloured, 0.1),
        (objective, "affinity_size", edges, 5),
        (objective, "affinity_dilation", edges, 2),
        (objective, "pairwise_warmup_steps", edges, 250),
        (data, "bottom_rows_without_affinity", edges, 0),
        (model, "weights", not initial, "random"),
        (model, "max_mask_positives", from_masks or objective["box"] != "none", 5),
        (model, "small_widths", model["backbone"] == "small", [24, 48, 96, 160]),
        (model, "neck_repeats", bifpn, 6),
        (model, "neck_norm", bifpn, "bn"),
        (optim, "momentum", optim["optimizer"] == "sgd", 0.9),
        (optim, "milestones", step, [2 / 3, 8 / 9]),
        (optim, "warmup_steps", step, None),
        (optim, "warmup_factor", step and optim["warmup_steps"] != 0, 0.001),
        (optim, "accumulation", False, 1),  # only cuts a step, see `engine.processes.normalised_together`
    ):
        if key in section and not is_read:
            section[key] = value
    for name, added in ADDED_LATER.items():
        for key, value in added.items():
            if identity[name].get(key) == value:
                del identity[name][key]
    return identity


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's TOML file and applies `a.b=c` overrides."""
    return parse_run(read_toml(path), where=str(path), overrides=overrides)


def parse_run(
    values: dict[str, Any], *, where: str, overrides: Sequence[str] = (), initial_run: bool = False
) -> RunConfig:
    """The configuration of a run that is to be trained; that of a recorded one needs `parse_config` alone.

    Args:
        where, overrides: see `parse_config`.
        initial_run: the run will start from the weights of another one, although it does not say so itself.

    Raises:
        UserError: what `parse_config` refuses, and random weights that would never be trained.
    """
    config = parse_config(RunConfig, values, where=where, overrides=overrides)
    if not initial_run:
        refuse_frozen_random_weights(config, where=where)
    return config


def refuse_frozen_random_weights(config: RunConfig, *, where: str) -> None:
    """A `UserError` if the first stages would keep the random weights that they start with."""
    if config.model.weights == "random" and config.init_from is None and config.model.frozen_stages > 0:
        raise UserError(
            f"{where}: model.frozen_stages > 0 would freeze random weights: set model.frozen_stages = 0, "
            "or give model.weights or init_from"
        )
