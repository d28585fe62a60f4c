"""Which channels survive which caller. The README's table is checked against `CALLERS`."""

import asyncio
import contextvars
import inspect
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
)
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.schema import QueryBundle
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool, RetrieverTool
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from llama_index.postprocessor.lanerank import InstructedQueryBundle
from packaging.version import Version

from lanerank import InstructionMissingError, use_instruction
from lanerank.context import Source

README = Path(__file__).parents[1] / "README.md"
HISTORY = [ChatMessage("earlier question"), ChatMessage("earlier answer", role="assistant")]


# --- the callers: each asks the application one question --------------------------------------


def postprocess(app: Any, bundle: QueryBundle) -> None:
    nodes = app.index.as_retriever(similarity_top_k=3).retrieve(bundle)
    app.reranker.postprocess_nodes(nodes, bundle)


async def apostprocess(app: Any, bundle: QueryBundle) -> None:
    nodes = await app.index.as_retriever(similarity_top_k=3).aretrieve(bundle)
    await app.reranker.apostprocess_nodes(nodes, bundle)


def query(app: Any, bundle: QueryBundle) -> None:
    app.engine().query(bundle)


async def aquery(app: Any, bundle: QueryBundle) -> None:
    await app.engine().aquery(bundle)


def retrieve(app: Any, bundle: QueryBundle) -> None:
    app.engine().retrieve(bundle)


async def aretrieve(app: Any, bundle: QueryBundle) -> None:
    await app.engine().aretrieve(bundle)


def citation(app: Any) -> CitationQueryEngine:
    return CitationQueryEngine.from_args(
        app.index, llm=app.llm, similarity_top_k=3, node_postprocessors=[app.reranker]
    )


def citation_query(app: Any, bundle: QueryBundle) -> None:
    citation(app).query(bundle)


async def citation_aquery(app: Any, bundle: QueryBundle) -> None:
    await citation(app).aquery(bundle)


def tools(app: Any) -> list[QueryEngineTool]:
    return [
        QueryEngineTool.from_defaults(app.engine(), name=name, description=name)
        for name in ("sea", "river")
    ]


def router(app: Any, kind: Any) -> RouterQueryEngine:
    choices = [{"choice": 1, "reason": "r"}, {"choice": 2, "reason": "r"}]
    chosen = choices[:1] if kind is LLMSingleSelector else choices
    app.llm.replies["Some choices are given below"] = json.dumps(chosen)
    return RouterQueryEngine.from_defaults(
        tools(app), llm=app.llm, selector=kind.from_defaults(llm=app.llm)
    )


def route_to_one(app: Any, bundle: QueryBundle) -> None:
    router(app, LLMSingleSelector).query(bundle)


async def aroute_to_one(app: Any, bundle: QueryBundle) -> None:
    await router(app, LLMSingleSelector).aquery(bundle)


def route_to_two(app: Any, bundle: QueryBundle) -> None:
    router(app, LLMMultiSelector).query(bundle)
    assert len(app.scorer.requests) == 2


async def aroute_to_two(app: Any, bundle: QueryBundle) -> None:
    await router(app, LLMMultiSelector).aquery(bundle)
    assert len(app.scorer.requests) == 2


def hyde(app: Any) -> TransformQueryEngine:
    return TransformQueryEngine(app.engine(), query_transform=HyDEQueryTransform(llm=app.llm))


def hyde_query(app: Any, bundle: QueryBundle) -> None:
    hyde(app).query(bundle)


async def hyde_aquery(app: Any, bundle: QueryBundle) -> None:
    await hyde(app).aquery(bundle)


def sub_questions(app: Any, **options: Any) -> SubQuestionQueryEngine:
    asked = [{"sub_question": "red fish", "tool_name": name} for name in ("sea", "river")]
    app.llm.replies["output a list of relevant sub-questions"] = json.dumps({"items": asked})
    return SubQuestionQueryEngine.from_defaults(
        tools(app),
        llm=app.llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=app.llm),
        verbose=False,
        **options,
    )


def sub_question_query(app: Any, bundle: QueryBundle) -> None:
    sub_questions(app, use_async=False).query(bundle)
    assert len(app.scorer.requests) == 2


