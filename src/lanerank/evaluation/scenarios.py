"""Scenario files: queries whose right order depends on the instruction, read and checked."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from lanerank.errors import FileFormatError, InputError

LaneKind = Literal[
    "none",
    "neutral",
    "disambiguation",
    "user_context",
    "business_rule",
    "glossary",
    "recency",
    "combined",
]
"""What an instruction is for. `none` is no instruction; `neutral` one that changes no grade."""

LANE_KINDS: tuple[LaneKind, ...] = get_args(LaneKind)
"""Every kind, in the order of reports."""

INSTRUCTED_KINDS: tuple[LaneKind, ...] = tuple(
    kind for kind in LANE_KINDS if kind not in ("none", "neutral")
)
"""The kinds whose instruction is meant to change the order."""

RELEVANT_GRADE = 2
"""From this grade on a document counts as relevant where a measure needs yes or no."""

_ISO_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


def _day(value: object) -> object:
    if value is None or type(value) is date:
        return value
    if isinstance(value, str) and _ISO_DAY.fullmatch(value):
        return date.fromisoformat(value)
    raise ValueError("expected a date written YYYY-MM-DD")


NotBlank = Annotated[StrictStr, AfterValidator(_not_blank)]
"""Text with something in it."""

Day = Annotated[date | None, BeforeValidator(_day)]
"""A date written YYYY-MM-DD, or none."""

_Grade = Annotated[StrictInt, Field(ge=0, le=3)]


class Record(BaseModel):
    """A part of an input file: strict about its own fields, deaf to notes beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """The records inside this one, by the field that holds them, so that errors can name theirs."""

    @model_validator(mode="before")
    @classmethod
    def _drop_notes(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        known = tuple(cls.model_fields)
        return {
            name: field
            for name, field in value.items()
            if name in known or get_close_matches(str(name), known, n=1, cutoff=0.8)
        }


_RecordT = TypeVar("_RecordT", bound=Record)


class ScenarioDocument(Record):
    """One document of a scenario."""

    id: NotBlank
    """Unique in the scenario; grades refer to it."""
    text: NotBlank
    """The retrieved text."""
    metadata: Mapping[StrictStr, JsonValue] = Field(default_factory=dict)
    """What an index would know about it. Every field here reaches the model's attributes lane."""
    injected: StrictBool = False
    """Whether the text holds a prompt injection. For the measures only; no model sees it."""
    text_without_injection: NotBlank | None = None
    """The same text without the injected part, for the attack measure; only where `injected`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "injected" in self.metadata:
            raise ValueError(
                "`injected` stands beside `metadata`, not inside it, where a model would read it"
            )
        if self.text_without_injection is not None and not self.injected:
            raise ValueError("`text_without_injection` needs `injected: true`")
        if self.text_without_injection == self.text:
            raise ValueError("`text_without_injection` equals `text`; leave out the injected part")
        return self


class ScenarioLane(Record):
    """One setting of the instruction, with a grade for every document of the scenario."""

    kind: LaneKind
    """What the instruction is for."""
    instruction: NotBlank | None
    """The instruction's text; `None` in a lane of kind `none`, and only there."""
    grades: Mapping[StrictStr, _Grade]
    """Document id to grade: 3 exactly what is wanted, 2 relevant, 1 marginal, 0 not relevant."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "none" and self.instruction is not None:
            raise ValueError("kind 'none' takes no instruction; set `instruction` to null")
        if self.kind != "none" and self.instruction is None:
            raise ValueError(f"kind {self.kind!r} needs an instruction; only kind 'none' has null")
        return self


class Scenario(Record):
    """A query, its documents, and how they should be graded under different instructions."""

    parts = {"documents": ScenarioDocument, "lanes": ScenarioLane}

    id: NotBlank
    """Unique in the files that are read together."""
    domain: NotBlank
    """The subject area; an instruction from another one counts as irrelevant in some measures."""
    query: NotBlank
    """What the searcher typed."""
    today: Day = None
    """The date on which the search happens, `YYYY-MM-DD`; `None` where the time plays no part."""
    documents: Annotated[tuple[ScenarioDocument, ...], Field(min_length=1)]
    """The candidates, in the order in which they are given to a model."""
    lanes: Annotated[tuple[ScenarioLane, ...], Field(min_length=1)]
    """The settings of the instruction."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [document.id for document in self.documents]
        if repeated := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
            raise ValueError(f"`documents`: id used more than once: {_listed(repeated)}")
        for position, lane in enumerate(self.lanes):
            where = f"`lanes[{position}].grades`"
            if missing := [id_ for id_ in ids if id_ not in lane.grades]:
                raise ValueError(f"{where}: no grade for {_listed(missing)}; grade every document")
            if unknown := [id_ for id_ in lane.grades if id_ not in ids]:
                raise ValueError(f"{where}: there is no document {_listed(unknown)}")
        return self


def attribute_fields(scenario: Scenario) -> tuple[str, ...]:
    """The metadata fields of a scenario's documents, in the order in which they first occur.

    These are what `evaluate` passes as `attributes=`, so that a rule about a date or a source can
    be followed.
    """
    return tuple(dict.fromkeys(name for doc in scenario.documents for name in doc.metadata))


def read_scenarios(paths: str | Path | Iterable[str | Path]) -> list[Scenario]:
    """Read scenarios from JSONL files, plain or `.gz`: UTF-8, one scenario a line.

    The check is strict. A field whose name nearly is one of the format's is refused, because a
    misspelt `today` or `metadata` would otherwise change what is measured without a word. Other
    fields are notes, and are not read; facts about a document go into its `metadata`.

    Args:
        paths: A file, or several that are read as one set, in this order.

    Returns:
        The scenarios in file order.

    Raises:
        FileFormatError: If a line is not a valid scenario, or repeats the id of an earlier one.
            The message begins with the file and the line.
        InputError: If a file cannot be read.
    """
    scenarios: list[Scenario] = []
    seen: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for number, value in read_objects(path):
            scenario = validate_record(Scenario, value, path, number)
            if scenario.id in seen:
                raise FileFormatError(
                    path,
                    number,
                    f"scenario id {scenario.id!r} was already used in {seen[scenario.id]}; "
                    "ids must be unique in files that are read together",
                )
            seen[scenario.id] = f"{path}:{number}"
            scenarios.append(scenario)
    return scenarios


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The JSON objects of a JSONL file with their line numbers; errors as for `read_scenarios`."""
    for number, line in _lines(Path(path)):
        yield number, parse_object(line, path, number)


def parse_object(text: str, path: str | Path, line: int) -> dict[str, object]:
    """The JSON object that a text is, which begins at this line of the file.

    Raises:
        FileFormatError: It is not JSON, not an object, or holds a key twice or NaN.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} (column {error.colno})"
        raise FileFormatError(path, line + error.lineno - 1, problem) from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, line, f"not usable JSON: {error}") from error
    if not isinstance(value, dict):
        problem = f"expected a JSON object, got {reprlib.repr(value)}"
        raise FileFormatError(path, line, problem)
    return value


