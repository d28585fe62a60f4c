"""What the server counts, for Prometheus. No text of a request ever becomes a label."""

from __future__ import annotations

from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROUTES = ("/v1/rerank", "/v2/rerank", "/score", "/health", "/metrics", "/openapi.json")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one HTTP process, in a registry of their own."""

    def __init__(self) -> None:
        """Start all of them at zero."""
        self.registry = CollectorRegistry()
        into = self.registry
        self.requests = Counter(
            "lanerank_http_requests", "Requests answered.", ("route", "status"), registry=into
        )
        self.seconds = Histogram(
            "lanerank_http_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=into,
        )
        self.in_progress = Gauge(
            "lanerank_http_requests_in_progress",
            "Requests being read, waiting for the model or being scored.",
            registry=into,
        )
        self.documents = Counter("lanerank_documents", "Documents scored.", registry=into)
        self.batch_requests = Histogram(
            "lanerank_batch_requests",
            "Requests that the model was given at a time.",
            buckets=_SIZES,
            registry=into,
        )
        self.batch_seconds = Histogram(
            "lanerank_batch_seconds",
            "Time that the model took for what it was given at a time.",
            buckets=_SECONDS,
            registry=into,
        )
        self.queue_seconds = Histogram(
            "lanerank_queue_seconds",
            "Time that a request spent waiting for the model.",
            buckets=_SECONDS,
            registry=into,
        )

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Counted:
    """Counts and times the requests to an ASGI application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap the application."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at the status of its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # What callers make up must not become a label, since each costs memory.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = path if path in _ROUTES else "other"
        # The status of a request whose caller has left before there was an answer.
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = perf_counter()
        try:
            with self.metrics.in_progress.track_inprogress():
                await self.app(scope, receive, watched)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - started)