async def sub_question_aquery(app: Any, bundle: QueryBundle) -> None:
    await sub_questions(app).aquery(bundle)
    assert len(app.scorer.requests) == 2


async def sub_question_query_on_a_loop(app: Any, bundle: QueryBundle) -> None:
    # A synchronous query with `use_async` under a running loop goes through another thread.
    sub_questions(app, use_async=True).query(bundle)
    assert len(app.scorer.requests) == 2


def memory() -> ChatMemoryBuffer:
    # The default keeps its messages in a database, and leaves the connection open.
    return ChatMemoryBuffer.from_defaults(chat_history=HISTORY)


def context_chat(app: Any) -> ContextChatEngine:
    return ContextChatEngine.from_defaults(
        app.index.as_retriever(similarity_top_k=3),
        llm=app.llm,
        node_postprocessors=[app.reranker],
        memory=memory(),
    )


def condense_plus(app: Any) -> CondensePlusContextChatEngine:
    return CondensePlusContextChatEngine.from_defaults(
        app.index.as_retriever(similarity_top_k=3),
        llm=app.llm,
        node_postprocessors=[app.reranker],
        memory=memory(),
    )


def condense_question(app: Any) -> CondenseQuestionChatEngine:
    return CondenseQuestionChatEngine.from_defaults(app.engine(), llm=app.llm, memory=memory())


def chat(make: Callable[[Any], Any]) -> Callable[..., Any]:
    def ask(app: Any, bundle: QueryBundle) -> None:
        make(app).chat(bundle.query_str)

    return ask


def achat(make: Callable[[Any], Any]) -> Callable[..., Any]:
    async def ask(app: Any, bundle: QueryBundle) -> None:
        await make(app).achat(bundle.query_str)

    return ask


def stream_chat(make: Callable[[Any], Any]) -> Callable[..., Any]:
    def ask(app: Any, bundle: QueryBundle) -> None:
        assert "".join(make(app).stream_chat(bundle.query_str).response_gen)

    return ask


def astream_chat(make: Callable[[Any], Any]) -> Callable[..., Any]:
    async def ask(app: Any, bundle: QueryBundle) -> None:
        response = await make(app).astream_chat(bundle.query_str)
        assert [token async for token in response.async_response_gen()]

    return ask


def retriever_tool(app: Any) -> RetrieverTool:
    return RetrieverTool.from_defaults(
        app.index.as_retriever(similarity_top_k=3),
        node_postprocessors=[app.reranker],
        name="fish",
        description="fish",
    )


def call_tools(app: Any, bundle: QueryBundle) -> None:
    tools(app)[0].call(bundle.query_str)
    retriever_tool(app).call(bundle.query_str)


async def acall_tools(app: Any, bundle: QueryBundle) -> None:
    await tools(app)[0].acall(bundle.query_str)
    await retriever_tool(app).acall(bundle.query_str)


def agent(app: Any, tool: Any) -> FunctionAgent:
    return FunctionAgent(tools=[tool], llm=app.tool_llm, system_prompt="Answer.")


async def agent_with_engine(app: Any, bundle: QueryBundle) -> None:
    await agent(app, tools(app)[0]).run(bundle.query_str)


async def agent_with_retriever(app: Any, bundle: QueryBundle) -> None:
    await agent(app, retriever_tool(app)).run(bundle.query_str)


async def agent_with_function(app: Any, bundle: QueryBundle) -> None:
    def look_up(input: str) -> str:
        return str(app.engine().query(input))

    tool = FunctionTool.from_defaults(fn=look_up, name="look_up", description="look up")
    await agent(app, tool).run(bundle.query_str)


class Ask(Workflow):
    @step
    async def ask(self, event: StartEvent) -> StopEvent:
        return StopEvent(result=await event.app.engine().aquery(event.bundle))


async def workflow(app: Any, bundle: QueryBundle) -> None:
    await Ask().run(app=app, bundle=bundle)


def thread_pool(app: Any, bundle: QueryBundle) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(app.engine().query, bundle).result()


