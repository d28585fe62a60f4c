"""Hostile texts as data, the neutral texts that are their controls, and how they are inserted."""

from __future__ import annotations

import hashlib
import json
import random
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    StrictStr,
    ValidationError,
    model_validator,
)

from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.measures import SEED

Position = Literal["start", "middle", "end"]
"""Where in a document an attack stands."""

POSITIONS: tuple[Position, ...] = get_args(Position)
"""Every position, in the order of reports."""

Disguise = Literal["homoglyphs", "full_width", "zero_width"]
"""Characters that look like those of the text, or that nobody sees, to pass by a filter."""

_T = TypeVar("_T")
_NEAREST_CONTROLS = 5
_WORD = re.compile(r"\w+")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PLACEHOLDERS = ("query", "instruction", "attribute")
_HOMOGLYPHS = str.maketrans("aceopxyijsABCEHKMOPTX", "асеорхуіјѕАВСЕНКМОРТХ")  # noqa: RUF001 - look-alikes on purpose
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}
_FROZEN = ConfigDict(frozen=True, extra="forbid")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


def _not_empty(items: tuple[_T, ...]) -> tuple[_T, ...]:
    if not items:
        raise ValueError("expected at least one")
    return items


_Text = Annotated[StrictStr, AfterValidator(_not_blank)]


class Attack(BaseModel):
    """One wording of one kind of attack."""

    model_config = _FROZEN

    id: _Text
    """Unique in its list."""
    family: _Text
    """The kind of attack; reports have a part for each."""
    text: _Text
    """What is put into a document. `{query}` and `{instruction}` stand for these, `{attribute}` for
    the attributes of a document that the instruction favours, written as a model is shown them
    (`date: 2025-01-15; region: DE`). Other braces are plain text."""
    disguise: Disguise | None = None
    """How the text is disguised once the placeholders are filled in."""
    positions: Annotated[tuple[Position, ...], AfterValidator(_not_empty)] = POSITIONS
    """Where it makes sense."""
    source: _Text
    """Where the wording or the idea comes from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := self.placeholders.difference(_PLACEHOLDERS):
            raise ValueError(
                f"`text` has an unknown placeholder {{{min(unknown)}}}; it may have "
                + ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            )
        return self

    @property
    def placeholders(self) -> frozenset[str]:
        """What has to be known before the attack can be used."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    def fill(self, values: Mapping[str, str], *, repeats: int = 1) -> str:
        """The text to inject.

        Args:
            values: What the placeholders stand for, at least those that occur. Values are foreign
                text: they are put in as they are, and a placeholder in one is not filled in turn.
            repeats: How often the text is said, with blanks between.
        """
        text = _PLACEHOLDER.sub(lambda found: values[found[1]], self.text)
        return " ".join([_disguise(text, self.disguise)] * repeats)


class AttackSuite(BaseModel):
    """A list of attacks, and the neutral prose from which their controls are made."""

    model_config = _FROZEN

    version: Literal[1]
    """The version of the format."""
    attacks: Annotated[tuple[Attack, ...], AfterValidator(_not_empty)]
    neutral: tuple[_Text, ...] = ()
    """Sentences that are relevant to no query, in the language of the documents; empty is the
    English prose that comes with lanerank. Ordered from short words to long ones they give controls
    of any length in words and characters."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        first: dict[object, str] = {}
        for place, attack in enumerate(self.attacks):
            for what, value in (("id", attack.id), ("text", (attack.text, attack.disguise))):
                if value in first:
                    raise ValueError(
                        f"`attacks[{place}].{what}` of {attack.id!r} is that of {first[value]!r} "
                        "as well; leave one of them out"
                    )
                first[value] = attack.id
        if self.neutral and not _WORD.search(" ".join(self.neutral)):
            raise ValueError("`neutral` has no words; give some sentences")
        return self

    @property
    def prose(self) -> tuple[str, ...]:
        """The sentences from which controls are made."""
        return self.neutral or _shipped().neutral

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any text, so that reports can be told apart."""
        content = repr(([attack.model_dump() for attack in self.attacks], self.prose))
        return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def read_attacks(path: str | Path | None = None) -> AttackSuite:
    """Read a list of attacks.

    To tune a defence on some wordings and measure it on others, build two suites from parts of
    `attacks`; every family of the list that comes with lanerank has at least four.

    Args:
        path: A JSON file `{"version": 1, "attacks": [{"id", "family", "text", "source", ...}],
            "neutral": [sentences]}`; `None` reads the list that comes with lanerank.

    Raises:
        InputError: The file cannot be read, or an entry is not valid. The message names the entry
            and the field.
    """
    if path is None:
        return _shipped()
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(
            f"`path`: {str(path)!r} cannot be read: {error.strerror}. Give a JSON file of attacks."
        ) from error
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} (column {error.colno})"
        raise FileFormatError(path, error.lineno, problem) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not usable JSON: {error}") from error
    return make_suite(value, str(path))


