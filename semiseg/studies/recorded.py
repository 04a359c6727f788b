"""Finished runs as results: from their folders, from the records of all studies, and by what people type.

People type a run's folder, its id or the start of it, or STUDY:ROW[:SPLIT][:SEED].
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from semiseg.config.read import digest, read_json
from semiseg.errors import UserError
from semiseg.results import Result, checked, read
from semiseg.studies.file import PRETRAIN_ROW, near_hint
from semiseg.studies.identity import REPORTS_FOLDER, RESULT_NAME, RESULTS_NAME, RUNS_FOLDER, PlannedRun
from semiseg.studies.status import finished_values

_FROM_RESULT = ("data_fingerprint", "metrics", "steps", "seconds", "device", "versions", "git_revision", "finished")


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
    def name(self) -> str:
        """STUDY:ROW[:SPLIT]:SEED."""
        return f"{self.row_name}:{self.result.seed}"

    @property
    def finished(self) -> float:
        """When, in seconds since 1970."""
        return datetime.fromisoformat(self.result.finished).timestamp()

    def __str__(self) -> str:
        return f"{self.name} ({self.result.run_id})"


def read_result(run: PlannedRun, *, typed: Sequence[str]) -> Result:
    """The record of a finished run of a study, from its folder.

    Raises:
        UserError: the result is missing or not whole, or the split was changed while it trained.
    """
    path, values = run.folder / RESULT_NAME, finished_values(run)
    if run.split is not None and values.get("split_digest") != run.identity["split"]:
        raise UserError(f"{path}: the class split {run.split!r} was changed while the run trained; remove {run.folder}")
    about = {name: getattr(run, name) for name in ("run_id", "identity", "study", "row", "split", "seed", "init_run")}
    # Paths of initial weights belong to one machine; what they are is in the identity.
    about["config"] = run.config.model_dump(mode="json", exclude={"init_from"})
    return _result(path, values, about | {"split_digest": run.identity["split"], "command": list(typed)})


def run_of_folder(folder: Path) -> RecordedRun:
    """The finished run in a folder, of a study or of `semiseg train`.

    Raises:
        UserError: the folder holds no finished run, or its files are not whole.
    """
    path = folder / RESULT_NAME
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run: there is no {RESULT_NAME} in it")
    values, run = read_json(path), read_json(folder / "config.json")
    study = read_json(folder / "identity.json") if (folder / "identity.json").is_file() else {}
    try:
        settings, inputs = dict(run["identity"]), run["inputs"]
        config = {name: value for name, value in run["config"].items() if name != "init_from"}
        cut = {name: settings.pop(name) for name in ("normalised_together",) if name in settings}
        digests = {"split": inputs["split"], "data": inputs["data"], "init": inputs["init_from"]}
        identity = study.get("identity") or {"config": digest(settings), **digests, **cut}
        about = {
            "run_id": study.get("run_id") or digest(identity),
            "identity": identity,
            "study": study.get("study", ""),
            "row": study.get("row") or folder.resolve().name,
            "split": (config.get("supervision") or {}).get("split"),
            "split_digest": values.get("split_digest"),
            "seed": config["seed"],
            "config": config,
            "init_run": study.get("init"),
            "command": [values["command"]],
        }
        return RecordedRun(_result(path, values, about), folder, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = f"its {RESULT_NAME} and config.json are not those of a finished run"
        raise UserError(f"{folder}: {known} ({error})") from None


def _result(path: Path, values: Mapping[str, Any], about: Mapping[str, Any]) -> Result:
    """The record of a run, of what `path`, its result.json, holds and what else is known about it."""
    missing = [name for name in _FROM_RESULT if name not in values]
    if missing:
        raise UserError(f"{path}: not the result of a finished run: {missing[0]!r} is missing")
    fields = {name: values[name] for name in _FROM_RESULT}
    optional = {"processes": values.get("processes", 1), "val_fingerprint": values.get("val_fingerprint")}
    return checked({**about, **fields, **optional}, where=str(path))


def known_runs() -> list[RecordedRun]:
    """Every run of the records in `reports/*/`, each once per study, the newest of it."""
    folders = _folders()
    newest: dict[tuple[str, str], RecordedRun] = {}
    for record in sorted(REPORTS_FOLDER.glob(f"*/{RESULTS_NAME}")):
        for result in read(record):
            run = RecordedRun(result, folders.get(result.run_id), record)
            key = (result.study, result.run_id)
            newest[key] = max(run, newest.get(key, run), key=lambda run: run.finished)
    return list(newest.values())


def _folders() -> dict[str, Path]:
    """run_id -> the folder of a study's run."""
    return {path.name.rpartition("-")[2]: path for path in sorted(RUNS_FOLDER.glob("*/*-*")) if path.is_dir()}


def find_runs(name: str, known: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The run that `name` means, or all runs of a row.

    Args:
        known: of `known_runs`.

    Raises:
        UserError: no such run, with the nearest ones, or an id that is not whole and begins several.
    """
    if name and Path(name).is_dir():
        return [run_of_folder(Path(name))]
    return _runs_of_row(name, known) if ":" in name else [_run_of_id(name, known)]


def _run_of_id(name: str, known: Sequence[RecordedRun]) -> RecordedRun:
    recorded = {run.result.run_id: run for run in sorted(known, key=lambda run: run.finished)}
    folders = {run_id: path for run_id, path in _folders().items() if (path / RESULT_NAME).is_file()}
    matching = sorted(run_id for run_id in {**recorded, **folders} if name and run_id.startswith(name.lower()))
    if not matching:
        near = difflib.get_close_matches(name.lower(), recorded, n=2, cutoff=0.4)
        hint = f" Near: {', '.join(str(recorded[run_id]) for run_id in near)}." if near else ""
        studies = ", ".join(sorted({run.result.study for run in known})) or "none"
        raise UserError(
            f"{name}: neither the folder of a run, nor the beginning of a run's id, nor STUDY:ROW.{hint} "
            f"Recorded studies: {studies}"
        )
    if len(matching) > 1:
        first = ", ".join(str(recorded.get(run_id, run_id)) for run_id in matching[:4])
        raise UserError(f"{name}: {len(matching)} runs have an id that begins so: {first}")
    return recorded[matching[0]] if matching[0] in recorded else run_of_folder(folders[matching[0]])


def _runs_of_row(name: str, known: Sequence[RecordedRun]) -> list[RecordedRun]:
    study, row, *rest = name.split(":")
    of_row = [run for run in known if (run.result.study, run.result.row) == (study, row)]
    matching = [run for run in of_row if all(part in (run.split, str(run.result.seed)) for part in rest)]
    if not matching:
        rows = sorted({f"{run.result.study}:{run.result.row}" for run in known if run.result.row != PRETRAIN_ROW})
        hint = near_hint(name, sorted(run.name for run in of_row) or rows)
        raise UserError(f"{name}: no recorded run is called so.{hint}")
    return sorted(matching, key=lambda run: run.result.seed)
