"""Bad input through the command line: one sentence that names the place, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import tomlkit
from PIL import Image
from torchvision.models._api import WeightsEnum
from typer.testing import CliRunner

from semiseg import __main__ as entry
from semiseg.cli import app
from semiseg.config.read import merge
from semiseg.data import table as table_module
from semiseg.data.coco import CocoFile, read_coco
from semiseg.data.table import load_table
from semiseg.engine import run as run_module
from semiseg.engine.checkpoint import load_tensors, save_tensors
from semiseg.engine.evaluate import predict_table
from semiseg.engine.logs import read_log
from semiseg.engine.run import execute_run
from semiseg.engine.run_folder import run_lock
from semiseg.errors import UserError, UserNotice
from semiseg.files import lock_folder, write_text
from tests.coco_files import CocoFiles, make_coco
from tests.forked import call_main, start
from tests.tiny import TINY, tiny_config

TRIANGLE = {"segmentation": [[1, 1, 20, 1, 20, 20]], "bbox": [1, 1, 19, 19], "area": 180.5}


def complaint(*arguments: str | Path) -> str:
    """The one line with which a command refuses its input."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("semiseg: ")
    return result.stderr.removeprefix("semiseg: ").rstrip("\n")


@pytest.fixture
def files(tmp_path: Path) -> CocoFiles:
    """Every instance with a mask, so that masks are evaluated."""
    return make_coco(tmp_path / "coco").rewrite(
        lambda content: [item.update(TRIANGLE) for item in content["annotations"]]
    )


