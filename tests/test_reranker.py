"""The reranker: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import (
    Document,
    InputError,
    Instruction,
    InstructionError,
    InstructionNotSupportedError,
    Reranker,
    ScorerError,
    use_instruction,
)
from lanerank.context import Resolved, Source
from lanerank.contracts import RerankRequest, Scores
from lanerank.testing import OverlapScorer, ScriptedScorer

TEXTS = st.lists(st.text(st.sampled_from("ab red fish"), max_size=12), max_size=8)
METADATA = st.dictionaries(
    st.sampled_from(
        ["rerank_instruction", "instruction", "today", "query", "system", "lanerank", "date", "x"]
    ),
    st.one_of(st.text(max_size=20), st.integers(), st.none(), st.dates(), st.lists(st.text())),
)


@dataclass
class Recording:
    """Scores by position and keeps the requests."""

    values: tuple = ()
    truncated: tuple = ()
    name: str = "recording"
    supports_instructions: bool = True
    requests: list[RerankRequest] = field(default_factory=list)

    def score(self, request: RerankRequest) -> Scores:
        self.requests.append(request)
        count = len(request.candidates)
        return Scores(self.values or tuple(1 / (i + 1) for i in range(count)), self.truncated)


@pytest.fixture
def recording() -> Recording:
    return Recording()


@pytest.fixture(scope="module")
def tiny(tiny_scorer) -> Reranker:
    return Reranker(tiny_scorer)


# Results


def test_the_best_come_first_with_the_documents_as_given() -> None:
    scorer = ScriptedScorer({"a": 0.2, "b": 0.9, "c": 0.5})
    documents = ["a", Document("b", id="2", metadata={"date": "2025"}), {"text": "c", "id": 3}]
    ranking = Reranker(scorer).rank("find", documents)
    assert [(r.index, r.score, r.document.id) for r in ranking] == [
        (1, 0.9, "2"),
        (2, 0.5, "3"),
        (0, 0.2, None),
    ]
    assert ranking[0].document is documents[1]
    assert (ranking.query, ranking.model) == ("find", "scripted")


def test_ties_keep_the_order_of_the_input() -> None:
    ranking = Reranker(ScriptedScorer({"a": 0.5, "b": 0.5, "c": 0.7})).rank("q", ["b", "a", "c"])
    assert [result.index for result in ranking] == [2, 0, 1]


@given(texts=TEXTS, top_k=st.one_of(st.none(), st.integers(1, 10)))
def test_rank_is_score_sorted_and_cut(texts, top_k) -> None:
    reranker = Reranker(OverlapScorer())
    scores = reranker.score("red fish", texts)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    ranking = reranker.rank("red fish", texts, top_k=top_k)
    assert [result.index for result in ranking] == order[:top_k]
    assert [result.score for result in ranking] == [scores[i] for i in order][:top_k]
    assert [result.document.text for result in ranking] == [texts[i] for i in order][:top_k]


@given(data=st.data())
def test_permuting_the_documents_permutes_the_ranking(data, tiny) -> None:
    texts = data.draw(st.lists(st.text("abc ", min_size=1), min_size=1, max_size=6, unique=True))
    shuffled = data.draw(st.permutations(texts))
    first = tiny.rank("red fish", texts, instruction="prefer a")
    second = tiny.rank("red fish", shuffled, instruction="prefer a")
    by_text = {result.document.text: result.score for result in first}
    assert [result.score for result in second] == pytest.approx(
        [result.score for result in first], abs=1e-5
    )
    for result in second:
        assert result.document.text == shuffled[result.index]
        assert result.score == pytest.approx(by_text[result.document.text], abs=1e-5)


def test_scores_are_python_floats_in_input_order(tiny) -> None:
    scores = tiny.score("red", ["a", "red fish", ""], instruction="b")
    assert [type(score) for score in scores] == [float] * 3
    by_index = {r.index: r.score for r in tiny.rank("red", ["a", "red fish", ""], instruction="b")}
    assert scores == [by_index[i] for i in range(3)]


def test_duplicates_stay_apart(tiny) -> None:
    ranking = tiny.rank("red", ["same"] * 4)
    assert [result.index for result in ranking] == [0, 1, 2, 3]


def test_documents_cut_by_the_model_are_flagged_in_the_ranking(tiny) -> None:
    texts = ["red", "red " * 300, "blue " * 300]
    ranking = tiny.rank("red", texts)
    assert sorted(ranking.truncated) == [1, 2]
    assert {r.index: r.truncated for r in ranking} == {0: False, 1: True, 2: True}
    assert tiny.rank("red", texts, long_documents="max_window").truncated == ()


@pytest.mark.parametrize("documents", [[], (), iter([])])
def test_no_documents_give_an_empty_ranking(documents, recording) -> None:
    ranking = Reranker(recording).rank("q", documents, instruction="i")
    assert (len(ranking), ranking.non_finite, recording.requests) == (0, (), [])
    assert ranking.instruction_source == "argument"
    assert Reranker(recording).score("q", []) == []


def test_any_iterable_of_documents_will_do(recording) -> None:
    assert len(Reranker(recording).rank("q", (text for text in "abc"))) == 3
    assert len(Reranker(recording).rank("q", np.array(["a", "b"]))) == 2


def test_progress_is_handed_to_the_scorer(tiny) -> None:
    seen = []
    tiny.rank("red", ["a", "b"], progress=lambda done, whole: seen.append((done, whole)))
    assert seen == [(2, 2)]


def test_a_reranker_shows_its_model() -> None:
    assert repr(Reranker(OverlapScorer())) == "Reranker('overlap')"


# Nothing is changed


@given(metadata=METADATA, texts=TEXTS)
def test_no_input_is_mutated(metadata, texts) -> None:
    documents = [{"text": t, "metadata": metadata, "extra": [1]} for t in texts]
    documents += [Document(t, metadata=metadata) for t in texts]
    instruction = Instruction("prefer red", glossary={"x": "y"}, today="2026-01-01")
    attributes = ["date", "x", "extra"]
    before = copy.deepcopy((documents, metadata, instruction, attributes))
    Reranker(OverlapScorer()).rank(
        "red", documents, instruction=instruction, attributes=attributes, top_k=2
    )
    assert (documents, metadata, instruction, attributes) == before


# Guarantee 5: metadata is not a source of instructions


@given(metadata=METADATA)
def test_metadata_never_becomes_an_instruction(metadata, tiny) -> None:
    texts = ["red fish", "a coach"]
    plain = tiny.rank("red", texts)
    laden = tiny.rank("red", [Document(text, metadata=metadata) for text in texts])
    mapped = tiny.rank("red", [{"text": text, **metadata} for text in texts])
    for ranking in (laden, mapped):
        assert [(r.index, r.score) for r in ranking] == [(r.index, r.score) for r in plain]
        assert ranking.instruction_fingerprint is None
        assert ranking.instruction_source is None


@given(metadata=METADATA)
def test_metadata_that_was_not_chosen_reaches_no_lane(metadata) -> None:
    recording = Recording()
    document = Document("a", metadata={**metadata, "chosen": "yes"})
    Reranker(recording).rank("q", [document], instruction="i", attributes=["chosen"])
    [request] = recording.requests
    assert (request.query, request.instruction) == ("q", "i")
    [candidate] = request.candidates
    assert (candidate.text, candidate.attributes) == ("a", "chosen: yes")


@given(metadata=METADATA)
def test_chosen_metadata_reaches_the_attributes_lane_only(metadata) -> None:
    recording = Recording()
    document = Document("a", metadata=metadata)
    Reranker(recording).rank("q", [document], instruction="i", attributes=list(metadata))
    [request] = recording.requests
    assert (request.query, request.instruction) == ("q", "i")
    assert request.candidates[0].text == "a"


def test_the_keys_of_a_mapping_count_as_metadata_and_metadata_wins(recording) -> None:
    documents = [{"text": "a", "date": "2024", "site": "x", "metadata": {"date": "2025"}}]
    ranking = Reranker(recording).rank("q", documents, attributes=("date", "site"))
    assert recording.requests[0].candidates[0].attributes == "date: 2025; site: x"
    assert ranking[0].document.metadata == {"date": "2025", "site": "x"}


def test_unknown_attributes_are_left_out(recording) -> None:
    Reranker(recording).rank("q", [Document("a", metadata={"b": 1})], attributes=["c", "b"])
    assert recording.requests[0].candidates[0].attributes == "b: 1"


@pytest.mark.parametrize("names", [iter(["b", "a"]), ["b", "b", "a"], {"b": 1, "a": 2}])
def test_attributes_may_come_in_any_iterable(names, recording) -> None:
    Reranker(recording).rank("q", [Document("x", metadata={"a": 1, "b": 2})], attributes=names)
    assert recording.requests[0].candidates[0].attributes == "b: 2; a: 1"


def test_attributes_are_not_read_when_none_are_chosen(recording) -> None:
    Reranker(recording).rank("q", [Document("a", metadata={"date": "2025-01-01"})])
    assert recording.requests[0].candidates[0].attributes == ""


def test_a_date_gets_its_age_where_the_instruction_knows_today(recording) -> None:
    document = Document("a", metadata={"date": dt.date(2025, 10, 1)})
    instruction = Instruction(recency="Prefer new documents.", today="2026-01-01")
    Reranker(recording).rank("q", [document], instruction=instruction, attributes=["date"])
    [request] = recording.requests
    assert request.candidates[0].attributes == "date: 2025-10-01 (3 months old)"
    assert request.instruction == "Prefer new documents. Today is 2026-01-01."


# What adapters take for a model


def test_coerce_takes_rerankers_and_scorers_as_they_are() -> None:
    reranker = Reranker(OverlapScorer(), long_documents="max_window")
    assert Reranker.coerce(reranker) is reranker
    assert Reranker.coerce(reranker.scorer).scorer is reranker.scorer


def test_coerce_loads_a_name_once_also_for_threads(tiny_model_folder) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(Reranker.coerce, [tiny_model_folder, str(tiny_model_folder)] * 4))
    assert len(set(map(id, loaded))) == 1
    assert loaded[0].scorer.name == tiny_model_folder.name


@pytest.mark.parametrize("value", [7, ["lanerank-mini"], b"lanerank-mini", OverlapScorer])
def test_coerce_refuses_anything_else_and_names_the_argument(value) -> None:
    with pytest.raises(InputError, match="`model` must be a name or folder"):
        Reranker.coerce(value)
    with pytest.raises(InputError, match="`reranker` must be"):
        Reranker.check(value, name="reranker")


# Where the instruction comes from


def test_a_ranking_tells_which_instruction_was_applied(recording) -> None:
    instruction = Instruction(rules="Prefer red.")
    ranking = Reranker(recording).rank("q", ["a"], instruction=instruction)
    assert ranking.instruction_fingerprint == instruction.fingerprint
    assert ranking.instruction_source == "argument"
    assert ranking.instruction_applied == "lane"
    assert recording.requests[0].instruction == "Prefer red."


@pytest.mark.parametrize("instruction", [None, "", "  ", Instruction()])
def test_without_an_instruction_a_ranking_names_none(instruction, recording) -> None:
    ranking = Reranker(recording).rank("q", ["a"], instruction=instruction)
    assert ranking.instruction_fingerprint is None
    assert ranking.instruction_source is None
    assert ranking.instruction_applied is None
    assert recording.requests[0].instruction == ""


def test_use_instruction_applies_to_calls_inside(recording) -> None:
    reranker = Reranker(recording)
    with use_instruction("prefer red"):
        inside = reranker.rank("q", ["a"])
        reranker.score("q", ["a"])
        argument = reranker.rank("q", ["a"], instruction="prefer blue")
    outside = reranker.rank("q", ["a"])
    assert [r.instruction for r in recording.requests] == [
        "prefer red",
        "prefer red",
        "prefer blue",
        "",
    ]
    assert [r.instruction_source for r in (inside, argument, outside)] == [
        "use_instruction",
        "argument",
        None,
    ]


def test_what_an_adapter_resolved_is_final(recording) -> None:
    reranker = Reranker(recording)
    handed = Resolved(instruction=Instruction("prefer red"), source=Source.METADATA)
    nothing = Resolved(instruction=Instruction())
    with use_instruction("prefer blue"):
        ranking = reranker.rank("q", ["a"], instruction=handed)
        without = reranker.rank("q", ["a"], instruction=nothing)
        reranker.score("q", ["a"], instruction=handed)
        in_a_thread = asyncio.run(reranker.arank("q", ["a"], instruction=handed))
    assert [r.instruction for r in recording.requests] == [
        "prefer red",
        "",
        "prefer red",
        "prefer red",
    ]
    assert ranking.instruction_source == in_a_thread.instruction_source == "metadata"
    assert without.instruction_source is None


def test_an_instruction_changes_the_scores_of_a_model_that_reads_it(tiny) -> None:
    plain = tiny.score("red", ["a fish"])
    assert tiny.score("red", ["a fish"], instruction="prefer marine") != plain
    with use_instruction("prefer marine"):
        assert tiny.score("red", ["a fish"]) != plain


# Models without an instruction channel


def test_the_names_of_columns_are_no_documents(recording) -> None:
    table = pd.DataFrame({"text": ["a", "b"], "id": ["1", "2"]})
    with pytest.raises(InputError, match=r"DataFrame with columns; .*to_dict\('records'\)"):
        Reranker(recording).rank("q", table)
    assert len(Reranker(recording).rank("q", table.to_dict("records"))) == 2


def test_an_instruction_that_the_model_cannot_read_is_refused(recording) -> None:
    reranker = Reranker(replace(recording, supports_instructions=False))
    with pytest.raises(InstructionNotSupportedError, match="'recording' has no channel"):
        reranker.rank("q", ["a"], instruction="prefer red")
    with use_instruction("prefer red"), pytest.raises(InstructionNotSupportedError):
        reranker.score("q", ["a"])
    assert reranker.rank("q", ["a"]).instruction_applied is None


@pytest.mark.parametrize(
    ("choice", "applied", "query"),
    [("prepend", "prepended", "prefer red q"), ("ignore", "ignored", "q")],
)
def test_a_chosen_fallback_is_recorded(choice, applied, query, recording) -> None:
    scorer = replace(recording, supports_instructions=False)
    ranking = Reranker(scorer, on_unsupported=choice).rank("q", ["a"], instruction="prefer red")
    [request] = scorer.requests
    assert (request.query, request.instruction) == (query, "")
    assert ranking.query == "q"
    assert ranking.instruction_applied == applied
    assert ranking.instruction_fingerprint == Instruction("prefer red").fingerprint
    assert ranking.instruction_source == "argument"


@pytest.mark.parametrize("choice", ["raise", "prepend", "ignore"])
def test_a_fallback_does_not_touch_models_that_take_instructions(choice, recording) -> None:
    ranking = Reranker(recording, on_unsupported=choice).rank("q", ["a"], instruction="i")
    assert ranking.instruction_applied == "lane"
    assert recording.requests[0].query == "q"


# Input that is refused


@pytest.mark.parametrize("query", [None, "", "  \n", 7, b"red", ["red"], Document("red")])
def test_a_query_that_is_no_text_is_refused(query, recording) -> None:
    with pytest.raises(InputError, match="`query`"):
        Reranker(recording).rank(query, ["a"])
    assert recording.requests == []


@pytest.mark.parametrize(
    "documents", [None, "a text", b"bytes", {"text": "a"}, Document("a"), 7, object()]
)
def test_documents_that_are_no_list_are_refused(documents, recording) -> None:
    with pytest.raises(InputError, match="`documents` must be a list"):
        Reranker(recording).rank("q", documents)


@pytest.mark.parametrize(
    "document",
    [
        None,
        7,
        b"bytes",
        ["a"],
        {},
        {"content": "a"},
        {"text": None},
        {"text": 7},
        {"text": "a", "metadata": "date"},
        {"text": "a", "metadata": [1]},
        {"text": "a", "metadata": {1: 2}},
        {"text": "a", 1: 2},
    ],
)
def test_a_document_of_another_shape_is_refused_by_its_place(document, recording) -> None:
    with pytest.raises(InputError, match=r"`documents\[1\]") as caught:
        Reranker(recording).rank("q", ["fine", document])
    assert "\n" not in str(caught.value)
    assert recording.requests == []


@pytest.mark.parametrize("document", [{"text": "a", "metadata": None}, {"text": "a", "id": None}])
def test_absent_parts_of_a_mapping_may_be_none(document, recording) -> None:
    assert Reranker(recording).rank("q", [document])[0].document == Document("a")


@pytest.mark.parametrize("top_k", [0, -1, True, False, 2.0, "3"])
def test_a_top_k_that_is_no_positive_whole_number_is_refused(top_k, recording) -> None:
    with pytest.raises(InputError, match="`top_k`"):
        Reranker(recording).rank("q", ["a"], top_k=top_k)


def test_a_top_k_beyond_the_documents_keeps_all(recording) -> None:
    assert len(Reranker(recording).rank("q", ["a", "b"], top_k=100)) == 2


@pytest.mark.parametrize("attributes", ["date", b"date", None, 7, [7], ["date", None], [["date"]]])
def test_attributes_that_are_no_list_of_names_are_refused(attributes, recording) -> None:
    with pytest.raises(InputError, match="`attributes`"):
        Reranker(recording).rank("q", ["a"], attributes=attributes)


@pytest.mark.parametrize("instruction", [7, b"prefer red", ["prefer red"], {"text": "x"}])
def test_an_instruction_of_another_type_is_refused(instruction, recording) -> None:
    with pytest.raises(InputError, match="instruction"):
        Reranker(recording).rank("q", ["a"], instruction=instruction)


@pytest.mark.parametrize("option", ["long_documents", "on_unsupported"])
@pytest.mark.parametrize("value", ["sometimes", None, "", 7, []])
def test_unknown_options_are_refused_by_name(option, value, recording) -> None:
    with pytest.raises(InputError, match=f"`{option}` must be one of"):
        Reranker(recording, **{option: value})


@pytest.mark.parametrize("value", ["split", "", 7, False, []])
@pytest.mark.parametrize("documents", [["a"], []])
def test_an_unknown_treatment_of_long_documents_is_refused_per_call(
    value, documents, recording
) -> None:
    reranker = Reranker(recording)
    for call in (
        reranker.rank,
        reranker.score,
        lambda *given, **options: asyncio.run(reranker.arank(*given, **options)),
        lambda query, _, **options: RerankRequest(query=query, **options),
    ):
        with pytest.raises(InputError, match=r"`long_documents` .*'truncate', 'max_window'"):
            call("q", documents, long_documents=value)


@pytest.mark.parametrize("argument", ["query", "instruction"])
def test_trusted_text_longer_than_the_model_is_refused_by_name(argument, tiny) -> None:
    arguments = {"query": "red", "documents": ["a"], argument: "fish " * 300}
    with pytest.raises(InputError, match=f"`{argument}` is longer than"):
        tiny.rank(**arguments)


def test_an_instruction_beyond_all_limits_is_refused(tiny) -> None:
    with pytest.raises(InstructionError, match=r"30000 .* more than the 20000 .*; shorten it"):
        tiny.rank("red", ["a"], instruction="x" * 30_000)


# Input that is odd and works


@given(data=st.data())
def test_any_text_can_be_ranked(data, tiny, troublesome_text) -> None:
    texts = data.draw(st.lists(troublesome_text, max_size=4))
    query = data.draw(troublesome_text)[:40]
    instruction = data.draw(troublesome_text)[:40]
    if not query.strip():
        return
    try:
        ranking = tiny.rank(query, texts, instruction=instruction)
    except InputError as error:  # an instruction that the tokenizer cannot read is never dropped
        if "has no character that this model can read" not in str(error):
            raise
        return
    assert [r.document.text for r in sorted(ranking, key=lambda r: r.index)] == texts
    assert all(0 <= result.score <= 1 for result in ranking)
    assert ranking.non_finite == ()


@pytest.mark.parametrize(
    "text",
    ["", " ", "\0", "\0" * 1000, "\ud800", "🚢👩\u200d🔬", "דוח שנתי", "\u202etxet", "x" * 5000],
)
def test_odd_documents_get_a_score(text, tiny) -> None:
    ranking = tiny.rank("red", [text, "red fish"], instruction="prefer marine")
    assert len(ranking) == 2
    assert {result.document.text for result in ranking} == {text, "red fish"}
    assert all(math.isfinite(result.score) for result in ranking)


# Scorers that break their contract


@pytest.mark.parametrize("values", [(0.5,), (0.5,) * 3])
def test_a_wrong_number_of_scores_is_an_error(values) -> None:
    with pytest.raises(ScorerError, match=r"'recording' gave \d scores .* for 2 documents"):
        Reranker(Recording(values)).rank("q", ["a", "b"])


def test_a_wrong_number_of_flags_is_an_error() -> None:
    with pytest.raises(ScorerError, match="1 truncation flags for 2 documents"):
        Reranker(Recording(truncated=(True,))).rank("q", ["a", "b"])


@pytest.mark.parametrize("value", ["high", "0.5", None, [0.5], b"1", 1j, object()])
def test_a_score_that_is_no_number_is_an_error(value) -> None:
    with pytest.raises(ScorerError, match="no number"):
        Reranker(Recording((0.5, value))).rank("q", ["a", "b"])


@pytest.mark.parametrize("value", [np.float32(0.75), np.float64(0.75), np.array(0.75), 1])
def test_numbers_of_other_libraries_become_floats(value) -> None:
    [score] = Reranker(Recording((value,))).score("q", ["a"])
    assert type(score) is float
    assert score == float(value)


def test_scores_that_are_not_finite_sort_last_and_are_reported(caplog) -> None:
    scorer = Recording((math.nan, 0.2, math.inf, 0.9, -math.inf))
    with caplog.at_level(logging.WARNING, logger="lanerank"):
        ranking = Reranker(scorer).rank("q", list("abcde"))
    assert [result.index for result in ranking] == [3, 1, 0, 2, 4]
    assert ranking.non_finite == (0, 2, 4)
    assert "recording gave no finite score for documents (0, 2, 4)" in caplog.text


def test_non_finite_scores_are_reported_even_if_top_k_leaves_them_out() -> None:
    ranking = Reranker(Recording((math.nan, 0.2))).rank("q", ["a", "b"], top_k=1)
    assert [result.index for result in ranking] == [1]
    assert ranking.non_finite == (0,)


def test_an_error_of_the_scorer_is_not_swallowed() -> None:
    class Failing(Recording):
        def score(self, request: RerankRequest) -> Scores:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        Reranker(Failing()).rank("q", ["a"])


# Asynchronous


@dataclass
class Waiting(Recording):
    """Scores only after somebody has opened the gate."""

    started: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def score(self, request: RerankRequest) -> Scores:
        self.started.set()
        assert self.gate.wait(60), "the event loop did not get to open the gate"
        return super().score(request)


@dataclass
class Awaited(Recording):
    """Can be awaited."""

    degraded: str | None = None

    async def ascore(self, request: RerankRequest) -> Scores:
        await asyncio.sleep(0)
        return replace(self.score(request), degraded=self.degraded)


def test_arank_awaits_a_scorer_that_can_be_awaited_and_gives_the_ranking_of_rank() -> None:
    documents = ["a", Document("b", metadata={"date": "old"}), {"text": "c"}]
    options = {"instruction": "prefer red", "attributes": ["date"], "top_k": 2}
    seen = []

    async def rank():
        ranking = await Reranker(Awaited((0.1, 0.2, 0.3), (False, True, False))).arank(
            "q", documents, progress=lambda done, whole: seen.append(done), **options
        )
        return ranking, asyncio.get_running_loop()._default_executor

    ranking, threads = asyncio.run(rank())
    expected = Reranker(Recording((0.1, 0.2, 0.3), (False, True, False)))
    assert ranking == expected.rank("q", documents, **options)
    assert threads is None


def test_awaited_scores_are_checked_as_any() -> None:
    async def rank(scorer: Awaited, *arguments, **options):
        return await Reranker(scorer).arank(*arguments, **options)

    empty = Awaited()
    assert len(asyncio.run(rank(empty, "q", []))) == 0
    assert empty.requests == []
    for values, error in (((0.5,), "1 scores"), ((0.5, "high"), "no number")):
        with pytest.raises(ScorerError, match=error):
            asyncio.run(rank(Awaited(values), "q", ["a", "b"]))
    for arguments in ((None, ["a"]), ("q", "a")):
        with pytest.raises(InputError):
            asyncio.run(rank(Awaited(), *arguments))
    with pytest.raises(InputError, match="`top_k`"):
        asyncio.run(rank(Awaited(), "q", ["a"], top_k=0))


def test_a_degraded_answer_is_told_in_the_ranking_and_was_not_instructed() -> None:
    reranker = Reranker(Awaited((0.0, 0.0), degraded="away"))
    ranking = asyncio.run(reranker.arank("q", ["b", "a"], instruction="prefer a"))
    assert [result.document.text for result in ranking] == ["b", "a"]
    assert (ranking.degraded, ranking.instruction_applied) == ("away", "ignored")
    assert ranking.instruction_fingerprint == Instruction("prefer a").fingerprint
    assert asyncio.run(reranker.arank("q", ["b", "a"])).instruction_applied is None


def test_an_instruction_that_the_model_left_out_is_told_in_the_ranking() -> None:
    class Deaf(Recording):
        def score(self, request: RerankRequest) -> Scores:
            return replace(super().score(request), neutral=True)

    ranking = Reranker(Deaf((0.1, 0.2))).rank("q", ["b", "a"], instruction="prefer b")
    assert ranking.instruction_applied == "neutral"
    assert ranking.instruction_fingerprint == Instruction("prefer b").fingerprint
    assert "neutral" in ranking._repr_html_()
    for none in (None, ""):
        assert Reranker(Deaf((0.1,))).rank("q", ["a"], instruction=none).instruction_applied is None


def test_arank_leaves_the_event_loop_free() -> None:
    scorer = Waiting()

    async def run():
        ranking = asyncio.create_task(Reranker(scorer).arank("q", ["a", "b"], top_k=1))
        # If `arank` blocked the loop, nothing would be left to open the gate.
        while not scorer.started.is_set():
            await asyncio.sleep(0)
        scorer.gate.set()
        return await ranking

    assert [result.index for result in asyncio.run(run())] == [0]


def test_arank_gives_the_ranking_of_rank(tiny) -> None:
    arguments = ("red", ["a fish", Document("coach", metadata={"date": "old"}), "red " * 200])
    options = {"instruction": "prefer marine", "attributes": ["date"], "top_k": 2}
    options["long_documents"] = "max_window"
    assert asyncio.run(tiny.arank(*arguments, **options)) == tiny.rank(*arguments, **options)


def test_arank_carries_the_instruction_of_its_own_task(recording) -> None:
    reranker = Reranker(recording)

    async def under(instruction):
        with use_instruction(instruction):
            await asyncio.sleep(0)
            return await reranker.arank("q", ["a"])

    async def run():
        return await asyncio.gather(under("red"), under("blue"), reranker.arank("q", ["a"]))

    rankings = asyncio.run(run())
    assert [ranking.instruction_fingerprint for ranking in rankings] == [
        Instruction("red").fingerprint,
        Instruction("blue").fingerprint,
        None,
    ]
    assert sorted(request.instruction for request in recording.requests) == ["", "blue", "red"]


def test_arank_raises_what_rank_raises(recording) -> None:
    with pytest.raises(InputError, match="`top_k`"):
        asyncio.run(Reranker(recording).arank("q", ["a"], top_k=0))


# Loading


def test_from_pretrained_loads_a_folder_and_keeps_the_options(tiny_model_folder) -> None:
    reranker = Reranker.from_pretrained(
        tiny_model_folder, dtype="float32", long_documents="max_window", on_unsupported="ignore"
    )
    assert (reranker.long_documents, reranker.on_unsupported) == ("max_window", "ignore")
    assert reranker.rank("red", ["red " * 300]).truncated == ()
    assert repr(reranker) == "Reranker('tiny')"


def test_ten_thousand_documents_are_ranked(tiny) -> None:
    ranking = tiny.rank("red", [f"fish {'red ' * (i % 5)}" for i in range(10_000)], top_k=3)
    assert len(ranking) == 3
