"""README and docs say what the reports say."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.quotes import (
    PROCESSORS,
    PROJECT,
    QUOTES,
    REPORTS,
    TABLES,
    UNSEEN_CHAIN,
    cell,
    documents,
    unseen_by_seed,
    updated,
)


@pytest.mark.parametrize("name", documents())
def test_quoted_numbers_are_those_of_the_reports(name: str) -> None:
    text = (PROJECT / name).read_text(encoding="utf-8")
    assert text == updated(name, text), "python -m tests.quotes writes them anew"


@pytest.mark.parametrize("name", documents())
def test_another_number_would_be_seen(name: str) -> None:
    text = (PROJECT / name).read_text(encoding="utf-8")
    for quote in (quote for quote in QUOTES if quote.document == name):
        _assert_seen(name, text, quote.sentence.format(*quote.numbers()))
    for table in TABLES:
        if table.document == name:
            _assert_seen(name, text, table.lines()[-1])


def _assert_seen(name: str, text: str, quoted: str) -> None:
    """With another last digit the quoted line is put right again."""
    wrong = text.replace(quoted, re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), quoted))
    assert wrong != text
    assert updated(name, wrong) == text


def test_every_step_that_readme_calls_resolved_is_resolved() -> None:
    for first, second in pairwise(UNSEEN_CHAIN):
        assert cell("shapes_seeds/report.md", "reading", f"{second} − {first}", "unseen") == "resolved: higher"


@pytest.mark.parametrize("record", PROCESSORS.values())
def test_the_order_of_the_rows_holds_with_every_seed_on_every_processor(record: str) -> None:
    for values in unseen_by_seed(REPORTS / "shapes_seeds" / record).values():
        assert values == sorted(values)
