"""Whether scores mean what they say: calibration, overall and under each kind of instruction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from lanerank.display import fragment
from lanerank.errors import InputError
from lanerank.evaluation.measures import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    BoolArray,
    Estimate,
    FloatArray,
    IntArray,
    bootstrap_interval,
    codes,
    describe_interval,
    percentile_interval,
)
from lanerank.evaluation.scenarios import LANE_KINDS, RELEVANT_GRADE, LaneKind, Scenario
from lanerank.evaluation.scoring import SupportsScore, score_scenario
from lanerank.evaluation.sections import calibration_section
from lanerank.evaluation.sorted_pairs import SortedPairs, counted_interval
from lanerank.instruction import Instruction

ECE_BINS = 10

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class BrierDecomposition(BaseModel):
    """The parts of a Brier score: `reliability - resolution + uncertainty + within_bin`."""

    model_config = _FROZEN

    reliability: float
    """How far the bins' mean probabilities lie from their shares of relevant documents, squared;
    0 is best. This is the part that calibration can mend."""
    resolution: float
    """How far the bins' shares lie from the overall share, squared; the more the scores tell apart
    the larger it is, at most `uncertainty`."""
    uncertainty: float
    """`share * (1 - share)` of the overall share: the Brier score of always saying that share."""
    within_bin: float
    """What the bins' means leave out: the variance of the probabilities within bins, less twice
    their covariance with the labels. 0 where the probabilities of each bin are equal."""


class ReliabilityBin(BaseModel):
    """One bin of a reliability diagram."""

    model_config = _FROZEN

    probability: float
    """The mean probability."""
    relevant: Estimate
    """The share of relevant documents, with `n` the number of pairs. The interval is Wilson's
    (JASA 22, 1927), which takes the pairs as independent: those of one scenario are not quite, so
    that it is a little narrow."""


class BestThreshold(BaseModel):
    """Where to cut, if documents with at least this score are kept."""

    model_config = _FROZEN

    threshold: float
    """A score that occurs."""
    f1: float
    """The F1 of keeping those documents."""


class CalibrationMeasures(BaseModel):
    """Calibration over a set of pairs. `None` where there are none, or a score is outside [0, 1].

    The `n` of every estimate is `pairs`.
    """

    model_config = _FROZEN

    pairs: int
    """Graded (lane, document) pairs with a finite score."""
    ece: Estimate | None = None
    """Expected calibration error against grade 2 and above."""
    brier: Estimate | None = None
    """Brier score against grade 2 and above."""
    decomposition: BrierDecomposition | None = None
    """The parts of `brier`, over the bins below."""
    bins: tuple[ReliabilityBin, ...] = ()
    """The reliability diagram, from the lowest probabilities to the highest."""
    threshold: Estimate | None = None
    """The threshold that is best for these pairs, see `best_threshold`; `None` also where none of
    them is relevant."""
    f1: Estimate | None = None
    """The F1 at that threshold. Chosen on the same pairs, so that new ones will give a little
    less."""
    f1_pooled: Estimate | None = None
    """The F1 at the threshold that is best for the pairs of all kinds together: what is left if an
    application has one threshold for every instruction."""


class CalibrationReport(BaseModel):
    """What `measure_calibration` found."""

    model_config = _FROZEN

    model: str
    """The scorer's name."""
    interval: str
    """How the bounds of every estimate were made, but for those in `bins`."""

    scenarios: int
    non_finite: int
    """Pairs whose score was NaN or infinite, and which are left out."""
    pooled: CalibrationMeasures
    """Over the pairs of all lanes."""
    by_kind: Mapping[LaneKind, CalibrationMeasures]
    """The same by kind of lane, for the kinds that occur."""
    threshold_spread: Estimate | None
    """The highest best threshold of a kind less the lowest; `n` is the number of kinds that have
    one, and with fewer than two there is no spread. Above 0 also by chance: the fewer pairs a kind
    has, the less its best threshold is settled."""

    def _repr_html_(self) -> str:
        """Pictures and tables, for notebooks."""
        return fragment(*calibration_section(self))

    def rows(self) -> list[tuple[str, Estimate]]:
        """Every estimate there is with its name, for tables: `ece`, `recency/threshold`."""
        rows = named_estimates(self.pooled) + named_estimates(self)
        for kind, measures in self.by_kind.items():
            rows += named_estimates(measures, f"{kind}/")
        return rows


