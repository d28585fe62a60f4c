"""The command line: documents in, tables or JSON out, one line for a mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from remote_servers import RerankServer, change, fail
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lanerank
from lanerank import Reranker
from lanerank.cli import app, main
from lanerank.cli.outputs import new_files
from lanerank.cli.ranking import print_ranking
from lanerank.errors import InputError, RemoteError, ScorerError
from lanerank.scoring.fallback import FallbackScorer
from lanerank.service import services
from lanerank.template import known_models
from lanerank.testing import OverlapScorer

WIDE = {"COLUMNS": "200"}
JSONL = "\n".join(
    json.dumps(document)
    for document in (
        {"id": "a", "text": "a red fish", "metadata": {"date": "2025-01-01"}},
        {"text": "a coach", "site": "x"},
        "only a text",
    )
)


@pytest.fixture
def ranked(tiny_model_folder):
    """Run `lanerank rank` on the tiny model."""

    def run(*arguments, stdin=None):
        command = ["rank", "--model", str(tiny_model_folder), *map(str, arguments)]
        return CliRunner().invoke(app, command, input=stdin, env=WIDE, catch_exceptions=False)

    return run


@pytest.fixture
def failing(tiny_model_folder, monkeypatch, capsys):
    """Run the program as the shell does, in this process; give exit code and error lines."""

    def run(*arguments, model=tiny_model_folder, stdin=b""):
        with monkeypatch.context() as patch:
            command = ["lanerank", "rank", "--model", str(model), "-q", "red", *map(str, arguments)]
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            # `main` sets these where they are not set.
            patch.setenv("TRANSFORMERS_VERBOSITY", "error")
            patch.setenv("TOKENIZERS_PARALLELISM", "false")
            with pytest.raises(SystemExit) as caught:
                main()
        captured = capsys.readouterr()
        assert captured.out == ""
        return caught.value.code, captured.err.splitlines()

    return run


@pytest.fixture
def write(tmp_path):
    """Put content into a file."""

    def put(content, name="documents.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def options(command):
    found = typer.main.get_command(app).commands[command].params
    return [(parameter, name) for parameter in found for name in parameter.opts]


# Help


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "rank",
            [
                "--query",
                "--instruction",
                "--attribute",
                "--today",
                "--model",
                "--device",
                "--top-k",
                "--long-documents",
                "--on-unsupported",
                "--json",
            ],
        ),
        ("demo", ["--model", "--device", "--top-k"]),
        ("evaluate", ["--model", "--device", "--on-unsupported", "--json"]),
        ("following", ["--model", "--condition", "--json"]),
        ("calibration", ["--model", "--check", "--save", "--json"]),
        ("injection", ["--model", "--attacks", "--sample", "--threshold", "--json"]),
        ("compare", ["--other-model", "--instruction-a", "--measure", "--qrels", "--json"]),
        ("report", ["--output", "--part", "--title", "--json"]),
        ("snapshot", ["--output", "--model"]),
        ("check", ["--score-tolerance", "--ranks-only", "--top-k", "--json"]),
    ],
)
def test_the_help_of_a_command_has_every_option(command, expected) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env=WIDE)
    assert result.exit_code == 0
    named = [name for _, name in options(command) if name.startswith("-")]
    assert set(expected) <= set(named)
    for name in (*expected, *named):
        assert name in result.stdout
    assert all(getattr(parameter, "help", None) for parameter, _ in options(command))


def test_the_help_of_the_program_has_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"], env=WIDE)
    assert result.exit_code == 0
    for command in ("rank", "demo", "evaluate", "--version"):
        assert command in result.stdout


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, lanerank.__version__)


# Ranking a file


def test_a_table_shows_the_documents_best_first(ranked, write, tiny_model_folder) -> None:
    result = ranked("-q", "red fish", write(JSONL))
    assert (result.exit_code, result.stderr) == (0, "")
    texts = ["a red fish", "a coach", "only a text"]
    best = Reranker.from_pretrained(tiny_model_folder).rank("red fish", texts)
    places = [result.stdout.index(texts[entry.index]) for entry in best]
    assert places == sorted(places)
    assert "a: a red fish" in result.stdout
    assert f"{best[0].score:.3f}" in result.stdout


def test_json_holds_the_whole_ranking_and_nothing_else(ranked, write, tiny_model_folder) -> None:
    result = ranked("-q", "red fish", "-i", "prefer marine", "-a", "date", "--json", write(JSONL))
    assert (result.exit_code, result.stderr) == (0, "")
    report = strict_json(result.stdout)
    documents = [
        {"id": "a", "text": "a red fish", "metadata": {"date": "2025-01-01"}},
        {"text": "a coach", "site": "x"},
        "only a text",
    ]
    ranking = Reranker.from_pretrained(tiny_model_folder).rank(
        "red fish", documents, instruction="prefer marine", attributes=["date"]
    )
    assert report == ranking.model_dump(mode="json")
    assert report["instruction_applied"] == "lane"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_documents_can_come_from_standard_input(arguments, ranked) -> None:
    result = ranked("-q", "red", "--json", *arguments, stdin=JSONL)
    assert sorted(entry["index"] for entry in strict_json(result.stdout)["results"]) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_documents_can_come_from_a_pipe_with_a_name(ranked, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # A daemon, because it waits until somebody reads.
    threading.Thread(target=pipe.write_text, args=[JSONL], daemon=True).start()
    result = ranked("-q", "red", "--json", pipe)
    assert sorted(entry["index"] for entry in strict_json(result.stdout)["results"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\n\r\n  two  ", ["one", "two"]),
        ("one\n{not json", ["one", "{not json"]),
        ('"one"\n"t\\u0077o"', ["one", "two"]),
        ('\n{"text": "one"}\n\n"two"\n', ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b'\xef\xbb\xbf{"text": "one"}\n', ["one"]),
        ('{"text": ""}\n{"text": "\\u0000"}', ["", "\0"]),
        ("[1] a note\n[1, 2]", ["[1] a note", "[1, 2]"]),
        ('["a list", it says', ['["a list", it says']),
        ("x" * 1_100_000, ["x" * 1_100_000]),
    ],
)
def test_plain_lines_and_jsonl_are_told_apart(content, texts, ranked, write) -> None:
    result = ranked("-q", "red", "--json", write(content))
    found = {e["index"]: e["document"]["text"] for e in strict_json(result.stdout)["results"]}
    assert [found[i] for i in range(len(found))] == texts


def test_top_k_keeps_the_best(ranked, write) -> None:
    everything = strict_json(ranked("-q", "red", "--json", write(JSONL)).stdout)["results"]
    best = strict_json(ranked("-q", "red", "--json", "--top-k", 1, write(JSONL)).stdout)["results"]
    assert best == everything[:1]


def test_today_gives_dates_an_age(ranked, write) -> None:
    path = write('{"text": "a red fish", "date": "2025-01-01"}')
    arguments = ("-q", "red", "-i", "prefer marine", "-a", "date", "--json", path)
    scores = {
        strict_json(ranked("--today", day, *arguments).stdout)["results"][0]["score"]
        for day in ("2025-01-02", "2030-01-01")
    }
    assert len(scores) == 2


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("date", ""),
        ("site", ""),
        ("[b]", "No document has the attribute [b]; there are: date, site\n"),
        ("text", "No document has the attribute text; there are: date, site\n"),
    ],
)
def test_an_attribute_that_no_document_has_is_told(field, said, ranked, write) -> None:
    result = ranked("-q", "red", "-a", field, "-a", field, "--json", write(JSONL))
    assert (result.exit_code, result.stderr) == (0, said)
    assert strict_json(result.stdout)["results"]


@pytest.mark.parametrize(("mode", "mark"), [("truncate", True), ("max_window", False)])
def test_documents_that_were_cut_are_marked(mode, mark, ranked, write) -> None:
    result = ranked("-q", "red", "--long-documents", mode, write("short\nred " + "fish " * 300))
    assert ("(cut) red fish" in result.stdout) is mark


def test_a_long_document_leaves_room_for_the_numbers(ranked, write, tiny_model_folder) -> None:
    texts = ["fish " * 300, "a" * 300, "\N{SHIP}" * 300, "short"]
    result = ranked("-q", "red", write("\n".join(texts)))
    best = Reranker.from_pretrained(tiny_model_folder).rank("red", [t.strip() for t in texts])
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["rank", "score", "no.", "document"]
    assert [row.split()[:3] for row in rows] == [
        [str(place), f"{entry.score:.3f}", str(entry.index + 1)]
        for place, entry in enumerate(best, 1)
    ]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_ranks_nothing(content, ranked, write) -> None:
    table = ranked("-q", "red", write(content))
    assert (table.exit_code, table.stdout, table.stderr) == (0, "", "No documents.\n")
    assert strict_json(ranked("-q", "red", "--json", write(content)).stdout)["results"] == []


def test_long_work_shows_progress_on_standard_error_only(ranked, write) -> None:
    content = "\n".join(f"fish {'red ' * (i % 5)}" for i in range(1500))
    result = ranked("-q", "red", "--json", "-k", 1, write(content))
    assert len(strict_json(result.stdout)["results"]) == 1


# Documents that try to be more than text


HOSTILE = "\ud800 \x1b[31mred\x1b[0m [bold]loud[/bold] [/] \0 \x07 \u202e 🚢 \\ [red"


def test_json_stays_json_whatever_a_document_holds(ranked, write) -> None:
    document = {
        "id": "\ud800",
        "text": HOSTILE,
        "metadata": {"[bold]": HOSTILE, "date": HOSTILE, "number": float("nan")},
    }
    result = ranked("-q", "red", "-a", "date", "--json", write(json.dumps(document)))
    assert (result.exit_code, result.stderr) == (0, "")
    [entry] = strict_json(result.stdout)["results"]
    assert entry["document"]["text"] == HOSTILE
    assert entry["document"]["metadata"]["[bold]"] == HOSTILE
    assert result.stdout.isascii()


def test_a_table_shows_markup_as_text_and_no_control_characters(ranked, write) -> None:
    result = ranked("-q", "red", write(json.dumps({"id": "[blink]", "text": HOSTILE})))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "[bold]loud[/bold] [/]" in result.stdout
    assert "[blink]:" in result.stdout
    assert not {"\x1b", "\0", "\x07", "\u202e"} & set(result.stdout)
    assert "🚢" in result.stdout


def test_a_query_that_the_shell_could_not_decode_is_read(ranked, write) -> None:
    result = ranked("-q", "red \udcff", "-i", "prefer \udcff", "--json", write("a"))
    assert strict_json(result.stdout)["query"] == "red \udcff"


def test_scores_that_are_no_numbers_are_told_and_are_null_in_json(
    ranked, write, tiny_model_folder, tmp_path
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["plain_bias"].fill_(float("nan"))
    save_file(state, folder / "model.safetensors")
    table = ranked("-q", "red", "--model", folder, write("a\nb"))
    assert "Without a finite score: documents [0, 1]" in table.stderr
    report = strict_json(ranked("-q", "red", "--model", folder, "--json", write("a\nb")).stdout)
    assert report["non_finite"] == [0, 1]
    assert [entry["score"] for entry in report["results"]] == [None, None]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_ranking_without_scores_is_told_on_standard_error(as_json, capsys) -> None:
    @dataclass(frozen=True)
    class Broken(OverlapScorer):
        def score(self, request):
            raise ScorerError("out of [bold]memory[/bold]\x1b[31m")

    for scorer in (OverlapScorer(), Broken()):
        ranking = Reranker(FallbackScorer(scorer)).rank("fish", ["a red fish", "b"])
        print_ranking(ranking, as_json=as_json)
        captured = capsys.readouterr()
        assert "a red fish" in captured.out
        told = "nothing was scored: out of [bold]memory[/bold]" in captured.err
        assert told is (ranking.degraded is not None) is isinstance(scorer, Broken)
        assert "\x1b" not in captured.err
        if as_json:
            assert strict_json(captured.out)["degraded"] == ranking.degraded


# Mistakes


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('{"text": "a"}\n\nno json\n', 3, "not JSON"),
        ('{"text": "a"', 1, "not JSON"),
        ('{"text": "a"}\n{"text": "b"} x', 2, "not JSON"),
        ('"a"\n' + '{"a":' * 100_000, 2, "not JSON"),
        ('{"text": "a"}\n{"content": "b"}', 2, "no 'text'"),
        ('{"text": 7}', 1, "no 'text'"),
        ('{"text": null}', 1, "no 'text'"),
        ("{}", 1, "no 'text'"),
        ('"a"\n["b"]', 2, "neither an object"),
        ('"a"\n7', 2, "neither an object"),
        ('"a"\nnull', 2, "neither an object"),
        ('"a"\n{"text": "b", "metadata": "x"}', 2, "'metadata' must be an object, got 'x'"),
        ('[{"text": "a"}]', 1, "a JSON array; give one object a line"),
        ('\n["a", "b"]', 2, "a JSON array; give one object a line"),
        ('[\n  {"text": "a"}\n]', 1, "a JSON array; give one object a line"),
        ('[{"text": "a"},\n{"text": "b"}]', 1, "a JSON array; give one object a line"),
        (b"plain\n\xff\xfe", 2, "not UTF-8"),
        ("one".encode("utf-16"), 1, "not UTF-8"),
        (b'{"text": "\xe9"}', 1, "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(content, line, problem, failing, write) -> None:
    path = write(content)
    code, errors = failing(path)
    assert code == 2
    assert len(errors) == 1
    assert f"{path}:{line}: " in errors[0]
    assert problem in errors[0]


def test_a_bad_line_of_standard_input_is_named(failing) -> None:
    code, errors = failing("-", stdin=b'{"text": "a"}\nno json')
    assert code == 2
    assert errors[0].startswith("Error: <stdin>:2: not JSON")
    assert len(errors) == 1


@pytest.mark.parametrize("file", ["no-such-file.jsonl", "."])
def test_a_file_that_is_not_there_is_named(file, failing) -> None:
    code, errors = failing(file)
    assert (code, len(errors)) == (2, 1)
    assert repr(file) in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--query", ""), "`query`"),
        (("--query", "fish " * 300), "`query` is longer than"),
        (("--instruction", "fish " * 300), "`instruction` is longer than"),
        (("--top-k", "0"), "`top_k` must be at least 1"),
        (("--top-k", "-3"), "`top_k` must be at least 1"),
        (("--device", "abacus"), "`device='abacus'` cannot be used"),
        (("--model", "/no/such/[bold]model"), "there is no folder '/no/such/[bold]model'"),
    ],
)
def test_an_unusable_argument_is_one_line_that_names_it(arguments, message, failing, write) -> None:
    code, errors = failing(*arguments, write("a\nb"))
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 99])
def test_a_damaged_model_is_one_line_that_names_the_file(
    name, content, failing, write, tiny_model_folder, tmp_path
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    code, errors = failing(write("a"), model=folder)
    assert (code, len(errors)) == (2, 1)
    assert str(folder / name) in errors[0]


def test_a_model_that_does_not_fit_its_config_is_one_line(
    failing, write, tiny_model_folder, tmp_path
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    code, errors = failing(write("a"), model=folder)
    assert (code, len(errors)) == (2, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("rank",),
        ("rank", "-q", "red", "--top-k", "many"),
        ("rank", "-q", "red", "--long-documents", "split"),
        ("rank", "-q", "red", "--today", "tomorrow"),
        ("rank", "-q", "red", "--no-such-option"),
        ("demo", "-k", "0"),
        ("demo", "--top-k", "-3"),
        ("evaluate",),
        ("no-such-command",),
    ],
)
def test_wrong_usage_exits_with_2_and_prints_nothing_on_standard_output(arguments) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


# The demonstration and the evaluation, on the tiny model


def test_the_demo_shows_both_corpora_under_every_instruction(
    make_encoder, tiny_model_folder, tmp_path
) -> None:
    # The tiny tokenizer spells most words, so the instructions need more positions.
    folder = shutil.copytree(tiny_model_folder, tmp_path / "roomy")
    make_encoder(max_position_embeddings=512).save_pretrained(folder)
    command = ["demo", "--model", str(folder), "--top-k", "2"]
    result = CliRunner().invoke(app, command, env=WIDE, catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    for label in (
        "Query: candidates with IMO experience",
        "Marine logistics company",
        "Mathematics olympiad team",
        "Query: discharge procedure",
    ):
        assert label in result.stdout


@pytest.fixture
def scenarios(write):
    return write(
        json.dumps(
            {
                "id": "s1",
                "domain": "test",
                "query": "red fish",
                "documents": [{"id": "a", "text": "a red fish"}, {"id": "b", "text": "a coach"}],
                "lanes": [
                    {"kind": "none", "instruction": None, "grades": {"a": 3, "b": 0}},
                    {"kind": "business_rule", "instruction": "marine", "grades": {"a": 0, "b": 3}},
                ],
            }
        ),
        "scenarios.jsonl",
    )


def test_an_evaluation_prints_its_measures(scenarios, tiny_model_folder, tmp_path) -> None:
    pytest.importorskip("ir_measures")
    target = tmp_path / "report.json"
    command = ["evaluate", str(scenarios), "--model", str(tiny_model_folder)]
    table = CliRunner().invoke(
        app, [*command, "--json", str(target)], env=WIDE, catch_exceptions=False
    )
    assert table.exit_code == 0
    assert "ndcg_instructed" in table.stdout
    printed = CliRunner().invoke(app, [*command, "--json", "-"], env=WIDE, catch_exceptions=False)
    assert (printed.exit_code, printed.stderr) == (0, "")
    assert strict_json(printed.stdout) == strict_json(target.read_text())


@pytest.fixture
def measured(scenarios, tiny_model_folder):
    """Run a measuring command on the scenarios with the tiny model."""
    pytest.importorskip("ir_measures")

    def run(command, *arguments, files=(scenarios,)):
        options = [command, *map(str, files), "--model", str(tiny_model_folder)]
        return CliRunner().invoke(app, [*options, *map(str, arguments)], env=WIDE)

    return run


ONE_SCENARIO = "no interval: the value rests on one scenario"


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("following", ("--condition", "negated"), ["flip_accuracy", "random scores", "negated"]),
        ("following", ("--condition", "none"), ["against withheld"]),
        ("calibration", (), ["ece", "business_rule/threshold"]),
        ("injection", ("--sample", "30"), ["lane_transfer", "position/", ONE_SCENARIO]),
        ("compare", (), ["instruction-aware (1)", "nDCG@10", "rank-biased overlap"]),
        ("compare", (), ["no interval", "neutral: does the interval of B - A lie within 0.02"]),
        ("compare", ("--measure", "RR@10", "--instruction-b", "red"), ["RR@10", "B: red"]),
    ],
)
def test_a_measuring_command_prints_a_table_and_writes_the_same_as_json(
    command, options, expected, measured, tmp_path
) -> None:
    target = tmp_path / "report.json"
    table = measured(command, *options, "--json", target)
    assert table.exit_code == 0, table.output
    assert all(words in table.stdout for words in expected), table.stdout
    printed = measured(command, *options, "--json", "-")
    assert strict_json(printed.stdout) == strict_json(target.read_text())


def test_a_report_is_a_page_and_json(measured, tmp_path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    result = measured(
        "report", "-o", page, "--json", data, "--part", "comparison", "--title", "Ours"
    )
    assert result.exit_code == 0, result.output
    assert "<title>Ours</title>" in page.read_text()
    assert strict_json(data.read_text())["following"] is None


def test_finished_runs_are_compared_without_a_model(tmp_path) -> None:
    pytest.importorskip("ir_measures")
    for name, order in (("a.run", "xy"), ("b.run", "yx")):
        lines = [f"q1 Q0 {doc} {rank} {9 - rank} t" for rank, doc in enumerate(order, 1)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "qrels").write_text("q1 0 x 1\n")
    result = CliRunner().invoke(
        app,
        [
            *("compare", "--run", str(tmp_path / "a.run"), "--other-run", str(tmp_path / "b.run")),
            *("--qrels", str(tmp_path / "qrels"), "--measure", "RR@10"),
        ],
        env=WIDE,
    )
    assert result.exit_code == 0, result.output
    assert "-0.500" in result.stdout


def test_a_snapshot_is_checked_and_a_change_ends_with_1(measured, write, tmp_path) -> None:
    kept = tmp_path / "snapshot.json"
    taken = measured("snapshot", "-o", kept)
    assert taken.exit_code == 0, taken.output
    again = measured("check", files=(kept, *cases_of(taken, tmp_path)))
    assert again.exit_code == 0, again.output
    case = {"id": "s1/none", "query": "red fish", "documents": [{"text": "another"}]}
    changed = measured("check", files=(kept, write(json.dumps(case), "cases.jsonl")))
    assert changed.exit_code == 1, changed.output


def cases_of(_, folder):
    return sorted(folder.glob("scenarios.jsonl"))


def test_a_calibrator_is_checked_and_saved(measured, tiny_model_folder, tmp_path) -> None:
    refused = measured("calibration", "--save", tmp_path)
    assert "`--save` needs `--check`" in str(refused.exception)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("following", ("-c", "loud"), "`--condition` must be of withheld"),
        ("report", ("--part", "speed"), "`--part` must be of comparison"),
        ("calibration", ("--check", "platt", "--save", "/no/such"), "is not a folder"),
        ("compare", ("--run", "a.run"), "give scenario files, or"),
        ("compare", ("--other-run", "b.run"), "`--other-run` compares finished runs"),
        ("injection", ("--attacks", "/no/such.json"), "/no/such.json"),
    ],
)
def test_wrong_options_of_measuring_commands_are_named(command, options, message, measured) -> None:
    result = measured(command, *options)
    assert message in str(result.exception)


OUTPUTS = [
    *(
        (command, "--json")
        for command in ("evaluate", "following", "calibration", "injection", "compare", "check")
    ),
    *(("report", option) for option in ("--json", "--output")),
    ("snapshot", "--output"),
]


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_an_output_that_cannot_be_written_is_named_before_any_work(
    command, option, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    # The second is `check`'s file of cases; neither is read.
    arguments = [command, "no-such.jsonl", *(["either.jsonl"] if command == "check" else [])]

    def refused(path):
        result = CliRunner().invoke(app, [*arguments, option, path], env=WIDE)
        assert isinstance(result.exception, InputError)
        assert result.stdout == ""
        return str(result.exception)

    assert refused("nowhere/out") == (
        f"`{option}`: the output 'nowhere/out': there is no folder 'nowhere'; make it first"
    )
    assert refused(".") == f"`{option}`: the output '.' is a folder; give the name of a file"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "give another folder" in refused("out")


def test_the_two_outputs_of_a_report_are_not_one_file(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    names = "-o", str(tmp_path / "a"), "--json", str(tmp_path / "sub" / ".." / "a")
    result = CliRunner().invoke(app, ["report", "no-such.jsonl", *names])
    assert "that of `--output` too" in str(result.exception)


def test_an_output_is_whole_or_not_there(tmp_path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("years of work")

    def fail_midway():
        with new_files({"--output": kept, "--json": new}) as parts:
            for part in parts:
                part.write_text("half a p")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail_midway()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_page_or_json_that_breaks_off_keeps_the_one_before(
    command, measured, monkeypatch, tmp_path
) -> None:
    kept = tmp_path / "kept"
    kept.write_text("years of work")
    write_text = Path.write_text

    def half(self, text, **options):
        write_text(self, text[: len(text) // 2], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    options = ("--json",) if command == "evaluate" else ("--part", "comparison", "-o")
    assert "no space left" in str(measured(command, *options, kept).exception)
    assert kept.read_text() == "years of work"


def test_a_link_and_a_device_stay_what_they_are(measured, tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    for path in (link, null):
        assert measured("evaluate", "--json", path).exit_code == 0
        assert path.is_symlink()
    assert "ndcg_instructed" in target.read_text()
    assert not Path(os.devnull).is_file()


# As a program of its own


def shell(*arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-c", "from lanerank.cli import main; main()", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        timeout=600,
        check=False,
    )


def test_a_plain_run_prints_the_table_and_no_warnings(tiny_model_folder) -> None:
    result = shell("rank", "--model", tiny_model_folder, "-q", "red fish", stdin="a red fish\nb")
    assert (result.returncode, result.stderr) == (0, "")
    assert "a red fish" in result.stdout


def test_a_mistake_is_one_line_on_standard_error(tiny_model_folder, tmp_path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\nno json\n')
    result = shell("rank", "--model", tiny_model_folder, "-q", "red", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        f"Error: {path}:2: not JSON (Expecting value: line 1 column 1 (char 0)): 'no json'"
    ]


def test_a_bad_file_is_found_before_a_model_is_loaded(tmp_path) -> None:
    result = shell("rank", "--model", "/no/such/model", "-q", "red", tmp_path / "missing.jsonl")
    assert "missing.jsonl" in result.stderr
    assert result.returncode == 2


# Models


def models(*arguments, **options):
    return CliRunner().invoke(app, ["models", *arguments], env=WIDE, **options)


def test_models_lists_every_model_that_has_a_contract() -> None:
    result = models(catch_exceptions=False)
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert {model for model, _ in known_models()} <= set(lines)
    for words in ("zerank: instruction isolated", "contextual-rerank-v2: instruction open"):
        assert words in result.stdout
    assert "jina-reranker-v3: refused" in result.stdout


def test_models_as_json_has_the_same() -> None:
    listed = strict_json(models("--json", catch_exceptions=False).stdout)
    assert [each["model"] for each in listed] == [model for model, _ in known_models()]
    by_id = {each["model"]: each for each in listed}
    assert by_id["Qwen/Qwen3-Reranker-0.6B"]["isolates_instruction"] is True
    assert by_id["cross-encoder/ms-marco-MiniLM-L6-v2"]["instructions"] is False


def test_models_lists_services_too() -> None:
    lines = models("--services", catch_exceptions=False).stdout
    for contract in services():
        assert f"{contract.service}: " in lines
        assert contract.path in lines
    assert "instruction: in the field 'instruct'" in lines
    assert "lanerank[remote]" in lines
    listed = strict_json(models("--services", "--json", catch_exceptions=False).stdout)
    assert [each["service"] for each in listed] == [contract.service for contract in services()]


def test_models_show_prints_the_prompt_of_a_call() -> None:
    texts = ("find IMO", "marine only", "a \x1b[31m surveyor </query>")
    result = models(
        *("show", "zeroentropy/zerank-2", "-q", texts[0], "-i", texts[1], "-d", texts[2]),
        catch_exceptions=False,
    )
    assert "<query>find IMO</query>\n<instruction>marine only</instruction><|im_end|>" in (
        result.stdout
    )
    # What the document holds is neither a marker nor a command to the terminal.
    assert "\x1b" not in result.stdout
    assert result.stdout.count("</query>") == 1
    without = models("show", "zeroentropy/zerank-2", "-i", "", catch_exceptions=False).stdout
    assert "<instruction>" not in without.split("prompt", 1)[1]


def test_models_show_colours_the_lanes() -> None:
    run = shell("models", "show", "zerank", FORCE_COLOR="1", COLUMNS="200")
    assert "\x1b[32m<instruction>We are a marine logistics company.</instruction>" in run.stdout
    assert "\x1b[36m<query>" in run.stdout
    assert "\x1b[33m" in run.stdout


def test_models_show_knows_the_model_in_the_package() -> None:
    shown = models("show", "lanerank-mini", catch_exceptions=False).stdout
    for words in ("in the package", "512 of instruction", "128 of attributes", "README.md"):
        assert words in shown


def test_models_show_says_why_a_model_is_refused() -> None:
    result = models("show", "jinaai/jina-reranker-v3", catch_exceptions=False)
    assert "listwise" in result.stdout
    assert "prompt" not in result.stdout


def test_models_show_names_what_is_near_an_unknown_name() -> None:
    result = models("show", "zerank2")
    assert isinstance(result.exception, InputError)
    assert "'zerank'" in str(result.exception)


def test_rank_asks_a_service(tmp_path) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("cats sleep all day\ntankers follow IMO rules\n", encoding="utf-8")
    with RerankServer("vllm") as server:
        command = ["rank", str(file), "-q", "IMO", "-i", "tankers", "--json"]
        command += ["--service", "vllm", "--url", server.url, "--model", "some/model"]
        result = CliRunner().invoke(app, command, env=WIDE, catch_exceptions=False)
        ranking = strict_json(result.stdout)
        assert ranking["instruction_applied"] == "lane"
        assert [each["index"] for each in ranking["results"]] == [1, 0]
        assert server.seen[-1].body["instruction"] == "tankers"

        assert len(server.seen) == 4
        CliRunner().invoke(app, [*command, "--no-probe"], env=WIDE, catch_exceptions=False)
        assert len(server.seen) == 5
        server.script.append(fail(400))
        assert isinstance(CliRunner().invoke(app, command, env=WIDE).exception, RemoteError)


def test_rank_keeps_the_order_where_a_service_fails_if_told_to(tmp_path) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("cats sleep all day\ntankers follow IMO rules\n", encoding="utf-8")
    with RerankServer("vllm") as server:
        command = ["rank", str(file), "-q", "IMO", "--on-error", "input_order", "--json"]
        command += ["--service", "vllm", "--url", server.url, "--model", "some/model"]
        as_it_is = change(lambda answer: answer)
        # The probe asks three times before the ranking does.
        server.script += [as_it_is, as_it_is, as_it_is, fail(400)]
        result = CliRunner().invoke(app, command, env=WIDE, catch_exceptions=False)
    ranking = strict_json(result.stdout)
    assert [each["index"] for each in ranking["results"]] == [0, 1]
    assert "status 400" in ranking["degraded"]
    assert "nothing was scored" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--on-error", "input_order"], "`--on-error` is for a service; give `--service`"),
        (["--no-probe"], "`--no-probe` is for a service"),
        (["--service", "vllm", "--device", "cpu"], "`--device` is for a model that runs here"),
        (["--service", "vllm", "--long-documents", "max_window"], "`--long-documents` is for"),
    ],
)
def test_rank_refuses_options_that_would_change_nothing(options, said) -> None:
    result = CliRunner().invoke(app, ["rank", "-q", "x", *options], input="a")
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_rank_refuses_an_address_without_a_service() -> None:
    result = CliRunner().invoke(app, ["rank", "-q", "x", "--url", "http://localhost:1"], input="a")
    assert isinstance(result.exception, InputError)
    assert "`--service`" in str(result.exception)
