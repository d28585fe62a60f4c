"""Parquet, read and written by pyarrow; columns that are only copied stay in Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lanerank.distributed.rows import Added, Columns, Row, Shard
from lanerank.errors import InputError

_ROW_GROUP_BYTES = 64 << 20
"""How much output is collected before it is written: enough to be read back quickly."""


@dataclass(frozen=True, slots=True)
class ParquetBatch:
    """A piece of a file, and the same as rows."""

    table: pa.RecordBatch
    rows: list[Row]


class ParquetFormat:
    """See `Format`."""

    suffix = ".parquet"

    def check(self, path: Path, columns: Columns) -> None:
        """The schema has the columns, and they have a usable type."""
        schema, where = _open(path).schema_arrow, repr(str(path))
        if twice := {name for name in schema.names if schema.names.count(name) > 1}:
            raise InputError(f"{where} has several columns named {sorted(twice)[0]!r}; rename them")
        columns.check(schema.names, where)
        for argument, name in columns.named.items():
            kind = schema.field(name).type
            if argument == "documents_column" and columns.form == "lists":
                if not _holds_documents(kind):
                    raise InputError(
                        f"`{argument}` {name!r} of {where} is of type {kind}; expected lists of "
                        "strings, or of structs with a 'text'. For one document a row there is "
                        "`form='pairs'`"
                    )
            elif argument != "id_column" and not _is_text(kind):
                raise InputError(
                    f"`{argument}` {name!r} of {where} is of type {kind}, expected strings"
                )

    def split(self, path: Path, file: int, size: int) -> list[Shard]:
        """Ranges of rows, whatever the file's row groups are."""
        rows = _open(path).metadata.num_rows
        return [
            Shard(file=file, first=start + 1, rows=min(size, rows - start))
            for start in range(0, max(rows, 1), size)
        ]

    def read(self, path: Path, shard: Shard, columns: Columns, size: int) -> Iterator[ParquetBatch]:
        """Read the row groups that the shard touches, from their beginning."""
        file = _open(path)
        start, stop = shard.first - 1, shard.first - 1 + shard.rows
        ends = [0]
        for group in range(file.num_row_groups):
            ends.append(ends[-1] + file.metadata.row_group(group).num_rows)
        touched = [g for g in range(file.num_row_groups) if ends[g] < stop and start < ends[g + 1]]
        if not touched:
            return
        kept = columns.kept(file.schema_arrow.names)
        names = sorted({*columns.named.values(), *columns.fields, *kept})
        end = ends[touched[0]]
        for table in file.iter_batches(size, row_groups=touched, columns=names):
            begin, end = end, end + table.num_rows
            if start < end:
                skipped = max(start - begin, 0)
                wanted = table.slice(skipped, min(stop, end) - begin - skipped)
                yield ParquetBatch(wanted, _rows(wanted, columns, begin + skipped + 1))
            if end >= stop:
                return

    def writer(self, file: BinaryIO, path: Path, columns: Columns) -> ParquetWriter:
        """The output has the schema of the input, and the new columns."""
        return ParquetWriter(file, _open(path).schema_arrow, columns)


class ParquetWriter:
    """See `Writer`."""

    def __init__(self, file: BinaryIO, schema: pa.Schema, columns: Columns) -> None:
        """Leave out the schema's metadata, which describes other rows and other columns."""
        self._kept = columns.kept(schema.names)
        self._added = columns.added
        self._schema = pa.schema([*map(schema.field, self._kept), *columns.added])
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []

    def write(self, batch: ParquetBatch, added: Sequence[Added | None]) -> None:
        """Collect rows until there is enough for a row group."""
        old = batch.table.select(self._kept)
        new = pa.RecordBatch.from_pylist([dict(values or {}) for values in added], self._added)
        both = pa.RecordBatch.from_arrays([*old.columns, *new.columns], schema=self._schema)
        # Slices, because not every type can be picked from.
        for ranked, run in groupby(range(len(added)), lambda place: added[place] is not None):
            if ranked:
                first, *others = run
                self._waiting.append(both.slice(first, 1 + len(others)))
        if sum(each.nbytes for each in self._waiting) > _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the last rows and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._waiting, self._schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._waiting = []


@dataclass(frozen=True, slots=True)
class _Unreadable:
    why: str


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{str(path)!r} is not a Parquet file: {error}") from error


def _rows(table: pa.RecordBatch, columns: Columns, first: int) -> list[Row]:
    names = {*columns.named.values(), *columns.fields}
    values = {name: _python(table.column(name)) for name in names}
    return [
        _row(number, {name: column[place] for name, column in values.items()}, columns)
        for place, number in enumerate(range(first, first + table.num_rows))
    ]


def _row(number: int, cells: dict[str, Any], columns: Columns) -> Row:
    problems = [
        f"column {name!r}: {cell.why}"
        for name, cell in cells.items()
        if isinstance(cell, _Unreadable)
    ]
    cell_of = {argument: cells[name] for argument, name in columns.named.items()}
    return Row(
        number=number,
        query=cell_of["query_column"],
        documents=cell_of["documents_column"],
        instruction=cell_of.get("instruction_column"),
        metadata={name: cells[name] for name in columns.fields},
        id=cell_of.get("id_column"),
        problem=problems[0] if problems else None,
    )


def _python(column: pa.Array) -> list[Any]:
    """The values of a column; one that cannot be read spoils no other."""
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, KeyError, OverflowError):
        return [_python_value(value) for value in column]


def _python_value(value: pa.Scalar) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return value.as_py(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        return _Unreadable(f"not UTF-8 ({error.reason})")
    except (ValueError, KeyError, OverflowError) as error:
        return _Unreadable(str(error))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    # A column of nothing but nulls has a type of its own.
    known = ("is_string", "is_large_string", "is_string_view", "is_null")
    return any(getattr(pa.types, name)(kind) for name in known)


def _holds_documents(kind: pa.DataType) -> bool:
    known = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    if not any(getattr(pa.types, name)(kind) for name in known):
        return bool(pa.types.is_null(kind))
    if not pa.types.is_struct(kind.value_type):
        return _is_text(kind.value_type)
    place = kind.value_type.get_field_index("text")
    return place >= 0 and _is_text(kind.value_type.field(place).type)
