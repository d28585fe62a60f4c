"""The pytest fixture, in test runs of its own."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lanerank.evaluation.drift import check_snapshot
from lanerank.evaluation.snapshot import Snapshot
from lanerank.pytest_plugin import RankingSnapshots

pytest_plugins = ["pytester"]

# Scores come from a file, because Python may not notice that a module changed within a second.
MODULE = """
import json
from pathlib import Path

import pytest
from lanerank import Reranker
from lanerank.evaluation.cases import Case
from lanerank.testing import ScriptedScorer


def check(snapshots, name, **options):
    scores = json.loads((Path(__file__).parent / "scores.json").read_text())
    case = Case(id="case one", query="query", documents=list(scores))
    snapshots.check(Reranker(ScriptedScorer(scores)), [case], name=name, **options)


def test_search(lanerank_snapshot):
    check(lanerank_snapshot, "search")
"""


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run pytest in this process with no plugin but lanerank's, warnings being errors."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(test_rankings=MODULE)

    def run_pytest(*arguments: str, **scores: float) -> pytest.RunResult:
        if scores:
            (pytester.path / "scores.json").write_text(json.dumps(scores))
        # lanerank is imported already, and pytest would have liked to rewrite its assertions.
        quiet = ("-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning")
        return pytester.runpytest_inprocess("-p", "lanerank", *quiet, *arguments)

    return run_pytest


@pytest.fixture
def snapshot(pytester: pytest.Pytester) -> Path:
    return pytester.path / "snapshots" / "search.json"


def more_tests(pytester: pytest.Pytester, code: str) -> None:
    pytester.makepyfile(test_rankings=MODULE + inspect.cleandoc(code))


def test_a_missing_snapshot_fails_with_the_command_that_makes_it(run, snapshot):
    result = run(a=0.5)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"there is no snapshot {snapshot}; make it with",
            "pytest test_rankings.py::test_search --lanerank-update",
        ]
    )
    assert not snapshot.parent.exists()


def test_the_command_makes_it_and_says_so(run, snapshot):
    result = run("test_rankings.py::test_search", "--lanerank-update", a=0.5)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"lanerank: test_rankings.py::test_search wrote {snapshot}"])
    assert Snapshot.load(snapshot).cases[0].documents[0].score == 0.5


def test_passes_while_nothing_moves(run, snapshot):
    run("--lanerank-update", a=0.5, b=0.4)
    before = snapshot.read_bytes()
    result = run(a=0.51, b=0.4)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*lanerank: *")
    assert snapshot.read_bytes() == before


def test_fails_with_a_summary_when_rankings_move(run, snapshot):
    run("--lanerank-update", a=0.5, b=0.4)
    before = snapshot.read_bytes()
    result = run(a=0.5, b=0.7)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"rankings are not those of {snapshot}",
            "drift: 2 of 2 documents, in 1 of 1 cases, moved beyond tolerance",
            "case one: 2 of 2 documents, Kendall's tau -1.00",
            "  #2 b: score 0.4000 -> 0.7000 (+0.3000), rank 2 -> 1",
            "pytest test_rankings.py::test_search --lanerank-update",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    assert snapshot.read_bytes() == before


def test_fails_when_the_cases_are_others(run):
    run("--lanerank-update", a=0.5)
    result = run(a=0.5, b=0.4)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["out of date: case one: new #2 b"])


def test_an_update_replaces_what_moved(run, snapshot):
    run("--lanerank-update", a=0.5)
    run("--lanerank-update", a=0.9).assert_outcomes(passed=1)
    assert Snapshot.load(snapshot).cases[0].documents[0].score == 0.9
    run().assert_outcomes(passed=1)


def test_tolerances_are_passed_on(run, pytester):
    options = {
        "score_tolerance": 0.3,
        "tie_tolerance": 0.2,
        "rank_tolerance": 1,
        "top_k": 0,
    }
    tests = [
        f"def test_{name}(lanerank_snapshot):\n"
        f"    check(lanerank_snapshot, {name!r}, {name}={value})"
        for name, value in options.items()
    ]
    more_tests(pytester, "\n\n\n".join(tests))
    run("--lanerank-update", a=0.5, b=0.4).assert_outcomes(passed=5)
    # Every tolerance forgives a part of it, and none alone all of it.
    result = run(a=0.45, b=0.55)
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(
        [
            "tolerance: 0.02 in score, 0 in rank among the best 10, near-ties within 0.02",
            "tolerance: 0.3 in score, 0 in rank among the best 10, near-ties within 0.02",
            "tolerance: 0.02 in score, 0 in rank among the best 10, near-ties within 0.2",
            "tolerance: 0.02 in score, 1 in rank among the best 10, near-ties within 0.02",
            "tolerance: 0.02 in score, 0 in rank among the best 0, near-ties within 0.02",
        ]
    )


def test_the_defaults_are_those_of_check_snapshot():
    fixture = inspect.signature(RankingSnapshots.check).parameters
    function = inspect.signature(check_snapshot).parameters
    for name in ("score_tolerance", "tie_tolerance", "rank_tolerance", "top_k"):
        assert fixture[name].default == function[name].default


def test_a_second_check_of_an_update_compares_with_the_first(run, pytester, snapshot):
    more_tests(
        pytester,
        """
        def test_again(lanerank_snapshot):
            check(lanerank_snapshot, "search")


        def test_other_cases_under_the_same_name(lanerank_snapshot):
            case = Case(id="case two", query="query", documents=["a"])
            reranker = Reranker(ScriptedScorer({"a": 0.5}))
            lanerank_snapshot.check(reranker, [case], name="search")
        """,
    )
    result = run("--lanerank-update", a=0.5)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["not in the snapshot: case two"])
    assert [case.id for case in Snapshot.load(snapshot).cases] == ["case one"]


def test_snapshots_stand_beside_their_tests(run, pytester):
    folder = pytester.mkdir("deep")
    (folder / "test_deep.py").write_text(MODULE)
    (folder / "scores.json").write_text('{"a": 0.9}')
    run("--lanerank-update", a=0.5).assert_outcomes(passed=2)
    for place, score in ((folder, 0.9), (pytester.path, 0.5)):
        loaded = Snapshot.load(place / "snapshots" / "search.json")
        assert loaded.cases[0].documents[0].score == score


def test_the_command_can_be_pasted(run, pytester):
    more_tests(
        pytester,
        """
        @pytest.mark.parametrize("name", ["it's one"])
        def test_each(lanerank_snapshot, name):
            check(lanerank_snapshot, "each")
        """,
    )
    result = run("-k", "each", a=0.5)
    quoted = """pytest 'test_rankings.py::test_each[it'"'"'s one]' --lanerank-update"""
    assert quoted in result.stdout.lines


@pytest.mark.parametrize("name", ["../search", "a/b", "", ".hidden", "a b", 7])
def test_a_name_that_is_a_path_is_refused(run, pytester, name):
    more_tests(
        pytester,
        f"""
        def test_named(lanerank_snapshot):
            check(lanerank_snapshot, {name!r})
        """,
    )
    result = run("-k", "named", "--lanerank-update", a=0.5)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*InputError: `name` must be letters, digits*"])
    assert not list(pytester.path.rglob("*.json.new")) + list(pytester.path.rglob("snapshots/*"))


def test_a_damaged_snapshot_is_an_error(run, snapshot):
    run("--lanerank-update", a=0.5)
    snapshot.write_text(snapshot.read_text().replace('"version": 1', '"version": 2'))
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*InputError: `path`: * has version 2 of the format*"])


def test_a_process_of_its_own_starts_without_a_warning(run, pytester):
    run("--lanerank-update", a=0.5)
    result = pytester.runpytest_subprocess("-p", "lanerank", "-W", "error")
    result.assert_outcomes(passed=1)


def test_pytest_finds_the_plugin():
    [point] = entry_points(group="pytest11", name="lanerank")
    assert point.value == "lanerank.pytest_plugin"


def test_tests_that_do_not_rank_do_not_wait():
    code = "import json, sys, lanerank.pytest_plugin; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "scipy", "ir_measures", "numpy", "lanerank.evaluation"}
    assert not heavy & set(json.loads(run.stdout))
