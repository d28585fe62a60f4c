"""Measures of calibration against references, and calibrators against kinds they never saw."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, f1_score

from lanerank import Reranker
from lanerank.calibration import Calibrator
from lanerank.contracts import Scores
from lanerank.errors import InputError, ScorerError
from lanerank.evaluation import Scenario, evaluate
from lanerank.evaluation.calibration import (
    CalibrationReport,
    best_threshold,
    brier,
    brier_decomposition,
    expected_calibration_error,
    measure_calibration,
    reliability_bins,
    score_pairs,
)
from lanerank.evaluation.calibrators import CalibratorCheck, check_calibrator, fit_calibrator
from lanerank.testing import OverlapScorer

# Few digits make ties, which is where thresholds and bins go wrong.
PAIRS = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 5).map(lambda n: n / 5)), st.booleans()),
    min_size=1,
    max_size=60,
)


def split(pairs):
    return [list(part) for part in zip(*pairs, strict=True)]


def wilson(hits, size):
    """The interval by its formula (Wilson, 1927)."""
    z, share = 1.959963984540054, hits / size
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return centre - half, centre + half


# Decomposition


def test_decomposition_by_hand_without_a_rest() -> None:
    # Bins {0.2 four times, 1 relevant} and {0.6 twice, 1 relevant}; a third is relevant overall.
    parts = brier_decomposition([0.2, 0.2, 0.6, 0.2, 0.6, 0.2], [0, 0, 1, 1, 0, 0])
    assert parts.reliability == pytest.approx((4 * 0.05**2 + 2 * 0.1**2) / 6)
    assert parts.resolution == pytest.approx((4 * (1 / 12) ** 2 + 2 * (1 / 6) ** 2) / 6)
    assert parts.uncertainty == pytest.approx(2 / 9)
    assert parts.within_bin == pytest.approx(0, abs=1e-15)


def test_decomposition_by_hand_of_one_bin() -> None:
    # Mean 0.4 against share 0.5; variance 0.04, and covariance 0.2 * 0.5.
    parts = brier_decomposition([0.2, 0.6], [0, 1], bins=1)
    assert parts.reliability == pytest.approx(0.01)
    assert (parts.resolution, parts.uncertainty) == (0.0, 0.25)
    assert parts.within_bin == pytest.approx(0.04 - 2 * 0.1)


@given(PAIRS, st.integers(1, 15))
def test_the_parts_add_up_to_the_score(pairs, bins) -> None:
    probabilities, labels = split(pairs)
    parts = brier_decomposition(probabilities, labels, bins=bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    reference = brier_score_loss(labels, probabilities, labels=[False, True])
    assert total == pytest.approx(reference, abs=1e-12)
    assert brier(probabilities, labels) == pytest.approx(reference, abs=1e-12)
    assert 0 <= parts.reliability <= 1
    assert 0 <= parts.resolution <= parts.uncertainty + 1e-12 <= 0.25 + 1e-12


@given(PAIRS, st.randoms(use_true_random=False))
def test_input_order_changes_nothing(pairs, shuffler) -> None:
    shuffled = list(pairs)
    shuffler.shuffle(shuffled)
    one, two = split(pairs), split(shuffled)
    # Equal scores have no order of their own, so that sums may differ in their last bits.
    parts = [brier_decomposition(*each).model_dump() for each in (one, two)]
    assert parts[0] == pytest.approx(parts[1], abs=1e-12)
    assert best_threshold(*one) == best_threshold(*two)
    ours, theirs = reliability_bins(*one), reliability_bins(*two)
    assert [each.relevant for each in ours] == [each.relevant for each in theirs]


# Reliability diagram


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_bins_agree_with_the_curve_of_scikit_learn(digits) -> None:
    rng = np.random.default_rng(5)
    probabilities = rng.beta(0.4, 0.7, 500).round(digits)
    labels = rng.random(500) < probabilities**1.5
    observed, predicted = calibration_curve(labels, probabilities, n_bins=10, strategy="quantile")
    bins = reliability_bins(probabilities, labels)
    assert [each.probability for each in bins] == pytest.approx(predicted)
    assert [each.relevant.value for each in bins] == pytest.approx(observed)


@given(PAIRS, st.integers(1, 15))
def test_bins_hold_every_pair_once_and_make_up_the_calibration_error(pairs, bins) -> None:
    probabilities, labels = split(pairs)
    found = reliability_bins(probabilities, labels, bins=bins)
    assert 1 <= len(found) <= bins
    assert sum(each.relevant.n for each in found) == len(pairs)
    assert sum(each.relevant.n * each.relevant.value for each in found) == pytest.approx(
        sum(labels)
    )
    means = [each.probability for each in found]
    assert means == sorted(means)
    gaps = sum(each.relevant.n * abs(each.relevant.value - each.probability) for each in found)
    error = expected_calibration_error(probabilities, labels, bins=bins)
    assert gaps / len(pairs) == pytest.approx(error, abs=1e-12)


def test_equal_scores_share_a_bin() -> None:
    bins = reliability_bins([0.1, 0.5, 0.5, 0.5, 0.5, 0.9], [0, 1, 0, 0, 0, 1], bins=3)
    assert [(each.probability, each.relevant.n) for each in bins] == [
        (pytest.approx((0.1 + 4 * 0.5) / 5), 5),
        (0.9, 1),
    ]


@pytest.mark.parametrize(("hits", "size"), [(0, 10), (8, 10), (10, 10), (1, 3), (250, 1000)])
def test_the_interval_of_a_bin_is_wilsons(hits, size) -> None:
    labels = [1] * hits + [0] * (size - hits)
    [only] = reliability_bins([0.5] * size, labels)
    assert (only.relevant.value, only.relevant.n) == (hits / size, size)
    assert (only.relevant.low, only.relevant.high) == pytest.approx(wilson(hits, size), abs=1e-9)


# Thresholds


def f1_at(threshold, scores, labels):
    return f1_score(labels, np.array(scores) >= threshold, zero_division=0)


@given(PAIRS)
def test_no_threshold_has_a_better_f1_and_no_higher_one_as_good(pairs) -> None:
    scores, labels = split(pairs)
    best = best_threshold(scores, labels)
    if not any(labels):
        assert best is None
        return
    values = {score: f1_at(score, scores, labels) for score in scores}
    assert best.threshold in values
    assert best.f1 == pytest.approx(values[best.threshold], abs=1e-12)
    assert best.f1 == pytest.approx(max(values.values()), abs=1e-12)
    assert best.threshold == max(
        score for score, value in values.items() if value > best.f1 - 1e-12
    )


def test_of_equally_good_thresholds_the_highest_is_taken() -> None:
    # One of one kept, two of four kept: 2 / (1 + 2) either way.
    assert best_threshold([0.9, 0.5, 0.4, 0.3], [1, 0, 0, 1]).threshold == 0.9


def test_where_nothing_is_relevant_there_is_no_best_threshold() -> None:
    assert best_threshold([0.1, 0.9], [0, 0]) is None


# Theory


def test_a_constant_score_of_the_right_height_is_calibrated_and_says_nothing() -> None:
    labels = [1] * 3 + [0] * 7
    parts = brier_decomposition([0.3] * 10, labels)
    assert parts.reliability == pytest.approx(0, abs=1e-30)
    assert parts.resolution == 0
    assert parts.uncertainty == pytest.approx(0.21)
    assert brier([0.3] * 10, labels) == pytest.approx(0.21)
    assert best_threshold([0.3] * 10, labels).model_dump() == {
        "threshold": 0.3,
        "f1": pytest.approx(2 * 0.3 / 1.3),
    }


def test_an_oracle_resolves_all_uncertainty() -> None:
    labels = [1] * 3 + [0] * 7
    parts = brier_decomposition(labels, labels)
    assert parts.resolution == pytest.approx(parts.uncertainty)
    assert parts.reliability == parts.within_bin == expected_calibration_error(labels, labels) == 0
    assert best_threshold(labels, labels).model_dump() == {"threshold": 1.0, "f1": 1.0}


def test_random_scores_have_the_values_of_theory() -> None:
    rng, share = np.random.default_rng(1), 0.3
    scores, labels = rng.random(100_000), rng.random(100_000) < share
    parts = brier_decomposition(scores, labels)
    # E (p - y)^2 = 1/3 whatever the share is; with ten bins of width 0.1 a variance of 1/1200 is
    # inside them. E |p - share| is the calibration error.
    assert brier(scores, labels) == pytest.approx(1 / 3, abs=0.005)
    assert parts.reliability == pytest.approx(1 / 12 - 1 / 1200 + 0.2**2, abs=0.005)
    assert parts.resolution == pytest.approx(0, abs=1e-3)
    assert parts.uncertainty == pytest.approx(0.21, abs=0.005)
    assert parts.within_bin == pytest.approx(1 / 1200, abs=1e-3)
    error = expected_calibration_error(scores, labels)
    assert error == pytest.approx((share**2 + (1 - share) ** 2) / 2, abs=0.01)
    best = best_threshold(scores, labels)
    assert best.threshold < 0.05
    assert best.f1 == pytest.approx(2 * share / (1 + share), abs=0.01)


@pytest.mark.parametrize(
    "measure",
    [brier_decomposition, reliability_bins, best_threshold, expected_calibration_error],
)
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([], [], "two lists of the same length, at least 1"),
        ([0.5], [1, 0], r"got the shapes \(1,\) and \(2,\)"),
        ([[0.5]], [[1]], r"got the shapes \(1, 1\)"),
        ([0.5, 1.5], [0, 1], r"must lie in \[0, 1\], got values from 0\.5 to 1\.5"),
        ([0.5, math.nan], [0, 1], r"must lie in \[0, 1\], got values from nan"),
        ([0.5, 0.6], [0, 3], "`labels` must be 0 or 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, probabilities, labels, message) -> None:
    with pytest.raises(InputError, match=message):
        measure(probabilities, labels)


@pytest.mark.parametrize("measure", [brier_decomposition, reliability_bins])
def test_no_bins_are_refused(measure) -> None:
    with pytest.raises(InputError, match="`bins` must be at least 1, got 0"):
        measure([0.5], [1], bins=0)


# Reports


class StubScorer:
    """The one thing that a report asks a scorer for."""

    name = "scripted"


class ScriptedReranker:
    """Scores by a function of (query, instruction text or None, document text), keeping calls."""

    def __init__(self, function):
        self.scorer = StubScorer()
        self.function = function
        self.calls = []

    def score(self, query, documents, *, instruction=None, attributes=()):
        self.calls.append((query, instruction))
        text = instruction.text if instruction is not None else None
        return [self.function(query, text, document.text) for document in documents]


def constant(value):
    return ScriptedReranker(lambda *_: value)


def grade_of(scenarios):
    return {
        (scenario.query, lane.instruction, document.text): lane.grades[document.id]
        for scenario in scenarios
        for lane in scenario.lanes
        for document in scenario.documents
    }


def uniform(*key):
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def pseudo_random():
    return ScriptedReranker(lambda *key: uniform("score", *key))


def make(number=0, **lanes):
    """A scenario of as many documents as each lane `kind=grades` has grades."""
    size = len(next(iter(lanes.values())))
    return Scenario.model_validate(
        {
            "id": f"s{number}",
            "domain": "tests",
            "query": f"query {number}",
            "documents": [{"id": f"d{i}", "text": f"text {i}"} for i in range(size)],
            "lanes": [
                {
                    "kind": kind,
                    "instruction": None if kind == "none" else f"instruction for {kind}",
                    "grades": {f"d{i}": grade for i, grade in enumerate(grades)},
                }
                for kind, grades in lanes.items()
            ],
        }
    )


MIXED = [
    make(i, none=[3, 2, 1, 0], glossary=[0, 0, 2, 1], recency=[i % 4, 0, 3, 1]) for i in range(12)
]


def test_a_constant_scorer() -> None:
    report = measure_calibration(constant(0.5), MIXED)
    share = (24 + 12 + 12 + 6) / 144
    pooled = report.pooled
    assert pooled.pairs == pooled.ece.n == 144
    assert pooled.ece.value == pytest.approx(0.5 - share)
    assert pooled.brier.value == pytest.approx(0.25)
    assert pooled.decomposition.reliability == pytest.approx((0.5 - share) ** 2)
    assert pooled.decomposition.resolution == 0
    assert [each.probability for each in pooled.bins] == [0.5]
    assert pooled.threshold.value == pooled.threshold.low == pooled.threshold.high == 0.5
    assert pooled.f1.value == pytest.approx(2 * share / (1 + share))
    assert (report.threshold_spread.value, report.threshold_spread.n) == (0.0, 3)
    assert report.by_kind["none"].ece.value == 0
    assert report.by_kind["glossary"].ece.value == pytest.approx(0.25)


def test_an_oracle() -> None:
    grades = grade_of(MIXED)
    report = measure_calibration(ScriptedReranker(lambda *key: float(grades[key] >= 2)), MIXED)
    for measures in (report.pooled, *report.by_kind.values()):
        assert measures.ece.value == measures.brier.value == 0
        assert measures.decomposition.resolution == pytest.approx(
            measures.decomposition.uncertainty
        )
        assert measures.threshold.value == measures.f1.value == measures.f1_pooled.value == 1
    assert report.threshold_spread.value == 0


def test_a_random_scorer() -> None:
    scenarios = [make(i, none=[3, 0, 1, 0]) for i in range(500)]
    pooled = measure_calibration(pseudo_random(), scenarios).pooled
    assert pooled.brier.value == pytest.approx(1 / 3, abs=0.03)
    assert pooled.ece.value == pytest.approx((0.25**2 + 0.75**2) / 2, abs=0.03)
    assert pooled.decomposition.resolution == pytest.approx(0, abs=0.005)
    assert pooled.f1.value == pytest.approx(2 * 0.25 / 1.25, abs=0.03)


def test_pairs_are_what_evaluate_sees() -> None:
    report, evaluation = (
        function(pseudo_random(), MIXED) for function in (measure_calibration, evaluate)
    )
    assert (report.pooled.ece, report.pooled.brier) == (evaluation.ece, evaluation.brier)
    assert list(report.by_kind) == list(evaluation.by_kind) == ["none", "glossary", "recency"]
    for kind, measures in report.by_kind.items():
        assert measures.ece == evaluation.by_kind[kind].ece
        assert measures.brier == evaluation.by_kind[kind].brier


def test_thresholds_by_kind_and_what_one_for_all_costs() -> None:
    # The same order under both kinds; under `glossary` all scores are half as high.
    scores = {"text 0": 0.8, "text 1": 0.6, "text 2": 0.2}
    lower = ScriptedReranker(lambda q, text, doc: scores[doc] / (2 if text else 1))
    scenarios = [make(i, none=[3, 2, 0], glossary=[3, 2, 0]) for i in range(5)]
    report = measure_calibration(lower, scenarios)
    none, glossary = report.by_kind["none"], report.by_kind["glossary"]
    assert (none.threshold.value, glossary.threshold.value) == (0.6, 0.3)
    assert none.f1.value == glossary.f1.value == report.pooled.f1.value == 1
    assert report.pooled.threshold.value == 0.3
    assert report.threshold_spread.value == pytest.approx(0.3)
    # Twice as high under `glossary` instead, and one threshold cannot serve both.
    higher = ScriptedReranker(lambda q, text, doc: scores[doc] / (4 if text else 1))
    report = measure_calibration(higher, scenarios)
    assert report.pooled.threshold.value == 0.15
    assert report.by_kind["none"].f1_pooled.value == pytest.approx(4 / 5)
    assert report.by_kind["none"].f1.value == report.by_kind["glossary"].f1_pooled.value == 1
    assert report.by_kind["none"].f1_pooled.low == pytest.approx(4 / 5)


def test_a_threshold_interval_spans_what_the_scenarios_say() -> None:
    # Half of the scenarios want the cut at 0.7, half at 0.4.
    scores = {"text 0": 0.7, "text 1": 0.4, "text 2": 0.1}
    scenarios = [make(i, none=[3, 3 if i % 2 else 0, 0]) for i in range(10)]
    reranker = ScriptedReranker(lambda q, text, doc: scores[doc])
    report = measure_calibration(reranker, scenarios)
    threshold = report.pooled.threshold
    assert (threshold.low, threshold.high) == (0.4, 0.7)
    assert report.threshold_spread is None


def test_kinds_that_a_resample_lacks_do_not_spoil_the_spread() -> None:
    scenarios = [make(0, none=[3, 0, 0]), make(1, glossary=[0, 0, 3]), make(2, recency=[0, 0, 0])]
    report = measure_calibration(pseudo_random(), scenarios)
    spread = report.threshold_spread
    assert spread.n == 2
    assert 0 <= spread.low <= spread.value <= spread.high
    assert report.by_kind["recency"].threshold is report.by_kind["recency"].f1 is None
    assert report.by_kind["recency"].f1_pooled is None
    assert report.by_kind["recency"].ece is not None


def test_scenarios_in_which_nothing_is_relevant_have_no_threshold() -> None:
    report = measure_calibration(pseudo_random(), [make(0, none=[0, 1]), make(1, glossary=[1, 0])])
    assert report.pooled.threshold is report.pooled.f1 is report.threshold_spread is None
    assert report.pooled.brier.n == 4


def test_scores_outside_the_unit_interval_are_not_measured() -> None:
    reranker = ScriptedReranker(lambda q, text, doc: 0.5 if text is None else 1.5)
    report = measure_calibration(reranker, MIXED)
    assert report.pooled.pairs == 144
    assert report.pooled.ece is report.pooled.brier is report.pooled.threshold is None
    assert report.pooled.decomposition is report.threshold_spread is None
    assert report.pooled.bins == ()
    assert report.by_kind["glossary"].ece is None
    assert report.by_kind["none"].ece.value == 0
    assert report.by_kind["none"].f1_pooled is None


def test_scores_that_are_not_finite_are_left_out_and_counted() -> None:
    broken = {"text 0": math.nan, "text 1": math.inf}
    report = measure_calibration(ScriptedReranker(lambda q, t, doc: broken.get(doc, 0.5)), MIXED)
    assert report.non_finite == 72
    assert report.pooled.pairs == report.pooled.brier.n == 72
    report = measure_calibration(constant(math.nan), MIXED)
    assert (report.non_finite, report.pooled.pairs) == (144, 0)
    assert report.pooled.ece is None
    assert list(report.by_kind) == ["none", "glossary", "recency"]


def test_intervals_hold_their_values_and_one_scenario_has_none() -> None:
    report = measure_calibration(pseudo_random(), MIXED)
    assert all(each.low <= each.value <= each.high for _, each in report.rows())
    assert report.pooled.ece.low < report.pooled.ece.high
    assert report == measure_calibration(pseudo_random(), MIXED)
    report = measure_calibration(pseudo_random(), MIXED[:1])
    assert all(each.low == each.value == each.high for _, each in report.rows())


def test_a_report_survives_json_and_names_its_estimates() -> None:
    report = measure_calibration(pseudo_random(), MIXED)
    assert CalibrationReport.model_validate_json(report.model_dump_json()) == report
    rows = dict(report.rows())
    assert len(rows) == len(report.rows()) == 5 + 1 + 3 * 5
    assert rows["ece"] == report.pooled.ece
    assert rows["recency/threshold"] == report.by_kind["recency"].threshold
    assert rows["threshold_spread"] == report.threshold_spread
    assert report.interval == "95% percentile bootstrap over scenarios, 2000 resamples, seed 0"


def test_each_instruction_is_scored_once_with_the_day_of_the_scenario() -> None:
    grades = {"d0": 3, "d1": 0}
    lanes = [
        {"kind": "none", "instruction": None, "grades": grades},
        {"kind": "glossary", "instruction": "same", "grades": grades},
        {"kind": "recency", "instruction": "same", "grades": grades},
    ]
    scenario = MIXED[0].model_dump() | {"lanes": lanes, "today": date(2025, 6, 30)}
    scenario["documents"] = scenario["documents"][:2]
    reranker, seen = constant(0.5), []
    scenarios = [Scenario.model_validate(scenario), MIXED[1]]
    measure_calibration(reranker, scenarios, progress=lambda *step: seen.append(step))
    first = [call for query, call in reranker.calls if query == "query 0"]
    assert first[0] is None
    assert [(call.text, call.today) for call in first[1:]] == [("same", date(2025, 6, 30))]
    assert seen == [(1, 2), (2, 2)]


def test_a_report_needs_scenarios_and_a_score_for_each_document() -> None:
    with pytest.raises(InputError, match="`scenarios` is empty"):
        measure_calibration(constant(0.5), [])
    short = constant(0.5)
    short.score = lambda *args, **options: [0.5]
    with pytest.raises(ScorerError, match="returned 1 scores for 4 documents"):
        measure_calibration(short, MIXED)


# Calibrators


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def world(shifts, *, scenarios=120, documents=4):
    """Scenarios, and a reranker that is off by `logit -> slope * logit + shift` in each kind.

    The true probability of every pair is known, and the grade is drawn with it.
    """
    numbers = {}
    made = []
    for number in range(scenarios):
        lanes = {}
        for kind in shifts:
            text = None if kind == "none" else f"instruction for {kind}"
            grades = []
            for i in range(documents):
                key = (f"query {number}", text, f"text {i}")
                logit = 6 * uniform("logit", *key) - 3
                grades.append(3 if uniform("label", *key) < sigmoid(logit) else 0)
                slope, shift = shifts[kind]
                numbers[key] = sigmoid(slope * logit + shift)
            lanes[kind] = grades
        made.append(make(number, **lanes))
    return made, ScriptedReranker(lambda *key: numbers[key])


SAME = dict.fromkeys(("none", "glossary", "recency"), (2.0, 1.5))


@pytest.fixture(scope="module")
def same_check():
    """A check where all kinds have the same error."""
    return check_calibrator(ScriptedReranker(world(SAME)[1].function), world(SAME)[0])


def test_a_fit_on_scenarios_is_a_fit_on_their_pairs() -> None:
    scenarios, reranker = world(SAME, scenarios=40)
    pairs = score_pairs(reranker, scenarios)
    calibrator = fit_calibrator(reranker, scenarios, method="platt")
    reference = Calibrator.fit(pairs.scores, pairs.labels, "platt")
    assert calibrator.model_copy(update={"note": ""}) == reference
    assert calibrator.note == "scripted on 40 scenarios; kinds: none, glossary, recency"


def test_a_fit_can_be_kept_to_some_kinds_and_scores_no_others() -> None:
    scenarios, reranker = world(SAME, scenarios=40)
    reranker.calls.clear()
    calibrator = fit_calibrator(reranker, scenarios, kinds=["recency"], method="isotonic")
    assert calibrator.pairs == 160
    assert calibrator.note.endswith("kinds: recency")
    assert {call.text for _, call in reranker.calls} == {"instruction for recency"}


def test_an_error_that_all_kinds_share_is_mended_in_a_kind_not_fitted_on(same_check) -> None:
    assert (same_check.method, same_check.folds, same_check.scenarios) == ("platt", 5, 120)
    assert list(same_check.by_kind) == ["none", "glossary", "recency"]
    for measures in (same_check.pooled, *same_check.by_kind.values()):
        assert measures.ece_before.value > 0.1
        assert measures.ece_after.value < 0.08
        assert measures.ece_change.high < 0
        assert measures.brier_change.high < 0
    assert same_check.pooled.pairs == same_check.calibrator.pairs == 1440
    # The inverse of the error: `z -> (z - 1.5) / 2`.
    assert same_check.calibrator.slope == pytest.approx(0.5, abs=0.07)
    assert same_check.calibrator.intercept == pytest.approx(-0.75, abs=0.15)


def test_an_error_of_its_own_is_not_mended_and_the_pooled_figure_hides_it() -> None:
    scenarios, reranker = world({"none": (1, 2), "glossary": (1, -2)}, scenarios=60)
    check = check_calibrator(reranker, scenarios, method="isotonic")
    assert check.method == "isotonic"
    for measures in check.by_kind.values():
        assert measures.ece_change.low > 0.1
    pooled = measure_calibration(calibrated(reranker, check.calibrator), scenarios).pooled
    assert pooled.ece.value < 0.01
    assert measure_calibration(reranker, scenarios).threshold_spread.low > 0.1


def calibrated(reranker, calibrator):
    return ScriptedReranker(lambda *key: float(calibrator.apply(reranker.function(*key))))


def test_held_out_scores_come_from_other_kinds_of_other_scenarios() -> None:
    shifts = {"none": (1, 1), "glossary": (2, -1), "recency": (1, 0)}
    scenarios, reranker = world(shifts, scenarios=40)
    check = check_calibrator(reranker, scenarios, held_out=["glossary"])
    pairs = score_pairs(reranker, scenarios)
    errors = []
    for fold in range(5):
        here = pairs.scenarios % 5 == fold
        fitted, tested = ~here & (pairs.kinds != "glossary"), here & (pairs.kinds == "glossary")
        calibrator = Calibrator.fit(pairs.scores[fitted], pairs.labels[fitted])
        errors.append((calibrator.apply(pairs.scores[tested]) - pairs.labels[tested]) ** 2)
    assert list(check.by_kind) == ["glossary"]
    assert check.pooled == check.by_kind["glossary"]
    assert check.pooled.brier_after.value == pytest.approx(np.concatenate(errors).mean())
    before = brier(*(x[pairs.kinds == "glossary"] for x in (pairs.scores, pairs.labels)))
    assert check.pooled.brier_before.value == pytest.approx(before)
    change = check.pooled.brier_after.value - check.pooled.brier_before.value
    assert check.pooled.brier_change.value == pytest.approx(change)
    change = check.pooled.ece_after.value - check.pooled.ece_before.value
    assert check.pooled.ece_change.value == pytest.approx(change)
    assert check.calibrator.pairs == 480


def test_kinds_to_fit_on_and_to_check_can_be_chosen_apart() -> None:
    shifts = {"none": (1, 3), "glossary": (1, 0), "recency": (1, 0)}
    scenarios, reranker = world(shifts, scenarios=40)
    check = check_calibrator(reranker, scenarios, kinds=["glossary", "recency"])
    assert list(check.by_kind) == ["glossary", "recency"]
    assert check.calibrator.intercept == pytest.approx(0, abs=0.3)
    check = check_calibrator(reranker, scenarios, kinds=["recency"], held_out=["none"])
    assert list(check.by_kind) == ["none"]
    assert check.calibrator.note.endswith("kinds: recency")


def test_a_check_survives_json_and_names_its_estimates(same_check) -> None:
    assert CalibratorCheck.model_validate_json(same_check.model_dump_json()) == same_check
    rows = dict(same_check.rows())
    assert len(rows) == len(same_check.rows()) == 4 * 6
    assert rows["recency/ece_after"] == same_check.by_kind["recency"].ece_after
    assert all(each.low <= each.value <= each.high for each in rows.values())


def test_scores_that_are_not_finite_are_left_out_of_a_check() -> None:
    scenarios, reranker = world(SAME, scenarios=20)
    known = reranker.function
    reranker.function = lambda q, text, doc: math.nan if doc == "text 0" else known(q, text, doc)
    check = check_calibrator(reranker, scenarios)
    assert (check.non_finite, check.pooled.pairs) == (60, 180)
    reranker.function = lambda q, text, doc: math.nan if text is None else known(q, text, doc)
    with pytest.raises(InputError, match="no finite score in any lane of kind none; leave it out"):
        check_calibrator(reranker, scenarios)
    assert check_calibrator(reranker, scenarios, held_out=["recency"]).non_finite == 80


def refused(function, message, reranker, scenarios, **options) -> None:
    reranker.calls.clear()
    with pytest.raises(InputError, match=message):
        function(reranker, scenarios, **options)
    assert reranker.calls == []


@pytest.mark.parametrize("function", [fit_calibrator, check_calibrator])
def test_what_cannot_be_fitted_is_refused_before_anything_is_scored(function) -> None:
    scenarios, reranker = world(SAME, scenarios=3)
    refused(function, "`method` must be one of", reranker, scenarios, method="beta")
    refused(function, "`scenarios` ", reranker, [])
    refused(function, "`kinds` must be .*none, glossary, rec", reranker, scenarios, kinds=[])
    refused(function, r"got \['combined'\]", reranker, scenarios, kinds=["combined"])
    refused(function, "got 'none'", reranker, scenarios, kinds="none")


def test_a_check_needs_something_to_fit_on_and_something_to_hold_out() -> None:
    scenarios, reranker = world(SAME, scenarios=3)
    refused(check_calibrator, "`scenarios` must be at least two", reranker, scenarios[:1])
    refused(check_calibrator, "nothing is left to fit on", reranker, scenarios, kinds=["none"])
    refused(check_calibrator, "`held_out` must be", reranker, scenarios, held_out=[])
    refused(check_calibrator, r"`held_out` .*\['x'\]", reranker, scenarios, held_out=["x"])


def test_pairs_that_settle_no_calibrator_say_which() -> None:
    scenarios, reranker = world(SAME, scenarios=10)
    reranker.function = lambda *_: 0.5
    with pytest.raises(
        InputError, match=r"`scenarios`: .* on 10 of them, kinds none, glossary, re"
    ):
        fit_calibrator(reranker, scenarios)
    reranker.function = lambda *_: 7.0
    with pytest.raises(InputError, match=r"`scenarios`: .*`scores` must be numbers in \[0, 1\]"):
        check_calibrator(reranker, scenarios)


def test_a_calibrated_reranker_is_not_calibrated_again() -> None:
    calibrator = Calibrator(method="temperature", temperature=2.0, pairs=9)
    reranker = Reranker(calibrator.wrap(OverlapScorer()))
    for function in (fit_calibrator, check_calibrator):
        with pytest.raises(InputError, match=r"calibrated already: .*`calibrated=False`"):
            function(reranker, MIXED)
    report = measure_calibration(reranker, MIXED)
    assert report.model == "overlap (calibrated: temperature)"


class TableScorer:
    """The scripted scores behind the interface of a scorer."""

    name = "table"
    supports_instructions = True

    def __init__(self, function):
        self.function = function

    def score(self, request):
        text = request.instruction.removesuffix(".") or None
        return Scores(
            tuple(self.function(request.query, text, each.text) for each in request.candidates)
        )


def test_a_calibrator_fitted_saved_and_loaded_mends_the_model(tmp_path) -> None:
    scenarios, scripted = world(SAME, scenarios=60)
    raw = TableScorer(scripted.function)
    fit_calibrator(Reranker(raw), scenarios).save(tmp_path)
    after = measure_calibration(Reranker(Calibrator.load(tmp_path).wrap(raw)), scenarios)
    before = measure_calibration(Reranker(raw), scenarios)
    assert after.pooled.ece.value < 0.05 < 0.1 < before.pooled.ece.value
    assert (before.model, after.model) == ("table", "table (calibrated: platt)")
    # No threshold keeps other documents than before: the order is the same.
    assert after.pooled.f1 == before.pooled.f1


def test_a_missing_extra_is_reported_before_anything_is_scored() -> None:
    code = (
        "import sys\n"
        "sys.modules['sklearn'] = None\n"
        "from types import SimpleNamespace\n"
        "from lanerank.errors import MissingExtraError\n"
        "from lanerank.evaluation.calibrators import fit_calibrator\n"
        "try: fit_calibrator(SimpleNamespace(scorer=None), [])\n"
        "except MissingExtraError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'scikit-learn, not installed here. Install the extra: pip install "lane' in run.stdout
    assert run.stdout.endswith("False\n")
