"""How a model does on quadruples: the measures of a training run, and of held-out rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date

import numpy as np
from pydantic import BaseModel, ConfigDict

from lanerank.context import use_instruction
from lanerank.contracts import Document
from lanerank.display import fragment, table
from lanerank.errors import InputError, ScorerError
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
from lanerank.evaluation.scoring import SupportsScore
from lanerank.evaluation.sections import headings, row, words
from lanerank.instruction import Instruction
from lanerank.training.groups import Group, Row, make_groups
from lanerank.training.quadruples import Quadruple, group_by_query

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
    """Expected calibration error against grade 2 and above; `None` also where a score lies outside
    [0, 1] and therefore is no probability."""
    brier: Estimate | None
    """Brier score against grade 2 and above; `None` as for `ece`."""

    def rows_of_estimates(self) -> list[tuple[str, Estimate]]:
        """Every estimate there is with its name, for tables."""
        named = [(f"ndcg/{kind}", value) for kind, value in self.ndcg_by_kind.items()]
        return [*named_estimates(self), *named]

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        return fragment(
            table(
                headings(("measure", "value", "n")),
                [row(name, value, str(value.n)) for name, value in self.rows_of_estimates()],
            ),
            words(f"{self.rows} rows of {self.queries} queries. Intervals: {self.interval}."),
        )


def measure_development(
    reranker: SupportsScore,
    rows: Iterable[Quadruple],
    *,
    min_gap: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> DevelopmentReport:
    """Measure a reranker on quadruples, as a training run measures on its development data.

    `train` reports its model without calibration; here a model is measured as it was loaded.

    Args:
        reranker: What to measure, such as a `Reranker`. It is asked once for each query and
            instruction, with the `attributes` and the `today` of the rows.
        rows: At least one. For a fair figure neither training nor its `dev` has seen their queries.
        min_gap: The least difference of two targets that counts as a flip; the default is that of
            `TrainingConfig.min_gap`.
        progress: Called after each query with the number done and the number in all.

    Raises:
        InputError: An argument is not usable.
        InstructionNotSupportedError: As for `Reranker.score`.
        ScorerError: The reranker does not return one score for each document.
    """
    if not 0 < min_gap < 1:
        raise InputError(f"`min_gap` must be above 0 and below 1, got {min_gap!r}")
    rows = list(rows)
    if not rows:
        raise InputError("`rows` is empty; give at least one, for example from read_quadruples")
    groups = make_groups(rows, min_gap=min_gap)
    return measure_groups(groups, score_rows(reranker, rows, progress=progress))


def measure_groups(
    groups: Sequence[Group], scores: Sequence[FloatArray], *, calibration: bool = True
) -> DevelopmentReport:
    """Measure scores that are there already.

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


def score_rows(
    reranker: SupportsScore,
    rows: Iterable[Quadruple],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[FloatArray]:
    """For each group of `make_groups` the scores of its rows, by a reranker as it is used.

    Args:
        reranker: The model.
        rows: Of which `make_groups` made the groups, without dividing them.
        progress: As for `measure_development`.
    """
    groups = group_by_query(rows)
    scores = []
    for members in groups.values():
        scores.append(_score_group(reranker, members))
        if progress is not None:
            progress(len(scores), len(groups))
    return scores


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


_Request = tuple[str, str | None, date | None, tuple[str, ...]]


def _score_group(reranker: SupportsScore, members: Sequence[Quadruple]) -> FloatArray:
    places: dict[_Request, list[int]] = defaultdict(list)
    for place, member in enumerate(members):
        places[member.query, member.instruction, member.today, member.attributes].append(place)
    values = np.full(len(members), np.nan)
    for (query, text, today, attributes), chosen in places.items():
        # Without this, "no instruction" would mean that of a scope around the measurement.
        with use_instruction(None):
            given = reranker.score(
                query,
                [Document(members[i].document, metadata=members[i].metadata) for i in chosen],
                instruction=None if text is None else Instruction(text, today=today),
                attributes=attributes,
            )
        if len(given) != len(chosen):
            raise ScorerError(
                f"{reranker.scorer.name!r} returned {len(given)} scores for {len(chosen)} "
                f"documents of the query {query[:60]!r}; expected one for each, in input order"
            )
        values[chosen] = given
    return values