@dataclass(frozen=True)
class Caller:
    """A row of the README's table: a name, ways to ask, and what arrives."""

    name: str
    ways: tuple[Callable[..., Any], ...]
    bundle: bool
    ambient: bool = True
    """`use_instruction` and instrument tags, which are both context variables."""


CALLERS = (
    Caller("`postprocess_nodes`, `apostprocess_nodes`", (postprocess, apostprocess), bundle=True),
    Caller("`RetrieverQueryEngine`", (query, aquery, retrieve, aretrieve), bundle=True),
    Caller("`CitationQueryEngine`", (citation_query, citation_aquery), bundle=True),
    Caller(
        "`RouterQueryEngine`",
        (route_to_one, aroute_to_one, route_to_two, aroute_to_two),
        bundle=True,
    ),
    Caller("`TransformQueryEngine` with HyDE", (hyde_query, hyde_aquery), bundle=False),
    Caller(
        "`SubQuestionQueryEngine`",
        (sub_question_query, sub_question_aquery, sub_question_query_on_a_loop),
        bundle=False,
    ),
    *(
        Caller(
            f"`{kind}`",
            tuple(way(make) for way in (chat, achat, stream_chat, astream_chat)),
            bundle=False,
        )
        for kind, make in (
            ("ContextChatEngine", context_chat),
            ("CondensePlusContextChatEngine", condense_plus),
            ("CondenseQuestionChatEngine", condense_question),
        )
    ),
    Caller("`QueryEngineTool`, `RetrieverTool`", (call_tools, acall_tools), bundle=False),
    Caller(
        "`FunctionAgent` with such a tool",
        (agent_with_engine, agent_with_retriever, agent_with_function),
        bundle=False,
    ),
    Caller("a `Workflow` step that passes the bundle on", (workflow,), bundle=True),
    Caller("`ThreadPoolExecutor.submit`", (thread_pool,), bundle=True, ambient=False),
)
# Before these versions of llama-index-core, context variables were lost on the way.
SINCE = {
    sub_question_query_on_a_loop: "0.14.9",
    aroute_to_two: "0.14.16",
    agent_with_function: "0.14.22",
}
WAYS = [
    pytest.param(caller, way, id=f"{caller.name.replace('`', '')}-{number}")
    for caller in CALLERS
    for number, way in enumerate(caller.ways)
]


def ask(way: Callable[..., Any], app: Any, bundle: QueryBundle) -> None:
    if inspect.iscoroutinefunction(way):
        asyncio.run(way(app, bundle))
    else:
        way(app, bundle)


def ambient_arrives(caller: Caller, way: Callable[..., Any]) -> bool:
    needed = SINCE.get(way, "0")
    return caller.ambient and Version(llama_index.core.__version__) >= Version(needed)


def arrived(app: Any) -> set[str]:
    assert app.scorer.requests
    return set(app.scorer.instructions)


@pytest.mark.parametrize(("caller", "way"), WAYS)
def test_bundle(caller: Caller, way, make_app) -> None:
    app = make_app(instruction="red")
    ask(way, app, InstructedQueryBundle("fish", instruction="blue"))
    assert arrived(app) == {"blue" if caller.bundle else "red"}


@pytest.mark.parametrize(("caller", "way"), WAYS)
def test_use_instruction(caller: Caller, way, make_app) -> None:
    app = make_app(instruction="red")
    with use_instruction("blue"):
        ask(way, app, QueryBundle("fish"))
    assert arrived(app) == {"blue" if ambient_arrives(caller, way) else "red"}


@pytest.mark.parametrize(("caller", "way"), WAYS)
def test_instrument_tags(caller: Caller, way, make_app) -> None:
    app = make_app(instruction="red", sources=("instrument_tags", "field"))
    with instrument_tags({"rerank_instruction": "blue"}):
        ask(way, app, QueryBundle("fish"))
    assert arrived(app) == {"blue" if ambient_arrives(caller, way) else "red"}


@pytest.mark.parametrize(("caller", "way"), WAYS)
def test_instruction_from(caller: Caller, way, make_app) -> None:
    app = make_app(instruction_from=lambda context: "blue" if context.query else None)
    ask(way, app, QueryBundle("fish"))
    assert arrived(app) == {"blue"}


