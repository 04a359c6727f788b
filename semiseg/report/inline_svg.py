"""A drawn SVG file as an element of an HTML page: unique ids, the page's colours and letters, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

PIXELS_PER_POINT = 96 / 72
_DROPPED = ("metadata", "style", "script", "title", "desc")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_GREY = re.compile(r"#([0-9a-f]{2})\1\1")


def inline_svg(svg: bytes, *, prefix: str, alt: str) -> tuple[str, float]:
    """The element `<svg>` of a figure, and its natural width in CSS pixels.

    What is drawn black takes the colour of the text around (`currentColor`), white the colour of the page, light and
    dark greys those of its rules and of its quieter text: the variables `--paper`, `--rule` and `--quiet` of the page.
    Middle greys and colours stay. White letters stay white, since they lie on something coloured.

    Args:
        svg: a file of matplotlib with letters as text.
        prefix: put before every id, so that ids of several figures differ.
        alt: what the figure shows, for who cannot see it.

    Raises:
        ElementTree.ParseError: not an XML file.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        for name in list(element.attrib):
            element.set(_local(name), element.attrib.pop(name))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _DROPPED]:
            parent.remove(child)
    used = set(_references(root))
    for element in root.iter():
        _rewrite(element, prefix, used)
        if element.tag != "text":
            element.text = None  # line breaks between elements
        element.tail = None
    box = [float(number) for number in root.get("viewBox", "0 0 1 1").split()]
    width, height = box[2] * PIXELS_PER_POINT, box[3] * PIXELS_PER_POINT
    shown = {"viewBox": root.get("viewBox", ""), "width": f"{width:.0f}", "height": f"{height:.0f}"}
    root.attrib.clear()
    root.attrib.update({**shown, "fill": "currentColor", "role": "img", "aria-label": alt})
    title = Element("title")
    title.text = alt
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode"), width


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _references(root: Element) -> Iterator[str]:
    """The ids that something in the figure refers to."""
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                yield value[1:]
            yield from _REFERENCE.findall(value)


def _rewrite(element: Element, prefix: str, used: set[str]) -> None:
    for name, value in list(element.attrib.items()):
        if name == "id":
            if value in used:
                element.set(name, f"{prefix}-{value}")
            else:
                del element.attrib[name]
        elif name == "href":
            if value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            elif not value.startswith("data:image/"):
                del element.attrib[name]
        elif name == "style":
            element.set(name, _style(value, letters=element.tag == "text", prefix=prefix))
        elif name in ("fill", "stroke"):
            element.set(name, _colour(value, letters=element.tag == "text"))
        else:
            element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", _LONG_NUMBER.sub(_shorter, value)))


def _shorter(number: re.Match[str]) -> str:
    """Two decimals: a fiftieth of a pixel."""
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _style(style: str, *, letters: bool, prefix: str) -> str:
    properties = []
    for item in style.split(";"):
        name, _, value = (part.strip() for part in item.partition(":"))
        if not value or name == "font-family":
            continue  # the page names the fonts
        if name == "font":
            value = re.sub(r"\s*'.*", " sans-serif", value)
        elif name in ("fill", "stroke", "color"):
            value = _colour(value, letters=letters)
        value = _LONG_NUMBER.sub(_shorter, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))
        properties.append(f"{name}:{value}")
    return ";".join(properties)


def _colour(value: str, *, letters: bool) -> str:
    """A colour of the figure as one of the page, if it has no hue."""
    grey = _GREY.fullmatch(value.lower())
    if grey is None:
        return value
    level = int(grey.group(1), 16)
    if level < 0x20:
        return "currentColor"
    if level > 0xF8:
        return value if letters else "var(--paper)"
    if level >= 0xC0:
        return "var(--rule)"
    return "var(--quiet)" if level <= 0x70 else value
