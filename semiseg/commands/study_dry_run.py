"""`semiseg run STUDY --dry-run`: what would be trained, on what, and for about how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from semiseg.config import RunConfig
from semiseg.engine.processes import parts_per_step
from semiseg.report.tables import text_table
from semiseg.results import latest, read
from semiseg.study import Study
from semiseg.study_child import this_machine
from semiseg.study_plan import (
    RESULTS_NAME,
    RUNS_FOLDER,
    class_names,
    listed_runs,
    missing_data,
    plan,
    planned_steps,
)
from semiseg.study_run import RunStatus, run_status, runs_to_do

if TYPE_CHECKING:
    from semiseg.study_estimate import StepEstimate

ESTIMATE_SECONDS = 60.0  # for all measurements together
_MANY_HOURS = 100  # from here on also said in days


@dataclass(frozen=True)
class _Line:
    """One run of the list.

    Attributes:
        state: as shown.
        done: steps that need not be trained again.
        run_id: "" if it is not known, for want of the data.
    """

    row: str
    split: str | None
    seed: int
    config: RunConfig
    state: str
    done: int = 0
    run_id: str = ""


def list_runs(
    study: Study, folder: Path, *, only: Sequence[str], processes: int, reproduce: bool, estimate: bool
) -> None:
    """Prints the runs that would be trained; nothing is trained.

    Without the data at hand all runs are listed, and one line says what is missing: which of them are done can only be
    told from the annotations.

    Args:
        folder: of the study's record.
        estimate: also say how long they take, for which a step of each kind of run may be measured.
    """
    missing = missing_data(study, only=only)
    if missing is None:
        planned = plan(study, only=only, processes=processes)
        recorded = latest(read(folder / RESULTS_NAME))
        lines = [_planned_line(run_status(run, recorded)) for run in runs_to_do(planned, recorded, reproduce=reproduce)]
        total = len(planned)
    else:
        runs = listed_runs(study, only=only, processes=processes)
        lines, total = [_Line(run.row, run.split, run.seed, run.config, "unknown") for run in runs], len(runs)
    steps = _estimates(lines, processes, at_hand=missing is None) if estimate and lines else []
    if lines:
        typer.echo(_table(lines, steps, processes), nl=False)
    typer.echo(f"{len(lines)} of {total} runs to train" + ", if none is done" * (missing is not None))
    if not lines and not reproduce:
        typer.echo("all are done or recorded; '--reproduce' lists those that were recorded elsewhere")
    if missing is not None:
        typer.echo(f"which of them are done cannot be told without the data: {missing}")
    for sentence in _told(lines, steps):
        typer.echo(sentence)


def _planned_line(status: RunStatus) -> _Line:
    run = status.run
    done = status.step or 0 if status.state == "started" else 0
    state: str = status.state
    if status.state == "started" and status.steps is not None:
        state = f"step {status.step} of {status.steps}"
    return _Line(run.row, run.split, run.seed, run.config, state, done, run.run_id)


def _estimates(lines: Sequence[_Line], processes: int, *, at_hand: bool) -> list[StepEstimate]:
    from semiseg.study_estimate import estimate_steps

    return estimate_steps(
        [line.config for line in lines],
        processes=processes,
        runs_folder=RUNS_FOLDER,
        num_classes=len(class_names(lines[0].config.data)) if at_hand else None,
        seconds=ESTIMATE_SECONDS,
        say=lambda text: typer.echo(f"semiseg: {text}", err=True),
    )


def _table(lines: Sequence[_Line], steps: Sequence[StepEstimate], processes: int) -> str:
    gpus = str(processes) if this_machine().gpus else "none"
    cells = []
    for number, line in enumerate(lines):
        hours = _hours(line, steps[number]) if steps else None
        length = planned_steps(line.config)
        cells.append(
            [
                *(line.row, line.split or "", str(line.seed), line.state),
                str(length) if length is not None else f"{line.config.optim.epochs:g} epochs",
                _batch(line.config, processes),
                gpus,
                *([_shown(hours)] if steps else []),
                line.run_id,
            ]
        )
    headings = ("row", "split", "seed", "state", "steps", "batch", "GPUs", *(["hours"] if steps else []), "run")
    return text_table(headings, cells)


def _batch(config: RunConfig, processes: int) -> str:
    """Images per step: in all, and as processes x accumulation parts x images where that is not one."""
    parts, batch = parts_per_step(config, processes), config.optim.batch_size
    shares = [f"{processes}"] * (processes > 1) + [f"{parts} parts"] * (parts > 1)
    return f"{batch} = {' x '.join([*shares, str(batch // processes // parts)])}" if shares else str(batch)


def _hours(line: _Line, step: StepEstimate) -> float | None:
    """What is left of a run; None where its steps or their length are not known."""
    length = planned_steps(line.config)
    return None if length is None or step.seconds is None else (length - line.done) * step.seconds / 3600


def _shown(hours: float | None) -> str:
    return "—" if hours is None else two_digits(hours)


def two_digits(value: float) -> str:
    """A positive estimate with the two digits that it deserves: 0.052, 1.5, 43, 43000."""
    decimals = 1 - math.floor(math.log10(float(f"{value:.1e}"))) if value > 0 else 0
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def _told(lines: Sequence[_Line], steps: Sequence[StepEstimate]) -> list[str]:
    """The sum, and where the seconds per step come from."""
    if not steps:
        return []
    hours = [_hours(line, step) for line, step in zip(lines, steps, strict=True)]
    known = [value for value in hours if value is not None]
    runs = "" if len(known) == len(lines) else f" for {len(known)} of the runs"
    total = sum(known)
    days = f" ({two_digits(total / 24)} days)" * (total > _MANY_HOURS)
    told = [f"about {two_digits(total)} hours{days} in all{runs}, one run after the other"] if known else []
    sources = dict.fromkeys(step.source for step in steps)
    what = "training alone: no reading of images, no exchange between processes, no evaluation"
    return [*told, *sources, *([what] * bool(known))]
