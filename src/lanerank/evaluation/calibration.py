"""Whether scores mean what they say: calibration, overall and under each kind of instruction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lanerank.evaluation.measures import (
    RESAMPLES,
    SEED,
    FloatArray,
    IntArray,
    codes,
    percentile_interval,
)

ECE_BINS = 10


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
    members = codes(np.arange(len(pairs.residuals)) if clusters is None else clusters)
    number = int(members.max()) + 1
    members = members[pairs.order]

    def error(drawn: IntArray, axis: int) -> FloatArray:
        rows = np.moveaxis(drawn, axis, -1)
        draws = (np.bincount(row, minlength=number) for row in rows.reshape(-1, number))
        errors = [pairs.calibration_error(times[members], bins) for times in draws]
        return np.array(errors).reshape(rows.shape[:-1])

    value = expected_calibration_error(probabilities, labels, bins=bins)
    return percentile_interval(error, number, value, n, seed)


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
