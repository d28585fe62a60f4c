"""Cases: what an application ranks and wants to keep an eye on, read and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    StrictStr,
    model_validator,
)

from lanerank.contracts import Document
from lanerank.errors import FileFormatError
from lanerank.evaluation.scenarios import (
    Day,
    NotBlank,
    Record,
    Scenario,
    attribute_fields,
    read_objects,
    validate_record,
)
from lanerank.instruction import Instruction


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate has no place in an id; use another id") from None
    return text


def _instruction(value: object) -> object:
    return Instruction(value) if value is None or isinstance(value, str) else value


def _document(value: object) -> object:
    if isinstance(value, str):
        return {"text": value}
    return dict(value) if isinstance(value, Document) else value


_Id = Annotated[NotBlank, AfterValidator(_encodable)]


class CaseDocument(Record):
    """One document of a case."""

    text: StrictStr
    """The retrieved text; may be empty, as some are."""
    id: _Id | None = None
    """Unique in the case. By it a document is known again after its text has changed."""
    metadata: Mapping[StrictStr, JsonValue] = Field(default_factory=dict)
    """What the index knows about it. Only the fields in `Case.attributes` reach the model."""


class Case(Record):
    """A query with documents and an instruction, as the application ranks them."""

    parts: ClassVar[Mapping[str, type[BaseModel]]] = {"documents": CaseDocument}

    id: _Id
    """Unique in a snapshot."""
    query: NotBlank
    """What is searched for."""
    instruction: Annotated[Instruction, BeforeValidator(_instruction)] = Field(
        default_factory=Instruction
    )
    """A text, an object with the fields of an `Instruction`, or nothing."""
    attributes: tuple[StrictStr, ...] = ()
    """The metadata fields that the model may see."""
    documents: Annotated[
        tuple[Annotated[CaseDocument, BeforeValidator(_document)], ...], Field(min_length=1)
    ]
    """The candidates. In place of an object, a text or a `lanerank.Document` will do."""
    today: Day = None
    """The `today` of the instruction. A recency part needs one, here or in the instruction: scores
    that follow the calendar would drift by themselves."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := repeated_name(doc.id for doc in self.documents if doc.id is not None):
            raise ValueError(f"`documents`: id used more than once: {repeated!r}")
        day = self.instruction.effective_today(date.min)
        if day == date.min and self.today is None:
            raise ValueError(
                "`today` is missing: the instruction has a recency part, and without a date its "
                f'scores would drift with the calendar; add "today": "{date.today()}"'
            )
        if self.today and day not in (None, date.min, self.today):
            raise ValueError(f"`today` is {self.today}, and in the instruction {day}; keep one")
        return self

    @property
    def dated_instruction(self) -> Instruction:
        """The instruction with its `today`, as the model is given it."""
        if self.today is None:
            return self.instruction
        return self.instruction.model_copy(update={"today": self.today})


def read_cases(paths: str | Path | Iterable[str | Path]) -> list[Case]:
    """Read cases from JSONL files, plain or `.gz`: UTF-8, one case or scenario a line.

    A case is `{"id", "query", "documents": [{"text", "id"?, "metadata"?}], "instruction"?,
    "attributes"?, "today"?}`; the instruction is a text, an object with the fields of an
    `Instruction`, or null. A line with `lanes` is a scenario: each lane becomes a case, named
    `<scenario id>/<kind>`, from the second of a kind on `<scenario id>/<kind>-2`, and is scored as
    `evaluate` does. The check is as strict as that of `read_scenarios`.

    Args:
        paths: A file, or several that are read as one set, in this order.

    Returns:
        The cases in file order.

    Raises:
        FileFormatError: If a line is not a valid case or scenario, or repeats the id of an earlier
            one. The message begins with the file and the line.
        InputError: If a file cannot be read.
    """
    cases: list[Case] = []
    seen: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for number, value in read_objects(path):
            values = [value]
            if "lanes" in value:
                values = _cases_of(validate_record(Scenario, value, path, number))
            for case in (validate_record(Case, each, path, number) for each in values):
                if case.id in seen:
                    raise FileFormatError(
                        path,
                        number,
                        f"case id {case.id!r} was already used in {seen[case.id]}; "
                        "ids must be unique in files that are read together",
                    )
                seen[case.id] = f"{path}:{number}"
                cases.append(case)
    return cases


def repeated_name(names: Iterable[str]) -> str | None:
    """The first name that occurs twice."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _cases_of(scenario: Scenario) -> list[dict[str, object]]:
    kinds: Counter[str] = Counter()
    cases: list[dict[str, object]] = []
    for lane in scenario.lanes:
        kinds[lane.kind] += 1
        number = f"-{kinds[lane.kind]}" if kinds[lane.kind] > 1 else ""
        cases.append(
            {
                "id": f"{scenario.id}/{lane.kind}{number}",
                "query": scenario.query,
                "instruction": lane.instruction,
                "attributes": attribute_fields(scenario),
                "documents": [
                    doc.model_dump(include={"id", "text", "metadata"}) for doc in scenario.documents
                ],
                # The date travels with an instruction, as in `evaluate`.
                "today": scenario.today if lane.instruction else None,
            }
        )
    return cases
