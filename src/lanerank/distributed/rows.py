"""Rows of any format, and what a format has to do: cut a file, read a shard, write its output.

A `Row` holds whatever the file had in the named columns: what is usable is for the reranker to say.
What a format alone can see (bytes that are no text, lines that are no JSON) is the row's `problem`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from lanerank.errors import InputError

Form = Literal["lists", "pairs"]


class Shard(BaseModel):
    """A range of rows of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: int
    """The number of the file."""
    first: int
    """The first row, counted from 1; in JSONL its line."""
    rows: int
    offset: int = 0
    """Where the first line begins, in bytes; JSONL only."""


class Columns(BaseModel):
    """The columns of the input that are read, and those that the output has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Form
    query_column: str
    documents_column: str
    instruction_column: str | None = None
    id_column: str | None = None
    attributes: tuple[str, ...] = ()
    """Metadata fields of the documents; in the form "pairs" columns."""
    keep_columns: tuple[str, ...] | None = None
    """The columns of the input to copy; all if `None`."""
    prefix: str = ""
    """Stands before the names of the new columns."""

    @property
    def named(self) -> dict[str, str]:
        """The columns that must be there, by the argument that names them."""
        arguments = ("query_column", "documents_column", "instruction_column", "id_column")
        named = {argument: getattr(self, argument) for argument in arguments}
        return {argument: name for argument, name in named.items() if name is not None}

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are attributes."""
        return self.attributes if self.form == "pairs" else ()

    @cached_property
    def added(self) -> pa.Schema:
        """The new columns."""
        own: list[tuple[str, pa.DataType]]
        if self.form == "pairs":
            own = [("score", pa.float64()), ("truncated", pa.bool_())]
        else:
            names = [("index", pa.int32()), ("id", pa.string()), ("score", pa.float64())]
            own = [("ranking", pa.list_(pa.struct([*names, ("truncated", pa.bool_())])))]
        texts = ("model", "instruction_fingerprint", "instruction_applied")
        own += [(name, pa.string()) for name in texts]
        return pa.schema([(self.prefix + name, kind) for name, kind in own])

    def check(self, names: Sequence[str], where: str) -> None:
        """Raise an `InputError` if a file with these columns cannot be read or written."""
        wanted = [*self.named.items(), *(("attributes", name) for name in self.fields)]
        wanted += [("keep_columns", name) for name in self.keep_columns or ()]
        for argument, name in wanted:
            if name not in names:
                raise InputError(
                    f"`{argument}` names {name!r}, and {where} has no such column; it has "
                    f"{', '.join(map(repr, names))}"
                )
        if taken := [name for name in self.added.names if name in self.kept(names)]:
            raise InputError(
                f"{where} has a column {taken[0]!r}, which is also the name of a column that "
                "ranking adds; give the new ones a `prefix` such as 'rerank_', or leave the old "
                "one out of `keep_columns`"
            )

    def kept(self, names: Sequence[str]) -> list[str]:
        """The columns of a file that go to the output, in the order of the file."""
        return [n for n in names if self.keep_columns is None or n in self.keep_columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the input, not yet checked."""

    number: int
    """Counted from 1; in JSONL the line."""
    query: object = None
    documents: object = None
    """In the form "pairs" the one document."""
    instruction: object = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    """The attribute columns, in the form "pairs"."""
    id: object = None
    problem: str | None = None
    """Why the row cannot be read."""


class Batch(Protocol):
    """Rows that are read together, with what their format needs to write them again."""

    @property
    def rows(self) -> Sequence[Row]:
        """The rows, in the order of the file."""
        ...


Added = Mapping[str, object]
"""The values of a row's new columns."""


class Writer(Protocol):
    """Writes the output of a shard."""

    def write(self, batch: Any, added: Sequence[Added | None]) -> None:  # noqa: ANN401 - a batch of the writer's own format
        """Append the rows of a batch with their new columns; `None` leaves a row out."""
        ...

    def close(self) -> None:
        """Write what is left; the file stays open."""
        ...


class Format(Protocol):
    """How a kind of file is read and written."""

    @property
    def suffix(self) -> str:
        """The end of the files' names."""
        ...

    def check(self, path: Path, columns: Columns) -> None:
        """Raise an `InputError` if the file does not have what `columns` names."""
        ...

    def split(self, path: Path, file: int, size: int) -> list[Shard]:
        """Ranges of at most `size` rows, at least one, for the file of that number."""
        ...

    def read(self, path: Path, shard: Shard, columns: Columns, size: int) -> Iterator[Batch]:
        """The rows of a shard, at most `size` at a time."""
        ...

    def writer(self, file: BinaryIO, path: Path, columns: Columns) -> Writer:
        """Begin the output for a shard of the input file at `path`."""
        ...
