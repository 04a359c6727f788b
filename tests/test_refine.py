"""GrabCut and the dense CRF beside their definitions, and as an argument of what predicts and measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import refine as rows
from benchmarks import straightforward as plain
from benchmarks.__main__ import main
from semiseg.cli import app
from semiseg.data.detections import decoded, read_results
from semiseg.engine.predict import encode_masks, load_model
from semiseg.engine.run import evaluate_run
from semiseg.errors import UserError
from semiseg.models import refine
from semiseg.models.refine import CRF_SIDE, crf, crf_kernel, grabcut, grabcut_or_box, mean_field, pixel_boxes
from tests.coco_files import make_coco
from tests.model_folders import make_model

pytest.importorskip("cv2")


def noisy_disc(side: int = 60, *, radius: float = 14, centre: tuple[float, float] = (30, 28)) -> tuple[Tensor, Tensor]:
    """A green disc on a blue ground with noise: an image (3, side, side) uint8 and its mask."""
    y, x = np.mgrid[:side, :side] + 0.5
    mask = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    picture = np.where(mask[..., None], (60, 180, 70), (40, 60, 160)) + np.random.default_rng(0).normal(
        0, 8, (side, side, 3)
    )
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1), torch.from_numpy(mask)


def iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


# CRF -----------------------------------------------------------------------------------------------------------------


def test_the_matrix_form_is_the_sum_over_both_labels() -> None:
    image = noisy_disc(24, radius=7, centre=(11, 12))[0][:, :19].double()
    probabilities = torch.rand(2, 19 * 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probabilities[0, :5], probabilities[0, 5:9] = 0.0, 1.0  # are clipped, and can change their mind
    kernel = crf_kernel(image)
    torch.testing.assert_close(kernel, kernel.T, rtol=0, atol=1e-15)
    assert not kernel.diagonal().any()
    for own in probabilities:
        expected = plain.two_label_sums(own, image, iterations=5)
        torch.testing.assert_close(mean_field(own[None], kernel)[0], expected, rtol=0, atol=1e-12)


def test_a_cell_that_stands_for_more_pixels_counts_for_as_many() -> None:
    flat = torch.full((3, 4, 6), 90.0, dtype=torch.float64)
    fine, coarse = crf_kernel(flat), crf_kernel(flat, stride=2.0)
    assert coarse[0, 1] == pytest.approx(4 * float(fine[0, 2]), rel=1e-12)
    assert coarse[0, 6] == pytest.approx(4 * float(fine[0, 12]), rel=1e-12)


def noisy_probabilities(mask: Tensor) -> Tensor:
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    return (torch.where(mask, 0.65, 0.35) + 0.2 * noise).clamp(0, 1)


@pytest.mark.parametrize("side", [60, 200], ids=["whole image", "crop"])
def test_the_crf_finds_the_outline_that_colours_show(side: int) -> None:
    image, mask = noisy_disc(side, radius=14 * side / 60, centre=(side / 2, side / 2 - 2))
    assert (side > CRF_SIDE) == (side == 200)
    probabilities, reach = noisy_probabilities(mask)[None], 14 * side / 60
    box = torch.tensor([[side / 2 - reach, side / 2 - 2 - reach, side / 2 + reach, side / 2 - 2 + reach]])
    found = crf(image, box, probabilities)
    assert iou(probabilities[0] > 0.5, mask) < 0.75
    if side == 200:  # beyond the crop nothing is looked at
        assert torch.equal(found[0, :20], probabilities[0, :20] > 0.5)
        found[0] &= torch.zeros_like(mask).index_fill_(0, torch.arange(35, 165), True)
        found[0] &= torch.zeros_like(mask).index_fill_(1, torch.arange(35, 165), True)
    assert iou(found[0], mask) > 0.95
    assert crf(image, box[:0], probabilities[:0]).shape == (0, side, side)


def test_instances_share_the_kernel_of_a_small_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def counted(image: Tensor, **options: Any) -> Tensor:
        made.append(image.shape)
        return crf_kernel(image, **options)

    monkeypatch.setattr(refine, "crf_kernel", counted)
    for side, count in ((60, 1), (140, 2)):
        image, mask = noisy_disc(side)
        boxes, probabilities = torch.tensor([[16.0, 14.0, 44.0, 42.0]]).repeat(2, 1), noisy_probabilities(mask)[None]
        together = crf(image, boxes, probabilities.repeat(2, 1, 1))
        assert len(made) == count
        assert torch.equal(together, crf(image, boxes[:1], probabilities).repeat(2, 1, 1))
        made.clear()


# GrabCut -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [60, 700], ids=["as it is", "shrunk"])
def test_grabcut_finds_the_object_in_its_box_and_the_same_every_time(side: int) -> None:
    radius = 14 * side / 60
    image, mask = noisy_disc(side, radius=radius, centre=(side / 2, side / 2))
    box = torch.tensor([[side / 2 - radius, side / 2 - radius, side / 2 + radius, side / 2 + radius]])
    found = grabcut(image, box, None)
    assert iou(found[0], mask) > 0.97
    assert torch.equal(grabcut(image, torch.cat([box, box]), None), found.repeat(2, 1, 1))
    assert not found[0, :, : int(box[0, 0])].any()
    assert grabcut(image, box[:0]).shape == (0, side, side)


def test_the_box_stands_in_where_grabcut_finds_nothing() -> None:
    image, _ = noisy_disc()
    whole = torch.tensor([[0.0, 0.0, 60.0, 60.0]])  # leaves no background to learn from
    hidden = torch.tensor([[40.0, 40.0, 58.0, 58.0]])  # nothing but ground: what is found is a speck
    masks, from_box = grabcut_or_box(torch.full_like(image, 7), torch.cat([whole, hidden]))
    assert from_box == [True, True]
    assert masks[0].all()
    assert masks[1].sum() == 18 * 18
    assert masks[1, 40:58, 40:58].all()
    assert grabcut_or_box(image, torch.tensor([[16.0, 14.0, 44.0, 42.0]]))[1] == [False]


def test_boxes_become_the_pixels_whose_centres_they_hold() -> None:
    boxes = torch.tensor([[1.4, 0.6, 5.6, 9.0], [2.2, 3.0, 2.3, 3.1], [-4.0, 5.0, 90.0, 8.0], [11.9, 5.0, 30.0, 6.0]])
    assert pixel_boxes(boxes, (10, 12)) == [(1, 1, 6, 9), (2, 3, 3, 4), (0, 5, 12, 8), (11, 5, 12, 6)]


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"GrabCut needs OpenCV: pip install 'semiseg\[grabcut\]'"):
        refine.build_refiner("grabcut")


# as an argument ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with `model/` and data, all of whose objects have masks, and the model's detections."""
    folder = tmp_path_factory.mktemp("refine")
    make_coco(folder, sizes_hw=[(64, 80), (120, 70), (48, 96)])
    make_model(folder / "model")
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a.get("segmentation") and not a["iscrowd"]]
    (folder / "instances.json").write_text(json.dumps(content))
    return folder, evaluated(folder, folder / "model")


