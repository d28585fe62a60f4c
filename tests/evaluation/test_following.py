import hashlib
import json
import math
from datetime import date
from itertools import pairwise

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import Reranker
from lanerank.contracts import order_by_score
from lanerank.errors import InputError, ScorerError
from lanerank.evaluation import Scenario, evaluate, ndcg
from lanerank.evaluation.following import FollowingMeasure, FollowingReport, measure_following
from lanerank.evaluation.measures import p_mrr, rank_by_score, robustness, sicr, wise
from lanerank.evaluation.wordings import CONDITIONS
from lanerank.testing import OverlapScorer

MEASURES = [
    name
    for name, field in FollowingReport.model_fields.items()
    if field.annotation == FollowingMeasure | None
]
RANKS = st.integers(1, 200)


class TestRankByScore:
    def test_by_hand(self):
        assert rank_by_score([0.2, 0.9, 0.5]).tolist() == [3, 1, 2]

    def test_ties_keep_input_order_and_what_is_not_finite_is_last(self):
        assert rank_by_score([0.5, math.nan, 0.5, math.inf, 0.7]).tolist() == [2, 4, 3, 5, 1]

    @given(st.lists(st.sampled_from([0.0, 0.25, 0.5, math.nan, -math.inf])))
    def test_is_the_order_that_a_user_sees(self, scores):
        assert np.argsort(rank_by_score(scores)).tolist() == order_by_score(tuple(scores))


def reciprocal_rank(rank):
    """The reciprocal rank by ir-measures, in a run where only this rank is relevant."""
    run = {"q": {f"d{place}": -float(place) for place in range(1, 201)}}
    [metric] = ir_measures.iter_calc([ir_measures.RR], {"q": {f"d{rank}": 1}}, run)
    return metric.value


class TestPMrr:
    def test_by_hand(self):
        # 1 -> 4 falls: 1 - 1/4. 6 -> 2 rises: 2/6 - 1. 3 -> 3 stays: 0.
        value = p_mrr([1, 6, 3], [4, 2, 3])
        assert value == pytest.approx((3 / 4 - 2 / 3 + 0) / 3)

    @given(st.lists(st.tuples(RANKS, RANKS), min_size=1, max_size=5))
    def test_agrees_with_reciprocal_ranks_of_ir_measures(self, pairs):
        # In the words of the paper: MRR before over MRR after less one, or one less the inverse.
        values = []
        for original, changed in pairs:
            before, after = reciprocal_rank(original), reciprocal_rank(changed)
            values.append(before / after - 1 if original >= changed else 1 - after / before)
        assert p_mrr(*zip(*pairs, strict=True)) == pytest.approx(np.mean(values), abs=1e-9)

    @given(st.lists(RANKS, min_size=1))
    def test_ranks_that_stay_give_exactly_nothing(self, ranks):
        assert p_mrr(ranks, ranks) == 0.0

    @given(st.lists(st.tuples(RANKS, RANKS), min_size=1))
    def test_swapping_the_instructions_changes_the_sign(self, pairs):
        original, changed = zip(*pairs, strict=True)
        assert p_mrr(original, changed) == pytest.approx(-p_mrr(changed, original), abs=1e-12)
        assert -1 < p_mrr(original, changed) < 1

    @pytest.mark.parametrize(
        ("original", "changed", "problem"),
        [
            ([], [], "at least one"),
            ([1, 2], [1], r"got shapes \(2,\), \(1,\)"),
            ([[1, 2]], [[1, 2]], r"got shapes \(1, 2\)"),
            ([1, 2], [0, 2], r"`ranks_changed` must hold ranks, integers from 1, got \[0, 2\]"),
            ([0.9, 0.1], [1, 2], "`ranks_original` must hold ranks.*`rank_by_score`"),
            ([math.nan], [1], "`ranks_original`"),
            ([1], [math.inf], "`ranks_changed`"),
        ],
    )
    def test_what_is_no_rank_is_refused(self, original, changed, problem):
        with pytest.raises(InputError, match=problem):
            p_mrr(original, changed)


