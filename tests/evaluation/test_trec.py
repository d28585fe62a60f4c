import gzip
import json
import math

import ir_measures
import numpy as np
import pytest

from lanerank import Instruction, Reranker
from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.compare import compare, compare_runs
from lanerank.evaluation.runs import measure_run, order_documents, parse_measures
from lanerank.evaluation.systems import System
from lanerank.evaluation.trec import Topic, read_qrels, read_run, read_topics, read_trec
from lanerank.testing import OverlapScorer

QRELS = "301 0 a 2\n301 0 b 0\n302 0 c -1\n302 0 a 1\n"
RUN = "301 Q0 a 1 9.5 bm25\n301 Q0 b 2 8.5 bm25\n302 Q0 c 1 7 bm25\n302 Q0 b 2 1e-3 bm25\n"
TOPICS = [
    {"id": "301", "query": "red fish", "instruction": "Prefer blue.", "instruction_aware": True},
    {"id": "302", "query": "green fish", "cluster": "301"},
]
DOCUMENTS = [
    {"id": "a", "text": "a red fish", "metadata": {"date": "2024-01-01"}, "title": "Red"},
    {"id": "b", "text": "a blue fish"},
    {"id": "c", "text": "a green fish"},
    {"id": "unused", "text": "a grey fish"},
]


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(each) + "\n" for each in content)
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return put


class TestQrels:
    @pytest.mark.parametrize("name", ["qrels.txt", "qrels.gz"])
    def test_are_read(self, write, name):
        assert read_qrels(write(name, QRELS)) == {
            "301": {"a": 2, "b": 0},
            "302": {"c": -1, "a": 1},
        }

    def test_blank_lines_tabs_windows_line_ends_and_a_byte_order_mark(self, write):
        path = write("qrels", "\ufeff301\t0\ta\t2\r\n\r\n  301 0  b 0  ")
        assert read_qrels(str(path)) == {"301": {"a": 2, "b": 0}}

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("301 a 2", "expected `query iteration document grade`, got '301 a 2'"),
            ("301 0 a 2 more", "expected `query iteration document grade`"),
            ("query-id corpus-id score", "expected `query iteration"),
            ("301 0 a high", "expected `query .*'high'"),
            ("301 0 a 1.5", "expected `query .*'1.5'"),
            ("301 0 a 99999999999999", "grades are integers from -100 to 100"),
            ("301 0 b 1", "query '301' has document 'b' a second time"),
        ],
    )
    def test_a_line_that_is_wrong_is_named(self, write, line, problem):
        path = write("qrels", "301 0 b 0\n\n" + line)
        with pytest.raises(FileFormatError, match=problem) as error:
            read_qrels(path)
        assert str(error.value).startswith(f"{path}:3: ")
        assert error.value.line == 3


class TestRun:
    @pytest.mark.parametrize("name", ["run.txt", "run.gz"])
    def test_is_read(self, write, name):
        assert read_run(write(name, RUN)) == {
            "301": {"a": 9.5, "b": 8.5},
            "302": {"c": 7.0, "b": 0.001},
        }

    def test_order_and_ties_are_those_of_trec_eval(self, write):
        lines = [("B", 0.5), ("a", 0.5), ("10", 0.5), ("9", 0.5), ("é", 0.5), ("top", 0.9)]
        content = "".join(f"q Q0 {doc} {i} {score} t\n" for i, (doc, score) in enumerate(lines))
        run = read_run(write("run", content))
        assert order_documents(run["q"]) == ["top", "é", "a", "B", "9", "10"]
        [measure] = parse_measures(["RR"]).values()
        for document in run["q"]:
            qrels = {"q": {document: 1}}
            ours = measure_run(measure, qrels, {"q": order_documents(run["q"])})
            reference = ir_measures.calc_aggregate([measure], qrels, {"q": dict(lines)})
            assert ours["q"] == pytest.approx(reference[measure])

    def test_the_rank_column_plays_no_part(self, write):
        run = read_run(write("run", "q Q0 a 1 0.1 t\nq Q0 b 2 0.9 t\n"))
        assert list(run["q"]) == ["b", "a"]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("301 Q0 a 1 9.5", "expected `query Q0 document rank score tag`, got"),
            ("301 Q0 a 1 high t", "expected `query Q0 .*'high'"),
            ("301 Q0 a 1 nan t", "the score must be finite, got nan"),
            ("301 Q0 a 1 inf t", "the score must be finite, got inf"),
            ("301 Q0 b 7 1 t", "query '301' has document 'b' a second time"),
        ],
    )
    def test_a_line_that_is_wrong_is_named(self, write, line, problem):
        path = write("run", "301 Q0 b 1 9.5 t\n" + line)
        with pytest.raises(FileFormatError, match=problem) as error:
            read_run(path)
        assert (error.value.path, error.value.line) == (str(path), 2)

    @pytest.mark.parametrize("reader", [read_qrels, read_run, read_topics])
    def test_files_that_cannot_be_read(self, write, tmp_path, reader):
        with pytest.raises(InputError, match=r"absent' cannot be read: No such file"):
            reader(tmp_path / "absent")
        with pytest.raises(InputError, match="cannot be read"):
            reader(tmp_path)
        broken = tmp_path / "broken.gz"
        broken.write_bytes(b"not gzip")
        with pytest.raises(InputError, match=r"broken\.gz' cannot be read"):
            reader(broken)
        cut = tmp_path / "cut.gz"
        cut.write_bytes(gzip.compress(b"\n" * 1000)[:-4])
        with pytest.raises(InputError, match=r"cut\.gz' cannot be read"):
            reader(cut)
        with pytest.raises(InputError, match="has no lines"):
            reader(write("empty", "\n\n"))
        with pytest.raises(FileFormatError, match="latin:1: not UTF-8"):
            reader(write("latin", b"301 0 caf\xe9 1\n"))


