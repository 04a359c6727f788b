"""What is left when a process is killed, the disk is full or a folder holds other things, at any moment of writing."""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from semiseg.config import RunConfig
from semiseg.data.shapes import ensure_shapes, make_shapes
from semiseg.data.table import load_table
from semiseg.engine import checkpoint
from semiseg.engine import predict_files as predict_module
from semiseg.engine import train as training
from semiseg.engine.build import build_data
from semiseg.engine.checkpoint import load_model_folder, load_tensors, read_model_info, save_checkpoint, save_tensors
from semiseg.engine.logs import TrainingLog, read_log
from semiseg.engine.predict import load_model
from semiseg.engine.predict_files import PredictOptions, predict_files
from semiseg.engine.run_folder import check_folder, run_lock
from semiseg.engine.session import start_accelerator
from semiseg.errors import UserError
from semiseg.files import settle, temporary_folder, whole_folder, write_bytes
from semiseg.models.segmenter import Segmenter
from tests.coco_files import make_coco
from tests.model_folders import make_model
from tests.test_cli import call
from tests.tiny import tiny_config


def killed(work: Callable[[], Any]) -> None:
    """Does the work in a process of its own, which must end as if it were killed: by `os._exit(9)`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def die(*_: object, **__: object) -> None:
    os._exit(9)


def die_once_a_folder_is_aside() -> None:
    rename = os.rename

    def rename_and_die(old: Path, new: Path) -> None:
        rename(old, new)
        if "aside" in str(new):
            die()

    os.rename = rename_and_die  # type: ignore[assignment]


def content(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes: what a full disk is to them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["model/net.py"], r"model/;"),
        (["notes.txt"], r"notes\.txt;"),
        (["a.py", "b.py", "best/cat.png", "c.py", "model/model.safetensors"], r"a\.py, b\.py, best/ and 2 more;"),
        (["config.json", "log.jsonl"], r"config\.json, log\.jsonl;"),
        (["checkpoints"], r"checkpoints;"),
        (["model/model.safetensors", "model/config.json"], r"model/;"),
    ],
)
def test_a_folder_with_what_no_run_wrote_is_refused(tmp_path: Path, files: list[str], told: str) -> None:
    for name in files:
        write_bytes(tmp_path / name, b"{}")
    before = content(tmp_path)
    config = tiny_config(tmp_path / "data")
    with pytest.raises(UserError, match=f"holds what no run wrote: {told} give a new or an empty folder"):
        check_folder(config, tmp_path, resume=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["model/net.py"], "model/"),
        (["best/best.json", "best/a"], "best/"),
        (["checkpoints", "model"], "checkpoints, m"),
    ],
)
def test_in_a_runs_folder_too_a_users_things_under_its_names(tmp_path: Path, files: list[str], told: str) -> None:
    config = tiny_config(tmp_path / "data")
    with run_lock(config, tmp_path, inputs={}, resume=False):
        write_bytes(tmp_path / "log.jsonl", b"")
    for name in files:
        write_bytes(tmp_path / name, b"")
    with pytest.raises(UserError, match=f"holds what no run wrote: {told}"):
        check_folder(config, tmp_path, resume=True)


def test_what_a_study_and_hidden_files_put_there_is_no_hindrance(tmp_path: Path) -> None:
    for name in ("identity.json", "train.json", "output.txt", ".lock", ".best.mine/x", ".git/config"):
        write_bytes(tmp_path / name, b"{}")
    before = content(tmp_path)
    with run_lock(tiny_config(tmp_path / "data"), tmp_path, inputs={}, resume=False):
        write_bytes(tmp_path / "notes.txt", b"beside a run that has begun")
    check_folder(tiny_config(tmp_path / "data"), tmp_path, resume=True)
    assert before.items() <= content(tmp_path).items()


def test_the_best_of_a_run_that_died_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    with run_lock(tiny_config(tmp_path / "data"), tmp_path, inputs={}, resume=False):
        make_model(tmp_path / "best")
    other = tiny_config(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match=r"holds another run \(its seed is 0, wanted 1\)"):
        check_folder(other, tmp_path, resume=True)


def weigh(model: Segmenter) -> dict[str, float]:
    """A score that the weights alone decide, up and down from step to step."""
    return {"mask_AP": float(sum(value.detach().double().sum() for value in model.parameters()) * 1e4 % 100)}


def train_once(config: RunConfig, out: Path) -> None:
    data, accelerator = build_data(config), start_accelerator(config.runtime, seed=0)
    with run_lock(config, out, inputs={}, resume=True):
        state = training.train(config, data, accelerator, out=out, progress=False, validate=weigh)
        training.save_trained(state, data, out / "model")


def test_killed_at_the_worst_moments_a_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    runtime = {"checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 1}
    config = tiny_config(tmp_path / "data", optim={"steps": 8, "learning_rate": 0.02}, runtime=runtime)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    train_once(config, whole)
    scores = {
        line["step"]: line["validation"]["mask_AP"] for line in read_log(whole / "log.jsonl") if "losses" not in line
    }
    assert list(scores) == [2, 4, 6]
    improving = [step for step in scores if scores[step] > max([scores[s] for s in scores if s < step], default=-1)]
    assert len(improving) > 1, "best/ is to be replaced"

    def before_a_validation() -> None:
        training._validate = die  # type: ignore[assignment]
        train_once(config, out)

    def between_best_and_its_line_in_the_log() -> None:
        write = TrainingLog.write

        def die_or_write(log: TrainingLog, record: dict[str, Any]) -> None:
            die() if "validation" in record else write(log, record)

        TrainingLog.write = die_or_write  # type: ignore[assignment, method-assign]
        train_once(config, out)

    def between_the_two_renames_of_best() -> None:
        die_once_a_folder_is_aside()
        train_once(config, out)

    def before_the_last_tidying() -> None:
        remove = checkpoint.remove_old_checkpoints

        def die_or_remove(folder: Path, *, keep: int) -> None:
            die() if (folder / "step_00000008.pt").exists() else remove(folder, keep=keep)

        checkpoint.remove_old_checkpoints = die_or_remove
        train_once(config, out)

    killed(before_a_validation)
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2]
    killed(between_best_and_its_line_in_the_log)
    killed(between_the_two_renames_of_best)
    assert not (out / "best").exists()
    killed(before_the_last_tidying)
    assert len(list((out / "checkpoints").iterdir())) == 2
    train_once(config, out)
    ends = [content(folder) for folder in (whole, out)]
    for name in ("model/model.safetensors", "best/model.safetensors", "best/best.json"):
        assert ends[0][name] == ends[1][name]
    assert list(ends[0]) == list(ends[1])
    logs = [[line for line in read_log(folder / "log.jsonl") if "validation" in line] for folder in (whole, out)]
    assert [(line["step"], line["validation"]) for line in logs[0]] == [
        (line["step"], line["validation"]) for line in logs[1]
    ]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    def write_and_die() -> None:
        with whole_folder(tmp_path / "table") as new:
            (new / "half").write_text("half")
            die()

    killed(write_and_die)
    (left,) = tmp_path.iterdir()
    assert (left / "new" / "half").exists()
    (tmp_path / f".semiseg-{1:032x}").mkdir()  # killed before its lock was made
    own = [".table.0123", ".semiseg-notes/lock", f".semiseg-{2:032x}/mine", ".results.json.12.tmp", ".a.part/x"]
    for name in own:
        write_bytes(tmp_path / name, b"")
    (tmp_path / f".semiseg-{3:032x}").symlink_to(left)
    with temporary_folder(tmp_path) as alive:
        (alive / "new").write_text("being written")
        settle(tmp_path)
        assert (alive / "new").exists()
    assert not left.exists()
    assert not (tmp_path / f".semiseg-{1:032x}").exists()
    assert all((tmp_path / name).exists() for name in own)
    assert len(list(tmp_path.iterdir())) == len(own) + 1


@pytest.mark.parametrize("what", ["shapes", "own shapes", "table", "split"])
def test_a_kill_when_all_is_in_place_leaves_nothing_after_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also where that look writes nothing, since all is there, or refuses to."""
    files = make_coco(tmp_path / "coco")
    target = tmp_path / "new" / "data"

    def work() -> None:
        if what == "shapes":
            ensure_shapes(tmp_path / "new", images=1, image_size=32, seed=0)
        elif what == "own shapes":
            make_shapes(target, images=1, image_size=32, seed=0)
        elif what == "table":
            load_table(files.annotations, files.images, cache=tmp_path / "new")
        else:
            call("split", "make", "x", "--dataset", "shapes", "--seen", "3", "--out", str(target))

    with monkeypatch.context() as patch:
        patch.setattr("semiseg.files._dissolve", die)
        killed(work)
    hidden = [path.name for path in (tmp_path / "new").rglob(".*")]
    assert any(name.startswith(".semiseg-") for name in hidden), hidden
    with (
        nullcontext()
        if what in ("shapes", "table")
        else pytest.raises((UserError, AssertionError), match="exists already")
    ):
        work()
    assert [path.name for path in (tmp_path / "new").iterdir()] != []
    assert list((tmp_path / "new").rglob(".*")) == []