class TestSicr:
    # Five documents; the third is gold.
    ORIGINAL = (0.9, 0.8, 0.5, 0.2, 0.1)
    RISEN = (0.5, 0.4, 0.7, 0.2, 0.1)
    FALLEN = (0.9, 0.8, 0.1, 0.3, 0.2)
    GOLD = (False, False, True, False, False)

    def test_rank_and_score_rise_and_fall(self):
        assert sicr(self.ORIGINAL, self.RISEN, self.FALLEN, self.GOLD) == 1.0

    @pytest.mark.parametrize(
        ("instructed", "reversed_"),
        [
            (ORIGINAL, FALLEN),  # does not rise
            (RISEN, ORIGINAL),  # does not fall
            (FALLEN, RISEN),  # the wrong way round
            ((0.2, 0.1, 0.4, 0, 0), FALLEN),  # its rank rises, its score does not
            ((0.9, 0.8, 0.6, 0, 0), FALLEN),  # its score rises, its rank does not
            (RISEN, (0.9, 0.8, 0.6, 0.7, 0)),  # its rank falls, its score does not
            (RISEN, (0.9, 0.8, 0.4, 0.2, 0.1)),  # its score falls, its rank does not
            (RISEN, (0.9, 0.8, math.nan, 0.3, 0.2)),  # no score
            ((0.5, 0.4, math.nan, 0.2, 0.1), FALLEN),
        ],
    )
    def test_every_part_is_needed(self, instructed, reversed_):
        assert sicr(self.ORIGINAL, instructed, reversed_, self.GOLD) == 0.0

    def test_a_document_that_is_first_need_not_rise(self):
        gold = [True, False]
        assert sicr([0.5, 0.3], [0.5, 0.3], [0.2, 0.3], gold) == 1.0
        assert sicr([0.5, 0.3], [0.4, 0.3], [0.2, 0.3], gold) == 0.0
        assert sicr([0.5, 0.3], [0.5, 0.6], [0.2, 0.3], gold) == 0.0
        assert sicr([0.5, 0.3], [0.5, 0.3], [0.4, 0.3], gold) == 0.0

    def test_is_the_share_of_gold_documents(self):
        # The first gold document complies, the second stays where it was.
        original, instructed, reversed_ = [0.6, 0.5, 0.4], [0.6, 0.7, 0.4], [0.6, 0.3, 0.4]
        assert sicr(original, instructed, reversed_, [False, True, True]) == 0.5

    @given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any), st.floats(0, 1))
    def test_a_constant_scorer_has_nothing(self, gold, score):
        assert sicr(*[[score] * len(gold)] * 3, gold) == 0.0

    @pytest.mark.parametrize("gold", [[False] * 5, [True], [2], [0, 0, 1, 0, 0], []])
    def test_gold_marks_documents(self, gold):
        with pytest.raises(InputError, match="`gold` must hold True or False for each score"):
            sicr(self.ORIGINAL, self.RISEN, self.FALLEN, gold)

    def test_runs_are_of_the_same_documents(self):
        with pytest.raises(InputError, match=r"scores of shapes \[\(5,\), \(4,\), \(5,\)\]"):
            sicr(self.ORIGINAL, self.RISEN[:4], self.FALLEN, self.GOLD)


def wise_of_one(o, i, r, candidates):
    """The decision tree of the published code, for one document."""
    if i <= o < r:
        if o < candidates and i == 1:
            return 1
        return (1 - math.sqrt(o - i) / 20) / math.sqrt(i) if o <= 20 else 0.01
    if r < o < i:
        return -1
    return (o - i) / i if o <= i else (r - o) / o


class TestWise:
    @pytest.mark.parametrize(
        ("o", "i", "r", "value"),
        [
            (3, 1, 4, 1.0),
            (1, 1, 2, 1.0),
            (6, 2, 9, (1 - 2 / 20) / math.sqrt(2)),
            (5, 1, 7, 1 - 2 / 20),  # as deep as there are candidates
            (4, 4, 6, 1 / 2),
            (25, 24, 26, 0.01),
            (3, 5, 2, -1.0),
            (2, 8, 9, -6 / 8),
            (2, 8, 2, -6 / 8),
            (8, 2, 4, -4 / 8),
            (4, 4, 4, 0.0),
            (8, 2, 8, 0.0),
        ],
    )
    def test_each_case_by_hand(self, o, i, r, value):
        assert wise([o], [i], [r], candidates=5) == pytest.approx(value)

    @given(st.lists(st.tuples(RANKS, RANKS, RANKS), min_size=1), st.integers(1, 30))
    def test_agrees_with_one_document_at_a_time(self, ranks, candidates):
        value = wise(*zip(*ranks, strict=True), candidates=candidates)
        assert value == pytest.approx(np.mean([wise_of_one(*one, candidates) for one in ranks]))
        assert -1 <= value <= 1

    @given(st.lists(RANKS, min_size=1))
    def test_ranks_that_stay_give_exactly_nothing(self, ranks):
        assert wise(ranks, ranks, ranks, candidates=3) == 0.0

    def test_what_is_no_rank_is_refused(self):
        with pytest.raises(InputError, match="`ranks_reversed` must hold ranks"):
            wise([1], [1], [0], candidates=3)
        with pytest.raises(InputError, match=r"got shapes \(1,\), \(2,\), \(1,\)"):
            wise([1], [1, 2], [1], candidates=3)
        with pytest.raises(InputError, match="`candidates` must be at least 1, got 0"):
            wise([1], [1], [1], candidates=0)


