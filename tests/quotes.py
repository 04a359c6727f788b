"""What README and docs quote from `reports/`: where it stands, and what the reports say.

python -m tests.quotes     writes the reports' numbers into the documents; `test_quotes` compares them

Functions take the folder `reports/` to read: the working tree's, or a copy of the committed one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from semiseg.data.shapes import SHAPES_CLASSES
from semiseg.evaluation.coco_metrics import Metrics
from semiseg.report.tables import markdown_table
from semiseg.results import read
from semiseg.splits import load_split
from tests.committed import PROJECT, WORKING, committed_reports

# -> record of shapes_seeds
PROCESSORS = {"AVX-512 and AMX": "amx.jsonl", "AVX-512 without AMX": "avx512.jsonl", "AVX2": "results.jsonl"}
UNSEEN_CHAIN = ("neither", "projection", "projection + pairwise", "full-masks")


@dataclass(frozen=True)
class Quote:
    """Numbers in a sentence of a document.

    Attributes:
        sentence: as it stands there, `{}` in place of each number.
        numbers: what stands in their places, in order, by the reports.
    """

    document: str
    sentence: str
    numbers: Callable[[Path], list[str]]


@dataclass(frozen=True)
class QuotedTable:
    """A table of a document: the first one after a line.

    Attributes:
        after: a line of the document, whole or its beginning.
        lines: of the table, by the reports.
    """

    document: str
    after: str
    lines: Callable[[Path], list[str]]


def tables_of(path: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headings and lines of every table of a Markdown file, without emphasis."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("|"):
            lines = [line.replace("**", "").strip().strip("|").split("|") for line in block.strip().split("\n")]
            headings, _, *rest = [[text.strip() for text in line] for line in lines]
            yield headings, rest


def cell(reports: Path, path: str, column: str, *beginning: str) -> str:
    """The cell below a heading, such as "23.9 ± 3.0", of the line that begins so, in the first table with both.

    Args:
        path: of the page, below `reports`.
    """
    for headings, lines in tables_of(reports / path):
        for line in lines:
            if column in headings and tuple(line[: len(beginning)]) == beginning:
                return line[headings.index(column)]
    raise ValueError(f"{path}: no line {beginning} with a {column!r}")


def table_below(path: Path, heading: str) -> list[str]:
    """The lines of the first table below a heading of a report."""
    lines = path.read_text(encoding="utf-8").split("\n")
    below = lines[lines.index(heading) :]
    first = next(number for number, line in enumerate(below) if line.startswith("|"))
    return [line for line in below[first : below.index("", first)] if line.startswith("|")]


def bench_lines(reports: Path, name: str = "bench.json") -> list[str]:
    rows = json.loads((reports / "benchmarks" / name).read_text(encoding="utf-8"))["rows"]
    lines = [
        "| row | seconds | straightforward | speed-up | MB over the inputs | straightforward | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        memory = [f"{row['memory_mb']:.0f}", f"{row['baseline_memory_mb']:.0f}", f"{row['memory_ratio']:.2f}"]
        cells = [f"`{row['name']}`", three_digits(row["seconds"]), three_digits(row["baseline_seconds"])]
        lines.append("| " + " | ".join([*cells, f"{three_digits(row['speedup'])}x", *memory]) + " |")
    return lines


def edge_lines(reports: Path) -> list[str]:
    """Truly positive edges of photographs, by neighbourhood and threshold."""
    shares = json.loads((reports / "edges/coco_mini_val2017.json").read_text(encoding="utf-8"))["shares"]
    thresholds = sorted({share["threshold"] for share in shares})
    lines = [
        f"| neighbourhood | {' | '.join(f'τ = {threshold:g}' for threshold in thresholds)} |",
        f"|---|{'---:|' * len(thresholds)}",
    ]
    for size, dilation in sorted({(share["size"], share["dilation"]) for share in shares}):
        own = {share["threshold"]: share for share in shares if (share["size"], share["dilation"]) == (size, dilation)}
        cells = [f"{100 * own[each]['positive']:.1f} ({100 * own[each]['share']:.0f})" for each in thresholds]
        lines.append(f"| {size} x {size}, dilation {dilation} | {' | '.join(cells)} |")
    return lines


def three_digits(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def growth_numbers(reports: Path) -> list[str]:
    """How much faster the mask losses are for 1 and 128 instances, and how many points gave the same result."""
    with (reports / "benchmarks/growth.csv").open(encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert all(point["same_result"] == "True" for point in points)
    faster = {
        point["value"]: float(point["baseline_seconds"]) / float(point["seconds"])
        for point in points
        if (point["axis"], point["row"]) == ("instances", "mask_losses")
    }
    return [f"{faster['1']:.0f}", f"{faster['128']:.0f}", str(len(points))]


def wide_neighbourhood(reports: Path) -> list[str]:
    page, narrow, wide = "shapes_neighbourhood/report.md", "3 x 3, dilation 1", "5 x 5, dilation 2"
    table = "shapes_neighbourhood/tables/neighbourhood.md"
    difference = cell(reports, page, "AP", f"{wide} − {narrow}").removeprefix("+")
    return [difference, *(cell(reports, table, "AP", row).split(" ± ")[0] for row in (wide, narrow))]


def processor_lines(reports: Path) -> list[str]:
    """AP on unseen classes with 3 of 12 seen, by processor and seed."""
    lines = [f"| processor | seed | {' | '.join(UNSEEN_CHAIN)} |", f"|---|---:|{'---:|' * len(UNSEEN_CHAIN)}"]
    for name, record in PROCESSORS.items():
        for seed, values in unseen_by_seed(reports / "shapes_seeds" / record).items():
            lines.append(f"| {name} | {seed} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return lines


def unseen_by_seed(record: Path) -> dict[int, list[float]]:
    """Seed -> AP on unseen classes of the rows of `UNSEEN_CHAIN`, of a record of `shapes_seeds`."""
    unseen = load_split("shapes_few_seen", SHAPES_CLASSES).unseen
    return {seed: [group_ap(one, unseen) for one in metrics_of(record, seed)] for seed in (0, 1, 2)}


def metrics_of(record: Path, seed: int) -> list[Metrics]:
    runs = {run.row: run for run in read(record) if run.seed == seed and run.split in (None, "shapes_few_seen")}
    return [Metrics.from_dict(runs[row.replace(" ", "")].metrics) for row in UNSEEN_CHAIN]


def learned_elsewhere(reports: Path) -> list[str]:
    """Mean unseen AP over seeds of learned edges and of colour's, few and many seen, on AVX-512 without AMX."""
    runs, numbers = read(reports / "shapes_seeds" / PROCESSORS["AVX-512 without AMX"]), []
    for split in ("shapes_few_seen", "shapes_many_seen"):
        unseen = load_split(split, SHAPES_CLASSES).unseen
        for row in ("learned", "projection+pairwise"):
            own = [Metrics.from_dict(run.metrics) for run in runs if (run.row, run.split) == (row, split)]
            assert len(own) == 3
            numbers.append(f"{sum(group_ap(metrics, unseen) for metrics in own) / 3:.1f}")
    return numbers


