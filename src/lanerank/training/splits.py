"""A development set that shares neither a query nor a document with the training set."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lanerank.errors import InputError
from lanerank.evaluation.measures import SEED
from lanerank.training.quadruples import Quadruple

_TOLERANCE = 0.5
"""How far the share may be from what was asked, as a part of the smaller side."""


class Split(NamedTuple):
    """Two parts of the rows, each in their order."""

    train: list[Quadruple]
    dev: list[Quadruple]


def split(rows: Sequence[Quadruple], *, dev: float = 0.1, seed: int = SEED) -> Split:
    """Split rows so that no query and no document is on both sides.

    Rows belong together if they have the `query_id`, the text of the query or the text of the
    document in common, directly or over other rows; texts are compared without regard to case,
    white space and Unicode form. What belongs together stays together, and which of it goes to the
    development set is drawn. Queries that merely resemble each other are not kept apart: `check`
    finds them.

    Args:
        rows: Their order plays no part in who goes where.
        dev: The share of the rows for the development set, above 0 and below 1.
        seed: Equal rows and seeds give equal splits.

    Raises:
        InputError: `dev` is out of range, or no such split comes near to it, because too much
            belongs together.
    """
    if not 0 < dev < 1:
        raise InputError(f"`dev` must be above 0 and below 1, got {dev!r}")
    members = _components(rows)
    if len(members) < 2:
        reason = "all of them are connected by queries or documents that they share"
        raise InputError(
            f"the {len(rows)} rows cannot be split: "
            f"{reason if rows else 'there are none'}. Give rows about other documents too, or a "
            "development set of your own"
        )
    chosen = _draw(members, dev * len(rows), random.Random(seed))
    share = len(chosen) / len(rows)
    if abs(share - dev) > _TOLERANCE * min(dev, 1 - dev):
        largest = max(map(len, members)) / len(rows)
        raise InputError(
            f"the split nearest to `dev={dev}` has a share of {share:.3f}: the rows fall into "
            f"{len(members)} parts that share no query and no document, and the largest holds "
            f"{largest:.1%} of them. Ask for `dev={share:.3f}`, or give more queries about other "
            "documents"
        )
    return Split(
        train=[row for place, row in enumerate(rows) if place not in chosen],
        dev=[row for place, row in enumerate(rows) if place in chosen],
    )


def normalised(text: str) -> str:
    """A text for comparison: without regard to case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _components(rows: Sequence[Quadruple]) -> list[list[int]]:
    """The places of the rows that belong together, in an order that theirs plays no part in."""
    nodes: dict[tuple[str, str], int] = {}
    edges = [
        [
            nodes.setdefault(node, len(nodes))
            for node in (
                ("id", row.query_key),
                ("query", normalised(row.query)),
                ("document", normalised(row.document)),
            )
        ]
        for row in rows
    ]
    ends = np.array(edges, dtype=np.int64).reshape(-1, 3)
    size = (len(nodes), len(nodes))
    first, second = np.repeat(ends[:, 0], 2), ends[:, 1:].ravel()
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=size)
    _, labels = connected_components(graph, directed=False) if nodes else (0, np.empty(0, int))
    members: dict[int, list[int]] = {}
    for place, label in enumerate(labels[ends[:, 0]].tolist()):
        members.setdefault(label, []).append(place)
    return sorted(members.values(), key=lambda places: min(rows[i].query_key for i in places))


def _draw(members: list[list[int]], wanted: float, rng: random.Random) -> set[int]:
    """The places of parts drawn at random, as near to the wanted number as the draw allows."""
    drawn = rng.sample(members, len(members))
    chosen: set[int] = set()
    left = []
    for places in drawn:
        if len(chosen) + len(places) <= wanted:
            chosen.update(places)
        else:
            left.append(places)
    # One more part may come nearer from above than the others did from below.
    smallest = min(left, key=len)
    over, under = len(chosen) + len(smallest) - wanted, wanted - len(chosen)
    if len(left) > 1 and (over < under or not chosen):
        chosen.update(smallest)
    return chosen
