"""Finished runs side by side: found by what people type, put into rows, and made what a report is built from.

People type a run's folder, its id or the start of it, or STUDY:ROW[:SPLIT][:SEED].
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePath

from semiseg.config import RunConfig, parse_recorded
from semiseg.config.read import digest, parse_config, read_json
from semiseg.errors import UserError, differing_names, near_hint
from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.report.provenance import identity_settings, recorded_values, run_settings, unmeant
from semiseg.results import RESULT_NAME, Result, read, same_validation_data
from semiseg.splits import ClassSplit, load_split
from semiseg.studies.file import PRETRAIN_ROW, StudyRow
from semiseg.studies.identity import REPORTS_FOLDER, RESULTS_NAME, RUNS_FOLDER
from semiseg.studies.report import class_groups, protocol_fields, report_row, row_meaning
from semiseg.studies.status import finished_result

TABLE = "comparison"
NO_SPLIT = "none"


@dataclass(frozen=True)
class RecordedRun:
    """A finished run."""

    result: Result
    folder: Path | None  # with its detections; None if it is not here
    record: Path  # the file that the result was read from

    @property
    def short_id(self) -> str:
        """The beginning of its id, as people see it."""
        return self.result.run_id[:6]

    @property
    def split(self) -> str:
        """Name of its class split; "" if it does not depend on one."""
        return PurePath(self.result.split or "").stem

    @property
    def row_name(self) -> str:
        """STUDY:ROW[:SPLIT], as people type it."""
        return ":".join(part for part in (self.result.study, self.result.row, self.split) if part)

    @property
    def config(self) -> RunConfig:
        """Its configuration; a UserError if what is recorded is none."""
        where = f"{self.record}, run {self.result.run_id}"
        return parse_config(RunConfig, recorded_values(self.result), where=where)

    def __str__(self) -> str:
        return f"{self.row_name}:{self.result.seed} ({self.result.run_id})"


def run_of_folder(folder: Path) -> RecordedRun:
    """The finished run in a folder, of a study or of `semiseg train`; a UserError if there is none that is whole."""
    path, config_path = folder / RESULT_NAME, folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run: there is no {RESULT_NAME} in it")
    values, run = read_json(path), read_json(config_path)
    study = read_json(folder / "identity.json") if (folder / "identity.json").is_file() else {}
    try:
        settings, inputs, recorded = (dict(run[name]) for name in ("identity", "inputs", "config"))
        digests = {"split": inputs["split"], "data": inputs["data"], "init": inputs["init_from"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{config_path}: not the configuration that a run writes beside its result") from None
    config = parse_recorded(recorded, where=str(config_path))
    cut = {name: settings.pop(name) for name in ("normalised_together",) if name in settings}
    identity = study.get("identity") or {"config": digest(settings), **digests, **cut}
    about = {
        "run_id": study.get("run_id") or digest(identity),
        "identity": identity,
        "study": study.get("study", ""),
        "row": study.get("row") or folder.resolve().name,
        "split": config.supervision.split,
        "split_digest": values.get("split_digest"),
        "seed": config.seed,
        "config": {name: value for name, value in recorded.items() if name != "init_from"},
        "init_run": study.get("init"),
        "command": [values.get("command", "")],
    }
    return RecordedRun(finished_result(path, values, about), folder, path)


def known_runs() -> list[RecordedRun]:
    """Every run of the records in `reports/*/`, each once per study, the newest of it."""
    folders = {path.name.rpartition("-")[2]: path for path in sorted(RUNS_FOLDER.glob("*/*-*")) if path.is_dir()}
    records = {record: read(record) for record in sorted(REPORTS_FOLDER.glob(f"*/{RESULTS_NAME}"))}
    runs = [
        RecordedRun(item, folders.get(item.run_id), record) for record, results in records.items() for item in results
    ]
    newest = {(run.result.study, run.result.run_id): run for run in sorted(runs, key=_finished)}
    return sorted(newest.values(), key=_finished)


def _finished(run: RecordedRun) -> datetime:
    return datetime.fromisoformat(run.result.finished)


def find_runs(name: str, known: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The run of `known_runs` that `name` means, or all runs of a row; a UserError if it is none or not clear which."""
    if name and Path(name).is_dir():
        return [run_of_folder(Path(name))]
    if ":" in name:
        study, row, *parts = name.split(":")
        rows = dict.fromkeys(run.result.row for run in known if run.result.study == study)
        if rows and row not in rows:
            shown = ", ".join(other for other in rows if other != PRETRAIN_ROW)
            raise UserError(f"{name}: no row {row!r} of study {study!r} is recorded. Recorded: {shown}")
        of_row = [run for run in known if (run.result.study, run.result.row) == (study, row)]
        matching = [run for run in of_row if all(part in (run.split, str(run.result.seed)) for part in parts)]
    else:
        by_id = {run.result.run_id: run for run in known if name and run.result.run_id.startswith(name.lower())}
        matching = list(by_id.values())
        if len(matching) > 1:
            several = ", ".join(map(str, matching[:4]))
            raise UserError(f"{name}: {len(matching)} runs have an id that begins so: {several}")
    if not matching:
        others = [run for run in known if run.result.row != PRETRAIN_ROW]
        names = dict.fromkeys(f"{run.result.study}:{run.result.row}" for run in others)
        recorded = f" Recorded: {', '.join(names) or 'none'}"
        hint = near_hint(name, [*names, *(f"{run.row_name}:{run.result.seed}" for run in others)], otherwise=recorded)
        raise UserError(
            f"{name}: neither the folder of a run, nor the beginning of a recorded run's id, nor "
            f"STUDY:ROW[:SPLIT][:SEED].{hint}"
        )
    return sorted(matching, key=lambda run: run.result.seed)


