"""Whether a reranker follows instructions: the field's measures, and how wording changes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict
from scipy import stats

from lanerank.display import fragment
from lanerank.errors import InputError
from lanerank.evaluation.measures import (
    CONFIDENCE,
    SEED,
    BoolArray,
    Estimate,
    FloatArray,
    IntArray,
    describe_interval,
    estimate_mean,
    flip_outcomes,
    ndcg,
    p_mrr,
    rank_by_score,
    sicr,
    wise,
)
from lanerank.evaluation.scenarios import INSTRUCTED_KINDS, RELEVANT_GRADE, LaneKind, Scenario
from lanerank.evaluation.scoring import SupportsScore, score_scenario
from lanerank.evaluation.sections import following_section
from lanerank.evaluation.wordings import CONDITIONS, Condition, Wording, Wordings
from lanerank.instruction import Instruction

RANDOM_SCORERS = 20


class FollowingMeasure(BaseModel):
    """A measure of the model, with what noise and knowledge of the grades give on the same data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Estimate
    """The value and its interval, scenarios drawn whole."""
    random: Estimate
    """The noise floor: the mean over `n` scorers of random scores, and the range in which 95% of
    such scorers fall, beyond the measure's own range where scenarios are few. A model whose value
    lies in it has not been shown to follow."""
    oracle: Estimate
    """The value of a scorer that returns the grades, ties in input order: a ceiling that the data
    and not the model sets. For the negated instruction it returns the reversed grades."""


class ConditionReport(BaseModel):
    """How instructed lanes are ranked when something stands in the place of their instruction.

    Means are over lanes of the `INSTRUCTED_KINDS`, and where a condition has several wordings over
    all of them. The grades are always the lane's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ndcg: Estimate | None
    """Mean nDCG@10; `n` counts lanes times wordings."""
    lift: Estimate | None
    """Mean of `ndcg` less that of `withheld`, lane by lane; `None` for `withheld` itself."""
    change: Estimate | None
    """Mean of `ndcg` less that of `matched`, lane by lane; `None` for `matched` itself."""
    drift: Estimate | None
    """Mean `|score - score in the condition that should score alike|`, each document once for each
    lane and wording: `matched` for `long` and `paraphrased`, `withheld` for `irrelevant`, and
    `None` for the others. Smaller is better."""
    ndcg_by_wording: Mapping[str, Estimate]
    """The nDCG of each wording, where the condition has several."""


class FollowingReport(BaseModel):
    """What `measure_following` found. A measure is `None` where there was nothing to measure.

    The measures come from benchmarks in which relevance is yes or no and each query has an
    instruction and its reverse. Scenarios have graded lanes, so each field says what stands for
    what. A document is relevant in a lane from grade 2 on; an *instructed* lane is one of the
    `INSTRUCTED_KINDS`; `none` is the lane of kind `none`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """The scorer's name."""
    interval: str
    """How the bounds of estimates were made."""
    noise: str
    """How the value and bounds of `FollowingMeasure.random` were made."""

    scenarios: int
    lanes: int
    """The number of instructed lanes."""
    lanes_without_relevant: int
    """Instructed lanes in which every grade is 0. They have no nDCG and are left out of it."""
    requests: int
    """The calls of the reranker. None was made twice for the same scenario and instruction."""
    non_finite: int
    """Scores that were NaN or infinite. They sort last, and are wrong where scores are compared."""

    flip_accuracy: FollowingMeasure | None
    """As in `EvaluationReport`: over all (document, lane A, lane B) with different grades, the
    share whose scores differ in the right direction. A scorer that ignores instructions has 0, a
    random one 0.5."""
    p_mrr: FollowingMeasure | None
    """The p-MRR over ordered pairs of instructed lanes (A, B), A original and B changed. The
    documents are those relevant in A and not in B. `n` counts pairs, each the mean over its
    documents, as FollowIR does with queries. There the changed instruction narrows the original
    one; here it may replace it."""
    p_mrr_from_none: FollowingMeasure | None
    """The same with `none` as A, so that the original has no instruction. Closest to FollowIR,
    since what the query alone asks for is narrowed."""
    sicr: FollowingMeasure | None
    """The SICR with `none` as the original run, an instructed lane A as the instructed and another,
    B, as the reversed one; `n` counts ordered pairs (A, B), each the mean over its gold documents.
    Gold are the documents relevant in `none` and in A, and not in B: as in InfoSearch, they fit the
    query and what the instruction adds. There the reversed run negates the instruction of A; here B
    is another instruction, because its grades are known. Documents that have the highest grade in
    `none` already need not rise, but SICR demands it: see `oracle`."""
    wise: FollowingMeasure | None
    """The WISE over the same pairs and gold documents. The candidates are the documents relevant in
    `none`."""
    robustness: FollowingMeasure | None
    """Robustness@10: the worst nDCG@10 among the matched instruction and its paraphrases, averaged
    over instructed lanes. The random scorer draws afresh for each wording."""
    negation_accuracy: FollowingMeasure | None
    """Over pairs of documents that are both relevant in `none`, one relevant in an instructed lane
    and one not: the share in which the first scores higher under the instruction and lower under
    the negated one. Scored pairwise as in NevIR (Weller et al., EACL 2024); a scorer deaf to the
    negation has 0, a random one 0.25."""
    negation_lift: Estimate | None
    """By how much the negated instruction improves on asking without one, as nDCG@10 with the
    lane's grades reversed: those of `none` for documents not relevant in the lane, 0 for the
    others. This is the reversed mode of InfoSearch."""
    conditions: Mapping[Condition, ConditionReport]
    """By condition, for those that were run."""

    def measures(self) -> list[tuple[str, FollowingMeasure]]:
        """The measures there are that have a noise floor and a ceiling, with their names."""
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return [(name, value) for name, value in fields if isinstance(value, FollowingMeasure)]

    def _repr_html_(self) -> str:
        """Pictures and tables, for notebooks."""
        return fragment(*following_section(self))

    def rows(self) -> list[tuple[str, Estimate]]:
        """Every estimate there is with its name, for tables: `p_mrr/random`, `long/ndcg`."""
        return _named_estimates(self, "")


