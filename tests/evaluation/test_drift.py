import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lanerank import Document, Reranker
from lanerank.errors import InputError
from lanerank.evaluation.cases import Case
from lanerank.evaluation.drift import SCORE_TOLERANCE, DriftReport, check_snapshot
from lanerank.evaluation.snapshot import Snapshot, take_snapshot
from lanerank.testing import OverlapScorer, ScriptedScorer


def scripted(scores, name="scripted") -> Reranker:
    return Reranker(ScriptedScorer(scores, name=name))


def a_case(documents, **changes) -> Case:
    return Case(**{"id": "case", "query": "query", "documents": list(documents)} | changes)


def check(before, after, **options) -> DriftReport:
    """The report on one case whose documents had these scores and now have those."""
    snapshot = take_snapshot(scripted(before), [a_case(before)])
    return check_snapshot(snapshot, scripted(after), [a_case(after)], **options)


def moved(report) -> dict[str, tuple[str, ...]]:
    """What is beyond tolerance, by the text of the document, worst first."""
    return {
        document.document.split(" ", 1)[1]: document.beyond
        for case in report.cases
        for document in case.moved
    }


# Nothing moved


def test_the_same_model_is_ok():
    cases = [
        a_case(["red fish", "blue fish", "", "red fish", "\ud800"], instruction="Prefer blue."),
        a_case(["cow"], id="other"),
    ]
    snapshot = take_snapshot(Reranker(OverlapScorer()), cases)
    report = check_snapshot(snapshot, Reranker(OverlapScorer()), cases, score_tolerance=0)
    assert report.ok
    assert report.documents == 6
    assert (report.mean_score_change, report.max_score_change) == (0, 0)
    assert [case.moved for case in report.cases] == [(), ()]
    assert [case.kendall_tau for case in report.cases] == [1, None]
    assert not any(case.reworded or case.outdated for case in report.cases)
    assert str(report) == (
        "ok: 0 of 6 documents, in 0 of 2 cases, moved beyond tolerance\n"
        "tolerance: 0 in score, 0 in rank among the best 10, near-ties within 0\n"
        "model: overlap\n"
        "change of scores: +0.0000 on average, 0.0000 at most"
    )


def test_what_is_finer_than_the_record_is_no_drift():
    assert check({"a": 0.123449}, {"a": 0.12341}, score_tolerance=0).ok


