"""TREC files: qrels and runs, and what it takes to rank a run anew (topics and documents)."""

from __future__ import annotations

import gzip
import io
import math
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ir_measures
from pydantic import StrictBool

from lanerank.contracts import Document
from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.queries import JudgedQuery
from lanerank.evaluation.runs import Qrels, Run, checked_grades, order_documents
from lanerank.evaluation.scenarios import NotBlank, Record, parse_object, validate_record

# BEIR's names for the same things.
_ID, _QUERY = {"_id": "id"}, {"_id": "id", "text": "query"}


class Topic(Record):
    """A query of a test collection."""

    id: NotBlank
    query: NotBlank
    instruction: NotBlank | None = None
    """The instruction that belongs to the query, such as a TREC narrative."""
    instruction_aware: StrictBool | None = None
    """Whether the right order depends on the instruction; `None` where that is not known."""
    cluster: NotBlank | None = None
    """What the query shares with others, such as the query that it is a variant of."""


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read TREC qrels: lines `query iteration document grade`, plain or `.gz`, UTF-8.

    The iteration plays no part.

    Returns:
        Query id to document id to grade.

    Raises:
        FileFormatError: A line is no such line, grades a document twice, or is out of range. The
            message begins with the file and the line.
        InputError: The file cannot be read, or has no line.
    """
    grades: dict[str, dict[str, int]] = {}
    form = "query iteration document grade"
    for number, line in _lines(path):
        [qrel] = _parsed(ir_measures.read_trec_qrels, path, number, line, form)
        try:
            [grade] = checked_grades(qrel.query_id, {qrel.doc_id: qrel.relevance}).values()
        except InputError as error:
            raise FileFormatError(path, number, str(error)) from error
        _add(grades, qrel.query_id, qrel.doc_id, grade, path, number)
    return _not_empty(grades, path, form)


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a TREC run: lines `query Q0 document rank score tag`, plain or `.gz`, UTF-8.

    The order is that of trec_eval: by score, best first, ties by document id, last first; the rank
    column plays no part. (trec_eval reads scores in single precision, so that it also takes those
    for tied that agree to seven digits.)

    Returns:
        Query id to document id to score, in this order.

    Raises:
        FileFormatError: A line is no such line, ranks a document twice, or has a score that is not
            finite. The message begins with the file and the line.
        InputError: The file cannot be read, or has no line.
    """
    scores: dict[str, dict[str, float]] = {}
    form = "query Q0 document rank score tag"
    for number, line in _lines(path):
        [doc] = _parsed(ir_measures.read_trec_run, path, number, line, form)
        if not math.isfinite(doc.score):
            raise FileFormatError(path, number, f"the score must be finite, got {doc.score}")
        _add(scores, doc.query_id, doc.doc_id, doc.score, path, number)
    return {
        query: dict(sorted(found.items(), key=lambda item: (item[1], item[0]), reverse=True))
        for query, found in _not_empty(scores, path, form).items()
    }


def read_topics(path: str | Path) -> dict[str, Topic]:
    """Read the queries of a test collection, plain or `.gz`, UTF-8.

    A `.tsv` or `.txt` file has lines `id<TAB>query`. Any other is JSONL: objects with the fields of
    `Topic`, of which `id` and `query` are needed (BEIR's `_id` and `text` will do); other fields
    are not read.

    Returns:
        The topics by id, in file order.

    Raises:
        FileFormatError: A line is no topic, or repeats an id. The message begins with the file and
            the line.
        InputError: The file cannot be read, or has no line.
    """
    topics: dict[str, Topic] = {}
    tabbed = Path(str(path).removesuffix(".gz")).suffix in (".tsv", ".txt")
    for number, line in _lines(path):
        if tabbed:
            name, tab, query = line.partition("\t")
            if not tab:
                raise FileFormatError(
                    path, number, f"expected `id<TAB>query`, got {reprlib.repr(line)}"
                )
            fields: dict[str, object] = {"id": name.strip(), "query": query.strip()}
        else:
            fields = _renamed(parse_object(line, path, number), _QUERY)
        topic = validate_record(Topic, fields, path, number)
        if topic.id in topics:
            raise FileFormatError(path, number, f"topic {topic.id!r} is there a second time")
        topics[topic.id] = topic
    return _not_empty(topics, path, "id<TAB>query" if tabbed else "JSON object")


