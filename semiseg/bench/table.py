"""What `semiseg bench` says: the JSON for programs, the lines of the table for people."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from semiseg.bench.measure import Measurement, Scale
from semiseg.engine.run import device_name, git_revision, package_versions

HEADINGS = ("row", "s", "straightforward", "speed-up", "MB", "straightforward", "ratio", "same result")


def benchmark_json(measured: Sequence[Measurement], *, scale: Scale) -> dict[str, Any]:
    """Everything that was measured, and on what: JSON-serialisable.

    `rows` have the keys name, seconds, baseline_seconds, speedup, memory_mb, baseline_memory_mb, memory_ratio (ours /
    straightforward) and same_result; and sizes, passes, the peaks of the whole processes, facts of the row.
    """
    return {
        "device": machine(),
        "scale": scale,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "git_revision": git_revision(),
        "rows": [_row(one) for one in measured],
    }


def _row(one: Measurement) -> dict[str, Any]:
    return {
        "name": one.name,
        "seconds": one.seconds,
        "baseline_seconds": one.baseline_seconds,
        "speedup": one.speedup,
        "memory_mb": one.memory_mb,
        "baseline_memory_mb": one.baseline_memory_mb,
        "memory_ratio": one.memory_ratio,
        "same_result": one.same_result,
        "passes": one.passes,
        "process_mb": one.total_mb,
        "baseline_process_mb": one.baseline_total_mb,
        "sizes": dict(one.sizes),
        **one.facts,
    }


def table_head(*, scale: Scale) -> str:
    """The lines above the table: device, versions, how it was measured."""
    versions = ", ".join(f"{name} {value}" for name, value in package_versions().items())
    return f"device    {machine()}\nversions  {versions}\nscale     {scale}; {torch.get_num_threads()} threads\n"


def table_lines(measured: Sequence[Measurement]) -> list[list[str]]:
    """One list of texts per row, under `HEADINGS`."""
    return [
        [
            one.name,
            seconds_text(one.seconds),
            seconds_text(one.baseline_seconds),
            f"{one.speedup:.2f}x",
            f"{one.memory_mb:.1f}",
            f"{one.baseline_memory_mb:.1f}",
            f"{one.memory_ratio:.3f}",
            "yes" if one.same_result else "NO",
        ]
        for one in measured
    ]


def detail_lines(measured: Sequence[Measurement]) -> list[str]:
    """Sizes, passes and facts of every row."""
    lines = []
    for one in measured:
        parts = [f"{name} {value}" for name, value in one.sizes.items()]
        parts += [f"{name} {value:.3g}" for name, value in one.facts.items()]
        lines.append(f"{one.name}: {', '.join(parts)}; {one.passes} passes")
    return lines


def seconds_text(seconds: float) -> str:
    """Three digits, whatever the size."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def machine() -> str:
    """The processor with its cores, and the GPU, or "no GPU"."""
    gpu = device_name(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"
    return f"{_processor()}, {os.cpu_count()} cores; {gpu}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
