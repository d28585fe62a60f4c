"""The compressor by itself: order, copies, arguments, models, events, and the runnable."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lanerank import Instruction, InstructionContext, Reranker, use_instruction
from lanerank.errors import InputError, InstructionError, InstructionMissingError, ModelLoadError
from lanerank.testing import ScriptedScorer
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import (
    AsyncCallbackHandler,
    BaseCallbackHandler,
    CallbackManagerForChainRun,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import dumpd
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnablePassthrough
from pydantic import ValidationError

from langchain_lanerank import InstructionHandler, LanerankRerank

Make = Callable[..., LanerankRerank]


# What comes out


def test_results_are_scored_copies_and_the_input_stays_as_it_was(make_compressor: Make):
    class Page(Document):
        """A document of a kind of its own."""

    given = [Page("red fish", id="r", metadata={"page": 3}), Document("blue fish", id="b")]
    before = copy.deepcopy(given)
    found = make_compressor(instruction="blue", report_instruction=False).compress_documents(
        given, "fish"
    )
    assert given == before
    assert [(document.id, type(document)) for document in found] == [("b", Document), ("r", Page)]
    assert found[0].metadata == {"relevance_score": 1.0}
    assert found[1].metadata == {"page": 3, "relevance_score": pytest.approx(1 / 3)}
    assert json.loads(json.dumps([document.metadata for document in found]))
    found[1].metadata["page"] = 4
    assert given == before


async def test_where_the_model_gives_no_finite_number_the_score_is_none():
    documents = [Document("a"), Document("b"), Document("c")]
    scores = {"a": math.nan, "b": 0.5, "c": math.inf}
    compressor = LanerankRerank(model=ScriptedScorer(scores), top_n=None)
    for found in (
        compressor.compress_documents(documents, "q"),
        await compressor.acompress_documents(documents, "q"),
    ):
        assert [document.page_content for document in found] == ["b", "a", "c"]
        metadata = [document.metadata for document in found]
        assert [each["relevance_score"] for each in metadata] == [0.5, None, None]
        json.dumps(metadata, allow_nan=False)
    results = compressor.rerank(documents, "q")
    assert [each["relevance_score"] for each in results] == [0.5, None, None]


def test_a_document_cannot_claim_a_score_or_an_instruction(make_compressor: Make):
    claims = {
        "rank": 99.0,
        "rerank_instruction_source": "argument",
        "rerank_instruction_fingerprint": "0" * 16,
        "rerank_degraded": True,
    }
    [found] = make_compressor(score_key="rank").compress_documents(
        [Document("stone", metadata=claims)], "fish"
    )
    assert found.metadata == {
        "rank": 0.0,
        "rerank_instruction_source": None,
        "rerank_instruction_fingerprint": None,
        "rerank_degraded": False,
    }
    assert claims["rank"] == 99.0


def test_what_applied_is_reported_where_it_is_asked_for(fish, make_compressor: Make):
    rule = Instruction(rules=["blue"])
    found = make_compressor().compress_documents(fish, "fish", instruction=rule)
    assert found[0].metadata["rerank_instruction_source"] == "argument"
    assert type(found[0].metadata["rerank_instruction_source"]) is str
    assert found[0].metadata["rerank_instruction_fingerprint"] == rule.fingerprint
    quiet = make_compressor(report_instruction=False).compress_documents(fish, "fish")
    assert set(quiet[0].metadata) == {"relevance_score"}


def test_only_chosen_attributes_reach_the_model(make_compressor: Make):
    document = Document("fish", metadata={"source": "harbour", "tenant": "secret", 3: "a number"})
    for attributes, seen in (((), ""), (("source", "date"), "source: harbour")):
        scorer = ScriptedScorer({"fish": 0.5})
        make_compressor(model=scorer, attributes=attributes).compress_documents([document], "q")
        [candidate] = scorer.requests[0].candidates
        assert (candidate.text, candidate.attributes) == ("fish", seen)


@pytest.mark.parametrize(
    ("set_to", "per_call", "kept"),
    [(2, -1, 2), (None, -1, 3), (2, None, 3), (2, 1, 1), (None, 9, 3)],
)
def test_top_n(set_to, per_call, kept, fish, make_compressor: Make):
    compressor = make_compressor(top_n=set_to)
    assert len(compressor.compress_documents(fish, "fish", top_n=per_call)) == kept
    assert len(compressor.rerank(fish, "fish", top_n=per_call)) == kept


def test_three_documents_are_kept_by_default():
    assert LanerankRerank().top_n == 3


def test_rerank_gives_indexes_and_scores(fish, make_compressor: Make):
    compressor = make_compressor(top_n=2)
    expected = [
        {"index": 1, "relevance_score": 1.0},
        {"index": 0, "relevance_score": pytest.approx(1 / 3)},
    ]
    texts = [document.page_content for document in fish]
    for documents in (fish, texts, [{"text": text} for text in texts]):
        assert compressor.rerank(documents, "fish", instruction="blue") == expected
    assert compressor.rerank([], "fish") == []
    with use_instruction("green"):
        assert compressor.rerank(fish, "fish", top_n=1)[0]["index"] == 2


def test_long_documents_reach_the_model(make_compressor: Make):
    for long_documents, seen in ((None, "truncate"), ("max_window", "max_window")):
        scorer = ScriptedScorer({"fish": 0.5})
        compressor = make_compressor(model=scorer, long_documents=long_documents)
        compressor.compress_documents([Document("fish")], "q")
        assert scorer.requests[0].long_documents == seen


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instuction": "blue"}, "instuction"),
        ({"instruction": 3}, "instruction"),
        ({"instruction": b"blue"}, "instruction"),
        ({"model": 3}, "`model` must be .* got int: 3"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"sources": ["document"]}, r"unknown names \['document'\]; known are argument, "),
        ({"sources": "field"}, "sources"),
        ({"attributes": "date"}, "attributes"),
        ({"instruction_key": ""}, "instruction_key"),
        ({"instruction_from": 3}, "instruction_from"),
        ({"instruction_from": "From {user.city}."}, "only plain `{name}` is allowed"),
        ({"long_documents": "split"}, "long_documents"),
    ],
)
def test_wrong_settings_are_refused(options, message, make_compressor: Make):
    with pytest.raises(ValidationError, match=message):
        make_compressor(**options)


def test_settings_are_checked_when_they_change(make_compressor: Make):
    compressor = make_compressor()
    with pytest.raises(ValidationError, match="top_n"):
        compressor.top_n = 0


@pytest.mark.parametrize("top_n", [0, -2, True, "3", 1.0])
def test_a_wrong_top_n_of_a_call_is_refused(top_n, fish, make_compressor: Make):
    with pytest.raises(InputError, match=f"`top_n` must be at least 1.* got {top_n!r}"):
        make_compressor().compress_documents(fish, "fish", top_n=top_n)


@pytest.mark.parametrize("documents", ["fish", Document("fish"), {"text": "fish"}, 3, None])
def test_documents_that_are_no_list_are_refused(documents, make_compressor: Make):
    for method in (make_compressor().compress_documents, make_compressor().rerank):
        with pytest.raises(InputError, match="`documents` must be a list, got"):
            method(documents, "fish")


async def test_other_documents_are_refused_with_their_place(fish, make_compressor: Make):
    documents: Any = [*fish, "grey fish"]
    with pytest.raises(InputError, match=r"`documents\[3\]` must be .* got str: 'grey fish'"):
        make_compressor().compress_documents(documents, "fish")
    with pytest.raises(InputError, match=r"`documents\[3\]`"):
        await make_compressor().acompress_documents(documents, "fish")
    with pytest.raises(InputError, match=r"`documents\[1\]` .* int: 3"):
        make_compressor().rerank(["fish", 3], "fish")


def test_a_wrong_query_or_instruction_is_refused(fish, make_compressor: Make):
    wrong: Any = ["blue"]
    with pytest.raises(InputError, match=r"instruction from `argument` must be .* list"):
        make_compressor().compress_documents(fish, "fish", instruction=wrong)
    with pytest.raises(InputError, match="`query`"):
        make_compressor().compress_documents(fish, " ")


# Where instructions come from


def test_a_template_is_filled_from_the_runs_metadata(fish, make_compressor: Make):
    compressor = make_compressor(instruction_from="The user likes {colour}.", instruction="red")

    def ask(config: RunnableConfig) -> Document:
        return RunnableLambda(lambda _: compressor.compress_documents(fish, "fish")).invoke(
            None, config
        )[0]

    found = ask({"metadata": {"colour": "blue"}})
    assert (found.id, found.metadata["rerank_instruction_source"]) == ("blue", "instruction_from")
    with pytest.raises(InstructionError, match="'colour', absent or blank here"):
        ask({"metadata": {"colours": "blue"}})


def test_a_callable_sees_the_run_and_no_documents(fish, make_compressor: Make):
    seen: list[InstructionContext] = []

    def look(context: InstructionContext) -> str | None:
        seen.append(context)
        return None

    compressor = make_compressor(instruction_from=look, instruction="blue")
    runnable = compressor.as_runnable()
    config: RunnableConfig = {"configurable": {"a": 1}, "metadata": {"b": 2}, "tags": ["c"]}
    [found, *_] = runnable.invoke({"documents": fish, "query": "fish"}, config)
    assert (found.id, found.metadata["rerank_instruction_source"]) == ("blue", "field")
    [context] = seen
    assert context.query == "fish"
    assert context.configurable["a"] == 1
    assert context.metadata["b"] == 2
    assert "c" in context.tags
    assert context.runtime_context is None


def test_the_sources_have_an_order(fish, make_compressor: Make):
    """Each source goes before all below it, whatever those hold."""
    order = {
        "handler": {"callbacks": [InstructionHandler("blue")]},
        "configurable": {"configurable": {"rerank_instruction": "blue"}},
        "metadata": {"metadata": {"rerank_instruction": "blue"}},
        "instruction_from": {},
    }
    compressor = make_compressor(instruction_from=lambda _: "blue", instruction="blue")

    def source(config: RunnableConfig, **argument: str) -> str:
        values = {"documents": fish, "query": "fish", **argument}
        return (
            compressor.as_runnable().invoke(values, config)[0].metadata["rerank_instruction_source"]
        )

    rest = list(order)
    for name in order:
        config: Any = {}
        for lower in rest:
            config |= order[lower]
        assert source(config) == name
        with use_instruction("blue"):
            assert source(config) == "use_instruction"
            assert source(config, instruction="blue") == "argument"
        rest.remove(name)


def test_the_handler_added_last_counts(fish, make_compressor: Make):
    handlers = [InstructionHandler("red"), InstructionHandler("blue")]
    assert make_compressor().compress_documents(fish, "fish", handlers)[0].id == "blue"
    chain = RunnableLambda(
        lambda _: make_compressor().compress_documents(fish, "fish", [InstructionHandler("green")])
    )
    assert chain.invoke(None, {"callbacks": handlers})[0].id == "green"
    handlers.append(InstructionHandler(""))
    assert make_compressor().compress_documents(fish, "fish", handlers)[0].id == "blue"
    with pytest.raises(InputError, match="`instruction` must be"):
        InstructionHandler(["blue"])  # type: ignore[arg-type]  # the point of the test


def test_the_manager_of_a_run_will_do_for_callbacks(fish, make_compressor: Make):
    config: Any = {"callbacks": [InstructionHandler("blue")], "metadata": {"colour": "green"}}
    seen: list[str | None] = []

    def rerank(_: object, run_manager: CallbackManagerForChainRun) -> None:
        for compressor in (
            make_compressor(sources=["handler"]),
            make_compressor(instruction_from="{colour}", sources=["instruction_from"]),
        ):
            seen.append(compressor.compress_documents(fish, "fish", run_manager)[0].id)

    RunnableLambda(rerank).invoke(None, config)
    assert seen == ["blue", "green"]


def test_a_handler_outside_of_a_list_is_not_dropped_in_silence(fish, make_compressor: Make):
    handler: Any = InstructionHandler("blue")
    with pytest.raises(InputError, match=r"`callbacks` must be .* got InstructionHandler"):
        make_compressor().compress_documents(fish, "fish", handler)


def test_an_instruction_may_come_by_its_parts_where_json_is_spoken(fish, make_compressor: Make):
    def ask(parts: object) -> list[Document]:
        config: RunnableConfig = {"configurable": {"rerank_instruction": parts}}
        values = {"documents": fish, "query": "fish"}
        return make_compressor().as_runnable().invoke(values, config)

    assert ask({"rules": ["blue"], "glossary": {"colour": "blue"}})[0].id == "blue"
    with pytest.raises(InputError, match=r"`rule`.*its parts are"):
        ask({"rule": ["blue"]})
    with pytest.raises(InputError, match=r"`3`.*its parts are"):
        ask({3: "blue"})
    for wrong in (3, ["blue"], b"blue", lambda: "blue"):
        with pytest.raises(InputError, match="instruction from `configurable` must be"):
            ask(wrong)


def test_the_key_can_be_another(fish, make_compressor: Make):
    runnable = make_compressor(instruction_key="house_rules").as_runnable()
    config: RunnableConfig = {
        "configurable": {"rerank_instruction": "green", "house_rules": "blue"}
    }
    assert runnable.invoke({"documents": fish, "query": "fish"}, config)[0].id == "blue"


def test_resolve_says_what_would_apply(make_compressor: Make):
    compressor = make_compressor(instruction="blue")
    found = compressor.resolve("fish", config={"metadata": {"rerank_instruction": "green"}})
    assert (found.instruction.render(), found.source) == ("green", "metadata")
    assert compressor.resolve("fish").source == "field"
    found = compressor.resolve("fish", default="red")
    assert (found.instruction.render(), found.source) == ("red", "field")


# Models


def test_models_are_loaded_when_they_are_needed_and_once(fish, tmp_path):
    compressor = LanerankRerank(model=tmp_path / "nothing", require_instruction=True)
    with pytest.raises(InstructionMissingError):
        compressor.compress_documents(fish, "fish")
    assert compressor.compress_documents([], "fish", instruction="blue") == []
    with pytest.raises(ModelLoadError, match="there is no folder"):
        compressor.compress_documents(fish, "fish", instruction="blue")


def test_neither_the_model_nor_code_is_shown_or_dumped(make_compressor: Make):
    compressor = make_compressor(instruction_from=lambda _: "blue", instruction="green")
    assert "Overlap" not in repr(compressor)
    assert "lambda" not in repr(compressor)
    dumped = compressor.model_dump()
    assert dumped["instruction"] == "green"
    assert not {"model", "instruction_from"} & set(dumped)
    json.dumps(compressor.model_dump(mode="json"))
    assert "Overlap" not in json.dumps(dumpd(compressor.as_runnable()))


# Threads and the event loop


async def test_ranking_does_not_block_the_event_loop(fish, gate, make_compressor: Make):
    ranking = asyncio.create_task(
        make_compressor(model=gate).acompress_documents(fish, "fish", instruction="blue")
    )
    while not gate.entered.is_set():
        await asyncio.sleep(0)
    assert not ranking.done()
    gate.opened.set()
    assert len(await ranking) == 3


async def test_the_instruction_is_found_before_the_thread_takes_over(fish, make_compressor: Make):
    threads: list[threading.Thread] = []

    def look(_: InstructionContext) -> str:
        threads.append(threading.current_thread())
        return "blue"

    compressor = make_compressor(instruction_from=look)
    assert (await compressor.acompress_documents(fish, "fish"))[0].id == "blue"
    assert threads == [threading.current_thread()]


@pytest.mark.usefixtures("no_threads")
async def test_a_scorer_that_can_be_awaited_takes_no_thread(fish, awaited, make_compressor: Make):
    awaited.opened.set()
    for model in (awaited, Reranker(awaited)):
        compressor = make_compressor(model=model)
        with use_instruction("blue"):
            assert (await compressor.acompress_documents(fish, "fish"))[0].id == "blue"
        values = {"documents": fish, "query": "fish", "instruction": "green"}
        assert (await compressor.as_runnable().ainvoke(values))[0].id == "green"
    assert awaited.threads == [threading.current_thread()] * 4


@pytest.mark.usefixtures("no_threads")
async def test_the_guard_against_threads_sees_one(fish, make_compressor: Make):
    with pytest.raises(AssertionError, match="a thread was used"):
        await make_compressor().acompress_documents(fish, "fish")


@pytest.mark.usefixtures("no_threads")
async def test_a_model_is_loaded_beside_the_event_loop(fish, tmp_path):
    with pytest.raises(AssertionError, match="a thread was used"):
        await LanerankRerank(model=tmp_path / "nothing").acompress_documents(fish, "fish")


async def test_cancelling_a_call_cancels_the_scorer(fish, awaited, make_compressor: Make):
    call = asyncio.create_task(make_compressor(model=awaited).acompress_documents(fish, "fish"))
    await asyncio.wait_for(awaited.entered.wait(), 20)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert awaited.cancelled


def test_calls_in_many_threads_do_not_mix(fish, make_compressor: Make):
    compressor = make_compressor()

    def ask(colour: str) -> str | None:
        with use_instruction(colour):
            return compressor.compress_documents(fish, "fish")[0].id

    colours = ["red", "blue", "green"] * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, colours)) == colours


# Events


class Events(BaseCallbackHandler):
    """Keeps the custom events."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_custom_event(self, name, data, **kwargs):
        self.seen.append((name, data))


