"""From comparisons to scores: strengths of entries, on one scale, with what is wrong with them."""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import choix
import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import optimize, sparse, special
from scipy.sparse import csgraph

from lanerank.errors import InputError
from lanerank.evaluation.measures import Estimate, FloatArray, IntArray, estimate_mean
from lanerank.training.panel import Comparison
from lanerank.training.quadruples import Entry, Quadruple
from lanerank.training.scale import Scale, fit_scale

StrengthModel = Literal["bradley-terry", "thurstone"]
"""The curve from the difference of two strengths to the chance to win: logistic, or normal."""

_CIRCLES = 0.1
_ITERATIONS = 10_000
_MOST_ENTRIES = 3_000
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class TournamentReport(BaseModel):
    """How far the comparisons carry the scores. `None` where there was nothing to measure."""

    model_config = _FROZEN

    entries: int
    comparisons: int
    model: StrengthModel
    unplayed: tuple[str, ...]
    """Entries in no comparison; they get no score."""
    components: int
    """Into how many parts the comparisons fall, unplayed entries not counted. Strengths of
    different parts have nothing to do with each other."""
    split_requests: tuple[str, ...]
    """Requests whose played entries are in more than one part; judge pairs that join them."""
    anchored_components: int
    """Parts with a grade in them. The others stand at the mean level of these, with the uncertainty
    that this implies; without any grade, each part has its own mean at 0.5."""
    slope: float | None
    """Logits of the grade for a unit of strength; `None` without grades."""
    anchor_error: Estimate | None
    """Mean `|score - grade|` over the grades, which the scale was fitted to."""
    intransitive: Estimate | None
    """Of the triples of entries compared with each other, none a tie, the share that go round in a
    circle. For a judge that flips coins it is 0.25."""
    upsets: Estimate | None
    """The share of comparisons, ties not counted, in which the weaker entry was preferred."""
    residual: Estimate | None
    """Mean `|share of the game won - share expected|`, in [0, 1]."""

    def warnings(self) -> list[str]:
        """What a person should know before training on the scores, a sentence each."""
        found = []
        if self.unplayed:
            found.append(
                f"{len(self.unplayed)} entries were in no comparison and have no score, such as "
                f"[{self.unplayed[0]}]."
            )
        if self.split_requests:
            found.append(
                f"The comparisons of {len(self.split_requests)} requests fall apart, such as "
                f"those of [{self.split_requests[0]}]; judge pairs that join the parts."
            )
        if self.components > max(self.anchored_components, 1):
            found.append(
                f"{self.components - self.anchored_components} of {self.components} parts have no "
                "grade in them; scores of different parts do not compare. Give grades, or join "
                "parts by comparing a document under several requests."
            )
        if self.intransitive and self.intransitive.low > _CIRCLES:
            found.append(
                f"{self.intransitive.value:.0%} of {self.intransitive.n} triples go round in a "
                "circle (25% for a judge that flips coins); the judge contradicts itself."
            )
        return found


class Tournament(BaseModel):
    """The scores of entries."""

    model_config = _FROZEN

    strengths: tuple[float | None, ...]
    """For each entry its strength, against a mean of 0 in its part of the graph; `None` where it
    was in no comparison."""
    deviations: tuple[float | None, ...]
    """The standard errors of the strengths, from the Fisher information of the comparisons."""
    parts: tuple[int | None, ...]
    """The part of the graph in which each entry is, from 0."""
    quadruples: tuple[Quadruple, ...]
    """The entries with their scores and standard errors, at most 0.5, in their order, without the
    unplayed."""
    report: TournamentReport


