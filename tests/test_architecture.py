"""The house rules that a machine can check: layers, sizes of files and functions, names that say nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "semiseg"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "files", "project", "config", "splits", "structures", "results"}
# room -> rooms that it may import (docs/ARCHITECTURE.md, rule 8)
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "project": {"errors"},
    "config": {"errors", "config"},
    "splits": {"errors", "files", "project", "config"},
    "structures": {"errors", "structures"},
    "results": {"errors", "config"},
    "overlays": {"structures"},
    "data": BASE | {"data"},
    "models": BASE | {"models"},
    "losses": BASE | {"losses"},
    "evaluation": BASE | {"evaluation"},
    "engine": BASE | {"data", "models", "losses", "evaluation", "engine", "overlays"},
    "interop": BASE | {"models", "engine", "interop"},
    "studies": BASE | {"data", "engine", "report", "studies"},
    "api": BASE | {"data", "models", "losses", "engine"},
    "report": BASE | {"evaluation", "overlays", "report"},
    "commands": BASE | {"data", "losses", "evaluation", "engine", "interop", "studies", "api", "report", "commands"},
    "cli": {"errors", "files", "commands", "cli"},
    "__main__": {"errors", "cli"},
    "__init__": BASE | {"api", "losses"},
}


def room_of(name: str) -> str:
    """The room of a file or module name below `semiseg`: its folder, or its own name."""
    first = name.split(".")[0]
    return first


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "semiseg":
                names = [f"semiseg.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {room_of(name.removeprefix("semiseg.")) for name in names if name.startswith("semiseg.")}
    return rooms - {"__version__"}


def test_the_guard_looks_at_the_whole_package() -> None:
    assert len(FILES) >= 45
    rooms = {room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers_and_sizes(path: Path) -> None:
    room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert imported_rooms(path) <= ALLOWED[room], f"{room} may not import {imported_rooms(path) - ALLOWED[room]}"
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 600, "files stay under 600 lines"
    assert path.stem not in ("utils", "misc", "helpers", "common")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines; functions stay under 60"


def test_nine_tenths_of_the_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert len(lengths) > 200
    assert lengths[int(0.9 * len(lengths))] <= 40


def test_public_modules_functions_and_classes_say_what_they_do() -> None:
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            missing.append(str(path))
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.name}: {node.name}")
    assert missing == []