def comparison(
    runs: Sequence[RecordedRun], known: Sequence[RecordedRun], *, split: str | None, command: Sequence[str]
) -> ReportInput:
    """The report of runs side by side; a UserError if their validation data or classes differ.

    What they start from is looked up in `known`. The class groups are the split's; `none` = no groups, None = the split
    of the runs.
    """
    classes = _common_classes(runs)
    initial_runs = {run.result.init_run for run in runs}
    starts = {run.result.run_id: run for run in known if run.result.run_id in initial_runs}
    start_results = [run.result for run in starts.values()]
    rows = _rows(runs, starts)
    configs = {name: of_row[0].config for name, of_row in rows.items()}
    settings = [run_settings(of_row[0].result, start_results) for of_row in rows.values()]
    groups, notes = _split_of(runs, classes, split)
    unnamed = StudyRow(name="row")
    table = ReportTable(
        name=TABLE,
        title="The runs side by side",
        published=None,
        rows=tuple(
            report_row(name, name.replace("+", " + "), row_meaning(unnamed, config, in_every_table=False), config)
            for name, config in configs.items()
        ),
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
        pretraining_results=tuple(start_results),
        records=tuple(dict.fromkeys(f"`{run.record}`" for run in runs)),
        notes=notes,
        run_folders={run.result.run_id: run.folder for run in runs if run.folder is not None},
        **protocol_fields(list(configs.values()), pretraining=_pretraining(runs, starts), classes=len(classes)),
    )


def _common_classes(runs: Sequence[RecordedRun]) -> tuple[str, ...]:
    """The classes of the runs; a UserError unless all were measured on the same images, objects and classes."""
    first = runs[0].result
    classes = tuple(first.metrics["instances"])
    for run in runs:
        own = tuple(run.result.metrics["instances"])
        if own != classes:
            differing = differing_names(own, classes)
            raise UserError(f"{runs[0]} and {run} have different classes: they differ in {differing}")
        if not same_validation_data(first, run.result):
            fingerprints = "; ".join(
                f"validation {result.val_fingerprint or 'unknown'}, data {result.data_fingerprint}"
                for result in (first, run.result)
            )
            raise UserError(
                f"{runs[0]} and {run} were not measured on the same validation data, as far as their records say "
                f"({fingerprints}), so that their numbers cannot stand side by side"
            )
    return classes


def _rows(runs: Sequence[RecordedRun], starts: Mapping[str, RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Name of the row -> its runs by seed: those of one configuration, in the order of their first run.

    A seed that a configuration has twice, trained anew, is a row of its own. Rows are called as they were recorded;
    those that are called alike as people type them, and those that are still called alike with their id.
    """
    trained: Counter[tuple[str, int]] = Counter()
    groups: dict[tuple[str, int], list[RecordedRun]] = {}
    for run in runs:
        key = _configuration_key(run, starts)
        trained[key, run.result.seed] += 1
        groups.setdefault((key, trained[key, run.result.seed]), []).append(run)
    rows = [sorted(group, key=lambda run: run.result.seed) for group in groups.values()]
    names = [row[0].result.row for row in rows]
    for longer in ("{0.row_name}", "{0.row_name} {0.short_id}"):
        alike = [name for name in names if names.count(name) > 1]
        names = [longer.format(row[0]) if name in alike else name for name, row in zip(names, rows, strict=True)]
    return dict(zip(names, rows, strict=True))


def _configuration_key(run: RecordedRun, starts: Mapping[str, RecordedRun]) -> str:
    """Digest of everything that can change the numbers of a run, but for its seed."""
    result, start = run.result, starts.get(run.result.init_run or "")
    split = result.split_digest if run.config.supervision.source == "split" else None
    init = result.identity.get("init") if start is None else _configuration_key(start, starts)
    return digest([identity_settings(result), split, result.data_fingerprint, init])


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


def _pretraining(runs: Sequence[RecordedRun], starts: Mapping[str, RecordedRun]) -> RunConfig | None:
    """What all runs start from, if it is one pretraining but for its seed."""
    kinds = {digest(identity_settings(start.result)): start for start in starts.values()}
    if len(kinds) != 1 or any(run.result.init_run not in starts for run in runs):
        return None
    return next(iter(kinds.values())).config