def group_ap(metrics: Metrics, classes: Sequence[str]) -> float:
    value = metrics.group("segm", classes)["AP"]
    assert value is not None
    return value


def largest_move(reports: Path) -> list[str]:
    """How far the unseen AP of a run moves with the processor at most, and how much of that is the crescent."""
    unseen = load_split("shapes_few_seen", SHAPES_CLASSES).unseen
    moves = []
    for seed in (0, 1, 2):
        records = [metrics_of(reports / "shapes_seeds" / record, seed) for record in PROCESSORS.values()]
        for one, other in (pair for row in zip(*records, strict=True) for pair in combinations(row, 2)):
            crescent = (group_ap(other, ["crescent"]) - group_ap(one, ["crescent"])) / len(unseen)
            move = group_ap(other, unseen) - group_ap(one, unseen)
            moves.append((abs(move), crescent if move > 0 else -crescent))
    return [f"{value:.1f}" for value in max(moves)]


def shares_lines(reports: Path) -> list[str]:
    """AP of the rows of `shapes_fractions` beside each other, by the share of masks."""
    shares, rows = (1, 2, 5, 10, 20, 50), ("masks alone", "projection + pairwise", "projection + learned affinity")
    tables = {share: f"shapes_fractions/tables/percent_{share:02}.md" for share in shares}
    lines = [[row, *(cell(reports, table, "AP", row) for table in tables.values())] for row in rows]
    headings = ("share of the masks", *(f"{share} %" for share in shares))
    return markdown_table(headings, lines, texts=1).splitlines()


