import itertools
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from lanerank.evaluation import (
    bootstrap_calibration_interval,
    bootstrap_interval,
    brier,
    expected_calibration_error,
    flip_outcomes,
    ndcg,
)
from lanerank.evaluation.measures import estimate_mean

PROBABILITY = st.floats(0, 1, allow_subnormal=False)
JUDGED = st.lists(st.tuples(PROBABILITY, st.booleans()), min_size=1, max_size=60)


def dcg(grades):
    return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))


class TestNdcg:
    def test_by_hand(self):
        # Ranked: grade 0, 3, 1. DCG = 0 + 7 / log2(3) + 1 / 2, ideal = 7 + 1 / log2(3).
        [value] = ndcg([[0, 3, 1]], [[0.9, 0.5, 0.1]])
        assert value == pytest.approx((7 / 1.5849625007 + 0.5) / (7 + 1 / 1.5849625007))
        assert value == pytest.approx(0.64428693)

    def test_gain_is_exponential_and_not_linear(self):
        [value] = ndcg([[2, 3]], [[1.0, 0.0]])
        assert value == pytest.approx(dcg([2, 3]) / dcg([3, 2]))
        assert value != pytest.approx((2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3)))

    def test_only_ten_ranks_count(self):
        grades = [0] * 10 + [3]
        assert ndcg([grades], [[-float(i) for i in range(11)]]) == [0.0]
        assert ndcg([grades], [[float(i) for i in range(11)]]) == [1.0]
        assert ndcg([grades], [[-float(i) for i in range(11)]], cutoff=11) > 0

    def test_ideal_is_cut_as_well(self):
        assert ndcg([[3] * 12], [[0.5] * 12]) == [1.0]

    @pytest.mark.parametrize("grades", [[3, 0, 2, 1], [0, 1, 2, 3], [0] * 9 + [2, 3, 1]])
    def test_ties_keep_input_order(self, grades):
        # trec_eval itself would order ties by document id, descending.
        [value] = ndcg([grades], [[0.5] * len(grades)])
        assert value == pytest.approx(dcg(grades[:10]) / dcg(sorted(grades, reverse=True)[:10]))

    def test_differences_below_single_precision_are_no_ties(self):
        assert ndcg([[0, 3]], [[0.5, 0.5 + 1e-12]]) == [1.0]

    def test_scores_that_are_not_finite_come_last(self):
        order = [[math.nan, math.inf, 0.1]]
        assert ndcg([[0, 0, 3]], order) == [1.0]
        assert ndcg([[0, 3, 0]], order) == pytest.approx(1 / math.log2(4))

    def test_without_a_relevant_document_there_is_no_value(self):
        values = ndcg([[0, 0], [1, 0]], [[0.1, 0.2], [0.2, 0.1]])
        assert math.isnan(values[0])
        assert values[1] == 1.0

    def test_nothing_in_nothing_out(self):
        assert ndcg([], []).shape == (0,)

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="argument 2 is longer"):
            ndcg([[1, 2]], [[0.1]])

    def test_queries_keep_their_order(self):
        grades = [[0, 3] if i % 3 else [3, 0] for i in range(25)]
        values = ndcg(grades, [[0.2, 0.1]] * 25)
        assert [value == 1.0 for value in values] == [i % 3 == 0 for i in range(25)]

    def test_mean_over_all_orders_is_the_expectation_for_random_scores(self):
        grades = [3, 1, 0, 0, 2]
        orders = list(itertools.permutations(range(5)))
        values = ndcg([grades] * len(orders), [list(map(float, order)) for order in orders])
        gain = sum(2**grade - 1 for grade in grades) / 5
        discounts = sum(1 / math.log2(rank + 1) for rank in range(1, 6))
        assert values.mean() == pytest.approx(gain * discounts / dcg(sorted(grades)[::-1]))


