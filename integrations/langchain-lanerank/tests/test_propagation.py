"""What arrives where: every cell of the README's table, for both components, sync and async."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import pytest
from lanerank import use_instruction
from lanerank.testing import OverlapScorer
from langchain.agents import create_agent
from langchain.tools import ToolRuntime, tool
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    MultiQueryRetriever,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.tools import create_retriever_tool
from langgraph.graph import END, START, StateGraph
from packaging.version import Version

from langchain_lanerank import InstructionHandler, LanerankRerank, LanerankRetriever

README = Path(__file__).parents[1] / "README.md"
KEY = "rerank_instruction"
COLOURS = ("green", "blue")
# Those before 1.3 copy `configurable` values into the metadata, which then reach everything.
COPIES_CONFIGURABLE = Version(version("langchain-core")) < Version("1.3")

Documents = list[Document]
Found = dict[str, Documents]


@dataclass
class Context:
    """The context object of a graph or an agent."""

    rerank_instruction: str | None = None


@dataclass(frozen=True)
class Giver:
    """Gives an instruction through one source."""

    source: str

    def config(self, colour: str) -> RunnableConfig:
        if self.source == "handler":
            return {"callbacks": [InstructionHandler(colour)]}
        if self.source in ("configurable", "metadata"):
            return {self.source: {KEY: colour}}
        return {}

    def context(self, colour: str) -> Context:
        return Context(colour if self.source == "runtime" else None)


Shape = Callable[[BaseRetriever, Giver], Found | Awaitable[Found]]
SHAPES: dict[str, list[Shape]] = {}


def call(row: str) -> Callable[[Shape], Shape]:
    """Put a function into a row of the table.

    It calls the retriever once for each of some colours, given as an instruction, and says what
    came back.
    """

    def register(shape: Shape) -> Shape:
        SHAPES.setdefault(row, []).append(shape)
        return shape

    return register


@call("`invoke`, `stream`")
def invoke(retriever, give):
    return {"green": retriever.invoke("fish", give.config("green"))}


@call("`invoke`, `stream`")
def stream(retriever, give):
    [found] = retriever.stream("fish", give.config("green"))
    return {"green": found}


@call("`invoke`, `stream`")
async def ainvoke(retriever, give):
    return {"green": await retriever.ainvoke("fish", give.config("green"))}


@call("`invoke`, `stream`")
async def astream(retriever, give):
    [found] = [chunk async for chunk in retriever.astream("fish", give.config("green"))]
    return {"green": found}


@call("`invoke`, `stream`")
async def gathered(retriever, give):
    """Concurrent calls in one loop, which must not see each other's instruction."""
    calls = [retriever.ainvoke("fish", give.config(colour)) for colour in COLOURS * 4]
    return dict(zip(COLOURS, (await asyncio.gather(*calls))[-2:], strict=True))


LATER = "`stream`, `batch_as_completed`, read after the `with`"


@call(LATER)
def streamed_later(retriever, give):
    chunks = retriever.stream("fish", give.config("green"))
    [found] = contextvars.Context().run(list, chunks)
    return {"green": found}


@call(LATER)
def batched_later(retriever, give):
    answers = retriever.batch_as_completed(["fish"], [give.config("green")])
    [(_, found)] = contextvars.Context().run(list, answers)
    return {"green": found}


@call(LATER)
async def astreamed_later(retriever, give):
    chunks = retriever.astream("fish", give.config("green"))

    async def read() -> list[Documents]:
        return [chunk async for chunk in chunks]

    [found] = await asyncio.create_task(read(), context=contextvars.Context())
    return {"green": found}


@call("`batch`, each with its own config")
def batch(retriever, give):
    found = retriever.batch(["fish", "fish"], [give.config(colour) for colour in COLOURS])
    return dict(zip(COLOURS, found, strict=True))


@call("`batch`, each with its own config")
async def abatch(retriever, give):
    found = await retriever.abatch(["fish", "fish"], [give.config(colour) for colour in COLOURS])
    return dict(zip(COLOURS, found, strict=True))


@call("`with_config(...)`")
def with_config(retriever, give):
    return {"green": retriever.with_config(give.config("green")).invoke("fish")}


@call("`with_config(...)`")
async def awith_config(retriever, give):
    return {"green": await retriever.with_config(give.config("green")).ainvoke("fish")}


