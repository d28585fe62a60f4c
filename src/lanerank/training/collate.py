"""From groups to the tensors of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from lanerank.training import losses
from lanerank.training.backends import Backend, Inputs
from lanerank.training.groups import Group, Pair


class Batch(TypedDict):
    """Some groups as tensors; positions count through the rows of all of them."""

    inputs: Inputs
    """The arguments of the model's forward pass."""
    targets: Tensor
    """`(n,)`, NaN where a row is only compared with others."""
    weights: Tensor
    """`(n,)`."""
    lists: Tensor
    """`(l, k)`, filled up with -1."""
    horizontal: Tensor
    """`(m, 2)`, as the other pairs; see `Group`."""
    vertical: Tensor
    consistency: Tensor
    invariance: Tensor


class GroupCollator:
    """Makes batches of groups for one kind of model."""

    def __init__(self, backend: Backend) -> None:
        """Read rows as `backend` does."""
        self.backend = backend

    def __call__(self, groups: Sequence[Group]) -> Batch:
        """Lay the rows of the groups out one after another."""
        rows = [row for group in groups for row in group.rows]
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group.rows))
        located = list(zip(starts, groups, strict=False))

        def pairs(name: str) -> Tensor:
            moved = [
                (start + a, start + b)
                for start, group in located
                for a, b in _pairs_of(group, name)
            ]
            return torch.tensor(moved, dtype=torch.long).reshape(-1, 2)

        listed = [[start + i for i in places] for start, group in located for places in group.lists]
        longest = max(map(len, listed), default=0)
        filled = [places + [-1] * (longest - len(places)) for places in listed]
        return Batch(
            inputs=self.backend.inputs(rows),
            targets=torch.tensor([row.target for row in rows]),
            weights=torch.tensor([row.weight for row in rows]),
            lists=torch.tensor(filled, dtype=torch.long).reshape(len(filled), longest),
            horizontal=pairs("horizontal"),
            vertical=pairs("vertical"),
            consistency=pairs("consistency"),
            invariance=pairs("invariance"),
        )


def losses_of(logits: Tensor, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses of a batch that have a weight, each times its weight."""
    graded = (logits, batch["targets"], batch["weights"])
    each = {
        "pointwise": lambda: losses.pointwise_bce(*graded),
        "listwise": lambda: losses.listwise_softmax(*graded, batch["lists"]),
        "horizontal": lambda: losses.horizontal_pairs(*graded, batch["horizontal"]),
        "vertical": lambda: losses.vertical_pairs(*graded, batch["vertical"]),
        "consistency": lambda: losses.null_instruction_consistency(logits, batch["consistency"]),
        "invariance": lambda: losses.injection_invariance(logits, batch["invariance"]),
    }
    return {name: weight * each[name]() for name, weight in weights.items()}


def count_terms(groups: Sequence[Group], weights: Mapping[str, float]) -> dict[str, int]:
    """How many terms each loss that has a weight has in one pass over the groups."""
    counts = {
        "pointwise": sum(not math.isnan(row.target) for group in groups for row in group.rows),
        "listwise": sum(len(group.lists) for group in groups),
        **{
            name: sum(len(_pairs_of(group, name)) for group in groups)
            for name in ("horizontal", "vertical", "consistency", "invariance")
        },
    }
    return {name: counts[name] for name in weights}


def _pairs_of(group: Group, name: str) -> tuple[Pair, ...]:
    pairs: tuple[Pair, ...] = getattr(group, name)
    return pairs
