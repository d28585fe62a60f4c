"""Service contracts: how a server or a hosted service wants to be asked, and answers, as data.

A contract is one JSON file in `services/`, or one that a user wrote. What differs between services
is names: of fields, of the place where an instruction goes, of what comes back. One that follows a
common shape takes a few lines:

>>> contract = ServiceContract(
...     service="mine",
...     path="/v1/rerank",
...     request={"documents": "passages"},
...     response={"score": "score"},
...     instruction={"field": "task"},
... )
>>> contract.body(query="fish", documents=[("cod", "")], instruction="Prefer recipes.")
{'query': 'fish', 'passages': ['cod'], 'task': 'Prefer recipes.'}
>>> contract.read({"results": [{"index": 0, "score": 0.5}]}, 1).values
(0.5,)
"""

from __future__ import annotations

import difflib
import json
import math
import reprlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from lanerank.contracts import LongDocuments, Scores
from lanerank.errors import InputError, InstructionNotSupportedError, ModelLoadError
from lanerank.markers import Steps, at_once, check_markers, neutralising
from lanerank.template import Mapping01, PromptTemplate, Segment

ScoreKind = Literal["unit", "logit", "raw"]
"""What a service's scores are: in [0, 1] as they stand, logits whose sigmoid is, or any numbers."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_SLACK = 1e-3
"""How far beyond [0, 1] a score in that range may lie, since services compute in half precision."""

SPECIAL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|end|>", "<|embed_token|>", "<|rerank_token|>", "<|score_token|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<mask>", "<s>", "</s>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<<SYS>>", "<</SYS>>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_CONTENT]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
    *("[THINK]", "[/THINK]", "[start_header_id]", "[end_header_id]", "[gMASK]", "[sMASK]"),
    *("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[BOS]", "[EOS]", "[EOT]", "]~!b[", "]~b]", "[e~["),
)
"""Tokens that mark turns and lanes. A server that turns one string into ids reads them in a
document as if they were its own.

Most others are known by their form, see `neutralise`. Here are those that only a list can tell from
tags and words in brackets, and the usual ones, which count with white space in them too. Left out
are some that honest text has far more often than attacks: `[IMG]`, `[ARGS]`, `<role>`."""


class Key(BaseModel):
    """How a service wants to be shown a key."""

    model_config = _FROZEN

    environment: str
    """The environment variable that holds it."""
    header: str = "Authorization"
    prefix: str = "Bearer "
    """What stands before the key in the header."""
    required: bool = False


class RequestShape(BaseModel):
    """The names in a request. A dot leads into an object: `input.query`."""

    model_config = _FROZEN

    model: str | None = "model"
    """`None` where a server has one model and no field for its name."""
    query: str = "query"
    documents: str = "documents"
    text: str | None = None
    """The key of the text where each document is an object; without it documents are strings."""
    attributes: str | None = None
    """Where the attributes lane goes: a key of each document where they are objects, otherwise a
    list beside the documents. Without it attributes stand in front of the text."""
    long_documents: str | None = None
    """The field that takes `"max_window"`; without it the service cannot be asked for windows."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields that every request has."""


class ResponseShape(BaseModel):
    """The names in an answer. A dot leads into an object: `output.results`."""

    model_config = _FROZEN

    results: str = "results"
    """The list of results; the empty string is an answer that is the list itself."""
    index: str | None = "index"
    """The place in the request; `None` where the order of the results is that of the request."""
    score: str | None = "relevance_score"
    """`None` where each result is the score itself."""
    truncated: str | None = None
    """A list of the places of documents that were cut, for services that tell."""
    applied: str | None = None
    """How the instruction was applied, for services that tell: `"neutral"` where the model took it
    for one that changes nothing."""


