import gzip
import json
import sys
from datetime import date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lanerank.errors import FileFormatError, InputError, MissingExtraError
from lanerank.evaluation.scenarios import LANE_KINDS
from lanerank.training.quadruples import (
    Quadruple,
    group_by_query,
    read_quadruples,
    write_quadruples,
)

ENDINGS = [".jsonl", ".jsonl.gz", ".parquet"]


def row(**changes):
    fields = {"query": "spring tide", "instruction": None, "document": "The moon.", "score": 1}
    return Quadruple.model_validate(fields | changes)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def quadruples(draw):
    instruction = draw(st.none() | texts)
    kinds = ["none"] if instruction is None else [kind for kind in LANE_KINDS if kind != "none"]
    query, document = draw(texts), draw(texts)
    return Quadruple(
        query=query,
        instruction=instruction,
        document=document,
        score=draw(st.floats(0, 1)),
        # One id for one text, which is checked elsewhere.
        query_id=draw(st.none() | st.just(f"q-{query}")),
        document_id=draw(st.none() | st.just(f"d-{document}")),
        metadata=draw(st.dictionaries(texts, json_values, max_size=3)),
        attributes=tuple(draw(st.lists(texts, max_size=2, unique=True))),
        today=draw(st.none() | st.dates()),
        kind=draw(st.none() | st.sampled_from(kinds)),
        weight=draw(st.floats(1e-6, 1e6)),
        source=draw(st.none() | texts),
        uncertainty=draw(st.none() | st.floats(0, 10)),
    )


class TestRoundTrip:
    @pytest.mark.parametrize("ending", ENDINGS)
    @given(rows=st.lists(quadruples(), max_size=3))
    def test_what_is_written_is_read(self, tmp_path_factory, ending, rows):
        path = tmp_path_factory.mktemp("round") / f"rows{ending}"
        write_quadruples(path, iter(rows))
        assert read_quadruples(path) == rows

    @pytest.mark.parametrize("ending", ENDINGS)
    @given(data=st.data())
    def test_hostile_texts_stay_what_they_are(
        self, tmp_path_factory, troublesome_text, ending, data
    ):
        fields = {"query": "tide", "document": "moon", "instruction": "Be brief.", "source": "s"}
        name = data.draw(st.sampled_from(list(fields)))
        text = data.draw(troublesome_text)
        # Neither can be told from nothing: a blank, and half of a character.
        usable = text.strip() and not any("\ud800" <= char <= "\udfff" for char in text)
        if not usable:
            with pytest.raises(ValidationError, match=r"expected some text|lone surrogate"):
                row(**fields | {name: text})
            return
        rows = [row(**fields | {name: text}, metadata={text: [text]}, attributes=[text])]
        path = tmp_path_factory.mktemp("hostile") / f"rows{ending}"
        write_quadruples(path, rows)
        assert read_quadruples(path) == rows

    def test_what_is_default_is_not_written(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        write_quadruples(
            path, [row(), row(weight=1, metadata={}, document="é", today="2025-01-31")]
        )
        assert path.read_text("utf-8").splitlines() == [
            '{"query": "spring tide", "instruction": null, "document": "The moon.", "score": 1.0}',
            '{"query": "spring tide", "instruction": null, "document": "é", "score": 1.0, '
            '"today": "2025-01-31"}',
        ]

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_equal_rows_give_equal_bytes(self, tmp_path, ending):
        paths = [tmp_path / f"{name}{ending}" for name in "ab"]
        for path in paths:
            write_quadruples(path, [row(), row(document="The sea.")])
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_parquet_has_a_type_for_every_column(self, tmp_path):
        path = tmp_path / "rows.parquet"
        write_quadruples(path, [row(metadata={"a": 1}, attributes=["a"], today="2025-01-31")])
        table = pq.read_table(path)
        assert table.schema.names == list(Quadruple.model_fields)
        assert table.schema.field("score").type == pa.float64()
        [cells] = table.to_pylist()
        assert (cells["metadata"], cells["attributes"]) == ('{"a": 1}', ["a"])
        assert (cells["today"], cells["weight"]) == (date(2025, 1, 31), None)


class TestWriting:
    @pytest.mark.parametrize("name", ["rows", "rows.json", "rows.gz", "rows.csv", "rows.jsonl.zst"])
    def test_an_ending_that_is_no_format(self, tmp_path, name):
        with pytest.raises(InputError, match=r"`path` must end in \.jsonl, \.jsonl\.gz or"):
            write_quadruples(tmp_path / name, [row()])

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match=r"rows\.jsonl' cannot be written: No such file"):
            write_quadruples(tmp_path / "absent" / "rows.jsonl", [row()])

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_a_failure_leaves_the_old_file_and_no_other(self, tmp_path, ending):
        path = tmp_path / f"rows{ending}"
        write_quadruples(path, [row()])

        def broken():
            yield row()
            raise RuntimeError("the judge stopped")

        with pytest.raises(RuntimeError, match="the judge stopped"):
            write_quadruples(path, broken())
        assert read_quadruples(path) == [row()]
        assert list(tmp_path.iterdir()) == [path]

    def test_ids_that_could_not_be_read_again(self, tmp_path):
        rows = [row(query_id="q"), row(query="neap tide", query_id="q")]
        with pytest.raises(InputError, match=r"`rows\[1\]`: 'q' is another query in `rows\[0\]`"):
            write_quadruples(tmp_path / "rows.jsonl", rows)


