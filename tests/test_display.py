"""Text from anywhere is shown on one harmless line, and as text, never as markup."""

from __future__ import annotations

import math
from datetime import date
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank.display import (
    describe_metadata,
    describe_score,
    document_cell,
    element,
    fragment,
    harmless,
    one_line,
    table,
)


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("", 5, ""),
        (" \n\t ", 5, ""),
        ("abcde", 5, "abcde"),
        ("abcdef", 5, "abcd…"),
        ("a\n b\u2028c", 9, "a b c"),
        ("abc def", 5, "abc…"),
        ("中文字", 6, "中文字"),
        ("中文字符", 6, "中文…"),
        ("中a文", 4, "中a…"),
        ("\x1b[31mred", 20, "\ufffd[31mred"),
        ("a\u202eb\u2066c\ud800d\0", 9, "a\ufffdb\ufffdc\ufffdd\ufffd"),
        ("👩\u200d🔬", 9, "👩\u200d🔬"),
        ("دوح", 9, "دوح"),
    ],
)
def test_a_line_is_flat_short_and_harmless(text, width, shown) -> None:
    assert one_line(text, width) == shown


def test_a_document_of_megabytes_is_read_at_its_beginning_only() -> None:
    class Watched(str):
        """Tells how much of it was split."""

        def split(self, sep=None, maxsplit=-1):
            assert 0 <= maxsplit <= 10
            return super().split(sep, maxsplit)

    assert one_line(Watched("word " * 1_000_000), 10) == "word word…"


@given(data=st.data(), width=st.integers(1, 40))
def test_a_line_keeps_to_its_width_and_can_be_encoded(data, width, troublesome_text) -> None:
    line = one_line(data.draw(troublesome_text), width)
    assert len(line) <= width
    assert line.replace("\u200c", "").replace("\u200d", "").isprintable()
    line.encode()


def test_plain_fields_of_metadata_are_told_and_nested_ones_left_out() -> None:
    metadata = {
        "type": "policy",
        "date": date(2026, 1, 15),
        "pages": 3,
        "draft": False,
        "blank": " ",
        "nothing": None,
        "vector": [0.1, 0.2],
        "author": {"name": "Ada"},
    }
    shown = "type: policy; date: 2026-01-15; pages: 3; draft: False"
    assert describe_metadata(metadata, 100) == shown
    assert describe_metadata({"text": "a" * 100}, 10) == "text: aaa…"


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.5, "0.500"),
        (-3.25, "-3.250"),
        (12345.6, "1.23e+04"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_a_score_takes_little_room_whatever_it_is(score, shown) -> None:
    assert describe_score(score) == shown


class Page(HTMLParser):
    """What a browser makes of a fragment: its tags, its attributes and its text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)

    def unknown_decl(self, data):
        raise AssertionError(f"<![{data}")

    def handle_comment(self, data):
        raise AssertionError(f"<!--{data}")

    handle_decl = handle_pi = handle_comment


ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></svg></td></table></div><b>",
    "<!-- ]]> <![CDATA[ <?xml ?> -->",
    "&lt;b&gt; &#60; &amp &nbsp;",
)


@given(data=st.data())
def test_a_text_is_only_ever_text(data, troublesome_text) -> None:
    texts = st.one_of(st.sampled_from(ATTACKS), troublesome_text)
    before, inside, after, hint = (data.draw(texts) for _ in range(4))
    markup = fragment(before, element("p", {"title": hint}, inside), after)
    page = Page(markup)
    assert page.tags == ["div", "style", "p"]
    assert page.attributes == [("class", "lanerank"), ("title", harmless(hint))]
    style = ElementTree.fromstring(markup)[0].text
    assert "".join(page.texts) == style + harmless(before + inside + after)


def test_the_style_needs_no_escapes_and_loads_nothing() -> None:
    style = ElementTree.fromstring(fragment())[0].text
    assert style in fragment()
    assert not any(word in style for word in ("url(", "@import", "//", "expression"))


def test_a_cell_tells_what_was_cut() -> None:
    cell = ElementTree.tostring(document_cell("text", "7", {"a": 1}, cut=True), encoding="unicode")
    assert "".join(Page(cell).texts) == "7 (cut) texta: 1"
    plain = ElementTree.tostring(document_cell("text", None, {}), encoding="unicode")
    assert "".join(Page(plain).texts) == "text"


def test_a_table_has_a_row_for_each_row() -> None:
    cells = [[element("td", {}, str(10 * row + column)) for column in (1, 2)] for row in (1, 2)]
    made = table([element("th", {}, "a"), element("th", {}, "b")], cells)
    assert [["".join(cell.itertext()) for cell in row] for row in made.iter("tr")] == [
        ["a", "b"],
        ["11", "12"],
        ["21", "22"],
    ]