def train_file(files: CocoFiles, **sections: dict[str, Any]) -> Path:
    """The configuration of a tiny run on `files`, for training and validation."""
    data = {"format": "coco", "root": str(files.annotations.parent)}
    for kind in ("train", "val"):
        data |= {f"{kind}_images": files.images.name, f"{kind}_annotations": files.annotations.name}
    own = {"short_sides": [64], "long_side": 96}
    values = {**TINY, "data": {**data, **own}, "supervision": {"source": "as_annotated"}}
    path = files.annotations.parent / "run.toml"
    path.write_text(tomlkit.dumps(merge(merge(values, {"optim": {"steps": 1}}), sections)))
    return path


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.toml", 'a = "é"'.encode("latin-1"), r"latin.toml: not valid TOML: 'utf-8' codec"),
        ("date.toml", b"seed = 2020-01-01", "date.toml: 'seed': Input should be a valid integer"),
        ("digits.toml", b"seed = " + b"1" * 5000, "digits.toml: not valid TOML: Exceeds the limit"),
        ("hex.toml", b"seed = 0x" + b"f" * 5000, "hex.toml: 'seed': allowed: integers of at most 64 bits"),
        (
            "wide.toml",
            b"[model.backbone]\nkind = 'small'\nwidths = [9223372036854775808]",
            "wide.toml: 'model.backbone.widths.0': allowed: int",
        ),
        ("section.toml", b"data = 0x" + b"f" * 5000, "section.toml: 'data': allowed: integers of at most 64 bits"),
        (
            "null.toml",
            rb'model.backbone.weights = "a\u0000b"',
            r"null.toml: 'model.backbone.weights': a text with a null character",
        ),
        ("null2.toml", rb'data.val_images = "\u0000"', r"null2.toml: 'data.val_images': a text with a null character"),
        ("null.json", rb'{"init_from": "\u0000"}', r"null.json: 'init_from': a text with a null character"),
        ("half.json", rb'{"init_from": "\ud800"}', "half.json: not valid JSON: "),
        ("digits.json", b'{"seed": ' + b"1" * 5000 + b"}", "digits.json: not valid JSON: number out of range"),
        ("latin.json", '{"a": "é"}'.encode("latin-1"), "latin.json: not valid JSON"),
        ("deep.json", b"[" * 100_000, "deep.json: not valid JSON"),
        ("list.json", b"[1]", "list.json: expected a table of values, not list"),
        ("held.json", b'{"config": 3, "identity": {}}', "held.json: unknown key"),
        ("folder.toml", None, "folder.toml: cannot be read: Is a directory"),
        ("folder.json", None, "folder.json: cannot be read: Is a directory"),
    ],
)
def test_unreadable_configurations(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert told in complaint("train", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 'x'")
    assert "'seed': Input should be a valid integer" in complaint("train", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=-1", "'seed': Input should be greater than or equal to 0"),
        ("seed=4294967296", "'seed': Input should be less than 4294967296"),
        ("optim.learning_rate=inf", "'optim.learning_rate': Input should be a finite number"),
        ("model.pixel_mean=[nan, 1.0, 1.0]", "'model.pixel_mean.0': Input should be a finite number"),
        ("data.short_sides=[]", "'data.short_sides': List should have at least 1 item"),
        ("inference.long_side=1", "'inference.long_side': Input should be greater than or equal to 32"),
        ("objective.affinity_dilation=1000", "'objective.affinity_dilation': Input should be less than or equal to 64"),
        ("data=5", "'data': Input should be a valid dictionary"),
        ("seed=" + "1" * 5000, "'seed': Input should be a valid integer (value: '1111"),
        ("seed=" + "[" * 5000, "'seed': Input should be a valid integer (value: '[[[["),
        ("seed=0x" + "f" * 5000, "'seed': allowed: integers of at most 64 bits"),
        ("a" + ".a" * 5000 + "=1", "unknown key 'a'"),
    ],
)
def test_impossible_values(tmp_path: Path, change: str, told: str) -> None:
    (tmp_path / "run.toml").write_text("")
    assert told in complaint("train", tmp_path / "run.toml", "--out", tmp_path / "out", "--set", change)


def test_an_out_that_is_a_file_is_said_before_any_work(files: CocoFiles) -> None:
    config = train_file(files)
    assert f"{config}: is no folder" in complaint("train", config, "--out", config)
    assert f"{config} is a file" in complaint("train", config, "--out", config / "x")
    assert f"{config}: is no folder" in complaint("evaluate", "runs/x", "--out", config / "x.json")
    assert "is a folder, expected a file" in complaint("evaluate", "runs/x", "--detections", config.parent)
    assert f"{config}: is no folder" in complaint("run", "shapes", "--out", config)
    assert not list(config.parent.glob("arrow"))


def study_text(**changes: Any) -> str:
    rows = [{"name": "neither", "set": {"objective": {"box": "none"}}}]
    tables = [{"name": "t", "title": "T", "split": "few", "rows": ["neither"]}]
    splits = {"few": "shapes_few_seen"}
    values = {"title": "T", "base": {"data": {"format": "shapes"}}, "rows": rows, "splits": splits, "tables": tables}
    return tomlkit.dumps({**values, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": {"supervision": 3}}, "study 's', row 'neither': 'supervision': expected a table of values, not 3"),
        ({"base": {"seed": 4}}, r"[base] sets 'seed', but the seeds of a study are its own 'seeds'"),
        ({"rows": [{"name": "neither", "set": {"seed": 1}}]}, "row 'neither' sets 'seed'"),
        ({"pretrain": {"objective": "none"}}, "study 's', [pretrain]: 'objective': expected a table of values"),
        ({"seeds": [-1]}, "'seeds.0': Input should be greater than or equal to 0"),
        ({"name": ".."}, "'name': String should match pattern"),
        (
            {"base": {"model": {"backbone": {"weights": "a\0b"}}}},
            "'base.model.backbone.weights': a text with a null",
        ),
        ({"splits": {"few": "a\0b"}}, "'splits.few': a text with a null character"),
    ],
)
def test_bad_studies(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(study_text(**changes))
    assert told in complaint("run", path, "--dry-run")


def test_one_object_without_a_mask_is_said_before_the_work(files: CocoFiles) -> None:
    """The crowd may lack its mask, an object, too: then mask AP is that of the others, and if all do, boxes' alone."""
    files = files.rewrite(lambda content: content["annotations"][-1].pop("segmentation"))
    config, out = str(train_file(files)), str(files.images.parent / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = CliRunner().invoke(app, ["train", config, "--out", out])
    assert "mask AP" in done.output, done.output
    assert "not measured" not in done.output
    files.rewrite(lambda content: content["annotations"][0].pop("segmentation"))
    told = r"instances\.json: 1 of 16 objects has no mask: mask AP is measured on the others, and its box is a region"
    with pytest.warns(UserWarning, match=told):
        done = CliRunner().invoke(app, ["train", config, "--out", f"{out}2"])
    left_out = "mask AP without 1 of 16 objects, which have no mask"
    assert re.search(rf"^mask AP [\d.]+, box AP [\d.]+ \({left_out}\) after 1 steps", done.stdout, re.M), done.stdout
    with pytest.warns(UserWarning, match=told):
        done = CliRunner().invoke(app, ["evaluate", f"{out}2"])
    assert left_out in done.stdout
    files.rewrite(lambda content: [each.pop("segmentation", None) for each in content["annotations"]])
    with pytest.warns(UserWarning, match="no object has a mask, so mask AP is not measured"):
        done = CliRunner().invoke(app, ["train", config, "--out", f"{out}3", "--set", "supervision.source=boxes"])
    assert re.search(r"^box AP [\d.]+, mask AP not measured: objects without a mask after 1 steps", done.stdout, re.M)


def test_a_training_without_objects_is_refused(files: CocoFiles) -> None:
    config, out = train_file(files), files.images.parent / "out"
    files.rewrite(lambda content: [item.update(iscrowd=1) for item in content["annotations"]])
    assert "instances.json: has no objects to learn from" in complaint("train", config, "--out", out)
    files.rewrite(lambda content: content.update(annotations=[]))
    assert "instances.json: has no objects to learn from" in complaint("train", config, "--out", out)
    assert not out.exists()


def test_names_of_splits_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "a/b", ".x", ""):
        assert "no name for a split" in complaint("split", "make", name, "--dataset", "coco", "--seen", "cat")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "splits" / "folder.toml").mkdir(parents=True)
    assert CliRunner().invoke(app, ["split", "list"]).exit_code == 0


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("annotations", {"area": None}, "annotation 1: 'area' is None, allowed: a number"),
        ("annotations", {"area": "12"}, "annotation 1: 'area' is '12'"),
        ("images", {"file_name": "a\0b/c.png"}, r"images[0]: 'file_name' is 'a\x00b/c.png'"),
        ("images", {"file_name": "c\ud800.png"}, r"images[0]: 'file_name' is 'c\ud800.png'"),
        ("categories", {"name": "c\ud800"}, r"categories[0]: 'name' is 'c\ud800', allowed: a text of whole characters"),
    ],
)
def test_values_that_only_a_later_stage_would_trip_over(
    files: CocoFiles, section: str, changes: dict[str, Any], told: str
) -> None:
    files.rewrite(lambda content: content[section][0].update(changes))
    checked = CliRunner().invoke(app, ["data", "check", str(files.annotations)])
    assert checked.exit_code == 2
    assert told in checked.output
    out = files.annotations.parent / "out"
    assert told in complaint("train", train_file(files), "--out", out)
    assert not out.exists()


