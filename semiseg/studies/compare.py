"""From finished runs to what a report of them is built from: which are one row, which may stand side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from semiseg.config import RunConfig
from semiseg.config.read import digest, parse_config
from semiseg.data.sources import expected_files
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.provenance import identity_settings, recorded_values, run_settings, unmeant
from semiseg.results import Result, same_validation_data
from semiseg.splits import ClassSplit, load_split
from semiseg.studies.file import StudyRow, load_study
from semiseg.studies.recorded import RecordedRun
from semiseg.studies.words import (
    data_sentence,
    initial_weights_in_words,
    is_paper_data,
    pretraining_sentence,
    row_meaning,
    schedule_sentence,
)

TABLE = "comparison"
NO_SPLIT = "none"


class _Row(NamedTuple):
    """Runs that differ in their seed alone; `name` and `label` are those of the table."""

    name: str
    label: str
    runs: tuple[RecordedRun, ...]
    config: RunConfig


def comparison(
    runs: Sequence[RecordedRun], known: Sequence[RecordedRun], *, split: str | None, command: Sequence[str]
) -> ReportInput:
    """The report of runs side by side.

    Args:
        known: where the runs that these start from are looked up.
        split: name of the class split for the groups, `none` for no groups, None = that of the runs.
        command: what the user typed.

    Raises:
        UserError: validation data or classes differ, or there is no such split.
    """
    classes = _common_classes(runs)
    _require_same_validation_data(runs)
    by_id = {run.result.run_id: run.result for run in known}
    ids = dict.fromkeys(run.result.init_run for run in runs)
    starts = {run_id: by_id[run_id] for run_id in ids if run_id in by_id}
    rows = _rows(runs, starts)
    groups, notes = _class_groups(runs, classes, split)
    configs = [row.config for row in rows]
    table = ReportTable(
        name=TABLE,
        title="The runs side by side",
        split=groups.name if groups else "",
        split_digest=groups.digest() if groups else "",
        seen=groups.seen if groups else classes,
        unseen=groups.unseen if groups else (),
        published=None,
        rows=tuple(_report_row(row) for row in rows),
        alike=_is_alike(rows, list(starts.values())),
    )
    cells = {(TABLE, row.name, run.result.seed): replace(run.result, row=row.name) for row in rows for run in row.runs}
    files = expected_files(configs[0].data)["val"]
    here = files.annotations.is_file() and files.images.is_dir()
    records = dict.fromkeys(str(run.record) for run in runs)
    return ReportInput(
        study=TABLE,
        title=f"Comparison: {', '.join(row.label for row in rows)}",
        question="How do these runs compare, measured on the same validation images?",
        seeds=tuple(sorted({run.result.seed for run in runs})),
        tables=(table,),
        results=cells,
        data=" ".join(dict.fromkeys(data_sentence(config.data) for config in configs)),
        schedule=schedule_sentence(configs),
        pretraining=_pretraining(rows, starts),
        initial=initial_weights_in_words(configs),
        paper_data=is_paper_data(configs[0].data, len(classes)),
        run_command="",
        report_command=shlex.join(command),
        pretraining_results=tuple(starts.values()),
        records=tuple(f"`{record}`" for record in records),
        notes=tuple(notes),
        run_folders={run.result.run_id: run.folder for run in runs if run.folder is not None},
        val_annotations=files.annotations if here else None,
        val_images=files.images if here else None,
    )


def _require_same_validation_data(runs: Sequence[RecordedRun]) -> None:
    """Raises UserError if not all were measured on the same images and objects."""
    same, others = [runs[0]], list(runs[1:])
    while joined := [run for run in others if any(same_validation_data(run.result, item.result) for item in same)]:
        same += joined
        others = [run for run in others if run not in joined]
    if others:
        first, second = runs[0].result, others[0].result
        raise UserError(
            f"{_named(runs[0])} and {_named(others[0])} were not measured on the same validation data, as far as their "
            f"records say ({_data_in_words(first)}; {_data_in_words(second)}), so that their numbers cannot stand side "
            "by side"
        )


def _data_in_words(result: Result) -> str:
    data = result.config.get("data", {})
    if data.get("format") == "shapes":
        shapes = data.get("shapes", {})
        return f"{shapes.get('val_images')} Shapes of seed {shapes.get('val_seed')}, data {result.data_fingerprint}"
    digest_of_val = f"validation {result.val_fingerprint}, " if result.val_fingerprint else ""
    return f"{digest_of_val}data {result.data_fingerprint}"


def _named(run: RecordedRun) -> str:
    return f"{run.result.row!r} seed {run.result.seed} ({run.result.run_id})"


def _common_classes(runs: Sequence[RecordedRun]) -> tuple[str, ...]:
    lists = [tuple(run.result.metrics.get("instances", ())) for run in runs]
    for run, classes in zip(runs, lists, strict=True):
        if classes != lists[0]:
            differing = ", ".join(sorted(set(classes) ^ set(lists[0]))) or "their order"
            raise UserError(f"{_named(runs[0])} and {_named(run)} have different classes: they differ in {differing}")
    return lists[0]


def _rows(runs: Sequence[RecordedRun], starts: Mapping[str, Result]) -> list[_Row]:
    """Runs of one configuration and different seeds are one row, in the order of their first run."""
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        key = _configuration_key(run.result, starts)
        while any(run.result.seed == other.result.seed for other in groups.get(key, ())):
            key += "+"  # the same seed once more, trained anew: a row of its own
        groups.setdefault(key, []).append(run)
    members = [tuple(sorted(group, key=lambda run: run.result.seed)) for group in groups.values()]
    names = _row_names([group[0] for group in members])
    return [_row(name, group) for name, group in zip(names, members, strict=True)]


def _configuration_key(result: Result, starts: Mapping[str, Result]) -> str:
    """Digest of everything that can change the numbers of a run, but for its seed."""
    start = starts.get(result.init_run or "")
    split = result.split_digest if result.config.get("supervision", {}).get("source") == "split" else None
    init = result.identity.get("init") if start is None else _configuration_key(start, starts)
    return digest([identity_settings(result), split, result.data_fingerprint, init])


def _row_names(firsts: Sequence[RecordedRun]) -> list[str]:
    """As recorded; where that does not tell the rows apart, with study and split as far as they differ, or the id."""
    rows = [run.result.row for run in firsts]
    if len(set(rows)) == len(rows):
        return rows
    if len({run.result.study for run in firsts}) > 1:
        rows = [
            f"{run.result.study}: {row}" if run.result.study else row for run, row in zip(firsts, rows, strict=True)
        ]
    if len({run.split for run in firsts}) > 1:
        rows = [f"{row} ({run.split})" if run.split else row for run, row in zip(firsts, rows, strict=True)]
    return [f"{row} {run.short_id}" if rows.count(row) > 1 else row for run, row in zip(firsts, rows, strict=True)]


def _row(name: str, runs: tuple[RecordedRun, ...]) -> _Row:
    result = runs[0].result
    config = parse_config(RunConfig, recorded_values(result), where=f"recorded run {result.run_id}")
    return _Row(name, name.replace(result.row, _label(result)), runs, config)


def _label(result: Result) -> str:
    """What the study calls the row for people, if its file is here."""
    try:
        rows = load_study(result.study).rows if result.study else []
    except UserError:
        rows = []
    label = next((row.label for row in rows if row.name == result.row), "")
    return label or result.row.replace("+", " + ")


def _report_row(row: _Row) -> ReportRow:
    source, box = row.config.supervision.source, row.config.objective.box
    terms = source != "masks" and box in ("none", "projection", "projection+pairwise")
    return ReportRow(
        name=row.name,
        projection=("yes" if "projection" in box else "no") if terms else "",
        pairwise=("yes" if "pairwise" in box else "no") if terms else "",
        label=row.label,
        meaning=row_meaning(StudyRow(name="row"), row.config, in_every_table=False),
        every_mask=source == "masks",
    )


def _is_alike(rows: Sequence[_Row], starts: Sequence[Result]) -> bool:
    columns = [run_settings(row.runs[0].result, starts) for row in rows]
    data = {run.result.data_fingerprint for row in rows for run in row.runs}
    return not unmeant(columns) and len(data) == 1


def _class_groups(
    runs: Sequence[RecordedRun], classes: Sequence[str], split: str | None
) -> tuple[ClassSplit | None, list[str]]:
    """The split whose classes are shown apart, and what to say if there is none although there are splits."""
    if split is not None:
        return (None if split == NO_SPLIT else load_split(split, classes)), []
    trained = {run.result.split_digest: run.result.split for run in runs if run.result.split_digest}
    names = dict.fromkeys(f"`{name}`" for name in trained.values())
    hint = "`--split NAME` shows the numbers of a split's unseen and seen classes."
    if len(trained) > 1:
        return None, [f"**No class groups.** The runs are of different class splits ({', '.join(names)}); {hint}"]
    for name in trained.values():
        try:
            return load_split(str(name), classes), []
        except UserError:
            return None, [f"**No class groups.** The class split {next(iter(names))} is not here; {hint}"]
    return None, []


def _pretraining(rows: Sequence[_Row], starts: Mapping[str, Result]) -> str | None:
    """What all rows start from, if it is one pretraining but for its seed."""
    kinds = {digest(identity_settings(start)) for start in starts.values()}
    if len(kinds) != 1 or any(run.result.init_run not in starts for row in rows for run in row.runs):
        return None
    first = next(iter(starts.values()))
    return pretraining_sentence(parse_config(RunConfig, dict(first.config), where="recorded pretraining"))
