"""Provenance and warnings of a report: configurations, classes, and what is said above a table."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from semiseg.config import RunConfig
from semiseg.config.read import merge
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.provenance import differences_section, protocol, provenance, settings, warnings
from semiseg.results import Result, checked, same_validation_data
from tests.page_reader import unpadded
from tests.recorded_runs import recorded_run

ROWS = tuple(ReportRow(name, "", "", f"label of {name}") for name in ("a", "b_<b>"))
TABLE = ReportTable("table6", "T", "few", "d6", ("猫", "dog|s"), ("café",), None, ROWS)
BASE = {
    "data": {"format": "shapes"},
    "model": {"backbone": {"kind": "small"}},
    "optim": {"steps": 90_000},
}


def run(row: str, seed: int = 0, *, held: dict[str, Any] | None = None, **changes: Any) -> Result:
    """A recorded run; `held` is laid over its configuration, `changes` over the record."""
    config = RunConfig.model_validate({**merge(BASE, held or {}), "seed": seed}).model_dump(mode="json")
    recorded = {
        "study": "s",
        "split_digest": "d6",
        "config": config,
        "identity": {"config": "c", "data": "shapes-2", "init": None},
        "seconds": 1800.0,
        "command": ["semiseg", "run", "s"],
    }
    return recorded_run(row, seed, **{**recorded, **changes})


def report_of(*runs: Result, table: ReportTable = TABLE, starts: tuple[Result, ...] = ()) -> ReportInput:
    return ReportInput(
        study="s",
        title="S",
        question="?",
        seeds=tuple(sorted({result.seed for result in runs})),
        tables=(table,),
        results={(table.name, result.row, result.seed): result for result in runs},
        data="",
        schedule="",
        pretraining=None,
        run_command="semiseg run s",
        report_command="semiseg report s",
        pretraining_results=starts,
    )


ALIKE = (run("a"), run("a", 1), run("b_<b>"), run("b_<b>", 1))


def test_nothing_is_warned_of_where_all_is_alike() -> None:
    report = report_of(*ALIKE)
    assert warnings(report) == []
    told = differences_section(report)
    assert told[1:] == ["The rows of table6 have the same configuration but for the seed."]


def test_seeds_that_differ_in_more_than_the_seed_are_named() -> None:
    report = report_of(*ALIKE[:3], run("b_<b>", 1, held={"optim": {"batch_size": 32, "learning_rate": 0.5}}))
    [told] = warnings(report)
    assert told == (
        "**Mixed configurations.** table6: the seeds of `b_<b>` differ in `optim.learning_rate` (`0.01`: seed 0; "
        "`0.5`: seed 1); `optim.batch_size` (`16`: seed 0; `32`: seed 1). Their mean is not that of one configuration."
    )


def test_rows_may_differ_in_supervision_losses_and_what_the_study_varies_only() -> None:
    masks = {"supervision": {"source": "masks"}, "objective": {"box": "none"}}
    assert warnings(report_of(run("a"), run("b_<b>", held=masks))) == []
    faster = {"optim": {"steps": 9}}
    [told] = warnings(report_of(run("a"), run("b_<b>", held={**masks, **faster})))
    assert told == (
        "**Different configurations.** table6: beyond supervision and mask losses its rows differ in `optim.steps` "
        "(`90000`: a; `9`: b\\_&lt;b&gt;). What differs in AP may be due to that."
    )
    varied = replace(TABLE, varied=("optim.steps",))
    assert warnings(report_of(run("a"), run("b_<b>", held=faster), table=varied)) == []
    # How a run is executed is nobody's business, but for the precision.
    assert warnings(report_of(run("a"), run("b_<b>", held={"runtime": {"workers": 9}}))) == []
    [told] = warnings(report_of(run("a"), run("b_<b>", held={"runtime": {"precision": "bf16"}})))
    assert "`runtime.precision` (`no`: a; `bf16`: b" in told


def test_keys_that_an_older_version_did_not_record_have_their_defaults() -> None:
    older = run("a")
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in older.config.items()}
    del config["model"]["neck"]
    assert settings(config) == settings(older.config)
    assert "seed" not in settings(config)
    assert not any(
        key.startswith(("data.root", "data.voc", "data.hub", "data.train_images")) for key in settings(config)
    )
    assert settings({"model": {"unknown": 1}, "seed": 3}) == {"model.unknown": "1"}


def test_the_table_of_differences() -> None:
    long = [640, 672, 704, 736, 768, 800, 832, 864, 896]
    rows = (run("a", held={"optim": {"clip_norm": 2.5}}), run("b_<b>", held={"data": {"short_sides": long}}))
    _, heading, table = differences_section(report_of(*rows))
    assert heading == "Where the rows of table6 differ, beyond the seed:"
    assert re.sub(r"\|:?-[-|: ]*\|", "rule", unpadded(table)) == (
        "| setting | label of a | label of b\\_&lt;b&gt; |\nrule\n"
        "| data.short\\_sides | \\[640, 672, 704, 736, 768, 800\\] | \\[640, 672, 704, 736, 768, 800, 832, 864… |\n"
        "| optim.clip\\_norm | 2.5 | — |\n"
    )
    assert differences_section(report_of(table=TABLE)) == []


def test_what_runs_start_from_is_part_of_it() -> None:
    short, long = (run("pretrain", steps, held={"optim": {"steps": steps}}) for steps in (5, 6))
    first, second = run("a", init_run=short.run_id), run("b_<b>", init_run=long.run_id)
    table = differences_section(report_of(first, second, starts=(short, long)))[2]
    assert unpadded(table).splitlines()[2:] == ["| start.optim.steps | 5 | 6 |"]
    table = differences_section(report_of(first, run("b_<b>"), starts=(short,)))[2]
    assert unpadded(table).splitlines()[2:] == ["| start | pretraining (5 steps) | — |"]


def test_provenance_has_its_parts_and_the_runs_with_their_commands_last() -> None:
    starts = (run("pretrain", split=None, split_digest=None, processes=2),)
    blocks = provenance(report_of(*ALIKE, starts=starts))
    text = unpadded("\n\n".join(blocks))
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    assert headings == [
        "Provenance", "Configuration of the rows", "Classes", "Runs",
    ]  # fmt: skip
    assert "4 runs and 1 of pretraining, 2.5 hours of training and evaluation in all." in text
    assert "- `few` (digest `d6`): 2 seen: 猫, dog\\|s; 1 unseen: café." in text
    lines = unpadded(blocks[-1]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| pretrain-0",
        "| a-0",
        "| a-1",
        *["| b\\_&lt;b&gt;-0", "| b\\_&lt;b&gt;-1"],
    ]
    assert all(line.endswith(" | semiseg run s |") for line in lines[2:])
    alone = "\n\n".join(provenance(report_of(*ALIKE)))
    assert "process hours" not in alone
    unsplit = replace(TABLE, split="", split_digest="", seen=("猫",), unseen=())
    assert "- 1 classes: 猫." in "\n\n".join(provenance(report_of(*ALIKE, table=unsplit)))
    assert "Hours" not in "\n\n".join(provenance(report_of()))


def test_what_lacks_and_what_is_mixed_is_told() -> None:
    alike = [replace(result, val_fingerprint="v") for result in ALIKE]
    mixed = [*alike[:3], replace(alike[3], git_revision="def", device="cpu (1 threads)", data_fingerprint="data2")]
    told = warnings(report_of(*mixed[:2], mixed[3]))
    assert told[0].startswith("**Incomplete.** table6 lacks `b_<b>` seed 0. `semiseg run s` fills them, then")
    assert any(
        text.startswith(
            "**Mixed training data.** `data1`: a (few) seed 0, a (few) seed 1; `data2`: b\\_&lt;b&gt; (few) seed 1"
        )
        for text in told
    )
    for what in ("code (git revisions)", "devices"):
        assert any(text.startswith(f"**Mixed {what}.** ") for text in told)


def test_a_limit_of_detections_that_is_not_cocos_is_told() -> None:
    usual, other = report_of(*ALIKE), [replace(result, metrics={"instances": {}, "max_dets": 300}) for result in ALIKE]
    assert protocol(usual)[1].endswith("percent (pycocotools), on the validation images.")
    told = "percent (pycocotools; the best 300 detections of each image and class, not COCO's 100), on the"
    assert told in protocol(report_of(*other))[1]
    assert warnings(report_of(*other)) == []
    assert any("**Mixed limits of the evaluation" in text for text in warnings(report_of(*ALIKE[:3], other[3])))
    with pytest.raises(UserError, match="'max_dets' is 0, allowed"):
        checked({**asdict(ALIKE[0]), "metrics": {"instances": {}, "max_dets": 0}}, where="line 1")


def test_objects_that_masks_were_not_measured_on_are_told() -> None:
    some = [replace(result, metrics={"instances": {}, "unmasked": 7}) for result in ALIKE]
    told = "on the validation images, without 7 objects that have no mask, in whose boxes masks count for nobody."
    assert protocol(report_of(*some))[1].endswith(told)


def test_splits_that_have_changed_or_are_others() -> None:
    changed = report_of(run("a", split_digest="old"), run("b_<b>", split="splits/few.toml"))
    [told] = warnings(changed)
    assert told.startswith(
        "**Other split.** table6 shows the class groups of `few` (d6), but these runs were trained with masks by "
    )
    assert told.endswith(": `few (old)`: a (few) seed 0.")
    other = report_of(run("a", split="many", split_digest="d7"), run("b_<b>", split=None, split_digest=None))
    [told] = warnings(other)
    assert told.startswith("**Other split.** table6 shows the class groups of `few`")
    assert "`many (d7)`: a (many) seed 0." in told


COCO = {"data": {"format": "coco"}}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (run("a"), run("b"), True),
        (run("a"), run("b", data_fingerprint="data2"), False),
        (run("a", held=COCO), run("b", held=COCO), True),
        (run("a", held=COCO), run("b", held=COCO, data_fingerprint="data2"), False),
        (
            run("a", held=COCO, val_fingerprint="v"),
            run("b", held=COCO, data_fingerprint="data2", val_fingerprint="v"),
            True,
        ),
        (run("a", val_fingerprint="v"), run("b", data_fingerprint="data2", val_fingerprint="w"), False),
        (run("a", held=COCO, val_fingerprint="v"), run("b", held=COCO, data_fingerprint="data2"), False),
    ],
)
def test_same_validation_data(first: Result, second: Result, same: bool) -> None:
    assert same_validation_data(first, second) is same
    assert same_validation_data(second, first) is same
