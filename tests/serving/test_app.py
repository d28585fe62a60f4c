"""The HTTP interface, over scorers that answer at once: what it takes, refuses and reports."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import Document, Instruction, Reranker
from lanerank.contracts import RerankRequest, Scores
from lanerank.errors import InputError, InstructionNotSupportedError, ScorerError
from lanerank.serving.app import create_app
from lanerank.serving.guard import Refusal
from lanerank.serving.schemas import ScoreBody
from lanerank.serving.settings import ServerSettings
from lanerank.testing import OverlapScorer, ScriptedScorer

ROUTES = ("/v1/rerank", "/v2/rerank", "/score")
FISH = ["red fish", "blue fish", "green fish"]
ASKED = {"query": "fish", "documents": FISH}
TOKEN = "s3cr3t-0f-the-server"


def call(app, method: str, path: str, **options) -> httpx.Response:
    """One request to the application; a defect of it is an answer here as on the network."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def post(app, path: str, body: object, **options) -> httpx.Response:
    return call(app, "POST", path, json=body, **options)


def raw(app, body: bytes, path: str = "/score") -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return call(app, "POST", path, content=body, headers=headers)


def problem(answer: httpx.Response) -> dict[str, object]:
    """The error of an answer, in the one shape that it may have."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "param"}
    return body["error"]


@dataclass
class Watching:
    """Scores by overlap, and keeps what it was asked."""

    name: str = "watching"
    supports_instructions: bool = True
    requests: list[RerankRequest] = field(default_factory=list)

    async def ascore(self, request: RerankRequest) -> Scores:
        self.requests.append(request)
        return OverlapScorer().score(request)

    def score(self, request: RerankRequest) -> Scores:
        raise AssertionError("a scorer that can be awaited is awaited")


@dataclass(frozen=True)
class Failing:
    """Raises what it is told to."""

    error: Exception
    name: str = "failing"
    supports_instructions: bool = True

    def score(self, request: RerankRequest) -> Scores:
        raise self.error


@pytest.fixture(scope="module")
def app():
    return create_app(OverlapScorer())


# What it answers


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(path, app) -> None:
    answer = post(app, path, {**ASKED, "instruction": "blue"})
    assert answer.status_code == 200
    ranking = Reranker(OverlapScorer()).rank("fish", FISH, instruction="blue")
    body = answer.json()
    assert body.pop("id")
    assert body == {
        "model": "overlap",
        "results": [{"index": each.index, "relevance_score": each.score} for each in ranking],
        "meta": {
            "instruction": {"fingerprint": Instruction("blue").fingerprint, "applied": "lane"},
            "truncated": [],
        },
    }
    assert [each["index"] for each in body["results"]] == [1, 0, 2]


def test_scores_come_back_in_the_order_of_the_request(app) -> None:
    answer = post(app, "/score", {**ASKED, "instruction": "blue"})
    values = Reranker(OverlapScorer()).score("fish", FISH, instruction="blue")
    assert answer.json() == {"model": "overlap", "scores": values, "truncated": [False] * 3}


def test_two_answers_have_different_ids(app) -> None:
    assert len({post(app, "/v1/rerank", ASKED).json()["id"] for _ in range(2)}) == 2


def test_the_best_are_kept_and_returned_as_they_were_given(app) -> None:
    given = {"text": "blue fish", "id": "b", "metadata": {"a": [1, None, {"x": 2.5}], "n": "\0"}}
    body = {
        "query": "fish",
        "documents": ["red fish", given],
        "instruction": "blue",
        "top_n": 1,
        "return_documents": True,
    }
    [result] = post(app, "/v2/rerank", body).json()["results"]
    assert result == {"index": 1, "relevance_score": 1.0, "document": given}


def test_a_text_comes_back_as_a_document(app) -> None:
    body = {"query": "fish", "documents": ["red fish"], "return_documents": True}
    [result] = post(app, "/v2/rerank", body).json()["results"]
    assert result["document"] == {"text": "red fish"}


def test_no_documents_give_an_empty_answer(app) -> None:
    assert post(app, "/v1/rerank", {"query": "x", "documents": []}).json()["results"] == []
    assert post(app, "/score", {"query": "x", "documents": []}).json()["scores"] == []


@pytest.mark.parametrize("instruction", [None, "", "  "])
def test_a_blank_instruction_is_none(instruction, app) -> None:
    body = post(app, "/v1/rerank", {**ASKED, "instruction": instruction}).json()
    assert body["meta"]["instruction"] is None


def test_the_model_gets_what_the_core_would_give_it() -> None:
    scorer, direct = Watching(), Watching()
    documents = [
        {"text": "a", "metadata": {"date": "2026-08-01", "secret": "x"}},
        {"text": "b", "metadata": {"date": None}},
        "c",
    ]
    asked = {
        "query": "q",
        "documents": documents,
        "instruction": "Prefer new ones.",
        "attributes": ["date"],
        "today": "2026-11-26",
        "long_documents": "max_window",
    }
    assert post(create_app(scorer), "/v1/rerank", asked).status_code == 200
    asyncio.run(
        Reranker(direct).arank(
            "q",
            documents,
            instruction=Instruction("Prefer new ones.", today="2026-11-26"),
            attributes=("date",),
            long_documents="max_window",
        )
    )
    assert scorer.requests == direct.requests
    assert scorer.requests[0].candidates[0].attributes == "date: 2026-08-01 (3 months old)"


def test_attributes_that_come_rendered_reach_the_model_as_they_are() -> None:
    scorer = Watching()
    documents = [
        {"text": "a", "attributes": "x: 1; y: 2", "metadata": {"date": "2026"}},
        {"text": "b", "metadata": {"date": "2025"}},
        {"text": "c", "attributes": ""},
    ]
    body = {"query": "q", "documents": documents, "attributes": ["date"]}
    assert post(create_app(scorer), "/score", body).status_code == 200
    [asked] = scorer.requests
    assert [each.attributes for each in asked.candidates] == ["x: 1; y: 2", "date: 2025", ""]
    assert [each.text for each in asked.candidates] == ["a", "b", "c"]


def test_attributes_that_come_rendered_empty_hide_the_metadata_beside_any_document() -> None:
    scorer = Watching()
    hidden = {"text": "a", "attributes": "", "metadata": {"date": "2026"}}
    for documents in ([hidden], [hidden, {"text": "b", "attributes": "x: 1"}]):
        body = {"query": "q", "documents": documents, "attributes": ["date"]}
        assert post(create_app(scorer), "/score", body).status_code == 200
    assert [asked.candidates[0].attributes for asked in scorer.requests] == ["", ""]


def test_metadata_is_never_an_instruction(app) -> None:
    keys = ("instruction", "rerank_instruction", "metadata")
    documents = ["blue fish", {"text": "grey fish", "metadata": dict.fromkeys(keys, "grey")}]
    body = post(app, "/v1/rerank", {"query": "fish", "documents": documents}).json()
    assert [each["index"] for each in body["results"]] == [0, 1]
    assert body["meta"]["instruction"] is None


@dataclass(frozen=True)
class Cutting:
    """Says which documents it did not read whole."""

    name: str = "cutting"
    supports_instructions: bool = True

    def score(self, request: RerankRequest) -> Scores:
        texts = [candidate.text for candidate in request.candidates]
        return Scores(
            tuple(1 / len(text) for text in texts), tuple(len(text) > 3 for text in texts)
        )


def test_documents_that_were_cut_are_named() -> None:
    app = create_app(Cutting())
    body = {"query": "q", "documents": ["long one", "abc", "longer one", "ab"]}
    assert post(app, "/score", body).json()["truncated"] == [True, False, True, False]
    assert post(app, "/v1/rerank", body).json()["meta"]["truncated"] == [0, 2]
    assert post(app, "/v1/rerank", {**body, "top_n": 3}).json()["meta"]["truncated"] == [0]


def test_a_score_that_is_no_number_is_null_and_last() -> None:
    texts = {"a": math.nan, "b": 0.5, "c": math.inf}
    app = create_app(ScriptedScorer(texts))
    body = {"query": "q", "documents": list(texts)}
    answer = post(app, "/v1/rerank", body)
    results = [(each["index"], each["relevance_score"]) for each in answer.json()["results"]]
    assert results == [(1, 0.5), (0, None), (2, None)]
    assert post(app, "/score", body).json()["scores"] == [None, 0.5, None]


@pytest.mark.parametrize("on_unsupported", ["prepend", "ignore"])
def test_an_answer_says_what_became_of_an_instruction(on_unsupported) -> None:
    scorer = OverlapScorer(supports_instructions=False)
    app = create_app(scorer, ServerSettings(on_unsupported=on_unsupported))
    meta = post(app, "/v1/rerank", {**ASKED, "instruction": "blue"}).json()["meta"]
    applied = {"prepend": "prepended", "ignore": "ignored"}[on_unsupported]
    assert meta["instruction"]["applied"] == applied


def test_health_tells_the_model(app) -> None:
    body = call(app, "GET", "/health").json()
    assert body["status"] == "ok"
    assert body["model"] == "overlap"
    assert body["version"]


# What it refuses


NOT_JSON = {
    "nothing": b"",
    "half": b'{"query": "x", "documents": [',
    "NaN": b'{"query": "x", "documents": [{"text": "a", "metadata": {"a": NaN}}]}',
    "infinity": b'{"query": "x", "documents": [], "top_n": -Infinity}',
    "bytes that are not UTF-8": b'{"query": "\xff\xfe", "documents": []}',
    "a lone surrogate": b'{"query": "\\ud800", "documents": []}',
    "a raw NUL": b'{"query": "a\0b", "documents": []}',
    "NUL bytes": b"\0" * 100,
    "depth": b'{"query": "x", "documents": [{"text": "a", "metadata": {"a": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}}]}",
    "a number of 5000 digits": b'{"query": "x", "documents": [], "top_n": ' + b"9" * 5000 + b"}",
    "two values": b'{"query": "x", "documents": []} {}',
    "a byte order mark": b'\xef\xbb\xbf{"query": "x", "documents": []}',
}


@pytest.mark.parametrize("name", NOT_JSON)
@pytest.mark.parametrize("path", ROUTES)
def test_what_is_not_json_is_refused_with_the_place(name, path, app) -> None:
    answer = raw(app, NOT_JSON[name], path)
    assert answer.status_code in (400, 422)
    assert problem(answer)["message"]
    if name != "nothing":
        assert problem(answer)["type"] == "invalid_json"
        assert "column" in str(problem(answer)["message"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"query": 1}, "query"),
        ({"query": None}, "query"),
        ({"query": ["x"]}, "query"),
        ({"documents": "red fish"}, "documents"),
        ({"documents": None}, "documents"),
        ({"documents": {"text": "a"}}, "documents"),
        ({"documents": ["a", 3]}, "documents.1"),
        ({"documents": ["a", None]}, "documents.1"),
        ({"documents": [{"txt": "a"}]}, "documents.0.text"),
        ({"documents": [{"text": 1}]}, "documents.0.text"),
        ({"documents": [{"text": "a", "metadata": []}]}, "documents.0.metadata"),
        ({"documents": [{"text": "a", "id": 1}]}, "documents.0.id"),
        ({"documents": [{"text": "a", "attributes": {"x": 1}}]}, "documents.0.attributes"),
        ({"documents": [{"text": "a", "other": 1}]}, "documents.0.other"),
        ({"instruction": ["blue"]}, "instruction"),
        ({"instruction": {"text": "blue"}}, "instruction"),
        ({"attributes": "date"}, "attributes"),
        ({"attributes": [1]}, "attributes.0"),
        ({"today": "yesterday"}, "today"),
        ({"today": 20260101}, "today"),
        ({"today": "2026-01-01T00:00:00"}, "today"),
        ({"long_documents": "cut"}, "long_documents"),
        ({"model": 1}, "model"),
        ({"top_k": 1}, "top_k"),
        ({"": 1}, None),
    ],
)
@pytest.mark.parametrize("path", ROUTES)
def test_a_field_of_the_wrong_type_is_named(change, param, path, app) -> None:
    answer = post(app, path, {**ASKED, **change})
    assert answer.status_code == 422
    assert problem(answer)["type"] == "invalid_request"
    assert problem(answer)["param"] == param


@pytest.mark.parametrize("top_n", [0, -1, 1.0, "1", True, [1]])
def test_top_n_is_a_number_of_documents(top_n, app) -> None:
    answer = post(app, "/v1/rerank", {**ASKED, "top_n": top_n})
    assert answer.status_code == 422
    assert problem(answer)["param"] == "top_n"


def test_a_very_large_top_n_keeps_all(app) -> None:
    body = json.dumps(ASKED)[:-1].encode() + b', "top_n": ' + b"9" * 4000 + b"}"
    assert len(raw(app, body, "/v1/rerank").json()["results"]) == 3


def test_a_number_too_large_for_a_float_is_refused(app) -> None:
    body = b'{"query": "x", "documents": [{"text": "a", "metadata": {"a": {"b": [1, 1e999]}}}]}'
    answer = raw(app, body)
    assert answer.status_code == 422
    assert problem(answer)["param"] == "documents.0.metadata"
    assert "too large" in str(problem(answer)["message"])


def test_checking_metadata_takes_no_step_for_each_value() -> None:
    """One body can hold millions of values, and all other requests wait meanwhile."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    body = {"query": "q", "documents": [{"text": "a", "metadata": {"x": [[1.5] * 100] * 100}}]}
    sys.setprofile(count)
    try:
        ScoreBody.model_validate(body)
    finally:
        sys.setprofile(None)
    assert calls < 100