def test_cases_and_documents_are_known_wherever_they_stand():
    scores = {"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.3}
    cases = [a_case("abcd"), a_case("ab", id="two"), a_case("dc", id="three")]
    named = [{"id": name, "text": name} for name in "abcd"]
    cases += [a_case(named, id="ids")]
    snapshot = take_snapshot(scripted(scores), cases)
    turned = [
        case.model_copy(update={"documents": case.documents[::-1]}) for case in reversed(cases)
    ]
    report = check_snapshot(snapshot, scripted(scores), turned, score_tolerance=0)
    assert report.ok
    assert [case.id for case in report.cases] == ["ids", "three", "two", "case"]
    assert all(case.kendall_tau == 1 for case in report.cases)


# Scores


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("change", "ok"), [(0.0199, True), (0.02, True), (0.0201, False)])
def test_a_score_moves_when_it_changes_by_more_than_the_tolerance(sign, change, ok):
    # 0.52 - 0.5 is more than 0.02 in floating point.
    report = check({"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.5 + sign * change})
    assert report.ok is ok
    assert moved(report) == ({} if ok else {"b": ("score",)})
    assert report.max_score_change == change
    assert report.mean_score_change == pytest.approx(sign * change / 2, abs=1e-4)


def test_a_drifted_document_is_described():
    report = check({"a": 0.9, "b": 0.5, "c": 0.4}, {"a": 0.9, "b": 0.3, "c": 0.4})
    [case] = report.cases
    [document, other] = case.moved
    assert document.model_dump() == {
        "index": 1,
        "document": "#2 b",
        "beyond": ("score", "rank"),
        "recorded_score": 0.5,
        "score": 0.3,
        "score_change": -0.2,
        "recorded_rank": 2,
        "rank": 3,
        "places": -1,
    }
    assert (other.document, other.beyond, other.places) == ("#3 c", ("rank",), 1)
    assert (case.documents, case.max_score_change, case.kendall_tau) == (3, 0.2, 0.3333)


def test_a_score_that_is_no_longer_finite_moved_whatever_the_tolerance():
    before = {"a": 0.9, "b": 0.5, "c": math.nan, "d": math.inf}
    after = {"a": math.nan, "b": 0.5, "c": 0.1, "d": -math.inf}
    report = check(before, after, score_tolerance=None, top_k=0)
    assert moved(report) == {"a": ("score",), "c": ("score",)}
    first = report.cases[0].moved[0]
    assert (first.recorded_score, first.score, first.score_change) == (0.9, None, None)
    assert report.max_score_change == 0
    assert "  #1 a: score 0.9000 -> not finite, rank 1 -> 3" in str(report)


def test_whoever_loses_its_score_falls_behind_the_rest():
    report = check({"a": 0.9, "b": 0.5, "c": 0.4}, {"a": math.nan, "b": 0.5, "c": 0.4})
    assert moved(report) == {"a": ("score", "rank"), "b": ("rank",), "c": ("rank",)}
    assert [each.places for each in report.cases[0].moved] == [-2, 1, 1]


def test_scores_that_never_were_finite_are_no_drift():
    report = check({"a": math.nan, "b": math.nan}, {"a": math.nan, "b": math.inf})
    assert report.ok
    assert (report.documents, report.max_score_change, report.mean_score_change) == (2, None, None)


def test_scores_need_not_be_between_0_and_1():
    assert check({"a": -11.25, "b": 1e300}, {"a": -11.26, "b": 1e300}).ok
    report = check({"a": -1e308, "b": 7.0}, {"a": 1e308, "b": 7.0})
    assert moved(report)["a"] == ("score", "rank")


# Ranks


def test_near_ties_may_swap():
    report = check({"a": 0.51, "b": 0.5, "c": 0.1}, {"a": 0.495, "b": 0.505, "c": 0.1})
    assert report.ok
    assert report.cases[0].kendall_tau == pytest.approx(0.3333)


@pytest.mark.parametrize(
    ("before", "after", "ok"),
    [
        ((0.52, 0.50), (0.50, 0.60), True),  # near-ties then
        ((0.60, 0.50), (0.50, 0.52), True),  # near-ties now
        ((0.5201, 0.50), (0.50, 0.5201), False),  # neither
    ],
)
def test_near_ties_in_either_run_may_swap(before, after, ok):
    report = check(
        dict(zip("ab", before, strict=True)),
        dict(zip("ab", after, strict=True)),
        score_tolerance=0.5,
    )
    assert report.tie_tolerance == 0.02
    assert report.ok is ok
    assert moved(report) == ({} if ok else {"a": ("rank",), "b": ("rank",)})


@pytest.mark.parametrize(
    ("given", "tie"), [({}, 0.02), ({"score_tolerance": 0.3}, 0.02), ({"score_tolerance": 0}, 0)]
)
def test_lenience_with_scores_is_none_with_the_order(given, tie):
    assert check({"a": 0.5}, {"a": 0.5}, **given).tie_tolerance == tie
    assert check({"a": 0.5}, {"a": 0.5}, tie_tolerance=0.1, **given).tie_tolerance == 0.1


def test_ranks_alone_are_judged_where_scores_mean_something_else():
    before, after = {"a": 0.9, "b": 0.6, "c": 0.3}, {"a": 12.0, "b": 5.0, "c": -2.0}
    assert check(before, after, score_tolerance=None).ok
    report = check(before, after | {"a": 0.0}, score_tolerance=None)
    assert moved(report) == {"a": ("rank",), "b": ("rank",)}
    assert str(report).splitlines()[1].startswith("tolerance: any in score, 0 in rank among")


def test_small_moves_are_within_the_tolerance_of_ranks():
    before = {name: score / 10 for name, score in zip("abcde", (9, 8, 7, 6, 5), strict=True)}
    after = before | {"a": 0.55}
    options = {"score_tolerance": None}
    assert moved(check(before, after, rank_tolerance=0, **options)) == {
        name: ("rank",) for name in "abcd"
    }
    assert moved(check(before, after, rank_tolerance=1, **options)) == {"a": ("rank",)}
    assert moved(check(before, after, rank_tolerance=3, **options)) == {}


def test_only_the_best_are_watched():
    before = {name: score / 10 for name, score in zip("abcde", (9, 8, 7, 6, 5), strict=True)}
    options = {"score_tolerance": None}
    swapped = before | {"c": 0.6, "d": 0.7}
    assert check(before, swapped, top_k=2, **options).ok
    assert set(moved(check(before, swapped, top_k=3, **options))) == {"c", "d"}
    # A newcomer among the best counts as much as one that has left them.
    risen = before | {"e": 0.85}
    assert set(moved(check(before, risen, top_k=2, **options))) == {"b", "e"}
    assert check(before, risen, top_k=0, **options).ok
    assert set(moved(check(before, risen, top_k=None, **options))) == {"b", "c", "d", "e"}


@given(data=st.data())
def test_noise_within_the_tolerance_is_never_drift(data):
    steps = data.draw(st.lists(st.integers(0, 120), min_size=1, max_size=12))
    noise = st.integers(-200, 200)
    before = {str(i): step / 100 for i, step in enumerate(steps)}
    after = {text: score + data.draw(noise) / 10_000 for text, score in before.items()}
    order = data.draw(st.permutations(list(after)))
    assert check(before, {text: after[text] for text in order}, top_k=None).ok


@given(data=st.data())
def test_without_ties_places_are_the_difference_of_ranks(data):
    texts = "abcdefgh"
    scores = st.lists(st.integers(0, 10**4), min_size=8, max_size=8, unique=True)
    before, after = (
        {text: score / 10**4 for text, score in zip(texts, data.draw(scores), strict=True)}
        for _ in range(2)
    )
    report = check(before, after, score_tolerance=None, tie_tolerance=0, top_k=None)
    drifted = report.cases[0].moved
    assert all(each.places == each.recorded_rank - each.rank != 0 for each in drifted)
    old, new = (sorted(texts, key=lambda text: -run[text]) for run in (before, after))
    changed = {text for text in texts if old.index(text) != new.index(text)}
    assert {texts[each.index] for each in drifted} == changed


@given(data=st.data())
def test_a_check_is_as_strict_in_both_directions(data):
    scores = st.lists(st.integers(0, 40), min_size=5, max_size=5)
    before, after = (
        {text: score / 40 for text, score in zip("abcde", data.draw(scores), strict=True)}
        for _ in range(2)
    )
    options = {"score_tolerance": 0.4, "rank_tolerance": data.draw(st.integers(0, 2)), "top_k": 3}
    there, back = check(before, after, **options), check(after, before, **options)
    assume(not there.ok)
    assert not back.ok
    assert {d.index: -d.places for d in there.cases[0].moved} == {
        d.index: d.places for d in back.cases[0].moved
    }


# Cases that are not the recorded ones


def test_a_new_wording_is_reported_and_is_no_drift_by_itself():
    scorer = ScriptedScorer({"a": 0.5}, by_instruction={"Be rash.": {"a": 0.9}})
    cases = {text: [a_case("a", instruction=text)] for text in ("Be brief.", "Brief!", "Be rash.")}
    snapshot = take_snapshot(Reranker(scorer), cases["Be brief."])
    mild = check_snapshot(snapshot, Reranker(scorer), cases["Brief!"])
    assert mild.ok
    assert mild.cases[0].reworded
    assert mild.cases[0].recorded_instruction == snapshot.cases[0].instruction
    assert "worded anew: case" in str(mild)
    harsh = check_snapshot(snapshot, Reranker(scorer), cases["Be rash."])
    assert not harsh.ok
    assert moved(harsh) == {"a": ("score",)}


def test_another_model_is_named():
    cases = [a_case("a")]
    report = check_snapshot(
        take_snapshot(scripted({"a": 0.5}, "old"), cases), scripted({"a": 0.5}, "new"), cases
    )
    assert report.ok
    assert (report.recorded_model, report.model) == ("old", "new")
    assert "model: old -> new" in str(report)


def test_a_changed_document_is_out_of_date_and_not_compared():
    old = [{"id": "a", "text": "1"}, {"id": "b", "text": "2"}, "3", "4"]
    new = [{"id": "a", "text": "1"}, {"id": "b", "text": "two"}, "3", "four"]
    before = {"1": 0.9, "2": 0.8, "3": 0.7, "4": 0.6}
    after = before | {"two": 0.1, "four": 0.1}
    snapshot = take_snapshot(scripted(before), [a_case(old)])
    report = check_snapshot(snapshot, scripted(after), [a_case(new)])
    [case] = report.cases
    assert not report.ok
    assert (case.moved, case.documents, case.outdated) == ((), 2, True)
    assert case.changed_documents == ("b",)
    assert case.new_documents == ("#4 four",)
    assert case.removed_documents == (snapshot.cases[0].documents[3].content,)
    assert str(report).splitlines()[0] == (
        "out of date: 0 of 2 documents, in 0 of 1 cases, moved beyond tolerance"
    )
    assert "out of date: case: changed b; new #4 four; gone " in str(report)


def test_ranks_are_those_among_the_documents_compared():
    before = {"a": 0.9, "b": 0.5, "c": 0.3}
    report = check(before, {"new": 1.0, "b": 0.5, "a": 0.4, "c": 0.3})
    assert report.cases[0].new_documents == ("#1 new",)
    ranks = {each.document: (each.recorded_rank, each.rank) for each in report.cases[0].moved}
    assert ranks == {"#3 a": (1, 2), "#2 b": (2, 1)}


def test_an_attribute_is_content():
    def case(day, *, shown):
        document = Document("a", id="x", metadata={"date": day})
        return a_case([document], attributes=["date"] if shown else [])

    for shown in (True, False):
        snapshot = take_snapshot(scripted({"a": 0.5}), [case("2025-01-01", shown=shown)])
        report = check_snapshot(snapshot, scripted({"a": 0.5}), [case("2025-02-01", shown=shown)])
        assert report.ok is not shown
        assert report.cases[0].changed_documents == (("x",) if shown else ())


def test_documents_without_their_ids_are_known_by_content():
    named = [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}]
    scores = {"a": 0.5, "b": 0.2}
    bare, renamed = ["a", "b"], [{"id": "z", "text": "b"}, {"id": "x", "text": "a"}]
    for old, new in ((named, bare), (bare, named), (named, renamed)):
        snapshot = take_snapshot(scripted(scores), [a_case(old)])
        assert check_snapshot(snapshot, scripted(scores), [a_case(new)]).ok


def test_an_id_counts_for_more_than_content():
    old = [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}]
    new = [{"id": "x", "text": "b"}, {"id": "y", "text": "a"}]
    scores = {"a": 0.5, "b": 0.2}
    report = check_snapshot(
        take_snapshot(scripted(scores), [a_case(old)]), scripted(scores), [a_case(new)]
    )
    assert report.cases[0].changed_documents == ("x", "y")


