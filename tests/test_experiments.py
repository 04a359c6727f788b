"""Every shipped study: its file is right, its runs are shared as they should be, and its first step trains."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semiseg.commands.known_classes import COCO_CLASSES
from semiseg.config import RunConfig, learns_masks
from semiseg.config.model import AnchorDetector, DynamicMaskHead, RegionDetector, RegionMaskHead, ResNetBackbone
from semiseg.config.read import digest, merge, parse_config, read_toml
from semiseg.engine.build import RunData, build_data, build_training_loader
from semiseg.engine.optim import learning_rate
from semiseg.engine.session import start_accelerator
from semiseg.engine.train import optimizer_step, prepare
from semiseg.losses.terms import MASK_LOSSES, OPTIONAL_MASK_LOSSES, TERMS
from semiseg.report.published import read_published
from semiseg.splits import load_split
from semiseg.structures.inputs import Supervision
from semiseg.studies.file import Study, StudyRun, load_study, study_runs
from semiseg.studies.identity import run_identity
from semiseg.studies.report import report_row
from tests.coco_files import make_coco, polygon_annotation
from tests.tiny import DETECTORS, HEADS, TINY, nested

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.stem for path in (ROOT / "experiments").glob("*.toml"))
COCO_TABLES = {
    "coco_table2": "2",
    "coco_tau": "tau",
    "coco_neighbourhood": "neighbourhood",
    "coco_table3": "3",
    "coco_table4": "4",
}
ANIMALS = "animals"
PUBLISHED = read_published(ROOT / "reports" / "published" / "boxinst.csv")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_ids(study: Study) -> dict[str, str]:
    """Row -> id of its runs (of the first seed and split), on one made-up data set."""
    ids: dict[str, str] = {}
    for run in study_runs(study):
        identity = run_identity(run, data=lambda _: "d", split=lambda run: run.split, weights=str)
        ids.setdefault(run.row, digest(identity))
    return ids


def printed_rows(table: str) -> list[str]:
    return list(dict.fromkeys(PUBLISHED.loc[PUBLISHED["table"] == table, "row"]))


def test_there_is_a_study_for_every_table() -> None:
    assert {*COCO_TABLES, "coco_voc_splits", "shapes", "shapes_table2", "shapes_tau"} <= set(STUDIES)
    found = {str(table.number) for name in STUDIES if name.startswith("coco") for table in load_study(name).tables}
    assert found == {"2", "3", "4", "6", "7", "tau", "neighbourhood"}


def test_the_studies_of_shapes_have_one_base() -> None:
    names = [name for name in STUDIES if name.startswith("shapes")]
    assert len(names) == 12
    for name in names:
        written = read_toml(ROOT / "experiments" / f"{name}.toml")
        assert written["base"] == "shapes"
        assert load_study(name).base == read_toml(ROOT / "experiments" / "bases" / "shapes.toml")


@pytest.mark.parametrize("name", STUDIES)
def test_rows_are_named_as_in_the_paper(name: str) -> None:
    """So that the printed numbers stand beside ours; rows that the paper leaves out are known ones."""
    study = load_study(name)
    assert study.question
    assert study_runs(study)
    for table in study.tables:
        if table.number is not None:
            left_out = set(table.rows) - set(printed_rows(str(table.number)))
            assert left_out <= {"full-masks", "0.3", "learned", "sdi-r101"}, table.name
    rows = {run.row: report_row(run.row, "", "", run.config) for run in study_runs(study)}
    for table in study.tables:
        printed = PUBLISHED[PUBLISHED["table"] == str(table.number)].set_index("row")
        # GrabCut's masks come from no loss; our row says by which the boxes were trained
        for row in set(table.rows) & set(printed.index) - {"grabcut-r101"}:
            assert {rows[row].projection} == set(printed.loc[[row], "projection"]), (table.name, row)
            assert {rows[row].pairwise} == set(printed.loc[[row], "pairwise"]), (table.name, row)


@pytest.mark.parametrize(("name", "table"), COCO_TABLES.items())
def test_coco_studies_have_all_rows_of_their_table(name: str, table: str) -> None:
    assert load_study(name).tables[0].rows == printed_rows(table)
    assert {run.config.data.val_annotations for run in study_runs(load_study(name))} == {
        "annotations/instances_val2017.json"
    }


def test_runs_that_several_tables_show_are_trained_once() -> None:
    ids = {name: run_ids(load_study(name)) for name in (*COCO_TABLES, "coco_voc_splits")}
    boxes = ids["coco_voc_splits"]["box-supervised"]
    assert ids["coco_table3"]["projection+pairwise"] == boxes
    assert ids["coco_tau"]["0.1"] == boxes
    assert ids["coco_neighbourhood"]["size3-dilation2"] == boxes
    assert ids["coco_table2"]["dice"] == ids["coco_voc_splits"]["full-masks"]
    assert ids["coco_table2"]["redesigned"] == ids["coco_tau"]["full"]
    # 13 rows of Table 4, 6 of Tables 6 and 7 (of which 4 depend on the split), and 1 + 1 + 2 + 2 + 3 of the others.
    distinct = {run_id for study in ids.values() for run_id in study.values()}
    assert len(distinct) == 13 + 6 + 1 + 2 + 2 + 3


def test_table_4_is_the_papers_recipe() -> None:
    runs = {run.row: run.config for run in study_runs(load_study("coco_table4"))}
    for row, config in runs.items():
        optim = config.optim
        full = row.startswith(("mask-rcnn", "condinst", "polarmask", "yolact"))
        drops = (210_000, 250_000) if row.endswith("3x") or full else (60_000, 80_000)
        steps = optim.steps or 0
        if row.startswith("polarmask"):  # 26 epochs of 118 287 images
            assert (steps, optim.batch_size, optim.learning_rate) == (96_108, 32, 0.02)
            assert [round(26 * share) for share in optim.milestones] == [18, 24]
            assert (config.inference.decoding, config.inference.nms_threshold) == ("polarmask", 0.5)
            continue
        if row.startswith("yolact"):
            assert (steps, optim.batch_size, optim.learning_rate) == (800_000, 8, 0.001)
            assert [800 * share for share in optim.milestones] == [280, 600, 700, 750]
            assert (config.objective.mask, config.data.augment.crop) == ("crop_bce", "ssd")
            assert config.data.augment.least_box == pytest.approx(4 / 550)
            continue
        assert steps == {210_000: 270_000, 60_000: 90_000}[drops[0]], row
        others = row.startswith(("mask-rcnn", "bbtp"))
        rate = 0.02 if others else 0.01
        for number, drop in enumerate(drops):
            before, after = (learning_rate(optim, step=step, steps=steps) for step in (drop - 1, drop))
            assert (before, after) == pytest.approx((rate * 0.1**number, rate * 0.1 ** (number + 1))), row
        assert (optim.batch_size, config.data.long_side) == (16, 1333)
        assert isinstance(config.model.backbone, ResNetBackbone)
        assert config.model.backbone.depth == (50 if "r50" in row else 101), row
        if isinstance(config.model.mask_head, DynamicMaskHead):
            assert config.model.mask_head.feature_channels == (8 if row.startswith("condinst") else 16), row
        assert isinstance(config.model.mask_head, DynamicMaskHead) != others
        assert config.supervision.source == ("masks" if full else "boxes"), row
        assert (config.model.neck.kind, config.model.neck.channels) == (
            ("bifpn", 160) if "bifpn" in row else ("fpn", 256)
        )
        assert deformable_interval(config) == (1 if "dcn" in row else 0), row
        sides = [800] if row.endswith("noaug") or row.startswith("bbtp") else [640, 672, 704, 736, 768, 800]
        assert config.data.short_sides == sides, row


def deformable_interval(config: RunConfig) -> int:
    backbone = config.model.backbone
    return backbone.deformable_interval if isinstance(backbone, ResNetBackbone) else 0


def tiny(config: RunConfig, root: Path) -> RunConfig:
    """The run at the smallest size that keeps what defines it: supervision, objective, neck, kind of backbone."""
    values = config.model_dump(mode="json", exclude={"data", "optim", "runtime", "init_from"})
    bottlenecks = deformable_interval(config) > 0
    head = config.model.mask_head
    small = {
        **({"mask_head.feature_channels": head.feature_channels} if isinstance(head, DynamicMaskHead) else {}),
        **{"detector.strides": [8, 16, 32, 64, 128], "detector.level_ranges": [16, 32, 64, 128]},
        **({"neck.kind": "bifpn", "neck.repeats": 1} if config.model.neck.kind == "bifpn" else {}),
    }
    detector = config.model.detector
    if not isinstance(head, DynamicMaskHead):
        small["mask_head"] = HEADS[head.kind]
    if isinstance(detector, AnchorDetector):
        small = merge(DETECTORS["yolact"], {"mask_head": {"start": "nothing"}})
    if isinstance(detector, RegionDetector):
        assert isinstance(head, RegionMaskHead)
        small = merge(DETECTORS["mask_rcnn"], {"detector": {"mask_regions": detector.mask_regions}})
        small = merge(small, {"mask_head": {"margin": head.margin, "class_agnostic": head.class_agnostic}})
    changes: dict[str, Any] = {**TINY, **merge({"model": TINY["model"]}, {"model": nested(small)})}
    if bottlenecks:
        changes["model"]["backbone"] = {"depth": 50, "weights": "random"}
    del changes["supervision"]
    changes["optim"] = {**changes["optim"], "steps": 9, "batch_size": 2}
    changes["data"] = {**changes["data"], "root": str(root)}
    if config.data.format != "shapes":
        files = {"train_images": "images", "val_images": "images"}
        files |= {"train_annotations": "instances.json", "val_annotations": "instances.json"}
        changes["data"] |= {"format": "coco", "short_sides": [64], **files}
        changes["data"]["bottom_rows_without_affinity"] = config.data.bottom_rows_without_affinity
    changes["data"]["augment"] = config.data.augment.model_dump(mode="json")
    return parse_config(RunConfig, merge(values, changes), where="tiny")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data folders by format; COCO's has COCO's 80 classes, the VOC classes and the others in turn."""
    coco = tmp_path_factory.mktemp("coco")
    split = load_split("coco_voc20_seen", COCO_CLASSES)
    names = [name for pair in zip_longest(split.seen, split.unseen) for name in pair if name]
    annotations = [
        # Category ids are 1, 3, 5, ...
        polygon_annotation(
            4 * image + n, image_id=image, category_id=2 * n + 1, points=[8 * n, 8, 8 * n + 36, 12, 8 * n + 16, 52]
        )
        for image in range(1, 7)
        for n in range(4)
    ]
    random = np.random.default_rng(0)
    animals = tmp_path_factory.mktemp(ANIMALS)
    for folder, classes in ((coco, names), (animals, ["bear", "deer", "elephant", "otter", "tiger", "turtle"])):
        files = make_coco(folder, sizes_hw=[(64, 64)] * 6, class_names=classes, annotations=annotations)
        for path in files.images.iterdir():  # smooth, so that neighbours reach every threshold
            Image.fromarray(random.integers(126, 131, (64, 64, 3)).astype(np.uint8)).save(path)
    return {"shapes": tmp_path_factory.mktemp("shapes"), "coco": coco, "voc": coco, ANIMALS: animals}


