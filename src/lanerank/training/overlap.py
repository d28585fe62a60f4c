"""Checks of what texts have in common: an instruction with its document, training with dev."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from lanerank.training.findings import Finding, finding, quoted, words
from lanerank.training.quadruples import Quadruple
from lanerank.training.splits import normalised

NGRAM = 5
"""The number of words in a row that count as copied."""

NEAR_DUPLICATE = 0.7
"""From this Jaccard similarity of letter trigrams on two queries are nearly the same."""

_LEAK = 0.25
_CHUNK = 256


def instruction_leak(rows: Sequence[Quadruple]) -> Finding:
    """How many instructions share whole phrases with the document that they judge."""
    said = [row for row in rows if row.instruction is not None]
    ngrams = cache(_ngrams)
    shares = []
    for row in said:
        phrases = ngrams(row.instruction or "")
        shares.append(len(phrases & ngrams(row.document)) / len(phrases) if phrases else 0.0)
    overlap = np.array(shares)
    leaks = overlap >= _LEAK
    share = float(leaks.mean()) if said else None
    scores = np.array([row.score for row in said])
    message = (
        f"share of the rows with an instruction of which {_LEAK:.0%} or more of the phrases of "
        f"{NGRAM} words are in the document too"
    )
    if leaks.any() and not leaks.all():
        message += (
            f"; their mean score is {scores[leaks].mean():.2f}, that of the others "
            f"{scores[~leaks].mean():.2f}"
        )
    worst = (said[place] for place in np.argsort(-overlap, kind="stable") if leaks[place])
    return finding(
        "instruction_leak",
        "ok" if not share else "error" if share >= 0.1 else "warning" if share >= 0.01 else "hint",
        share,
        message,
        "Say what is wanted in words of its own: where the instruction repeats the document, a "
        "model learns to look for equal words. A text that quotes the instruction on purpose, as "
        "injections do, is fine if it is scored by its content",
        (f"{quoted(row.instruction or '')} in {quoted(row.document)}" for row in worst),
    )


def _ngrams(text: str) -> frozenset[tuple[str, ...]]:
    said = words(normalised(text))
    return frozenset(zip(*(said[start:] for start in range(NGRAM)), strict=False))


def split_overlap(rows: Sequence[Quadruple], dev: Sequence[Quadruple]) -> Finding:
    """How much of the development set was seen in training."""
    keys = {row.query_key for row in rows}
    queries = {normalised(row.query) for row in rows}
    documents = {normalised(row.document) for row in rows}
    shared = [
        row
        for row in dev
        if row.query_key in keys
        or normalised(row.query) in queries
        or normalised(row.document) in documents
    ]
    share = len(shared) / len(dev) if dev else None
    return finding(
        "split",
        "error" if shared else "ok",
        share,
        "share of the rows of the development set whose query or document is in training too",
        "Make the development set with `split`; on this one a model looks better than it is",
        (f"{quoted(row.query)} / {quoted(row.document)}" for row in shared),
    )


def similar_queries(rows: Sequence[Quadruple], dev: Sequence[Quadruple]) -> Finding:
    """How many queries of the development set nearly were seen in training."""
    known = list(dict.fromkeys(row.query for row in rows))
    asked = list(dict.fromkeys(row.query for row in dev))
    found = list(_near_duplicates(asked, known)) if asked else []
    share = len(found) / len(asked) if asked else None
    return finding(
        "similar_queries",
        "ok" if not share else "warning" if share >= 0.05 else "hint",
        share,
        "share of the queries of the development set that nearly are a query of training: Jaccard "
        f"similarity of letter trigrams from {NEAR_DUPLICATE}",
        "Leave them out on one side: a model that knows them by heart looks better than it is",
        (
            f"{quoted(query)} like {quoted(like)} ({similarity:.2f})"
            for similarity, query, like in sorted(found, reverse=True)
        ),
    )


def _near_duplicates(queries: list[str], known: list[str]) -> Iterator[tuple[float, str, str]]:
    """Similarity, query, and the known query that is most like it, where that is near."""
    vectorizer = CountVectorizer(
        analyzer="char_wb", ngram_range=(3, 3), binary=True, dtype=np.int32
    )
    theirs = vectorizer.fit_transform(known)
    ours = vectorizer.transform(queries)
    trigrams = vectorizer.build_analyzer()
    # Also those that training does not know, and `ours` therefore lacks.
    total = np.array([len(set(trigrams(query))) for query in queries])
    sizes = np.asarray(theirs.sum(axis=1)).ravel()
    for start in range(0, len(queries), _CHUNK):
        shared = (ours[start : start + _CHUNK] @ theirs.T).tocoo()
        either = total[start + shared.row] + sizes[shared.col] - shared.data
        similarity = shared.data / either
        best: dict[int, tuple[float, int]] = {}
        for place in np.flatnonzero(similarity >= NEAR_DUPLICATE):
            here = float(similarity[place]), int(shared.col[place])
            row = int(shared.row[place])
            best[row] = max(best.get(row, here), here)
        for row, (value, col) in best.items():
            yield value, queries[start + row], known[col]
