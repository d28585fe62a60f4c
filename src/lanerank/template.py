"""Prompt contracts: the exact text around the lanes that a model was trained on, as data.

A contract is one JSON file in `templates/`, or one that a user wrote. It is looked up by the exact
id of a model; nothing is guessed from a name, because a wrong prompt gives plausible scores.

>>> contract = contract_for("Qwen/Qwen3-Reranker-0.6B")
>>> contract.isolates_instruction
True
>>> [piece.text for piece in contract.render(query="fish", document="cod")][-3:-1]
['<Document>:', ' cod']
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lanerank.contracts import Lane
from lanerank.errors import InputError, ModelLoadError
from lanerank.markers import check_markers, neutralise

LOCAL_CONTRACT = "lanerank.json"
"""The name of a contract that lies beside weights in a folder."""

_LANES = {
    "instruction": Lane.INSTRUCTION,
    "query": Lane.QUERY,
    "attributes": Lane.ATTRIBUTES,
    "document": Lane.DOCUMENT,
}
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Segment(BaseModel):
    """A stretch of a prompt that is tokenised by itself: fixed text, or a lane's content.

    Cut fixed text where the tokenizer can merge nothing across the cut. Where it could, as between
    `<Document>:` and a text that follows a blank, let the blank belong to the lane as `before`.
    """

    model_config = _FROZEN

    fixed: str | None = None
    """Text of the template, which may name special tokens."""
    lane: Literal["instruction", "query", "document"] | None = None
    """Whose content stands here. Attributes go to the beginning of the document's content."""
    before: str = ""
    """Text of the template that is tokenised together with the content that follows it."""
    after: str = ""
    """Text of the template that is tokenised together with the content before it."""
    strip: bool = False
    """Whether white space around the content is dropped, as the model's own code does."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.fixed is None) == (self.lane is None):
            raise ValueError("a segment has either `fixed` or `lane`")
        if self.fixed is not None and (self.before or self.after or self.strip):
            raise ValueError("`before`, `after` and `strip` belong to a segment with a `lane`")
        return self


class Answer(BaseModel):
    """A token whose logit says how relevant the document is."""

    model_config = _FROZEN

    token: str
    """The token as text."""
    id: int | None = None
    """Its id, checked when the model is loaded; `None` where it differs between models."""


class Answers(BaseModel):
    """The tokens that are read at the last position of the prompt."""

    model_config = _FROZEN

    positive: Answer
    negative: Answer | None = None
    """Without one, the logit of the positive token alone is the raw score."""


class Mapping01(BaseModel):
    """From raw score to [0, 1]: `sigmoid((raw - shift) / scale)`."""

    model_config = _FROZEN

    shift: float = 0.0
    scale: float = Field(1.0, gt=0)
    official: bool = True
    """Whether the model's authors map scores like this. If not, scores only order documents."""

    def apply(self, raw: Iterable[float]) -> tuple[float, ...]:
        """Map raw scores; what is not a number stays so."""
        return tuple(_sigmoid((value - self.shift) / self.scale) for value in raw)


def _sigmoid(value: float) -> float:
    # Of the two forms the one whose exponential cannot overflow.
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)


class ModelFacts(BaseModel):
    """What differs between the models of one family."""

    model_config = _FROZEN

    parameters: str | None = None
    """The size, such as `"0.6B"`."""
    licence: str | None = None
    mapping: Mapping01 | None = None
    max_tokens: int | None = Field(None, gt=0)
    remote_code: bool = False
    """Whether the model needs Python code from its repository, which has to be allowed by name."""


class Piece(NamedTuple):
    """A stretch of a rendered prompt."""

    lane: Lane | None
    """`None` for text of the template."""
    text: str


