"""Strict configuration: unknown keys, wrong types and impossible values are sentences; the identity of a run."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tomlkit import string as toml_string

from semiseg.config import RunConfig, load_run_config, parse_run
from semiseg.config.model import FPNNeck
from semiseg.config.read import apply_overrides, digest, merge, parse_config, read_toml
from semiseg.errors import UserError


def parse(values: dict[str, Any]) -> RunConfig:
    return parse_config(RunConfig, values, where="run.toml")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optmi": {}}, r"unknown key 'optmi'\. Did you mean 'optim'\?"),
        (
            {"optim": {"steps": 5, "learnig_rate": 0.1}},
            r"unknown key 'optim\.learnig_rate'\. Did you mean 'learning_r",
        ),
        ({"data": {"shapes": {"imagesize": 64}}}, r"unknown key 'data\.shapes\.imagesize'\. Did you mean 'image_size'"),
        ({"data": {"zzz": 1}}, r"unknown key 'data\.zzz'\. Allowed here: format, root, "),
        ({"seed": "1"}, r"'seed': .*integer.* \(value: '1'\)"),
        ({"data": {"flip": 1.5}}, r"'data\.flip': .*less than or equal to 1.* \(value: 1\.5\)"),
        ({"data": {"short_sides": [0]}}, r"'data\.short_sides\.0': .*greater than or equal to 32"),
        ({"model": {"backbone": {"kind": "vgg"}}}, r"'model\.backbone\.kind': .*'small', 'timm' \(value: 'vgg'\)"),
        ({"model": {"backbone": {"kind": ["vgg"]}}}, r"'model\.backbone\.kind': .*'resnet', 'small'"),
        ({"model": {"neck": 3}}, r"'model\.neck' is a table of its own now \(value: 3\)"),
        ({"model": {"backbone": {"resnet": {"depth": 18}}}}, r"unknown key 'model\.backbone\.resnet'"),
        ({"model": {"backbone": {"depth": 20}}}, r"'model\.backbone\.depth': .*18, 34, 50 or 101.* \(value: 20\)"),
        ({"model": {"neck": {"repeats": 2}}}, r"unknown key 'model\.neck\.repeats'\. Kind 'bifpn' reads it, not 'fpn'"),
        ({"model": {"neck": {"chanels": 2}}}, r"unknown key 'model\.neck\.chanels'\. Did you mean 'channels'"),
        ({"optim": {}}, r"give exactly one of 'steps' and 'epochs'"),
        ({"optim": {"steps": 5, "epochs": 1.0}}, r"give exactly one of 'steps' and 'epochs'"),
        ({"optim": {"steps": 5, "batch_size": 4, "accumulation": 3}}, r"batch_size 4 must divide by accumulation 3"),
        ({"supervision": {"source": "split"}}, r"source = 'split' needs 'split'"),
        ({"model": {"detector": {"strides": [8, 16, 32]}}}, r"level_ranges needs 2 values for 3 strides"),
        ({"model": {"detector": {"strides": [8, 16, 48], "level_ranges": [64, 128]}}}, r"twice the one before"),
        ({"model": {"detector": {"level_ranges": [64, 32, 256, 512]}}}, r"level_ranges must ascend"),
        ({"model": {"mask_head": {"feature_stride": 8, "stride": 3}}}, r"multiple of stride"),
        ({"model": {"neck": {"channels": 48}}}, r"neck.channels must divide by detector.tower_groups"),
        (
            {"model": {"backbone": {"kind": "small", "weights": "imagenet"}}},
            r"'small' has no ImageNet weights: set",
        ),
        ({"model": {"pixel_std": [1.0, 1.0, 0.0]}}, r"'model\.pixel_std\.2': .*greater than 0"),
    ],
)
def test_errors_are_sentences_with_place_value_and_the_nearest_key(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=r"^run\.toml: .*" + told):
        parse(values)


def test_random_weights_are_not_frozen_unless_another_run_gives_the_first_ones() -> None:
    values = {"model": {"backbone": {"weights": "random", "frozen_stages": 1}}}
    with pytest.raises(UserError, match=r"^run\.toml: model\.backbone\.frozen_stages > 0 would freeze random weights"):
        parse_run(values, where="run.toml")
    assert parse_run(values, where="run.toml", initial_run=True).init_from is None
    assert parse_run({**values, "init_from": "runs/a/model"}, where="run.toml").model.backbone.frozen_stages == 1


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse({"seeds": 1, "data": {"flip": 2.0}})
    assert "'seeds'. Did you mean 'seed'?" in str(caught.value)
    assert "'data.flip'" in str(caught.value)


def test_the_shortest_run_is_the_papers() -> None:
    config = parse({})
    assert (config.optim.steps, config.optim.batch_size, config.optim.learning_rate) == (90_000, 16, 0.01)
    assert config.model.detector.strides == [8, 16, 32, 64, 128]
    assert config.model.size_divisor == 32


def test_toml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\n[optim]\nsteps = 10\n")
    config = load_run_config(path, ["optim.steps=20", "data.root=/x y", "data.short_sides=[64, 96]", "data.flip = 0.0"])
    assert (config.seed, config.optim.steps, config.data.root) == (3, 20, "/x y")
    assert (config.data.short_sides, config.data.flip) == ([64, 96], 0.0)
    with pytest.raises(UserError, match=r"--set optim\.step=20: unknown key 'optim\.step'\. Did you mean 'steps'"):
        load_run_config(path, ["optim.step=20"])


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("optim.steps", "expected the form a.b=value"),
        ("a..b=1", "the form"),
        ("seed.x=1", "'seed' is a value"),
    ],
)
def test_malformed_overrides(item: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        apply_overrides({"seed": 1}, [item])


def test_overrides_leave_the_original_alone() -> None:
    values = {"optim": {"steps": 1}}
    assert apply_overrides(values, ["optim.steps=2", "runtime.precision=bf16"]) == {
        "optim": {"steps": 2},
        "runtime": {"precision": "bf16"},
    }
    assert values == {"optim": {"steps": 1}}


def test_an_override_is_one_value() -> None:
    """Not a second key behind a line break, and never an exception of the TOML reader."""
    assert apply_overrides({}, ["a=1\nb = 2"]) == {"a": "1\nb = 2"}
    assert apply_overrides({}, ["a=[1,\n2]"]) == {"a": [1, 2]}
    for text in ("[" * 20_000, "9" * 5000):
        assert apply_overrides({}, [f"a={text}"]) == {"a": text}


KEYS = st.text("abc_", min_size=1, max_size=2)
VALUES = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=8) | st.lists(st.integers())
TABLES = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=2), max_size=3)


def as_toml(value: Any) -> str:
    """The value as one types it: JSON's numbers and lists are TOML's, but for infinity."""
    return toml_string(value).as_string() if isinstance(value, str) else json.dumps(value).replace("Infinity", "inf")


@settings(max_examples=30)
@given(TABLES, st.lists(KEYS, min_size=1, max_size=3), VALUES)
def test_an_override_sets_its_key_and_nothing_else(table: dict[str, Any], path: list[str], value: Any) -> None:
    before, item = copy.deepcopy(table), f"{'.'.join(path)}={as_toml(value)}"
    expected: Any = copy.deepcopy(table)
    there = expected
    for key in path[:-1]:
        there = there.setdefault(key, {})
        if not isinstance(there, dict):
            with pytest.raises(UserError, match="is a value, not a table"):
                apply_overrides(table, [item])
            return
    there[path[-1]] = value
    assert apply_overrides(table, [item]) == apply_overrides(expected, [item]) == expected
    assert table == before


@settings(max_examples=30)
@given(TABLES, st.lists(st.text(max_size=12), max_size=3))
def test_any_text_is_an_override_or_a_sentence(table: dict[str, Any], items: list[str]) -> None:
    with suppress(UserError):
        apply_overrides(table, items)


def test_merge_replaces_lists_whole_and_tables_by_key() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(base, {"a": {"y": [3]}, "c": {"z": 1}}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": {"z": 1}}
    assert base["a"] == {"x": 1, "y": [1, 2]}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.toml: no such file"):
        read_toml(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match=r"bad\.toml: not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")


def test_the_identity_covers_what_changes_the_numbers() -> None:
    base = digest(parse({}).identity())

    def changed(*overrides: str) -> bool:
        return digest(parse(apply_overrides({"optim": {"steps": 90_000}}, list(overrides))).identity()) != base

    assert not changed()
    for same in (
        ("runtime.workers=7", "runtime.threads=3", "runtime.log_every=1", "runtime.tensorboard=false"),
        ("data.root=/elsewhere", "data.train_images=x", "data.val_annotations=y"),
        ("init_from=/some/model",),
        ("data.shapes.image_size=64",),  # the data are COCO's
        ("supervision.split=any",),  # its content counts, which the caller adds
    ):
        assert not changed(*same), same
    for other in (
        "seed=1",
        "optim.steps=5",
        "objective.affinity_threshold=0.1",
        "inference.nms_threshold=0.5",
        "data.flip=0.0",
        "runtime.precision=bf16",
        "supervision.source=boxes",
        "data.format=shapes",
    ):
        assert changed(other), other


def test_shapes_parameters_are_part_of_the_identity_of_shapes() -> None:
    ids = {
        digest(parse({"data": {"format": "shapes", "shapes": {"train_seed": seed}}}).identity()) for seed in (1, 100)
    }
    assert len(ids) == 2


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, {"c": None}]}) == digest({"b": [1, {"c": None}], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({}, 8)) == 8


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FPNNeck().channels = 3