def evaluated(folder: Path, model: Path | None, **options: Any) -> list[dict[str, Any]]:
    metrics = evaluate_run(
        model,
        annotations=folder / "instances.json",
        images=folder / "images",
        detections=folder / "out.json",
        progress=False,
        **options,
    )
    assert metrics is not None
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return results


def image_of(folder: Path, image_id: int) -> Tensor:
    content = json.loads((folder / "instances.json").read_text())
    name = next(image["file_name"] for image in content["images"] if image["id"] == image_id)
    return torch.from_numpy(np.array(Image.open(folder / "images" / name).convert("RGB"))).permute(2, 0, 1)


def corners_of(result: dict[str, Any]) -> Tensor:
    x, y, width, height = result["bbox"]
    return torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)


def test_evaluation_refines_by_the_stored_image(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, plain = measured
    cut = evaluated(folder, folder / "model", refine="grabcut")
    assert [{**one, "segmentation": 0} for one in cut] == [{**one, "segmentation": 0} for one in plain]
    for result in cut:
        rounded = corners_of(result)  # of the results; the network's own have all digits
        expected = grabcut(image_of(folder, result["image_id"]), rounded)[0]
        assert iou(torch.from_numpy(decoded(result["segmentation"])), expected) > 0.9
    settled = evaluated(folder, folder / "model", refine="crf")
    assert [one["segmentation"] for one in settled] != [one["segmentation"] for one in plain]


def test_stored_detections_are_refined_without_the_network(
    measured: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plain = measured
    boxes = [{key: value for key, value in one.items() if key != "segmentation"} for one in plain]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "plain.json").write_text(json.dumps(plain))
    cut = evaluated(folder, None, results=folder / "boxes.json", refine="grabcut")
    for result in cut:
        assert (
            result["segmentation"] == encode_masks(grabcut(image_of(folder, result["image_id"]), corners_of(result)))[0]
        )
    assert evaluated(folder, None, results=folder / "plain.json") == plain
    settled = evaluated(folder, None, results=folder / "plain.json", refine="crf")
    for one, before in zip(settled, plain, strict=True):
        stored = torch.from_numpy(decoded(before["segmentation"]))[None]
        expected = crf(image_of(folder, one["image_id"]), corners_of(one), torch.where(stored, 0.9, 0.1))
        assert one["segmentation"] == encode_masks(expected)[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bbox": [1, 2, 3]}, r"result 1: 'bbox' is \[1, 2, 3\], allowed: four numbers"),
        ({"image_id": 99}, "result 1: image_id 99 is not in the annotation file"),
        ({"category_id": "cat"}, "result 1: category_id 'cat' is not in the annotation file"),
        ({"score": None}, "result 1: 'score' is None, allowed: a number"),
        ({"segmentation": {"size": [1, 1], "counts": "1"}}, r"result 1: RLE has size \[1, 1\], allowed: "),
        ({"segmentation": []}, "result 1: 'segmentation' is empty, allowed: an RLE or polygons"),
        (None, "result 1: is no object; needed: image_id, category_id, bbox, score, segmentation"),
    ],
)
def test_results_of_others_are_looked_at(tmp_path: Path, change: dict[str, Any] | None, sentence: str) -> None:
    good = {"image_id": 3, "category_id": 1, "bbox": [1.0, 2, 3, 4], "score": 0.5, "segmentation": [[1, 1, 5, 1, 5, 6]]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([good]))
    (entry,) = read_results(path, {3: (9, 12)}, (1, 2))
    assert decoded(entry["segmentation"]).sum() > 5
    path.write_text(json.dumps([good, None if change is None else {**good, **change}]))
    with pytest.raises(UserError, match=sentence):
        read_results(path, {3: (9, 12)}, (1, 2))
    path.write_text("{}")
    with pytest.raises(UserError, match="expected a list of COCO results"):
        read_results(path, {3: (9, 12)}, (1, 2))


