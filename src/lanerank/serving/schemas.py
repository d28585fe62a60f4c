"""What goes over the wire: requests, answers and errors, in Cohere's shape with an instruction.

Strict on the way in: a number is no text, a field that does not exist is an error, and what JSON
has no number for is refused.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lanerank.contracts import LongDocuments
from lanerank.reranker import Applied

_CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_UNKNOWN = 10
"""How many fields that do not exist are told one by one."""


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse what was too large for a float, however deep it is buried."""
    try:
        # A loop over millions of values would hold up every other request for seconds.
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise ValueError("a number is too large") from None
    return values


def _day(value: object) -> object:
    # Left to itself pydantic takes numbers and times as well.
    if isinstance(value, str):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            pass
    elif value is None or isinstance(value, dt.date):
        return value
    raise ValueError("expected a date such as '2026-11-22'")


class _Closed(BaseModel):
    """An object of a request. What is in it beyond its fields is an error."""

    model_config = _CLOSED

    @model_validator(mode="before")
    @classmethod
    def _not_crowded(cls, value: object) -> object:
        # Each unknown field is an error of its own, and a short text can hold millions.
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + _UNKNOWN:
            raise ValueError(f"it has {len(value)} fields, known are {', '.join(cls.model_fields)}")
        return value


class WireDocument(_Closed):
    """A document, or its text alone."""

    text: StrictStr
    id: StrictStr | None = None
    """The caller's identifier, handed back where documents are returned."""
    # Its values were read from JSON, and need no check that they are JSON.
    metadata: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(default_factory=dict)
    """Fields of the index. The model sees those that the request names as `attributes`; none is
    ever read as an instruction."""
    attributes: StrictStr | None = None
    """The attributes lane as text, for callers that render it themselves; the model then sees this
    and no field of `metadata`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return {"text": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Say that a string will do, where it comes from the caller."""
        whole = handler(schema)
        return whole if handler.mode == "serialization" else {"anyOf": [{"type": "string"}, whole]}


class ScoreBody(_Closed):
    """A query and documents to score for it."""

    model: StrictStr | None = None
    """The name of the model, if the caller wants to be sure; `/health` tells it."""
    query: StrictStr
    documents: list[WireDocument]
    instruction: StrictStr | None = None
    """What relevance means here. It travels in a lane of its own, which no document can enter."""
    attributes: list[StrictStr] = Field(default_factory=list, max_length=64)
    """The metadata fields that the model may see; none by default."""
    today: Annotated[dt.date | None, BeforeValidator(_day)] = None
    """The date from which ages count; the model is told it with the instruction."""
    long_documents: LongDocuments | None = None
    """What happens to a document longer than the model reads: its beginning is read, or windows of
    it are and the best one counts. By default as the server is set."""


class RerankBody(ScoreBody):
    """A query and documents to put in order for it."""

    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    """How many documents to return; all by default."""
    return_documents: StrictBool = False
    """Whether results hold the documents themselves."""


class Result(BaseModel):
    """One document of a ranking."""

    model_config = _CLOSED

    index: int
    """Position in the request's list."""
    relevance_score: float | None
    """In [0, 1] for the models that lanerank ships; `null` where the model gave no finite number,
    and the document is then among the last."""
    document: WireDocument | None = None


class InstructionMeta(BaseModel):
    """Which instruction was followed, and how."""

    model_config = _CLOSED

    fingerprint: str
    """The same for equal instructions."""
    applied: Applied
    """`"lane"`, or `"neutral"` where the model took it for one that changes nothing; anything else
    only where the server's operator chose it for a model without an instruction channel."""


class Meta(BaseModel):
    """How a ranking came to be."""

    model_config = _CLOSED

    instruction: InstructionMeta | None
    """`null` where the request had none."""
    truncated: list[int]
    """Positions in the request's list of the returned documents that were not read to the end."""


class RerankAnswer(BaseModel):
    """Documents, best first; ties keep the order of the request."""

    model_config = _CLOSED

    id: str
    """A number for this answer."""
    model: str
    results: list[Result]
    meta: Meta


class ScoreAnswer(BaseModel):
    """Scores in the order of the request."""

    model_config = _CLOSED

    model: str
    scores: list[float | None]
    """`null` where the model gave no finite number."""
    truncated: list[bool]
    """Whether the document was not read to the end."""


class Health(BaseModel):
    """The server is up and has its model."""

    model_config = _CLOSED

    status: Literal["ok"] = "ok"
    model: str
    version: str
    """Of lanerank."""


class Problem(BaseModel):
    """Why a request was refused."""

    model_config = _CLOSED

    type: str
    """A name for the kind of problem that programs can rely on."""
    message: str
    """What was wrong, what was expected and what to do."""
    param: str | None = None
    """The field of the request, such as `"documents.3.text"`."""


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    model_config = _CLOSED

    error: Problem
