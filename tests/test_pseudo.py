"""Pseudo masks: made of boxes alone, brought to their objects, and learned from."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec
from torch import Tensor
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.data.dataset import InstanceDataset, build_rule, withhold
from semiseg.data.pseudo import PseudoMask, PseudoMasks, load_pseudo
from semiseg.data.sources import cache_folder
from semiseg.data.table import Table, load_table
from semiseg.data.transforms import Resize
from semiseg.engine import pseudo as making
from semiseg.engine.build import build_data, train_dataset
from semiseg.engine.predict import LoadedModel, load_model
from semiseg.engine.pseudo import make_pseudo, masks_at_boxes
from semiseg.engine.run import execute_run
from semiseg.errors import UserError
from semiseg.models.paste import paste_probabilities
from semiseg.structures.grids import Regions
from semiseg.structures.inputs import Supervision
from tests.coco_files import CocoFiles, make_coco
from tests.model_folders import make_model
from tests.test_train import first_batches, fresh_step, losses_and_gradients
from tests.tiny import DETECTORS, HEADS, model_of, tiny_config

pytest.importorskip("cv2")
SIZE = (64, 80)


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def decoded(counts: bytes, size_hw: tuple[int, int] = SIZE) -> np.ndarray:
    mask: np.ndarray = rle_codec.decode({"size": list(size_hw), "counts": counts}).astype(bool)
    return mask


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def boxed(annotation_id: int, image_id: int, box: Sequence[float], **more: Any) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    own = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "iscrowd": 0,
    }
    return {**own, "area": (x1 - x0) * (y1 - y0), **more}


BOXES = {11: (1, [10, 10, 40, 40]), 12: (1, [35, 20, 70, 60]), 21: (2, [5, 5, 30, 50]), 22: (2, [40, 8, 78, 30])}


@pytest.fixture
def files(tmp_path: Path) -> CocoFiles:
    """Two images with two boxes each, of which number 11 has a mask."""
    annotations = [boxed(key, image, box) for key, (image, box) in BOXES.items()]
    annotations[0]["segmentation"] = rle_of(rectangle(12, 12, 30, 38))
    return make_coco(tmp_path, sizes_hw=[SIZE, SIZE], annotations=annotations)


def table_of(files: CocoFiles) -> Table:
    return load_table(files.annotations, files.images, cache=files.annotations.parent / "arrow")


def imported(files: CocoFiles, annotations: list[dict[str, Any]], **more: Any) -> PseudoMasks:
    """What is read of a file with these annotations of the same images."""
    path = files.annotations.with_name("pseudo.json")
    path.write_text(json.dumps({"images": files.content["images"], "annotations": annotations, **more}))
    return load_pseudo(path, table_of(files), cache=path.parent / "arrow")


# import --------------------------------------------------------------------------------------------------------------


def test_masks_go_to_their_objects_by_id_or_by_box(files: CocoFiles) -> None:
    mask = rectangle(38, 25, 60, 55)
    known = rectangle(0, 0, 50, 64)
    entries = [
        boxed(12, 1, [35, 20, 70, 60], segmentation=rle_of(mask), mask_weight=0.25, mask_known=rle_of(known)),
        boxed(900, 2, [5.2, 5, 30, 50], segmentation=[[6, 6, 29, 6, 29, 49]], category_id=77),  # by its box
        boxed(22, 2, [1, 40, 20, 60], segmentation=rle_of(rectangle(2, 41, 18, 58))),  # another object's id
        boxed(901, 1, [50, 0, 60, 9], segmentation=rle_of(rectangle(51, 1, 59, 8))),  # nobody's
        boxed(902, 1, [10, 10, 40, 40]),  # no mask
    ]
    found = imported(files, entries)
    first, second = found.of(0), found.of(1)
    assert first.keys() == {12}
    assert (decoded(first[12].rle_counts) == mask).all()
    assert first[12].weight == 0.25
    known_counts = first[12].known_counts
    assert known_counts is not None
    assert (decoded(known_counts) == known).all()
    assert second.keys() == {21}
    assert second[21].weight == 1
    assert second[21].known_counts is None
    assert decoded(second[21].rle_counts).sum() > 300
    words = "pseudo masks for 2 of 4 objects; 2 of the file's 4 masks belong to none of them"
    assert found.summary.endswith(words)


def test_a_mask_is_cut_to_its_box(files: CocoFiles) -> None:
    found = imported(files, [boxed(11, 1, [10, 10, 40, 40], segmentation=rle_of(rectangle(5, 15, 38, 44)))])
    assert (decoded(found.of(0)[11].rle_counts) == rectangle(10, 15, 38, 40)).all()


def test_images_are_known_by_their_names_whatever_their_ids(files: CocoFiles) -> None:
    names = [image["file_name"] for image in files.content["images"]]
    images = [{"id": f"x{n}", "file_name": f"elsewhere\\{name}"} for n, name in enumerate(names)]
    entry = boxed(1, 0, [5, 5, 30, 50], segmentation=rle_of(rectangle(6, 6, 28, 40)))
    found = imported(files, [{**entry, "image_id": "x1"}], images=images)
    assert found.of(0) == {}
    assert found.of(1).keys() == {21}


def test_images_of_one_name_in_different_folders_are_not_mixed_up(tmp_path: Path) -> None:
    """Whatever the ids: each mask is as wide as its image's number says."""
    files = make_coco(tmp_path, sizes_hw=[SIZE, SIZE], annotations=[boxed(n, n, [0, 0, 40, 40]) for n in (1, 2)])
    for folder in ("a", "b"):
        (files.images / folder).mkdir()
        (files.images / ("001.png" if folder == "a" else "002.png")).rename(files.images / folder / "1.png")

    def rename(content: dict[str, Any]) -> None:
        for image, folder in zip(content["images"], "ab", strict=True):
            image["file_name"] = f"{folder}/1.png"

    files = files.rewrite(rename)
    masks = {"a": rle_of(rectangle(0, 0, 10, 30)), "b": rle_of(rectangle(0, 0, 20, 30))}
    for ids in ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 11, "b": 12}):
        images = [{"id": ids[folder], "file_name": f"./{folder}/1.png"} for folder in "ab"]
        entries = [boxed(50 + ids[folder], ids[folder], [0, 0, 40, 40], segmentation=masks[folder]) for folder in "ab"]
        found = imported(files, entries, images=images)
        widths = [int(decoded(next(iter(found.of(n).values())).rle_counts).any(0).sum()) for n in (0, 1)]
        assert widths == [10, 20], ids
    entry = boxed(9, 5, [0, 0, 40, 40], segmentation=masks["a"])
    alone = imported(files, [entry], images=[{"id": 5, "file_name": "a/1.png"}])
    assert (len(alone.of(0)), len(alone.of(1))) == (1, 0)
    with pytest.raises(UserError, match="none of its 1 images"):  # which of the two it is cannot be known
        imported(files, [], images=[{"id": 1, "file_name": "1.png"}])


