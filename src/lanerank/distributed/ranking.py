"""From rows to the values of their new columns, or to the reason why a row has none."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lanerank.context import Resolved, Source, resolve_instruction
from lanerank.contracts import (
    AsyncScorer,
    Document,
    ManyScorer,
    RankedDocument,
    Ranking,
    RerankRequest,
    Scorer,
    Scores,
)
from lanerank.distributed.rows import Added, Columns, Row
from lanerank.errors import (
    InputError,
    InstructionError,
    InstructionNotSupportedError,
    RemoteError,
)
from lanerank.instruction import Instruction
from lanerank.reranker import Reranker

_T = TypeVar("_T")
_TOO_LARGE = 413
_REFUSED = (400, _TOO_LARGE, 422)
"""What a service answers where the row is at fault and not the service."""


@dataclass(frozen=True, slots=True)
class RankedRow:
    """What became of a row that could be ranked."""

    added: Added
    """The values of the new columns."""
    documents: int
    """How many documents were scored."""
    truncated: int
    """How many of those kept were not read whole."""


@dataclass(slots=True)
class _Call:
    """One question to the reranker, and the places of the rows that ask it."""

    query: Any
    instruction: Resolved
    documents: Any
    places: list[int] = field(default_factory=list)

    def halves(self) -> list[_Call]:
        """Two questions, each about half of the pairs."""
        middle = len(self.places) // 2
        return [
            replace(self, documents=self.documents[half], places=self.places[half])
            for half in (slice(middle), slice(middle, None))
        ]


class RowRanker:
    """Ranks rows, all that are handed over together in as few forward passes as the scorer can.

    Args:
        reranker: What ranks.
        columns: What the rows are.
        top_k: As for `Reranker.rank`; for lists only.
        instruction: Applies to every row, above the row's own.
    """

    def __init__(
        self,
        reranker: Reranker,
        columns: Columns,
        *,
        top_k: int | None = None,
        instruction: Instruction | None = None,
    ) -> None:
        """Let the rows' requests meet, unless the scorer can be awaited and has its own way."""
        self.model = reranker.scorer.name
        self._together = None
        if not isinstance(reranker.scorer, AsyncScorer):
            self._together = _Together(reranker.scorer)
            reranker = Reranker(
                self._together,
                long_documents=reranker.long_documents,
                on_unsupported=reranker.on_unsupported,
            )
        self._reranker = reranker
        self._columns = columns
        self._top_k = top_k
        self._instruction = instruction or Instruction()
        # In a thread of its own, since a notebook has a running event loop already.
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, rows: Sequence[Row]) -> list[RankedRow | str]:
        """For each row its new columns, or why it has none.

        Raises:
            InstructionNotSupportedError: The model has no channel for an instruction.
            ScorerError: The model or the service failed, whatever the row.
        """
        results: list[RankedRow | str] = [row.problem or "" for row in rows]
        calls: dict[object, _Call] = {}
        for place, row in enumerate(rows):
            if row.problem is not None:
                continue
            try:
                self._add(calls, place, row)
            except (InputError, InstructionError) as error:
                results[place] = str(error)
        todo = list(calls.values())
        while todo:
            asked, todo = todo, []
            for call, answer in zip(asked, self._run(self._ask(asked)), strict=True):
                too_large = isinstance(answer, RemoteError) and answer.status == _TOO_LARGE
                if too_large and len(call.places) > 1:
                    # Together they are too large, which need not be the fault of any.
                    todo += call.halves()
                    continue
                for place, result in zip(call.places, self._results(call, answer), strict=True):
                    results[place] = result
        return results

    def close(self) -> None:
        """Close the event loop and end its thread."""
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()

    def _add(self, calls: dict[object, _Call], place: int, row: Row) -> None:
        """Note what a row asks. Pairs that share query and instruction are one question."""
        own = Instruction.coerce(row.instruction)  # type: ignore[arg-type]  # it checks the type
        resolved = resolve_instruction([(Source.ARGUMENT, self._instruction + own)])
        if self._columns.form == "lists":
            calls[place] = _Call(row.query, resolved, row.documents, [place])
            return
        if not isinstance(row.query, str):
            raise InputError(f"`query` must be a str that is not blank, got {row.query!r}")
        if not isinstance(row.documents, str):
            raise InputError(f"the document must be a str, got {row.documents!r}")
        call = calls.setdefault((row.query, row.instruction), _Call(row.query, resolved, []))
        call.documents.append(Document(row.documents, metadata=row.metadata))
        call.places.append(place)

    async def _ask(self, calls: Sequence[_Call]) -> list[Ranking | BaseException]:
        tasks = [
            asyncio.create_task(
                self._reranker.arank(
                    call.query,
                    call.documents,
                    instruction=call.instruction,
                    attributes=self._columns.attributes,
                    top_k=self._top_k,
                )
            )
            for call in calls
        ]
        if self._together is not None:
            # Every task runs up to where it waits for its scores.
            await asyncio.sleep(0)
            self._together.score_waiting()
        return await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, coroutine: Coroutine[object, object, _T]) -> _T:
        return self._thread.submit(self._runner.run, coroutine).result()

    def _results(self, call: _Call, answer: Ranking | BaseException) -> list[RankedRow | str]:
        """One result for each place of the call."""
        if isinstance(answer, BaseException):
            return [_reason(answer)] * len(call.places)
        if answer.degraded is not None:
            return [answer.degraded] * len(call.places)
        common = {
            "model": self.model,
            "instruction_fingerprint": answer.instruction_fingerprint,
            "instruction_applied": answer.instruction_applied,
        }
        if self._columns.form == "pairs":
            ordered = sorted(answer.results, key=lambda result: result.index)
            return [self._pair(result, common) for result in ordered]
        if answer.non_finite:
            places = ", ".join(map(str, answer.non_finite[:10]))
            return [f"the model gave no finite score for the documents {places}"]
        ranking = [
            {
                "index": result.index,
                "id": result.document.id,
                "score": result.score,
                "truncated": result.truncated,
            }
            for result in answer.results
        ]
        added = self._named({"ranking": ranking, **common})
        return [RankedRow(added, len(call.documents), len(answer.truncated))]

    def _pair(self, result: RankedDocument, common: Added) -> RankedRow | str:
        if not math.isfinite(result.score):
            return "the model gave no finite score"
        values = {"score": result.score, "truncated": result.truncated, **common}
        return RankedRow(self._named(values), 1, int(result.truncated))

    def _named(self, values: Added) -> Added:
        return {self._columns.prefix + name: value for name, value in values.items()}


