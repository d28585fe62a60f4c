"""Whether a difference between two systems is more than chance, and whether it matters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lanerank.evaluation.measures import CONFIDENCE, SEED, Estimate, codes

PERMUTATIONS = 9999
_TESTED_CELLS = 2_000_000


def paired_randomisation_test(
    differences: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n: int = PERMUTATIONS,
    seed: int = SEED,
) -> float:
    """The p-value of a mean difference, two-sided, by Fisher's randomisation test.

    If it does not matter which of the two systems is which, each difference could as well have had
    the other sign. The p-value is the share of such draws whose mean is at least as far from 0.
    Smucker, Allan and Carterette (CIKM 2007) recommend this test, which assumes nothing of the
    distribution, and advise against those of Wilcoxon and of signs.

    Args:
        differences: One for each query, at least one.
        clusters: The cluster of each difference, any labels; the differences of a cluster change
            their sign together. Without it each is its own.
        n: The number of draws; where there are no more ways to choose the signs, all are taken.
        seed: Equal seeds give equal p-values.

    Returns:
        A value in (0, 1]; 1 where nothing differs.
    """
    terms = np.asarray(differences, dtype=float)
    sums = np.bincount(codes(np.arange(terms.size) if clusters is None else clusters), terms)
    # Zeros stay zero under either sign: without them the test is the same, and sooner exact.
    sums = sums[sums != 0]
    if sums.size < 2:
        return 1.0
    result = stats.permutation_test(
        (sums,),
        lambda drawn, axis: drawn.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n,
        batch=max(1, _TESTED_CELLS // sums.size),
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def describe_test(units: str = "queries") -> str:
    """How the p-values of a comparison are made, for reports."""
    return (
        "two-sided paired randomisation test of the mean difference (Smucker, Allan and "
        f"Carterette, CIKM 2007), signs drawn for {units}, {PERMUTATIONS} draws or all if there "
        f"are no more, seed {SEED}; adjusted by Holm's method over the measures of a group"
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for several questions asked at once (Holm, Scand. J. Statist. 6(2), 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may be smaller than
    one before it, or exceed 1. Whoever then believes all that are below 5% is wrong about any of
    them with a probability of at most 5%.
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors)
    return [float(value) for value in adjusted.clip(max=1)]


def is_neutral(difference: Estimate, clusters: int, margin: float) -> bool | None:
    """Whether a difference is shown to be too small to matter.

    Its interval must lie inside `(-margin, margin)`, which is Schuirmann's two one-sided tests
    (J. Pharmacokin. Biopharm. 15, 1987) read off an interval; they ask for one of 90%, so that the
    one of 95% used here is on the safe side. A difference that is merely not significant is no
    such proof: with few queries nothing is significant.

    Args:
        difference: The mean difference.
        clusters: The number of independent units that it is made of.
        margin: The smallest difference that matters.

    Returns:
        `None` for so few clusters that no draw of signs could be significant either, since the
        interval of so few is not to be trusted.
    """
    if 2 * 0.5**clusters > 1 - CONFIDENCE:
        return None
    return -margin < difference.low and difference.high < margin
