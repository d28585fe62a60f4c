"""Quadruples: what a reranker that follows instructions is trained on, read, checked and written.

A quadruple says how well one document answers one query under one instruction; an entry is one that
has no score yet. Rows of the same query form a group: a document under several instructions shows
what an instruction changes, the documents under one instruction are a list to order.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, Field, JsonValue, StrictStr, model_validator

from lanerank.display import one_line
from lanerank.errors import FileFormatError, InputError, MissingExtraError
from lanerank.evaluation.scenarios import (
    Day,
    LaneKind,
    NotBlank,
    Record,
    parse_object,
    read_objects,
    validate_record,
)

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal[".jsonl", ".jsonl.gz", ".parquet"]
"""How quadruples are written; the end of a file's name says which."""

_FORMATS: tuple[Format, ...] = get_args(Format)
_ROW_GROUP = 16_384
_NAME_WIDTH = 60
_EntryT = TypeVar("_EntryT", bound="Entry")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be stored as UTF-8; remove it") from None
    return text


def _storable(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        _json(metadata).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate cannot be stored as UTF-8; remove it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this cannot be stored as JSON: {error}") from None
    return metadata


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a field is named twice; name each once")
    return names


Text = Annotated[NotBlank, AfterValidator(_encodable)]
"""Text with something in it, that UTF-8 can hold."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number, not one in quotes."""


class Entry(Record):
    """A document under a request: what judges compare, and what a `Quadruple` scores.

    Fields that may be left out may also be `None`, which says the same.
    """

    query: Text
    """What the searcher typed."""
    instruction: Text | None
    """What relevance means here; `None` without an instruction. It cannot be left out."""
    document: Text
    """The retrieved text."""
    query_id: Text | None = None
    """What the rows of a query have in common; by default the text of the query."""
    document_id: Text | None = None
    """What the rows of a document have in common, within a query; by default its text."""
    metadata: Annotated[Mapping[StrictStr, JsonValue], AfterValidator(_storable)] = Field(
        default_factory=dict
    )
    """What an index would know about the document."""
    attributes: Annotated[tuple[Text, ...], AfterValidator(_distinct)] = ()
    """The fields of `metadata` that judge and model may see; none by default."""
    today: Day = None
    """The date on which the search happens; `None` where the time plays no part."""
    kind: LaneKind | None = None
    """What the instruction is for; `None` where that is not known. No judge or model sees it."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        """Tables have a cell for every field, so that an empty one cannot but say "not given"."""
        if not isinstance(value, dict):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: v for name, v in value.items() if v is not None or name not in optional}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "none" and self.instruction is not None:
            raise ValueError("kind 'none' takes no instruction; set `instruction` to null")
        if self.kind not in ("none", None) and self.instruction is None:
            raise ValueError(f"kind {self.kind!r} needs an instruction; only kind 'none' has null")
        return self

    @property
    def query_key(self) -> str:
        """What tells queries apart: `query_id`, else the text."""
        return self.query if self.query_id is None else self.query_id

    @property
    def document_key(self) -> str:
        """What tells the documents of a query apart: `document_id`, else the text."""
        return self.document if self.document_id is None else self.document_id

    @property
    def request_key(self) -> tuple[str, str, str, str]:
        """What tells requests apart: query, its text, the instruction and the date."""
        return (self.query_key, self.query, self.instruction or "", str(self.today or ""))

    def as_quadruple(
        self, *, score: float, uncertainty: float | None = None, source: str | None = None
    ) -> Quadruple:
        """The entry with a score."""
        fields = {name: getattr(self, name) for name in Entry.model_fields}
        return Quadruple(**fields, score=score, uncertainty=uncertainty, source=source)

    def __str__(self) -> str:
        """The entry on one line, for messages."""
        parts = [one_line(self.query, _NAME_WIDTH)]
        if self.instruction:
            parts.append(one_line(self.instruction, _NAME_WIDTH))
        return f"{' | '.join(parts)} | {one_line(self.document_key, _NAME_WIDTH)}"


class Quadruple(Entry):
    """How well a document answers a query under an instruction."""

    score: Annotated[Number, Field(ge=0, le=1)]
    """From 0, not relevant, to 1, exactly what is wanted; the same scale for all rows."""
    # Losses are sums in float32, in which pairs weigh the product of two rows.
    weight: Annotated[Number, Field(ge=1e-6, le=1e6)] = 1.0
    """How much the row counts in training, against 1 for the others; from 1e-6 to 1e6."""
    source: Text | None = None
    """Where the row comes from, such as a data set or a judge."""
    uncertainty: Annotated[Number, Field(ge=0)] | None = None
    """The standard error of `score`; `None` where that is not known."""


_REQUIRED = tuple(name for name, field in Quadruple.model_fields.items() if field.is_required())


def group_by_query(rows: Iterable[Quadruple]) -> dict[str, list[Quadruple]]:
    """The rows of each query, by `Quadruple.query_key`, both in the order of the rows."""
    groups: dict[str, list[Quadruple]] = {}
    for row in rows:
        groups.setdefault(row.query_key, []).append(row)
    return groups


def read_quadruples(paths: str | Path | Iterable[str | Path]) -> list[Quadruple]:
    """Read quadruples from `.parquet` files and JSONL files, plain or `.gz`: UTF-8, one a line.

    The check is strict, as in `read_scenarios`: a field whose name nearly is one of the format's is
    refused, and other fields are notes that are not read. In Parquet `metadata` is a struct, a map,
    or an object as JSON text, which is what `write_quadruples` writes; null fields of a struct
    count as absent.

    Args:
        paths: A file, or several that are read as one set, in this order.

    Returns:
        The rows in file order.

    Raises:
        FileFormatError: A line is no quadruple, or uses the id of another query, or of another
            document of its query. The message begins with the file and the line, or in Parquet the
            row, counted from 1.
        InputError: A file cannot be read.
        MissingExtraError: A file is Parquet, and pyarrow is not installed.
    """
    return [row for row, _, _ in _rows(Quadruple, paths)]


def read_entries(paths: str | Path | Iterable[str | Path]) -> list[Entry]:
    """Read entries, for a panel of judges, from files as for `read_quadruples`.

    Their lines need no score. Those of quadruples will do: score, weight, source and uncertainty
    are not read.

    Args:
        paths: A file, or several that are read as one set, in this order.

    Returns:
        The entries in file order.

    Raises:
        FileFormatError: A line is no entry, uses the id of another query or document, or has the
            document of an earlier one under the same request. The message begins with the file and
            the line, or in Parquet the row, counted from 1.
        InputError: A file cannot be read.
        MissingExtraError: A file is Parquet, and pyarrow is not installed.
    """
    entries: list[Entry] = []
    seen: dict[tuple[tuple[str, ...], str], str] = {}
    for entry, path, number in _rows(Entry, paths):
        key = (entry.request_key, entry.document_key)
        if key in seen:
            problem = f"[{entry}] is in {seen[key]} already; leave one out"
            raise FileFormatError(path, number, problem)
        seen[key] = f"{path}:{number}"
        entries.append(entry)
    return entries


def _rows(
    record: type[_EntryT], paths: str | Path | Iterable[str | Path]
) -> Iterator[tuple[_EntryT, str | Path, int]]:
    """The rows of files, each with its file and line, if they can be told apart."""
    names = _Names()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        read = _read_parquet if Path(path).suffix == ".parquet" else read_objects
        for number, value in read(path):
            row = validate_record(record, value, path, number)
            if problem := names.conflict(row, f"{path}:{number}"):
                raise FileFormatError(path, number, problem)
            yield row, path, number


def quadruple_format(path: str | Path) -> Format:
    """The format in which `write_quadruples` would write a file; for checks before long work.

    Raises:
        InputError: The name ends in none of these.
    """
    for end in _FORMATS:
        if Path(path).name.endswith(end):
            return end
    raise InputError(f"`path` must end in .jsonl, .jsonl.gz or .parquet, got {str(path)!r}")


def write_quadruples(path: str | Path, rows: Iterable[Quadruple]) -> None:
    """Write quadruples, so that `read_quadruples` gives equal ones; equal rows give equal bytes.

    Fields at their default are left out. The file appears under its name when it is complete.

    Args:
        path: Ends in `.jsonl`, `.jsonl.gz` or `.parquet`, which decides the format.
        rows: Written in this order.

    Raises:
        InputError: The name has another ending, a row uses the id of another query or document, or
            the file cannot be written.
        MissingExtraError: The file is Parquet, and pyarrow is not installed.
    """
    path = Path(path)
    writers: dict[Format, Callable[[IO[bytes], Iterable[Quadruple]], None]] = {
        ".jsonl": _write_jsonl,
        ".jsonl.gz": _write_gzip,
        ".parquet": _write_parquet,
    }
    write = writers[quadruple_format(path)]
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            with part.open("wb") as file:
                write(file, _named(rows))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"`path`: {str(path)!r} cannot be written: {error.strerror or error}"
        ) from error


class _Names:
    """What every id was first used for: one id for two texts would mix up what it stands for."""

    def __init__(self) -> None:
        self._queries: dict[str, tuple[str, str]] = {}
        self._documents: dict[tuple[str, str], tuple[str, str]] = {}

    def conflict(self, row: Entry, here: str) -> str | None:
        """What is wrong with the ids of the row that stands here."""
        text, where = self._queries.setdefault(row.query_key, (row.query, here))
        if text != row.query:
            return f"{row.query_key!r} is another query in {where}; give each its own `query_id`"
        key = (row.query_key, row.document_key)
        text, where = self._documents.setdefault(key, (row.document, here))
        if text != row.document:
            name = f"document {row.document_key!r} of query {row.query_key!r}"
            return f"{name} is another text in {where}; give each its own `document_id`"
        return None


def _named(rows: Iterable[Quadruple]) -> Iterator[Quadruple]:
    """The rows, if they can be told apart when they are read again."""
    names = _Names()
    for place, row in enumerate(rows):
        if problem := names.conflict(row, f"`rows[{place}]`"):
            raise InputError(f"`rows[{place}]`: {problem}")
        yield row


def _write_jsonl(file: IO[bytes] | gzip.GzipFile, rows: Iterable[Quadruple]) -> None:
    for row in rows:
        values = row.model_dump(mode="json", exclude_defaults=True)
        # What every row has comes first, for people who look at the file.
        first = {name: values.pop(name) for name in _REQUIRED}
        file.write(f"{_json(first | values)}\n".encode())


def _write_gzip(file: IO[bytes], rows: Iterable[Quadruple]) -> None:
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed:
        _write_jsonl(compressed, rows)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_parquet(file: IO[bytes], rows: Iterable[Quadruple]) -> None:
    pa, pq = _pyarrow()
    types = {
        **dict.fromkeys(Quadruple.model_fields, pa.string()),
        **dict.fromkeys(("score", "weight", "uncertainty"), pa.float64()),
        "attributes": pa.list_(pa.string()),
        "today": pa.date32(),
    }
    table = pa.Table.from_pylist([_cells(row) for row in rows], pa.schema(types.items()))
    pq.write_table(table, file, compression="zstd", row_group_size=_ROW_GROUP)


def _cells(row: Quadruple) -> dict[str, object]:
    cells: dict[str, object] = row.model_dump(exclude_defaults=True)
    # As text, because a column has one type, and a struct would give every row every field.
    return cells | ({"metadata": _json(cells["metadata"])} if "metadata" in cells else {})


def _read_parquet(path: str | Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The rows of a Parquet file with their numbers, as the objects of a JSONL file would be."""
    pa, pq = _pyarrow()
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name in Quadruple.model_fields]
            # Other columns are not read; their names are kept, so that a misspelt one is refused.
            notes = dict.fromkeys(set(file.schema_arrow.names) - set(known))
            if len(set(known)) < len(known):
                raise InputError(f"{str(path)!r} has two columns of one name; rename one: {known}")
            for batch in file.iter_batches(columns=known):
                columns = {name: batch.column(name) for name in known}
                for place in range(batch.num_rows):
                    number += 1
                    cells = {name: column[place] for name, column in columns.items()}
                    yield number, notes | _values(cells, path, number)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"`paths`: {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}. "
            "Give Parquet files, or JSONL under another name."
        ) from error


def _values(cells: Mapping[str, pa.Scalar], path: str | Path, row: int) -> dict[str, object]:
    pa, _ = _pyarrow()
    values: dict[str, object] = {}
    for name, cell in cells.items():
        try:
            values[name] = cell.as_py(maps_as_pydicts="strict")
        except (ValueError, KeyError) as error:
            raise FileFormatError(path, row, f"`{name}` cannot be read: {error}") from error
    metadata = values.get("metadata")
    if isinstance(metadata, str):
        values["metadata"] = parse_object(metadata, path, row)
    elif isinstance(metadata, dict) and pa.types.is_struct(cells["metadata"].type):
        values["metadata"] = {name: field for name, field in metadata.items() if field is not None}
    return values


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Parquet files need pyarrow, not installed here. "
            'Install the extra: pip install "lanerank[train]"'
        ) from error
    return pyarrow, pyarrow.parquet
