"""The order of the tests, and what the server of forked processes has imported: both for the suite's duration."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.forked import PRELOADED

multiprocessing.set_forkserver_preload(PRELOADED)
# These files first, so that no process is left alone with one at the end.
LONGEST = ("study_launch", "distributed", "report_page", "study", "wheel", "loader", "processors", "bench", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
