"""The instruction: its parts, how they are worded for a model, and how layers combine."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    StrictStr,
    ValidationError,
)

from lanerank.errors import InputError

# What ends a sentence, in several scripts, and the quotes and brackets that may follow it.
_SENTENCE_ENDS = tuple(".!?…:;。！？।؟۔")  # noqa: RUF001
_CLOSERS = "\"'”’»)]}」』"  # noqa: RUF001


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Glossary(Mapping[str, str]):
    """A mapping that cannot change; unlike `MappingProxyType` it can be hashed and pickled."""

    pairs: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, term: str) -> str:
        return dict(self.pairs)[term]

    def __iter__(self) -> Iterator[str]:
        return (term for term, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self.pairs))

    def __repr__(self) -> str:
        return repr(dict(self.pairs))


def _strip(text: str | None) -> str | None:
    return (text or "").strip() or None


def _strip_all(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(stripped for text in texts if (stripped := text.strip()))


def _listed(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, set | frozenset):
        raise ValueError("expected a list or a tuple, because a set has no fixed order")
    return (value,) if isinstance(value, str) else value


def _freeze(glossary: Mapping[str, str]) -> Mapping[str, str]:
    pairs = tuple((term.strip(), meaning.strip()) for term, meaning in glossary.items())
    kept = tuple(pair for pair in pairs if all(pair))
    if len(dict(kept)) < len(kept):
        raise ValueError("the same term occurs twice; give each term one meaning")
    return _Glossary(kept)


def _day(value: object) -> object:
    if isinstance(value, datetime):
        raise ValueError("expected a date without a time; pass `.date()` of it")
    if not isinstance(value, str):
        return value
    try:
        return date.fromisoformat(value.strip())
    except ValueError:
        raise ValueError("expected a date such as '2026-11-22'") from None


# What the fields accept and how they keep it. Strict, so that bytes and numbers are refused.
_Text = Annotated[StrictStr | None, AfterValidator(_strip)]
_Texts = Annotated[tuple[StrictStr, ...], BeforeValidator(_listed), AfterValidator(_strip_all)]
_Terms = Annotated[
    Mapping[StrictStr, StrictStr],
    BeforeValidator(lambda value: {} if value is None else value),
    AfterValidator(_freeze),
    PlainSerializer(lambda glossary: dict(glossary), return_type=dict[str, str]),
]
_Day = Annotated[Annotated[date, Strict()] | None, BeforeValidator(_day)]


class _Parts(TypedDict, total=False):
    """The keyword arguments of `Instruction`, as a caller may write them."""

    rules: str | Sequence[str] | None
    user_context: str | None
    disambiguation: str | Sequence[str] | None
    glossary: Mapping[str, str] | None
    recency: str | None
    today: date | str | None
    layers: Sequence[Instruction]


class Instruction(BaseModel):
    """What should count as relevant, in the words of the application and of its user.

    Every part is optional; blank parts count as absent. Instructions are values: frozen,
    hashable, equal when their layers are equal, and false when they hold nothing.

    >>> operator = Instruction(rules="Prefer trial reports", glossary={"MI": "heart attack"})
    >>> (operator + "The user is a nurse").render()
    'Prefer trial reports. MI means heart attack. The user is a nurse.'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: _Text = None
    """Free wording; all that most callers need."""
    rules: _Texts = ()
    """Business rules, a sentence each. A single string is one rule."""
    user_context: _Text = None
    """Who is asking and what for, as a sentence."""
    disambiguation: _Texts = ()
    """Hints such as "Treat 'IMO' as the International Maritime Organization."."""
    glossary: _Terms = Field(default_factory=_Glossary)
    """Terms with their meanings, kept in the order given."""
    recency: _Text = None
    """Which age of document to prefer, in words: "Prefer documents from the last six months."."""
    today: _Day = None
    """The date from which ages count; an ISO string is accepted. See `effective_today`."""
    layers: Annotated[tuple[Instruction, ...], BeforeValidator(_listed)] = ()
    """Instructions of lower rank, the highest first; usually made by `operator + user`."""

    def __init__(self, /, text: str | None = None, **parts: Unpack[_Parts]) -> None:
        """Accept the text by position, as `Instruction("...")`.

        Raises:
            InputError: If a part has the wrong type, or there is no such part.
        """
        try:
            super().__init__(text=text, **parts)
        except ValidationError as error:
            raise InputError(_explain(error)) from error

    @classmethod
    def coerce(cls, value: InstructionLike, *, name: str = "`instruction`") -> Instruction:
        """An instruction from whatever an `instruction=` argument takes.

        A string becomes the text, `None` the empty instruction. Error messages use `name`.

        Raises:
            InputError: If the value is of any other type.
        """
        if isinstance(value, Instruction):
            return value
        if value is None or isinstance(value, str):
            return cls(value)
        raise InputError(
            f"{name} must be a str, an Instruction or None, got {type(value).__name__}: "
            f"{reprlib.repr(value)}. Pass one string, or `Instruction(rules=[...])` for several."
        )

    @property
    def is_empty(self) -> bool:
        """Whether no layer holds anything."""
        return not self._stack()

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the instruction, fit to be kept in logs.

        The same for equal instructions, in every process and on every day: the current date that
        a recency part brings in is not part of it, an explicit `today` is.
        """
        # Lone surrogates are legal in a str, and must not stop a ranking from being recorded.
        content = self._canonical().encode("utf-8", "surrogatepass")
        return hashlib.sha256(content).hexdigest()[:16]

    def effective_today(self, default_today: date | None = None) -> date | None:
        """The date to reckon ages from, or `None` where the instruction does not ask for one.

        It is the `today` of the first layer that has one; failing that, if any layer has a
        recency part, `default_today`, which is the current local date by default. Read the clock
        once and pass it here and to `render` where the two must agree across midnight.
        """
        stack = self._stack()
        explicit = next((layer.today for layer in stack if layer.today), None)
        if explicit or not any(layer.recency for layer in stack):
            return explicit
        return default_today or date.today()

    def render(self, default_today: date | None = None) -> str:
        """The instruction as plain sentences, the one wording that every model is given.

        Each layer gives its text, user context, rules, hints, glossary and recency, in this
        order; `effective_today(default_today)` comes once, at the end. A term that an earlier
        layer defines, in whatever case, is left out of later ones. A text on its own stays
        exactly as it is; the empty instruction gives the empty string.
        """
        stack = self._stack()
        today = self.effective_today(default_today)
        sentences: list[str] = []
        defined: set[str] = set()
        for layer in stack:
            sentences += layer._sentences(defined)
            defined.update(term.casefold() for term in layer.glossary)
        if today:
            sentences.append(f"Today is {today.isoformat()}.")
        if len(sentences) == 1 and stack[0].text:
            return sentences[0]
        return " ".join(map(_end_sentence, sentences))

    def __bool__(self) -> bool:
        """Whether the instruction holds anything."""
        return not self.is_empty

    def __eq__(self, other: object) -> bool:
        """Equal when the layers are, however they are nested; the order of a glossary counts."""
        if not isinstance(other, Instruction):
            return NotImplemented
        return self._canonical() == other._canonical()

    def __hash__(self) -> int:
        """Agree with `__eq__`."""
        return hash(self._canonical())

    def __add__(self, lower: InstructionLike) -> Instruction:
        """Put another instruction below this one: `operator + user`.

        The parts of the left side come first, and its glossary terms and its `today` win.
        Layering is associative, and the empty instruction changes nothing.
        """
        if not isinstance(lower, str | Instruction | None):
            return NotImplemented
        stack = (*self._stack(), *Instruction.coerce(lower)._stack())
        if not stack:
            return Instruction()
        return stack[0].model_copy(update={"layers": stack[1:]})

    def __radd__(self, upper: str | None) -> Instruction:
        """Put this instruction below a string: `"operator's rules" + user`."""
        if not isinstance(upper, str | None):
            return NotImplemented
        return Instruction(upper) + self

    def _own(self) -> dict[str, object]:
        """The parts present in this layer, as JSON values."""
        parts = {
            "text": self.text,
            "user_context": self.user_context,
            "rules": self.rules,
            "disambiguation": self.disambiguation,
            "glossary": tuple(self.glossary.items()),
            "recency": self.recency,
            "today": self.today and self.today.isoformat(),
        }
        # Absent parts are left out, so that a part added later keeps today's fingerprints valid.
        return {name: part for name, part in parts.items() if part}

    def _stack(self) -> tuple[Instruction, ...]:
        """The non-empty layers, own parts first, none of them nested any more."""
        own = (self.model_copy(update={"layers": ()}),) if self._own() else ()
        return (*own, *(part for layer in self.layers for part in layer._stack()))

    def _canonical(self) -> str:
        content = [layer._own() for layer in self._stack()]
        return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    def _sentences(self, defined: set[str]) -> list[str]:
        terms = [pair for pair in self.glossary.items() if pair[0].casefold() not in defined]
        return [
            *filter(None, (self.text, self.user_context)),
            *self.rules,
            *self.disambiguation,
            *(f"{term} means {meaning}" for term, meaning in terms),
            *filter(None, (self.recency,)),
        ]


InstructionLike = str | Instruction | None
"""What every `instruction=` argument takes; a string is the text of an instruction."""


def _end_sentence(part: str) -> str:
    return part if part.rstrip(_CLOSERS).endswith(_SENTENCE_ENDS) else f"{part}."


def _explain(error: ValidationError) -> str:
    """Pydantic's findings as one line, naming each part and the value it had."""
    problems = [
        f"`{'.'.join(map(str, problem['loc']))}`: {problem['msg'].removeprefix('Value error, ')}, "
        f"got {reprlib.repr(problem['input'])}"
        for problem in error.errors(include_url=False)
    ]
    known = ", ".join(Instruction.model_fields)
    return f"the instruction is not usable: {'; '.join(problems)} (its parts are {known})"
