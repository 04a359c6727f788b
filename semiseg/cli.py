"""The verbs of the command line. Importing this imports no torch: `semiseg --help` answers at once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from semiseg import __version__
from semiseg.commands import convert, data, predict, pseudo, split, study, train
from semiseg.errors import StepError, UserError, lack_of_memory
from semiseg.files import FULL

# What typer raises on a command line that no verb takes; its own name is private.
USAGE_ERROR: Any = typer.BadParameter.__base__


class Root(TyperGroup):
    """The command itself: a line that no verb takes ends with one sentence, as bad input does."""

    def main(self, *args: Any, **named: Any) -> Any:
        """Runs a verb and exits; code 2 for such a line."""
        try:
            code = super().main(*args, **{**named, "standalone_mode": False})
        except USAGE_ERROR as error:
            code, told = error.exit_code, " ".join(error.format_message().split())
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                where = error.ctx.command_path if error.ctx else "semiseg"
                see = "" if told.endswith("?") else f"; see '{where} --help'"
                typer.echo(f"semiseg: {told[:1].lower()}{told[1:].removesuffix('.')}{see}", err=True)
        sys.exit(code)


# Plain help: the rich one costs a fifth of a second and breaks lines in examples.
app = typer.Typer(name="semiseg", cls=Root, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
splits = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
data_sets = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
conversions = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def errors_as_sentences(function: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with its errors as sentences: exit code 2 for bad input, 1 for a failed step, 130 when interrupted."""

    @functools.wraps(function)
    def verb(*args: Any, **named: Any) -> Any:
        code = 2
        try:
            return function(*args, **named)
        except UserError as error:
            sentence = str(error)
        except OSError as error:
            # A path that cannot be read or written; anything else keeps its traceback.
            if error.filename is None and error.errno not in FULL:
                raise
            path = f"{error.filename2 or error.filename}: " if error.filename is not None else ""
            sentence = f"{path}{error.strerror}"
        except StepError as error:
            code, sentence = 1, str(error)
        except (MemoryError, RuntimeError) as error:
            lack = lack_of_memory(error)
            if lack is None:  # keeps its traceback
                raise
            sentence = lack
        except KeyboardInterrupt as interruption:
            code, sentence = 130, str(interruption.args[0] if interruption.args else "interrupted")
        typer.echo(f"semiseg: {sentence}", err=True)
        raise typer.Exit(code)

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


VERBS: dict[typer.Typer, dict[str, Callable[..., None]]] = {
    splits: {"list": split.list_splits, "show": split.show, "make": split.make},
    data_sets: {"check": data.check, "split": data.split, "shapes": data.shapes},
    conversions: {"adelaidet": convert.adelaidet, "torchvision": convert.torchvision, "yolact": convert.yolact},
    app: {
        "train": train.train,
        "evaluate": train.evaluate,
        "predict": predict.predict,
        "pseudo": pseudo.pseudo,
        "run": study.run,
        "status": study.status,
        "report": study.report,
        "compare": study.compare,
    },
}
app.add_typer(splits, name="split", help="Class splits: which classes have masks and which only boxes.")
app.add_typer(data_sets, name="data", help="Data sets: check one, divide one, draw Shapes.")
app.add_typer(conversions, name="convert", help="Checkpoints of other implementations become model folders.")
for group, verbs in VERBS.items():
    for name, verb in verbs.items():
        group.command(name)(errors_as_sentences(verb))
