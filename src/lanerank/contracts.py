"""The values that travel between the parts: lanes, documents, requests, rankings, scorers."""

from __future__ import annotations

import asyncio
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, get_args, overload, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lanerank.display import (
    MAX_ROWS,
    describe_score,
    document_cell,
    element,
    fragment,
    one_line,
    table,
)
from lanerank.errors import InputError, LanerankError

LongDocuments = Literal["truncate", "max_window"]
"""What happens to a document longer than the model reads: cut it, or score windows of it."""


class Lane(IntEnum):
    """Who wrote a token. Information flows from lower to higher numbers, never back."""

    INSTRUCTION = 0
    """The application's operator or its signed-in user: trusted."""
    QUERY = 1
    """The searcher: trusted."""
    ATTRIBUTES = 2
    """Chosen metadata fields, written by the index: partly trusted."""
    DOCUMENT = 3
    """The retrieved text, written by anyone: not trusted."""


class Document(BaseModel):
    """A retrieved text with what the index knows about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """The text to score."""
    metadata: Mapping[str, Any] = Field(default_factory=dict)
    """Fields of the index. Only those named in `attributes=` reach a model, and none is ever
    read as an instruction."""
    id: str | None = None
    """The caller's identifier, handed back untouched."""

    def __init__(self, /, text: str, **fields: Any) -> None:  # noqa: ANN401 - pydantic validates them
        """Accept the text by position, as `Document("...")`.

        Raises:
            InputError: A field has the wrong type, or there is no such field.
        """
        try:
            super().__init__(text=text, **fields)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"the document is not usable: `{where}`: {problem['msg']}, got "
                f"{reprlib.repr(problem['input'])}"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a scorer sees of one document: two lanes of text and nothing else."""

    text: str
    """The document lane."""
    attributes: str = ""
    """The attributes lane, rendered; empty where no field was chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """One call to a scorer: the trusted lanes once, and the candidates to score against them."""

    query: str
    instruction: str = ""
    """The rendered instruction; the empty string is no instruction."""
    candidates: tuple[Candidate, ...] = ()
    long_documents: LongDocuments = "truncate"
    progress: Callable[[int, int], None] | None = None
    """Called now and then with how many candidates are scored, and of how many."""

    def __post_init__(self) -> None:
        """Refuse an unknown treatment of long documents, which scorers would take for the other."""
        if self.long_documents not in get_args(LongDocuments):
            raise InputError(
                f"`long_documents` must be one of {get_args(LongDocuments)}, got "
                f"{self.long_documents!r}"
            )


@dataclass(frozen=True, slots=True)
class Scores:
    """A scorer's answer, in the order of the request's candidates."""

    values: tuple[float, ...]
    """One score for each candidate, higher is better, in [0, 1] for the models lanerank ships."""
    truncated: tuple[bool, ...] = ()
    """Whether a part of the candidate was not read; empty means that nothing was cut."""
    degraded: str | None = None
    """Why nothing was scored, where a failure policy stands in for the scorer: the values are all
    the same and say nothing."""
    neutral: bool = False
    """Whether the model took the instruction for one that changes nothing, and left it out."""


@runtime_checkable
class Scorer(Protocol):
    """The one seam: anything that turns a request into one score for each candidate.

    A scorer is pointwise (a candidate's score does not depend on the others), never mutates the
    request, and may be called from several threads.
    """

    @property
    def name(self) -> str:
        """The model's name, for rankings and reports."""
        ...

    @property
    def supports_instructions(self) -> bool:
        """Whether a non-empty `request.instruction` reaches the model."""
        ...

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request."""
        ...


@runtime_checkable
class AsyncScorer(Scorer, Protocol):
    """A scorer that can also be awaited, and needs no thread for that."""

    async def ascore(self, request: RerankRequest) -> Scores:
        """`score`, without blocking the event loop; cancelling it leaves nothing behind."""
        ...


@runtime_checkable
class ManyScorer(Scorer, Protocol):
    """A scorer that can put the candidates of several requests into one forward pass."""

    def score_many(
        self, requests: Sequence[RerankRequest], *, return_exceptions: bool = False
    ) -> Sequence[Scores | LanerankError]:
        """`score` for each request.

        With `return_exceptions`, a request that cannot be scored has its error in the place of its
        scores, and does not stop the others.
        """
        ...


async def score_async(scorer: Scorer, request: RerankRequest) -> Scores:
    """Await the scorer where it can be awaited, otherwise run it in a worker thread."""
    if isinstance(scorer, AsyncScorer):
        return await scorer.ascore(request)
    return await asyncio.to_thread(scorer.score, request)


class RankedDocument(BaseModel):
    """One document of a ranking."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    """Position in the list that the caller gave."""
    score: float
    """The model's score; not finite only where `Ranking.non_finite` lists this index."""
    document: Document
    """The document as given."""
    truncated: bool = False
    """Whether the model did not read the whole document."""