def test_a_model_that_was_being_replaced_is_found_again(tmp_path: Path) -> None:
    info = make_model(tmp_path / "model")
    before = content(tmp_path)

    def die_between_the_renames() -> None:
        die_once_a_folder_is_aside()
        make_model(tmp_path / "model", short_side=96)

    killed(die_between_the_renames)
    assert not (tmp_path / "model").exists()
    assert read_model_info(tmp_path / "model") == info
    assert content(tmp_path) == before


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model")
    weights, _ = load_model_folder(tmp_path / "model")
    save_checkpoint(tmp_path / "checkpoints", {"model": weights}, step=1, keep=1)
    (tmp_path / "out").mkdir()
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    before = content(tmp_path)
    monkeypatch.setattr(predict_module, "coco_results", lambda *_, **__: [{"text": "x" * 9000}])

    def predict() -> None:
        options = PredictOptions(
            short_side=64, long_side=96, score_threshold=0.2, drawn_score=None, batch_size=1, workers=1
        )
        model, files = load_model(tmp_path / "model", device="cpu"), [tmp_path / "a.png"]
        predict_files(model, files, out=tmp_path / "out", options=options, progress=False, report=print)

    for work, name in (
        (lambda: save_checkpoint(tmp_path / "checkpoints", {"model": weights}, step=2, keep=1), "step_00000002.pt"),
        (lambda: make_model(tmp_path / "model", short_side=96), "model"),
        (lambda: write_bytes(tmp_path / "report.md", bytes(9000)), "report.md"),
        (predict, "results.json"),
    ):
        with file_size_limit(4000), pytest.raises(UserError, match=rf"/{name}: file too large$"):
            work()
        assert content(tmp_path) == before
    log = TrainingLog(tmp_path / "out", steps=9, start_step=0, tensorboard=False, progress=False)
    with file_size_limit(4000), pytest.raises(UserError, match=r"out/log\.jsonl: file too large$"), log:
        log.write({"step": 1, "seconds": 1.0, "text": "x" * 9000})


def test_a_signal_while_a_checkpoint_is_written_stays_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.FileIO):
        def write(self, _: Any) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", lambda path, mode: (Interrupted if path.name == "new" else open)(path, mode))
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "a.pt", {"a": torch.zeros(99)})
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(tmp_path: Path) -> None:
    path, values = tmp_path / "a.pt", torch.arange(30.0)
    save_tensors(path, {"a": values, "step": 3})
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            read = load_tensors(path)
        except UserError as error:
            noticed += "a.pt: not a readable checkpoint: damaged" in str(error)
        else:
            assert torch.equal(read["a"], values)
            assert read["step"] == 3
    assert noticed > 20
