"""The Python API: load a model, detect, train; `semiseg` itself exports the names of `__all__`.

These names, their arguments and the fields of what they return stay as they are documented here and in docs/API.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.config import RunConfig, load_run_config, parse_run
from semiseg.config.read import digest
from semiseg.config.run import refuse_frozen_random_weights
from semiseg.data.reading import scaled
from semiseg.engine import predict
from semiseg.engine.predict import LoadedModel
from semiseg.engine.tiles import Tiling, find_in_tiles
from semiseg.errors import UserError
from semiseg.splits import ClassSplit
from semiseg.structures.outputs import Detections

__all__ = ["ClassSplit", "Detections", "LoadedModel", "RunConfig", "UserError", "detect", "load_model", "train"]


TILES_AT_ONCE = 8


def load_model(folder: str | Path, *, device: str | torch.device | None = None) -> LoadedModel:
    """Loads a trained model, for `detect`: the network in evaluation mode with `class_names`, `device` and `info`.

    Args:
        folder: a model folder (from a training or a conversion), or the folder of a finished run.
        device: such as "cpu" or "cuda:1"; None = the GPU if there is one, else the CPU.

    Raises:
        UserError: no model folder, a damaged one, or no such device on this machine.
    """
    return predict.load_model(Path(folder), device=device)


def detect(
    model: LoadedModel,
    images: Sequence[Tensor],
    *,
    output_sizes: Sequence[tuple[int, int]] | None = None,
    score_threshold: float = 0.05,
    tile: int | None = None,
    overlap: int | None = None,
) -> list[Detections]:
    """Detects the instances in each image.

    The network sees the images as they are: nothing is resized, so give them at the scale of the training
    (`model.info.inference.short_side`). An image's result does not depend on the others.

    Args:
        images: a list of (3, H, W) uint8 RGB tensors on any device; sizes may differ. For a model that was trained with
            `data.value_range`, tensors of another type hold stored values, which are scaled by `model.info.value_range`
            as those of files are; grey ones may be (1, H, W).
        output_sizes: (height, width) for each image, to which its boxes and masks are scaled; None = its own size.
        score_threshold: in [0, 1]; keeps detections whose class probability x centreness is greater. The `scores` that
            are returned are the square roots of that product, so 0.05 keeps scores above 0.224. Detectors other than
            FCOS score by the class probability alone, which is compared as it is, and as PolarMask's own decoding does.
        tile: an image with a longer side is looked at in square tiles of so many pixels, and detections of one object
            in several tiles become one (docs/API.md); without `output_sizes`. None = every image as a whole.
        overlap: pixels that neighbouring tiles share, less than `tile`; None = an eighth of it.

    Returns:
        one `Detections` for each image, on the CPU: `boxes` (N, 4) xyxy float32 in output pixels, `scores` (N,) float32
        descending, `labels` (N,) int64 index into `model.class_names`, `masks` (N, height, width) bool. At most
        `model.info.inference.max_detections` each, or of each tile.

    Raises:
        TypeError, ValueError: something else than described; the message names the image.
    """
    _check_model(model)
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise TypeError(f"images must be a list of tensors, not {type(images).__name__}")
    for number, image in enumerate(images):
        _check_image(image, f"images[{number}]", model.info.value_range)
    images = [_scaled(image, model.info.value_range) for image in images]
    if output_sizes is None:
        sizes = [(image.shape[1], image.shape[2]) for image in images]
    elif len(output_sizes) != len(images):
        raise ValueError(f"output_sizes has {len(output_sizes)} entries for {len(images)} images")
    else:
        sizes = [_size(size, f"output_sizes[{number}]") for number, size in enumerate(output_sizes)]
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in [0, 1], not {score_threshold!r}")
    limits = model.info.inference.model_copy(update={"score_threshold": score_threshold})
    if tiling := _tiling(tile, overlap, output_sizes):
        given: dict[str, Any] = {"tiling": tiling, "limits": limits, "batch_size": TILES_AT_ONCE}
        return [predict.collected(find_in_tiles(model.network, image, **given)) for image in images]
    return predict.each_image(model.network, images, predict.collected, output_sizes=sizes, limits=limits)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates one run, or returns the result of one that is finished already.

    Args:
        config: a `RunConfig`, its values as nested dicts, or the path of a TOML file with them.
        out: the run's folder; None = `runs/api-` and a digest of the configuration.
        resume: continue from the latest checkpoint in the folder; False refuses a folder that has one.

    Returns:
        the contents of the run's `result.json`, and the run's folder as `folder`, which `load_model` takes. Under
        `accelerate launch` only on the main process; elsewhere just `folder`.

    Raises:
        UserError: a configuration or data that is not valid, or a folder that holds something else than this run.
        KeyboardInterrupt: after SIGINT or SIGTERM, with a checkpoint written; the same call continues.
    """
    if isinstance(config, str | Path):
        settings = load_run_config(Path(config))
    elif isinstance(config, RunConfig):
        settings = config
        refuse_frozen_random_weights(settings, where="config")
    elif isinstance(config, Mapping):
        settings = parse_run(dict(config), where="config")
    else:
        raise TypeError(f"config must be a RunConfig, a dict or a path, not {type(config).__name__}")
    if out is None:
        # Everything that is part of the run; what execute_run still finds to differ (data on disk) it refuses.
        out = Path("runs") / f"api-{digest(settings.model_dump(mode='json', exclude={'runtime'}))}"
    from semiseg.engine.run import execute_run  # with accelerate and Arrow, which `detect` need not wait for

    result = execute_run(settings, out=Path(out), resume=resume, progress=progress)
    return {**result, "folder": str(out)}


def _check_model(model: LoadedModel) -> None:
    if not isinstance(model, LoadedModel):
        raise TypeError(f"model must be what load_model returns, not {type(model).__name__}")
    if model.network.training:
        raise ValueError("model.network is in training mode; model.network.eval() ends it")


def _check_image(image: Tensor, name: str, value_range: tuple[float, float] | None) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(image).__name__}")
    stored = value_range is not None and image.dtype not in (torch.uint8, torch.bool) and not image.is_complex()
    if image.dtype != torch.uint8 and not stored:
        raise TypeError(f"{name} must be uint8 with values 0 to 255, not {str(image.dtype).removeprefix('torch.')}")
    channels = (1, 3) if stored else (3,)
    if image.ndim != 3 or image.shape[0] not in channels or 0 in image.shape:
        raise ValueError(f"{name} must be (3, height, width), not {tuple(image.shape)}")


def _scaled(image: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    if value_range is None or image.dtype == torch.uint8:
        return image
    return torch.from_numpy(scaled(image.detach().cpu().numpy(), value_range)).expand(3, -1, -1)


def _tiling(tile: int | None, overlap: int | None, output_sizes: object) -> Tiling | None:
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap says what tiles share; give their size as tile")
        return None
    overlap = tile // 8 if overlap is None and type(tile) is int else overlap
    if type(tile) is not int or type(overlap) is not int:
        raise TypeError(f"tile and overlap must be whole numbers of pixels, not {tile!r} and {overlap!r}")
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tile must be at least 1 and overlap from 0 to tile - 1, not {tile} and {overlap}")
    if output_sizes is not None:
        raise ValueError("with tile, boxes and masks are in the image's own pixels; leave out output_sizes")
    return Tiling(tile, overlap)


def _size(size: Sequence[int], name: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (height, width), not {size!r}") from None
    if (height, width) != tuple(size) or height < 1 or width < 1:
        raise ValueError(f"{name} must be two whole numbers of at least 1, not {size!r}")
    return height, width
