"""Predicting a table, every image once over all processes, gathered once; stored detections in its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from semiseg.config import InferenceConfig
from semiseg.config.model import RefinerName
from semiseg.data.detections import decoded, read_results
from semiseg.data.loader import BatchLoader
from semiseg.data.table import Table
from semiseg.engine.predict import coco_results, each_image, encode_masks
from semiseg.engine.session import gather_to_main
from semiseg.models.refine import build_refiner
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch

STORED_PROBABILITY = 0.9  # of a mask that was stored without its probabilities, for the CRF


def predict_table(
    model: Segmenter,
    loader: BatchLoader,
    table: Table,
    accelerator: Accelerator,
    *,
    limits: InferenceConfig,
    progress: bool,
) -> tuple[list[dict[str, Any]], list[int]]:
    """Detections of the table, of which `loader` has this process's share: COCO results by image, the best first.

    With them the images that were looked at, each as often as it was. On other processes than the main one both are
    empty.

    Masks become RLE chunk by chunk, so that memory does not grow with their number.
    """
    if accelerator.num_processes > 1:
        # Running statistics of batch norm are each process's own; the main process's are the ones that are saved.
        for buffer in model.buffers():
            broadcast(buffer)
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    image_ids: list[int] = []
    sizes = table.original_sizes_hw()
    original = stored_images(table) if limits.refine != "none" else None
    bar = tqdm(
        loader, desc="predicting", unit="batch", disable=not (progress and accelerator.is_main_process), file=sys.stderr
    )
    with accelerator.autocast():
        for batch in bar:
            results += predict_batch(
                model, batch.to(accelerator.device), sizes, table.category_ids, limits=limits, original=original
            )
            image_ids += batch.image_ids
    model.train(was_training)
    results, image_ids = gather_to_main(results), gather_to_main(image_ids)
    return sorted(results, key=lambda item: (item["image_id"], -item["score"])), image_ids


def predict_batch(
    model: Segmenter,
    batch: Batch,
    output_sizes: dict[int, tuple[int, int]],
    category_ids: Sequence[int],
    *,
    limits: InferenceConfig,
    original: Callable[[int], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """COCO results of one batch: boxes xywh and RLE masks in pixels of the original images.

    The padding that larger neighbours brought is taken away again: see `predict.find_instances`. `original` gives the
    stored image of an id, which refined masks follow.
    """
    sizes, ids = batch.image_sizes_hw.tolist(), batch.image_ids
    by_image = each_image(
        model,
        [image[:, :height, :width] for image, (height, width) in zip(batch.images, sizes, strict=True)],
        lambda detections: coco_results(detections, image_id=ids[detections.number], category_ids=category_ids),
        output_sizes=[output_sizes[image_id] for image_id in ids],
        limits=limits,
        originals=None if original is None else lambda number: original(ids[number]),
    )
    return list(chain.from_iterable(by_image))


def stored_images(table: Table) -> Callable[[int], Tensor]:
    """Image id -> the image as it is stored, (3, H, W) uint8."""
    row_of = {image_id: row for row, image_id in enumerate(table.rows.data.column("image_id").to_pylist())}

    def read(image_id: int) -> Tensor:
        return table.image(table.rows[row_of[image_id]])

    return read


def refined_results(path: Path, table: Table, *, refine: RefinerName, progress: bool) -> list[dict[str, Any]]:
    """COCO results of a file, their masks refined without the network that made them.

    GrabCut looks at boxes alone, so that it gives detectors without masks some. For the CRF a stored mask has a
    probability of `STORED_PROBABILITY` and its outside the rest. A UserError if an entry does not fit the table.
    """
    refiner = build_refiner(refine)
    results = read_results(path, table.original_sizes_hw(), table.category_ids, masks=refine != "grabcut")
    if refiner is None:
        return results
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in results:
        by_image.setdefault(entry["image_id"], []).append(entry)
    image_of = stored_images(table)
    bar = tqdm(by_image.items(), desc=f"refining by {refine}", unit="image", disable=not progress, file=sys.stderr)
    for image_id, own in bar:
        image = image_of(image_id)
        for entry in own:  # one after the other, so that memory does not grow with their number
            corners = torch.tensor([entry["bbox"]], dtype=torch.float64)
            corners[:, 2:] += corners[:, :2]
            probability = None
            if refine == "crf":
                stored = torch.from_numpy(decoded(entry["segmentation"]))[None]
                probability = torch.where(stored, STORED_PROBABILITY, 1 - STORED_PROBABILITY)
            entry["segmentation"] = encode_masks(refiner(image, corners, probability))[0]
    return results
