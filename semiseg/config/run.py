"""Strict, typed configuration of one run: its tables beside the network's, and what of them can change its numbers.

Configuration stops at the builders (`build_model`, `build_loader`, ...): below them everything is an explicit keyword
argument. Derived values (number of classes, of steps) are properties or come from the data, never typed twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from semiseg.config.former import as_recorded, with_present_keys, without_unread
from semiseg.config.model import InferenceConfig, ModelConfig
from semiseg.config.read import file_digest, parse_config, read_toml
from semiseg.config.section import PositiveInt, Probability, Scale, Section, Seed, Side
from semiseg.errors import UserError

# Of the training: raise it with every change of the code after which the same configuration trains to other numbers (a
# mended loss; other assignment, sampling, augmentation, first weights or order of images), so that nobody takes a run
# recorded before for one of today; not for speed or last bits. 1 is left out of identities: runs recorded before there
# was a version keep theirs.
ALGORITHM_VERSION = 1

Tracker = Literal["wandb", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab", "trackio"]
Maker = Literal["grabcut", "crf"]  # of pseudo masks, from boxes: values of `supervision.pseudo` that are no files


class ShapesConfig(Section):
    """The embedded data set, for `data.format = "shapes"`."""

    image_size: Side = 128
    train_images: PositiveInt = 4000
    val_images: PositiveInt = 200
    train_seed: Seed = 1
    val_seed: Seed = 2


class VocConfig(Section):
    """Image sets of PASCAL VOC 2012, for `data.format = "voc"`: `train_aug`, `main_train`, ... (docs/DATA.md)."""

    train_set: str = "train_aug"
    val_set: str = "val"


class HubConfig(Section):
    """Splits of a data set on the Hugging Face Hub, where `data.root` begins with `hf:`."""

    train_split: str = "train"
    val_split: str = "validation"


class AugmentConfig(Section):
    """How training images are varied beside their size and flip, drawn anew for every sample; by default not at all.

    An object whose centre a crop leaves out is dropped, what is visible of it is a region where nothing is learnt. One
    with a box alone that is cut keeps what is left of the box for the detector and gets no mask loss (docs/METHOD.md).
    """

    photometric: Probability = 0.0  # of each of brightness, contrast, saturation and hue, in torchvision's ranges
    # With probability 1/2 the image lies anywhere on a canvas of the mean colour, of up to so many times its sides.
    expand: Annotated[float, Field(ge=1, le=8)] = 1.0
    # `random`: any window; `ssd`: SSD's, with the centre of an object and in five of six cases an IoU with one
    crop: Literal["none", "random", "ssd"] = "none"
    crop_least: Annotated[float, Field(gt=0, le=1)] = 0.3  # share of each side that a crop has at least
    rotations: Annotated[list[int], Field(min_length=1)] = [0]  # degrees to the left, one of which is drawn
    scale: Annotated[list[Scale], Field(min_length=2, max_length=2)] = [1.0, 1.0]  # factor of the sides, between these
    least_box: Annotated[float, Field(ge=0, lt=1)] = 0.0  # objects narrower or lower, by the image's side, are dropped

    @model_validator(mode="after")
    def _boxes_stay_boxes(self) -> AugmentConfig:
        turns = [0, 90, 180, 270]
        if other := [angle for angle in self.rotations if angle not in turns]:
            raise ValueError(
                f"rotations has {other[0]}: of an object turned by it a box alone does not tell the box, "
                "so that box supervision would be wrong; allowed: 0, 90, 180, 270"
            )
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale goes from the smaller to the larger factor, not {self.scale}")
        return self


class DataConfig(Section):
    """Where images and annotations are and how they become batches."""

    format: Literal["shapes", "coco", "voc"] = "coco"
    # Holds the data set and its Arrow cache; `hf:OWNER/NAME` is one of the Hugging Face Hub, `hf:FOLDER` one on disk.
    root: str = "data/coco"
    train_images: str = "train2017"  # of COCO, as the next three: relative to the root
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    shapes: ShapesConfig = ShapesConfig()
    voc: VocConfig = VocConfig()
    hub: HubConfig = HubConfig()
    short_sides: Annotated[list[Side], Field(min_length=1)] = [640, 672, 704, 736, 768, 800]
    long_side: Side = 1333
    flip: Probability = 0.5
    stretch: bool = False  # height and width both become the short side that is drawn, whatever the image's were
    bottom_rows_without_affinity: Annotated[int, Field(ge=0)] = 10
    # What annotations with `iscrowd` 1 are: regions that are neither learnt nor measured, or objects as all others
    crowds: Literal["ignore", "objects"] = "ignore"
    upright: bool = False  # apply EXIF orientations: the annotations are of the upright images
    # Stored values that are black and white, of images with more than 8 bits; None = 0 and 65535, floats are refused
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _black_is_below_white(self) -> DataConfig:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"value_range is {self.value_range}, allowed: the value of black below that of white")
        return self

    @model_validator(mode="after")
    def _augmented_images_are_usable(self) -> DataConfig:
        if min(self.short_sides) * self.augment.scale[0] < 32:
            raise ValueError(
                f"augment.scale makes images of a short side of {min(self.short_sides)} x {self.augment.scale[0]} "
                "pixels, allowed: at least 32"
            )
        if any(self.augment.rotations) and self.bottom_rows_without_affinity:
            raise ValueError(
                "augment.rotations turns the bottom rows away: bottom_rows_without_affinity must be 0, "
                f"not {self.bottom_rows_without_affinity}"
            )
        return self


class SupervisionConfig(Section):
    """Which training instances keep their mask.

    `split`: those of its seen classes, by its mask fractions. `masks`: all that are annotated; `as_annotated` likewise,
    where some objects have none. `boxes`: none.
    """

    source: Literal["split", "masks", "boxes", "as_annotated"] = "as_annotated"
    split: str | None = None  # name or path; also defines the seen and unseen classes of the evaluation
    # Masks for instances that are left with a box: a COCO json of whoever made them, or `grabcut` or `crf`, which make
    # theirs on first use (docs/PSEUDO_MASKS.md).
    pseudo: str | None = None

    @model_validator(mode="after")
    def _split_is_named(self) -> SupervisionConfig:
        if self.source == "split" and self.split is None:
            raise ValueError("source = 'split' needs 'split', the name or path of a class split")
        return self


class ObjectiveConfig(Section):
    """Which mask loss an instance gets, by its supervision, and the constants of the BoxInst losses (docs/METHOD.md).

    `box_as_mask` trains the Dice loss on the filled box (the first row of the paper's Table 3). `projection+learned`
    replaces colour's edges by those that the masks of other instances have taught. `bce` is Mask R-CNN's loss,
    `crop_bce` YOLACT's, `mil` BBTP's, with its smoothness as `mil+smooth`.
    """

    # `rays`: PolarMask's own, for its mask head on FCOS
    mask: Literal["dice", "labelled", "bce", "crop_bce", "rays"] = "dice"
    box: Literal[
        "none", "projection", "projection+pairwise", "projection+learned", "box_as_mask", "mil", "mil+smooth"
    ] = "projection+pairwise"
    affinity: Literal["colour", "learned"] = "colour"  # `learned` adds the branch that learns edges from masks
    pseudo: Literal["dice", "bce", "dice+projection", "dice+projection+pairwise"] = "dice"  # of `supervision.pseudo`
    level_set: Annotated[float, Field(ge=0)] = 0.0  # weight of the level set loss on an instance's box; 0 = without
    affinity_threshold: Probability = 0.3
    affinity_size: Literal[3, 5, 7] = 3
    affinity_dilation: Annotated[int, Field(ge=1, le=64)] = 2  # mask_head.kind = 'regions' has 1
    pairwise_warmup_steps: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _learned_edges_are_learned(self) -> ObjectiveConfig:
        if self.box == "projection+learned" and self.affinity != "learned":
            raise ValueError("box = 'projection+learned' needs affinity = 'learned', the branch that learns the edges")
        if self.level_set > 0 and not self.box.startswith("projection"):
            raise ValueError(f"level_set is added to the projection loss, which box = {self.box!r} has not")
        return self


class OptimConfig(Section):
    """Optimiser and schedule; the defaults are the paper's 1x. Exactly one of steps and epochs gives the length."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["step", "one_cycle", "constant"] = "step"  # one_cycle rises and falls along a cosine
    milestones: list[Probability] = [2 / 3, 8 / 9]  # fractions of the run at which `step` divides the rate by ten
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # of `step`; None = 1000, at most a ninth of the run
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 0.001
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    # So many validations (`runtime.evaluate_every`) in a row without a better AP end the training, and its model is the
    # best that was validated; 0 = all steps, and the last weights
    patience: Annotated[int, Field(ge=0)] = 0

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
        times the number of processes, with the learning rate in proportion and as many images in all: another run.
    """

    workers: Annotated[int, Field(ge=0)] = 2
    threads: Annotated[int, Field(ge=0)] = 0  # per process; 0 = torch's own choice
    precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # steps; 0 = only at the end
    tensorboard: bool = True
    trackers: list[Tracker] = []  # that hear the log, too, through accelerate; each is to be installed
    channels_last: bool = True
    compile: bool = False  # by torch, before the first step, which takes minutes; for GPUs
    images_per_process: Annotated[int, Field(ge=0)] = 0
    batch_rule: Literal["keep", "linear"] = "keep"
    fast_evaluation: bool = False  # by hotcoco (`pip install 'semiseg[fast]'`): the same numbers, sooner

    @model_validator(mode="after")
    def _linear_rule_knows_its_share(self) -> RuntimeConfig:
        if self.batch_rule == "linear" and self.images_per_process == 0:
            raise ValueError("batch_rule = 'linear' needs images_per_process, the images of one process and step")
        return self


class RunConfig(Section):
    """Everything that one training run needs."""

    data: DataConfig = DataConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    inference: InferenceConfig = InferenceConfig()
    optim: OptimConfig = OptimConfig(steps=90_000)
    runtime: RuntimeConfig = RuntimeConfig()
    seed: Seed = 0
    init_from: str | None = None  # checkpoint or model folder whose weights the run starts from

    @model_validator(mode="after")
    def _objective_fits_the_heads(self) -> RunConfig:
        if self.objective.mask == "crop_bce" and self.model.mask_head.kind == "regions":
            raise ValueError(
                "objective.mask = 'crop_bce' cuts masks of whole images to their boxes: model.mask_head.kind must be "
                "'dynamic', 'prototypes' or 'rays', not 'regions', whose loss is 'bce'"
            )
        if self.objective.mask == "rays":
            self.model.require_rays("objective.mask = 'rays'")
        if self.inference.decoding == "polarmask":
            self.model.require_rays("inference.decoding = 'polarmask'")
        if self.optim.patience and not self.runtime.evaluate_every:
            raise ValueError("optim.patience counts validations: runtime.evaluate_every must not be 0")
        return self

    def identity(self, *, initial: bool = False) -> dict[str, Any]:
        """What can change the numbers of the run: the config without paths, workers, logging and the split's name.

        A file of backbone weights is named by its content, a key that nothing reads has a fixed value. The caller adds
        the digests of split, data and `init_from`, and `engine.processes.normalised_together`. `initial`: the run
        starts from the weights of another one, so that those of its backbone are not read.
        """
        left_out = {"runtime", "init_from"}
        values = as_recorded(
            self.model_dump(mode="json", exclude=left_out),
            self.model_dump(mode="json", exclude=left_out, exclude_defaults=True),
        )
        for name in ("root", "train_images", "train_annotations", "val_images", "val_annotations", "voc", "hub"):
            del values["data"][name]
        if values["data"]["format"] != "shapes":
            del values["data"]["shapes"]
        if augment := self.data.augment.model_dump(mode="json", exclude_defaults=True):
            if self.data.augment.crop == "none":
                augment.pop("crop_least", None)
            values["data"]["augment"] = augment
        if not augment:
            del values["data"]["augment"]
        del values["supervision"]["split"]
        pseudo = self.supervision.pseudo
        if pseudo is not None and pseudo not in get_args(Maker):
            values["supervision"]["pseudo"] = file_digest(Path(pseudo))
        backbone = self.model.backbone
        if not initial and not backbone.names_weights:
            values["model"]["weights"] = file_digest(Path(backbone.weights))
        if self.optim.patience:
            values["evaluate_every"] = self.runtime.evaluate_every
        if self.runtime.precision != "no":
            values["precision"] = self.runtime.precision
        if ALGORITHM_VERSION != 1:
            values["algorithm"] = ALGORITHM_VERSION
        return without_unread(values, initial=initial)


def learns_masks(config: RunConfig) -> bool:
    """Whether an instance can get a mask loss: none can without masks of any kind if boxes alone have no loss."""
    supervision = config.supervision
    return supervision.source != "boxes" or config.objective.box != "none" or supervision.pseudo is not None


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's TOML file and applies `a.b=c` overrides."""
    return parse_run(read_toml(path), where=str(path), overrides=overrides)


def parse_run(
    values: dict[str, Any], *, where: str, overrides: Sequence[str] = (), initial_run: bool = False
) -> RunConfig:
    """The configuration of a run to train, by `parse_config`; without `initial_run` no random weights stay frozen."""
    config = parse_config(RunConfig, values, where=where, overrides=overrides)
    if not initial_run:
        refuse_frozen_random_weights(config, where=where)
    return config


def refuse_frozen_random_weights(config: RunConfig, *, where: str) -> None:
    """A `UserError` if the first stages would keep the random weights that they start with."""
    backbone = config.model.backbone
    if backbone.weights == "random" and config.init_from is None and backbone.frozen_stages > 0:
        raise UserError(
            f"{where}: model.backbone.frozen_stages > 0 would freeze random weights: set it to 0, "
            "or give model.backbone.weights or init_from"
        )


def parse_recorded(values: dict[str, Any], *, where: str) -> RunConfig:
    """The configuration of a run that was recorded, also by a version with other keys."""
    return parse_config(RunConfig, with_present_keys(values), where=where)
