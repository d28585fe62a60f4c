"""One scale for all parts of a tournament: a logistic map from strengths to grades."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from lanerank.errors import InputError
from lanerank.evaluation.measures import FloatArray, IntArray

_LEVEL_SPREAD = 2.0
"""By how many logits the levels of parts are taken to differ (a standard deviation): enough for one
part to be mostly relevant and another mostly not. It decides where there are few grades."""

_LARGEST_DEVIATION = 0.5
"""No quantity in [0, 1] has a larger standard deviation: it is that of 0 and 1, drawn evenly."""

# Wide: they only keep a fit to a grade or two finite. One unit of strength is about one logit.
_SLOPE, _SLOPE_SPREAD = 1.0, 2.0
_COMMON_SPREAD = 5.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Scores in [0, 1] with their standard errors, at most 0.5, for each entry."""

    scores: FloatArray
    deviations: FloatArray
    slope: float | None
    """Logits of the grade for a unit of strength; `None` without grades."""


def fit_scale(
    strengths: FloatArray,
    variances: FloatArray,
    parts: IntArray,
    grades: Mapping[int, float],
    chance: Callable[[FloatArray], FloatArray],
    grade_deviation: float,
) -> Scale:
    """Put the strengths of all parts on the scale of the grades; see `fit_tournament`.

    The map is `expit(slope * strength + level + offset of the part)`, with normal priors on all
    three, fitted by maximum posterior. A part without grades keeps an offset of 0 and its whole
    prior variance, so that its scores are as uncertain as they should be.

    Args:
        strengths: One for each entry; the mean of each part is 0.
        variances: Of the strengths.
        parts: The part of each entry; -1 where it has none.
        grades: In [0, 1], by entry.
        chance: From strength to the score where there are no grades.
        grade_deviation: The standard error of a grade in the middle of the scale.

    Raises:
        InputError: A grade is not usable, or grades fall where strengths rise.
    """
    _check(grades, len(strengths), grade_deviation)
    known = {place: grade for place, grade in grades.items() if parts[place] >= 0}
    if not known:
        if grades:
            raise InputError(
                "`grades` are all of entries that are in no comparison; give grades of others"
            )
        step = 1e-4
        slopes = (chance(strengths + step) - chance(strengths - step)) / (2 * step)
        return Scale(chance(strengths), _bounded(slopes * np.sqrt(variances)), None)
    places = np.array(list(known), dtype=np.int64)
    targets = np.array(list(known.values()), dtype=float)
    fit = _Fit(strengths[places], parts[places], targets, 0.25 / grade_deviation**2)
    slope, level, offsets = fit.solve(int(parts.max()) + 1)
    if slope <= 0:
        raise InputError(
            f"`grades` fall where the judges' strengths rise (slope {slope:.3g} over "
            f"{len(known)} grades); check that they belong to these entries and that more is better"
        )
    scores = special.expit(slope * strengths + level + offsets[parts])
    logit_variances = slope**2 * variances + fit.variances(slope, level, offsets, strengths, parts)
    return Scale(scores, _bounded(scores * (1 - scores) * np.sqrt(logit_variances)), slope)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A logistic regression on strength, with a random offset for each part."""

    strengths: FloatArray
    parts: IntArray
    grades: FloatArray
    weight: float
    """How many yes-or-no observations a grade is worth."""

    def solve(self, parts: int) -> tuple[float, float, FloatArray]:
        """Slope, level and the offset of each part."""
        means = np.concatenate(([_SLOPE, 0.0], np.zeros(parts)))
        spreads = np.concatenate(([_SLOPE_SPREAD, _COMMON_SPREAD], np.full(parts, _LEVEL_SPREAD)))

        def loss(values: FloatArray) -> tuple[float, FloatArray]:
            slope, level, offsets = values[0], values[1], values[2:]
            logits = slope * self.strengths + level + offsets[self.parts]
            # The logistic loss for a target between 0 and 1.
            total = self.weight * (np.logaddexp(0, logits) - self.grades * logits).sum()
            errors = self.weight * (special.expit(logits) - self.grades)
            pulls = (values - means) / spreads**2
            total += 0.5 * ((values - means) * pulls).sum()
            pushes = np.bincount(self.parts, weights=errors, minlength=parts)
            gradient = np.concatenate(([errors @ self.strengths, errors.sum()], pushes)) + pulls
            return float(total), gradient

        result = optimize.minimize(
            loss, means, jac=True, method="L-BFGS-B", options={"maxiter": 10_000}
        )
        return float(result.x[0]), float(result.x[1]), result.x[2:]

    def variances(
        self,
        slope: float,
        level: float,
        offsets: FloatArray,
        strengths: FloatArray,
        parts: IntArray,
    ) -> FloatArray:
        """The variance of `slope * strength + level + offset` for each entry.

        The information matrix is dense only where slope and level stand, so it is inverted by
        blocks: the work grows with the number of parts, not with its cube.
        """
        chances = special.expit(slope * self.strengths + level + offsets[self.parts])
        weights = self.weight * chances * (1 - chances)
        design = np.stack([self.strengths, np.ones_like(self.strengths)])
        corner = (design * weights) @ design.T
        corner += np.diag([1 / _SLOPE_SPREAD**2, 1 / _COMMON_SPREAD**2])
        count = len(offsets)
        edge = np.stack([np.bincount(self.parts, row * weights, count) for row in design])
        diagonal = np.bincount(self.parts, weights, count) + 1 / _LEVEL_SPREAD**2
        common = np.linalg.inv(corner - (edge / diagonal) @ edge.T)
        shares = np.stack([strengths, np.ones_like(strengths)]) - (edge / diagonal)[:, parts]
        variances: FloatArray = np.einsum("ie,ij,je->e", shares, common, shares)
        variances += 1 / diagonal[parts]
        return variances


def _bounded(deviations: FloatArray) -> FloatArray:
    """Deviations that a tangent gave (the delta method), which runs past both ends of the scale."""
    bounded: FloatArray = np.minimum(deviations, _LARGEST_DEVIATION)
    return bounded


def _check(grades: Mapping[int, float], size: int, grade_deviation: float) -> None:
    if not 0 < grade_deviation < 0.5:
        raise InputError(f"`grade_deviation` must be between 0 and 0.5, got {grade_deviation!r}")
    for place, grade in grades.items():
        if not _is_position(place, size):
            raise InputError(
                f"`grades` are by position in the {size} entries, got the position {place!r}"
            )
        if not 0 <= grade <= 1:
            raise InputError(
                f"`grades[{place}]` must be from 0 to 1, got {grade!r}; divide a grade from 0 to 3 "
                "by 3"
            )


def _is_position(place: int, size: int) -> bool:
    try:
        # The integers of NumPy are no `int`, and index a list all the same.
        return 0 <= operator.index(place) < size
    except TypeError:
        return False