def test_duplicates_are_counted():
    snapshot = take_snapshot(scripted({"a": 0.5, "b": 0.2}), [a_case(["a", "b", "a"])])
    after = scripted({"a": 0.5, "b": 0.2})
    assert check_snapshot(snapshot, after, [a_case(["a", "a", "b"])]).ok
    one = check_snapshot(snapshot, after, [a_case(["a", "b"])])
    assert one.cases[0].removed_documents == (snapshot.cases[0].documents[0].content,)
    three = check_snapshot(snapshot, after, [a_case(["a", "b", "a", "a"])])
    assert three.cases[0].new_documents == ("#4 a",)
    assert not one.ok
    assert not three.ok


def test_another_query_is_out_of_date_and_not_compared():
    snapshot = take_snapshot(scripted({"a": 0.5}), [a_case("a")])
    report = check_snapshot(snapshot, scripted({"a": 0.9}), [a_case("a", query="other")])
    assert not report.ok
    assert report.documents == 0
    assert report.cases[0].query_changed
    assert report.cases[0].outdated
    assert "out of date: case: another query" in str(report)


def test_new_and_missing_cases_are_not_ok():
    both = [a_case("a", id="one"), a_case("a", id="two")]
    scorer = scripted({"a": 0.5})
    missing = check_snapshot(take_snapshot(scorer, both), scorer, both[:1])
    assert (missing.ok, missing.missing_cases, missing.new_cases) == (False, ("two",), ())
    assert "only in the snapshot: two" in str(missing)
    new = check_snapshot(take_snapshot(scorer, both[:1]), scorer, both)
    assert (new.ok, new.missing_cases, new.new_cases) == (False, (), ("two",))
    assert "not in the snapshot: two" in str(new)


