"""Detections in COCO's results format, read from a file of whoever made them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_codec

from semiseg.data.coco import is_number, read_counts
from semiseg.data.problems import BadValue
from semiseg.errors import UserError


def read_results(
    path: Path, sizes_hw: Mapping[int, tuple[int, int]], category_ids: Collection[int], *, masks: bool = True
) -> list[dict[str, Any]]:
    """COCO results of a file in its order: image_id, category_id, bbox xywh, score, segmentation (a compressed RLE).

    A UserError if the file or an entry is none, or is of another image or category than the given.

    Args:
        sizes_hw: (height, width) of each image by its id.
        category_ids: the allowed ones.
        masks: False lets `segmentation` be missing; then it is missing in all that are returned.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of COCO results, objects with image_id, category_id, bbox, ...")
    return [_read(entry, f"{path}: result {n}", sizes_hw, category_ids, masks) for n, entry in enumerate(content)]


def _read(
    entry: Any, where: str, sizes_hw: Mapping[int, tuple[int, int]], category_ids: Collection[int], masks: bool
) -> dict[str, Any]:
    needed = ("image_id", "category_id", "bbox", "score", *(("segmentation",) if masks else ()))
    if not isinstance(entry, dict) or (missing := [name for name in needed if name not in entry]):
        lacks = f"{missing[0]!r} is missing" if isinstance(entry, dict) else "is no object"
        raise UserError(f"{where}: {lacks}; needed: {', '.join(needed)}")
    for name, known in (("image_id", sizes_hw), ("category_id", category_ids)):
        if type(entry[name]) is not int or entry[name] not in known:
            raise UserError(f"{where}: {name} {entry[name]!r} is not in the annotation file")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise UserError(f"{where}: 'bbox' is {box!r}, allowed: four numbers [x, y, width, height]")
    if not is_number(entry["score"]):
        raise UserError(f"{where}: 'score' is {entry['score']!r}, allowed: a number")
    result = {name: entry[name] for name in needed[:4]}
    if masks:
        size_hw = sizes_hw[entry["image_id"]]
        try:
            counts = read_counts(entry["segmentation"], size_hw=size_hw)
        except BadValue as bad:
            raise UserError(f"{where}: {bad.text}") from None
        if counts is None:
            raise UserError(f"{where}: 'segmentation' is empty, allowed: an RLE or polygons")
        result["segmentation"] = {"size": list(size_hw), "counts": counts.decode("ascii")}
    return result


def decoded(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The (H, W) mask of a compressed RLE."""
    mask: NDArray[np.bool_] = rle_codec.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
    return mask