class AsyncEvents(AsyncCallbackHandler):
    """Keeps the custom events, asynchronously."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    async def on_custom_event(self, name, data, **kwargs):
        self.seen.append((name, data))


def check_events(events: Events | AsyncEvents) -> None:
    [(name, data)] = events.seen
    assert name == "lanerank_rerank"
    seconds = data.pop("seconds")
    assert isinstance(seconds, float)
    assert data == {
        "query": "fish",
        "documents": 3,
        "kept": 2,
        "truncated": 0,
        "non_finite": 0,
        "model": "overlap",
        "instruction_source": "argument",
        "instruction_fingerprint": Instruction("blue").fingerprint,
        "instruction_applied": "lane",
        "degraded": None,
    }
    json.dumps(data)


async def test_a_ranking_is_reported_to_the_run_around_it(fish, make_compressor: Make):
    compressor = make_compressor(top_n=2)
    values = {"documents": fish, "query": "fish", "instruction": "blue"}
    events = Events()
    compressor.as_runnable().invoke(values, {"callbacks": [events]})
    check_events(events)
    for aevents in (Events(), AsyncEvents()):
        await compressor.as_runnable().ainvoke(values, {"callbacks": [aevents]})
        check_events(aevents)
    events = Events()
    rerank = RunnableLambda(lambda _: compressor.rerank(fish, "fish", instruction="blue"))
    rerank.invoke(None, {"callbacks": [events]})
    check_events(events)


async def test_there_is_no_event_without_a_run(fish, make_compressor: Make):
    events = Events()
    make_compressor().compress_documents(fish, "fish", [events])
    await make_compressor().acompress_documents(fish, "fish", [events])
    make_compressor().rerank(fish, "fish")
    assert events.seen == []


# Other callers


def test_it_is_a_document_compressor_and_works_in_a_pipeline(fish, make_compressor: Make):
    assert issubclass(LanerankRerank, BaseDocumentCompressor)
    pipeline = DocumentCompressorPipeline(
        transformers=[make_compressor(top_n=2), make_compressor(top_n=1)]
    )
    assert pipeline.compress_documents([], "fish") == []
    handlers = [InstructionHandler("blue")]
    assert [d.id for d in pipeline.compress_documents(fish, "fish", handlers)] == ["blue"]


async def test_the_runnable_composes(fish, make_compressor: Make):
    compressor = make_compressor(top_n=1)
    chain = {"query": RunnablePassthrough(), "documents": lambda _: fish} | compressor.as_runnable()
    configs: list[RunnableConfig] = [
        {"configurable": {"rerank_instruction": colour}} for colour in ("green", "blue")
    ]
    for found in (
        chain.batch(["fish", "fish"], configs),
        await chain.abatch(["fish", "fish"], configs),
    ):
        assert [documents[0].id for documents in found] == ["green", "blue"]
    assert chain.get_graph().nodes
    schema = compressor.as_runnable().get_input_jsonschema()
    assert "documents" in json.dumps(schema)


def test_the_runnable_takes_an_instruction_as_json_has_it(fish, make_compressor: Make):
    values: Any = {"query": "fish", "documents": fish, "instruction": {"text": "blue"}}
    assert make_compressor().as_runnable().invoke(values)[0].id == "blue"
    values["instruction"] = {"txt": "blue"}
    with pytest.raises(InputError, match="txt"):
        make_compressor().as_runnable().invoke(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"query": "fish"}, "must be a mapping with 'query', 'documents'"),
        ("fish", "must be a mapping .* got 'fish'"),
        ({"query": "fish", "documents": [], "instructions": "blue"}, "has 'instructions' besides"),
    ],
)
def test_the_runnable_refuses_other_input(values, message, make_compressor: Make):
    with pytest.raises(InputError, match=message):
        make_compressor().as_runnable().invoke(values)