class InstructionChannel(BaseModel):
    """How an instruction travels: in one of three ways."""

    model_config = _FROZEN

    field: str | None = None
    """In a field of its own."""
    query: str | None = None
    """In the query, such as `"<query>{query}</query>\\n<instruction>{instruction}</instruction>"`.
    A call without an instruction has the query alone."""
    template: bool = False
    """In a prompt that lanerank renders by the contract of the model, because the server reads two
    texts and puts nothing around them."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields that replace those of `request.extra` in a request with a rendered prompt."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if (self.field is not None) + (self.query is not None) + self.template != 1:
            raise ValueError("an instruction goes into a `field`, the `query` or a `template`")
        if self.extra and not self.template:
            raise ValueError("`extra` belongs to a `template`")
        if self.query is not None:
            names = [(name, spec, conv) for _, name, spec, conv in _pieces(self.query) if name]
            if sorted(names) != [("instruction", "", None), ("query", "", None)]:
                raise ValueError("`query` needs {query} and {instruction}, once each and plain")
        return self


class Limits(BaseModel):
    """What a request may hold. lanerank sends several where one would not do."""

    model_config = _FROZEN

    documents: int = Field(100, gt=0)
    bytes: int = Field(1_000_000, gt=1000)
    """Of query and text, summed over the documents, which is how cross-encoders count."""


class ServiceContract(BaseModel):
    """How a service wants to be asked, and what its answer means. See `services/*.json`.

    A contract of your own needs `service`, `path` and what differs from the defaults.
    """

    model_config = _FROZEN

    service: str
    """The name that `service=` takes."""
    url: str | None = None
    """The address of a hosted service; `None` for a server that users run themselves."""
    path: str
    """What comes after the address, such as `"/v1/rerank"`."""
    key: Key | None = None
    request: RequestShape = RequestShape()
    response: ResponseShape = ResponseShape()
    instruction: InstructionChannel | None = None
    """`None` where the service has no way for an instruction."""
    scores: ScoreKind = "unit"
    limits: Limits = Limits()
    strips: bool = False
    """Whether the service drops white space around texts, which a rendered prompt may need."""
    isolates_lanes: bool = False
    """Whether the service turns each lane into ids by itself, so that no text can pass for a
    marker. Where it does not, markers and special tokens are neutralised before sending."""
    markers: tuple[str, ...] = ()
    """Ordinary text that marks lanes in the service's prompt, which no text may imitate."""
    refused: dict[str, str] = Field(default_factory=dict)
    """Models that lanerank does not ask, each with the reason."""
    causes: tuple[str, ...] = ()
    """Why an instruction usually changes nothing, for the error of the probe."""
    sources: tuple[str, ...] = ()
    """Where the facts come from."""
    verified: str = "not verified"
    """What was checked, and how."""
    notes: str = ""

    def __init__(self, /, **fields: Any) -> None:  # noqa: ANN401 - pydantic validates them
        """Check the contract.

        Raises:
            InputError: A field has the wrong type or makes no sense with the others.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"the service contract is not usable: {f'`{where}`: ' if where else ''}"
                + problem["msg"].removeprefix("Value error, ")
            ) from error

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.path.startswith("/"):
            raise ValueError("`path` begins with '/'")
        check_markers(self.markers)
        return self

    def carries_instructions(self, template: PromptTemplate | None) -> bool:
        """Whether an instruction reaches the model, given the model's own contract if known."""
        if self.instruction is None:
            return False
        if self.instruction.template:
            return template is not None and template.supports_instructions
        return True

    def body(
        self,
        *,
        query: str,
        documents: Sequence[tuple[str, str]],
        instruction: str = "",
        model: str | None = None,
        template: PromptTemplate | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> dict[str, JsonValue]:
        """The body of a request.

        Args:
            query: The query lane.
            documents: Text and rendered attributes of each document.
            instruction: The instruction lane; the empty string is none.
            model: The name by which the service knows the model.
            template: The contract of that model. A service that renders its prompts by itself gets
                texts that do not imitate its markers; for others the prompt is rendered by it.
            long_documents: How the service treats them, where it can be told.

        Raises:
            InputError: Windows are asked for, and the service cannot be told.
            InstructionNotSupportedError: The instruction would not reach the model.
        """
        draft = at_once(
            self.draft(
                query=query,
                instruction=instruction,
                model=model,
                template=template,
                long_documents=long_documents,
            )
        )
        return draft.body([at_once(draft.document(*document)) for document in documents])

    def draft(
        self,
        *,
        query: str,
        instruction: str = "",
        model: str | None = None,
        template: PromptTemplate | None = None,
        long_documents: LongDocuments = "truncate",
    ) -> Steps[Draft]:
        """`body` in steps: what comes before documents are known. Arguments and errors are its."""
        self._check_call(instruction, model, template, long_documents)
        channel, markers = self.instruction, self._markers(template)
        query = yield from self._harmless(query, markers)
        instruction = yield from self._harmless(instruction, markers)
        frame = None
        if channel is not None and channel.template and template is not None and template.segments:
            query, frame = _rendered(template, markers, query, instruction)
        elif instruction and channel is not None and channel.query is not None:
            query = channel.query.format(query=query, instruction=instruction)
        return Draft(
            contract=self,
            model=model,
            query=query,
            instruction=instruction,
            long_documents=long_documents,
            markers=markers,
            frame=frame,
        )

    def _harmless(self, text: str, markers: tuple[str, ...]) -> Steps[str]:
        """A text that the service cannot take for anything but text."""
        return neutralising(text, markers, chat_tokens=not self.isolates_lanes)

    def _check_call(
        self,
        instruction: str,
        model: str | None,
        template: PromptTemplate | None,
        long_documents: LongDocuments,
    ) -> None:
        if instruction and not self.carries_instructions(template):
            raise InstructionNotSupportedError(
                f"{self.service!r} has no way for an instruction to the model {model!r}, got "
                f"{reprlib.repr(instruction)}"
            )
        if long_documents == "max_window" and self.request.long_documents is None:
            raise InputError(
                f"`long_documents='max_window'` is not for {self.service!r}, which alone can count "
                "the tokens of its model; split the documents, or leave 'truncate'"
            )

    def read(self, answer: object, count: int, *, scores: ScoreKind | None = None) -> Scores:
        """The scores of an answer, in the order of the request.

        Args:
            answer: The answer as parsed from JSON.
            count: How many documents the request had.
            scores: What the scores are, if not what the contract says.

        Raises:
            ValueError: The answer does not have exactly one finite number for each document. The
                message says what it has instead.
        """
        shape = self.response
        results = _get(answer, shape.results)
        if not isinstance(results, list):
            where = f"no list `{shape.results}`" if shape.results else "no list"
            raise ValueError(f"it has {where} of results but {reprlib.repr(results)}")
        if len(results) != count:
            raise ValueError(f"it has {len(results)} results for {count} documents")
        values: dict[int, float] = {}
        for place, result in enumerate(results):
            index = place if shape.index is None else _get(result, shape.index)
            if type(index) is not int or not 0 <= index < count:
                raise ValueError(
                    f"result {place} has the index {reprlib.repr(index)}, expected one from 0 to "
                    f"{count - 1}"
                )
            if index in values:
                raise ValueError(f"it has two results with the index {index}")
            score = result if shape.score is None else _get(result, shape.score)
            values[index] = _score(score, index, scores or self.scores)
        return Scores(
            tuple(values[index] for index in range(count)),
            self._truncated(answer, count),
            neutral=shape.applied is not None and _get(answer, shape.applied) == "neutral",
        )

    def _truncated(self, answer: object, count: int) -> tuple[bool, ...]:
        if self.response.truncated is None:
            return ()
        cut = _get(answer, self.response.truncated)
        if not isinstance(cut, list) or not all(type(i) is int and 0 <= i < count for i in cut):
            raise ValueError(
                f"its `{self.response.truncated}` is no list of indexes but {reprlib.repr(cut)}"
            )
        places = set(cut)
        return tuple(index in places for index in range(count)) if places else ()

    def _markers(self, template: PromptTemplate | None) -> tuple[str, ...]:
        if self.isolates_lanes:
            return ()
        own = () if template is None else (*template.markers, *template.special_tokens)
        return tuple(dict.fromkeys((*self.markers, *own, *SPECIAL_TOKENS)))


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the document in a rendered prompt that is sent as two texts."""

    lane: Segment
    after: str

    def around(self, text: str) -> str:
        return self.lane.before + text + self.lane.after + self.after


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request of which all is known but the documents, so that it serves for several."""

    contract: ServiceContract
    model: str | None
    query: str
    instruction: str
    long_documents: LongDocuments
    markers: tuple[str, ...]
    frame: _Frame | None

    def document(self, text: str, attributes: str) -> Steps[tuple[str, str]]:
        """A document as `body` takes it: its text and attributes, without what marks lanes."""
        if attributes and self.contract.request.attributes is None:
            # As one, since a marker may lie across the two.
            text, attributes = f"{attributes}\n{text}", ""
        if self.frame is not None and self.frame.lane.strip:
            text = text.strip()
        text = yield from self.contract._harmless(text, self.markers)
        attributes = yield from self.contract._harmless(attributes, self.markers)
        return text if self.frame is None else self.frame.around(text), attributes

    def body(self, documents: Sequence[tuple[str, str]]) -> dict[str, JsonValue]:
        """The body of a request for documents that `document` gave."""
        shape, channel = self.contract.request, self.contract.instruction
        body: dict[str, JsonValue] = dict(shape.extra)
        if self.frame is not None and channel is not None:
            body.update(channel.extra)
        windows = None if self.long_documents == "truncate" else self.long_documents
        attributes: list[JsonValue] = [lane for _, lane in documents]
        _put(body, shape.model, self.model)
        _put(body, shape.query, self.query)
        _put(body, shape.documents, self._items(documents))
        if shape.text is None and any(attributes):
            _put(body, shape.attributes, attributes)
        _put(body, None if channel is None else channel.field, self.instruction or None)
        _put(body, shape.long_documents, windows)
        return body

    def _items(self, documents: Sequence[tuple[str, str]]) -> list[JsonValue]:
        shape = self.contract.request
        if shape.text is None:
            return [text for text, _ in documents]
        items: list[JsonValue] = []
        for text, lane in documents:
            item: dict[str, JsonValue] = {shape.text: text}
            if shape.attributes is not None and lane:
                item[shape.attributes] = lane
            items.append(item)
        return items


def check_rendering(template: PromptTemplate, contract: ServiceContract) -> None:
    """Refuse a prompt that cannot be sent to a service as two texts, query and document.

    Raises:
        InputError: It cannot; the message says why.
    """
    if template.kind == "cross_encoder":
        return
    if template.chat:
        raise InputError(
            f"the contract {template.family!r} stands in a chat template, which only the model's "
            "folder has; write a contract with the full prompt as `segments`"
        )
    if not template.isolates_instruction:
        raise InputError(
            f"the contract {template.family!r} puts the document before the query or the "
            "instruction, so one text would hold both; load the model with `from_pretrained`, or "
            "serve it with a server that takes an instruction"
        )
    before, frame = _rendered(template, (), "x", "x")
    if contract.strips and any(text != text.strip() for text in (before, frame.around("x"))):
        raise InputError(
            f"the contract {template.family!r} has white space at the end of the prompt or before "
            f"the document, which {contract.service!r} drops, so the answer would be read at the "
            "wrong place; use a server that takes an instruction"
        )


def _rendered(
    template: PromptTemplate, markers: tuple[str, ...], query: str, instruction: str
) -> tuple[str, _Frame]:
    """The prompt up to the document, and what stands around that."""
    # Special tokens are text here, so content must not spell them; by ids it could not.
    template = template.model_copy(update={"markers": markers})
    segments, _ = template.variant(instruction)
    place = [segment.lane for segment in segments].index("document")
    pieces = template.render(query=query, document="", instruction=instruction)
    before = "".join(piece.text for piece in pieces[:place])
    after = "".join(piece.text for piece in pieces[place + 1 :])
    return before, _Frame(segments[place], after)


def _score(score: object, index: int, kind: ScoreKind) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"the score of document {index} is no number but {reprlib.repr(score)}")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"the score of document {index} is {value!r}, not a finite number")
    if kind == "logit":
        return Mapping01().apply([value])[0]
    if kind == "raw":
        return value
    if not -_SLACK <= value <= 1 + _SLACK:
        raise ValueError(
            f"the score of document {index} is {value!r}, outside [0, 1]; if the service gives "
            "logits or other numbers, pass `scores='logit'` or `scores='raw'`"
        )
    return min(1.0, max(0.0, value))


