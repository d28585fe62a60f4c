"""Rankings side by side: who moved how far, and how it is shown."""

from __future__ import annotations

import copy
import pickle
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import Document, InputError, RankedDocument, Ranking, Reranker, compare_rankings
from lanerank.testing import OverlapScorer, ScriptedScorer

FISH = [Document(f"{colour} fish", id=colour) for colour in ("red", "blue", "green", "grey")]


def rank(instruction=None, documents=FISH, **options):
    return Reranker(OverlapScorer()).rank("fish", documents, instruction=instruction, **options)


def in_order(indexes, texts):
    """A ranking of the texts in this order of their indexes."""
    scores = {texts[index]: 1 - place / 1000 for place, index in enumerate(indexes)}
    return Reranker(ScriptedScorer(scores)).rank("query", texts, top_k=len(indexes))


def page(shown):
    return ElementTree.fromstring(shown._repr_html_())


def words(node):
    return "".join(node.itertext())


def rows(shown):
    return [[words(cell) for cell in row] for row in page(shown).iter("tr")]


# Ranks and moves


def test_a_document_has_its_rank_its_score_and_its_move_under_each_label() -> None:
    comparison = compare_rankings({"none": rank(), "green": rank("green"), "grey": rank("grey")})
    assert comparison.labels == ("none", "green", "grey")
    assert [row.document.id for row in comparison] == ["red", "blue", "green", "grey"]
    assert [row.index for row in comparison] == [0, 1, 2, 3]
    assert [row.ranks for row in comparison] == [(1, 2, 2), (2, 3, 3), (3, 1, 4), (4, 4, 1)]
    assert [row.moves for row in comparison] == [(0, -1, -1), (0, -1, -1), (0, 2, -1), (0, 0, 3)]
    assert comparison.documents[2].scores == (1.0, 1.0, pytest.approx(1 / 3))


@given(orders=st.lists(st.permutations(range(6)), min_size=1, max_size=4))
def test_ranks_are_the_places_in_each_ranking_and_moves_cancel_out(orders) -> None:
    texts = [f"text {number}" for number in range(6)]
    rankings = {str(n): in_order(order, texts) for n, order in enumerate(orders)}
    comparison = compare_rankings(rankings)
    assert [row.index for row in comparison] == list(orders[0])
    for column, ranking in enumerate(rankings.values()):
        for row in comparison:
            result = ranking[row.ranks[column] - 1]
            assert (result.index, result.document) == (row.index, row.document)
            assert result.score == row.scores[column]
        assert sum(row.moves[column] for row in comparison) == 0
    assert all(row.moves[0] == 0 for row in comparison)


def test_a_document_that_a_ranking_did_not_keep_has_no_rank_there() -> None:
    comparison = compare_rankings({"none": rank(top_k=2), "green": rank("green", top_k=2)})
    assert [(row.document.id, row.ranks, row.moves) for row in comparison] == [
        ("red", (1, 2), (0, -1)),
        ("blue", (2, None), (0, None)),
        ("green", (None, 1), (None, None)),
    ]
    assert comparison.documents[1].scores[1] is None


def test_one_ranking_or_none_of_documents_can_be_shown() -> None:
    alone = compare_rankings({"none": rank()})
    assert [row.ranks for row in alone] == [(1,), (2,), (3,), (4,)]
    empty = compare_rankings({"a": rank(documents=[]), "b": rank("red", documents=[])})
    assert (len(empty), list(empty)) == (0, [])
    for comparison in (alone, empty):
        assert page(comparison).find("svg") is None
        assert len(rows(comparison)) == len(comparison) + 1
    assert str(empty) == "query: fish\na                b"


def test_what_was_compared_is_kept_and_does_not_change() -> None:
    rankings = {"none": rank(), "green": rank("green")}
    before = copy.deepcopy(rankings)
    comparison = compare_rankings(rankings)
    assert rankings == before
    assert comparison.rankings == tuple(rankings.values())
    assert pickle.loads(pickle.dumps(comparison)) == comparison
    with pytest.raises(AttributeError):
        comparison.labels = ()