def test_a_run_folder_that_was_damaged(files: CocoFiles) -> None:
    """One run, then one file after the other made unreadable; the last checkpoint alone brings everything back."""
    config, out = train_file(files, optim={"steps": 2}, runtime={"checkpoint_every": 1}), files.images.parent / "out"
    again = ("train", config, "--out", out, "--resume")
    assert CliRunner().invoke(app, [str(part) for part in again]).exit_code == 0
    result, last = out / "result.json", out / "checkpoints" / "step_00000002.pt"
    metrics = json.loads(result.read_text())["metrics"]

    assert "'--resume' continues it" in complaint("train", config, "--out", out)
    result.write_text('{"metrics": ')
    assert "result.json: not valid JSON" in complaint(*again)
    content: dict[str, Any]
    for content in ({}, {"metrics": 3, "steps": 2}, {"metrics": {**metrics, "bbox": {"groups": 1}}, "steps": 2}):
        result.write_text(json.dumps(content))
        assert "result.json: no result of a run; remove it" in complaint(*again)
    result.unlink()
    kept = last.read_bytes()
    for damaged in (b"", kept[: len(kept) // 2]):
        last.write_bytes(damaged)
        assert "step_00000002.pt: not a readable checkpoint" in complaint(*again)
    saved = load_tensors(out / "checkpoints" / "step_00000001.pt")
    broken = {name: value * math.nan for name, value in saved["model"].items()}
    change: dict[str, Any]
    for change, told in (
        ({"step": -5}, "step_00000002.pt: says that it is of step -5"),
        ({"step": 2, "model": broken}, r"of its weights are not finite numbers, first: backbone"),
    ):
        save_tensors(last, {**saved, **change})
        assert told in complaint(*again)
        assert "remove it to continue from the checkpoint before" in complaint(*again)
    last.unlink()
    log, held = out / "log.jsonl", (out / "config.json").read_text()
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0] + b'{"step": "2", "seconds": 1}\n\xff\n{}\n')
    (out / "config.json").write_text("{}")
    assert "config.json: says not which run" in complaint(*again)
    (out / "config.json").write_text(held)
    left = out / f".semiseg-{0:032x}"  # by a process that was killed while it wrote
    for name in ("lock", "new"):
        write_text(left / name, "")
    write_text(out / ".model.mine" / "notes.txt", "a user's own")
    assert CliRunner().invoke(app, [str(part) for part in again]).exit_code == 0
    assert json.loads(result.read_text())["metrics"] == metrics
    assert [line["step"] for line in read_log(log)] == [1, 2]
    assert not left.exists()
    assert (out / ".model.mine" / "notes.txt").exists()

    description = json.loads((out / "model" / "config.json").read_text())
    for change, told in (
        ({"class_names": None}, "config.json: 'class_names': Input should be a valid list"),
        ({"format": 3}, "config.json: format 3 is not known"),
        ({"model": merge(description["model"], {"neck": {"channels": 32}})}, "the weights are not those of the model"),
        (
            {"model": merge(description["model"], {"neck": {"channels": 2**40}})},
            "the weights are not those of the model",
        ),
        (
            {"model": merge(description["model"], {"detector": {"tower_convs": 2**40}})},
            "'model.detector.tower_convs': Input should be less than or",
        ),
        ({"category_ids": [1, 3, 5]}, "config.json: 4 class_names and 3 category_ids: needs one of each"),
        ({"category_ids": [1, 3, 5, 3]}, "config.json: 'category_ids' has 3 2 times; classes must differ"),
        ({"class_names": ["cat", "cat", "bird", "fish"]}, "config.json: 'class_names' has 'cat' 2 times"),
        ({"class_names": ["\ud800", "dog", "bird", "fish"]}, r"'class_names' has '\ud800', allowed: texts of"),
        (
            {"inference": {"long_side": 2**40}},
            "config.json: 'inference.long_side': Input should be less than or",
        ),
    ):
        (out / "model" / "config.json").write_text(json.dumps({**description, **change}))
        assert told in complaint("evaluate", out)
    (out / "model" / "config.json").write_text(json.dumps(description))
    weights = out / "model" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-2] ^= 64
    weights.write_bytes(flipped)
    assert "model.safetensors: not the weights that config.json describes" in complaint("evaluate", out)


