"""Figures of a report hold all that they show."""

from __future__ import annotations

import pandas as pd
import pytest

from semiseg.report import figures
from semiseg.report.aggregate import ReportRow, ReportTable

ROWS = (ReportRow("neither", "no", "no", "neither"), ReportRow("projection+pairwise", "yes", "yes", "both"))


@pytest.mark.parametrize("high", ["ring", "cross"])
def test_the_bars_of_seen_and_unseen_classes_lie_within_the_axes(high: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "chart", lambda figure: figure)
    table = ReportTable("t", "T", "s", "d", ("ring",), ("cross", "star"), None, ROWS)
    classes = pd.DataFrame({"neither": 5.0, "projection+pairwise": 10.0}, index=["ring", "cross", "star"])
    classes.loc[high] = 80.0
    panels = figures.class_figure(table, classes).axes
    assert [panel.get_ylabel() for panel in panels] == ["unseen", "seen"]
    assert [len(panel.patches) for panel in panels] == [2, 1]
    for panel in panels:
        left, right = panel.get_xlim()
        assert left == 0
        assert right > 80
