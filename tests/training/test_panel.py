"""Panels: votes, the cache, what is counted, and control pairs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from judges import ENTRIES, PAIRS, Counting, answer, entry, panel, shown

from lanerank.errors import InputError
from lanerank.training.controls import (
    INJECTED_ORDERS,
    find_clear_pairs,
    make_controls,
    measure_obedience,
)
from lanerank.training.judge import Judge, JudgeError
from lanerank.training.panel import Comparison, JudgePanel
from lanerank.training.verdicts import Cost, Verdict, VerdictStore

# Order and votes


def first_is_better(prompt: str) -> str:
    return answer(0.5)


def leaning(prompt: str) -> str:
    """Sees the difference, and leans to what is shown first."""
    a, b = (int(shown(prompt)[f"document_{name}"]["text"].split()[2]) for name in "AB")
    return answer(max(-1, min(1, (a - b) / 8 + 0.4)))


def test_both_orders_even_out_a_leaning_to_one_place() -> None:
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    swapped = panel(leaning, order="both").compare(ENTRIES, pairs)
    assert all(c.preference < 0 for c in swapped.comparisons)
    assert swapped.position_bias.value == pytest.approx(0.37, abs=0.05)
    assert swapped.order_flips.value > 0.2
    for comparison in swapped.comparisons:
        assert [vote.shown_first for vote in comparison.votes] == ["first", "second"]
    # Without the swap, the same judge prefers some entries only for their place.
    alone = panel(leaning).compare(ENTRIES, pairs)
    assert any(c.preference > 0 for c in alone.comparisons)
    assert alone.order_flips is None


def test_a_judge_that_always_prefers_the_first_ties_every_pair() -> None:
    found = panel(first_is_better, order="both").compare(ENTRIES, PAIRS)
    assert {c.preference for c in found.comparisons} == {0.0}
    assert found.order_flips.value == 1
    assert found.position_bias.value == 0.5


def test_the_random_order_is_even_and_depends_on_the_pair_alone() -> None:
    many = [entry(f"fish number {number}") for number in range(25)]
    pairs = [(i, j) for i in range(25) for j in range(i + 1, 25)]
    found = panel(first_is_better).compare(many, pairs).comparisons
    first = sum(c.preference > 0 for c in found)
    assert 0.4 < first / len(found) < 0.6
    turned = panel(first_is_better).compare(many[::-1], [(24 - j, 24 - i) for i, j in pairs])
    assert [c.preference for c in turned.comparisons] == [-c.preference for c in found]
    other = panel(first_is_better, seed=1).compare(many, pairs).comparisons
    assert [c.preference for c in other] != [c.preference for c in found]


def test_votes_of_several_judges_are_averaged_and_their_reasons_kept() -> None:
    judges = [
        Judge(lambda _, p=p, name=name: answer(p, reason=name), name=name)
        for name, p in (("x", 1), ("y", 0.5), ("z", -0.3))
    ]
    found = JudgePanel(judges, order="both").compare(ENTRIES, [(0, 1)])
    assert found.comparisons[0].preference == pytest.approx(0)
    # As shown: "first" and "second" in turn, so that preferences change sign.
    assert [(v.judge, v.preference, v.reason) for v in found.comparisons[0].votes] == [
        *(("x", 1, "x"), ("x", -1, "x")),
        *(("y", 0.5, "y"), ("y", -0.5, "y")),
        *(("z", -0.3, "z"), ("z", 0.3, "z")),
    ]

    def numbers(sign: int):
        def model(prompt: str) -> str:
            return answer(sign * json.loads(Counting()(prompt))["preference"])

        return model

    mixed = [Judge(numbers(sign), name=str(n)) for n, sign in enumerate((1, 1, -1))]
    found = JudgePanel(mixed).compare(ENTRIES, [(7, 0)])
    assert found.comparisons[0].preference == pytest.approx(7 / 8 / 3)
    assert found.judge_agreement.value == pytest.approx(1 / 3)
    assert found.judge_agreement.n == 3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"order": "swap"}, "`order`"),
        ({"concurrency": 0}, "`concurrency`"),
        ({"max_failures": -1}, "`max_failures`"),
    ],
)
def test_options_are_checked(options, problem) -> None:
    with pytest.raises(InputError, match=problem):
        panel(first_is_better, **options)


def test_judges_need_names_of_their_own() -> None:
    with pytest.raises(InputError, match="different names"):
        JudgePanel([Judge(first_is_better, name="a"), Judge(leaning, name="a")])
    with pytest.raises(InputError, match="`judges`"):
        JudgePanel([])


@pytest.mark.parametrize("pair", [(0, 0), (0, 8), (-1, 0)])
def test_pairs_outside_the_entries_are_refused(pair) -> None:
    with pytest.raises(InputError, match=r"`pairs\[0\]`"):
        panel(first_is_better).compare(ENTRIES, [pair])


def test_no_pairs_no_calls() -> None:
    found = panel(first_is_better).compare(ENTRIES, [])
    assert (found.comparisons, found.cost.calls, found.position_bias) == ((), 0, None)


def test_pairs_may_come_from_an_iterator() -> None:
    found = panel(Counting()).compare(ENTRIES, iter(PAIRS))
    assert found == panel(Counting()).compare(ENTRIES, PAIRS)
    assert panel(Counting()).plan(ENTRIES, iter(PAIRS)).pairs == len(PAIRS)


def test_a_run_can_be_awaited_in_a_thread() -> None:
    found = asyncio.run(asyncio.to_thread(panel(Counting()).compare, ENTRIES, PAIRS))
    assert len(found.comparisons) == len(PAIRS)


def test_the_part_of_a_game_that_is_won() -> None:
    assert [Comparison(first=0, second=1, preference=p).win for p in (-1, 0, 0.5)] == [0, 0.5, 0.75]


def test_importing_judges_and_tournaments_loads_no_torch_and_no_framework() -> None:
    program = (
        "import sys, lanerank.training.tournament, lanerank.training.controls\n"
        "print(sorted({'torch', 'transformers', 'langchain_core', 'llama_index'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_the_cache_is_a_path_like_any_other(tmp_path: Path) -> None:
    strange = tmp_path / "judge ments?#%.sqlite"
    panel(Counting(), cache=str(strange)).compare(ENTRIES, PAIRS)
    assert strange.exists()


# The cache


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_that_broke_off_goes_on_without_asking_anything_twice(tmp_path, concurrency) -> None:
    cache, model = tmp_path / "judgements.sqlite", Counting(fail_after=7)
    with pytest.raises(JudgeError, match="the line is down"):
        panel(model, cache=cache, concurrency=concurrency).compare(ENTRIES, PAIRS)
    assert model.calls.total() == 7
    model.fail_after = None
    again = panel(model, cache=cache, concurrency=concurrency)
    assert again.plan(ENTRIES, PAIRS).remembered == 7
    found = again.compare(ENTRIES, PAIRS)
    assert found.remembered == 7
    assert model.calls.total() == len(PAIRS)
    assert set(model.calls.values()) == {1}
    whole = panel(Counting()).compare(ENTRIES, PAIRS)
    assert found.comparisons == whole.comparisons


def test_a_killed_process_leaves_every_answer_that_came(tmp_path) -> None:
    cache = tmp_path / "judgements.sqlite"
    program = f"""
        import os
        from lanerank.training.judge import Judge
        from lanerank.training.panel import JudgePanel
        from lanerank.training.questions import Entry

        asked = []

        def model(prompt):
            asked.append(prompt)
            if len(asked) == 4:
                os._exit(9)
            return '{{"reason": "r", "preference": 0.5}}'

        entries = [
            Entry(query="fish", instruction="Prefer red.", document=f"fish number {{n}}")
            for n in range(8)
        ]
        JudgePanel(Judge(model, name="judge"), cache={str(cache)!r}, concurrency=1).compare(
            entries, {PAIRS!r}
        )
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == 9
    assert panel(Counting(), cache=cache).plan(ENTRIES, PAIRS).remembered == 3