def same(query: str) -> str:
    return query


def chains(retriever: BaseRetriever) -> list[Runnable[Any, Any]]:
    """The retriever as a step, in the usual compositions; each gives the documents."""
    documents = RunnableLambda(lambda values: values["documents"])
    return [
        RunnableLambda(same) | retriever,
        RunnableLambda(same) | RunnableParallel(documents=retriever, query=same) | documents,
        RunnableLambda(same) | {"documents": retriever, "query": RunnablePassthrough()} | documents,
        {"query": RunnablePassthrough()}
        | RunnablePassthrough.assign(documents=RunnableLambda(lambda v: v["query"]) | retriever)
        | documents,
    ]


def alike(all_found: list[Documents]) -> Documents:
    assert all(found == all_found[0] for found in all_found)
    return all_found[0]


@call("step of a chain")
def step(retriever, give):
    config = give.config("green")
    return {"green": alike([chain.invoke("fish", config) for chain in chains(retriever)])}


@call("step of a chain")
def streamed_step(retriever, give):
    config = give.config("green")
    chunks = [list(chain.stream("fish", config)) for chain in chains(retriever)]
    return {"green": alike([found for [found] in chunks])}


@call("step of a chain")
async def astep(retriever, give):
    config = give.config("green")
    return {"green": alike([await chain.ainvoke("fish", config) for chain in chains(retriever)])}


@call("step of a chain")
async def step_with_events(retriever, give):
    ends = []
    for chain in chains(retriever):
        async for event in chain.astream_events("fish", give.config("green"), version="v2"):
            if event["event"] == "on_retriever_end":
                ends.append(event["data"]["output"])
    assert len(ends) == 4
    return {"green": alike(ends)}


@call("step of a chain, `batch`")
def step_batch(retriever, give):
    chain = RunnableLambda(same) | retriever
    found = chain.batch(["fish", "fish"], [give.config(colour) for colour in COLOURS])
    return dict(zip(COLOURS, found, strict=True))


@call("step of a chain, `batch`")
async def step_abatch(retriever, give):
    chain = RunnableLambda(same) | retriever
    found = await chain.abatch(["fish", "fish"], [give.config(colour) for colour in COLOURS])
    return dict(zip(COLOURS, found, strict=True))


@call("step `with_config(...)` of a chain")
def bound_step(retriever, give):
    chain = RunnableLambda(same) | retriever.with_config(give.config("green"))
    return {"green": chain.invoke("fish")}


@call("step `with_config(...)` of a chain")
async def abound_step(retriever, give):
    chain = RunnableLambda(same) | retriever.with_config(give.config("green"))
    return {"green": await chain.ainvoke("fish")}


@call("called by a function in a chain")
def in_function(retriever, give):
    function = RunnableLambda(lambda query: retriever.invoke(query))
    return {"green": function.invoke("fish", give.config("green"))}


@call("called by a function in a chain")
def in_function_with_config(retriever, give):
    def ask(query: str, config: RunnableConfig) -> Documents:
        return retriever.invoke(query, config)

    return {"green": RunnableLambda(ask).invoke("fish", give.config("green"))}


@call("called by a function in a chain")
def in_executor_of_langchain(retriever, give):
    def ask(query: str) -> Documents:
        with ContextThreadPoolExecutor() as pool:
            return pool.submit(retriever.invoke, query).result()

    return {"green": RunnableLambda(ask).invoke("fish", give.config("green"))}


@call("called by a function in a chain")
async def in_coroutine(retriever, give):
    async def ask(query: str) -> Documents:
        return await asyncio.create_task(retriever.ainvoke(query))

    return {"green": await RunnableLambda(ask).ainvoke("fish", give.config("green"))}


@call("called by a function in a chain")
async def in_thread_of_asyncio(retriever, give):
    async def ask(query: str) -> Documents:
        return await asyncio.to_thread(retriever.invoke, query)

    return {"green": await RunnableLambda(ask).ainvoke("fish", give.config("green"))}


class Passing(BaseDocumentCompressor):
    """Compresses nothing."""

    def compress_documents(self, documents, query, callbacks=None):
        return documents


