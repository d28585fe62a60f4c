"""Bulk ranking: what comes out is what `Reranker.rank` gives, and no row is lost on the way.

Most runs here are in this process; those on workers share one small Ray cluster.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remote_servers import RerankServer, fail
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lanerank import (
    BulkError,
    InputError,
    Instruction,
    InstructionNotSupportedError,
    MissingExtraError,
    RemoteError,
    Reranker,
    ScorerError,
    use_instruction,
)
from lanerank.cli import app
from lanerank.contracts import RerankRequest, Scores
from lanerank.distributed import rank_dataset
from lanerank.distributed.cluster import _check_room
from lanerank.distributed.plan import digest
from lanerank.testing import OverlapScorer, ScriptedScorer

# Ray sets attributes of its own that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")

FISH = ["a red fish", "a blue fish", "a stone"]
EXACT = {"concurrency": 0, "dtype": "float32"}


def overlap() -> Reranker:
    return Reranker(OverlapScorer())


def write(path: Path, rows: list[dict], **options: int) -> Path:
    """Rows as a file, in the format of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(folder: Path) -> list[dict]:
    """The output, as anybody would read it."""
    parts = sorted(folder.glob("part-*"))
    if parts[0].suffix == ".parquet":
        return pq.read_table(folder).to_pylist()
    return [json.loads(line) for part in parts for line in part.read_bytes().split(b"\n")[:-1]]


