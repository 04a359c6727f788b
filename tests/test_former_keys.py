"""Keys of before the parts of a network had tables: errors that name today's; records and folders are still read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semiseg.config import RunConfig, parse_recorded
from semiseg.config.former import FORMER_KEYS, as_recorded, with_present_keys
from semiseg.config.read import apply_overrides, digest, merge, parse_config
from semiseg.engine.checkpoint import read_model_info
from semiseg.engine.run import evaluate_run, execute_run
from semiseg.engine.run_folder import check_folder
from semiseg.errors import UserError
from semiseg.results import read
from semiseg.studies.file import load_study, study_runs
from tests.committed import committed_records
from tests.model_folders import make_model
from tests.tiny import nested, tiny_config

RECORDS = committed_records()


def recorded_lines() -> list[dict[str, Any]]:
    """The committed records as they were written, with the keys of their time."""
    return [json.loads(line) for path in RECORDS for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("former", FORMER_KEYS)
def test_an_old_key_is_an_error_that_names_the_new_one(former: str) -> None:
    value = "bifpn" if former == "model.neck" else 5
    for values, overrides in ((nested({former: value}), ()), ({}, (f"{former}={value}",))):
        source = f"--set {overrides[0]}" if overrides else "run.toml"
        with pytest.raises(UserError) as caught:
            parse_config(RunConfig, values, where="run.toml", overrides=overrides)
        assert str(caught.value).startswith(f"{source}: ")
        assert repr(former) in str(caught.value)
        assert f"It is {FORMER_KEYS[former]!r} now." in str(caught.value)


def test_an_old_backbone_is_a_kind_and_a_depth(tmp_path: Path) -> None:
    told = r"Write model\.backbone\.kind = 'resnet' and model\.backbone\.depth = 101\."
    its_own = r"run.toml: 'model.backbone' is a table of its own now \(value: 'resnet101'\). "
    with pytest.raises(UserError, match=its_own + told):
        parse_config(RunConfig, {"model": {"backbone": "resnet101"}}, where="run.toml")
    study = """
