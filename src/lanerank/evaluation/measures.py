"""What is measured: small functions from arrays to numbers, and the interval around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ir_measures
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from lanerank.contracts import order_by_score

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

_RESAMPLED_CELLS = 2_000_000


class Estimate(BaseModel):
    """A measured value with its 95% interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    """The interval's lower bound."""
    high: float
    """The interval's upper bound."""
    n: int
    """How many terms the value is made of; each measure says what its terms are."""


def estimate_mean(terms: Iterable[tuple[int, ArrayLike]]) -> Estimate | None:
    """The mean of all values with its `bootstrap_interval`, clusters drawn whole.

    Args:
        terms: A cluster, such as the number of a scenario, and its values, or one value. NaN stands
            for what has no value and is left out.

    Returns:
        The estimate; `None` where nothing is left.
    """
    groups = [(number, np.atleast_1d(np.asarray(part, dtype=float))) for number, part in terms]
    if not groups:
        return None
    values = np.concatenate([part for _, part in groups])
    clusters = np.repeat([number for number, _ in groups], [part.size for _, part in groups])
    kept = ~np.isnan(values)
    if not kept.any():
        return None
    low, high = bootstrap_interval(values[kept], clusters[kept])
    return Estimate(value=float(values[kept].mean()), low=low, high=high, n=int(kept.sum()))


def describe_interval(clusters: str = "scenarios") -> str:
    """How the bounds of estimates are made, for reports."""
    return (
        f"{CONFIDENCE:.0%} percentile bootstrap over {clusters}, {RESAMPLES} resamples, seed {SEED}"
    )


def ndcg(
    grades: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], *, cutoff: int = 10
) -> FloatArray:
    """The nDCG with exponential gain, for each query.

    `DCG@k = sum over ranks i = 1..k of (2^grade_i - 1) / log2(i + 1)`, divided by the DCG@k of the
    ideal order (Järvelin and Kekäläinen, ACM TOIS 20(4), 2002; the gain is that of Burges et al.,
    ICML 2005). Computed by ir-measures from the order in which a user would see the documents:
    ties keep input order, scores that are not finite come last.

    Args:
        grades: For each query, the grade of each document, an integer from 0.
        scores: For each query, the score of each document, in the same order.
        cutoff: The number of ranks that count.

    Returns:
        One value in [0, 1] for each query; NaN where no document has a grade above 0, since every
        order is then as good as any other.
    """
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for query, (query_grades, query_scores) in enumerate(zip(grades, scores, strict=True)):
        # trec_eval breaks ties by document id, so it is given the final rank and not the score.
        order = order_by_score(tuple(map(float, query_scores)))
        pairs = zip(range(len(order)), query_grades, strict=True)
        qrels[str(query)] = {str(document): int(grade) for document, grade in pairs}
        run[str(query)] = {str(document): float(-rank) for rank, document in enumerate(order)}
    values = np.full(len(qrels), np.nan)
    for query_id, value in _exponential_ndcg(qrels, run, cutoff):
        if any(qrels[query_id].values()):
            values[int(query_id)] = value
    return values


def flip_outcomes(
    grades_a: ArrayLike, grades_b: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike
) -> BoolArray:
    """Whether a document's score moved the right way between two instructions.

    For every document whose grade differs between instruction A and instruction B, true if and
    only if its score is higher where its grade is. Equal scores are wrong, and so are scores that
    are NaN. The mean of these outcomes is lanerank's flip accuracy: 0 for a model that ignores
    instructions, about 0.5 for one that scores at random, 1 for one that follows them.

    Args:
        grades_a: The grade of each document under A.
        grades_b: The grade of each document under B.
        scores_a: The score of each document under A.
        scores_b: The score of each document under B.

    Returns:
        One outcome for each document whose grades differ, in input order.
    """
    first, second = np.asarray(grades_a), np.asarray(grades_b)
    before, after = np.asarray(scores_a, dtype=float), np.asarray(scores_b, dtype=float)
    right = np.where(first > second, before > after, before < after)
    outcomes: BoolArray = right[first != second]
    return outcomes


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike | None = None, *, n: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """The percentile bootstrap interval (95%) of a mean.

    Whole clusters are drawn with replacement and the mean of all their values is taken, as a ratio
    of sums (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for
    clusters Field and Welsh, J. R. Statist. Soc. B 69(3), 2007). Values that belong to one
    scenario are not independent, and drawing them one by one would make the interval too narrow.

    Args:
        values: The values, at least one.
        clusters: The cluster of each value, any labels; without it each value is its own.
        n: The number of resamples.
        seed: Equal seeds give equal intervals.

    Returns:
        The lower and the upper bound. Where there is a single cluster nothing is known about the
        spread, and both are the mean.
    """
    terms = np.asarray(values, dtype=float)
    members = codes(np.arange(terms.size) if clusters is None else clusters)
    sums = np.bincount(members, weights=terms)
    sizes = np.bincount(members)

    def ratio(drawn: IntArray, axis: int) -> FloatArray:
        means: FloatArray = sums[drawn].sum(axis=axis) / sizes[drawn].sum(axis=axis)
        return means

    return percentile_interval(ratio, len(sizes), float(terms.mean()), n, seed)


def codes(clusters: ArrayLike) -> IntArray:
    """Cluster labels as numbers from 0 without gaps."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].astype(np.int64)


def percentile_interval(
    statistic: Callable[[IntArray, int], FloatArray], clusters: int, value: float, n: int, seed: int
) -> tuple[float, float]:
    """The interval of a statistic of the numbers of the clusters drawn."""
    if clusters < 2:
        return value, value
    result = stats.bootstrap(
        (np.arange(clusters),),
        lambda drawn, axis: statistic(drawn, axis),
        n_resamples=n,
        batch=max(1, _RESAMPLED_CELLS // clusters),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return min(low, value), max(high, value)


def _exponential_ndcg(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]], cutoff: int
) -> Iterator[tuple[str, float]]:
    """The one call to ir-measures, typed: query and value."""
    # `dcg="exp-log2"` needs perl and rounds to five digits; a map of gains is the same measure.
    highest = max((grade for query in qrels.values() for grade in query.values()), default=0)
    measure = ir_measures.nDCG(gains={grade: 2**grade - 1 for grade in range(highest + 1)}) @ cutoff
    for metric in ir_measures.iter_calc([measure], qrels, run):
        yield str(metric.query_id), float(metric.value)
