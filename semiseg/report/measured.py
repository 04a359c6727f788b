"""What was measured on the detections of runs, kept beside the report so that it outlives the run folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from semiseg.config_files import read_json
from semiseg.errors import UserError
from semiseg.resources import write_text
from semiseg.results import Result

MEASURED_NAME = "measured.json"
PARTS = ("bootstrap", "detections", "failures", "object_sizes", "thresholds")  # others are of earlier versions: dropped
# Of trainings (`Result.trained_as`), runs and data: digests of 16 letters, as no setting in a key has them.
_NAMES = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?:\.[0-9a-f]{8})?(?![0-9a-f])")


class Measured:
    """The measurements of one report.

    `measured.json` maps part -> key -> JSON value. A key names what the value follows from (`Result.trained_as`, and
    any setting of the measurement), so that a value never has to be measured twice; delete the file to measure anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path.is_file():
            with suppress(UserError):  # damaged: measured anew
                content = read_json(path)
                self._parts = {name: content[name] for name in PARTS if isinstance(content.get(name), dict)}
                self._changed = set(self._parts) != set(content)

    def get(self, part: str, key: str, measure: Callable[[], Any | None]) -> Any | None:
        """The kept value, else that of `measure`, which gives plain JSON values or None where it cannot measure."""
        kept = self._parts.setdefault(part, {})
        if key not in kept:
            value = measure()
            if value is None:
                return None
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
            self._changed = True
        return kept[key]

    def keep_only(self, recorded: Iterable[Result]) -> None:
        """Drops what was measured on trainings, runs or data that none of the results is of.

        A key without any name of that kind stays.
        """
        known = {name for run in recorded for name in (run.trained_as, run.run_id, run.data_fingerprint)}
        for kept in self._parts.values():
            for key in [key for key in kept if not set(_NAMES.findall(key)) <= known]:
                del kept[key]
                self._changed = True

    def save(self) -> None:
        """Writes the file if something was added or dropped."""
        if self._changed:
            parts = {name: dict(sorted(kept.items())) for name, kept in sorted(self._parts.items()) if kept}
            write_text(self._path, json.dumps(parts, separators=(",", ":"), ensure_ascii=False) + "\n")
            self._changed = False
