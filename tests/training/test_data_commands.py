"""`lanerank data`: files in, files out, and what is said of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lanerank.cli import app
from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation import read_scenarios
from lanerank.training import (
    CheckReport,
    Quadruple,
    quadruples_from_scenarios,
    read_quadruples,
    write_quadruples,
)

SCENARIOS = Path(__file__).parents[2] / "recipes" / "mini" / "data" / "scenarios"
WIDE = {"COLUMNS": "200"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `lanerank data` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def data(*arguments, code=0):
        result = CliRunner().invoke(app, ["data", *map(str, arguments)], env=WIDE)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return data


@pytest.fixture(scope="session")
def scenario_file(tmp_path_factory) -> Path:
    """Some scenarios of the recipe."""
    path = tmp_path_factory.mktemp("scenarios") / "some.jsonl"
    with gzip.open(SCENARIOS / "software.jsonl.gz", "rt", encoding="utf-8") as file:
        path.write_text("".join(line for line, _ in zip(file, range(12), strict=False)))
    return path


@pytest.fixture(scope="session")
def rows(scenario_file) -> list[Quadruple]:
    return quadruples_from_scenarios(read_scenarios(scenario_file))


@pytest.fixture
def quadruples(rows, tmp_path) -> Path:
    write_quadruples(tmp_path / "rows.parquet", rows)
    return tmp_path / "rows.parquet"


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFromScenarios:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
    def test_rows_are_those_of_the_function(self, run, scenario_file, rows, tmp_path, name):
        result = run("from-scenarios", scenario_file, name)
        assert read_quadruples(tmp_path / name) == rows
        assert f"{len(rows):,} rows of 12 queries in {name}" in result.stderr
        assert left_behind(tmp_path) == {name}

    def test_several_files_scores_and_source(self, run, scenario_file, tmp_path):
        lines = scenario_file.read_text().splitlines(keepends=True)
        for name, part in (("a.jsonl", lines[:2]), ("b.jsonl", lines[2:4])):
            (tmp_path / name).write_text("".join(part))
        scores = {0: 0.02, 1: 0.25, 2: 0.75, 3: 0.97}
        options = [f"--score={grade}={score}" for grade, score in scores.items()]
        run("from-scenarios", "a.jsonl", "b.jsonl", "out.jsonl", *options, "--source=mine")
        expected = quadruples_from_scenarios(
            read_scenarios(["a.jsonl", "b.jsonl"]), scores=scores, source="mine"
        )
        assert read_quadruples("out.jsonl") == expected

    @pytest.mark.parametrize("score", ["3", "three=1", "3=high", "=1"])
    def test_a_score_that_is_none(self, run, scenario_file, score):
        with pytest.raises(InputError, match="`--score`"):
            run("from-scenarios", scenario_file, "out.jsonl", "--score", score)

    def test_a_grade_without_a_score_leaves_no_file(self, run, scenario_file, tmp_path):
        with pytest.raises(InputError, match="`scores` has none for grade"):
            run("from-scenarios", scenario_file, "out.jsonl", "--score", "3=1")
        assert left_behind(tmp_path) == set()


class TestOutputs:
    def test_what_is_there_is_not_overwritten(self, run, scenario_file, rows, tmp_path):
        out = tmp_path / "out.jsonl"
        out.write_text("years of work")
        with pytest.raises(InputError, match=r"'out\.jsonl' is there already; .*--overwrite"):
            run("from-scenarios", scenario_file, "out.jsonl")
        assert out.read_text() == "years of work"
        run("from-scenarios", scenario_file, "out.jsonl", "--overwrite")
        assert read_quadruples(out) == rows

    def test_a_failure_keeps_what_is_overwritten(self, run, tmp_path):
        (tmp_path / "out.jsonl").write_text("years of work")
        (tmp_path / "bad.jsonl").write_text("{}\n")
        with pytest.raises(FileFormatError, match=r"bad\.jsonl:1"):
            run("from-scenarios", "bad.jsonl", "out.jsonl", "--overwrite")
        assert (tmp_path / "out.jsonl").read_text() == "years of work"
        assert left_behind(tmp_path) == {"bad.jsonl", "out.jsonl"}

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("nowhere/out.jsonl", "no folder 'nowhere'"),
            (".", "is a folder"),
            ("out.csv", r"must end in \.jsonl.*, got 'out\.csv'\n.*`OUT`"),
        ],
    )
    def test_an_output_that_cannot_be_written(self, run, scenario_file, tmp_path, name, problem):
        with pytest.raises(InputError, match=problem):
            run("from-scenarios", scenario_file, name)
        assert left_behind(tmp_path) == set()


class TestFromTrec:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path):
        (tmp_path / "qrels.txt").write_text("301 0 a 2\n301 0 b 1\n302 0 b 0\n302 0 a -1\n")
        (tmp_path / "documents.jsonl").write_text(
            '{"id": "a", "text": "A red fish.", "metadata": {"date": "2024-01-01"}}\n'
            '{"id": "b", "text": "Fish soup."}\n'
        )
        (tmp_path / "topics.jsonl").write_text(
            '{"id": "301", "query": "fish", "instruction": "Catches only."}\n'
            '{"id": "302", "query": "fish"}\n'
        )
        (tmp_path / "topics.trec").write_text(
            "<top>\n<num> Number: 301\n<title> fish\n<desc> Description:\nAny fish.\n"
            "<narr> Narrative:\nCatches only.\n</top>\n"
            "<top>\n<num> Number: 302\n<title> soup\n<desc> Description:\nAny soup.\n</top>\n"
        )

    def made(self, run, *options):
        files = ["--qrels", "qrels.txt", "--documents", "documents.jsonl"]
        run("from-trec", "out.jsonl", *files, *options)
        return read_quadruples("out.jsonl")

    def test_topics_in_jsonl(self, run):
        rows = self.made(run, "--topics", "topics.jsonl", "-a", "date")
        assert [(row.document_id, row.instruction, row.score) for row in rows] == [
            ("a", "Catches only.", 1.0),
            ("b", "Catches only.", 0.5),
            ("b", None, 0.0),
            ("a", None, 0.0),
        ]
        assert rows[0].attributes == ("date",)
        assert {row.source for row in rows} == {"trec"}

    def test_topics_of_trec_with_either_field(self, run):
        rows = self.made(run, "--topics", "topics.trec", "--instruction-field", "narrative")
        assert [row.instruction for row in rows] == ["Catches only."] * 2 + [None] * 2
        field = ["--instruction-field", "description", "--overwrite"]
        rows = self.made(run, "--topics", "topics.trec", *field)
        assert [row.instruction for row in rows] == ["Any fish."] * 2 + ["Any soup."] * 2

    def test_scores_of_ones_own(self, run):
        scores = ["--score=-1=0", "--score=0=0.1", "--score=1=0.4", "--score=2=0.9"]
        rows = self.made(run, "--topics", "topics.jsonl", *scores)
        assert [row.score for row in rows] == [0.9, 0.4, 0.1, 0.0]

    def test_a_missing_document_leaves_no_file(self, run, tmp_path):
        (tmp_path / "qrels.txt").write_text("301 0 c 2\n")
        with pytest.raises(InputError, match="'c'"):
            self.made(run, "--topics", "topics.jsonl")
        assert not (tmp_path / "out.jsonl").exists()


class TestFromTriples:
    def test_scores_are_moved_to_the_scale(self, run, tmp_path):
        (tmp_path / "pairs.tsv").write_text("fish\ta red fish\t4\nfish\tsoup\t1\n")
        run("from-triples", "pairs.tsv", "out.jsonl", "--lowest=1", "--highest=5", "--source=web")
        assert [(row.document, row.score, row.source) for row in read_quadruples("out.jsonl")] == [
            ("a red fish", 0.75, "web"),
            ("soup", 0.0, "web"),
        ]

    def test_a_score_out_of_range_is_named_with_its_line(self, run, tmp_path):
        (tmp_path / "pairs.tsv").write_text("fish\ta red fish\t0.5\nfish\tsoup\t2\n")
        with pytest.raises(FileFormatError, match=r"pairs\.tsv:2: .*from 0\.0 to 1\.0"):
            run("from-triples", "pairs.tsv", "out.jsonl")


@pytest.mark.parametrize(
    ("command", "name"), [("from-triples", "empty.tsv"), ("from-scenarios", "empty.jsonl")]
)
def test_rows_are_not_made_of_nothing(run, tmp_path, command, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(InputError, match=f"`FILE` '{name}'.*give files with content"):
        run(command, name, "out.jsonl")
    assert left_behind(tmp_path) == {name}


def row(query: str, document: str, score: float, instruction: str | None = None) -> Quadruple:
    return Quadruple(query=query, instruction=instruction, document=document, score=score)


class TestCheck:
    def test_errors_are_a_table_and_exit_with_1(self, run, quadruples):
        bad = [row("fish", "a fish", 1.0), row("fish", "a red fish", 0.0)]
        write_quadruples(Path("bad.jsonl"), bad)
        result = run("check", "bad.jsonl", code=1)
        for said in (
            "2 rows of 1 queries",
            "uninstructed",
            "error",
            "Add rows with an instruction",
        ):
            assert said in result.stdout
        report = CheckReport.model_validate_json(run("check", "bad.jsonl", "--json", code=1).stdout)
        assert not report.passed
        assert report.defeats_training

    def test_warnings_exit_with_1_only_where_strict(self, run, quadruples, rows):
        # Two of three queries always have the same instruction.
        lone = [row(f"fish {n}", text, n % 2, "red only") for n in range(30) for text in ("a", "b")]
        mixed = [each for each in rows if each.query_key == rows[0].query_key]
        write_quadruples(Path("lone.jsonl"), [*mixed, *lone])
        report = CheckReport.model_validate_json(run("check", "lone.jsonl", "--json").stdout)
        assert not report.passed
        assert not report.defeats_training
        run("check", "lone.jsonl", "--strict", code=1)

    def test_sound_data_pass(self, run, quadruples, rows):
        result = run("check", quadruples, "--strict")
        assert f"{len(rows):,} rows of 12 queries" in result.stdout

    def test_a_development_set_that_was_trained_on(self, run, quadruples):
        run("check", quadruples, "--dev", quadruples, "--strict", code=1)
        found = run("check", quadruples, "--dev", quadruples, "--json", code=1)
        report = json.loads(found.stdout)
        found = {each["check"]: each for each in report["findings"]}
        assert (found["split"]["severity"], found["split"]["value"]) == ("error", 1.0)

    def test_hostile_texts_cannot_act_on_the_terminal(self, run):
        evil = "[red]a\x1b[31m fish[/]"
        write_quadruples(Path("evil.jsonl"), [row("f", evil, 1.0), row("f", evil, 0.0)])
        result = run("check", "evil.jsonl", code=1)
        assert "\x1b[31m" not in result.stdout
        assert "[red]a" in result.stdout

    def test_a_line_that_is_none(self, run, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"query": "q"}\n')
        with pytest.raises(FileFormatError, match=r"bad\.jsonl:1: "):
            run("check", "bad.jsonl")


class TestSplit:
    def test_no_query_and_no_document_is_on_both_sides(self, run, quadruples, rows, tmp_path):
        options = ["--train", "train.jsonl", "--dev", "dev.jsonl.gz", "--share", 0.25]
        result = run("split", quadruples, *options, "--seed", 3)
        train, dev = read_quadruples("train.jsonl"), read_quadruples("dev.jsonl.gz")
        assert len(train) + len(dev) == len(rows)
        assert 0.125 < len(dev) / len(rows) < 0.375
        assert {each.query for each in train}.isdisjoint(each.query for each in dev)
        assert {each.document for each in train}.isdisjoint(each.document for each in dev)
        assert f"{len(dev):,} rows of" in result.stderr
        with pytest.raises(InputError, match="is there already"):
            run("split", quadruples, *options)
        first = Path("dev.jsonl.gz").read_bytes()
        run("split", quadruples, *options, "--seed", 3, "--overwrite")
        assert Path("dev.jsonl.gz").read_bytes() == first
        run("split", quadruples, *options, "--seed", 4, "--overwrite")
        assert Path("dev.jsonl.gz").read_bytes() != first

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (("a.jsonl", "a.jsonl"), "two outputs two names"),
            (("a.jsonl", "folder/../a.jsonl"), "`--dev`.* is that of `--train` too"),
            (("a.jsonl", "b.csv"), r"must end in \.jsonl.*, got 'b\.csv'\n.*`--dev`"),
            (("a.jsonl", "b/dev.jsonl"), "`--dev`.* no folder 'b'"),
        ],
    )
    def test_both_files_are_written_or_none(self, run, quadruples, tmp_path, names, problem):
        (tmp_path / "folder").mkdir()
        with pytest.raises(InputError, match=problem):
            run("split", quadruples, "--train", names[0], "--dev", names[1], "--share", 0.25)
        assert left_behind(tmp_path) == {quadruples.name, "folder"}

    def test_a_format_is_refused_with_its_option_before_anything_is_read(self, run):
        with pytest.raises(InputError, match=r"got 'a\.csv'\n.*`--train`"):
            run("split", "no-such.jsonl", "--train", "a.csv", "--dev", "b.jsonl")

    def test_a_share_that_cannot_be_had_is_explained_in_the_words_of_the_command(self, run):
        same = [row(f"fish {number}", "one document", 1.0) for number in range(4)]
        write_quadruples(Path("same.jsonl"), same)
        with pytest.raises(InputError, match="cannot be split") as caught:
            run("split", "same.jsonl", "--train", "a.jsonl", "--dev", "b.jsonl")
        assert "`--share`" in caught.value.__notes__[0]


class TestDatasheet:
    def test_the_page(self, run, quadruples, rows):
        licence = ["--licence", "scenarios=Apache-2.0"]
        run("datasheet", quadruples, "sheet.md", *licence, "--title", "Fish")
        page = Path("sheet.md").read_text()
        assert page.startswith("# Fish\n")
        assert f"| scenarios | {len(rows):,} | Apache-2.0 |" in page
        with pytest.raises(InputError, match="is there already"):
            run("datasheet", quadruples, "sheet.md")

    def test_the_development_set_and_the_name_of_the_file(self, run, quadruples):
        run("split", quadruples, "--train=t.jsonl", "--dev=d.jsonl", "--share=0.25")
        run("datasheet", "t.jsonl", "pond.md", "--dev", "d.jsonl")
        page = Path("pond.md").read_text()
        assert page.startswith("# pond\n")
        assert "|  | training | development |" in page
        assert "not stated" in page

    def test_a_licence_of_no_source(self, run, quadruples, tmp_path):
        with pytest.raises(InputError, match="`licences` names 'scenarois'"):
            run("datasheet", quadruples, "sheet.md", "--licence", "scenarois=MIT")
        with pytest.raises(InputError, match="`--licence` must be NAME=VALUE"):
            run("datasheet", quadruples, "sheet.md", "--licence", "MIT")
        assert not (tmp_path / "sheet.md").exists()


@pytest.mark.parametrize(
    "command", ["check", "from-scenarios", "from-trec", "from-triples", "split", "datasheet"]
)
def test_help_has_an_explanation_for_every_option(run, command):
    said = run(command, "--help").stdout
    options = [line for line in said.splitlines() if line.startswith("│")]
    assert len(options) >= 3
    # A row ends with words, not with the type of what is expected.
    assert not [line for line in options if line.rstrip(" │").endswith((">", "FILE", "OUT"))]
