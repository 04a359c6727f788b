"""The Arrow table: converted once, memory-mapped afterwards, safe with two converting at once."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from semiseg.data import table as table_module
from semiseg.data.coco import image_records, read_coco
from semiseg.data.missing import missing_images
from semiseg.data.table import Table, load_table
from semiseg.errors import UserError
from semiseg.files import lock, whole_folder
from tests.coco_files import CocoFiles, make_coco


def test_rows_hold_what_the_json_says(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache")
    assert table.rows.to_list() == list(image_records(read_coco(files.annotations)))
    assert table.class_names == ("cat", "dog", "bird", "fish")
    assert table.category_ids == (1, 3, 5, 7)
    assert list(table.original_sizes_hw()) == [1, 2, 3, 4]
    assert table.original_sizes_hw() == {1: (64, 80), 2: (64, 80), 3: (48, 96), 4: (80, 64)}


def test_conversion_happens_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"
    first = load_table(files.annotations, files.images, cache=cache)
    calls = []
    convert = table_module._convert

    def counted(annotations: Path, images: Path, folder: Path, **named: Any) -> None:
        calls.append(folder)
        convert(annotations, images, folder, **named)

    monkeypatch.setattr(table_module, "_convert", counted)
    again = load_table(files.annotations, files.images, cache=cache)
    assert calls == []
    assert again.fingerprint == first.fingerprint
    files.annotations.touch()
    load_table(files.annotations, files.images, cache=cache)
    assert calls == []
    files.rewrite(lambda content: content["annotations"].pop())
    changed = load_table(files.annotations, files.images, cache=cache)
    assert len(calls) == 1
    assert changed.fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 2


def test_a_table_pickles_as_a_path(tmp_path: Path) -> None:
    sizes = [(16, 16)] * 300
    files = make_coco(tmp_path, sizes_hw=sizes, annotations=[])
    box = {"iscrowd": 0, "category_id": 1, "bbox": [0, 0, 9, 9]}
    annotations = [
        box | {"id": number, "image_id": number % 300 + 1, "segmentation": [[0.0, 0.0] * 50]} for number in range(3000)
    ]
    files = files.rewrite(lambda content: content.update(annotations=annotations))
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache")
    content = pickle.dumps(table)
    assert table.rows.data.nbytes > 2_000_000
    assert len(content) < 10_000
    assert pickle.loads(content).rows[7] == table.rows[7]


def both_load(files: CocoFiles, cache: Path) -> list[Table]:
    """The table as two threads get it that ask at once."""
    tables: list[Table] = []
    threads = [
        threading.Thread(target=lambda: tables.append(load_table(files.annotations, files.images, cache=cache)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tables


def folder_of(table: Table) -> str:
    return Path(table.rows.cache_files[0]["filename"]).parent.name


def no_locks(descriptor: int, operation: int) -> None:
    """`flock` of a file system that has none."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_of_two_that_want_to_convert_one_waits_and_finds_it_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"
    convert, conversions, waits = table_module._convert, [], threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == f"{cache}: another process converts annotations; waiting":
                waits.set()

    def convert_when_the_other_waits(*arguments: Any, **named: Any) -> None:
        conversions.append(arguments)
        assert waits.wait(60)
        convert(*arguments, **named)

    monkeypatch.setattr(table_module, "_convert", convert_when_the_other_waits)
    listener = Listener()
    logging.getLogger("semiseg.files").addHandler(listener)
    try:
        tables = both_load(files, cache)
    finally:
        logging.getLogger("semiseg.files").removeHandler(listener)
    assert len(conversions) == 1
    assert tables[0].rows.to_list() == tables[1].rows.to_list()
    assert [path.name for path in cache.iterdir()] == [folder_of(tables[0])]


@pytest.mark.filterwarnings("ignore:.*cannot be locked")
def test_two_converting_at_once_without_locks_both_end_up_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"
    both_written = threading.Barrier(2, timeout=20)

    @contextmanager
    def meet_then_rename(folder: Path) -> Iterator[Path]:
        with whole_folder(folder) as temporary:
            yield temporary
            both_written.wait()  # neither has seen the other's table

    monkeypatch.setattr(table_module, "whole_folder", meet_then_rename)
    monkeypatch.setattr("fcntl.flock", no_locks)
    tables = both_load(files, cache)
    assert len(tables) == 2
    assert tables[0].rows.to_list() == tables[1].rows.to_list()
    assert [path.name for path in cache.iterdir()] == [folder_of(tables[0])]


def test_a_lock_of_a_killed_conversion_goes_and_a_held_one_stays(tmp_path: Path) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"
    load_table(files.annotations, files.images, cache=cache)
    (cache / ".lock").touch()
    load_table(files.annotations, files.images, cache=cache)
    assert not (cache / ".lock").exists()
    with lock(cache / ".lock"):  # another conversion is under way
        assert len(load_table(files.annotations, files.images, cache=cache)) == 4
        assert (cache / ".lock").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"

    def interrupted(*_args: object, **_kwargs: object) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(table_module, "image_records", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_table(files.annotations, files.images, cache=cache)
    assert not cache.exists()
    assert len(load_table(files.annotations, files.images, cache=cache)) == 4


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(UserError, match="cache: the Arrow table cannot be written"):
        load_table(files.annotations, files.images, cache=tmp_path / "cache")


def test_missing_images_are_found_before_training(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    (files.images / "002.png").unlink()
    (files.images / "004.png").unlink()
    with pytest.raises(UserError, match=r"images: 2 of the 4 images .*instances\.json names are missing, such as 002"):
        load_table(files.annotations, files.images, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="no such image folder"):
        load_table(files.annotations, tmp_path / "elsewhere", cache=tmp_path / "cache")


def test_sizes_are_compared_once_and_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cache = make_coco(tmp_path), tmp_path / "cache"
    content = {name: (files.images / name).read_bytes() for name in ("002.png", "003.png", "004.png")}
    Image.new("RGB", (80, 65)).save(files.images / "002.png")
    Image.new("RGB", (96, 47)).save(files.images / "004.png")
    (files.images / "003.png").write_text("no image")
    told = (
        r"002\.png: the image is 80 x 65 .*, but its annotations say 80 x 64; of 4 images 2 of another size and "
        r"1 unreadable: `semiseg data check` lists them"
    )
    for _ in range(2):  # a table whose images are wrong is not kept
        with pytest.raises(UserError, match=told):
            load_table(files.annotations, files.images, cache=cache)
    assert not cache.exists()
    for name, pixels in content.items():
        (files.images / name).write_bytes(pixels)
    load_table(files.annotations, files.images, cache=cache)
    monkeypatch.setattr(Image, "open", None)  # no header is read again
    load_table(files.annotations, files.images, cache=cache)


def test_images_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    assert missing_images(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "1.png"]) == ["a/2.png", "b/1.png", "1.png"]


def test_the_classes_file_is_readable(tmp_path: Path) -> None:
    files = make_coco(tmp_path, class_names=("caf\u00e9", "b", "c", "d"))
    load_table(files.annotations, files.images, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/classes.json")
    assert json.loads(path.read_text(encoding="utf-8"))["class_names"] == ["caf\u00e9", "b", "c", "d"]
