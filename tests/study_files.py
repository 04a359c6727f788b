"""A project folder with a study and the smallest COCO data that it can be planned on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLASSES = ("cat", "dog", "cow")


def write_study(folder: Path, study: str, *, splits: Mapping[str, str] | None = None) -> None:
    """Writes `experiments/study.toml`, `splits/NAME.toml` and the data of `add_study_data`."""
    files = {"experiments/study.toml": study, **{f"splits/{name}.toml": text for name, text in (splits or {}).items()}}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    add_study_data(folder)


def add_study_data(folder: Path) -> None:
    """Writes `coco/`: annotations that differ for training and validation, and an image file for each."""
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
    }
    differing: dict[str, Any]
    for name, differing in (("train", {}), ("val", {"info": {}})):
        images = folder / "coco" / f"{name}2017"
        images.mkdir(parents=True)
        (images / "1.png").write_text("")
        (folder / "coco" / f"{name}.json").write_text(json.dumps({**content, **differing}))
