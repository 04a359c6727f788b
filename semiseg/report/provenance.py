"""Where the numbers of a report come from: protocol, settings of the rows, runs; and the warnings that follow."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from semiseg.config import RunConfig
from semiseg.config.former import leaves
from semiseg.config.read import parse_config
from semiseg.errors import UserError
from semiseg.report.aggregate import ReportInput, ReportTable
from semiseg.report.tables import code, escape_markdown, markdown_table
from semiseg.results import MAX_DETS, Result, same_validation_data

Settings = Mapping[str, str]

# Settings that say which data and which split; what these hold is in fingerprints and digests.
_NAMES = ("data.train_", "data.val_images", "data.val_annotations", "data.voc.", "data.hub.", "supervision.split")
_DATA = {  # format -> the settings that only it reads
    "coco": ("data.train_", "data.val_images", "data.val_annotations", "data.hub."),
    "shapes": ("data.shapes.",),
    "voc": ("data.voc.",),
}
_MEANT = ("supervision.", "objective.")  # what rows of one table are there to compare
_START = "start"
_LONGEST = 40  # characters of a value
_MOST_NAMED = 6  # runs; more are only counted


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Flat key -> value in words of a recorded configuration, without what a run's identity leaves out.

    Keys that the recording version did not know have their defaults. Names of data files and of the split are kept,
    since they tell a reader which data these are.
    """
    try:
        values = parse_config(RunConfig, dict(config), where="recorded configuration").model_dump(mode="json")
    except UserError:  # of a version with other keys
        values = dict(config)
    flat = flat_settings(values)
    unread = (keys for kind, keys in _DATA.items() if kind != flat.get("data.format"))
    left_out = ("seed", "init_from", "data.root", "runtime.", *chain.from_iterable(unread))
    return {key: value for key, value in flat.items() if key == "runtime.precision" or not key.startswith(left_out)}


