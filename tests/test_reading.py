"""How stored pixels become RGB of 8 bits: ranges of values, EXIF orientations, and who says what is left out."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import semiseg
from semiseg.cli import app
from semiseg.config import RunConfig
from semiseg.data.check import check_annotations
from semiseg.data.images import UPRIGHT, read_image
from semiseg.data.reading import AS_STORED, Greys, Reading, describe_few_greys, scaled
from semiseg.data.table import HEADERS_NAME, load_table
from semiseg.engine.pseudo import made_file
from semiseg.errors import UserError, UserNotice
from semiseg.studies.report import protocol_fields
from tests.coco_files import CocoFiles, make_coco
from tests.model_folders import make_model
from tests.tiny import tiny_config

SIZES = [(40, 56), (64, 64), (48, 72)]
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
# How grey values of 8 bits are stored -> with the range under which they are themselves again.
STORED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[float, float]]] = {
    "float, 0 to 1": (lambda grey: (grey / 255).astype(np.float32), (0, 1)),
    "float, 0 to 255": (lambda grey: grey.astype(np.float32), (0, 255)),
    "float, negative": (lambda grey: grey.astype(np.float32) / 10 - 20, (-20, 5.5)),
    "12 of 16 bits": (lambda grey: grey.astype(np.uint16) * 16, (0, 4080)),
    "8 of 16 bits": (lambda grey: grey.astype(np.uint16), (0, 255)),
    "8 of 32 bits": (lambda grey: grey.astype(np.int32), (0, 255)),
    "32 bits, negative": (lambda grey: grey.astype(np.int32) * 8 - 1000, (-1000, 1040)),
}


def store(files: CocoFiles, change: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Stores every image anew, grey, as a TIFF of changed values; the grey values as they were."""
    greys = []
    for path in sorted(files.images.iterdir()):
        greys.append(np.asarray(Image.open(path).convert("L")))
        path.unlink()
        Image.fromarray(change(greys[-1])).save(path.with_suffix(".tif"))

    def rename(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = str(Path(image["file_name"]).with_suffix(".tif"))

    files.rewrite(rename)
    return greys


def notices(files: CocoFiles, reading: Reading = AS_STORED) -> list[str]:
    table = load_table(files.annotations, files.images, cache=files.annotations.parent / "cache", reading=reading)
    return list(table.image_notices(setting="RANGE {low} {high}", upright="UPRIGHT"))


def deep_png(path: Path, pixels: np.ndarray) -> None:
    """Colours of 16 bits, (H, W, 3), which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_values_go_linearly_between_black_and_white() -> None:
    values = np.array([[-5, 10, 60, 110, 500]], np.int32)
    assert scaled(values, (10, 110)).tolist() == [[0, 0, 128, 255, 255]]
    floats = np.array([np.nan, -np.inf, 0.0, 0.25, 1.0, np.inf], np.float32)
    assert scaled(floats, (0, 1)).tolist() == [0, 0, 0, 64, 255, 255]
    assert scaled(np.array([0, 65535], np.uint16), (0, 65535)).tolist() == [0, 255]


@pytest.mark.parametrize("wrong", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_without_width_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="allowed: two finite numbers, the black one below the white one"):
        Reading(wrong)


@pytest.mark.parametrize("kind", STORED)
def test_a_range_brings_the_grey_values_back(tmp_path: Path, kind: str) -> None:
    change, value_range = STORED[kind]
    files = make_coco(tmp_path, sizes_hw=SIZES)
    greys = store(files, change)
    reading = Reading(value_range)
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache", reading=reading)
    for row, grey in zip(table.rows, greys, strict=True):
        assert np.array_equal(table.image(row), np.repeat(grey[None], 3, axis=0))
    assert list(table.image_notices(setting="", upright="")) == []
    assert check_annotations(files.annotations, files.images, reading).findings == ()
    (lost,) = notices(files, Reading((-1e6, 1e6)))  # a range that fits nothing is said, too
    assert "3 of 3 images with more than 8 bits a channel keep almost none of their grey values in 8 bits" in lost


@pytest.mark.parametrize("kind", ["12 of 16 bits", "8 of 16 bits", "8 of 32 bits"])
def test_lost_grey_values_are_said_with_counts(tmp_path: Path, kind: str) -> None:
    files = make_coco(tmp_path, sizes_hw=SIZES)
    greys = store(files, STORED[kind][0])
    (lost,) = notices(files)
    largest = max(int(STORED[kind][0](grey).max()) for grey in greys)
    assert f"; RANGE 0 {4095 if largest > 255 else 255} says which values become black and white" in lost
    assert f"{files.annotations}: 3 of 3 images with more than 8 bits a channel" in lost
    report = check_annotations(files.annotations, files.images).render()
    assert "3 x image keeps almost none of its grey values in 8 bits" in report
    assert "--value-range 0 " in report


def test_floats_and_negative_values_without_a_range_are_refused_before_a_training(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=SIZES)
    store(files, STORED["float, 0 to 1"][0])
    with pytest.raises(UserError, match=r"001\.tif: .* floating-point numbers, allowed: .*data\.value_range"):
        notices(files)
    assert notices(files, Reading((0, 1))) == []
    with pytest.raises(UserError, match="floating-point numbers"):  # the table is there, the range is not
        notices(files)
    other = make_coco(tmp_path / "other", sizes_hw=SIZES)
    store(other, STORED["32 bits, negative"][0])
    with pytest.raises(UserError, match=r"allowed: 0 to 65535, or those of a value range"):
        notices(other)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 65535], np.uint16),  # two values in the file, two in 8 bits
        np.arange(0, 65536, 16, dtype=np.uint16),
        np.full(64, 7, np.uint16),  # one value
    ],
)
def test_nothing_is_said_of_what_was_not_lost(tmp_path: Path, values: np.ndarray) -> None:
    files = make_coco(tmp_path, sizes_hw=SIZES)
    store(files, lambda grey: values[np.arange(grey.size) % len(values)].reshape(grey.shape))
    assert notices(files) == []


def test_of_many_images_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semiseg.data.table.LOOKED_AT", 2)
    files = make_coco(tmp_path, sizes_hw=SIZES)
    store(files, STORED["8 of 16 bits"][0])
    (lost,) = notices(files)
    assert "2 of 2 images looked at of the 3 with more than 8 bits a channel" in lost


def test_the_range_that_is_named_wastes_little() -> None:
    def named(low: float, high: float) -> str | None:
        return describe_few_greys({"a": Greys(low, high, 90, 5)}, setting="{low} to {high}.")

    for (low, high), expected in {
        (0, 1.0): "0 to 1.",
        (300, 3900): "0 to 4095.",
        (7000, 8490): "7000 to 8490.",  # a thermal camera
        (-1000, 2000): "-1000 to 2000.",  # Hounsfield units
        (0, 1e6): "0 to 1e+06.",
    }.items():
        assert expected in (named(low, high) or "")


def test_colours_of_sixteen_bits(tmp_path: Path) -> None:
    """Pillow gives their upper 8 bits: few of 12 are left, and no range brings the others back."""
    files = make_coco(tmp_path, sizes_hw=[(40, 56)])
    path = next(files.images.iterdir())
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 56, 3))
    deep_png(path, pixels)
    assert np.array_equal(read_image(path).permute(1, 2, 0), pixels >> 8)
    assert notices(files) == []
    deep_png(path, pixels >> 4)
    (lost,) = notices(files)
    assert "1 of 1 images with more than 8 bits a channel" in lost
    assert lost.endswith("; of colours the upper 8 bits are read, so store these in 8 bits")
    with pytest.raises(UserError, match="a value range is for grey values, and this file has colours of 16 bits"):
        read_image(path, reading=Reading((0, 4095)))


def turned(files: CocoFiles, orientation: int, *, annotate_stored: bool = False) -> list[np.ndarray]:
    """Marks every image and stores its pixels so that a viewer shows them as they were; those pixels."""
    pixels = []
    for path in sorted(files.images.iterdir()):
        image = Image.open(path).convert("RGB")
        pixels.append(np.asarray(image))
        exif = Image.Exif()
        exif[0x0112] = orientation
        turn = UPRIGHT[orientation]
        image.transpose(BACK.get(turn, turn)).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientations_are_applied_where_the_annotations_are_of_upright_images(tmp_path: Path, orientation: int) -> None:
    files = make_coco(tmp_path, sizes_hw=SIZES)
    pixels = turned(files, orientation)
    reading = Reading(upright=True)
    table = load_table(files.annotations, files.images, cache=tmp_path / "cache", reading=reading)
    for row, image in zip(table.rows, pixels, strict=True):
        assert np.array_equal(table.image(row).permute(1, 2, 0), image)
    assert list(table.image_notices(setting="", upright="")) == []
    assert check_annotations(files.annotations, files.images, reading).findings == ()
    if orientation >= 5:
        with pytest.raises(UserError, match=r"is not applied: data\.upright = true .*; of 3 images 2 of another size"):
            load_table(files.annotations, files.images, cache=tmp_path / "cache")
    else:
        (told,) = notices(files)
        assert told.startswith(f"{files.annotations}: 3 of 3 images, such as 001.png, have an EXIF orientation")
        assert told.endswith("set UPRIGHT")


def test_any_turn_of_a_square_image_is_said_at_every_start_until_it_is_mended(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(64, 64)] * 3)
    turned(files, 6)
    assert "3 of 3 images" in notices(files)[0]
    assert "3 of 3 images" in notices(files)[0]  # the table is there
    image = Image.open(files.images / "002.png").convert("RGB")
    image.save(files.images / "002.png")
    assert len(notices(files)) == 1
    for name in ("001.png", "003.png"):
        image.save(files.images / name)
    assert notices(files) == []
    (headers,) = (tmp_path / "cache").rglob(HEADERS_NAME)
    assert json.loads(headers.read_text(encoding="utf-8")) == {}


@pytest.mark.parametrize("content", [None, "{", '{"turned": 3}', "[]"])
def test_headers_of_older_tables_are_looked_at_once(tmp_path: Path, content: str | None) -> None:
    files = make_coco(tmp_path, sizes_hw=[(64, 64)] * 3)
    turned(files, 3)
    wanted = notices(files)
    (headers,) = (tmp_path / "cache").rglob(HEADERS_NAME)
    headers.unlink() if content is None else headers.write_text(content, encoding="utf-8")
    assert notices(files) == wanted
    assert headers.is_file()


def test_upright_images_of_stored_annotations_are_refused(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(40, 56)])
    image = Image.open(files.images / "001.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(files.images / "001.png", exif=exif)
    assert "1 of 1 images" in notices(files)[0]
    told = r"turned upright as its EXIF orientation says, is 40 x 56 .* say 56 x 40: .* data\.upright = false takes"
    with pytest.raises(UserError, match=told):
        notices(files, Reading(upright=True))


def test_pseudo_masks_are_of_a_reading(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(64, 64)] * 2)
    tables = [
        load_table(files.annotations, files.images, cache=tmp_path / "cache", reading=reading)
        for reading in (AS_STORED, Reading(upright=True), Reading((0, 1)))
    ]
    assert len({made_file(table, "crf", folder=tmp_path) for table in tables}) == 3


def test_the_identity_of_a_run_has_them_where_they_are_chosen() -> None:
    plain = RunConfig().identity()
    assert "upright" not in plain["data"]
    assert "value_range" not in plain["data"]
    chosen = RunConfig(data={"upright": True, "value_range": [0, 4095]}).identity()  # type: ignore[arg-type]
    assert chosen["data"] == plain["data"] | {"upright": True, "value_range": [0.0, 4095.0]}
    with pytest.raises(ValueError, match="allowed: the value of black below that of white"):
        RunConfig(data={"value_range": [4095, 0]})  # type: ignore[arg-type]


def test_pictures_of_reports_show_what_the_run_saw(tmp_path: Path) -> None:
    files = make_coco(tmp_path, sizes_hw=[(40, 56)])
    (grey,) = store(files, STORED["12 of 16 bits"][0])
    data = {"format": "coco", "root": str(tmp_path), "value_range": [0, 4080]}
    data |= {"val_images": "images", "val_annotations": files.annotations.name}
    config = tiny_config(tmp_path, data=data)
    fields = protocol_fields([config], pretraining=None, classes=4)
    assert np.array_equal(fields["pixels_of"](files.images / "001.tif"), np.repeat(grey[:, :, None], 3, axis=2))


def run_verb(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.mark.filterwarnings("ignore:.*objects? ha(s|ve) no mask")
def test_a_run_keeps_its_range_and_says_once_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = make_coco(tmp_path, sizes_hw=[(64, 64), (64, 80)])
    greys = store(files, STORED["12 of 16 bits"][0])
    own: dict[str, Any] = {"format": "coco", "root": ".", "value_range": None}
    own |= {f"{name}_images": "images" for name in ("train", "val")}
    own |= {f"{name}_annotations": files.annotations.name for name in ("train", "val")}
    config = tiny_config(
        tmp_path, data=own, supervision={"source": "boxes", "split": None}, optim={"steps": 1, "batch_size": 2}
    )
    with pytest.warns(UserNotice, match=r"2 of 2 images .* data\.value_range = \[0, 4095\]") as told:
        semiseg.train(config, out="plain")
    assert sum("grey values" in str(each.message) for each in told) == 2  # of training and validation
    values = config.model_dump(mode="json")
    values["data"]["value_range"] = [0, 4080]
    values["runtime"]["evaluate_every"] = 0
    semiseg.train(values, out="own")
    model = semiseg.load_model("own", device="cpu")
    assert model.info.value_range == (0, 4080)
    assert semiseg.load_model("plain", device="cpu").info.value_range is None
    found = semiseg.detect(model, [torch.from_numpy(grey.astype(np.int32) * 16)[None] for grey in greys])
    wanted = semiseg.detect(model, [torch.from_numpy(grey.copy()).expand(3, -1, -1) for grey in greys])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
    assert "grey values" not in run_verb("predict", "own", "images", "--out", "a")
    told_of = run_verb("predict", "plain", "images", "--out", "b")
    assert told_of.count("2 of 2 images with more than 8 bits a channel") == 1
    assert "grey values" not in run_verb("predict", "plain", "images", "--out", "c", "--value-range", 0, 4095)


@pytest.mark.filterwarnings("ignore:.*objects? ha(s|ve) no mask")
def test_evaluate_pseudo_and_check_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = make_coco(tmp_path, sizes_hw=[(64, 64), (64, 80)])
    store(files, STORED["12 of 16 bits"][0])
    make_model(tmp_path / "model")
    data = ["--annotations", files.annotations, "--images", files.images]
    pseudo = ["pseudo", files.annotations, files.images, "--maker", "crf"]
    for words in (["evaluate", "model", *data], [*pseudo, "--out", "a.json"]):
        with pytest.warns(UserNotice, match="2 of 2 images .* --value-range 0 4095") as told:
            run_verb(*words)
        assert sum("grey values" in str(each.message) for each in told) == 1
    more = ["--value-range", 0, 4095]
    for words in (["evaluate", "model", *data], [*pseudo, "--out", "b.json"]):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run_verb(*words, *more)
        assert not any("grey values" in str(each.message) for each in heard)
    assert "no errors" in run_verb("data", "check", files.annotations, "--images", files.images, *more)
    told_of = run_verb("data", "check", files.annotations, "--images", files.images, "--value-range", 5, 1, code=2)
    told_of = " ".join(told_of.split())
    assert "[5, 1]: allowed: two finite numbers, the black one below the white one" in told_of
