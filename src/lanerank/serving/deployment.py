"""The server on Ray Serve: one HTTP process, and as many copies of the model as the load needs.

There is one HTTP process because its counters are those of the server, whoever asks for them. It
checks requests and waits for the model, so it is no bottleneck before the machines behind it are
many. A copy of the model gets the requests of several clients at a time, each under its own
instruction.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.deployment import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from lanerank.contracts import ManyScorer, RerankRequest, Scorer, Scores
from lanerank.errors import LanerankError, ModelError
from lanerank.reranker import Reranker
from lanerank.serving.app import create_app
from lanerank.serving.guard import Refusal
from lanerank.serving.metrics import Metrics
from lanerank.serving.settings import ServerSettings

log = logging.getLogger(__name__)

_MODEL = "Model"
_HTTP = "HTTP"
_ATTEMPTS = 1
"""How often a first process may fail to start: what stops it, as a model that is not there, does so
again."""
_SPARE = 64
"""Requests that are being read or answered, while others wait."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the HTTP process has to know of the model."""

    name: str
    supports_instructions: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A request's part in what the model was given at a time."""

    outcome: Scores | LanerankError
    """The scores, or why this request cannot be scored; its neighbours are no less scored."""
    seconds: float
    """How long the model took for all that it was given."""
    requests: int | None
    """How many requests that were, told with one of them."""


class _OutOfTimeError(ModelError):
    """A request was answered without the model, which need not go on with it."""


@dataclass(frozen=True, slots=True)
class _Deadline:
    """Stops a scorer that tells its progress, once nobody waits for its answer any more."""

    end: float
    """In the seconds of `monotonic`."""

    def __call__(self, done: int, total: int) -> None:
        if done < total and monotonic() > self.end:
            raise _OutOfTimeError("the request took longer than the server's `timeout_s`")


