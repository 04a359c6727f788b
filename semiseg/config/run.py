"""Strict, typed configuration of one run. Unknown key, wrong type, impossible value: an error naming the path.

Configuration stops at the builders (`build_model`, `build_loader`, ...): below them everything is an explicit keyword
argument. Derived values (number of classes, warm-up lengths, number of steps) are properties or come from the data,
never typed twice. The digest of a run covers what can change its numbers and nothing else (`RunConfig.identity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semiseg.config.data import DataConfig
from semiseg.config.former import as_recorded, with_present_keys, without_unread
from semiseg.config.model import InferenceConfig, ModelConfig
from semiseg.config.read import file_digest, parse_config, read_toml
from semiseg.config.section import Section, Seed
from semiseg.config.training import ObjectiveConfig, OptimConfig, RuntimeConfig, SupervisionConfig
from semiseg.errors import UserError

# Of the training: raise it with every change of the code after which the same configuration trains to other numbers (a
# mended loss; other assignment, sampling, augmentation, first weights or order of images), so that nobody takes a run
# recorded before for one of today; not for speed or last bits. 1 is left out of identities: runs recorded before there
# was a version keep theirs.
ALGORITHM_VERSION = 1


class RunConfig(Section):
    """Everything that one training run needs.

    init_from: path of a checkpoint or model folder whose weights the run starts from (weights only).
    """

    data: DataConfig = DataConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    inference: InferenceConfig = InferenceConfig()
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
        left_out = {"runtime", "init_from"}
        values = as_recorded(
            self.model_dump(mode="json", exclude=left_out),
            self.model_dump(mode="json", exclude=left_out, exclude_defaults=True),
        )
        for name in ("root", "train_images", "train_annotations", "val_images", "val_annotations", "voc", "hub"):
            del values["data"][name]
        if values["data"]["format"] != "shapes":
            del values["data"]["shapes"]
        del values["supervision"]["split"]
        weights = self.model.backbone.weights
        if not initial and weights not in ("imagenet", "random"):
            values["model"]["weights"] = file_digest(Path(weights))
        if self.runtime.precision != "no":
            values["precision"] = self.runtime.precision
        if ALGORITHM_VERSION != 1:
            values["algorithm"] = ALGORITHM_VERSION
        return without_unread(values, initial=initial)


def learns_masks(config: RunConfig) -> bool:
    """Whether an instance can get a mask loss: none can if all masks are withheld and boxes alone have no loss."""
    return config.supervision.source != "boxes" or config.objective.box != "none"


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's TOML file and applies `a.b=c` overrides."""
    return parse_run(read_toml(path), where=str(path), overrides=overrides)


def parse_run(
    values: dict[str, Any], *, where: str, overrides: Sequence[str] = (), initial_run: bool = False
) -> RunConfig:
    """The configuration of a run that is to be trained; see `parse_recorded` for that of a recorded one.

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
    backbone = config.model.backbone
    if backbone.weights == "random" and config.init_from is None and backbone.frozen_stages > 0:
        raise UserError(
            f"{where}: model.backbone.frozen_stages > 0 would freeze random weights: set it to 0, "
            "or give model.backbone.weights or init_from"
        )


def parse_recorded(values: dict[str, Any], *, where: str) -> RunConfig:
    """The configuration of a run that was recorded, also by a version with other keys."""
    return parse_config(RunConfig, with_present_keys(values), where=where)
