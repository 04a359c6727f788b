"""`semiseg compare`: which runs are found, which are one row, and which are refused to stand side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.config import RunConfig
from semiseg.config.read import digest, merge
from semiseg.errors import UserError
from semiseg.evaluation.coco_metrics import METRIC_NAMES
from semiseg.report.aggregate import ReportInput
from semiseg.report.provenance import warnings
from semiseg.results import Result, append
from semiseg.splits import SplitFile, make_split, write_split
from semiseg.studies.compare import RecordedRun, comparison, find_runs, known_runs, run_of_folder
from tests.page_reader import unpadded

CLASSES = ("a_ring", "b|<b>", "猫 café")
SHAPES = {
    "data": {"format": "shapes"},
    "model": {"backbone": {"kind": "small"}},
}


def run_config(changes: dict[str, Any], seed: int) -> RunConfig:
    return RunConfig.model_validate({**merge(SHAPES, changes), "seed": seed})


def metrics_of(ap: float) -> dict[str, Any]:
    def numbers(value: float) -> dict[str, float]:
        return {**dict.fromkeys(METRIC_NAMES, value), "AP50": value + 10}

    classes = {name: numbers(ap + place) for place, name in enumerate(CLASSES)}
    return {
        "unit": "percent",
        "images": 4,
        "instances": dict.fromkeys(CLASSES, 2),
        "bbox": {"groups": {}, "classes": classes},
        "segm": {"groups": {}, "classes": classes},
    }


def made_run(
    row: str, seed: int = 0, *, study: str = "first", ap: float = 30.0, init: Result | None = None, **changes: Any
) -> Result:
    """The record of a run; `changes` are laid over its configuration."""
    config = run_config(changes, seed)
    split = config.supervision.split
    identity: dict[str, str | None] = {
        "config": digest(config.identity()),
        "split": split and f"digest of {split}",
        "data": "shapes-2",
        "init": None if init is None else init.run_id,
    }
    return Result(
        run_id=digest(identity),
        study=study,
        row=row,
        split=split,
        split_digest=identity["split"],
        seed=seed,
        config=config.model_dump(mode="json", exclude={"init_from"}),
        identity=identity,
        data_fingerprint=digest(config.data.shapes.model_dump()),
        metrics=metrics_of(ap + seed),
        steps=10,
        seconds=360.0,
        device="cpu",
        versions={"torch": "2"},
        git_revision="abc",
        command=["semiseg", "run", study, "--jobs", "2", "--set", "optim.momentum=0.5"],
        finished="2026-01-01T00:00:00+00:00",
        init_run=None if init is None else init.run_id,
        val_fingerprint=digest([config.data.shapes.val_seed, config.data.shapes.val_images]),
    )


def found(*results: Result) -> list[RecordedRun]:
    return [RecordedRun(result, None, Path("reports") / result.study / "results.jsonl") for result in results]


def compared(*results: Result, split: str | None = None, known: tuple[Result, ...] = ()) -> ReportInput:
    return comparison(found(*results), found(*results, *known), split=split, command=["semiseg", "compare", "x"])


def row_names(report: ReportInput) -> list[str]:
    return [row.name for row in report.tables[0].rows]


def record(*results: Result) -> None:
    for result in results:
        append(Path("reports") / result.study / "results.jsonl", result)


@pytest.fixture(autouse=True)
def _in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BOXES: dict[str, Any] = {"supervision": {"source": "boxes"}}
MASKS: dict[str, Any] = {"supervision": {"source": "masks"}}


def test_runs_that_differ_in_their_seed_alone_are_one_row() -> None:
    starts = [made_run("pretrain", seed, **BOXES) for seed in range(2)]
    boxes = [made_run("box+er", seed, init=start, **BOXES) for seed, start in enumerate(starts)]
    masks = made_run("full", 1, init=starts[1], **MASKS)
    report = compared(boxes[1], masks, boxes[0], known=tuple(starts))
    assert row_names(report) == ["box+er", "full"]
    assert {key[1:] for key in report.results} == {("box+er", 0), ("box+er", 1), ("full", 1)}
    assert report.seeds == (0, 1)
    boxed, full = report.tables[0].rows
    assert (boxed.label, boxed.projection, boxed.pairwise, boxed.every_mask) == ("box + er", "yes", "yes", False)
    assert (full.projection, full.pairwise, full.every_mask) == ("", "", True)
    assert report.tables[0].alike
    assert report.pretraining is not None
    assert {start.run_id for start in report.pretraining_results} == {start.run_id for start in starts}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"steps": 7, "batch_size": 8}},
        {"objective": {"affinity_threshold": 0.1}},
        {"runtime": {"precision": "bf16"}},
    ],
)
def test_another_configuration_is_another_row(changes: dict[str, Any]) -> None:
    same = made_run("r", 0, **BOXES)
    other = made_run("r", 1, study="second", **{**BOXES, **changes})
    report = compared(same, other)
    assert row_names(report) == ["first:r", "second:r"]
    # Workers and logging are not part of a configuration's identity.
    again = made_run("r", 1, **{**BOXES, "runtime": {"workers": 7}})
    assert row_names(compared(same, again)) == ["r"]


def test_another_start_is_another_row_and_is_named() -> None:
    short, long = (made_run("pretrain", 0, **{**BOXES, "optim": {"steps": steps}}) for steps in (10, 20))
    runs = [made_run("r", seed, init=start, **BOXES) for seed, start in enumerate((short, long))]
    report = compared(*runs, known=(short, long))
    assert len(row_names(report)) == 2
    assert not report.tables[0].alike
    assert report.pretraining is None
    [told] = [text for text in warnings(report) if "Different configurations" in text]
    assert "`start.optim.steps` (`10`: " in told
    without = compared(runs[0], made_run("scratch", 0, **BOXES), known=(short,))
    [told] = [text for text in warnings(without) if "Different configurations" in text]
    assert "`start` (`pretraining (10 steps)`: r; `—`: scratch)" in told
    assert "start.optim" not in told


def test_the_same_seed_of_a_configuration_twice_is_two_rows() -> None:
    first = made_run("r", 0, **BOXES)
    again = replace(
        first,
        run_id="f" * 16,
    )
    names = row_names(compared(first, again))
    assert names == [f"first:r {first.run_id[:6]}", "first:r ffffff"]


def test_numbers_on_different_validation_data_are_refused() -> None:
    mine = made_run("mine", **BOXES)
    other = made_run("other", **{**BOXES, "data": {"shapes": {"val_seed": 9}}})
    fingerprints = r"validation \w{16}, data \w{16}; validation \w{16}, data \w{16}"
    told = rf"first:mine:0 \(\w+\) and first:other:0 .* not measured on the same validation data.*{fingerprints}"
    with pytest.raises(UserError, match=told):
        compared(mine, other)
    more = made_run("more", **{**BOXES, "data": {"shapes": {"val_images": 9}}})
    with pytest.raises(UserError, match="not measured on the same validation data"):
        compared(mine, more)


def test_other_training_data_may_stand_beside_it_and_are_named() -> None:
    mine = made_run("mine", **BOXES)
    other = made_run("other", **{**BOXES, "data": {"shapes": {"train_seed": 9}}})
    report = compared(mine, other)
    assert not report.tables[0].alike
    told = " ".join(warnings(report))
    assert "**Mixed training data.**" in told
    assert "`data.shapes.train_seed` (`1`: mine; `9`: other)" in told


def test_the_fingerprint_of_the_validation_data_decides_where_it_is_recorded() -> None:
    def coco(row: str, data: str, val: str | None) -> Result:
        made = made_run(row, **{**BOXES, "data": {"format": "coco"}})
        return replace(made, run_id=row, data_fingerprint=data, val_fingerprint=val)

    new, same, other = coco("new", "d1", "v1"), coco("same", "d2", "v1"), coco("other", "d3", "v2")
    older, unknown = coco("older", "d1", None), coco("unknown", "d4", None)
    assert row_names(compared(new, same)) == ["new", "same"]
    assert row_names(compared(older, new)) == ["older", "new"]  # of all the same data
    for refused in ((new, other), (older, same), (new, unknown)):
        with pytest.raises(UserError, match="not measured on the same validation data, as far as their records say"):
            compared(*refused)


def test_other_classes_are_refused() -> None:
    mine, other = made_run("mine"), made_run("other", seed=1)
    metrics = {**other.metrics, "instances": {"a_ring": 2, "dog": 1}}
    with pytest.raises(UserError, match=r"different classes: they differ in b\|<b>, dog, 猫 café"):
        compared(mine, replace(other, metrics=metrics))


def test_class_groups_are_those_of_the_runs_or_of_the_split_that_is_named() -> None:
    for name, seen in (("few", CLASSES[:1]), ("many", CLASSES[:2])):
        write_split(make_split(SplitFile(name=name, seen=list(seen)), CLASSES), Path("splits") / f"{name}.toml")
    few, many, gone = (
        made_run("r", supervision={"source": "split", "split": name}) for name in ("few", "many", "gone")
    )
    boxes = made_run("boxes", **BOXES)
    assert compared(few, boxes).tables[0].unseen == CLASSES[1:]
    report = compared(few, many)
    assert row_names(report) == ["first:r:few", "first:r:many"]
    assert report.tables[0].unseen == ()
    assert "no class split in common that is here (`few`, `many`)" in report.notes[0]
    chosen = compared(few, many, split="many")
    assert chosen.tables[0].unseen == CLASSES[2:]
    assert "**Other split.** comparison shows the class groups of `many`" in " ".join(warnings(chosen))
    assert compared(few, boxes, split="none").tables[0].unseen == ()
    with pytest.raises(UserError, match="no such class split"):
        compared(few, boxes, split="fewer")
    assert "no class split in common that is here (`gone`)" in compared(gone, boxes).notes[0]


def test_missing_seeds_are_named() -> None:
    boxes = [made_run("r", seed, **BOXES) for seed in range(3)]
    report = compared(*boxes, made_run("full", 0, **MASKS))
    assert "comparison lacks `full` seed 1, 2." in warnings(report)[0]
    assert report.notes == ()


def train_folder(path: Path, seed: int = 0) -> Path:
    """What `semiseg train` leaves."""
    config = run_config(BOXES, seed)
    about = {
        "identity": config.identity(),
        "inputs": {"data": "d", "split": None, "init_from": None},
        "config": config.model_dump(mode="json"),
    }
    made = made_run("x", seed, **BOXES)
    names = ("data_fingerprint", "metrics", "steps", "seconds", "device", "versions", "git_revision", "finished")
    result = {name: getattr(made, name) for name in names} | {"split_digest": None, "command": "semiseg train x.toml"}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(about))
    (path / "result.json").write_text(json.dumps(result | {"val_fingerprint": "v", "processes": 2}))
    return path


def test_folders_of_semiseg_train(tmp_path: Path) -> None:
    run = run_of_folder(train_folder(tmp_path / "runs" / "mine"))
    result = run.result
    assert (result.row, result.study, result.seed, result.processes, result.val_fingerprint) == ("mine", "", 0, 2, "v")
    assert "init_from" not in result.config
    assert run.folder == tmp_path / "runs" / "mine"
    second = run_of_folder(train_folder(tmp_path / "runs" / "again", seed=1))
    assert second.result.run_id != result.run_id
    [row] = comparison([run, second], [], split=None, command=["c"]).tables[0].rows
    assert row.name == "mine"
    with pytest.raises(UserError, match=r"holds no finished run: there is no result\.json in it"):
        run_of_folder(tmp_path)
    path = tmp_path / "runs" / "again" / "result.json"
    values = json.loads(path.read_text())
    change: dict[str, Any]
    for change in ({"metrics": 3}, {"steps": "5"}, {"finished": 5}, {"versions": []}, {"seconds": None}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=rf"result\.json: not a result of this version \('{next(iter(change))}': "):
            run_of_folder(path.parent)
    (tmp_path / "runs" / "mine" / "result.json").write_text('{"metrics": {}}')
    with pytest.raises(
        UserError, match=r"mine/result\.json: not a result of this version \('data_fingerprint': Field required"
    ):
        run_of_folder(tmp_path / "runs" / "mine")


def test_a_damaged_configuration_is_a_sentence_that_names_its_file(tmp_path: Path) -> None:
    path = train_folder(tmp_path / "runs" / "mine") / "config.json"
    values = json.loads(path.read_text())
    config = values["config"]
    held: Any
    for damaged, told in {
        "none": "not the configuration that a run writes beside its result",
        "text": "not the configuration that a run writes beside its result",
        "supervision": "'supervision': Input should be a valid dictionary",
        "model": "'model': Input should be a valid dictionary",
        "seed": "'seed': Input should be a valid integer",
    }.items():
        held = {"none": None, "text": "abc"}.get(damaged, {**config, damaged: "x"})
        path.write_text(json.dumps(values | {"config": held}))
        with pytest.raises(UserError, match=rf"^\S*mine/config\.json: {told}"):
            run_of_folder(path.parent)
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "config"}))
    with pytest.raises(UserError, match=r"config\.json: not the configuration that a run writes beside its result"):
        run_of_folder(path.parent)


def test_runs_are_found_by_id_row_and_folder() -> None:
    few: dict[str, Any] = {"supervision": {"source": "split", "split": "few"}}
    many: dict[str, Any] = {"supervision": {"source": "split", "split": "splits/many.toml"}}
    runs = [made_run("r", seed, **few) for seed in range(2)] + [made_run("r", 0, **many)]
    runs += [made_run("pretrain", 0, **BOXES)]
    record(*runs, made_run("r", 0, study="second", **few))
    later = replace(runs[0], finished="2026-02-01T00:00:00+00:00", seconds=1.0)
    record(later)
    known = known_runs()
    assert len(known) == 5
    assert find_runs(runs[0].run_id[:9], known)[0].result == later
    assert [run.result.seed for run in find_runs("first:r:few", known)] == [0, 1]
    assert [run.result.run_id for run in find_runs("first:r:1", known)] == [runs[1].run_id]
    assert [run.result.run_id for run in find_runs("first:r:many", known)] == [runs[2].run_id]
    for name, told in {
        "first:s": "first:s: no row 's' of study 'first' is recorded. Recorded: r",
        "first:nosuchrow:0": "no row 'nosuchrow' of study 'first' is recorded. Recorded: r",
        "firsts:r": "Did you mean 'first:r'?",
        "first:r:few:7": "Did you mean 'first:r:few:1'?",
        "": "neither the folder of a run, nor the beginning",
        runs[0].run_id[:-1] + "x": "nor the beginning of a recorded run's id",
        "nothing": "Recorded: first:r, second:r",
    }.items():
        with pytest.raises(UserError, match=re.escape(told)):
            find_runs(name, known)


def test_a_row_of_several_splits_or_configurations_is_as_many_rows() -> None:
    few: dict[str, Any] = {"supervision": {"source": "split", "split": "few"}}
    many: dict[str, Any] = {"supervision": {"source": "split", "split": "many"}}
    runs = [made_run("r", 0, **few), made_run("r", 1, **few), made_run("r", 0, **many)]
    changed = made_run("r", 1, **{**few, "optim": {"steps": 3}})
    record(*runs, changed)
    chosen = find_runs("first:r", known_runs())
    assert {run.result.run_id for run in chosen} == {run.run_id for run in (*runs, changed)}
    names = row_names(comparison(chosen, chosen, split="none", command=["c"]))
    assert names == [f"first:r:few {runs[0].run_id[:6]}", "first:r:many", f"first:r:few {changed.run_id[:6]}"]


def test_the_beginning_of_several_ids_names_them() -> None:
    runs = [replace(made_run("r", seed), run_id=f"ab{seed}" + "0" * 13) for seed in range(2)]
    record(*runs)
    with pytest.raises(
        UserError, match=r"ab: 2 runs have an id that begins so: first:r:0 \(ab00+\), first:r:1 \(ab10+\)"
    ):
        find_runs("ab", known_runs())


def test_the_verb_prints_the_table_and_writes_the_report_twice_the_same() -> None:
    names = ("box|er", "_<b>猫%#")
    runs = [made_run(names[0], seed, **BOXES) for seed in range(2)]
    runs += [made_run(names[1], seed, study="second", ap=20.0, **MASKS) for seed in range(2)]
    record(*runs)
    ids = [run.run_id[:7] for run in runs]
    outcome = CliRunner().invoke(app, ["compare", *ids])
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    assert re.search(r"box\|er +yes +yes +2  31\.5 ± 0\.7", outcome.output)
    folder = Path("reports") / "compare" / "-".join(run.run_id[:6] for run in runs)
    text = unpadded((folder / "report.md").read_text(encoding="utf-8"))
    assert "| box\\|er | yes | yes | 2 | 31.5 ± 0.7 |" in text
    assert "| \\_&lt;b&gt;猫%\\# | — | — | 2 | 21.5 ± 0.7 |" in text
    assert "`reports/first/results.jsonl`, `reports/second/results.jsonl`; 4 runs" in text
    assert f"- This page by `semiseg compare {' '.join(ids)}`." in text
    assert "| supervision.source | boxes | masks |" in text
    assert "Incomplete" not in text
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {folder / "tables" / f"comparison.{kind}" for kind in ("csv", "md", "tex")} <= set(before)
    assert CliRunner().invoke(app, ["compare", *ids]).exit_code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_bad_input_is_one_sentence_and_exit_code_2() -> None:
    record(made_run("r", **BOXES), made_run("o", **{**BOXES, "data": {"shapes": {"val_seed": 5}}}))
    for arguments, told in (
        (["first:r"], "semiseg: first:r: is one run; a comparison needs two or more"),
        (["first:r", "first:r:0"], "is one run"),
        (["first:r", "nothing"], "nothing: neither the folder of a run"),
        (["first:r", "first:o"], "not measured on the same validation data"),
    ):
        outcome = CliRunner().invoke(app, ["compare", *arguments])
        assert outcome.exit_code == 2, arguments
        assert told in outcome.output
        assert outcome.output.count("\n") == 1
    assert not Path("reports/compare").exists()
    path = Path("reports/first/results.jsonl")
    values = json.loads(path.read_text().splitlines()[0])
    values["metrics"]["instances"] = ["a_ring"]
    path.write_text(path.read_text() + json.dumps(values) + "\n")
    outcome = CliRunner().invoke(app, ["compare", "first:r", "first:o"])
    assert outcome.exit_code == 2
    assert outcome.output.startswith(
        f"semiseg: {path}, line 3: not a result of this version ('metrics': 'instances' is"
    )
