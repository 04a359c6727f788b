"""A report's Markdown as one HTML file that needs nothing beside it: contents, tables, figures and pictures inside."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from pathlib import Path
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from semiseg.report.inline_svg import inline_svg

PAGE_NAME = "index.html"
_STYLE = Path(__file__).with_name("page.css")
_LONGEST_NUMBER = 30  # letters; a right-aligned column with a longer text holds words
_LONGEST_MARK = 3
_WIDEST_LINE = 115  # letters; in wider tables numbers in parentheses stand below the others where room is short
_LONGEST_LISTING = 5  # lines; longer ones are folded
_SMALLEST_SCALE = 0.75  # of a figure's own width: smaller letters could not be read, so that it is scrolled instead
_GROUP = re.compile(r"(all|unseen|seen)\b")
_PERCENT = re.compile(r"(?<=\d) %")
_BEHIND = re.compile(r" (\([^()<>]*\))$")
_FOOTER = (
    '<footer><p>Links marked <span class="beside">so</span> open files that lie beside this page. '
    'The same text without this dress: <a class="beside" href="report.md">report.md</a>.</p></footer>\n'
)


def render_page(text: str, folder: Path) -> str:
    """The page of a report.

    The words are those of the Markdown: CommonMark with GitHub's tables; raw HTML is shown as the letters it is, and
    no line ends between a number and its percent sign. A figure with an SVG beside its PNG is drawn as SVG, in the
    colours of the page; pictures are embedded. A paragraph that holds only an image, and a wholly emphasised one after
    it, are a figure and its caption.

    Args:
        text: report.md.
        folder: where it lies: its images are looked for there.
    """
    return _Page(folder).render(text)


@dataclass(frozen=True)
class _Heading:
    """One entry of the contents: its level, id, words, and these as HTML."""

    level: int
    name: str
    words: str
    html: str


class _Page:
    """One page being written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        self._markdown.add_render_rule("image", lambda _, tokens, place, *rest: self._image(tokens[place])[0])
        self._markdown.add_render_rule("text", lambda _, tokens, place, *rest: _unbroken(tokens[place].content))
        self._markdown.add_render_rule("link_open", lambda _, tokens, place, *rest: _link(tokens[place]))
        self._taken: dict[str, int] = {}
        self._headings: list[_Heading] = []
        self._figures = 0

    def render(self, text: str) -> str:
        nodes = SyntaxTreeNode(self._markdown.parse(text)).children
        body = "".join(self._blocks(nodes))
        title = self._headings[0].words if self._headings else "Report"
        contents = self._contents()
        to_contents = '<a class="to-contents" href="#contents">Contents</a>\n' if contents else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
            f"{to_contents}<main>\n{body}{_FOOTER}</main>\n{contents}</body>\n</html>\n"
        )

    def _blocks(self, nodes: Sequence[SyntaxTreeNode]) -> list[str]:
        blocks, place = [], 0
        while place < len(nodes):
            node, following = nodes[place], nodes[place + 1 : place + 2]
            used = 1
            if node.type == "heading":
                blocks.append(self._heading(node, following=nodes[place + 1 :]))
            elif node.type == "table":
                blocks.append(self._table(node))
            elif node.type == "blockquote":
                blocks.append(f'<blockquote class="warning">\n{self._html(node.children)}</blockquote>\n')
            elif image := _only(node, "image"):
                caption = _only(following[0], "em") if following else []
                blocks.append(self._figure(image[0], caption))
                used = 2 if caption else 1
            elif following and _is_long_listing(following[0]) and self._words(node).endswith(":"):
                blocks.append(self._folded(self._inline(node).removesuffix(":"), following[0]))
                used = 2
            elif _is_long_listing(node):
                blocks.append(self._folded("All", node))
            elif kind := self._lead(node):
                blocks.append(f'<p class="{kind}">{self._inline(node)}</p>\n')
            else:
                blocks.append(self._html([node]))
            place += used
        return blocks

    def _heading(self, node: SyntaxTreeNode, *, following: Sequence[SyntaxTreeNode]) -> str:
        words, html = self._words(node), self._inline(node)
        heading = _Heading(int(node.tag[1]), self._anchor(words), words, html)
        self._headings.append(heading)
        if heading.level == 1:
            return f'<h1 id="{escape(heading.name)}">{html}</h1>\n'
        content = [other.type for other in takewhile(lambda other: other.type != "heading", following)]
        part = ' class="part"' if heading.level == 2 and "table" in content else ""
        anchor = f'<a class="anchor" href="#{quote(heading.name)}" aria-label="Link to this section"></a>'
        return f'<{node.tag} id="{escape(heading.name)}"{part}>{html}{anchor}</{node.tag}>\n'

    def _anchor(self, words: str) -> str:
        """GitHub's anchor of a heading, so that links to it are right in report.md and here."""
        name = base = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") or "section"
        while name in self._taken:
            self._taken[base] += 1
            name = f"{base}-{self._taken[base]}"
        self._taken[name] = 0
        return name

    def _contents(self) -> str:
        """Sections with their parts below them."""
        lines = ""
        parts: list[str] = []
        for heading in reversed(self._headings):
            link = f'<a href="#{quote(heading.name)}">{heading.html}</a>'
            if heading.level == 2:
                below = f"\n<ol>\n{''.join(reversed(parts))}</ol>\n" if parts else ""
                lines, parts = f"<li>{link}{below}</li>\n{lines}", []
            elif heading.level > 2:
                parts.append(f"<li>{link}</li>\n")
        top = f'<p><a href="#{quote(self._headings[0].name)}">Contents</a></p>\n' if self._headings else ""
        return f'<nav id="contents" aria-label="Contents">\n{top}<ol>\n{lines}</ol>\n</nav>\n' if lines else ""

    def _lead(self, node: SyntaxTreeNode) -> str:
        """`question` or `answer` for the paragraphs above all sections that begin with that word."""
        if node.type != "paragraph" or len(self._headings) != 1:
            return ""
        return next((kind for kind in ("question", "answer") if self._words(node).lower().startswith(f"{kind}.")), "")

    def _table(self, table: SyntaxTreeNode) -> str:
        lines = [line.children for part in table.children for line in part.children]
        columns = [
            _column(
                [self._words(cell) for cell in column],
                [self._inline(cell) for cell in column],
                is_right="right" in str(column[0].attrs.get("style", "")),
                is_first=place == 0,
            )
            for place, column in enumerate(zip(*lines, strict=True))
        ]
        head, *body = [f"<tr>{''.join(line)}</tr>\n" for line in zip(*columns, strict=True)]
        longest = [max(len(self._words(cell)) for cell in column) for column in zip(*lines[1:], strict=True)]
        kind = ' class="stacked"' if sum(longest) > _WIDEST_LINE else ""
        label = escape(f"Table: {self._headings[-1].words}") if self._headings else "Table"
        return (
            f'<div class="wide" role="region" aria-label="{label}" tabindex="0">\n<table{kind}>\n'
            f"<thead>\n{head}</thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n"
        )

    def _folded(self, words: str, listing: SyntaxTreeNode) -> str:
        count = listing.content.count("\n")
        return f"<details>\n<summary>{words} ({count} lines)</summary>\n{self._html([listing])}</details>\n"

    def _figure(self, image: Token, caption: Sequence[Token]) -> str:
        drawn, width = self._image(image)
        box = f'<div class="wide" style="--least:{_SMALLEST_SCALE * width:.0f}px">{drawn}</div>\n'
        source = str(image.attrs.get("src", ""))
        files = [name for name in (source, str(Path(source).with_suffix(".svg"))) if self._file(name).is_file()]
        links = ", ".join(
            f'<a class="beside" href="{escape(name)}">{Path(name).suffix[1:]}</a>' for name in dict.fromkeys(files)
        )
        words = self._render(caption) + " " if caption else ""
        return f'<figure>\n{box}<figcaption>{words}<span class="files">{links}</span></figcaption>\n</figure>\n'

    def _image(self, image: Token) -> tuple[str, float]:
        """An image as an element that holds it, and its own width in CSS pixels; words where the file is not there."""
        alt = _text(image)
        path = self._file(str(image.attrs.get("src", "")))
        drawing = path.with_suffix(".svg")
        if drawing.is_file():
            self._figures += 1
            return inline_svg(drawing.read_bytes(), prefix=f"f{self._figures}", alt=alt)
        if not path.is_file():
            return f'<em class="absent">No figure here: {escape(alt)}.</em>', 0
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24]) if path.suffix == ".png" else (0, 0)
        size = f' width="{width}" height="{height}"' if width else ""
        kind = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return f'<img alt="{escape(alt)}"{size} src="{source}">', width

    def _file(self, link: str) -> Path:
        return self._folder / unquote(link)

    def _html(self, nodes: Sequence[SyntaxTreeNode]) -> str:
        return self._render([token for node in nodes for token in node.to_tokens()])

    def _inline(self, node: SyntaxTreeNode) -> str:
        """The words of a heading, paragraph or cell as HTML, without the element around them."""
        return self._render(_inline_tokens(node))

    def _render(self, tokens: Sequence[Token]) -> str:
        html: str = self._markdown.renderer.render(tokens, self._markdown.options, {})
        return html

    def _words(self, node: SyntaxTreeNode) -> str:
        """What a reader reads of a heading, paragraph or cell."""
        return "".join(map(_text, _inline_tokens(node)))


