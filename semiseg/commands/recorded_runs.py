"""Finds finished runs by what people type: a run's folder, its id or the start of it, or STUDY:ROW[:SPLIT][:SEED]."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from semiseg.config_files import digest, read_json
from semiseg.errors import UserError
from semiseg.results import Result, checked, read
from semiseg.study import PRETRAIN_ROW, near_hint
from semiseg.study_plan import REPORTS_FOLDER, RESULTS_NAME, RUNS_FOLDER
from semiseg.study_run import RESULT_NAME

_SHORT = 6  # signs of an id that people see


@dataclass(frozen=True)
class RecordedRun:
    """A finished run.

    Attributes:
        folder: with its detections, or None if it is not here.
        record: the file that the result was read from.
    """

    result: Result
    folder: Path | None
    record: Path

    @property
    def short_id(self) -> str:
        """The beginning of its id."""
        return self.result.run_id[:_SHORT]


def known_runs() -> list[RecordedRun]:
    """Every run of the records in `reports/*/`, each once per study, the newest line of it."""
    folders = {path.name.rpartition("-")[2]: path for path in sorted(RUNS_FOLDER.glob("*/*-*")) if path.is_dir()}
    found: dict[tuple[str, str], RecordedRun] = {}
    for record in sorted(REPORTS_FOLDER.glob(f"*/{RESULTS_NAME}")):
        for result in read(record):
            key = (result.study, result.run_id)
            if key not in found or _finished(found[key].result) <= _finished(result):
                found[key] = RecordedRun(result, folders.get(result.run_id), record)
    return list(found.values())


def find_runs(name: str, known: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The run that `name` means, or the seeds of one row.

    Args:
        known: of `known_runs`.

    Raises:
        UserError: no such run, with the nearest one, or several.
    """
    if name and Path(name).is_dir():
        return [_with_record(run_of_folder(Path(name)), known)]
    if ":" in name:
        return _runs_of_row(name, known)
    return [_run_of_id(name, known)]


def run_of_folder(folder: Path) -> RecordedRun:
    """The finished run in a folder, of a study or of `semiseg train`.

    Raises:
        UserError: the folder holds no finished run, or its files are not whole.
    """
    path = folder / RESULT_NAME
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run: there is no {RESULT_NAME} in it")
    values, held = read_json(path), read_json(folder / "config.json")
    about = read_json(folder / "identity.json") if (folder / "identity.json").is_file() else {}
    try:
        config, inputs, settings = dict(held["config"]), held["inputs"], dict(held["identity"])
        cut = settings.pop("normalised_together", None)
        identity: Mapping[str, Any] = about.get("identity") or {
            "config": digest(settings),
            "split": inputs["split"],
            "data": inputs["data"],
            "init": inputs["init_from"],
            **({} if cut is None else {"normalised_together": cut}),
        }
        config.pop("init_from", None)
        told = {
            "run_id": about.get("run_id") or digest(identity),
            "study": about.get("study", ""),
            "row": about.get("row") or folder.resolve().name,
            "split": (config.get("supervision") or {}).get("split"),
            "split_digest": values.get("split_digest"),
            "seed": config["seed"],
            "config": config,
            "identity": identity,
            "init_run": about.get("init"),
            "command": [values["command"]],
            **{name: values[name] for name in ("data_fingerprint", "metrics", "steps", "seconds", "device")},
            **{name: values[name] for name in ("versions", "git_revision", "finished")},
            "processes": values.get("processes", 1),
            "val_fingerprint": values.get("val_fingerprint"),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: its {RESULT_NAME} and config.json are not those of a finished run ({error})"
        ) from None
    return RecordedRun(checked(told, where=str(path)), folder, path)


def _with_record(run: RecordedRun, known: Sequence[RecordedRun]) -> RecordedRun:
    """The run of a folder as a study has recorded it, which names the command that the user typed."""
    for item in known:
        if (item.result.run_id, item.result.finished) == (run.result.run_id, run.result.finished):
            return RecordedRun(item.result, run.folder, item.record)
    return run


def _run_of_id(name: str, known: Sequence[RecordedRun]) -> RecordedRun:
    by_id: dict[str, RecordedRun] = {}
    for run in known:
        held = by_id.get(run.result.run_id)
        if held is None or _finished(held.result) < _finished(run.result):
            by_id[run.result.run_id] = run
    folders = {path.name.rpartition("-")[2]: path for path in sorted(RUNS_FOLDER.glob("*/*-*"))}
    unrecorded = {run_id: path for run_id, path in folders.items() if (path / RESULT_NAME).is_file()}
    ids = sorted({*by_id, *unrecorded})
    matching = [run_id for run_id in ids if name and run_id.startswith(name.lower())]
    if len(matching) > 1:
        shown = ", ".join(_described(run_id, by_id) for run_id in matching[:4])
        raise UserError(f"{name}: {len(matching)} runs have an id that begins so: {shown}")
    if not matching:
        near = difflib.get_close_matches(name.lower(), ids, n=2, cutoff=0.4)
        told = f" Near: {', '.join(_described(run_id, by_id) for run_id in near)}." if near else ""
        studies = ", ".join(sorted({run.result.study for run in known})) or "none"
        raise UserError(
            f"{name}: neither the folder of a run, nor the beginning of a run's id, nor STUDY:ROW.{told} "
            f"Recorded studies: {studies}"
        )
    return by_id[matching[0]] if matching[0] in by_id else run_of_folder(unrecorded[matching[0]])


def _described(run_id: str, by_id: Mapping[str, RecordedRun]) -> str:
    if run_id not in by_id:
        return run_id
    result = by_id[run_id].result
    parts = (result.study, result.row, *([PurePath(result.split).stem] if result.split else []), str(result.seed))
    return f"{run_id} ({':'.join(parts)})"


def _runs_of_row(name: str, known: Sequence[RecordedRun]) -> list[RecordedRun]:
    study, row, *rest = name.split(":")
    runs = [run for run in known if run.result.study == study]
    if not runs:
        raise UserError(f"{name}: no study {study!r} is recorded.{_hint(study, (r.result.study for r in known))}")
    rows = [run for run in runs if run.result.row == row]
    if not rows:
        raise UserError(f"{name}: study {study!r} has no run of row {row!r}.{_hint(row, (r.result.row for r in runs))}")
    wanted = [run for run in rows if all(part in (_split(run), str(run.result.seed)) for part in rest)]
    if not wanted:
        places = sorted({":".join(part for part in (_split(run), str(run.result.seed)) if part) for run in rows})
        raise UserError(f"{name}: no such run of row {row!r}; recorded are {', '.join(places)}")
    splits = sorted({_split(run) or "no split" for run in wanted})
    if len(splits) > 1:
        raise UserError(f"{name}: row {row!r} was trained with several splits; add one of {', '.join(splits)}")
    seeds = [run.result.seed for run in wanted]
    doubled = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if doubled is not None:
        ids = ", ".join(run.result.run_id for run in wanted if run.result.seed == doubled)
        raise UserError(f"{name}: seed {doubled} was trained with several configurations; name one by its id: {ids}")
    return sorted(wanted, key=lambda run: run.result.seed)


def _split(run: RecordedRun) -> str:
    return PurePath(run.result.split or "").stem


def _hint(name: str, known: Iterable[str]) -> str:
    return near_hint(name, sorted(set(known) - {PRETRAIN_ROW, ""}))


def _finished(result: Result) -> datetime:
    return datetime.fromisoformat(result.finished)
