"""How a model does on the development data: the measures of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from lanerank.contracts import RerankRequest, Scorer
from lanerank.evaluation.calibration import JudgedPairs, named_estimates
from lanerank.evaluation.measures import (
    Estimate,
    FloatArray,
    IntArray,
    describe_interval,
    estimate_mean,
    flip_outcomes,
    ndcg,
)
from lanerank.evaluation.scenarios import LANE_KINDS, LaneKind
from lanerank.training.groups import Group, Row

HIGHEST_GRADE = 3
"""Targets in [0, 1] become grades from 0 to 3, as scenarios have them."""


class DevelopmentReport(BaseModel):
    """What a model does on quadruples. A measure is `None` where there was nothing to measure.

    A list is the documents of one query under one instruction. For nDCG, ECE and Brier score the
    target counts as the nearest grade from 0 to 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval: str
    """How the bounds of estimates were made."""
    queries: int
    rows: int
    non_finite: int
    """Scores that were NaN or infinite: last in their lists, wrong in flips, otherwise left out."""

    ndcg: Estimate | None
    """Mean nDCG@10 over lists of two documents or more with a grade above 0."""
    ndcg_instructed: Estimate | None
    """The same over lists with an instruction, neutral ones left out."""
    ndcg_plain: Estimate | None
    """The same over lists without an instruction."""
    ndcg_by_kind: Mapping[LaneKind, Estimate]
    """The same by kind of instruction, where rows say it."""
    flip_accuracy: Estimate | None
    """Over all (document, two instructions) whose targets differ by `min_gap`, the share whose
    scores differ in the right direction; a tie is wrong."""
    neutral_drift: Estimate | None
    """Mean `|score with a neutral instruction - score without|`; smaller is better."""
    ece: Estimate | None
    """Expected calibration error against grade 2 and above."""
    brier: Estimate | None
    """Brier score against grade 2 and above."""

    def rows_of_estimates(self) -> list[tuple[str, Estimate]]:
        """Every estimate there is with its name, for tables."""
        named = [(f"ndcg/{kind}", value) for kind, value in self.ndcg_by_kind.items()]
        return [*named_estimates(self), *named]


def measure_development(
    groups: Sequence[Group], scores: Sequence[FloatArray], *, calibration: bool = True
) -> DevelopmentReport:
    """Measure scores of development groups.

    Args:
        groups: At least one, not divided into parts.
        scores: For each group one score in [0, 1] for each of its rows.
        calibration: Whether to give ECE and Brier score; the interval of the ECE takes longest.
    """
    finite = [np.where(np.isfinite(part), part, np.nan) for part in scores]
    lists: list[tuple[int, Row, list[int], list[float]]] = []
    for number, (group, part) in enumerate(zip(groups, finite, strict=True)):
        for places in group.lists:
            listed = [group.rows[place] for place in places]
            lists.append((number, listed[0], _grades(listed).tolist(), part[[*places]].tolist()))
    values = ndcg([grades for _, _, grades, _ in lists], [given for *_, given in lists])

    def mean(chosen: Callable[[Row], bool]) -> Estimate | None:
        return estimate_mean(
            (number, value)
            for (number, row, _, _), value in zip(lists, values, strict=True)
            if chosen(row)
        )

    pairs = JudgedPairs.join(
        # The kind is not looked at: these measures are pooled.
        (number, "none", part, _grades(group.rows))
        for number, (group, part) in enumerate(zip(groups, finite, strict=True))
    )
    calibration = calibration and pairs.are_probabilities
    return DevelopmentReport(
        interval=describe_interval("queries"),
        queries=len(groups),
        rows=sum(len(group.rows) for group in groups),
        non_finite=sum(int(np.isnan(part).sum()) for part in finite),
        ndcg=mean(lambda row: True),
        ndcg_instructed=mean(lambda row: bool(row.instruction) and row.kind != "neutral"),
        ndcg_plain=mean(lambda row: not row.instruction),
        ndcg_by_kind={
            kind: value
            for kind in LANE_KINDS
            if (value := mean(lambda row, kind=kind: row.kind == kind)) is not None  # type: ignore[misc]  # mypy knows no lambda with a default
        },
        flip_accuracy=estimate_mean(_flips(groups, finite)),
        neutral_drift=estimate_mean(
            (number, abs(part[a] - part[b]))
            for number, (group, part) in enumerate(zip(groups, finite, strict=True))
            for a, b in group.consistency
        ),
        ece=pairs.calibration_error() if calibration else None,
        brier=pairs.brier() if calibration else None,
    )


def score_group(scorer: Scorer, group: Group) -> FloatArray:
    """The scores of a group's rows by a scorer; one without instruction channel reads them first.

    One request for each instruction, as in use.
    """
    values = np.full(len(group.rows), np.nan)
    under: dict[str, list[int]] = {}
    for place, row in enumerate(group.rows):
        under.setdefault(row.instruction, []).append(place)
    for instruction, places in under.items():
        first = group.rows[places[0]]
        channel = scorer.supports_instructions or not instruction
        request = RerankRequest(
            query=first.query if channel else f"{instruction} {first.query}",
            instruction=instruction if channel else "",
            candidates=tuple(group.rows[place].candidate for place in places),
        )
        values[places] = scorer.score(request).values
    return values


def judged(groups: Sequence[Group], scores: Sequence[FloatArray]) -> tuple[FloatArray, IntArray]:
    """Finite scores, and for each whether its row is relevant, for a calibrator."""
    values = np.concatenate(list(scores))
    labels = np.concatenate([_grades(group.rows) >= 2 for group in groups]).astype(np.int64)
    kept = np.isfinite(values)
    return values[kept], labels[kept]


def _grades(rows: Sequence[Row]) -> IntArray:
    return np.rint([HIGHEST_GRADE * row.target for row in rows]).astype(np.int64)


def _flips(groups: Sequence[Group], scores: Sequence[FloatArray]) -> list[tuple[int, FloatArray]]:
    flips = []
    for number, (group, part) in enumerate(zip(groups, scores, strict=True)):
        if group.vertical:
            first, second = map(list, zip(*group.vertical, strict=True))
            targets = np.array([row.target for row in group.rows])
            right = flip_outcomes(targets[first], targets[second], part[first], part[second])
            flips.append((number, right.astype(float)))
    return flips