def _inline_tokens(node: SyntaxTreeNode) -> list[Token]:
    tokens = [child.token for child in node.children if child.type == "inline" and child.token is not None]
    return [part for token in tokens for part in token.children or []]


def _text(token: Token) -> str:
    if token.children is not None:
        return "".join(map(_text, token.children))
    return " " if token.type in ("softbreak", "hardbreak") else token.content


def _only(node: SyntaxTreeNode, kind: str) -> list[Token]:
    """The image, or the tokens within the emphasis, that are all of a paragraph; else nothing."""
    if node.type != "paragraph" or [part.type for part in node.children[0].children] != [kind]:
        return []
    tokens = _inline_tokens(node)
    return tokens if kind == "image" else tokens[1:-1]


def _is_long_listing(node: SyntaxTreeNode) -> bool:
    return node.type == "fence" and node.content.count("\n") > _LONGEST_LISTING


def _column(words: Sequence[str], html: Sequence[str], *, is_right: bool, is_first: bool) -> list[str]:
    """The cells of a column from its heading down.

    Their class is `n` for numbers, `g` for the first of a group of classes, `t` for words as short as yes and no. Where
    numbers have others in parentheses behind them, those without keep their place in the column.

    Args:
        words, html: of each cell, what is read and what is written.
        is_right: right-aligned in the Markdown.
    """
    longest = max(map(len, words[1:]), default=0)
    is_number = is_right and longest <= _LONGEST_NUMBER
    is_short = not is_right and not is_first and longest <= _LONGEST_MARK
    names = ["n"] * is_number + ["g"] * bool(is_number and _GROUP.match(words[0])) + ["t"] * is_short
    kind = f' class="{" ".join(names)}"' if names else ""
    width = max((len(found.group(1)) for text in words[1:] if (found := _BEHIND.search(text))), default=0)
    body = list(html[1:])
    if is_number and width:
        span = f'<span class="behind" style="min-width:{width - 1}ch">'
        body = [
            _BEHIND.sub(rf" {span}\1</span>", cell) if _BEHIND.search(cell) else f"{cell} {span}</span>"
            for cell in body
        ]
    start, end = ('th scope="row"', "th") if is_first else ("td", "td")
    head = _BEHIND.sub(r' <span class="behind">\1</span>', html[0])
    return [f'<th scope="col"{kind}>{head}</th>', *(f"<{start}{kind}>{cell}</{end}>" for cell in body)]


def _unbroken(text: str) -> str:
    """A text as HTML; a number and its percent sign stay on one line."""
    return escapeHtml(_PERCENT.sub("\N{NO-BREAK SPACE}%", text))


def _link(token: Token) -> str:
    """The start of a link; one to a file is marked."""
    target = str(token.attrs.get("href", ""))
    mark = "" if target.startswith("#") else ' class="beside"'
    return f'<a{mark} href="{escape(target)}">'
