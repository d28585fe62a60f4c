"""How values show themselves: text from anywhere on one harmless line, and fragments of HTML.

HTML is built as a tree and written by the standard library, so whatever a document says is
escaped by the same code. A fragment has no script and refers to nothing outside itself; colours
follow the page it is shown on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from html import escape
from itertools import accumulate
from typing import TypeAlias
from unicodedata import east_asian_width
from xml.etree import ElementTree

Element: TypeAlias = ElementTree.Element
Content = Element | str

MAX_ROWS = 50
"""The most documents that a table shows; more would bury the page."""

# Tooltips have lines; Persian, Indic scripts and emoji are wrong without the joiners.
_KEPT = "\n\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"

# No character here may need escaping: a browser reads a style as it stands. Selectors name a class
# for every cell, since the style sheets of notebooks are as specific as a plain `.lanerank td`.
_STYLE = """
.lanerank { font: 13px/1.45 system-ui, sans-serif; overflow-x: auto; padding: 4px 0; }
.lanerank p { margin: 0 0 8px; }
.lanerank .soft { opacity: .7; }
.lanerank table { border-collapse: collapse; table-layout: auto; margin: 0; font-size: 13px; }
.lanerank table .number, .lanerank table .text { padding: 4px 10px; line-height: 1.45;
  vertical-align: top; border: 0; border-bottom: 1px solid rgba(128, 128, 128, .3); }
.lanerank table th.number, .lanerank table th.text { vertical-align: bottom; font-weight: 600; }
.lanerank table .number { text-align: right; font-variant-numeric: tabular-nums; }
.lanerank table td.number { white-space: nowrap; }
.lanerank table .text { text-align: left; max-width: 60em; overflow-wrap: anywhere; }
.lanerank table td.text div { overflow: hidden; }
.lanerank .compact table { width: 100%; margin-top: 12px; }
.lanerank .compact .number { min-width: 8.5em; text-align: left; }
.lanerank .compact .number b { display: inline-block; min-width: 1.2em; text-align: right; }
.lanerank .compact th.text { min-width: 18em; }
.lanerank .compact td.text { max-width: 0; width: 100%; }
.lanerank .compact td.text div { text-overflow: ellipsis; white-space: nowrap; }
.lanerank .up { color: #3B82C4; }
.lanerank .down { color: #D55E00; }
.lanerank svg { display: block; font: 12px system-ui, sans-serif; fill: currentColor; }
.lanerank svg .heading { font-weight: 600; text-anchor: middle; }
.lanerank svg .before { text-anchor: end; }
.lanerank svg .middle { text-anchor: middle; }
.lanerank svg .guide { stroke: currentColor; stroke-opacity: .2; }
.lanerank svg .document path { fill: none; stroke-width: 3; stroke-linecap: round; }
.lanerank svg .document .out { stroke-dasharray: 0 7; }
.lanerank svg .document text { stroke: none; fill: currentColor; }
.lanerank svg .document .rank { font-size: 11px; font-weight: 600; text-anchor: middle; }
.lanerank svg .named .rank { fill: #000; }
.lanerank svg .other path { stroke-width: 1.5; stroke-opacity: .5; }
.lanerank svg .other circle { fill-opacity: .25; stroke: none; }
.lanerank.page { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; font-size: 14px; }
.lanerank.page .words { max-width: 48em; }
.lanerank.page td.name { min-width: 11em; }
.lanerank.page td.number { white-space: normal; }
.lanerank.page .bounds { display: block; white-space: nowrap; }
.lanerank.page th.text { vertical-align: top; }
.lanerank.page .compact { margin-bottom: 28px; }
.lanerank.page h2 { margin: 36px 0 8px; }
.lanerank.page h3 { margin: 24px 0 8px; }
.lanerank.page details { margin-top: 36px; }
.lanerank .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr));
  gap: 12px; margin-bottom: 12px; }
