"""The record of finished runs: one JSON line per run, only ever appended to.

A line holds everything that a table needs, so that reports are rebuilt without checkpoints or data.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from semiseg.config_files import digest
from semiseg.errors import UserError


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        run_id: digest of `identity`.
        study, row: where the run belongs; row `pretrain` is the detector pretraining shared by a seed's rows.
        split: name of the class split, or None if the run does not depend on one.
        split_digest: `ClassSplit.digest`, or None.
        seed: of initialisation, order of the data and augmentation.
        config: the resolved `RunConfig` as plain values, without paths of initial weights.
        identity: what can change the numbers: {"config", "split", "data", "init"}.
        data_fingerprint: digest of the data's content, as the run itself found it.
        metrics: `evaluation.coco_metrics.Metrics.to_dict()`: percent, per class and group, "bbox" and "segm".
        steps: optimizer steps.
        seconds: training and evaluation.
        device: in words.
        versions: package -> version.
        git_revision: of the working tree, or None outside of one.
        command: what the user typed.
        finished: ISO 8601 time with zone.
        init_run: run_id of the run whose weights this one started from, or None.
        processes: that trained together.
        val_fingerprint: digest of the validation annotations alone; None in records from before it was kept.
    """

    run_id: str
    study: str
    row: str
    split: str | None
    split_digest: str | None
    seed: int
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    data_fingerprint: str
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    device: str
    versions: Mapping[str, str]
    git_revision: str | None
    command: Sequence[str]
    finished: str
    init_run: str | None = None
    processes: int = 1
    val_fingerprint: str | None = None

    @property
    def trained_as(self) -> str:
        """`run_id` and a digest of the numbers: tells trainings of one run apart, unless they gave the same numbers."""
        return f"{self.run_id}.{digest(self.metrics, 8)}"


def append(path: Path, result: Result) -> bool:
    """Adds a result in one write that has reached the disk; False if this very result is recorded already.

    The same run trained again (on another machine) is a new line; `latest` reads the newest.
    """
    known = {(item.run_id, item.finished) for item in read(path)}
    if (result.run_id, result.finished) in known:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        # An interrupted write left half a line: the new one must not be glued to it.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    return True


def read(path: Path) -> list[Result]:
    """All results in the order of writing; [] if there is no such file.

    A line cut off by an interruption is left out with a warning.

    Raises:
        UserError: a whole line that is no result of this version; names file and line.
    """
    if not path.exists():
        return []
    results = []
    names = {item.name for item in fields(Result)}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            warnings.warn(f"{path}, line {number}: cut off by an interruption, or damaged; ignored", stacklevel=2)
            continue
        if not isinstance(values, dict) or set(values) - names:
            extra = ", ".join(sorted(set(values) - names)) if isinstance(values, dict) else "no table"
            raise UserError(f"{path}, line {number}: not a result of this version ({extra})")
        try:
            result = Result(**values)
            _check(result)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: not a result of this version ({error})") from None
        results.append(result)
    return results


def _check(result: Result) -> None:
    """Raises ValueError for values that nobody could have recorded."""
    for name in ("config", "identity", "metrics", "versions"):
        if not isinstance(getattr(result, name), Mapping):
            raise ValueError(f"{name!r} is {getattr(result, name)!r}")
    datetime.fromisoformat(result.finished)


def latest(results: Iterable[Result]) -> dict[str, Result]:
    """run_id -> its newest result (the last one written)."""
    return {result.run_id: result for result in results}


def same_validation_data(first: Result, second: Result) -> bool:
    """Whether two results were measured on the same images and objects, so that their numbers may stand side by side.

    Records from before `val_fingerprint` was kept count as the same if all their data are, or if both are Shapes drawn
    by one version of the generator with the same size, number and seed; else nobody can tell, which counts as no.
    """
    if first.data_fingerprint == second.data_fingerprint:
        return True
    if first.val_fingerprint is not None and second.val_fingerprint is not None:
        return first.val_fingerprint == second.val_fingerprint
    drawn = [_drawn_validation(result) for result in (first, second)]
    return drawn[0] is not None and drawn[0] == drawn[1]


def _drawn_validation(result: Result) -> tuple[Any, ...] | None:
    """What the validation images of the embedded data set follow from; None for other data."""
    data, drawn = result.config.get("data", {}), str(result.identity.get("data", ""))
    if data.get("format") != "shapes" or not drawn.startswith("shapes-"):
        return None
    return drawn, *(data.get("shapes", {}).get(name) for name in ("image_size", "val_images", "val_seed"))