title = "a study"
base = "shapes"
[[rows]]
name = "row"
set.model.backbone = "resnet101"
[[tables]]
name = "table"
title = "a table"
rows = ["row"]
"""
    (tmp_path / "study.toml").write_text(study)
    with pytest.raises(UserError, match=r"row 'row': 'model\.backbone': expected a table of values, not .*" + told):
        study_runs(load_study(str(tmp_path / "study.toml")))


def test_every_committed_record_is_read_under_the_id_that_it_has() -> None:
    lines = recorded_lines()
    of_before = [line for line in lines if isinstance(line["config"]["model"]["backbone"], str)]
    assert len(of_before) > 50, "of before the parts had tables"
    for line in lines:
        config = parse_recorded(line["config"], where="record")
        initial = line["identity"]["init"] is not None
        assert digest(config.identity(initial=initial)) == line["identity"]["config"]
    assert [parse_recorded(dict(run.config), where="") for path in RECORDS for run in read(path)]


def test_todays_keys_are_returned_as_they_are() -> None:
    values = RunConfig().model_dump(mode="json")
    assert with_present_keys(values) is values
    assert with_present_keys({"model": 3}) == {"model": 3}


def former_values(config: RunConfig) -> dict[str, Any]:
    """The configuration as a version of before wrote it."""
    values = config.model_dump(mode="json")
    return {**values, **{name: as_recorded(values, {})[name] for name in ("data", "model")}}


def test_a_model_folder_of_the_first_format_is_read(tmp_path: Path) -> None:
    info = make_model(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    said = json.loads(path.read_text())
    config = parse_config(RunConfig, {"model": said["model"], "inference": said["inference"]}, where="")
    sizes = {name: said["inference"][name] for name in ("short_side", "long_side")}
    del said["inference"]
    first = {**said, "format": 1, "model": former_values(config)["model"], **sizes}
    path.write_text(json.dumps(first))
    assert read_model_info(tmp_path / "model") == info
    for broken, told in (({"model": None}, "'model'"), ({"short_side": -1}, "'inference.short_side'")):
        path.write_text(json.dumps({**first, **broken}))
        with pytest.raises(UserError, match=f"config.json: {told}"):
            read_model_info(tmp_path / "model")


def test_a_run_folder_of_before_is_evaluated_and_continued(tmp_path: Path) -> None:
    config, out = tiny_config(tmp_path / "data", optim={"steps": 1}), tmp_path / "run"
    result = execute_run(config, out=out, progress=False)
    held = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**held, "config": former_values(config)}))
    metrics = evaluate_run(out, progress=False)
    assert metrics is not None
    assert metrics.to_dict() == result["metrics"]
    check_folder(config, out, resume=True)


# -- kinds and sections that are to come ------------------------------------------------------------------------------


def test_a_section_at_its_defaults_is_left_out_of_the_identity() -> None:
    values, changed = RunConfig().model_dump(mode="json"), {"seed": 3}
    usual = as_recorded(values, changed)
    assert set(usual) == {"data", "supervision", "objective", "model", "optim", "seed"}
    assert not any(isinstance(value, dict) for value in usual["model"].values())
    later = {**values, "affinity": {"channels": 32, "weight": 1.0}}
    assert as_recorded(later, changed) == usual
    assert as_recorded(later, {"affinity": {"weight": 2.0}}) == {**usual, "affinity": {"weight": 2.0}}


def test_a_kind_that_came_later_is_named_with_what_is_not_its_default() -> None:
    values = RunConfig().model_dump(mode="json")
    usual = as_recorded(values, {})
    other = merge(values, {"model": {"mask_head": {"kind": "regions", "size": 28, "convs": 4}}})
    found = as_recorded(other, {"model": {"mask_head": {"size": 14}}})
    assert found["model"]["mask_head.kind"] == "regions"
    assert found["model"]["mask_head.size"] == 14
    assert "mask_head.convs" not in found["model"]
    assert digest(found) != digest(usual)


def test_another_kind_begins_its_table_anew() -> None:
    small: dict[str, Any] = {"kind": "small", "widths": [8, 8, 8, 8]}
    base = {"model": {"backbone": small, "neck": {"channels": 16}}}
    other = {"kind": "resnet", "depth": 18}
    assert merge(base, {"model": {"backbone": other}}) == {"model": {"backbone": other, "neck": {"channels": 16}}}
    assert merge(base, {"model": {"backbone": {"kind": "small", "norm": "gn"}}})["model"]["backbone"] == {
        **small,
        "norm": "gn",
    }
    items = ["model.backbone.depth=18", "model.backbone.kind=resnet"]
    for overrides in (items, items[::-1]):
        assert apply_overrides(base, overrides)["model"]["backbone"] == other


@pytest.mark.parametrize("written", [{"channels": 64}, {"kind": "fpn", "channels": 64}])
def test_a_table_that_names_no_kind_is_of_the_usual_one(written: dict[str, Any]) -> None:
    anew = {"model": {"neck": {"kind": "bifpn"}}}
    assert merge({"model": {"neck": written}}, anew) == anew
    assert apply_overrides({"model": {"neck": written}}, ["model.neck.kind=bifpn"]) == anew
    assert apply_overrides({"model": {"neck": written}}, ["model.neck.kind=fpn"])["model"]["neck"]["channels"] == 64
    of_a_row = apply_overrides({"model": {"neck": {"channels": 64}}}, ["model.neck.kind=bifpn"], partial=True)
    assert of_a_row == {"model": {"neck": {"kind": "bifpn", "channels": 64}}}, "laid over a neck that may be one"


@pytest.mark.parametrize(
    ("overrides", "neck"),
    [
        (["model.neck={kind='bifpn',repeats=2}", "model.neck.kind=fpn"], {"kind": "fpn"}),
        (["model.neck.kind=bifpn", "model.neck={channels=8}"], {"channels": 8}),
        (["model={}", "model.neck.kind=bifpn"], {"kind": "bifpn"}),
        (["model.neck.kind=bifpn", "model={}"], None),
        (["model.neck.kind=bifpn", "model.neck.kind=fpn", "model.neck.channels=8"], {"kind": "fpn", "channels": 8}),
    ],
)
def test_of_overrides_the_last_one_holds(overrides: list[str], neck: dict[str, Any] | None) -> None:
    values = apply_overrides({"model": {"neck": {"kind": "fpn", "channels": 64}}}, overrides)
    assert values["model"].get("neck") == neck


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"backbone": "resnetX"}},
        {"model": {"backbone": "vgg"}},
        {"model": {"backbone": "small", "neck": "pan"}},
        {"model": {"backbone": "small", "neck": []}},
        {"model": {"backbone": "small", "detector": 3}},
        {"model": {"backbone": "small"}, "data": 3},
        {"model": {"backbone": "small"}, "data": "val_short_side"},
        {"model": {"backbone": "small"}, "inference": 3},
    ],
    ids=str,
)
def test_a_damaged_record_is_a_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    old = former_values(tiny_config(tmp_path))
    damaged = {**old, **change, "model": {**old["model"], **change["model"]}}
    with pytest.raises(UserError, match=r"^record: "):
        parse_recorded(damaged, where="record")
    for value in ([1], 3, None, "text"):
        with pytest.raises(UserError, match=r"^record: "):
            parse_recorded(value, where="record")  # type: ignore[arg-type]