def heads_lines(reports: Path) -> list[str]:
    """AP of each mask head on all classes by supervision, and what its way to say a mask could reach."""
    heads = {
        "CondInst's (dynamic filters)": "whole map, stride 2",
        "YOLACT's (prototypes)": "whole map, stride 2",
        "PolarMask's (rays)": "36 rays from the box's centre",
        "Mask R-CNN's (regions)": "28 x 28 cells of 1.25 times the box",
    }
    with (reports / "shapes_heads/ceilings.csv").open(encoding="utf-8") as file:
        ceilings = {line["way"]: line["ceiling"] for line in csv.DictReader(file)}
    tables = {"full": "AP", "mixed": "all AP", "mixed, unseen": "unseen AP", "boxes": "AP", "none": "all AP"}
    lines = [
        [
            head,
            *(
                cell(reports, f"shapes_heads/tables/{name.split(',')[0]}.md", column, head)
                for name, column in tables.items()
            ),
            ceilings[way],
        ]
        for head, way in heads.items()
    ]
    supervision = (
        "every mask",
        "3 of 12 classes",
        "unseen classes of these",
        "boxes alone",
        "3 of 12, nothing of others",
    )
    return markdown_table(("mask head", *supervision, "ceiling"), lines, texts=1).splitlines()


QUOTES = (
    Quote(
        "README.md",
        "unseen classes reach {}, {}, {} and {} AP in the order of neither, projection, projection + pairwise and "
        "full-masks (each step but the first is resolved: its 95 % intervals over seeds and over images leave out 0); "
        "boxes used as masks reach {} AP",
        lambda reports: [
            *(cell(reports, "shapes_seeds/tables/table6.md", "unseen AP", row) for row in UNSEEN_CHAIN),
            cell(reports, "shapes_seeds/tables/boxes_as_masks.md", "AP", "boxes used as masks"),
        ],
    ),
    Quote(
        "README.md",
        "unseen classes reach {} AP with them and {} with those of colour (resolved); all masks give {}",
        lambda reports: [
            cell(reports, "shapes_learned/tables/table6.md", "unseen AP", row)
            for row in ("projection + learned affinity", "projection + pairwise", "full-masks")
        ],
    ),
    Quote(
        "docs/LEARNED_AFFINITY.md",
        "{} AP on unseen and {} on all classes with learned edges, {} and {} with colour's",
        lambda reports: [
            cell(reports, "shapes_seeds/tables/table7.md", column, row)
            for row in ("projection + learned affinity", "projection + pairwise")
            for column in ("unseen AP", "all AP")
        ],
    ),
    Quote(
        "docs/LEARNED_AFFINITY.md",
        "trained on another kind of processor (AVX-512 without AMX), three seeds reach {} and {} unseen AP with "
        "learned edges and with colour's, and with masks for 9 of 12 classes {} and {}",
        learned_elsewhere,
    ),
    Quote(
        "README.md",
        "a tenth of the masks gives {} AP by itself, {} with the boxes of all objects and {} with learned affinity",
        lambda reports: [
            cell(reports, "shapes_fractions/tables/percent_10.md", "AP", row)
            for row in ("masks alone", "projection + pairwise", "projection + learned affinity")
        ],
    ),
    Quote(
        "docs/LEARNED_AFFINITY.md",
        "{} AP with learned edges beside {} with colour's where a tenth of the objects has a mask, {} beside {} with a "
        "third; box AP is not lower ({} beside {} with a tenth)",
        lambda reports: [
            *(
                cell(reports, f"shapes_scratch/tables/percent_{share}.md", "AP", row)
                for share in (10, 33)
                for row in ("projection + learned affinity", "projection + pairwise")
            ),
            *(
                cell(reports, "shapes_scratch/report.md", "box AP", row)
                for row in ("projection + learned affinity", "projection + pairwise")
            ),
        ],
    ),
    Quote(
        "docs/LEARNED_AFFINITY.md",
        "with half of the masks it reaches what all masks give ({}, the same seeds in `reports/shapes_seeds/`)",
        lambda reports: [cell(reports, "shapes_seeds/tables/table6.md", "all AP", "full-masks")],
    ),
    Quote(
        "docs/NUMERICS.md",
        "finds it {} AP above 3 × 3 with dilation 1 without masks ({} and {})",
        wide_neighbourhood,
    ),
    Quote(
        "docs/NUMERICS.md",
        "A run's AP moves by up to {} with the processor, {} of it in the crescent",
        largest_move,
    ),
    Quote(
        "docs/PERFORMANCE.md",
        "The mask losses are {} times (1 instance) to {} times (128) faster. Results are the same at all {} points.",
        growth_numbers,
    ),
)
TABLES = (
    QuotedTable(
        "README.md",
        "Masks for 3 of 12 classes, boxes for all (`reports/shapes/tables/table6.md`",
        lambda reports: (reports / "shapes/tables/table6.md").read_text(encoding="utf-8").splitlines(),
    ),
    QuotedTable(
        "docs/LEARNED_AFFINITY.md",
        "Shapes, masks for 3 of 12 classes, five seeds",
        lambda reports: (reports / "shapes_learned/tables/table6.md").read_text(encoding="utf-8").splitlines(),
    ),
    QuotedTable(
        "docs/LEARNED_AFFINITY.md",
        "How much of the gap on unseen classes",
        lambda reports: table_below(
            reports / "shapes_learned/report.md", "### How much of the gap on unseen classes each row closes"
        ),
    ),
    QuotedTable(
        "docs/LEARNED_AFFINITY.md",
        "How well edges are told apart",
        lambda reports: table_below(reports / "shapes_learned/report.md", "### Learned edges"),
    ),
    QuotedTable("docs/LEARNED_AFFINITY.md", "What are a few masks worth?", shares_lines),
    QuotedTable(
        "docs/PSEUDO_MASKS.md",
        "Table 5 of the paper with Shapes",
        lambda reports: (reports / "shapes_table5/tables/table5.md").read_text(encoding="utf-8").splitlines(),
    ),
    QuotedTable("docs/PSEUDO_MASKS.md", "What they cost, `python", partial(bench_lines, name="refine.json")),
    QuotedTable("docs/HEADS.md", "Shapes, the same detector, losses", heads_lines),
    QuotedTable("docs/REAL_DATA.md", "Truly positive edges in percent", edge_lines),
    QuotedTable(
        "docs/REAL_DATA.md",
        "Few masks seen, those of bear",
        lambda reports: (reports / "animals/tables/table6.md").read_text(encoding="utf-8").splitlines(),
    ),
    QuotedTable(
        "docs/REAL_DATA.md",
        "Many, those of the other three",
        lambda reports: (reports / "animals/tables/table7.md").read_text(encoding="utf-8").splitlines(),
    ),
    QuotedTable("docs/NUMERICS.md", "Order of the rows by processor and seed", processor_lines),
    QuotedTable("docs/PERFORMANCE.md", "The full form, `python -m benchmarks --json", bench_lines),
    QuotedTable("docs/PERFORMANCE.md", "The rows of mask heads, `python", partial(bench_lines, name="heads.json")),
)


