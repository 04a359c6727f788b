"""`python -m semiseg` and the `semiseg` command."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from types import FrameType

from semiseg.errors import UserNotice

_library_format = warnings.formatwarning


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Notices as sentences; warnings of libraries keep their place in the code."""
    own = issubclass(category, UserNotice)
    return f"semiseg: {message}\n" if own else _library_format(message, category, filename, lineno, line)


def main() -> None:
    """Runs the command line; exits with 0, with 2 on bad input, with 130 when interrupted."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    # A stop from outside (SIGTERM) leaves as little behind as Ctrl-C does. What was started to ignore them still does.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is shown escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _formatted
    try:
        from semiseg.cli import app

        app(prog_name="semiseg")
    except (Exception, KeyboardInterrupt):
        # Modules that are just being imported may turn an interruption into an error of their own.
        if not interrupted:
            raise
        sys.stderr.write("semiseg: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
