"""Which pairs a judge is asked about: a few games for each entry instead of all against all."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np

from lanerank.errors import InputError
from lanerank.training.quadruples import Entry

_DRAWS = 32


def plan_pairs(
    entries: Sequence[Entry],
    *,
    games: int = 4,
    all_pairs_up_to: int = 6,
    cross_documents: int = 0,
    seed: int = 0,
) -> list[tuple[int, int]]:
    """The pairs to judge.

    Within a request, the entries are joined by `games / 2` random Hamiltonian cycles: each plays
    about `games` others, every two are joined by a short chain of games, and the number of pairs
    grows with the number of entries instead of its square. Across the requests of a query,
    `cross_documents` of its documents are compared with themselves, which puts the requests on one
    scale. What is drawn for a query depends on its entries alone, so that a cache stays good when
    other queries come or go.

    Args:
        entries: The entrants; a request is a query with an instruction and a date.
        games: How many others each entry plays, an even number from 2. Cycles are drawn so that
            they share as few pairs as possible; a shared pair is played once.
        all_pairs_up_to: Requests with so many entries or fewer play all against all.
        cross_documents: How many documents of a query, drawn among those that stand under several
            of its requests, are compared across these.
        seed: Equal seeds give equal pairs.

    Returns:
        Pairs of positions in `entries`, the smaller first, each once.

    Raises:
        InputError: An argument is not usable.
    """
    if isinstance(games, bool) or not isinstance(games, int) or games < 2 or games % 2:
        raise InputError(f"`games` must be an even integer from 2, got {games!r}")
    for name, value in (("all_pairs_up_to", all_pairs_up_to), ("cross_documents", cross_documents)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"`{name}` must be an integer from 0, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"`seed` must be an integer from 0, got {seed!r}")
    requests: dict[tuple[str, ...], list[int]] = defaultdict(list)
    documents: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, entry in enumerate(entries):
        requests[entry.request_key].append(place)
        documents[entry.query_key][entry.document].append(place)
    pairs: list[tuple[int, int]] = []
    for key, places in requests.items():
        pairs += _schedule(places, games, all_pairs_up_to, _generator(seed, key))
    for query, texts in documents.items():
        across = [
            list(first.values())
            for places in texts.values()
            if len(first := {entries[p].request_key: p for p in reversed(places)}) > 1
        ]
        rng = _generator(seed, ("across", query))
        for chosen in rng.permutation(len(across))[:cross_documents].tolist():
            pairs += _schedule(sorted(across[chosen]), games, all_pairs_up_to, rng)
    return pairs


def _generator(seed: int, key: Sequence[str]) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8])])


def _schedule(
    places: Sequence[int], games: int, all_pairs_up_to: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """The pairs of these positions that are played."""
    if len(places) <= max(all_pairs_up_to, games + 1):
        return list(combinations(places, 2))
    edges: set[tuple[int, int]] = set()
    for _ in range(games // 2):
        cycles = (set(_cycle(len(places), rng)) for _ in range(_DRAWS))
        edges |= min(cycles, key=lambda cycle: len(cycle & edges))
    return [(places[low], places[high]) for low, high in sorted(edges)]


def _cycle(size: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    order = rng.permutation(size).tolist()
    for here, there in pairwise([*order, order[0]]):
        yield min(here, there), max(here, there)
