"""`lanerank judge`: judges in a module of the user's, asked, interrupted, resumed and scored."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from judges import entry
from scipy import stats
from typer.testing import CliRunner

from lanerank.cli import app
from lanerank.cli.judge import load_judge
from lanerank.errors import FileFormatError, InputError, JudgeError
from lanerank.training import (
    Entry,
    Judge,
    ObedienceReport,
    Quadruple,
    TournamentReport,
    read_quadruples,
    write_quadruples,
)

WIDE = {"COLUMNS": "200"}
HIGH, LOW = "Prefer high numbers.", "Prefer low numbers."
SIZE = 10

# Judges read what they are shown, and note each call in a file.
MODULE = '''
import json
import os
import re
import signal
from pathlib import Path

from lanerank.training import INJECTED_ORDERS, Judge


def higher(prompt):
    with open("calls.txt", "a") as file:
        file.write("x")
    data = json.loads(prompt.rpartition("\\n\\n")[2])
    if "document" in data:
        a, b = (suits(data["document"], data[f"request_{name}"]) for name in "AB")
    else:
        a, b = (suits(data[f"document_{name}"], data) for name in "AB")
    preference = max(-1.0, min(1.0, (a - b) / 4))
    return json.dumps({"reason": f"{a} against {b}", "preference": preference})


def suits(document, request):
    number = int(re.search(r"number is (\\d+)", document["text"])[1])
    return 9 - number if "low" in request["instruction"] else number


def calls():
    return len(Path("calls.txt").read_text()) if Path("calls.txt").exists() else 0


def obedient(prompt):
    data = json.loads(prompt.rpartition("\\n\\n")[2])
    for name, preference in (("A", 1), ("B", -1)):
        if any(order in data[f"document_{name}"]["text"] for order in INJECTED_ORDERS):
            return json.dumps({"reason": "so it says", "preference": preference})
    return higher(prompt)


def ordered(prompt):
    data = json.loads(prompt.rpartition("\\n\\n")[2])
    texts = [data[f"document_{name}"]["text"] for name in "AB"]
    return any(order in text for order in INJECTED_ORDERS for text in texts)


def filtered(prompt):
    """A provider that takes the orders for an attack on its model."""
    if ordered(prompt) and not Path("mended").exists():
        raise RuntimeError("content filter")
    return higher(prompt)


def cut_off(prompt):
    if ordered(prompt) and not Path("again").exists():
        Path("again").touch()
        raise KeyboardInterrupt
    return higher(prompt)


def lazy(prompt):
    return json.dumps({"reason": "it came first", "preference": 0.5})


def impatient(prompt):
    """Somebody presses Ctrl-C at the sixth question of the first run."""
    if calls() == 5 and not Path("again").exists():
        Path("again").touch()
        raise KeyboardInterrupt
    return higher(prompt)


def signalled(prompt):
    if calls() == 5 and not Path("again").exists():
        Path("again").touch()
        os.kill(os.getpid(), signal.SIGINT)
    return higher(prompt)


def broken(prompt):
    if calls() == 5 and not Path("mended").exists():
        raise RuntimeError("the line is down")
    return higher(prompt)


class Shelf:
    named = Judge(higher, name="a name of its own")


NOT_A_JUDGE = 7
'''


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a module of judges and entries, in which the user stands."""
    (tmp_path / "panel_of_mine.py").write_text(MODULE)
    (tmp_path / "half_done.py").write_text("import a_module_that_nobody_has\n")
    write_entries(tmp_path / "entries.jsonl", field())
    monkeypatch.chdir(tmp_path)
    # Undone after the test, with what the command adds to it.
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("panel_of_mine", "half_done"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("panel_of_mine", "half_done"):
        sys.modules.pop(name, None)


def field(size: int = SIZE, queries: tuple[str, ...] = ("fish", "birds")) -> list[Entry]:
    numbers = random.Random(7).sample(range(size), size)
    return [
        entry(
            f"About {query} in general. Its number is {number}. That is all.",
            query=query,
            instruction=instruction,
            document_id=f"{query}-{number}",
        )
        for query in queries
        for instruction in (HIGH, LOW)
        for number in numbers
    ]


def write_entries(path: Path, entries: list[Entry]) -> None:
    lines = (each.model_dump_json(exclude_defaults=True) + "\n" for each in entries)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def run(folder):
    """Run `lanerank judge entries.jsonl out.jsonl`; one question at a time, to count them."""

    def judge(*options, judge="higher", code=0, entries="entries.jsonl", out="out.jsonl"):
        command = ["judge", entries, out, "--judge", f"panel_of_mine:{judge}", "--concurrency=1"]
        result = CliRunner().invoke(app, [*command, *map(str, options)], env=WIDE)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return judge


def calls() -> int:
    return len(Path("calls.txt").read_text()) if Path("calls.txt").exists() else 0


def number_of(row: Entry) -> int:
    return int(row.document_id.rpartition("-")[2])


# What comes out


@pytest.mark.parametrize("model", ["bradley-terry", "thurstone"])
def test_scores_follow_the_judge_under_each_instruction(run, model) -> None:
    result = run("--model", model, "--source", "a judge")
    rows = read_quadruples("out.jsonl")
    assert len(rows) == 4 * SIZE
    for instruction, sign in ((HIGH, 1), (LOW, -1)):
        for query in ("fish", "birds"):
            of = [r for r in rows if r.instruction == instruction and r.query == query]
            tau = stats.kendalltau([sign * number_of(r) for r in of], [r.score for r in of])
            assert tau.statistic > 0.8
    assert all(row.uncertainty > 0 and row.source == "a judge" for row in rows)
    assert f"{4 * SIZE:,} rows in out.jsonl" in result.stdout
    assert f"{calls()} calls" in result.stdout


def test_a_larger_prior_brings_scores_closer_to_each_other(run) -> None:
    spread = {}
    for prior in (0.1, 5):
        run("--prior", prior, "--overwrite")
        scores = [row.score for row in read_quadruples("out.jsonl")]
        spread[prior] = max(scores) - min(scores)
    assert spread[5] < spread[0.1]


def test_quadruples_are_entries_too_and_parquet_is_read_and_written(run) -> None:
    rows = [each.as_quadruple(score=0.5, source="old") for each in field(queries=("fish",))]
    write_quadruples(Path("entries.parquet"), rows)
    run(entries="entries.parquet", out="out.parquet")
    made = read_quadruples("out.parquet")
    assert [row.document_id for row in made] == [row.document_id for row in rows]
    assert {row.source for row in made} == {"tournament"}
    assert len({row.score for row in made}) > 5


def test_grades_put_queries_on_one_scale(run) -> None:
    grades = [
        each.as_quadruple(score=number_of(each) / SIZE if each.query == "fish" else 0.1)
        for each in field()
        if each.instruction == HIGH and number_of(each) in (1, 5, 8)
    ]
    write_quadruples(Path("grades.jsonl"), [*grades, entry("other").as_quadruple(score=1)])
    result = run("--grades", "grades.jsonl", "--cross-documents", SIZE)
    assert "6 of 40 entries are graded" in result.stderr
    means = {
        query: sum(r.score for r in read_quadruples("out.jsonl") if r.query == query)
        for query in ("fish", "birds")
    }
    assert means["fish"] > means["birds"] + 3
    assert "distance of scores from grades" in result.stdout


def test_the_whole_report_in_json(run) -> None:
    report = json.loads(run("--json", "--controls", 4).stdout)
    assert TournamentReport.model_validate(report["tournament"]).entries == 4 * SIZE
    votes = [c["votes"] for c in report["judging"]["comparisons"]]
    assert len(votes) == report["judging"]["questions"]
    assert all(" against " in each[0]["reason"] for each in votes)
    assert ObedienceReport.model_validate(report["obedience"]).obeyed.value == 0
    assert [w for w in report["warnings"] if "obey" in w] == []


def test_two_judges_vote(run) -> None:
    result = run("--judge", "panel_of_mine:Shelf.named", "--json")
    report = json.loads(result.stdout)["judging"]
    names = {vote["judge"] for c in report["comparisons"] for vote in c["votes"]}
    assert names == {"panel_of_mine:higher", "a name of its own"}
    assert report["judge_agreement"]["value"] == 1


# What a person is warned of


def test_an_obeying_judge_is_told_from_one_that_does_not(run) -> None:
    honest = run("--controls", 12)
    assert "obey documents" not in honest.stderr
    result = run("--controls", 12, judge="obedient", out="obedient.jsonl")
    assert "Warning: An order inside a document turned 100% of 12 judgements" in result.stderr
    assert "controls: turned by an order" in result.stdout


def test_a_judge_that_leans_to_a_place_is_told(run) -> None:
    result = run(judge="lazy")
    assert "lean to the entry shown first (mean preference 0.50)" in result.stderr
    assert "scores of different parts do not compare" in result.stderr
    result = run("--order", "both", "--controls", 3, judge="lazy", out="both.jsonl")
    assert "preferences that the swap turned" in result.stdout
    assert "No pair was decided clearly enough for `--controls`" in result.stderr


# The plan


def test_a_dry_run_asks_nothing_and_is_what_the_run_takes(run, folder) -> None:
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    price = ["--input-price", 2, "--output-price", 8]
    plan = json.loads(run("--dry-run", "--json", "--controls", 3, *price).stdout)
    assert calls() == 0
    assert {path.name for path in folder.iterdir()} <= before
    assert plan["pairs"] == plan["questions"] == plan["calls"] - plan["calls_for_controls"]
    assert plan["cost"] == pytest.approx(
        2e-6 * plan["tokens_sent"] + 8e-6 * plan["tokens_answered"], rel=1e-3
    )
    shown = run("--dry-run", *price).stdout
    assert "What judging would take" in shown
    assert "cost" in shown
    assert "--input-price" in run("--dry-run").stdout
    result = run("--controls", 3, *price)
    assert calls() == plan["calls"]
    assert f"{plan['calls']:,} calls" in result.stdout
    assert "cost 0.0" in result.stdout
    again = json.loads(run("--dry-run", "--json").stdout)
    assert (again["calls"], again["remembered"]) == (0, plan["questions"])
    both = json.loads(run("--dry-run", "--json", "--order", "both", "--games", 8).stdout)
    assert both["questions"] == 2 * both["pairs"]
    assert both["pairs"] > plan["pairs"]


# Interrupted and resumed


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(run, folder) -> None:
    result = run(judge="impatient", code=130)
    assert "the same command goes on" in result.stderr
    assert not (folder / "out.jsonl").exists()
    # What was under way has ended, and is kept as well.
    kept = calls()
    plan = json.loads(run("--dry-run", "--json", judge="impatient").stdout)
    assert plan["remembered"] == kept
    result = run(judge="impatient")
    questions = calls()
    assert 5 <= kept < questions == plan["questions"]
    assert f"{kept} of {questions} answers were remembered" in result.stdout
    run("--cache", "other.sqlite", out="whole.jsonl")
    assert calls() == 2 * questions
    assert read_quadruples("out.jsonl") == read_quadruples("whole.jsonl")


def test_ctrl_c_at_the_keyboard_keeps_the_answers(folder) -> None:
    code = "import sys; from lanerank.cli import main; sys.argv[0] = 'lanerank'; main()"
    command = ["judge", "entries.jsonl", "out.jsonl", "--judge", "panel_of_mine:signalled"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *command, "--concurrency", "2"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "Interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    with sqlite3.connect(folder / "out.jsonl.judge.sqlite") as cache:
        [(kept,)] = cache.execute("SELECT count(*) FROM verdicts")
    cache.close()
    assert 5 <= kept == calls()
    assert not (folder / "out.jsonl").exists()


def test_a_judge_that_fails_ends_the_run_and_a_mended_one_goes_on(run, folder) -> None:
    with pytest.raises(JudgeError, match="RuntimeError: the line is down") as caught:
        run(judge="broken")
    assert caught.value.judge == "panel_of_mine:broken"
    assert caught.value.cost.calls == 1
    assert not (folder / "out.jsonl").exists()
    (folder / "mended").touch()
    assert "5 of " in run(judge="broken").stdout


def test_some_failures_may_be_let_pass(run) -> None:
    result = run("--max-failures", 1000, judge="broken")
    assert "questions have no answer; the first: the judge" in result.stderr
    assert "entries were in no comparison" in result.stderr
    assert 2 <= len(read_quadruples("out.jsonl")) < 4 * SIZE


def test_controls_that_fail_do_not_cost_the_scores(run, folder) -> None:
    result = run("--controls", 4, judge="filtered", code=1)
    rows = read_quadruples("out.jsonl")
    assert len(rows) == 4 * SIZE
    assert f"{4 * SIZE} rows in out.jsonl" in result.stdout
    for part in ("'out.jsonl' is written", "--overwrite", "RuntimeError: content filter"):
        assert part in result.stderr
    report = json.loads(
        run("--controls", 4, "--json", "--overwrite", judge="filtered", code=1).stdout
    )
    assert report["obedience"] is None
    assert "content filter" in report["warnings"][-1]
    # As the message says: failures may be let pass, or the judge mended.
    passed = run("--controls", 4, "--overwrite", "--max-failures", 4, judge="filtered")
    assert "4 questions about control pairs have no answer" in passed.stderr
    (folder / "mended").touch()
    assert "content filter" not in run("--controls", 4, "--overwrite", judge="filtered").stderr
    assert read_quadruples("out.jsonl") == rows


def test_controls_that_are_interrupted_do_not_cost_the_scores(run) -> None:
    result = run("--controls", 4, judge="cut_off", code=130)
    assert "'out.jsonl' is written; the same command with --overwrite goes on" in result.stderr
    rows = read_quadruples("out.jsonl")
    assert "turned by an order" in run("--controls", 4, "--overwrite", judge="cut_off").stdout
    assert read_quadruples("out.jsonl") == rows


# What is refused


@pytest.mark.parametrize("prior", ["0", "-1", "nan", "inf"])
def test_a_prior_that_is_none_is_refused_before_judges_are_paid(run, prior) -> None:
    with pytest.raises(InputError, match="`--prior` must be a number of games above 0"):
        run("--prior", prior)
    assert calls() == 0


def test_an_output_is_not_overwritten_and_nothing_is_asked(run, folder) -> None:
    (folder / "out.jsonl").write_text("years of work")
    with pytest.raises(InputError, match="is there already"):
        run()
    assert calls() == 0
    assert (folder / "out.jsonl").read_text() == "years of work"
    run("--overwrite")
    assert len(read_quadruples("out.jsonl")) == 4 * SIZE


def test_an_output_of_another_format_is_refused_before_judges_are_paid(run) -> None:
    with pytest.raises(InputError, match=r"must end in \.jsonl"):
        run(out="out.csv")
    assert calls() == 0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("panel_of_mine", "must be MODULE:NAME"),
        (":higher", "must be MODULE:NAME"),
        ("panel_of_yours:higher", "no module 'panel_of_yours' in the current folder"),
        ("panel_of_mine.sub:higher", "no module 'panel_of_mine.sub'"),
        ("panel_of_mine:lower", "'panel_of_mine' has no 'lower'"),
        ("panel_of_mine:Shelf.other", r"has no 'Shelf\.other'"),
        ("panel_of_mine:NOT_A_JUDGE", "a LangChain chat model, .*got 7"),
        ("panel_of_mine:Shelf", "got <class"),
    ],
)
def test_what_is_no_judge_is_refused(folder, name, problem) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        load_judge(name)
    assert name in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_what_a_module_of_the_users_fails_at_is_shown_as_it_is(folder) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        load_judge("half_done:judge")


