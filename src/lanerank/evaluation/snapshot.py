"""Snapshots: how a reranker scored the cases that matter to an application."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Self
from uuid import uuid4

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from lanerank.context import use_instruction
from lanerank.contracts import Document, order_by_score
from lanerank.display import one_line
from lanerank.errors import FileFormatError, InputError, LanerankError, ScorerError
from lanerank.evaluation.cases import Case, CaseDocument, repeated_name
from lanerank.evaluation.scenarios import parse_object
from lanerank.evaluation.scoring import SupportsScore

SCORE_DIGITS = 4
"""Scores are recorded and compared to this many decimals."""

_FORMAT = "lanerank-snapshot"
_VERSION = 1
_NOT_PLAIN = re.compile(r"[^ -~]")


_Hash = Annotated[StrictStr, Field(pattern="^[0-9a-f]{16}$")]


class RecordedDocument(BaseModel):
    """What a snapshot keeps of a document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: StrictStr | None
    """The document's id."""
    content: _Hash
    """A hash of what the model was given: the text and the chosen attributes."""
    score: Annotated[StrictFloat, Field(allow_inf_nan=False)] | None
    """The score to `SCORE_DIGITS` decimals; `None` where it was not finite."""
    rank: Annotated[StrictInt, Field(ge=1)]
    """The place in the case's ranking, from 1, by the scores before rounding."""


class RecordedCase(BaseModel):
    """What a snapshot keeps of a case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: StrictStr
    """The case's id."""
    query: _Hash
    """A hash of the query."""
    instruction: _Hash | None
    """`Instruction.fingerprint` with the date; `None` without an instruction."""
    documents: tuple[RecordedDocument, ...]
    """The documents, in the order of the case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := repeated_name(doc.id for doc in self.documents if doc.id is not None):
            raise ValueError(f"id used more than once in `documents`: {repeated!r}")
        ranks = sorted(document.rank for document in self.documents)
        if ranks != list(range(1, len(ranks) + 1)):
            raise ValueError(f"the ranks of {len(ranks)} `documents` are {ranks}")
        return self


class Snapshot(BaseModel):
    """How a reranker scored a set of cases.

    Texts are kept as hashes, so that the file can be committed where the texts cannot. The hashes
    are not secret: who guesses a text can see that the guess is right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanerank: StrictStr
    """The version of lanerank that took the snapshot."""
    model: StrictStr
    """The scorer's name."""
    cases: tuple[RecordedCase, ...]
    """The cases, in the order given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if repeated := repeated_name(case.id for case in self.cases):
            raise ValueError(f"id used more than once in `cases`: {repeated!r}")
        return self

    def save(self, path: str | Path) -> None:
        """Write JSON with a line for each document, so that a diff shows what moved.

        The file is replaced as a whole or not at all. Equal snapshots give equal bytes.

        Raises:
            InputError: The file cannot be written.
        """
        path = Path(path)
        new = path.with_name(f".{path.name}.{uuid4().hex}.new")
        try:
            try:
                new.write_text(self._to_json(), encoding="utf-8", newline="\n")
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"`path`: {str(path)!r} cannot be written: {error.strerror or error}; give a file "
                "in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a snapshot that `save` wrote.

        Raises:
            FileFormatError: The file is not JSON; the message has the line.
            InputError: The file cannot be read, is no snapshot or damaged, or was written by a
                later lanerank.
        """
        name = f"`path`: {str(path)!r}"
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{name} cannot be read: {error.strerror or error}; give a file that "
                "`lanerank snapshot` wrote"
            ) from error
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise FileFormatError(path, line, f"not UTF-8 ({error.reason})") from error
        value = parse_object(text, path, 1)
        if value.pop("format", None) != _FORMAT:
            raise InputError(
                f'{name} is not a snapshot: it lacks "format": "{_FORMAT}"; give a file that '
                "`lanerank snapshot` wrote"
            )
        if (number := value.pop("version", None)) != _VERSION:
            raise InputError(
                f"{name} has version {number!r} of the format, written by lanerank "
                f"{value.get('lanerank')!r}; this is lanerank {version('lanerank')}, which reads "
                f"version {_VERSION}: upgrade it, or take the snapshot again"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"{name} is damaged: `{where}`: {problem['msg'].removeprefix('Value error, ')}; "
                "restore the file, or take the snapshot again"
            ) from error

    def _to_json(self) -> str:
        head = {"format": _FORMAT, "version": _VERSION, **self.model_dump(exclude={"cases"})}
        fields = "".join(f"  {_json(key)}: {_json(value)},\n" for key, value in head.items())
        cases = ",\n".join(map(_case_to_json, self.cases))
        return f'{{\n{fields}  "cases": [\n{cases}\n  ]\n}}\n'


