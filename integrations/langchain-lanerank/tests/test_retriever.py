"""The retriever: LangChain's standard suite, its arguments, and what it hands on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypedDict
from uuid import UUID, uuid4

import pytest
from lanerank import Instruction
from lanerank.errors import InputError, InstructionMissingError
from lanerank.testing import OverlapScorer
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langgraph.graph import END, START, StateGraph
from pydantic import ValidationError

from langchain_lanerank import InstructionHandler, LanerankRerank, LanerankRetriever

Make = Callable[..., LanerankRetriever]
COLOURS = ("red", "blue", "green", "grey", "white")


def store() -> InMemoryVectorStore:
    return InMemoryVectorStore.from_texts(
        [f"{colour} fish" for colour in COLOURS], DeterministicFakeEmbedding(size=8)
    )


class TestStandards(RetrieversIntegrationTests):
    """LangChain's own suite for retrievers."""

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return LanerankRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {
            "base_retriever": store().as_retriever(search_kwargs={"k": 5}),
            "reranker": LanerankRerank(model=OverlapScorer()),
        }

    @property
    def retriever_query_example(self) -> str:
        return "fish"

    @property
    def num_results_arg_name(self) -> str:
        return "top_n"


# Arguments


def first(documents: list[Document]) -> str | None:
    return documents[0].id


async def test_arguments_can_be_given_bound_and_batched(fish, make_retriever: Make):
    retriever = make_retriever(fish)
    arguments = {"instruction": "blue", "top_n": 2}
    chain = RunnableLambda(lambda query: query) | retriever.bind(**arguments)
    for found in (
        retriever.invoke("fish", **arguments),
        await retriever.ainvoke("fish", **arguments),
        *retriever.batch(["fish"], **arguments),
        *await retriever.abatch(["fish"], **arguments),
        *retriever.stream("fish", **arguments),
        *chain.batch(["fish", "fish"]),
        await chain.ainvoke("fish"),
    ):
        assert [document.id for document in found] == ["blue", "red"]


@pytest.mark.parametrize(
    ("per_call", "own", "rerankers", "kept"),
    [(1, 2, 3, 1), (None, 2, 3, 2), (None, None, 3, 3), (None, None, None, 5), (9, 2, 3, 5)],
)
def test_top_n(per_call, own, rerankers, kept, make_retriever: Make):
    documents = [Document(f"{colour} fish") for colour in COLOURS]
    retriever = make_retriever(documents, {"top_n": own}, top_n=rerankers)
    assert len(retriever.invoke("fish", top_n=per_call)) == kept


async def test_unknown_arguments_are_not_swallowed(make_retriever: Make):
    retriever = LanerankRetriever(
        base_retriever=store().as_retriever(), reranker=LanerankRerank(model=OverlapScorer())
    )
    with pytest.raises(InputError, match="no argument 'instructions'; arguments are"):
        retriever.invoke("fish", instructions="blue")
    with pytest.raises(InputError, match="no argument 'k'"):
        await retriever.ainvoke("fish", k=3)
    with pytest.raises(InputError, match=r"`top_n` must be at least 1.* got 0"):
        retriever.invoke("fish", top_n=0)


@pytest.mark.parametrize("options", [{"top_n": 0}, {"rerank": 3}, {"instruction": 3}])
def test_wrong_settings_are_refused(options, fish, make_retriever: Make):
    with pytest.raises(ValidationError, match=next(iter(options))):
        make_retriever(fish, options)


async def test_a_required_instruction_is_missed_before_anything_is_retrieved(make_compressor):
    def never(_: str) -> list[Document]:
        raise AssertionError

    retriever = LanerankRetriever(
        base_retriever=RunnableLambda(never), reranker=make_compressor(require_instruction=True)
    )
    with pytest.raises(InstructionMissingError, match="argument, use_instruction, handler"):
        retriever.invoke("fish")
    with pytest.raises(InstructionMissingError):
        await retriever.ainvoke("fish")


# Fields and configurable fields


def test_its_own_instruction_goes_before_the_rerankers(fish, make_retriever: Make):
    assert first(make_retriever(fish, instruction="green").invoke("fish")) == "green"
    retriever = make_retriever(fish, {"instruction": "blue"}, instruction="green")
    found = retriever.invoke("fish")
    assert (first(found), found[0].metadata["rerank_instruction_source"]) == ("blue", "field")


