"""`semiseg bench`: speed and memory beside straightforward formulations of the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semiseg.errors import UserError
from semiseg.resources import require_folder, write_text

if TYPE_CHECKING:
    from semiseg.bench.measure import Measurement, Scale


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions: about a minute on two cores.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Measure this row. Repeatable.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON; - = to the output.")
    ] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Measure instead how cost grows with instances, image size and classes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --growth: folder of growth.csv and growth.png.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True, help="For tests: smallest sizes, this process.")] = False,
) -> None:
    """Measure speed and memory.

    Every row does the same work twice, by this package and in a straightforward formulation, and compares the results.
    Exit code 1 if a result differs, whatever the times.

    Examples:

    semiseg bench --quick

    semiseg bench --only mask_losses --only step --json -

    semiseg bench --growth --out reports/benchmarks
    """
    if growth:
        if out is None or quick or only or json_file:
            raise UserError("--growth needs --out FOLDER, and goes with no other option")
        _growth(out, tiny=tiny)
        return
    if out is not None:
        raise UserError("--out goes with --growth; the numbers of the rows are written by --json FILE")
    if json_file not in (None, "-"):
        require_folder(Path(json_file).parent)
    scale: Scale = "tiny" if tiny else "quick" if quick else "full"
    measured = _measure(only or [], scale)
    _show(measured, scale, json_file)
    if not all(one.same_result for one in measured):
        raise typer.Exit(1)


def _measure(names: list[str], scale: Scale) -> list[Measurement]:
    from semiseg.bench.measure import measure_row
    from semiseg.bench.rows import chosen_rows

    measured = []
    for row in chosen_rows(names):
        typer.echo(f"measuring {row.name}", err=True)
        measured.append(measure_row(row, scale=scale, own_processes=scale != "tiny"))
    return measured


def _show(measured: list[Measurement], scale: Scale, json_file: str | None) -> None:
    """The table on the output, or, where the JSON goes there, on the error output."""
    from semiseg.bench.table import HEADINGS, benchmark_json, detail_lines, table_head, table_lines
    from semiseg.report.tables import text_table

    beside = json_file == "-"
    text = table_head(scale=scale) + "\n" + text_table(HEADINGS, table_lines(measured))
    typer.echo(text + "\n" + "\n".join(detail_lines(measured)), err=beside)
    wrong = [one.name for one in measured if not one.same_result]
    if wrong:
        typer.echo(f"semiseg: results differ from the straightforward formulation: {', '.join(wrong)}", err=True)
    if json_file is not None:
        content = _json_text(benchmark_json(measured, scale=scale))
        typer.echo(content, nl=False) if beside else write_text(Path(json_file), content)


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _growth(out: Path, *, tiny: bool) -> None:
    from semiseg.bench.growth import AXES, measure_growth, tiny_axes, write_growth
    from semiseg.bench.table import machine

    require_folder(out)
    axes = tiny_axes() if tiny else AXES
    points = measure_growth(axes, tell=lambda line: typer.echo(line, err=True), own_processes=not tiny)
    write_growth(points, out, title=machine())
    typer.echo(f"{len(points)} points in {out / 'growth.csv'}, drawn in {out / 'growth.png'}")
    wrong = [f"{p.axis.row.name} at {p.value}" for p in points if p.measured and not p.measured.same_result]
    if wrong:
        typer.echo(f"semiseg: results differ from the straightforward formulation: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)
