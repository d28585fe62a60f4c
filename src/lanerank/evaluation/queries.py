"""Queries with their candidates and, where they are known, their grades."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from lanerank.contracts import Document
from lanerank.errors import InputError
from lanerank.evaluation.runs import check_id, checked_grades
from lanerank.evaluation.scenarios import INSTRUCTED_KINDS, Scenario, attribute_fields
from lanerank.instruction import Instruction, InstructionLike


class JudgedQuery(BaseModel):
    """A query with its candidates and, where they are known, their grades."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    query: str
    documents: tuple[Document, ...]
    """The candidates in the order in which a model is given them, each with an id."""
    grades: Mapping[str, int] | None
    """Document id to grade; documents without one count as not relevant. `None` without labels."""
    instruction: Instruction | None
    """The instruction that belongs to the query, and under which the grades hold."""
    instruction_aware: bool | None
    """Whether the right order depends on the instruction; `None` where that is not known."""
    attributes: tuple[str, ...]
    """The metadata fields that the model may see."""
    id: str
    cluster: str
    """What the query shares with others, such as its scenario."""

    def __init__(
        self,
        query: str,
        documents: Sequence[Document | str],
        grades: Mapping[str, int] | Sequence[int] | None = None,
        *,
        instruction: InstructionLike = None,
        instruction_aware: bool | None = None,
        attributes: Sequence[str] = (),
        id: str | None = None,
        cluster: str | None = None,
    ) -> None:
        """Check the query, and give every document an id.

        Args:
            query: What is searched for.
            documents: At least one; a document without an id gets its position, counted from 0.
            grades: By document id, also for documents that are not among the candidates, as in
                TREC qrels; or one for each document, in order. 0 is not relevant.
            instruction: The query's own instruction; see `OWN`.
            instruction_aware: `True` for a query whose right order depends on the instruction,
                `False` for a generic one. Queries of unknown kind take part in the whole only.
            attributes: The metadata fields that the model may see; none by default.
            id: Unique among the queries compared; by default the text of the query.
            cluster: Queries that are not independent, such as those about the same documents,
                name the same cluster; by default each query is its own.

        Raises:
            InputError: An argument is not usable; the message names it.
        """
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"`query` must be a str that is not blank, got {query!r}")
        name = query if id is None else id
        check_id(f"`id` of query {query!r}", name)
        named = _with_ids(name, documents)
        if grades is not None and not isinstance(grades, Mapping):
            if len(grades) != len(named):
                raise InputError(
                    f"`grades` of query {name!r} has {len(grades)} values for {len(named)} "
                    "documents; give one for each, or a mapping from document ids"
                )
            grades = {str(doc.id): grade for doc, grade in zip(named, grades, strict=True)}
        if isinstance(attributes, str):
            raise InputError(f"`attributes` must be a list of field names, got {attributes!r}")
        try:
            super().__init__(
                query=query,
                documents=named,
                grades=None if grades is None else checked_grades(name, grades),
                instruction=Instruction.coerce(instruction) or None,
                instruction_aware=instruction_aware,
                attributes=tuple(attributes),
                id=name,
                cluster=name if cluster is None else cluster,
            )
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise InputError(
                f"`{problem['loc'][0]}` of query {name!r}: {problem['msg']}, got "
                f"{reprlib.repr(problem['input'])}"
            ) from error


def queries_from_scenarios(scenarios: Iterable[Scenario]) -> list[JudgedQuery]:
    """Every lane of every scenario as a query with its own instruction and grades.

    Lanes of kind `none` and `neutral` are generic, those of the other kinds instruction-aware. A
    query is named `<scenario id>/<kind of lane>`, numbered from the second of a kind, and the
    queries of a scenario form a cluster. All metadata fields are attributes, and the scenario's
    `today` travels with the instruction, as in `evaluate`.
    """
    queries = []
    for scenario in scenarios:
        documents = tuple(
            Document(doc.text, metadata=doc.metadata, id=doc.id) for doc in scenario.documents
        )
        kinds: Counter[str] = Counter()
        for lane in scenario.lanes:
            kinds[lane.kind] += 1
            number = f"-{kinds[lane.kind]}" if kinds[lane.kind] > 1 else ""
            text = lane.instruction
            queries.append(
                JudgedQuery(
                    scenario.query,
                    documents,
                    lane.grades,
                    instruction=None if text is None else Instruction(text, today=scenario.today),
                    instruction_aware=lane.kind in INSTRUCTED_KINDS,
                    attributes=attribute_fields(scenario),
                    id=f"{scenario.id}/{lane.kind}{number}",
                    cluster=scenario.id,
                )
            )
    return queries


def _with_ids(query: str, documents: Sequence[Document | str]) -> tuple[Document, ...]:
    if isinstance(documents, str | Document | Mapping):
        raise InputError(
            f"`documents` of query {query!r} must be a list of Document or str, got "
            f"{type(documents).__name__}; wrap a single document in a list"
        )
    given = [item if isinstance(item, Document) else Document(item) for item in documents]
    if not given:
        raise InputError(f"`documents` of query {query!r} is empty; there is nothing to rank")
    named = tuple(
        document if document.id is not None else document.model_copy(update={"id": str(position)})
        for position, document in enumerate(given)
    )
    ids = Counter(str(document.id) for document in named)
    for each in ids:
        check_id(f"`documents` of query {query!r}: an id", each)
    if repeated := [each for each, times in ids.items() if times > 1]:
        raise InputError(
            f"`documents` of query {query!r} has the id {repeated[0]!r} more than once; give each "
            "document an id of its own"
        )
    return named
