import hashlib
import itertools
import json
import math
import random
import re
import shutil

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lanerank import Document, Instruction, RankingComparison, Reranker, use_instruction
from lanerank.contracts import Scores
from lanerank.errors import InputError, InstructionNotSupportedError, ScorerError
from lanerank.evaluation import Scenario, evaluate, ndcg
from lanerank.evaluation.compare import Comparison, compare, compare_runs
from lanerank.evaluation.measures import Estimate
from lanerank.evaluation.queries import JudgedQuery, queries_from_scenarios
from lanerank.evaluation.runs import (
    DEFAULT_MEASURES,
    measure_run,
    parse_measures,
    rank_biased_overlap,
)
from lanerank.evaluation.significance import holm, is_neutral, paired_randomisation_test
from lanerank.evaluation.systems import OWN, System
from lanerank.testing import OverlapScorer, ScriptedScorer

[NDCG] = DEFAULT_MEASURES


class FunctionScorer:
    """Scores by a function of (query, rendered instruction, text), and counts its requests."""

    def __init__(self, function, name="function"):
        self.name = name
        self.supports_instructions = True
        self.function = function
        self.requests = []

    def score(self, request):
        self.requests.append(request)
        key = (request.query, request.instruction)
        return Scores(tuple(self.function(*key, each.text) for each in request.candidates))


def reranker(function, name="function"):
    return Reranker(FunctionScorer(function, name))


def pseudo_random(salt=""):
    def draw(*key):
        digest = hashlib.sha256(f"{salt}|{key}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    return reranker(draw, f"random{salt}")


TEXTS = ("alpha report", "beta report", "gamma note", "delta note")


def make_queries(number=12, grades=(0, 1, 2, 3), **fields):
    return [
        JudgedQuery(
            f"query {i}", TEXTS, grades, instruction=f"want {i}", instruction_aware=True, **fields
        )
        for i in range(number)
    ]


def oracle(queries):
    known = {
        (query.query, query.instruction.render() if query.instruction else "", doc.text): grade
        for query in queries
        for doc, grade in zip(query.documents, query.grades.values(), strict=True)
    }
    return reranker(lambda *key: known.get(key, 0) / 3, "oracle")


def make_scenario(number=0):
    texts = ["alpha report", "beta report", "gamma note", "delta note"]
    lanes = {
        "none": (None, [3, 2, 0, 0]),
        "neutral": ("Answer politely.", [3, 2, 0, 0]),
        "glossary": (f"note {number}", [0, 0, 3, 2]),
        "recency": ("delta", [0, 0, 2, 3]),
    }
    return Scenario.model_validate(
        {
            "id": f"s{number}",
            "domain": "tests",
            "query": f"report {number}",
            "today": "2026-01-31",
            "documents": [
                {"id": f"d{i}", "text": text, "metadata": {"source": f"wiki {number}"}}
                for i, text in enumerate(texts)
            ],
            "lanes": [
                {
                    "kind": kind,
                    "instruction": text,
                    "grades": {f"d{i}": grade for i, grade in enumerate(grades)},
                }
                for kind, (text, grades) in lanes.items()
            ],
        }
    )


def dcg(grades):
    return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))


def written_out(first, second, p):
    """Equation 32 of Webber et al. as it stands, with prefixes cut afresh at each depth."""
    long, short = sorted((first, second), key=len, reverse=True)
    s, l = len(short), len(long)  # noqa: E741 - the names of the paper

    def overlap(depth):
        return len(set(long[:depth]) & set(short[:depth]))

    total = sum(overlap(d) / d * p**d for d in range(1, l + 1))
    total += sum(overlap(s) * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    return (1 - p) / p * total + ((overlap(l) - overlap(s)) / l + overlap(s) / s) * p**l


class TestRankBiasedOverlap:
    @pytest.mark.parametrize("depth", [1, 2, 7, 300])
    def test_the_same_order_is_one_and_nothing_in_common_is_zero(self, depth):
        items = [f"d{i}" for i in range(depth)]
        assert rank_biased_overlap(items, items) == pytest.approx(1.0)
        assert rank_biased_overlap(items, [f"x{i}" for i in range(depth)]) == 0.0

    def test_by_hand(self):
        # Agreement 0 at depth 1 and 1 at depth 2: 0.5 * (0 + 0.5 * 1) + 0.25 * 1.
        assert rank_biased_overlap("ab", "ba", p=0.5) == pytest.approx(0.5)
        # Agreement 0, 1/2 and 2/3, the last kept for good.
        expected = 0.5 * (0.5 * 1 / 2 + 0.25 * 2 / 3) + 0.125 * 2 / 3
        assert rank_biased_overlap("abc", "cax", p=0.5) == pytest.approx(expected)

    def test_the_example_of_the_paper(self):
        # Webber et al. tabulate the agreement of these two at depths 1 to 7, mean 0.312.
        first, second = "abcdefg", "zcavwxy"
        agreement = [0, 0, 2 / 3, 2 / 4, 2 / 5, 2 / 6, 2 / 7]
        assert np.mean(agreement) == pytest.approx(0.312, abs=5e-4)
        expected = 0.1 * sum(a * 0.9**d for d, a in enumerate(agreement)) + 2 / 7 * 0.9**7
        assert rank_biased_overlap(first, second) == pytest.approx(expected)

    def test_a_value_that_another_implementation_publishes(self):
        assert rank_biased_overlap("abcde", "bcdae", p=0.9) == pytest.approx(0.828)

    def test_the_reverse_of_ten_items_is_what_the_docstring_says(self):
        assert rank_biased_overlap("abcdefghij", "jihgfedcba") == pytest.approx(0.51, abs=0.005)

    def test_a_shorter_ranking_is_taken_to_go_on_as_it_was(self):
        assert rank_biased_overlap("abc", "a") == pytest.approx(1.0)
        # Agreement 0, 1/2, 1/3, none of it extrapolated, since the short one had none at its end.
        expected = 0.5 * (0.5 * 1 / 2 + 0.25 * 1 / 3) + 0.125 * 1 / 3
        assert rank_biased_overlap("abc", "b", p=0.5) == pytest.approx(expected)

    def test_without_items(self):
        assert rank_biased_overlap([], []) == 1.0
        assert rank_biased_overlap([], ["a"]) == rank_biased_overlap(["a"], []) == 0.0

    @given(
        st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1),
        st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1),
        st.floats(0.05, 0.99),
    )
    def test_agrees_with_the_formula_written_out(self, first, second, p):
        value = rank_biased_overlap(first, second, p=p)
        assert value == pytest.approx(written_out(first, second, p), abs=1e-12)
        assert value == pytest.approx(rank_biased_overlap(second, first, p=p), abs=1e-12)
        assert 0 <= value <= 1

    @given(st.permutations("abcdefgh"), st.integers(1, 8), st.floats(0.05, 0.9))
    def test_is_the_infinite_sum_with_the_last_agreement_kept(self, order, depth, p):
        first, second = "abcdefgh"[:depth], order[:depth]
        common = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, depth + 1)]
        tail = [common[-1]] * 1000
        infinite = (1 - p) * sum(a * p**d for d, a in enumerate([*common, *tail]))
        assert rank_biased_overlap(first, second, p=p) == pytest.approx(infinite, abs=1e-9)

    @pytest.mark.parametrize("p", [0, 1, -0.5, math.nan])
    def test_persistence_is_checked(self, p):
        with pytest.raises(InputError, match="`p` must lie between 0 and 1"):
            rank_biased_overlap("ab", "ab", p=p)

    def test_an_item_occurs_once(self):
        with pytest.raises(InputError, match="`second` has an item more than once"):
            rank_biased_overlap("ab", "aa")