def test_a_snapshot_from_a_file_is_as_good(tmp_path):
    cases = [a_case(["red fish", "blue fish", "\ud83d"], instruction="Prefer blue.")]
    snapshot = take_snapshot(Reranker(OverlapScorer()), cases)
    snapshot.save(tmp_path / "s.json")
    loaded = Snapshot.load(tmp_path / "s.json")
    assert check_snapshot(loaded, Reranker(OverlapScorer()), cases, score_tolerance=0).ok


# The report


def test_the_worst_comes_first_and_the_text_is_bounded():
    texts = [f"text {number}" for number in range(30)]
    before = dict.fromkeys(texts, 0.5)
    after = {text: 0.5 + 0.03 + number / 100 for number, text in enumerate(texts)}
    cases = [a_case(texts[:size], id=f"case {size}") for size in range(1, 31)]
    report = check_snapshot(take_snapshot(scripted(before), cases), scripted(after), cases)
    lines = str(report).splitlines()
    assert lines[0] == "drift: 465 of 465 documents, in 30 of 30 cases, moved beyond tolerance"
    assert lines[4].startswith("case 30: 30 of 30 documents, Kendall's tau -1.00")
    assert lines[5] == "  #30 text 29: score 0.5000 -> 0.8200 (+0.3200), rank 30 -> 1"
    assert lines[10] == "  and 25 more of its documents"
    assert lines[11].startswith("case 29: ")
    assert lines[-1] == "and 20 more of the cases that moved"
    assert len(lines) == 4 + 10 * 7 + 1


