"""What a training learns from: which instances keep their mask, which loss they get; optimiser, schedule, runtime."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from semiseg.config.section import PositiveInt, Probability, Section


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
