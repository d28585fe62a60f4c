"""The scorers that lanerank ships for the tests of applications."""

from __future__ import annotations

import dataclasses

import pytest

from lanerank import Reranker, use_instruction
from lanerank.context import Source, current_instruction, resolve_instruction
from lanerank.contracts import Candidate, RerankRequest, Scorer
from lanerank.errors import InputError, LanerankError
from lanerank.testing import ADAPTER_CASES, AdapterCase, OverlapScorer, ScriptedScorer


def request(*texts, query="red fish", instruction="") -> RerankRequest:
    candidates = tuple(Candidate(text=text) for text in texts)
    return RerankRequest(query=query, instruction=instruction, candidates=candidates)


@pytest.mark.parametrize("scorer", [OverlapScorer(), ScriptedScorer({})])
def test_the_doubles_are_scorers(scorer) -> None:
    assert isinstance(scorer, Scorer)
    assert scorer.supports_instructions
    assert scorer.score(request()).values == ()


@pytest.mark.parametrize(
    ("text", "instruction", "score"),
    [
        ("a Red FISH", "", 1.0),
        ("a red bird", "", 0.5),
        ("nothing", "", 0.0),
        ("", "", 0.0),
        ("a red bird", "bird", 3 / 4),
        ("a red bird", "cat", 1 / 4),
    ],
)
def test_overlap_counts_shared_words_and_those_of_the_instruction_twice(
    text, instruction, score
) -> None:
    [value] = OverlapScorer().score(request(text, instruction=instruction)).values
    assert value == pytest.approx(score)


def test_overlap_reads_the_attributes() -> None:
    candidate = Candidate(text="bird", attributes="colour: red")
    [value] = OverlapScorer().score(RerankRequest(query="red", candidates=(candidate,))).values
    assert value == 1.0


def test_overlap_shows_that_an_instruction_reached_the_model() -> None:
    reranker, documents = Reranker(OverlapScorer()), ["red fish in a pond", "blue bird"]
    assert reranker.rank("fish", documents)[0].index == 0
    assert reranker.rank("fish", documents, instruction="blue bird")[0].index == 1


def test_scripted_gives_what_it_is_told() -> None:
    scorer = ScriptedScorer({"a": 0.2, "b": 0.8}, by_instruction={"Prefer a.": {"a": 0.9}})
    assert scorer.score(request("a", "b", "a")).values == (0.2, 0.8, 0.2)
    assert scorer.score(request("a", "b", instruction="Prefer a.")).values == (0.9, 0.8)
    assert scorer.score(request("a", "b", instruction="Prefer b.")).values == (0.2, 0.8)


def test_scripted_keeps_the_requests() -> None:
    scorer = ScriptedScorer({"a": 0.5})
    Reranker(scorer).rank("find a", ["a"], instruction="Prefer a.")
    [seen] = scorer.requests
    assert (seen.query, seen.instruction) == ("find a", "Prefer a.")
    assert seen.candidates == (Candidate(text="a"),)


def test_scripted_doubles_do_not_share_their_requests() -> None:
    first, second = ScriptedScorer({"a": 0.5}), ScriptedScorer({"a": 0.5})
    first.score(request("a"))
    assert second.requests == []


def test_scripted_refuses_a_text_it_has_no_score_for() -> None:
    with pytest.raises(InputError, match="no score for 'b'"):
        ScriptedScorer({"a": 0.5}).score(request("a", "b"))


def test_a_double_can_stand_for_a_model_without_instructions() -> None:
    reranker = Reranker(OverlapScorer(supports_instructions=False), on_unsupported="ignore")
    assert reranker.rank("a", ["a"], instruction="b").instruction_applied == "ignored"


# The cases for adapters, run here against the simplest adapter there can be


def adapt(case: AdapterCase):
    """What an adapter does: resolve first, then hand the reranker what was resolved."""
    resolved = resolve_instruction(
        [
            (Source.ARGUMENT, case.per_call),
            (Source.USE_INSTRUCTION, current_instruction()),
            (Source.FIELD, case.default),
        ],
        sources=case.sources,
        require=case.require,
    )
    return Reranker(OverlapScorer()).rank(
        case.query, case.documents, instruction=resolved, top_k=case.top_n
    )


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)
def test_adapter_case(case: AdapterCase) -> None:
    with use_instruction(case.scope):
        if case.error is not None:
            with pytest.raises(case.error):
                adapt(case)
            return
        ranking = adapt(case)
    assert tuple(result.index for result in ranking) == case.order
    assert ranking.instruction_source == (case.source and str(case.source))


def test_adapter_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in ADAPTER_CASES}) == len(ADAPTER_CASES)


@pytest.mark.parametrize(
    "flaw",
    [
        pytest.param({"scope": None}, id="loses the scope"),
        pytest.param({"per_call": None}, id="loses the argument"),
        pytest.param({"default": None}, id="loses the default"),
        pytest.param({"sources": None}, id="ignores sources"),
        pytest.param({"require": False}, id="ignores require"),
        pytest.param({"top_n": None}, id="ignores top_n"),
    ],
)
def test_adapter_with_a_flaw_fails_a_case(flaw) -> None:
    failed = []
    for case in ADAPTER_CASES:
        broken = dataclasses.replace(case, **flaw)
        try:
            with use_instruction(broken.scope):
                order = tuple(result.index for result in adapt(broken))
        except LanerankError as error:
            failed.append(type(error) is not case.error)
        else:
            failed.append(order != case.order)
    assert any(failed)