class TestSignificance:
    def test_is_the_test_of_scipy_on_pairs(self):
        rng = np.random.default_rng(7)
        a, b = rng.random(40), rng.random(40) + 0.1
        expected = stats.permutation_test(
            (b, a),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(0),
        ).pvalue
        value = paired_randomisation_test(b - a)
        assert value == pytest.approx(expected, abs=0.01)
        assert value == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=0.03)

    def test_is_exact_for_few_queries(self):
        differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05, 0.2])
        drawn = [abs(differences @ signs) for signs in itertools.product([1, -1], repeat=6)]
        expected = np.mean(np.array(drawn) >= abs(differences.sum()) - 1e-12)
        assert paired_randomisation_test(differences) == pytest.approx(expected)
        assert paired_randomisation_test(-differences) == pytest.approx(expected)
        # Queries without a difference change nothing.
        padded = [0.0, *differences, 0.0, 0.0]
        assert paired_randomisation_test(padded) == pytest.approx(expected)

    def test_a_cluster_changes_its_sign_as_a_whole(self):
        differences = np.array([0.3, 0.2, -0.1, 0.4, 0.4, 0.1, 0.2])
        clusters = ["x", "x", "y", "z", "z", "u", "v"]
        sums = np.array([0.5, -0.1, 0.8, 0.1, 0.2])
        drawn = [abs(sums @ signs) for signs in itertools.product([1, -1], repeat=5)]
        expected = np.mean(np.array(drawn) >= sums.sum() - 1e-12)
        assert paired_randomisation_test(differences, clusters) == pytest.approx(expected)

    @pytest.mark.parametrize("differences", [[0.0], [0.4], [0.0, 0.0, 0.0], [0.0, 0.4, 0.0]])
    def test_nothing_can_be_significant_where_at_most_one_query_differs(self, differences):
        assert paired_randomisation_test(differences) == 1.0

    def test_p_values_are_uniform_where_nothing_differs(self):
        rng = np.random.default_rng(11)
        # Each with draws of its own: the same draws would make the p-values depend on each other.
        values = [
            paired_randomisation_test(rng.normal(size=15), n=199, seed=seed) for seed in range(300)
        ]
        assert stats.kstest(values, "uniform").pvalue > 0.05
        assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.03)

    def test_clusters_keep_the_error_rate_where_single_queries_would_not(self):
        rng = np.random.default_rng(12)
        clusters = np.repeat(np.arange(12), 5)
        shared = [np.repeat(rng.normal(size=12), 5) for _ in range(100)]

        def rejected(labels):
            values = [
                paired_randomisation_test(each, labels, n=199, seed=seed)
                for seed, each in enumerate(shared)
            ]
            return np.mean(np.array(values) <= 0.05)

        assert rejected(clusters) <= 0.12
        assert rejected(None) > 0.2

    def test_equal_seeds_give_equal_values(self):
        differences = np.random.default_rng(1).normal(0.2, size=30)
        first, second = (paired_randomisation_test(differences, seed=3) for _ in range(2))
        assert first == second != paired_randomisation_test(differences, seed=4)

    def test_holm_by_hand(self):
        # 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04, which may not be below its predecessor.
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]) == [1.0, 1.0]
        assert holm([0.03]) == [0.03]
        assert holm([]) == []

    @pytest.mark.parametrize(
        ("low", "high", "clusters", "expected"),
        [
            (-0.019, 0.019, 6, True),
            (0.001, 0.01, 50, True),
            (-0.03, 0.01, 50, False),
            (-0.01, 0.02, 50, False),
            (0.03, 0.05, 50, False),
            (0.0, 0.0, 5, None),
            (0.0, 0.0, 1, None),
        ],
    )
    def test_neutral_needs_the_whole_interval_inside_the_margin(
        self, low, high, clusters, expected
    ):
        estimate = Estimate(value=(low + high) / 2, low=low, high=high, n=clusters)
        assert is_neutral(estimate, clusters, 0.02) is expected