def test_its_own_metadata_and_tags_are_those_of_langchain(fish, make_retriever: Make):
    retriever = make_retriever(fish, {"metadata": {"rerank_instruction": "blue"}, "tags": ["t"]})
    assert (retriever.metadata, retriever.tags) == ({"rerank_instruction": "blue"}, ["t"])
    # They describe the retriever's own run; its instruction has a field.
    assert first(retriever.invoke("fish")) == "red"


async def test_the_instruction_can_be_a_configurable_field(fish, make_retriever: Make):
    retriever = make_retriever(fish, {"instruction": "red"})
    field = ConfigurableField(id="house_rules")
    configurable = retriever.configurable_fields(instruction=field)
    config: RunnableConfig = {"configurable": {"house_rules": "blue"}}
    chain = RunnableLambda(lambda query: query) | configurable
    for found in (
        configurable.invoke("fish", config),
        await configurable.ainvoke("fish", config),
        configurable.with_config(config).invoke("fish"),
        chain.invoke("fish", config),
        *chain.batch(["fish", "fish"], config),
        *await chain.abatch(["fish", "fish"], config),
    ):
        assert first(found) == "blue"
        assert found[0].metadata["rerank_instruction_source"] == "field"
    assert first(configurable.invoke("fish")) == "red"
    schema = configurable.config_schema().model_json_schema()
    assert "house_rules" in schema["$defs"]["Configurable"]["properties"]
    # The same reranker, and with it the same model, serves every configuration.
    prepared, _ = configurable.prepare(config)
    assert prepared.reranker is retriever.reranker
    with pytest.raises(ValidationError, match="instruction"):
        configurable.invoke("fish", {"configurable": {"house_rules": 3}})


def test_a_configurable_field_may_have_the_key_itself(fish, make_retriever: Make):
    field = ConfigurableField(id="rerank_instruction")
    retriever = make_retriever(fish).configurable_fields(instruction=field)
    for instruction in ("blue", {"rules": ["blue"]}, Instruction("blue")):
        found = retriever.invoke("fish", {"configurable": {"rerank_instruction": instruction}})
        assert (first(found), found[0].metadata["rerank_instruction_source"]) == (
            "blue",
            "configurable",
        )


def test_an_inner_configuration_goes_before_the_enclosing_one(fish, make_retriever: Make):
    retriever = make_retriever(fish)
    for source in ("configurable", "metadata"):
        outer, inner = ({source: {"rerank_instruction": c}} for c in ("green", "blue"))
        ask = RunnableLambda(lambda query, inner=inner: retriever.invoke(query, inner))
        assert first(ask.invoke("fish", outer)) == "blue"


# LangGraph


class Context(TypedDict, total=False):
    """A context that is a mapping, with facts about the user."""

    rerank_instruction: object
    colour: str


class State(TypedDict, total=False):
    """The state of a graph."""

    documents: list[Document]


def run_graph(retriever: LanerankRetriever, context: Context) -> list[Document]:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("retrieve", lambda _: {"documents": retriever.invoke("fish")})
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", END)
    return graph.compile().invoke({}, context=context)["documents"]


@pytest.mark.parametrize("instruction", ["blue", Instruction("blue"), {"rules": ["blue"]}])
def test_the_context_of_a_graph_may_be_a_mapping(instruction, fish, make_retriever: Make):
    found = run_graph(make_retriever(fish), {"rerank_instruction": instruction})
    assert (first(found), found[0].metadata["rerank_instruction_source"]) == ("blue", "runtime")


def test_the_context_of_a_graph_fills_templates(fish, make_retriever: Make):
    retriever = make_retriever(fish, instruction_from="The user likes {colour}.")
    assert first(run_graph(retriever, {"colour": "blue"})) == "blue"


# What it hands on


async def test_the_base_retriever_gets_the_whole_configuration():
    base = store().as_retriever().configurable_fields(search_kwargs=ConfigurableField(id="search"))
    retriever = LanerankRetriever(
        base_retriever=base, reranker=LanerankRerank(model=OverlapScorer(), top_n=None)
    )
    config: RunnableConfig = {"configurable": {"search": {"k": 2}}}
    chain = RunnableLambda(lambda query: query) | retriever
    assert len(retriever.invoke("fish")) == 4
    for found in (
        retriever.invoke("fish", config),
        await retriever.ainvoke("fish", config),
        *chain.batch(["fish", "fish"], config),
    ):
        assert len(found) == 2


