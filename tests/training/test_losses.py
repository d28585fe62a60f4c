"""Each loss is least where its targets are met, and its gradient leads there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lanerank.training.losses import (
    LIST_TEMPERATURE,
    horizontal_pairs,
    injection_invariance,
    listwise_softmax,
    null_instruction_consistency,
    pointwise_bce,
    vertical_pairs,
)

TARGETS = torch.tensor([0.9, 0.5, 0.1])
ONES = torch.ones(3)
ALL = torch.tensor([[0, 1, 2]])
PAIRS = torch.tensor([[0, 1], [2, 0]])
NO_PAIRS = torch.empty(0, 2, dtype=torch.long)
NO_LISTS = torch.empty(0, 0, dtype=torch.long)

logit_lists = st.lists(st.floats(-6, 6, allow_nan=False, width=32), min_size=3, max_size=3).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def gradient(loss, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    loss(logits).backward()
    assert logits.grad is not None
    return logits.grad


def best_of(loss, start: torch.Tensor) -> torch.Tensor:
    """The logits that plain gradient descent finds."""
    logits = start.clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


def test_pointwise_is_least_where_scores_are_targets() -> None:
    best = best_of(lambda logits: pointwise_bce(logits, TARGETS.double(), ONES), torch.zeros(3))
    assert best.sigmoid().tolist() == pytest.approx(TARGETS.tolist(), abs=1e-4)


def test_pointwise_known_value_and_gradient() -> None:
    logits = torch.tensor([0.0, 2.0])
    targets, weights = torch.tensor([1.0, 0.25]), torch.tensor([3.0, 1.0])
    high = 1 / (1 + math.exp(-2))
    second = -0.25 * math.log(high) - 0.75 * math.log(1 - high)
    value = pointwise_bce(logits, targets, weights)
    assert float(value) == pytest.approx((3 * math.log(2) + second) / 4)
    # The gradient of a row is its share of the weight times score less target.
    given = gradient(lambda logits: pointwise_bce(logits, targets, weights), logits)
    assert given.tolist() == pytest.approx([0.75 * (0.5 - 1), 0.25 * (high - 0.25)])


def test_rows_without_target_do_not_count() -> None:
    targets = torch.tensor([0.9, float("nan"), 0.1])
    logits = torch.tensor([1.0, 30.0, -1.0])
    alone = pointwise_bce(logits[[0, 2]], targets[[0, 2]], ONES[:2])
    assert float(pointwise_bce(logits, targets, ONES)) == pytest.approx(float(alone))
    given = gradient(lambda logits: pointwise_bce(logits, targets, ONES), logits)
    assert given[1] == 0
    assert bool(given.isfinite().all())


@given(logit_lists, st.floats(-20, 20))
def test_listwise_is_zero_at_best_and_blind_to_shifts(logits, shift) -> None:
    targets = TARGETS.double()
    best = targets / LIST_TEMPERATURE + shift
    at_best = listwise_softmax(best, targets, ONES, ALL)
    assert float(at_best) == pytest.approx(0, abs=1e-9)
    value = listwise_softmax(logits, targets, ONES, ALL)
    assert float(value) >= -1e-9
    shifted = listwise_softmax(logits + shift, targets, ONES, ALL)
    assert float(shifted) == pytest.approx(float(value), abs=1e-9)


def test_listwise_gradient_lifts_what_is_too_low() -> None:
    given = gradient(lambda logits: listwise_softmax(logits, TARGETS, ONES, ALL), torch.zeros(3))
    assert given[0] < 0 < given[2]
    assert float(given.sum()) == pytest.approx(0, abs=1e-6)


def test_lists_of_different_lengths_do_not_touch_each_other() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1])
    targets = torch.tensor([1.0, 0.0, 0.3, 0.6, 0.9])
    weights = torch.ones(5)
    short, long = torch.tensor([[0, 1, -1]]), torch.tensor([[2, 3, 4]])
    both = listwise_softmax(logits, targets, weights, torch.cat([short, long]))
    apart = [
        listwise_softmax(logits, targets, weights, torch.tensor([[0, 1]])),
        listwise_softmax(logits, targets, weights, long),
    ]
    assert float(both) == pytest.approx(float(sum(apart)) / 2)
    given = gradient(lambda logits: listwise_softmax(logits, targets, weights, short), logits)
    assert given[2:].tolist() == [0, 0, 0]
    assert bool(given.isfinite().all())


@pytest.mark.parametrize("loss", [horizontal_pairs, vertical_pairs])
def test_pairs_are_pushed_apart_by_their_targets(loss) -> None:
    logits = torch.zeros(3)
    given = gradient(lambda logits: loss(logits, TARGETS, ONES, PAIRS), logits)
    # The better one is lifted whichever stands first, and the wider gap (0 and 2) counts for more.
    assert given[0] < 0
    assert given[1] > 0
    assert given[2] > given[1]
    value = float(loss(logits, TARGETS, ONES, PAIRS))
    assert value == pytest.approx(math.log(2))
    right = torch.tensor([9.0, 0.0, -9.0])
    assert float(loss(right, TARGETS, ONES, PAIRS)) < 0.001 < value
    assert float(loss(-right, TARGETS, ONES, PAIRS)) > 9


@pytest.mark.parametrize("loss", [horizontal_pairs, vertical_pairs])
@given(logits=logit_lists)
def test_the_order_within_a_pair_makes_no_difference(loss, logits) -> None:
    value = loss(logits, TARGETS.double(), ONES, PAIRS)
    turned = loss(logits, TARGETS.double(), ONES, PAIRS.flip(1))
    assert float(value) == pytest.approx(float(turned))


@pytest.mark.parametrize("loss", [horizontal_pairs, vertical_pairs])
def test_weights_of_rows_weigh_pairs(loss) -> None:
    logits = torch.tensor([0.0, 3.0, 0.0])
    pairs, targets = torch.tensor([[0, 1], [0, 2]]), torch.tensor([1.0, 0.0, 0.0])
    even = loss(logits, targets, ONES, pairs)
    heavy = loss(logits, targets, torch.tensor([1.0, 3.0, 1.0]), pairs)
    wrong, tie = math.log(1 + math.exp(3)), math.log(2)
    assert float(even) == pytest.approx((wrong + tie) / 2)
    assert float(heavy) == pytest.approx((3 * wrong + tie) / 4)


def test_pairs_of_equal_targets_ask_for_nothing() -> None:
    targets = torch.full((3,), 0.5)
    given = gradient(lambda logits: vertical_pairs(logits, targets, ONES, PAIRS), torch.ones(3))
    assert given.tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss", [null_instruction_consistency, injection_invariance])
@given(logits=logit_lists)
def test_keeping_a_score_is_zero_where_it_is_kept(loss, logits) -> None:
    value = float(loss(logits, PAIRS))
    assert value >= -1e-9
    equal = logits[0].repeat(3)
    assert float(loss(equal, PAIRS)) == pytest.approx(0, abs=1e-9)
    if float((logits[0] - logits[1]).abs()) > 1 and float((logits[2] - logits[0]).abs()) > 1:
        assert value > 1e-5


@pytest.mark.parametrize("loss", [null_instruction_consistency, injection_invariance])
def test_only_the_first_of_a_pair_moves_to_keep_its_score(loss) -> None:
    logits = torch.tensor([1.0, -2.0])
    given = gradient(lambda logits: loss(logits, torch.tensor([[0, 1]])), logits)
    moving, kept = logits.sigmoid().tolist()
    assert given.tolist() == pytest.approx([moving - kept, 0])
    # Sure of the opposite, where a squared difference of scores would hardly move.
    sure = gradient(
        lambda logits: loss(logits, torch.tensor([[0, 1]])), torch.tensor([12.0, -12.0])
    )
    assert sure[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: pointwise_bce(logits, torch.full((3,), float("nan")), ONES),
        lambda logits: listwise_softmax(logits, TARGETS, ONES, NO_LISTS),
        lambda logits: horizontal_pairs(logits, TARGETS, ONES, NO_PAIRS),
        lambda logits: vertical_pairs(logits, TARGETS, ONES, NO_PAIRS),
        lambda logits: null_instruction_consistency(logits, NO_PAIRS),
        lambda logits: injection_invariance(logits, NO_PAIRS),
    ],
)
def test_nothing_to_compare_costs_nothing(loss) -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert float(loss(logits)) == 0
    assert gradient(loss, logits).tolist() == [0, 0, 0]
