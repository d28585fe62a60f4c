"""The server on Ray, over real HTTP, as its clients have it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from ray import serve

from lanerank import Document, InputError, Instruction, ModelError, RemoteError, Reranker
from lanerank.contracts import Candidate, RerankRequest
from lanerank.distributed import rank_dataset
from lanerank.serving import build
from lanerank.serving.deployment import Model, ReplicatedScorer
from lanerank.serving.metrics import Metrics
from lanerank.serving.settings import ServerSettings

CLOSE = 1e-5
WORDS = "red blue green marine coach olympiad team shipping engineer candidate".split()
FISH = ["a red fish", "a blue fish and a coach", "green marine shipping", "an old olympiad"]
CONFIG = """
dtype: float32
token_env: RANKER_TOKEN
max_bytes: 200000
batching: {max_size: 16}
num_cpus: 0.5
"""


@dataclass(frozen=True)
class Server:
    """A server that runs, and what it said when it began."""

    url: str
    greeting: str
    headers: dict[str, str]

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=120)

    def count(self, name: str) -> float:
        """A value from `/metrics`."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        lines = (line.rpartition(" ") for line in text.splitlines())
        return float(next((value for label, _, value in lines if label == name), 0.0))


@pytest.fixture(scope="module")
def server(ray_address, token, tiny_model_folder, tmp_path_factory) -> Iterator[Server]:
    """`lanerank serve` with the small model, in a process of its own, ended as Ctrl-C does."""
    config = tmp_path_factory.mktemp("server") / "server.yaml"
    config.write_text(CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [
            *(Path(sys.executable).with_name("lanerank"), "serve", "--address", ray_address),
            *("--config", config, "--model", tiny_model_folder, "--port", str(port)),
        ],
        env={**os.environ, "RANKER_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "-d '" in line:
                break
        greeting = "".join(lines)
        assert process.poll() is None, greeting
        yield Server(f"http://127.0.0.1:{port}", greeting, {"Authorization": f"Bearer {token}"})
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()  # One that did not end would be waited for without end.


@pytest.fixture(scope="module")
def core(tiny_model_folder) -> Reranker:
    """The model of the server, in this process."""
    return Reranker.from_pretrained(tiny_model_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def remote(server, token) -> Iterator[Reranker]:
    """The server as a reranker."""
    reranker = Reranker.from_url(server.url, service="lanerank", api_key=token)
    yield reranker
    reranker.scorer.close()


# One client


def test_the_greeting_holds_a_request_that_works(server, token) -> None:
    assert f"Serving at {server.url}; Ctrl-C stops it." in server.greeting
    assert token not in server.greeting
    command = server.greeting[server.greeting.index("curl ") :]
    run = subprocess.run(
        ["bash", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
        env={**os.environ, "RANKER_TOKEN": token},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"results":[{"index":' in run.stdout


def test_health_is_open_and_all_else_asks_for_the_token(server) -> None:
    health = httpx.get(f"{server.url}/health").json()
    assert (health["status"], health["model"]) == ("ok", "tiny")
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    answer = httpx.post(f"{server.url}/v1/rerank", json={"query": "a", "documents": ["b"]})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "unauthorized"


@pytest.mark.parametrize("mode", ["truncate", "max_window"])
def test_scores_are_those_of_the_core(mode, server, core) -> None:
    documents = [
        {"text": "a red fish", "metadata": {"date": "2025-01-15", "secret": "blue"}},
        {"text": "marine " * 200, "metadata": {"date": "2026-01-15"}},
        {"text": "a coach"},
    ]
    asked = {
        "query": "red fish",
        "instruction": "marine team only",
        "attributes": ["date"],
        "today": "2026-11-26",
        "long_documents": mode,
    }
    answer = server.post("/score", {**asked, "documents": documents}).json()
    instruction = Instruction("marine team only", today="2026-11-26")
    ranking = core.rank(
        "red fish",
        documents,
        instruction=instruction,
        attributes=("date",),
        long_documents=mode,
    )
    expected = {each.index: each.score for each in ranking}
    assert dict(enumerate(answer["scores"])) == pytest.approx(expected, abs=CLOSE)
    assert answer["truncated"] == [False, mode == "truncate", False]
    answer = server.post("/v2/rerank", {**asked, "documents": documents}).json()
    assert [each["index"] for each in answer["results"]] == [each.index for each in ranking]
    assert answer["meta"]["instruction"]["fingerprint"] == instruction.fingerprint


def test_a_reranker_over_the_network_ranks_as_one_in_the_process(remote, core) -> None:
    documents = [
        Document(text, metadata={"kind": word}) for text, word in zip(FISH, WORDS, strict=False)
    ]
    options = {"instruction": "marine team only", "attributes": ("kind",)}
    there, here = (each.rank("red fish", documents, **options) for each in (remote, core))
    assert [each.index for each in there] == [each.index for each in here]
    assert [each.score for each in there] == pytest.approx([each.score for each in here], abs=CLOSE)


def test_bad_input_is_the_callers_mistake(server, remote) -> None:
    answer = server.post("/v1/rerank", {"query": "fish " * 500, "documents": ["a"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "query"
    assert "longer than the 126 tokens" in answer.json()["error"]["message"]
    with pytest.raises(RemoteError, match="longer than the 126 tokens"):
        remote.rank("fish " * 500, ["a"])


def test_a_body_that_is_too_large_is_refused_whether_declared_or_not(server) -> None:
    headers = {**server.headers, "Content-Type": "application/json"}
    declared = b"x" * 300_000

    def trickled() -> Iterator[bytes]:
        for _ in range(300):
            yield b"x" * 1000

    for content in (declared, trickled()):
        answer = httpx.post(f"{server.url}/score", content=content, headers=headers, timeout=60)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "too_large"


# Many clients


def test_two_thousand_requests_of_64_clients_each_get_their_own_answer(server, core) -> None:
    """Nothing is lost, and no client's instruction shows in the scores of another."""
    clients = 64
    rules = [f"{WORDS[n % 10]} {WORDS[n // 10]} only" for n in range(clients - 1)] + [None]
    bodies = [
        {"query": f"{WORDS[n % 7]} fish", "documents": FISH[: 1 + n % 4], "instruction": rule}
        for n, rule in enumerate(rules)
    ]
    expected = [
        core.score(body["query"], body["documents"], instruction=body["instruction"])
        for body in bodies
    ]
    apart = {round(scores[0], 4) for scores in expected}
    assert len(apart) > clients // 2, "the clients' scores have to tell the clients apart"
    before = {
        name: server.count(name)
        for name in (
            'lanerank_http_requests_total{route="/score",status="200"}',
            "lanerank_documents_total",
            "lanerank_batch_requests_sum",
            "lanerank_batch_requests_count",
        )
    }

    async def ask(client: httpx.AsyncClient, number: int, share: int) -> list[list[float]]:
        answers = []
        for _ in range(share):
            answer = await client.post("/score", json=bodies[number])
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["scores"])
        return answers

    async def ask_all() -> list[list[list[float]]]:
        shares = [2000 // clients + (number < 2000 % clients) for number in range(clients)]
        async with httpx.AsyncClient(
            base_url=server.url,
            headers=server.headers,
            timeout=120,
            limits=httpx.Limits(max_connections=clients),
        ) as client:
            return await asyncio.gather(*(ask(client, n, share) for n, share in enumerate(shares)))

    answers = asyncio.run(ask_all())
    assert sum(map(len, answers)) == 2000
    for number, given in enumerate(answers):
        for scores in given:
            assert scores == pytest.approx(expected[number], abs=CLOSE)
    requests, documents, in_batches, batches = (
        server.count(name) - value for name, value in before.items()
    )
    assert requests == in_batches == 2000
    assert documents == sum(
        len(body["documents"]) * len(given) for body, given in zip(bodies, answers, strict=True)
    )
    assert batches < requests, "requests of several clients share a batch"


def test_a_bad_request_fails_alone(server) -> None:
    good = {"query": "red fish", "documents": FISH, "instruction": "marine team only"}
    bad = {**good, "query": "fish " * 500}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=server.url, headers=server.headers, timeout=60
        ) as client:
            return await asyncio.gather(
                *(client.post("/score", json=bad if n % 3 == 0 else good) for n in range(60))
            )

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [400, 200, 200] * 20
    values = [answer.json()["scores"] for answer in answers if answer.status_code == 200]
    assert all(each == pytest.approx(values[0], abs=CLOSE) for each in values)


USERS = ("red blue only", "green olympiad only")


def own_orders(core: Reranker) -> dict[str, list[str]]:
    """What each user should get, best first."""
    orders = {
        rule: [each.document.text for each in core.rank("red fish", FISH, instruction=rule)]
        for rule in USERS
    }
    assert orders[USERS[0]] != orders[USERS[1]]
    return orders


def test_two_users_of_langchain_get_their_own_orders(remote, core) -> None:
    plugin = pytest.importorskip("langchain_lanerank")
    from langchain_core.documents import Document as LangChainDocument

    compressor = plugin.LanerankRerank(model=remote, top_n=None)
    documents = [LangChainDocument(page_content=text) for text in FISH]

    async def use() -> list[list[str]]:
        found = await asyncio.gather(
            *(
                compressor.acompress_documents(documents, "red fish", instruction=rule)
                for rule in USERS * 10
            )
        )
        return [[each.page_content for each in kept] for kept in found]

    orders = own_orders(core)
    assert asyncio.run(use()) == [orders[rule] for rule in USERS * 10]


def test_two_users_of_llamaindex_get_their_own_orders(remote, core) -> None:
    plugin = pytest.importorskip("llama_index.postprocessor.lanerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    postprocessor = plugin.LanerankRerank(model=remote, top_n=len(FISH))
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in FISH]

    async def use() -> list[list[str]]:
        found = await asyncio.gather(
            *(
                postprocessor.apostprocess_nodes(
                    nodes, plugin.InstructedQueryBundle("red fish", instruction=rule)
                )
                for rule in USERS * 10
            )
        )
        return [[each.node.text for each in kept] for kept in found]

    orders = own_orders(core)
    assert asyncio.run(use()) == [orders[rule] for rule in USERS * 10]


# Programs on the same Ray


def test_a_program_on_the_same_ray_needs_no_http(server, core) -> None:
    scorer = ReplicatedScorer(serve.get_deployment_handle("Model", "lanerank"), Metrics())
    asyncio.run(scorer.connect())
    there = Reranker(scorer).score("red fish", FISH, instruction=USERS[0])
    assert there == pytest.approx(core.score("red fish", FISH, instruction=USERS[0]), abs=CLOSE)
    with pytest.raises(InputError, match="longer than the 126 tokens"):
        Reranker(scorer).score("fish " * 500, FISH)


# An instruction that the model leaves out

APPLIED = {"Answer politely.": "neutral", "The user is vegan.": "lane"}


@pytest.fixture(scope="module")
def mini(server) -> Iterator[str]:
    """The address of the model in the package, as a second application of the same Serve."""
    serve.run(build({"num_cpus": "0.5"}), name="mini", route_prefix="/mini")
    yield f"{server.url}/mini"
    serve.delete("mini")


@pytest.mark.parametrize("instruction", APPLIED)
def test_the_answer_says_that_an_instruction_was_left_out(instruction, mini) -> None:
    body = {"query": "lunch ideas", "documents": FISH, "instruction": instruction}
    answer = httpx.post(f"{mini}/v1/rerank", json=body, timeout=120).json()
    assert answer["meta"]["instruction"]["applied"] == APPLIED[instruction]


@pytest.mark.parametrize("instruction", APPLIED)
def test_a_reranker_over_the_network_says_that_it_was_left_out(instruction, mini) -> None:
    async def awaited():
        async with reranker.scorer:
            return await reranker.arank("lunch ideas", FISH, instruction=instruction)

    with Reranker.from_url(mini, service="lanerank").scorer as scorer:
        reranker = Reranker(scorer)
        ranking = reranker.rank("lunch ideas", FISH, instruction=instruction)
        plain = reranker.rank("lunch ideas", FISH)
        again = asyncio.run(awaited())
    assert ranking.instruction_applied == again.instruction_applied == APPLIED[instruction]
    assert plain.instruction_applied is None
    same = [each.score for each in ranking] == [each.score for each in plain]
    assert same is (APPLIED[instruction] == "neutral")


def test_bulk_output_of_a_server_says_that_it_was_left_out(mini, tmp_path) -> None:
    rows = [{"query": "lunch ideas", "documents": FISH, "i": each} for each in (*APPLIED, None)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rank_dataset(source, tmp_path / "out", model=mini, instruction_column="i", concurrency=0)
    [part] = (tmp_path / "out").glob("part-*")
    found = [json.loads(line)["instruction_applied"] for line in part.read_text().splitlines()]
    assert found == [*APPLIED.values(), None]


# What goes wrong behind it


def model_processes() -> set[int]:
    """The processes of the model, by number."""
    return {
        each.pid
        # Of a process that ends meanwhile there is no command line.
        for each in psutil.process_iter(["cmdline"])
        if any("ServeReplica:lanerank:Model" in word for word in each.info["cmdline"] or ())
    }


def test_the_model_is_not_put_behind_other_programs(server) -> None:
    [process] = model_processes()
    assert psutil.Process(process).nice() == psutil.Process().nice()


def test_a_model_that_dies_is_replaced(server, core) -> None:
    body = {"query": "red fish", "documents": FISH, "instruction": "marine team only"}
    [process] = model_processes()
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 300
    seen = set()
    while time.monotonic() < deadline:
        answer = server.post("/score", body)
        seen.add(answer.status_code)
        if answer.status_code == 200 and model_processes() - {process}:
            break
    assert seen <= {200, 503}
    expected = core.score("red fish", FISH, instruction="marine team only")
    assert answer.json()["scores"] == pytest.approx(expected, abs=CLOSE)


@pytest.fixture
def slow(server, tiny_model_folder) -> Iterator[serve.handle.DeploymentHandle]:
    """A model that takes 0.1 s for each forward pass, and time for few of them."""

    # In here it is sent to its process by value, which cannot import this file.
    class Slow(Model):
        def __init__(self, settings: ServerSettings) -> None:
            super().__init__(settings)
            self._passes = 0
            self.scorer.tokens_per_batch = 1
            self.scorer.model.head_output.register_forward_hook(self._pass)

        def _pass(self, *_: object) -> None:
            self._passes += 1
            time.sleep(0.1)

        async def passes(self) -> int:
            return self._passes

    settings = ServerSettings(model=str(tiny_model_folder), timeout_s=2.0)
    model = serve.deployment(Slow, name="Slow", ray_actor_options={"num_cpus": 0.5})
    yield serve.run(model.bind(settings), name="slow", route_prefix="/slow")
    serve.delete("slow")


def test_a_request_that_timed_out_stops_at_the_next_forward_pass(slow) -> None:
    short, long = (
        RerankRequest(
            query="red", instruction=USERS[0], candidates=(Candidate(text="red fish"),) * count
        )
        for count in (1, 300)
    )
    scorer = ReplicatedScorer(slow, Metrics())
    with pytest.raises(ModelError, match="`timeout_s`"):
        asyncio.run(scorer.ascore(long))
    # It had begun, and of half a minute's work no more than two seconds' was done.
    assert 0 < slow.passes.remote().result() <= 21
    # The model is free for the next.
    assert len(asyncio.run(scorer.ascore(short)).values) == 1


# Ray's own tools


@pytest.fixture
def crowded(server, tiny_model_folder) -> Iterator[str]:
    """A second application of the same Serve, with hardly any room to wait."""
    arguments = {
        "model": str(tiny_model_folder),
        "batching.max_size": "1",
        "max_queued": "1",
        "num_cpus": "0.5",
    }
    serve.run(build(arguments), name="crowded", route_prefix="/crowded")
    yield f"{server.url}/crowded"
    serve.delete("crowded")


def test_when_too_many_wait_the_others_are_told_to_come_again(crowded) -> None:
    body = {"query": "red fish", "documents": FISH * 100}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(
                *(client.post(f"{crowded}/score", json=body) for _ in range(30))
            )

    answers = asyncio.run(ask_all())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert len(refused) < 30
    for answer in refused:
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "overloaded"
    # The application lies under a prefix, and counts by its own paths all the same.
    counted = f'lanerank_http_requests_total{{route="/score",status="429"}} {len(refused)}.0'
    assert counted in httpx.get(f"{crowded}/metrics").text


def test_the_builder_reads_the_file_of_the_server(tmp_path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("replicas: {min: 1, max: 2}\n")
    assert build({"config": str(config), "batching": {"max_size": 3}})
    with pytest.raises(InputError, match="there is no setting `prot`"):
        build({"config": str(config), "prot": 1})


@pytest.mark.parametrize("name", ["host", "port"])
def test_the_builder_leaves_the_address_to_serve(name) -> None:
    with pytest.raises(InputError, match=f"`{name}` is for Serve to set"):
        build({name: "1"})
