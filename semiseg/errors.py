"""What is said to the user: bad input, on which the command line exits with code 2, and notices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names file, place, value and the allowed ones."""


class UserNotice(UserWarning):
    """What the user should know of input that is taken all the same: a sentence, as a warning."""


def near_hint(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of an error about an unknown name, after a blank: the nearest known one, else all of them.

    Args:
        otherwise: said instead of all of them.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known) or 'none'}." if otherwise is None else otherwise
