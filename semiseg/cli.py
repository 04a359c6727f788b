"""The verbs of the command line. Importing this imports no torch: `semiseg --help` answers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from semiseg import __version__
from semiseg.commands import compare, convert, data, predict, split, study, train
from semiseg.errors import UserError
from semiseg.files import FULL

NO_MEMORY = ("out of memory", "can't allocate memory", "could not create a primitive")

# Plain help: the rich one costs a fifth of a second and breaks lines in examples.
app = typer.Typer(name="semiseg", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
splits = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
data_sets = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
conversions = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def _speaks(function: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with its errors as sentences: exit code 2 for bad input, 130 for an interruption."""

    @functools.wraps(function)
    def verb(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except UserError as error:
            typer.echo(f"semiseg: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            # A path that cannot be read or written; anything else keeps its traceback.
            if error.filename is None and error.errno not in FULL:
                raise
            place = f"{error.filename2 or error.filename}: " if error.filename is not None else ""
            typer.echo(f"semiseg: {place}{error.strerror}", err=True)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:
            # How torch and its parts say that memory is short; anything else keeps its traceback.
            told = str(error).strip().partition("\n")[0]
            if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in NO_MEMORY):
                raise
            typer.echo(f"semiseg: not enough memory{f' ({told})' if told else ''}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interruption:
            typer.echo(f"semiseg: {interruption.args[0] if interruption.args else 'interrupted'}", err=True)
            raise typer.Exit(130) from None

    return verb


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"semiseg {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Semi-supervised instance segmentation: masks for some classes, boxes for all.

    Example: semiseg run shapes --jobs 2
    """


for group, name, about in (
    (splits, "split", "Class splits: which classes have masks and which only boxes."),
    (data_sets, "data", "Data sets: check one, draw Shapes, measure one."),
    (conversions, "convert", "Checkpoints of other implementations become model folders."),
):
    app.add_typer(group, name=name, help=about)

splits.command("list")(_speaks(split.list_splits))
splits.command("show")(_speaks(split.show))
splits.command("make")(_speaks(split.make))
splits.command("check")(_speaks(split.check))
data_sets.command("check")(_speaks(data.check))
data_sets.command("shapes")(_speaks(data.shapes))
data_sets.command("affinity")(_speaks(data.affinity))
conversions.command("adelaidet")(_speaks(convert.adelaidet))
app.command("train")(_speaks(train.train))
app.command("evaluate")(_speaks(train.evaluate))
app.command("predict")(_speaks(predict.predict))
app.command("run")(_speaks(study.run))
app.command("status")(_speaks(study.status))
app.command("report")(_speaks(study.report))
app.command("compare")(_speaks(compare.compare))
