"""README and docs say what the reports say."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.committed import PROJECT, committed_reports, reports_in_git
from tests.quotes import (
    PROCESSORS,
    QUOTES,
    TABLES,
    UNSEEN_CHAIN,
    cell,
    documents,
    quoted_reports,
    unseen_by_seed,
    updated,
)


@pytest.mark.parametrize("name", documents())
def test_quoted_numbers_are_those_of_the_reports(name: str) -> None:
    assert quoted_reports(name)


@pytest.mark.parametrize("name", documents())
def test_another_number_would_be_seen(name: str) -> None:
    text, reports = (PROJECT / name).read_text(encoding="utf-8"), quoted_reports(name)
    for quote in (quote for quote in QUOTES if quote.document == name):
        _assert_seen(name, text, quote.sentence.format(*quote.numbers(reports)), reports)
    for table in TABLES:
        if table.document == name:
            _assert_seen(name, text, table.lines(reports)[-1], reports)


def _assert_seen(name: str, text: str, quoted: str, reports: Path) -> None:
    """With another last digit the quoted line is put right again."""
    wrong = text.replace(quoted, re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), quoted))
    assert wrong != text
    assert updated(name, wrong, reports) == text


def test_every_step_that_readme_calls_resolved_is_resolved() -> None:
    reports = quoted_reports("README.md")
    report, pairs = "shapes_seeds/report.md", pairwise(UNSEEN_CHAIN)
    readings = [cell(reports, report, "reading", f"{second} − {first}", "unseen") for first, second in pairs]
    assert readings == ["not resolved over seeds", "resolved: higher", "resolved: higher"]
    learned = "projection + learned affinity − projection + pairwise"
    assert cell(reports, "shapes_learned/report.md", "reading", learned, "unseen") == "resolved: higher"


@pytest.mark.parametrize("record", PROCESSORS.values())
def test_the_order_of_the_rows_holds_with_every_seed_on_every_processor(record: str) -> None:
    for values in unseen_by_seed(committed_reports() / "shapes_seeds" / record).values():
        assert values == sorted(values)


def test_what_a_clone_measures_itself_is_not_what_is_committed(tmp_path: Path) -> None:
    number = tmp_path / "reports" / "study" / "results.jsonl"
    number.parent.mkdir(parents=True)
    number.write_text("1\n")
    assert reports_in_git(tmp_path) == tmp_path / "reports", "without git"
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert reports_in_git(tmp_path) == tmp_path / "reports", "not kept"
    subprocess.run(["git", "-C", str(tmp_path), "add", "reports"], check=True)
    number.write_text("2\n")
    (tmp_path / "reports" / "own.jsonl").touch()
    copy = reports_in_git(tmp_path)
    assert [path.relative_to(copy).as_posix() for path in copy.rglob("*.jsonl")] == ["study/results.jsonl"]
    assert (copy / "study" / "results.jsonl").read_text() == "1\n"