class _Together:
    """A scorer that lets requests wait until they can be scored together."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: list[tuple[RerankRequest, asyncio.Future[Scores]]] = []

    @property
    def name(self) -> str:
        return self._scorer.name

    @property
    def supports_instructions(self) -> bool:
        return self._scorer.supports_instructions

    def score(self, request: RerankRequest) -> Scores:
        return self._scorer.score(request)

    async def ascore(self, request: RerankRequest) -> Scores:
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        return await future

    def score_waiting(self) -> None:
        """Answer all requests that wait."""
        waiting, self._waiting = self._waiting, []
        answers = self._score([request for request, _ in waiting])
        for (_, future), answer in zip(waiting, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _score(self, requests: Sequence[RerankRequest]) -> Sequence[Scores | Exception]:
        if isinstance(self._scorer, ManyScorer):
            return self._scorer.score_many(requests, return_exceptions=True)
        return [self._score_one(request) for request in requests]

    def _score_one(self, request: RerankRequest) -> Scores | Exception:
        try:
            return self._scorer.score(request)
        except Exception as error:  # noqa: BLE001 - raised again where the request waits
            return error


def _reason(error: BaseException) -> str:
    """What to say of a row that caused an error; errors that are not the row's are raised."""
    unsupported = isinstance(error, InstructionNotSupportedError)
    if isinstance(error, InputError | InstructionError) and not unsupported:
        return str(error)
    if isinstance(error, RemoteError) and error.status in _REFUSED:
        return str(error)
    raise error