def bad_rows(folder: Path) -> list[dict]:
    parts = sorted((folder / "_bad_rows").iterdir())
    return [json.loads(line) for part in parts for line in part.read_bytes().split(b"\n")[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a run is for, byte by byte."""
    parts = [*folder.glob("part-*"), *folder.glob("_bad_rows/*")]
    return {str(part.relative_to(folder)): part.read_bytes() for part in parts}


@pytest.fixture(params=[".parquet", ".jsonl"])
def suffix(request) -> str:
    return request.param


@pytest.fixture
def lists(tmp_path, suffix) -> Path:
    """Ten rows of lists."""
    rows = [
        {"query": f"fish {n}", "documents": [*FISH, f"document {n}"], "n": n} for n in range(10)
    ]
    return write(tmp_path / f"in{suffix}", rows)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


# The output is what the reranker gives


def test_lists_are_ranked_as_by_rank(tmp_path, out, suffix, tiny_model_folder) -> None:
    rows = [
        {
            "query": ["red", "marine engineer", "coach"][n % 3],
            "documents": [
                {
                    "id": f"{n}-{i}",
                    "text": text + " fish" * (200 * (n % 2)),
                    "metadata": {"date": f"2025-0{i + 1}-01"},
                }
                for i, text in enumerate([*FISH, "a coach", ""])
            ],
            "rule": [None, "prefer marine", "", "only red fish"][n % 4],
        }
        for n in range(12)
    ]
    options = {"attributes": ["date"], "top_k": 4}
    report = rank_dataset(
        write(tmp_path / f"in{suffix}", rows),
        out,
        model=tiny_model_folder,
        instruction_column="rule",
        rows_per_shard=5,
        batch_size=4,
        **options,
        **EXACT,
    )
    reranker = Reranker.from_pretrained(tiny_model_folder, dtype="float32")
    found = read(out)
    for row, got in zip(rows, found, strict=True):
        ranking = reranker.rank(row["query"], row["documents"], instruction=row["rule"], **options)
        assert {name: got[name] for name in row} == row
        assert [(r["index"], r["id"]) for r in got["ranking"]] == [
            (r.index, r.document.id) for r in ranking
        ]
        assert [r["score"] for r in got["ranking"]] == pytest.approx(
            [r.score for r in ranking], abs=1e-5
        )
        assert [r["truncated"] for r in got["ranking"]] == [r.truncated for r in ranking]
        assert got["model"] == ranking.model == "tiny"
        assert got["instruction_fingerprint"] == ranking.instruction_fingerprint
        assert got["instruction_applied"] == ranking.instruction_applied
    assert (report.rows, report.ranked_rows, report.bad_rows) == (12, 12, 0)
    assert (report.documents, report.shards, report.resumed_shards) == (60, 3, 0)
    assert report.truncated == sum(r["truncated"] for row in found for r in row["ranking"]) > 0


def test_pairs_are_scored_as_by_score(tmp_path, out, suffix, tiny_model_folder) -> None:
    rows = [
        {
            "query": ["red", "coach", "marine"][n % 3],
            "document": f"{FISH[n % 2]} {n}",
            "instruction": [None, "prefer marine"][n % 4 // 2],
            "date": f"2025-01-{n + 1:02}",
        }
        for n in range(20)
    ]
    rank_dataset(
        write(tmp_path / f"in{suffix}", rows),
        out,
        form="pairs",
        model=tiny_model_folder,
        instruction_column="instruction",
        attributes=["date"],
        rows_per_shard=9,
        batch_size=7,
        **EXACT,
    )
    reranker = Reranker.from_pretrained(tiny_model_folder, dtype="float32")
    for row, got in zip(rows, read(out), strict=True):
        document = {"text": row["document"], "date": row["date"]}
        [score] = reranker.score(
            row["query"], [document], instruction=row["instruction"], attributes=["date"]
        )
        assert {name: got[name] for name in row} == row
        assert got["score"] == pytest.approx(score, abs=1e-5)
        assert got["truncated"] is False
        expected = Instruction(row["instruction"]).fingerprint if row["instruction"] else None
        assert got["instruction_fingerprint"] == expected


@pytest.mark.parametrize("row_group", [1, 3, 100])
@pytest.mark.parametrize(("shard", "batch"), [(1, 1), (4, 3), (7, 2), (100, 100)])
def test_every_cut_gives_the_same_rows(tmp_path, out, row_group, shard, batch) -> None:
    rows = [{"query": "fish", "document": FISH[n % 3], "n": n} for n in range(17)]
    source = write(tmp_path / "in.parquet", rows, row_group_size=row_group)
    report = rank_dataset(
        source,
        out,
        form="pairs",
        model=overlap,
        rows_per_shard=shard,
        batch_size=batch,
        concurrency=0,
    )
    assert report.shards == math.ceil(17 / shard)
    assert [(row["n"], row["score"]) for row in read(out)] == [
        (n, float("fish" in FISH[n % 3])) for n in range(17)
    ]


def test_pairs_of_a_query_are_one_request_in_any_order(tmp_path, out) -> None:
    scorer = ScriptedScorer(dict.fromkeys("abcd", 0.5))
    rows = [{"query": f"q{n % 2}", "document": "abcd"[n]} for n in range(4)]
    rank_dataset(
        write(tmp_path / "in.jsonl", rows),
        out,
        form="pairs",
        model=lambda: Reranker(scorer),
        concurrency=0,
    )
    assert [(r.query, [c.text for c in r.candidates]) for r in scorer.requests] == [
        ("q0", ["a", "c"]),
        ("q1", ["b", "d"]),
    ]


def test_other_columns_keep_values_and_types(tmp_path, out) -> None:
    table = pa.table(
        {
            "day": pa.array([datetime(2026, 1, 1), None], pa.timestamp("ms", tz="UTC")),
            "query": pa.array(["fish", "fish"]).dictionary_encode(),
            "deep": pa.array([{"a": [{"b": b"\xff"}]}, None]),
            "documents": pa.array([["a fish"], []], pa.large_list(pa.large_string())),
            "map": pa.array([[("k", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int8())),
            "dotted.name": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    rank_dataset(tmp_path / "in.parquet", out, model=overlap, concurrency=0, rows_per_shard=1)
    found = pq.read_table(out)
    assert found.select(table.column_names).equals(table)
    assert found.column_names[len(table.column_names) :] == [
        "ranking",
        "model",
        "instruction_fingerprint",
        "instruction_applied",
    ]


def test_columns_can_be_left_out_and_new_ones_renamed(lists, out) -> None:
    options = {"model": overlap, "keep_columns": ["n"], "prefix": "rerank_", "concurrency": 0}
    rank_dataset(lists, out, **options)
    assert list(read(out)[0]) == [
        "n",
        "rerank_ranking",
        "rerank_model",
        "rerank_instruction_fingerprint",
        "rerank_instruction_applied",
    ]


def test_nothing_in_nothing_out(tmp_path, out, suffix) -> None:
    source = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        schema = pa.schema([("query", pa.string()), ("documents", pa.list_(pa.string()))])
        pq.write_table(schema.empty_table(), source)
    else:
        source.write_bytes(b"")
    report = rank_dataset(source, out, model=overlap, concurrency=0)
    assert (report.rows, report.ranked_rows, report.bad_rows, report.documents) == (0, 0, 0, 0)
    assert read(out) == []


def test_a_row_without_documents_has_an_empty_ranking(tmp_path, out, suffix) -> None:
    rows = [{"query": "a", "documents": []}, {"query": "b", "documents": ["b"]}]
    source = write(tmp_path / f"in{suffix}", rows)
    rank_dataset(source, out, model=overlap, concurrency=0)
    assert [len(row["ranking"]) for row in read(out)] == [0, 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_text_survives(data, tmp_path_factory, troublesome_text) -> None:
    folder = tmp_path_factory.mktemp("any")
    texts = data.draw(st.lists(troublesome_text, min_size=1, max_size=6))
    rows = [{"query": text, "document": f"x {text}", "n": n} for n, text in enumerate(texts)]
    options = {"form": "pairs", "model": overlap, "rows_per_shard": 2, "concurrency": 0}
    report = rank_dataset(write(folder / "in.jsonl", rows), folder / "out", **options)
    kept = {row["n"]: row for row in read(folder / "out")}
    blank = {n for n, text in enumerate(texts) if not text.strip()}
    assert {bad["row"] - 1 for bad in bad_rows(folder / "out")} == blank
    assert kept.keys() == set(range(len(texts))) - blank
    # Two halves of a character become one in JSON.
    given = [json.loads(json.dumps(row)) for row in rows]
    assert all(given[n].items() <= row.items() for n, row in kept.items())
    assert report.rows == report.ranked_rows + report.bad_rows == len(texts)


def test_pandas_reads_the_folder(tmp_path, out) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"query": ["fish"] * 5, "document": [*FISH, "", "x"]}, index=list("abcde")
    )
    frame.to_parquet(tmp_path / "in.parquet")
    options = {"form": "pairs", "model": overlap, "rows_per_shard": 2, "concurrency": 0}
    rank_dataset(tmp_path / "in.parquet", out, **options)
    assert pandas.read_parquet(out)["score"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


# Instructions


def test_the_instruction_of_a_row_comes_below_that_of_the_run(tmp_path, out, suffix) -> None:
    operator = Instruction(rules="Prefer blue.")
    rows = [{"query": "fish", "documents": FISH, "i": i} for i in (None, "Prefer stone.", "  ")]
    rank_dataset(
        write(tmp_path / f"in{suffix}", rows),
        out,
        model=overlap,
        instruction=operator,
        instruction_column="i",
        concurrency=0,
    )
    found = read(out)
    both = operator + "Prefer stone."
    assert [row["instruction_fingerprint"] for row in found] == [
        operator.fingerprint,
        both.fingerprint,
        operator.fingerprint,
    ]
    expected = [r.score for r in overlap().rank("fish", FISH, instruction=both)]
    assert [r["score"] for r in found[1]["ranking"]] == expected


def test_an_enclosing_instruction_applies(lists, out) -> None:
    with use_instruction("Prefer blue."):
        rank_dataset(lists, out, model=overlap, concurrency=0)
    assert {row["ranking"][0]["index"] for row in read(out)} == {1}
    with use_instruction("Prefer red."), pytest.raises(BulkError, match="`instruction` was"):
        rank_dataset(lists, out, model=overlap, concurrency=0)


@pytest.mark.parametrize("form", ["lists", "pairs"])
def test_the_output_says_which_instructions_the_model_left_out(tmp_path, out, suffix, form) -> None:
    applied = {"Answer politely.": "neutral", "The user is vegan.": "lane", None: None}
    text = {"documents": FISH} if form == "lists" else {"document": FISH[0]}
    # Two of each, so that some are scored together.
    rows = [{"query": "lunch ideas", "i": each, **text} for each in applied] * 2
    source = write(tmp_path / f"in{suffix}", rows)
    rank_dataset(source, out, form=form, instruction_column="i", **EXACT)
    assert [row["instruction_applied"] for row in read(out)] == [*applied.values()] * 2


def test_an_instruction_that_the_model_cannot_read_ends_the_run(lists, out) -> None:
    def deaf(choice="raise") -> Reranker:
        return Reranker(OverlapScorer(supports_instructions=False), on_unsupported=choice)

    with pytest.raises(InstructionNotSupportedError, match="no channel"):
        rank_dataset(lists, out, model=deaf, instruction="Prefer blue.", concurrency=0)
    rank_dataset(
        lists,
        out,
        model=lambda: deaf("ignore"),
        instruction="Prefer blue.",
        resume=False,
        concurrency=0,
    )
    assert {row["instruction_applied"] for row in read(out)} == {"ignored"}


def test_ages_count_from_one_day(lists, out) -> None:
    recent = Instruction(recency="Prefer the last year.")
    with pytest.raises(InputError, match=r"`instruction` has a recency part and no `today`"):
        rank_dataset(lists, out, model=overlap, instruction=recent, concurrency=0)
    dated = recent + Instruction(today=date(2026, 1, 1))
    rank_dataset(lists, out, model=overlap, instruction=dated, concurrency=0)
    assert {row["instruction_fingerprint"] for row in read(out)} == {dated.fingerprint}


# Bad rows

GOOD = {"query": "fish", "documents": ["a fish"], "id": "good"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": None}, "`query` must be a str that is not blank, got None"),
        ({"query": " "}, "`query`"),
        ({"query": 7}, "`query`"),
        ({"documents": None}, "`documents` must be a list"),
        ({"documents": "a fish"}, "`documents` must be a list"),
        ({"documents": {"text": "a"}}, "`documents` must be a list"),
        ({"documents": ["a", None]}, r"`documents\[1\]`"),
        ({"documents": ["a", 7]}, r"`documents\[1\]`"),
        ({"documents": [{"text": None}]}, r"`documents\[0\]` has no 'text'"),
        ({"documents": [{"text": "a", "metadata": 3}]}, "metadata"),
        ({"instruction": 7}, "instruction"),
        ({"instruction": "x" * 30_000}, "30000 characters"),
        ({"ranking": 1}, "has 'ranking', which is the name"),
    ],
)
def test_a_bad_object_goes_to_the_side_file(tmp_path, out, change, reason) -> None:
    good = {**GOOD, "instruction": None}
    source = write(tmp_path / "in.jsonl", [good, {**good, "id": 7, **change}, good])
    options = {"instruction_column": "instruction", "id_column": "id", "concurrency": 0}
    if "ranking" in change:
        # Beyond what is looked at before the run.
        source.write_text(f"{json.dumps(good)}\n" * 1000 + source.read_text())
    report = rank_dataset(source, out, model=overlap, rows_per_shard=500, **options)
    [bad] = bad_rows(out)
    assert (bad["file"], bad["id"]) == ("in.jsonl", 7)
    assert bad["row"] == report.rows - 1
    assert re.search(reason, bad["reason"])
    assert {row["id"] for row in read(out)} == {"good"}
    assert (report.ranked_rows, report.bad_rows) == (report.rows - 1, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"query": NaN, "documents": []}', "NaN is not JSON"),
        (b'{"query": "a", "documents": [], "x": 1e999}', "not JSON"),
        (b'{"query": "a\xff", "documents": []}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"documents": []}', "no 'query'; a row without a value has to say null"),
        (b'{"query": "a"}', "no 'documents'"),
    ],
)
def test_a_bad_line_goes_to_the_side_file(tmp_path, out, line, reason) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, b"", b"  ", line, b"", good]))
    report = rank_dataset(tmp_path / "in.jsonl", out, model=overlap, concurrency=0)
    [bad] = bad_rows(out)
    assert bad["row"] == 4
    assert reason in bad["reason"]
    assert (report.rows, report.ranked_rows) == (3, 2)


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path, out) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert rank_dataset(tmp_path / "in.jsonl", out, model=overlap, concurrency=0).bad_rows == 0


def test_bad_cells_of_parquet_go_to_the_side_file(tmp_path, out) -> None:
    spoilt = pa.array([b"fish", b"fi\xffsh", b"fish", None, b"fish"]).view(pa.string())
    twice = pa.map_(pa.string(), pa.string())
    documents = pa.array(
        [
            [{"text": "a fish", "metadata": [("date", "2025-01-01")]}],
            [{"text": "a fish", "metadata": []}],
            [{"text": "a fish", "metadata": [("date", "x"), ("date", "y")]}],
            [{"text": "a fish", "metadata": []}],
            None,
        ],
        pa.list_(pa.struct([("text", pa.string()), ("metadata", twice)])),
    )
    numbers = pa.array([1.5, math.nan, 3, 4, 5])
    table = pa.table({"query": spoilt, "documents": documents, "n": numbers})
    pq.write_table(table, tmp_path / "in.parquet")
    report = rank_dataset(
        tmp_path / "in.parquet",
        out,
        model=overlap,
        keep_columns=["n"],
        id_column="n",
        attributes=["date"],
        concurrency=0,
    )
    assert [row["n"] for row in read(out)] == [1.5]
    assert [(bad["row"], bad["id"]) for bad in bad_rows(out)] == [
        (2, "nan"),
        (3, "3.0"),
        (4, "4.0"),
        (5, "5.0"),
    ]
    reasons = [bad["reason"] for bad in bad_rows(out)]
    assert "'query': not UTF-8" in reasons[0]
    assert "'documents': " in reasons[1]
    assert "duplicate" in reasons[1]
    assert (report.rows, report.bad_rows) == (5, 4)


@pytest.mark.parametrize("use", [{"attributes": ["date"]}, {"id_column": "date"}])
@pytest.mark.parametrize(
    ("kind", "far"),
    [(pa.timestamp("us"), 2**62), (pa.timestamp("ms"), 2**50), (pa.date32(), 2**30)],
)
def test_a_date_beyond_those_of_python_is_bad_alone(tmp_path, out, kind, far, use) -> None:
    dates = pa.array([0, far, 1], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    table = pa.table({"query": ["fish"] * 3, "document": FISH, "date": dates})
    pq.write_table(table, tmp_path / "in.parquet")
    options = {"form": "pairs", "keep_columns": [], "concurrency": 0, **use}
    rank_dataset(tmp_path / "in.parquet", out, model=overlap, **options)
    [bad] = bad_rows(out)
    assert bad["row"] == 2
    assert bad["reason"].startswith("column 'date': ")
    assert len(read(out)) == 2


@pytest.mark.parametrize(
    "change", [{"query": None}, {"query": " "}, {"document": None}, {"instruction": "x" * 30_000}]
)
def test_a_bad_pair_spoils_no_other(tmp_path, out, suffix, change) -> None:
    pair = {"query": "fish", "document": "a fish", "instruction": None}
    source = write(tmp_path / f"in{suffix}", [pair, {**pair, **change}, pair])
    options = {"form": "pairs", "instruction_column": "instruction", "concurrency": 0}
    report = rank_dataset(source, out, model=overlap, **options)
    assert [row["score"] for row in read(out)] == [1.0, 1.0]
    assert [bad["row"] for bad in bad_rows(out)] == [2]
    assert report.documents == 2


def test_text_longer_than_a_trusted_lane_is_bad_alone(tmp_path, out, tiny_model_folder) -> None:
    row = {"query": "red", "documents": FISH, "instruction": "prefer marine"}
    rows = [row, {**row, "instruction": "fish " * 300}, {**row, "query": "fish " * 300}, row]
    rank_dataset(
        write(tmp_path / "in.parquet", rows),
        out,
        model=tiny_model_folder,
        instruction_column="instruction",
        **EXACT,
    )
    assert [bad["row"] for bad in bad_rows(out)] == [2, 3]
    assert "`instruction` is longer than" in bad_rows(out)[0]["reason"]
    assert "`query` is longer than" in bad_rows(out)[1]["reason"]
    assert len(read(out)) == 2


def test_a_shard_of_bad_rows_alone_has_an_empty_part(tmp_path, out, suffix) -> None:
    rows = [{**GOOD, "query": " "}, {**GOOD, "query": " "}, GOOD]
    source = write(tmp_path / f"in{suffix}", rows)
    report = rank_dataset(source, out, model=overlap, **SMALL)
    assert (report.ranked_rows, report.bad_rows) == (1, 2)
    assert len(list(out.glob("part-*"))) == 2
    assert [row["id"] for row in read(out)] == ["good"]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column_is_read(tmp_path, out, kind) -> None:
    texts = pa.array(["fish", None, "fish"]).cast(kind)
    pq.write_table(pa.table({"query": texts, "document": texts}), tmp_path / "in.parquet")
    rank_dataset(tmp_path / "in.parquet", out, form="pairs", model=overlap, concurrency=0)
    assert [row["score"] for row in read(out)] == [1.0, 1.0]


@pytest.mark.parametrize(("form", "bad"), [("pairs", [2, 4]), ("lists", [2])])
def test_scores_that_are_not_finite_make_a_row_bad(tmp_path, out, suffix, form, bad) -> None:
    scores = {"a": 0.5, "b": math.nan, "c": 0.25, "d": math.inf}
    pairs = [{"query": "q", "document": text} for text in "abcd"]
    lists = [{"query": "q", "documents": list(text)} for text in ("ac", "abc", "c")]
    rank_dataset(
        write(tmp_path / f"in{suffix}", pairs if form == "pairs" else lists),
        out,
        form=form,
        model=lambda: Reranker(ScriptedScorer(scores)),
        concurrency=0,
    )
    assert [row["row"] for row in bad_rows(out)] == bad
    assert all("no finite score" in row["reason"] for row in bad_rows(out))
    assert len(read(out)) == 2


def test_the_first_bad_row_can_end_the_run(tmp_path, out, suffix) -> None:
    rows = [GOOD, {**GOOD, "query": None}]
    source = write(tmp_path / f"in{suffix}", rows)
    with pytest.raises(BulkError, match=f"row 2 of 'in{suffix}': `query` must be a str"):
        rank_dataset(source, out, model=overlap, on_bad_row="raise", concurrency=0)


# Models that fail


def test_a_model_that_breaks_its_contract_ends_the_run(lists, out) -> None:
    @dataclass(frozen=True)
    class Short(OverlapScorer):
        def score(self, request: RerankRequest) -> Scores:
            return Scores((0.5,))

    with pytest.raises(ScorerError, match="gave 1 scores"):
        rank_dataset(lists, out, model=lambda: Reranker(Short()), concurrency=0)
    assert not list(out.glob("part-*"))


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_an_error_derived_from_lanerank_s_keeps_its_name_and_its_kind(lists, out) -> None:
    class QuotaError(ScorerError):
        pass

    @dataclass(frozen=True)
    class Spent(OverlapScorer):
        def score(self, request: RerankRequest) -> Scores:
            raise QuotaError("used up")

    with pytest.raises(ScorerError, match="QuotaError: used up"):
        rank_dataset(lists, out, model=lambda: Reranker(Spent()), concurrency=0)


def test_an_error_that_is_not_lanerank_s_is_not_swallowed(lists, out) -> None:
    @dataclass(frozen=True)
    class Broken(OverlapScorer):
        def score(self, request: RerankRequest) -> Scores:
            raise ZeroDivisionError("no memory")

    with pytest.raises(ZeroDivisionError, match="no memory"):
        rank_dataset(lists, out, model=lambda: Reranker(Broken()), concurrency=0)


class Maker:
    def __call__(self) -> Reranker:
        return overlap()


@pytest.mark.parametrize(
    "model",
    [
        7,
        Reranker(OverlapScorer()),
        OverlapScorer(),
        Maker(),
        partial(Maker()),
        partial(print, [Maker()]),
    ],
)
def test_a_model_that_workers_cannot_load_is_refused(lists, out, model) -> None:
    with pytest.raises(InputError, match="`model` must be"):
        rank_dataset(lists, out, model=model, concurrency=0)


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_arguments_of_the_function_tell_a_run_from_another(lists, out) -> None:
    def made(name: str, key: str = "") -> Reranker:
        return Reranker(OverlapScorer(name=name))

    rank_dataset(lists, out, model=partial(made, "a", key="secret"), **SMALL)
    manifest = (out / "_manifest.json").read_text()
    assert "secret" not in manifest
    assert " at 0x" not in manifest
    assert (
        rank_dataset(lists, out, model=partial(made, "a", key="secret"), **SMALL).resumed_shards
        == 5
    )
    for other in (partial(made, "b", key="secret"), partial(made, "a"), partial(overlap)):
        with pytest.raises(BulkError, match="holds a run that differs: `model"):
            rank_dataset(lists, out, model=other, **SMALL)


def test_a_function_that_makes_no_reranker_is_refused(lists, out) -> None:
    with pytest.raises(InputError, match="`model` must make a `Reranker`"):
        rank_dataset(lists, out, model=OverlapScorer, concurrency=0)


def test_shards_of_two_models_are_found_out(lists, out) -> None:
    names = iter("ab")

    def one() -> Reranker:
        return Reranker(OverlapScorer(name=next(names)))

    with pytest.raises(Stop):
        rank_dataset(lists, out, model=one, progress=stop_after(2), **SMALL)
    with pytest.raises(BulkError, match="several models, a, b"):
        rank_dataset(lists, out, model=one, **SMALL)


def test_a_server_can_be_the_model(lists, out) -> None:
    with RerankServer("lanerank") as server:
        rank_dataset(lists, out, model=server.url, instruction="prefer blue", concurrency=0)
    assert {row["ranking"][0]["index"] for row in read(out)} == {1}


@pytest.mark.parametrize("suffix", [".parquet"])
def test_a_row_that_a_server_refuses_is_bad_and_a_server_that_is_gone_is_not(lists, out) -> None:
    with RerankServer("lanerank") as server:
        # The probe asks twice, and then each row does.
        server.script = [lambda handler, answer: handler.send(200, answer)] * 6 + [fail(422)]
        report = rank_dataset(lists, out, model=server.url, **SMALL)
        assert report.bad_rows == 1
    with pytest.raises(RemoteError):
        rank_dataset(lists, out, model=server.url, resume=False, **SMALL)


@pytest.mark.parametrize("huge", [False, True])
def test_pairs_that_are_too_many_for_a_server_are_sent_in_parts(tmp_path, out, huge) -> None:
    @dataclass(frozen=True)
    class Limited(OverlapScorer):
        def score(self, request: RerankRequest) -> Scores:
            texts = [candidate.text for candidate in request.candidates]
            if len(texts) > 4 or "huge" in texts:
                raise RemoteError("too large", status=413)
            return super().score(request)

    rows = [{"query": "fish", "document": f"fish {n}", "n": n} for n in range(9)]
    if huge:
        rows[5]["document"] = "huge"
    source = write(tmp_path / "in.jsonl", rows)
    rank_dataset(source, out, form="pairs", model=lambda: Reranker(Limited()), concurrency=0)
    assert [row["n"] for row in read(out)] == [n for n in range(9) if not (huge and n == 5)]
    assert [(bad["row"], bad["reason"]) for bad in bad_rows(out)] == [(6, "too large")] * huge


# Interruption

SMALL = {"rows_per_shard": 2, "concurrency": 0}


class Stop(Exception):
    """Raised where a run is to be interrupted."""


def stop_after(rows: int):
    def progress(done: int, total: int) -> None:
        if done >= rows:
            raise Stop

    return progress


def test_an_interrupted_run_goes_on_where_it_stopped(lists, out, tmp_path) -> None:
    undisturbed = rank_dataset(lists, tmp_path / "undisturbed", model=overlap, **SMALL)
    with pytest.raises(Stop):
        rank_dataset(lists, out, model=overlap, progress=stop_after(4), **SMALL)
    assert len(list(out.glob("part-*"))) == 2
    seen = []
    report = rank_dataset(lists, out, model=overlap, progress=lambda *n: seen.append(n), **SMALL)
    assert seen == [(6, 10), (8, 10), (10, 10)]
    assert report.resumed_shards == 2
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert report.model_copy(update={"seconds": 0, "resumed_shards": 0}) == undisturbed.model_copy(
        update={"seconds": 0}
    )


def test_a_finished_run_has_nothing_left_to_do(lists, out) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    before = contents(out)
    report = rank_dataset(lists, out, model=overlap, **SMALL)
    assert report.resumed_shards == report.shards == 5
    assert contents(out) == before


def test_how_rows_are_shared_out_may_change(lists, out) -> None:
    with pytest.raises(Stop):
        rank_dataset(lists, out, model=overlap, progress=stop_after(2), batch_size=1, **SMALL)
    assert rank_dataset(lists, out, model=overlap, batch_size=2, **SMALL).resumed_shards == 1


@pytest.mark.parametrize("damage", ["delete", "cut", "no record", "half a record"])
def test_what_is_damaged_is_done_again(lists, out, damage) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    before = contents(out)
    [part, *_] = sorted(out.glob("part-*"))
    record = out / "_shards" / "000000.json"
    if damage == "delete":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:20])
    assert rank_dataset(lists, out, model=overlap, **SMALL).resumed_shards == 4
    assert contents(out) == before


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_a_row_that_turns_out_well_leaves_the_side_file(lists, out) -> None:
    scores = {text: math.nan for text in (*FISH, *(f"document {n}" for n in range(10)))}
    options = {"model": lambda: Reranker(ScriptedScorer(scores)), "concurrency": 0}
    assert rank_dataset(lists, out, **options).bad_rows == 10
    (out / "part-000000.jsonl").unlink()
    scores.update(dict.fromkeys(scores, 0.5))
    report = rank_dataset(lists, out, **options)
    assert (report.ranked_rows, report.bad_rows) == (10, 0)
    assert bad_rows(out) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k": 1}, "`top_k` was None, now 1"),
        ({"model": "lanerank-mini"}, "`model` was 'tiny', now 'lanerank-mini'"),
        ({"instruction": "x"}, "`instruction` was '', now 'x'"),
        ({"query_column": "other"}, "`query_column` was 'query', now 'other'"),
        ({"attributes": ["date"]}, "`attributes` was (), now ('date',)"),
        ({"dtype": "bfloat16"}, "`dtype` was 'float32', now 'bfloat16'"),
        ({"prefix": "x_"}, "`prefix` was '', now 'x_'"),
        ({"rows_per_shard": 3}, "`rows_per_shard` was 2, now 3"),
        ({"form": "pairs"}, "`form` was 'lists', now 'pairs'"),
        ({"long_documents": "max_window"}, "`long_documents` was 'truncate'"),
    ],
)
def test_other_settings_are_refused(lists, out, tiny_model_folder, change, said) -> None:
    options = {"model": tiny_model_folder, "dtype": "float32", **SMALL}
    rank_dataset(lists, out, **options)
    before = contents(out)
    with pytest.raises(BulkError, match="`--restart`") as caught:
        rank_dataset(lists, out, **{**options, **change})
    assert said in str(caught.value)
    assert contents(out) == before


def test_a_model_with_other_middle_layers_is_another(tmp_path) -> None:
    weights = tmp_path / "model.safetensors"
    content = bytearray(bytes(range(256)) * 32_000)
    weights.write_bytes(content)
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    quarter = len(content) // 4
    content[quarter : 2 * quarter] = bytes(quarter)
    weights.write_bytes(content)
    assert digest(tmp_path) != before


def test_another_model_in_the_same_folder_is_refused(lists, out, tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    options = {"model": folder, "dtype": "float32", **SMALL}
    rank_dataset(lists, out, **options)
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors")
    with pytest.raises(BulkError, match="`model_digest` was"):
        rank_dataset(lists, out, **options)


def test_another_input_is_refused(tmp_path, out, suffix) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        write(source / f"{name}{suffix}", [GOOD])
    rank_dataset(source, out, model=overlap, concurrency=0)
    (source / f"a{suffix}").unlink()
    write(source / f"b{suffix}", [GOOD, GOOD])
    write(source / f"d{suffix}", [GOOD])
    with pytest.raises(BulkError) as caught:
        rank_dataset(source, out, model=overlap, concurrency=0)
    for name, what in (("a", "is gone"), ("b", "has changed"), ("d", "is new")):
        assert f"the input file '{name}{suffix}' {what}" in str(caught.value)
    report = rank_dataset(source, out, model=overlap, resume=False, concurrency=0)
    assert report.rows == 4


def test_moving_input_and_output_together_is_no_difference(lists, tmp_path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.move(lists, folder / lists.name)
    rank_dataset(folder / lists.name, folder / "out", model=overlap, **SMALL)
    folder.rename(tmp_path / "two")
    moved = tmp_path / "two"
    report = rank_dataset(moved / lists.name, moved / "out", model=overlap, **SMALL)
    assert report.resumed_shards == 5


def test_input_that_changes_under_way_ends_the_run(lists, out) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(lists, ns=(0, 0))

    with pytest.raises(BulkError, match="has changed since the run began"):
        rank_dataset(lists, out, model=overlap, progress=touch, **SMALL)


def test_starting_afresh_deletes_what_a_run_wrote_and_nothing_else(lists, out) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    (out / "_notes.txt").write_text("mine")
    rank_dataset(lists, out, model=overlap, top_k=1, resume=False, rows_per_shard=5, concurrency=0)
    assert (out / "_notes.txt").read_text() == "mine"
    assert len(list(out.glob("part-*"))) == 2
    assert {len(row["ranking"]) for row in read(out)} == {1}


def test_starting_afresh_with_a_mistake_deletes_nothing(lists, out) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    before = contents(out)
    with pytest.raises(InputError, match="`query_column` names 'qurey'"):
        rank_dataset(lists, out, model=overlap, query_column="qurey", resume=False, **SMALL)
    assert contents(out) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(lists, out, resume) -> None:
    mine = {"part-000000.parquet", "login.attempts", "deep/.draft.tmp", "_shards/1.attempts"}
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(BulkError, match="holds '_shards' and no manifest"):
        rank_dataset(lists, out, model=overlap, resume=resume, **SMALL)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == mine


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_what_killed_workers_left_is_cleaned_up_and_nothing_else(lists, out) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    draft = f"{'0a' * 16}.tmp"
    left = [
        f".part-000000.jsonl.{draft}",
        f"._manifest.json.{draft}",
        f"_shards/.000000.json.{draft}",
        "_shards/000000.attempts",
        f"_bad_rows/.part-000000.jsonl.{draft}",
    ]
    mine = ["login.attempts", ".draft.tmp", f".notes.{draft}", f"deep/.part-000000.jsonl.{draft}"]
    (out / "deep").mkdir()
    for name in left + mine:
        (out / name).write_text("x")
    rank_dataset(lists, out, model=overlap, **SMALL)
    assert [name for name in left + mine if (out / name).exists()] == mine


@pytest.mark.parametrize("suffix", [".jsonl"])
@pytest.mark.parametrize("fails", ["mkdir", "replace"])
def test_a_run_that_ended_as_it_began_begins_again(lists, out, monkeypatch, fails) -> None:
    real = getattr(Path, fails)

    def full(self: Path, *args: object, **options: object) -> object:
        if self.name.startswith(("._manifest.json", "_shards")):
            raise OSError(28, "No space left on device")
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        with pytest.raises(OSError, match="No space left"):
            rank_dataset(lists, out, model=overlap, **SMALL)
    # Where the process was killed, a draft is left too.
    (out / f"._manifest.json.{'0a' * 16}.tmp").write_text("{")
    assert rank_dataset(lists, out, model=overlap, **SMALL).ranked_rows == 10


def test_a_manifest_that_cannot_be_read_is_refused(lists, out) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    (out / "_manifest.json").write_text("{}")
    with pytest.raises(BulkError, match="not a manifest that this version"):
        rank_dataset(lists, out, model=overlap, **SMALL)


def test_a_part_that_nobody_wrote_is_found_out(lists, out, suffix) -> None:
    rank_dataset(lists, out, model=overlap, **SMALL)
    for name in (f"part-999999{suffix}", "_bad_rows/part-000000.jsonl"):
        (out / name).write_text("x")
        with pytest.raises(BulkError, match=f"holds '{name}'"):
            rank_dataset(lists, out, model=overlap, **SMALL)
        (out / name).unlink()


def test_a_second_run_is_kept_out_while_the_first_is_under_way(lists, out) -> None:
    refused = []

    def again(done: int, total: int) -> None:
        with pytest.raises(BulkError) as caught:
            rank_dataset(lists, out, model=overlap, resume=False, **SMALL)
        refused.append(str(caught.value))

    rank_dataset(lists, out, model=overlap, progress=again, **SMALL)
    assert len(refused) == 5
    assert f"another run writes to {str(out)!r} (process {os.getpid()} on " in refused[0]
    assert not list(out.glob("_running*"))


def test_a_worker_whose_run_is_over_writes_nothing_more(lists, out) -> None:
    @dataclass(frozen=True)
    class Late(OverlapScorer):
        """Another run takes the folder while this one scores."""

        def score(self, request: RerankRequest) -> Scores:
            manifest = out / "_manifest.json"
            manifest.write_text(manifest.read_text().replace('"top_k": null', '"top_k": 3'))
            return super().score(request)

    with pytest.raises(BulkError, match="another run has taken"):
        rank_dataset(lists, out, model=lambda: Reranker(Late()), **SMALL)
    assert not list(out.glob("part-*"))
    assert not list(out.glob(".*.tmp"))


def test_a_shard_that_keeps_ending_its_process_is_given_up(lists, out) -> None:
    def earlier_attempts(done: int, total: int) -> None:
        (out / "_shards" / "000001.attempts").write_bytes(b"....")

    with pytest.raises(BulkError, match=r"rows 3 to 4 of .* ended their worker's process 4 times"):
        rank_dataset(lists, out, model=overlap, progress=earlier_attempts, **SMALL)
    assert rank_dataset(lists, out, model=overlap, **SMALL).resumed_shards == 1


def test_a_running_event_loop_is_no_obstacle(lists, out) -> None:
    async def notebook():
        return rank_dataset(lists, out, model=overlap, **SMALL)

    assert asyncio.run(notebook()).ranked_rows == 10


# Where the input is, and what it must have


def test_a_folder_a_pattern_and_a_file_are_inputs(tmp_path, suffix) -> None:
    source = tmp_path / "in"
    for name in ("b", "a", "deep/c", "_hidden", ".hidden", "_run/part"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write(source / f"{name}{suffix}", [{**GOOD, "id": name}])
    found = {}
    for name, where in (("folder", source), ("pattern", f"{source}/*{suffix}")):
        rank_dataset(where, tmp_path / name, model=overlap, concurrency=0)
        found[name] = [row["id"] for row in read(tmp_path / name)]
    assert found["folder"] == ["a", "b", "deep/c"]
    assert found["pattern"] == ["_hidden", "a", "b"]


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ([], "nothing", "is no file, folder or pattern that any file matches"),
        ([], "*.parquet", "is no file, folder or pattern"),
        (["a.parquet", "b.jsonl"], ".", "several formats"),
        (["a.csv"], "a.csv", "names that end in .parquet or .jsonl"),
        (["a.jsonl.gz"], "a.jsonl.gz", "no compression around them"),
        (["a.parquet"], "a.parquet", "is not a Parquet file"),
    ],
)
def test_other_inputs_are_refused(tmp_path, out, files, source, said) -> None:
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    with pytest.raises(InputError) as caught:
        rank_dataset(tmp_path / "in" / source, out, model=overlap, concurrency=0)
    assert said in str(caught.value)
    assert not out.exists() or not list(out.glob("part-*"))


ODD_PATHS = {
    "": "is ''; pass a path",
    " ": "is ' '; pass a path",
    "a\0b": "holds a NUL",
    "\ud800": "holds a NUL or half of a character",
    "a" * 5000: "cannot be used: File name too long; check",
    "a/" * 5000: "cannot be used: File name too long; check",
    **dict.fromkeys((None, 3, True, b"in", ("in",)), "must be a str or a Path, got"),
}


@pytest.mark.parametrize("path", ODD_PATHS, ids=lambda path: repr(path)[:12])
def test_a_path_that_can_be_none_is_refused_by_argument(path, lists, out) -> None:
    with pytest.raises(InputError, match="^`source` .*" + re.escape(ODD_PATHS[path])):
        rank_dataset(path, out, model=overlap, concurrency=0)
    with pytest.raises(InputError, match="^`destination` .*" + re.escape(ODD_PATHS[path])):
        rank_dataset(lists, path, model=overlap, concurrency=0)
    assert not out.exists()


@pytest.mark.parametrize("place", ["file", "file/out", "circle", "circle/out"])
def test_a_destination_where_no_folder_can_be_is_refused(place, lists, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match=r"^`destination` .*(is a file; pass a folder|check each)"):
        rank_dataset(lists, tmp_path / place, model=overlap, concurrency=0)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["_lock", "_running.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_and_left(name, lists, out) -> None:
    (out / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"^`destination` .* Is a directory; check"):
        rank_dataset(lists, out, model=overlap, concurrency=0)
    assert (out / name).is_dir()
    (out / name).rmdir()
    assert rank_dataset(lists, out, model=overlap, concurrency=0).rows == 10


def test_a_file_whose_name_is_no_text_is_refused(tmp_path, out) -> None:
    file = tmp_path / os.fsdecode(b"in\xff.jsonl")
    try:
        write(file, [GOOD])
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InputError, match=r"^`source` has a file whose name is not UTF-8.*rename"):
        rank_dataset(file, out, model=overlap, concurrency=0)


def test_object_storage_is_refused_with_a_way_out(lists, out) -> None:
    with pytest.raises(InputError, match=r"`source` must be a path.*mount it"):
        rank_dataset("s3://bucket/in.parquet", out)
    with pytest.raises(InputError, match=r"`destination` must be a path.*mount it"):
        rank_dataset(lists, "gs://bucket/out")


def test_output_does_not_become_input(tmp_path, suffix) -> None:
    source = tmp_path / "in"
    source.mkdir()
    file = write(source / f"a{suffix}", [GOOD])
    for where, folder in ((source, source), (source, source / "out"), (file, source)):
        with pytest.raises(InputError, match="overlap"):
            rank_dataset(where, folder, model=overlap, concurrency=0)
    with pytest.raises(InputError, match="is a file; pass a folder"):
        rank_dataset(source, file, model=overlap, concurrency=0)
    assert rank_dataset(file, source / "out", model=overlap, concurrency=0).rows == 1


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        ("**/*", True),
        ("[io]*/*.jsonl", True),
        ("**/*.jsonl", True),
        ("*/*.jsonl", True),
        ("*/_bad*/*.jsonl", True),
        ("*.jsonl", False),
        ("i*/**/*.jsonl", False),
        ("**/a*.jsonl", False),
        ("**/deep/*.jsonl", False),
    ],
)
def test_a_pattern_that_would_match_output_is_refused_at_once(
    tmp_path, monkeypatch, pattern, refused
) -> None:
    for name in ("a", "in/a", "in/deep/a", "in/_bad/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    for where in (pattern, str(tmp_path / pattern)):
        if refused:
            with pytest.raises(InputError, match="overlap"):
                rank_dataset(where, "out", model=overlap, concurrency=0)
            assert not Path("out").exists()
        else:
            rows = rank_dataset(where, "out", model=overlap, concurrency=0).rows
            assert rank_dataset(where, "out", model=overlap, concurrency=0).rows == rows
            shutil.rmtree("out")


@pytest.mark.parametrize(
    "options",
    [
        {"query_column": "x"},
        {"documents_column": "x"},
        {"instruction_column": "x"},
        {"id_column": "x"},
        {"keep_columns": ["x"]},
        {"form": "pairs", "documents_column": "query", "attributes": ["x"]},
    ],
)
def test_a_column_that_is_not_there_is_named_before_anything_runs(lists, out, options) -> None:
    argument = next(name for name, value in options.items() if value in ("x", ["x"]))
    with pytest.raises(
        InputError, match=f"`{argument}` names 'x', and .*'query', 'documents', 'n'"
    ):
        rank_dataset(lists, out, model=overlap, concurrency=0, **options)


def test_a_new_column_does_not_replace_an_old_one(tmp_path, out, suffix) -> None:
    source = write(tmp_path / f"in{suffix}", [{**GOOD, "model": "T"}])
    with pytest.raises(InputError, match=r"has a column 'model', which is also.*`prefix`"):
        rank_dataset(source, out, model=overlap, concurrency=0)
    options = {"keep_columns": ["query"], "concurrency": 0}
    rank_dataset(source, out, model=overlap, **options)
    assert read(out)[0]["model"] == "overlap"


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"query": [1], "documents": [["a"]]}, {}, "`query_column` 'query' of .* type int64"),
        ({"query": ["a"], "documents": ["a"]}, {}, "of type string; expected lists"),
        ({"query": ["a"], "documents": [[1]]}, {}, "expected lists of strings"),
        ({"query": ["a"], "documents": [[{"body": "a"}]]}, {}, "structs with a 'text'"),
        ({"query": ["a"], "document": [["a"]]}, {"form": "pairs"}, "expected strings"),
        (
            {"query": ["a"], "documents": [["a"]], "i": [1]},
            {"instruction_column": "i"},
            "`instruction_column` 'i' of",
        ),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path, out, columns, options, said) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=said):
        rank_dataset(tmp_path / "in.parquet", out, model=overlap, concurrency=0, **options)


def test_columns_of_one_name_are_refused(tmp_path, out) -> None:
    table = pa.table([["a"], ["b"], [["c"]]], names=["query", "query", "documents"])
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(InputError, match="several columns named 'query'"):
        rank_dataset(tmp_path / "in.parquet", out, model=overlap, concurrency=0)


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": value} for value in (0, -1, True, 2.0, "3")),
        *({"batch_size": value} for value in (0, True, 1.5, 10**30, 10**5000)),
        *({"rows_per_shard": value} for value in (0, -3, 10**30)),
        {"top_k": 10**30},
        *({"model": value} for value in ("", " ", "a" * 5000, 3, "\ud800")),
        *({name: "\ud800"} for name in ("instruction", "prefix")),
        {"progress": 3},
        *({"concurrency": value} for value in (-1, (0, 2), (3, 2), (1, 2, 3), True, 1.5)),
        {"form": "triples"},
        {"on_bad_row": "ignore"},
        {"long_documents": "split"},
        {"on_unsupported": "guess"},
        {"dtype": "int8"},
        {"attributes": "date"},
        {"keep_columns": "query"},
        {"query_column": None},
        {"instruction": 7},
        {"device": "cpu"},
        {"revision": "main"},
        *({"num_gpus": value} for value in (-1, 1, True, "1", math.nan)),
        {"num_cpus": 2},
    ],
)
def test_arguments_that_are_not_usable_are_refused_by_name(lists, out, options) -> None:
    [argument] = options
    with pytest.raises(InputError, match=f"`{argument}"):
        rank_dataset(lists, out, **{"model": overlap, "concurrency": 0, **options})
    assert not list(out.glob("part-*"))


def test_a_worker_that_this_machine_has_no_room_for_is_refused() -> None:
    _check_room({"CPU": 2.0}, num_cpus=2.0, num_gpus=0)
    with pytest.raises(InputError, match=r"`num_gpus` is 0.5 .* Ray finds 0 .* RAY_ADDRESS"):
        _check_room({"CPU": 2.0}, num_cpus=1.0, num_gpus=0.5)
    with pytest.raises(InputError, match=r"`num_cpus` is 4 .* Ray finds 2"):
        _check_room({"CPU": 2.0, "GPU": 8.0}, num_cpus=4, num_gpus=1)


def test_options_that_would_have_no_effect_are_refused(lists, out) -> None:
    with pytest.raises(InputError, match="`top_k` is for lists"):
        rank_dataset(lists, out, form="pairs", documents_column="query", top_k=1)
    with pytest.raises(InputError, match="`dtype` has no effect on a server"):
        rank_dataset(lists, out, model="http://127.0.0.1:9", dtype="float32")
    with pytest.raises(InputError, match="`device='cuda'` needs `num_gpus`"):
        rank_dataset(lists, out, device="cuda")


# The command line


@pytest.fixture
def command(tiny_model_folder):
    def run(*arguments):
        words = ["rank-dataset", *map(str, arguments), "--model", str(tiny_model_folder)]
        words += ["--concurrency", "0", "--dtype", "float32"]
        return CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)

    return run


def test_the_command_ranks_and_says_what_it_did(lists, out, command) -> None:
    result = command(lists, out, "-k", 2, "--rows-per-shard", 4, "-i", "prefer marine")
    assert result.exit_code == 0, result.output
    assert "tiny: 10 of 10 rows ranked, 40 documents, 3 shards, " in result.stdout
    assert "Bad rows" not in result.output
    assert {len(row["ranking"]) for row in read(out)} == {2}
    again = command(lists, out, "-k", 2, "--rows-per-shard", 4, "-i", "prefer marine", "--json")
    assert json.loads(again.stdout)["resumed_shards"] == 3
    restarted = command(lists, out, "-k", 3, "--restart")
    assert restarted.exit_code == 0
    assert {len(row["ranking"]) for row in read(out)} == {3}


def test_the_command_takes_pairs_and_names_bad_rows(tmp_path, out, command) -> None:
    rows = [
        {"q": "red", "d": "a fish", "rule": "prefer marine", "date": "2025-01-01"},
        {"q": None, "d": "a fish", "rule": None, "date": None},
    ]
    columns = ["--query-column", "q", "--documents-column", "d", "--instruction-column", "rule"]
    more = ["-a", "date", "--today", "2026-01-01", "--keep-column", "date", "--id-column", "date"]
    source = write(tmp_path / "in.jsonl", rows)
    result = command(source, out, "--form", "pairs", *columns, *more)
    assert "1 of 2 rows ranked" in result.stdout
    assert f"Bad rows: 1, in {out / '_bad_rows'}" in result.stderr
    assert list(read(out)[0])[:2] == ["date", "score"]


def test_the_command_refuses_a_number_of_workers_that_is_none(lists, out) -> None:
    for words in ("many", "2-", "-"):
        with pytest.raises(InputError, match="`--concurrency`"):
            CliRunner().invoke(
                app,
                ["rank-dataset", str(lists), str(out), "--concurrency", words],
                catch_exceptions=False,
            )


# Workers


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with room for two workers."""
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        yield ray
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A busy machine is no reason to kill workers, nor to let them wait.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        yield ray
        ray.shutdown()


def test_a_worker_that_is_killed_changes_nothing(tmp_path, out, cluster) -> None:
    marker = tmp_path / "killed"

    def mortal(killed: str | None = None) -> Reranker:
        # In here, so that it travels to the workers as code.
        @dataclass(frozen=True)
        class Mortal(OverlapScorer):
            def score(self, request: RerankRequest) -> Scores:
                if killed and "7" in request.query and not Path(killed).exists():
                    Path(killed).touch()
                    os.kill(os.getpid(), 9)
                return super().score(request)

        return Reranker(Mortal())

    rows = [
        {"query": f"fish {n}", "documents": [*FISH, None] if n == 3 else FISH} for n in range(9)
    ]
    source = write(tmp_path / "in.parquet", rows)
    rank_dataset(source, tmp_path / "undisturbed", model=mortal, **SMALL)
    report = rank_dataset(
        source, out, model=lambda: mortal(str(marker)), concurrency=(1, 2), rows_per_shard=2
    )
    assert marker.exists()
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert (report.rows, report.ranked_rows, report.bad_rows) == (9, 8, 1)


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_a_run_that_is_killed_goes_on(lists, tmp_path, out, cluster, tiny_model_folder) -> None:
    options = {"model": str(tiny_model_folder), "dtype": "float32", "rows_per_shard": 1}
    program = f"""
        import os
        from lanerank.distributed import rank_dataset

        def kill(done, total):
            if done >= 2:
                os.kill(os.getpid(), 9)

        rank_dataset({str(lists)!r}, {str(out)!r}, concurrency=1, progress=kill, **{options!r})
    """
    address = cluster.get_runtime_context().gcs_address
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -9, run.stderr
    left = len(list((out / "_shards").glob("*.json")))
    assert 2 <= left < 10
    report = rank_dataset(lists, out, concurrency=1, **options)
    assert report.resumed_shards >= left
    assert report.shards == 10
    rank_dataset(lists, tmp_path / "undisturbed", **{**options, "concurrency": 0})
    assert [p.name for p in sorted(out.iterdir()) if p.name.startswith("part")] == [
        p.name for p in sorted((tmp_path / "undisturbed").iterdir()) if p.name.startswith("part")
    ]
    for got, expected in zip(read(out), read(tmp_path / "undisturbed"), strict=True):
        scores = [result.pop("score") for result in got["ranking"]]
        assert scores == pytest.approx(
            [result.pop("score") for result in expected["ranking"]], abs=1e-6
        )
        assert got == expected


@pytest.mark.parametrize("suffix", [".jsonl"])
def test_an_error_in_a_worker_arrives_as_what_it_was(lists, out, cluster) -> None:
    def deaf() -> Reranker:
        return Reranker(OverlapScorer(supports_instructions=False))

    def broken() -> Reranker:
        raise ZeroDivisionError("no memory")

    with pytest.raises(InstructionNotSupportedError, match="'overlap' has no channel"):
        rank_dataset(lists, out, model=deaf, instruction="prefer red", concurrency=1)
    with pytest.raises(BulkError, match="a worker failed with ZeroDivisionError: no mem") as caught:
        rank_dataset(lists, out, model=broken, resume=False, concurrency=1)
    assert "in broken" in caught.value.__notes__[0]


# What is not installed


def test_without_ray_the_extra_is_named(lists, out, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'"lanerank\[ray\]".*`concurrency=0`'):
        rank_dataset(lists, out, model=overlap)
    assert rank_dataset(lists, out, model=overlap, concurrency=0).rows == 10


@pytest.mark.parametrize("package", ["pyarrow", "filelock"])
def test_without_a_package_the_extra_is_named(package) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; import lanerank.distributed"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "MissingExtraError" in last
    assert f"needs {package}" in last
    assert 'pip install "lanerank[ray]"' in last


def test_importing_loads_neither_ray_nor_torch() -> None:
    program = "import sys, lanerank.distributed; print({'ray', 'torch'} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