class TestRobustness:
    def test_by_hand(self):
        # The worst of the first group is 0.4, of the second 0.8.
        assert robustness([0.9, 0.8, 0.4, 1.0], ["a", "b", "a", "b"]) == pytest.approx(0.6)

    def test_with_ndcg_of_ir_measures(self):
        # Two wordings: one gets both documents right, the other swaps grades 3 and 1.
        values = ndcg([[3, 1]] * 2, [[0.9, 0.1], [0.1, 0.9]])
        swapped = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
        assert robustness(values, [0, 0]) == pytest.approx(swapped)

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1))
    def test_is_at_most_the_mean_and_falls_with_more_wordings(self, pairs):
        values, groups = zip(*pairs, strict=True)
        means = [np.mean([v for v, g in pairs if g == group]) for group in set(groups)]
        assert robustness(values, groups) <= np.mean(means) + 1e-12
        worse = robustness([*values, 0.0], [*groups, groups[0]])
        assert worse <= robustness(values, groups) + 1e-12

    def test_values_that_are_none_are_left_out(self):
        nan = math.nan
        assert robustness([0.5, nan, nan, 0.7], [1, 1, 2, 3]) == pytest.approx(0.6)
        assert math.isnan(robustness([nan, nan], [1, 1]))

    @pytest.mark.parametrize(("values", "groups"), [([], []), ([0.1, 0.2], [1]), ([[0.1]], [[1]])])
    def test_needs_a_group_for_each_value(self, values, groups):
        with pytest.raises(InputError, match="`values` and `groups` must be of the same length"):
            robustness(values, groups)


class StubScorer:
    def __init__(self, name):
        self.name = name


class ScriptedReranker:
    """Scores by a function of (query, instruction text or None, document), and keeps its calls."""

    def __init__(self, function, name="scripted"):
        self.scorer = StubScorer(name)
        self.function = function
        self.calls = []

    @property
    def texts(self):
        return [instruction and instruction.text for _, _, instruction, _ in self.calls]

    def score(self, query, documents, *, instruction=None, attributes=()):
        self.calls.append((query, documents, instruction, attributes))
        text = instruction.text if instruction is not None else None
        return [self.function(query, text, document) for document in documents]


def constant(value=0.5):
    return ScriptedReranker(lambda query, instruction, document: value, "constant")