def test_a_whole_number_of_any_size_is_metadata(app) -> None:
    number = "9" * 4000
    body = (
        '{"query": "x", "documents": [{"text": "a", "metadata": {"a": %s}}], "attributes": ["a"], '
        '"return_documents": true}'
    )
    answer = raw(app, (body % number).encode(), "/v1/rerank")
    assert answer.status_code == 200
    assert number in answer.text


def test_only_the_first_problems_are_told(app) -> None:
    answer = post(app, "/score", {"query": "x", "documents": [1] * 500})
    message = str(problem(answer)["message"])
    assert message.count("documents.") == 3
    assert message.endswith("; and 497 more")


def test_names_that_a_caller_made_up_are_cut(app) -> None:
    answer = post(app, "/score", {**ASKED, "x" * 10_000: 1})
    assert answer.status_code == 422
    assert len(answer.content) < 1000


@pytest.mark.parametrize("query", ["", " ", "\n\t"])
def test_a_blank_query_is_refused(query, app) -> None:
    answer = post(app, "/v1/rerank", {**ASKED, "query": query})
    assert answer.status_code == 400
    assert problem(answer)["type"] == "invalid_input"
    assert problem(answer)["param"] == "query"


def test_an_instruction_that_is_too_long_for_any_lane_is_refused(app) -> None:
    answer = post(app, "/v1/rerank", {**ASKED, "instruction": "blue " * 10_000})
    assert answer.status_code == 400
    assert problem(answer)["type"] == "invalid_instruction"
    assert problem(answer)["param"] == "instruction"


