"""Image files of every mode become RGB uint8 as stored; a bad file is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semiseg.data.images import check_header, read_image
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
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

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
