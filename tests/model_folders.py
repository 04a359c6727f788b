"""A model folder for tests: a tiny network whose random weights already find something."""

from __future__ import annotations

from pathlib import Path

import torch

from semiseg.config import InferenceConfig
from semiseg.engine.checkpoint import ModelInfo, save_model
from semiseg.models.build import build_model
from tests.coco_files import CLASS_NAMES
from tests.tiny import dynamic, fcos, tiny_config


def make_model(
    folder: Path,
    *,
    class_names: tuple[str, ...] = CLASS_NAMES,
    category_ids: tuple[int, ...] | None = None,
    short_side: int = 64,
    long_side: int = 96,
    score_threshold: float = 0.2,
) -> ModelInfo:
    """Writes `model.safetensors` and `config.json`; category ids are 1, 3, 5, ... as in `make_coco`.

    Scores vary over the image, boxes are some cells wide, masks are parts of the image.
    """
    config = tiny_config(folder).model
    inference = InferenceConfig(
        short_side=short_side, long_side=long_side, score_threshold=score_threshold, max_detections=20
    )
    torch.manual_seed(0)
    network = build_model(config, num_classes=len(class_names))
    with torch.no_grad():
        head = fcos(network)
        for layer, bias in ((head.class_logits, -1.0), (head.box_distances, 1.5), (head.centreness, 0.0)):
            assert layer.bias is not None
            layer.weight.mul_(12)
            layer.bias.fill_(bias)
        controller = dynamic(network).controller
        assert controller.bias is not None
        controller.weight.mul_(10)
        controller.bias.normal_(std=0.7)
    ids = category_ids or tuple(2 * label + 1 for label in range(len(class_names)))
    info = ModelInfo(config, inference, class_names, ids)
    save_model(folder, network.state_dict(), info)
    return info
