"""The record of finished runs: one JSON line per run, only ever appended to.

A line holds everything that a table needs, so that reports are rebuilt without checkpoints or data.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from semiseg.config.former import with_present_keys
from semiseg.config.read import digest, explain, read_json_lines
from semiseg.errors import UserError, UserNotice

MAX_DETS = 100  # best detections of an image and class: the limit of every AP that COCO reports


def _checked_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("expected a time with its zone")
    return text


def _with_instances(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The classes of a run, and how many detections were measured, are read off its metrics without the rest."""
    counts = metrics.get("instances")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise ValueError(f"'instances' is {json.dumps(counts)[:80]}, allowed: a table of class = number of objects")
    if type(limit := metrics.get("max_dets", MAX_DETS)) is not int or limit < 1:
        raise ValueError(f"'max_dets' is {json.dumps(limit)[:80]}, allowed: a whole number of at least 1")
    return metrics


EDGE_NUMBERS = {"edges", "different", "learned_auc", "colour_auc", "calibration_error"}


def _with_all_numbers(edges: Mapping[str, Mapping[str, float]] | None) -> Mapping[str, Mapping[str, float]] | None:
    for group, numbers in (edges or {}).items():
        if group not in ("seen", "unseen") or set(numbers) != EDGE_NUMBERS:
            allowed = f"'seen' and 'unseen' with {', '.join(sorted(EDGE_NUMBERS))}"
            raise ValueError(f"'{group[:80]}' is {json.dumps(numbers)[:80]}, allowed: {allowed}")
    return edges


RESULT_NAME = "result.json"  # of a run: the engine writes it last, so that a folder with it is finished


@dataclass(frozen=True)
class Result:
    """One finished run; `checked` looks whether its values are of these types, which Python does not."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    run_id: Annotated[str, Field(min_length=1)]  # digest of `identity`, see `studies.identity.run_identity`
    study: str
    row: str  # `pretrain`: the detector pretraining shared by a seed's rows
    split: str | None
    split_digest: str | None
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    config: Mapping[str, Any]  # `RunConfig` as plain values under today's keys, without paths of initial weights
    identity: Mapping[str, Any]
    data_fingerprint: str  # digest of the data's content, as the run itself found it
    # of `evaluation.coco_metrics.Metrics.to_dict()`, in percent
    metrics: Annotated[Mapping[str, Any], AfterValidator(_with_instances)]
    steps: Annotated[int, Field(ge=0, lt=2**63)]
    seconds: Annotated[float, Field(ge=0)]  # of training and evaluation
    device: str
    versions: Mapping[str, str]
    git_revision: str | None
    command: Sequence[str]
    finished: Annotated[str, AfterValidator(_checked_time)]  # ISO 8601 with zone
    init_run: str | None = None  # run_id of the run whose weights this one started from
    processes: Annotated[int, Field(ge=1, lt=2**63)] = 1
    # Of runs with learned affinity, see `engine.edges.edge_quality`: "seen" and "unseen" -> its numbers.
    edges: Annotated[Mapping[str, Mapping[str, float]] | None, AfterValidator(_with_all_numbers)] = None
    val_fingerprint: str | None = None  # of the validation annotations; None in records from before it was kept

    @property
    def max_dets(self) -> int:
        """The best so many detections of each image and class were measured."""
        return int(self.metrics.get("max_dets", MAX_DETS))

    @property
    def trained_as(self) -> str:
        """`run_id` and a digest of the numbers: tells trainings of one run apart, unless they gave the same numbers."""
        return f"{self.run_id}.{digest(self.metrics, 8)}"


_RESULT = TypeAdapter(Result)


def checked(values: Any, *, where: str) -> Result:
    """The result of plain values, as JSON holds them; a UserError that names `where` and what is wrong with them.

    Half a character, as in an argument that is not UTF-8, is "?".
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a result of this version (no table)")
    if isinstance(values.get("config"), dict):
        values = {**values, "config": with_present_keys(values["config"])}
    try:
        # Strict, and yet an array is a sequence: only text is validated so.
        return _RESULT.validate_json(_json(values))
    except ValueError as error:  # also one that is not finite
        reason = explain(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{where}: not a result of this version ({reason})") from None


def _json(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def append(path: Path, result: Result) -> bool:
    """Adds a result in one write that has reached the disk; False if this very result is recorded already.

    The same run trained again is a new line. A result that could not be read again is a UserError, and not written.
    """
    result = checked(asdict(result), where=f"run {result.run_id}")
    if any((item.run_id, item.finished) == (result.run_id, result.finished) for item in read(path)):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _json(asdict(result)) + b"\n"
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            # An interrupted write left half a line: the new one must not be glued to it.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return True


def read(path: Path) -> list[Result]:
    """All results in the order of writing; [] if there is no such file.

    A line cut off by an interruption is left out with a warning; one that is damaged in another way is a UserError.
    """
    results = []
    for number, values in read_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(values, ValueError):
            results.append(checked(values, where=where))
        elif "EOF" in str(values):  # what every beginning of a line misses
            warnings.warn(f"{where}: cut off by an interruption; ignored", UserNotice, stacklevel=2)
        else:
            raise UserError(f"{where}: damaged ({values}); mend or remove this line")
    return results


def latest(results: Iterable[Result]) -> dict[str, Result]:
    """run_id -> its newest result (the last one written)."""
    return {result.run_id: result for result in results}


def ap_in_words(metrics: Mapping[str, Any]) -> str:
    """Mask and box AP of all classes, as far as they were measured: "mask AP 31.3, box AP 40.2"."""
    groups = {what: (metrics.get(kind) or {}).get("groups", {}) for what, kind in (("mask", "segm"), ("box", "bbox"))}
    numbers = {what: (of_kind.get("all") or {}).get("AP") for what, of_kind in groups.items()}
    return ", ".join(f"{what} AP {value:.1f}" for what, value in numbers.items() if value is not None)


def limit_in_words(max_dets: int) -> str:
    """ "" for COCO's own limit, else the sentence that goes with numbers measured at another."""
    if max_dets == MAX_DETS:
        return ""
    return f"measured: the best {max_dets} detections of each image and class (COCO's own numbers look at {MAX_DETS})"


def same_validation_data(first: Result, second: Result) -> bool:
    """Whether two results were measured on the same images and objects, so that their numbers may stand side by side.

    Records from before `val_fingerprint` was kept count as the same if all their data are.
    """
    if first.val_fingerprint is None or second.val_fingerprint is None:
        return first.data_fingerprint == second.data_fingerprint
    return first.val_fingerprint == second.val_fingerprint