class Ranking(BaseModel):
    """Documents, best first, with how they came to be ordered. Behaves as a sequence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: tuple[RankedDocument, ...] = ()
    query: str
    model: str
    """The scorer's name."""
    instruction_fingerprint: str | None = None
    """`Instruction.fingerprint` of the instruction that was applied; `None` without one."""
    instruction_source: str | None = None
    """Where the instruction came from (`"argument"`, `"use_instruction"`, ...); `None` without."""
    instruction_applied: Literal["lane", "neutral", "prepended", "ignored"] | None = None
    """How the instruction reached the model; `None` without one. `"neutral"` says that the model
    took it for one that changes nothing, so that it has not: where you wanted a change, say more of
    what is wanted. The others happen only where the caller chose `on_unsupported` for a model
    without an instruction channel, or a failure policy and the ranking is `degraded`."""
    non_finite: tuple[int, ...] = ()
    """Indexes whose score was NaN or infinite; they sort last, in input order."""
    degraded: str | None = None
    """Why nothing was scored: the documents are in the order of the input and every score is 0.0,
    which says nothing. Only where the caller chose a failure policy; `None` otherwise."""

    @property
    def truncated(self) -> tuple[int, ...]:
        """Indexes of the documents of this ranking that were not read whole."""
        return tuple(result.index for result in self.results if result.truncated)

    def __len__(self) -> int:
        """The number of documents kept."""
        return len(self.results)

    def __iter__(self) -> Iterator[RankedDocument]:  # type: ignore[override]  # a sequence of results, not of fields
        """Iterate over the documents, best first."""
        return iter(self.results)

    @overload
    def __getitem__(self, position: int) -> RankedDocument: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[RankedDocument, ...]: ...
    def __getitem__(self, position: int | slice) -> RankedDocument | tuple[RankedDocument, ...]:
        """The document at a rank, counted from 0."""
        return self.results[position]

    def _repr_html_(self) -> str:
        """A table for notebooks: the best documents, and how they came to be ordered."""
        number = {"class": "number"}
        rows = [
            (
                element("td", number, str(rank)),
                element("td", number, describe_score(result.score)),
                document_cell(
                    result.document.text,
                    result.document.id,
                    result.document.metadata,
                    cut=result.truncated,
                ),
            )
            for rank, result in enumerate(self.results[:MAX_ROWS], 1)
        ]
        notes = [self.model, describe_instruction(self)]
        if len(rows) < len(self):
            notes.append(f"the first {len(rows)} of {len(self)} documents")
        if self.degraded is not None:
            notes.append(f"in input order, nothing was scored: {self.degraded}")
        if self.non_finite:
            notes.append(f"documents without a finite score: {len(self.non_finite)}")
        headings = [element("th", number, name) for name in ("rank", "score")]
        return fragment(
            element("p", {}, element("b", {}, one_line(self.query, 200))),
            element("p", {"class": "soft"}, one_line("; ".join(notes), 300)),
            table((*headings, element("th", {"class": "text"}, "document")), rows),
        )


def describe_instruction(ranking: Ranking) -> str:
    """Which instruction a ranking followed and where it came from, in a few words."""
    if ranking.instruction_fingerprint is None:
        return "no instruction"
    words = f"instruction {ranking.instruction_fingerprint} from {ranking.instruction_source}"
    by_lane = ranking.instruction_applied in (None, "lane")
    return words if by_lane else f"{words}, {ranking.instruction_applied}"


def order_by_score(values: tuple[float, ...]) -> list[int]:
    """Indexes from the best score to the worst; ties keep input order, non-finite ones go last."""
    return sorted(
        range(len(values)),
        key=lambda i: (0, -values[i]) if math.isfinite(values[i]) else (1, 0.0),
    )