def around_whole_config(retriever: BaseRetriever) -> list[BaseRetriever]:
    """Retrievers around this one that hand the whole configuration down."""
    return [
        EnsembleRetriever(retrievers=[retriever], weights=[1.0]),
        LanerankRetriever(
            base_retriever=retriever,
            # Has nothing to say, so that what it is given stays as it is.
            reranker=LanerankRerank(model=OverlapScorer(), sources=(), top_n=None),
        ),
    ]


def around_callbacks_only(retriever: BaseRetriever) -> list[BaseRetriever]:
    """Retrievers around this one that hand the callbacks down and nothing else."""
    return [
        MultiQueryRetriever(retriever=retriever, llm_chain=RunnableLambda(lambda _: ["fish"])),
        ContextualCompressionRetriever(base_compressor=Passing(), base_retriever=retriever),
    ]


for row, around in (
    ("in `EnsembleRetriever` or `LanerankRetriever`", around_whole_config),
    ("in `MultiQueryRetriever` or `ContextualCompressionRetriever`", around_callbacks_only),
):

    @call(row)
    def inside(retriever, give, around=around):
        config = give.config("green")
        return {"green": tops([outer.invoke("fish", config) for outer in around(retriever)])}

    @call(row)
    async def ainside(retriever, give, around=around):
        config = give.config("green")
        outers = around(retriever)
        return {"green": tops([await outer.ainvoke("fish", config) for outer in outers])}


def tops(all_found: list[Documents]) -> Documents:
    """The first of some results, where all have the same documents in the same order."""
    assert len({tuple(document.page_content for document in found) for found in all_found}) == 1
    return all_found[0]


class State(TypedDict, total=False):
    """The state of the graph."""

    query: str
    documents: Documents


def graph_of(node: Callable[[State], Any]) -> Any:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("retrieve", node)
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", END)
    return graph.compile()


@call("LangGraph node")
def node(retriever, give):
    graph = graph_of(lambda state: {"documents": retriever.invoke(state["query"])})
    context = give.context("green")
    state = graph.invoke({"query": "fish"}, give.config("green"), context=context)
    return {"green": state["documents"]}


@call("LangGraph node")
async def anode(retriever, give):
    async def retrieve(state: State) -> State:
        return {"documents": await retriever.ainvoke(state["query"])}

    graph = graph_of(retrieve)
    context = give.context("green")
    state = await graph.ainvoke({"query": "fish"}, give.config("green"), context=context)
    return {"green": state["documents"]}


@call("LangGraph node")
async def sync_node_in_async_graph(retriever, give):
    graph = graph_of(lambda state: {"documents": retriever.invoke(state["query"])})
    context = give.context("green")
    state = await graph.ainvoke({"query": "fish"}, give.config("green"), context=context)
    return {"green": state["documents"]}


class Caller(GenericFakeChatModel):
    """A chat model that calls its tool once and then has done."""

    def bind_tools(self, tools, **kwargs):
        return self


def agent_with(search: Any) -> Any:
    calls = [{"name": "search", "args": {"query": "fish"}, "id": "1"}]
    model = Caller(messages=iter([AIMessage("", tool_calls=calls), AIMessage("done")]))
    return create_agent(model, [search], context_schema=Context)


def retriever_tool(retriever: BaseRetriever) -> Any:
    return create_retriever_tool(
        retriever, "search", "Find fish.", response_format="content_and_artifact"
    )


def tool_with_runtime(retriever: BaseRetriever) -> Any:
    @tool(response_format="content_and_artifact")
    def search(query: str, runtime: ToolRuntime[Context, Any]) -> tuple[str, Documents]:
        """Find fish."""
        return "found", retriever.invoke(query)

    return search


@call("tool of `create_agent`")
def agent(retriever, give):
    config, context = give.config("green"), give.context("green")
    found = []
    for make in (retriever_tool, tool_with_runtime):
        messages = {"messages": [("user", "Find fish.")]}
        state = agent_with(make(retriever)).invoke(messages, config, context=context)
        found.append(state["messages"][-2].artifact)
    return {"green": alike(found)}


@call("tool of `create_agent`")
async def aagent(retriever, give):
    messages = {"messages": [("user", "Find fish.")]}
    state = await agent_with(retriever_tool(retriever)).ainvoke(
        messages, give.config("green"), context=give.context("green")
    )
    return {"green": state["messages"][-2].artifact}