# Mistakes


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ({}, "at least one entry"),
        ([rank()], "mapping from labels to rankings"),
        (None, "mapping from labels to rankings .* got None"),
        ({1: rank()}, "got int 1 to Ranking"),
        ({"a": [rank()]}, "got str 'a' to list"),
        (
            {"a": rank(), "b": Reranker(OverlapScorer()).rank("bird", FISH)},
            r"`rankings\['b'\]` is for the query 'bird' and `rankings\['a'\]` for 'fish'",
        ),
        ({"a": rank(), "b": rank(documents=FISH[::-1])}, "'grey fish' as document 0"),
        (
            {"a": rank(), "b": rank(documents=[Document("red fish", id="x"), *FISH[1:]])},
            "rank the same list, in the same order",
        ),
    ],
)
def test_rankings_that_cannot_be_compared_are_refused(rankings, message) -> None:
    with pytest.raises(InputError, match=message):
        compare_rankings(rankings)


# As text


def test_a_terminal_gets_a_table() -> None:
    comparison = compare_rankings({"none": rank(top_k=3), "the grey one is best": rank("grey")})
    assert str(comparison).splitlines() == [
        "query: fish",
        "none             the grey one i…",
        "  1  1.000         2  0.333 ▼1    red: red fish",
        "  2  1.000         3  0.333 ▼1    blue: blue fish",
        "  3  1.000         4  0.333 ▼1    green: green fish",
        "  –                1  1.000 new   grey: grey fish",  # noqa: RUF001 - the mark for no rank
    ]
    assert repr(comparison) == str(comparison)


@given(data=st.data())
def test_a_terminal_gets_nothing_that_acts(data, troublesome_text) -> None:
    label, query, text = (data.draw(troublesome_text) for _ in range(3))
    ranking = Reranker(OverlapScorer()).rank(f"q{query}", [Document(text, id=text)])
    lines = str(compare_rankings({label: ranking})).split("\n")
    assert len(lines) == 3
    assert all(line.replace("\u200c", "").replace("\u200d", "").isprintable() for line in lines)


def test_a_long_list_is_cut_and_says_so() -> None:
    ranking = in_order(range(120), [f"text {number}" for number in range(120)])
    comparison = compare_rankings({"a": ranking, "b": ranking})
    assert len(str(comparison).splitlines()) == 2 + 50 + 1
    assert str(comparison).endswith("and 70 more documents")
    for shown in (comparison, ranking):
        assert len(rows(shown)) == 51
        assert "the first 50 of 120 documents" in words(page(shown))


# As HTML


def test_the_table_has_ranks_scores_moves_and_texts() -> None:
    comparison = compare_rankings({"none": rank(top_k=3), "grey": rank("grey")})
    assert rows(comparison) == [
        ["none", "grey", "document"],
        ["1 1.000 ", "2 0.333 ▼1", "red red fish"],
        ["2 1.000 ", "3 0.333 ▼1", "blue blue fish"],
        ["3 1.000 ", "4 0.333 ▼1", "green green fish"],
        ["\N{EN DASH}  ", "1 1.000 new", "grey grey fish"],
    ]


def test_the_chart_has_a_dot_for_each_rank_and_a_name_at_both_ends() -> None:
    comparison = compare_rankings({"none": rank(), "grey": rank("grey"), "green": rank("green")})
    chart = page(comparison).find("svg")
    traces = {words(trace.find("title")): trace for trace in chart.iter("g")}
    [grey] = [trace for title, trace in traces.items() if title.startswith("grey: grey fish\n")]
    assert words(grey.find("title")).splitlines()[1:] == [
        "none: rank 4, score 1.000",
        "grey: rank 1, score 1.000 ▲3",
        "green: rank 4, score 0.333 =",
    ]
    texts = [(text.get("class"), words(text)) for text in grey.iter("text")]
    assert [shown for kind, shown in texts if kind == "rank"] == ["4", "1", "4"]
    assert texts[-2:] == [("before", "grey: grey fish"), ("after", "grey: grey fish")]
    assert len(traces) == 4
    headings = [words(t) for t in chart.iter("text") if t.get("class") == "heading"]
    assert headings == ["none", "grey", "green"]


def dots(chart, column):
    """Heights of the dots of one column, by the document's first text."""
    found = {}
    for trace in chart.iter("g"):
        circles = sorted(trace.iter("circle"), key=lambda circle: float(circle.get("cx")))
        found[words(trace.find("title")).splitlines()[0]] = float(circles[column].get("cy"))
    return found