def validate_record(
    record: type[_RecordT], value: Mapping[str, object], path: str | Path, line: int
) -> _RecordT:
    """The object at this line as a record.

    Raises:
        FileFormatError: It is none; the message names every field that is wrong.
    """
    try:
        return record.model_validate(value)
    except ValidationError as error:
        raise FileFormatError(path, line, _explain(record, value.get("id"), error)) from error
    except RecursionError as error:
        raise FileFormatError(path, line, "nested too deeply") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers counted from 1."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"`paths`: {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}. "
            "Give JSONL files, plain or gzipped."
        ) from error
    # Split as bytes: str.splitlines() would also split at U+2028, which is legal inside JSON.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte {error.start + 1} of the line is {raw[error.start]:#04x}"
            raise FileFormatError(path, number, problem) from error
        if line:
            yield number, line


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"key used more than once in an object: "
            f"{_listed(sorted({name for name in names if names.count(name) > 1}))}"
        )
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _explain(record: type[Record], record_id: object, error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        where, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown field; the fields here are {', '.join(_fields_at(record, where))}"
        elif problem["type"] not in ("missing", "value_error") or where[-1:] == ("today",):
            message += f", got {reprlib.repr(problem['input'])}"
        problems.append(f"{_location(where)}{message}")
    name = record.__name__.lower()
    label = f"{name} {reprlib.repr(record_id)}: " if isinstance(record_id, str) else ""
    return label + "; ".join(problems)


def _location(where: tuple[int | str, ...]) -> str:
    """A field's place as `lanes[1].grades.d3`, ready to put before a message."""
    if not where:
        return ""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
    return f"`{steps.removeprefix('.')}`: "


def _fields_at(record: type[Record], where: tuple[int | str, ...]) -> Iterable[str]:
    return (record if len(where) == 1 else record.parts[str(where[0])]).model_fields


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
