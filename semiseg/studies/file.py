"""A study file -> the runs that it asks for.

A study lists only what differs from the defaults: `base` and `set` for all runs, `set` per row, and optionally
`[pretrain]`, one training on boxes alone per seed whose weights all rows of that seed start from. Rows that do not
depend on the class split (all masks, boxes only) are there once and read for every table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from semiseg.config import RunConfig, parse_run
from semiseg.config.read import apply_overrides, check_settings, merge, parse_config, read_toml
from semiseg.config.section import Section, Seed
from semiseg.errors import UserError, near_hint
from semiseg.project import find

PRETRAIN_ROW = "pretrain"

RunKey = tuple[str, str | None, int]  # row, split, seed
CellKey = tuple[str, str, int]  # table, row, seed
Name = Annotated[str, Field(min_length=1, pattern=r"^[^./\\\p{Cc}][^/\\\p{Cc}]*$")]  # part of a folder's name


class StudyRow(Section):
    """One row of the tables. Unless `set` names another source, its supervision is the split's."""

    name: Name
    label: str = ""  # what people read in tables and figures; the name if empty
    set: dict[str, Any] = Field(default_factory=dict)  # configuration values laid over those of the study
    projection: Any = None  # in study files of before, as is pairwise: reports read them off the row's configuration
    pairwise: Any = None


class StudyTable(Section):
    """One table: its rows under one split."""

    name: Name
    title: str
    split: str | None = None  # key of the study's `[splits]`; its unseen and seen classes are the column groups
    number: int | Literal["tau", "neighbourhood"] | None = None  # of the printed table beside which it is shown
    rows: list[str] = Field(min_length=1)
    # Pairs of rows whose difference the report shows, second minus first; empty = the usual ones.
    compare: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(default_factory=list)


class Study(Section):
    """A study file; `name` is the file's name unless it says otherwise."""

    name: Name
    title: str
    question: str = ""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    # A study of the same rows with several seeds, whose means a run of this one is set beside at its end.
    reference: str | None = None
    # Values of every run; a file may name them instead, by a path or the name of a file in `experiments/bases/`.
    base: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict)  # laid over the base
    pretrain: dict[str, Any] | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    rows: list[StudyRow] = Field(min_length=1)
    tables: list[StudyTable] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        rows, tables = [row.name for row in self.rows], [table.name for table in self.tables]
        for what, names in (("row", rows), ("table", tables), ("seed", [str(seed) for seed in self.seeds])):
            doubled = [name for name in names if names.count(name) > 1]
            if doubled:
                raise ValueError(f"{what} {doubled[0]!r} is there twice")
        if PRETRAIN_ROW in rows:
            raise ValueError(f"{PRETRAIN_ROW!r} is no name for a row: it is the shared detector pretraining")
        for table in self.tables:
            where = f"table {table.name!r}"
            if not re.fullmatch(r"[\w-]+", table.name, re.ASCII):
                raise ValueError(f"{where}: a table's name is of letters, digits, '_' and '-'")
            if len(set(table.rows)) < len(table.rows):
                raise ValueError(f"{where}: a row is there twice")
            unknown = [name for name in table.rows if name not in rows]
            unknown += [name for pair in table.compare for name in pair if name not in table.rows]
            if unknown:
                raise ValueError(f"{where}: unknown row {unknown[0]!r}.{near_hint(unknown[0], rows)}")
            if table.split is not None and table.split not in self.splits:
                raise ValueError(f"{where}: unknown split {table.split!r}.{near_hint(table.split, self.splits)}")
        for row in self.rows:
            if not any(row.name in table.rows for table in self.tables):
                raise ValueError(f"row {row.name!r} is in no table")
        settings = {"[base]": self.base, "[set]": self.set, "[pretrain]": self.pretrain or {}}
        for name, values in (*settings.items(), *((f"row {row.name!r}", row.set) for row in self.rows)):
            if "seed" in values:
                raise ValueError(f"{name} sets 'seed', but the seeds of a study are its own 'seeds'")
        return self


@dataclass(frozen=True)
class StudyRun:
    """A run as the study file alone tells it, before any data or split has been looked at."""

    row: str  # `PRETRAIN_ROW` for the pretraining
    split: str | None  # None if the run does not depend on one
    seed: int
    config: RunConfig
    init: StudyRun | None = None  # the run whose weights it starts from

    @property
    def key(self) -> RunKey:
        return self.row, self.split, self.seed

    @property
    def label(self) -> str:
        """Short name for people: row, split, seed."""
        return "-".join([self.row, *([Path(self.split).stem] if self.split else []), f"s{self.seed}"])


