"""Rerankers that ask a server: what comes out of them, and what happens where it fails."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from lanerank import Reranker
from lanerank.contracts import Candidate, RerankRequest
from lanerank.errors import InputError, RemoteError
from lanerank.testing import OverlapScorer
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig
from pytest_examples import find_examples

from langchain_lanerank import LanerankRerank, LanerankRetriever

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


class Handler(BaseHTTPRequestHandler):
    """Ranks as `lanerank serve` does, by shared words; or fails."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        candidates = tuple(Candidate(text=document["text"]) for document in body["documents"])
        request = RerankRequest(
            query=body["query"], instruction=body.get("instruction", ""), candidates=candidates
        )
        scores = enumerate(OverlapScorer().score(request).values)
        results = [{"index": index, "relevance_score": score} for index, score in scores]
        answer: object = {"results": results, "meta": {"truncated": []}}
        if self.server.broken:
            answer = {"error": {"message": f"no memory for {body['documents'][0]['text']!r}"}}
        content = json.dumps(answer).encode()
        self.send_response(500 if self.server.broken else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server of this machine; breaks when it is told to."""

    broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reranker(self, **options: Any) -> Reranker:
        return Reranker.from_url(self.url, service="lanerank", max_retries=0, **options)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Events(BaseCallbackHandler):
    """Keeps what the custom events say."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_custom_event(self, name, data, **kwargs):
        assert name == "lanerank_rerank"
        self.seen.append(data)


async def sync(runnable: Runnable, value: object, config: RunnableConfig) -> list[Document]:
    return runnable.invoke(value, config)


async def native(runnable: Runnable, value: object, config: RunnableConfig) -> list[Document]:
    return await runnable.ainvoke(value, config)


def by_compressor(reranker: LanerankRerank, documents: list[Document], shelf: Any) -> Any:
    return reranker.as_runnable(), {"query": "fish", "documents": documents}


def by_retriever(reranker: LanerankRerank, documents: list[Document], shelf: Any) -> Any:
    return LanerankRetriever(base_retriever=shelf(documents), reranker=reranker), "fish"


both = pytest.mark.parametrize("call", [sync, native])
everywhere = pytest.mark.parametrize("place", [by_compressor, by_retriever])
Place = Callable[[LanerankRerank, list[Document], Any], Any]


@both
@everywhere
async def test_a_server_ranks_under_the_instruction(call, place: Place, server, fish, shelf):
    events = Events()
    compressor = LanerankRerank(model=server.reranker(), instruction="blue", top_n=2)
    found = await call(*place(compressor, fish, shelf), {"callbacks": [events]})
    assert [document.id for document in found] == ["blue", "red"]
    assert [document.metadata["relevance_score"] for document in found] == [1.0, 1 / 3]
    [event] = events.seen
    assert (event["instruction_applied"], event["degraded"]) == ("lane", None)


@both
@everywhere
async def test_a_failure_raises_by_default(call, place: Place, server, fish, shelf):
    events = Events()
    compressor = LanerankRerank(model=server.reranker(), instruction="blue")
    server.broken = True
    with pytest.raises(RemoteError, match="status 500"):
        await call(*place(compressor, fish, shelf), {"callbacks": [events]})
    assert events.seen == []


@both
@everywhere
async def test_by_choice_a_failure_keeps_the_order_and_is_told(
    call, place: Place, server, fish, shelf, caplog
):
    events = Events()
    compressor = LanerankRerank(
        model=server.reranker(on_error="input_order"),
        instruction="blue",
        top_n=2,
        report_instruction=True,
    )
    server.broken = True
    found = await call(*place(compressor, fish, shelf), {"callbacks": [events]})
    assert [document.id for document in found] == ["red", "blue"]
    assert [document.metadata["relevance_score"] for document in found] == [0.0, 0.0]
    assert all(document.metadata["rerank_degraded"] for document in found)
    [event] = events.seen
    assert "status 500" in event["degraded"]
    assert (event["kept"], event["instruction_applied"]) == (2, "ignored")
    json.dumps(event)
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert event["degraded"] in warning.getMessage()
    # It ranks again as soon as the server does, and says so.
    server.broken = False
    [best, _] = await call(*place(compressor, fish, shelf), {"callbacks": [events]})
    assert (best.id, best.metadata["rerank_degraded"]) == ("blue", False)
    assert events.seen[1]["degraded"] is None


async def test_what_a_failed_server_repeats_gets_into_no_metadata(server, fish, caplog):
    secret = Document("secret fish", id="secret")
    compressor = LanerankRerank(
        model=server.reranker(on_error="input_order"), report_instruction=True, top_n=None
    )
    server.broken = True
    for found in (
        compressor.compress_documents([secret, *fish], "fish"),
        await compressor.acompress_documents([secret, *fish], "fish"),
    ):
        assert "secret" not in json.dumps([document.metadata for document in found])
    assert caplog.text.count("no memory for 'secret fish'") == 2


async def test_a_mistake_of_the_caller_raises_whatever_is_chosen(server, fish):
    compressor = LanerankRerank(model=server.reranker(on_error="input_order"))
    with pytest.raises(InputError, match="`query`"):
        compressor.compress_documents(fish, " ")
    with pytest.raises(InputError, match="`query`"):
        await compressor.acompress_documents(fish, " ")


def test_the_readme_example_with_a_server_works_where_one_runs(server, fish):
    """It is no `python` block, because it needs a server at the address it names."""
    [example] = [example for example in find_examples(README) if example.prefix == "py"]
    address = "http://localhost:8000"
    assert address in example.source
    names: dict[str, Any] = {}
    exec(example.source.replace(address, server.url), names)
    [best] = names["reranker"].compress_documents(fish, "fish", instruction="blue", top_n=1)
    assert best.id == "blue"
    server.broken = True
    kept = names["reranker"].compress_documents(fish, "fish", instruction="blue")
    assert [document.id for document in kept] == ["red", "blue", "green"]
