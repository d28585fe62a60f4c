"""Scores and labels sorted once, so that measures of sorted pairs can be resampled quickly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from lanerank.errors import InputError
from lanerank.evaluation.measures import (
    RESAMPLES,
    SEED,
    FloatArray,
    IntArray,
    percentile_interval,
)


def counted_interval(
    statistic: Callable[[IntArray], float],
    clusters: int,
    value: float,
    *,
    n: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """The interval of a statistic of how often each cluster was drawn."""

    def of_draws(drawn: IntArray, axis: int) -> FloatArray:
        rows = np.moveaxis(drawn, axis, -1)
        draws = (np.bincount(row, minlength=clusters) for row in rows.reshape(-1, clusters))
        return np.array([statistic(times) for times in draws]).reshape(rows.shape[:-1])

    return percentile_interval(of_draws, clusters, value, n, seed)


class SortedPairs:
    """Probabilities with their labels, sorted once, so that a resample is only a set of weights.

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.

    Attributes:
        order: Where each of the sorted pairs stood in the input; weights come in this order.
        scores: The probabilities, rising.
        labels: Their labels, 0.0 or 1.0.
    """

    def __init__(self, probabilities: ArrayLike, labels: ArrayLike) -> None:
        """Check and sort the pairs.

        Raises:
            InputError: The arguments are not such values, or differ in length.
        """
        scores, relevant = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
        if scores.ndim != 1 or scores.shape != relevant.shape or not scores.size:
            raise InputError(
                "`probabilities` and `labels` must be two lists of the same length, at least 1; "
                f"got the shapes {scores.shape} and {relevant.shape}"
            )
        if not (scores.min() >= 0 and scores.max() <= 1):
            raise InputError(
                "`probabilities` must lie in [0, 1], got values from "
                f"{float(scores.min())!r} to {float(scores.max())!r}"
            )
        if not np.isin(relevant, (0, 1)).all():
            raise InputError("`labels` must be 0 or 1")
        self.order = np.argsort(scores, kind="stable")
        self.scores: FloatArray = scores[self.order]
        self.labels: FloatArray = relevant[self.order]
        self._residuals = self.labels - self.scores
        self._ends = np.searchsorted(self.scores, self.scores, side="right") - 1
        self._firsts = np.unique(self._ends, return_index=True)[1]

    def calibration_error(self, weights: IntArray, bins: int) -> float:
        """The calibration error where each pair counts as often as its weight says."""
        closing, total = self._closing(weights, bins)
        excess = np.cumsum(weights * self._residuals)[closing]
        return float(np.abs(np.diff(excess, prepend=0.0)).sum() / total)

    def best_threshold(self, weights: IntArray) -> float:
        """The highest of the scores that as thresholds maximise F1, pairs weighted as above."""
        kept = np.cumsum(weights[::-1])[::-1]
        hits = np.cumsum((weights * self.labels)[::-1])[::-1]
        # The sum is 0 only where a resample has nothing relevant, and then F1 is 0.
        f1 = (2 * hits / np.maximum(kept + hits[0], 1))[self._firsts]
        return float(self.scores[self._firsts[f1.size - 1 - np.argmax(f1[::-1])]])

    def bins(self, bins: int) -> tuple[IntArray, IntArray]:
        """Where each bin that holds something begins, and its size."""
        closing, total = self._closing(np.ones(self.scores.size, dtype=np.int64), bins)
        edges = np.unique(closing) + 1
        starts = np.concatenate([[0], edges[:-1]])
        return starts, np.diff(starts, append=total)

    def _closing(self, weights: IntArray, bins: int) -> tuple[IntArray, int]:
        """The last pair of each bin, and the sum of the weights."""
        if bins < 1:
            raise InputError(f"`bins` must be at least 1, got {bins!r}")
        mass = np.cumsum(weights)
        total = int(mass[-1])
        # Pair number ceil(m * total / bins) closes bin m, together with all that are equal to it.
        wanted = -(-np.arange(1, bins + 1) * total // bins)
        return self._ends[np.searchsorted(mass, wanted)], total
