"""Speed and memory beside straightforward formulations of the same work; docs/PERFORMANCE.md says how.

    python -m benchmarks --quick                                  # about a minute on two cores
    python -m benchmarks --only mask_losses --only step --json -
    python -m benchmarks --growth --out reports/benchmarks

Every row does the same work twice, by this package and in a straightforward formulation, and compares the results.
Exit code 1 if a result differs, whatever the times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import growth
from benchmarks.measure import Scale, measure_row
from benchmarks.rows import chosen_rows
from semiseg.engine.run import device_name, git_revision, package_versions
from semiseg.errors import UserError
from semiseg.files import require_folder, write_text

HEADINGS = ("row", "s", "straightforward", "speed-up", "MB", "straightforward", "ratio", "same result")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: about a minute on two cores")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="measure this row; repeatable")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - = to the output")
    parser.add_argument("--growth", action="store_true", help="measure instead how cost grows with the sizes")
    parser.add_argument("--out", type=Path, help="with --growth: folder of growth.csv and growth.png")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: smallest sizes, one process
    asked = parser.parse_args(arguments)
    if asked.growth and (asked.out is None or asked.quick or asked.only or asked.json):
        parser.error("--growth needs --out FOLDER, and goes with no other option")
    if asked.out is not None and not asked.growth:
        parser.error("--out goes with --growth; the numbers of the rows are written by --json FILE")
    try:
        wrong = _growth(asked.out, asked.tiny) if asked.growth else _rows(asked)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if wrong:
        print(f"benchmarks: results differ from the straightforward formulation: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _rows(asked: argparse.Namespace) -> list[str]:
    """Measures rows and shows them; returns the names of those with a wrong result."""
    if asked.json not in (None, "-"):
        require_folder(Path(asked.json).parent)
    scale: Scale = "tiny" if asked.tiny else "quick" if asked.quick else "full"
    measured = []
    for row in chosen_rows(asked.only):
        print(f"measuring {row.name}", file=sys.stderr)
        if scale == "tiny" and row.tiny_agree is not None:
            row = replace(row, agree=row.tiny_agree)
        passes = {"full": row.passes, "quick": row.quick_passes, "tiny": 1}[scale]
        measured.append(measure_row(row, sizes=row.sizes_at(scale), passes=passes, own_processes=scale != "tiny"))
    # Where the JSON goes to the output, the table goes beside it.
    print(text(measured, scale), file=sys.stderr if asked.json == "-" else sys.stdout)
    if asked.json is not None:
        content = json.dumps(as_json(measured, scale), indent=2, ensure_ascii=False) + "\n"
        print(content, end="") if asked.json == "-" else write_text(Path(asked.json), content)
    return [row["name"] for row in measured if not row["same_result"]]


def _growth(out: Path, tiny: bool) -> list[str]:
    require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    axes = growth.TINY_AXES if tiny else growth.AXES
    points = growth.measure_growth(axes, tell=lambda line: print(line, file=sys.stderr), own_processes=not tiny)
    growth.write_growth(points, out, title=machine())
    print(f"{len(points)} points in {out / 'growth.csv'}, drawn in {out / 'growth.png'}")
    wrong = points[points.same_result == False]  # noqa: E712  # None: not measured
    return [f"{row} at {value}" for row, value in zip(wrong.row, wrong.value, strict=True)]


def as_json(measured: Sequence[dict[str, Any]], scale: Scale) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {
        "device": machine(),
        "scale": scale,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "rows": list(measured),
    }


def text(measured: Sequence[dict[str, Any]], scale: Scale) -> str:
    """Device and versions, the table, and of every row what the table leaves out."""
    versions = ", ".join(f"{name} {value}" for name, value in package_versions().items())
    head = f"device    {machine()}\nversions  {versions}\nscale     {scale}; {torch.get_num_threads()} threads\n"
    table = pd.DataFrame([table_line(row) for row in measured], columns=HEADINGS).to_string(index=False)
    details = []
    for row in measured:
        parts = [f"{name} {value}" for name, value in row["sizes"].items()]
        parts += [f"{name} {value:.3g}" for name, value in list(row.items())[list(row).index("sizes") + 1 :]]
        details.append(f"{row['name']}: {', '.join(parts)}; {row['passes']} passes")
    return "\n".join([head, table, *details])


def table_line(row: dict[str, Any]) -> list[str]:
    """The cells under `HEADINGS`."""
    seconds = [f"{s:.3g}" if s < 100 else f"{s:.0f}" for s in (row["seconds"], row["baseline_seconds"])]
    memory = [f"{row['memory_mb']:.1f}", f"{row['baseline_memory_mb']:.1f}", f"{row['memory_ratio']:.3f}"]
    return [row["name"], *seconds, f"{row['speedup']:.2f}x", *memory, "yes" if row["same_result"] else "NO"]


def machine() -> str:
    """The processor with its cores, and the GPU, or "no GPU"."""
    gpu = device_name(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    processor = named.group(1).strip() if named else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores; {gpu}"


if __name__ == "__main__":
    sys.exit(main())
