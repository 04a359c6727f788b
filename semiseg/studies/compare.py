"""From finished runs to what a report of them is built from: which are one row, which may stand side by side."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from semiseg.config import RunConfig
from semiseg.config.read import digest, parse_config
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable
from semiseg.report.provenance import identity_settings, recorded_values, run_settings, unmeant
from semiseg.results import Result
from semiseg.splits import ClassSplit, load_split
from semiseg.studies.file import StudyRow
from semiseg.studies.recorded import RecordedRun
from semiseg.studies.report import class_groups, protocol_fields, row_meaning

TABLE = "comparison"
NO_SPLIT = "none"


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
    initial_runs = {run.result.init_run for run in runs}
    starts = {run.result.run_id: run.result for run in known if run.result.run_id in initial_runs}
    rows = _rows(runs, starts)
    configs = {name: _config(of_row[0].result) for name, of_row in rows.items()}
    settings = [run_settings(of_row[0].result, list(starts.values())) for of_row in rows.values()]
    groups, notes = _split_of(runs, classes, split)
    table = ReportTable(
        name=TABLE,
        title="The runs side by side",
        published=None,
        rows=tuple(_report_row(name, config) for name, config in configs.items()),
        alike=not unmeant(settings) and len({run.result.data_fingerprint for run in runs}) == 1,
        **class_groups(groups, classes),
    )
    return ReportInput(
        study=TABLE,
        title=f"Comparison: {', '.join(row.label for row in table.rows)}",
        question="How do these runs compare, measured on the same validation images?",
        seeds=tuple(sorted({run.result.seed for run in runs})),
        tables=(table,),
        results={(TABLE, name, run.result.seed): replace(run.result, row=name) for name in rows for run in rows[name]},
        run_command="",
        report_command=shlex.join(command),
        pretraining_results=tuple(starts.values()),
        records=tuple(dict.fromkeys(f"`{run.record}`" for run in runs)),
        notes=notes,
        run_folders={run.result.run_id: run.folder for run in runs if run.folder is not None},
        **protocol_fields(list(configs.values()), pretraining=_pretraining(runs, starts), classes=len(classes)),
    )


def _config(result: Result) -> RunConfig:
    return parse_config(RunConfig, recorded_values(result), where=f"recorded run {result.run_id}")


def _require_same_validation_data(runs: Sequence[RecordedRun]) -> None:
    """Raises UserError if not all were measured on the same images and objects.

    A record from before validation data had a fingerprint has that of another run with all the same data.
    """
    results = [run.result for run in runs]
    known = {result.data_fingerprint: result.val_fingerprint for result in results if result.val_fingerprint}
    validation = [
        result.val_fingerprint or known.get(result.data_fingerprint, result.data_fingerprint) for result in results
    ]
    other = next((index for index, fingerprint in enumerate(validation) if fingerprint != validation[0]), None)
    if other is not None:
        raise UserError(
            f"{runs[0]} and {runs[other]} were not measured on the same validation data, as far as their records say "
            f"({_fingerprints(results[0])}; {_fingerprints(results[other])}), so that their numbers cannot stand side "
            "by side"
        )


def _fingerprints(result: Result) -> str:
    return f"validation {result.val_fingerprint or 'unknown'}, data {result.data_fingerprint}"


def _common_classes(runs: Sequence[RecordedRun]) -> tuple[str, ...]:
    lists = [tuple(run.result.metrics.get("instances", ())) for run in runs]
    for run, classes in zip(runs, lists, strict=True):
        if classes != lists[0]:
            differing = ", ".join(sorted(set(classes) ^ set(lists[0]))) or "their order"
            raise UserError(f"{runs[0]} and {run} have different classes: they differ in {differing}")
    return lists[0]


def _rows(runs: Sequence[RecordedRun], starts: Mapping[str, Result]) -> dict[str, list[RecordedRun]]:
    """Name of the row -> its runs by seed: those of one configuration, in the order of their first run.

    A seed that a configuration has twice, trained anew, is a row of its own. Rows are called as they were recorded;
    those that are called alike as people type them, and those that are still called alike with their id.
    """
    trained: Counter[tuple[str, int]] = Counter()
    groups: dict[tuple[str, int], list[RecordedRun]] = {}
    for run in runs:
        key = _configuration_key(run.result, starts)
        trained[key, run.result.seed] += 1
        groups.setdefault((key, trained[key, run.result.seed]), []).append(run)
    rows = [sorted(group, key=lambda run: run.result.seed) for group in groups.values()]
    names = [row[0].result.row for row in rows]
    names = [row[0].row_name if names.count(name) > 1 else name for name, row in zip(names, rows, strict=True)]
    names = [
        f"{name} {row[0].short_id}" if names.count(name) > 1 else name for name, row in zip(names, rows, strict=True)
    ]
    return dict(zip(names, rows, strict=True))


def _configuration_key(result: Result, starts: Mapping[str, Result]) -> str:
    """Digest of everything that can change the numbers of a run, but for its seed."""
    start = starts.get(result.init_run or "")
    split = result.split_digest if result.config.get("supervision", {}).get("source") == "split" else None
    init = result.identity.get("init") if start is None else _configuration_key(start, starts)
    return digest([identity_settings(result), split, result.data_fingerprint, init])


def _report_row(name: str, config: RunConfig) -> ReportRow:
    source, box = config.supervision.source, config.objective.box
    uses_terms = source != "masks" and box in ("none", "projection", "projection+pairwise")
    return ReportRow(
        name=name,
        projection=("yes" if "projection" in box else "no") if uses_terms else "",
        pairwise=("yes" if "pairwise" in box else "no") if uses_terms else "",
        label=name.replace("+", " + "),
        meaning=row_meaning(StudyRow(name="row"), config, in_every_table=False),
        every_mask=source == "masks",
    )


def _split_of(
    runs: Sequence[RecordedRun], classes: Sequence[str], split: str | None
) -> tuple[ClassSplit | None, tuple[str, ...]]:
    """The split whose classes are shown apart, and what to say if there is none although the runs have splits."""
    if split is not None:
        return (None if split == NO_SPLIT else load_split(split, classes)), ()
    names = {run.result.split_digest: str(run.result.split) for run in runs if run.result.split_digest}
    if not names:
        return None, ()
    if len(names) == 1:
        with suppress(UserError):
            return load_split(next(iter(names.values())), classes), ()
    listed = ", ".join(dict.fromkeys(f"`{name}`" for name in names.values()))
    return None, (
        f"**No class groups.** The runs have no class split in common that is here ({listed}); `--split NAME` shows "
        "the numbers of a split's unseen and seen classes.",
    )


def _pretraining(runs: Sequence[RecordedRun], starts: Mapping[str, Result]) -> RunConfig | None:
    """What all runs start from, if it is one pretraining but for its seed."""
    kinds = {digest(identity_settings(start)) for start in starts.values()}
    if len(kinds) != 1 or any(run.result.init_run not in starts for run in runs):
        return None
    return _config(next(iter(starts.values())))
