"""How the measures ask a reranker, and what they need of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lanerank.context import use_instruction
from lanerank.contracts import Document
from lanerank.errors import ScorerError
from lanerank.evaluation.measures import FloatArray
from lanerank.evaluation.scenarios import Scenario, attribute_fields
from lanerank.instruction import Instruction


class SupportsName(Protocol):
    """Anything with a name for the report."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...


class SupportsScore(Protocol):
    """What the measures need of a reranker; `lanerank.Reranker` has it."""

    @property
    def scorer(self) -> SupportsName:
        """The model."""
        ...

    def score(
        self,
        query: str,
        documents: Sequence[Document],
        *,
        instruction: Instruction | None = None,
        attributes: Sequence[str] = (),
    ) -> Sequence[float]:
        """One score for each document, in input order."""
        ...


def score_scenario(
    reranker: SupportsScore,
    scenario: Scenario,
    instruction: Instruction | None,
    documents: Sequence[Document] | None = None,
) -> FloatArray:
    """The scores of a scenario's documents under an instruction.

    Every metadata field that any of the scenario's documents has is an attribute, so that a rule
    about a date or a source can be followed.

    Args:
        reranker: The model.
        scenario: Gives the query, the documents and the attributes.
        instruction: With the scenario's `today` where it should count; `None` asks without one.
        documents: Others in place of the scenario's own, such as attacked ones.

    Returns:
        One score for each document, NaN where the model's is not finite.

    Raises:
        ScorerError: If the reranker does not return one score for each document.
    """
    if documents is None:
        documents = [
            Document(doc.text, metadata=doc.metadata, id=doc.id) for doc in scenario.documents
        ]
    # Without this, "no instruction" would mean that of a scope around the whole evaluation.
    with use_instruction(None):
        values = reranker.score(
            scenario.query,
            documents,
            instruction=instruction,
            attributes=attribute_fields(scenario),
        )
    if len(values) != len(documents):
        raise ScorerError(
            f"{reranker.scorer.name!r} returned {len(values)} scores for {len(documents)} "
            f"documents of scenario {scenario.id!r}; expected one for each document, in input order"
        )
    given = np.array(values, dtype=float)
    return np.where(np.isfinite(given), given, np.nan)


class Remembering:
    """A reranker that scores nothing twice, for measures that ask for the same pairs.

    It relies on scorers being pointwise: a document's score is kept, whatever it was scored with.

    Args:
        reranker: Gives the scores.
    """

    def __init__(self, reranker: SupportsScore) -> None:
        """Begin with an empty memory."""
        self.reranker = reranker
        self._known: dict[tuple[str, str, tuple[str, ...]], dict[tuple[str, str], float]] = {}

    @property
    def scorer(self) -> SupportsName:
        """The model."""
        return self.reranker.scorer

    def score(
        self,
        query: str,
        documents: Sequence[Document],
        *,
        instruction: Instruction | None = None,
        attributes: Sequence[str] = (),
    ) -> Sequence[float]:
        """One score for each document, in input order."""
        known = self._known.setdefault((query, repr(instruction), tuple(attributes)), {})
        # Metadata need be neither hashable nor JSON.
        keys = [(document.text, repr(document.metadata)) for document in documents]
        missing = {key: doc for key, doc in zip(keys, documents, strict=True) if key not in known}
        if missing:
            values = self.reranker.score(
                query, list(missing.values()), instruction=instruction, attributes=attributes
            )
            if len(values) != len(missing):
                raise ScorerError(
                    f"{self.scorer.name!r} returned {len(values)} scores for {len(missing)} "
                    "documents; expected one for each document, in input order"
                )
            known.update(zip(missing, values, strict=True))
        return [known[key] for key in keys]