class TestTopics:
    def test_from_json_lines(self, write):
        topics = read_topics(write("topics.jsonl", TOPICS))
        assert list(topics) == ["301", "302"]
        assert topics["301"].instruction == "Prefer blue."
        assert topics["301"].instruction_aware is True
        assert topics["302"] == Topic(id="302", query="green fish", cluster="301")

    def test_with_the_names_of_beir(self, write):
        rows = [{"_id": "1", "text": "red fish", "metadata": {"url": "x"}}]
        assert read_topics(write("queries.jsonl", rows)) == {"1": Topic(id="1", query="red fish")}

    @pytest.mark.parametrize("name", ["topics.tsv", "topics.tsv.gz", "topics.txt"])
    def test_from_tabbed_lines(self, write, name):
        topics = read_topics(write(name, "301\tred fish\n302\tgreen\tfish\n"))
        assert topics["301"].query == "red fish"
        assert topics["302"].query == "green\tfish"

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("t.tsv", "301 red fish", "1: expected `id<TAB>query`, got '301 red fish'"),
            ("t.tsv", "301\t ", "1: .*expected `id<TAB>query`"),
            ("t.jsonl", "301\tred fish", "1: not valid JSON"),
            ("t.jsonl", '{"id": "1"}', "1: .*`query`: Field required"),
            ("t.jsonl", '{"id": 1, "query": "x"}', "`id`: .* got 1"),
            ("t.jsonl", '{"id": "1", "query": " "}', "`query`: expected some text"),
            ("t.jsonl", '{"id": "1", "query": "x", "instrution": "y"}', "`instrution`: unknown"),
            ("t.jsonl", '{"id": "1", "query": "x", "instruction_aware": "no"}', "`instruction_aw"),
            ("t.jsonl", '{"id": "1", "query": "x"}\n{"id": "1", "query": "y"}', "2: topic '1' is"),
        ],
    )
    def test_a_line_that_is_wrong_is_named(self, write, name, content, problem):
        with pytest.raises(FileFormatError, match=problem):
            read_topics(write(name, content))


