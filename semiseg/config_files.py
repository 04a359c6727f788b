"""Reading configurations: TOML and JSON files, overrides, and errors in one sentence with place and allowed values."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from semiseg.errors import UserError

Config = TypeVar("Config", bound=BaseModel)


def digest(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path, length: int = 16) -> str:
    """Hex digest of a file's content; a missing file is a `UserError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:length]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file; a syntax error or an unreadable file is a `UserError` that names it."""
    try:
        return tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds a table; anything else is a `UserError` that names it."""
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a table of values, not {type(values).__name__}")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark at the start
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_config(kind: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """Validates `values`; every error becomes one sentence with place, value and the allowed or nearest ones."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, item, where) for item in error.errors())) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set; c is read as a TOML value, or as text if it is none."""
    result = copy.deepcopy(values)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not all(key.strip().split(".")):
            raise UserError(f"--set {item!r}: expected the form a.b=value")
        table = result
        *parents, last = key.strip().split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {item!r}: {parent!r} is a value, not a table")
        table[last] = _toml_value(text.strip())
    return result


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `change` laid over it, key by key; lists and values are replaced whole.

    Raises:
        UserError: a key is a table in one of them and a value in the other.
    """
    result = dict(base)
    for key, value in change.items():
        tables = [isinstance(item, dict) for item in (result.get(key, value), value)]
        if any(tables) and not all(tables):
            wrong = value if tables[0] else result[key]
            raise UserError(f"{key!r}: expected a table of values, not {wrong!r}")
        result[key] = merge(result[key], value) if all(tables) and key in result else value
    return result


def _toml_value(text: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # ValueError: no TOML, or a number of too many digits
        return text
    return values["value"] if len(values) == 1 else text  # more than one line


def _explain(kind: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        allowed = _keys_at(kind, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Allowed here: {', '.join(allowed)}."
        return f"{where}: unknown key {path!r}.{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if not path:
        return f"{where}: {message}"
    shown = "" if isinstance(item["input"], dict) else f" (value: {item['input']!r})"
    return f"{where}: {path!r}: {message}{shown}"


def _keys_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)