class TestMeasures:
    @pytest.mark.parametrize(
        "text",
        [
            *("", "nDCG@", "foo@10", "nDCG@x", "nDCG@10; AP", "__import__('os')", "nDCG(10)"),
            *("P", "P@5.5", "P(rel='a')@5", "P(foo=1)@5", "nDCG(dcg='bad')@10", "alpha_nDCG@10x"),
            # trec_eval would end the whole process, or take all memory.
            *("nDCG@0", "P@0", "P(rel=0)@5", "Judged@0", "nDCG(gains={1:999999999999})@10"),
        ],
    )
    def test_what_is_no_measure_is_refused_by_name(self, text):
        with pytest.raises(InputError) as error:
            parse_measures(["AP", text])
        assert f"`measures` has {text!r}" in str(error.value)
        assert "'nDCG@10'" in str(error.value)

    def test_a_single_string_is_no_list(self):
        with pytest.raises(InputError, match="must be a list of str, got 'AP'"):
            parse_measures("AP")

    def test_the_same_measure_is_kept_once(self):
        assert list(parse_measures(["nDCG@10", " NDCG@10 ", "AP"])) == ["nDCG@10", "AP"]

    def test_the_default_has_the_gain_of_lanerank_and_ndcg_that_of_trec_eval(self):
        qrels = {"q": {"a": 2, "b": 3, "c": 0}}
        rankings = {"q": ["a", "b", "c"]}
        parsed = parse_measures([NDCG, "nDCG@10"])
        exponential, linear = (measure_run(each, qrels, rankings) for each in parsed.values())
        assert exponential["q"] == pytest.approx(dcg([2, 3]) / dcg([3, 2]))
        assert exponential["q"] == pytest.approx(ndcg([[2, 3, 0]], [[3.0, 2.0, 1.0]])[0])
        assert linear["q"] == pytest.approx((2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3)))

    @pytest.mark.skipif(shutil.which("perl") is None, reason="gdeval is written in perl")
    def test_the_default_is_what_gdeval_computes(self):
        # It takes numbers for query ids only.
        qrels = {query[1:]: grades for query, grades in random_qrels(20).items()}
        rankings = {query[1:]: order for query, order in random_rankings(20).items()}
        [measure] = parse_measures([NDCG]).values()
        ours = measure_run(measure, qrels, rankings)
        reference = {
            metric.query_id: metric.value
            for metric in ir_measures.gdeval.iter_calc([measure], qrels, scored(rankings))
        }
        assert ours == pytest.approx(reference, abs=1e-5)

    @pytest.mark.parametrize(
        "text", ["nDCG@10", "nDCG", "AP", "AP(rel=2)", "RR@10", "P@5", "R@3", "Judged@10", "Bpref"]
    )
    def test_agrees_with_ir_measures(self, text):
        qrels, rankings = random_qrels(30), random_rankings(30)
        [measure] = parse_measures([text]).values()
        expected = ir_measures.calc(
            [ir_measures.parse_measure(text)], ir_measures_qrels(qrels), scored(rankings)
        )
        ours = measure_run(measure, qrels, rankings)
        assert ours == pytest.approx({m.query_id: m.value for m in expected.per_query})
        [aggregate] = expected.aggregated.values()
        assert np.mean(list(ours.values())) == pytest.approx(aggregate)

    def test_unretrieved_relevant_documents_count_in_the_ideal(self):
        [measure] = parse_measures([NDCG]).values()
        values = measure_run(measure, {"q": {"a": 1, "elsewhere": 3}}, {"q": ["a", "b"]})
        assert values["q"] == pytest.approx(1 / dcg([3, 1]))

    def test_ids_may_hold_anything(self):
        odd = ["with blank", "line\nbreak", "שלום", "", "0"]
        [measure] = parse_measures(["nDCG@10"]).values()
        values = measure_run(measure, {"a query": {odd[0]: 1}}, {"a query": odd})
        assert values == {"a query": 1.0}

    def test_negative_grades_are_not_relevant(self):
        measures = parse_measures([NDCG, "nDCG@10", "RR"]).values()
        rankings = {"q": ["spam", "good"]}
        values = [measure_run(each, {"q": {"spam": -2, "good": 1}}, rankings) for each in measures]
        assert [value["q"] for value in values] == pytest.approx([1 / math.log2(3)] * 2 + [0.5])

    def test_grades_too_high_for_an_exponential_gain_are_refused(self):
        exponential, linear = parse_measures([NDCG, "nDCG@10"]).values()
        with pytest.raises(InputError, match=r"there is a grade 16; use 'nDCG@10'"):
            measure_run(exponential, {"q": {"a": 16}}, {"q": ["a"]})
        assert measure_run(linear, {"q": {"a": 16}}, {"q": ["a"]}) == {"q": 1.0}

    def test_what_ir_measures_cannot_digest_is_a_typed_error(self):
        with pytest.raises(InputError, match="cannot compute P for these"):
            measure_run(ir_measures.P, {"q": {"a": 1}}, {"q": ["a"]})


def random_qrels(number):
    rng = random.Random(5)
    return {
        f"q{i}": {f"d{j}": rng.choice([0, 0, 1, 2, 3]) for j in rng.sample(range(20), 12)}
        | {"d0": 3}
        for i in range(number)
    }


def random_rankings(number):
    rng = random.Random(6)
    return {f"q{i}": [f"d{j}" for j in rng.sample(range(20), 14)] for i in range(number)}


def ir_measures_qrels(qrels):
    return [
        ir_measures.Qrel(query, document, grade)
        for query, grades in qrels.items()
        for document, grade in grades.items()
    ]