@call("thread of your own, config handed over")
def thread_with_config(retriever, give):
    with ThreadPoolExecutor() as pool:
        return {"green": pool.submit(retriever.invoke, "fish", give.config("green")).result()}


@call("thread of your own, config handed over")
async def athread_with_config(retriever, give):
    def ask() -> Documents:
        return asyncio.run(retriever.ainvoke("fish", give.config("green")))

    return {"green": await asyncio.get_running_loop().run_in_executor(None, ask)}


@call("thread of your own, nothing handed over")
def thread_without_config(retriever, give):
    def ask(state: State) -> State:
        with ThreadPoolExecutor() as pool:
            return {"documents": pool.submit(retriever.invoke, state["query"]).result()}

    context = give.context("green")
    state = graph_of(ask).invoke({"query": "fish"}, give.config("green"), context=context)
    return {"green": state["documents"]}


@call("thread of your own, nothing handed over")
async def athread_without_config(retriever, give):
    async def ask(state: State) -> State:
        loop = asyncio.get_running_loop()
        return {"documents": await loop.run_in_executor(None, retriever.invoke, state["query"])}

    context = give.context("green")
    state = await graph_of(ask).ainvoke({"query": "fish"}, give.config("green"), context=context)
    return {"green": state["documents"]}


def table() -> dict[str, dict[str, str]]:
    """The README's table: for each call, which component each source reaches."""
    lines = iter(README.read_text(encoding="utf-8").splitlines())
    head = next(cells(line) for line in lines if line.startswith("| call |"))
    next(lines)
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        if not line.startswith("|"):
            return rows
        name, *reaches = cells(line)
        rows[name] = dict(zip((source.strip("`") for source in head[1:]), reaches, strict=True))
    raise AssertionError


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_lists_what_is_tested():
    rows = table()
    assert set(rows) == set(SHAPES)
    for row, reaches in rows.items():
        assert set(reaches) == {"use_instruction", "handler", "configurable", "metadata", "runtime"}
        assert set(reaches.values()) <= {"both", "retriever", "no", "-"}, row
    for shapes in SHAPES.values():
        assert {inspect.iscoroutinefunction(shape) for shape in shapes} == {True, False}


def cells_of(*, coroutines: bool) -> list[Any]:
    return [
        pytest.param(shape, source, component, reaches in ("both", component), id="-".join(names))
        for row, sources in table().items()
        for source, reaches in sources.items()
        if reaches != "-"
        for shape in SHAPES[row]
        if inspect.iscoroutinefunction(shape) is coroutines
        for component in ("retriever", "compressor")
        if (names := (row, shape.__name__, source, component))
    ]


@pytest.fixture
def build(fish, shelf, make_compressor, make_retriever) -> Callable[[str], BaseRetriever]:
    """Make either component, with the three fish to find."""

    def build(component: str) -> BaseRetriever:
        if component == "retriever":
            return make_retriever(fish)
        return ContextualCompressionRetriever(
            base_compressor=make_compressor(), base_retriever=shelf(fish)
        )

    return build


def scope(source: str) -> AbstractContextManager[object]:
    return use_instruction("green") if source == "use_instruction" else nullcontext()


def check(found: Found, source: str, *, arrives: bool) -> None:
    for colour, documents in found.items():
        expected = "green" if source == "use_instruction" else colour
        seen = documents[0].metadata["rerank_instruction_source"]
        if source == "configurable" and seen == "metadata" and COPIES_CONFIGURABLE:
            assert not arrives
        elif not arrives:
            assert seen is None
            expected = "red"
        else:
            assert seen == source
        assert documents[0].page_content == f"{expected} fish"


@pytest.mark.parametrize(("shape", "source", "component", "arrives"), cells_of(coroutines=False))
def test_what_arrives(shape, source, component, arrives, build):
    with scope(source):
        found = shape(build(component), Giver(source))
    check(found, source, arrives=arrives)


@pytest.mark.parametrize(("shape", "source", "component", "arrives"), cells_of(coroutines=True))
async def test_what_arrives_asynchronously(shape, source, component, arrives, build):
    with scope(source):
        found = await shape(build(component), Giver(source))
    check(found, source, arrives=arrives)
