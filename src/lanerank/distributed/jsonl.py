"""JSONL: one JSON object a line. Blank lines are not rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from lanerank.distributed.rows import Added, Columns, Row, Shard

_CHECKED = 1000
"""How many objects of a file are looked at before the run."""


@dataclass(frozen=True, slots=True)
class JsonlBatch:
    """The objects of some lines, and the same as rows."""

    values: list[dict[str, Any]]
    """Empty where the line holds no object."""
    rows: list[Row]


class JsonlFormat:
    """See `Format`."""

    suffix = ".jsonl"

    def check(self, path: Path, columns: Columns) -> None:
        """The first objects stand for all, so that a misspelt name is found before the run."""
        with path.open("rb") as lines:
            first = map(_parse, islice(filter(bytes.strip, lines), _CHECKED))
            names = dict.fromkeys(
                name for value in first if isinstance(value, dict) for name in value
            )
        if names:
            columns.check(list(names), repr(str(path)))

    def split(self, path: Path, file: int, size: int) -> list[Shard]:
        """Ranges of lines; the whole file is read once to count them."""
        starts, rows, offset = [(1, 0)], 0, 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    if rows and rows % size == 0:
                        starts.append((number, offset))
                    rows += 1
                offset += len(line)
        return [
            Shard(file=file, first=number, rows=min(size, rows - place * size), offset=begin)
            for place, (number, begin) in enumerate(starts)
        ]

    def read(self, path: Path, shard: Shard, columns: Columns, size: int) -> Iterator[JsonlBatch]:
        """Read the lines of the shard."""
        with path.open("rb") as lines:
            lines.seek(shard.offset)
            filled = ((n, line) for n, line in enumerate(lines, shard.first) if line.strip())
            wanted = islice(filled, shard.rows)
            while part := list(islice(wanted, size)):
                values = [_parse(line) for _, line in part]
                yield JsonlBatch(
                    [value if isinstance(value, dict) else {} for value in values],
                    [
                        _row(number, value, columns)
                        for (number, _), value in zip(part, values, strict=True)
                    ],
                )

    def writer(self, file: BinaryIO, path: Path, columns: Columns) -> JsonlWriter:
        """The output has the objects of the input, and the new keys at their end."""
        return JsonlWriter(file, columns)


class JsonlWriter:
    """See `Writer`."""

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        """Write to an open file."""
        self._file = file
        self._columns = columns

    def write(self, batch: JsonlBatch, added: Sequence[Added | None]) -> None:
        """Write a line for each row."""
        for value, new in zip(batch.values, added, strict=True):
            if new is not None:
                kept = {name: value[name] for name in self._columns.kept(list(value))}
                self._file.write(json_line({**kept, **new}))

    def close(self) -> None:
        """Nothing waits."""


def json_line(value: object) -> bytes:
    """A value as a line of strict JSON; what JSON does not know is written as text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        # JSON can write lone surrogates, UTF-8 cannot.
        return f"{json.dumps(value, allow_nan=False, default=str)}\n".encode()


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
        # What Python reads and JSON cannot say, such as 1e999, is found here and not half-way.
        json.dumps(value, allow_nan=False)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return value if isinstance(value, dict) else "not a JSON object"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _row(number: int, value: dict[str, Any] | str, columns: Columns) -> Row:
    if isinstance(value, str):
        return Row(number=number, problem=value)
    cell_of = {argument: value.get(name) for argument, name in columns.named.items()}
    missing = [name for name in columns.named.values() if name not in value]
    taken = [name for name in columns.added.names if name in columns.kept(list(value))]
    problem = None
    if missing:
        problem = f"no {missing[0]!r}; a row without a value has to say null"
    elif taken:
        problem = f"has {taken[0]!r}, which is the name of a column that ranking adds"
    return Row(
        number=number,
        query=cell_of["query_column"],
        documents=cell_of["documents_column"],
        instruction=cell_of.get("instruction_column"),
        metadata={name: value.get(name) for name in columns.fields},
        id=cell_of.get("id_column"),
        problem=problem,
    )