def scored(rankings):
    return {
        query: {document: 1 / rank for rank, document in enumerate(order, 1)}
        for query, order in rankings.items()
    }


class TestJudgedQuery:
    def test_plain_lists_will_do(self):
        query = JudgedQuery("red", ["a red fish", Document("a blue fish", id="blue")], [3, 0])
        assert [doc.id for doc in query.documents] == ["0", "blue"]
        assert query.grades == {"0": 3, "blue": 0}
        assert (query.id, query.cluster) == ("red", "red")
        assert query.instruction is query.instruction_aware is None

    def test_grades_may_name_documents_that_are_no_candidates(self):
        query = JudgedQuery("red", [Document("x", id="a")], {"a": 1, "elsewhere": np.int64(3)})
        assert query.grades == {"a": 1, "elsewhere": 3}

    def test_the_caller_keeps_what_was_given(self):
        document = Document("x")
        documents, grades = [document], {"0": 1}
        query = JudgedQuery("red", documents, grades)
        grades["0"] = 2
        assert document.id is None
        assert query.grades == {"0": 1}

    @pytest.mark.parametrize("blank", [None, "", "  ", Instruction()])
    def test_a_blank_instruction_is_none(self, blank):
        assert JudgedQuery("q", ["x"], instruction=blank).instruction is None

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((" ", ["x"]), {}, "`query` must be a str that is not blank"),
            ((7, ["x"]), {}, "`query` must be"),
            (("q", []), {}, "`documents` of query 'q' is empty"),
            (("q", "text"), {}, "must be a list of Document or str, got str"),
            (("q", [{"text": "x"}]), {}, "not usable: `text`"),
            (("q", [Document("x", id="a"), Document("y", id="a")]), {}, "id 'a' more than once"),
            (("q", ["x", Document("y", id="0")]), {}, "id '0' more than once"),
            (("q", ["x", "y"], [1]), {}, "has 1 values for 2 documents"),
            (("q", ["x"], [1.5]), {}, "has 1.5 for document '0'; grades are integers"),
            (("q", ["x"], [True]), {}, "has True"),
            (("q", ["x"], ["3"]), {}, "has '3'"),
            (("q", ["x"], [2**40]), {}, "from -100 to 100"),
            (("q", ["x"]), {"instruction": 7}, "`instruction` must be"),
            (("q", ["x"]), {"instruction_aware": "yes"}, "`instruction_aware` of query 'q'"),
            (("q", ["x"]), {"attributes": "date"}, "`attributes` must be a list"),
            (("q", ["x"]), {"id": 7}, "`id` of query 'q' must be a str"),
            (("\ud800", ["x"]), {}, "without lone surrogates"),
            (("q", [Document("x", id="\ud800")]), {}, "an id must be a str without lone"),
        ],
    )
    def test_unusable_input_is_named(self, arguments, options, message):
        with pytest.raises(InputError, match=message.replace("(", r"\(")):
            JudgedQuery(*arguments, **options)


class TestScenarios:
    def test_lanes_become_queries(self):
        queries = queries_from_scenarios([make_scenario(0), make_scenario(1)])
        assert [query.id for query in queries[:4]] == [
            "s0/none",
            "s0/neutral",
            "s0/glossary",
            "s0/recency",
        ]
        assert [query.instruction_aware for query in queries[:4]] == [False, False, True, True]
        assert [query.cluster for query in queries] == ["s0"] * 4 + ["s1"] * 4
        assert queries[0].instruction is None
        assert queries[2].instruction == Instruction("note 0", today="2026-01-31")
        assert queries[2].grades == {"d0": 0, "d1": 0, "d2": 3, "d3": 2}
        assert queries[2].attributes == ("source",)

    def test_a_second_lane_of_a_kind_is_numbered(self):
        value = make_scenario().model_dump(mode="json")
        value["lanes"].append(value["lanes"][2] | {"instruction": "another"})
        queries = queries_from_scenarios([Scenario.model_validate(value)])
        assert [query.id for query in queries[2:]] == ["s0/glossary", "s0/recency", "s0/glossary-2"]

    def test_with_and_without_is_the_lift_that_evaluate_reports(self):
        scenarios = [make_scenario(i) for i in range(8)]
        model = pseudo_random()
        report = evaluate(model, scenarios)
        comparison = compare(System(model, None), System(model), queries_from_scenarios(scenarios))
        aware = comparison.instruction_aware
        assert aware.measures[NDCG].a == report.ndcg_withheld
        assert aware.measures[NDCG].b == report.ndcg_instructed
        assert aware.measures[NDCG].difference == report.lift
        assert comparison.generic.measures[NDCG].b == report.ndcg_neutral

    def test_lanes_without_instruction_say_nothing_about_an_instruction(self):
        scenarios = [make_scenario(i) for i in range(3)]
        model = Reranker(OverlapScorer())
        comparison = compare(System(model, None), System(model), queries_from_scenarios(scenarios))
        assert comparison.asked_alike == 3
        assert {query.id for query in comparison.per_query} == {
            f"s{i}/{kind}" for i in range(3) for kind in ("neutral", "glossary", "recency")
        }
        assert comparison.generic.queries == comparison.generic.clusters == 3
        # Between models they are a comparison like any other.
        comparison = compare(
            System(model), System(pseudo_random()), queries_from_scenarios(scenarios)
        )
        assert (comparison.asked_alike, comparison.generic.queries) == (0, 6)

    def test_each_question_is_asked_once(self):
        model = pseudo_random()
        queries = queries_from_scenarios([make_scenario(i) for i in range(2)])
        compare(System(model, None), System(model), queries)
        asked = [(r.query, r.instruction) for r in model.scorer.requests]
        assert len(asked) == len(set(asked)) == 2 * 4
        assert all("wiki" in request.candidates[0].attributes for request in model.scorer.requests)

    def test_intervals_and_tests_go_by_scenario(self):
        scenarios = [make_scenario(i) for i in range(3)]
        comparison = compare(
            System(pseudo_random("a")),
            System(pseudo_random("b")),
            queries_from_scenarios(scenarios),
        )
        assert "over clusters of queries" in comparison.interval
        assert "for clusters of queries" in comparison.test
        assert (comparison.pooled.queries, comparison.pooled.clusters) == (12, 3)
        # Three signs have eight combinations, so that p is a multiple of 1/4.
        p_value = comparison.pooled.measures[NDCG].p_value
        assert p_value * 4 == pytest.approx(round(p_value * 4))
        assert comparison.pooled.measures[NDCG].neutral is None