LINE = {"query": "tide", "instruction": "Be brief.", "document": "The moon.", "score": 0.5}

INVALID = {
    "not JSON": ("{'query': 1}", "not valid JSON"),
    "not an object": ("[1]", "expected a JSON object"),
    "a key twice": ('{"query": "a", "query": "b"}', "key used more than once"),
    "NaN": ('{"score": NaN}', "NaN is not a JSON value"),
    "no instruction": ({k: v for k, v in LINE.items() if k != "instruction"}, "`instruction`: Fi"),
    "no document": ({**LINE, "document": None}, "`document`: Input should be a valid string"),
    "blank query": ({**LINE, "query": " \n"}, "`query`: expected some text"),
    "half a character": ({**LINE, "query": "\ud800"}, "`query`: a lone surrogate cannot"),
    "blank instruction": ({**LINE, "instruction": ""}, "`instruction`: expected some text"),
    "score too high": ({**LINE, "score": 1.01}, "`score`: Input should be less than or equal to 1"),
    "score negative": ({**LINE, "score": -0.1}, "`score`: Input should be greater than or equal"),
    "score a text": ({**LINE, "score": "1"}, "`score`: Input should be a valid number, got '1'"),
    "score a flag": ({**LINE, "score": True}, "`score`: Input should be a valid number, got True"),
    "score null": ({**LINE, "score": None}, "`score`: Input should be a valid number, got None"),
    "misspelt": ({**LINE, "instructions": "x"}, "`instructions`: unknown field; the fields here"),
    "metadata a list": ({**LINE, "metadata": []}, "`metadata`: Input should be a valid dictionary"),
    "metadata infinite": (
        json.dumps(LINE | {"metadata": {"a": 0}}).replace("0}}", "1e999}}"),
        "`metadata`: this cannot be stored as JSON",
    ),
    "metadata half a character": ({**LINE, "metadata": {"a": ["\udfff"]}}, "`metadata`: a lone su"),
    "attributes a text": ({**LINE, "attributes": "date"}, "`attributes`: Input should be"),
    "attributes twice": (
        {**LINE, "attributes": ["a", "a"]},
        "`attributes`: a field is named twice",
    ),
    "today": ({**LINE, "today": "31.1.2025"}, "`today`: expected a date written YYYY-MM-DD"),
    "kind": ({**LINE, "kind": "persona"}, "`kind`: Input should be"),
    "kind none": ({**LINE, "kind": "none"}, "kind 'none' takes no instruction"),
    "kind without": ({**LINE, "instruction": None, "kind": "recency"}, "kind 'recency' needs an"),
    "weight": (
        {**LINE, "weight": 0},
        "`weight`: Input should be greater than or equal to 0.000001",
    ),
    "weight beyond float32": (
        {**LINE, "weight": 1e39},
        "`weight`: Input should be less than or equal to 1000000, got 1e+39",
    ),
    "weight that float32 rounds to 0": ({**LINE, "weight": 1e-50}, "`weight`: Input should be"),
    "weight infinite": (
        json.dumps(LINE)[:-1] + ', "weight": 1e999}',
        "`weight`: Input should be a",
    ),
    "uncertainty": ({**LINE, "uncertainty": -1}, "`uncertainty`: Input should be greater than"),
    "too deep": ("[" * 200_000, "not usable JSON"),
}