def updated(document: str, text: str, reports: Path) -> str:
    """The text of a document with the reports' numbers in it.

    Raises:
        ValueError: a sentence or a table is not there exactly once.
    """
    for quote in QUOTES:
        if quote.document == document:
            text = _with_numbers(text, quote, quote.numbers(reports))
    for table in TABLES:
        if table.document == document:
            text = _with_table(text, table, table.lines(reports))
    return text


def _with_numbers(text: str, quote: Quote, numbers: Sequence[str]) -> str:
    pattern = r"[\d.]+(?: ± [\d.]+)?".join(map(re.escape, quote.sentence.split("{}")))
    if len(re.findall(pattern, text)) != 1:
        raise ValueError(f"{quote.document}: not there once: {quote.sentence!r}")
    sentence = quote.sentence.format(*numbers)
    return re.sub(pattern, lambda _: sentence, text)


def _with_table(text: str, table: QuotedTable, quoted: Sequence[str]) -> str:
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith(table.after)]
    if len(starts) != 1:
        raise ValueError(f"{table.document}: not there once: {table.after!r}")
    first = next(number for number in range(starts[0], len(lines)) if lines[number].startswith("|"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return "\n".join([*lines[:first], *quoted, *lines[last:]])


def quoted_reports(document: str) -> Path:
    """The reports that a document quotes.

    They are the committed ones, which a clone's own runs do not change, or the working tree's for whoever renews both.

    Raises:
        ValueError: it quotes neither.
    """
    text = (PROJECT / document).read_text(encoding="utf-8")
    for reports in (committed_reports(), WORKING):
        if text == updated(document, text, reports):
            return reports
    raise ValueError(f"{document}: not what the reports say; python -m tests.quotes writes their numbers into it")


def documents() -> list[str]:
    return sorted({item.document for item in (*QUOTES, *TABLES)})


if __name__ == "__main__":
    for name in documents():
        path = PROJECT / name
        path.write_text(updated(name, path.read_text(encoding="utf-8"), WORKING), encoding="utf-8")