def test_annotations_changed_while_a_training_runs(files: CocoFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end does not measure on other annotations than those whose digest the result carries."""
    config, out = train_file(files), files.images.parent / "out"
    held = files.annotations.read_bytes()

    def changed_meanwhile(*arguments: Any, **keywords: Any) -> Any:
        files.rewrite(lambda content: content["annotations"].pop())
        return predict_table(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "predict_table", changed_meanwhile)
        assert "instances.json: was changed since this run read it" in complaint("train", config, "--out", out)
    assert not (out / "result.json").exists()
    files.annotations.write_bytes(held)
    assert CliRunner().invoke(app, ["train", str(config), "--out", str(out), "--resume"]).exit_code == 0


def test_images_changed_before_a_training_goes_on(files: CocoFiles) -> None:
    config, out = train_file(files), files.images.parent / "out"
    again = ["train", str(config), "--out", str(out), "--resume"]
    assert CliRunner().invoke(app, again).exit_code == 0
    (out / "result.json").unlink()
    path = files.images / "002.png"
    held = path.read_bytes()
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert "out: holds another run (its inputs.image_files is '" in complaint(*again)
    path.write_bytes(held)
    os.utime(path, (1, 1))  # a copy of the data is the same data
    assert CliRunner().invoke(app, again).exit_code == 0
    (out / "result.json").unlink()
    content = json.loads((out / "config.json").read_text())
    del content["inputs"]["image_files"]  # as in a run of an earlier version
    (out / "config.json").write_text(json.dumps(content))
    assert CliRunner().invoke(app, again).exit_code == 0


def test_replay_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "replay.pt"
    for content in (b"", b"text", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        assert "replay.pt: not a readable checkpoint: damaged, or not written by torch.save" in complaint(
            "train", "--replay", path
        )
    assert complaint("train", "--replay", tmp_path) == f"{tmp_path}: is a folder, expected a checkpoint file"


def test_a_folder_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", optim={"steps": 1})
    code = "import sys; from pathlib import Path; from semiseg.files import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    out = tmp_path / "out"
    out.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is training this run"):
        execute_run(config, out=out, progress=False)
    assert [path.name for path in out.iterdir()] == [".train.lock"]
    other.communicate()
    with run_lock(config, out, inputs={}, resume=False):
        assert (out / "config.json").is_file()
    with lock_folder(out):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    config, out = tiny_config(tmp_path / "data"), tmp_path / "out"
    for _ in range(2):  # nothing stands for a lock that a killed process would leave
        told = pytest.warns(UserWarning, match=r"out: cannot be locked \(.*\); let one process at a time work there")
        with told, run_lock(config, out, inputs={}, resume=False):
            assert (out / "config.json").is_file()


def test_a_folder_where_nothing_was_trained_is_free(tmp_path: Path) -> None:
    """A first attempt that failed, say for a missing file of weights, is no other run."""
    for seed in (0, 1):
        with run_lock(tiny_config(tmp_path / "data", seed=seed), tmp_path / "out", inputs={}, resume=False):
            pass
    assert json.loads((tmp_path / "out" / "config.json").read_text())["config"]["seed"] == 1


def test_a_run_that_fails_before_it_makes_anything_leaves_no_folder(
    files: CocoFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say because ImageNet's weights cannot be downloaded."""

    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    model = {"backbone": {"kind": "resnet", "depth": 18, "weights": "imagenet"}}
    config, out = train_file(files, model=model), files.images.parent / "runs" / "out"
    assert "cannot download" in complaint("train", config, "--out", out)
    assert not out.exists()
    out.mkdir()
    assert "cannot download" in complaint("train", config, "--out", out)
    assert list(out.iterdir()) == []
    (out / ".notes").touch()  # what others put there stays
    assert "cannot download" in complaint("train", config, "--out", out)
    assert (out / ".notes").exists()


@pytest.mark.parametrize("name", ["rows.arrow", "classes.json"])
def test_a_damaged_table_is_made_anew(
    files: CocoFiles, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "arrow"
    table = load_table(files.annotations, files.images, cache=cache)
    rows = table.rows.to_list()
    path = next(cache.iterdir()) / name
    content = path.read_bytes()
    turned = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(9, len(content), 97)]
    for damaged in (content[:-9], b"", b"{}", content[:300] + bytes(40) + content[340:], *turned[:40], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        caplog.clear()
        again = load_table(files.annotations, files.images, cache=cache)
        assert again.rows.to_list() == rows
        assert (again.class_names, again.category_ids) == (table.class_names, table.category_ids)
        assert f"{path.parent}: cannot be used (" in caplog.text
    assert sorted(part.name for part in cache.iterdir()) == [path.parent.name, f"{path.parent.name}.2"]


def test_a_table_that_cannot_be_opened_here_stays_for_other_jobs(
    files: CocoFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "arrow"
    table = load_table(files.annotations, files.images, cache=cache)
    (folder,) = cache.iterdir()
    held = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    opened = datasets.Dataset.from_file

    def stale(name: str) -> datasets.Dataset:
        if Path(name).parent == folder:
            raise OSError(116, "Stale file handle")
        return opened(name)

    monkeypatch.setattr(datasets.Dataset, "from_file", stale)
    again = load_table(files.annotations, files.images, cache=cache)
    assert again.rows.to_list() == table.rows.to_list()
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()} == held


def test_a_table_from_before_its_digest_was_kept_is_used(files: CocoFiles, tmp_path: Path) -> None:
    cache = tmp_path / "arrow"
    load_table(files.annotations, files.images, cache=cache)
    (path,) = cache.glob("*/classes.json")
    path.write_text(json.dumps({name: kept for name, kept in json.loads(path.read_text()).items() if name != "digest"}))
    load_table(files.annotations, files.images, cache=cache)
    assert len(list(cache.iterdir())) == 1


def test_annotations_changed_while_they_are_converted(
    files: CocoFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*arguments: Any, **keywords: Any) -> CocoFile:
        files.rewrite(lambda content: content["annotations"].pop())
        return read_coco(*arguments, **keywords)

    monkeypatch.setattr(table_module, "read_coco", meanwhile)
    with pytest.raises(UserError, match=r"instances\.json: was changed while it was read"):
        load_table(files.annotations, files.images, cache=tmp_path / "arrow")
    assert not (tmp_path / "arrow").exists()


def test_termination_of_a_whole_process_group_is_an_orderly_stop(files: CocoFiles) -> None:
    """As batch systems do it: the loader's workers get the signal too."""
    out = files.annotations.parent / "out"
    config = train_file(files, optim={"steps": 5000}, runtime={"workers": 1})
    output = out.parent / "output.txt"
    training = start(call_main, "semiseg.__main__", "train", str(config), "--out", str(out), output=output)
    until = time.monotonic() + 60
    while not read_log(out / "log.jsonl") and time.monotonic() < until:
        time.sleep(0.05)
    assert training.pid is not None
    os.killpg(training.pid, signal.SIGTERM)
    training.join(timeout=60)
    told = output.read_text()
    assert training.exitcode == 130
    assert told.startswith("semiseg: stopped after step ")
    assert told.count("\n") == 1
    step = read_log(out / "log.jsonl")[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{step:08d}.pt"]


def test_warnings_of_the_package_are_sentences() -> None:
    """Whatever called them: a decorated function's notice seems to come from `contextlib`."""
    for caller in (str(Path(entry.__file__).parent / "results.py"), "/x/contextlib.py"):
        assert (
            entry._formatted("r.jsonl, line 2: ignored", UserNotice, caller, 3) == "semiseg: r.jsonl, line 2: ignored\n"
        )
    assert "library.py:3: UserWarning: old" in entry._formatted("old", UserWarning, "/x/library.py", 3)
