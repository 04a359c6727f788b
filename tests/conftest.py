"""The order of the tests: the files that take longest first, so that no process is left alone with one at the end."""

from __future__ import annotations

import pytest

LONGEST = ("study_launch", "distributed", "report_page", "study", "wheel", "loader", "processors", "bench", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