def test_an_instruction_that_the_model_has_no_channel_for_is_refused() -> None:
    app = create_app(OverlapScorer(supports_instructions=False))
    answer = post(app, "/v1/rerank", {**ASKED, "instruction": "blue"})
    assert answer.status_code == 400
    assert problem(answer)["type"] == "instruction_not_supported"
    assert problem(answer)["param"] == "instruction"
    assert post(app, "/v1/rerank", ASKED).status_code == 200


def test_another_models_name_is_refused(app) -> None:
    assert post(app, "/score", {**ASKED, "model": "overlap"}).status_code == 200
    answer = post(app, "/score", {**ASKED, "model": "rerank-v3.5"})
    assert answer.status_code == 400
    assert problem(answer)["type"] == "model_not_found"
    assert problem(answer)["param"] == "model"


def test_too_many_documents_are_refused() -> None:
    app = create_app(OverlapScorer(), ServerSettings(max_documents=2))
    assert post(app, "/score", {"query": "x", "documents": ["a"] * 2}).status_code == 200
    answer = post(app, "/score", {"query": "x", "documents": ["a"] * 3})
    assert answer.status_code == 413
    assert problem(answer)["type"] == "too_many_documents"
    assert problem(answer)["param"] == "documents"


@pytest.mark.parametrize(
    "body",
    [
        {"query": "x", "documents": [1] * 1_000_000},
        {"query": "x", "documents": [""] * 1_000_000},
        {"query": "x", "documents": [{"text": "a", **{f"x{n}": 1 for n in range(300_000)}}]},
        {**ASKED, **{f"x{n}": 1 for n in range(300_000)}},
        {**ASKED, "attributes": [1] * 1_000_000},
        {**ASKED, "attributes": ["a"] * 1_000_000},
    ],
    ids=["bad", "empty", "unknown in one", "unknown", "bad names", "names"],
)
def test_what_is_short_to_say_and_long_to_check_is_refused_at_once(body, app) -> None:
    tracemalloc.start()
    try:
        answer = post(app, "/score", body)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code in (413, 422)
    assert len(answer.content) < 1000
    # The text itself and what Python makes of it; a check for each entry would take a gigabyte.
    assert held < 100_000_000


