"""In which settings the recorded runs of a table differ: for the provenance, and for the warnings above a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from semiseg.config import RunConfig
from semiseg.config_files import parse_config
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.report.tables import code, escape_markdown, markdown_table
from semiseg.results import Result

Settings = Mapping[str, str]

# Names that say which data and which split; what these hold is in fingerprints and digests.
_NAMES = ("data.train_", "data.val_images", "data.val_annotations", "data.voc.", "data.hub.", "supervision.split")
_MEANT = ("supervision.", "objective.")  # what rows of one table are there to compare
_START = "start"
_LONGEST = 40  # signs of a value


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Flat key -> value in words of a recorded configuration, without what a run's identity leaves out.

    Keys that the recording version did not know have their defaults. The seed, paths, workers and logging are left out;
    names of data files and of the split are kept, since they tell a reader which data these are.
    """
    try:
        values = parse_config(RunConfig, dict(config), where="recorded configuration").model_dump(mode="json")
    except UserError:  # of a version with other keys
        values = dict(config)
    found = _flat(values)
    kind = found.get("data.format")
    unused = [f"data.{name}." for name in ("shapes", "voc") if name != kind]
    if not found.get("data.root", "").startswith("hf:"):
        unused.append("data.hub.")
    if kind != "coco":
        unused += ["data.train_", "data.val_images", "data.val_annotations"]
    left_out = ("seed", "init_from", "data.root", "runtime.", *unused)
    return {key: value for key, value in found.items() if key == "runtime.precision" or not key.startswith(left_out)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{key}.")
        else:
            found[key] = "—" if value is None else value if isinstance(value, str) else json.dumps(value)
    return found


def recorded_values(run: Result) -> dict[str, Any]:
    """The configuration of a run; a record names no path of initial weights, only that there were some."""
    started = run.init_run is not None or run.identity.get("init") is not None
    return {**run.config, **({"init_from": "recorded weights"} if started else {})}


def _result_settings(run: Result) -> dict[str, str]:
    """The settings of a run, and over how many images its batch norms normalise where that is not the whole batch."""
    cut = _flat({name: run.identity[name] for name in ("normalised_together",) if name in run.identity})
    return settings(recorded_values(run)) | cut


def identity_settings(run: Result) -> Settings:
    """The settings of a run without mere names: what can change its numbers beside seed, data, split and start."""
    return {key: value for key, value in _result_settings(run).items() if not key.startswith(_NAMES)}


def run_settings(run: Result, pretraining: Sequence[Result]) -> Settings:
    """The settings of a run, and as "start..." those of the run that it starts from."""
    found = _result_settings(run)
    init = next((item for item in pretraining if item.run_id == run.init_run), None)
    if init is not None:
        found |= {f"{_START}.{key}": value for key, value in _result_settings(init).items()}
    elif run.init_run is not None or run.identity.get("init") is not None:
        found[_START] = "given weights"
    return found


def row_settings(report: ReportInput, table: ReportTable) -> dict[str, list[tuple[Result, Settings]]]:
    """Row name -> its runs with their settings, in the order of seeds; rows without a run are left out."""
    found: dict[str, list[tuple[Result, Settings]]] = {}
    for row in table.rows:
        runs = [report.results.get((table.name, row.name, seed)) for seed in report.seeds]
        held = [(run, run_settings(run, report.pretraining_results)) for run in runs if run is not None]
        if held:
            found[row.name] = held
    return found


def differing(columns: Sequence[Settings]) -> list[str]:
    """The keys whose values are not the same in all of these, in their order; a missing start counts as one key."""
    keys = dict.fromkeys(key for column in columns for key in column)
    found = [key for key in keys if len({column.get(key) for column in columns}) > 1]
    started = [any(key.startswith(f"{_START}.") for key in column) for column in columns]
    if any(started) and not all(started):
        found = [key for key in found if key.partition(".")[0] != _START] + [_START]
    return found


def unmeant(columns: Sequence[Settings]) -> list[str]:
    """Those of the differing settings that are neither supervision nor mask losses, nor mere names of data."""
    return [key for key in differing(columns) if not key.startswith((*_MEANT, *_NAMES))]


def _value(column: Settings, key: str) -> str:
    if key == _START and key not in column:
        steps = column.get(f"{_START}.optim.steps")
        return "—" if steps is None else f"pretraining ({steps} steps)"
    return column.get(key, "—")


def differences_section(report: ReportInput) -> list[str]:
    """For each table the settings in which its rows differ, one column per row."""
    blocks = ["### Configuration of the rows"]
    for table in report.tables:
        rows = row_settings(report, table)
        labels = {row.name: row.label for row in table.rows}
        keys = differing([column for held in rows.values() for _, column in held])
        if not rows:
            continue
        if not keys:
            blocks.append(f"The rows of {escape_markdown(table.name)} have the same configuration but for the seed.")
            continue
        lines = [
            [key, *(_shortened("; ".join(dict.fromkeys(_value(c, key) for _, c in held))) for held in rows.values())]
            for key in keys
        ]
        blocks += [
            f"Where the rows of {escape_markdown(table.name)} differ, beyond the seed:",
            markdown_table(("setting", *(labels[name] for name in rows)), lines, texts=1 + len(rows)),
        ]
    return blocks if len(blocks) > 1 else []


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def configuration_warnings(report: ReportInput, table: ReportTable) -> list[str]:
    """Names seeds of one row that differ in more than the seed, and rows that differ in more than they are meant to."""
    rows = row_settings(report, table)
    found, told = [], set()
    for name, held in rows.items():
        keys = [key for key in differing([column for _, column in held]) if not key.startswith(_NAMES)]
        told |= set(keys)
        if keys:
            places = "; ".join(
                f"{code(key)} ({_by_value([(f'seed {run.seed}', _value(c, key)) for run, c in held])})" for key in keys
            )
            found.append(
                f"**Mixed configurations.** {escape_markdown(table.name)}: the seeds of {code(name)} differ in "
                f"{places}. Their mean is not that of one configuration."
            )
    first = {name: held[0][1] for name, held in rows.items()}
    keys = [key for key in unmeant(list(first.values())) if key not in (*table.varied, *told)]
    if keys:
        places = "; ".join(
            f"{code(key)} ({_by_value([(name, _value(column, key)) for name, column in first.items()])})"
            for key in keys
        )
        found.append(
            f"**Different configurations.** {escape_markdown(table.name)}: beyond supervision and mask losses its rows "
            f"differ in {places}. What differs in AP may be due to that."
        )
    return found


def _by_value(pairs: Sequence[tuple[str, str]]) -> str:
    """ "16: neither, projection; 8: full-masks" of (place, value)."""
    places: dict[str, list[str]] = {}
    for place, value in pairs:
        places.setdefault(value, []).append(escape_markdown(place))
    return "; ".join(f"{escape_markdown(_shortened(value))}: {', '.join(names)}" for value, names in places.items())
