"""What training minimises: small functions of logits, which they compare with graded targets.

All take the logits of a batch, `(n,)`, whose sigmoids are the scores, and give a scalar that is 0
where there is nothing to compare. Positions are indexes into the batch.

| loss | compares | is least where |
|---|---|---|
| `pointwise_bce` | each row with its target | `sigmoid(logit) = target` |
| `listwise_softmax` | the documents under one instruction | the logits differ as the targets do |
| `horizontal_pairs` | two documents under one instruction | the better one lies far above |
| `vertical_pairs` | one document under two instructions | it lies far above where it suits |
| `null_instruction_consistency` | one document, with and without an idle instruction | equal |
| `injection_invariance` | one document, with an injected and a neutral text | equal |
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

LIST_TEMPERATURE = 0.2
"""Targets lie in [0, 1]: without a temperature their softmax would be almost flat."""


def pointwise_bce(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy with graded targets, `-y log p - (1 - y) log(1 - p)`, `p = sigmoid(s)`.

    A proper scoring rule (Good, J. R. Statist. Soc. B 14, 1952): in expectation it is least where
    the score is the mean target, so that trained scores mean something.

    Args:
        logits: `(n,)`.
        targets: `(n,)` in [0, 1]; rows that are NaN have no target and are left out.
        weights: `(n,)`, how much each row counts.

    Returns:
        The weighted mean.
    """
    known = ~targets.isnan()
    if not bool(known.any()):
        return _nothing(logits)
    each = F.binary_cross_entropy_with_logits(logits[known], targets[known], reduction="none")
    return (each * weights[known]).sum() / weights[known].sum()


def listwise_softmax(logits: Tensor, targets: Tensor, weights: Tensor, lists: Tensor) -> Tensor:
    """ListNet with top-one probabilities: `KL(softmax(y / T) || softmax(s))`.

    From Cao et al., ICML 2007, with `T = LIST_TEMPERATURE`, and with the entropy of the targets
    taken off, so that it is 0 at best. Logits of a list may be shifted together at no cost.

    Args:
        logits: `(n,)`.
        targets: `(n,)` in [0, 1].
        weights: `(n,)`; a list counts as much as its rows on average.
        lists: `(l, k)`: the rows of each list, filled up with -1. None has a NaN target.

    Returns:
        The weighted mean over lists.
    """
    if not len(lists):
        return _nothing(logits)
    there = lists >= 0
    rows = lists.clamp(min=0)
    hidden = ~there
    wanted = (targets[rows] / LIST_TEMPERATURE).masked_fill(hidden, -float("inf")).log_softmax(1)
    given = logits[rows].masked_fill(hidden, -float("inf")).log_softmax(1)
    # Where nothing is, the difference of two infinities would be NaN.
    gap = (wanted - given).masked_fill(hidden, 0.0)
    divergence = (wanted.exp() * gap).sum(1)
    weight = (weights[rows] * there).sum(1) / there.sum(1)
    return (divergence * weight).sum() / weight.sum()


def horizontal_pairs(logits: Tensor, targets: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """Two documents under one instruction: `log(1 + exp(s_worse - s_better))`, RankNet.

    From Burges et al., ICML 2005. A pair counts by the difference of its targets, so that a near
    tie asks for little.

    Args:
        logits: `(n,)`.
        targets: `(n,)` in [0, 1]; they say which of two rows is the better one.
        weights: `(n,)`; a pair has the product of those of its rows.
        pairs: `(m, 2)`, in either order.

    Returns:
        The weighted mean over pairs.
    """
    return _pairwise_logistic(logits, targets, weights, pairs)


def vertical_pairs(logits: Tensor, targets: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """One document under two instructions: the loss of `horizontal_pairs`, the other way round.

    What both rows share, query and document, cannot tell them apart: only reading the instruction
    lowers it. It is the logistic form of the flip accuracy that `evaluate` reports.

    Args:
        logits: `(n,)`.
        targets: `(n,)` in [0, 1].
        weights: `(n,)`; a pair has the product of those of its rows.
        pairs: `(m, 2)`, in either order.

    Returns:
        The weighted mean over pairs.
    """
    return _pairwise_logistic(logits, targets, weights, pairs)


def null_instruction_consistency(logits: Tensor, pairs: Tensor) -> Tensor:
    """An instruction that changes nothing keeps the score: `KL(p_without || p_with)`.

    The divergence of two Bernoulli variables. The score without is held fixed, as the prediction to
    keep in consistency training (Xie et al., NeurIPS 2020), so that it does not drift to meet the
    other. The gradient is `p_with - p_without`, which does not vanish where both are sure.

    Args:
        logits: `(n,)`.
        pairs: `(m, 2)`: the row with the idle instruction, and the one without any.

    Returns:
        The mean over pairs.
    """
    return _keep(logits, pairs)


def injection_invariance(logits: Tensor, pairs: Tensor) -> Tensor:
    """A document with an injected text scores as with a neutral one: `KL(p_neutral || p_injected)`.

    The neutral text is as long and stands in the same place, so that nothing but what the injected
    text says is held against it. The score with the neutral text is held fixed.

    Args:
        logits: `(n,)`.
        pairs: `(m, 2)`: the row with the injected text, and the one with the neutral text.

    Returns:
        The mean over pairs.
    """
    return _keep(logits, pairs)


def _pairwise_logistic(logits: Tensor, targets: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    if not len(pairs):
        return _nothing(logits)
    first, second = pairs.unbind(1)
    gap = targets[first] - targets[second]
    margin = (logits[first] - logits[second]) * gap.sign()
    weight = gap.abs() * weights[first] * weights[second]
    # A batch of ties asks for nothing, and must not divide by zero.
    return (F.softplus(-margin) * weight).sum() / weight.sum().clamp(min=1e-12)


def _keep(logits: Tensor, pairs: Tensor) -> Tensor:
    if not len(pairs):
        return _nothing(logits)
    moving, kept = logits[pairs[:, 0]], logits[pairs[:, 1]].detach()
    wanted = kept.sigmoid()
    at_best = F.binary_cross_entropy_with_logits(kept, wanted)
    return F.binary_cross_entropy_with_logits(moving, wanted) - at_best


def _nothing(logits: Tensor) -> Tensor:
    """0 with a gradient of 0, since a batch may have nothing for any of the losses."""
    return (logits * 0).sum()