def flat_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted path -> value in words of nested settings."""
    return {
        path: "—" if value is None else value if isinstance(value, str) else json.dumps(value)
        for path, value in leaves(values).items()
    }


def recorded_values(run: Result) -> dict[str, Any]:
    """The configuration of a run; a record names no path of initial weights, only that there were some."""
    return dict(run.config) | ({"init_from": "recorded weights"} if _has_start(run) else {})


def _has_start(run: Result) -> bool:
    return run.init_run is not None or run.identity.get("init") is not None


def _result_settings(run: Result) -> dict[str, str]:
    """The settings of a run, and over how many images its batch norms normalise where that is not the whole batch."""
    cut = flat_settings({name: run.identity[name] for name in ("normalised_together",) if name in run.identity})
    return settings(recorded_values(run)) | cut


def identity_settings(run: Result) -> Settings:
    """The settings of a run without mere names: what can change its numbers beside seed, data, split and start."""
    return {key: value for key, value in _result_settings(run).items() if not key.startswith(_NAMES)}


def run_settings(run: Result, pretraining: Sequence[Result]) -> Settings:
    """The settings of a run, in words as "start" what it starts from, and as "start...." the settings of that."""
    values = _result_settings(run)
    init = next((item for item in pretraining if item.run_id == run.init_run), None)
    if init is not None:
        start = _result_settings(init)
        values[_START] = f"pretraining ({start.get('optim.steps')} steps)"
        values |= {f"{_START}.{key}": value for key, value in start.items()}
    elif _has_start(run):
        values[_START] = "given weights"
    return values


def differing(columns: Sequence[Settings]) -> list[str]:
    """The keys whose values are not the same in all of these, in their order.

    Starts are compared by their settings if all are recorded runs, else in words.
    """
    keys = dict.fromkeys(key for column in columns for key in column)
    different = [key for key in keys if len({column.get(key) for column in columns}) > 1]
    if all(any(key.startswith(f"{_START}.") for key in column) for column in columns):
        return [key for key in different if key != _START]
    return [key for key in different if not key.startswith(f"{_START}.")]


def unmeant(columns: Sequence[Settings]) -> list[str]:
    """Those of the differing settings that are neither supervision nor mask losses, nor mere names of data."""
    return [key for key in differing(columns) if not key.startswith((*_MEANT, *_NAMES))]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def row_settings(report: ReportInput, table: ReportTable) -> dict[str, list[tuple[Result, Settings]]]:
    """Row name -> its runs with their settings, in the order of seeds; rows without a run are left out."""
    rows: dict[str, list[tuple[Result, Settings]]] = {}
    for row, _, run in report.cells(table):
        rows.setdefault(row, []).append((run, run_settings(run, report.pretraining_results)))
    return rows


def warnings(report: ReportInput) -> list[str]:
    """What a reader must know before the numbers: missing cells, and runs that do not belong together."""
    runs = [*report.runs(), *report.pretraining_results]
    same_validation = all(same_validation_data(runs[0], run) for run in runs)
    common: dict[str, Callable[[Result], str]] = {
        "training data" if same_validation else "data": lambda run: run.data_fingerprint,
        "code (git revisions)": lambda run: run.git_revision or "outside git",
        "versions": _versions,
        "limits of the evaluation (detections per image and class)": lambda run: str(run.max_dets),
        "devices": lambda run: re.sub(r", \d+ threads", "", run.device),  # threads change the last bits only
    }
    return [
        *(text for table in report.tables for text in _incomplete(report, table)),
        *report.notes,
        *(text for table in report.tables for text in _configuration_warnings(report, table)),
        *(
            f"**Mixed {what}.** {_runs_by(key, runs)}. Numbers of different {what} are not strictly comparable."
            for what, key in common.items()
            if len({key(run) for run in runs}) > 1
        ),
        *(text for table in report.tables for text in _split_warning(report, table)),
    ]


def _incomplete(report: ReportInput, table: ReportTable) -> list[str]:
    cells = []
    for row in table.rows:
        seeds = [str(seed) for seed in report.seeds if (table.name, row.name, seed) not in report.results]
        if seeds:
            cells.append(f"{code(row.name)} seed {', '.join(seeds)}")
    if not cells:
        return []
    text = f"**Incomplete.** {escape_markdown(table.name)} lacks {'; '.join(cells)}."
    if report.run_command:
        text += f" {code(report.run_command)} fills them, then {code(report.report_command)}."
    return [text]


def _configuration_warnings(report: ReportInput, table: ReportTable) -> list[str]:
    """Names seeds of one row that differ in more than the seed, and rows that differ in more than they are meant to."""
    rows, name = row_settings(report, table), escape_markdown(table.name)
    texts, mixed = [], set(table.varied)
    for row, runs in rows.items():
        keys = [key for key in differing([column for _, column in runs]) if not key.startswith(_NAMES)]
        mixed |= set(keys)
        if keys:
            values = _settings_by(keys, [(f"seed {run.seed}", column) for run, column in runs])
            texts.append(
                f"**Mixed configurations.** {name}: the seeds of {code(row)} differ in {values}. Their mean is not "
                "that of one configuration."
            )
    first = [(row, runs[0][1]) for row, runs in rows.items()]
    if keys := [key for key in unmeant([column for _, column in first]) if key not in mixed]:
        texts.append(
            f"**Different configurations.** {name}: beyond supervision and mask losses its rows differ in "
            f"{_settings_by(keys, first)}. What differs in AP may be due to that."
        )
    return texts


def _split_warning(report: ReportInput, table: ReportTable) -> list[str]:
    others = [run for *_, run in report.cells(table) if run.split_digest not in (None, table.split_digest)]
    if not table.split or not others:
        return []
    values = _runs_by(lambda run: f"{run.split} ({run.split_digest})", others)
    return [
        f"**Other split.** {escape_markdown(table.name)} shows the class groups of {code(table.split)} "
        f"({table.split_digest}), but these runs were trained with masks by another split or content: {values}."
    ]


def _settings_by(keys: Iterable[str], columns: Sequence[tuple[str, Settings]]) -> str:
    """ "`optim.batch_size` (`16`: neither, projection; `8`: full-masks)"."""
    values = {key: [(_shortened(column.get(key, "—")), name) for name, column in columns] for key in keys}
    return "; ".join(f"{code(key)} ({_by_value(pairs)})" for key, pairs in values.items())


def _runs_by(key: Callable[[Result], str], runs: Sequence[Result]) -> str:
    """ "`abc`: 23 runs; `def`: neither (few) seed 1"."""
    return _by_value((key(run), f"{run.row}{f' ({run.split})' if run.split else ''} seed {run.seed}") for run in runs)


def _by_value(pairs: Iterable[tuple[str, str]]) -> str:
    """Value and name of each -> the names of every value, in the order given."""
    names: dict[str, list[str]] = {}
    for value, name in pairs:
        names.setdefault(value, []).append(escape_markdown(name))
    return "; ".join(
        f"{code(value)}: {', '.join(own) if len(own) <= _MOST_NAMED else _runs(len(own))}"
        for value, own in names.items()
    )


def protocol(report: ReportInput) -> list[str]:
    """The section that says what was trained on what: data, start, schedule, seeds, rows, measure."""
    start = f"Every row starts from {escape_markdown(report.initial)}."
    if report.pretraining is not None:
        start = f"{escape_markdown(report.pretraining)} It stands in for the ImageNet weights of the paper."
    differ = "its mask loss" if all(table.alike for table in report.tables) else "its masks, mask loss and network"
    meanings = {row.name: row.meaning for table in report.tables for row in table.rows if row.meaning}
    words = "".join(f"\n  - {code(name)}: {escape_markdown(meaning)}" for name, meaning in meanings.items())
    lines = [
        f"- **Data.** {escape_markdown(report.data)}",
        f"- **Start.** {start}",
        f"- **Schedule.** {escape_markdown(report.schedule)}",
        f"- **Seeds.** {', '.join(map(str, report.seeds))}. Deviations are sample standard deviations over them.",
        f"- **Rows.** Every row has the boxes and classes of all objects and differs in {differ}.{words}",
        f"- **Measure.** COCO AP of masks in percent (pycocotools{_limits(report)}), on the validation images"
        f"{_left_out(report)}.",
    ]
    return ["## Protocol", "\n".join(lines)]


def _limits(report: ReportInput) -> str:
    """What of the detections was measured, where it is not COCO's 100."""
    limits = " or ".join(map(str, sorted({run.max_dets for run in report.runs()} - {MAX_DETS})))
    return f"; the best {limits} detections of each image and class, not COCO's {MAX_DETS}" if limits else ""


