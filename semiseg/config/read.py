"""Reading configurations: TOML and JSON files, overrides, and errors in one sentence with place and allowed values."""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from semiseg.config.former import USUAL_KINDS, describe_former
from semiseg.config.section import kind_of, tables_of
from semiseg.errors import UserError, near_hint

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
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, which is no syntax error
        raise UserError(f"{path}: not valid TOML: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds a table; anything else is a `UserError` that names it."""
    try:
        values = from_json(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a table of values, not {type(values).__name__}")
    return values


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its value) of every line that is not blank; nothing if there is no such file.

    The value of a line that is no JSON is the ValueError that says why. Lines end at "\\n" alone, not at U+2028.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, from_json(line)
            except ValueError as error:
                yield number, error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark at the start
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_config(kind: type[Config], values: dict[str, Any], *, where: str, overrides: Sequence[str] = ()) -> Config:
    """Validates `values`; every error becomes one sentence with place, value and the allowed or nearest ones.

    Args:
        where: they are from, for the messages.
        overrides: `a.b=c` that are laid over them; the message of an error in one of these names it instead.
    """
    values = apply_overrides(values, overrides)
    _refuse_unusable(values, where)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, item, where, overrides) for item in error.errors())) from None


def check_settings(kind: type[BaseModel], values: dict[str, Any], *, where: str) -> None:
    """Refuses settings that are wrong whatever they are laid under; what only the whole can tell passes."""
    try:
        kind.model_validate(values)
    except ValidationError as error:
        wrong = [_explain(kind, item, where, ()) for item in error.errors() if item["type"] != "value_error"]
        if wrong:
            raise UserError("; ".join(wrong)) from None


def _source(path: str, where: str, overrides: Sequence[str]) -> str:
    """The override that gave the value at a path, or where all other values are from."""
    names = path.split(".")
    for item in reversed(overrides):
        keys = [key.strip() for key in item.partition("=")[0].split(".")]
        if names[: len(keys)] == keys:
            return f"--set {item}"
    return where


def _refuse_unusable(values: dict[str, Any], where: str) -> None:
    """Refuses what some field takes and no file system or tensor does: null characters, integers beyond 64 bits."""
    pending: list[tuple[str, Any]] = [("", values)]
    while pending:  # no recursion: overrides may nest as deeply as they like
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}.{index}", item) for index, item in enumerate(value)]
        elif isinstance(value, str) and "\0" in value:
            raise UserError(f"{where}: {path[1:]!r}: a text with a null character (value: {_shown(value)})")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: {path[1:]!r}: allowed: integers of at most 64 bits")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], *, partial: bool = False) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set, later ones last; c is read as a TOML value, or as text if it is none.

    Another `kind` begins its table anew, since it has other keys, but for those that overrides of their own have given.
    Where `values` are partial, to be laid over others, a table without a kind may be of any.
    """
    result = copy.deepcopy(values)
    given: set[str] = set()  # paths that have overrides of their own
    for item in overrides:
        key, sign, text = item.partition("=")
        *parents, last = (part.strip() for part in key.split("."))
        if not sign or not all([*parents, last]):
            raise UserError(f"--set {item!r}: expected the form a.b=value")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {item!r}: {parent!r} is a value, not a table")
        value = _toml_value(text.strip())
        usual = value if partial else USUAL_KINDS.get(".".join(parents), value)
        if last == "kind" and table.get("kind", usual) != value:
            for name in [name for name in table if ".".join([*parents, name]) not in given]:
                del table[name]
        table[last] = value
        path = ".".join([*parents, last])
        given = {other for other in given if not other.startswith(f"{path}.")} | {path}
    return result


def merge(base: dict[str, Any], change: dict[str, Any], above: str = "") -> dict[str, Any]:
    """`base` with the tables of `change` laid over it, key by key; lists and values are replaced whole.

    A table of another `kind` is replaced whole, too: it has other keys. One of `base` that names none has the usual.
    A key that is a table in one of them and a value in the other is a UserError.
    """
    usual = USUAL_KINDS.get(above[:-1], change.get("kind"))
    result = {} if "kind" in change and base.get("kind", usual) != change["kind"] else dict(base)
    for key, value in change.items():
        tables = [isinstance(item, dict) for item in (result.get(key, value), value)]
        if any(tables) and not all(tables):
            path, wrong = above + key, value if tables[0] else result[key]
            former = describe_former(path, wrong)
            hint = "" if former is None else f". {former}"
            raise UserError(f"{path!r}: expected a table of values, not {_shown(wrong)}{hint}")
        result[key] = merge(result[key], value, f"{above}{key}.") if all(tables) and key in result else value
    return result


def _toml_value(text: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # ValueError: no TOML, or a number of too many digits
        return text
    return values["value"] if len(values) == 1 else text  # more than one line


def _explain(kind: type[BaseModel], item: Any, where: str, overrides: Sequence[str]) -> str:
    path, tables = _place(kind, item["loc"])
    if item["type"] == "union_tag_invalid":
        item = {**item, "msg": f"allowed: {item['ctx']['expected_tags']}", "input": item["input"].get("kind")}
        path += ".kind"
    elif item["type"] == "union_tag_not_found":
        item = {**item, "msg": "expected a table of values"}
    source, former = _source(path, where, overrides), describe_former(path, item["input"])
    if item["type"] == "extra_forbidden":
        key, allowed = path.rpartition(".")[2], list(tables[0].model_fields) if tables else []
        readers = [kind_of(table) for table in tables[1:] if key in table.model_fields]
        if former is not None:
            hint = f" {former}"
        elif readers:
            hint = f" Kind {' or '.join(map(repr, readers))} reads it, not {kind_of(tables[0])!r}."
        else:
            hint = near_hint(key, allowed, otherwise=f" Allowed here: {', '.join(allowed)}.")
        return f"{source}: unknown key {path!r}.{hint}"
    if former is not None and not isinstance(item["input"], dict):
        return f"{source}: {path!r} is a table of its own now (value: {_shown(item['input'])}). {former}"
    return f"{source}: {explain(item, path)}"


def explain(item: Any, path: str | None = None) -> str:
    """One of the errors of a `ValidationError`: place, what is allowed, and the value."""
    path = ".".join(str(part) for part in item["loc"]) if path is None else path
    message: str = item["msg"].removeprefix("Value error, ")
    if not path:
        return message
    shown = "" if isinstance(item["input"], dict) else f" (value: {_shown(item['input'])})"
    return f"{path!r}: {message}{shown}"


def _shown(value: Any) -> str:
    """A value for a message, cut to one readable length."""
    try:
        text = repr(value)
    except ValueError:  # Python shows no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted path of an error, and the kinds of the table that holds its last key, the chosen one first.

    Between the name of a table that has several kinds and its keys pydantic's location names the kind.
    """
    names: list[str] = []
    within, below = [kind], [kind]  # kinds of the table of the last name, and of the table that it names, if any
    kind_is_next = False
    for part in location:
        chosen = [table for table in below if kind_is_next and kind_of(table) == part]
        kind_is_next = False
        if chosen:
            below = chosen + [table for table in below if table is not chosen[0]]
            continue
        names.append(str(part))
        if not isinstance(part, int):
            within = below
            field = within[0].model_fields.get(part) if within else None
            below = tables_of(field.annotation) if field is not None else []
            kind_is_next = len(below) > 1
    return ".".join(names), within
