"""How long a study's runs would take: seconds per step from finished runs of the same kind here, else measured now."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from semiseg.config import RunConfig
from semiseg.config_files import parse_config, read_json
from semiseg.engine.estimate import StepTime, measure_step, step_key
from semiseg.engine.run import device_name
from semiseg.errors import UserError
from semiseg.study_run import RESULT_NAME

_CLASSES = {"shapes": 12, "coco": 80, "voc": 20}  # of data that are not at hand


@dataclass(frozen=True)
class StepEstimate:
    """Seconds per step of one kind of run, and how they are known.

    Attributes:
        seconds: None if they are not.
        source: in words; of equal words one line is printed for all.
    """

    seconds: float | None
    source: str


def estimate_steps(
    configs: Sequence[RunConfig],
    *,
    processes: int,
    runs_folder: Path,
    num_classes: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> list[StepEstimate]:
    """One estimate per configuration; configurations with equally long steps share a measurement.

    Args:
        configs: as executed by so many processes.
        runs_folder: with the folders of finished runs, `runs`.
        num_classes: None = the usual number of the kind of data.
        seconds: for all measurements together; what is left when they are over is not measured.
        say: told what is being measured, one line each.
    """
    keys = [step_key(config, processes) for config in configs]
    logged = _logged_steps(runs_folder, processes)
    found: dict[str, StepEstimate] = {key: logged[key] for key in keys if key in logged}
    missing = {key: config for key, config in zip(keys, configs, strict=True) if key not in found}
    ends = time.monotonic() + seconds
    for number, (key, config) in enumerate(missing.items()):
        left = ends - time.monotonic()
        if left <= 0:
            found[key] = StepEstimate(None, f"not measured (—): the {seconds:g} s for measuring were over")
            continue
        say(f"measuring a step ({number + 1} of {len(missing)}): {config.model.backbone}, {config.supervision.source}")
        classes = num_classes or _CLASSES[config.data.format]
        found[key] = _measured(config, classes, processes, left / (len(missing) - number))
    return [found[key] for key in keys]


def _measured(config: RunConfig, num_classes: int, processes: int, seconds: float) -> StepEstimate:
    try:
        step = measure_step(config, num_classes=num_classes, processes=processes, seconds=seconds)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        share = config.optim.batch_size // processes
        return StepEstimate(
            None, f"a step of {share} images does not fit on {_device_words()}: lower runtime.images_per_process"
        )
    return StepEstimate(step.seconds, _measured_words(step))


def _measured_words(step: StepTime) -> str:
    how = f" ({step.how})" if step.how else ""
    return f"steps measured on {_device_words()} with made-up images{how}"


def _device_words() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device_name(device)
    return f"1 x {name}" if device.type == "cuda" else name


def _logged_steps(runs_folder: Path, processes: int) -> dict[str, StepEstimate]:
    """`step_key` -> mean seconds per step of the finished runs of that kind on this kind of device."""
    here = _kind_of(device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    seconds: dict[str, list[float]] = {}
    devices: dict[str, str] = {}
    for path in sorted(runs_folder.glob(f"*/*/{RESULT_NAME}")):
        try:
            result = read_json(path)
            config = parse_config(RunConfig, read_json(path.parent / "config.json")["config"], where=str(path.parent))
            if _kind_of(result["device"]) == here and result.get("processes", 1) == processes:
                key = step_key(config, processes)
                seconds.setdefault(key, []).append(_seconds_per_step(result))
                devices[key] = result["device"]
        except (UserError, KeyError, TypeError, ZeroDivisionError):
            continue  # no whole run, or one of another version: it says nothing about this study
    return {
        key: StepEstimate(sum(times) / len(times), f"steps as in the logs of finished runs on {devices[key]}")
        for key, times in seconds.items()
    }


def _seconds_per_step(result: Mapping[str, Any]) -> float:
    return float(result["train_seconds"]) / int(result["steps"])


def _kind_of(device: str) -> str:
    """A device's name without the number of threads."""
    return re.sub(r", \d+ threads", "", device)
