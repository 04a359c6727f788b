"""`python -m semiseg` and the `semiseg` command."""

from __future__ import annotations

from semiseg.cli import app


def main() -> None:
    """Runs the command line; exits with 0, with 2 on bad input, with 130 when interrupted."""
    app(prog_name="semiseg")


if __name__ == "__main__":
    main()
