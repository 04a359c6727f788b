"""Class names of the data sets that a split can be made for without an annotation file at hand."""

from __future__ import annotations

from pathlib import Path

from semiseg.errors import UserError

# COCO's 80 categories in the order of their ids.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# Their ids: 1..90 without those that the annotations never use.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


def classes_of(dataset: str | None, annotations: Path | None) -> tuple[str, ...]:
    """The classes of an annotation file, else of a known data set; a UserError if neither is given."""
    if annotations is not None:
        from semiseg.data.coco import read_coco

        return read_coco(annotations).class_names
    if dataset == "coco":
        return COCO_CLASSES
    if dataset == "shapes":
        from semiseg.data.shapes import SHAPES_CLASSES

        return SHAPES_CLASSES
    if dataset == "voc":
        from semiseg.data.voc import VOC_CLASSES

        return VOC_CLASSES
    unknown = f"data set {dataset!r} is not known by name (known: coco, shapes, voc)"
    raise UserError(f"{unknown if dataset else 'no data set is named'}; give an annotation file of it")