def named_estimates(report: BaseModel, prefix: str = "") -> list[tuple[str, Estimate]]:
    """The fields of a report that hold an estimate, with their names."""
    fields = ((name, getattr(report, name)) for name in type(report).model_fields)
    return [(prefix + name, value) for name, value in fields if isinstance(value, Estimate)]


# Measures


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


def brier_decomposition(
    probabilities: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS
) -> BrierDecomposition:
    """The Brier score in parts that add up to it.

    With `p` and `y` the probabilities and labels, `m` the bins of `expected_calibration_error`:
    reliability `sum n_m / n * (mean p in m - mean y in m)^2`, resolution `sum n_m / n * (mean y in
    m - mean y)^2` and uncertainty `mean y * (1 - mean y)` (Murphy, J. Appl. Meteorol. 12, 1973).
    They are the whole score only where all probabilities of a bin are equal; the rest is the
    within-bin variance less twice the covariance (Stephenson et al., Weather and Forecasting 23,
    2008).

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.
        bins: The number of bins.

    Raises:
        InputError: An argument is not usable.
    """
    pairs = SortedPairs(probabilities, labels)
    starts, sizes = pairs.bins(bins)
    means, shares = (np.add.reduceat(x, starts) / sizes for x in (pairs.scores, pairs.labels))
    share = pairs.labels.mean()
    spread = pairs.scores - np.repeat(means, sizes)
    surplus = pairs.labels - np.repeat(shares, sizes)
    weights = sizes / sizes.sum()
    return BrierDecomposition(
        reliability=float(weights @ (means - shares) ** 2),
        resolution=float(weights @ (shares - share) ** 2),
        uncertainty=float(share * (1 - share)),
        within_bin=float((spread * (spread - 2 * surplus)).mean()),
    )


def reliability_bins(
    probabilities: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS
) -> tuple[ReliabilityBin, ...]:
    """The points of a reliability diagram, over the bins of `expected_calibration_error`.

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.
        bins: The number of bins.

    Returns:
        The bins that hold something, from the lowest probabilities to the highest.

    Raises:
        InputError: An argument is not usable.
    """
    pairs = SortedPairs(probabilities, labels)
    starts, sizes = pairs.bins(bins)
    found = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        inside = slice(start, start + size)
        relevant = int(pairs.labels[inside].sum())
        share = stats.binomtest(relevant, size).proportion_ci(CONFIDENCE, method="wilson")
        found.append(
            ReliabilityBin(
                probability=float(pairs.scores[inside].mean()),
                relevant=Estimate(
                    value=relevant / size, low=float(share.low), high=float(share.high), n=size
                ),
            )
        )
    return tuple(found)


def best_threshold(probabilities: ArrayLike, labels: ArrayLike) -> BestThreshold | None:
    """The threshold that maximises F1, if documents that score at least as high are kept.

    Of several thresholds with the same F1 the highest is taken, which keeps the fewest documents.

    Args:
        probabilities: Scores in [0, 1], at least one.
        labels: Whether each of them is relevant.

    Returns:
        One of the scores, with its F1; `None` where nothing is relevant and F1 says nothing.

    Raises:
        InputError: An argument is not usable.
    """
    pairs = SortedPairs(probabilities, labels)
    if not pairs.labels.any():
        return None
    threshold = pairs.best_threshold(np.ones(pairs.scores.size, dtype=np.int64))
    kept = pairs.scores >= threshold
    hits = 2 * int(pairs.labels[kept].sum())
    return BestThreshold(threshold=threshold, f1=hits / (kept.sum() + pairs.labels.sum()))


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

    Raises:
        InputError: An argument is not usable.
    """
    pairs = SortedPairs(probabilities, labels)
    return pairs.calibration_error(np.ones(pairs.scores.size, dtype=np.int64), bins)


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

    Raises:
        InputError: An argument is not usable.
    """
    pairs = SortedPairs(probabilities, labels)
    members = codes(np.arange(pairs.scores.size) if clusters is None else clusters)[pairs.order]
    value = expected_calibration_error(probabilities, labels, bins=bins)
    return counted_interval(
        lambda times: pairs.calibration_error(times[members], bins),
        int(members.max()) + 1,
        value,
        n=n,
        seed=seed,
    )


# Reports