class TestFlipOutcomes:
    def test_by_hand(self):
        outcomes = flip_outcomes(
            [3, 0, 2, 1, 1], [0, 3, 2, 0, 2], [0.9, 0.2, 0.5, 0.4, 0.6], [0.1, 0.1, 0.9, 0.4, 0.7]
        )
        # d1 falls as its grade does; d2 should rise and falls; d3 keeps its grade and does not
        # count; d4 should fall and is a tie; d5 rises as its grade does.
        assert outcomes.tolist() == [True, False, False, True]

    def test_swapping_the_instructions_changes_nothing(self):
        rng = np.random.default_rng(3)
        a, b = rng.integers(0, 4, (2, 50))
        x, y = rng.random((2, 50))
        assert flip_outcomes(a, b, x, y).tolist() == flip_outcomes(b, a, y, x).tolist()

    def test_nan_is_wrong(self):
        nan = math.nan
        assert not flip_outcomes([3, 0, 3], [0, 3, 0], [nan, nan, 1.0], [0.1, nan, nan]).any()

    def test_equal_grades_give_no_outcome(self):
        assert flip_outcomes([1, 2], [1, 2], [0.1, 0.2], [0.3, 0.4]).size == 0


class TestCalibration:
    def test_brier_by_hand(self):
        assert brier([1.0, 0.5, 0.2], [1, 0, 0]) == pytest.approx((0 + 0.25 + 0.04) / 3)

    @given(JUDGED)
    def test_brier_agrees_with_scikit_learn(self, judged):
        probabilities, labels = zip(*judged, strict=True)
        expected = brier_score_loss(labels, probabilities, labels=[False, True])
        assert brier(probabilities, labels) == pytest.approx(expected, abs=1e-12)

    def test_error_by_hand_with_two_bins(self):
        # Bins {0.1, 0.2} and {0.6, 0.9}: |0.5 - 0.15| and |0.5 - 0.75|, half of the weight each.
        value = expected_calibration_error([0.9, 0.1, 0.6, 0.2], [1, 0, 0, 1], bins=2)
        assert value == pytest.approx((0.35 + 0.25) / 2)

    @pytest.mark.parametrize("digits", [1, 2, 8])
    def test_error_agrees_with_the_curve_of_scikit_learn(self, digits):
        rng = np.random.default_rng(5)
        probabilities = rng.beta(0.4, 0.7, 500).round(digits)
        labels = rng.random(500) < probabilities**1.5
        observed, predicted = calibration_curve(
            labels, probabilities, n_bins=10, strategy="quantile"
        )
        edges = np.quantile(probabilities, np.linspace(0, 1, 11))[1:-1]
        sizes = np.bincount(np.searchsorted(edges, probabilities), minlength=10)
        expected = (sizes[sizes > 0] * np.abs(observed - predicted)).sum() / 500
        assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)

    def test_constant_score_is_one_bin(self):
        assert expected_calibration_error([0.3] * 8, [1, 0] * 4) == pytest.approx(0.2)

    def test_perfect_certainty_has_no_error(self):
        assert expected_calibration_error([0.0, 1.0, 1.0], [0, 1, 1]) == 0.0

    @given(JUDGED, st.randoms(use_true_random=False))
    def test_error_does_not_depend_on_input_order(self, judged, shuffler):
        shuffled = list(judged)
        shuffler.shuffle(shuffled)
        values = [
            expected_calibration_error(*zip(*pairs, strict=True)) for pairs in (judged, shuffled)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-12)
        assert 0 <= values[0] <= 1

    def test_calibrated_scores_have_a_small_error(self):
        rng = np.random.default_rng(7)
        probabilities = rng.random(20_000)
        labels = rng.random(20_000) < probabilities
        assert expected_calibration_error(probabilities, labels) < 0.02
        assert expected_calibration_error(probabilities, ~labels) > 0.3


