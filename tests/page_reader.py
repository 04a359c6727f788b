"""Reads a report's Markdown and its HTML page as a tree, and says whether that is whole: for the tests of reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote


def unpadded(text: str) -> str:
    """Markdown whose tables have one space beside each cell."""
    return re.sub(r" +(?= \|)", "", re.sub(r"(?<=\|) +", " ", text))


VOID = {"meta", "img", "br", "hr", "link", "input", "source", "wbr"}
LOADING = {"script", "link", "iframe", "object", "embed", "base", "source", "foreignObject"}


@dataclass
class Element:
    """One element: its tag, attributes and content (texts and elements, in order)."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    content: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for part in self.content:
            if isinstance(part, Element):
                yield from part.walk()

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.walk() if element.tag in tags]

    def one(self, tag: str) -> Element:
        (found,) = self.all(tag)
        return found

    def has_class(self, name: str) -> bool:
        return name in self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> says an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def read_page(text: str) -> Element:
    """The tree of a page; every element must be closed where it belongs."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"never closed: {[element.tag for element in reader.open[1:]]}"
    return reader.root


def assert_whole(page: Element, folder: Path) -> None:
    """Nothing is loaded from anywhere, every id is one element's, and every link leads somewhere."""
    elements = list(page.walk())
    assert not [element.tag for element in elements if element.tag in LOADING]
    ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for element in elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        for name, value in element.attributes.items():
            assert name not in ("srcset", "poster", "background", "xlink:href"), name
            if name == "src":
                assert value.startswith("data:image/"), value
            if name == "href" and value.startswith("#"):
                assert unquote(value[1:]) in ids, f"{value} leads nowhere"
            elif name == "href":
                assert element.tag == "a", f"<{element.tag}> refers to {value}"
                assert (folder / unquote(value)).is_file(), f"{value} is not beside the page"
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#")
                assert target[1:] in ids
    style = page.one("style").text
    assert "url(" not in style
    assert "@import" not in style
