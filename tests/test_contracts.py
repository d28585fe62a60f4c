"""Values hold what they are given, cannot change, and sort as promised."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import threading
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lanerank.contracts import (
    AsyncScorer,
    Candidate,
    Document,
    Lane,
    RankedDocument,
    Ranking,
    RerankRequest,
    Scorer,
    Scores,
    order_by_score,
    score_async,
)
from lanerank.errors import InputError

RANKING = Ranking(
    results=(
        RankedDocument(index=2, score=0.9, document=Document("c")),
        RankedDocument(index=0, score=0.4, document=Document("a", id="7"), truncated=True),
    ),
    query="q",
    model="m",
)


def test_information_flows_from_lower_lanes_to_higher_ones() -> None:
    assert list(Lane) == [Lane.INSTRUCTION, Lane.QUERY, Lane.ATTRIBUTES, Lane.DOCUMENT]
    assert list(map(int, Lane)) == [0, 1, 2, 3]


def test_a_document_takes_its_text_by_position_or_name() -> None:
    assert Document("a") == Document(text="a")
    assert (Document("a").metadata, Document("a").id) == ({}, None)


@given(data=st.data())
def test_a_document_keeps_any_text(data, troublesome_text) -> None:
    text = data.draw(troublesome_text)
    assert Document(text).text == text


@pytest.mark.parametrize(
    "fields",
    [
        {"text": None},
        {"text": 1},
        {"text": "a", "metadata": "date"},
        {"text": "a", "metadata": None},
        {"text": "a", "id": 7},
        {"text": "a", "instruction": "b"},
    ],
)
def test_a_document_of_another_shape_is_refused(fields) -> None:
    with pytest.raises((InputError, TypeError)):
        Document(**fields)


def test_the_error_names_the_field_and_its_value() -> None:
    with pytest.raises(InputError, match=r"`text`: .* got None"):
        Document(None)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Document("a"), "text"),
        (RANKING, "query"),
        (RANKING[0], "score"),
        (Candidate(text="a"), "text"),
        (RerankRequest(query="q"), "query"),
        (Scores((0.5,)), "values"),
    ],
)
def test_values_cannot_change(value, field) -> None:
    with pytest.raises((ValidationError, AttributeError)):
        setattr(value, field, "other")


def test_a_ranking_is_a_sequence_of_its_results() -> None:
    assert len(RANKING) == 2
    assert [result.index for result in RANKING] == [2, 0]
    assert RANKING[0].document.text == "c"
    assert RANKING[-1].document.id == "7"
    assert RANKING[:1] == RANKING.results[:1]
    assert RANKING[0] in RANKING
    with pytest.raises(IndexError):
        RANKING[2]


def test_a_ranking_lists_the_documents_that_were_cut() -> None:
    assert RANKING.truncated == (0,)
    assert Ranking(query="q", model="m").truncated == ()


def test_an_empty_ranking_is_false_and_has_no_results() -> None:
    empty = Ranking(query="q", model="m")
    assert (len(empty), list(empty), bool(empty)) == (0, [], False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_ranking_survives_copying(copied) -> None:
    assert copied(RANKING) == RANKING


def test_a_ranking_survives_json() -> None:
    assert Ranking.model_validate_json(RANKING.model_dump_json()) == RANKING


def html_rows(ranking: Ranking) -> list[list[str]]:
    page = ElementTree.fromstring(ranking._repr_html_())
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_a_notebook_gets_a_table_with_metadata_and_a_mark_where_a_document_was_cut() -> None:
    metadata = {"type": "policy", "pages": 3, "vector": [0.1]}
    ranking = Ranking(
        results=(
            RankedDocument(index=2, score=0.9, document=Document("c", metadata=metadata)),
            RankedDocument(index=0, score=0.4, document=Document("a", id="7"), truncated=True),
        ),
        query="q",
        model="m",
    )
    assert html_rows(ranking) == [
        ["rank", "score", "document"],
        ["1", "0.900", "ctype: policy; pages: 3"],
        ["2", "0.400", "7 (cut) a"],
    ]
    assert html_rows(Ranking(query="q", model="m")) == [["rank", "score", "document"]]


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({}, "m; no instruction"),
        (
            {
                "instruction_fingerprint": "0f" * 8,
                "instruction_source": "argument",
                "instruction_applied": "lane",
            },
            "m; instruction 0f0f0f0f0f0f0f0f from argument",
        ),
        (
            {
                "instruction_fingerprint": "0f" * 8,
                "instruction_source": "use_instruction",
                "instruction_applied": "ignored",
            },
            "m; instruction 0f0f0f0f0f0f0f0f from use_instruction, ignored",
        ),
        ({"non_finite": (1, 2)}, "m; no instruction; documents without a finite score: 2"),
        (
            {"degraded": "the service is away"},
            "m; no instruction; in input order, nothing was scored: the service is away",
        ),
    ],
)
def test_a_notebook_is_told_how_a_ranking_came_about(fields, note) -> None:
    page = ElementTree.fromstring(Ranking(query="q", model="m", **fields)._repr_html_())
    assert ["".join(line.itertext()) for line in page.iter("p")] == ["q", note]


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ((), []),
        ((0.1,), [0]),
        ((0.1, 0.9, 0.5), [1, 2, 0]),
        ((0.5, 0.9, 0.5, 0.5), [1, 0, 2, 3]),
        ((math.nan, 0.1, math.inf, 0.9, -math.inf), [3, 1, 0, 2, 4]),
        ((math.nan, math.nan), [0, 1]),
        ((0.0, -0.0), [0, 1]),
    ],
)
def test_the_best_come_first_ties_keep_their_order_and_non_finite_go_last(values, order) -> None:
    assert order_by_score(values) == order


@given(st.lists(st.floats()).map(tuple))
def test_an_order_is_a_permutation_sorted_by_score(values) -> None:
    order = order_by_score(values)
    assert sorted(order) == list(range(len(values)))
    finite = [values[i] for i in order if math.isfinite(values[i])]
    assert finite == sorted(finite, reverse=True)
    assert all(not math.isfinite(values[i]) for i in order[len(finite) :])


def test_anything_with_the_three_members_is_a_scorer() -> None:
    class Constant:
        name = "constant"
        supports_instructions = False

        def score(self, request: RerankRequest) -> Scores:
            return Scores((0.5,) * len(request.candidates))

    assert isinstance(Constant(), Scorer)
    assert not isinstance(Constant(), AsyncScorer)
    assert not isinstance(object(), Scorer)


def test_a_scorer_is_awaited_where_it_can_be_and_else_runs_in_a_thread() -> None:
    places = []

    class Blocking:
        name = "blocking"
        supports_instructions = False

        def score(self, request: RerankRequest) -> Scores:
            places.append(threading.get_ident())
            return Scores((0.5,))

    class Awaitable(Blocking):
        async def ascore(self, request: RerankRequest) -> Scores:
            return self.score(request)

    assert isinstance(Awaitable(), AsyncScorer)
    for scorer in (Blocking(), Awaitable()):
        assert asyncio.run(score_async(scorer, RerankRequest(query="q"))) == Scores((0.5,))
    blocking, awaitable = places
    assert blocking != threading.get_ident()
    assert awaitable == threading.get_ident()