@pytest.mark.parametrize("size", [2, 12, 13, 40, 300])
def test_a_better_rank_is_higher_up_however_many_there_are(size) -> None:
    texts = [f"text {number}" for number in range(size)]
    order = [*range(5, size), *range(min(5, size))]
    comparison = compare_rankings({"a": in_order(range(size), texts), "b": in_order(order, texts)})
    chart = page(comparison).find("svg")
    width, height = (float(side) for side in chart.get("viewBox").split()[2:])
    assert height < 600
    for column in (0, 1):
        heights = dots(chart, column)
        rank_of = {row.document.text: row.ranks[column] for row in comparison}
        by_height = sorted(heights, key=heights.__getitem__)
        assert by_height == sorted(heights, key=rank_of.__getitem__)
        assert len(set(heights.values())) == len(heights)
        assert 0 < min(heights.values()) < max(heights.values()) < height
    kept = {row.document.text for row in comparison if min(row.ranks) <= 12}
    assert set(dots(chart, 0)) == kept
    assert f"max-width: {width:g}px" in chart.get("style")
    assert "width: 100%" in chart.get("style")


def test_a_document_that_fell_out_leaves_on_a_dashed_line() -> None:
    comparison = compare_rankings({"none": rank(top_k=2), "green": rank("green", top_k=2)})
    chart = page(comparison).find("svg")
    drawn = {
        words(trace.find("title")).partition(":")[0]: (
            [path.get("class") for path in trace.iter("path")],
            len(list(trace.iter("circle"))),
        )
        for trace in chart.iter("g")
    }
    assert drawn == {"red": (["in"], 2), "blue": (["out"], 1), "green": (["out"], 1)}
    assert "not kept" in words(chart)
    assert "green: not kept" in words(chart)


def test_the_table_has_the_colours_of_the_chart() -> None:
    texts = [f"text {number}" for number in range(9)]
    comparison = compare_rankings(
        {"a": in_order(range(9), texts), "b": in_order(range(8, -1, -1), texts)}
    )
    whole = page(comparison)
    lines = {
        words(trace.find("title")).splitlines()[0]: trace.get("stroke")
        for trace in whole.find("svg").iter("g")
    }
    cells = {words(row[-1]): row[0].get("style") for row in list(whole.iter("tr"))[1:]}
    coloured = {text for text, colour in lines.items() if colour != "gray"}
    # Those that are far up somewhere, so from both ends of the list.
    assert coloured == {"text 0", "text 8", "text 1", "text 7", "text 2", "text 6"}
    assert len({lines[text] for text in coloured}) == 6
    for text in texts:
        assert cells[text].endswith(lines[text] if text in coloured else "transparent")


class Tags(HTMLParser):
    """What a browser finds in a fragment."""

    def __init__(self, markup):
        super().__init__()
        self.names, self.attributes, self.texts = set(), set(), []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes.update(attrs)

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></text></svg></td><b onclick='x'>",
    "<!-- ]]> <![CDATA[",
    "&lt;script&gt;",
)
TAGS = set("div style p b bdi span table thead tbody tr th td svg g title path circle text".split())
TEXT_ATTRIBUTES = {"title", "aria-label"}
DRAWING = re.compile(r"[-\w .,:;#%()]*")


@given(data=st.data())
def test_whatever_a_text_says_it_stays_a_text(data, troublesome_text) -> None:
    texts = st.one_of(st.sampled_from(ATTACKS), troublesome_text)
    query, model, source, identifier, text, key, value, label = (data.draw(texts) for _ in range(8))
    ranking = Ranking(
        results=(
            RankedDocument(
                index=0,
                score=0.5,
                document=Document(text, id=identifier, metadata={key: value}),
                truncated=True,
            ),
        ),
        query=query,
        model=model,
        instruction_fingerprint="0123456789abcdef",
        instruction_source=source,
        instruction_applied="lane",
    )
    for shown in (ranking, compare_rankings({label: ranking, f"{label} again": ranking})):
        markup = shown._repr_html_()
        tags = Tags(markup)
        assert tags.names <= TAGS
        for name, content in tags.attributes:
            assert name in TEXT_ATTRIBUTES or DRAWING.fullmatch(content), (name, content)
        # Two parsers with different rules find the same text.
        assert "".join(tags.texts) == words(ElementTree.fromstring(markup))
        for attack in ATTACKS:
            if attack in (query, text):
                assert attack in "".join(tags.texts)
        assert markup.replace("\n", "").replace("\u200c", "").replace("\u200d", "").isprintable()


def test_nothing_is_loaded_and_nothing_runs() -> None:
    markup = compare_rankings({"none": rank(), "green": rank("green")})._repr_html_()
    assert not re.search(r"script|href|src=|url\(|@import|https?:|\bon\w+=", markup)