.lanerank svg:has(.document:hover) .document:not(:hover) { opacity: .15; }
"""


def harmless(text: str) -> str:
    """A text with U+FFFD for what acts instead of being printed; line feeds may stay."""
    return "".join(
        char if char.isprintable() or char in _KEPT else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def one_line(text: str, width: int) -> str:
    """A text on one line of at most `width` columns, with nothing in it that acts.

    Control characters, lone surrogates and the marks that turn the direction of writing around
    become U+FFFD. A character of an East Asian script takes two columns. A text that is too long
    ends in an ellipsis.
    """
    # Each piece has at least one character, so `width` pieces fill the line: a document of a
    # megabyte need not be split to its end.
    safe = harmless(" ".join(text.split(maxsplit=width))[: width + 1])
    ends = list(accumulate(2 if east_asian_width(char) in "WF" else 1 for char in safe))
    if not ends or ends[-1] <= width:
        return safe
    return safe[: sum(end < width for end in ends)].rstrip() + "…"


def describe_metadata(metadata: Mapping[str, object], width: int) -> str:
    """The plain fields of a document's metadata on one line; nested ones are left out."""
    return one_line(
        "; ".join(
            f"{name}: {str(value)[:width]}"
            for name, value in metadata.items()
            if isinstance(value, str | int | float | date) and str(value).strip()
        ),
        width,
    )


def describe_score(score: float) -> str:
    """Three decimals for scores of the usual size."""
    return f"{score:.3f}" if math.isfinite(score) and abs(score) < 1000 else f"{score:.3g}"


def element(name: str, attributes: Mapping[str, object], *content: Content) -> Element:
    """An element with texts and elements in it, in this order; the texts are made harmless."""
    values = {key: harmless(str(value)) for key, value in attributes.items()}
    node = ElementTree.Element(name, values)
    for item in content:
        if not isinstance(item, str):
            node.append(item)
        elif len(node):
            node[-1].tail = (node[-1].tail or "") + harmless(item)
        else:
            node.text = (node.text or "") + harmless(item)
    return node


def document_cell(
    text: str, identifier: str | None, metadata: Mapping[str, object], *, cut: bool = False
) -> Element:
    """A table cell with a document: its id, the beginning of its text, its plain metadata.

    Args:
        text: The text; the beginning of it is shown, more of it on hovering.
        identifier: Shown before the text.
        metadata: Its plain fields are shown below the text.
        cut: Whether to say that the model did not read the whole text.
    """
    parts: list[Content] = []
    if identifier:
        parts += [element("b", {}, one_line(identifier, 40)), " "]
    if cut:
        hint = "the model did not read this document to its end"
        parts += [element("span", {"class": "soft", "title": hint}, "(cut)"), " "]
    # Isolated, so that a script written from right to left does not turn the cell around.
    lines = [element("div", {}, *parts, element("bdi", {}, one_line(text, 160)))]
    if fields := describe_metadata(metadata, 160):
        lines.append(element("div", {"class": "soft"}, element("bdi", {}, fields)))
    return element("td", {"class": "text", "title": one_line(text, 600)}, *lines)


def table(headings: Sequence[Element], rows: Iterable[Sequence[Element]]) -> Element:
    """A table from its `th` and `td` elements."""
    body = (element("tr", {}, *row) for row in rows)
    return element(
        "table",
        {},
        element("thead", {}, element("tr", {}, *headings)),
        element("tbody", {}, *body),
    )


def page(title: str, *content: Content) -> str:
    """A whole page with the content; it runs no script and fetches nothing, and says so."""
    head = (
        '<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(one_line(title, 120))}</title></head>"
    )
    body = element("div", {"class": "lanerank page"}, element("style", {}, _STYLE), *content)
    text = ElementTree.tostring(body, encoding="unicode", short_empty_elements=False)
    return f'<!doctype html>\n<html lang="en">{head}<body>{text}</body></html>\n'


def fragment(*content: Content) -> str:
    """What a notebook shows: the content with the style that it needs."""
    whole = element("div", {"class": "lanerank"}, element("style", {}, _STYLE), *content)
    return ElementTree.tostring(whole, encoding="unicode", short_empty_elements=False)