def test_a_report_out_of_date_is_bounded_too():
    old = [a_case([str(n) for n in range(40)], id=f"case {size}") for size in range(40)]
    new = [a_case([f"new {n}" for n in range(40)], id=f"case {size}") for size in range(40)]
    scores = scripted({text.text: 0.5 for case in (old[0], new[0]) for text in case.documents})
    lines = str(check_snapshot(take_snapshot(scores, old), scores, new)).splitlines()
    assert lines[-1] == "and 30 more of the cases out of date"
    assert lines[-2].startswith("out of date: case 9: new #1 new 0, #2 new 1, #3 new 2, #4 new 3, ")
    assert " and 35 more; gone " in lines[-2]
    assert len(lines) == 14


@given(data=st.data())
def test_a_report_is_harmless_text_and_json(data, troublesome_text):
    texts = data.draw(st.lists(troublesome_text, min_size=1, max_size=3, unique=True))
    name = data.draw(troublesome_text)
    identifier = data.draw(st.text(min_size=1).filter(lambda text: text.strip()))
    old = a_case([{"id": identifier, "text": "a"}, *texts], id=identifier)
    new = a_case([{"id": identifier, "text": "a"}, "b"], id=identifier)
    before = scripted(dict.fromkeys((*texts, "a"), 0.5), name)
    after = scripted(dict.fromkeys((*texts, "a", "b"), 0.9), name + "x")
    snapshot = take_snapshot(before, [old])
    for cases in ([new], [old], [old, a_case("b", id=identifier + "x")]):
        report = check_snapshot(snapshot, after, cases)
        assert not report.ok
        # The joiners are kept, as everywhere: scripts and emoji need them.
        shown = str(report).replace("\u200c", "").replace("\u200d", "")
        assert all(char.isprintable() or char == "\n" for char in shown)
        assert max(map(len, str(report).splitlines())) < 500
        assert DriftReport.model_validate_json(report.model_dump_json()) == report