class TestReading:
    @pytest.mark.parametrize(("line", "problem"), INVALID.values(), ids=INVALID.keys())
    @pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
    def test_names_file_line_and_problem(self, tmp_path, ending, line, problem):
        path = tmp_path / f"rows{ending}"
        lines = [json.dumps(LINE), "", line if isinstance(line, str) else json.dumps(line)]
        raw = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
        with pytest.raises(FileFormatError) as caught:
            read_quadruples(path)
        assert str(caught.value).startswith(f"{path}:3: ")
        assert problem in str(caught.value)
        assert (caught.value.path, caught.value.line) == (str(path), 3)

    def test_names_every_field_that_is_wrong(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({**LINE, "query": "", "score": 2}))
        with pytest.raises(FileFormatError, match=r"`query`: .*; `score`: "):
            read_quadruples(path)

    def test_notes_and_nulls_say_nothing(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        optional = [name for name in Quadruple.model_fields if name not in LINE]
        path.write_text(json.dumps({**dict.fromkeys(optional), **LINE, "judge": "anna"}))
        assert read_quadruples(path) == [Quadruple(**LINE)]

    def test_several_files_are_one_set(self, tmp_path):
        paths = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
        write_quadruples(paths[0], [row(), row(document="The sea.")])
        write_quadruples(paths[1], [row(query="neap tide")])
        assert read_quadruples(map(str, paths)) == [
            *read_quadruples(paths[0]),
            row(query="neap tide"),
        ]
        assert read_quadruples([]) == []

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"query": "neap tide"}, "'q' is another query in {path}:1; give each its own"),
            ({"document": "Ebb."}, "document 'd' of query 'q' is another text in {path}:1"),
        ],
    )
    def test_one_id_for_two_texts(self, tmp_path, changes, problem):
        path = tmp_path / "rows.jsonl"
        first = {**LINE, "query_id": "q", "document_id": "d"}
        path.write_text(f"{json.dumps(first)}\n\n{json.dumps({**first, **changes})}\n")
        with pytest.raises(FileFormatError) as caught:
            read_quadruples(path)
        assert problem.format(path=path) in str(caught.value)
        assert caught.value.line == 3

    def test_ids_of_documents_belong_to_a_query(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [row(document_id="d"), row(query="neap tide", document="Ebb.", document_id="d")]
        write_quadruples(path, rows)
        assert read_quadruples(path) == rows

    @pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.parquet"])
    def test_files_that_cannot_be_read(self, tmp_path, name):
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            read_quadruples(tmp_path / name)
        (tmp_path / name).write_bytes(b"\0\xff")
        with pytest.raises(InputError, match=name):
            read_quadruples(tmp_path / name)


class TestParquetOfOthers:
    def write(self, path, **columns):
        columns = {name: [value] * 2 for name, value in LINE.items()} | columns
        pq.write_table(pa.table(columns), path)
        return path

    def test_metadata_is_a_struct_a_map_or_json(self, tmp_path):
        struct = pa.array([{"a": 1, "b": None}, {"a": None, "b": "x"}])
        pairs = pa.array([[("a", 1), ("b", None)], []], pa.map_(pa.string(), pa.int64()))
        for metadata, first, second in [
            (struct, {"a": 1}, {"b": "x"}),
            (pairs, {"a": 1, "b": None}, {}),
            (['{"a": [1, null]}', None], {"a": [1, None]}, {}),
        ]:
            rows = read_quadruples(self.write(tmp_path / "rows.parquet", metadata=metadata))
            assert [row.metadata for row in rows] == [first, second]

    def test_other_types_for_the_same_values(self, tmp_path):
        query = pa.array(["tide", "tide"]).dictionary_encode()
        document = pa.array(["The moon."] * 2, pa.large_string())
        score = pa.array([1, 0], pa.int32())
        rows = read_quadruples(
            self.write(tmp_path / "rows.parquet", query=query, document=document, score=score)
        )
        assert [(row.query, row.document, row.score) for row in rows] == [
            ("tide", "The moon.", 1.0),
            ("tide", "The moon.", 0.0),
        ]

    @pytest.mark.parametrize(
        ("columns", "problem"),
        [
            ({"score": [0.5, 1.5]}, ":2: `score`: Input should be less than or equal to 1"),
            ({"score": [0.5, None]}, ":2: `score`: Input should be a valid number"),
            ({"document": ["Tide.", None]}, ":2: `document`: Input should be a valid string"),
            ({"documents": ["a", "b"]}, ":1: `documents`: unknown field"),
            ({"metadata": ["{}", "{"]}, ":2: not valid JSON"),
            ({"kind": ["recency", "new"]}, ":2: `kind`: Input should be"),
            ({"today": [datetime(2025, 1, 1)] * 2}, ":1: `today`: expected a date"),
            ({"document": pa.array([b"Tide.", b"\xff"])}, ":1: `document`: Input"),
            (
                {
                    "metadata": pa.array(
                        [[], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())
                    )
                },
                ":2: `metadata` cannot be read",
            ),
        ],
    )
    def test_names_file_row_and_problem(self, tmp_path, columns, problem):
        path = self.write(tmp_path / "rows.parquet", **columns)
        with pytest.raises(FileFormatError) as caught:
            read_quadruples(path)
        assert f"{path}{problem}" in str(caught.value)

    def test_text_that_is_not_utf8(self, tmp_path):
        offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
        broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
        path = self.write(tmp_path / "rows.parquet", query=broken)
        with pytest.raises(FileFormatError, match=r":2: `query` cannot be read: .*utf-8"):
            read_quadruples(path)

    def test_two_columns_of_one_name(self, tmp_path):
        path = tmp_path / "rows.parquet"
        values = [pa.array(["x"])] * 3
        pq.write_table(pa.Table.from_arrays(values, ["query", "query", "document"]), path)
        with pytest.raises(InputError, match="two columns of one name"):
            read_quadruples(path)


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (lambda path: write_quadruples(path, [row()]), read_quadruples):
        with pytest.raises(MissingExtraError, match=r'pip install "lanerank\[train\]"'):
            use(tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_query_form_a_group():
    rows = [
        row(query_id="q", document="a"),
        row(document="a"),
        row(query_id="q", document="b", document_id="d"),
        row(document="c"),
    ]
    assert group_by_query(rows) == {"q": [rows[0], rows[2]], "spring tide": [rows[1], rows[3]]}
    assert [each.document_key for each in rows] == ["a", "a", "d", "c"]


def test_rows_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        row().score = 0.5