def test_a_body_declared_too_large_is_refused_unread() -> None:
    app = create_app(OverlapScorer(), ServerSettings(max_bytes=100))
    sent = send(app, [b"x" * 50] * 10, headers=[(b"content-length", b"500")])
    assert sent.status == 413
    assert sent.read == 0


def test_a_body_without_a_length_is_read_to_the_limit_and_no_further() -> None:
    app = create_app(OverlapScorer(), ServerSettings(max_bytes=100))
    sent = send(app, [b"x" * 40] * 1000)
    assert sent.status == 413
    assert sent.read == 3
    assert json.loads(sent.body)["error"]["type"] == "too_large"


def test_a_body_at_the_limit_is_read(app) -> None:
    body = json.dumps(ASKED).encode()
    at, below = (
        create_app(OverlapScorer(), ServerSettings(max_bytes=len(body) - less)) for less in (0, 1)
    )
    assert raw(at, body).status_code == 200
    assert raw(below, body).status_code == 413


@dataclass
class Sent:
    """What became of a request that was sent piece by piece."""

    read: int = 0
    status: int = 0
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


def send(app, pieces: list[bytes], headers: list[tuple[bytes, bytes]] | None = None) -> Sent:
    """Send a body in pieces, and see how many of them the application takes."""
    sent = Sent()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/score",
        "raw_path": b"/score",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *(headers or [])],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def receive() -> dict[str, object]:
        piece = pieces[sent.read]
        sent.read += 1
        return {"type": "http.request", "body": piece, "more_body": sent.read < len(pieces)}

    async def answer(message) -> None:
        if message["type"] == "http.response.start":
            sent.status, sent.headers = message["status"], dict(message["headers"])
        else:
            sent.body += message.get("body", b"")

    asyncio.run(app(scope, receive, answer))
    return sent


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_called_json_is_refused(kind, app) -> None:
    answer = call(app, "POST", "/score", content=json.dumps(ASKED), headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert problem(answer)["type"] == "unsupported_media_type"


def test_other_paths_and_methods_are_refused_in_the_same_shape(app) -> None:
    assert problem(call(app, "GET", "/rerank"))["type"] == "not_found"
    answer = call(app, "DELETE", "/score")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert problem(answer)["type"] == "method_not_allowed"
    for path in ("/docs", "/redoc"):
        assert call(app, "GET", path).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "query",
                    "documents",
                    "text",
                    "metadata",
                    "attributes",
                    "instruction",
                    "today",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(body=JSON, path=st.sampled_from(ROUTES))
def test_no_json_makes_the_server_fail(body, path, app) -> None:
    answer = raw(app, json.dumps(body).encode(), path)
    assert answer.status_code in (200, 400, 422)
    if answer.status_code != 200:
        assert problem(answer)["message"]


@given(body=st.binary(max_size=200), path=st.sampled_from(ROUTES))
def test_no_bytes_make_the_server_fail(body, path, app) -> None:
    assert raw(app, body, path).status_code in (200, 400, 422)


@given(data=st.data())
def test_any_text_is_ranked_and_comes_back(data, app, troublesome_text) -> None:
    # JSON that is UTF-8 has no lone surrogates.
    writable = troublesome_text.map(lambda text: text.encode("utf-8", "ignore").decode())
    texts = data.draw(st.lists(writable, min_size=1, max_size=4))
    query = data.draw(writable.filter(str.strip))
    instruction = data.draw(writable)
    body = {"query": query, "documents": texts, "instruction": instruction}
    answer = post(app, "/v1/rerank", {**body, "return_documents": True})
    assert answer.status_code == 200, answer.text
    returned = {each["index"]: each["document"]["text"] for each in answer.json()["results"]}
    assert returned == dict(enumerate(texts))


# Tokens


@pytest.fixture
def private(monkeypatch):
    monkeypatch.setenv("RANKER_TOKEN", TOKEN)
    return create_app(OverlapScorer(), ServerSettings(token_env="RANKER_TOKEN"))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer x {TOKEN}",
    ],
)
@pytest.mark.parametrize("path", [*ROUTES, "/metrics"])
def test_without_the_token_there_is_no_answer(header, path, private) -> None:
    headers = {} if header is None else {"Authorization": header}
    method = "GET" if path == "/metrics" else "POST"
    answer = call(private, method, path, content=b"not even JSON", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert problem(answer)["type"] == "unauthorized"
    assert TOKEN not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_token_there_is(scheme, private) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    assert post(private, "/v1/rerank", ASKED, headers=headers).status_code == 200
    assert call(private, "GET", "/metrics", headers=headers).status_code == 200


def test_without_the_token_no_byte_is_read(private) -> None:
    sent = send(private, [b"x"] * 10)
    assert (sent.status, sent.read) == (401, 0)


def test_health_and_the_description_are_open(private) -> None:
    assert call(private, "GET", "/health").status_code == 200
    description = call(private, "GET", "/openapi.json")
    assert description.status_code == 200
    schemes = description.json()["components"]["securitySchemes"]
    assert [scheme["scheme"] for scheme in schemes.values()] == ["bearer"]


def test_no_answer_and_no_record_holds_the_token(private, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for path, body in (("/score", ASKED), ("/score", {}), ("/nowhere", {}), ("/score", [TOKEN])):
        assert TOKEN not in post(private, path, body, headers=headers).text
    assert TOKEN not in caplog.text
    assert TOKEN not in call(private, "GET", "/openapi.json").text


# Failures


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (
            InputError("`query` is longer than the 510 tokens this model reads"),
            400,
            "invalid_input",
        ),
        (InstructionNotSupportedError("no channel"), 400, "instruction_not_supported"),
        (ScorerError("gave 2 scores for 3 documents"), 500, "model_error"),
        (RuntimeError("CUDA error"), 500, "internal_error"),
        (RecursionError(), 500, "internal_error"),
        (Refusal.busy(), 429, "overloaded"),
        (Refusal.unavailable("the process of the model has ended"), 503, "unavailable"),
        (TimeoutError(), 503, "unavailable"),
    ],
)
def test_what_a_scorer_raises_becomes_an_answer(error, status, kind) -> None:
    answer = post(create_app(Failing(error)), "/v1/rerank", ASKED)
    assert answer.status_code == status
    assert problem(answer)["type"] == kind
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert "Traceback" not in answer.text