def test_a_report_is_the_same_on_every_run():
    cases = [a_case(["red fish", "blue fish", "cow"], instruction="Prefer blue.")]
    snapshot = take_snapshot(Reranker(OverlapScorer()), cases)
    other = [a_case(["red fish", "cow", "blue fish"], instruction="Prefer red.")]
    reports = [check_snapshot(snapshot, Reranker(OverlapScorer()), other) for _ in range(2)]
    assert reports[0].model_dump_json() == reports[1].model_dump_json()
    assert json.loads(reports[0].model_dump_json())["ok"] is False


def test_says_how_far_it_is():
    done = []
    cases = [a_case("a", id=name) for name in "abc"]
    snapshot = take_snapshot(scripted({"a": 0.5}), cases)
    check_snapshot(
        snapshot, scripted({"a": 0.5}), cases, progress=lambda *number: done.append(number)
    )
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"score_tolerance": -0.1}, "`score_tolerance` must be a number from 0, or None, got -0.1"),
        ({"score_tolerance": math.nan}, "`score_tolerance` .* got nan"),
        ({"score_tolerance": math.inf}, "`score_tolerance` .* got inf"),
        ({"score_tolerance": "0.1"}, "`score_tolerance` .* got '0.1'"),
        ({"score_tolerance": True}, "`score_tolerance` .* got True"),
        ({"tie_tolerance": -1}, "`tie_tolerance` must be a number from 0"),
        ({"rank_tolerance": -1}, "`rank_tolerance` must be an int from 0, got -1"),
        ({"rank_tolerance": None}, "`rank_tolerance` must be an int from 0, got None"),
        ({"rank_tolerance": 1.0}, "`rank_tolerance` must be an int from 0, got 1.0"),
        ({"top_k": -1}, "`top_k` must be an int from 0, or None, got -1"),
        ({"top_k": True}, "`top_k` must be an int from 0, or None, got True"),
    ],
)
def test_unusable_tolerances_are_refused_before_anything_is_scored(options, problem):
    scorer = ScriptedScorer({"a": 0.5})
    snapshot = take_snapshot(Reranker(scorer), [a_case("a")])
    scorer.requests.clear()
    with pytest.raises(InputError, match=problem):
        check_snapshot(snapshot, Reranker(scorer), [a_case("a")], **options)
    assert not scorer.requests


def test_a_path_is_no_snapshot():
    with pytest.raises(InputError, match=r"`snapshot` must be a `Snapshot`, got 's\.json'; `Snap"):
        check_snapshot("s.json", scripted({"a": 0.5}), [a_case("a")])


def test_an_empty_list_of_cases_is_refused():
    snapshot = take_snapshot(scripted({"a": 0.5}), [a_case("a")])
    with pytest.raises(InputError, match="`cases` is empty"):
        check_snapshot(snapshot, scripted({}), [])


def test_the_embedded_model_is_stable_under_its_own_tolerance():
    reranker = Reranker.from_pretrained()
    cases = [
        a_case(
            [
                "Coached the national team for the International Mathematical Olympiad.",
                "Ten years of port-state inspections of tankers at the IMO.",
                "Sells paint.",
            ],
            query="candidates with IMO experience",
            instruction="We are a marine logistics company.",
        )
    ]
    snapshot = take_snapshot(reranker, cases)
    assert check_snapshot(snapshot, reranker, cases, score_tolerance=0).ok
    other = [cases[0].model_copy(update={"instruction": cases[0].instruction + "Be a coach."})]
    assert check_snapshot(snapshot, reranker, other).cases[0].reworded
    exact = check_snapshot(snapshot, Reranker.from_pretrained(dtype="float32"), cases)
    assert exact.ok
    assert exact.max_score_change < SCORE_TOLERANCE / 2
