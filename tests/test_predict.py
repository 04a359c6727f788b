"""`semiseg predict`: the results of `evaluate`, every kind of image file, what it leaves behind, and the drawings."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from typer.testing import CliRunner

from semiseg import overlays
from semiseg.cli import app
from semiseg.commands.predict import find_images
from semiseg.data.images import read_image
from semiseg.data.reading import Reading
from semiseg.engine import predict as predict_module
from semiseg.engine import predict_files
from semiseg.engine.predict import encode_masks, find_instances
from semiseg.engine.predict_files import overlay_paths
from semiseg.engine.run import evaluate_run
from semiseg.errors import UserError
from semiseg.overlays import (
    COLOURS,
    LARGEST_SIDE,
    Drawn,
    choose_colours,
    draw_detections,
    drawing_size,
    place_label,
    prepare_drawing,
    written_name,
)
from tests.coco_files import make_coco, picture
from tests.model_folders import make_model

EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "model"
    make_model(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*arguments: str | Path, code: int = 0) -> str:
    """What `semiseg predict` prints, its errors included."""
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


def save(path: Path, height: int = 40, width: int = 56, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(np.random.default_rng(seed), height, width)).save(path, **options)
    return path


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_results_are_those_of_evaluate(model: Path, folder: Path) -> None:
    sizes = [(64, 80), (48, 96), (33, 40), (64, 80), (120, 70), (64, 64), (50, 90), (64, 81), (30, 96), (65, 80)]
    data = make_coco(folder, sizes_hw=sizes)
    with pytest.warns(UserWarning, match="10 of 40 objects have no mask"):
        evaluate_run(
            model, annotations=data.annotations, images=data.images, detections=folder / "wanted.json", progress=False
        )
    told = predict(model, "images", "--out", "out", "--no-overlays")
    results = load(folder / "out" / "results.json")
    assert len(results) > 50
    assert results == load(folder / "wanted.json")
    assert told.startswith(f"10 images, {len(results)} detections, ")
    images = load(folder / "out" / "images.json")
    assert [(item["id"], item["height"], item["width"]) for item in images["images"]] == [
        (item["id"], item["height"], item["width"]) for item in data.content["images"]
    ]
    assert images["images"][1]["file_name"] == "images/002.png"
    assert images["categories"] == data.content["categories"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["images.json", "results.json"]
    loaded = COCO(folder / "out" / "images.json").loadRes(str(folder / "out" / "results.json"))
    assert len(loaded.anns) == len(results)


@pytest.mark.filterwarnings("ignore:.*objects have no mask")
def test_a_model_whose_settings_rescore(model: Path, folder: Path) -> None:
    data = make_coco(folder, sizes_hw=[(64, 80), (48, 96)])
    own = Path(shutil.copytree(model, folder / "own"))
    settings = load(own / "config.json")
    settings["inference"]["rescore"] = True
    (own / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, each in (("plain.json", model), ("rescored.json", own)):
        found = folder / name
        evaluate_run(each, annotations=data.annotations, images=data.images, detections=found, progress=False)
    plain, rescored = load(folder / "plain.json"), load(folder / "rescored.json")
    assert 10 < len(plain) == len(rescored)
    assert sum(one["score"] for one in rescored) < sum(one["score"] for one in plain)
    predict(own, "images", "--out", "out", "--no-overlays")
    assert load(folder / "out" / "results.json") == rescored


def test_batches_do_not_matter(model: Path, folder: Path) -> None:
    for number, size in enumerate([(64, 80), (48, 96), (64, 80), (40, 40), (90, 64)]):
        save(folder / "images" / f"{number}.png", *size, seed=number)
    for out, batch in (("one", "1"), ("three", "3")):
        predict(model, "images", "--out", out, "--batch", batch, "--drawn-score", "0.99")
    one, three = (load(folder / name / "results.json") for name in ("one", "three"))
    assert len(one) == len(three) > 30
    for a, b in zip(one, three, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=2e-3)
    names = sorted(path.name for path in (folder / "one" / "overlays").iterdir())
    assert names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]


def test_resize_options(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder / "a.png", 40, 60)
    seen: list[tuple[int, ...]] = []

    def note(network: Any, images: list[torch.Tensor], **options: Any) -> Iterator[Any]:
        seen.extend(tuple(image.shape[1:]) for image in images)
        return find_instances(network, images, **options)

    monkeypatch.setattr(predict_module, "find_instances", note)
    for options in ([], ["--short-side", 128], ["--short-side", 128, "--long-side", 150], ["--long-side", 45]):
        predict(model, "a.png", "--out", "out", *map(str, options))
    assert seen == [(64, 96), (128, 192), (100, 150), (30, 45)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_demand(folder: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(pixels).save("a.png", exif=exif)
    with Image.open("a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(Path("a.png"), reading=Reading(upright=True)).permute(1, 2, 0), upright)
    assert np.array_equal(read_image(Path("a.png")).permute(1, 2, 0), pixels)
    assert (upright.shape[:2] == (6, 4)) == (orientation >= 5)
    Image.fromarray(pixels).save("a.tif", exif=exif)  # Pillow turns these by itself
    assert np.array_equal(read_image(Path("a.tif"), reading=Reading(upright=True)).permute(1, 2, 0), upright)


def test_a_turned_photograph_is_predicted_upright(model: Path, folder: Path) -> None:
    upright = picture(np.random.default_rng(0), 60, 44)
    Image.fromarray(upright).save("upright.png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(np.rot90(upright)).save("turned.png", exif=exif)
    predict(model, "upright.png", "turned.png", "--out", "out")
    images = load(Path("out/images.json"))["images"]
    assert [(item["height"], item["width"]) for item in images] == [(60, 44), (60, 44)]
    results = load(Path("out/results.json"))
    first, second = ([{**r, "image_id": 0} for r in results if r["image_id"] == number] for number in (1, 2))
    assert len(first) > 3
    assert first == second
    one, other = (np.asarray(Image.open(f"out/overlays/{name}.jpg")) for name in ("upright", "turned"))
    assert np.array_equal(one, other)


def test_unreadable_exif_says_nothing(folder: Path) -> None:
    save(folder / "a.jpg", exif=b"Exif\x00\x00nonsense" + bytes(40))
    assert read_image(folder / "a.jpg", reading=Reading(upright=True)).shape == (3, 40, 56)


def test_every_common_kind_of_image(model: Path, folder: Path) -> None:
    image = Image.fromarray(picture(np.random.default_rng(0), 40, 56))
    for mode in ("L", "1", "P", "LA", "RGBA"):
        image.convert(mode).save(f"mode_{mode}.png")
    image.convert("CMYK").save("cmyk.jpg")
    Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29).save("deep.png")
    for suffix in ("gif", "bmp", "tif", "webp", "ppm", "JPG", "tga"):
        image.save(f"kind_{suffix}.{suffix}")
    told = predict(
        model, ".", "--out", "out", "--drawn-score", "0.99"
    )  # of what is found nothing is drawn, which is slow
    assert told.startswith("14 images, ")
    assert len(list(Path("out/overlays").iterdir())) == 14
    assert all((item["height"], item["width"]) == (40, 56) for item in load(Path("out/images.json"))["images"])


def test_unreadable_files_are_named_and_the_others_done(model: Path, folder: Path) -> None:
    for number, name in enumerate(("a.png", "b.png", "d.png")):
        save(folder / name, seed=number)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    told = predict(model, "*", "--out", "out", "--batch", "2", code=1)
    assert "semiseg: b.png: the image cannot be decoded: " in told
    assert "semiseg: notes.txt: the image cannot be decoded: not an image or damaged" in told
    assert "semiseg: 2 files could not be read" in told
    assert "2 images, " in told
    images = load(folder / "out" / "images.json")["images"]
    assert [(item["id"], item["file_name"]) for item in images] == [(1, "a.png"), (3, "d.png")]
    assert {result["image_id"] for result in load(folder / "out" / "results.json")} == {1, 3}
    told = predict(model, "notes.txt", "--out", "none", code=1)
    assert "0 images, 0 detections" in told
    assert load(folder / "none" / "results.json") == []


def test_names(model: Path, folder: Path) -> None:
    for name in ("x/photo.png", "y/photo.png", "x/Größe 照片.png", "y/.hidden.png"):
        save(folder / name)
    predict(model, "x", "y", "--out", "out")
    overlays = Path("out/overlays")
    assert sorted(path.relative_to(overlays).as_posix() for path in overlays.rglob("*.jpg")) == [
        "x/Größe 照片.jpg",
        "x/photo.jpg",
        "y/photo.jpg",
    ]
    assert load(Path("out/images.json"))["images"][0]["file_name"] == "x/Größe 照片.png"

    def names(*files: str) -> list[str]:
        return [path.relative_to("o").as_posix() for path in overlay_paths([Path(file) for file in files], Path("o"))]

    assert names("p/a.png", "p/b.png") == ["a.jpg", "b.jpg"]
    assert names("p/a.png", "p/b.png", "p/q/a.png") == ["a.jpg", "b.jpg", "q/a.jpg"]
    for alike in ("p/a.tif", "p/A.png"):
        assert names("p/a.png", "p/b.png", alike) == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert names(f"p/{'é' * 120}.png") == ["000001.jpg"]


def test_which_files_arguments_mean(folder: Path) -> None:
    for name in ("a/2.png", "a/1.JPG", "a/deep/3.png", "b/4.tif", "b/[x].png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "b" / "notes.txt").touch()

    def names(*arguments: str) -> list[str]:
        return [path.as_posix() for path in find_images(arguments)]

    assert names("a") == ["a/1.JPG", "a/2.png"]
    assert names("b", "a/2.png", "a") == ["b/4.tif", "b/[x].png", "a/2.png", "a/1.JPG"]
    assert names("a/**/*.png") == ["a/2.png", "a/deep/3.png"]
    assert names("b/[x].png") == ["b/[x].png"]
    assert names("b/*") == ["b/4.tif", "b/[x].png", "b/notes.txt"]
    assert names("*") == ["a/1.JPG", "a/2.png", "b/4.tif", "b/[x].png"]
    for argument, told in (
        ("c", "c: no such image or folder"),
        ("*.gif", "no file matches"),
        ("a/*/*.gif", "no file matches"),
    ):
        with pytest.raises(UserError, match=told.replace("*", r"\*")):
            find_images([argument])


def test_bad_input(model: Path, folder: Path) -> None:
    save(folder / "a.png")
    assert "semiseg: .: not a model folder: config.json is missing" in predict(".", "a.png", "--out", "out", code=2)
    assert "semiseg: gone: no such folder" in predict("gone", "a.png", "--out", "out", code=2)
    evaluated = CliRunner().invoke(app, ["evaluate", "gone"])
    assert (evaluated.exit_code, str(evaluated.exception)) == (2, "2")
    assert "semiseg: gone: no such folder" in evaluated.output
    assert "semiseg: b.png: no such image or folder" in predict(model, "b.png", "--out", "out", code=2)
    assert "semiseg: a.png: is no folder" in predict(model, "a.png", "--out", "a.png", code=2)
    assert "device 'tpu9'" in predict(model, "a.png", "--out", "out", "--device", "tpu9", code=2)
    (folder / "empty").mkdir()
    assert "semiseg: empty: holds no images" in predict(model, "empty", "--out", "out", code=2)
    assert not (folder / "out").exists()
    save(folder / "out" / "overlays" / "a.jpg")
    before = (folder / "out" / "overlays" / "a.jpg").read_bytes()
    held = "which is to be predicted; give another folder as --out"
    assert f"out: holds out/overlays/a.jpg, {held}" in predict(model, "out/overlays", "--out", "out", code=2)
    assert (folder / "out" / "overlays" / "a.jpg").read_bytes() == before
    files = sorted(folder.rglob("*"))
    assert f".: holds a.png, {held}" in predict(model, "a.png", "--out", ".", code=2)
    assert sorted(folder.rglob("*")) == files


def test_a_folder_with_what_no_prediction_wrote_is_refused(model: Path, folder: Path) -> None:
    save(folder / "photos" / "a.png")
    save(folder / "photos" / "sub" / "b.png")
    held = "photos: holds what no prediction wrote: a.png, sub/; give a new or an empty folder as --out"
    for images in ("photos/sub", "image.png"):
        save(folder / "image.png")
        assert held in predict(model, images, "--out", "photos", code=2)
    assert sorted(path.name for path in (folder / "photos").iterdir()) == ["a.png", "sub"]
    predict(model, "image.png", "--out", "out")
    (folder / "out" / "notes.txt").write_text("mine")
    predict(model, "image.png", "--out", "out")  # beside the files of a prediction others may stand
    assert (folder / "out" / "notes.txt").read_text() == "mine"
    save(folder / "killed" / "overlays" / "image.jpg")
    predict(model, "image.png", "--out", "killed")


@pytest.mark.parametrize("options", [[], ["--no-overlays"]])
def test_a_second_prediction_leaves_no_drawing_of_the_first(model: Path, folder: Path, options: list[str]) -> None:
    for name in ("a", "b/c", "d/c"):
        save(folder / f"{name}.png")
    predict(model, "a.png", "b", "d", "--out", "out")
    (folder / "out" / "overlays" / "notes.txt").write_text("mine")
    predict(model, "a.png", "--out", "out", *options)
    left = sorted(path.name for path in (folder / "out" / "overlays").rglob("*") if path.is_file())
    assert left == (["notes.txt"] if options else ["a.jpg", "notes.txt"])


def test_scores(model: Path, folder: Path) -> None:
    save(folder / "a.png")
    predict(model, "a.png", "--out", "all")
    every = load(folder / "all" / "results.json")
    limit = sorted(result["score"] for result in every)[len(every) // 2] + 1e-6
    predict(model, "a.png", "--out", "some", "--score", str(limit))
    assert load(folder / "some" / "results.json") == [result for result in every if result["score"] > limit]
    predict(model, "a.png", "--out", "low", "--score", "0.1")  # below the model's own limit
    assert len(load(folder / "low" / "results.json")) >= len(every)
    scores = [result["score"] for result in every]
    drawn_score = sorted(scores)[-3]
    told = predict(model, "a.png", "--out", "three", "--drawn-score", str(drawn_score))
    reached = sum(score >= drawn_score for score in scores)
    assert 3 <= reached < len(scores)
    assert f"1 image, {len(scores)} detections, " in told
    assert told.endswith(f"; of these {reached} reach --drawn-score {drawn_score:g} and are drawn\n")
    assert "drawn" not in predict(model, "a.png", "--out", "none", "--no-overlays")
    assert "of these 0 reach" in predict(model, "a.png", "--out", "undrawn", "--drawn-score", "1")
    drawn, bare = (
        np.asarray(Image.open(folder / name / "overlays" / "a.jpg")).astype(int) for name in ("all", "undrawn")
    )
    plain = np.asarray(prepare_drawing(read_image(folder / "a.png").permute(1, 2, 0).numpy())).astype(int)
    assert bare.shape == plain.shape
    assert abs(bare - plain).mean() < 3  # JPEG
    assert abs(drawn - plain).mean() > 20


def test_an_interruption_leaves_whole_files(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        save(folder / "images" / f"{number}.png", seed=number)
    calls: list[int] = []

    def stop(network: Any, images: list[torch.Tensor], **options: Any) -> Iterator[Any]:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return find_instances(network, images, **options)

    monkeypatch.setattr(predict_module, "find_instances", stop)
    told = predict(model, "images", "--out", "out", "--batch", "2", code=130)
    assert told == "semiseg: stopped after 4 of 5 images, whose results are in out\n"
    assert {result["image_id"] for result in load(folder / "out" / "results.json")} == {1, 2, 3, 4}
    assert [item["id"] for item in load(folder / "out" / "images.json")["images"]] == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "out" / "overlays").iterdir()) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["images.json", "overlays", "results.json"]


def test_a_failure_leaves_nothing_half_written(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder / "a.png")

    def fail(*_: object, **__: object) -> Iterator[Any]:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(predict_module, "find_instances", fail)
    assert isinstance(
        CliRunner().invoke(app, ["predict", str(model), "a.png", "--out", "out"]).exception, ZeroDivisionError
    )
    assert list((folder / "out").iterdir()) == []


def test_drawings_have_readable_sizes() -> None:
    assert drawing_size((128, 128)) == (512, 512)
    assert drawing_size((480, 640)) == (480, 640)
    assert drawing_size((4000, 6000)) == (1365, LARGEST_SIDE)
    assert drawing_size((100, 1500)) == (100, 1500)
    assert drawing_size((1, 1)) == (480, 480)
    assert drawing_size((1, 9000)) == (1, LARGEST_SIDE)
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randint(1, 5000), draw.randint(1, 5000)
        assert 1 <= min(drawing_size(size)) <= max(drawing_size(size)) <= LARGEST_SIDE


def drawn_square(size_hw: tuple[int, int], x0: int, y0: int, x1: int, y1: int, text: str = "cat 0.50") -> Drawn:
    mask = torch.zeros(1, *size_hw, dtype=torch.bool)
    mask[0, y0:y1, x0:x1] = True
    return Drawn((x0, y0, x1 - x0, y1 - y0), encode_masks(mask)[0], text)


def test_a_mask_is_tinted_where_it_is() -> None:
    image = np.full((500, 600, 3), 100, dtype=np.uint8)
    drawing = draw_detections(prepare_drawing(image), (500, 600), [drawn_square((500, 600), 100, 200, 400, 420)])
    pixels = np.asarray(drawing).astype(int)
    assert pixels.shape == (500, 600, 3)
    colour = np.array(COLOURS[0])
    assert (abs(pixels[210:410, 110:390] - (55 + 0.45 * colour)) <= 1).all()
    assert (pixels[200, 100:400] == colour).all()
    changed = (pixels != 100).any(2)
    changed[200:420, 100:400] = False
    rows, columns = changed.nonzero()  # the label, above the box
    assert rows.min() > 170
    assert (rows.max(), columns.min()) == (199, 100)
    half = draw_detections(prepare_drawing(image[:50, :60]), (50, 60), [drawn_square((50, 60), 10, 20, 40, 42)])
    assert (abs(np.asarray(half).astype(int)[210:410, 110:390] - (55 + 0.45 * colour)) <= 1).all()  # ten times larger


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 900), (3000, 2), (7, 5), (2100, 2100)])
def test_any_size_can_be_drawn(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    image = np.zeros((height, width, 3), dtype=np.uint8)
    instances = [drawn_square(size_hw, 0, 0, width, height, "a very long name of a class " * 9), Drawn(
        (width, height, 0, 0), encode_masks(torch.zeros(1, height, width, dtype=torch.bool))[0], ""
    )]  # fmt: skip
    drawing = draw_detections(prepare_drawing(image), size_hw, instances)
    assert (drawing.height, drawing.width) == drawing_size(size_hw)


def test_labels_stay_in_the_picture_and_apart() -> None:
    draw = random.Random(0)
    placed: list[tuple[int, int, int, int]] = []
    for _ in range(12):
        x0, y0 = draw.randint(0, 900), draw.randint(0, 700)
        label = place_label(
            (90, 20), (x0, y0, x0 + draw.randint(1, 100), y0 + draw.randint(1, 100)), placed, (1000, 800)
        )
        assert label is not None
        assert 0 <= label[0] < label[2] <= 1000
        assert 0 <= label[1] < label[3] <= 800
        assert all(a[2] <= label[0] or label[2] <= a[0] or a[3] <= label[1] or label[3] <= a[1] for a in placed)
        placed.append(label)
    assert place_label((90, 20), (5, 100, 60, 160), [], (1000, 800)) == (5, 80, 95, 100)  # above
    assert place_label((90, 20), (5, 0, 60, 160), [(0, 0, 99, 30)], (1000, 800)) == (5, 160, 95, 180)  # below


def test_labels_do_not_hide_a_dense_picture() -> None:
    """Each place beside plain loops over pixels; of 60 small boxes some have no label, of three large ones all."""
    draw, (width, height) = random.Random(1), (400, 300)
    for side, count in ((22, 60), (90, 3)):
        boxes = []
        for _ in range(count):
            x0, y0 = draw.randint(0, width - side), draw.randint(0, height - side)
            boxes.append((x0, y0, x0 + draw.randint(side // 2, side), y0 + draw.randint(side // 2, side)))
        covered, placed = np.zeros((height, width), bool), list[tuple[int, int, int, int]]()
        for box in boxes:
            label = place_label((70, 17), box, placed, (width, height), objects=boxes)
            if label is None:
                continue
            x0, y0, x1, y1 = label
            assert (x1 - x0, y1 - y0) == (70, 17)
            assert not covered[y0:y1, x0:x1].any()
            covered[y0:y1, x0:x1] = True
            placed.append(label)
            for other in boxes:
                inside = np.zeros((height, width), bool)
                inside[other[1] : other[3], other[0] : other[2]] = True
                assert inside[y0:y1, x0:x1].sum() <= 0.1 * inside.sum()
        assert (0 < len(placed) < 40) if count == 60 else (len(placed) == 3)
    assert place_label((70, 17), (0, 0, 400, 300), [], (400, 300), objects=[(0, 0, 400, 300)]) == (0, 0, 70, 17)
    assert place_label((70, 17), (0, 0, 20, 20), [], (20, 20), objects=[(0, 0, 20, 20)]) is None


@pytest.mark.parametrize("refused", [0, 1, 2, 3])
def test_labels_shrink_before_they_fall_away(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    asked: list[int] = []

    def place(size_wh: tuple[int, int], *arguments: Any, **options: Any) -> tuple[int, int, int, int] | None:
        asked.append(size_wh[1])
        return None if len(asked) <= refused else place_label(size_wh, *arguments, **options)

    monkeypatch.setattr(overlays, "place_label", place)
    picture, square = Image.new("RGB", (480, 480)), drawn_square((480, 480), 100, 100, 300, 300)
    drawing = draw_detections(picture, (480, 480), [square])
    assert len(asked) == min(refused + 1, 3)
    assert asked == sorted(set(asked), reverse=True)
    label = (np.asarray(drawing)[:100] == COLOURS[0]).all(2).any(1)  # above the box
    assert label.sum() == (asked[-1] if refused < 3 else 0)
    without = draw_detections(picture, (480, 480), [Drawn(square.box_xywh, square.rle, "")])
    assert (np.asarray(drawing) == np.asarray(without)).all() == (refused == 3)


@pytest.mark.parametrize("labels", ["full", "score", "none"])
def test_what_labels_say(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    save(folder / "image.png", 64, 80)
    texts: list[str] = []

    def note(picture: Any, size_hw: Any, drawn: list[Drawn]) -> Any:
        texts.extend(item.text for item in drawn)
        return draw_detections(picture, size_hw, drawn)

    monkeypatch.setattr(predict_files, "draw_detections", note)
    predict(model, "image.png", "--out", "out", "--drawn-score", "0", "--labels", labels)
    results = load(folder / "out" / "results.json")
    names = {item["id"]: item["name"] for item in load(folder / "out" / "images.json")["categories"]}
    scores = [f"{result['score']:.2f}" for result in results]
    full = [f"{names[result['category_id']]} {score}" for result, score in zip(results, scores, strict=True)]
    assert len(texts) > 3
    assert texts == {"full": full, "score": scores, "none": [""] * len(results)}[labels]
    assert "'full', 'score', 'none'" in predict(model, "image.png", "--out", "out", "--labels", "all", code=2)


def test_colours_of_touching_boxes_differ() -> None:
    row = [(10 * number, 0, 10 * number + 12, 10) for number in range(30)]
    colours = choose_colours(row)
    assert all(a != b for a, b in pairwise(colours))
    assert choose_colours(row[:5]) == colours[:5]
    assert set(choose_colours([(0, 0, 9, 9)] * len(COLOURS))) == set(COLOURS)
    assert len(choose_colours([(0, 0, 9, 9)] * 20)) == 20


def test_names_that_the_font_cannot_write_become_numbers(model: Path, folder: Path) -> None:
    assert written_name("potted plant, Größe, Кошка 0.5", 3) == "potted plant, Größe, Кошка 0.5"
    assert written_name("照片", 3) == "class 3"
    info = make_model(folder / "other", class_names=("cat", "照片"), category_ids=(4, 9))
    assert predict_files.written_names(info) == ["cat", "class 9"]


def test_files_of_the_same_names_that_are_no_predictions_stay(model: Path, folder: Path) -> None:
    save(folder / "image.png")
    for name, content in (("results.json", "mine"), ("images.json", '{"images": [], "annotations": [{}]}')):
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_text(content)
        told = predict(model, "image.png", "--out", "out", code=2)
        assert f"{name}: is not of a prediction, and would be lost; give another folder as --out" in told
        assert [(path.name, path.read_text()) for path in (folder / "out").iterdir()] == [(name, content)]
        (folder / "out" / name).unlink()
    predict(model, "image.png", "--out", "out")
    predict(model, "image.png", "--out", "out")