class TestReranking:
    @pytest.fixture
    def files(self, write):
        return {
            "topics": write("topics.jsonl", TOPICS),
            "documents": write("documents.jsonl.gz", DOCUMENTS),
            "run": write("run.txt", RUN),
        }

    def test_queries_have_their_candidates_in_the_order_of_the_run(self, files, write):
        first, second = read_trec(**files, qrels=write("qrels", QRELS), attributes=["title"])
        assert (first.id, first.query, first.instruction) == (
            "301",
            "red fish",
            Instruction("Prefer blue."),
        )
        assert [doc.id for doc in first.documents] == ["a", "b"]
        assert first.documents[0].metadata == {"title": "Red", "date": "2024-01-01"}
        assert first.grades == {"a": 2, "b": 0}
        assert (first.instruction_aware, second.instruction_aware) == (True, None)
        assert (first.cluster, second.cluster) == ("301", "301")
        # A judged document that is no candidate still counts in the ideal.
        assert second.grades == {"c": -1, "a": 1}
        assert first.attributes == ("title",)

    def test_what_was_read_before_will_do(self, files):
        topics, run = read_topics(files["topics"]), read_run(files["run"])
        queries = read_trec(topics=topics, documents=files["documents"], run=run)
        assert queries == read_trec(**files)
        assert queries[0].grades is None

    def test_a_run_in_memory_is_put_in_order(self, files):
        run = {"301": {"a": 1.0, "b": 2.0, "c": 3.0}}
        [query] = read_trec(topics=files["topics"], documents=files["documents"], run=run, depth=2)
        assert [doc.id for doc in query.documents] == ["c", "b"]

    @pytest.mark.parametrize("depth", [0, True, 1.5])
    def test_depth_is_checked(self, files, depth):
        with pytest.raises(InputError, match="`depth` must be an int of at least 1"):
            read_trec(**files, depth=depth)

    def test_missing_documents_are_no_silent_gap(self, files, write):
        files["documents"] = write("few.jsonl", DOCUMENTS[:1])
        with pytest.raises(InputError, match=r"few\.jsonl' lacks 2 of the 3 documents .* 'b'"):
            read_trec(**files)

    def test_missing_topics_are_no_silent_gap(self, files, write):
        files["topics"] = write("few.jsonl", TOPICS[1:])
        with pytest.raises(InputError, match=r"`topics` lacks 1 of the 2 queries .* '301'"):
            read_trec(**files)

    def test_beir_names_its_documents_otherwise(self, files, write):
        rows = [{"_id": row["id"], "title": "T", "text": row["text"]} for row in DOCUMENTS]
        files["documents"] = write("corpus.jsonl", rows)
        assert read_trec(**files)[0].documents[1].metadata == {"title": "T"}

    @pytest.mark.parametrize(
        ("rows", "problem"),
        [
            ([*DOCUMENTS, {"id": "d"}], ":5: a document needs an `id` and a `text`"),
            ([{"id": 7, "text": "x"}], ":1: a document needs an `id`.* got 7 and 'x'"),
            ([*DOCUMENTS, DOCUMENTS[0]], ":5: document 'a' is there a second time"),
            ([{"id": "a", "text": "x", "metadata": "y"}], ":1: `metadata` must be an object"),
            ("[]", ":1: expected a JSON object"),
        ],
    )
    def test_a_document_that_is_wrong_is_named(self, files, write, rows, problem):
        files["documents"] = write("wrong.jsonl", rows)
        with pytest.raises(FileFormatError, match=problem):
            read_trec(**files)

    def test_ranked_anew_with_and_without_instruction(self, files, write):
        model = Reranker(OverlapScorer())
        queries = read_trec(**files, qrels=write("qrels", QRELS))
        comparison = compare(
            System(model, None), System(model, "Prefer blue."), queries, measures=["RR"]
        )
        values = {each.id: each.values["RR"] for each in comparison.per_query}
        # "blue" comes before "red" under the instruction; the relevant document of 302 is no
        # candidate.
        assert values == {"301": (1.0, 0.5), "302": (0.0, 0.0)}
        assert comparison.instruction_aware.queries == 1
        assert comparison.pooled.clusters == 1


class TestFinishedRuns:
    def test_means_are_those_of_ir_measures_on_the_files(self, write):
        rng = np.random.default_rng(4)
        grades = "".join(
            f"q{i} 0 d{j} {rng.integers(0, 3)}\n" for i in range(12) for j in range(0, 20, 2)
        )
        grades += "".join(f"q{i} 0 sure {1}\n" for i in range(12))
        # Scores with one digit, so that many are tied. The measures are those that trec_eval
        # computes: other providers of ir-measures break ties in other ways.
        runs = [
            "".join(
                f"q{i} Q0 d{j} 0 {rng.random():.1f} t\n"
                for i in range(12)
                for j in rng.permutation(20)[:15]
            )
            for _ in range(2)
        ]
        qrels = write("qrels", grades)
        paths = [write(f"run{i}.gz", content) for i, content in enumerate(runs)]
        names = ["nDCG@10", "AP", "RR", "P@5", "R@10"]
        comparison = compare_runs(
            read_run(paths[0]), read_run(paths[1]), read_qrels(qrels), measures=names
        )
        for path, side in zip(paths, ("a", "b"), strict=True):
            reference = ir_measures.calc_aggregate(
                [ir_measures.parse_measure(name) for name in names],
                list(ir_measures.read_trec_qrels(str(qrels))),
                list(ir_measures.read_trec_run(str(path))),
            )
            for measure, value in reference.items():
                ours = getattr(comparison.pooled.measures[str(measure)], side)
                assert ours.value == pytest.approx(value), measure

    def test_unjudged_documents_are_not_relevant_and_counted(self, write):
        run = read_run(write("run", "1 Q0 new 1 2 t\n1 Q0 old 2 1 t\n"))
        comparison = compare_runs(run, run, read_qrels(write("qrels", "1 0 old 1\n")))
        [measure] = comparison.pooled.measures.values()
        assert measure.a.value == pytest.approx(1 / math.log2(3))
        assert comparison.a.judged == comparison.b.judged == 0.5
