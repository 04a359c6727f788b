"""What was measured on the detections of runs, kept beside the report so that it outlives the run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from semiseg.config.read import read_json
from semiseg.errors import UserError
from semiseg.files import write_text

MEASURED_NAME = "measured.json"


class Measured:
    """The measurements of one report.

    `measured.json` maps part -> key -> JSON value. A key names what the value follows from (`Result.trained_as`, and
    any setting of the measurement), so that a value never has to be measured twice; delete the file to measure anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with suppress(UserError):  # damaged: measured anew
                self._parts = {name: kept for name, kept in read_json(path).items() if isinstance(kept, dict)}

    def get(self, part: str, key: str, measure: Callable[[], Any | None]) -> Any | None:
        """The kept value, else that of `measure`, which gives plain JSON values or None where it cannot measure."""
        kept = self._parts.setdefault(part, {})
        if key not in kept and (value := measure()) is not None:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        return kept.get(key)

    def save(self) -> None:
        """Writes the file if there is something to keep."""
        parts = {name: dict(sorted(kept.items())) for name, kept in sorted(self._parts.items()) if kept}
        if parts:
            write_text(self._path, json.dumps(parts, separators=(",", ":"), ensure_ascii=False) + "\n")
