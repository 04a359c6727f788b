"""`semiseg compare`: any finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semiseg.config.read import digest
from semiseg.errors import UserError
from semiseg.files import require_folder
from semiseg.project import find


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
    """Compare finished runs, of one study or of several, and write a report.

    The numbers come from the records in reports/*/results.jsonl or from the folders of the runs; nothing is trained.
    Runs that differ only in their seed are one row, with mean and standard deviation. Runs whose validation data
    differ are refused. The beginning of an id is enough; STUDY:ROW means all its runs. Ids stand in the reports and
    in 'semiseg status STUDY'.

    Examples:

    semiseg compare shapes_seeds:box-supervised shapes_table3:projection

    semiseg compare runs/mine a201527f c3f73351 --split shapes_few_seen
    """
    from semiseg.report.page import build_report, report_text
    from semiseg.studies.compare import comparison, find_runs, known_runs

    known = known_runs()
    chosen = {run.result.run_id: run for name in runs for run in find_runs(name, known)}
    if len(chosen) < 2:
        raise UserError(f"{' '.join(runs)}: is one run; a comparison needs two or more")
    folder = out or Path("reports") / "compare" / _folder_name([run.short_id for run in chosen.values()])
    require_folder(folder)
    given = [part for name, value in (("--split", split), ("--out", out)) if value for part in (name, str(value))]
    command = ["semiseg", "compare", *runs, *given]
    report = comparison(list(chosen.values()), known, split=split, command=command)
    path = build_report(report, out=folder, published=find("published", "boxinst"))
    notes = [note.replace("**", "").replace("`", "'") + "\n" for note in report.notes]
    typer.echo("\n".join([report_text(report), *notes, f"report: {path}\nto open: {path.with_name('index.html')}"]))


def _folder_name(ids: list[str]) -> str:
    """The ids of up to six runs; of more the first five and how many there are in all, with a digest of all."""
    return "-".join(ids if len(ids) <= 6 else [*ids[:5], f"{len(ids)}runs", digest(ids, 6)])