class TestCompare:
    @pytest.mark.parametrize("same", [True, False])
    def test_a_system_against_itself(self, same):
        model = pseudo_random()
        other = model if same else pseudo_random()
        comparison = compare(
            System(model), System(other), make_queries(), measures=[NDCG, "RR", "P(rel=2)@1"]
        )
        for measure in comparison.pooled.measures.values():
            assert measure.a == measure.b
            assert measure.difference == Estimate(
                value=0, low=0, high=0, n=12, clusters=measure.a.clusters
            )
            assert measure.p_value == measure.p_adjusted == 1.0
            assert measure.neutral is True
            assert (measure.wins, measure.ties, measure.losses) == (0, 12, 0)
        assert comparison.pooled.rbo.value == pytest.approx(1)
        assert comparison.pooled.kendall_tau.value == pytest.approx(1)
        assert comparison.pooled.overlap.value == 1
        assert comparison.pooled.same_order == 12
        assert comparison.examples == ()
        assert comparison.a.label != comparison.b.label
        # The same question to the same model is asked once.
        assert len(model.scorer.requests) == 12

    def test_an_oracle_beats_chance_and_both_have_the_values_of_theory(self):
        queries = make_queries(60)
        comparison = compare(System(pseudo_random()), System(oracle(queries)), queries)
        measure = comparison.pooled.measures[NDCG]
        assert measure.b.value == pytest.approx(1)
        discounts = sum(1 / math.log2(rank + 1) for rank in range(1, 5))
        expected = sum(2**g - 1 for g in range(4)) / 4 * discounts / dcg([3, 2, 1, 0])
        assert measure.a.low < expected < measure.a.high
        assert measure.difference.value == pytest.approx(1 - measure.a.value)
        # None of the draws was as extreme, and the draw that was observed counts as one.
        assert measure.p_value == pytest.approx(2 / 10_000)
        assert measure.neutral is False
        assert measure.losses == 0
        assert comparison.instruction_aware == comparison.pooled
        assert comparison.generic is None

    def test_constant_scores_keep_the_order_given(self):
        constant = reranker(lambda *key: 0.5, "constant")
        queries = make_queries(6, grades=(0, 1, 2, 3))
        comparison = compare(System(constant), System(oracle(queries)), queries)
        measure = comparison.pooled.measures[NDCG]
        assert measure.a.value == pytest.approx(dcg([0, 1, 2, 3]) / dcg([3, 2, 1, 0]))
        # The reverse order of four: no pair agrees.
        assert comparison.pooled.kendall_tau.value == pytest.approx(-1)
        [*_, last] = comparison.per_query
        assert [(each.id, each.rank_a, each.rank_b) for each in last.moved] == [
            ("0", 1, 4),
            ("3", 4, 1),
            ("1", 2, 3),
        ]
        # The best three of each have two in common.
        assert comparison.pooled.overlap.value == pytest.approx(2 / 3)

    def test_swapping_the_systems_turns_the_difference_round(self):
        queries = make_queries()
        a, b = System(pseudo_random("a")), System(pseudo_random("b"))
        there, back = compare(a, b, queries), compare(b, a, queries)
        one, two = there.pooled.measures[NDCG], back.pooled.measures[NDCG]
        assert (one.a, one.b, one.wins) == (two.b, two.a, two.losses)
        assert one.difference.value == pytest.approx(-two.difference.value)
        assert one.p_value == pytest.approx(two.p_value, abs=0.02)
        assert there.pooled.rbo == back.pooled.rbo

    def test_two_instructions_reach_every_query(self):
        model = pseudo_random()
        queries = [
            JudgedQuery("one", TEXTS, [3, 0, 0, 0], instruction="its own", instruction_aware=True),
            JudgedQuery("two", TEXTS, [3, 0, 0, 0], instruction_aware=False),
        ]
        comparison = compare(
            System(model, "Prefer reports."),
            System(model, Instruction(rules="Prefer notes")),
            queries,
        )
        assert {(r.query, r.instruction) for r in model.scorer.requests} == set(
            itertools.product(["one", "two"], ["Prefer reports.", "Prefer notes."])
        )
        assert (comparison.a.label, comparison.b.label) == ("Prefer reports.", "Prefer notes.")
        assert (comparison.asked_alike, comparison.generic.queries) == (0, 1)

    def test_two_models_are_told_apart_by_name(self):
        comparison = compare(
            System(pseudo_random("a")), System(pseudo_random("b")), make_queries(3)
        )
        assert (comparison.a.label, comparison.b.label) == ("randoma", "randomb")
        assert (comparison.a.model, comparison.b.model) == ("randoma", "randomb")

    def test_a_query_that_occurs_twice_is_asked_about_the_documents_of_each(self):
        scorer = ScriptedScorer(scores={"x": 0.1, "y": 0.9, "z": 0.5})
        documents = [Document("x", metadata={"n": 1}), Document("y")]
        queries = [
            JudgedQuery("q", documents, id="both"),
            JudgedQuery("q", ["y", "z"], id="others"),
            JudgedQuery("q", documents, attributes=["n"], id="with attributes"),
        ]
        compare(System(Reranker(scorer)), System(pseudo_random()), queries)
        assert [[(c.text, c.attributes) for c in r.candidates] for r in scorer.requests] == [
            [("x", ""), ("y", "")],
            [("y", ""), ("z", "")],
            [("x", "n: 1"), ("y", "")],
        ]

    def test_texts_that_are_no_unicode_do_not_stop_a_report(self):
        model = pseudo_random()
        queries = [
            JudgedQuery("\ud800", ["\udfff", "b", "c"], instruction="\ud800", id=f"q{i}")
            for i in range(3)
        ]
        comparison = compare(System(model, "\udfff x"), System(model, label="\ud800"), queries)
        assert Comparison.model_validate_json(comparison.model_dump_json())
        assert comparison.examples[0]._repr_html_().encode()

    def test_a_label_can_be_chosen(self):
        model = pseudo_random()
        comparison = compare(
            System(model, None, label="plain"), System(model, label="steered"), make_queries(3)
        )
        assert (comparison.a.label, comparison.b.label) == ("plain", "steered")
        assert comparison.examples[0].labels[0] == "plain"
        assert comparison.examples[0].labels[1].startswith("steered: want ")

    def test_a_scope_around_the_comparison_does_not_reach_in(self):
        model = pseudo_random()
        with use_instruction("of the scope"):
            compare(System(model, None), System(model), make_queries(2))
        assert {r.instruction for r in model.scorer.requests} == {"", "want 0", "want 1"}

    def test_without_labels_it_says_how_rankings_differ(self):
        scorer = ScriptedScorer(
            scores={"w": 4, "x": 3, "y": 2, "z": 1}, by_instruction={"flip": {"z": 9, "w": 0}}
        )
        model = Reranker(scorer)
        queries = [
            JudgedQuery("moved", ["w", "x", "y", "z"], instruction="flip"),
            JudgedQuery("kept", ["w", "x", "y", "z"], instruction="harmless"),
        ]
        comparison = compare(System(model, None), System(model), queries, top_k=2)
        assert comparison.pooled.measures == {}
        assert comparison.graded == 0
        assert comparison.a.judged is None
        moved, kept = comparison.per_query
        # w x y z becomes z x y w.
        assert (moved.id, kept.id) == ("moved", "kept")
        assert moved.values == {}
        assert moved.rbo == pytest.approx(rank_biased_overlap("wxyz", "zxyw"))
        assert moved.kendall_tau == pytest.approx(stats.kendalltau([1, 2, 3, 4], [4, 2, 3, 1])[0])
        assert moved.overlap == 1 / 2
        assert [(each.id, each.rank_a, each.rank_b) for each in moved.moved] == [
            ("0", 1, 4),
            ("3", 4, 1),
        ]
        assert (kept.rbo, kept.kendall_tau, kept.moved) == (pytest.approx(1), pytest.approx(1), ())
        assert comparison.pooled.same_order == 1
        assert comparison.pooled.rbo.value == pytest.approx((1 + moved.rbo) / 2)
        assert len(comparison.examples) == 1

    def test_queries_of_unknown_kind_take_part_in_the_whole_only(self):
        queries = [
            JudgedQuery("a", TEXTS, [3, 0, 0, 0], instruction_aware=True),
            JudgedQuery("b", TEXTS, [0, 3, 0, 0], instruction_aware=False),
            JudgedQuery("c", TEXTS, [0, 0, 3, 0]),
            JudgedQuery("d", TEXTS),
            JudgedQuery("e", TEXTS, [0, 0, 0, 0]),
        ]
        comparison = compare(System(pseudo_random("a")), System(pseudo_random("b")), queries)
        sizes = {name: group.queries for name, group in comparison.groups()}
        assert sizes == {"all": 5, "instruction-aware": 1, "generic": 1}
        # Without grades, or without a relevant one, there is nothing to measure.
        assert (comparison.graded, comparison.without_relevant) == (4, 1)
        assert comparison.pooled.measures[NDCG].difference.n == 3
        assert {q.id for q in comparison.per_query if not q.values} == {"d", "e"}
        assert comparison.pooled.rbo.n == 5

    def test_several_measures_are_adjusted_together(self):
        queries = make_queries(8)
        names = [NDCG, "nDCG@10", "RR(rel=3)", "P@1"]
        comparison = compare(
            System(pseudo_random("x")), System(oracle(queries)), queries, measures=names
        )
        found = comparison.pooled.measures
        assert list(found) == names
        raw = [measure.p_value for measure in found.values()]
        assert [measure.p_adjusted for measure in found.values()] == pytest.approx(holm(raw))
        assert "Holm" in comparison.test

    def test_means_are_those_of_ir_measures(self):
        queries = make_queries(10)
        a, b = pseudo_random("a"), pseudo_random("b")
        names = ["nDCG@10", "AP(rel=2)", "RR", "P@2"]
        comparison = compare(System(a), System(b), queries, measures=names)
        qrels = [
            ir_measures.Qrel(query.id, document, grade)
            for query in queries
            for document, grade in query.grades.items()
        ]
        for model, side in ((a, "a"), (b, "b")):
            run = {
                query.id: {
                    doc.id: model.scorer.function(query.query, query.instruction.render(), doc.text)
                    for doc in query.documents
                }
                for query in queries
            }
            measures = [ir_measures.parse_measure(name) for name in names]
            reference = ir_measures.calc_aggregate(measures, qrels, run)
            for measure, value in reference.items():
                ours = getattr(comparison.pooled.measures[str(measure)], side)
                assert ours.value == pytest.approx(value)

    def test_scores_that_are_not_finite_come_last_and_are_counted(self):
        broken = reranker(lambda q, i, text: math.nan if "alpha" in text else 0.5, "broken")
        queries = make_queries(6, grades=(3, 0, 0, 0))
        comparison = compare(System(reranker(lambda *key: 0.5, "fine")), System(broken), queries)
        assert (comparison.a.non_finite, comparison.b.non_finite) == (0, 6)
        assert comparison.pooled.measures[NDCG].b.value == pytest.approx(1 / math.log2(5))
        assert comparison.examples[0].rankings[1].non_finite == (0,)
        assert Comparison.model_validate_json(comparison.model_dump_json())

    def test_an_error_keeps_its_type_and_names_the_query(self):
        def fail(query, instruction, text):
            if query == "query 2":
                raise ScorerError("out of memory")
            return 0.5

        broken = System(reranker(fail, "broken"))
        with pytest.raises(
            ScorerError, match=r"query 'query 2', broken with 'own instructions': out of memory"
        ):
            compare(System(pseudo_random()), broken, make_queries(4))

    def test_a_model_without_an_instruction_channel_says_so_with_the_query(self):
        plain = Reranker(OverlapScorer(supports_instructions=False))
        with pytest.raises(InstructionNotSupportedError, match=r"query 'query 0'.*no channel"):
            compare(System(plain, None), System(plain), make_queries(2))

    def test_one_score_for_each_document(self):
        class Short:
            scorer = OverlapScorer(name="short")

            def score(self, query, documents, *, instruction=None, attributes=()):
                return [0.5]

        with pytest.raises(ScorerError, match=r"query 'query 0', short.*1 scores for 4 documents"):
            compare(System(Short()), System(pseudo_random()), make_queries(2))

    def test_progress_counts_queries(self):
        seen = []
        compare(
            System(pseudo_random("a")),
            System(pseudo_random("b")),
            make_queries(3),
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(1, 3), (2, 3), (3, 3)]

    def test_json_brings_everything_back_but_the_examples(self):
        queries = queries_from_scenarios([make_scenario(i) for i in range(7)])
        model = pseudo_random()
        comparison = compare(System(model, None), System(model), queries, measures=[NDCG, "AP"])
        assert comparison.examples
        back = Comparison.model_validate_json(comparison.model_dump_json())
        assert back == comparison.model_copy(update={"examples": ()})
        assert "examples" not in json.loads(comparison.model_dump_json())
        assert "gamma note" not in comparison.model_dump_json()
        with pytest.raises(ValueError, match="frozen"):
            comparison.margin = 1

    def test_equal_scores_give_equal_reports(self):
        first, second = (
            compare(System(pseudo_random("a")), System(pseudo_random("b")), make_queries())
            for _ in range(2)
        )
        assert first.model_dump_json() == second.model_dump_json()

    def test_examples_are_the_queries_that_changed_most_and_show_themselves_safely(self):
        hostile = "<script>alert(1)</script> \u202eevil"
        model = pseudo_random()
        queries = [
            JudgedQuery(f"q{i}", [hostile, "b", "c", "d", "e"], instruction=f"i{i}")
            for i in range(8)
        ]
        comparison = compare(System(model, None), System(model), queries, examples=2)
        assert len(comparison.examples) == 2
        assert all(isinstance(each, RankingComparison) for each in comparison.examples)
        assert [each.rankings[0].query for each in comparison.examples] == [
            each.id for each in comparison.per_query[:2]
        ]
        values = [each.rbo for each in comparison.per_query]
        assert values == sorted(values)
        plain, own = comparison.examples[0].labels
        assert plain == "no instruction"
        assert re.fullmatch(r"own instructions: i\d", own)
        html = comparison.examples[0]._repr_html_()
        assert "<script" not in html
        assert "\u202e" not in html
        assert "instruction" in html
        assert hostile not in repr(comparison)
        assert compare(System(model, None), System(model), queries, examples=0).examples == ()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"measures": ["nonsense@10"]}, "`measures` has 'nonsense@10'"),
            ({"margin": 0}, "`margin` must be a number above 0, got 0"),
            ({"margin": math.nan}, "`margin`"),
            ({"margin": math.inf}, "`margin`"),
            ({"top_k": 0}, "`top_k` must be an int of at least 1, got 0"),
            ({"top_k": True}, "`top_k`"),
            ({"rbo_p": 1}, "`rbo_p` must lie between 0 and 1, got 1"),
        ],
    )
    def test_settings_are_checked_before_anything_is_scored(self, options, message):
        model = pseudo_random()
        with pytest.raises(InputError, match=message):
            compare(System(model, None), System(model), make_queries(2), **options)
        assert model.scorer.requests == []

    def test_something_must_be_compared(self):
        model = pseudo_random()
        with pytest.raises(InputError, match="`queries` is empty"):
            compare(System(model, None), System(model), [])
        generic = [JudgedQuery(f"q{i}", ["x"]) for i in range(2)]
        with pytest.raises(InputError, match="all 2 are asked the same"):
            compare(System(model, None), System(model), generic)
        with pytest.raises(InputError, match="id 'q0' more than once"):
            compare(System(model, "x"), System(model), [generic[0], generic[0]])

    @pytest.mark.parametrize("wrong", [OverlapScorer(), "lanerank-mini", None])
    def test_a_system_needs_a_reranker(self, wrong):
        with pytest.raises(InputError, match="`reranker` must be a Reranker"):
            System(wrong)

    def test_a_system_needs_an_instruction(self):
        with pytest.raises(InputError, match="`instruction` must be a str"):
            System(pseudo_random(), ["a", "b"])

    def test_the_word_own_is_an_instruction_like_any_other(self):
        model = pseudo_random()
        assert System(model).instruction is OWN
        assert System(model, "own").instruction == Instruction("own")


