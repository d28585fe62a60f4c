"""What happens when a scorer fails: a wrapper that keeps the input's order and says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lanerank.contracts import RerankRequest, Scorer, Scores, score_async
from lanerank.errors import ScorerError

OnError = Literal["raise", "input_order"]
"""What a failing scorer does to a ranking: raise, or keep the input's order and flag it."""


@dataclass(frozen=True, slots=True)
class FallbackScorer:
    """Keeps documents in the order of the input where the scorer fails.

    Only a `ScorerError` counts as a failure, of which `RemoteError` is one kind. Input that is not
    usable and an instruction that would be lost are mistakes of the caller, and raise.

    Every score is then 0.0. Scores end up in metadata and JSON, which have no place for NaN; equal
    ones keep their order in whatever sorts by them later; and a document that nobody judged must
    not pass a threshold.
    """

    scorer: Scorer
    """What scores as long as it can."""

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
            return self._degraded(request, error)

    async def ascore(self, request: RerankRequest) -> Scores:
        """`score`, awaited where the scorer can be awaited."""
        try:
            return await score_async(self.scorer, request)
        except ScorerError as error:
            return self._degraded(request, error)

    def _degraded(self, request: RerankRequest, error: ScorerError) -> Scores:
        return Scores((0.0,) * len(request.candidates), degraded=str(error))