class Model:
    """A copy of the model, in a process of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        """Load the model; Ray shows this process the GPUs it may use, and sets the threads."""
        reranker = Reranker.from_pretrained(
            settings.model, device=settings.device, dtype=settings.dtype
        )
        self.scorer = reranker.scorer
        self._timeout_s = settings.timeout_s
        self._gathered = serve.batch(
            max_batch_size=settings.batching.max_size,
            batch_wait_timeout_s=settings.batching.wait_ms / 1000,
        )(self._score_together)
        self._idle = asyncio.Event()
        self._idle.set()

    async def facts(self) -> Facts:
        """What the HTTP process has to know."""
        return Facts(self.scorer.name, self.scorer.supports_instructions)

    async def score(self, request: RerankRequest) -> Scored:
        """Score a request, together with others that are there.

        Not for longer than its client waits, or one large request would keep the model from all
        those that come after it.
        """
        request = replace(request, progress=_Deadline(monotonic() + self._timeout_s))
        # Serve closes a batch when its time is up, whether or not the model is free. Held back
        # until it is, what arrives meanwhile is one batch and not many small ones.
        await self._idle.wait()
        return await self._gathered(request)

    async def _score_together(self, requests: list[RerankRequest]) -> list[Scored]:
        self._idle.clear()
        try:
            started = perf_counter()
            outcomes = await asyncio.to_thread(score_each, self.scorer, requests)
            seconds = perf_counter() - started
        finally:
            self._idle.set()
        return [
            Scored(outcome, seconds, len(requests) if number == 0 else None)
            for number, outcome in enumerate(outcomes)
        ]


def score_each(scorer: Scorer, requests: Sequence[RerankRequest]) -> list[Scores | LanerankError]:
    """Score requests together where the scorer can, and one after the other where it cannot.

    Returns:
        For each request its scores, or the error that is its own.
    """
    if isinstance(scorer, ManyScorer):
        try:
            return list(scorer.score_many(requests, return_exceptions=True))
        except _OutOfTimeError:
            pass  # Which of them it is shows when each is scored by itself.
        except Exception as error:  # noqa: BLE001 - one request must not be able to fail the others
            log.error("%s while scoring %d requests together", type(error).__name__, len(requests))
    return [_outcome(scorer, request) for request in requests]


def _outcome(scorer: Scorer, request: RerankRequest) -> Scores | LanerankError:
    try:
        if request.progress is not None:
            request.progress(0, len(request.candidates))
        return scorer.score(request)
    except LanerankError as error:
        return error
    except Exception as error:
        log.error("%s while scoring a request", type(error).__name__)
        log.debug("the error in full", exc_info=error)
        return ModelError(f"{scorer.name!r} failed with {type(error).__name__}")


class ReplicatedScorer:
    """The model as the HTTP process has it: a scorer whose work is done by the copies.

    Args:
        handle: Of the deployment of `Model`.
        metrics: Where to count what the copies tell of their work.
    """

    supports_instructions = False
    name = "not connected"

    def __init__(self, handle: DeploymentHandle[Model], metrics: Metrics) -> None:
        """Ask nobody yet; see `connect`."""
        self._handle = handle
        self._metrics = metrics

    async def connect(self) -> None:
        """Wait for a copy of the model, and learn what it is."""
        facts: Facts = await self._handle.facts.remote()
        self.name, self.supports_instructions = facts.name, facts.supports_instructions

    async def ascore(self, request: RerankRequest) -> Scores:
        """Let a copy of the model score the request.

        Raises:
            LanerankError: The request cannot be scored.
            Refusal: Too many requests wait, or there is no copy of the model.
        """
        started = perf_counter()
        try:
            scored: Scored = await self._handle.score.remote(replace(request, progress=None))
        except BackPressureError:
            raise Refusal.busy() from None
        except (RayActorError, DeploymentUnavailableError) as error:
            log.error("%s while a request was with the model", type(error).__name__)
            raise Refusal.unavailable("the process of the model has ended") from None
        self._metrics.queue_seconds.observe(max(0.0, perf_counter() - started - scored.seconds))
        if scored.requests is not None:
            self._metrics.batch_requests.observe(scored.requests)
            self._metrics.batch_seconds.observe(scored.seconds)
        if isinstance(scored.outcome, LanerankError):
            raise scored.outcome
        return scored.outcome

    def score(self, request: RerankRequest) -> Scores:
        """As `ascore`, for a thread that has no event loop."""
        return asyncio.run(self.ascore(request))


def application(settings: ServerSettings) -> Application:
    """The two deployments of a server, the one of the model behind that of HTTP."""
    together = settings.batching.max_size
    replicas = settings.replicas
    scale: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": replicas.target_ongoing_requests,
            }
        }
    gpus = settings.num_gpus
    if gpus is None:
        gpus = float(settings.device.startswith("cuda"))
    # One batch with the model and one that gathers.
    ongoing = 2 * together
    model = serve.deployment(
        Model,
        name=_MODEL,
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.max_queued,
        max_constructor_retry_count=_ATTEMPTS,
        ray_actor_options={"num_cpus": settings.num_cpus or 1.0, "num_gpus": gpus},
        **scale,
    )

    def make_app() -> FastAPI:
        metrics = Metrics()
        name = serve.get_replica_context().app_name
        scorer = ReplicatedScorer(serve.get_deployment_handle(_MODEL, name), metrics)

        @asynccontextmanager
        async def connected(app: FastAPI) -> AsyncIterator[None]:
            await scorer.connect()
            yield

        return create_app(scorer, settings, metrics=metrics, lifespan=connected)

    http = serve.deployment(
        serve.ingress(make_app)(),
        name=_HTTP,
        num_replicas=1,
        # More than can wait for the model, so that the one who refuses is the application.
        max_ongoing_requests=settings.max_queued + ongoing * replicas.max + _SPARE,
        max_constructor_retry_count=_ATTEMPTS,
        ray_actor_options={"num_cpus": 0},
    )
    bound: Application = http.bind(model.bind(settings))  # type: ignore[attr-defined]  # Ray's types see a decorator here
    return bound