def fit_tournament(
    entries: Sequence[Entry],
    comparisons: Iterable[Comparison],
    *,
    grades: Mapping[int, float] | None = None,
    model: StrengthModel = "bradley-terry",
    prior: float = 0.5,
    grade_deviation: float = 0.15,
    source: str | None = "tournament",
) -> Tournament:
    """Turn comparisons into scores on one scale.

    Strengths are fitted to all comparisons of a connected part of the graph together, each being
    one game of which both sides can win a share. Requests that cross comparisons join are one part,
    and their strengths compare. Where some entries have a grade from 0 to 1, the chance
    `1 / (1 + exp(-slope * strength - level))` is fitted to the grades, with one slope for all and a
    level for each part, so that a score means the same in all. Without grades the score is the
    chance to win against the mean of the part.

    The `uncertainty` of a score is its standard error by the delta method. Where little is known
    that exceeds what a score between 0 and 1 can vary, and is cut to 0.5, the largest standard
    deviation there is; 0.5 means that the score is not known.

    Args:
        entries: The entrants.
        comparisons: From `JudgePanel.compare`, or made of people's preferences.
        grades: Pointwise grades in [0, 1] of a few entries, by position; spread them over parts,
            and over weak and strong entries.
        model: `"bradley-terry"` (logistic, fitted by choix) or `"thurstone"` (normal).
        prior: Drawn games that each entry is taken to have played besides, spread over the others
            of its part; above 0. It keeps an entry that won every game at a finite strength.
        grade_deviation: The standard error of a grade in the middle of the scale.
        source: The `source` of the quadruples.

    Raises:
        InputError: An argument is not usable, or the grades fall where strengths rise.
    """
    # An iterator would be used up by the check, and leave all entries unplayed.
    comparisons = tuple(comparisons)
    _check(entries, comparisons, model, prior)
    first = np.array([c.first for c in comparisons], dtype=np.int64)
    second = np.array([c.second for c in comparisons], dtype=np.int64)
    wins = np.array([c.win for c in comparisons], dtype=float)
    parts = _parts(len(entries), first, second)
    strengths, variances = np.zeros(len(entries)), np.zeros(len(entries))
    count = int(parts.max(initial=-1)) + 1
    for members, inside in zip(_by_part(parts, count), _by_part(parts[first], count), strict=True):
        games = np.zeros((members.size, members.size))
        a, b = (np.searchsorted(members, end[inside]) for end in (first, second))
        np.add.at(games, (a, b), wins[inside])
        np.add.at(games, (b, a), 1 - wins[inside])
        strengths[members], variances[members] = fit_strengths(games, model=model, prior=prior)
    played = np.flatnonzero(parts >= 0)
    scale = fit_scale(strengths, variances, parts, grades or {}, _LINKS[model].cdf, grade_deviation)
    return Tournament(
        strengths=_by_entry(strengths, parts),
        deviations=_by_entry(np.sqrt(variances), parts),
        parts=tuple(int(part) if part >= 0 else None for part in parts),
        quadruples=tuple(
            entries[place].as_quadruple(
                score=float(scale.scores[place]),
                uncertainty=float(scale.deviations[place]),
                source=source,
            )
            for place in played.tolist()
        ),
        report=_report(entries, comparisons, model, parts, strengths, scale, grades or {}),
    )


def fit_strengths(
    games: FloatArray, *, model: StrengthModel = "bradley-terry", prior: float = 0.5
) -> tuple[FloatArray, FloatArray]:
    """The strengths of entries that played each other.

    Args:
        games: A square matrix; row `i` and column `j` hold how many games `i` won against `j`,
            which need not be a whole number.
        model: As for `fit_tournament`.
        prior: As for `fit_tournament`.

    Returns:
        The strengths, with a mean of 0, and the variances of their estimates: the diagonal of the
        pseudo-inverse of the Fisher information, the prior's games included.

    Raises:
        InputError: The fit does not converge, or there are more than 3,000 entries, for which the
            matrices get too large.
    """
    size = len(games)
    if size > _MOST_ENTRIES:
        raise InputError(
            f"`comparisons` join {size} entries to one part, of {_MOST_ENTRIES} at most; leave out "
            "cross comparisons between queries"
        )
    played = games + prior / (2 * max(size - 1, 1))
    np.fill_diagonal(played, 0.0)
    link = _LINKS[model]
    try:
        fitted = link.fit(played)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the strengths of {size} entries cannot be estimated with `prior={prior!r}` "
            f"({error}); give a larger `prior`"
        ) from error
    strengths = fitted - fitted.mean()
    totals = played + played.T
    information = totals * link.information(strengths[:, None] - strengths[None, :])
    laplacian = np.diag(information.sum(axis=1)) - information
    variances = np.diag(np.linalg.pinv(laplacian, hermitian=True))
    return strengths, np.maximum(variances, 0.0)


# The two curves


@dataclass(frozen=True, slots=True)
class _Link:
    cdf: Callable[[FloatArray], FloatArray]
    """The chance to win by the difference of strengths."""
    information: Callable[[FloatArray], FloatArray]
    """The Fisher information of one game on that difference."""
    fit: Callable[[FloatArray], FloatArray]
    """The most likely strengths, for games as in `fit_strengths`."""


def _fit_bradley_terry(games: FloatArray) -> FloatArray:
    fitted: FloatArray = choix.ilsr_pairwise_dense(games, max_iter=_ITERATIONS)
    return fitted


def _fit_thurstone(games: FloatArray) -> FloatArray:
    def loss(strengths: FloatArray) -> tuple[float, FloatArray]:
        differences = strengths[:, None] - strengths[None, :]
        chances = special.log_ndtr(differences)
        slopes = games * np.exp(_log_density(differences) - chances)
        return -float((games * chances).sum()), slopes.sum(axis=0) - slopes.sum(axis=1)

    result = optimize.minimize(
        loss, np.zeros(len(games)), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}
    )
    if not result.success:
        raise RuntimeError(result.message)
    fitted: FloatArray = result.x
    return fitted


def _log_density(differences: FloatArray) -> FloatArray:
    # Many times as fast as that of scipy.stats.
    return -0.5 * (differences**2 + math.log(2 * math.pi))


def _normal_information(differences: FloatArray) -> FloatArray:
    # In logarithms, because both chances vanish in the tails.
    logs = (
        2 * _log_density(differences)
        - special.log_ndtr(differences)
        - special.log_ndtr(-differences)
    )
    information: FloatArray = np.exp(logs)
    return information