def test_an_annotation_id_stands_once(files: CocoFiles) -> None:
    entry = boxed(12, 1, [35, 20, 70, 60], segmentation=rle_of(rectangle(38, 25, 60, 55)))
    with pytest.raises(UserError, match=r"annotations\[1\]: annotation id 12 is used twice"):
        imported(files, [entry, entry])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mask_weight": 1.2}, r"annotation 12: 'mask_weight' is '1.2', allowed: a number from 0 to 1"),
        ({"mask_weight": "high"}, r"annotation 12: 'mask_weight' is 'high', allowed"),
        ({"segmentation": rle_of(np.ones((3, 4)))}, r"annotation 12: RLE has size \[3, 4\], allowed"),
        ({"mask_known": rle_of(np.ones((3, 4)))}, r"annotation 12: mask_known: RLE has size \[3, 4\], allowed"),
        (
            {"segmentation": rle_of(rectangle(0, 0, 30, 30))},
            r"annotation 12: only 0 of the 900 pixels of its mask are in the box of its object, \[35.0, 20.0",
        ),
        ({"bbox": [1, 2]}, r"annotation 12: 'bbox' is \[1, 2\], allowed: four numbers"),
        ({"bbox": [10**400, 0, 1, 1]}, r"annotation 12: 'bbox' is .*, allowed: four numbers"),
        ({"mask_known": {}}, r"annotation 12: mask_known: is empty, allowed: polygons or an RLE"),
        ({"mask_known": 5}, r"annotation 12: mask_known: the mask is neither"),
        ({"image_id": None}, r"annotations\[0\] is no object with 'image_id', each a number or a text"),
        ({"image_id": [1]}, r"annotations\[0\] is no object with 'image_id', each a number or a text"),
        ({"id": {}}, r"annotations\[0\] is no object with 'id', each a number or a text"),
        ({"image_id": "1"}, r"none of its 1 masks belongs to one of the 4 objects of .*, by annotation id or by box"),
        ({"segmentation": None}, r"none of its 0 masks belongs to one of the 4 objects"),
        ({"iscrowd": 1}, r"none of its 0 masks belongs to one of the 4 objects"),
    ],
)
def test_a_file_that_does_not_fit_is_a_sentence(files: CocoFiles, change: dict[str, Any], sentence: str) -> None:
    entry = boxed(12, 1, [35, 20, 70, 60], segmentation=rle_of(rectangle(38, 25, 60, 55)))
    with pytest.raises(UserError, match=sentence):
        imported(files, [{**entry, **change}])
    assert not list((files.annotations.parent / "arrow").glob("pseudo-*"))


