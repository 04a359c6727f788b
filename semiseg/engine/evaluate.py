"""Predicting a table: every image once over all processes, gathered once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm import tqdm

from semiseg.config import InferenceConfig
from semiseg.data.loader import BatchLoader
from semiseg.data.table import Table
from semiseg.engine.predict import coco_results, each_image
from semiseg.engine.session import gather_to_main
from semiseg.models.segmenter import Segmenter
from semiseg.structures.inputs import Batch


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
    bar = tqdm(
        loader, desc="predicting", unit="batch", disable=not (progress and accelerator.is_main_process), file=sys.stderr
    )
    with accelerator.autocast():
        for batch in bar:
            results += predict_batch(model, batch.to(accelerator.device), sizes, table.category_ids, limits=limits)
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
) -> list[dict[str, Any]]:
    """COCO results of one batch: boxes xywh and RLE masks in pixels of the original images.

    The padding that larger neighbours brought is taken away again: see `predict.find_instances`.
    """
    sizes, ids = batch.image_sizes_hw.tolist(), batch.image_ids
    by_image = each_image(
        model,
        [image[:, :height, :width] for image, (height, width) in zip(batch.images, sizes, strict=True)],
        lambda detections: coco_results(detections, image_id=ids[detections.number], category_ids=category_ids),
        output_sizes=[output_sizes[image_id] for image_id in ids],
        limits=limits,
    )
    return list(chain.from_iterable(by_image))
