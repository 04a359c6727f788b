"""Stands in for `semiseg train` in the tests of studies: the same arguments, files, signals and exit codes, no torch.

What it does beyond a plain run is told by the environment variable FAKE: "fail:ROW", "crash:ROW", "silent:ROW" (ends
well without a result) or "slow:ROW" (ten seconds per step), for runs whose folder name starts with ROW.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from semiseg.files import lock_folder


def main() -> None:
    verb, config_path, flag, out_text, resume = sys.argv[1:]
    assert (verb, flag, resume) == ("train", "--out", "--resume")
    with lock_folder(Path(out_text)):
        train(Path(out_text), json.loads(Path(config_path).read_text()))


def train(out: Path, config: dict[str, Any]) -> None:
    kind, _, row = os.environ.get("FAKE", "").partition(":")
    kind = kind if row and out.name.startswith(row) else ""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped.append(received))
    if kind == "fail":
        print("noise\nsemiseg: val.json: annotation 3 is broken", file=sys.stderr)
        sys.exit(2)
    if kind == "crash":
        raise RuntimeError("out of luck")
    if config["init_from"] is not None:
        assert (Path(config["init_from"]) / "model.safetensors").is_file(), "started before its initial run ended"
    checkpoint = out / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    steps = config["optim"]["steps"]
    with (out / "calls.jsonl").open("a") as calls:
        threads = os.environ["OMP_NUM_THREADS"]
        calls.write(json.dumps({"start": done, "threads": threads, "pid": os.getpid(), "time": time.time()}) + "\n")
    for step in range(done + 1, steps + 1):
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "steps": steps, "seconds": 0.1 * step}) + "\n")
        checkpoint.write_text(str(step))
        until = time.monotonic() + (10.0 if kind == "slow" else 0.01)
        while time.monotonic() < until and not stopped:
            time.sleep(0.01)
        if stopped:
            sys.exit(130)
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "model.safetensors").write_text("weights")
    if kind != "silent":
        write_result(out, config, steps)
    with (out / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"end": steps, "time": time.time()}) + "\n")


def write_result(out: Path, config: dict[str, Any], steps: int) -> None:
    from semiseg.splits import load_split

    classes = ("cat", "dog", "cow")
    numbers = {"AP": 10.0 + config["seed"], "AP50": 20.0, "AP75": 5.0, "APs": None, "APm": None, "APl": None}
    kind = {"groups": {"all": numbers}, "classes": dict.fromkeys(classes, numbers)}
    split = config["supervision"]["split"] if config["supervision"]["source"] == "split" else None
    result = {
        "metrics": {"unit": "percent", "images": 1, "instances": dict.fromkeys(classes, 2), "bbox": kind, "segm": kind},
        "steps": steps,
        "seconds": 1.0,
        "data_fingerprint": "fake",
        "split_digest": load_split(split, classes).digest() if split else None,
        "device": "fake",
        "processes": 1,
        "versions": {"fake": "1"},
        "git_revision": None,
        "finished": datetime.now(UTC).isoformat(),
    }
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
