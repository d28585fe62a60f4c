"""Systems under comparison: a reranker with a setting of the instruction, and how it is asked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from lanerank.context import Source, use_instruction
from lanerank.contracts import RankedDocument, Ranking, order_by_score
from lanerank.display import one_line
from lanerank.errors import InputError, LanerankError, ScorerError
from lanerank.evaluation.queries import JudgedQuery
from lanerank.evaluation.scoring import SupportsScore
from lanerank.instruction import Instruction, InstructionLike


class OwnInstruction(Enum):
    """The type of `OWN`."""

    OWN = "own"


OWN = OwnInstruction.OWN
"""In place of an instruction: each query is asked with the instruction that belongs to it."""


@dataclass(frozen=True, slots=True)
class System:
    """A reranker with a setting of the instruction: one side of a comparison.

    `System(reranker, None)` against `System(reranker)` is without and with instruction,
    `System(reranker, "...")` against `System(reranker, "...")` instruction A and B, and
    `System(reranker)` against `System(other)` model A and B.

    Raises:
        InputError: The reranker is none, or the instruction has the wrong type.
    """

    reranker: SupportsScore
    instruction: InstructionLike | OwnInstruction = OWN
    """`OWN`, the default, asks each query with its own instruction; `None` asks without one; any
    other is given to every query."""
    label: str = ""
    """What reports call it; by default what the instruction is."""

    def __post_init__(self) -> None:
        """Check the parts and find a label."""
        if not hasattr(self.reranker, "scorer") or not hasattr(self.reranker, "score"):
            raise InputError(
                f"`reranker` must be a Reranker, got {type(self.reranker).__name__}; wrap a scorer "
                "as `Reranker(scorer)`, load a model with `Reranker.from_pretrained(name)`"
            )
        words = "own instructions"
        if self.instruction is not OWN:
            instruction = Instruction.coerce(self.instruction)
            object.__setattr__(self, "instruction", instruction or None)
            words = one_line(instruction.render(), 40) or "no instruction"
        if not self.label:
            object.__setattr__(self, "label", words)

    @property
    def model(self) -> str:
        """The scorer's name."""
        return self.reranker.scorer.name

    def instruction_for(self, own: Instruction | None) -> Instruction | None:
        """What a query with this instruction of its own is asked with."""
        return own if self.instruction is OWN else Instruction.coerce(self.instruction) or None


def distinct_labels(a: System, b: System) -> tuple[str, str]:
    """What to call two systems: their labels, else their models, else A and B."""
    for first, second in ((a.label, b.label), (a.model, b.model)):
        if first != second:
            return first, second
    return f"{a.label} (A)", f"{b.label} (B)"


def queries_to_ask(a: System, b: System, queries: Sequence[JudgedQuery]) -> list[JudgedQuery]:
    """The queries in which two systems can differ.

    Those that both ask with the same reranker and the same instruction are left out, unless the
    systems are one and the same.

    Raises:
        InputError: There is none, or two have the same id.
    """
    if not queries:
        raise InputError("`queries` is empty; give at least one JudgedQuery")
    ids = Counter(query.id for query in queries)
    if repeated := [each for each, times in ids.items() if times > 1]:
        raise InputError(
            f"`queries` has the id {repeated[0]!r} more than once; give each JudgedQuery an `id`"
        )
    if a.reranker is not b.reranker or a.instruction == b.instruction:
        return list(queries)
    asked = [
        query
        for query in queries
        if a.instruction_for(query.instruction) != b.instruction_for(query.instruction)
    ]
    if not asked:
        raise InputError(
            f"`queries`: with {a.label!r} and with {b.label!r} all {len(queries)} are asked the "
            "same, so there is nothing to compare; give queries with an instruction of their own, "
            "or one of the systems another instruction"
        )
    return asked


_Scored = dict[str, dict[str, float]]
"""A run in the making."""


def score_queries(
    a: System,
    b: System,
    queries: Sequence[JudgedQuery],
    progress: Callable[[int, int], None] | None,
) -> tuple[_Scored, _Scored]:
    """The scores of both systems, by query and document.

    Raises:
        LanerankError: A system fails on a query; the message names the query and the system.
    """
    runs: tuple[_Scored, _Scored] = ({}, {})
    done = 0
    # The lanes of a scenario share query and documents: what they have in common is asked once.
    for _, members in groupby(queries, key=_question):
        answers: dict[tuple[int, Instruction | None], dict[str, float]] = {}
        for query in members:
            for system, run in zip((a, b), runs, strict=True):
                instruction = system.instruction_for(query.instruction)
                key = (id(system.reranker), instruction)
                if key not in answers:
                    answers[key] = _ask(system, query, instruction)
                run[query.id] = answers[key]
            done += 1
            if progress:
                progress(done, len(queries))
    return runs


def _question(query: JudgedQuery) -> tuple[object, ...]:
    """What queries must share for their answers to depend on the instruction alone."""
    return query.query, query.attributes, *map(id, query.documents)


def _ask(system: System, query: JudgedQuery, instruction: Instruction | None) -> dict[str, float]:
    try:
        # Without this, "no instruction" would mean that of a scope around the whole comparison.
        with use_instruction(None):
            scores = system.reranker.score(
                query.query, query.documents, instruction=instruction, attributes=query.attributes
            )
        if len(scores) != len(query.documents):
            raise ScorerError(
                f"{len(scores)} scores for {len(query.documents)} documents; expected one for "
                "each document, in input order"
            )
    except LanerankError as error:
        # Type and attributes stay as they are: only the message says where it happened.
        error.args = (f"query {query.id!r}, {system.model} with {system.label!r}: {error}",)
        raise
    return {str(doc.id): float(score) for doc, score in zip(query.documents, scores, strict=True)}


def ranking_of(system: System, query: JudgedQuery, scores: Mapping[str, float]) -> Ranking:
    """The answer of a system as a ranking, to be shown."""
    values = tuple(scores.values())
    instruction = system.instruction_for(query.instruction)
    return Ranking(
        results=tuple(
            RankedDocument(index=index, score=values[index], document=query.documents[index])
            for index in order_by_score(values)
        ),
        query=query.query,
        model=system.model,
        instruction_fingerprint=instruction.fingerprint if instruction else None,
        instruction_source=str(Source.ARGUMENT) if instruction else None,
        non_finite=tuple(i for i, value in enumerate(values) if not math.isfinite(value)),
    )
