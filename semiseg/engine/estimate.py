"""How long a training step takes on this machine: real steps of a run's own model on made-up batches of its sizes.

What is not in it: reading images, the exchange of gradients between processes, checkpoints and the evaluation.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.config import DataConfig, RunConfig
from semiseg.config_files import digest
from semiseg.data.collate import Collate
from semiseg.data.transforms import TrainTransform
from semiseg.engine.build import build_step, without_initial_weights
from semiseg.engine.optim import build_optimizer
from semiseg.engine.processes import parts_per_step
from semiseg.engine.run import device_name
from semiseg.engine.step import TrainStep
from semiseg.structures.inputs import Batch, Sample, Supervision, grid_size

MEASURED_STEPS = 5  # after one to warm up
_WIDE = 0.73  # share of COCO's images that are wider than high
_STORED_HW = (480, 640)  # the usual size of an image of COCO; that of VOC has the same ratio
_INSTANCES = {"shapes": 3, "coco": 7, "voc": 3}  # per image, as counted in the annotations
_SMALL_SIDE = 256  # pixels; on a processor, images with a longer short side are measured at a part of their sides
_PIXELS_AT_ONCE = 300_000  # on a processor; beyond, the time is in proportion anyway


@dataclass(frozen=True)
class StepTime:
    """A measured step.

    Attributes:
        seconds: of an optimizer step of one process.
        images: of one process and step.
        device: on which it was measured.
        how: how the measured step differed from the real one, "" if it did not.
    """

    seconds: float
    images: int
    device: str
    how: str


def step_key(config: RunConfig, processes: int) -> str:
    """Equal for runs whose steps take equally long: same network, losses, image sizes and batch."""
    values = config.model_dump(mode="json", include={"data", "objective", "model"})
    values["objective"] = {name: values["objective"][name] for name in ("mask", "box", "affinity_size")}
    values["data"] = {name: values["data"][name] for name in ("format", "short_sides", "long_side")}
    for name in ("weights", "pixel_mean", "pixel_std"):
        del values["model"][name]
    optim, runtime = config.optim, config.runtime
    batch = [optim.batch_size, optim.optimizer, optim.ema_decay is None, processes, parts_per_step(config, processes)]
    how = [runtime.precision, runtime.channels_last, runtime.compile, config.supervision.source]
    size = config.data.shapes.image_size if config.data.format == "shapes" else None
    return digest([values, batch, how, size])


def measure_step(config: RunConfig, *, num_classes: int, processes: int, seconds: float) -> StepTime:
    """Trains some steps on two batches in turn and takes the mean of the shortest time of each, after the first.

    Other work on the machine only lengthens steps; the shortest are the least disturbed.

    On a GPU with one process's share of the batch. On a processor, where that may take minutes and much memory, with as
    few images at a time as fill it and large ones at a part of their sides, in proportion to images and pixels. Never
    compiled (`runtime.compile`): that takes minutes itself, and the step is said to be measured without it.

    Args:
        config: of the run; its weights are not needed.
        seconds: how long this may take; a step that has begun is finished.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = parts_per_step(config, processes)
    share = config.optim.batch_size // processes
    real = device.type == "cuda"
    shrink = 1 if real else max(1, -(-max(config.data.short_sides) // _SMALL_SIDE))
    count, images = (parts, share // parts) if real else (1, min(share // parts, _images_at_once(config, shrink)))
    began = time.perf_counter()
    step = _step(config, num_classes=num_classes, device=device)
    batches = [
        [made_up_batch(config, images=images, shrink=shrink, seed=n * count + part) for part in range(count)]
        for n in range(2)
    ]
    times: list[float] = []
    for number in range(MEASURED_STEPS + 1):
        times.append(_timed(step, batches[number % len(batches)], device))
        if time.perf_counter() - began + times[-1] > seconds:
            break
    del step, batches
    if real:
        torch.cuda.empty_cache()  # the next one may need another share of the memory
    later = [times[number::2] for number in (1, 2)] if len(times) > 1 else [times]
    measured = statistics.fmean(min(of_batch) for of_batch in later if of_batch)
    words = {1: "one image"}.get(images, f"{images} images")
    how = [f"{words} at a time"] * (count * images < share) + [f"images of 1/{shrink} of the sides"] * (shrink > 1)
    how += ["in proportion"] * bool(how) + ["not compiled"] * config.runtime.compile
    factor = share * shrink**2 / (count * images)
    return StepTime(measured * factor, share, device_name(device), ", ".join(how))


def _images_at_once(config: RunConfig, shrink: int) -> int:
    """How many images fill a processor; large ones do it alone."""
    height, width = _STORED_HW if config.data.format != "shapes" else (1, 1)
    side = max(config.data.short_sides) // shrink
    return max(1, _PIXELS_AT_ONCE // (side * side * width // height))


def _step(config: RunConfig, *, num_classes: int, device: torch.device) -> Callable[[Sequence[Batch]], None]:
    """A function that does one optimizer step on the given parts: plan, forward, backward, update."""
    module = build_step(without_initial_weights(config), num_classes=num_classes).to(device).train()
    if config.runtime.channels_last:
        module.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module.model, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # random weights would diverge; the work is the same
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.runtime.precision)

    def autocast() -> AbstractContextManager[None]:
        return nullcontext() if precision is None else torch.autocast(device.type, precision)

    def run(parts: Sequence[Batch]) -> None:
        _optimizer_step(module, optimizer, parts, autocast)

    return run


def _optimizer_step(
    module: TrainStep,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager[None]],
) -> None:
    """As `train.optimizer_step`: the parts are as loaded, and are drafted on the host and sent here."""
    sent = [batch.to(module.model.pixel_mean.device, non_blocking=True) for batch in parts]
    plans = [module.plan(there, module.draft(here)) for here, there in zip(parts, sent, strict=True)]
    counts = torch.stack([plan.counts for plan in plans]).sum(0)
    for batch, plan in zip(sent, plans, strict=True):
        with autocast():
            total = module(batch, plan, counts, warmup=1.0, processes=1).total
        total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _timed(step: Callable[[Sequence[Batch]], None], parts: Sequence[Batch], device: torch.device) -> float:
    began = time.perf_counter()
    step(parts)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def made_up_batch(config: RunConfig, *, images: int, shrink: int, seed: int) -> Batch:
    """A padded batch with the configuration's sizes and supervision; the same for the same arguments.

    Three of four images are wider than high, as in COCO; sides of boxes are 5 to 90 % of those of the image.

    Args:
        shrink: by how much the sides of the images are divided.
    """
    generator = random.Random(seed)
    samples = [_sample(config, shrink=shrink, number=number, generator=generator) for number in range(images)]
    return Collate(config.model.size_divisor)(samples)


def _sample(config: RunConfig, *, shrink: int, number: int, generator: random.Random) -> Sample:
    data, stride = config.data, config.model.mask_stride
    transform = TrainTransform([side // shrink for side in data.short_sides], data.long_side // shrink, data.flip)
    height, width = transform(_stored_hw(data, generator), generator.getrandbits(32)).input_hw
    boxes = torch.tensor([_box(height, width, generator) for _ in range(_INSTANCES[data.format])])
    with_mask = _with_mask(config, len(boxes))
    supervision = torch.full((len(boxes),), int(Supervision.BOX))
    supervision[with_mask] = int(Supervision.MASK)
    return Sample(
        image=_picture(height, width, generator.getrandbits(31)),
        image_id=number,
        boxes_xyxy=boxes,
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        supervision=supervision,
        masks=_ellipses(boxes[with_mask], grid_size((height, width), stride), stride),
        mask_instance=with_mask,
        crowd_boxes_xyxy=torch.zeros(0, 4),
        mask_stride=stride,
    )


def _stored_hw(data: DataConfig, generator: random.Random) -> tuple[int, int]:
    if data.format == "shapes":
        return data.shapes.image_size, data.shapes.image_size
    height, width = _STORED_HW
    return (height, width) if generator.random() < _WIDE else (width, height)


def _box(height: int, width: int, generator: random.Random) -> list[float]:
    """One box, xyxy; small ones are more frequent than large ones."""
    sides = [0.05 * 18 ** generator.random() * length for length in (width, height)]
    corner = [generator.random() * (length - side) for length, side in zip((width, height), sides, strict=True)]
    return [*corner, corner[0] + sides[0], corner[1] + sides[1]]


def _with_mask(config: RunConfig, count: int) -> Tensor:
    """Indices of the instances that have a mask: none, all, or every other one under a class split."""
    source = config.supervision.source
    return torch.arange(0, 0 if source == "boxes" else count, 2 if source == "split" else 1)


def _ellipses(boxes: Tensor, grid_hw: tuple[int, int], stride: int) -> Tensor:
    """(N, h, w) bool: the ellipses that fill the boxes (N, 4), at the centres of the cells."""
    y, x = (torch.arange(length) * stride + stride // 2 for length in grid_hw)
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (N, 1) each
    across = ((2 * x - left - right) / (right - left)) ** 2  # (N, w)
    down = ((2 * y - top - bottom) / (bottom - top)) ** 2  # (N, h)
    return down[:, :, None] + across[:, None, :] <= 1


def _picture(height: int, width: int, seed: int) -> Tensor:
    """(3, H, W) uint8 of slowly changing colours with some noise, so that edges above and below a threshold occur."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(60, 190, (1, 3, 9, 9), generator=generator).float()
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (smooth + torch.randint(-4, 5, smooth.shape, generator=generator)).to(torch.uint8)