class PromptTemplate(BaseModel):
    """How a model wants to be asked, and how its answer becomes a score. See `templates/*.json`.

    A contract of your own needs `family`, `kind`, `segments`, `answers` and what to do without an
    instruction; the rest has defaults.
    """

    model_config = _FROZEN

    family: str
    """The name that `contract=` takes."""
    kind: Literal["causal_lm", "cross_encoder", "refused"]
    models: dict[str, ModelFacts] = Field(default_factory=dict)
    """Exact ids on the Hugging Face hub, with what is special about each."""
    segments: tuple[Segment, ...] = ()
    """The prompt, in order; empty for a cross-encoder, whose tokenizer joins query and document."""
    segments_without_instruction: tuple[Segment, ...] | None = None
    """The prompt of a call without an instruction, where the model was trained without one."""
    default_instruction: str | None = None
    """What stands for the instruction where a call has none and the model always expects one."""
    chat: bool = False
    """Whether `segments` are the user's turn of whatever chat template the model comes with."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that fixed text names; the tokenizer must have each as one token."""
    markers: tuple[str, ...] = ()
    """Ordinary text that marks lanes in the prompt, which content must not imitate."""
    ordinary_tokens: str = ""
    """A regular expression of added tokens that content may hold, because the model met them in
    ordinary text; special tokens stay reserved whatever it says."""
    answers: Answers | None = None
    mapping: Mapping01 = Mapping01()
    max_tokens: int = Field(8192, gt=0)
    """The longest prompt, which a model's own number of positions may lower."""
    licence: str = "unknown"
    languages: str = "unknown"
    sources: tuple[str, ...] = ()
    """Where the facts come from."""
    verified: str = "not verified"
    """What was checked, and how."""
    notes: str = ""
    reason: str = ""
    """Why the model is refused."""

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
                f"the contract is not usable: {f'`{where}`: ' if where else ''}"
                + problem["msg"].removeprefix("Value error, ")
            ) from error

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "refused" and not self.reason:
            raise ValueError("a refused model needs a `reason`")
        if self.kind == "cross_encoder" and (self.segments or self.answers):
            raise ValueError("a cross-encoder has neither `segments` nor `answers`")
        check_markers(self.markers)
        try:
            re.compile(self.ordinary_tokens)
        except re.error as error:
            raise ValueError(f"`ordinary_tokens` is no regular expression: {error}") from error
        if self.kind == "causal_lm":
            self._complete_prompt()
        return self

    def _complete_prompt(self) -> None:
        if self.answers is None:
            raise ValueError("a causal language model needs `answers`")
        without = self.segments_without_instruction
        for variant in (self.segments, self.segments if without is None else without):
            lanes = [segment.lane for segment in variant if segment.lane]
            if len(set(lanes)) < len(lanes) or not {"query", "document"} <= set(lanes):
                raise ValueError("segments need one `query` and one `document`, no lane twice")
            if self.chat and (variant[0].fixed is None or variant[-1].fixed is None):
                raise ValueError("segments inside a chat template begin and end with `fixed`")
        if without is not None and any(segment.lane == "instruction" for segment in without):
            raise ValueError("`segments_without_instruction` has an `instruction`")
        if self.supports_instructions and without is None and self.default_instruction is None:
            raise ValueError(
                "say what a prompt without instruction looks like: `segments_without_instruction` "
                "or `default_instruction`"
            )

    @property
    def supports_instructions(self) -> bool:
        """Whether the prompt has a place for an instruction."""
        return any(segment.lane == "instruction" for segment in self.segments)

    @property
    def isolates_instruction(self) -> bool:
        """Whether no document can change how the instruction and the query are read.

        In a causal model this is so where both come before the document. It does not mean that a
        document cannot lie.
        """
        if self.kind != "causal_lm" or not self.supports_instructions:
            return False
        return all(
            [segment.lane for segment in variant if segment.lane][-1] == "document"
            for variant in (self.segments, self.segments_without_instruction or self.segments)
        )

    def variant(self, instruction: str) -> tuple[tuple[Segment, ...], str]:
        """The segments for a call, and the instruction to put into them."""
        if instruction.strip():
            return self.segments, instruction
        if self.segments_without_instruction is not None:
            return self.segments_without_instruction, ""
        return self.segments, self.default_instruction or ""

    def content(self, segment: Segment, text: str) -> str:
        """What of a text stands in a lane's segment: stripped if asked, markers neutralised."""
        return neutralise(text.strip() if segment.strip else text, self.markers)

    def render(self, *, query: str, document: str, instruction: str = "") -> tuple[Piece, ...]:
        """The prompt as text, cut into the pieces that are tokenised one by one.

        For people to read: a model never gets this text, it gets the ids of the pieces.
        """
        segments, instruction = self.variant(instruction)
        texts = {"instruction": instruction, "query": query, "document": document}
        if self.kind == "cross_encoder":
            segments = (Segment(lane="query"), Segment(lane="document"))
        pieces = []
        for segment in segments:
            if segment.lane is None:
                pieces.append(Piece(None, segment.fixed or ""))
            else:
                content = self.content(segment, texts[segment.lane])
                pieces.append(Piece(_LANES[segment.lane], segment.before + content + segment.after))
        return tuple(pieces)

    def in_chat(self, wrap: Callable[[str], str]) -> PromptTemplate:
        """The contract with its segments inside a model's own chat template.

        Args:
            wrap: Renders a conversation whose only turn is the given text of the user, up to the
                place where the assistant's answer begins.

        Raises:
            ModelLoadError: The template does not hand the text on as it is.
        """
        sentinel = "lanerank stands here"
        before, found, after = wrap(sentinel).partition(sentinel)
        if not found or sentinel in after:
            raise ModelLoadError(
                "the model's chat template does not show the user's turn once and unchanged; "
                "write a contract with the full prompt as `segments`"
            )

        def framed(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
            first, *inner, last = segments
            opening, closing = before + (first.fixed or ""), (last.fixed or "") + after
            return (Segment(fixed=opening), *inner, Segment(fixed=closing))

        without = self.segments_without_instruction
        return self.model_copy(
            update={
                "chat": False,
                "segments": framed(self.segments),
                "segments_without_instruction": without and framed(without),
            }
        )

    def for_model(self, model: str) -> PromptTemplate:
        """The contract with what is special about one of its models filled in."""
        facts = self.models[model]
        changed = {
            name: value
            for name in ("licence", "mapping", "max_tokens")
            if (value := getattr(facts, name)) is not None
        }
        return self.model_copy(update={**changed, "models": {model: facts}})


@cache
def contracts() -> tuple[PromptTemplate, ...]:
    """All contracts that come with lanerank, by name of the family."""
    folder = files("lanerank") / "templates"
    paths = sorted((path for path in folder.iterdir()), key=lambda path: path.name)
    return tuple(
        _parse(path.read_text(encoding="utf-8"), path.name)
        for path in paths
        if path.name.endswith(".json")
    )


def known_models() -> Iterator[tuple[str, PromptTemplate]]:
    """Every model id that has a contract, with that contract."""
    for contract in contracts():
        for model in contract.models:
            yield model, contract.for_model(model)


def contract_for(name: str) -> PromptTemplate:
    """The contract of a model id, or of a family whose models do not differ.

    Raises:
        InputError: There is none; the message names the nearest.
    """
    models = dict(known_models())
    if name in models:
        return models[name]
    for contract in contracts():
        if contract.family == name:
            if any(facts.mapping or facts.max_tokens for facts in contract.models.values()):
                raise InputError(
                    f"the models of the family {name!r} differ; name one of "
                    f"{', '.join(contract.models)}"
                )
            return contract
    known = [*models, *(contract.family for contract in contracts())]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    raise InputError(
        f"no contract is known for {name!r}"
        + (f"; near it are {', '.join(map(repr, near))}" if near else "")
    )


def read_contract(path: str | Path) -> PromptTemplate:
    """Read a contract from a JSON file, such as the `lanerank.json` beside a model's weights.

    The file holds a whole contract, or `{"model": "..."}` or `{"family": "..."}` to say that the
    contract of that model or family applies.

    Raises:
        ModelLoadError: The file is missing or not a contract.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> PromptTemplate:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise InputError("it is no JSON object")
        if len(fields) == 1 and fields.keys() <= {"model", "family"}:
            return contract_for(str(*fields.values()))
        return PromptTemplate(**fields)
    except ValueError as error:
        raise ModelLoadError(f"{where} cannot be used as a contract: {error}") from error
