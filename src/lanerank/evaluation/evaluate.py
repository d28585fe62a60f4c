"""Measure how well a reranker follows instructions, on scenarios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
from pydantic import BaseModel, ConfigDict

from lanerank.contracts import Document
from lanerank.errors import InputError
from lanerank.evaluation.calibration import JudgedPairs, named_estimates
from lanerank.evaluation.measures import (
    BoolArray,
    Estimate,
    FloatArray,
    IntArray,
    describe_interval,
    estimate_mean,
    flip_outcomes,
    ndcg,
)
from lanerank.evaluation.scenarios import (
    INSTRUCTED_KINDS,
    LANE_KINDS,
    LaneKind,
    Scenario,
)
from lanerank.evaluation.scoring import SupportsScore, score_scenario
from lanerank.instruction import Instruction


class KindReport(BaseModel):
    """The measures of one kind of lane; `None` where nothing could be measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanes: int
    """The number of lanes of this kind."""
    ndcg: Estimate | None
    """Mean nDCG@10."""
    ndcg_withheld: Estimate | None
    """The same lanes scored without their instruction; `None` for kind `none`."""
    lift: Estimate | None
    """Mean of `ndcg - ndcg_withheld` over lanes; `None` for kind `none`."""
    flip_accuracy: Estimate | None
    """Over pairs of lanes of which at least one is of this kind."""
    ece: Estimate | None
    """Expected calibration error against grade 2 and above."""
    brier: Estimate | None
    """Brier score against grade 2 and above."""


class EvaluationReport(BaseModel):
    """What `evaluate` found. A measure is `None` where the scenarios gave nothing to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """The scorer's name."""
    interval: str
    """How the bounds of every estimate were made."""

    scenarios: int
    documents: int
    """The number of documents, each counted once."""
    lanes: int
    pairs: int
    """The number of graded (lane, document) pairs."""
    lanes_without_relevant: int
    """Lanes in which every grade is 0. They have no nDCG and are left out of it and of the lift."""
    non_finite: int
    """Pairs whose score was NaN or infinite. They sort last, count as wrong in flips, and are left
    out of drift, calibration and attack."""

    ndcg_instructed: Estimate | None
    """Mean nDCG@10 (gain `2^grade - 1`) over lanes of every kind but `none` and `neutral`."""
    ndcg_withheld: Estimate | None
    """The same lanes and grades, scored without the instruction."""
    lift: Estimate | None
    """Mean of `ndcg_instructed - ndcg_withheld`, lane by lane."""
    ndcg_none: Estimate | None
    """Mean nDCG@10 over lanes of kind `none`."""
    ndcg_neutral: Estimate | None
    """Mean nDCG@10 over lanes of kind `neutral`, scored with the neutral instruction."""
    neutral_drift: Estimate | None
    """Mean `|score with the neutral instruction - score without|`; smaller is better."""
    flip_accuracy: Estimate | None
    """Over all (document, lane A, lane B) of a scenario with different grades, the share whose
    scores differ in the right direction; a tie is wrong. Lanes of every kind take part."""
    flip_accuracy_instructed: Estimate | None
    """The same over pairs of lanes that are neither `none` nor `neutral`."""
    ece: Estimate | None
    """Expected calibration error of all pairs against grade 2 and above; `None` also where a score
    lies outside [0, 1] and therefore is no probability."""
    brier: Estimate | None
    """Brier score of all pairs against grade 2 and above; `None` as for `ece`."""
    attack: Estimate | None
    """Mean of `score - score without the injected text` over injected documents for which the
    scenario gives that text, in every lane; above 0 the injection pays."""
    by_kind: Mapping[LaneKind, KindReport]
    """The same by kind of lane, for the kinds that occur."""

    def rows(self) -> list[tuple[str, Estimate]]:
        """Every estimate there is with its name, for tables: `flip_accuracy`, `recency/ndcg`."""
        rows = named_estimates(self)
        for kind, report in self.by_kind.items():
            rows += named_estimates(report, f"{kind}/")
        return rows