def clustered(seed, clusters=40, size=4):
    """Values that agree within their cluster, around a true mean of 0."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(clusters, 1)) + 0.3 * rng.normal(size=(clusters, size))
    return values.ravel(), np.repeat(np.arange(clusters), size)


class TestBootstrap:
    def test_one_cluster_has_no_interval_however_many_values_it_has(self):
        alone = estimate_mean([(7, [0.0, 1.0]), (7, 0.5), (8, math.nan)])
        assert (alone.clusters, alone.n, alone.bounds()) == (1, 3, "no interval")
        # Clusters that agree have one, of no width.
        alike = estimate_mean([(7, 0.5), (8, 0.5)])
        assert (alike.clusters, alike.bounds("+", between=" to ")) == (2, "+0.500 to +0.500")

    def test_covers_the_true_mean_as_often_as_it_says(self):
        intervals = [bootstrap_interval(*clustered(seed), n=400) for seed in range(200)]
        covered = np.mean([low <= 0 <= high for low, high in intervals])
        assert 0.90 <= covered <= 0.98

    def test_values_drawn_one_by_one_would_cover_too_little(self):
        intervals = [bootstrap_interval(clustered(seed)[0], n=400) for seed in range(200)]
        assert np.mean([low <= 0 <= high for low, high in intervals]) < 0.75

    def test_agrees_with_the_normal_approximation(self):
        values = np.random.default_rng(1).normal(10, 2, 400)
        low, high = bootstrap_interval(values)
        half = 1.96 * values.std() / math.sqrt(400)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)

    def test_clusters_of_different_size_weigh_by_their_values(self):
        # Only three means are possible: of the large cluster, of the small one, and of all.
        values, clusters = [1.0] * 9 + [0.0], ["large"] * 9 + ["small"]
        assert bootstrap_interval(values, clusters) == (0.0, 1.0)

    def test_equal_seeds_give_equal_intervals(self):
        values, clusters = clustered(0)
        assert bootstrap_interval(values, clusters) == bootstrap_interval(values, clusters)
        assert bootstrap_interval(values, clusters) != bootstrap_interval(values, clusters, seed=1)

    def test_order_and_names_of_values_in_a_cluster_do_not_matter(self):
        values, clusters = clustered(0)
        order = list(range(len(values)))
        random.Random(0).shuffle(order)
        shuffled = bootstrap_interval(values[order], clusters[order])
        assert shuffled == pytest.approx(bootstrap_interval(values, clusters))

    @pytest.mark.parametrize("clusters", [[0] * 5, [0, 0, 1, 1, 2], None])
    def test_constant_values_have_no_spread(self, clusters):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            interval = bootstrap_interval([0.1] * 5, clusters)
        assert interval == pytest.approx((0.1, 0.1))

    def test_one_cluster_collapses_to_the_mean(self):
        assert bootstrap_interval([0.0, 1.0], ["only", "only"]) == (0.5, 0.5)
        assert bootstrap_interval([0.25]) == (0.25, 0.25)

    def test_calibration_interval_holds_the_value(self):
        rng = np.random.default_rng(2)
        probabilities = rng.random(2_000)
        labels = rng.random(2_000) < probabilities**2
        clusters = np.repeat(np.arange(200), 10)
        value = expected_calibration_error(probabilities, labels)
        low, high = bootstrap_calibration_interval(probabilities, labels, clusters, n=300)
        assert 0 < low < value < high < 1
        assert high - low < 0.1

    def test_calibration_interval_repeats_the_measure_on_each_resample(self):
        # Two clusters: a resample holds one of them twice or both, so that the bounds are known.
        probabilities, labels, clusters = [0.1, 0.3, 0.8, 0.9], [0, 1, 1, 1], [0, 0, 1, 1]
        errors = [
            expected_calibration_error(np.take(probabilities, rows), np.take(labels, rows))
            for rows in ([0, 1, 0, 1], [0, 1, 2, 3], [2, 3, 2, 3])
        ]
        interval = bootstrap_calibration_interval(probabilities, labels, clusters, n=500)
        assert interval == pytest.approx((min(errors), max(errors)))

    def test_calibration_interval_of_one_cluster(self):
        assert bootstrap_calibration_interval([0.25, 0.25], [0, 1], [7, 7]) == (0.25, 0.25)