def _put(body: dict[str, JsonValue], path: str | None, value: JsonValue) -> None:
    """Set a field, where the service has it and there is a value."""
    if path is None or value is None:
        return
    *above, name = path.split(".")
    for step in above:
        inner = body.get(step)
        # A copy, since a fixed field of the contract must stay as it is.
        body[step] = inner = dict(inner) if isinstance(inner, dict) else {}
        body = inner
    body[name] = value


def _get(value: object, path: str) -> object:
    for step in filter(None, path.split(".")):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _pieces(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"`query` is no format: {error}") from None


@cache
def services() -> tuple[ServiceContract, ...]:
    """All service contracts that come with lanerank, by name."""
    folder = files("lanerank") / "services"
    paths = sorted((path for path in folder.iterdir()), key=lambda path: path.name)
    return tuple(
        _parse(path.read_text(encoding="utf-8"), path.name)
        for path in paths
        if path.name.endswith(".json")
    )


def service_for(name: str) -> ServiceContract:
    """The contract of a service by its name.

    Raises:
        InputError: There is none; the message names those there are.
    """
    known = {contract.service: contract for contract in services()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(
        f"`service` {name!r} is not known"
        + (f", did you mean {near[0]!r}?" if near else "")
        + f"; known are {', '.join(known)}; pass a JSON file or a `ServiceContract` for another"
    )


def read_service(path: str | Path) -> ServiceContract:
    """Read a service contract from a JSON file.

    Raises:
        ModelLoadError: The file is missing or not a contract.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> ServiceContract:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise InputError("it is no JSON object")
        return ServiceContract(**fields)
    except ValueError as error:
        raise ModelLoadError(f"{where} cannot be used as a service contract: {error}") from error
