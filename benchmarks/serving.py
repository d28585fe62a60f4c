"""Latency and throughput of `lanerank serve` with the embedded model, beside the core without it.

The workload: 2,000 requests of 10 documents of about 90 tokens, each client under an instruction of
its own that has about 60. Measured in one run, on one machine:

- the core, one request after the other, and 32 of them at a time with `score_many`;
- the server with 1 client and with 64, over HTTP on the loopback address: with one copy of the
  model that has all cores, and with a copy for each core. The clients run on the same cores, and
  what they take is taken from the server;
- the HTTP process alone, over a scorer that answers at once, which shows how far one of them goes.

Every answer is compared with the core's, so a lost request or a mixed-up instruction ends the run.

`python benchmarks/serving.py` prints a table and writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from lanerank import Reranker
from lanerank.contracts import Candidate, RerankRequest, Scores
from lanerank.scoring.lane_encoder import LaneEncoderScorer, default_dtype
from lanerank.serving import Replicas, ServerSettings, create_app, running

HERE = Path(__file__).parent
TOPICS = (
    "discharge of patients",
    "port-state control of tankers",
    "mathematics olympiads",
    "heat pumps in old houses",
    "pension law",
    "sourdough baking",
    "railway signalling",
    "orchard pests",
)
INSTRUCTION = (
    "The user is number {number} of a help desk that answers questions on {topic}. Prefer what is "
    "in force over drafts and announcements, and answers from the last twelve months over older "
    "ones. Texts on anything but {topic} are of no use, however well they are written."
)
SENTENCE = (
    "On the day the responsible person signs the summary of {topic} before ten, the office brings "
    "what is needed by one, and the case moves on as soon as the desk has confirmed it. "
)
TOLERANCE = 0.02
"""What rounding may change in bfloat16 when a text is scored beside others."""


@dataclass(frozen=True)
class Measured:
    """One way of asking."""

    way: str
    requests: int
    requests_per_second: float
    documents_per_second: float
    p50_ms: float
    p99_ms: float


def body_of(client: int, turn: int, documents: int) -> dict[str, Any]:
    """The request of a client; each turn has other documents."""
    topic = TOPICS[client % len(TOPICS)]
    texts = []
    for number in range(documents):
        about = TOPICS[(client + turn + number) % len(TOPICS)]
        words = (SENTENCE * 3).format(topic=about).split()
        texts.append(
            f"Case {turn}-{number}. " + " ".join(words[number % 20 : 20 + number % 20 + 42])
        )
    return {
        "query": f"what has to be ready first in {topic}",
        "instruction": INSTRUCTION.format(number=client, topic=topic),
        "documents": texts,
    }


def request_of(body: dict[str, Any]) -> RerankRequest:
    """The same request as a scorer has it."""
    candidates = tuple(Candidate(text=text) for text in body["documents"])
    return RerankRequest(
        query=body["query"], instruction=body["instruction"], candidates=candidates
    )


def measured(way: str, seconds: float, times: list[float], documents: int) -> Measured:
    """What a run of requests comes to."""
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return Measured(
        way=way,
        requests=len(times),
        requests_per_second=round(len(times) / seconds, 2),
        documents_per_second=round(len(times) * documents / seconds, 1),
        p50_ms=round(1000 * cuts[49], 1),
        p99_ms=round(1000 * cuts[98], 1),
    )


async def ask_all(
    url: str, bodies: list[dict[str, Any]], clients: int
) -> tuple[float, list[float], list[list[float]]]:
    """Let clients share the requests: seconds in all, seconds of each, and the scores of each."""
    times = [0.0] * len(bodies)
    scores: list[list[float]] = [[] for _ in bodies]

    async def ask(http: httpx.AsyncClient, first: int) -> None:
        for number in range(first, len(bodies), clients):
            begun = time.perf_counter()
            answer = await http.post(f"{url}/score", json=bodies[number])
            times[number] = time.perf_counter() - begun
            answer.raise_for_status()
            scores[number] = answer.json()["scores"]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        begun = time.perf_counter()
        await asyncio.gather(*(ask(http, client) for client in range(clients)))
        return time.perf_counter() - begun, times, scores


class Instant:
    """Answers at once."""

    name = "instant"
    supports_instructions = True

    def score(self, request: RerankRequest) -> Scores:
        """A half for each."""
        return Scores((0.5,) * len(request.candidates))

    async def ascore(self, request: RerankRequest) -> Scores:
        """As `score`."""
        return self.score(request)


def serve_instant(port: int) -> None:
    """The HTTP interface over a scorer that takes no time."""
    uvicorn.run(create_app(Instant()), host="127.0.0.1", port=port, log_level="error")


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def measure_core(
    scorer: LaneEncoderScorer, bodies: list[dict[str, Any]], documents: int
) -> tuple[list[Measured], list[tuple[float, ...]]]:
    """The core without a server: one request at a time, and 32."""
    requests = [request_of(body) for body in bodies]
    for request in requests[:5]:
        scorer.score(request)
    times, expected = [], []
    started = time.perf_counter()
    for request in requests:
        begun = time.perf_counter()
        expected.append(scorer.score(request).values)
        times.append(time.perf_counter() - begun)
    alone = measured("core, one at a time", time.perf_counter() - started, times, documents)
    times = []
    started = time.perf_counter()
    for first in range(0, len(requests), 32):
        begun = time.perf_counter()
        together = requests[first : first + 32]
        scorer.score_many(together)
        times += [time.perf_counter() - begun] * len(together)
    many = measured("core, 32 at a time", time.perf_counter() - started, times, documents)
    return [alone, many], expected


def measure_server(
    bodies: list[dict[str, Any]],
    expected: list[tuple[float, ...]],
    documents: int,
    clients: int,
) -> tuple[list[Measured], float]:
    """The server with one client and with many, and how many requests it put together for these."""
    rows = []
    with running(ServerSettings(port=free_port())) as url:
        asyncio.run(ask_all(url, bodies[:clients], 1))
        share = bodies[: len(bodies) // 10]
        seconds, times, scores = asyncio.run(ask_all(url, share, 1))
        check(scores, expected[: len(share)])
        rows.append(measured("server, 1 client", seconds, times, documents))
        before = batches(url)
        seconds, times, scores = asyncio.run(ask_all(url, bodies, clients))
        check(scores, expected)
        rows.append(measured(f"server, {clients} clients", seconds, times, documents))
        after = batches(url)
    return rows, (after[0] - before[0]) / (after[1] - before[1])


def measure_copies(
    bodies: list[dict[str, Any]],
    expected: list[tuple[float, ...]],
    documents: int,
    clients: int,
) -> Measured:
    """The server with a copy of the model for each core."""
    copies = os.cpu_count() or 1
    settings = ServerSettings(
        port=free_port(), replicas=Replicas(min=copies, max=copies), num_cpus=1
    )
    with running(settings) as url:
        asyncio.run(ask_all(url, bodies[: 4 * clients], clients))
        seconds, times, scores = asyncio.run(ask_all(url, bodies, clients))
        check(scores, expected)
    name = f"server, {clients} clients, {copies} copies of 1 thread"
    return measured(name, seconds, times, documents)


def batches(url: str) -> tuple[float, float]:
    """How many requests the model was given so far, and in how many batches."""
    text = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    name = "lanerank_batch_requests"
    return float(values[f"{name}_sum"]), float(values[f"{name}_count"])


def check(scores: list[list[float]], expected: list[tuple[float, ...]]) -> None:
    """End the run if an answer is not that of its own request."""
    worst = 0.0
    for number, (given, wanted) in enumerate(zip(scores, expected, strict=True)):
        if len(given) != len(wanted):
            raise SystemExit(f"request {number} has {len(given)} scores")
        worst = max(worst, *(abs(a - b) for a, b in zip(given, wanted, strict=True)))
    if worst > TOLERANCE:
        raise SystemExit(f"an answer is {worst:.4f} off the core's")


def measure_http(bodies: list[dict[str, Any]], documents: int, clients: int) -> Measured:
    """The HTTP process alone."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve_instant, args=(port,))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        asyncio.run(ask_all(url, bodies[:clients], clients))
        seconds, times, _ = asyncio.run(ask_all(url, bodies, clients))
    finally:
        process.terminate()
        process.join()
    return measured(f"HTTP process alone, {clients} clients", seconds, times, documents)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    bodies = [
        body_of(number % arguments.clients, number // arguments.clients, arguments.documents)
        for number in range(arguments.requests)
    ]
    scorer = Reranker.from_pretrained(device="cpu").scorer
    if not isinstance(scorer, LaneEncoderScorer):
        raise SystemExit("the embedded model is expected to be a lane encoder")
    lengths = [len(scorer.lanes.content(text)) for text in bodies[0]["documents"]]
    trusted = [len(scorer.lanes.content(bodies[0][lane])) for lane in ("instruction", "query")]
    rows, expected = measure_core(scorer, bodies, arguments.documents)
    served, together = measure_server(bodies, expected, arguments.documents, arguments.clients)
    rows += [
        *served,
        measure_copies(bodies, expected, arguments.documents, arguments.clients),
        measure_http(bodies, arguments.documents, arguments.clients),
    ]
    console = Console()
    table = Table()
    for heading in ("way", "requests/s", "documents/s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(
            row.way,
            f"{row.requests_per_second:.1f}",
            f"{row.documents_per_second:.0f}",
            f"{row.p50_ms:.0f}",
            f"{row.p99_ms:.0f}",
        )
    console.print(table)
    console.print(
        f"The server gave its model {together:.1f} requests at a time for the many clients."
    )
    result = {
        "workload": {
            "requests": arguments.requests,
            "clients": arguments.clients,
            "documents_in_a_request": arguments.documents,
            "mean_document_tokens": statistics.mean(lengths),
            "instruction_tokens": trusted[0],
            "query_tokens": trusted[1],
        },
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "load_before": load,
            "dtype": str(default_dtype(torch.device("cpu"))),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "ray", "fastapi", "uvicorn", "httpx")},
        },
        "measured": [asdict(row) for row in rows],
        "requests_in_a_batch": round(together, 1),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
