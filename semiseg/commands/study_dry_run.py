"""`semiseg run STUDY --dry-run`: what would be trained, and for how long where finished runs say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semiseg.config import RunConfig
from semiseg.config_files import digest, parse_config, read_json
from semiseg.engine.logs import format_seconds
from semiseg.engine.processes import parts_per_step
from semiseg.errors import UserError
from semiseg.report.tables import text_table
from semiseg.results import latest, read
from semiseg.study import Study
from semiseg.study_child import this_machine
from semiseg.study_plan import RESULTS_NAME, RUNS_FOLDER, missing_data, plan, planned_steps
from semiseg.study_run import RESULT_NAME, run_status, runs_to_do

TRAINING_ALONE = "training alone, one run after the other, as the newest finished runs of the same kind took on"


def listed(study: Study, folder: Path, *, only: Sequence[str], processes: int, reproduce: bool) -> str:
    """The runs that would be trained, as a table with what is to be known of them.

    Without the data at hand all runs are listed, and one line says what is missing: which of them are done can only be
    told from the annotations.

    Args:
        folder: of the study's record.
    """
    missing = missing_data(study, only=only)
    planned = plan(study, only=only, processes=processes, by_name=missing is not None)
    recorded = latest(read(folder / RESULTS_NAME))
    todo = planned if missing else runs_to_do(planned, recorded, reproduce=reproduce)
    known = seconds_per_step(RUNS_FOLDER, processes)
    gpus = str(processes) if this_machine().gpus else "none"
    rows: list[list[str]] = []
    times: list[tuple[float, str]] = []  # seconds that are left of a run, and the device they are known from
    for run in todo:
        status, steps = run_status(run, recorded), planned_steps(run.config)
        time = "—"
        if steps is not None and (kind := _kind(run.config, processes)) in known:
            seconds, device = known[kind]
            times.append(((steps - (status.step or 0)) * seconds, device))
            time = format_seconds(times[-1][0])
        rows.append(
            [
                *(run.row, run.split or "", str(run.seed), "unknown" if missing else status.shown),
                f"{run.config.optim.epochs:g} epochs" if steps is None else str(steps),
                *(_batch(run.config, processes), gpus, time, "" if missing else run.run_id),
            ]
        )
    table = text_table(("row", "split", "seed", "state", "steps", "batch", "GPUs", "time", "run"), rows) if rows else ""
    lines = [f"{len(todo)} of {len(planned)} runs to train{', if none is done' if missing else ''}"]
    if missing:
        lines.append(f"which of them are done cannot be told without the data: {missing}")
    if times:
        total, devices = format_seconds(sum(left for left, _ in times)), sorted({device for _, device in times})
        lines.append(f"about {total} for {len(times)} of them: {TRAINING_ALONE} {', '.join(devices)}")
    elif todo:
        lines.append(f"no times: no run of the same kind is finished in {RUNS_FOLDER}/")
    elif not reproduce:
        lines.append("all are done or recorded; '--reproduce' lists those that were recorded elsewhere")
    return table + "\n".join(lines)


def _batch(config: RunConfig, processes: int) -> str:
    """Images per step: in all, and as processes x accumulation parts x images where that is not one."""
    parts, batch = parts_per_step(config, processes), config.optim.batch_size
    factors = [str(processes)] if processes > 1 else []
    factors += [f"{parts} parts"] if parts > 1 else []
    return f"{batch} = {' x '.join([*factors, str(batch // processes // parts)])}" if factors else str(batch)


def seconds_per_step(runs_folder: Path, processes: int) -> dict[str, tuple[float, str]]:
    """Kind of run -> seconds of a step and device, of the newest finished run of that kind on so many processes."""
    newest: dict[str, tuple[str, float, str]] = {}
    for path in runs_folder.glob(f"*/*/{RESULT_NAME}"):
        try:
            result: dict[str, Any] = read_json(path)
            config = parse_config(RunConfig, read_json(path.parent / "config.json")["config"], where=str(path.parent))
            if result.get("processes", 1) == processes:
                found = (result["finished"], result["train_seconds"] / result["steps"], result["device"])
                kind = _kind(config, processes)
                newest[kind] = max(found, newest.get(kind, found))
        except (UserError, KeyError, TypeError, ZeroDivisionError):
            continue  # no whole run, or one of another version: it says nothing about this study
    return {kind: (seconds, device) for kind, (_, seconds, device) in newest.items()}


def _kind(config: RunConfig, processes: int) -> str:
    """Equal for runs whose steps take equally long: they differ in seed, length, rates and the split's classes."""
    batch = [config.optim.batch_size, config.optim.optimizer, parts_per_step(config, processes)]
    return digest({**config.identity(initial=True), "seed": 0, "optim": batch})
