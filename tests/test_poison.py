"""The leak barrier, end to end: withheld masks replaced by noise on disk change no batch, loss or gradient."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from torch import Tensor

from benchmarks.inputs import half_open
from semiseg.config import RunConfig
from semiseg.data.shapes import SHAPES_CLASSES, ensure_shapes
from semiseg.engine.build import build_data, build_step, build_training_loader
from semiseg.splits import load_split
from semiseg.structures.inputs import Batch
from tests.distributed_worker import LEARNED
from tests.tiny import TINY, tiny_config

SHAPES = TINY["data"]["shapes"]


def make_data(
    root: Path, *, poisoned: bool, objective: dict[str, str] | None = None, pseudo: str | None = None
) -> RunConfig:
    """Shapes as a COCO data set in which every fifth annotation is a crowd; poisoned: unseen masks are noise."""
    split = load_split("shapes_few_seen", SHAPES_CLASSES)
    folder = ensure_shapes(root, images=SHAPES["train_images"], image_size=64, seed=SHAPES["train_seed"])
    content = json.loads((folder / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    noise = np.random.default_rng(7)
    changed = 0
    for number, annotation in enumerate(content["annotations"]):
        annotation["iscrowd"] = int(number % 5 == 0)
        if poisoned and names[annotation["category_id"]] in split.unseen:
            mask = np.asfortranarray(noise.random((64, 64)) < 0.5, dtype=np.uint8)
            rle = rle_codec.encode(mask)
            annotation["segmentation"] = {"size": [64, 64], "counts": rle["counts"].decode()}
            changed += 1
    assert not poisoned or changed > 10
    (root / "train.json").write_text(json.dumps(content))
    data = {
        "format": "coco",
        "train_annotations": "train.json",
        "train_images": str((folder / "images").relative_to(root)),
        "val_annotations": str((folder / "annotations.json").relative_to(root)),
        "val_images": str((folder / "images").relative_to(root)),
    }
    return tiny_config(root, data=data, objective=objective or {}, supervision={"pseudo": pseudo})


def everything(config: RunConfig) -> tuple[list[Batch], list[float], Tensor]:
    loader = build_training_loader(
        config, build_data(config), steps=2, start_step=0, processes=1, rank=0, pin_memory=False
    )
    torch.manual_seed(3)
    module = build_step(config, num_classes=len(SHAPES_CLASSES)).train()
    if module.affinity is not None:
        half_open(module.affinity)
    batches, losses = list(loader), []
    for batch in batches:
        plan = module.plan(batch)
        terms = module(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        losses += [float(terms.weighted[name].detach()) for name in module.loss_names]
    return batches, losses, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def with_source(config: RunConfig, source: str) -> RunConfig:
    return config.model_copy(update={"supervision": config.supervision.model_copy(update={"source": source})})


@pytest.mark.parametrize(
    ("objective", "pseudo"),
    [({}, None), (LEARNED, None), ({**LEARNED, "pseudo": "dice+projection+pairwise"}, "grabcut")],
    ids=["colour", "learned", "pseudo masks"],
)
def test_withheld_masks_change_nothing(tmp_path: Path, objective: dict[str, str], pseudo: str | None) -> None:
    configs = [
        make_data(tmp_path / str(poisoned), poisoned=poisoned, objective=objective, pseudo=pseudo)
        for poisoned in (False, True)
    ]
    clean, poisoned = map(everything, configs)
    for mine, theirs in zip(clean[0], poisoned[0], strict=True):
        assert mine.image_ids == theirs.image_ids
        assert torch.equal(mine.images, theirs.images)
        assert mine.targets is not None
        assert theirs.targets is not None
        for name in (
            field.name
            for field in fields(mine.targets)
            if field.name not in ("mask_stride", "encoded", "rays", "mask_known", "encoded_known")
        ):
            assert torch.equal(getattr(mine.targets, name), getattr(theirs.targets, name)), name
        assert mine.targets.encoded is theirs.targets.encoded is None
    targets = [batch.targets for batch in clean[0] if batch.targets]
    assert sum(len(each.crowd_boxes_xyxy) for each in targets) > 0
    count, masks = sum(each.num_instances for each in targets), sum(len(each.masks) for each in targets)
    assert 0 < masks < count if pseudo is None else 0 < masks == count
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])


def test_the_poison_is_one(tmp_path: Path) -> None:
    """With every mask in use the same noise does change the losses: the test above can fail."""
    configs = [make_data(tmp_path / name, poisoned=name == "poisoned") for name in ("clean", "poisoned")]
    losses = [everything(with_source(config, "masks"))[1] for config in configs]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("source", ["boxes", "split"])
def test_no_mask_of_an_unseen_class_is_in_a_batch(tmp_path: Path, source: str) -> None:
    config = make_data(tmp_path, poisoned=False)
    unseen = [SHAPES_CLASSES.index(name) for name in load_split("shapes_few_seen", SHAPES_CLASSES).unseen]
    batches = everything(with_source(config, source))[0]
    labels = torch.cat([batch.targets.labels[batch.targets.mask_instance] for batch in batches if batch.targets])
    assert (len(labels) > 0) == (source == "split")
    assert not torch.isin(labels, torch.tensor(unseen)).any()
