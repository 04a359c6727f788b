"""Class splits: by name, complement, mask fractions, errors that help, and where named files are found."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from semiseg.commands.known_classes import COCO_CLASSES
from semiseg.data.shapes import SHAPES_CLASSES
from semiseg.errors import UserError
from semiseg.files import write_text
from semiseg.project import available, find, packaged_root
from semiseg.splits import ClassSplit, SplitFile, draw_seen, load_split, make_split, write_split

CLASSES = ("cat", "dog", "potted plant", "café")


def made(name: str, classes: tuple[str, ...] = CLASSES, **values: Any) -> ClassSplit:
    return make_split(SplitFile.model_validate({"name": name, **values}), classes)


def load(tmp_path: Path, text: str, classes: tuple[str, ...] = CLASSES) -> ClassSplit:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_split(str(path), classes)


def test_the_other_side_is_the_complement(tmp_path: Path) -> None:
    by_seen = load(tmp_path, 'seen = ["dog", "cat"]')
    by_unseen = load(tmp_path, 'name = "other"\nunseen = ["café", "potted plant"]')
    assert by_seen.seen == by_unseen.seen == ("cat", "dog")
    assert by_seen.unseen == by_unseen.unseen == ("potted plant", "café")
    assert (by_seen.name, by_unseen.name) == ("mine", "other")
    assert by_seen.digest() == by_unseen.digest()
    assert by_seen.keeps_mask("cat", 7)
    assert not by_seen.keeps_mask("café", 7)


def test_both_sides_must_be_exactly_the_classes(tmp_path: Path) -> None:
    whole = 'seen = ["cat"]\nunseen = ["dog", "potted plant", "café"]'
    assert load(tmp_path, whole).digest() == load(tmp_path, 'seen = ["cat"]').digest()
    with pytest.raises(UserError, match=r"mine\.toml: class 'café' is neither seen nor unseen"):
        load(tmp_path, 'seen = ["cat"]\nunseen = ["dog", "potted plant"]')


def test_names_compare_after_nfc_and_trimming(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert decomposed != "café"
    split = load(tmp_path, f'seen = ["  {decomposed} "]')
    assert split.seen == ("café",)
    other = load(tmp_path, 'seen = ["café"]', classes=(*CLASSES[:3], f" {decomposed}"))
    assert other.seen == ("café",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('seen = ["cat"]\nunseen = ["cat", "dog"]', r"class 'cat' is both seen and unseen"),
        ('seen = ["Potted_Plant"]', r"unknown class 'Potted_Plant'\. Did you mean 'potted plant'\? Allowed: cat, dog"),
        ('unseen = ["CAT"]', r"'unseen': unknown class 'CAT'\. Did you mean 'cat'\?"),
        ('seen = ["zebra"]', r"unknown class 'zebra'\. Allowed: cat, dog, potted plant, café"),
        ("seen = []", r"'seen' is empty"),
        ('seen = ["cat", "dog", "potted plant", "café"]', r"'unseen' would be empty"),
        ('seen = ["cat", "cat "]', r"'seen': class 'cat' is listed twice"),
        (
            'dataset = "x"\nseen = ["a", "b"]',
            r"none of its 2 classes .* another data set \(the split is written for x\)\?",
        ),
        ('name = "a"', r"lists neither 'seen' nor 'unseen' classes and has no \[fraction\] table"),
        ('sen = ["cat"]', r"unknown key 'sen'\. Did you mean 'seen'\?"),
        ("[fraction]\ncat = 1.5", r"fraction of 'cat' is 1\.5; allowed are 0 to 1"),
        ('[fraction]\ncat = "x"', r"'fraction\.cat': .* valid number \(value: 'x'\)"),
        ("[fraction]\nseed = 0.5", r"'fraction\.seed': .* valid integer.* \(value: 0\.5\)"),
        ("[fraction]\ndefault = " + "1" * 5000, r"not valid TOML"),
        ("[fraction]\ndefault = 0x" + "f" * 5000, r"'fraction\.default': allowed: integers of at most 64 bits"),
        ("[fraction]\nDog = 0.5", r"'fraction': unknown class 'Dog'\. Did you mean 'dog'\?"),
        ("[fraction]\ndefault = 0", r"every fraction is 0"),
        (
            'seen = ["cat"]\n[fraction]\ndog = 0.5',
            r"class 'dog' is unseen but its mask fraction is 0\.5; list it",
        ),
        ('seen = ["cat"]\n[fraction]\ncat = 0', r"class 'cat' is seen but its mask fraction is 0"),
    ],
)
def test_errors_name_file_class_and_allowed_names(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=r"mine\.toml.*" + told):
        load(tmp_path, text)


def test_fractions_are_nested_and_of_the_right_size() -> None:
    def kept(fraction: float, seed: int = 0) -> set[int]:
        split = made("f", fraction={"cat": fraction, "seed": seed})
        return {number for number in range(20_000) if split.keeps_mask("cat", number)}

    few, many = kept(0.1), kept(0.3)
    assert few < many
    # Binomial standard deviation of the share: sqrt(0.3 * 0.7 / 20000) = 0.0032.
    assert len(many) / 20_000 == pytest.approx(0.3, abs=0.013)
    assert len(kept(0.3, seed=1) & many) / 20_000 == pytest.approx(0.09, abs=0.01)
    assert kept(1.0) == set(range(20_000))


def test_the_hash_is_the_documented_one() -> None:
    """The digits are part of published splits: another hash would be another split under the same name."""
    split = made("f", fraction={"dog": 0.25, "seed": 3})
    for number in range(200):
        value = int.from_bytes(hashlib.blake2b(f"3:{number}".encode(), digest_size=8).digest(), "big")
        assert split.keeps_mask("dog", number) == (value / 2**64 < 0.25)


def test_a_pure_fraction_split_sees_every_class_with_masks(tmp_path: Path) -> None:
    split = load(tmp_path, "[fraction]\nseed = 5\ndefault = 0.3\ncat = 1.0\ndog = 0")
    assert split.seen == ("cat", "potted plant", "café")
    assert split.unseen == ("dog",)
    assert split.seed == 5
    assert split.fractions == {"cat": 1.0, "dog": 0.0, "potted plant": 0.3, "café": 0.3}


def test_digest_covers_what_decides_and_nothing_else() -> None:
    base = made("a", seen=["cat", "dog"])
    assert made("b", CLASSES[::-1], seen=["dog", "cat"], fraction={"seed": 9}).digest() == base.digest()
    assert made("a", seen=["cat"]).digest() != base.digest()
    drawn = [made("a", seen=["cat", "dog"], fraction={"default": 0.5, "seed": seed}) for seed in (0, 1)]
    assert len({split.digest() for split in (base, *drawn)}) == 3


@pytest.mark.parametrize(
    "split",
    [
        made("x", seen=["café", "cat"], dataset="pets"),
        made("x", unseen=["dog"], dataset="pets", drawn={"seed": 4, "seen": 3}),
        made("x", fraction={"cat": 0.1, "default": 0.5, "seed": 7}),
        made("x", seen=["cat", "dog"], fraction={"cat": 0.25, "seed": 2}),
    ],
    ids=["names", "drawn", "fractions", "names and fractions"],
)
def test_what_is_written_is_what_is_read(tmp_path: Path, split: ClassSplit) -> None:
    write_split(split, tmp_path / "x.toml")
    assert load_split(str(tmp_path / "x"), CLASSES) == split


def test_draws_are_nested_and_independent_of_order() -> None:
    three, nine = (draw_seen(SHAPES_CLASSES, count=count, seed=0) for count in (3, 9))
    assert set(three) < set(nine)
    assert sorted(draw_seen(SHAPES_CLASSES[::-1], count=3, seed=0)) == sorted(three)
    assert len({tuple(draw_seen(COCO_CLASSES, count=20, seed=seed)) for seed in range(10)}) == 10
    for count in (0, 12):
        with pytest.raises(UserError, match="expected a number from 1 to 11"):
            draw_seen(SHAPES_CLASSES, count=count, seed=0)


@pytest.mark.parametrize(("name", "count"), [("shapes_few_seen", 3), ("shapes_many_seen", 9)])
def test_the_shipped_shapes_splits_repeat_their_draw(name: str, count: int) -> None:
    split = load_split(name, SHAPES_CLASSES)
    assert len(SHAPES_CLASSES) == 12
    assert list(split.seen) == draw_seen(SHAPES_CLASSES, count=count, seed=0)
    assert (len(split.seen), split.drawn_seed) == (count, 0)


def test_the_shipped_coco_splits_are_each_others_complement() -> None:
    assert len(set(COCO_CLASSES)) == 80
    voc, rest = load_split("coco_voc20_seen", COCO_CLASSES), load_split("coco_nonvoc60_seen", COCO_CLASSES)
    assert (len(voc.seen), len(voc.unseen)) == (20, 60)
    assert (voc.seen, voc.unseen) == (rest.unseen, rest.seen)
    # VOC's own names are aeroplane, motorbike, sofa, pottedplant, diningtable, tvmonitor.
    assert {"airplane", "motorcycle", "couch", "potted plant", "dining table", "tv"} < set(voc.seen)
    assert "truck" in voc.unseen


def test_a_name_is_a_path_then_of_the_project_then_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("splits", "coco_voc20_seen") == packaged_root() / "splits" / "coco_voc20_seen.toml"
    write_text(tmp_path / "splits" / "coco_voc20_seen.toml", 'seen = ["cat"]')
    assert find("splits", "coco_voc20_seen") == Path("splits/coco_voc20_seen.toml")
    write_text(tmp_path / "coco_voc20_seen.toml", 'seen = ["dog"]')
    assert find("splits", "coco_voc20_seen") == Path("coco_voc20_seen.toml")
    assert load_split("coco_voc20_seen", CLASSES).seen == ("dog",)
    assert available("splits").count("coco_voc20_seen") == 1
    with pytest.raises(UserError, match=r"coco_voc20: no such class split.*Did you mean 'coco_voc20_seen'\?.*shapes"):
        find("splits", "coco_voc20")


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]
