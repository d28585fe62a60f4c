"""What happens when a scorer fails: a wrapper that keeps the input's order and says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lanerank.contracts import AsyncScorer, ManyScorer, RerankRequest, Scorer, Scores
from lanerank.errors import LanerankError, ScorerError

OnError = Literal["raise", "input_order"]
"""What a failing scorer does to a ranking: raise, or keep the input's order and flag it."""


@dataclass(frozen=True)
class FallbackScorer:
    """Keeps documents in the order of the input where the scorer fails.

    Only a `ScorerError` counts as a failure, of which `RemoteError` is one kind. Input that is not
    usable and an instruction that would be lost are mistakes of the caller, and raise.

    Every score is then 0.0. Scores end up in metadata and JSON, which have no place for NaN; equal
    ones keep their order in whatever sorts by them later; and a document that nobody judged must
    not pass a threshold.

    It has `ascore` and `score_many` where the scorer has them, and only there, because whoever
    calls it chooses between threads, batches and waiting by what is there.
    """

    scorer: Scorer
    """What scores as long as it can."""

    def __post_init__(self) -> None:
        """Take over what the scorer can do beyond `score`."""
        # Not bound methods: in a cycle, a large model would stay until garbage is collected.
        if isinstance(self.scorer, AsyncScorer):
            object.__setattr__(self, "ascore", partial(_ascore, self.scorer))
        if isinstance(self.scorer, ManyScorer):
            object.__setattr__(self, "score_many", partial(_score_many, self.scorer))

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self.scorer.name

    @property
    def supports_instructions(self) -> bool:
        """As the scorer."""
        return self.scorer.supports_instructions

    def score(self, request: RerankRequest) -> Scores:
        """The scorer's answer, or one that is `degraded`."""
        try:
            return self.scorer.score(request)
        except ScorerError as error:
            return _degraded(request, error)


async def _ascore(scorer: AsyncScorer, request: RerankRequest) -> Scores:
    try:
        return await scorer.ascore(request)
    except ScorerError as error:
        return _degraded(request, error)


def _score_many(
    scorer: ManyScorer, requests: Sequence[RerankRequest], *, return_exceptions: bool = False
) -> list[Scores | LanerankError]:
    try:
        answers = scorer.score_many(requests, return_exceptions=return_exceptions)
    except ScorerError:
        # One of them may be at fault; the others are not to suffer for it.
        alone = FallbackScorer(scorer)
        return [alone.score(request) for request in requests]
    return [
        _degraded(request, answer) if isinstance(answer, ScorerError) else answer
        for request, answer in zip(requests, answers, strict=True)
    ]


def _degraded(request: RerankRequest, error: ScorerError) -> Scores:
    return Scores((0.0,) * len(request.candidates), degraded=str(error))