class Runs(BaseCallbackHandler):
    """Keeps the runs of retrievers, their parents, and the custom events."""

    def __init__(self) -> None:
        self.parents: dict[UUID, UUID | None] = {}
        self.names: dict[UUID, str] = {}
        self.failed: list[UUID] = []
        self.events: list[tuple[UUID, Any]] = []

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **kwargs):
        self.parents[run_id] = parent_run_id
        self.names[run_id] = kwargs["name"]

    def on_retriever_error(self, error, *, run_id, **kwargs):
        self.failed.append(run_id)

    def on_custom_event(self, name, data, *, run_id, **kwargs):
        self.events.append((run_id, data))


async def test_runs_are_nested_and_the_ranking_belongs_to_the_retrievers():
    retriever = LanerankRetriever(
        base_retriever=store().as_retriever(), reranker=LanerankRerank(model=OverlapScorer())
    )
    for synchronous in (True, False):
        runs, run_id = Runs(), uuid4()
        config: RunnableConfig = {"callbacks": [runs], "run_name": "search"}
        if synchronous:
            retriever.invoke("fish", config, run_id=run_id, instruction="blue")
        else:
            await retriever.ainvoke("fish", config, run_id=run_id, instruction="blue")
        [base] = [run for run, parent in runs.parents.items() if parent is not None]
        assert runs.parents == {run_id: None, base: run_id}
        assert (runs.names[run_id], runs.names[base]) == ("search", "VectorStoreRetriever")
        [(owner, data)] = runs.events
        assert owner == run_id
        assert (data["instruction_source"], data["documents"], data["kept"]) == ("argument", 4, 3)


def test_a_missing_instruction_is_an_error_of_the_run(fish, make_retriever: Make):
    runs = Runs()
    with pytest.raises(InstructionMissingError):
        make_retriever(fish, require_instruction=True).invoke("fish", {"callbacks": [runs]})
    assert runs.failed == list(runs.parents)


async def test_custom_events_are_streamed(fish, make_retriever: Make):
    chain = RunnableLambda(lambda query: query) | make_retriever(fish)
    for runnable in (make_retriever(fish), chain):
        events = [e async for e in runnable.astream_events("fish", version="v2")]
        [event] = [e for e in events if e["event"] == "on_custom_event"]
        assert event["name"] == "lanerank_rerank"
        assert event["data"]["documents"] == 3


async def test_it_does_not_block_the_event_loop(fish, gate, make_retriever: Make):
    search = asyncio.create_task(make_retriever(fish, model=gate).ainvoke("fish"))
    while not gate.entered.is_set():
        await asyncio.sleep(0)
    gate.opened.set()
    assert len(await search) == 3


@pytest.mark.usefixtures("no_threads")
async def test_nothing_takes_a_thread_where_all_can_be_awaited(fish, awaited, make_retriever: Make):
    async def find(query: str) -> list[Document]:
        return fish

    awaited.opened.set()
    retriever = make_retriever([], {"base_retriever": RunnableLambda(find)}, model=awaited)
    assert first(await retriever.ainvoke("fish", instruction="blue")) == "blue"
    assert awaited.threads == [threading.current_thread()]


async def test_cancelling_a_call_cancels_the_scorer(fish, awaited, make_retriever: Make):
    search = asyncio.create_task(make_retriever(fish, model=awaited).ainvoke("fish"))
    await asyncio.wait_for(awaited.entered.wait(), 20)
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    assert awaited.cancelled


async def test_concurrent_calls_do_not_mix(fish, make_retriever: Make):
    retriever = make_retriever(fish)
    colours = ["red", "blue", "green"] * 10

    def config(colour: str) -> RunnableConfig:
        return {"callbacks": [InstructionHandler(colour)]}

    found = await asyncio.gather(*(retriever.ainvoke("fish", config(c)) for c in colours))
    assert [first(documents) for documents in found] == colours
    found = retriever.batch(["fish"] * len(colours), [config(c) for c in colours])
    assert [first(documents) for documents in found] == colours
