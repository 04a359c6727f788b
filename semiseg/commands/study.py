"""`semiseg run`, `status` and `report`: studies."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semiseg.errors import UserError
from semiseg.resources import require_folder

if TYPE_CHECKING:
    from semiseg.study import Study
    from semiseg.study_launch import LaunchFile
    from semiseg.study_plan import PlannedRun
    from semiseg.study_run import RunStatus

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name or path of a study file (experiments/*.toml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Change a value of every run; pretrain.A.B=C and rows.A.B=C of some. Repeatable."
    ),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of the study's.")]
Out = Annotated[Path | None, typer.Option(help="Folder of record and report. Default: reports/<study>.")]


def run(
    study: StudyName,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only this row. Repeatable.")] = None,
    seeds: Seeds = None,
    jobs: Annotated[int, typer.Option(min=1, help="Independent runs side by side.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes per run, through accelerate.")] = 1,
    launch: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Instead of --processes: accelerate's configuration file for each run."),
    ] = None,
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="Train also what is only recorded, as by another machine.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be trained, with times of finished runs alike.")
    ] = False,
    out: Out = None,
) -> None:
    """Train what is missing of a study, then report.

    Can be interrupted at any time; the same command continues.

    Examples:

    semiseg run shapes --jobs 2

    semiseg run shapes --only neither --seeds 0,1,2 --set optim.steps=200 --out reports/trial
    """
    from semiseg.study_plan import RESULTS_NAME, plan
    from semiseg.study_run import Execution, run_missing, run_status

    loaded = _load(study, overrides, seeds)
    folder = _folder(loaded, out)
    file = _launch_file(launch, processes)
    path, processes = (None, processes) if file is None else (file.path, file.processes)
    if dry_run:
        from semiseg.commands.study_dry_run import listed

        typer.echo(listed(loaded, folder, only=only or (), processes=processes, reproduce=reproduce))
        return
    planned = plan(loaded, only=only or (), processes=processes)
    require_folder(folder)
    typed = ("semiseg", *sys.argv[1:])
    if file is not None and file.machines > 1 and _told_machines(planned, file, folder, reproduce, typed):
        return
    how = Execution(jobs=jobs, processes=processes, launch=path, reproduce=reproduce, typed=typed)
    trained = run_missing(planned, name=loaded.name, results=folder / RESULTS_NAME, how=how)
    if not trained:
        typer.echo(f"nothing to train: all {len(planned)} runs are done")
    if not trained and not reproduce and any(run_status(item, {}).state != "done" for item in planned):
        typer.echo("(some of them were recorded elsewhere; '--reproduce' trains them here)")
    _build_report(loaded, folder, record=folder, command=_command(study, overrides, seeds, out))
    if not overrides:
        _say_beside_reference(loaded, folder)


def _launch_file(name: str | None, processes: int) -> LaunchFile | None:
    if name is None:
        return None
    if processes > 1:
        raise UserError(
            f"--processes {processes}: the number of processes is that of --launch {name}; give one of the two"
        )
    from semiseg.study_launch import read_launch_file

    file = read_launch_file(name)
    os.environ.update(file.environment)  # of a single process, which is started without accelerate's launcher
    return file


def _told_machines(
    planned: list[PlannedRun], file: LaunchFile, folder: Path, reproduce: bool, typed: tuple[str, ...]
) -> bool:
    """Says what to type on several machines, whose runs nobody can start from one of them; False: all are done."""
    from semiseg.results import latest, read
    from semiseg.study_launch import lines_for_machines
    from semiseg.study_plan import RESULTS_NAME
    from semiseg.study_run import record_ended

    record_ended(planned, results=folder / RESULTS_NAME, typed=typed)
    lines = lines_for_machines(planned, latest(read(folder / RESULTS_NAME)), file, reproduce=reproduce)
    if lines:
        typer.echo(
            f"# {len(lines)} runs on {file.machines} machines: in this folder, on each machine, in this order, with "
            "RANK 0 on that of main_process_ip;\n# afterwards the same 'semiseg run' records them and reports"
        )
        typer.echo("\n".join(lines))
    return bool(lines)


def status(
    study: StudyName,
    overrides: Overrides = None,
    seeds: Seeds = None,
    processes: Annotated[
        int, typer.Option(min=1, help="As in 'run': under the linear batch rule other runs are meant.")
    ] = 1,
    out: Out = None,
) -> None:
    """Show which runs of a study are done.

    The others are under way (started) or missing. Without the data the runs are listed, their state unknown.

    Example: semiseg status shapes
    """
    from semiseg.results import latest, read
    from semiseg.study_plan import RESULTS_NAME, missing_data, plan
    from semiseg.study_run import run_status

    loaded = _load(study, overrides, seeds)
    lacking = missing_data(loaded)
    if lacking is not None:
        listed = plan(loaded, processes=processes, by_name=True)
        lines = [[run.row, run.split or "", str(run.seed), "unknown", "", ""] for run in listed]
        typer.echo(_status_table(lines), nl=False)
        typer.echo(
            f"{loaded.name}: {len(listed)} runs; which of them are done cannot be told without the data: {lacking}"
        )
        return
    recorded = latest(read(_folder(loaded, out) / RESULTS_NAME))
    statuses = [run_status(item, recorded) for item in plan(loaded, processes=processes)]
    typer.echo(_status_table([_status_line(item) for item in statuses]), nl=False)
    counts = Counter(item.state for item in statuses)
    typer.echo(f"{loaded.name}: " + ", ".join(f"{counts[state]} {state}" for state in ("done", "started", "missing")))


def report(study: StudyName, overrides: Overrides = None, seeds: Seeds = None, out: Out = None) -> None:
    """Rebuild a report from recorded results.

    Needs no training, no data and no run folders. In an --out that has no record, from that in reports/<study>.

    Example: semiseg report shapes
    """
    loaded = _load(study, overrides, seeds)
    folder = _folder(loaded, out)
    record = _record_folder(loaded, folder)
    require_folder(folder)
    _build_report(loaded, folder, record=record, command=_command(study, overrides, seeds, out))


def _load(study: str, overrides: list[str] | None, seeds: str | None) -> Study:
    from semiseg.study import load_study

    numbers = None
    if seeds is not None:
        try:
            numbers = [int(text) for text in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {seeds!r}: expected numbers with commas between, such as 0,1,2") from None
    return load_study(study, overrides or (), seeds=numbers)


def _folder(study: Study, out: Path | None) -> Path:
    from semiseg.study_plan import REPORTS_FOLDER

    return out or REPORTS_FOLDER / study.name


def _command(study: str, overrides: list[str] | None, seeds: str | None, out: Path | None) -> list[str]:
    changes = [part for item in overrides or [] for part in ("--set", item)]
    given = [part for name, value in (("--seeds", seeds), ("--out", out)) if value for part in (name, str(value))]
    return ["semiseg", "run", study, *changes, *given]


def _say_beside_reference(study: Study, folder: Path) -> None:
    """What a run gave beside the means over seeds that are recorded for it, where they are at hand."""
    from semiseg.commands.study_report import report_input
    from semiseg.report.page import beside_recorded
    from semiseg.study_plan import RESULTS_NAME

    if study.reference is None:
        return
    reference = _load(study.reference, None, None)
    record = _folder(reference, None)
    if not (record / RESULTS_NAME).is_file():
        return
    inputs = [report_input(one, place, command=("semiseg",)) for one, place in ((study, folder), (reference, record))]
    if text := beside_recorded(*inputs):
        typer.echo(
            f"\nbeside the means ± deviations over {len(reference.seeds)} seeds in {record} (one seed moves by several "
            f"AP with processor and chance; '!' is further away than two deviations):\n\n{text}"
        )


def _record_folder(study: Study, folder: Path) -> Path:
    """Where the study's results are recorded: the folder of the report, else the study's own."""
    from semiseg.study_plan import RESULTS_NAME

    places = list(dict.fromkeys((folder, _folder(study, None))))
    for place in places:
        if (place / RESULTS_NAME).is_file():
            return place
    raise UserError(
        f"{' and '.join(str(place) for place in places)}: no recorded results; 'semiseg run {study.name}' makes them"
    )


def _build_report(study: Study, folder: Path, *, record: Path, command: list[str]) -> None:
    from semiseg.commands.study_report import build

    text, path = build(study, folder, record=record, command=command)
    typer.echo(f"\n{text}\nreport: {path}\nto open: {path.with_name('index.html')}")


def _status_line(item: RunStatus) -> list[str]:
    from semiseg.study_run import finished_at

    run = item.run
    return [run.row, run.split or "", str(run.seed), item.shown, finished_at(item.when), run.run_id]


def _status_table(lines: list[list[str]]) -> str:
    from semiseg.report.tables import text_table

    return text_table(("row", "split", "seed", "state", "finished", "run"), lines)
