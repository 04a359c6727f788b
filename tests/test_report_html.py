"""The page for browsers: its words are those of the Markdown, nothing comes from outside, and it can be read."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from semiseg.report import html
from semiseg.report.context import FigureFiles
from semiseg.report.drawing import Drawing, chart, new_figure, plain
from semiseg.report.html import render_page
from semiseg.report.inline_svg import inline_svg
from semiseg.report.tables import code, escape_latex, escape_markdown, markdown_table
from tests.page_reader import Element, assert_whole, read_page

NAMES = (
    "猫", "café", "\"double\" and 'single'", "a|b", "potted_plant_", "<b>bold</b>", "$x$ and $y$", "&amp; &lt;",
    "`code` ``", "*star* **two**", "[link](x)", "# ~~no~~ \\ back", "<script>alert(1)</script>", "-->", "]]>",
)  # fmt: skip
STYLE = (Path(html.__file__).parent / "page.css").read_text(encoding="utf-8")


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(content, format="png")
    return content.getvalue()


def drawing_of(name: str) -> Drawing:
    """A figure with a name at its axis, black and white marks, grey lines and a clipped line."""
    figure = new_figure(3, 2)
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], "o-", color="#000000", markerfacecolor="white")
    panel.plot([0, 1], [1, 0], color="#0072B2")
    panel.yaxis.grid(color="#dddddd")
    panel.set_xticks([0.5], [plain(name)])
    return chart(figure)


def page_of(folder: Path, *blocks: str) -> Element:
    text = "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    page = read_page(render_page(text, folder))
    assert_whole(page, folder)
    return page


def figures(folder: Path) -> FigureFiles:
    return FigureFiles(folder / "figures")


@pytest.mark.parametrize("name", NAMES)
def test_names_come_out_letter_by_letter(name: str, tmp_path: Path) -> None:
    told = escape_markdown(name)
    page = page_of(
        tmp_path,
        f"# {told}",
        f"**Question.** {told}",
        f"> **Incomplete.** {told}",
        f"## {told}",
        markdown_table((name, "n"), [[name, "1"], [f"{name} ± {name}", "2"]]),
        *figures(tmp_path).show("one", drawing_of(name), alt=name, caption=name),
        *figures(tmp_path).show("two", Drawing(picture()), alt=f"of {name}"),
        f"- {told}",
        f"- {code(name)}",
    )
    assert page.one("h1").text == name
    assert page.one("head").one("title").text == name
    assert page.one("h2").text == name
    assert [item.text for item in page.one("main").all("li", "p")][:2] == [f"Question. {name}", f"Incomplete. {name}"]
    assert [cell.text for cell in page.one("table").all("th", "td")] == [name, "n", name, "1", f"{name} ± {name}", "2"]
    drawn = page.one("svg")
    assert drawn.attributes["aria-label"] == name
    assert drawn.one("title").text == name
    assert name in [text.text for text in drawn.all("text")]
    assert page.all("figcaption")[0].text == f"{name} png, svg"
    assert page.one("img").attributes["alt"] == f"of {name}"
    assert [item.text.strip() for item in page.one("main").one("ul").all("li")] == [name, name]
    assert page.one("code").text == name
    assert page.one("nav").one("li").text == name


def test_a_number_and_its_percent_sign_stay_on_one_line(tmp_path: Path) -> None:
    drawn = figures(tmp_path).show("one", Drawing(picture()), alt="a", caption="Of 4 % each.")
    cells = [["12 (3 %)", "4.5 % ± 0.1 %"], ["1", "-2 %"]]
    text = 'The 95 % interval *of 50 %* **holds 7.5 %**; 10 %, 20 %. A % of n; `5 %`; <b>6 %</b> & "more".'
    page = page_of(tmp_path, "# T 1 %", "## H 8 %", text, *drawn, markdown_table(("a 2 %", "b"), cells))
    whole = page.one("main").text
    assert re.findall(r"\S+ %", whole) == ["A %", "5 %"], "code is shown letter by letter"
    assert whole.count("\xa0%") == 14
    assert page.one("main").all("p")[0].text.replace("\xa0", " ") == re.sub(r"\*+|`", "", text)
    assert page.all("h2")[0].attributes["id"] == "h-8-"
    assert page.one("table").all("td")[0].text == "4.5\xa0% ± 0.1\xa0%"


@pytest.mark.parametrize(
    ("name", "latex"),
    [
        ("猫", "猫"),
        ("café", "café"),
        ("a|b_c", r"a\textbar{}b\_c"),
        ("<b>", r"\textless{}b\textgreater{}"),
        ("$x$", r"\$x\$"),
        ("&amp;", r"\&amp;"),
        ("`a`", r"\textasciigrave{}a\textasciigrave{}"),
    ],
)
def test_the_same_names_in_latex(name: str, latex: str) -> None:
    assert escape_latex(name) == latex


def test_a_figure_is_drawn_in_the_pages_colours_and_two_do_not_share_ids(tmp_path: Path) -> None:
    shown = [figures(tmp_path).show(name, drawing_of("x"), alt=f"{name} & more", caption="Lines.") for name in "ab"]
    page = page_of(tmp_path, "# T", *shown[0], *shown[1])
    first, second = page.all("svg")
    ids = [
        {element.attributes["id"] for element in drawn.walk() if "id" in element.attributes}
        for drawn in page.all("svg")
    ]
    assert len(ids[0]) == len(ids[1]) >= 3  # ticks, marks and the clipping path; groups need none
    assert not ids[0] & ids[1]
    assert [element.attributes["href"] for element in first.all("use")]
    assert any("clip-path" in element.attributes for element in second.walk())
    styles = " ".join(element.attributes.get("style", "") for element in first.walk())
    assert first.attributes["fill"] == "currentColor"  # letters, and what is filled with black
    assert "stroke:currentColor" in styles
    assert "fill:var(--paper)" in styles
    assert "stroke:var(--rule)" in styles
    assert "stroke:#0072b2" in styles
    assert not re.search(r"#000000|#ffffff|#dddddd|font-family|DejaVu", styles)
    assert not first.all("style", "metadata")
    assert page.all("figure")[1].one("figcaption").text == "Lines. png, svg"
    # The file itself stays one for any program.
    assert b"currentColor" not in (tmp_path / "figures" / "a.svg").read_bytes()
    assert b"'DejaVu Sans', sans-serif" in (tmp_path / "figures" / "a.svg").read_bytes()


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("fill: #FFFFFF", "fill:var(--paper)"),
        ("fill: #ffffff; stroke: #000000", "fill:var(--paper);stroke:currentColor"),
        ("stroke: #cccccc; stroke-width: 0.812345", "stroke:var(--rule);stroke-width:0.81"),
        ("fill: #555555", "fill:var(--quiet)"),
        ("fill: #8c8c8c", "fill:#8c8c8c"),
        ("fill: #0072b2; font: 700 10px 'DejaVu Sans', sans-serif", "fill:#0072b2;font:700 10px sans-serif"),
    ],
)
def test_colours_without_hue_become_the_pages(style: str, expected: str) -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 36"><path d="M 1.23456 2" style="{style}"/></svg>'
    element, width = inline_svg(svg.encode(), prefix="p", alt="")
    assert f'style="{expected}"' in element
    assert 'd="M 1.23 2"' in element
    assert width == 96
    letters = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><text style="{style}">a</text></svg>'
    drawn, _ = inline_svg(letters.encode(), prefix="p", alt="")
    assert ("#ffffff" in drawn.lower()) == ("#ffffff" in style.lower()), "white letters lie on something coloured"


def test_nothing_of_a_drawing_leads_outside() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">'
        '<script>1</script><image xlink:href="http://example.org/a.png"/><a href="javascript:1"><text>t</text></a>'
        '<image xlink:href="data:image/png;base64,AA=="/></svg>'
    )
    drawn, _ = inline_svg(svg.encode(), prefix="p", alt="")
    assert "script" not in drawn
    assert "example.org" not in drawn
    assert 'href="data:image/png;base64,AA=="' in drawn


def test_pictures_are_embedded_and_a_missing_one_is_said(tmp_path: Path) -> None:
    shown = figures(tmp_path).show("two", Drawing(picture()), alt="pixels")
    page = page_of(tmp_path, "# T", *shown, "Some ![more](figures/two.png) words.", "![lost _one_](figures/gone.png)")
    assert [image.attributes["alt"] for image in page.all("img")] == ["pixels", "more"]
    for image in page.all("img"):
        kind, _, content = image.attributes["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == picture()
        assert (image.attributes["width"], image.attributes["height"]) == ("30", "20")
    assert page.all("figure")[-1].text.strip() == "No figure here: lost one."


def test_html_in_the_text_is_shown_as_letters(tmp_path: Path) -> None:
    page = page_of(tmp_path, "# T", "<script>alert(1)</script>", "a <b>c</b> [x](javascript:alert(1))")
    assert [p.text for p in page.one("main").all("p")][:2] == [
        "<script>alert(1)</script>",
        "a <b>c</b> [x](javascript:alert(1))",
    ]


def test_headings_tables_warnings_and_listings(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text("")
    table = markdown_table(
        ("row", "terms", "all AP", "reading"), [["a", "yes", "1.0", "z" * 31], ["b", "no", "—", "r"]]
    )
    wide = table.replace("| --- | ---: | ---: | ---: |", "| --- | --- | ---: | ---: |")
    page = page_of(
        tmp_path,
        "# Title",
        "**Answer.** Yes.",
        "> **Mixed code.** Beware.",
        "## Table 6: few (3 of 12)",
        "Files: [csv](tables/t.csv), see [below](#per-class-1).",
        wide,
        "### Per class",
        "## Table 7",
        "### Per class",
        "**Answer.** Not the answer of the page.",
        "## Protocol",
        "Commands of the runs:\n\n```text\n" + "\n".join("abcdef") + "\n```",
        "### Commands",
        "```text\n" + "\n".join("abcdefg") + "\n```",
        "Two commands:\n\n```text\na\nb\n```",
    )
    headings = {heading.text: heading for heading in page.all("h2")}
    assert list(headings) == ["Table 6: few (3 of 12)", "Table 7", "Protocol"]
    assert [heading.has_class("part") for heading in headings.values()] == [True, False, False]
    assert [h.attributes["id"] for h in page.all("h3")] == ["per-class", "per-class-1", "commands"]
    assert headings["Table 6: few (3 of 12)"].attributes["id"] == "table-6-few-3-of-12"
    entries = [part for part in page.one("nav").all("ol")[0].content if isinstance(part, Element)]
    assert [[link.text for link in entry.all("a")] for entry in entries] == [
        ["Table 6: few (3 of 12)", "Per class"],
        ["Table 7", "Per class"],
        ["Protocol", "Commands"],
    ]
    assert [p.text for p in page.all("p") if p.has_class("answer")] == ["Answer. Yes."]
    assert page.one("blockquote").has_class("warning")
    cells = page.one("table").all("th", "td")
    assert [cell.attributes.get("class", "") for cell in cells] == ["", "t", "n g", ""] * 3
    assert [cell.attributes.get("scope", "") for cell in cells] == ["col"] * 4 + ["row", "", "", ""] * 2
    folded = page.all("details")
    assert [part.one("summary").text for part in folded] == ["Commands of the runs (6 lines)", "All (7 lines)"]
    assert folded[0].one("pre").text == "a\nb\nc\nd\ne\nf\n"
    assert len(page.all("pre")) == 3
    assert page.one("head").one("title").text == "Title"
    assert page.one("html").attributes["lang"] == "en"


def test_numbers_stand_below_each_other_beside_printed_ones(tmp_path: Path) -> None:
    lines = [["a", "**31.0** (29.5)"], ["b", "4.0"], ["c (x)", "**5.0**"]]
    table = "| row | AP (printed) |\n| --- | ---: |\n" + "".join(f"| {a} | {b} |\n" for a, b in lines)
    numbers = [line.all("td", "th")[1] for line in page_of(tmp_path, "# T", table).one("table").all("tr")]
    assert [cell.text.strip() for cell in numbers] == ["AP (printed)", "31.0 (29.5)", "4.0", "5.0"]
    behind = [cell.one("span") for cell in numbers]
    assert [part.text for part in behind] == ["(printed)", "(29.5)", "", ""]
    assert [part.attributes.get("style") for part in behind] == [None, *["min-width:5ch"] * 3]


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, "")
    assert page.one("title").text == "Report"
    assert not page.all("nav", "svg", "table")


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2 of two colours #rrggbb."""
    lights = []
    for colour in (first, second):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_can_be_read_in_both_schemes(scheme: str) -> None:
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in STYLE.split("@media screen", 2)[:2]
    )
    colours = light if scheme == "light" else {**light, **dark}
    assert set(light) == set(dark), "a scheme lacks a colour"
    assert set(re.findall(r"var\(--([a-z-]+)\)", STYLE)) - {"least"} <= set(light)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ink in ("ink", "quiet", "link"):
        for paper in ("paper", "band", "warn"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_a_table_that_is_too_wide_for_a_screen_is_marked(tmp_path: Path) -> None:
    heads = ("row", *(f"AP{number} (COCO, printed)" for number in range(9)))
    line = ("box-supervised", *("34.6 ± 2.1 (32.5)" for _ in range(9)))
    assert '<table class="stacked">' in render_page(markdown_table(heads, [line]), tmp_path)
    narrow = ("box-supervised", *("34.6 (32.5)" for _ in range(9)))
    assert "<table>" in render_page(markdown_table(heads, [narrow]), tmp_path)
    assert ".stacked .behind { display: block;" in STYLE
