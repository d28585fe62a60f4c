"""Quadruples from what is there already: scenarios, TREC files with narratives, plain triples."""

from __future__ import annotations

import gzip
import html
import math
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from pydantic import ValidationError

from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.runs import Qrels
from lanerank.evaluation.scenarios import (
    Record,
    Scenario,
    attribute_fields,
    read_objects,
    validate_record,
)
from lanerank.evaluation.trec import Topic, read_qrels, read_topics, read_trec
from lanerank.training.quadruples import Number, Quadruple, Text

TopicField = Literal["narrative", "description"]
"""A field of a TREC topic that says more than its title."""

SCENARIO_SCORES: Mapping[int, float] = MappingProxyType({0: 0.0, 1: 1 / 3, 2: 2 / 3, 3: 1.0})
"""The scores of the grades of scenarios, evenly spaced."""

_TOPIC = re.compile(r"<top>(.*?)(</top>|(?=<top>)|\Z)", re.DOTALL | re.IGNORECASE)
# End tags are often left out; a field then ends where a line begins with the next tag.
_FIELD = re.compile(
    r"<(num|title|desc|narr)>(.*?)(?=</\1>|^\s*<[a-z]|\Z)", re.DOTALL | re.IGNORECASE | re.MULTILINE
)
_LABEL = re.compile(r"\A\s*(Number|Topic|Description|Narrative):", re.IGNORECASE)


def quadruples_from_scenarios(
    scenarios: Iterable[Scenario],
    *,
    scores: Mapping[int, float] = SCENARIO_SCORES,
    source: str | None = "scenarios",
) -> list[Quadruple]:
    """Every document under every lane as a row.

    A row has the ids of the scenario and the document. All metadata fields are attributes, and the
    scenario's `today` goes along, as in `evaluate`.

    Args:
        scenarios: For instance from `read_scenarios`.
        scores: The score of each grade from 0 to 3; evenly spaced by default. Cross-entropy asks
            for a score that is also a probability, so that `{0: 0.02, 1: 0.25, 2: 0.75, 3: 0.97}`
            is a choice that puts 0.5 between the grades that count as relevant and the others.
        source: The `source` of the rows.

    Raises:
        InputError: A grade has no score, or a text cannot be stored.
    """
    return [
        _row(
            f"scenario {scenario.id!r}",
            query=scenario.query,
            instruction=lane.instruction,
            document=document.text,
            score=_score(lane.grades[document.id], scores, f"scenario {scenario.id!r}"),
            query_id=scenario.id,
            document_id=document.id,
            metadata=document.metadata,
            attributes=attribute_fields(scenario),
            today=scenario.today,
            kind=lane.kind,
            source=source,
        )
        for scenario in scenarios
        for lane in scenario.lanes
        for document in scenario.documents
    ]


def quadruples_from_trec(
    *,
    topics: str | Path | Mapping[str, Topic],
    qrels: str | Path | Qrels,
    documents: str | Path,
    scores: Mapping[int, float] | None = None,
    attributes: Sequence[str] = (),
    source: str | None = "trec",
) -> list[Quadruple]:
    """Every judged document as a row, under the narrative of its topic.

    Assessors grade by the narrative, which makes it the instruction of the grades. One topic alone
    does not show what an instruction changes; topics with the same query and another narrative
    (as in FollowIR) do, and their rows form one group.

    Args:
        topics: A file for `read_topics` whose topics have an `instruction`, or what it or
            `read_trec_topics` returned. A topic without one gives rows without.
        qrels: A file for `read_qrels`, or qrels; in this order.
        documents: A JSONL file as in `read_trec`. Every judged document has to be there.
        scores: The score of each grade. By default a grade is divided by the highest of the qrels,
            and grades below 0 (junk) become 0.
        attributes: The metadata fields that the model may see; none by default.
        source: The `source` of the rows.

    Raises:
        FileFormatError: A line of a file is not usable; the message begins with the file and the
            line.
        InputError: A file cannot be read, a judged topic or document is not there, or a grade has
            no score.
    """
    known = topics if isinstance(topics, Mapping) else read_topics(topics)
    judged = qrels if isinstance(qrels, Mapping) else read_qrels(qrels)
    if scores is None:
        found = {grade for grades in judged.values() for grade in grades.values()}
        highest = max(found, default=0)
        scores = {grade: grade / highest if grade > 0 else 0.0 for grade in found}
    # The judged documents are the candidates, which is what a run says.
    run = {query: dict.fromkeys(grades, 0.0) for query, grades in judged.items()}
    texts = {query.id: query for query in read_trec(topics=known, documents=documents, run=run)}
    # Topics with one query are one group, named after the first.
    names: dict[str, str] = {}
    rows = []
    for query, grades in judged.items():
        topic = known[query]
        candidates = {document.id: document for document in texts[query].documents}
        for document, grade in grades.items():
            rows.append(
                _row(
                    f"topic {query!r}, document {document!r}",
                    query=topic.query,
                    instruction=topic.instruction,
                    document=candidates[document].text,
                    score=_score(grade, scores, f"topic {query!r}, document {document!r}"),
                    query_id=names.setdefault(topic.query, query),
                    document_id=document,
                    metadata=candidates[document].metadata,
                    attributes=tuple(attributes),
                    kind=None if topic.instruction else "none",
                    source=source,
                )
            )
    return rows