def make_suite(value: object, where: str) -> AttackSuite:
    """The suite that has these fields.

    Raises:
        InputError: They are not valid. The message begins with `where` and names entry and field.
    """
    try:
        return AttackSuite.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(value, error)}") from error


def neutral_text(like: str, prose: Sequence[str], *, seed: int = SEED) -> str:
    """Neutral text of the length of another: the same number of words, about as many characters.

    Args:
        like: The text to match. Characters without width do not count.
        prose: Sentences to take it from; a stretch of words from these, in their order.
        seed: Chooses among the stretches that fit best; the same text gets the same control.
    """
    visible = "".join(char for char in like if unicodedata.category(char) != "Cf")
    count = max(1, len(_WORD.findall(visible)))
    once = len(_WORD.findall(" ".join(prose)))
    text = " ".join([*prose] * (count // once + 2))
    words = list(_WORD.finditer(text))
    starts = np.array([word.start() for word in words[:once]])
    ends = np.array([word.end() for word in words[count - 1 : count - 1 + once]])
    misfit = np.abs(ends - starts - len(visible))
    choices = np.argsort(misfit, kind="stable")[:_NEAREST_CONTROLS].tolist()
    chosen = random.Random(f"{seed} {like!r}").choice(choices)
    return text[starts[chosen] : ends[chosen]]


def insert_text(document: str, text: str, position: Position) -> str:
    """A document with a text put in, set off by blanks.

    The middle is the gap between sentences nearest to it, else that between words.
    """
    if position == "start":
        return f"{text} {document}"
    if position == "end":
        return f"{document} {text}"
    half = len(document) // 2
    gaps = [gap.start() for gap in re.finditer(r"(?<=[.!?])\s+", document)]
    gaps = gaps or [gap.start() for gap in re.finditer(r"\s+", document)]
    cut = min(gaps, key=lambda gap: abs(gap - half), default=half)
    return f"{document[:cut]} {text} {document[cut:].lstrip()}"


@cache
def _shipped() -> AttackSuite:
    content = (files("lanerank.evaluation") / "attacks.json").read_bytes()
    return AttackSuite.model_validate(json.loads(content))


def _disguise(text: str, disguise: Disguise | None) -> str:
    if disguise == "homoglyphs":
        return text.translate(_HOMOGLYPHS)
    if disguise == "full_width":
        return text.translate(_FULL_WIDTH)
    if disguise == "zero_width":
        return re.sub(r"(?<=\S)(?=\S)", "\N{ZERO WIDTH SPACE}", text)
    return text


def _explain(value: object, error: ValidationError) -> str:
    """Pydantic's findings as one line, naming each entry by its id and each field."""
    problems = []
    for problem in error.errors(include_url=False):
        where, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields = (Attack if len(where) > 1 else AttackSuite).model_fields
            message = f"unknown field; the fields here are {', '.join(fields)}"
        elif problem["type"] not in ("missing", "value_error"):
            message += f", got {reprlib.repr(problem['input'])}"
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
        name = f"`{steps.removeprefix('.')}`{_name(value, where)}: " if steps else ""
        problems.append(name + message)
    return "; ".join(problems)


def _name(value: object, where: tuple[int | str, ...]) -> str:
    """The id of the entry in which something is wrong, where it can be told."""
    for step in where[:2]:
        try:
            value = value[step]  # type: ignore[index]  # whatever it is, it may not have such a part
        except (TypeError, LookupError):
            return ""
    id_ = value.get("id") if isinstance(value, dict) else getattr(value, "id", None)
    return f" (id {id_!r})" if isinstance(id_, str) else ""
