"""Rerank servers on the loopback address that speak as the real ones do, and can be made to fail.

Each shape is written from the service's own documentation and knows nothing of lanerank's
contracts. Scores are shares of common words, those of the instruction counting double, so tests can
tell whether an instruction arrived.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORD = re.compile(r"\w+")
TURNS = re.compile(
    r"<\|im_start\|>system\n.*?<\|im_end\|>\n<\|im_start\|>user\n<Instruct>: (?P<instruction>.*?)\n"
    r"<Query>: (?P<query>.*?)\n<Document>: (?P<document>.*?)"
    r"<\|im_end\|>\n<\|im_start\|>assistant\n<think>\n\n</think>\n\n",
    re.DOTALL,
)
JUDGE = re.compile(
    r"(?:Instruction: (?P<instruction>.*?)\n)?Query: (?P<query>.*?)\nDocument:"
    r"(?P<document>.*?)\nRelevant:",
    re.DOTALL,
)
TAGS = re.compile(r"<query>(.*?)</query>\n<instruction>(.*?)</instruction>", re.DOTALL)


def overlap(query: str, instruction: str, document: str) -> float:
    wanted, ruled, found = (set(WORD.findall(t.lower())) for t in (query, instruction, document))
    whole = len(wanted) + 2 * len(ruled)
    return (len(wanted & found) + 2 * len(ruled & found)) / whole if whole else 0.0


class Invalid(Exception):
    """The request is not what the service documents."""


@dataclass(frozen=True)
class Ask:
    """A request as a service understands it."""

    query: str
    documents: list[str]
    instruction: str = ""
    model: str = ""


def need(body: dict, name: str, kind: type) -> object:
    if not isinstance(body.get(name), kind):
        raise Invalid(f"{name}: field required")
    return body[name]


def texts(body: dict, name: str = "documents") -> list[str]:
    found = need(body, name, list)
    if not found or not all(isinstance(text, str) for text in found):
        raise Invalid(f"{name}: a list of strings is required")
    return found


def flat(instruction: str = "") -> Callable[[dict], Ask]:
    """The shape that most follow, with the name of the instruction's field."""

    def understand(body: dict) -> Ask:
        return Ask(
            need(body, "query", str),
            texts(body),
            body.get(instruction) or "",
            body.get("model") or "",
        )

    return understand


def tei(body: dict) -> Ask:
    # One text and another; whatever stands around them is the client's business.
    if unknown := body.keys() - {"query", "texts", "truncate", "raw_scores", "return_text"}:
        raise Invalid(f"unknown field {sorted(unknown)[0]}")
    return Ask(need(body, "query", str), texts(body, "texts"))


def tags(body: dict) -> Ask:
    ask = flat()(body)
    found = TAGS.fullmatch(ask.query)
    return Ask(found[1], ask.documents, found[2], ask.model) if found else ask


def voyage(body: dict) -> Ask:
    ask = flat()(body)
    before, found, after = ask.query.rpartition("\nQuery: ")
    return Ask(after, ask.documents, before, ask.model) if found else ask


def contextual(body: dict) -> Ask:
    ask = flat("instruction")(body)
    metadata = body.get("metadata") or [""] * len(ask.documents)
    if len(metadata) != len(ask.documents):
        raise Invalid("metadata must have the same length as documents")
    joined = [f"{text} {about}" for text, about in zip(ask.documents, metadata, strict=True)]
    return Ask(ask.query, joined, ask.instruction, ask.model)


def lanerank(body: dict) -> Ask:
    documents = [
        item if isinstance(item, str) else f"{item.get('attributes', '')} {item['text']}"
        for item in need(body, "documents", list)
    ]
    return Ask(need(body, "query", str), documents, body.get("instruction") or "")


def results(key: str = "results", **more: object) -> Callable[[list[float], Ask], object]:
    def answer(scores: list[float], ask: Ask) -> object:
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
        found = [{"index": i, "relevance_score": scores[i]} for i in ranked]
        return {key: found, "model": ask.model, **more}

    return answer


