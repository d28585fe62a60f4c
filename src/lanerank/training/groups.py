"""From quadruples to what a step of training sees: groups, and which of their rows to compare."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from lanerank.contracts import Candidate
from lanerank.evaluation.attacks import AttackSuite, insert_text, neutral_text
from lanerank.evaluation.scenarios import LaneKind
from lanerank.instruction import Instruction
from lanerank.lanes import render_attributes
from lanerank.training.quadruples import Quadruple, group_by_query

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One document under one instruction, as a scorer would be given it, and what it should say."""

    query: str
    instruction: str
    """Rendered; the empty string is none."""
    candidate: Candidate
    target: float = math.nan
    """In [0, 1]; NaN for rows that are only compared with others."""
    weight: float = 1.0
    kind: LaneKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rows of one query, with the positions of those that losses and measures compare."""

    query_key: str
    rows: tuple[Row, ...]
    lists: tuple[tuple[int, ...], ...]
    """For each instruction with two documents or more, its rows."""
    horizontal: tuple[Pair, ...] = field(default=(), repr=False)
    """Two documents under one instruction, whose targets differ."""
    vertical: tuple[Pair, ...] = field(default=(), repr=False)
    """One document under two instructions, whose targets differ."""
    consistency: tuple[Pair, ...] = field(default=(), repr=False)
    """One document under a neutral instruction, and without any."""
    invariance: tuple[Pair, ...] = field(default=(), repr=False)
    """One document with an injected text, and with a neutral one."""


def make_row(quadruple: Quadruple) -> Row:
    """The row of a quadruple: texts as `Reranker` would hand them to a scorer.

    `today` travels with the instruction, as in evaluation: without one no age is given.
    """
    text = quadruple.instruction
    instruction = Instruction() if text is None else Instruction(text, today=quadruple.today)
    today = instruction.effective_today()
    return Row(
        query=quadruple.query,
        instruction=instruction.render(today),
        candidate=Candidate(
            text=quadruple.document,
            attributes=render_attributes(quadruple.metadata, quadruple.attributes, today),
        ),
        target=quadruple.score,
        weight=quadruple.weight,
        kind=quadruple.kind or ("none" if text is None else None),
    )


def make_groups(
    quadruples: Iterable[Quadruple],
    *,
    min_gap: float,
    documents: int | None = None,
    seed: int = 0,
    horizontal: bool = False,
) -> list[Group]:
    """The groups of some quadruples, in the order in which their queries first occur.

    Args:
        quadruples: Any mix of queries.
        min_gap: The least difference of two targets that makes a pair.
        documents: A group with more documents is divided into parts of about equal size, each with
            all the rows of its documents; by default none is.
        seed: Decides which documents stay together.
        horizontal: Whether to pair documents under one instruction, which only the loss of that
            name needs: there are as many pairs as the square of the documents.
    """
    groups = []
    for key, members in group_by_query(quadruples).items():
        for part in _parts(key, members, documents, seed):
            groups.append(_group(key, part, min_gap, horizontal=horizontal))
    return groups


def add_attacks(
    groups: Iterable[Group], suite: AttackSuite, *, share: float, seed: int
) -> list[Group]:
    """The groups with twins of some rows: one with an injected text, one with a neutral one.

    Attacks that need what is not there, such as `{instruction}` in a row without one, are not drawn
    for it. Equal seeds give equal twins.

    Args:
        groups: Whose rows to attack.
        suite: What to inject.
        share: The share of rows that get twins.
        seed: Decides on rows, wordings and places.
    """
    return [
        _attacked(group, suite, share, random.Random(f"{seed}/{number}"))
        for number, group in enumerate(groups)
    ]


def _parts(
    key: str, members: Sequence[Quadruple], documents: int | None, seed: int
) -> Iterator[list[Quadruple]]:
    keys = list(dict.fromkeys(row.document_key for row in members))
    count = 1 if documents is None else -(-len(keys) // documents)
    if count == 1:
        yield list(members)
        return
    random.Random(f"{seed}/{key}").shuffle(keys)
    part_of = {each: place % count for place, each in enumerate(keys)}
    for part in range(count):
        yield [row for row in members if part_of[row.document_key] == part]


def _group(key: str, members: Sequence[Quadruple], min_gap: float, *, horizontal: bool) -> Group:
    rows = tuple(map(make_row, members))
    under: dict[str, list[int]] = {}
    of: dict[str, list[int]] = {}
    for place, (row, quadruple) in enumerate(zip(rows, members, strict=True)):
        under.setdefault(row.instruction, []).append(place)
        of.setdefault(quadruple.document_key, []).append(place)

    def differing(places: Iterable[int]) -> Iterator[Pair]:
        for a, b in combinations(places, 2):
            # Grades of three steps lie a third apart, which floats cannot say exactly.
            if abs(rows[a].target - rows[b].target) >= min_gap - 1e-9:
                yield a, b

    return Group(
        query_key=key,
        rows=rows,
        lists=tuple(tuple(places) for places in under.values() if len(places) > 1),
        horizontal=tuple(
            pair for places in under.values() if horizontal for pair in differing(places)
        ),
        vertical=tuple(
            (a, b)
            for places in of.values()
            for a, b in differing(places)
            if rows[a].instruction != rows[b].instruction
        ),
        consistency=tuple(
            (a, b)
            for places in of.values()
            for a in places
            for b in places
            if rows[a].kind == "neutral" and not rows[b].instruction
        ),
    )


def _attacked(group: Group, suite: AttackSuite, share: float, rng: random.Random) -> Group:
    rows, pairs = list(group.rows), []
    for row in group.rows:
        if rng.random() >= share:
            continue
        values = {"query": row.query, "instruction": row.instruction}
        values["attribute"] = _favoured_attributes(group, row.instruction)
        known = {name for name, value in values.items() if value}
        usable = [attack for attack in suite.attacks if attack.placeholders <= known]
        if not usable:
            continue
        attack = rng.choice(usable)
        text, position = attack.fill(values), rng.choice(attack.positions)
        pairs.append((len(rows), len(rows) + 1))
        for added in (text, neutral_text(text, suite.prose)):
            document = insert_text(row.candidate.text, added, position)
            candidate = replace(row.candidate, text=document)
            rows.append(replace(row, candidate=candidate, target=math.nan))
    return replace(group, rows=tuple(rows), invariance=tuple(pairs))


def _favoured_attributes(group: Group, instruction: str) -> str:
    best = max(
        (row for row in group.rows if row.instruction == instruction), key=lambda row: row.target
    )
    return best.candidate.attributes
