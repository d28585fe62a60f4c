"""What tests share. Sockets are shut by pytest-socket, and model hubs are told so."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Never

import pytest
from lanerank.contracts import RerankRequest, Scores
from lanerank.testing import OverlapScorer
from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda

from langchain_lanerank import LanerankRerank, LanerankRetriever

# Read when huggingface_hub is first imported, so it has to be set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Whoever runs the tests may trace everything else.
os.environ["LANGSMITH_TRACING"] = os.environ["LANGCHAIN_TRACING_V2"] = "false"


class Gate:
    """A scorer that waits until it is let through, and fails if it never is."""

    name = "gate"
    supports_instructions = True

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def score(self, request: RerankRequest) -> Scores:
        self.entered.set()
        assert self.opened.wait(20), "the event loop stood still"
        return Scores((0.5,) * len(request.candidates))


class Awaited:
    """A scorer to be awaited: waits until it is let through, and keeps what became of it."""

    name = "awaited"
    supports_instructions = True

    def __init__(self) -> None:
        self.entered, self.opened = asyncio.Event(), asyncio.Event()
        self.threads: list[threading.Thread] = []
        self.cancelled = False

    def score(self, request: RerankRequest) -> Scores:
        raise AssertionError("it was not awaited")

    async def ascore(self, request: RerankRequest) -> Scores:
        self.threads.append(threading.current_thread())
        self.entered.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return OverlapScorer().score(request)


class NoThreads(ThreadPoolExecutor):
    """For an event loop that must do without worker threads."""

    def submit(self, *args: object, **kwargs: object) -> Never:
        raise AssertionError("a thread was used")


@pytest.fixture
def gate() -> Gate:
    """A scorer that the event loop has to let through, which it cannot while it is blocked."""
    return Gate()


@pytest.fixture
def awaited() -> Awaited:
    """A scorer that has to be awaited."""
    return Awaited()


@pytest.fixture
async def no_threads() -> None:
    """Make every worker thread of the test's event loop an error."""
    asyncio.get_running_loop().set_default_executor(NoThreads())


@pytest.fixture
def fish() -> list[Document]:
    """Three documents that only an instruction can tell apart for the query "fish"."""
    return [Document(f"{colour} fish", id=colour) for colour in ("red", "blue", "green")]


@pytest.fixture
def shelf() -> Callable[[Sequence[Document]], Runnable[str, list[Document]]]:
    """Make a retriever that finds the same documents whatever is asked."""
    return lambda documents: RunnableLambda(lambda _: list(documents), name="shelf")


@pytest.fixture
def make_compressor() -> Callable[..., LanerankRerank]:
    """Make a compressor that counts shared words, keeps everything and says what applied."""

    def make(**options: object) -> LanerankRerank:
        settings = {"model": OverlapScorer(), "top_n": None, "report_instruction": True}
        return LanerankRerank(**{**settings, **options})

    return make


@pytest.fixture
def make_retriever(
    make_compressor: Callable[..., LanerankRerank],
    shelf: Callable[[Sequence[Document]], Runnable[str, list[Document]]],
) -> Callable[..., LanerankRetriever]:
    """Make a retriever over given documents; other options go to its reranker."""

    def make(
        documents: Sequence[Document], retriever: dict[str, object] | None = None, **options: object
    ) -> LanerankRetriever:
        settings = {"base_retriever": shelf(documents), **(retriever or {})}
        return LanerankRetriever(reranker=make_compressor(**options), **settings)

    return make