@pytest.mark.parametrize(("caller", "way"), WAYS)
def test_field(caller: Caller, way, make_app) -> None:
    app = make_app(instruction="red")
    ask(way, app, QueryBundle("fish"))
    assert arrived(app) == {"red"}


def test_readme_table_is_what_the_callers_above_do() -> None:
    text = README.read_text(encoding="utf-8")
    section = text.split("## Channels")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| (.+?) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \|$", section, re.M
    )
    expected = [
        (
            caller.name,
            *(
                "yes" if works else "no"
                for works in (caller.bundle, caller.ambient, caller.ambient, True)
            ),
        )
        for caller in CALLERS
    ]
    assert rows == expected
    assert set(re.findall(r"\d+\.\d+\.\d+", section)) == set(SINCE.values())


# --- at the edges of the table ----------------------------------------------------------------


def test_a_scope_that_closes_before_the_workflow_is_awaited_still_counts(make_app) -> None:
    app = make_app()

    async def main() -> None:
        with use_instruction("blue"):
            handler = Ask().run(app=app, bundle=QueryBundle("fish"))
        await handler

    asyncio.run(main())
    assert arrived(app) == {"blue"}


def test_a_tool_can_build_the_bundle_from_the_context_of_a_workflow(make_app) -> None:
    app = make_app()

    async def look_up(ctx: Context, input: str) -> str:
        instruction = await ctx.store.get("instruction")
        return str(await app.engine().aquery(InstructedQueryBundle(input, instruction=instruction)))

    async def main() -> None:
        tool = FunctionTool.from_defaults(async_fn=look_up, name="look_up", description="look up")
        asked = agent(app, tool)
        context = Context(asked)
        await context.store.set("instruction", "blue")
        await asked.run("fish", ctx=context)

    asyncio.run(main())
    assert arrived(app) == {"blue"}


def test_a_copied_context_takes_the_scope_into_a_thread_pool(make_app) -> None:
    app = make_app()
    with ThreadPoolExecutor(1) as pool, use_instruction("blue"):
        context = contextvars.copy_context()
        pool.submit(context.run, app.engine().query, "fish").result()
    assert arrived(app) == {"blue"}


def test_tags_are_replaced_by_inner_tags(make_app) -> None:
    app = make_app(sources=("instrument_tags",))
    with instrument_tags({"rerank_instruction": "blue"}), instrument_tags({"other": "tag"}):
        app.engine().query("fish")
    assert arrived(app) == {""}


def test_a_required_instruction_that_an_engine_drops_is_an_error(make_app) -> None:
    app = make_app(require_instruction=True)
    with pytest.raises(InstructionMissingError, match="bundle, use_instruction"):
        hyde(app).query(InstructedQueryBundle("fish", instruction="blue"))


def test_sub_question_engine_swallows_the_error(make_app, caplog) -> None:
    app = make_app(require_instruction=True)
    sub_questions(app, use_async=False).query("fish")
    assert app.scorer.requests == []
    assert "Failed to run" in caplog.text


# --- concurrency ------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [Source.BUNDLE, Source.USE_INSTRUCTION, Source.INSTRUMENT_TAGS])
def test_concurrent_queries_do_not_bleed(channel: Source, make_app) -> None:
    app = make_app(sources=(channel,), top_n=1)
    engine = app.engine()

    async def best(colour: str) -> str:
        if channel is Source.BUNDLE:
            response = await engine.aquery(InstructedQueryBundle("fish", instruction=colour))
        elif channel is Source.USE_INSTRUCTION:
            with use_instruction(colour):
                response = await engine.aquery("fish")
        else:
            with instrument_tags({"rerank_instruction": colour}):
                response = await engine.aquery("fish")
        return response.source_nodes[0].text

    async def main() -> list[str]:
        return await asyncio.gather(*(best(colour) for colour in colours))

    colours = ["red", "blue", "green"] * 5
    assert asyncio.run(main()) == [f"{colour} fish" for colour in colours]
