"""From configuration to parts: below these builders everything takes explicit keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from semiseg.config import (
    AugmentConfig,
    InferenceConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    RuntimeConfig,
    learns_masks,
)
from semiseg.config.read import digest
from semiseg.config.run import Maker
from semiseg.data.augment import Augmentation
from semiseg.data.dataset import InstanceDataset, MaskRule, build_rule
from semiseg.data.loader import BatchLoader, StepBatches, build_loader, eval_batches
from semiseg.data.pseudo import PseudoMasks, load_pseudo
from semiseg.data.rays import RayRule
from semiseg.data.sources import cache_folder, ensure_files, reading_of
from semiseg.data.table import Table, load_table
from semiseg.data.transforms import Resize
from semiseg.engine.detection import detector_step
from semiseg.engine.logs import shows_bars
from semiseg.engine.processes import batch_norms, images_in_evaluation, parts_per_step
from semiseg.engine.pseudo import made_file, make_pseudo, require_as_made
from semiseg.engine.rays import build_ray_rule
from semiseg.engine.step import TrainStep
from semiseg.errors import UserError, differing_names
from semiseg.losses.terms import Objective
from semiseg.models.affinity import AffinityBranch
from semiseg.models.build import build_model, mask_cells, mask_stride
from semiseg.models.segmenter import Segmenter
from semiseg.splits import ClassSplit, load_split
from semiseg.structures.inputs import pad_images


@dataclass(frozen=True)
class RunData:
    """The tables of a run and the class split that its supervision and its class groups follow."""

    train: Table  # one row per image
    val: Table  # of the same classes in the same order
    split: ClassSplit | None  # None when the run names none
    pseudo: PseudoMasks | None = None  # for training instances with a box alone

    @property
    def fingerprint(self) -> str:
        """Digest of the contents of both tables."""
        return digest([self.train.fingerprint, self.val.fingerprint])

    @property
    def split_digest(self) -> str | None:
        return None if self.split is None else self.split.digest()


def build_data(config: RunConfig) -> RunData:
    """Opens (and on first use converts) both tables and loads the class split."""
    files = ensure_files(config.data)
    how: dict[str, Any] = {"reading": reading_of(config.data), "crowds": config.data.crowds}
    load: Callable[..., Table] = partial(load_table, cache=cache_folder(config.data), **how)
    train = load(*files["train"])
    val = load(*files["val"], classes=train.class_names)
    if {*train.groupings} & {*val.class_names}:  # what groups others in one file may be the other's class
        train = load(*files["train"], classes=val.class_names)
    if train.class_names != val.class_names:
        differing = differing_names(train.class_names, val.class_names)
        raise UserError(f"{val.annotations_file}: classes differ from {train.annotations_file} in {differing}")
    split = None if config.supervision.split is None else load_split(config.supervision.split, train.class_names)
    return RunData(train, val, split, _build_pseudo(config, train))


def _build_pseudo(config: RunConfig, train: Table) -> PseudoMasks | None:
    """The pseudo masks of a run; those of a maker are made on first use."""
    wanted = config.supervision.pseudo
    if wanted is None:
        return None
    cache = cache_folder(config.data)
    if wanted in get_args(Maker):
        path = made_file(train, cast(Maker, wanted), folder=cache.parent / "pseudo")
        if not path.exists():
            make_pseudo(train, path, maker=cast(Maker, wanted), shared=True, progress=shows_bars(None))
        require_as_made(path)
        return load_pseudo(path, train, cache=cache)
    return load_pseudo(Path(wanted), train, cache=cache)


def build_objective(config: ObjectiveConfig, *, with_pseudo: bool = False) -> Objective:
    """The losses' own description of the objective; `with_pseudo`: the run has pseudo masks."""
    return Objective(
        mask=config.mask,
        box=config.box,
        affinity_threshold=config.affinity_threshold,
        affinity_size=config.affinity_size,
        affinity_dilation=config.affinity_dilation,
        affinity=config.affinity,
        level_set=config.level_set,
        pseudo=config.pseudo if with_pseudo else None,
    )


def joined_dilation(config: RunConfig) -> int:
    """The dilation of the neighbourhood, 1 where cells of masks are predicted each by itself, as those of regions are.

    Neighbours n cells apart join every n-th cell alone: nothing holds a cell and the next one together, and masks of
    stripes or with holes in every other cell satisfy projection and pairwise as well as the object does. CondInst's
    maps cannot have them, since they are interpolated from cells n times as large.
    """
    return 1 if config.model.mask_head.kind == "regions" else config.objective.affinity_dilation


def without_initial_weights(config: RunConfig) -> RunConfig:
    """The same run for a model whose weights will all be loaded: its backbone need not find any of its own."""
    return config.model_copy(update={"model": config.model.with_backbone_weights("random")})


