"""The section of a report that says what was trained on what: data, splits, start, schedule, seeds, rows, measure."""

from __future__ import annotations

from collections.abc import Sequence

from semiseg.report.aggregate import ReportInput
from semiseg.report.tables import code, escape_markdown


def protocol(report: ReportInput) -> list[str]:
    """Heading and list."""
    seeds = ", ".join(map(str, report.seeds))
    lines = [f"- **Data.** {escape_markdown(report.data)}"]
    for table in report.tables:
        if not table.split:
            continue
        lines.append(
            f"- **Split {code(table.split)}** ({escape_markdown(table.name)}): masks for {_names(table.seen)}; "
            f"boxes only for {_names(table.unseen)}."
        )
    start = (
        f"Every row starts from {escape_markdown(report.initial)}."
        if report.pretraining is None
        else f"{escape_markdown(report.pretraining)} This pretraining is part of the protocol: it stands in for the "
        "ImageNet weights that the paper starts from."
    )
    groups = "; groups of classes are read from the same evaluation" * any(table.unseen for table in report.tables)
    lines += [
        f"- **Start.** {start}",
        f"- **Schedule.** {escape_markdown(report.schedule)}",
        f"- **Seeds.** {seeds}. A seed draws the initial weights, the order of the images and the augmentation; rows "
        "of one seed are compared in pairs. Deviations are sample standard deviations over seeds (n − 1).",  # noqa: RUF001
        f"- **Rows.** {_rows_in_words(report)}",
        f"- **Measure.** COCO AP of masks in percent (pycocotools), on the validation images{groups}.",
    ]
    return ["## Protocol", "\n".join(lines)]


def _rows_in_words(report: ReportInput) -> str:
    differ = "its mask loss" if all(table.alike for table in report.tables) else "its masks, mask loss and network"
    told = {row.name: row.meaning for table in report.tables for row in table.rows if row.meaning}
    words = "".join(f"\n  - {code(name)}: {escape_markdown(meaning)}" for name, meaning in told.items())
    return f"All rows get the boxes and classes of every object and differ in {differ}.{words}"


def _names(classes: Sequence[str]) -> str:
    if not classes:
        return "no class"
    noun = "class" if len(classes) == 1 else "classes"
    return f"{len(classes)} {noun} ({escape_markdown(', '.join(classes))})"