def read_trec(
    *,
    topics: str | Path | Mapping[str, Topic],
    documents: str | Path,
    run: str | Path | Run,
    qrels: str | Path | Qrels | None = None,
    depth: int | None = None,
    attributes: Sequence[str] = (),
) -> list[JudgedQuery]:
    """The queries of a first-stage run with their candidates, to rank them anew with `compare`.

    To compare two finished runs neither topics nor documents are needed: see `compare_runs`.

    Args:
        topics: A file for `read_topics`, or what it returned. Topics that the run lacks are left
            out.
        documents: A JSONL file, plain or `.gz`: objects with an `id` (or BEIR's `_id`) and a
            `text`, and optionally `metadata`; their other fields count as metadata. It is read
            line by line, and only what the run names is kept.
        run: A file for `read_run`, or a run. Candidates reach the model in its order, so that ties
            keep it.
        qrels: A file for `read_qrels`, or qrels; without them nothing is graded. Queries that they
            lack have no grades, and documents that they lack count as not relevant.
        depth: How many candidates to take of each query; all by default.
        attributes: The metadata fields that the model may see; none by default.

    Returns:
        One query for each that the run names, in its order.

    Raises:
        FileFormatError: A line of a file is not usable; the message begins with the file and the
            line.
        InputError: A file cannot be read, or the run names a topic or a document that is not there.
    """
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise InputError(f"`depth` must be an int of at least 1 or None, got {depth!r}")
    known = topics if isinstance(topics, Mapping) else read_topics(topics)
    scores = run if isinstance(run, Mapping) else read_run(run)
    grades = read_qrels(qrels) if isinstance(qrels, str | Path) else qrels or {}
    candidates = {query: order_documents(found)[:depth] for query, found in scores.items()}
    if unknown := [query for query in candidates if query not in known]:
        raise InputError(
            f"`topics` lacks {len(unknown)} of the {len(candidates)} queries of the run, such as "
            f"{unknown[0]!r}; its ids are {reprlib.repr(list(known))}"
        )
    wanted = {each for found in candidates.values() for each in found}
    texts = _read_documents(documents, wanted)
    if absent := [each for found in candidates.values() for each in found if each not in texts]:
        raise InputError(
            f"`documents` {str(documents)!r} lacks {len(wanted) - len(texts)} of the {len(wanted)} "
            f"documents of the run, such as {absent[0]!r}; give the whole collection, or a run "
            "over what is there"
        )
    return [
        JudgedQuery(
            known[query].query,
            [texts[each] for each in found],
            grades.get(query),
            instruction=known[query].instruction,
            instruction_aware=known[query].instruction_aware,
            attributes=attributes,
            id=query,
            cluster=known[query].cluster,
        )
        for query, found in candidates.items()
    ]


def _read_documents(path: str | Path, wanted: set[str]) -> dict[str, Document]:
    found: dict[str, Document] = {}
    for number, line in _lines(path):
        fields = _renamed(parse_object(line, path, number), _ID)
        name, text, metadata = (fields.pop(key, None) for key in ("id", "text", "metadata"))
        if not isinstance(name, str) or not isinstance(text, str):
            problem = f"a document needs an `id` and a `text` that are strings, got {name!r} and "
            raise FileFormatError(path, number, problem + reprlib.repr(text))
        if metadata is not None and not isinstance(metadata, dict):
            problem = f"`metadata` must be an object, got {reprlib.repr(metadata)}"
            raise FileFormatError(path, number, problem)
        if name not in wanted:
            continue
        if name in found:
            raise FileFormatError(path, number, f"document {name!r} is there a second time")
        found[name] = Document(text, id=name, metadata={**fields, **(metadata or {})})
    return found


def _renamed(fields: dict[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """The fields under our own names, where those are free."""
    return {
        new if (new := names.get(name, name)) == name or new not in fields else name: value
        for name, value in fields.items()
    }


def _parsed(
    reader: Callable[[io.StringIO], Iterator[Any]],
    path: str | Path,
    number: int,
    line: str,
    form: str,
) -> list[Any]:
    """One line, read by ir-measures, which on its own could not say where it failed."""
    try:
        return list(reader(io.StringIO(line)))
    except ValueError as error:
        problem = f"expected `{form}`, got {reprlib.repr(line)} ({error})"
        raise FileFormatError(path, number, problem) from error


def _add(
    table: dict[str, dict[str, Any]],
    query: str,
    document: str,
    value: float,
    path: str | Path,
    number: int,
) -> None:
    found = table.setdefault(query, {})
    if document in found:
        problem = f"query {query!r} has document {document!r} a second time; remove one"
        raise FileFormatError(path, number, problem)
    found[document] = value


def _not_empty(table: dict[str, Any], path: str | Path, form: str) -> dict[str, Any]:
    if not table:
        raise InputError(f"{str(path)!r} has no lines; expected `{form}`")
    return table


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank with their numbers, read one by one: a corpus may be large."""
    path = Path(path)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if line := raw.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise FileFormatError(path, number, f"not UTF-8 ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