def test_a_failure_tells_callers_nothing_and_the_log_no_text(caplog) -> None:
    caplog.set_level(logging.INFO)
    secret = "the words of a document"
    answer = post(create_app(Failing(ValueError(secret))), "/v1/rerank", ASKED)
    assert answer.status_code == 500
    assert secret not in answer.text
    assert secret not in caplog.text
    assert "ValueError while answering /v1/rerank" in caplog.text
    assert "test_app.py" in caplog.text


def test_documents_are_not_logged(app, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    for body in (ASKED, {**ASKED, "documents": [*FISH, 1]}, {**ASKED, "query": " "}):
        post(app, "/score", body)
    assert "red fish" not in caplog.text


class Slow:
    """Never answers, and notes that it was given up."""

    name = "slow"
    supports_instructions = True
    given_up = False

    def score(self, request: RerankRequest) -> Scores:
        raise AssertionError

    async def ascore(self, request: RerankRequest) -> Scores:
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up = True
        raise AssertionError


def test_a_model_that_does_not_answer_in_time_is_given_up() -> None:
    scorer = Slow()
    answer = post(create_app(scorer, ServerSettings(timeout_s=0.05)), "/score", ASKED)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert scorer.given_up


def test_a_body_that_does_not_end_is_given_up() -> None:
    app = create_app(OverlapScorer(), ServerSettings(timeout_s=0.05))

    async def trickle():
        yield b'{"query": '
        await asyncio.Event().wait()

    answer = call(
        app, "POST", "/score", content=trickle(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 503
    assert problem(answer)["type"] == "unavailable"


def test_a_ranking_that_was_not_scored_is_no_answer() -> None:
    @dataclass(frozen=True)
    class Degraded(OverlapScorer):
        def score(self, request: RerankRequest) -> Scores:
            return Scores((0.0,) * len(request.candidates), degraded="the service is down")

    answer = post(create_app(Degraded()), "/v1/rerank", ASKED)
    assert answer.status_code == 503


def test_a_token_that_is_not_set_stops_the_server_at_once(monkeypatch) -> None:
    monkeypatch.delenv("RANKER_TOKEN", raising=False)
    with pytest.raises(InputError, match="RANKER_TOKEN"):
        create_app(OverlapScorer(), ServerSettings(token_env="RANKER_TOKEN"))


# Counters


def sample(text: str, name: str) -> float | None:
    """The value of one line of Prometheus' text format."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else None


def test_requests_and_documents_are_counted() -> None:
    app = create_app(OverlapScorer())
    for _ in range(2):
        post(app, "/v1/rerank", ASKED)
    post(app, "/score", {})
    call(app, "GET", "/anything/else")
    answer = call(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = 'lanerank_http_requests_total{route="%s",status="%d"}'
    assert sample(answer.text, counted % ("/v1/rerank", 200)) == 2
    assert sample(answer.text, counted % ("/score", 422)) == 1
    assert sample(answer.text, counted % ("other", 404)) == 1
    assert sample(answer.text, 'lanerank_http_request_seconds_count{route="/v1/rerank"}') == 2
    assert sample(answer.text, "lanerank_documents_total") == 6
    # The one that asks is in progress itself.
    assert sample(answer.text, "lanerank_http_requests_in_progress") == 1


def test_two_servers_in_a_process_count_apart() -> None:
    first, second = (create_app(OverlapScorer()) for _ in range(2))
    post(first, "/score", ASKED)
    assert sample(call(second, "GET", "/metrics").text, "lanerank_documents_total") == 0


def test_paths_that_callers_make_up_do_not_become_labels() -> None:
    app = create_app(OverlapScorer())
    for number in range(20):
        call(app, "GET", f"/made/up/{number}")
    assert "made" not in call(app, "GET", "/metrics").text


# Documents as values


def test_what_is_sent_is_what_is_ranked() -> None:
    """A document on the wire is one of the core's, with its own metadata."""
    scorer = Watching()
    documents = [Document("a", metadata={"date": "2026-01-01"}, id="1")]
    body = {"query": "q", "documents": [document.model_dump() for document in documents]}
    assert post(create_app(scorer), "/v1/rerank", body).status_code == 200
