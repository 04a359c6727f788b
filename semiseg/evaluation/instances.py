"""Which detection found each ground-truth instance, and how the masks of the two differ; no mask is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pycocotools import mask as rle
from pycocotools.coco import COCO

from semiseg.evaluation.matching import match_cells
from semiseg.results import MAX_DETS

FOUND_IOU = 0.5  # of the boxes, from which a detection counts as the object's
SHARES = ("mask_iou", "outside", "recall", "on_others", "mask_box_iou")

_Encoding = Mapping[str, Any]


def box_matches(truth: COCO, results: Sequence[Mapping[str, Any]], *, max_dets: int = MAX_DETS) -> list[int | None]:
    """The annotation that each detection found: by score, the best one still free of its image and class.

    It is the matching of pycocotools on boxes at IoU 0.5, so that no object is found twice.

    Arguments are those of `matching.match_cells`.

    Returns:
        one annotation id per detection; None for one without an object, for one that lies on a crowd region, and for
        all after the first `max_dets` of an image and class.
    """
    matches: list[int | None] = [None] * len(results)
    for cell in match_cells(truth, results, "bbox", [FOUND_IOU], max_dets=max_dets):
        for key, annotation in zip(cell["dtIds"], cell["dtMatches"][0].tolist(), strict=True):
            if annotation and not truth.anns[int(annotation)]["iscrowd"]:
                matches[key - 1] = int(annotation)
    return matches


def match_instances(truth: COCO, results: Sequence[Mapping[str, Any]], *, max_dets: int = MAX_DETS) -> pd.DataFrame:
    """Matches detections to instances by their boxes (`box_matches`) and measures the matched masks.

    Crowd regions are no instances. Instances without a mask take part in the matching, but have no line.

    Arguments are those of `matching.match_cells`; the results fit the truth (`coco_metrics.check_results`).

    Returns:
        One line per instance with a mask, in the order of the file's images and annotations; index: annotation id.
        Columns: image (id), category (id), detection (index into `results`, -1 = not found), and shares in 0..1:
        mask_iou; outside: of the predicted mask, outside the instance's mask; recall: of the instance's mask, covered;
        on_others: of the predicted mask, on the masks of other instances of any class and not on its own;
        mask_box_iou: IoU of the predicted mask with the detection's own box. NaN where not found; the shares of an
        empty mask are 0.
    """
    matches = box_matches(truth, results, max_dets=max_dets)
    finders = {key: index for index, key in enumerate(matches) if key is not None}
    lines = []
    for image_id in truth.imgs:
        annotations = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"] and a.get("segmentation")]
        masks = {a["id"]: truth.annToRLE(a) for a in annotations}
        for annotation in annotations:
            key, category = annotation["id"], annotation["category_id"]
            line = {"annotation": key, "image": image_id, "category": category, "detection": finders.get(key, -1)}
            if key in finders:
                others = [mask for other, mask in masks.items() if other != key]
                result = results[finders[key]]
                line |= _mask_shares(result["segmentation"], masks[key], others, result["bbox"])
            lines.append(line)
    frame = pd.DataFrame(lines, columns=["annotation", "image", "category", "detection", *SHARES])
    return frame.astype({"detection": int, **dict.fromkeys(SHARES, float)}).set_index("annotation")


def _mask_shares(
    predicted: _Encoding, own: _Encoding, others: Sequence[_Encoding], box: Sequence[float]
) -> dict[str, float]:
    common = rle.merge([predicted, own], intersect=True)
    size, own_size, inside = (float(rle.area(mask)) for mask in (predicted, own, common))
    on_others = 0.0
    if others:
        shared = rle.merge([predicted, rle.merge(list(others))], intersect=True)
        on_others = float(rle.area(shared)) - float(rle.area(rle.merge([shared, own], intersect=True)))
    height, width = predicted["size"]
    box_mask = rle.frPyObjects(np.array([box], dtype=np.float64), height, width)[0]
    in_box = float(rle.area(rle.merge([predicted, box_mask], intersect=True)))
    return {
        "mask_iou": inside / max(size + own_size - inside, 1.0),
        "outside": (size - inside) / max(size, 1.0),
        "recall": inside / max(own_size, 1.0),
        "on_others": on_others / max(size, 1.0),
        "mask_box_iou": in_box / max(size + float(rle.area(box_mask)) - in_box, 1.0),
    }