def read_trec_topics(
    path: str | Path, *, instruction: TopicField = "narrative"
) -> dict[str, Topic]:
    """Read topics in the format of the TREC ad hoc tracks, plain or `.gz`, UTF-8.

    These are `<top>` elements with `<num>`, `<title>`, `<desc>` and `<narr>`, with or without end
    tags; the title is the query. Topics in JSONL or with tabs are for `read_topics`.

    Args:
        path: The file.
        instruction: The field that becomes the instruction. A topic that lacks it has none.

    Returns:
        The topics by number, in file order.

    Raises:
        FileFormatError: A topic has no number or no title, or repeats a number. The message begins
            with the file and the line of its `<top>`.
        InputError: The file cannot be read, or has no topic.
    """
    if instruction not in get_args(TopicField):
        raise InputError(
            f"`instruction` must be one of {get_args(TopicField)}, got {instruction!r}"
        )
    text = _text(path)
    topics: dict[str, Topic] = {}
    for match in _TOPIC.finditer(text):
        number = text.count("\n", 0, match.start()) + 1
        fields = {
            name.lower(): " ".join(html.unescape(_LABEL.sub("", value)).split())
            for name, value in _FIELD.findall(match[1])
        }
        said = fields.get("narr" if instruction == "narrative" else "desc")
        values = {
            "id": fields.get("num"),
            "query": fields.get("title"),
            "instruction": said or None,
        }
        if lacking := [f"<{tag}>" for tag in ("num", "title") if not fields.get(tag)]:
            raise FileFormatError(path, number, f"the topic has no {' and no '.join(lacking)}")
        topic = validate_record(Topic, values, path, number)
        if topic.id in topics:
            raise FileFormatError(path, number, f"topic {topic.id!r} is there a second time")
        topics[topic.id] = topic
    if not topics:
        raise InputError(
            f"{str(path)!r} has no <top>; read topics in JSONL or with tabs with `read_topics`"
        )
    return topics


class Triple(Record):
    """A query, a document and a score that holds without an instruction."""

    query: Text
    document: Text
    score: Number


def quadruples_from_triples(
    path: str | Path,
    *,
    lowest: float = 0.0,
    highest: float = 1.0,
    source: str | None = "triples",
) -> list[Quadruple]:
    """Every scored pair of a file as a row without an instruction.

    They teach nothing about instructions, but what to do without one.

    Args:
        path: A `.tsv` or `.txt` file of lines `query<TAB>document<TAB>score`, or JSONL objects with
            `query`, `document` and `score`; plain or `.gz`, UTF-8.
        lowest: The score in the file that becomes 0.
        highest: The score in the file that becomes 1; those between become what is between.
        source: The `source` of the rows.

    Raises:
        FileFormatError: A line is no triple, or its score is out of range. The message begins with
            the file and the line.
        InputError: The file cannot be read, or `lowest` is not below `highest`.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise InputError(f"`lowest` must be below `highest`, got {lowest!r} and {highest!r}")
    tabbed = Path(str(path).removesuffix(".gz")).suffix in (".tsv", ".txt")
    rows = []
    for number, fields in _tabbed(path) if tabbed else read_objects(path):
        triple = validate_record(Triple, fields, path, number)
        if not lowest <= triple.score <= highest:
            problem = f"the score must be from {lowest} to {highest}, got {triple.score}; "
            problem += "`lowest` and `highest` say what range the file has"
            raise FileFormatError(path, number, problem)
        values = {
            "query": triple.query,
            "instruction": None,
            "document": triple.document,
            "score": min((triple.score - lowest) / (highest - lowest), 1.0),
            "kind": "none",
            "source": source,
        }
        rows.append(validate_record(Quadruple, values, path, number))
    return rows


def _tabbed(path: str | Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            query, document, score = line.split("\t")
            value = float(score)
        except ValueError as error:
            problem = f"expected `query<TAB>document<TAB>score`, got {reprlib.repr(line)}"
            raise FileFormatError(path, number, problem) from error
        yield number, {"query": query, "document": document, "score": value}


def _score(grade: int, scores: Mapping[int, float], where: str) -> float:
    try:
        return scores[grade]
    except KeyError:
        raise InputError(
            f"`scores` has none for grade {grade!r} of {where}, got {dict(scores)!r}; "
            "give every grade a score from 0 to 1"
        ) from None


def _row(where: str, **fields: object) -> Quadruple:
    try:
        return Quadruple.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{where}: `{'.'.join(map(str, problem['loc']))}`: "
            f"{problem['msg'].removeprefix('Value error, ')}, got {reprlib.repr(problem['input'])}"
        ) from error


def _text(path: str | Path) -> str:
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileFormatError(path, line, f"not UTF-8 ({error.reason})") from error
