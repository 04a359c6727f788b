"""`semiseg convert`: checkpoints of other implementations become model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semiseg.commands.known_classes import COCO_CATEGORY_IDS, COCO_CLASSES
from semiseg.config import InferenceConfig, ModelConfig
from semiseg.config.former import leaves
from semiseg.config.model import ResNetBackbone
from semiseg.errors import UserError
from semiseg.files import require_folder
from semiseg.project import WEIGHTS_NAME

if TYPE_CHECKING:
    from semiseg.interop.checkpoints import Converted


Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Model folder to write; an existing model folder is replaced.")
]
ShortSide = Annotated[int, typer.Option(min=32, max=65536, help="Short side of images in evaluation.")]
LongSide = Annotated[int, typer.Option(min=32, max=65536, help="Largest long side, in pixels.")]


def adelaidet(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A released CondInst or BoxInst file, .pth.")],
    out: Out,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO json with the model's classes. Default, for 80 classes: COCO's.")
    ] = None,
    short_side: ShortSide = 800,
    long_side: LongSide = 1333,
) -> None:
    """Convert a released CondInst or BoxInst checkpoint.

    The model folder serves evaluate, predict, and init_from of a training.

    Example: semiseg convert adelaidet BoxInst_MS_R_50_3x.pth models/boxinst_r50
    """
    _check_out(out)
    from semiseg.interop.adelaidet import convert_checkpoint

    inference = InferenceConfig(short_side=short_side, long_side=long_side)
    _write(convert_checkpoint(checkpoint), checkpoint, out, annotations, inference)


def torchvision(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="State dict of torchvision's maskrcnn_resnet50_fpn, .pth.")
    ],
    out: Out,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO json with the model's classes. Default, for 91 outputs: COCO's 80.")
    ] = None,
    short_side: ShortSide = 800,
    long_side: LongSide = 1333,
) -> None:
    """Convert torchvision's Mask R-CNN into a model folder.

    Example: semiseg convert torchvision maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth models/maskrcnn_r50
    """
    _check_out(out)
    from semiseg.interop.checkpoints import read_state
    from semiseg.interop.torchvision import SCORES, convert_state

    state = read_state(checkpoint)
    rows = state[SCORES].shape[:1] if SCORES in state else ()
    of_coco = annotations is None and rows == (max(COCO_CATEGORY_IDS) + 1,)
    converted = convert_state(state, kept=COCO_CATEGORY_IDS if of_coco else None, where=str(checkpoint))
    inference = InferenceConfig(short_side=short_side, long_side=long_side, nms_threshold=0.5)
    _write(converted, checkpoint, out, annotations, inference)


def yolact(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A released YOLACT file with a ResNet, .pth.")],
    out: Out,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO json with the model's classes. Default, for 80 classes: COCO's.")
    ] = None,
    side: Annotated[
        int, typer.Option(min=32, max=65536, help="Pixels to which images are stretched: 550, 700, 400.")
    ] = 550,
) -> None:
    """Convert a released YOLACT checkpoint.

    Example: semiseg convert yolact yolact_resnet50_54_800000.pth models/yolact_r50
    """
    _check_out(out)
    from semiseg.interop.checkpoints import read_state
    from semiseg.interop.yolact import convert_state

    converted = convert_state(read_state(checkpoint), side=side, where=str(checkpoint))
    inference = InferenceConfig(short_side=side, long_side=side, stretch=True, nms_threshold=0.5)
    _write(converted, checkpoint, out, annotations, inference)


def _check_out(out: Path) -> None:
    """Only a new or empty folder or a model folder may be written; anything else would be lost."""
    require_folder(out.absolute().parent)
    if out.is_file():
        raise UserError(f"{out}: is a file, expected a model folder to write")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and names != {WEIGHTS_NAME, "config.json"}:
        raise UserError(f"{out}: holds other things than a model, which would be lost; give a new folder")
    if names:  # of a model, but others use the same names
        from semiseg.engine.checkpoint import read_model_info

        try:
            read_model_info(out)
        except UserError:
            reason = "holds no readable model of semiseg, but what would be lost; give a new folder"
            raise UserError(f"{out}: {reason}") from None


def _write(
    converted: Converted, checkpoint: Path, out: Path, annotations: Path | None, inference: InferenceConfig
) -> None:
    """Writes the model folder and says what it is of."""
    from semiseg.engine.checkpoint import ModelInfo, save_model

    names, ids = _classes(converted.num_classes, annotations, checkpoint)
    info = ModelInfo(config=converted.config, class_names=names, category_ids=ids, inference=inference)
    save_model(out.resolve(), converted.weights, info)
    typer.echo(_summary(converted, checkpoint, out))


def _classes(count: int, annotations: Path | None, checkpoint: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Name and category id of each label."""
    if annotations is not None:
        from semiseg.data.coco import read_coco

        coco = read_coco(annotations)
        if len(coco.class_names) != count:
            raise UserError(f"{annotations}: has {len(coco.class_names)} classes, but {checkpoint} has {count}")
        return coco.class_names, coco.category_ids
    if count != len(COCO_CLASSES):
        raise UserError(
            f"{checkpoint}: has {count} classes, not COCO's {len(COCO_CLASSES)}; name them with --annotations, a COCO "
            "json of its data set"
        )
    return COCO_CLASSES, COCO_CATEGORY_IDS


def _summary(converted: Converted, checkpoint: Path, out: Path) -> str:
    """What was read and dropped, and the TOML lines of what differs from the defaults but for the initial weights."""
    config = converted.config
    assert isinstance(config.backbone, ResNetBackbone)
    counters = [key for key in converted.dropped if key.startswith("backbone.") and "num_batches_tracked" in key]
    dropped = [key for key in converted.dropped if key not in counters]
    dropped += [f"num_batches_tracked of frozen norms ({len(counters)})"] if counters else []
    usual = leaves(ModelConfig().model_dump(mode="json"))
    values = leaves(config.model_dump(mode="json", exclude={"backbone": {"weights"}}))
    lines = [
        f"{checkpoint}: resnet{config.backbone.depth}, {config.neck.kind}, {converted.num_classes} classes",
        f"dropped, since only training needs it: {', '.join(dropped) or 'nothing'}",
        f"written to {out}; a training that starts from it needs",
        "",
        f"init_from = {json.dumps(str(out), ensure_ascii=False)}",
        "",
        "[model]",
        *(f"{name} = {json.dumps(value)}" for name, value in values.items() if value != usual.get(name)),
    ]
    return "\n".join(lines)