def take_snapshot(
    reranker: SupportsScore,
    cases: Sequence[Case],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Score cases and record the outcome.

    A `use_instruction` block around the call is not looked at: a case without an instruction is
    scored without one.

    Args:
        reranker: What to record.
        cases: At least one, for instance from `read_cases`.
        progress: Called after each case with the number done and the number in all.

    Raises:
        InputError: If there are no cases, one is none, or two have the same id.
        ScorerError: If the reranker does not return one score for each document.
    """
    _check_cases(cases)
    recorded = []
    for number, case in enumerate(cases, 1):
        recorded.append(_record(reranker, case))
        if progress:
            progress(number, len(cases))
    return Snapshot(
        lanerank=version("lanerank"),
        model=one_line(reranker.scorer.name, 200),
        cases=tuple(recorded),
    )


def _check_cases(cases: Sequence[Case]) -> None:
    if isinstance(cases, str | Path) or not isinstance(cases, Sequence):
        raise InputError(
            f"`cases` must be a list of `Case`, got {reprlib.repr(cases)}; `read_cases` makes one "
            "of a file"
        )
    if not cases:
        raise InputError("`cases` is empty; give at least one, for example from `read_cases`")
    for index, case in enumerate(cases):
        if not isinstance(case, Case):
            raise InputError(
                f"`cases[{index}]` must be a `Case`, got {type(case).__name__}; `read_cases` makes "
                "cases of scenarios too"
            )
    if repeated := repeated_name(case.id for case in cases):
        raise InputError(f"`cases`: id used more than once: {repeated!r}; give each its own")


def _record(reranker: SupportsScore, case: Case) -> RecordedCase:
    instruction = case.dated_instruction
    try:
        with use_instruction(None):
            values = reranker.score(
                case.query,
                [Document(doc.text, metadata=doc.metadata, id=doc.id) for doc in case.documents],
                instruction=instruction or None,
                attributes=case.attributes,
            )
    except LanerankError as error:
        error.add_note(f"while scoring case {case.id!r}")
        raise
    if len(values) != len(case.documents):
        raise ScorerError(
            f"{reranker.scorer.name!r} returned {len(values)} scores for {len(case.documents)} "
            f"documents of case {case.id!r}; expected one for each document, in input order"
        )
    scores = tuple(map(float, values))
    ranks = {index: rank for rank, index in enumerate(order_by_score(scores), 1)}
    return RecordedCase(
        id=case.id,
        query=_hash(case.query),
        instruction=instruction.fingerprint if instruction else None,
        documents=tuple(
            RecordedDocument(
                id=document.id,
                content=_hash_content(document, case.attributes),
                # Adding zero turns minus zero into zero.
                score=round(score, SCORE_DIGITS) + 0.0 if math.isfinite(score) else None,
                rank=ranks[index],
            )
            for index, (document, score) in enumerate(zip(case.documents, scores, strict=True))
        ),
    )


def _hash_content(document: CaseDocument, attributes: Sequence[str]) -> str:
    shown = [(name, document.metadata[name]) for name in attributes if name in document.metadata]
    return _hash(document.text, shown)


def _hash(*content: object) -> str:
    # Lone surrogates are legal in a text, and must not stop it from being recorded.
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _case_to_json(case: RecordedCase) -> str:
    head = _json(case.model_dump(exclude={"documents"})).removesuffix("}")
    documents = ",\n".join(f"      {_json(document.model_dump())}" for document in case.documents)
    return f'    {head}, "documents": [\n{documents}\n    ]}}'


def _json(value: object) -> str:
    """JSON in which letters are letters, and nothing acts on whoever looks at it."""
    return _NOT_PLAIN.sub(
        lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1],
        json.dumps(value, ensure_ascii=False),
    )