def test_files_are_predicted_with_masks_of_the_upright_original(
    measured: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = measured
    picture = Image.open(next((folder / "images").iterdir())).convert("RGB").resize((150, 90))
    picture.save(tmp_path / "photo.png")
    arguments = [str(folder / "model"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, ["predict", *arguments, "--refine", "grabcut"]).exit_code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert len(results) > 3
    for result in results:
        expected = grabcut(image, corners_of(result))[0]
        assert iou(torch.from_numpy(decoded(result["segmentation"])), expected) > 0.9
    assert load_model(folder / "model").info.inference.refine == "none"
    failed = CliRunner().invoke(app, ["predict", *arguments, "--refine", "sam"])
    assert failed.exit_code == 2


def test_an_evaluation_of_nothing_is_a_sentence() -> None:
    for arguments in ([], ["--results", "x.json"]):
        result = CliRunner().invoke(app, ["evaluate", *arguments])
        assert result.exit_code == 2
        assert "give the folder of a run or a model, or --results with --annotations and --images" in result.output


def test_the_rows_of_the_benchmark_agree_and_notice_a_wrong_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--only", "crf", "--only", "grabcut", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"]: row["same_result"] for row in found} == {"crf": True, "grabcut": True}
    masks = np.zeros((2, 6, 6), dtype=bool)
    masks[:, 1:5, 1:5] = True
    assert rows.alike_masks({"masks": masks}, {"masks": masks})
    assert not rows.alike_masks({"masks": masks}, {"masks": np.roll(masks, 1, axis=2)})
    assert not rows.same_probabilities({"probabilities": masks + 0.002}, {"probabilities": masks + 0.0})