def _left_out(report: ReportInput) -> str:
    """Which objects the masks were not measured on."""
    counts = " or ".join(
        map(str, sorted({run.metrics["unmasked"] for run in report.runs() if "unmasked" in run.metrics}))
    )
    return f", without {counts} objects that have no mask, in whose boxes masks count for nobody" if counts else ""


def provenance(report: ReportInput) -> list[str]:
    """The section that says by what, when and from which data every number was made; its last block lists the runs."""
    runs, pretraining = report.runs(), list(report.pretraining_results)
    every = [*pretraining, *runs]
    hours = sum(run.seconds for run in every) / 3600
    trained = f"Trained by {code(report.run_command)}, this page by" if report.run_command else "This page by"
    facts: dict[str, Callable[[Result], str | None]] = {
        "Data fingerprint (training and validation)": lambda run: run.data_fingerprint,
        "Validation data": lambda run: run.val_fingerprint,
        "Git revision": lambda run: run.git_revision or "outside git",
        "Device": lambda run: run.device,
        "Versions": _versions,
    }
    lines = [
        f"- Recorded results: {', '.join(report.records)}; {_runs(len(runs))} and {len(pretraining)} of pretraining, "
        f"{hours:.3g} hours of training and evaluation in all.",
        f"- {trained} {code(report.report_command)}.",
    ]
    for name, fact in facts.items():
        if values := dict.fromkeys(value for run in every if (value := fact(run))):
            lines.append(f"- {name}: {'; '.join(map(code, values))}.")
    blocks = ["## Provenance", "\n".join(lines), *differences_section(report), *_class_lists(report)]
    if every:
        headings = ("run", "row", "split", "seed", "steps", "seconds", "git", "finished", "started from", "command")
        blocks += ["### Runs", markdown_table(headings, map(_run_cells, every), texts=len(headings))]
    return blocks


def differences_section(report: ReportInput) -> list[str]:
    """For each table the settings in which its rows differ, one column per row."""
    blocks = []
    for table in report.tables:
        rows, name = row_settings(report, table), escape_markdown(table.name)
        keys = differing([column for runs in rows.values() for _, column in runs])
        headings = ("setting", *(row.label for row in table.rows if row.name in rows))
        lines = []
        for key in keys:
            values = ("; ".join(dict.fromkeys(column.get(key, "—") for _, column in runs)) for runs in rows.values())
            lines.append([key, *map(_shortened, values)])
        if keys:
            blocks.append(f"Where the rows of {name} differ, beyond the seed:")
            blocks.append(markdown_table(headings, lines, texts=len(headings)))
        elif rows:
            blocks.append(f"The rows of {name} have the same configuration but for the seed.")
    return ["### Configuration of the rows", *blocks] if blocks else []


def _class_lists(report: ReportInput) -> list[str]:
    """Which classes of each split have masks and which only boxes; the classes alone where nothing is split."""
    lines: dict[str, None] = {}
    for table in report.tables:
        seen, unseen = (escape_markdown(", ".join(names)) or "none" for names in (table.seen, table.unseen))
        if table.split:
            digest = f"{code(table.split)} (digest {code(table.split_digest)})"
            lines[f"- {digest}: {len(table.seen)} seen: {seen}; {len(table.unseen)} unseen: {unseen}."] = None
        elif not any(other.split for other in report.tables):
            lines[f"- {len(table.seen)} classes: {seen}."] = None
    return ["### Classes", "\n".join(lines)] if lines else []


def _run_cells(run: Result) -> list[str]:
    return [
        run.run_id,
        run.row,
        run.split or "—",
        str(run.seed),
        str(run.steps),
        f"{run.seconds:.0f}",
        (run.git_revision or "—")[:16],
        run.finished,
        run.init_run or "—",
        run.command if isinstance(run.command, str) else shlex.join(run.command),
    ]


def _versions(run: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(run.versions.items()))


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
