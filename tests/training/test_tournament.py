"""Tournaments: which pairs are played, how strong entries are, and what is reported."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import combinations

import choix
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from lanerank.errors import InputError
from lanerank.training.judge import Judge
from lanerank.training.pairing import plan_pairs
from lanerank.training.panel import Comparison, JudgePanel
from lanerank.training.quadruples import read_quadruples, write_quadruples
from lanerank.training.questions import Entry
from lanerank.training.tournament import fit_strengths, fit_tournament

ALMOST_NONE = 1e-9


def field(size: int, query: str = "q", instruction: str | None = "i") -> list[Entry]:
    return [
        Entry(query=query, instruction=instruction, document=f"{query} document {number}")
        for number in range(size)
    ]


def game(first: int, second: int, preference: float) -> Comparison:
    return Comparison(first=first, second=second, preference=preference)


def expit(x):
    return 1 / (1 + np.exp(-x))


# Pairs


@given(
    size=st.integers(0, 30),
    games=st.sampled_from([2, 4, 6]),
    small=st.integers(0, 8),
    seed=st.integers(0, 5),
)
def test_entries_of_a_request_are_joined_by_few_games(size, games, small, seed) -> None:
    pairs = plan_pairs(field(size), games=games, all_pairs_up_to=small, seed=seed)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= low < high < size for low, high in pairs)
    if size <= max(small, games + 1):
        assert pairs == list(combinations(range(size), 2))
        return
    graph = nx.Graph(pairs)
    assert len(graph) == size
    assert nx.is_biconnected(graph)
    assert max(dict(graph.degree).values()) <= games
    # Cycles rarely share pairs, so that nearly all games are played.
    assert len(pairs) >= 0.85 * size * games / 2


def test_large_requests_play_all_their_games_and_are_close_to_each_other() -> None:
    pairs = plan_pairs(field(100), games=4)
    assert len(pairs) == 200
    graph = nx.Graph(pairs)
    assert set(dict(graph.degree).values()) == {4}
    assert nx.diameter(graph) <= 8


def test_requests_play_for_themselves() -> None:
    entries = field(9) + field(9, instruction=None) + field(9, query="p")
    pairs = plan_pairs(entries)
    assert {(low // 9, high // 9) for low, high in pairs} == {(0, 0), (1, 1), (2, 2)}
    for request in range(3):
        graph = nx.Graph([pair for pair in pairs if pair[0] // 9 == request])
        assert nx.is_connected(graph)


def test_other_queries_do_not_change_the_pairs() -> None:
    ours, theirs = field(20), field(20, query="p")
    alone = plan_pairs(ours, cross_documents=2, seed=3)
    shifted = plan_pairs(theirs + ours, cross_documents=2, seed=3)
    assert [(a - 20, b - 20) for a, b in shifted if a >= 20] == alone
    assert plan_pairs(ours, seed=4) != alone


def test_documents_are_compared_across_the_requests_of_their_query() -> None:
    instructions = [None, "i", "j", "k"]
    entries = [e for i in instructions for e in field(5, instruction=i)]
    entries += field(5, query="p")
    pairs = plan_pairs(entries, cross_documents=2)
    across = [(a, b) for a, b in pairs if entries[a].request_key != entries[b].request_key]
    assert len({entries[a].document for a, _ in across}) == 2
    assert all(entries[a].document == entries[b].document for a, b in across)
    assert len(across) == 2 * 6
    within = plan_pairs(entries)
    assert set(pairs) - set(across) == set(within)
    everything = plan_pairs(entries, cross_documents=100)
    assert len(everything) == len(within) + 5 * 6


def test_two_entries_of_one_document_under_one_request_do_not_cross() -> None:
    entries = [*field(2), *field(2)]
    assert set(plan_pairs(entries, cross_documents=5)) == set(plan_pairs(entries))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"games": 3}, "`games`"),
        ({"games": 0}, "`games`"),
        ({"games": True}, "`games`"),
        ({"all_pairs_up_to": -1}, "`all_pairs_up_to`"),
        ({"cross_documents": 0.5}, "`cross_documents`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_plan_options_are_checked(options, problem) -> None:
    with pytest.raises(InputError, match=problem):
        plan_pairs(field(3), **options)


# Strengths


def test_two_entries_by_hand() -> None:
    games = np.array([[0.0, 3.0], [1.0, 0.0]])
    strengths, variances = fit_strengths(games, prior=ALMOST_NONE)
    # The chance is 3/4, so the difference is log 3, half of it on each side of the mean.
    assert strengths == pytest.approx([np.log(3) / 2, -np.log(3) / 2])
    # 4 games of information 3/4 * 1/4 on the difference; each strength is half of that.
    assert variances == pytest.approx(np.full(2, 1 / (4 * 3 / 16) / 4))
    normal, spread = fit_strengths(games, model="thurstone", prior=ALMOST_NONE)
    difference = stats.norm.ppf(0.75)
    assert normal == pytest.approx([difference / 2, -difference / 2], abs=1e-5)
    information = 4 * stats.norm.pdf(difference) ** 2 / (3 / 16)
    assert spread == pytest.approx(np.full(2, 1 / information / 4), abs=1e-5)


def test_the_prior_is_so_many_drawn_games() -> None:
    # 3 wins and half a drawn game: each side is given a quarter, so 3.25 to 0.25.
    strengths, _ = fit_strengths(np.array([[0.0, 3.0], [0.0, 0.0]]), prior=0.5)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(13))


def test_three_entries_by_hand() -> None:
    # Won 2, 4, 8 against each other in proportion to weights 1, 2, 4.
    games = np.array([[0.0, 2.0, 1.0], [4.0, 0.0, 2.0], [4.0, 4.0, 0.0]])
    strengths, variances = fit_strengths(games, prior=ALMOST_NONE)
    assert strengths == pytest.approx(np.log([1, 2, 4]) - np.log(2), abs=1e-6)
    # Information 6 * 2/9 between neighbours and 5 * 4/25 between the ends.
    a, b = 6 * 2 / 9, 5 * 4 / 25
    laplacian = np.array([[a + b, -a, -b], [-a, 2 * a, -a], [-b, -a, a + b]])
    assert variances == pytest.approx(np.diag(np.linalg.pinv(laplacian)), abs=1e-6)


LINKS = {
    "bradley-terry": (lambda d: -np.logaddexp(0, -d), 1.0),
    "thurstone": (stats.norm.logcdf, 1.0),
}


@pytest.mark.parametrize("model", LINKS)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12), prior=st.floats(0.05, 2))
def test_strengths_maximise_the_likelihood(model, seed, size, prior) -> None:
    log_chance, _ = LINKS[model]
    rng = np.random.default_rng(seed)
    games = rng.random((size, size)) * (rng.random((size, size)) < 0.5)
    np.fill_diagonal(games, 0)
    strengths, variances = fit_strengths(games, model=model, prior=prior)

    def loss(values) -> float:
        chances = log_chance(values[:, None] - values[None, :])
        drawn = prior / (size - 1) / 2 * (1 - np.eye(size))
        return -float(((games + drawn) * chances).sum())

    direct = optimize.minimize(loss, np.zeros(size), method="BFGS", options={"gtol": 1e-7}).x
    assert strengths == pytest.approx(direct - direct.mean(), abs=2e-3)
    assert strengths.mean() == pytest.approx(0, abs=1e-9)
    assert (variances > 0).all()


def test_whole_games_give_what_choix_gives_for_lists_of_pairs() -> None:
    rng = np.random.default_rng(0)
    won = [tuple(rng.permutation(6)[:2].tolist()) for _ in range(200)]
    games = np.zeros((6, 6))
    for winner, loser in won:
        games[winner, loser] += 1
    strengths, _ = fit_strengths(games, prior=ALMOST_NONE)
    assert strengths == pytest.approx(choix.opt_pairwise(6, won, alpha=1e-9), abs=1e-3)


def test_standard_errors_are_those_of_repeated_tournaments() -> None:
    rng = np.random.default_rng(0)
    true = np.array([-1.0, -0.4, 0.0, 0.4, 1.0])
    chances = expit(true[:, None] - true[None, :])
    upper = np.triu(np.ones((5, 5)), 1) > 0
    found = []
    for _ in range(300):
        games = np.where(upper, rng.binomial(30, chances), 0)
        games = games + np.where(upper, 30 - games, 0).T
        found.append(fit_strengths(games.astype(float), prior=ALMOST_NONE))
    strengths, variances = (np.array(part) for part in zip(*found, strict=True))
    assert strengths.std(axis=0) == pytest.approx(np.sqrt(variances.mean(axis=0)), rel=0.15)


# Scores


def noisy_judge(truth: dict[tuple, float]):
    """Draws the winner by Bradley-Terry from known strengths, the same for the same question."""

    def model(prompt: str) -> str:
        data = json.loads(prompt.rpartition("\n\n")[2])
        if "document" in data:
            keys = [
                (data[r]["query"], data[r]["instruction"], data["document"]["text"])
                for r in ("request_A", "request_B")
            ]
        else:
            keys = [
                (data["query"], data["instruction"], data[d]["text"])
                for d in ("document_A", "document_B")
            ]
        a, b = (truth[key] for key in keys)
        drawn = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) / 2**64
        return json.dumps({"reason": "r", "preference": "A" if drawn < expit(a - b) else "B"})

    return model


def known_field() -> tuple[list[Entry], np.ndarray]:
    """Eight queries under three instructions, of which some suit the documents and some do not."""
    rng = np.random.default_rng(7)
    entries, strengths = [], []
    for query in range(8):
        for instruction in (None, "i", "j"):
            entries += field(12, f"query {query}", instruction)
            strengths += (rng.normal(0, 1.5) + rng.normal(0, 2, 12)).tolist()
    return entries, np.array(strengths)


@pytest.fixture(scope="module")
def judged():
    entries, strengths = known_field()
    truth = {
        (e.query, e.instruction, e.document): s for e, s in zip(entries, strengths, strict=True)
    }
    judges = [Judge(noisy_judge(truth), name="judge")]
    found = {}
    for cross in (0, 12):
        pairs = plan_pairs(entries, games=8, cross_documents=cross)
        found[cross] = JudgePanel(judges, order="both").compare(entries, pairs).comparisons
    return entries, strengths, found


@pytest.mark.parametrize("model", ["bradley-terry", "thurstone"])
def test_a_judge_of_known_strengths_is_recovered_on_the_scale_of_a_few_grades(
    judged, model
) -> None:
    entries, strengths, found = judged
    truth = expit(strengths)
    grades = {i: float(truth[i]) for i in range(0, len(entries), 4)}
    fit = fit_tournament(entries, found[0], grades=grades, model=model)
    scores = np.array([q.score for q in fit.quadruples])
    errors = np.array([q.uncertainty for q in fit.quadruples])
    assert stats.spearmanr(scores, truth).statistic > 0.9
    assert np.abs(scores - truth).mean() < 0.09
    # Calibrated: as high on average, and off by as much as the standard errors say.
    assert scores.mean() == pytest.approx(truth.mean(), abs=0.02)
    assert 0.88 < (np.abs(scores - truth) < 1.96 * errors).mean()
    assert errors.mean() < 0.2
    assert fit.report.anchored_components == fit.report.components == 24
    assert fit.report.anchor_error.value < 0.08
    assert fit.report.warnings() == []


def test_cross_comparisons_put_instructions_on_one_scale(judged) -> None:
    entries, strengths, found = judged
    apart, joined = (fit_tournament(entries, found[cross]) for cross in (0, 12))
    assert (apart.report.components, joined.report.components) == (24, 8)
    assert joined.report.split_requests == ()

    def mean_over_queries(fit) -> float:
        estimates = np.array(fit.strengths).reshape(8, 36)
        truths = strengths.reshape(8, 36)
        return np.mean(
            [stats.spearmanr(a, b).statistic for a, b in zip(estimates, truths, strict=True)]
        )

    assert mean_over_queries(apart) < 0.83
    assert mean_over_queries(joined) > 0.93


def test_without_grades_a_score_is_the_chance_against_the_mean_of_the_part() -> None:
    for model, cdf in (("bradley-terry", expit), ("thurstone", stats.norm.cdf)):
        fit = fit_tournament(field(2), [game(0, 1, 0.5)] * 20, model=model, prior=0.001)
        assert fit.quadruples[0].score == pytest.approx(float(cdf(fit.strengths[0])))
        assert cdf(fit.strengths[0] - fit.strengths[1]) == pytest.approx(0.75, abs=1e-3)
        slope = (cdf(fit.strengths[0] + 1e-5) - cdf(fit.strengths[0] - 1e-5)) / 2e-5
        assert fit.quadruples[0].uncertainty == pytest.approx(slope * fit.deviations[0], rel=1e-3)
    assert fit.report.slope is None


def test_a_part_without_grades_stays_as_uncertain_as_it_is() -> None:
    entries = field(6) + field(6, query="p")
    pairs = list(combinations(range(6), 2))
    comparisons = [game(a, b, 0.5) for a, b in pairs] + [game(a + 6, b + 6, 0.5) for a, b in pairs]
    fit = fit_tournament(entries, comparisons, grades={0: 0.9, 3: 0.6, 5: 0.2})
    known, unknown = fit.quadruples[3].uncertainty, fit.quadruples[9].uncertainty
    assert 0 < known < unknown == 0.5
    assert fit.report.anchored_components == 1
    assert "1 of 2 parts have no grade" in fit.report.warnings()[0]
    both = fit_tournament(entries, comparisons, grades={0: 0.9, 3: 0.6, 5: 0.2, 9: 0.5})
    assert both.quadruples[9].uncertainty < unknown


@pytest.mark.parametrize("grades", [None, {20: 0.5}])
@pytest.mark.parametrize("model", ["bradley-terry", "thurstone"])
def test_a_score_is_never_more_uncertain_than_a_number_from_0_to_1_can_be(model, grades) -> None:
    # A chain of ties: how its ends compare, nobody knows.
    fit = fit_tournament(
        field(41),
        [game(place, place + 1, 0.0) for place in range(40)],
        grades=grades,
        model=model,
        prior=0.01,
    )
    assert [q.score for q in fit.quadruples] == pytest.approx([0.5] * 41, abs=1e-3)
    errors = np.array([q.uncertainty for q in fit.quadruples])
    steepness = 0.25 if grades or model == "bradley-terry" else 1 / np.sqrt(2 * np.pi)
    assert steepness * (fit.report.slope or 1) * fit.deviations[0] > 0.6
    assert errors[0] == errors[40] == errors.max() == 0.5


def test_the_scales_variance_is_that_of_its_whole_information_matrix() -> None:
    entries = field(4) + field(4, query="p")
    comparisons = [game(a, b, 0.4) for a, b in combinations(range(4), 2)]
    comparisons += [game(a + 4, b + 4, 0.7) for a, b in combinations(range(4), 2)]
    grades = {0: 0.8, 3: 0.3, 5: 0.6}
    fit = fit_tournament(entries, comparisons, grades=grades)
    strengths, scores = np.array(fit.strengths), np.array([q.score for q in fit.quadruples])
    design = np.array(
        [[s, 1, part == 0, part == 1] for s, part in zip(strengths, fit.parts, strict=True)]
    )
    weight = 0.25 / 0.15**2
    information = np.diag([1 / 4, 1 / 25, 1 / 4, 1 / 4])
    for place in grades:
        chance = scores[place] * (1 - scores[place])
        information += weight * chance * np.outer(design[place], design[place])
    covariance = np.linalg.inv(information)
    logits = np.einsum("ei,ij,ej->e", design, covariance, design)
    logits += fit.report.slope**2 * np.array(fit.deviations) ** 2
    assert [q.uncertainty for q in fit.quadruples] == pytest.approx(
        scores * (1 - scores) * np.sqrt(logits), rel=1e-6
    )


def test_quadruples_carry_their_entries_and_can_be_stored(tmp_path) -> None:
    entry = Entry(
        query="q",
        instruction="i",
        document="d",
        query_id="1",
        document_id="2",
        metadata={"date": "2025-01-01"},
        attributes=["date"],
        today="2025-02-01",
        kind="recency",
    )
    other = entry.model_copy(update={"document": "e", "document_id": "3"})
    fit = fit_tournament([entry, other], [game(0, 1, 0.5)], source="panel")
    row = fit.quadruples[0]
    for name in Entry.model_fields:
        assert getattr(row, name) == getattr(entry, name)
    assert (row.source, row.weight) == ("panel", 1.0)
    assert 0.5 < row.score < 1
    assert row.uncertainty > 0
    write_quadruples(tmp_path / "rows.jsonl", fit.quadruples)
    assert tuple(read_quadruples(tmp_path / "rows.jsonl")) == fit.quadruples


# What is reported


def test_a_request_that_falls_apart_is_reported() -> None:
    entries = field(7)
    comparisons = [game(0, 1, 1), game(2, 3, 1), game(3, 4, 1)]
    fit = fit_tournament(entries, comparisons)
    assert fit.report.components == 2
    assert fit.report.split_requests == (str(entries[0]),)
    assert fit.report.unplayed == (str(entries[5]), str(entries[6]))
    assert fit.parts == (0, 0, 1, 1, 1, None, None)
    assert fit.strengths[5] is None
    assert fit.deviations[6] is None
    assert [q.document for q in fit.quadruples] == [e.document for e in entries[:5]]
    warnings = " ".join(fit.report.warnings())
    for part in ("2 entries were in no comparison", "fall apart", "2 of 2 parts have no grade"):
        assert part in warnings


def test_a_planned_tournament_is_not_reported_as_falling_apart() -> None:
    entries = field(30)
    fit = fit_tournament(entries, [game(a, b, 0.2) for a, b in plan_pairs(entries)])
    assert fit.report.components == 1
    assert fit.report.warnings() == []


def test_circles_are_counted() -> None:
    entries = field(4)
    # 0 > 1 > 2 > 0 is a circle; 3 loses to all, so that the other three triples are in order.
    comparisons = [game(0, 1, 1), game(1, 2, 1), game(0, 2, -1)]
    comparisons += [game(n, 3, 0.5) for n in range(3)]
    report = fit_tournament(entries, comparisons).report
    assert (report.intransitive.value, report.intransitive.n) == (0.25, 4)
    assert report.residual.value > 0.2
    assert "circle" in " ".join(report.warnings())
    tied = fit_tournament(entries, [*comparisons, game(2, 0, -1)]).report
    assert (tied.intransitive.value, tied.intransitive.n) == (0, 2)


@given(seed=st.integers(0, 2**32))
def test_circles_agree_with_a_graph_library(seed) -> None:
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in combinations(range(8), 2) if rng.random() < 0.7]
    comparisons = [game(*rng.permutation(pair).tolist(), rng.choice([-1.0, 1.0])) for pair in pairs]
    graph = nx.DiGraph(
        (c.first, c.second) if c.preference > 0 else (c.second, c.first) for c in comparisons
    )
    kinds = Counter(
        nx.is_directed_acyclic_graph(graph.subgraph(triple))
        for triple in combinations(graph, 3)
        if graph.subgraph(triple).number_of_edges() == 3
    )
    found = fit_tournament(field(8), comparisons).report.intransitive
    if not kinds:
        assert found is None
    else:
        assert found.n == kinds.total()
        assert found.value == pytest.approx(kinds[False] / found.n)


def test_upsets_and_residuals() -> None:
    # 0 beats 1 three times and loses once, with no prior to speak of: expected 3/4.
    report = fit_tournament(
        field(2), [game(0, 1, 1)] * 3 + [game(1, 0, 1), game(0, 1, 0)], prior=ALMOST_NONE
    ).report
    expected = 3.5 / 5
    assert report.upsets.value == 0.25
    assert report.upsets.n == 4
    assert report.residual.value == pytest.approx(
        (3 * (1 - expected) + expected + abs(0.5 - expected)) / 5
    )


def test_an_order_biased_judge_scores_by_place_unless_its_places_are_swapped() -> None:
    entries = field(10)
    worth = {e.document: number for number, e in enumerate(entries)}

    def model(prompt: str) -> str:
        data = json.loads(prompt.rpartition("\n\n")[2])
        a, b = (worth[data[d]["text"]] for d in ("document_A", "document_B"))
        # Sees differences of five places only, and takes the first otherwise.
        return json.dumps({"reason": "r", "preference": "B" if b - a >= 5 else "A"})

    pairs = list(combinations(range(10), 2))

    def correlation(order: str) -> float:
        found = JudgePanel(Judge(model, name="j"), order=order).compare(entries, pairs)
        fit = fit_tournament(entries, found.comparisons)
        return stats.spearmanr(fit.strengths, range(10)).statistic

    assert correlation("both") > 0.98
    assert correlation("both") > correlation("random")


def test_positions_may_be_integers_of_numpy() -> None:
    games = [game(0, 1, 0.5), game(1, 2, 0.5)]
    fits = [
        fit_tournament(field(3), games, grades={kind(0): 0.9, kind(2): 0.2})
        for kind in (int, np.int64)
    ]
    assert fits[0] == fits[1]


def test_comparisons_may_come_from_an_iterator() -> None:
    games = [game(0, 1, 0.5), game(1, 2, 0.5)]
    assert fit_tournament(field(3), iter(games)) == fit_tournament(field(3), games)


def test_nothing_played_nothing_scored() -> None:
    for entries in ([], field(3)):
        fit = fit_tournament(entries, [])
        assert fit.quadruples == ()
        assert fit.report.components == 0
        assert fit.report.residual is None
        assert len(fit.report.unplayed) == len(entries)


def test_results_are_the_same_each_time_and_survive_json() -> None:
    entries = field(12)
    comparisons = [game(a, b, 0.3) for a, b in plan_pairs(entries)]
    one, two = (fit_tournament(entries, comparisons, grades={0: 0.5}) for _ in range(2))
    assert one == two
    assert type(one).model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model": "elo"}, "`model`"),
        ({"prior": 0}, "`prior`"),
        ({"prior": float("nan")}, "`prior`"),
        ({"grades": {9: 0.5}}, "position 9"),
        ({"grades": {np.int64(9): 0.5}}, r"position np\.int64\(9\)"),
        ({"grades": {-1: 0.5}}, "position -1"),
        ({"grades": {0.0: 0.5}}, r"position 0\.0"),
        ({"grades": {0: 3}}, r"`grades\[0\]`.*divide"),
        ({"grades": {0: float("nan")}}, r"`grades\[0\]`"),
        ({"grades": {2: 0.5}}, "in no comparison"),
        ({"grades": {0: 0.0, 1: 1.0}}, "fall where"),
        ({"grades": {0: 1.0}, "grade_deviation": 0}, "`grade_deviation`"),
        ({"comparisons": [game(0, 5, 1)]}, r"`comparisons\[0\]`"),
        ({"comparisons": [game(1, 1, 1)]}, r"`comparisons\[0\]`"),
    ],
)
def test_arguments_are_checked(options, problem) -> None:
    arguments = {"comparisons": [game(0, 1, 1)] * 9, **options}
    with pytest.raises(InputError, match=problem):
        fit_tournament(field(3), **arguments)
