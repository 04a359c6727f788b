"""The page for browsers: its words are those of the Markdown, nothing comes from outside, and it can be read."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from matplotlib import rc_context
from PIL import Image

from semiseg.report import html
from semiseg.report.context import FigureFiles
from semiseg.report.figures import STYLE as STYLE_OF_CHARTS
from semiseg.report.figures import chart, new_figure, plain
from semiseg.report.html import render_page
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


@rc_context(fname=STYLE_OF_CHARTS)
def drawing_of(name: str) -> bytes:
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
        *figures(tmp_path).show("two", picture(), alt=f"of {name}"),
        f"- {told}",
        f"- {code(name)}",
    )
    assert page.one("h1").text == name
    assert page.one("head").one("title").text == name
    assert page.one("h2").text == name
    assert [item.text for item in page.one("main").all("li", "p")][:2] == [f"Question. {name}", f"Incomplete. {name}"]
    assert [cell.text for cell in page.one("table").all("th", "td")] == [name, "n", name, "1", f"{name} ± {name}", "2"]
    assert [image.attributes["alt"] for image in page.all("img")] == [name, f"of {name}"]
    assert page.all("em")[0].text == name, "the caption"
    assert [item.text.strip() for item in page.one("main").one("ul").all("li")] == [name, name]
    assert page.one("code").text == name
    assert page.one("nav").one("li").text == name


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


def test_pictures_are_embedded_and_a_missing_one_is_said(tmp_path: Path) -> None:
    shown = figures(tmp_path).show("two", picture(), alt="pixels")
    page = page_of(tmp_path, "# T", *shown, "Some ![more](figures/two.png) words.", "![lost _one_](figures/gone.png)")
    assert [image.attributes["alt"] for image in page.all("img")] == ["pixels", "more"]
    for image in page.all("img"):
        kind, _, content = image.attributes["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == picture()
    assert page.one("main").all("em")[-1].text == "No figure here: lost one."


def test_html_in_the_text_is_shown_as_letters(tmp_path: Path) -> None:
    page = page_of(tmp_path, "# T", "<script>alert(1)</script>", "a <b>c</b> [x](javascript:alert(1))")
    assert [p.text for p in page.one("main").all("p")][:2] == [
        "<script>alert(1)</script>",
        "a <b>c</b> [x](javascript:alert(1))",
    ]


def test_headings_tables_warnings_and_listings(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text("")
    lines = [["a", "yes", "1.0", "z" * 31], ["b", "no", "—", "r"]]
    table = markdown_table(("row", "terms", "all AP", "reading"), lines, texts=2)
    page = page_of(
        tmp_path,
        "# Title",
        "**Answer.** Yes.",
        "> **Mixed code.** Beware.",
        "## Table 6: few (3 of 12)",
        "Files: [csv](tables/t.csv), see [below](#per-class-1).",
        table,
        "### Per class",
        "## Table 7",
        "### Per class",
        "**Answer.** Not the answer of the page.",
        "## Protocol",
        "### Commands",
        "Two commands:\n\n```text\na\nb\n```",
    )
    assert [heading.text for heading in page.all("h2")] == ["Table 6: few (3 of 12)", "Table 7", "Protocol"]
    assert page.all("h2")[0].attributes["id"] == "table-6-few-3-of-12"
    assert [h.attributes["id"] for h in page.all("h3")] == ["per-class", "per-class-1", "commands"]
    entries = [(entry.attributes["class"], entry.text) for entry in page.one("nav").all("li")]
    assert entries == [
        ("h2", "Table 6: few (3 of 12)"),
        ("h3", "Per class"),
        ("h2", "Table 7"),
        ("h3", "Per class"),
        ("h2", "Protocol"),
        ("h3", "Commands"),
    ]
    assert page.one("blockquote").text.strip() == "Mixed code. Beware."
    cells = page.one("table").all("th", "td")
    assert [cell.attributes.get("style", "") for cell in cells] == [
        *["text-align:left"] * 2,
        *["text-align:right"] * 2,
    ] * 3
    assert page.one("pre").text == "a\nb\n"
    assert page.one("head").one("title").text == "Title"
    assert page.one("html").attributes["lang"] == "en"


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, "")
    assert page.one("title").text == "Report"
    assert not page.all("nav", "img", "table")


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
    assert set(re.findall(r"var\(--([a-z-]+)\)", STYLE)) <= set(light)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ink in ("ink", "quiet", "link"):
        for paper in ("paper", "band", "warn"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