def test_a_file_of_other_images_is_a_sentence(files: CocoFiles) -> None:
    images = files.content["images"]
    with pytest.raises(UserError, match=r"none of its 1 images is one of the 2 of .*instances.json"):
        imported(files, [], images=[{"id": 1, "file_name": "other.jpg"}])
    with pytest.raises(UserError, match=r"no list 'images'; needed: images, annotations"):
        imported(files, [], images=None)
    with pytest.raises(UserError, match=r"image 1 \(001.png\): 'height' is 63, allowed: 64, as in"):
        imported(files, [], images=[{**images[0], "height": 63}, images[1]])
    (path := files.images / "lists.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match=r"no list 'annotations'; needed: images, annotations"):
        load_pseudo(path, table_of(files), cache=files.images)
    with pytest.raises(UserError, match=r"no such file of pseudo masks; 'semiseg pseudo' makes one"):
        load_pseudo(files.images / "nothing.json", table_of(files), cache=files.images)


def test_only_instances_with_a_box_alone_get_one(files: CocoFiles) -> None:
    row = table_of(files).rows[0]
    given = {key: PseudoMask(b"mask%d" % key, 0.5, None) for key in (11, 12, 21)}
    names, source = ("cat", "dog"), build_rule("as_annotated", None)
    mixed = withhold(row["objects"], class_names=names, rule=source, pseudo=given)
    assert mixed.supervision == [Supervision.MASK, Supervision.PSEUDO]
    assert mixed.masks[1] == b"mask12"
    assert mixed.mask_weight == [1.0, 0.5]
    alone = withhold(row["objects"], class_names=names, rule=build_rule("boxes", None), pseudo=given)
    assert alone.masks == [b"mask11", b"mask12"]
    none = withhold(row["objects"], class_names=names, rule=source, pseudo={})
    assert none.supervision == [Supervision.MASK, Supervision.BOX]


@pytest.mark.parametrize("stride", [2, None])
def test_unknown_cells_reach_the_batch(files: CocoFiles, stride: int | None) -> None:
    known = rectangle(0, 0, 50, 64)
    entry = boxed(12, 1, [35, 20, 70, 60], segmentation=rle_of(rectangle(38, 25, 60, 55)), mask_known=rle_of(known))
    dataset = InstanceDataset(
        table_of(files),
        rule=build_rule("as_annotated", None),
        transform=Resize([64], 128, flip=1.0),
        mask_stride=stride,
        pseudo=imported(files, [entry]),
    )
    targets = dataset.batch([(0, 3)], size_divisor=32).targets
    assert targets is not None
    assert targets.supervision.tolist() == [Supervision.MASK, Supervision.PSEUDO]
    mirrored = torch.from_numpy(known[:, ::-1].copy())
    if stride is not None:
        assert targets.mask_known is not None
        assert targets.mask_known[0, :32, :40].all()
        assert torch.equal(targets.mask_known[1, :32, :40], mirrored[1::2, 1::2])
    else:
        grid = Regions(torch.tensor([[0.0, 0, 80, 64]]).expand(2, 4), (64, 80))
        both = targets.known_on(grid)
        assert both is not None
        assert both[0].all()
        assert torch.equal(both[1], mirrored)
    plain = replace(dataset, pseudo=None).batch([(0, 3)], size_divisor=32).targets
    assert plain is not None
    assert plain.mask_known is None
    assert plain.encoded_known is None


# making --------------------------------------------------------------------------------------------------------------


def made(files: CocoFiles, name: str, maker: Any = "grabcut", **options: Any) -> dict[str, Any]:
    out = files.annotations.with_name(name)
    make_pseudo(table_of(files), out, maker=maker, progress=False, **options)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.mark.parametrize("maker", ["grabcut", "crf"])
def test_masks_are_made_of_boxes_alone(files: CocoFiles, maker: str) -> None:
    content = made(files, "one.json", maker)
    assert [each["id"] for each in content["annotations"]] == [11, 12, 21, 22]
    for each in content["annotations"]:
        mask, (x0, y0, x1, y1) = rle_codec.decode({**each["segmentation"]}), BOXES[each["id"]][1]
        assert mask.sum() == each["area"] > 0
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert each["mask_weight"] == 1
        assert each["mask_source"] in (maker, "box")

    def poison(content: dict[str, Any]) -> None:
        for number, each in enumerate(content["annotations"]):
            each |= {"segmentation": rle_of(np.random.default_rng(number).random(SIZE) < 0.3), "area": 5}

    files.rewrite(poison)
    assert made(files, "two.json", maker) == content
    found = load_pseudo(files.annotations.with_name("one.json"), table_of(files), cache=files.annotations.parent)
    assert "pseudo masks for 4 of 4 objects" in found.summary


def test_an_interruption_loses_the_images_at_hand_alone(
    files: CocoFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = made(files, "whole.json")
    of_row = making._of_row
    looked_at: list[int] = []

    def stopped(table: Table, index: int, make: Any) -> Any:
        looked_at.append(index)
        if index == 1 and len(looked_at) < 3:
            raise KeyboardInterrupt
        return of_row(table, index, make)

    monkeypatch.setattr(making, "_of_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(files, "cut.json", workers=1)
    part = tmp_path / "cut.json.part"
    assert not (tmp_path / "cut.json").exists()
    with part.open("a") as file:
        file.write('[[12, "half a li')  # as a power cut leaves it
    with pytest.raises(UserError, match=r"cut\.json\.part: was begun with other data, another maker or model, or by"):
        made(files, "cut.json", "crf")
    looked_at.append(-1)
    assert made(files, "cut.json", workers=1) == whole
    assert looked_at.count(0) == 1  # was not made again
    assert not part.exists()
    with pytest.raises(UserError, match="is there already"):
        made(files, "cut.json")


def test_a_part_of_somebody_else_is_left_alone(files: CocoFiles) -> None:
    for text in ("my own notes", '{"maker": 1}\n', "\n"):
        part = files.annotations.with_name("mine.json.part")
        part.write_text(text)
        with pytest.raises(UserError, match=r"mine\.json\.part: was begun .* or by somebody else; remove it first"):
            made(files, "mine.json")
        assert part.read_text() == text
    header = json.dumps({"version": making.FORMAT_VERSION, "annotations": table_of(files).fingerprint})[:20]
    part.write_text(header)  # as a power cut leaves the first line
    assert len(made(files, "mine.json")["annotations"]) == 4


def test_a_full_disk_names_the_file(files: CocoFiles) -> None:
    table_of(files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(UserError, match=r"full\.json\.part: file too large"):
            made(files, "full.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(made(files, "full.json")["annotations"]) == 4


@pytest.mark.skipif(not os.access("/proc", os.W_OK), reason="no folder here takes a file that then cannot be made")
def test_where_no_lock_can_be_made_nobody_is_waited_for(files: CocoFiles) -> None:
    with pytest.raises(UserError, match="/proc: no file can be made there"):
        make_pseudo(table_of(files), Path("/proc/masks.json"), maker="crf", progress=False)


def test_a_file_that_another_process_made_is_not_taken_for_ones_own(
    files: CocoFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = files.annotations.with_name("both.json")

    def first(folder: Path, make: Any, **_: Any) -> bool:
        out.write_text("the other's")
        return False

    monkeypatch.setattr(making, "make_once", first)
    with pytest.raises(UserError, match=r"both\.json: was made by another process meanwhile"):
        made(files, "both.json")
    assert out.read_text() == "the other's"
    out.unlink()
    assert make_pseudo(table_of(files), out, maker="crf", shared=True, progress=False) == {}


def test_a_model_of_other_classes_makes_no_masks(files: CocoFiles, tmp_path: Path) -> None:
    make_model(tmp_path / "model", class_names=("cat", "dog", "wolf"))
    with pytest.raises(UserError, match=r"instances\.json: its classes differ from the model's in bird, fish, wolf"):
        make_pseudo(table_of(files), tmp_path / "x.json", maker=load_model(tmp_path / "model"), progress=False)
    assert not list(tmp_path.glob("x.json*"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.parametrize("head", [*HEADS, *DETECTORS])
def test_a_model_of_any_kind_has_masks_for_given_boxes(root: Path, tmp_path: Path, head: str) -> None:
    config = tiny_config(root, model=model_of(head), optim={"steps": 1})
    execute_run(config, out=tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run", device="cpu")
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes, labels = torch.tensor([[4.0, 6, 40, 50], [20, 20, 60, 58], [9.0, 9, 9.6, 9.5]]), torch.tensor([0, 2, 1])
    found = masks_at_boxes(model, image, boxes, labels, (96, 128))
    assert len(found) == 3
    for probability in found[:2]:
        assert probability is not None
        assert probability.shape == (96, 128)
        assert 0 <= float(probability.min()) <= float(probability.max()) <= 1
    assert masks_at_boxes(model, image, boxes[:0], labels[:0], (64, 64)) == []
    data = build_data(config)
    counts = make_pseudo(data.train, tmp_path / "pseudo.json", maker=model, agree=True, progress=False)
    assert counts.get("model", 0) > 0
    weights = [each.get("mask_weight", 0) for each in json.loads((tmp_path / "pseudo.json").read_text())["annotations"]]
    assert all(0 <= weight <= 1 for weight in weights)


def test_a_models_masks_are_the_mean_over_the_places_it_learns_at(root: Path, tmp_path: Path) -> None:
    """Beside the masks that a training step asks for, of as many positives as it may."""
    config = tiny_config(root)
    step = fresh_step(config)
    (batch,) = first_batches(config, 1)
    assert batch.targets is not None
    first = batch.targets.image_index == 0
    height, width = batch.image_sizes_hw[0].tolist()
    image, boxes, labels = (
        batch.images[0, :, :height, :width],
        batch.targets.boxes_xyxy[first],
        batch.targets.labels[first],
    )
    model = fake_loaded(step.model, config.model)
    found = masks_at_boxes(model, image, boxes, labels, (height, width))
    with torch.no_grad():
        outputs = step.model.eval()(image[None], torch.tensor([[height, width]]))
        for box, label, mine in zip(boxes, labels, found, strict=True):
            alone = making._boxes_alone(box[None], label[None])
            # all instances take part in the assignment, so that only boxes without rivals are compared
            if any(overlap(box, other) for other in boxes if not torch.equal(other, box)):
                continue
            assignment = step.detector.assign(alone, sizes_hw=step.model.level_sizes((height, width)), num_images=1)
            quotas = torch.tensor([min(len(assignment.instance_index), making.MOST_POSITIVES)])
            queries = step.detector.sample(outputs, assignment, alone, quotas, counts=(int(quotas),))
            predicted = step.model.predict_masks(outputs, queries)
            expected = paste_probabilities(predicted.logits, predicted.grid, (height, width), (height, width)).mean(0)
            assert mine is not None
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def overlap(one: Tensor, other: Tensor) -> bool:
    return bool((torch.maximum(one[:2], other[:2]) < torch.minimum(one[2:], other[2:])).all())


def fake_loaded(network: Any, config: Any) -> LoadedModel:
    info: Any = type("Info", (), {"config": config})()
    return LoadedModel(network, info, torch.device("cpu"))


# learning ------------------------------------------------------------------------------------------------------------


def test_a_run_makes_the_masks_that_it_names_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(root, supervision={"pseudo": "grabcut", "source": "boxes", "split": None})
    data = build_data(config)
    assert data.pseudo is not None
    monkeypatch.setattr(making, "_of_row", lambda *_: pytest.fail("made again"))
    assert build_data(config).pseudo is not None
    (path,) = (cache_folder(config.data).parent / "pseudo").glob("*.json")
    content = path.read_text()
    for changed in (content.replace('"mask_weight": 1.0', '"mask_weight": 0.0', 1), content[:-10], "{}"):
        path.write_text(changed)
        with pytest.raises(UserError, match=r"grabcut-\w+\.json: was changed since it was made; remove it"):
            build_data(config)
    path.write_text(content)
    (batch,) = first_batches(config, 1)
    assert batch.targets is not None
    assert set(batch.targets.supervision.tolist()) == {Supervision.PSEUDO}
    identities = {
        json.dumps(tiny_config(root, **sections).identity(), sort_keys=True)
        for sections in (
            {},
            {"supervision": {"pseudo": "grabcut"}},
            {"supervision": {"pseudo": "crf"}},
            {"supervision": {"pseudo": "crf"}, "objective": {"pseudo": "dice+projection"}},
        )
    }
    assert len(identities) == 4
    unread = tiny_config(root, objective={"pseudo": "dice+projection"})
    assert unread.identity() == tiny_config(root).identity()
    assert not train_dataset(config, data).has_masks()  # none that teaches edges


def test_a_file_is_told_apart_by_its_content(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "masks.json"
    config = tiny_config(root, supervision={"pseudo": str(path)})
    with pytest.raises(UserError, match=r"masks\.json: cannot be read: No such file"):
        config.identity()
    with pytest.raises(UserError, match=r"masks\.json: no such file of pseudo masks"):
        build_data(config)
    found = []
    for content in ("1", "2"):
        path.write_text(content)
        found.append(config.identity())
    assert found[0] != found[1]


def test_a_mask_of_no_weight_teaches_nothing(root: Path) -> None:
    config = tiny_config(root, supervision={"pseudo": "grabcut", "source": "boxes", "split": None})
    module, (batch,) = fresh_step(config), first_batches(config, 1)
    assert batch.targets is not None
    names = [name for name, _ in module.named_parameters() if name.startswith("model.mask_head.")]
    for weight in (1.0, 0.0):
        weights = torch.full_like(batch.targets.mask_weight, weight)
        module.zero_grad()
        losses, _ = losses_and_gradients(module, [replace(batch, targets=replace(batch.targets, mask_weight=weights))])
        gradients = dict(module.named_parameters())
        assert any(bool(gradients[name].grad.any()) for name in names) is (weight > 0)  # type: ignore[union-attr]
        assert bool(torch.isfinite(losses).all())


# command line --------------------------------------------------------------------------------------------------------


def call(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["pseudo", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_verb(files: CocoFiles, tmp_path: Path) -> None:
    data = (files.annotations, files.images)
    said = call(*data, "--maker", "grabcut", "--out", tmp_path / "made.json")
    assert "made.json: " in said
    assert "grabcut" in said or "box" in said
    assert "is there already" in call(*data, "--maker", "grabcut", "--out", tmp_path / "made.json", code=2)
    sentence = "--model, --refine and --agree go with --maker model, which needs --model"
    assert sentence in call(*data, "--maker", "model", "--out", tmp_path / "b.json", code=2)
    assert sentence in call(*data, "--maker", "crf", "--agree", "--out", tmp_path / "b.json", code=2)
    assert "no such annotation file" in call(
        "x.json", files.images, "--maker", "crf", "--out", tmp_path / "b.json", code=2
    )
    assert not (tmp_path / "b.json").exists()
    assert not list(tmp_path.glob("*.part"))
