"""The configuration of a run: its tables, their identity, and reading them."""

from semiseg.config.model import InferenceConfig, ModelConfig
from semiseg.config.run import (
    AugmentConfig,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    learns_masks,
    load_run_config,
    parse_recorded,
    parse_run,
)

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "InferenceConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "RuntimeConfig",
    "learns_masks",
    "load_run_config",
    "parse_recorded",
    "parse_run",
]
