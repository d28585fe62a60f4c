"""What is measured: small functions from arrays to numbers, and the interval around them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ir_measures
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from lanerank.contracts import order_by_score
from lanerank.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

# A reward for documents deep in a long list, from the reference code of InfoSearch.
_WISE_DEPTH = 20
_WISE_DEEP_REWARD = 0.01

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
    clusters: int | None = None
    """How many independent units, such as scenarios, the bounds were drawn from; `None` where they
    were made otherwise. One unit says nothing of the spread: both bounds are then the value, and no
    interval."""

    def bounds(self, sign: str = "", *, between: str = ", ") -> str:
        """Both bounds as text, such as `0.123, 0.456`, or that there is no interval.

        Args:
            sign: `"+"` to write the sign of what is above 0.
            between: What stands between the bounds.
        """
        if self.clusters == 1:
            return "no interval"
        return f"{self.low:{sign}.3f}{between}{self.high:{sign}.3f}"


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
    return Estimate(
        value=float(values[kept].mean()),
        low=low,
        high=high,
        n=int(kept.sum()),
        clusters=np.unique(clusters[kept]).size,
    )


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


def rank_by_score(scores: ArrayLike) -> IntArray:
    """The rank of each document in the order in which a user would see them.

    Args:
        scores: One score for each document.

    Returns:
        Ranks from 1, in the order of the input. Ties keep input order, and scores that are not
        finite come last, so that equal scores never tell two rankings apart.
    """
    values = np.asarray(scores, dtype=float)
    order = order_by_score(tuple(values.tolist()))
    ranks = np.empty(values.size, dtype=np.int64)
    ranks[order] = np.arange(1, values.size + 1)
    return ranks


def p_mrr(ranks_original: ArrayLike, ranks_changed: ArrayLike) -> float:
    """How far documents fall that a change of the instruction made irrelevant.

    For a document at rank `o` under the original and `c` under the changed instruction, `1 - o/c`
    where it fell (`c > o`) and `c/o - 1` where it did not; the mean over documents (Weller et al.,
    FollowIR, NAACL 2025, arXiv 2403.15246). Published values are 100 times these.

    Args:
        ranks_original: Ranks from 1 of the documents that are relevant under the original
            instruction and not under the changed one, for instance from `rank_by_score`.
        ranks_changed: Ranks of the same documents under the changed instruction.

    Returns:
        A value in (-1, 1): above 0 where they fall, as they should; exactly 0 for a model that
        ignores instructions. Swapping the arguments changes the sign.

    Raises:
        InputError: If there are no documents, or a rank is not an integer from 1.
    """
    before, after = _as_ranks(ranks_original=ranks_original, ranks_changed=ranks_changed)
    return float(np.where(before >= after, after / before - 1, 1 - before / after).mean())


def sicr(
    scores_original: ArrayLike,
    scores_instructed: ArrayLike,
    scores_reversed: ArrayLike,
    gold: ArrayLike,
) -> float:
    """The share of gold documents that rise with an instruction and fall with its reverse.

    A gold document counts if its rank and its score both rise from the original to the instructed
    run and both fall from the original to the reversed run. Where it is first already, it has to
    stay first with no lower score, and to fall in the reversed run (strict instruction compliance
    ratio, SICR; Zhou et al., InfoSearch, ICLR 2025, arXiv 2410.23841).

    Args:
        scores_original: The score of every document of a query without an instruction.
        scores_instructed: Their scores under the instruction.
        scores_reversed: Their scores under an instruction to the contrary.
        gold: Whether each document is what the instruction asks for; at least one is.

    Returns:
        A value in [0, 1]; 0 for a model that ignores instructions. Scores that are NaN count as
        wrong.

    Raises:
        InputError: If there is no gold document, or the lengths differ.
    """
    runs = [np.asarray(run, float) for run in (scores_original, scores_instructed, scores_reversed)]
    chosen = np.asarray(gold)
    # Not converted: the positions of the gold documents would become a mask without a word.
    if chosen.dtype != bool or not chosen.any() or any(run.shape != (chosen.size,) for run in runs):
        raise InputError(
            f"`gold` must hold True or False for each score, and True at least once; got "
            f"{reprlib.repr(gold)}, and scores of shapes {[run.shape for run in runs]}"
        )
    before, under, against = (run[chosen] for run in runs)
    o, i, r = (rank_by_score(run)[chosen] for run in runs)
    rises = np.where(o == 1, (i == 1) & (under >= before), (i < o) & (under > before))
    return float((rises & (r > o) & (before > against)).mean())


def wise(
    ranks_original: ArrayLike,
    ranks_instructed: ArrayLike,
    ranks_reversed: ArrayLike,
    *,
    candidates: int,
) -> float:
    """How well ranks follow an instruction and its reverse, with partial credit and penalties.

    For each gold document with ranks `o`, `i` and `r` in the original, the instructed and the
    reversed run, the first that applies of

    - `i <= o < r`, as it should be: 1 if `i = 1` and `o < candidates`, else
      `(1 - sqrt(o - i) / 20) / sqrt(i)` if `o <= 20`, else 0.01;
    - `r < o < i`, all wrong: -1;
    - `o <= i`: `(o - i) / i`;
    - `r <= o`: `(r - o) / o`,

    and the mean over documents (weighted instruction sensitivity evaluation, WISE; Zhou et al.,
    InfoSearch, ICLR 2025, arXiv 2410.23841, in the form of its released code).

    Args:
        ranks_original: Ranks from 1 of the gold documents without an instruction.
        ranks_instructed: Their ranks under the instruction.
        ranks_reversed: Their ranks under an instruction to the contrary.
        candidates: The number of documents that fit the query, gold or not.

    Returns:
        A value in [-1, 1]; 0 for a model that ignores instructions. Only one document can be
        first, so that the best possible value is below 1 where there are several gold documents.

    Raises:
        InputError: If there are no documents, a rank is not an integer from 1, or `candidates` is
            below 1.
    """
    o, i, r = _as_ranks(
        ranks_original=ranks_original,
        ranks_instructed=ranks_instructed,
        ranks_reversed=ranks_reversed,
    )
    if candidates < 1:
        raise InputError(f"`candidates` must be at least 1, got {candidates!r}")
    followed = (i <= o) & (o < r)
    partial = (1 - np.sqrt(np.maximum(o - i, 0)) / _WISE_DEPTH) / np.sqrt(i)
    cases: list[tuple[BoolArray, float | FloatArray]] = [
        (followed & (i == 1) & (o < candidates), 1.0),
        (followed & (o <= _WISE_DEPTH), partial),
        (followed, _WISE_DEEP_REWARD),
        ((r < o) & (o < i), -1.0),
        (o <= i, (o - i) / i),
        (r <= o, (r - o) / o),
    ]
    applies, values = zip(*cases, strict=True)
    return float(np.select(list(applies), list(values)).mean())


def robustness(values: ArrayLike, groups: ArrayLike) -> float:
    """The mean over groups of the worst value in each group.

    With nDCG@k values and one group for each query, whose members are wordings of its instruction,
    this is the Robustness@k of InstructIR (Oh et al., arXiv 2402.14334).

    Args:
        values: For instance from `ndcg`; NaN stands for what has no value and is left out.
        groups: The group of each value, any labels.

    Returns:
        A value in the range of the values, never above their mean over groups; NaN where all are.

    Raises:
        InputError: If there are no values, or not one group for each.
    """
    terms, labels = np.asarray(values, dtype=float), np.asarray(groups)
    if terms.ndim != 1 or terms.size == 0 or labels.shape != terms.shape:
        raise InputError(
            f"`values` and `groups` must be of the same length, at least 1; got shapes "
            f"{terms.shape} and {labels.shape}"
        )
    kept = ~np.isnan(terms)
    if not kept.any():
        return float("nan")
    members = codes(labels[kept])
    worst = np.full(int(members.max()) + 1, np.inf)
    np.minimum.at(worst, members, terms[kept])
    return float(worst.mean())


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


def _as_ranks(**given: ArrayLike) -> list[FloatArray]:
    """Ranks of the same documents in several rankings, checked."""
    ranks = [np.asarray(values, dtype=float) for values in given.values()]
    for name, values in zip(given, ranks, strict=True):
        if values.ndim != 1 or values.size == 0 or values.shape != ranks[0].shape:
            raise InputError(
                f"{' and '.join(f'`{name}`' for name in given)} must hold one rank for each of the "
                f"same documents, at least one; got shapes "
                f"{', '.join(str(values.shape) for values in ranks)}"
            )
        if not ((values >= 1) & (values == np.floor(values)) & np.isfinite(values)).all():
            raise InputError(
                f"`{name}` must hold ranks, integers from 1, got {reprlib.repr(given[name])}; "
                "`rank_by_score` makes them of scores"
            )
    return ranks
