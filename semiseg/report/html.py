"""A report's Markdown as one HTML file that needs nothing beside it: contents, tables, figures and pictures inside."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

PAGE_NAME = "index.html"
_STYLE = Path(__file__).with_name("page.css")


def render_page(text: str, folder: Path) -> str:
    """The page of report.md: CommonMark with GitHub's tables, images of `folder` embedded; raw HTML stays letters."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.use(anchors_plugin, max_level=3, slug_func=_slug)
    markdown.add_render_rule("image", _image)
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0">\n<table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    environment = {"folder": folder}
    tokens = markdown.parse(text, environment)
    body: str = markdown.renderer.render(tokens, markdown.options, environment)
    headings = [(token, tokens[index + 1]) for index, token in enumerate(tokens) if token.type == "heading_open"]
    entries = [
        f'<li class="{token.tag}"><a href="#{quote(str(token.attrs["id"]))}">'
        f"{markdown.renderer.render(words.children or [], markdown.options, environment)}</a></li>\n"
        for token, words in headings
        if token.tag in ("h2", "h3")
    ]
    title = "".join(part.content for part in headings[0][1].children or []) if headings else "Report"
    contents = f'<nav aria-label="Contents">\n<ul>\n{"".join(entries)}</ul>\n</nav>\n' if entries else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"{contents}<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _slug(words: str) -> str:
    """GitHub's anchor of a heading, so that links to it are right in report.md and here."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") or "section"


def _image(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, environment: Any) -> str:
    """An image as an element that holds it; words where the file is not there."""
    alt = escape(renderer.renderInlineAsText(tokens[index].children, options, environment))
    path = environment["folder"] / unquote(str(tokens[index].attrs["src"]))
    if not path.is_file():
        return f"<em>No figure here: {alt}.</em>"
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{alt}" src="data:{mimetypes.guess_type(path)[0]};base64,{content}">'