def measure_following(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    conditions: Collection[Condition] = CONDITIONS,
    paraphrases: Mapping[str, Sequence[str]] | None = None,
    negations: Mapping[str, str] | None = None,
    seed: int = SEED,
    progress: Callable[[int, int], None] | None = None,
) -> FollowingReport:
    """Measure how rankings and scores follow instructions, and what their wording does to that.

    The conditions, and what should happen to a lane's nDCG:

    - `withheld` and `matched`, always run: without an instruction, and with the lane's own.
    - `irrelevant`: the instruction of a scenario of another domain, one for each scenario, drawn
      by `seed`. It says nothing about these documents, so scores should be those of `withheld`.
      Without another domain there is nothing to measure.
    - `negated`: "Leave out every document that fits the following, and keep the rest: ..." with
      the instruction after the colon. nDCG should fall below `withheld`. The rule fits any text,
      but is clumsy for some, and a double negation for one that excludes something itself;
      `negations` takes better ones.
    - `long`: some 400 tokens of notices about nothing, after the instruction (`rule_first`) and
      before it (`rule_last`). Nothing should change. Texts are bounded by characters, so that a
      model that reads 512 tokens can take them; an instruction without room is left out.
    - `paraphrased`: four phrases put before or after the instruction, and its sentences in another
      order if it has several, which may tear a pronoun from what it means. Nothing should change.

    With all of them a scenario takes 2 requests and 8 or 9 for each instructed lane, each of all
    its documents.

    Args:
        reranker: What to measure. It is asked with the attributes and the `today` of the scenario.
        scenarios: At least one, for instance from `read_scenarios`.
        conditions: Those to run besides `withheld` and `matched`; all by default.
        paraphrases: For the text of an instruction, further texts of the same meaning.
        negations: For the text of an instruction, the text to use as its opposite.
        seed: Decides the irrelevant instructions and the random scorers.
        progress: Called after each scenario with the number done and the number in all.

    Returns:
        The report. It depends on the scores and the seed alone.

    Raises:
        InputError: If there are no scenarios, a condition is not known, or texts are given that
            would not be used.
        ScorerError: If the reranker does not return one score for each document.
    """
    if not scenarios:
        raise InputError("`scenarios` is empty; give at least one, for example from read_scenarios")
    if type(seed) is not int or seed < 0:
        raise InputError(f"`seed` must be an integer from 0, got {seed!r}")
    wording = Wording(scenarios, conditions, paraphrases or {}, negations or {}, seed)
    cases = [_Case(number, scenario, wording) for number, scenario in enumerate(scenarios)]
    tables: list[_Table] = []
    for case in cases:
        tables.append(_ask(reranker, case))
        if progress:
            progress(len(tables), len(cases))
    asked = _looked_up(tables)
    rng = np.random.default_rng(seed)
    noise = [_looked_up(_random_tables(tables, rng)) for _ in range(RANDOM_SCORERS)]

    def place(terms: _Terms) -> FollowingMeasure | None:
        return _place(terms, cases, asked, noise)

    instructed = [lane for case in cases for lane in case.instructed]
    observed = [entry for case in cases for entry in _observe(case, asked)]
    return FollowingReport(
        model=reranker.scorer.name,
        interval=describe_interval(),
        noise=f"mean and {CONFIDENCE:.0%} prediction interval of {RANDOM_SCORERS} random scorers, "
        f"seed {seed}",
        scenarios=len(cases),
        lanes=len(instructed),
        lanes_without_relevant=sum(not lane.grades.any() for lane in instructed),
        requests=sum(len(table) for table in tables),
        non_finite=sum(int(np.isnan(run).sum()) for table in tables for run in table.values()),
        flip_accuracy=place(_flip_terms),
        p_mrr=place(_p_mrr_terms),
        p_mrr_from_none=place(_p_mrr_from_none_terms),
        sicr=place(_sicr_terms),
        wise=place(_wise_terms),
        robustness=place(_robustness_terms),
        negation_accuracy=place(_negation_terms),
        negation_lift=estimate_mean(
            (case.number, value) for case in cases for value in _negation_lifts(case, asked)
        ),
        conditions={
            condition: _report(condition, [e for e in observed if e.condition == condition])
            for condition in wording.conditions
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    """A lane with the texts that it is scored under."""

    kind: LaneKind
    text: str | None
    grades: IntArray
    reversed_grades: IntArray
    """The grades under the opposite instruction: those of lane `none` for what this one excludes;
    all 0 where there is no lane `none`."""
    texts: Wordings

    @property
    def relevant(self) -> BoolArray:
        return self.grades >= RELEVANT_GRADE

    @property
    def negated(self) -> str | None:
        return self.texts.get(("negated", ""))


class _Case:
    """A scenario, ready to be scored."""

    def __init__(self, number: int, scenario: Scenario, wording: Wording) -> None:
        self.number = number
        self.scenario = scenario
        foreign = wording.foreign(scenario.domain)
        plain = next((lane.grades for lane in scenario.lanes if lane.kind == "none"), {})
        ids = [document.id for document in scenario.documents]
        self.lanes = tuple(
            _Lane(
                kind=lane.kind,
                text=lane.instruction,
                grades=np.array([lane.grades[id_] for id_ in ids]),
                reversed_grades=np.array(
                    [plain.get(id_, 0) * (lane.grades[id_] < RELEVANT_GRADE) for id_ in ids]
                ),
                texts=wording.of(lane.instruction, foreign)
                if lane.instruction and lane.kind in INSTRUCTED_KINDS
                else {("matched", ""): lane.instruction},
            )
            for lane in scenario.lanes
        )
        self.none = next((lane for lane in self.lanes if lane.kind == "none"), None)
        self.instructed = [lane for lane in self.lanes if lane.kind in INSTRUCTED_KINDS]


_Table = dict[str | None, FloatArray]
"""The scores of a scenario's documents by the text they were asked under."""
_Answer = Callable[[_Case, _Lane, str | None], FloatArray]
"""The scores of one scorer, for a lane of a scenario under a text."""
_Terms = Callable[[_Case, _Answer], Iterator[ArrayLike]]
"""The values of a measure in one scenario, whose mean over scenarios is the measure."""


def _ask(reranker: SupportsScore, case: _Case) -> _Table:
    texts = [text for lane in case.lanes for text in lane.texts.values()]
    return {
        text: score_scenario(
            reranker,
            case.scenario,
            None if text is None else Instruction(text, today=case.scenario.today),
        )
        for text in dict.fromkeys(texts)
    }


def _random_tables(tables: Iterable[_Table], rng: np.random.Generator) -> list[_Table]:
    return [{text: rng.random(run.size) for text, run in table.items()} for table in tables]


def _looked_up(tables: Sequence[_Table]) -> _Answer:
    return lambda case, lane, text: tables[case.number][text]


def _oracle(case: _Case, lane: _Lane, text: str | None) -> FloatArray:
    negated = text is not None and text == lane.negated
    return (lane.reversed_grades if negated else lane.grades).astype(float)


def _place(
    terms: _Terms, cases: Sequence[_Case], asked: _Answer, noise: Sequence[_Answer]
) -> FollowingMeasure | None:
    """A measure of the model between its floor and its ceiling."""

    def collect(answer: _Answer) -> list[tuple[int, ArrayLike]]:
        return [(case.number, value) for case in cases for value in terms(case, answer)]

    model, oracle = estimate_mean(collect(asked)), estimate_mean(collect(_oracle))
    if model is None or oracle is None:
        return None
    drawn = np.array([np.nanmean(np.hstack([v for _, v in collect(one)])) for one in noise])
    mean = float(drawn.mean())
    # Where one further random scorer would fall: wider than the interval of their mean.
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, drawn.size - 1)
    half = float(quantile * drawn.std(ddof=1) * np.sqrt(1 + 1 / drawn.size))
    random = Estimate(value=mean, low=mean - half, high=mean + half, n=drawn.size)
    return FollowingMeasure(model=model, random=random, oracle=oracle)


def _flip_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for a, b in combinations(case.lanes, 2):
        yield flip_outcomes(a.grades, b.grades, answer(case, a, a.text), answer(case, b, b.text))


def _p_mrr_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    return _falls(case, permutations(case.instructed, 2), answer)


def _p_mrr_from_none_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    return _falls(case, ((case.none, lane) for lane in case.instructed if case.none), answer)


def _falls(
    case: _Case, pairs: Iterable[tuple[_Lane, _Lane]], answer: _Answer
) -> Iterator[ArrayLike]:
    for original, changed in pairs:
        lost = original.relevant & ~changed.relevant
        if lost.any():
            before, after = (
                rank_by_score(answer(case, lane, lane.text))[lost] for lane in (original, changed)
            )
            yield p_mrr(before, after)


def _reversals(case: _Case, answer: _Answer) -> Iterator[tuple[list[FloatArray], BoolArray, int]]:
    """Scores in the original, instructed and reversed run, the gold documents, the candidates."""
    if case.none is None:
        return
    for lane, other in permutations(case.instructed, 2):
        gold = case.none.relevant & lane.relevant & ~other.relevant
        if gold.any():
            runs = [answer(case, one, one.text) for one in (case.none, lane, other)]
            yield runs, gold, int(case.none.relevant.sum())


def _sicr_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for (original, instructed, reversed_), gold, _ in _reversals(case, answer):
        yield sicr(original, instructed, reversed_, gold)


def _wise_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for runs, gold, candidates in _reversals(case, answer):
        original, instructed, reversed_ = (rank_by_score(run)[gold] for run in runs)
        yield wise(original, instructed, reversed_, candidates=candidates)


def _robustness_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for lane in case.instructed:
        reworded = [
            text for (condition, _), text in lane.texts.items() if condition == "paraphrased"
        ]
        if reworded:
            runs = [answer(case, lane, text) for text in (lane.text, *reworded)]
            yield _ndcg_of_each(lane.grades, runs).min()


def _negation_terms(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for lane in case.instructed:
        if case.none and lane.negated:
            kept = case.none.relevant & lane.relevant
            excluded = case.none.relevant & ~lane.relevant
            matched, negated = (answer(case, lane, text) for text in (lane.text, lane.negated))
            right = matched[kept, None] > matched[excluded]
            yield (right & (negated[kept, None] < negated[excluded])).ravel()


def _negation_lifts(case: _Case, answer: _Answer) -> Iterator[ArrayLike]:
    for lane in case.instructed:
        if lane.negated:
            runs = [answer(case, lane, text) for text in (lane.negated, None)]
            negated, withheld = _ndcg_of_each(lane.reversed_grades, runs)
            yield negated - withheld


def _ndcg_of_each(grades: IntArray, runs: Sequence[FloatArray]) -> FloatArray:
    return ndcg([grades.tolist()] * len(runs), [run.tolist() for run in runs])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observation:
    """A lane under one text, compared with the first two: withheld and matched."""

    scenario: int
    condition: Condition
    wording: str
    ndcg: float
    lift: float
    change: float
    drift: FloatArray


def _observe(case: _Case, answer: _Answer) -> Iterator[_Observation]:
    for lane in case.instructed:
        runs = [answer(case, lane, text) for text in lane.texts.values()]
        values = _ndcg_of_each(lane.grades, runs)
        for (condition, wording), value, run in zip(lane.texts, values, runs, strict=True):
            alike = runs[0] if condition == "irrelevant" else runs[1]
            yield _Observation(
                scenario=case.number,
                condition=condition,
                wording=wording,
                ndcg=float(value),
                lift=float(value - values[0]),
                change=float(value - values[1]),
                drift=np.abs(run - alike),
            )


def _report(condition: Condition, observed: Sequence[_Observation]) -> ConditionReport:
    names = dict.fromkeys(entry.wording for entry in observed)
    by_wording = {
        name: estimate_mean((e.scenario, e.ndcg) for e in observed if e.wording == name)
        for name in names
        if name
    }
    changes_nothing = condition in ("irrelevant", "long", "paraphrased")
    return ConditionReport(
        ndcg=estimate_mean((e.scenario, e.ndcg) for e in observed),
        lift=estimate_mean((e.scenario, e.lift) for e in observed if condition != "withheld"),
        change=estimate_mean((e.scenario, e.change) for e in observed if condition != "matched"),
        drift=estimate_mean((e.scenario, e.drift) for e in observed if changes_nothing),
        ndcg_by_wording={name: value for name, value in by_wording.items() if value},
    )


def _named_estimates(report: BaseModel, prefix: str) -> list[tuple[str, Estimate]]:
    rows: list[tuple[str, Estimate]] = []
    for name in type(report).model_fields:
        value = getattr(report, name)
        parts = value if isinstance(value, Mapping) else {"": value}
        for key, part in parts.items():
            label = prefix + (key or name)
            if isinstance(part, Estimate):
                rows.append((label, part))
            elif isinstance(part, BaseModel):
                rows += _named_estimates(part, f"{label}/")
    return rows