def evaluate(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Score every scenario under each of its instructions and without, and measure the outcome.

    The reranker is called once for each different instruction of a scenario and once without, with
    the documents in file order and all their metadata fields as attributes. A document's
    `text_without_injection` is scored in the same call, as a further document. The scenario's
    `today` travels with the instruction; without an instruction no date is given.

    Args:
        reranker: What to measure.
        scenarios: At least one, for instance from `read_scenarios`.
        progress: Called after each scenario with the number done and the number in all.

    Returns:
        The report. It depends on the scores alone: the intervals are drawn with a fixed seed.

    Raises:
        InputError: If there are no scenarios.
        ScorerError: If the reranker does not return one score for each document.
    """
    if not scenarios:
        raise InputError("`scenarios` is empty; give at least one, for example from read_scenarios")
    lanes: list[_ScoredLane] = []
    for number, scenario in enumerate(scenarios):
        lanes += _score_lanes(reranker, number, scenario)
        if progress:
            progress(number + 1, len(scenarios))
    flips, pairs = _flips(lanes), _judged(lanes)
    instructed = [lane for lane in lanes if lane.kind in INSTRUCTED_KINDS]
    neutral = [lane for lane in lanes if lane.kind == "neutral"]
    return EvaluationReport(
        model=reranker.scorer.name,
        interval=describe_interval(),
        scenarios=len(scenarios),
        documents=sum(len(scenario.documents) for scenario in scenarios),
        lanes=len(lanes),
        pairs=sum(lane.grades.size for lane in lanes),
        lanes_without_relevant=sum(not lane.grades.any() for lane in lanes),
        non_finite=sum(int(np.isnan(lane.scores).sum()) for lane in lanes),
        ndcg_instructed=estimate_mean((lane.scenario, lane.ndcg) for lane in instructed),
        ndcg_withheld=estimate_mean((lane.scenario, lane.ndcg_withheld) for lane in instructed),
        lift=estimate_mean((lane.scenario, lane.lift) for lane in instructed),
        ndcg_none=estimate_mean(
            (lane.scenario, lane.ndcg) for lane in lanes if lane.kind == "none"
        ),
        ndcg_neutral=estimate_mean((lane.scenario, lane.ndcg) for lane in neutral),
        neutral_drift=estimate_mean((lane.scenario, lane.drift) for lane in neutral),
        flip_accuracy=estimate_mean((flip.scenario, flip.right) for flip in flips),
        flip_accuracy_instructed=estimate_mean(
            (flip.scenario, flip.right) for flip in flips if flip.kinds <= set(INSTRUCTED_KINDS)
        ),
        ece=pairs and pairs.calibration_error(),
        brier=pairs and pairs.brier(),
        attack=estimate_mean((lane.scenario, lane.shifts) for lane in lanes),
        by_kind={
            kind: _report_kind(kind, lanes, flips)
            for kind in LANE_KINDS
            if any(lane.kind == kind for lane in lanes)
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoredLane:
    """A lane with its scores. NaN stands for what has no value and is left out of means."""

    scenario: int
    kind: LaneKind
    grades: IntArray
    scores: FloatArray
    """NaN where the model's score was not finite."""
    withheld: FloatArray
    """The scores of the same documents without the instruction."""
    shifts: FloatArray
    """What the injected text adds to the score, for the documents where that is known."""
    ndcg: float
    ndcg_withheld: float

    @property
    def lift(self) -> float:
        return self.ndcg - self.ndcg_withheld

    @property
    def drift(self) -> FloatArray:
        return np.abs(self.scores - self.withheld)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flips:
    """The documents whose grade differs between two lanes of a scenario."""

    scenario: int
    kinds: frozenset[LaneKind]
    right: BoolArray


def _score_lanes(reranker: SupportsScore, number: int, scenario: Scenario) -> list[_ScoredLane]:
    texts = dict.fromkeys([None, *(lane.instruction for lane in scenario.lanes)])
    answers = {text: _score(reranker, scenario, text) for text in texts}
    grades = [[lane.grades[doc.id] for doc in scenario.documents] for lane in scenario.lanes]
    scores = [answers[lane.instruction][0] for lane in scenario.lanes]
    withheld = answers[None][0]
    instructed_ndcg = ndcg(grades, [values.tolist() for values in scores])
    withheld_ndcg = ndcg(grades, [withheld.tolist()] * len(grades))
    return [
        _ScoredLane(
            scenario=number,
            kind=lane.kind,
            grades=np.array(grades[position], dtype=np.int64),
            scores=scores[position],
            withheld=withheld,
            shifts=answers[lane.instruction][1],
            ndcg=float(instructed_ndcg[position]),
            ndcg_withheld=float(withheld_ndcg[position]),
        )
        for position, lane in enumerate(scenario.lanes)
    ]


def _score(
    reranker: SupportsScore, scenario: Scenario, text: str | None
) -> tuple[FloatArray, FloatArray]:
    """The scores under one instruction, and by how much injected texts moved them."""
    documents = scenario.documents
    attacked = [i for i, doc in enumerate(documents) if doc.text_without_injection is not None]
    contents = [(doc, doc.text) for doc in documents]
    contents += [(documents[i], documents[i].text_without_injection or "") for i in attacked]
    scores = score_scenario(
        reranker,
        scenario,
        None if text is None else Instruction(text, today=scenario.today),
        [Document(content, metadata=doc.metadata, id=doc.id) for doc, content in contents],
    )
    return scores[: len(documents)], scores[attacked] - scores[len(documents) :]


def _flips(lanes: Sequence[_ScoredLane]) -> list[_Flips]:
    """Every two lanes of the same scenario, compared."""
    return [
        _Flips(
            scenario=number,
            kinds=frozenset({a.kind, b.kind}),
            right=flip_outcomes(a.grades, b.grades, a.scores, b.scores),
        )
        for number, members in groupby(lanes, key=lambda lane: lane.scenario)
        for a, b in combinations(members, 2)
    ]


def _report_kind(
    kind: LaneKind, lanes: Sequence[_ScoredLane], flips: Sequence[_Flips]
) -> KindReport:
    chosen = [lane for lane in lanes if lane.kind == kind]
    with_instruction = chosen if kind != "none" else []
    pairs = _judged(chosen)
    return KindReport(
        lanes=len(chosen),
        ndcg=estimate_mean((lane.scenario, lane.ndcg) for lane in chosen),
        ndcg_withheld=estimate_mean(
            (lane.scenario, lane.ndcg_withheld) for lane in with_instruction
        ),
        lift=estimate_mean((lane.scenario, lane.lift) for lane in with_instruction),
        flip_accuracy=estimate_mean(
            (flip.scenario, flip.right) for flip in flips if kind in flip.kinds
        ),
        ece=pairs and pairs.calibration_error(),
        brier=pairs and pairs.brier(),
    )


def _judged(lanes: Sequence[_ScoredLane]) -> JudgedPairs | None:
    """The pairs of lanes, where their scores are probabilities."""
    pairs = JudgedPairs.join((lane.scenario, lane.kind, lane.scores, lane.grades) for lane in lanes)
    return pairs if pairs.are_probabilities else None