def build_step(config: RunConfig, *, num_classes: int) -> TrainStep:
    """The model with its assignment and losses."""
    model = build_model(config.model, num_classes=num_classes)
    objective = build_objective(config.objective, with_pseudo=config.supervision.pseudo is not None)
    detector = detector_step(config.model, model)
    objective = replace(objective, affinity_dilation=joined_dilation(config))
    if not learns_masks(config):
        model.freeze_masks()
        objective = replace(objective, affinity="colour")
    elif detector.own_regions and _counts_edges(config):
        raise UserError(
            "model.detector.mask_regions = 'proposals' learns masks in boxes that follow from predictions, where edges "
            "cannot be counted before: objective.mask must be 'dice' or 'bce' and objective.box 'none', 'projection', "
            "'box_as_mask', 'mil' or 'mil+smooth'"
        )
    elif objective.level_set > 0 and mask_stride(config.model) is None:
        raise UserError(f"objective.level_set needs masks on whole images, not {_head_in_words(config.model)}")
    else:
        _require_neighbours(config)
    return TrainStep(
        model,
        detector=detector,
        objective=objective,
        max_mask_positives=config.model.mask_head.max_positives,
        # After all other parts: those have the same first weights with and without it.
        affinity=_build_affinity(config.model, model, objective) if objective.affinity == "learned" else None,
    )


def _require_neighbours(config: RunConfig) -> None:
    """A UserError if every neighbour of a cell lies beyond its mask, so that a loss on edges would be 0 for ever."""
    longest = max(config.data.short_sides) if config.data.stretch else config.data.long_side
    longest = round(longest * config.data.augment.scale[1])
    objective, cells = config.objective, mask_cells(config.model, longest)
    labelled = objective.mask == "labelled" and config.supervision.source != "boxes"
    edges = objective.box == "projection+pairwise" or objective.affinity == "learned" or labelled
    edges = edges or _pseudo_edges(config)
    if edges and objective.affinity_dilation >= cells:
        raise UserError(
            f"objective.affinity_dilation = {objective.affinity_dilation}: no cell has a neighbour so far away, "
            f"allowed: less than the {cells} cells of a mask's longer side ({config.model.mask_cells}, "
            f"{'data.short_sides up to' if config.data.stretch else 'data.long_side'} {longest})"
        )


def _counts_edges(config: RunConfig) -> bool:
    """Whether an instance of the run may get a loss whose denominator counts edges."""
    source, goal = config.supervision.source, config.objective
    of_masks = source != "boxes" and goal.mask == "labelled"
    of_boxes = source != "masks" and goal.box in ("projection+pairwise", "projection+learned")
    return of_masks or of_boxes or _pseudo_edges(config)


def _pseudo_edges(config: RunConfig) -> bool:
    return config.supervision.pseudo is not None and "pairwise" in config.objective.pseudo


def _build_affinity(config: ModelConfig, model: Segmenter, objective: Objective) -> AffinityBranch:
    head, stride = model.mask_head, mask_stride(config)
    if head.edge_channels is None or stride is None:
        own = _head_in_words(config)
        raise UserError(f"objective.affinity = 'learned' needs a mask head with features of whole images, not {own}")
    edges = objective.affinity_size**2 // 2
    return AffinityBranch(head.edge_channels, factor=head.edge_stride // stride, edges=edges)


def _head_in_words(config: ModelConfig) -> str:
    return f"{config.mask_head.kind!r}{' with cells in parts' if config.masks_in_parts else ''}"


def require_normalisable(config: RunConfig, data: RunData, model: Segmenter, accelerator: Accelerator) -> None:
    """A UserError if a batch norm would ever get one value a channel, which has no deviation: torch refuses it.

    That is one cell of one image. The smallest image of the run is tried, where any could be as small as the coarsest
    map's stride; a network of timm may hold norms behind means over the map, so that it is tried whatever the size.
    """
    together = batch_norms(config, accelerator.num_processes)
    if "sync_bn" in together and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise UserError("norm = 'sync_bn' needs GPUs for several processes; choose 'bn', 'gn' or 'frozen_bn'")
    height, width = _smallest_input(config, data.train)
    if min(together.values(), default=2) > 1 or (max(height, width) > 128 and config.model.backbone.kind != "timm"):
        return
    alone: list[str] = []

    def look(name: str, given: tuple[Tensor, ...]) -> None:
        if given[0].numel() == given[0].shape[1]:
            alone.append(name)

    norms = [
        (name, each) for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d | nn.SyncBatchNorm)
    ]
    hooks = [each.register_forward_pre_hook(lambda _, given, name=name: look(name, given)) for name, each in norms]
    was_training = model.training
    with torch.no_grad():
        model.eval()(*pad_images([torch.zeros(3, height, width, dtype=torch.uint8)], model.size_divisor))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    if alone:
        norms_of = {"neck": "model.neck.norm", "mask_head": "model.mask_head.branch_norm"}
        keys = dict.fromkeys(norms_of.get(name.partition(".")[0], "model.backbone.norm") for name in alone)
        raise UserError(
            f"batch norm ({' and '.join(keys)}) would get a single value a channel, which has no deviation: one image "
            "at a time (optim.batch_size by its accumulation and processes, runtime.images_per_process), of "
            f"{width} x {height} pixels at the least; take two at a time, larger ones (data.short_sides, "
            "data.long_side), or norm 'gn' or 'frozen_bn'"
        )