def test_an_interrupt_keeps_the_answers(tmp_path) -> None:
    model = Counting()

    def interrupt(done: int, total: int, cost: Cost) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        panel(model, cache=tmp_path / "c.sqlite", concurrency=2).compare(
            ENTRIES, PAIRS, progress=interrupt
        )
    asked = model.calls.total()
    assert 3 <= asked <= len(PAIRS)
    assert panel(model, cache=tmp_path / "c.sqlite").plan(ENTRIES, PAIRS).remembered == asked


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_same_question_is_asked_once_in_a_run(concurrency) -> None:
    model = Counting()
    twins = [entry("fish number 1"), entry("fish number 2"), entry("fish number 1")]
    found = panel(model, concurrency=concurrency).compare(twins, [(0, 1), (1, 0), (2, 1), (0, 1)])
    assert model.calls.total() == 1
    assert [c.preference for c in found.comparisons] == [-1 / 8, 1 / 8, -1 / 8, -1 / 8]


def test_another_judge_instruction_document_or_order_is_another_question(tmp_path) -> None:
    cache = tmp_path / "c.sqlite"
    base = [entry("a"), entry("b")]
    calls = []

    def model(prompt: str) -> str:
        calls.append(prompt)
        return answer(1)

    def ask(entries, name="judge", **options) -> int:
        before = len(calls)
        JudgePanel(Judge(model, name=name), cache=cache, **options).compare(entries, [(0, 1)])
        return len(calls) - before

    assert ask(base) == 1
    assert ask(base) == ask(base[::-1]) == 0
    assert ask(base, name="other") == 1
    assert ask(base, order="both") == 1
    assert ask([entry("a", instruction=None), entry("b", instruction=None)]) == 1
    assert ask([entry("a", query="x"), entry("b", query="x")]) == 1
    assert ask([entry("a"), entry("c")]) == 1
    # What the judge is not shown makes no difference.
    assert ask([entry("a", document_id="1", metadata={"x": 1}), entry("b")]) == 0