def distinct_runs() -> dict[str, StudyRun]:
    """Every shipped study's runs of its first seed, those that are alike at tiny size once.

    Of the shares of masks one half: of less nothing may be left in four images.
    """
    runs: dict[str, StudyRun] = {}
    for name in STUDIES:
        for run in study_runs(load_study(name)):
            small_share = run.split.endswith("_percent") and run.split != "shapes_50_percent" if run.split else False
            if run.seed == 0 and not small_share:
                key = digest([tiny(run.config, Path("root")).model_dump(mode="json"), run.split])
                runs.setdefault(key, run)
    return runs


def expected_losses(config: RunConfig) -> set[str]:
    """Mask losses that instances of the run get, by its own words."""
    kinds = {
        "masks": [Supervision.MASK],
        "boxes": [Supervision.BOX],
        "split": [Supervision.MASK, Supervision.BOX],
        "as_annotated": [Supervision.MASK, Supervision.BOX],
    }[config.supervision.source]
    objective = {Supervision.MASK: config.objective.mask, Supervision.BOX: config.objective.box}
    return {term for kind in kinds for term in TERMS[kind, objective[kind]]}


def test_the_first_step_of_every_run(roots: dict[str, Path], tmp_path: Path) -> None:
    runs = distinct_runs()
    assert len(runs) >= 20
    tables: dict[tuple[str, str | None], RunData] = {}
    for run in runs.values():
        config = tiny(run.config, roots[ANIMALS if run.config.data.root.endswith(ANIMALS) else run.config.data.format])
        where = f"{run.row} ({run.split}), {config.data.format}"
        source = (config.data.root, config.supervision.split)
        if source not in tables:
            tables[source] = build_data(config)
        accelerator = start_accelerator(config.runtime, seed=0)
        state = prepare(config, tables[source], accelerator)
        model = state.step_module.model
        kinds = [type(module).__name__ for module in model.modules()]
        assert ("BiFPN" in kinds) == (run.config.model.neck.kind == "bifpn"), where
        assert kinds.count("DeformableConv") == (13 if deformable_interval(run.config) else 0), where
        parts = (list(model.mask_head.parameters()), list(model.detector.parameters()))
        before = [[parameter.detach().clone() for parameter in part] for part in parts]
        loader = build_training_loader(
            config, tables[source], steps=1, start_step=0, processes=1, rank=0, pin_memory=False
        )
        report = optimizer_step(state, list(loader), out=tmp_path)
        assert report is not None
        assert torch.isfinite(report.weighted).all(), where
        changed = [not all(map(torch.equal, weights, part)) for weights, part in zip(before, parts, strict=True)]
        assert changed == [learns_masks(config), True], where
        counts = dict(zip(state.step_module.count_names, report.counts.tolist(), strict=True))
        losses = {name for name in (*MASK_LOSSES, *OPTIONAL_MASK_LOSSES) if counts.get(name, 0) > 0}
        assert losses == expected_losses(config), where
