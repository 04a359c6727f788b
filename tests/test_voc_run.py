"""PASCAL VOC through the configuration: Table 5's study on the tiny tree, and masks beside boxes in one training."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from semiseg.config import RunConfig
from semiseg.config.model import ResNetBackbone
from semiseg.config.read import merge, parse_config
from semiseg.data.voc import VOC_CLASSES, voc_files
from semiseg.engine.build import build_data, train_dataset
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.structures.inputs import Supervision
from semiseg.studies.file import load_study, study_runs
from semiseg.studies.identity import data_digest
from tests.tiny import DETECTORS, LOSS_NAMES, TINY, tiny_config
from tests.voc_files import make_voc

TABLE5 = Path(__file__).parent.parent / "experiments" / "voc_table5.toml"
HAS_SCIPY = find_spec("scipy") is not None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    make_voc(root, sbd="SBD" if HAS_SCIPY else None)
    return root


def tiny(config: RunConfig, root: Path, network: dict[str, Any] | None = None) -> RunConfig:
    """The run with a network of a few channels and two steps; data, supervision and objective stay."""
    sizes = {name: TINY["data"][name] for name in ("short_sides", "long_side")}
    changes = {
        "data": {"root": str(root), **sizes},
        "inference": {**TINY["inference"], "refine": config.inference.refine},
        "optim": {"steps": 2, "batch_size": 4, "warmup_steps": 0},
        "runtime": TINY["runtime"] | {"checkpoint_every": 100},
    }
    model = tiny_config(root, model=network or {}).model.model_dump(mode="json")
    values = {**config.model_dump(mode="json"), "model": model}
    return parse_config(RunConfig, merge(values, changes), where="tiny")


def test_the_study_is_table_5s() -> None:
    study = load_study(str(TABLE5))
    rows = ["grabcut-r101", "sdi-r101", "bbtp-r101", "bbtp-crf-r101", "boxinst-r50", "boxinst-r101"]
    assert [(table.number, table.split, table.rows) for table in study.tables] == [(5, None, rows)]
    for run in study_runs(study):
        config, depth = run.config, 50 if run.row == "boxinst-r50" else 101
        assert isinstance(config.model.backbone, ResNetBackbone)
        assert (config.model.backbone.depth, config.model.backbone.weights) == (depth, "imagenet")
        assert (config.data.format, config.data.voc.train_set, config.data.voc.val_set) == ("voc", "train_aug", "val")
        assert config.supervision.source == "boxes"
        assert config.data.bottom_rows_without_affinity == 0
        if "boxinst" in run.row:
            assert (config.objective.box, config.objective.affinity_threshold) == ("projection+pairwise", 0.1)


@pytest.mark.skipif(not HAS_SCIPY, reason="train_aug needs SBD, whose files SciPy reads")
@pytest.mark.parametrize(
    ("row", "used"),
    [
        ("grabcut-r101", {"projection", "pairwise"}),
        ("sdi-r101", {"dice"}),
        ("bbtp-crf-r101", {"mil", "smoothness"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*pseudo masks for")
def test_first_steps_of_the_other_rows(root: Path, tmp_path: Path, row: str, used: set[str]) -> None:
    pytest.importorskip("cv2")
    run = study_runs(load_study(str(TABLE5)), only=[row])[0]
    network = DETECTORS["mask_rcnn"] if row.startswith("bbtp") else {}
    config = tiny(run.config, root, network)
    assert config.inference.refine == run.config.inference.refine
    result = execute_run(config, out=tmp_path, progress=False)
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "losses" in line]
    names = {"dice", "projection", "pairwise", "mil", "smoothness"}
    assert {name for line in lines for name, value in line["losses"].items() if name in names and value > 0} == used
    assert result["metrics"]["segm"] is not None


@pytest.mark.skipif(not HAS_SCIPY, reason="train_aug needs SBD, whose files SciPy reads")
def test_first_steps_of_table_5_and_its_numbers(root: Path, tmp_path: Path) -> None:
    run = study_runs(load_study(str(TABLE5)), only=["boxinst-r50"])[0]
    config = tiny(run.config, root)
    result = execute_run(config, out=tmp_path, progress=False)
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "losses" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert tuple(line["losses"]) == LOSS_NAMES
        assert line["losses"]["dice"] == 0
        assert line["losses"]["projection"] > 0
        assert line["counts"]["box_masks"] == line["counts"]["masks"] > 0
    data = build_data(config)
    assert (len(data.train), len(data.val), data.train.class_names) == (4, 2, VOC_CLASSES)
    metrics = result["metrics"]
    assert (metrics["images"], sum(metrics["instances"].values())) == (2, 2)
    assert {metric: type(metrics["segm"]["groups"]["all"][metric]) for metric in ("AP", "AP50", "AP75")} == {
        "AP": float, "AP50": float, "AP75": float,
    }  # fmt: skip


def test_masks_where_segmented_and_boxes_elsewhere_are_trained_together(root: Path) -> None:
    voc = {"train_set": "main_train", "val_set": "val"}
    values = merge(TINY, {"data": {"format": "voc", "root": str(root), "voc": voc}})
    values["supervision"] = {"source": "as_annotated"}
    config = parse_config(RunConfig, values, where="voc")
    data = build_data(config)
    batches = [train_dataset(config, data).batch([(row, 0)], size_divisor=1) for row in range(len(data.train))]
    samples = {batch.image_ids[0]: batch.targets for batch in batches}
    segmented, boxes = samples[2007000001], samples[2008000005]
    assert segmented is not None
    assert boxes is not None
    assert segmented.supervision.tolist() == [Supervision.MASK, Supervision.MASK]
    assert boxes.supervision.tolist() == [Supervision.BOX]
    assert (len(segmented.masks), len(boxes.masks), len(boxes.crowd_boxes_xyxy)) == (2, 0, 1)
    # The identity of a run knows the images and annotations, not where they lie.
    before = data_digest(config.data)
    assert before == data_digest(config.data.model_copy(update={"root": f"{root}/../{root.name}"}))
    path, content = voc_files(root, "val")[0], voc_files(root, "val")[0].read_text()
    path.write_text(content.replace('"iscrowd":1', '"iscrowd":0', 1))
    assert data_digest(config.data) != before
    path.write_text(content)