def _logistic_information(differences: FloatArray) -> FloatArray:
    information: FloatArray = special.expit(differences) * special.expit(-differences)
    return information


_LINKS: Mapping[StrengthModel, _Link] = {
    "bradley-terry": _Link(special.expit, _logistic_information, _fit_bradley_terry),
    "thurstone": _Link(special.ndtr, _normal_information, _fit_thurstone),
}


# What is wrong with the comparisons


def _report(
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    model: StrengthModel,
    parts: IntArray,
    strengths: FloatArray,
    scale: Scale,
    grades: Mapping[int, float],
) -> TournamentReport:
    queries = {key: n for n, key in enumerate(dict.fromkeys(e.query_key for e in entries))}
    clusters = [queries[entries[c.first].query_key] for c in comparisons]
    gaps = np.array([strengths[c.first] - strengths[c.second] for c in comparisons])
    wins = np.array([c.win for c in comparisons])
    preferences = np.array([c.preference for c in comparisons])
    residuals = np.abs(wins - _LINKS[model].cdf(gaps)) if comparisons else wins
    upsets = np.where(preferences == 0, np.nan, preferences * gaps < 0)
    spread: dict[tuple[str, ...], set[int]] = defaultdict(set)
    example: dict[tuple[str, ...], Entry] = {}
    for place, entry in enumerate(entries):
        if parts[place] >= 0:
            spread[entry.request_key].add(int(parts[place]))
            example.setdefault(entry.request_key, entry)
    return TournamentReport(
        entries=len(entries),
        comparisons=len(comparisons),
        model=model,
        unplayed=tuple(str(entries[place]) for place in np.flatnonzero(parts < 0).tolist()),
        components=int(parts.max(initial=-1)) + 1,
        split_requests=tuple(str(example[key]) for key, found in spread.items() if len(found) > 1),
        anchored_components=len({int(parts[place]) for place in grades if parts[place] >= 0}),
        slope=scale.slope,
        anchor_error=estimate_mean(
            (queries[entries[place].query_key], abs(scale.scores[place] - grade))
            for place, grade in grades.items()
            if parts[place] >= 0
        ),
        intransitive=estimate_mean(
            (queries[entries[place].query_key], circles)
            for place, circles in _circles(len(entries), comparisons)
        ),
        upsets=estimate_mean(zip(clusters, upsets, strict=True)),
        residual=estimate_mean(zip(clusters, residuals, strict=True)),
    )


def _circles(size: int, comparisons: Sequence[Comparison]) -> list[tuple[int, list[float]]]:
    """For each entry, whether each triple of which it is the first goes round in a circle."""
    totals: dict[tuple[int, int], float] = defaultdict(float)
    for c in comparisons:
        totals[min(c.first, c.second), max(c.first, c.second)] += (
            c.preference if c.first < c.second else -c.preference
        )
    decided = {pair: total > 0 for pair, total in totals.items() if total}
    above: list[set[int]] = [set() for _ in range(size)]
    for low, high in decided:
        above[low].add(high)
    # Of i < j < k, a circle is i over j over k over i, or the reverse.
    return [
        (
            i,
            [
                float(decided[i, j] == decided[j, k] != decided[i, k])
                for j in sorted(above[i])
                for k in sorted(above[i] & above[j])
            ],
        )
        for i in range(size)
    ]


def _parts(size: int, first: IntArray, second: IntArray) -> IntArray:
    """The connected part of each entry, numbered by first entry; -1 where it never played."""
    graph = sparse.coo_array((np.ones(first.size), (first, second)), shape=(size, size))
    _, labels = csgraph.connected_components(graph, directed=False)
    played = np.zeros(size, dtype=bool)
    played[first] = played[second] = True
    numbers = {label: n for n, label in enumerate(dict.fromkeys(labels[played].tolist()))}
    return np.array([numbers.get(label, -1) for label in labels.tolist()], dtype=np.int64)


def _by_part(parts: IntArray, count: int) -> list[IntArray]:
    """For each part, the positions that are in it, ascending."""
    order = np.argsort(parts, kind="stable")
    ends = np.searchsorted(parts[order], np.arange(count + 1))
    return [order[start:end] for start, end in pairwise(ends.tolist())]


def _by_entry(values: FloatArray, parts: IntArray) -> tuple[float | None, ...]:
    return tuple(
        float(value) if part >= 0 else None for value, part in zip(values, parts, strict=True)
    )


def _check(
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    model: StrengthModel,
    prior: float,
) -> None:
    if model not in get_args(StrengthModel):
        raise InputError(f"`model` must be one of {get_args(StrengthModel)}, got {model!r}")
    if not 0 < prior < float("inf"):
        raise InputError(f"`prior` must be a number of games above 0, got {prior!r}")
    for place, c in enumerate(comparisons):
        if c.first == c.second or not {c.first, c.second} <= set(range(len(entries))):
            raise InputError(
                f"`comparisons[{place}]` must be of two different positions in the {len(entries)} "
                f"entries, got {reprlib.repr(c)}"
            )
