"""Predicting a table and scoring it: every image once over all processes, gathered once, official COCO evaluation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools import mask as rle_codec
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from semiseg.config import ModelConfig
from semiseg.data.table import Table
from semiseg.engine.checkpoint import write_json
from semiseg.evaluation.coco_metrics import Metrics, evaluate_detections
from semiseg.models.condinst import CondInst
from semiseg.models.postprocess import Candidates, iter_masks, select_detections, to_output_boxes
from semiseg.structures.inputs import Batch


def predict_table(
    model: CondInst, loader: DataLoader, table: Table, accelerator: Accelerator, *, config: ModelConfig, progress: bool
) -> list[dict[str, Any]]:
    """Detections of every image of the table as COCO results; complete on the main process, empty elsewhere.

    Masks become RLE chunk by chunk, so that memory does not grow with their number.
    """
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    sizes = table.original_sizes_hw()
    bar = tqdm(
        loader, desc="predicting", unit="batch", disable=not (progress and accelerator.is_main_process), file=sys.stderr
    )
    with torch.inference_mode(), accelerator.autocast():
        for batch in bar:
            results += predict_batch(model, batch.to(accelerator.device), sizes, table.category_ids, config=config)
    model.train(was_training)
    if accelerator.num_processes > 1:
        results = gather_object(results)
    return sorted(results, key=lambda item: (item["image_id"], -item["score"])) if accelerator.is_main_process else []


def predict_batch(
    model: CondInst,
    batch: Batch,
    output_sizes: dict[int, tuple[int, int]],
    category_ids: Sequence[int],
    *,
    config: ModelConfig,
) -> list[dict[str, Any]]:
    """COCO results of one batch: boxes xywh and RLE masks in pixels of the original images."""
    outputs = model(batch.images, batch.image_sizes_hw)
    candidates = select_detections(
        outputs,
        batch.image_sizes_hw,
        score_threshold=config.score_threshold,
        candidates_per_level=config.candidates_per_level,
        nms_threshold=config.nms_threshold,
        max_detections=config.max_detections,
    )
    results = []
    for number, (image_id, found) in enumerate(zip(batch.image_ids, candidates, strict=True)):
        height, width = batch.image_sizes_hw[number].tolist()
        input_hw, output_hw = (height, width), output_sizes[image_id]
        chunks = iter_masks(model, outputs, found.queries, input_hw, output_hw)
        rles = [rle for _, masks in chunks for rle in encode_masks(masks)]
        boxes = to_output_boxes(found.boxes_xyxy, input_hw, output_hw)
        results += _as_results(image_id, found, boxes, rles, category_ids)
    return results


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool masks as COCO's compressed RLE with text counts."""
    columns = np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    encoded = rle_codec.encode(columns)
    return [{"size": list(map(int, item["size"])), "counts": item["counts"].decode("ascii")} for item in encoded]


def _as_results(
    image_id: int, found: Candidates, boxes: Tensor, rles: list[dict[str, Any]], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 3) for value in box],
            "score": score,
            "segmentation": rle,
        }
        for box, score, label, rle in zip(boxes_xywh, found.scores.tolist(), found.labels.tolist(), rles, strict=True)
    ]


def score_table(results: list[dict[str, Any]], table: Table) -> Metrics:
    """Official box and mask AP of the results, for all classes and for each of them."""
    return evaluate_detections(
        table.annotations_file,
        results,
        class_names=table.class_names,
        groups={"all": table.class_names},
        image_ids=table.image_ids,
    )


def save_detections(path: Path, results: list[dict[str, Any]]) -> None:
    """Writes the results in COCO's own format."""
    write_json(path, results)
