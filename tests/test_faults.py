"""The benchmark of faults on its smallest scale: it runs, counts, writes, and can fail."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from benchmarks import fault_inputs
from benchmarks.faults import BEGIN, END, difference, mutation, tree
from semiseg.errors import UserError
from tests.forked import call_main, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and namespaces are Linux's")


def test_a_kill_a_broken_input_and_mutations_are_counted_and_written(tmp_path: Path) -> None:
    page, found, work = tmp_path / "page.md", tmp_path / "found.json", tmp_path / "work"
    work.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    asked = ["--count", "1", "--only", "kills.predict", "--only", "inputs.splits", "--only", "mutations.segmentations"]
    arguments = [*asked, "--json", str(found), "--write", str(page)]
    output, environment = tmp_path / "output.txt", {**os.environ, "TMPDIR": str(work)}
    process = start(call_main, "benchmarks.faults", *arguments, output=output, environment=environment)
    process.join(timeout=300)
    assert process.exitcode == 0, output.read_text()
    verdicts = json.loads(found.read_text())["categories"]
    counts = {name: (verdict["tried"], verdict["survived"], verdict["kills"]) for name, verdict in verdicts.items()}
    assert counts == {"kills.predict": (1, 1, 1), "inputs.splits": (1, 1, 0), "mutations.segmentations": (250, 250, 0)}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| mutations.segmentations | 250 | 250 | 0 |  |" in text
    assert "old" not in text
    assert list(work.iterdir()) == [], "its folders are left over"


def test_a_reader_that_raises_something_else_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        raise UserError("a sentence") if path.read_bytes() == b"known" else KeyError("x")

    for content, told in ((b"known", None), (b"other", "KeyError in benchmark: 'x'")):

        def mutated(_draw: object, content: bytes = content) -> bytes:
            return content

        what = fault_inputs.Mutation(1, "a.txt", mutated, read)
        monkeypatch.setitem(fault_inputs.MUTATIONS, "test", what)
        assert mutation("test", 0, 0, tmp_path) == told


def test_mutations_are_drawn_from_their_number() -> None:
    for what in fault_inputs.MUTATIONS.values():
        first, again, second = (what.mutated(random.Random(f"x:{seed}")) for seed in (1, 1, 2))
        assert first == again != second


def test_folders_compare_without_times(tmp_path: Path) -> None:
    for name, seconds, weights in (("a", 1, "w"), ("b", 2, "w"), ("c", 1, "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"step": 1, "seconds": seconds}) + "\n")
        (tmp_path / name / "model").write_text(weights)
        (tmp_path / name / "step_1.pt").write_text(name)
    (tmp_path / "c/.model.tmp").mkdir()
    wanted, same, other = (tree(tmp_path / name, r"\.pt$") for name in ("a", "b", "c"))
    assert difference(wanted, same) == ""
    assert difference(wanted, other) == "left over: .model.tmp; different: model"