def _smallest_input(config: RunConfig, table: Table) -> tuple[int, int]:
    """(height, width) of the training image whose longer side is the smallest, as the network may get it."""
    data, scale = config.data, config.data.augment.scale[0]
    short_side, long_side = (max(1, round(side * scale)) for side in (min(data.short_sides), data.long_side))
    resize = Resize([short_side], long_side, stretch=data.stretch)
    sizes = {resize(size_hw, 0).input_hw for size_hw in set(table.original_sizes_hw().values())}
    if data.augment.crop != "none" or data.augment.expand > 1:  # windows and canvases of any shape
        sizes.add(resize((1, 1), 0).input_hw)
    return min(sizes, key=max)


def compile_network(model: Segmenter, *, backend: str = "inductor") -> None:
    """Has torch compile, in place and when first called, the parts whose work follows from the image size alone.

    Names of parameters stay as they are. Masks and losses depend on how many instances there are and are not compiled.
    """
    for part in model.compiled_parts():
        part.compile(backend=backend)


def train_dataset(config: RunConfig, data: RunData) -> InstanceDataset:
    """The training images with their supervision; withheld masks are gone from here on."""
    return InstanceDataset(
        data.train,
        rule=build_rule(config.supervision.source, data.split),
        transform=Resize(
            short_sides=config.data.short_sides,
            long_side=config.data.long_side,
            flip=config.data.flip,
            stretch=config.data.stretch,
            scale=(config.data.augment.scale[0], config.data.augment.scale[1]),
        ),
        mask_stride=mask_stride(config.model),
        bottom_rows_without_affinity=config.data.bottom_rows_without_affinity,
        rays=build_ray_rule(config, data.train),
        pseudo=data.pseudo,
        augmentation=_build_augmentation(config),
    )


def _build_augmentation(config: RunConfig) -> Augmentation | None:
    """What makes another image of one; None where only its size and flip are drawn."""
    wanted, usual = config.data.augment, AugmentConfig()
    names = ("photometric", "expand", "crop", "rotations", "least_box")
    if all(getattr(wanted, name) == getattr(usual, name) for name in names):
        return None
    red, green, blue = (min(max(round(value), 0), 255) for value in config.model.pixel_mean)
    own = {name: getattr(wanted, name) for name in names}
    return Augmentation(**own, crop_least=wanted.crop_least, fill=(red, green, blue))


def build_training_loader(
    config: RunConfig, data: RunData, *, steps: int, start_step: int, processes: int, rank: int, pin_memory: bool
) -> BatchLoader:
    """Batches of one process from `start_step` on, `parts_per_step` of them per optimizer step."""
    batches = StepBatches(
        len(data.train.rows),
        batch_size=config.optim.batch_size,
        accumulation=parts_per_step(config, processes),
        processes=processes,
        rank=rank,
        seed=config.seed,
        start_step=start_step,
        steps=steps,
    )
    return build_loader(
        train_dataset(config, data),
        batches=batches,
        size_divisor=config.model.size_divisor,
        workers=config.runtime.workers,
        pin_memory=pin_memory,
    )


def build_evaluation_loader(
    table: Table,
    *,
    model: ModelConfig,
    inference: InferenceConfig,
    runtime: RuntimeConfig,
    processes: int,
    rank: int,
    rule: MaskRule | None = None,
    rays: RayRule | None = None,
    bottom_rows_without_affinity: int = 0,
) -> BatchLoader:
    """Every image of the table once, shared out over the processes; masks are read only where a rule asks for them."""
    dataset = InstanceDataset(
        table,
        rule=rule or build_rule("boxes", None),
        transform=Resize([inference.short_side], inference.long_side, stretch=inference.stretch),
        mask_stride=mask_stride(model),
        bottom_rows_without_affinity=bottom_rows_without_affinity,
        rays=rays,
    )
    batches = eval_batches(len(dataset), batch_size=images_in_evaluation(runtime), processes=processes, rank=rank)
    return build_loader(dataset, batches=batches, workers=runtime.workers, size_divisor=model.size_divisor)
