"""What makes two runs the same: the cut of a step under batch norm, keys that nothing reads, the recorded runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semiseg.config import RunConfig
from semiseg.config import run as configuration
from semiseg.config.read import merge
from semiseg.engine.build import RunData, build_data, build_step, build_training_loader
from semiseg.engine.processes import normalised_together
from semiseg.engine.run import execute_run
from semiseg.engine.run_folder import check_folder
from semiseg.engine.session import start_accelerator
from semiseg.engine.train import optimizer_step, prepare
from semiseg.errors import UserError
from semiseg.report.provenance import differing, run_settings
from semiseg.results import Result, read
from semiseg.studies.file import Study, load_study, study_runs
from semiseg.studies.identity import PlannedRun, matching_results, plan, write_run_files
from tests.committed import committed_records, committed_reports
from tests.distributed_worker import LEARNED
from tests.recorded_runs import recorded_run
from tests.study_files import write_study
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
SPLIT_DATA = 'data = { root = "coco", train_annotations = "train.json", val_annotations = "val.json" }'
STUDY = f"""
title = "T"
[base]
{SPLIT_DATA}
optim.steps = 6
[[rows]]
name = "boxes"
set = {{ supervision.source = "boxes" }}
[[tables]]
name = "table"
title = "T"
rows = ["boxes"]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study of one row, 16 images a step; the current folder of the test."""
    write_study(tmp_path, STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_id(*overrides: str, processes: int = 1) -> str:
    return plan(load_study("study", overrides), processes=processes)[0].run_id


def result_of(run: PlannedRun, processes: int = 1) -> Result:
    identity = {"identity": run.identity, "run_id": run.run_id, "init_run": run.init_run}
    return recorded_run(run.row, run.seed, split=None, split_digest=None, processes=processes, **identity)


# -- how many images are normalised together --------------------------------------------------------------------------

PAIRS = "runtime.images_per_process=2"


def test_images_that_batch_norm_sees_together_make_the_run_whatever_holds_them(project: Path) -> None:
    whole, pairs = run_id(), run_id(processes=8)
    assert whole != pairs, "8 x 2 images are not 1 x 16"
    assert {run_id(PAIRS, processes=processes) for processes in (1, 2, 4, 8)} == {pairs}
    assert run_id("optim.accumulation=8") == pairs
    assert run_id("optim.accumulation=2", processes=4) == pairs
    assert run_id("runtime.images_per_process=16") == run_id("optim.accumulation=1") == whole
    assert len({run_id(processes=processes) for processes in (1, 2, 4, 8, 16)}) == 5
    assert run_id(PAIRS, processes=16) == run_id(processes=16), "one image each"
    linear = ("runtime.batch_rule=linear", PAIRS)
    assert run_id(*linear, processes=8) == pairs


@pytest.mark.parametrize("norm", ["gn", "frozen_bn"])
def test_other_norms_do_not_see_the_cut(project: Path, norm: str) -> None:
    chosen = f"model.mask_head.branch_norm={norm}"
    cuts = [run_id(chosen, processes=processes) for processes in (1, 2, 8, 16)]
    cuts += [run_id(chosen, PAIRS), run_id(chosen, "optim.accumulation=4")]
    assert set(cuts) == {run_id(chosen)}


def test_sync_bn_sees_a_part_of_all_processes(project: Path) -> None:
    sync = "model.mask_head.branch_norm=sync_bn"
    assert run_id(sync, processes=8) == run_id(sync, processes=2) == run_id(sync)
    assert run_id(sync, PAIRS, processes=8) == run_id(sync)
    assert run_id(sync, PAIRS, processes=4) != run_id(sync)
    assert run_id(sync, PAIRS, processes=4) == run_id(sync, "runtime.images_per_process=4", processes=2)


BIFPN = {
    "neck.kind": "bifpn",
    "detector.strides": [8, 16, 32, 64, 128],
    "detector.level_ranges": [16, 32, 64, 128],
    "neck.repeats": 1,
}
NO_MASKS = {"supervision": {"source": "boxes", "split": None}, "objective": {"box": "none"}}


@pytest.mark.parametrize(
    ("model", "sections", "images"),
    [
        ({"backbone.norm": "bn", "mask_head.branch_norm": "gn"}, {}, {"bn": 2}),
        ({"backbone.norm": "bn", "backbone.frozen_stages": 3, "mask_head.branch_norm": "gn"}, {}, {"bn": 2}),
        ({"backbone.norm": "bn", "backbone.frozen_stages": 4, "mask_head.branch_norm": "gn"}, {}, {}),
        ({"mask_head.branch_norm": "bn"}, {}, {"bn": 2}),
        ({"mask_head": {"branch_norm": "bn", "branch_convs": 0}}, {}, {"bn": 2}),  # its refinements have norms, too
        ({"mask_head.branch_norm": "bn"}, NO_MASKS, {}),
        ({"mask_head.branch_norm": "bn"}, {"supervision": NO_MASKS["supervision"]}, {"bn": 2}),
        ({**BIFPN, "neck.norm": "bn"}, NO_MASKS, {"bn": 2}),
        ({**BIFPN, "neck.norm": "sync_bn", "mask_head.branch_norm": "bn"}, {}, {"bn": 2, "sync_bn": 4}),
        ({**BIFPN, "neck.norm": "gn", "mask_head.branch_norm": "frozen_bn"}, {}, {}),
    ],
)
def test_the_norms_that_count_are_those_that_the_network_trains(
    model: dict[str, Any], sections: dict[str, Any], images: dict[str, int]
) -> None:
    config = tiny_config(Path(), **merge({"model": model, "optim": {"batch_size": 8, "accumulation": 2}}, sections))
    kinds = {nn.BatchNorm2d: "bn", nn.SyncBatchNorm: "sync_bn"}
    trained = {
        kinds[type(module)]
        for module in build_step(config, num_classes=12).modules()
        if type(module) in kinds and any(parameter.requires_grad for parameter in module.parameters())
    }
    assert trained == set(images)
    assert normalised_together(config, 2) == ({"normalised_together": images} if images else {})


def test_a_run_is_not_continued_under_a_cut_that_makes_it_another(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"mask_head.branch_norm": "bn"}, "optim": {"steps": 1}}
    first = execute_run(tiny_config(tmp_path, **sections), out=tmp_path / "run", progress=False)
    pairs = tiny_config(tmp_path, **sections, runtime={"images_per_process": 2})
    told = (
        r"run: holds another run \(its batch norm is over the whole batch, wanted 2 images \(bn\): that follows from "
        r"the number of processes and from runtime\.images_per_process\)"
    )
    with pytest.raises(UserError, match=told):
        execute_run(pairs, out=tmp_path / "run", progress=False)
    whole = tiny_config(tmp_path, **sections, runtime={"images_per_process": 4})
    assert execute_run(whole, out=tmp_path / "run", progress=False) == first


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_same_cut_on_other_processes_continues_a_run(tmp_path: Path, norm: str) -> None:
    sections: dict[str, Any] = {"model": {"mask_head.branch_norm": norm}, "optim": {"batch_size": 4}}
    config = tiny_config(tmp_path, **sections, runtime={"images_per_process": 2})
    identity = {**config.identity(), **normalised_together(config, 1)}
    (tmp_path / "config.json").write_text(json.dumps({"identity": identity, "inputs": {"init_from": None}}))
    (tmp_path / "result.json").write_text("{}")
    for processes in (1, 2):
        check_folder(config, tmp_path, processes=processes, resume=True)
    if norm == "gn":
        check_folder(config, tmp_path, processes=4, resume=True)
    else:
        with pytest.raises(UserError, match=r"its batch norm is over 2 images \(bn\), wanted 1 images \(bn\)"):
            check_folder(config, tmp_path, processes=4, resume=True)


def test_a_folder_of_a_study_is_trained_on_the_processes_that_it_is_meant_for(project: Path) -> None:
    (run,) = plan(load_study("study"), processes=8)
    write_run_files(run)
    check_folder(run.config, run.folder, processes=8, resume=True)
    pairs = run.config.model_copy(
        update={"runtime": run.config.runtime.model_copy(update={"images_per_process": 2})},
    )
    check_folder(pairs, run.folder, processes=1, resume=True)
    told = (
        r"means another run .* on 1 processes \(there batch norm is over 2 images \(bn\), here over the whole batch\)"
    )
    with pytest.raises(UserError, match=told):
        check_folder(run.config, run.folder, processes=1, resume=True)


def test_recorded_results_are_matched_by_the_processes_that_trained_them(project: Path) -> None:
    study = load_study("study")
    runs = {processes: plan(study, processes=processes)[0] for processes in (1, 8)}
    for processes, run in runs.items():
        assert matching_results(study, [result_of(run, processes)])
        # Recorded with a number of processes on which it would be another run, or none.
        for other in (9 - processes, 4, 3):
            assert not matching_results(study, [result_of(run, other)])
    pairs = load_study("study", [PAIRS])
    assert matching_results(pairs, [result_of(runs[8], 8)])
    assert matching_results(pairs, [result_of(runs[8], 1)]), "eight parts of two"
    assert not matching_results(pairs, [result_of(runs[1], 1)])


def test_a_report_says_where_runs_side_by_side_were_cut_differently(project: Path) -> None:
    columns = [
        run_settings(replace(result_of(run, n), config=run.config.model_dump(mode="json")), ())
        for n in (1, 8)
        for run in plan(load_study("study"), processes=n)
    ]
    assert differing(columns) == ["normalised_together.bn"]


def test_the_papers_studies_are_the_same_runs_on_one_gpu_and_on_eight() -> None:
    from semiseg.engine.processes import parts_per_step

    names = sorted(path.stem for path in (ROOT / "experiments").glob("*.toml") if path.stem.startswith(("coco", "voc")))
    assert len(names) == 7
    for name in names:
        for run in study_runs(load_study(str(ROOT / "experiments" / f"{name}.toml"))):
            parts = run.config.optim.batch_size // (8 * run.config.runtime.images_per_process)
            assert [parts_per_step(run.config, gpus) for gpus in (8, 4, 2, 1)] == [parts * n for n in (1, 2, 4, 8)], (
                name
            )
            if run.config.model.mask_head.kind != "dynamic":  # without a batch norm
                assert not any(normalised_together(run.config, gpus) for gpus in (8, 1)), run.row
                continue
            cuts = [normalised_together(run.config, gpus)["normalised_together"] for gpus in (8, 4, 2, 1)]
            assert [cut["bn"] for cut in cuts] == [2, 2, 2, 2], name
            if getattr(run.config.model.neck, "norm", None) == "sync_bn":
                # Over all processes, so that on fewer of them fewer images are in a part.
                assert [cut.get("sync_bn", 16) for cut in cuts] == [16, 8, 4, 2]
            else:
                assert cuts == [{"bn": 2}] * 4, name


# -- keys that nothing reads ------------------------------------------------------------------------------------------

BOXES = {"source": "boxes", "split": None}
UNREAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"optim": {"schedule": "one_cycle", "optimizer": "adamw"}, "objective": {"box": "projection"}},
        {
            "optim": {"milestones": [0.1], "warmup_steps": 3, "warmup_factor": 0.5, "momentum": 0.1},
            "objective": {
                "affinity_threshold": 0.9,
                "affinity_size": 5,
                "affinity_dilation": 1,
                "pairwise_warmup_steps": 7,
            },
            "data": {"bottom_rows_without_affinity": 3},
        },
    ),
    (
        {"optim": {"schedule": "step", "warmup_steps": 0}, "objective": {"box": "box_as_mask", "mask": "labelled"}},
        {"optim": {"warmup_factor": 0.5}, "objective": {"affinity_threshold": 0.9}},
    ),
    (
        {"optim": {"schedule": "constant"}, "supervision": BOXES, "objective": {"box": "projection"}},
        {
            "optim": {"milestones": [0.1], "warmup_steps": 3},
            "objective": {"mask": "labelled", "affinity_size": 7, "pairwise_warmup_steps": 7},
        },
    ),
    (
        {"supervision": BOXES, "objective": {"box": "none"}},
        {"objective": {"mask": "labelled", "affinity_size": 7}, "model": {"mask_head.max_positives": 9}},
    ),
]


def weights_after(config: RunConfig, data: RunData, out: Path) -> torch.Tensor:
    """All weights of a run after two steps."""
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    state = prepare(config, data, accelerator)
    state.wrapped.train()
    loader = build_training_loader(config, data, steps=2, start_step=0, processes=1, rank=0, pin_memory=False)
    for batch in loader:
        optimizer_step(state, [batch], out=out)
    return torch.cat([value.detach().flatten().double() for value in state.step_module.state_dict().values()])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.parametrize(("chosen", "unread"), UNREAD)
def test_keys_that_nothing_reads_change_neither_training_nor_identity(
    root: Path, tmp_path: Path, chosen: dict[str, Any], unread: dict[str, Any]
) -> None:
    configs = [tiny_config(root, **chosen), tiny_config(root, **merge(chosen, unread))]
    assert configs[0].identity() == configs[1].identity()
    data = build_data(configs[0])
    one, other = (weights_after(config, data, tmp_path) for config in configs)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("chosen", "read"),
    [
        ({"optim": {"schedule": "step"}}, {"optim": {"milestones": [0.5]}}),
        ({"optim": {"schedule": "step", "warmup_steps": 1}}, {"optim": {"warmup_factor": 0.5}}),
        ({"optim": {"optimizer": "sgd"}}, {"optim": {"momentum": 0.1}}),
        ({"objective": {"box": "projection", "mask": "labelled"}}, {"objective": {"affinity_size": 5}}),
        ({"objective": {"box": "projection+pairwise"}}, {"objective": {"affinity_threshold": 0.9}}),
        ({"objective": {"box": "none"}}, {"objective": {"mask": "labelled"}}),
        ({"objective": {"box": "none"}}, {"objective": {"affinity": "learned"}}),
        ({"objective": LEARNED}, {"objective": {"affinity_threshold": 0.9}}),
        ({"objective": LEARNED}, {"objective": {"affinity_size": 5}}),
        ({"objective": LEARNED}, {"objective": {"box": "projection+pairwise"}}),
        ({"model": BIFPN}, {"model": {"neck.norm": "gn", "neck.kind": "bifpn"}}),
        ({}, {"model": {"backbone.widths": [8, 8, 16, 24]}}),
    ],
)
def test_keys_that_something_reads_are_part_of_the_identity(chosen: dict[str, Any], read: dict[str, Any]) -> None:
    assert tiny_config(Path(), **chosen).identity() != tiny_config(Path(), **merge(chosen, read)).identity()


def test_a_folder_of_a_version_that_kept_unread_keys_is_continued(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {
        "optim": {"optimizer": "adamw"},
        "objective": {"box": "projection"},
        "init_from": "some/model",
    }
    config = tiny_config(tmp_path, **chosen)
    identity = config.identity(initial=True)
    old = merge(identity, {"optim": {"momentum": 0.5}, "objective": {"affinity_threshold": 0.3}})
    old["model"] = {**old["model"], "weights": "imagenet", "neck_repeats": 3}
    (tmp_path / "config.json").write_text(json.dumps({"identity": old, "inputs": {"init_from": "digest"}}))
    (tmp_path / "result.json").write_text("{}")
    check_folder(config, tmp_path, resume=True)
    other = tiny_config(tmp_path, **chosen, model={"neck.channels": 32})
    with pytest.raises(UserError, match=r"its model\.neck\.channels is 16, wanted 32"):
        check_folder(other, tmp_path, resume=True)


def test_weights_of_the_backbone_are_not_read_where_a_run_starts_from_another(project: Path) -> None:
    Path("experiments/study.toml").write_text(STUDY + "[pretrain]\noptim.steps = 4\n")
    first = [run.run_id for run in plan(load_study("study"))]
    other = [run.run_id for run in plan(load_study("study", ["rows.model.backbone.weights=/nowhere/backbone.pt"]))]
    assert first == other


# -- data, recorded runs, the version of the algorithm ----------------------------------------------------------------


def test_a_pretraining_on_other_annotations(project: Path) -> None:
    content = json.loads(Path("coco/train.json").read_text())
    Path("coco/boxes.json").write_text(json.dumps({**content, "info": {"description": "boxes alone"}}))
    alike = STUDY + "[pretrain]\noptim.steps = 4\n"
    Path("experiments/study.toml").write_text(alike)
    same = plan(load_study("study"))
    Path("experiments/study.toml").write_text(alike + 'data.train_annotations = "boxes.json"\n')
    study = load_study("study")
    start, row = plan(study)
    assert row.init_run == start.run_id
    assert row.config.init_from == str(start.folder / "model")
    assert start.identity["data"] != row.identity["data"] == same[1].identity["data"]
    assert {start.run_id, row.run_id}.isdisjoint(run.run_id for run in same)

    def matched(study: Study, runs: list[PlannedRun]) -> list[str]:
        return sorted(result.row for result in matching_results(study, [result_of(run) for run in runs]).values())

    assert matched(study, [start, row]) == ["boxes", "pretrain"]
    assert matched(study, [same[0], row]) == ["pretrain"], "what it starts from is not recorded: nobody can tell"
    Path("experiments/study.toml").write_text(alike)
    assert matched(load_study("study"), same) == ["boxes", "pretrain"]
    assert matched(load_study("study"), [start, row]) == ["pretrain"]


RECORDS = committed_records()
# Runs that a committed record still lacks, which its report says: two seeds of both rows with a CRF; a second seed.
UNFINISHED = {"shapes_table5": 4, "animals": 9}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_every_recorded_run_is_still_its_studys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study, results = load_study(path.parent.name), read(path)
    found = matching_results(study, results)
    lacking = UNFINISHED.get(path.parent.name, 0)
    assert len(found) == len(study_runs(study)) - lacking, "a cell of a table has lost its run"
    assert {result.run_id for result in found.values()} == {result.run_id for result in results}


def test_there_are_records_to_look_at() -> None:
    assert len(RECORDS) >= 6


def test_another_version_of_the_algorithm_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study, results = load_study("shapes"), read(committed_reports() / "shapes" / "results.jsonl")
    assert "algorithm" not in RunConfig().identity()
    monkeypatch.setattr(configuration, "ALGORITHM_VERSION", 2)
    assert RunConfig().identity()["algorithm"] == 2
    assert matching_results(study, results) == {}
