"""Which edges the pairwise loss trusts: how many count and how many of these are truly positive, against τ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from semiseg.report.aggregate import TableNumbers
from semiseg.report.context import PageContext
from semiseg.report.drawing import BLACK, ROW_COLOURS, Drawing, chart, new_figure
from semiseg.report.edge_curve import EdgeCurve, EdgeSettings
from semiseg.report.published import printed_positive_edges
from semiseg.report.tables import escape_markdown, markdown_table

_MARKS = "osD^vP*X"


def edge_curve_section(page: PageContext, numbers: TableNumbers) -> list[str]:
    """The edges of a table's pairwise losses; nothing if an earlier table of the page has the same ones."""
    curve, table = page.report.edge_curve, numbers.table
    if curve is None:
        return []
    used = _settings(curve, table.name)
    names = [other.table.name for other in page.tables]
    earlier = [_settings(curve, name) for name in names[: names.index(table.name)]]
    if not used or used in earlier:
        return []
    printed = printed_positive_edges(page.printed)
    told = ", ".join(f"{positive:g} % at τ = {threshold:g}" for threshold, positive in printed)
    beside = f" The paper prints, for COCO, {told}." if printed else ""
    return [
        "### Truly positive edges against τ",
        _edge_sentence(curve, used),
        "An edge joins a cell inside an object's box and one of its neighbours. It counts in the pairwise loss if the "
        "colour similarity of the two cells reaches τ, and it is truly positive if both cells have the same label in "
        f"the object's mask. {escape_markdown(curve.sentence)}{beside}",
        *page.figures.show(
            f"{table.name}_edges",
            edge_figure(curve, used, printed),
            alt=f"edges that count and truly positive edges against the colour threshold, {table.name}",
            caption="Lines: measured on these data; filled marks: the τ that rows train with"
            + ("; crosses: printed in the paper, for COCO." if printed else "."),
        ),
        *_class_table(curve, used),
    ]


def _settings(curve: EdgeCurve, table: str) -> list[EdgeSettings]:
    """Those of the rows of a table, each once, that were measured."""
    return sorted(kind for kind in set(curve.rows.get(table, {}).values()) if kind in curve.points)


def _edge_sentence(curve: EdgeCurve, used: Sequence[EdgeSettings]) -> str:
    """The shares at every setting in use, and the truly positive ones without a threshold."""
    parts = []
    for size, dilation, threshold in used:
        share, positive = curve.points[size, dilation, threshold]
        place = f" ({_place(size, dilation)})" if _places(used) > 1 else ""
        base = None if (size, dilation, 0.0) in used else curve.points.get((size, dilation, 0.0))
        beside = f" (of all edges {100 * base[1]:.1f} %)" if base is not None else ""
        text = f"at τ = {threshold:g}{place} {100 * share:.1f} % of the edges count"
        parts.append(f"{text}, and {100 * positive:.1f} % of these are truly positive{beside}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _places(used: Sequence[EdgeSettings]) -> int:
    return len({kind[:2] for kind in used})


def _place(size: int, dilation: int) -> str:
    return f"{size} × {size}, dilation {dilation}"  # noqa: RUF001


def _class_table(curve: EdgeCurve, used: Sequence[EdgeSettings]) -> list[str]:
    """The shares of every class at the settings in use."""
    found: Mapping[EdgeSettings, Mapping[str, tuple[float, float]]] = {
        kind: curve.classes[kind] for kind in used if kind in curve.classes
    }
    names = list(dict.fromkeys(name for by_class in found.values() for name in by_class))
    if not names:
        return []
    headings = []
    for size, dilation, threshold in found:
        where = f"τ = {threshold:g}" + (f", {_place(size, dilation)}" if _places(used) > 1 else "")
        headings += [f"count ({where})", "truly positive"]
    nothing = ("—", "—")
    lines = [
        [name, *(cell for by_class in found.values() for cell in (_percents(by_class.get(name)) or nothing))]
        for name in names
    ]
    return [markdown_table(("class", *headings), lines)]


def _percents(shares: tuple[float, float] | None) -> list[str]:
    return [] if shares is None else [f"{100 * share:.1f} %" for share in shares]


def edge_figure(curve: EdgeCurve, used: Sequence[EdgeSettings], printed: Sequence[tuple[float, float]]) -> Drawing:
    """Two panels over τ: the share of edges that count, and the share of these that is truly positive.

    Args:
        used: settings that are marked; their neighbourhoods get a line each.
        printed: (τ, percent truly positive) of the paper.
    """
    figure = new_figure(7.2, 3.5)
    panels = figure.subplots(1, 2)
    for place, (size, dilation) in enumerate(dict.fromkeys(kind[:2] for kind in used)):
        points = sorted((kind[2], shares) for kind, shares in curve.points.items() if kind[:2] == (size, dilation))
        marked = {kind[2] for kind in used if kind[:2] == (size, dilation)}
        colour = ROW_COLOURS[(place + 2) % len(ROW_COLOURS)]
        mark = _MARKS[place % len(_MARKS)]
        for part, panel in enumerate(panels):
            line = [(threshold, 100 * shares[part]) for threshold, shares in points]
            label = _place(size, dilation) if part == 0 else None
            panel.plot(*zip(*line, strict=True), color=colour, linewidth=1.3)
            chosen = [point for point in line if point[0] in marked]
            panel.plot(*zip(*chosen, strict=True), mark, color=colour, markersize=6, label=label)
    if printed:
        panels[1].plot(*zip(*printed, strict=True), "x", color=BLACK, markersize=7, label="printed in the paper (COCO)")
    for panel, title in zip(panels, ("edges that count", "truly positive among them"), strict=True):
        panel.set_title(f"{title} (%)", fontsize=9.5)
        panel.set_xlabel("colour threshold τ", fontsize=9)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    panels[0].set_ylim(0, 105)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return chart(figure)