def vllm_answer(scores: list[float], ask: Ask) -> object:
    answer = results(id="rerank-1", usage={"prompt_tokens": 9, "total_tokens": 9})(scores, ask)
    for result in answer["results"]:
        result["document"] = {"text": ask.documents[result["index"]], "multi_modal": None}
    return answer


def sglang_answer(scores: list[float], ask: Ask) -> object:
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [
        {"score": scores[i], "document": None, "index": i, "meta_info": {"id": "1"}} for i in ranked
    ]


def tei_answer(scores: list[float], ask: Ask) -> object:
    return [{"index": i, "score": s} for i, s in sorted(enumerate(scores), key=lambda p: -p[1])]


def openai_error(status: int, message: str) -> object:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@dataclass(frozen=True)
class Shape:
    """How one service asks and answers."""

    path: str
    understand: Callable[[dict], Ask]
    answer: Callable[[list[float], Ask], object]
    error: Callable[[int, str], object]
    invalid: int = 400
    """The status of a request that is not usable."""


SHAPES = {
    "vllm": Shape("/v1/rerank", flat("instruction"), vllm_answer, openai_error),
    "sglang": Shape(
        "/v1/rerank",
        flat("instruct"),
        sglang_answer,
        lambda status, text: {"object": "error", "message": text, "type": "x", "code": status},
    ),
    "llama.cpp": Shape(
        "/v1/rerank",
        flat("instruction"),
        results(object="list", usage={"prompt_tokens": 9, "total_tokens": 9}),
        lambda status, text: {"error": {"code": status, "message": text, "type": "x"}},
    ),
    "tei": Shape(
        "/rerank",
        tei,
        tei_answer,
        lambda status, text: {"error": text, "error_type": "Validation"},
        invalid=413,
    ),
    "infinity": Shape(
        "/rerank", flat(), results(object="rerank", id="x", created=1), openai_error, invalid=422
    ),
    "cohere": Shape(
        "/v2/rerank",
        flat(),
        results(id="x", meta={"api_version": {"version": "2"}}),
        lambda _, text: {"id": "x", "message": text},
    ),
    "voyage": Shape(
        "/v1/rerank",
        voyage,
        results("data", object="list", usage={"total_tokens": 9}),
        lambda _, text: {"detail": text},
    ),
    "jina": Shape(
        "/v1/rerank",
        flat(),
        results(usage={"total_tokens": 9}),
        lambda _, text: {"detail": text},
        invalid=422,
    ),
    "zeroentropy": Shape(
        "/v1/models/rerank",
        tags,
        results(total_bytes=9, total_tokens=9, actual_latency_mode="fast"),
        lambda _, text: {"detail": text},
    ),
    "contextual": Shape(
        "/v1/rerank", contextual, results(), lambda _, text: {"detail": [{"msg": text}]}, 422
    ),
    "dashscope": Shape(
        "/compatible-api/v1/reranks",
        flat("instruct"),
        results(object="list", id="x", usage={"total_tokens": 9}),
        lambda status, text: {"error": {"message": text, "code": str(status)}, "request_id": "x"},
    ),
    "lanerank": Shape(
        "/v1/rerank",
        lanerank,
        results(id="x", meta={"instruction": None, "truncated": [0]}),
        lambda _, text: {"error": {"type": "InputError", "message": text, "param": None}},
        invalid=422,
    ),
}


@dataclass
class Seen:
    """One request that arrived."""

    path: str
    headers: dict[str, str]
    body: dict


