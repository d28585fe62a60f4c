"""What tracers record of an instruction: the README's table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypedDict

import pytest
from lanerank import use_instruction
from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tracers import LangChainTracer
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.graph import END, START, StateGraph
from langsmith import Client
from packaging.version import Version

from langchain_lanerank import InstructionHandler, LanerankRetriever

SECRET = "prefer blue whales"
COPIES_CONFIGURABLE = Version(version("langchain-core")) < Version("1.3")


class Tracer(BaseTracer):
    """Keeps what any tracer is told."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = ""

    def _persist_run(self, run: Run) -> None:
        self.recorded += json.dumps(run.model_dump(exclude={"child_runs"}), default=str)
        for child in run.child_runs:
            self._persist_run(child)


class Recorder(Client):
    """A LangSmith client that keeps what it should send."""

    def __init__(self) -> None:
        super().__init__(api_url="http://localhost", api_key="none", auto_batch_tracing=False)
        self.recorded = ""

    def create_run(self, *args: Any, **kwargs: Any) -> None:
        self.recorded += json.dumps([args, kwargs], default=str)

    def update_run(self, *args: Any, **kwargs: Any) -> None:
        self.recorded += json.dumps([args, kwargs], default=str)


@dataclass
class Context:
    """The context object of a graph."""

    rerank_instruction: str


class State(TypedDict, total=False):
    """The state of a graph."""

    documents: list[Document]


Search = Callable[[LanerankRetriever, RunnableConfig], list[Document]]


def chain(retriever: LanerankRetriever) -> Any:
    return RunnableLambda(lambda query: query) | retriever


def by_argument(retriever, config):
    return chain(retriever.bind(instruction=SECRET)).invoke("fish", config)


def by_runnable(retriever, config):
    values = {"query": "fish", "documents": [Document("fish")], "instruction": SECRET}
    return retriever.reranker.as_runnable().invoke(values, config)


def by_scope(retriever, config):
    with use_instruction(SECRET):
        return chain(retriever).invoke("fish", config)


def by_handler(retriever, config):
    handlers = [*config["callbacks"], InstructionHandler(SECRET)]
    return chain(retriever).invoke("fish", {"callbacks": handlers})


def by_configurable(retriever, config):
    return chain(retriever).invoke(
        "fish", {**config, "configurable": {"rerank_instruction": SECRET}}
    )


def by_metadata(retriever, config):
    return chain(retriever).invoke("fish", {**config, "metadata": {"rerank_instruction": SECRET}})


def by_context(retriever, config):
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("retrieve", lambda _: {"documents": retriever.invoke("fish")})
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", END)
    return graph.compile().invoke({}, config, context=Context(SECRET))["documents"]


def by_field(retriever, config):
    own = retriever.model_copy(update={"instruction": SECRET})
    return chain(own).invoke("fish", config)


@pytest.mark.parametrize(
    ("search", "source", "any_tracer", "langsmith"),
    [
        (by_argument, "argument", False, False),
        (by_runnable, "argument", True, True),
        (by_scope, "use_instruction", False, False),
        (by_handler, "handler", False, False),
        (by_configurable, "configurable", COPIES_CONFIGURABLE, True),
        (by_metadata, "metadata", True, True),
        (by_context, "runtime", False, False),
        (by_field, "field", False, False),
    ],
)
def test_what_is_recorded(search: Search, source, any_tracer, langsmith, fish, make_retriever):
    tracer, recorder = Tracer(), Recorder()
    smith = LangChainTracer(client=recorder, project_name="test")
    found = search(make_retriever(fish), {"callbacks": [tracer, smith]})
    smith.wait_for_futures()
    assert found[0].metadata["rerank_instruction_source"] == source
    for recorded in (tracer.recorded, recorder.recorded):
        assert "red fish" in recorded or search is by_runnable
    assert (SECRET in tracer.recorded) is any_tracer
    assert (SECRET in recorder.recorded) is langsmith


def test_the_event_holds_no_text_of_instruction_or_document(fish, make_retriever):
    class Events(Tracer):
        def on_custom_event(self, name, data, **kwargs):
            self.recorded += json.dumps(data)

    events = Events()
    make_retriever(fish).invoke("minnows", {"callbacks": [events]}, instruction=SECRET)
    event = events.recorded[: events.recorded.index("}") + 1]
    assert json.loads(event)["query"] == "minnows"
    assert SECRET not in event
    assert "red fish" not in event
