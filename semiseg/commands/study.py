"""`semiseg run`, `status` and `report`: studies; `semiseg compare`: any finished runs side by side."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semiseg.errors import UserError

if TYPE_CHECKING:
    from semiseg.report.aggregate import ReportInput
    from semiseg.studies.file import Study
    from semiseg.studies.machines import LaunchFile

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name or path of a study file (experiments/*.toml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Change a value of every run; pretrain.A.B=C and rows.A.B=C of some. Repeatable."
    ),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, instead of the study's.")]
WithoutPictures = Annotated[
    bool, typer.Option("--without-pictures", help="A report without images, where these must not be copied.")
]
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
    without_pictures: WithoutPictures = False,
    out: Out = None,
) -> None:
    """Train what is missing of a study, then report.

    Can be interrupted at any time; the same command continues.

    Examples:

    semiseg run shapes --jobs 2

    semiseg run shapes --only neither --seeds 0,1,2 --set optim.steps=200 --out reports/trial
    """
    from semiseg.studies.identity import RESULTS_NAME, plan
    from semiseg.studies.machines import lines_for_machines
    from semiseg.studies.report import check_printed, reference_input, require_report_folder
    from semiseg.studies.run import Execution, run_missing, runs_to_train
    from semiseg.studies.status import dry_run_text, run_status

    loaded, folder = _load(study, overrides, seeds, out)
    file = _launch_file(launch, processes)
    processes = file.processes
    if dry_run:
        typer.echo(dry_run_text(loaded, folder, only=only or (), processes=processes, reproduce=reproduce))
        return
    check_printed(loaded)  # said before the trainings rather than after
    require_report_folder(folder)
    planned = plan(loaded, only=only or (), processes=processes)
    results, typed = folder / RESULTS_NAME, ("semiseg", *sys.argv[1:])
    how = Execution(jobs=jobs, launch=file, reproduce=reproduce, typed=typed)
    if file.machines > 1 and (todo := runs_to_train(planned, results=results, how=how)):
        typer.echo("\n".join(lines_for_machines(todo, file)))
        return
    if not run_missing(planned, name=loaded.name, results=results, how=how):
        typer.echo(f"nothing to train: all {len(planned)} runs are done")
        if not reproduce and any(run_status(item, {}).state != "done" for item in planned):
            typer.echo("(some of them were recorded elsewhere; '--reproduce' trains them here)")
    recorded = None if overrides else reference_input(loaded)
    command = _command(study, overrides, seeds, out, without_pictures=without_pictures)
    _report(loaded, folder, record=folder, command=command, pictures=not without_pictures, recorded=recorded)


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
    from semiseg.studies.status import status_text

    loaded, folder = _load(study, overrides, seeds, out)
    typer.echo(status_text(loaded, folder, processes=processes))


def report(
    study: StudyName,
    overrides: Overrides = None,
    seeds: Seeds = None,
    without_pictures: WithoutPictures = False,
    out: Out = None,
) -> None:
    """Rebuild a report from recorded results.

    Needs no training, no data and no run folders. In an --out that has no record, from that in reports/<study>.

    Example: semiseg report shapes
    """
    from semiseg.studies.report import record_folder, require_report_folder

    loaded, folder = _load(study, overrides, seeds, out)
    record = record_folder(loaded, folder)
    require_report_folder(folder)
    command = _command(study, overrides, seeds, out, without_pictures=without_pictures)
    _report(loaded, folder, record=record, command=command, pictures=not without_pictures)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Folder of a run, its id, or STUDY:ROW[:SPLIT][:SEED]."),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Class split whose unseen and seen classes are shown apart, or 'none'. Default: that of the runs.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. Default: reports/compare/<ids>.")] = None,
) -> None:
    """Compare finished runs and write a report.

    They may be of several studies. Their numbers come from the records in reports/*/results.jsonl or from their
    folders; nothing is trained. Runs that differ only in their seed are one row, with mean and standard deviation. Runs
    whose validation data differ are refused. The beginning of an id is enough; STUDY:ROW means all its runs. Ids stand
    in the reports and in 'semiseg status STUDY'.

    Examples:

    semiseg compare shapes_seeds:box-supervised shapes_table3:projection

    semiseg compare runs/mine a201527f c3f73351 --split shapes_few_seen
    """
    from semiseg.config.read import digest
    from semiseg.studies.compare import comparison, find_runs, known_runs
    from semiseg.studies.report import build, require_report_folder

    known = known_runs()
    chosen = {run.result.run_id: run for name in runs for run in find_runs(name, known)}
    if len(chosen) < 2:
        raise UserError(f"{' '.join(runs)}: is one run; a comparison needs two or more")
    ids = [run.short_id for run in chosen.values()]
    folder_name = "-".join(ids if len(ids) <= 6 else [*ids[:5], f"{len(ids)}runs", digest(ids, 6)])
    folder = out or Path("reports") / "compare" / folder_name
    require_report_folder(folder)
    command = ["semiseg", "compare", *runs, *_typed({"--split": split, "--out": out})]
    report = comparison(list(chosen.values()), known, split=split, command=command)
    text, path = build(report, folder)
    notes = [note.replace("**", "").replace("`", "'") + "\n" for note in report.notes]
    typer.echo("\n".join([text, *notes, _written(path)]))


def _load(study: str, overrides: list[str] | None, seeds: str | None, out: Path | None) -> tuple[Study, Path]:
    """The study, and the folder of its record and report."""
    from semiseg.studies.file import load_study
    from semiseg.studies.identity import REPORTS_FOLDER

    numbers = None
    if seeds is not None:
        try:
            numbers = [int(text) for text in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {seeds!r}: expected numbers with commas between, such as 0,1,2") from None
    loaded = load_study(study, overrides or (), seeds=numbers)
    return loaded, out or REPORTS_FOLDER / loaded.name


def _launch_file(name: str | None, processes: int) -> LaunchFile:
    from semiseg.studies.machines import LaunchFile, read_launch_file

    if name is None:
        return LaunchFile(processes=processes)
    if processes > 1:
        raise UserError(
            f"--processes {processes}: the number of processes is that of --launch {name}; give one of the two"
        )
    file = read_launch_file(name)
    os.environ.update(file.environment)  # of a single process, which is started without accelerate's launcher
    return file


def _command(
    study: str, overrides: list[str] | None, seeds: str | None, out: Path | None, *, without_pictures: bool = False
) -> list[str]:
    changes = [part for item in overrides or [] for part in ("--set", item)]
    changes += ["--without-pictures"] if without_pictures else []
    return ["semiseg", "run", study, *changes, *_typed({"--seeds": seeds, "--out": out})]


def _typed(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() if value for part in (name, str(value))]


def _written(path: Path) -> str:
    return f"report: {path}\nto open: {path.with_name('index.html')}"


def _report(
    study: Study,
    folder: Path,
    *,
    record: Path,
    command: list[str],
    pictures: bool,
    recorded: ReportInput | None = None,
) -> None:
    from semiseg.studies.report import build, report_input

    report = replace(report_input(study, record, command=command), pictures=pictures)
    text, path = build(report, folder, recorded=recorded)
    typer.echo(f"\n{text}\n{_written(path)}")
