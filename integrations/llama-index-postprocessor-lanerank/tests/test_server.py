"""Rerankers that ask a server: what comes out of them, and what happens where it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.postprocessor.lanerank import InstructedQueryBundle, LanerankRerank
from pytest_examples import find_examples

from lanerank import InputError, Reranker
from lanerank.contracts import Candidate, RerankRequest
from lanerank.errors import RemoteError
from lanerank.testing import OverlapScorer

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
            answer = {"error": {"message": "out of memory"}}
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


def sync(reranker: LanerankRerank, nodes: list[NodeWithScore], query: QueryBundle) -> Any:
    return reranker.postprocess_nodes(nodes, query)


def native(reranker: LanerankRerank, nodes: list[NodeWithScore], query: QueryBundle) -> Any:
    return asyncio.run(reranker.apostprocess_nodes(nodes, query))


both = pytest.mark.parametrize("call", [sync, native])
BLUE = InstructedQueryBundle("fish", instruction="blue")


@both
def test_a_server_ranks_under_the_instruction(call, server, nodes, trace) -> None:
    ranked = call(LanerankRerank(model=server.reranker()), nodes, BLUE)
    assert [(item.node_id, item.score) for item in ranked] == [("blue", 1.0), ("red", 1 / 3)]
    [end] = trace.of(ReRankEndEvent)
    assert end.tags["lanerank"]["instruction_applied"] == "lane"
    assert end.tags["lanerank"]["degraded"] is None


@both
def test_a_failure_raises_by_default(call, server, nodes, trace) -> None:
    reranker = LanerankRerank(model=server.reranker())
    server.broken = True
    with pytest.raises(RemoteError, match="status 500"):
        call(reranker, nodes, BLUE)
    [end] = trace.of(ReRankEndEvent)
    assert (end.nodes, "lanerank" in end.tags) == ([], False)


@both
def test_by_choice_a_failure_keeps_the_order_and_is_told(
    call, server, nodes, trace, caplog
) -> None:
    model = server.reranker(on_error="input_order")
    reranker = LanerankRerank(model=model, keep_retrieval_score=True)
    server.broken = True
    kept = call(reranker, nodes, BLUE)
    assert [(item.node_id, item.score) for item in kept] == [("red", 0.0), ("blue", 0.0)]
    assert [item.metadata["retrieval_score"] for item in kept] == [0.5, 0.4]
    cut = SimilarityPostprocessor(similarity_cutoff=0.1)
    assert cut.postprocess_nodes(kept) == []
    [end] = trace.of(ReRankEndEvent)
    report = end.tags["lanerank"]
    assert "status 500" in report["degraded"]
    assert (report["instruction_applied"], report["instruction_source"]) == ("ignored", "bundle")
    json.dumps(report)
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert report["degraded"] in warning.getMessage()
    # It ranks again as soon as the server does, and says so.
    server.broken = False
    assert call(reranker, nodes, BLUE)[0].node_id == "blue"
    assert trace.of(ReRankEndEvent)[1].tags["lanerank"]["degraded"] is None


@both
def test_an_engine_answers_from_what_was_retrieved(call, server, make_app, trace) -> None:
    app = make_app(top_n=1)
    app.reranker.model = server.reranker(on_error="input_order")
    server.broken = True
    if call is sync:
        answer = app.engine().query(BLUE)
    else:
        answer = asyncio.run(app.engine().aquery(BLUE))
    [retrieved, *_] = app.index.as_retriever(similarity_top_k=3).retrieve(BLUE)
    assert [(item.node_id, item.score) for item in answer.source_nodes] == [
        (retrieved.node_id, 0.0)
    ]
    assert trace.of(ReRankEndEvent)[0].tags["lanerank"]["degraded"]


@both
def test_a_mistake_of_the_caller_raises_whatever_is_chosen(call, server, nodes) -> None:
    reranker = LanerankRerank(model=server.reranker(on_error="input_order"))
    with pytest.raises(InputError, match="`query`"):
        call(reranker, nodes, QueryBundle(" "))


def test_the_readme_example_with_a_server_works_where_one_runs(server, nodes) -> None:
    """It is no `python` block, because it needs a server at the address it names."""
    [example] = [example for example in find_examples(README) if example.prefix == "py"]
    address = "http://localhost:8000"
    assert address in example.source
    names: dict[str, Any] = {}
    exec(example.source.replace(address, server.url), names)
    assert names["remote"].postprocess_nodes(nodes, BLUE)[0].node_id == "blue"
    server.broken = True
    kept = names["remote"].postprocess_nodes(nodes, BLUE)
    assert [item.node_id for item in kept] == ["red", "blue", "green"]
