"""How good pseudo masks are where the annotations have masks: mean IoU, and the AP that they would have at best.

    python -m examples.analysis.pseudo_quality data/toy/train/annotations.json data/toy/grabcut.json

Objects without a mask in either file are left out. The AP is the mean over the thresholds 0.5, 0.55, ... 0.95 of the
share of objects whose IoU reaches them: that of a detector that finds every box.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

THRESHOLDS = np.arange(0.5, 1.0, 0.05)


def main() -> None:
    """Reads two COCO jsons of the same annotation ids and prints what they have in common."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="COCO json with masks")
    parser.add_argument("pseudo", type=Path, help="COCO json with the masks in question")
    chosen = parser.parse_args()
    true, made = (json.loads(path.read_text(encoding="utf-8")) for path in (chosen.annotations, chosen.pseudo))
    print(describe(true, made))


def describe(true: dict[str, Any], made: dict[str, Any]) -> str:
    """The numbers in a sentence."""
    ious, sources = compared(true, made)
    if not len(ious):
        return "no object has a mask in both files"
    best = np.mean([(ious >= threshold).mean() for threshold in THRESHOLDS])
    words = ", ".join(f"{count} {name}" for name, count in sources.most_common())
    return f"{len(ious)} objects: mean IoU {ious.mean():.3f}, AP at best {100 * best:.1f} ({words})"


def compared(true: dict[str, Any], made: dict[str, Any]) -> tuple[np.ndarray, Counter[str]]:
    """IoU of the masks of each object that has both, and where the made ones come from."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in true["images"]}
    by_id = {each["id"]: each for each in made["annotations"] if each.get("segmentation")}
    ious, sources = [], Counter[str]()
    for each in true["annotations"]:
        other = by_id.get(each["id"])
        if other is not None and each.get("segmentation") and not each.get("iscrowd"):
            pair = [as_rle(item["segmentation"], sizes[each["image_id"]]) for item in (each, other)]
            ious.append(float(rle_codec.iou([pair[0]], [pair[1]], [0])[0, 0]))
            sources[other.get("mask_source", "from elsewhere")] += 1
    return np.array(ious), sources


def as_rle(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Polygons or an RLE of any kind as a compressed one."""
    if isinstance(segmentation, list):
        merged: dict[str, Any] = rle_codec.merge(rle_codec.frPyObjects(segmentation, *size_hw))
        return merged
    if isinstance(segmentation["counts"], list):
        encoded: dict[str, Any] = rle_codec.frPyObjects(segmentation, *size_hw)
        return encoded
    return dict(segmentation)


if __name__ == "__main__":
    main()
