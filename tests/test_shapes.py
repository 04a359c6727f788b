"""The embedded data set: exact masks, the same everywhere, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from semiseg.data import shapes
from semiseg.data.shapes import (
    MIN_VISIBLE_PIXELS,
    MIN_VISIBLE_SHARE,
    SHAPES_CLASSES,
    SceneObject,
    compose,
    ensure_shapes,
    make_shapes,
)
from semiseg.data.shapes_drawing import FAMILIES, SAMPLES, UNIT, Draws, Outline, fill
from semiseg.data.workers import results_of
from semiseg.errors import UserError

PICTURES = 60
# Of pictures 0..2 with seed 7 at 64 pixels. It may change only together with GENERATOR_VERSION.
GOLDEN = "ef324d43c9974789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_shapes(tmp_path_factory.mktemp("data"), images=PICTURES, image_size=128, seed=5)


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    return content


def test_pictures_and_masks_are_the_same_on_every_platform() -> None:
    state = hashlib.sha256()
    for index in range(3):
        pixels, objects = compose(7, index, 64)
        state.update(pixels.tobytes())
        for item in objects:
            state.update(bytes([item.label]) + np.packbits(item.visible).tobytes())
    assert state.hexdigest()[:16] == GOLDEN


def test_layout_is_coco(folder: Path, document: dict[str, Any]) -> None:
    assert [c["name"] for c in document["categories"]] == list(SHAPES_CLASSES)
    assert [c["id"] for c in document["categories"]] == list(range(1, 13))
    assert {"info", "licenses", "images", "annotations", "categories"} == set(document)
    assert len(document["images"]) == PICTURES
    for record in document["images"]:
        with Image.open(folder / "images" / record["file_name"]) as image:
            assert (image.size, image.mode) == ((record["width"], record["height"]), "RGB")
    assert [a["id"] for a in document["annotations"]] == list(range(1, len(document["annotations"]) + 1))
    assert {a["category_id"] for a in document["annotations"]} == set(range(1, 13))


def test_masks_are_disjoint_and_boxes_tight(document: dict[str, Any]) -> None:
    occupied = {image["id"]: np.zeros((128, 128), dtype=int) for image in document["images"]}
    for ann in document["annotations"]:
        mask = coco_mask.decode(ann["segmentation"])
        occupied[ann["image_id"]] += mask
        assert ann["bbox"] == coco_mask.toBbox(ann["segmentation"]).tolist()
        assert ann["area"] == mask.sum() >= MIN_VISIBLE_PIXELS
        assert MIN_VISIBLE_SHARE <= ann["visible"] <= 1
        assert ann["iscrowd"] == 0
    assert max(count.max() for count in occupied.values()) == 1


def test_pictures_hold_several_instances_that_hide_each_other(document: dict[str, Any]) -> None:
    numbers = np.bincount([a["image_id"] for a in document["annotations"]], minlength=PICTURES + 1)[1:]
    assert numbers.min() >= 2
    assert numbers.max() <= 4
    assert 2.5 <= numbers.mean() <= 3.5
    visible = np.array([a["visible"] for a in document["annotations"]])
    assert (visible < 0.9).mean() > 0.05
    assert (visible > 0.99).mean() > 0.3


def test_mask_pixels_show_the_object() -> None:
    """Away from the boundary the visible part of a plain object has one colour, up to noise and a rim."""
    smooth = 0
    for index in range(10):
        pixels, objects = compose(9, index, 128)
        for item in objects:
            inner = _eroded(_eroded(item.visible))
            if inner.sum() > 30:
                spread = pixels[inner].astype(float).std(axis=0).max()
                smooth += bool(spread < 8)
    assert smooth >= 8


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_holes_are_holes(family: str) -> None:
    for index in range(10):
        outline = FAMILIES[family](Draws(1, index))
        moved = Outline([r * 30 + 50 for r in outline.solids], [r * 30 + 50 for r in outline.holes])
        mask = fill(moved).mask
        assert _has_hole(mask) == (family in ("key", "ring")), (family, index)


def test_fill_counts_what_a_slow_exact_test_counts() -> None:
    """Against the even-odd rule in exact fractions, for one ring without self-crossings."""
    points = np.array([(1.3, 0.2), (7.9, 2.6), (5.1, 3.3), (6.4, 7.7), (0.4, 5.5), (3.0, 3.1)])
    patch = fill(Outline([points]))
    exact = [tuple(Fraction(int(v), SAMPLES * UNIT) for v in np.rint(p * SAMPLES * UNIT)) for p in points]
    for row in range(patch.coverage.shape[0]):
        for column in range(patch.coverage.shape[1]):
            samples = [
                (column + Fraction(2 * a + 1, 2 * SAMPLES), row + Fraction(2 * b + 1, 2 * SAMPLES))
                for a in range(SAMPLES)
                for b in range(SAMPLES)
            ]
            assert patch.coverage[row, column] == sum(_is_inside(exact, x, y) for x, y in samples), (row, column)


def test_fill_of_a_frame_by_hand() -> None:
    outer = np.array([(0, 0), (4, 0), (4, 4), (0, 4)], dtype=float)
    inner = np.array([(1, 1), (1, 3), (3, 3), (3, 1)], dtype=float)
    expected = np.full((4, 4), SAMPLES**2)
    expected[1:3, 1:3] = 0
    for hole in (inner, inner[::-1]):
        assert (fill(Outline([outer], [hole])).coverage[:4, :4] == expected).all()
    half = fill(Outline([np.array((0.5, 0)) + outer[::-1]]))
    assert half.coverage[0, :5].tolist() == [8, 16, 16, 16, 8]


def test_the_part_inside_the_image_is_a_part_of_the_whole() -> None:
    star = FAMILIES["star"](Draws(3, 0))
    for shift in ((2.0, 3.0), (18.0, 25.0), (60.0, 2.0), (-40.0, 5.0)):
        whole = fill(star.mapped(lambda ring, shift=shift: ring * 15 + shift))  # type: ignore[misc]
        part = whole.inside((20, 30))
        expected = np.zeros((200, 200), np.uint8)
        expected[whole.top + 60 :, whole.left + 60 :][: whole.coverage.shape[0], : whole.coverage.shape[1]] = (
            whole.coverage
        )
        pasted = np.zeros((20, 30), np.uint8)
        pasted[part.window] = part.coverage
        assert np.array_equal(pasted, expected[60:80, 60:90])


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    make_shapes(few, images=2, image_size=64, seed=3)
    make_shapes(many, images=4, image_size=64, seed=3)
    read = [json.loads((f / "annotations.json").read_text()) for f in (few, many)]
    assert read[1]["images"][:2] == read[0]["images"]
    assert read[1]["annotations"][: len(read[0]["annotations"])] == read[0]["annotations"]
    for name in ("000001.png", "000002.png"):
        assert (few / "images" / name).read_bytes() == (many / "images" / name).read_bytes()


def test_several_processes_draw_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ensure_shapes(tmp_path / "alone", images=5, image_size=64, seed=3)
    monkeypatch.setattr(shapes, "MANY_PICTURES", 5)
    before = torch.get_rng_state()
    together = ensure_shapes(tmp_path / "together", images=5, image_size=64, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for path in sorted(alone.rglob("*.*")):
        assert (together / path.relative_to(alone)).read_bytes() == path.read_bytes()


def test_of_two_that_want_to_draw_one_waits_and_finds_it_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, drawn, waits = shapes.make_shapes, [], threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == f"{tmp_path}: another process draws Shapes; waiting":
                waits.set()

    def make_when_the_other_waits(folder: Path, **parameters: int) -> None:
        drawn.append(folder)
        assert waits.wait(60)
        make(folder, **parameters)

    monkeypatch.setattr(shapes, "make_shapes", make_when_the_other_waits)
    listener = Listener()
    logging.getLogger("semiseg.files").addHandler(listener)
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ensure_shapes, tmp_path, images=2, image_size=64, seed=3) for _ in range(2)]
            folders = {future.result() for future in asked}
    finally:
        logging.getLogger("semiseg.files").removeHandler(listener)
    assert folders == set(drawn)
    assert len(drawn) == 1
    assert [path.name for path in tmp_path.iterdir()] == [drawn[0].name]


def test_a_failure_in_a_process_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(seed: int, index: int, image_size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
        if index == 3:
            raise OSError(28, "No space left on device")
        return compose(seed, index, image_size)

    monkeypatch.setattr(shapes, "MANY_PICTURES", 5)
    monkeypatch.setattr(shapes, "compose", fails)
    with pytest.raises(UserError, match=r"shapes-5x64px-seed3-\w+: no space left on device"):
        ensure_shapes(tmp_path, images=5, image_size=64, seed=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process draws")
@pytest.mark.parametrize("how", ["to all", "to one", "killed"])
def test_stopping_several_processes_leaves_nothing(tmp_path: Path, how: str) -> None:
    """Ctrl-C reaches all processes of the terminal; a signal to one process has to end the others.

    If it is killed, they end nevertheless, and what it had drawn is removed by the next process that draws.
    """
    lines = (
        "import signal; from pathlib import Path; from semiseg.data.shapes import ensure_shapes",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # a shell's background jobs ignore it
        f"ensure_shapes(Path({str(tmp_path / 'data')!r}), images=100_000, image_size=64, seed=1)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while len(list(tmp_path.rglob("*.png"))) < 40:
            assert process.poll() is None
            time.sleep(0.01)
        if how == "to all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT if how == "to one" else signal.SIGKILL)
        assert process.wait(timeout=30) != 0
        if how == "killed":
            with suppress(ProcessLookupError):
                for _ in range(3000):  # until the last of its processes has gone
                    os.killpg(process.pid, 0)
                    time.sleep(0.01)
            shutil.rmtree(ensure_shapes(tmp_path / "data", images=1, image_size=64, seed=1))
        assert list(tmp_path.glob("data/*")) == []
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_an_interrupt_while_work_is_handed_to_a_pool_acts_after_it() -> None:
    """Inside the pool's code it can leave a lock held, for which the pool's end waits for ever."""
    before, handed = signal.getsignal(signal.SIGINT), list[int]()

    def items() -> Iterator[int]:
        for item in range(1000):
            if item == 500:
                signal.raise_signal(signal.SIGINT)
            handed.append(item)
            yield item

    done: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        results = results_of(pool, abs, items())
        with pytest.raises(KeyboardInterrupt):
            done.extend(results)
    assert len(handed) == 1000
    assert done == []
    assert signal.getsignal(signal.SIGINT) is before


def test_another_seed_is_another_data_set(tmp_path: Path) -> None:
    folders = [ensure_shapes(tmp_path, images=1, image_size=64, seed=seed) for seed in (1, 2)]
    pictures = [(f / "images" / "000001.png").read_bytes() for f in folders]
    assert pictures[0] != pictures[1]


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
        if index == 2:
            raise KeyboardInterrupt
        return compose(seed, index, size)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "compose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_shapes(tmp_path, images=3, image_size=64, seed=0)
    assert list(tmp_path.iterdir()) == []
    assert len(list((ensure_shapes(tmp_path, images=3, image_size=64, seed=0) / "images").iterdir())) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_complete_folder_is_reused_and_a_damaged_one_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_shapes(tmp_path, images=2, image_size=64, seed=0)
    (tmp_path / ".lock").touch()  # of a process that was killed when it had drawn
    drawn = []

    def recorded(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[SceneObject]]:
        drawn.append((seed, index, size))
        return compose(seed, index, size)

    monkeypatch.setattr(shapes, "compose", recorded)
    assert ensure_shapes(tmp_path, images=2, image_size=64, seed=0) == folder
    assert drawn == []
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "images" / "000002.png").unlink()
    assert ensure_shapes(tmp_path, images=2, image_size=64, seed=0) == folder
    assert drawn == [(0, 0, 64), (0, 1, 64)]
    assert (folder / "images" / "000002.png").is_file()


@pytest.mark.filterwarnings("ignore:.*cannot be locked")
def test_without_locks_the_first_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_all = shapes._draw_all

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def while_another_is_quicker(part: Path, **parameters: int) -> None:
        monkeypatch.setattr(shapes, "_draw_all", draw_all)
        folder = ensure_shapes(tmp_path, **parameters)
        (folder / "first").touch()
        draw_all(part, **parameters)

    monkeypatch.setattr("fcntl.flock", no_locks)

    monkeypatch.setattr(shapes, "_draw_all", while_another_is_quicker)
    folder = ensure_shapes(tmp_path, images=1, image_size=64, seed=0)
    assert (folder / "first").exists()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("change", [{"images": 0}, {"image_size": 31}, {"seed": -1}])
def test_impossible_parameters(tmp_path: Path, change: dict[str, int]) -> None:
    parameters = {"images": 1, "image_size": 64, "seed": 0} | change
    name, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        ensure_shapes(tmp_path, **parameters)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        make_shapes(tmp_path, images=1, image_size=64, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return inner


def _is_inside(ring: list[tuple[Fraction, ...]], x: Fraction, y: Fraction) -> bool:
    inside = False
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
            inside = not inside
    return inside


def _has_hole(mask: NDArray[np.bool_]) -> bool:
    """Whether background of at least 9 pixels cannot be reached from outside."""
    free = np.pad(~mask, 1, constant_values=True)
    queue = deque([(0, 0)])
    free[0, 0] = False
    while queue:
        row, column = queue.popleft()
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < free.shape[0] and 0 <= c < free.shape[1] and free[r, c]:
                free[r, c] = False
                queue.append((r, c))
    return int(free.sum()) >= 9
