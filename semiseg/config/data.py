"""Where images and annotations are, which data set they form, and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from semiseg.config.section import PositiveInt, Probability, Section, Seed, Side


class ShapesConfig(Section):
    """The embedded data set; ignored unless `data.format = "shapes"`."""

    image_size: Side = 128
    train_images: PositiveInt = 4000
    val_images: PositiveInt = 200
    train_seed: Seed = 1
    val_seed: Seed = 2


class VocConfig(Section):
    """Image sets of PASCAL VOC 2012; ignored unless `data.format = "voc"`.

    `train_aug` is the usual 10 582 images: VOC's train and SBD's images outside VOC's val. `main_train` and
    `main_trainval` are detection lists, where most images have boxes only (docs/DATA.md). Any other name is a list in
    `ImageSets/Segmentation`.
    """

    train_set: str = "train_aug"
    val_set: str = "val"


class HubConfig(Section):
    """Splits of a data set on the Hugging Face Hub; ignored unless `data.root` begins with `hf:`."""

    train_split: str = "train"
    val_split: str = "validation"


class DataConfig(Section):
    """Where images and annotations are and how they become batches.

    `root` holds the data set and its Arrow cache. For COCO the four names are relative to `root`. `hf:OWNER/NAME` is a
    data set on the Hugging Face Hub, `hf:FOLDER` one of the same form on disk.
    """

    format: Literal["shapes", "coco", "voc"] = "coco"
    root: str = "data/coco"
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    shapes: ShapesConfig = ShapesConfig()
    voc: VocConfig = VocConfig()
    hub: HubConfig = HubConfig()
    short_sides: Annotated[list[Side], Field(min_length=1)] = [640, 672, 704, 736, 768, 800]
    long_side: Side = 1333
    flip: Probability = 0.5
    bottom_rows_without_affinity: Annotated[int, Field(ge=0)] = 10
