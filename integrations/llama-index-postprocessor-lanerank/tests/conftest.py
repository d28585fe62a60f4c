"""What the tests share: a small index, deterministic language models, and a recorder of traces.

Nothing is fetched: llama-index-core brings the data of NLTK and tiktoken that it uses.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.span import SimpleSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.llms import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CustomLLM,
    LLMMetadata,
)
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.lanerank import LanerankRerank
from pydantic import Field, PrivateAttr

from lanerank.contracts import RerankRequest, Scores
from lanerank.testing import OverlapScorer

# Read when huggingface_hub is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# The machine that runs the tests may be slow or busy; that is no finding.
settings.register_profile("lanerank", max_examples=30, deadline=None)
settings.load_profile("lanerank")


@pytest.fixture(autouse=True, scope="session")
def no_loop_left_open() -> None:
    """Let LlamaIndex's synchronous methods run a loop of their own, which they then close."""
    asyncio.set_event_loop(None)


# --- scorers and nodes ------------------------------------------------------------------------


@dataclass
class RecordingScorer:
    """Scores by shared words and keeps the requests."""

    name: str = "recording"
    supports_instructions: bool = True
    requests: list[RerankRequest] = field(default_factory=list)

    def score(self, request: RerankRequest) -> Scores:
        self.requests.append(request)
        return OverlapScorer().score(request)

    @property
    def instructions(self) -> list[str]:
        return [request.instruction for request in self.requests]


@pytest.fixture
def scorer() -> RecordingScorer:
    return RecordingScorer()


@pytest.fixture(scope="module")
def recorder() -> RecordingScorer:
    """For properties, which run many times within one test; to be cleared by each."""
    return RecordingScorer()


@pytest.fixture
def nodes() -> list[NodeWithScore]:
    """Three fish, in an order that no reranking under test gives by itself."""
    return [
        NodeWithScore(node=TextNode(id_=name, text=f"{name} fish"), score=score)
        for name, score in (("red", 0.5), ("blue", 0.4), ("green", 0.3))
    ]


# --- language models --------------------------------------------------------------------------


class ScriptedLLM(CustomLLM):
    """Answers a prompt by the first key that occurs in it."""

    replies: dict[str, str] = Field(default_factory=dict)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    @llm_completion_callback()
    def complete(self, prompt: str, **kwargs: Any) -> CompletionResponse:
        found = (reply for key, reply in self.replies.items() if key in prompt)
        return CompletionResponse(text=next(found, "an answer"))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, **kwargs: Any) -> Any:
        response = self.complete(prompt, **kwargs)
        yield CompletionResponse(text=response.text, delta=response.text)


class ToolCallingLLM(FunctionCallingLLM):
    """Calls its tool with what the user said, then answers."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True)

    def _prepare_chat_with_tools(self, tools: Any, **kwargs: Any) -> dict[str, Any]:
        return {"messages": kwargs["chat_history"], "tools": tools}

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        said = messages[-1]
        calls = []
        if said.role == "user":
            [tool] = kwargs["tools"]
            calls = [
                ToolSelection(
                    tool_id="1",
                    tool_name=tool.metadata.get_name(),
                    tool_kwargs={"input": said.content},
                )
            ]
        message = ChatMessage(role="assistant", content="an answer")
        return ChatResponse(message=message, additional_kwargs={"calls": calls})

    def get_tool_calls_from_response(self, response: ChatResponse, **kwargs: Any) -> Any:
        return response.additional_kwargs["calls"]

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages, **kwargs)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Any:
        async def stream() -> Any:
            yield self.chat(messages, **kwargs)

        return stream()

    def complete(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    acomplete = stream_complete = astream_complete = stream_chat = complete


# --- an application around the postprocessor --------------------------------------------------


@dataclass
class App:
    """A retriever, a query engine with the reranker, and what the reranker's model was given."""

    scorer: RecordingScorer
    reranker: LanerankRerank
    index: VectorStoreIndex
    llm: ScriptedLLM
    tool_llm: ToolCallingLLM = field(default_factory=ToolCallingLLM)

    def engine(self) -> RetrieverQueryEngine:
        return self.index.as_query_engine(
            llm=self.llm, node_postprocessors=[self.reranker], similarity_top_k=3
        )


@pytest.fixture
def make_app(scorer: RecordingScorer, nodes: list[NodeWithScore]) -> Callable[..., App]:
    """Build an application whose reranker has the given options."""

    def make(**options: Any) -> App:
        return App(
            scorer=scorer,
            reranker=LanerankRerank(model=scorer, **options),
            index=VectorStoreIndex(
                nodes=[item.node for item in nodes], embed_model=MockEmbedding(embed_dim=2)
            ),
            llm=ScriptedLLM(),
        )

    return make


# --- instrumentation --------------------------------------------------------------------------


@dataclass
class Trace:
    """What LlamaIndex's instrumentation was given: events, and the start and end of spans."""

    events: list[BaseEvent] = field(default_factory=list)
    entered: list[dict[str, Any]] = field(default_factory=list)
    exited: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def of(self, kind: type[BaseEvent]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class EventRecorder(BaseEventHandler):
    trace: Any

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.trace.events.append(event)


class SpanRecorder(BaseSpanHandler[SimpleSpan]):
    _trace: Any = PrivateAttr()

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def new_span(self, id_: str, bound_args: Any, instance: Any = None, **kwargs: Any) -> None:
        self._trace.entered.append({"id": id_, "arguments": bound_args, **kwargs})

    def prepare_to_exit_span(self, id_: str, *args: Any, **kwargs: Any) -> None:
        self._trace.exited.append(id_)

    def prepare_to_drop_span(self, id_: str, *args: Any, **kwargs: Any) -> None:
        self._trace.dropped.append(id_)


@pytest.fixture
def trace() -> Iterator[Trace]:
    """Everything that LlamaIndex traces during the test."""
    root, trace = get_dispatcher(), Trace()
    events, spans = EventRecorder(trace=trace), SpanRecorder(trace=trace)
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield trace
    root.event_handlers.remove(events)
    root.span_handlers.remove(spans)
