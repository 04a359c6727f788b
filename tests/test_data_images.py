"""Image files of every mode become RGB uint8 as stored; a bad file is one sentence."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from semiseg.data import images
from semiseg.data.images import check_header, open_image, read_image
from semiseg.data.problems import BadValue, Kind
from semiseg.errors import UserError


def save(path: Path, mode: str, pixels: np.ndarray) -> torch.Tensor:
    Image.fromarray(pixels).convert(mode).save(path)
    return read_image(path)


def test_rgb_has_the_channels_first(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = save(tmp_path / "a.png", "RGB", pixels)
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()  # as it was decoded
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 3:] = 255
    image = save(tmp_path / "a.png", mode, pixels)
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 4), (10, 20, 30, 0), np.uint8)
    assert save(tmp_path / "a.png", "RGBA", pixels)[:, 0, 0].tolist() == [10, 20, 30]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta + yellow = red
    image.save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "a.jpg").float().mean((1, 2)).tolist()
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    pixels = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / name)
    assert read_image(tmp_path / name).tolist() == [[[0, 1, 128, 255]]] * 3


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0.0, np.nan, 255.0], [1.0, 200.0, 65535.0]])
def test_floating_point_values_are_refused(tmp_path: Path, values: list[float]) -> None:
    """Nothing says which of them is white: 0 to 1 would be a black picture."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([values], np.float32)).save(path)
    told = "the image cannot be decoded: its values are floating-point numbers, allowed: integers of 8 or 16 bits"
    with pytest.raises(UserError, match=rf"a\.tif: {told}"):
        read_image(path)
    with pytest.raises(BadValue, match=told):  # before a training, too, where headers alone are read
        check_header(path, size_hw=(1, 3))


@pytest.mark.parametrize("values", [[-1, 5], [0, 2**16]])
def test_integers_beyond_sixteen_bits_are_refused(tmp_path: Path, values: list[int]) -> None:
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"grey values from {values[0]} to {values[1]}, allowed: 0 to 65535"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.eps", "a.jpg", "a.png", "a"])
def test_postscript_is_no_image_whatever_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pillow would hand it to Ghostscript, which is a program."""
    Image.new("RGB", (8, 4)).save(tmp_path / name, format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # called, it would be another error
    with pytest.raises(UserError, match="cannot be decoded: not an image or damaged"):
        read_image(tmp_path / name)
    with pytest.raises(BadValue, match="not an image or damaged"):
        check_header(tmp_path / name, size_hw=(4, 8))
    with pytest.raises(OSError, match="cannot identify"):
        open_image(io.BytesIO((tmp_path / name).read_bytes()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA"])
def test_formats_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 4), (255, 255, 255)).save(tmp_path / "a.dat", format=kind)
    assert read_image(tmp_path / "a.dat").float().mean() > 250


def test_pillow_remarks_on_large_files_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        importlib.reload(images)  # pytest keeps filters of its own
        assert images.read_image(tmp_path / "a.png").shape == (3, 4, 4)
    assert told == []


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in (len(content) * 2 // 3, 40, 10, 0):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{name}: the image cannot be decoded: .+") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png: no such image file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path(os.devnull)):
        with pytest.raises(UserError, match=f"{path}: the image cannot be decoded: it is no file"):
            read_image(path)


def test_another_size_than_annotated(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", size_hw=(4, 6)).shape == (3, 4, 6)
    with pytest.raises(UserError, match=r"a\.png: the image is 6 x 4 .* say 6 x 5"):
        read_image(tmp_path / "a.png", size_hw=(5, 6))


def test_exif_rotation_is_not_applied_but_named(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 6)
    with pytest.raises(UserError, match="EXIF orientation is not applied"):
        read_image(tmp_path / "a.jpg", size_hw=(6, 4))
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "a.jpg", size_hw=(6, 7))
    assert "EXIF" not in str(caught.value)


def test_a_photograph_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Image, "open", refuse)  # a superuser may read everything
    with pytest.raises(UserError, match=r"a\.png: no permission to read the image$"):
        read_image(tmp_path / "a.png")


def test_headers_tell_size_and_presence_but_not_damage_behind_them(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    check_header(tmp_path / "a.png", size_hw=(64, 80))
    (tmp_path / "text.png").write_text("no image")
    for name, kind in (("a", Kind.IMAGE_SIZE), ("none", Kind.IMAGE_MISSING), ("text", Kind.IMAGE_UNREADABLE)):
        with pytest.raises(BadValue) as caught:
            check_header(tmp_path / f"{name}.png", size_hw=(80, 64))
        assert caught.value.kind == kind