def pseudo_random(salt):
    def draw(query, instruction, document):
        digest = hashlib.sha256(f"{salt}|{query}|{instruction}|{document.text}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    return ScriptedReranker(draw, "random")


def oracle(scenarios):
    """Knows the grades under an instruction, in whatever wording, and under its opposite."""
    by_query = {scenario.query: scenario for scenario in scenarios}

    def grade(query, text, document):
        lanes = by_query[query].lanes
        none = next(lane for lane in lanes if lane.kind == "none")
        lane = next(
            (lane for lane in lanes if lane.instruction and lane.instruction in (text or "")), none
        )
        value = lane.grades[document.id]
        if text and text.startswith("Leave out"):
            return none.grades[document.id] if value < 2 else 0
        return value

    return ScriptedReranker(grade, "oracle")


SHIPS, SUMS = "Prefer ships.", "Prefer sums."
LANES = {
    ("none", None): [3, 2, 0, 0],
    ("business_rule", SHIPS): [0, 3, 0, 0],
    ("user_context", SUMS): [3, 0, 2, 0],
}


def make(number=0, *, lanes=LANES, domain="tests", texts=None, **fields):
    """A scenario with lanes `{(kind, instruction): grades}`, each document named as its text."""
    texts = texts or ["alpha", "beta", "gamma", "delta"]
    base = {
        "id": f"s{number}",
        "domain": domain,
        "query": f"query {number}",
        "documents": [{"id": text, "text": text} for text in texts],
        "lanes": [
            {"kind": kind, "instruction": text, "grades": dict(zip(texts, grades, strict=True))}
            for (kind, text), grades in lanes.items()
        ],
    }
    return Scenario.model_validate(base | fields)


def scripted(scores, documents=("alpha", "beta", "gamma", "delta")):
    """Scores by instruction text; what is not in the table is scored as `...` says."""

    def look_up(query, text, document):
        row = scores[text] if text in scores else scores[...]
        return row[documents.index(document.text)]

    return ScriptedReranker(look_up)


def two_domains(count=2, **fields):
    return [make(i, domain=f"domain {i % 2}", **fields) for i in range(count)]


def test_oracle_reaches_the_ceiling():
    scenarios = two_domains()
    report = measure_following(oracle(scenarios), scenarios)
    for name in MEASURES:
        measure = getattr(report, name)
        assert measure.model == measure.oracle, name
    values = {name: getattr(report, name).model.value for name in MEASURES}
    # Documents keep their order within a grade. Ships: beta, alpha, gamma, delta; sums: alpha,
    # gamma, beta, delta; none: alpha, beta, gamma, delta.
    assert values == pytest.approx(
        {
            "flip_accuracy": 1.0,
            "robustness": 1.0,
            "negation_accuracy": 1.0,
            # Ships to sums: beta 1 -> 3. Back: alpha 1 -> 2 and gamma 2 -> 3.
            "p_mrr": ((1 - 1 / 3) + ((1 - 1 / 2) + (1 - 2 / 3)) / 2) / 2,
            # To ships: alpha 1 -> 2. To sums: beta 2 -> 3.
            "p_mrr_from_none": ((1 - 1 / 2) + (1 - 2 / 3)) / 2,
            # Beta rises from 2 to 1 and falls to 3; alpha stays first and falls to 2.
            "sicr": 1.0,
            # Beta is as deep as there are candidates (2); alpha has the whole reward.
            "wise": ((1 - 1 / 20) + 1) / 2,
        }
    )
    # Reversed grades of ships are alpha 3: first already. Of sums beta 2: second without.
    assert report.negation_lift.value == pytest.approx((0 + 1 - 1 / math.log2(3)) / 2)
    assert report.conditions["matched"].ndcg.value == 1.0
    assert report.conditions["paraphrased"].ndcg.value == 1.0
    assert report.conditions["long"].ndcg.value == 1.0
    assert report.conditions["long"].drift.value == 0.0
    assert report.conditions["negated"].ndcg.value < report.conditions["withheld"].ndcg.value


def test_constant_scores_follow_nothing():
    report = measure_following(constant(), two_domains(4))
    for name in MEASURES:
        if name != "robustness":
            measure = getattr(report, name)
            assert (measure.model.value, measure.model.low, measure.model.high) == (0, 0, 0), name
    # File order under every wording: beta is second, gamma third.
    expected = [1 / math.log2(3), (7 + 3 / 2) / (7 + 3 / math.log2(3))]
    assert report.robustness.model.value == pytest.approx(np.mean(expected))
    assert report.negation_lift.value == 0.0
    for condition, part in report.conditions.items():
        assert part.ndcg.value == pytest.approx(np.mean(expected)), condition
        assert part.lift is None or part.lift.value == 0.0
        assert part.change is None or part.change.value == 0.0
        assert part.drift is None or part.drift.value == 0.0


def test_random_scores_fall_within_the_noise_floor():
    scenarios = two_domains(8)
    inside = [
        measure.random.low <= measure.model.value <= measure.random.high
        for salt in range(6)
        for report in [measure_following(pseudo_random(salt), scenarios)]
        for measure in (getattr(report, name) for name in MEASURES)
    ]
    assert len(inside) == 42
    assert np.mean(inside) > 0.85


def test_the_noise_floor_lies_around_theory():
    report = measure_following(constant(), two_domains(40), conditions=["negated"])
    theory = {"flip_accuracy": 1 / 2, "p_mrr": 0, "p_mrr_from_none": 0, "negation_accuracy": 1 / 4}
    for name, value in theory.items():
        random = getattr(report, name).random
        assert random.value == pytest.approx(value, abs=0.04), name
        assert random.low < value < random.high
        assert random.n == 20
    assert report.noise == "mean and 95% prediction interval of 20 random scorers, seed 0"
    # The oracle is beyond the noise, as it must be for the floor to say anything.
    assert report.p_mrr.oracle.value > report.p_mrr.random.high


def test_the_noise_floor_narrows_with_more_scenarios():
    few, many = (
        measure_following(constant(), [make(i) for i in range(count)], conditions=[]).p_mrr.random
        for count in (4, 32)
    )
    assert many.high - many.low < (few.high - few.low) / 2


def test_p_mrr_by_hand():
    scores = {
        None: [0.9, 0.8, 0.7, 0.6],
        SHIPS: [0.4, 0.9, 0.3, 0.8],
        SUMS: [0.9, 0.8, 0.1, 0.5],
    }
    report = measure_following(scripted(scores), [make()], conditions=[])
    # Ranks under ships: alpha 3, beta 1, gamma 4; under sums: alpha 1, beta 2, gamma 4.
    to_sums, to_ships = 1 - 1 / 2, ((1 - 1 / 3) + 0) / 2
    assert report.p_mrr.model.value == pytest.approx((to_sums + to_ships) / 2)
    assert report.p_mrr.model.n == 2
    # From none: alpha 1 -> 3 under ships, beta 2 -> 2 under sums.
    assert report.p_mrr_from_none.model.value == pytest.approx((2 / 3 + 0) / 2)
    assert report.p_mrr_from_none.model.n == 2


def test_sicr_and_wise_by_hand():
    scores = {
        None: [0.6, 0.8, 0.7, 0.5],
        SHIPS: [0.2, 0.9, 0.7, 0.5],
        SUMS: [0.5, 0.4, 0.9, 0.6],
    }
    report = measure_following(scripted(scores), [make()], conditions=[])
    # Ships then sums, gold is beta: ranks 1, 1, 4, scores 0.8, 0.9, 0.4: complies.
    # Sums then ships, gold is alpha: ranks 3, 3, 4, and not first, so that it has to rise.
    assert report.sicr.model.value == 0.5
    assert report.wise.model.value == pytest.approx((1 + 1 / math.sqrt(3)) / 2)
    assert report.sicr.model.n == report.wise.model.n == 2


def test_only_documents_that_the_query_asks_for_are_gold():
    lanes = LANES | {("none", None): [1, 1, 3, 0]}
    report = measure_following(constant(), [make(lanes=lanes)], conditions=[])
    # Gamma is relevant without instruction and in sums, and not in ships.
    assert report.sicr.model.n == 1
    assert report.sicr.oracle.value == 0.0


def test_robustness_by_hand():
    good, poor = [0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.8, 0.7]
    lanes = {("glossary", SHIPS): [0, 3, 0, 0]}
    reranker = scripted({None: poor, f"Please note: {SHIPS}": poor, ...: good})
    report = measure_following(reranker, [make(lanes=lanes)], conditions=["paraphrased"])
    part = report.conditions["paraphrased"]
    assert report.robustness.model.value == pytest.approx(1 / math.log2(5))
    assert report.robustness.oracle.value == 1.0
    assert part.ndcg.value == pytest.approx((1 / math.log2(5) + 3) / 4)
    assert part.ndcg_by_wording["please_note"].value == pytest.approx(1 / math.log2(5))
    assert part.ndcg_by_wording["context"].value == 1.0
    assert part.change.value == pytest.approx(part.ndcg.value - 1)
    assert part.lift.value == pytest.approx(part.ndcg.value - 1 / math.log2(5))
    assert part.drift.value == pytest.approx(np.mean([0.8, 0.8, 0.6, 0.4]) / 4)


def test_the_instruction_itself_is_one_of_its_wordings():
    good, poor = [0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.8, 0.7]
    lanes = {("glossary", SHIPS): [0, 3, 0, 0]}
    reranker = scripted({SHIPS: poor, ...: good})
    report = measure_following(reranker, [make(lanes=lanes)], conditions=["paraphrased"])
    assert report.conditions["paraphrased"].ndcg.value == 1.0
    assert report.robustness.model.value == pytest.approx(1 / math.log2(5))


def test_robustness_is_that_of_the_function():
    scenarios = two_domains(3)
    reranker = Reranker(OverlapScorer())
    report = measure_following(reranker, scenarios, conditions=["paraphrased"])
    before = [
        "",
        "Please note: ",
        "Context for this search: ",
        "Rank the results with this in mind. ",
    ]
    values, groups = [], []
    for scenario in scenarios:
        documents = [document.text for document in scenario.documents]
        for lane in scenario.lanes[1:]:
            texts = [prefix + lane.instruction for prefix in before]
            for text in [*texts, f"{lane.instruction} Please take this into account."]:
                scores = reranker.score(scenario.query, documents, instruction=text)
                values += ndcg([list(lane.grades.values())], [scores]).tolist()
                groups.append(f"{scenario.id} {lane.kind}")
    assert report.robustness.model.value == pytest.approx(robustness(values, groups))


def test_negation_by_hand():
    lanes = {("none", None): [3, 2, 2, 3], ("business_rule", SHIPS): [3, 2, 1, 0]}
    scores = {
        None: [0.4, 0.3, 0.2, 0.1],
        SHIPS: [0.9, 0.5, 0.4, 0.6],
        f"Leave out every document that fits the following, and keep the rest: {SHIPS}": [
            0.3,
            0.3,
            0.4,
            0.3,
        ],
    }
    report = measure_following(scripted(scores), [make(lanes=lanes)], conditions=["negated"])
    # Pairs of kept and excluded: alpha-gamma both right; alpha-delta a tie under the negation;
    # beta-gamma both right; beta-delta wrong already under the instruction.
    measure = report.negation_accuracy
    assert (measure.model.value, measure.model.n) == (2 / 4, 4)
    assert measure.oracle.value == 1.0
    # Reversed grades: gamma 2, delta 3. Negated: gamma, alpha, beta, delta; withheld: file order.
    ideal = 7 + 3 / math.log2(3)
    negated, withheld = 3 + 7 / math.log2(5), 3 / 2 + 7 / math.log2(5)
    assert report.negation_lift.value == pytest.approx((negated - withheld) / ideal)
    part = report.conditions["negated"]
    # Grades 3, 2, 1, 0 in the order gamma, alpha, beta, delta.
    expected = (1 + 7 / math.log2(3) + 3 / 2) / (7 + 3 / math.log2(3) + 1 / 2)
    assert part.ndcg.value == pytest.approx(expected)
    assert part.drift is None


def test_a_negation_can_be_supplied():
    reranker = constant()
    measure_following(reranker, [make()], conditions=["negated"], negations={SHIPS: "No ships."})
    assert reranker.texts == [
        None,
        SHIPS,
        "No ships.",
        SUMS,
        f"Leave out every document that fits the following, and keep the rest: {SUMS}",
    ]


def test_agrees_with_evaluate():
    lanes = LANES | {("neutral", "Answer in English."): [3, 2, 0, 0]}
    scenarios = two_domains(5, lanes=lanes)
    reranker = pseudo_random("evaluate")
    report, other = measure_following(reranker, scenarios), evaluate(reranker, scenarios)
    assert report.flip_accuracy.model == other.flip_accuracy
    assert report.conditions["matched"].ndcg == other.ndcg_instructed
    assert report.conditions["withheld"].ndcg == other.ndcg_withheld
    assert report.conditions["matched"].lift == other.lift
    assert report.lanes == other.lanes - 10


def test_an_irrelevant_instruction_is_one_of_another_domain():
    def lanes(text):
        return {("none", None): [3, 2, 0, 0], ("recency", text): [0, 0, 3, 2]}

    scenarios = [
        make(i, domain=domain, lanes=lanes(f"Only {domain} {i}."))
        for i, domain in enumerate(["law"] * 8 + ["sport"] * 8)
    ]

    def drawn(seed):
        reranker = constant()
        measure_following(reranker, scenarios, conditions=["irrelevant"], seed=seed)
        return [text for previous, text in pairwise(reranker.texts) if previous]

    first = [text for text in drawn(0) if text]
    assert len(first) == 16
    assert all("sport" in text for text in first[:8])
    assert all("law" in text for text in first[8:])
    assert len(set(first)) > 4
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_what_an_irrelevant_instruction_changes_is_drift():
    lanes = {("glossary", SHIPS): [0, 3, 0, 0]}
    other = {("glossary", SUMS): [0, 0, 0, 0]}
    scenarios = [make(0, lanes=lanes, domain="sea"), make(1, lanes=other, domain="school")]
    scores = {None: [0.1, 0.2, 0.3, 0.4], SHIPS: [0.1, 0.9, 0.1, 0.1], SUMS: [0.5, 0.4, 0.3, 0.2]}
    report = measure_following(scripted(scores), scenarios, conditions=["irrelevant"])
    part = report.conditions["irrelevant"]
    assert part.ndcg.value == pytest.approx(1 / math.log2(3))
    assert part.ndcg.n == 1
    assert part.lift.value == pytest.approx(1 / math.log2(3) - 1 / math.log2(4))
    assert part.change.value == pytest.approx(1 / math.log2(3) - 1)
    drift = [np.mean([0.4, 0.2, 0.0, 0.2]), np.mean([0.0, 0.7, 0.2, 0.3])]
    assert (part.drift.value, part.drift.n) == (pytest.approx(np.mean(drift)), 8)
    assert report.lanes_without_relevant == 1


def test_one_domain_has_nothing_irrelevant():
    report = measure_following(constant(), [make(0), make(1)], conditions=["irrelevant"])
    assert report.conditions["irrelevant"].ndcg is None
    assert report.conditions["irrelevant"].drift is None


def test_a_long_instruction_has_the_rule_first_and_last():
    reranker = constant()
    report = measure_following(reranker, [make()], conditions=["long"])
    first, last = reranker.texts[2:4]
    assert first.startswith("Prefer ships. This service")
    assert last.startswith("This service")
    assert last.endswith("carries no signature. Prefer ships.")
    assert sorted(first.split()) == sorted(last.split())
    assert 300 < len(first.split()) < 400
    assert list(report.conditions["long"].ndcg_by_wording) == ["rule_first", "rule_last"]


@pytest.mark.parametrize(
    ("rule", "words"), [("Ships in every port " * 75, 2_100 / 5), ("Ships in " * 300, 0)]
)
def test_a_long_rule_leaves_less_room_or_none(rule, words):
    reranker = constant()
    lanes = {("business_rule", rule.strip()): [0, 3, 0, 0]}
    report = measure_following(reranker, [make(lanes=lanes)], conditions=["long"])
    if words:
        assert len(rule) < len(reranker.texts[2]) <= 2_010
    else:
        assert reranker.texts == [None, rule.strip()]
        assert report.conditions["long"].ndcg is None
        assert report.conditions["long"].ndcg_by_wording == {}


def test_letters_of_other_scripts_take_more_room():
    reranker = constant()
    lanes = {("business_rule", "船" * 200): [0, 3, 0, 0]}
    measure_following(reranker, [make(lanes=lanes)], conditions=["long"])
    assert 200 + 800 < len(reranker.texts[2]) <= 200 + 1_010


def test_paraphrases_are_wrappers_another_order_and_what_the_caller_gives():
    rule = "We ship tea. Prefer ports"
    lanes = {("business_rule", rule): [0, 3, 0, 0]}
    reranker = constant()
    report = measure_following(
        reranker,
        [make(lanes=lanes)],
        conditions=["paraphrased"],
        paraphrases={rule: ["Tea by ship: ports.", "Harbours, please."]},
    )
    wordings = {
        "please_note": "Please note: We ship tea. Prefer ports",
        "context": "Context for this search: We ship tea. Prefer ports",
        "in_mind": "Rank the results with this in mind. We ship tea. Prefer ports",
        "take_into_account": "We ship tea. Prefer ports. Please take this into account.",
        "rotated": "Prefer ports. We ship tea.",
        "supplied_1": "Tea by ship: ports.",
        "supplied_2": "Harbours, please.",
    }
    assert reranker.texts == [None, rule, *wordings.values()]
    assert list(report.conditions["paraphrased"].ndcg_by_wording) == list(wordings)


def test_nothing_is_asked_twice():
    # Two lanes with one text, and a paraphrase that is the instruction of another lane.
    lanes = LANES | {("combined", SHIPS): [0, 2, 0, 0]}
    reranker = constant()
    report = measure_following(reranker, two_domains(2, lanes=lanes), paraphrases={SHIPS: [SUMS]})
    asked = [(call[0], text) for call, text in zip(reranker.calls, reranker.texts, strict=True)]
    assert len(asked) == len(set(asked)) == report.requests


def test_a_lane_takes_about_nine_requests():
    reranker = constant()
    report = measure_following(reranker, two_domains(2))
    # Without instruction; twice matched, negated, two long, four paraphrased; one irrelevant, which
    # here is always the instruction of the scenario itself.
    assert report.requests == len(reranker.calls) == 2 * (1 + 2 * (1 + 1 + 2 + 4))


@pytest.mark.parametrize(
    ("conditions", "requests"),
    [([], 3), (["withheld"], 3), (["negated"], 5), (("long", "negated"), 9), ({"paraphrased"}, 11)],
)
def test_only_the_conditions_asked_for_are_run(conditions, requests):
    reranker = constant()
    report = measure_following(reranker, [make()], conditions=conditions)
    assert len(reranker.calls) == requests
    wanted = {"withheld", "matched", *conditions}
    assert list(report.conditions) == [name for name in CONDITIONS if name in wanted]
    assert (report.robustness is None) == ("paraphrased" not in wanted)
    assert (report.negation_accuracy is None) == ("negated" not in wanted)
    assert (report.negation_lift is None) == ("negated" not in wanted)
    assert report.p_mrr is not None


def test_the_model_sees_attributes_and_the_date():
    reranker = constant()
    base = make(today="2025-06-30").model_dump()
    base["documents"][0]["metadata"] = {"source": "wiki", "date": "2025-01-01"}
    scenario = Scenario.model_validate(base)
    measure_following(reranker, [scenario])
    assert {call[3] for call in reranker.calls} == {("source", "date")}
    assert reranker.calls[0][2] is None
    assert {call[2].today for call in reranker.calls[1:]} == {date(2025, 6, 30)}


def test_without_a_lane_none_there_is_no_original_run():
    lanes = {key: grades for key, grades in LANES.items() if key[0] != "none"}
    report = measure_following(constant(), [make(lanes=lanes)])
    assert report.p_mrr is not None
    for name in ("p_mrr_from_none", "sicr", "wise", "negation_accuracy", "negation_lift"):
        assert getattr(report, name) is None, name
    assert report.conditions["withheld"].ndcg.n == 2


def test_without_an_instructed_lane_there_is_nothing_to_measure():
    lanes = {("none", None): [3, 2, 0, 0], ("neutral", "Answer in English."): [3, 2, 0, 0]}
    reranker = constant()
    report = measure_following(reranker, [make(lanes=lanes)])
    assert report.lanes == 0
    assert report.rows() == []
    assert reranker.texts == [None, "Answer in English."]


def test_lanes_of_a_scenario_are_drawn_together():
    # Three lanes of one scenario say no more than one of them: the intervals know it.
    def lucky(query, text, document):
        return float(document.text == ("beta" if text and query[-1] in "02468" else "alpha"))

    once = {("none", None): [3, 0, 0, 0], ("glossary", "a"): [0, 3, 0, 0]}
    thrice = once | {("glossary", text): [0, 3, 0, 0] for text in "bc"}
    single, triple = (
        measure_following(
            ScriptedReranker(lucky), [make(i, lanes=lanes) for i in range(20)], conditions=[]
        )
        for lanes in (once, thrice)
    )
    for narrow, wide in (
        (triple.p_mrr_from_none.model, single.p_mrr_from_none.model),
        (triple.conditions["matched"].ndcg, single.conditions["matched"].ndcg),
    ):
        assert (narrow.n, wide.n) == (60, 20)
        assert (narrow.low, narrow.high) == pytest.approx((wide.low, wide.high))
        assert wide.low < wide.value < wide.high


def test_scores_that_are_not_finite_are_counted_and_wrong():
    def broken(query, text, document):
        return math.nan if document.text == "beta" else float(text is None)

    report = measure_following(ScriptedReranker(broken), [make()], conditions=["negated"])
    assert report.non_finite == report.requests == 5
    assert report.sicr.model.value == 0.0
    assert report.negation_accuracy.model.value == 0.0
    # Beta is last under every instruction.
    assert report.p_mrr.model.value == 0.0


def test_report_survives_json():
    report = measure_following(pseudo_random("json"), two_domains(3))
    text = report.model_dump_json()
    assert FollowingReport.model_validate_json(text) == report
    content = json.loads(text)
    assert set(content["p_mrr"]) == {"model", "random", "oracle"}
    assert list(content["conditions"]) == list(CONDITIONS)
    assert content["conditions"]["withheld"]["lift"] is None


def test_report_is_the_same_again_and_its_estimates_hold_their_values():
    scenarios = two_domains(4)
    report = measure_following(Reranker(OverlapScorer()), scenarios)
    assert report == measure_following(Reranker(OverlapScorer()), scenarios)
    assert all(estimate.low <= estimate.value <= estimate.high for _, estimate in report.rows())


def test_rows_name_every_estimate_once():
    report = measure_following(pseudo_random("rows"), two_domains(3))
    rows = dict(report.rows())
    assert len(rows) == len(report.rows())
    assert rows["p_mrr/model"] == report.p_mrr.model
    assert rows["sicr/random"] == report.sicr.random
    assert rows["negation_lift"] == report.negation_lift
    assert rows["long/drift"] == report.conditions["long"].drift
    assert rows["long/rule_last"] == report.conditions["long"].ndcg_by_wording["rule_last"]
    assert "withheld/lift" not in rows


def test_measures_are_those_of_the_report():
    report = measure_following(constant(), [make()])
    found = [name for name, value in report if isinstance(value, FollowingMeasure)]
    assert found == MEASURES


def test_progress_counts_scenarios():
    seen = []
    scenarios = [make(i) for i in range(3)]
    measure_following(constant(), scenarios, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"scenarios": []}, "`scenarios` is empty"),
        (
            {"conditions": ["matched", "shuffled"]},
            "`conditions` must be a list of 'withheld', .*sh",
        ),
        ({"conditions": "negated"}, "`conditions` must be a list .* got 'negated'"),
        ({"seed": -1}, "`seed` must be an integer from 0, got -1"),
        ({"seed": 0.5}, "`seed` must be an integer from 0, got 0.5"),
        ({"paraphrases": {SHIPS: "Ships!"}}, "`paraphrases`: expected texts.* got 'Ships!'"),
        ({"paraphrases": {SHIPS: [" "]}}, "`paraphrases`: expected texts that are not blank"),
        ({"paraphrases": {SHIPS: [None]}}, "`paraphrases`: expected texts that are not blank"),
        ({"paraphrases": {"Prefer shops.": ["a"]}}, "no instructed lane .* 'Prefer shops.'; give"),
        ({"negations": {"Prefer shops.": "a"}}, "`negations`: no instructed lane"),
        ({"negations": {SHIPS: ""}}, "`negations`: expected texts that are not blank"),
        (
            {"paraphrases": {SHIPS: ["a"]}, "conditions": ["long"]},
            "`paraphrases` needs 'paraphrased' among the `conditions`",
        ),
        ({"negations": {SHIPS: "a"}, "conditions": []}, "`negations` needs 'negated' among"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_the_model_is_asked(arguments, problem):
    reranker = constant()
    with pytest.raises(InputError, match=problem):
        measure_following(reranker, **({"scenarios": [make()]} | arguments))
    assert reranker.calls == []


def test_a_wrong_number_of_scores_names_the_scenario():
    class Short(ScriptedReranker):
        def score(self, *args, **kwargs):
            return super().score(*args, **kwargs)[:-1]

    with pytest.raises(ScorerError, match=r"'short' returned 3 scores for 4 documents .* 's7'"):
        measure_following(Short(lambda *_: 0.5, "short"), [make(7)])
