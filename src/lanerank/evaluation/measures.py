"""What is measured: small functions from arrays to numbers, and the interval around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import ir_measures
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lanerank.contracts import order_by_score

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
ECE_BINS = 10

_RESAMPLED_CELLS = 2_000_000


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


def brier_terms(probabilities: ArrayLike, labels: ArrayLike) -> FloatArray:
    """The squared errors whose mean is the Brier score: `(p - y)^2` with `y` 0 or 1."""
    errors: FloatArray = np.asarray(probabilities, dtype=float) - np.asarray(labels, dtype=float)
    return errors**2


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The Brier score `mean (p - y)^2` (Brier, Monthly Weather Review 78, 1950).

    Args:
        probabilities: Scores in [0, 1].
        labels: Whether each of them is relevant.

    Returns:
        0 for certainty that is always right, 0.25 for a constant 0.5, at most 1.
    """
    return float(brier_terms(probabilities, labels).mean())


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS
) -> float:
    """How far scores are from the share of relevant documents among their like.

    `ECE = sum over bins m of (n_m / n) * |mean label in m - mean probability in m|` (Naeini et
    al., AAAI 2015), with bins of equal mass (Nguyen and O'Connor, EMNLP 2015), because reranker
    scores crowd at the ends of the scale. Equal probabilities share a bin, so the value does not
    depend on the order of the input.

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.
        bins: The number of bins; fewer are filled where many probabilities are equal.

    Returns:
        A value in [0, 1], 0 for perfect calibration. With few pairs it is biased upwards.
    """
    pairs = _SortedPairs(probabilities, labels)
    return pairs.calibration_error(np.ones(len(pairs.residuals), dtype=np.int64), bins)


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
    members = _codes(np.arange(terms.size) if clusters is None else clusters)
    sums = np.bincount(members, weights=terms)
    sizes = np.bincount(members)

    def ratio(drawn: IntArray, axis: int) -> FloatArray:
        means: FloatArray = sums[drawn].sum(axis=axis) / sizes[drawn].sum(axis=axis)
        return means

    return _percentile_interval(ratio, len(sizes), float(terms.mean()), n, seed)


def bootstrap_calibration_interval(
    probabilities: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    bins: int = ECE_BINS,
    n: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """The interval of `expected_calibration_error`, which is no mean, drawn as for one.

    The bins are made afresh for each resample. Resampling adds noise to every bin, so that the
    interval of a nearly perfect model lies a little high; it is widened to hold the value itself.

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.
        clusters: The cluster of each pair, any labels; without it each pair is its own.
        bins: The number of bins.
        n: The number of resamples.
        seed: Equal seeds give equal intervals.

    Returns:
        The lower and the upper bound.
    """
    pairs = _SortedPairs(probabilities, labels)
    members = _codes(np.arange(len(pairs.residuals)) if clusters is None else clusters)
    number = int(members.max()) + 1
    members = members[pairs.order]

    def error(drawn: IntArray, axis: int) -> FloatArray:
        rows = np.moveaxis(drawn, axis, -1)
        draws = (np.bincount(row, minlength=number) for row in rows.reshape(-1, number))
        errors = [pairs.calibration_error(times[members], bins) for times in draws]
        return np.array(errors).reshape(rows.shape[:-1])

    value = expected_calibration_error(probabilities, labels, bins=bins)
    return _percentile_interval(error, number, value, n, seed)


class _SortedPairs:
    """Probabilities with their labels, sorted once, so that a resample is only a set of weights."""

    def __init__(self, probabilities: ArrayLike, labels: ArrayLike) -> None:
        scores = np.asarray(probabilities, dtype=float)
        self.order = np.argsort(scores, kind="stable")
        ascending = scores[self.order]
        self.residuals: FloatArray = np.asarray(labels, dtype=float)[self.order] - ascending
        self._ends = np.searchsorted(ascending, ascending, side="right") - 1

    def calibration_error(self, weights: IntArray, bins: int) -> float:
        """The calibration error where each pair counts as often as its weight says."""
        mass = np.cumsum(weights)
        total = int(mass[-1])
        # Pair number ceil(m * total / bins) closes bin m, together with all that are equal to it.
        wanted = -(-np.arange(1, bins + 1) * total // bins)
        closing = self._ends[np.searchsorted(mass, wanted)]
        excess = np.cumsum(weights * self.residuals)[closing]
        return float(np.abs(np.diff(excess, prepend=0.0)).sum() / total)


def _codes(clusters: ArrayLike) -> IntArray:
    """Cluster labels as numbers from 0 without gaps."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].astype(np.int64)


def _percentile_interval(
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