def measure_calibration(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationReport:
    """Measure whether a score means the same under every kind of instruction.

    Every lane of a scenario is scored under its own instruction, as in `evaluate`. A pair counts as
    relevant from grade 2 on.

    Args:
        reranker: What to measure.
        scenarios: At least one, for instance from `read_scenarios`.
        progress: Called after each scenario with the number done and the number in all.

    Returns:
        The report. It depends on the scores alone: the intervals are drawn with a fixed seed.

    Raises:
        InputError: If there are no scenarios.
        ScorerError: If the reranker does not return one score for each document.
    """
    pairs = score_pairs(reranker, scenarios, progress)
    overall = None
    if pairs.are_probabilities:
        best = best_threshold(pairs.scores, pairs.labels)
        overall = None if best is None else best.threshold
    return CalibrationReport(
        model=reranker.scorer.name,
        interval=describe_interval(),
        scenarios=len(scenarios),
        non_finite=count_pairs(scenarios) - pairs.scores.size,
        pooled=_measure(pairs, overall),
        by_kind={
            kind: _measure(pairs.of(pairs.kinds == kind), overall)
            for kind in LANE_KINDS
            if any(lane.kind == kind for scenario in scenarios for lane in scenario.lanes)
        },
        threshold_spread=_threshold_spread(pairs) if pairs.are_probabilities else None,
    )


@dataclass(frozen=True, slots=True)
class JudgedPairs:
    """Finite scores beside what they should say, one for each (lane, document) pair.

    Its measures are for scores that `are_probabilities`.
    """

    scores: FloatArray
    labels: BoolArray
    scenarios: IntArray
    """The number of the scenario, which is drawn whole."""
    kinds: NDArray[np.str_]

    @classmethod
    def join(cls, lanes: Iterable[tuple[int, LaneKind, FloatArray, IntArray]]) -> Self:
        """The pairs of lanes: the scenario's number, the kind, scores and grades of each.

        Pairs whose score is NaN are left out.
        """
        numbers, kinds, scores, grades = zip(*lanes, strict=True)
        sizes = [part.size for part in scores]
        joined = cls(
            scores=np.concatenate(scores),
            labels=np.concatenate(grades) >= RELEVANT_GRADE,
            scenarios=np.repeat(numbers, sizes),
            kinds=np.repeat(kinds, sizes),
        )
        return joined.of(~np.isnan(joined.scores))

    def of(self, chosen: BoolArray) -> Self:
        """Some of the pairs."""
        return type(self)(
            self.scores[chosen], self.labels[chosen], self.scenarios[chosen], self.kinds[chosen]
        )

    def with_scores(self, scores: FloatArray) -> Self:
        """The same pairs with other scores."""
        return replace(self, scores=scores)

    @property
    def are_probabilities(self) -> bool:
        """Whether there are scores and all of them lie in [0, 1]."""
        return bool(self.scores.size and self.scores.min() >= 0 and self.scores.max() <= 1)

    def calibration_error(self) -> Estimate:
        """The expected calibration error."""
        bounds = bootstrap_calibration_interval(self.scores, self.labels, self.scenarios)
        return self._estimate(expected_calibration_error(self.scores, self.labels), bounds)

    def brier(self) -> Estimate:
        """The Brier score."""
        return self._mean(brier_terms(self.scores, self.labels))

    def calibration_error_change(self, after: JudgedPairs) -> Estimate:
        """What the other scores of the same pairs add to the expected calibration error."""
        both = [SortedPairs(pairs.scores, pairs.labels) for pairs in (self, after)]
        members = codes(self.scenarios)

        def change(times: IntArray) -> float:
            before, then = (
                pairs.calibration_error(times[members[pairs.order]], ECE_BINS) for pairs in both
            )
            return then - before

        number = int(members.max()) + 1
        value = change(np.ones(number, dtype=np.int64))
        return self._estimate(value, counted_interval(change, number, value))

    def brier_change(self, after: JudgedPairs) -> Estimate:
        """What the other scores of the same pairs add to the Brier score."""
        before = brier_terms(self.scores, self.labels)
        return self._mean(brier_terms(after.scores, self.labels) - before)

    def best_threshold(self) -> Estimate | None:
        """The threshold with the highest F1; `None` where nothing is relevant."""
        best = best_threshold(self.scores, self.labels)
        if best is None:
            return None
        pairs, members = SortedPairs(self.scores, self.labels), codes(self.scenarios)
        ordered = members[pairs.order]
        bounds = counted_interval(
            lambda times: pairs.best_threshold(times[ordered]),
            int(members.max()) + 1,
            best.threshold,
        )
        return self._estimate(best.threshold, bounds)

    def f1(self, threshold: float) -> Estimate | None:
        """The F1 at a threshold; `None` where nothing is relevant."""
        if not self.labels.any():
            return None
        kept, members = self.scores >= threshold, codes(self.scenarios)
        hits = np.bincount(members, weights=2 * (kept & self.labels))
        sizes = np.bincount(members, weights=kept.astype(float) + self.labels)

        def ratio(drawn: IntArray, axis: int) -> FloatArray:
            # A resample with nothing kept and nothing relevant counts as 0.
            values: FloatArray = hits[drawn].sum(axis) / np.maximum(sizes[drawn].sum(axis), 1)
            return values

        value = float(hits.sum() / sizes.sum())
        return self._estimate(value, percentile_interval(ratio, len(hits), value, RESAMPLES, SEED))

    def _mean(self, terms: FloatArray) -> Estimate:
        return self._estimate(float(terms.mean()), bootstrap_interval(terms, self.scenarios))

    def _estimate(self, value: float, bounds: tuple[float, float]) -> Estimate:
        return Estimate(
            value=value,
            low=bounds[0],
            high=bounds[1],
            n=self.scores.size,
            clusters=np.unique(self.scenarios).size,
        )


def score_pairs(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    progress: Callable[[int, int], None] | None = None,
    kinds: Collection[LaneKind] = LANE_KINDS,
) -> JudgedPairs:
    """Score every lane of these kinds, of which there is one, under its own instruction.

    Raises:
        InputError: If there are no scenarios.
        ScorerError: If the reranker does not return one score for each document.
    """
    if not scenarios:
        raise InputError("`scenarios` is empty; give at least one, for example from read_scenarios")
    lanes: list[tuple[int, LaneKind, FloatArray, IntArray]] = []
    for number, scenario in enumerate(scenarios):
        chosen = [lane for lane in scenario.lanes if lane.kind in kinds]
        answers = {
            text: score_scenario(
                reranker,
                scenario,
                None if text is None else Instruction(text, today=scenario.today),
            )
            for text in dict.fromkeys(lane.instruction for lane in chosen)
        }
        for lane in chosen:
            grades = np.array([lane.grades[doc.id] for doc in scenario.documents], dtype=np.int64)
            lanes.append((number, lane.kind, answers[lane.instruction], grades))
        if progress:
            progress(number + 1, len(scenarios))
    return JudgedPairs.join(lanes)


def count_pairs(scenarios: Sequence[Scenario], kinds: Collection[LaneKind] = LANE_KINDS) -> int:
    """The number of graded (lane, document) pairs in lanes of these kinds."""
    lanes = ((scenario, lane) for scenario in scenarios for lane in scenario.lanes)
    return sum(len(scenario.documents) for scenario, lane in lanes if lane.kind in kinds)


def _measure(pairs: JudgedPairs, pooled_threshold: float | None) -> CalibrationMeasures:
    if not pairs.are_probabilities:
        return CalibrationMeasures(pairs=pairs.scores.size)
    threshold = pairs.best_threshold()
    return CalibrationMeasures(
        pairs=pairs.scores.size,
        ece=pairs.calibration_error(),
        brier=pairs.brier(),
        decomposition=brier_decomposition(pairs.scores, pairs.labels),
        bins=reliability_bins(pairs.scores, pairs.labels),
        threshold=threshold,
        f1=None if threshold is None else pairs.f1(threshold.value),
        f1_pooled=None if pooled_threshold is None else pairs.f1(pooled_threshold),
    )


def _threshold_spread(pairs: JudgedPairs) -> Estimate | None:
    scenarios = codes(pairs.scenarios)
    kinds: list[tuple[SortedPairs, IntArray]] = []
    for kind in LANE_KINDS:
        chosen = pairs.kinds == kind
        if pairs.labels[chosen].any():
            part = SortedPairs(pairs.scores[chosen], pairs.labels[chosen])
            kinds.append((part, scenarios[chosen][part.order]))
    if len(kinds) < 2:
        return None

    def spread(times: IntArray) -> float:
        # A resample may leave out all scenarios of a kind.
        drawn = ((part, times[members]) for part, members in kinds)
        best = [part.best_threshold(weights) for part, weights in drawn if weights.any()]
        return max(best) - min(best) if best else 0.0

    number = int(scenarios.max()) + 1
    value = spread(np.ones(number, dtype=np.int64))
    low, high = counted_interval(spread, number, value)
    return Estimate(value=value, low=low, high=high, n=len(kinds), clusters=number)