def test_a_langchain_model_and_a_judge_are_taken(folder) -> None:
    pytest.importorskip("langchain_core")
    (folder / "chat_of_mine.py").write_text(
        textwrap.dedent("""
        from langchain_core.language_models import FakeListChatModel
        model = FakeListChatModel(responses=['{"reason": "r", "preference": 0.5}'])
        """)
    )
    judge = load_judge("chat_of_mine:model")
    assert isinstance(judge, Judge)
    assert judge.name == "chat_of_mine:model"
    assert load_judge("panel_of_mine:Shelf.named").name == "a name of its own"


def test_entries_without_a_pair_are_refused(run, folder) -> None:
    write_entries(folder / "entries.jsonl", [entry("a"), entry("b", query="birds")])
    with pytest.raises(InputError, match="no two documents with the same query"):
        run()


def test_an_entry_that_is_there_twice_is_named_with_its_line(run, folder) -> None:
    write_entries(folder / "entries.jsonl", [entry("a"), entry("b"), entry("a")])
    with pytest.raises(FileFormatError, match=r"entries\.jsonl:3: .*entries\.jsonl:1 already"):
        run()


def test_grades_of_other_entries_are_refused_before_judges_are_paid(run) -> None:
    write_quadruples(Path("grades.jsonl"), [entry("other").as_quadruple(score=1)])
    with pytest.raises(InputError, match="`--grades` has no row of an entry"):
        run("--grades", "grades.jsonl")
    assert calls() == 0


