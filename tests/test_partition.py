"""One COCO json becomes several: every image once, in the shares asked for, what belongs together together."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from semiseg.cli import app
from semiseg.data.partition import divide
from semiseg.errors import UserError


def content(images: int = 100, *, seed: int = 0) -> dict[str, Any]:
    """Images of ten videos; a common class, one in every third image, and a rare one of ten objects."""
    draw = random.Random(seed)
    annotations = [
        {"id": f"{image}-{category}-{n}", "image_id": image, "category_id": category, "bbox": [0, 0, 5, 5]}
        for image in range(images)
        for category, count in ((1, draw.randint(0, 4)), (2, image % 3 == 0), (3, image % 10 == 5))
        for n in range(int(count))
    ]
    entries = [{"id": n, "file_name": f"{n}.jpg", "video": f"v{n % 10}", "licence": 3} for n in range(images)]
    classes = [{"id": key, "name": name} for key, name in enumerate(("common", "other", "rare"), start=1)]
    return {"info": {"year": 2026}, "images": entries, "annotations": annotations, "categories": classes}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content()))
    return path


def test_every_image_is_in_one_part_with_its_annotations(file: Path) -> None:
    whole = content()
    for shares in ([0.8, 0.2], [0.25] * 4, [0.5, 0.3, 0.2]):
        pairs = divide(file, shares, seed=3)
        assert [len(own["images"]) for _, own in pairs] == pytest.approx([100 * share for share in shares], abs=1)
        assert sorted(entry["id"] for _, own in pairs for entry in own["images"]) == list(range(100))
        for others, own in pairs:
            for part in (others, own):
                ids = {entry["id"] for entry in part["images"]}
                assert part["images"] == [entry for entry in whole["images"] if entry["id"] in ids]
                assert part["annotations"] == [each for each in whole["annotations"] if each["image_id"] in ids]
                assert (part["info"], part["categories"]) == (whole["info"], whole["categories"])
            assert len(others["images"]) + len(own["images"]) == 100
    assert divide(file, [0.8, 0.2], seed=3) == divide(file, [0.8, 0.2], seed=3)
    assert divide(file, [0.8, 0.2], seed=3) != divide(file, [0.8, 0.2], seed=4)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share(file: Path, seed: int) -> None:
    whole = Counter(each["category_id"] for each in content()["annotations"])
    for shares in ([0.8, 0.2], [0.2] * 5):
        for share, (_, own) in zip(shares, divide(file, shares, seed=seed, by_class=True), strict=True):
            found = Counter(each["category_id"] for each in own["annotations"])
            for key, count in whole.items():
                assert abs(found[key] - share * count) <= 3, (share, key)  # of 2 on average in an image
            assert abs(len(own["images"]) - share * 100) <= 10


def test_what_belongs_together_stays_together(file: Path) -> None:
    for by_class in (False, True):
        parts = [own for _, own in divide(file, [0.7, 0.3], seed=1, group="video", by_class=by_class)]
        videos = [{entry["video"] for entry in part["images"]} for part in parts]
        assert not videos[0] & videos[1]
        assert [len(each) for each in videos] == [7, 3]
    with pytest.raises(UserError, match=r"its 10 values of 'video' are too few for a part of 0\.01"):
        divide(file, [0.99, 0.01], seed=0, group="video")
    with pytest.raises(
        UserError, match=r"images\[0\]: has no 'patient' by which to group, .*; there are: id, file_name"
    ):
        divide(file, [0.5, 0.5], seed=0, group="patient")


def test_what_is_no_such_file_is_a_sentence(file: Path) -> None:
    for change, sentence in (
        ({"annotations": [{"id": 1, "image_id": 400}]}, r"all\.json: annotations\[0\] is of no image of the file"),
        ({"annotations": [3]}, r"annotations\[0\] is of no image"),
        ({"annotations": [{"id": 1, "image_id": []}]}, r"annotations\[0\] is of no image"),
        ({"images": [{"id": 1}, {"id": 1}]}, r"images\[1\]: image id 1 is used twice"),
        ({"images": [7]}, r"images\[0\] is no object with 'id'"),
        ({"images": []}, r"the list 'images' is empty"),
    ):
        file.write_text(json.dumps({**content(), **change}))
        with pytest.raises(UserError, match=sentence):
            divide(file, [0.8, 0.2], seed=0)


def test_the_verb(file: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["data", "split", str(file), *arguments])
        return result.exit_code, result.output

    assert call()[0] == 0
    ids = [
        {entry["id"] for entry in json.loads(file.with_name(f"all_{name}.json").read_text())["images"]}
        for name in ("train", "val")
    ]
    assert (len(ids[0]), len(ids[1])) == (80, 20)
    assert ids[0] | ids[1] == set(range(100))
    assert "all_train.json: is there already; --force replaces it" in call()[1]
    assert call("--force", "--seed", "1")[0] == 0
    assert call("--folds", "5", "--by-class", "--out", str(file.parent / "folds"))[0] == 0
    seen: list[int] = []
    for number in range(1, 6):
        pair = [
            json.loads((file.parent / "folds" / f"all_fold{number}_{name}.json").read_text())
            for name in ("train", "val")
        ]
        train, val = ([entry["id"] for entry in part["images"]] for part in pair)
        assert not set(train) & set(val)
        seen += val
    assert sorted(seen) == list(range(100))
    assert "give one of the two" in call("--val", "0.2", "--folds", "3")[1]
    assert "--val 1: allowed: a share above 0 and below 1" in call("--val", "1")[1]
    assert file.read_text() == json.dumps(content())
