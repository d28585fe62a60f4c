"""The HTTP interface, as an ASGI application over any scorer.

It knows neither Ray nor torch: what scores is a `Scorer`, awaited where it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.security import HTTPBearer

from lanerank.contracts import (
    Document,
    RankedDocument,
    Ranking,
    RerankRequest,
    Scorer,
    Scores,
    score_async,
)
from lanerank.display import one_line
from lanerank.instruction import Instruction
from lanerank.reranker import Reranker
from lanerank.serving.guard import Refusal, explain_errors, guarded_route
from lanerank.serving.metrics import CONTENT_TYPE, Counted, Metrics
from lanerank.serving.schemas import (
    ErrorAnswer,
    Health,
    InstructionMeta,
    Meta,
    RerankAnswer,
    RerankBody,
    Result,
    ScoreAnswer,
    ScoreBody,
)
from lanerank.serving.settings import ServerSettings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_REASONS = {
    400: "The body is not JSON, or a field is not usable: a blank query, an instruction that is "
    "too long or that the model has no channel for, the name of another model.",
    401: "The bearer token is missing or wrong.",
    413: "Too many documents or bytes.",
    415: "The body is said to be something other than JSON.",
    422: "A field is missing, unknown or of the wrong type.",
    429: "Too many requests are waiting; `Retry-After` says when to ask again.",
    500: "The model failed, or the server has a defect.",
    503: "No answer came in time; `Retry-After` says when to ask again.",
}


def create_app(
    scorer: Scorer,
    settings: ServerSettings | None = None,
    *,
    metrics: Metrics | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    `/health` and `/openapi.json` are open, for load balancers and tools: they tell the model's name
    and the version. All else, `/metrics` included, asks for the token if there is one.

    Args:
        scorer: What scores; an `AsyncScorer` needs no thread for each request.
        settings: The limits, the token, and how long documents and unsupported instructions are
            handled. Host, port, batching and replicas are for whoever runs the application.
        metrics: Where to count, if the scorer counts there as well.
        lifespan: As in FastAPI.

    Raises:
        InputError: The environment variable of the token is not set.
    """
    settings = settings or ServerSettings()
    counts = metrics or Metrics()
    release = version("lanerank")
    app = FastAPI(
        title="lanerank",
        summary="Re-ranking with instructions that no document can enter.",
        version=release,
        # FastAPI's pages load scripts from the network.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    explain_errors(app)
    guarded = APIRouter(
        route_class=guarded_route(settings),
        # For the description only; the route itself has looked before.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.token_env else [],
    )
    refusals = _refusals(*_REASONS)

    async def ranked(body: ScoreBody, top_k: int | None = None) -> Ranking:
        _check_model(body.model, scorer.name)
        rendered = tuple(document.attributes for document in body.documents)
        reranker = Reranker(
            scorer if all(own is None for own in rendered) else _WithAttributes(scorer, rendered),
            long_documents=body.long_documents or settings.long_documents,
            on_unsupported=settings.on_unsupported,
        )
        ranking = await reranker.arank(
            body.query,
            [Document(each.text, metadata=each.metadata) for each in body.documents],
            instruction=Instruction(body.instruction, today=body.today),
            attributes=body.attributes,
            top_k=top_k,
        )
        if ranking.degraded is not None:
            # An answer has no place to say that its scores mean nothing.
            raise Refusal.unavailable("the model could not be asked")
        counts.documents.inc(len(body.documents))
        return ranking

    @guarded.post("/v2/rerank", responses=refusals, response_model_exclude_unset=True)
    @guarded.post("/v1/rerank", responses=refusals, response_model_exclude_unset=True)
    async def rerank(body: RerankBody) -> RerankAnswer:
        """Put documents in order for a query, best first, under an instruction."""
        ranking = await ranked(body, body.top_n)
        instruction = None
        if ranking.instruction_applied and ranking.instruction_fingerprint:
            instruction = InstructionMeta(
                fingerprint=ranking.instruction_fingerprint, applied=ranking.instruction_applied
            )
        return RerankAnswer(
            id=uuid4().hex,
            model=ranking.model,
            results=[_result(each, body) for each in ranking],
            meta=Meta(instruction=instruction, truncated=sorted(ranking.truncated)),
        )

    @guarded.post("/score", responses=refusals)
    async def score(body: ScoreBody) -> ScoreAnswer:
        """Score documents for a query under an instruction, in the order of the request."""
        ranking = await ranked(body)
        in_order = sorted(ranking, key=lambda each: each.index)
        return ScoreAnswer(
            model=ranking.model,
            scores=[_finite(each.score) for each in in_order],
            truncated=[each.truncated for each in in_order],
        )

    @guarded.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {}}}, **_refusals(401)},
        response_class=Response,
    )
    async def show_metrics() -> Response:
        """The counters of this server, in Prometheus' text format."""
        return Response(counts.exposition(), media_type=CONTENT_TYPE)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server is up and has its model."""
        return Health(status="ok", model=scorer.name, version=release)

    app.include_router(guarded)
    app.add_middleware(Counted, metrics=counts)
    return app


@dataclass(frozen=True, slots=True)
class _WithAttributes:
    """A scorer for one request, some of whose documents come with their attributes rendered."""

    scorer: Scorer
    rendered: tuple[str | None, ...]

    @property
    def name(self) -> str:
        return self.scorer.name

    @property
    def supports_instructions(self) -> bool:
        return self.scorer.supports_instructions

    def score(self, request: RerankRequest) -> Scores:
        return self.scorer.score(self._completed(request))

    async def ascore(self, request: RerankRequest) -> Scores:
        return await score_async(self.scorer, self._completed(request))

    def _completed(self, request: RerankRequest) -> RerankRequest:
        return replace(
            request,
            candidates=tuple(
                candidate if own is None else replace(candidate, attributes=own)
                for candidate, own in zip(request.candidates, self.rendered, strict=True)
            ),
        )


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _REASONS[status]} for status in statuses}


def _check_model(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise Refusal(
            400,
            "model_not_found",
            f"`model` is {one_line(asked or '', 100)!r}, and this server has {name!r}; leave "
            "it out, or give that name",
            param="model",
        )


def _result(ranked: RankedDocument, body: RerankBody) -> Result:
    result = Result(index=ranked.index, relevance_score=_finite(ranked.score))
    if not body.return_documents:
        return result
    return result.model_copy(update={"document": body.documents[ranked.index]})


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None
