"""What is said to the user: bad input, on which the command line exits with code 2, and notices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NO_MEMORY = ("out of memory", "can't allocate memory", "could not create a primitive")


class UserError(Exception):
    """Bad input. The message names file, place, value and the allowed ones."""


class StepError(RuntimeError):
    """A step of a training failed, and nothing says that its input is to blame: a sentence naming the whole error."""


class UserNotice(UserWarning):
    """What the user should know of input that is taken all the same: a sentence, as a warning."""


def lack_of_memory(error: BaseException) -> str | None:
    """What torch and its parts say where memory is short, as a sentence; None if the error is another one."""
    if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _NO_MEMORY):
        return None
    reason = str(error).strip().partition("\n")[0]
    return f"not enough memory ({reason})" if reason else "not enough memory"


def near_hint(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of an error about an unknown name, after a blank: the nearest known one, else `otherwise` or all of them.

    Case, underscores and hyphens do not matter for what is near.
    """
    known = list(known)
    plain = {_plain(item): item for item in known}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {plain[near[0]]!r}?"
    return f" Known: {', '.join(known) or 'none'}." if otherwise is None else otherwise


def differing_names(one: Iterable[str], other: Iterable[str]) -> str:
    """In what two lists of names, which are not the same, differ."""
    return ", ".join(sorted(set(one) ^ set(other))) or "their order"


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()