def load_study(name_or_path: str, overrides: Sequence[str] = (), *, seeds: Sequence[int] | None = None) -> Study:
    """Reads a study file; `seeds` replace the study's.

    An override `a.b=c` changes a value of every run; `pretrain.a.b=c` and `rows.a.b=c` of the pretraining or rows.
    """
    path = find("experiments", name_or_path)
    values = {"name": path.stem, **read_toml(path)}
    if seeds is not None:
        values["seeds"] = list(seeds)
    if isinstance(values.get("base"), str):
        base = find("bases", values["base"])
        values["base"] = read_toml(base)
        check_settings(RunConfig, values["base"], where=str(base))
    study = parse_config(Study, values, where=str(path))
    if study.reference is not None:
        find("experiments", study.reference)  # said before the trainings rather than after
    return _lay_over(study, overrides)


def _lay_over(study: Study, overrides: Sequence[str]) -> Study:
    parts: dict[str, list[str]] = {"pretrain": [], "rows": [], "": []}
    for item in overrides:
        head, dot, tail = item.partition("=")[0].partition(".")
        scope = head.strip() if head.strip() in ("pretrain", "rows") else ""
        if scope and not tail.strip():
            raise UserError(f"--set {item}: expected the form {scope}.a.b=value")
        if (tail if scope else head + dot).strip() == "seed":
            raise UserError(f"--set {item}: the seeds of a study are set with '--seeds'")
        parts[scope].append(item.partition(".")[2] if scope else item)
    pretrain = study.pretrain
    if parts["pretrain"] and pretrain is None:
        raise UserError(f"--set pretrain.{parts['pretrain'][0]}: study {study.name!r} has no [pretrain]")
    if pretrain is not None:
        pretrain = apply_overrides(pretrain, parts[""] + parts["pretrain"], partial=True)
    of_rows = parts[""] + parts["rows"]
    rows = [row.model_copy(update={"set": apply_overrides(row.set, of_rows, partial=True)}) for row in study.rows]
    return study.model_copy(update={"pretrain": pretrain, "rows": rows})


def study_cells(study: Study, *, only: Sequence[str] = ()) -> dict[CellKey, StudyRun]:
    """The run that each cell of the study's tables reads, of `only` these rows if any are named; cells may share it."""
    rows = {row.name: row for row in study.rows}
    for name in only:
        if name not in rows:
            near, listed = near_hint(name, rows, otherwise=""), ", ".join(rows)
            raise UserError(f"--only {name!r}: study {study.name!r} has no such row.{near} Its rows: {listed}")
    starts = {seed: _pretraining(study, seed) for seed in study.seeds}
    return {
        (table.name, name, seed): _row_run(study, rows[name], table, seed, start)
        for seed, start in starts.items()
        for table in study.tables
        for name in table.rows
        if not only or name in only
    }


def study_runs(study: Study, *, only: Sequence[str] = ()) -> list[StudyRun]:
    """The runs of `study_cells` and before them those that they start from, each (row, split, seed) once."""
    rows = list(study_cells(study, only=only).values())
    starts = [run.init for run in rows if run.init is not None]
    return list({run.key: run for run in [*starts, *rows]}.values())


def _pretraining(study: Study, seed: int) -> StudyRun | None:
    if study.pretrain is None:
        return None
    boxes_alone: dict[str, Any] = {"supervision": {"source": "boxes"}, "objective": {"box": "none"}}
    where = f"study {study.name!r}, [pretrain]"
    values = _merged(study.base, study.set, boxes_alone, study.pretrain, {"seed": seed}, where=where)
    config = parse_run(values, where=where)
    if config.supervision.source != "boxes":
        # Its weights reach every row: masks here would be masks of unseen classes there.
        raise UserError(
            f"{where}: 'supervision.source' is {config.supervision.source!r}; "
            "the pretraining that all rows share may use 'boxes' only"
        )
    return StudyRun(PRETRAIN_ROW, None, seed, config)


def _row_run(study: Study, row: StudyRow, table: StudyTable, seed: int, init: StudyRun | None) -> StudyRun:
    where = f"study {study.name!r}, row {row.name!r}"
    split = study.splits[table.split] if table.split is not None else None
    by_split: dict[str, Any] = {"supervision": {"source": "split", "split": split}} if split is not None else {}
    values = _merged(study.base, study.set, by_split, row.set, {"seed": seed}, where=where)
    supervision = values.get("supervision", {})
    if isinstance(supervision, dict):  # else `parse_run` says what it must be
        if supervision.get("source") != "split":
            supervision = {key: value for key, value in supervision.items() if key != "split"}
        elif supervision.get("split") is None:
            raise UserError(f"{where}: its supervision is the split's, but table {table.name!r} names no split")
    config = parse_run({**values, "supervision": supervision}, where=where, initial_run=init is not None)
    if init is not None and config.init_from is not None:
        raise UserError(f"{where}: 'init_from' is {config.init_from!r}, but its weights come from the [pretrain] run")
    return StudyRun(row.name, config.supervision.split, seed, config, init)


def _merged(*tables: dict[str, Any], where: str) -> dict[str, Any]:
    """Each table laid over those before it."""
    try:
        return functools.reduce(merge, tables, {})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
