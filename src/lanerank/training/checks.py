"""Checks of quadruples for what ruins instruction training."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
from scipy import stats

from lanerank.errors import InputError
from lanerank.evaluation.measures import BoolArray, FloatArray, estimate_mean
from lanerank.training.findings import (
    CHANGE,
    CheckReport,
    Finding,
    Setting,
    Severity,
    differ,
    finding,
    lists,
    quoted,
    setting,
    words,
)
from lanerank.training.overlap import instruction_leak, similar_queries, split_overlap
from lanerank.training.quadruples import Quadruple, group_by_query
from lanerank.training.splits import normalised

RELEVANT_SCORE = 0.5
"""From this score on a document counts as relevant."""

_SHORTCUT = 0.2
_FEW_INSTRUCTIONS = 10
_FEW_QUERIES = 10

# Meant to notice that there are injected texts at all, not to find every one.
_INJECTION = re.compile(
    r"\b(ignore|disregard|forget)\b[^.]{0,30}\b(instructions?|rules?|above|previous)\b"
    r"|\b(rank|rate|place|put|list|show|mark) (this|it|us|me)\b[^.]{0,30}"
    r"\b(first|top|highest|relevant|above|ahead|before)\b"
    r"|\b(search|ranking|retrieval|evaluation) (systems?|services?|agents?)\b[^.]{0,20}"
    r"\b(must|should|please|place|treat|mark)\b"
    r"|\brankers?\b|\boutrank|<\W?(instruct|system|query)|\[/?inst\]|<\|im_|^system:"
    r"|\brelevant: ?(true|yes)|\bscore: ?1\.0",
    re.IGNORECASE | re.MULTILINE,
)

_Rows = Sequence[Quadruple]


def check(rows: Sequence[Quadruple], *, dev: Sequence[Quadruple] | None = None) -> CheckReport:
    """Look for what ruins the training of a model that is to follow instructions.

    A check reads texts and scores, and knows nothing of the subject: what it finds may have a good
    reason, and what it does not find may still be wrong.

    Args:
        rows: The training set, or all rows.
        dev: The development set, where there is one. It is compared with `rows`, and not checked
            itself.

    Returns:
        One finding for each check, for the last two only with `dev`:

        - `instruction_effect`: documents whose score changes with the instruction;
        - `single_instruction`: queries that have one instruction only;
        - `instruction_variety`: different instructions in all;
        - `uninstructed`: rows without an instruction;
        - `instruction_leak`: instructions that share whole phrases with the document;
        - `length`, `position`: whether these alone order the documents of a list;
        - `contradictions`, `duplicates`: equal rows with different and with equal scores;
        - `balance`: relevant rows against others;
        - `flat_lists`: lists in which there is nothing to order;
        - `attributes`: attributes that no document has;
        - `injections`: documents that seem to command the model;
        - `split`: rows of `dev` whose query or document is in `rows`;
        - `similar_queries`: queries of `dev` that nearly are in `rows`.

    Raises:
        InputError: There are no rows.
    """
    if not rows:
        raise InputError("`rows` is empty; there is nothing to check")
    findings = [
        _instruction_effect(rows),
        _single_instruction(rows),
        _instruction_variety(rows),
        _uninstructed(rows),
        instruction_leak(rows),
        _length(rows),
        _position(rows),
        _contradictions(rows),
        _duplicates(rows),
        _balance(rows),
        _flat_lists(rows),
        _attributes(rows),
        _injections(rows),
    ]
    if dev is not None:
        findings += [split_overlap(rows, dev), similar_queries(rows, dev)]
    return CheckReport(rows=len(rows), queries=len(group_by_query(rows)), findings=tuple(findings))


def _instruction_effect(rows: _Rows) -> Finding:
    changed: list[tuple[int, BoolArray]] = []
    scores, means, steady = [], [], []
    for number, group in enumerate(_instructed(rows)):
        by_document = _scores_by_setting(group)
        changed.append((number, np.array([differ(each) for each in by_document])))
        if not changed[-1][1].any():
            steady.append(group[0])
        scores += [score for each in by_document for score in each]
        means += [np.mean(each) for each in by_document for _ in each]
    share = estimate_mean(changed)
    blind = _explained(np.array(scores), np.array(means))
    value = share.value if share else 0.0
    return finding(
        "instruction_effect",
        "error" if value == 0 else "warning" if value < 0.1 else "ok",
        share,
        f"share of the documents whose score moves by {CHANGE} or more between two instructions "
        f"of a query. Scores that overlook the instruction can still explain {blind:.0%} of the "
        "variance",
        "Add rows that score the same document of a query under instructions that want different "
        "ones. Without them a model learns that the instruction does not matter",
        (f"no document changes: {quoted(row.query)}" for row in steady),
    )


def _single_instruction(rows: _Rows) -> Finding:
    groups = _instructed(rows)
    single = [group for group in groups if len({setting(row) for row in group}) == 1]
    share = len(single) / len(groups) if groups else None
    return finding(
        "single_instruction",
        "warning" if share is not None and share > 0.5 else "ok",
        share,
        "share of the queries with an instruction that have one only, and no row without",
        "Score their documents without an instruction too, or better under another one: with one "
        "instruction for a query, the query alone says what is wanted",
        (f"{quoted(g[0].query)}: {quoted(g[0].instruction or '')}" for g in single),
    )


def _instruction_variety(rows: _Rows) -> Finding:
    counts = Counter(normalised(row.instruction) for row in rows if row.instruction)
    return finding(
        "instruction_variety",
        "warning" if 0 < len(counts) < _FEW_INSTRUCTIONS else "ok",
        len(counts),
        "number of different instructions",
        "Word the instructions in more ways, and add others: a model learns so few by heart, and "
        "does not learn to read a new one",
        (f"{number} rows: {quoted(text)}" for text, number in counts.most_common()),
    )


def _uninstructed(rows: _Rows) -> Finding:
    share = sum(row.instruction is None for row in rows) / len(rows)
    return finding(
        "uninstructed",
        "error" if share == 1 else "hint" if share == 0 else "ok",
        share,
        "share of the rows without an instruction",
        "Add rows with an instruction: these teach a model nothing about following one"
        if share == 1
        else "Add rows without one, if the model will also be asked without: it may otherwise get "
        "worse at that",
    )


def _length(rows: _Rows) -> Finding:
    length = cache(lambda text: len(words(text)))
    return _shortcut(
        rows,
        "length",
        "error",
        lambda _, row: length(row.document),
        "mean rank correlation (Kendall's tau-b) of the length of a document and its score, within "
        "the lists of one query and instruction; 0 is none",
        "Add documents that are long and not wanted, or short and wanted: the length alone orders "
        "the documents better than chance",
    )


def _position(rows: _Rows) -> Finding:
    return _shortcut(
        rows,
        "position",
        # Models score one document at a time, and do not see its place.
        "warning",
        lambda place, _: place,
        "mean rank correlation (Kendall's tau-b) of the place of a row in its list and its score; "
        "0 is none",
        "Shuffle the rows of a query: ties keep the order of the input, so that a model without a "
        "clue looks better or worse in evaluation than it is",
    )


def _shortcut(
    rows: _Rows,
    name: str,
    worst: Severity,
    feature: Callable[[int, Quadruple], int],
    message: str,
    remedy: str,
) -> Finding:
    """How far a feature that should not matter orders the documents of a list."""
    terms: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for number, group in enumerate(group_by_query(rows).values()):
        for listed in lists(group):
            if len(listed) > 1:
                values = [feature(place, row) for place, row in enumerate(listed)]
                # NaN where all are equal, which says nothing.
                tau = stats.kendalltau(values, [row.score for row in listed])
                terms[listed[0].instruction is not None].append((number, float(tau.statistic)))
    every = [*terms[False], *terms[True]]
    found = estimate_mean(every)
    severity: Severity = "ok"
    # A few queries can agree by chance, and the interval of one is a point.
    enough = len({number for number, _ in every}) >= _FEW_QUERIES
    if found and enough and abs(found.value) >= _SHORTCUT and not found.low <= 0 <= found.high:
        severity = worst if abs(found.value) >= 2 * _SHORTCUT else "warning"
    parts = {
        said: np.array([tau for _, tau in terms[instructed] if not math.isnan(tau)])
        for instructed, said in ((False, "without an instruction"), (True, "with an instruction"))
    }
    cases = [
        f"{said}: {tau.mean():.2f} in {tau.size} lists" for said, tau in parts.items() if tau.size
    ]
    return finding(name, severity, found, message, remedy, cases)


def _contradictions(rows: _Rows) -> Finding:
    equal = _equal_rows(rows)
    bad = [same for same in equal.values() if differ(row.score for row in same)]
    share = sum(map(len, bad)) / len(rows)
    return finding(
        "contradictions",
        "error" if share >= 0.01 else "warning" if share else "ok",
        share,
        f"share of the rows that another one contradicts: equal but for the score, and that by "
        f"{CHANGE} or more",
        "Judge them again, or replace them by one row with the mean and an `uncertainty`",
        (
            f"{_row(same[0])} / {quoted(same[0].document)}: "
            f"{', '.join(f'{row.score:.2f}' for row in same[:4])}"
            for same in bad
        ),
    )


def _duplicates(rows: _Rows) -> Finding:
    equal = _equal_rows(rows)
    often = sorted(equal.values(), key=len, reverse=True)
    share = 1 - len(equal) / len(rows)
    return finding(
        "duplicates",
        "warning" if share > 0.05 else "hint" if share else "ok",
        share,
        "share of the rows that repeat an earlier one, whatever the score",
        "Keep one of each; `weight` says that a row counts more",
        (
            f"{len(same)} times: {quoted(same[0].query)} / {quoted(same[0].document)}"
            for same in often
        ),
    )


def _balance(rows: _Rows) -> Finding:
    share = sum(row.score >= RELEVANT_SCORE for row in rows) / len(rows)
    different = len({row.score for row in rows})
    return finding(
        "balance",
        "error" if share in (0, 1) else "ok" if 0.05 <= share <= 0.95 else "warning",
        share,
        f"share of the rows with a score of {RELEVANT_SCORE} or more; {different} different scores "
        "in all",
        "Add documents of the other sort: what is wanted shows only against what is not",
    )


def _flat_lists(rows: _Rows) -> Finding:
    every = [listed for group in group_by_query(rows).values() for listed in lists(group)]
    flat = [listed for listed in every if not differ(row.score for row in listed)]
    share = len(flat) / len(every)
    return finding(
        "flat_lists",
        "error" if share == 1 else "warning" if share > 0.5 else "ok",
        share,
        f"share of the lists of one query and instruction in which no two scores differ by "
        f"{CHANGE} or more",
        "Add documents that answer the query better or worse; such a list has no order to learn",
        (f"{_row(listed[0])}: {len(listed)} documents" for listed in flat),
    )


def _attributes(rows: _Rows) -> Finding:
    named = {name for row in rows for name in row.attributes}
    absent = sorted(named - {name for row in rows for name in row.metadata})
    return finding(
        "attributes",
        "warning" if absent else "ok",
        len(absent),
        "number of fields in `attributes` that no row has in its `metadata`",
        "Correct the names, or leave them out",
        map(quoted, absent),
    )


def _injections(rows: _Rows) -> Finding:
    texts = {row.document for row in rows}
    share = sum(bool(_INJECTION.search(text)) for text in texts) / len(texts)
    return finding(
        "injections",
        "hint" if share < 0.005 else "ok",
        share,
        "share of the different documents that seem to speak to the ranker, by their wording",
        "Add documents with injected commands, scored by their honest content: a model learns that "
        "these mean nothing if it has seen some",
    )


def _instructed(rows: _Rows) -> list[list[Quadruple]]:
    """The groups that have an instruction: the others need not show what one changes."""
    groups = group_by_query(rows).values()
    return [group for group in groups if any(row.instruction for row in group)]


def _scores_by_setting(group: Iterable[Quadruple]) -> list[list[float]]:
    """For each document of a query its mean score under each setting of the instruction."""
    found: dict[str, dict[Setting, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in group:
        found[row.document_key][setting(row)].append(row.score)
    return [[float(np.mean(scores)) for scores in each.values()] for each in found.values()]


def _equal_rows(rows: _Rows) -> dict[tuple[object, ...], list[Quadruple]]:
    """Rows that a model cannot tell apart."""
    equal: dict[tuple[object, ...], list[Quadruple]] = defaultdict(list)
    for row in rows:
        shown = {name: row.metadata[name] for name in row.attributes if name in row.metadata}
        texts = (normalised(text) for text in (row.query, row.instruction or "", row.document))
        equal[*texts, row.today, json.dumps(shown, sort_keys=True)].append(row)
    return equal


def _explained(scores: FloatArray, fitted: FloatArray) -> float:
    """The share of the variance of scores that fitted values explain."""
    total = float(((scores - scores.mean()) ** 2).sum()) if scores.size else 0.0
    return 1 - float(((scores - fitted) ** 2).sum()) / total if total else 1.0


def _row(row: Quadruple) -> str:
    said = "no instruction" if row.instruction is None else quoted(row.instruction)
    return f"{quoted(row.query)} / {said}"