RUN_A = {"1": {"x": 3.0, "y": 2.0, "z": 1.0}, "2": {"x": 1.0}, "3": {"x": 1.0, "y": 0.5}}
RUN_B = {"1": {"x": 1.0, "y": 3.0, "z": 2.0}, "2": {"x": 1.0}, "4": {"y": 1.0}}
QRELS = {"1": {"y": 1, "w": 0}, "2": {"x": 2}, "3": {"y": 1}, "4": {"y": 1}, "9": {"y": 1}}


class TestCompareRuns:
    def test_by_hand(self):
        comparison = compare_runs(RUN_A, RUN_B, QRELS, measures=["RR"], labels=("bm25", "ours"))
        values = {each.id: each.values for each in comparison.per_query}
        # A run without the query has a reciprocal rank of 0 there.
        assert values == {
            "1": {"RR": (0.5, 1.0)},
            "2": {"RR": (1.0, 1.0)},
            "3": {"RR": (0.5, 0.0)},
            "4": {"RR": (0.0, 1.0)},
        }
        measure = comparison.pooled.measures["RR"]
        assert measure.difference.value == pytest.approx((0.5 + 0 - 0.5 + 1) / 4)
        assert (measure.wins, measure.ties, measure.losses) == (2, 1, 1)
        # Of 0.5, -0.5 and 1 with any signs, 8 sums: 2, 1, 1, 0, 0, -1, -1, -2; 6 are as far as 1.
        assert measure.p_value == pytest.approx(6 / 8)
        assert (comparison.a.label, comparison.b.label) == ("bm25", "ours")
        assert (comparison.a.missing, comparison.b.missing, comparison.unanswered) == (1, 1, 1)
        # A: 1/3 of three documents, 1/1, 1/2. B: 1/3, 1/1, 1/1.
        assert comparison.a.judged == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
        assert comparison.b.judged == pytest.approx((1 / 3 + 1 + 1) / 3)
        assert comparison.a.model is None

    def test_a_missing_query_has_nothing_in_common(self):
        comparison = compare_runs(RUN_A, RUN_B)
        by_id = {each.id: each for each in comparison.per_query}
        assert (by_id["3"].rbo, by_id["3"].overlap, by_id["3"].kendall_tau) == (0, 0, None)
        # y fell from rank 2 to below an empty list, a distance of one; so did x from rank 1.
        assert [(each.id, each.rank_a, each.rank_b) for each in by_id["3"].moved] == [
            ("y", 2, None),
            ("x", 1, None),
        ]
        assert by_id["2"].kendall_tau is None
        assert comparison.pooled.kendall_tau.n == 1

    def test_kinds_and_clusters(self):
        comparison = compare_runs(
            RUN_A,
            RUN_B,
            QRELS,
            instruction_aware={"1": True, "2": False, "3": None},
            clusters={"1": "c", "2": "c"},
        )
        assert [(n, g.queries) for n, g in comparison.groups()] == [
            ("all", 4),
            ("instruction-aware", 1),
            ("generic", 1),
        ]
        assert comparison.pooled.clusters == 3

    def test_agrees_with_ir_measures_on_the_same_run(self):
        qrels = random_qrels(25)
        rng = random.Random(8)
        runs = [
            {f"q{i}": {f"d{j}": rng.random() for j in rng.sample(range(30), 15)} for i in range(25)}
            for _ in range(2)
        ]
        names = ["nDCG@10", "AP", "P(rel=2)@5"]
        comparison = compare_runs(*runs, qrels, measures=names)
        for run, side in zip(runs, ("a", "b"), strict=True):
            measures = [ir_measures.parse_measure(name) for name in names]
            for measure, value in ir_measures.calc_aggregate(measures, qrels, run).items():
                ours = getattr(comparison.pooled.measures[str(measure)], side)
                assert ours.value == pytest.approx(value)

    def test_without_qrels(self):
        comparison = compare_runs(RUN_A, RUN_A)
        assert comparison.pooled.measures == {}
        assert comparison.pooled.rbo.value == pytest.approx(1)

    def test_inputs_stay_as_they_are(self):
        before = json.dumps([RUN_A, RUN_B, QRELS])
        compare_runs(RUN_A, RUN_B, QRELS)
        assert json.dumps([RUN_A, RUN_B, QRELS]) == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("run.txt", RUN_B), "`run_a` must map .* got 'run.txt'; read a file with read_run"),
            ((RUN_A, {"1": ["x"]}), "`run_b` must map"),
            ((RUN_A, {1: {"x": 1.0}}), "`run_b`: a query id must be a str .* got 1"),
            ((RUN_A, {"1": {"\ud800": 1.0}}), "a document id must be a str without lone"),
            ((RUN_A, RUN_B, "qrels.txt"), "`qrels` must map .* read_qrels"),
            ((RUN_A, {"1": {"x": "first"}}), "`run_b` has a score that is no number"),
            ((RUN_A, {"1": {"x": None}}), "`run_b` has a score that is no number"),
            ((RUN_A, {"q1": {"x": 1.0}}), "no query in common: .*'1'.* and .*'q1'"),
            (({}, {}), "no query in common"),
            ((RUN_A, RUN_B, {"q1": {"x": 1}}), "`qrels` has no query of the runs"),
            ((RUN_A, RUN_B, {}), "`qrels` has no query of the runs"),
            ((RUN_A, RUN_B, {"1": {"x": "high"}}), "`grades` of query '1' has 'high'"),
        ],
    )
    def test_unusable_input_is_named(self, arguments, message):
        with pytest.raises(InputError, match=message):
            compare_runs(*arguments)