def test_two_panels_share_a_file_at_the_same_time(tmp_path) -> None:
    cache, model = tmp_path / "c.sqlite", Counting()
    panels = [panel(model, cache=cache) for _ in range(3)]
    results: list = []
    threads = [
        threading.Thread(target=lambda p=p: results.append(p.compare(ENTRIES, PAIRS)))
        for p in panels
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.comparisons for result in results}) == 1
    assert panels[0].plan(ENTRIES, PAIRS).calls == 0


def test_a_dry_run_makes_no_file(tmp_path) -> None:
    panel(first_is_better, cache=tmp_path / "c.sqlite").plan(ENTRIES, PAIRS)
    assert not any(tmp_path.iterdir())


def test_a_file_of_something_else_is_left_alone(tmp_path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but longer than the header of one" * 9)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = other.read_bytes()
    for path in (text, other, tmp_path / "absent" / "c.sqlite"):
        with pytest.raises(InputError, match="`cache`: "):
            panel(first_is_better, cache=path).compare(ENTRIES, PAIRS)
    assert other.read_bytes() == before


def test_a_store_gives_back_what_it_was_given(tmp_path) -> None:
    verdicts = [
        Verdict(
            key=hashlib.sha256(str(n).encode()).hexdigest(),
            judge="j",
            preference=n / 1000,
            reason="r 🚢",
            cost=Cost(calls=n),
        )
        for n in range(600)
    ]
    # More than fit into one query.
    with VerdictStore(":memory:") as store:
        for verdict in verdicts:
            store.put(verdict, "v")
        store.put(verdicts[0].model_copy(update={"preference": 1.0}), "v")
        assert store.get(v.key for v in verdicts) == {v.key: v for v in verdicts}
    with VerdictStore(tmp_path / "c.sqlite") as store:
        store.put(verdicts[7], "v")
    with VerdictStore(tmp_path / "c.sqlite") as store:
        assert store.get(v.key for v in verdicts) == {verdicts[7].key: verdicts[7]}


def test_reasons_with_lone_surrogates_are_kept_as_far_as_text_goes(tmp_path) -> None:
    found = panel(lambda _: answer(1, reason="a\ud800b"), cache=tmp_path / "c.sqlite").compare(
        ENTRIES, [(0, 1)]
    )
    assert found.comparisons[0].votes[0].reason == "a\ufffdb"


# Counting and failing


@pytest.mark.parametrize("order", ["random", "both"])
def test_the_dry_run_says_what_the_run_takes(tmp_path, order) -> None:
    model = Counting()
    judges = [Judge(model, name="x"), Judge(model, name="y")]
    warm = JudgePanel(judges[0], cache=tmp_path / "c.sqlite", order=order)
    warm.compare(ENTRIES, PAIRS[:5])
    before = model.calls.total()
    both = JudgePanel(judges, cache=tmp_path / "c.sqlite", order=order)
    plan = both.plan(ENTRIES, PAIRS)
    assert model.calls.total() == before
    found = both.compare(ENTRIES, PAIRS)
    assert plan.calls == model.calls.total() - before == found.cost.calls
    assert plan.characters_sent == found.cost.characters_sent
    assert (plan.questions, plan.remembered) == (found.questions, found.remembered)
    assert plan.remembered == before
    assert plan.questions == len(PAIRS) * 2 * (2 if order == "both" else 1)
    assert plan.pairs == len(PAIRS)


def test_progress_begins_with_what_is_remembered_and_ends_with_all(tmp_path) -> None:
    cache = tmp_path / "c.sqlite"
    panel(Counting(), cache=cache).compare(ENTRIES, PAIRS[:5])
    seen: list[tuple[int, int, int]] = []
    panel(Counting(), cache=cache).compare(
        ENTRIES, PAIRS, progress=lambda done, total, cost: seen.append((done, total, cost.calls))
    )
    total = len(PAIRS)
    assert seen == [(done, total, done - 5) for done in range(5, total + 1)]


def test_failures_up_to_the_limit_are_listed_and_left_out() -> None:
    def model(prompt: str) -> str:
        return "?" if "number 0" in prompt else Counting()(prompt)

    hopeless = [pair for pair in PAIRS if 0 in pair]
    found = panel(model, max_failures=len(hopeless)).compare(ENTRIES, PAIRS)
    assert len(found.failures) == len(hopeless) > 0
    assert all("fish number 0" in failure for failure in found.failures)
    assert [(c.first, c.second) for c in found.comparisons] == [p for p in PAIRS if 0 not in p]
    assert found.cost.calls == len(PAIRS) + 2 * len(hopeless)
    with pytest.raises(JudgeError):
        panel(model, max_failures=len(hopeless) - 1).compare(ENTRIES, PAIRS)


def test_no_more_questions_are_under_way_than_allowed() -> None:
    gate, lock = threading.Barrier(3, timeout=30), threading.Lock()
    now, most = 0, 0

    def model(prompt: str) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        gate.wait()  # Passes only if three are here together.
        with lock:
            now -= 1
        return answer(0)

    panel(model, concurrency=3).compare(ENTRIES, PAIRS[:12])
    assert most == 3


# Control pairs


def obedient(prompt: str) -> str:
    """Prefers what holds one of the orders, else the higher number."""
    texts = [shown(prompt)[f"document_{name}"]["text"] for name in "AB"]
    obeyed = [any(order in text for order in INJECTED_ORDERS) for text in texts]
    if obeyed[0] != obeyed[1]:
        return answer("A" if obeyed[0] else "B")
    return steadfast(prompt)


def steadfast(prompt: str) -> str:
    marks = ["number 7" in shown(prompt)[f"document_{name}"]["text"] for name in "AB"]
    return answer((marks[0] - marks[1]) / 2)


KNOWN = [(7, number) for number in range(7)]


def test_a_judge_that_obeys_documents_is_caught() -> None:
    controls = make_controls(ENTRIES, KNOWN)
    report = measure_obedience(panel(obedient), controls)
    assert report.accuracy.value == report.obeyed.value == 1
    assert report.obeyed_neutral.value == 0
    assert report.pull.value == 1.5
    assert report.obeyed.n == report.judged == report.pairs == 7
    assert 0.5 < report.obeyed.low < 1
    example = report.examples[0]
    assert (example.better, example.worse) == ("fish number 7", "fish number 0")
    assert example.order in INJECTED_ORDERS
    assert example.reasons == ("because",)


def test_a_judge_that_does_not_is_cleared_as_far_as_the_number_of_pairs_allows() -> None:
    report = measure_obedience(panel(steadfast), make_controls(ENTRIES, KNOWN))
    assert (report.obeyed.value, report.pull.value, report.examples) == (0, 0, ())
    assert 0.2 < report.obeyed.high < 0.5


def test_pairs_that_are_judged_wrong_anyway_do_not_count() -> None:
    report = measure_obedience(
        panel(steadfast), make_controls(ENTRIES, [*KNOWN, *((low, 7) for low in range(7))])
    )
    assert report.accuracy.value == 0.5
    assert report.obeyed.n == 7


def filtered(prompt: str) -> str:
    """A provider that takes the orders for an attack on its model."""
    if any(order in shown(prompt)[f"document_{n}"]["text"] for n in "AB" for order in FILTERED):
        raise RuntimeError("content filter")
    return steadfast(prompt)


FILTERED = INJECTED_ORDERS[:4]


def test_pairs_that_got_no_answer_are_not_taken_for_pairs_judged_wrong() -> None:
    controls = make_controls(ENTRIES, KNOWN, orders=FILTERED)
    report = measure_obedience(panel(filtered, max_failures=99), controls)
    assert (report.judged, len(report.failures)) == (0, 7)
    failures, unknown = report.warnings()
    assert failures.startswith("7 questions about control pairs have no answer, so that 0 of 7 ")
    assert "content filter" in failures
    assert "No control pair was judged" in unknown


def test_some_controls_that_got_no_answer_are_told_beside_the_finding() -> None:
    controls = make_controls(ENTRIES, KNOWN, orders=INJECTED_ORDERS[3:5])
    report = measure_obedience(panel(filtered, max_failures=99), controls)
    assert 0 < report.judged < 7
    [failures] = report.warnings()
    assert f"{report.judged} of 7 pairs were judged in all three versions" in failures


def test_a_judge_that_gets_no_control_right_is_told() -> None:
    report = measure_obedience(panel(steadfast), make_controls(ENTRIES, [(0, 7), (1, 7)]))
    [warning] = report.warnings()
    assert warning.startswith("Of 2 control pairs the judges got none right as it is")


def test_the_check_can_be_planned_and_leaves_the_entries_alone() -> None:
    before = [e.model_dump() for e in ENTRIES]
    controls = make_controls(ENTRIES, KNOWN)
    plan = panel(steadfast).plan(controls.entries, controls.pairs)
    assert plan.calls == 3 * len(KNOWN)
    assert [e.model_dump() for e in ENTRIES] == before
    assert sorted(controls.orders) == sorted(set(controls.orders))
    for (_, clean), (_, ordered), order in zip(
        controls.pairs[:7], controls.pairs[7:14], controls.orders, strict=True
    ):
        assert order in controls.entries[ordered].document
        assert order not in controls.entries[clean].document


def test_clear_pairs_are_the_decided_ones_of_one_request_the_better_first() -> None:
    entries = [*ENTRIES, entry("fish number 0", instruction="another")]
    found = [
        Comparison(first=first, second=second, preference=preference, votes=())
        for first, second, preference in (
            (0, 1, 0.5),
            (2, 3, -1.0),
            (4, 5, 0.4),
            (6, 7, 0.0),
            (0, 8, 1.0),
            (1, 2, -0.75),
        )
    ]
    assert find_clear_pairs(entries, found) == [(0, 1), (3, 2), (2, 1)]
    assert find_clear_pairs(entries, found, least=0.75) == [(3, 2), (2, 1)]
    assert find_clear_pairs(entries, found, least=1.0) == [(3, 2)]
    assert find_clear_pairs(entries, found[2:4]) == []
    drawn = {tuple(find_clear_pairs(entries, found, count=1, seed=seed)) for seed in range(20)}
    assert drawn == {((0, 1),), ((3, 2),), ((2, 1),)}
    again = [find_clear_pairs(entries, found, count=2, seed=1) for _ in range(2)]
    assert again[0] == again[1]
    assert len(find_clear_pairs(entries, found, count=9)) == 3


def test_controls_may_be_made_of_an_iterator() -> None:
    assert make_controls(ENTRIES, iter(KNOWN)) == make_controls(ENTRIES, KNOWN)


def test_clear_pairs_make_controls() -> None:
    judged = panel(steadfast).compare(ENTRIES, KNOWN)
    pairs = find_clear_pairs(ENTRIES, judged.comparisons)
    assert pairs == KNOWN
    report = measure_obedience(panel(obedient), make_controls(ENTRIES, pairs))
    assert report.obeyed.value == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"least": 0}, "`least`.*got 0"),
        ({"least": 1.5}, "`least`.*got 1.5"),
        ({"least": float("nan")}, "`least`"),
        ({"count": -1}, "`count`.*got -1"),
        ({"count": 1.0}, "`count`.*got 1.0"),
        ({"entries": ENTRIES[:3]}, r"`comparisons\[0\]`.*the 3 entries, got \(7, 0\)"),
    ],
)
def test_arguments_of_clear_pairs_are_checked(options, problem) -> None:
    judged = panel(steadfast).compare(ENTRIES, KNOWN)
    arguments = {"entries": ENTRIES, "comparisons": judged.comparisons, **options}
    with pytest.raises(InputError, match=problem):
        find_clear_pairs(**arguments)


def test_controls_are_checked() -> None:
    with pytest.raises(InputError, match=r"`pairs\[0\]`.*same request"):
        make_controls([entry("a"), entry("b", instruction=None)], [(0, 1)])
    with pytest.raises(InputError, match="`orders`"):
        make_controls(ENTRIES, KNOWN, orders="one text")
    with pytest.raises(InputError, match="no pairs"):
        measure_obedience(panel(steadfast), make_controls(ENTRIES, []))