def test_grades_against_the_judges_keep_the_answers(run) -> None:
    turned = [each.as_quadruple(score=1 - number_of(each) / SIZE) for each in field()]
    grades = [row for row in turned if row.instruction == HIGH]
    write_quadruples(Path("grades.jsonl"), grades)
    with pytest.raises(InputError, match="`grades` fall where") as caught:
        run("--grades", "grades.jsonl")
    assert "out.jsonl.judge.sqlite" in caught.value.__notes__[0]
    asked = calls()
    run()
    assert calls() == asked


def test_an_entry_is_a_quadruple_without_a_score() -> None:
    assert issubclass(Quadruple, Entry)
    scored = {"score", "weight", "source", "uncertainty"}
    assert set(Quadruple.model_fields) - set(Entry.model_fields) == scored
    row = entry("a", document_id="x").as_quadruple(score=0.25, source="s")
    assert row.as_quadruple(score=0.75) == entry("a", document_id="x").as_quadruple(score=0.75)
    assert str(row) == "fish | Prefer red. | x"


def test_help_says_what_the_cache_goes_by(run) -> None:
    said = " ".join(CliRunner().invoke(app, ["judge", "--help"], env=WIDE).stdout.split())
    for part in ("MODULE:NAME", "answers are remembered by the judge's name", "--dry-run"):
        assert part in said