@dataclass
class RerankServer:
    """A server in threads of its own. Steps of `script` apply to one request each, in turn."""

    service: str
    reads_instruction: bool = True
    key: str | None = None
    scores: Callable[[str, str, str], float] = overlap
    script: list[Callable[[Handler, object], None]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    """How many were ever opened."""
    open: int = 0
    under_way: int = 0
    most: int = 0
    """How many requests were under way at the same time."""
    released: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.shape = SHAPES[self.service]

    def __enter__(self) -> RerankServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.rerank = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something that requests change is so; a minute is a hang."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout=60)

    def answer(self, body: dict, token: str | None) -> tuple[int, object]:
        if self.key is not None and token != f"Bearer {self.key}":
            return 401, self.shape.error(401, "invalid api token")
        try:
            ask = self.shape.understand(body)
        except Invalid as error:
            return self.shape.invalid, self.shape.error(self.shape.invalid, str(error))
        return 200, self.shape.answer([self.score(ask, text) for text in ask.documents], ask)

    def score(self, ask: Ask, document: str) -> float:
        query, instruction = ask.query, ask.instruction
        if self.service == "infinity":
            query, document = query.strip(), document.strip()
        if self.service in ("tei", "infinity"):
            # The servers put the two next to each other; a model knows its own prompt.
            prompt = TURNS.fullmatch(query + document) or JUDGE.fullmatch(query + document)
            if prompt is not None:
                query, document = prompt["query"], prompt["document"]
                instruction = prompt["instruction"] or ""
        return self.scores(query, instruction if self.reads_instruction else "", document)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; keeps it open as real servers do."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.owner: RerankServer = self.server.rerank
        with self.owner.changed:
            self.owner.connections += 1
            self.owner.open += 1
            self.owner.changed.notify_all()

    def finish(self) -> None:
        super().finish()
        with self.owner.changed:
            self.owner.open -= 1
            self.owner.changed.notify_all()

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        self.counted = 1
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.owner.changed:
            self.owner.seen.append(Seen(self.path, headers, body))
            step = self.owner.script.pop(0) if self.owner.script else None
            self.owner.under_way += 1
            self.owner.most = max(self.owner.most, self.owner.under_way)
            self.owner.changed.notify_all()
        try:
            self.respond(body, headers, step)
        finally:
            self.ended()

    def ended(self) -> None:
        """Count a request as over, at the latest before its answer goes out."""
        with self.owner.changed:
            self.owner.under_way -= self.counted
            self.counted = 0

    def respond(self, body: dict, headers: dict[str, str], step: object) -> None:
        if self.path != self.owner.shape.path:
            self.send(404, {"detail": "Not Found"})
            return
        status, answer = self.owner.answer(body, headers.get("authorization"))
        if step is None:
            self.send(status, answer)
        else:
            step(self, answer)

    def send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        self.ended()
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


# Steps of a script


def fail(status: int, **headers: str) -> Callable[[Handler, object], None]:
    """An error in the words of the service."""

    def step(handler: Handler, _: object) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.send(status, handler.owner.shape.error(status, "something is wrong"), named)

    return step


def say(content: bytes, status: int = 200, **headers: str) -> Callable[[Handler, object], None]:
    """These bytes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.send(status, content, named)


def change(edit: Callable[[object], object]) -> Callable[[Handler, object], None]:
    """The right answer after an edit."""
    return lambda handler, answer: handler.send(200, edit(answer))


def cut(handler: Handler, answer: object) -> None:
    """Half of the right answer, then the end of the connection."""
    content = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def hang(handler: Handler, answer: object) -> None:
    """Nothing until the server is released."""
    handler.owner.released.wait(60)
    handler.close_connection = True


def drip(handler: Handler, answer: object) -> None:
    """An answer of which a byte comes now and then, and never the last one."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.owner.released.wait(0.01):
        handler.wfile.write(b"1\r\n \r\n")


def flood(handler: Handler, answer: object) -> None:
    """An answer without an end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.owner.released.is_set():
        handler.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def until_gone(handler: Handler, answer: object) -> None:
    """Wait for the client to go away."""
    handler.connection.recv(1)
    handler.close_connection = True
