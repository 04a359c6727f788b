"""Tool: the memory of the training loader's processes together, and how long a start takes.

    python -m tests.measure_loader_memory DATA                       # DATA as made by tests.make_large_coco, or COCO
    python -m tests.measure_loader_memory DATA --methods fork --workers 8 --batch-size 2 --batches 100

For every start method a fresh process opens the data as a training does and fetches the same batches, first without
workers, then with them. Memory is the proportional set size (PSS, from /proc/PID/smaps_rollup: a page that n processes
share counts 1/n for each), summed over the process and all its descendants, at its largest over the batches. Shared
memory of batches that no process has mapped, or has mapped and not yet written, is in no PSS; the sizes of the open
files say how much that is, and it is added.
`--step-seconds` lets the reader wait between batches as a training step does, so that as many wait as can.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from semiseg.config import RunConfig

METHODS = ("fork", "forkserver", "spawn")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Measurement:
    """Of one process with its workers.

    Attributes:
        method: start method, None for the default; workers: 0 = everything in the main process.
        open_seconds: from the configuration to the tables: digests, listing of the images, opening of Arrow.
        first_batch_seconds: from asking for the first batch to having it: the start of the workers included.
        seconds: of all batches behind the first.
        pss: largest sum over all processes, in bytes; main_pss: the main process's part of it.
        waiting: bytes of shared memory that are taken but not in `pss`, at that moment.
        processes: alive at that moment.
    """

    method: str | None
    workers: int
    open_seconds: float
    first_batch_seconds: float
    seconds: float
    pss: int
    main_pss: int
    waiting: int
    processes: int

    @property
    def total(self) -> int:
        """All memory in bytes."""
        return self.pss + self.waiting


def pss(process: int, kind: str = "Pss") -> int:
    """Proportional set size of a process in bytes, or its part "Pss_Shmem"; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), 0)


def unmapped(processes: Sequence[int]) -> int:
    """Bytes of the shared-memory files that the processes hold open, less what is in their PSS."""
    held: dict[tuple[int, int], int] = {}
    for process in processes:
        try:
            for file in Path(f"/proc/{process}/fd").iterdir():
                if os.readlink(file).startswith("/dev/shm/"):
                    status = file.stat()
                    held[status.st_dev, status.st_ino] = 512 * status.st_blocks
        except OSError:  # it has ended, or closed the file
            continue
    return max(sum(held.values()) - sum(pss(process, "Pss_Shmem") for process in processes), 0)


def family(process: int) -> list[int]:
    """The process and all its living descendants."""
    members = [process]
    for member in members:  # grows while it is walked
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, children.read_text().split())
            except OSError:
                continue
    return members


def data_config(data: Path, *, batch_size: int, settings: Sequence[str] = ()) -> RunConfig:
    """The default training of COCO with `data` as its root."""
    from semiseg.config.read import apply_overrides, parse_config

    fixed = [f"data.root={json.dumps(str(data))}", f"optim.batch_size={batch_size}", "optim.steps=1000000"]
    return parse_config(RunConfig, apply_overrides({}, [*fixed, *settings]), where="measure")


def measure(
    config: RunConfig, *, method: str | None, workers: int, batches: int, step_seconds: float = 0.0
) -> Measurement:
    """Fetches batches in this process and its workers, at most one per `step_seconds`."""
    # As a training does: the whole engine is imported before the workers start.
    from semiseg.data.loader import StepBatches, build_loader
    from semiseg.engine.build import build_data, train_dataset

    started = time.perf_counter()
    data = build_data(config)
    opened = time.perf_counter()
    order = StepBatches(
        len(data.train),
        batch_size=config.optim.batch_size,
        accumulation=1,
        processes=1,
        rank=0,
        seed=0,
        start_step=0,
        steps=batches,
    )
    options: dict[str, Any] = {} if method is None else {"start_method": method}
    loader = build_loader(
        train_dataset(config, data),
        batches=order,
        size_divisor=config.model.size_divisor,
        workers=workers,
        pin_memory=False,
        **options,
    )
    largest, first = (0, 0, 0, 0), 0.0
    for number, _ in enumerate(loader):
        first = first or time.perf_counter()
        time.sleep(step_seconds)
        if number % 5 == 4 or number == batches - 1:
            members = family(os.getpid())
            shares = [pss(member) for member in members]
            largest = max(largest, (sum(shares), shares[0], unmapped(members), len(members)), key=lambda m: m[0] + m[2])
    ended = time.perf_counter()
    return Measurement(method, workers, opened - started, first - opened, ended - first, *largest)


def measure_apart(
    data: Path,
    *,
    method: str | None,
    workers: int,
    batches: int,
    batch_size: int,
    step_seconds: float = 0.0,
    settings: Sequence[str] = (),
) -> Measurement:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.measure_loader_memory", str(data), "--alone"]
    command += ["--workers", str(workers), "--batches", str(batches), "--batch-size", str(batch_size)]
    command += ["--step-seconds", str(step_seconds)]
    command += [*(["--methods", method] if method else []), *[part for item in settings for part in ("--set", item)]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def report(measured: Measurement, baseline: Measurement) -> str:
    """One line of the table."""
    method = (measured.method or "default") if measured.workers else "none"
    return (
        f"{method:<12}{measured.workers:>3} workers  {measured.processes:>2} processes  "
        f"PSS {measured.pss / MEBIBYTE:6.0f} + waiting {measured.waiting / MEBIBYTE:5.0f} MiB  "
        f"growth {(measured.total - baseline.total) / MEBIBYTE:+6.0f} MiB  "
        f"open {measured.open_seconds:5.1f} s  first batch {measured.first_batch_seconds:5.1f} s  "
        f"others {measured.seconds:6.1f} s"
    )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Memory of the training loader's processes together.")
    parser.add_argument("data", type=Path, help="folder with train2017, val2017, annotations")
    parser.add_argument("--methods", nargs="*", default=None, choices=METHODS)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch of this process")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pause of the reader after every batch")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--alone", action="store_true", help="measure in this process and print it as JSON")
    values = parser.parse_args()
    if values.alone:
        config = data_config(values.data, batch_size=values.batch_size, settings=values.settings)
        (method,) = values.methods or [None]
        measured = measure(
            config,
            method=method,
            workers=values.workers,
            batches=values.batches,
            step_seconds=values.step_seconds,
        )
        print(json.dumps(asdict(measured)))
        return
    common = {
        "batches": values.batches,
        "batch_size": values.batch_size,
        "step_seconds": values.step_seconds,
        "settings": values.settings,
    }
    baseline = measure_apart(values.data, method=None, workers=0, **{**common, "step_seconds": 0.0})
    print(report(baseline, baseline), flush=True)
    for method in [None, *METHODS] if values.methods is None else values.methods:
        measured = measure_apart(values.data, method=method, workers=values.workers, **common)
        print(report(measured, baseline), flush=True)


if __name__ == "__main__":
    main()
