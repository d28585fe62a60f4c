import gzip
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lanerank import Document, Instruction
from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.cases import Case, read_cases


def case(**changes: Any) -> dict[str, Any]:
    return {
        "id": "tides",
        "query": "spring tide",
        "instruction": "I mend gauges.",
        "documents": [
            {"id": "d1", "text": "The highest tides follow the new and the full moon."},
            {"text": "A spring drives the tide gauge.", "metadata": {"date": "2025-03-01"}},
        ],
    } | changes


def scenario(**changes: Any) -> dict[str, Any]:
    return {
        "id": "s",
        "domain": "oceanography",
        "query": "spring tide",
        "today": "2025-06-30",
        "documents": [
            {"id": "d1", "text": "Moon.", "metadata": {"date": "2025-03-01"}},
            {"id": "d2", "text": "Gauge.", "metadata": {"type": "manual"}},
        ],
        "lanes": [
            {"kind": kind, "instruction": instruction, "grades": {"d1": 3, "d2": 1}}
            for kind, instruction in (
                ("none", None),
                ("recency", "Prefer new ones."),
                ("recency", "Prefer old ones."),
            )
        ],
    } | changes


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_lines(*lines: object, name: str = "cases.jsonl") -> Path:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write_lines


def test_reads_every_field(write):
    [read] = read_cases(write(case(attributes=["date"], today="2025-06-30")))
    assert (read.id, read.query, read.attributes) == ("tides", "spring tide", ("date",))
    assert read.instruction == Instruction("I mend gauges.")
    assert read.today == date(2025, 6, 30)
    assert [doc.id for doc in read.documents] == ["d1", None]
    assert read.documents[1].metadata == {"date": "2025-03-01"}
    assert read.dated_instruction == Instruction("I mend gauges.", today=date(2025, 6, 30))


@pytest.mark.parametrize(
    ("written", "instruction"),
    [
        (None, Instruction()),
        (" ", Instruction()),
        ("Be brief.", Instruction("Be brief.")),
        (
            {"rules": ["Prefer trials."], "glossary": {"MI": "heart attack"}},
            Instruction(rules=["Prefer trials."], glossary={"MI": "heart attack"}),
        ),
        ({"text": "a", "layers": [{"text": "b"}]}, Instruction("a") + "b"),
    ],
)
def test_an_instruction_is_text_fields_or_nothing(write, written, instruction):
    [read] = read_cases(write(case(instruction=written)))
    assert read.instruction == read.dated_instruction == instruction


def test_a_case_needs_no_instruction(write):
    line = case()
    del line["instruction"]
    [read] = read_cases(write(line))
    assert not read.instruction


def test_the_date_goes_into_the_first_layer():
    instruction = Instruction(recency="New ones.") + Instruction("b")
    dated = Case(**case(instruction=instruction, today="2025-06-30")).dated_instruction
    assert dated.effective_today() == date(2025, 6, 30)
    assert dated.render() == "New ones. b. Today is 2025-06-30."


@pytest.mark.parametrize(
    "pinned",
    [
        {"today": "2025-06-30"},
        {"instruction": {"recency": "New ones.", "today": "2025-06-30"}},
        {"instruction": {"recency": "New ones.", "today": "2025-06-30"}, "today": "2025-06-30"},
    ],
)
def test_a_recency_part_has_its_date(write, pinned):
    [read] = read_cases(write(case(**{"instruction": {"recency": "New ones."}} | pinned)))
    assert read.dated_instruction.effective_today() == date(2025, 6, 30)


def test_in_python_documents_are_texts_or_documents_too():
    given = ["a", Document("b", id="x", metadata={"type": "manual"}), {"text": "c"}]
    built = Case(id="a", query="q", documents=given)
    assert [(doc.text, doc.id) for doc in built.documents] == [("a", None), ("b", "x"), ("c", None)]
    assert built.documents[1].metadata == {"type": "manual"}


def test_cases_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Case(**case()).query = "neap tide"


def test_lanes_of_scenarios_are_cases(write):
    read = read_cases(write(scenario()))
    assert [each.id for each in read] == ["s/none", "s/recency", "s/recency-2"]
    assert [each.dated_instruction for each in read] == [
        Instruction(),
        Instruction("Prefer new ones.", today=date(2025, 6, 30)),
        Instruction("Prefer old ones.", today=date(2025, 6, 30)),
    ]
    assert {each.attributes for each in read} == {("date", "type")}
    assert [doc.id for doc in read[2].documents] == ["d1", "d2"]


def test_cases_and_scenarios_mix_over_files(write):
    first = write(case(), scenario(), name="a.jsonl")
    second = first.with_name("b.jsonl.gz")
    second.write_bytes(gzip.compress(json.dumps(case(id="more")).encode()))
    ids = [each.id for each in read_cases([first, str(second)])]
    assert ids == ["tides", "s/none", "s/recency", "s/recency-2", "more"]
    assert [each.id for each in read_cases(str(second))] == ["more"]


def test_notes_beside_the_fields_are_not_read(write):
    noted = case(why="by hand", documents=[{"text": "a", "url": "b"}])
    assert read_cases(write(noted)) == [Case(**case(documents=["a"]))]


def test_texts_may_be_empty_or_odd(write):
    [read] = read_cases(write(case(documents=["", "\ud800", "\u202e\0"])))
    assert [doc.text for doc in read.documents] == ["", "\ud800", "\u202e\0"]


INVALID = {
    "not JSON": ("{'id': 1}", "not valid JSON: Expecting property name"),
    "not an object": ("[1]", "expected a JSON object, got [1]"),
    "repeated key": ('{"id": "a", "id": "b"}', "key used more than once"),
    "missing": ({"id": "a"}, "case 'a': `query`: Field required; `documents`: Field required"),
    "misspelt": (
        case(instructions="a"),
        "`instructions`: unknown field; the fields here are id, q",
    ),
    "misspelt in a document": (
        case(documents=[{"txt": "a"}]),
        "`documents[0].txt`: unknown field; the fields here are text, id, metadata",
    ),
    "misspelt part": (case(instruction={"rule": "a"}), "`instruction`: the instruction is not us"),
    "instruction of another type": (case(instruction=7), "`instruction`: Input should be"),
    "blank query": (case(query=" "), "`query`: expected some text"),
    "one attribute": (case(attributes="date"), "`attributes`: Input should be a valid tuple"),
    "no documents": (case(documents=[]), "`documents`: Tuple should have at least 1 item"),
    "document of another type": (case(documents=[7]), "`documents[0]`: Input should be"),
    "repeated document": (
        case(documents=[{"id": "a", "text": "b"}, {"id": "a", "text": "c"}]),
        "`documents`: id used more than once: 'a'",
    ),
    "number as id": (case(id=7), "`id`: Input should be a valid string, got 7"),
    "surrogate as id": (case(id="\ud800"), "`id`: a lone surrogate has no place in an id"),
    "surrogate as id of a scenario": (scenario(id="\ud800"), "`id`: a lone surrogate has no place"),
    "no date": (
        case(instruction={"recency": "New ones."}),
        "case 'tides': `today` is missing: the instruction has a recency part",
    ),
    "no date in a layer": (
        case(instruction={"text": "a", "layers": [{"recency": "New ones."}]}),
        f'add "today": "{date.today()}"',
    ),
    "two dates": (
        case(instruction={"text": "a", "today": "2025-01-01"}, today="2025-06-30"),
        "`today` is 2025-06-30, and in the instruction 2025-01-01; keep one",
    ),
    "no day": (case(today="2025-02-30"), "`today`: day is out of range"),
    "scenario without grades": (scenario(lanes=[{"kind": "none"}]), "`lanes[0].grades`: Field req"),
}


@pytest.mark.parametrize(("line", "problem"), INVALID.values(), ids=INVALID)
def test_an_invalid_line_is_refused_with_its_place(write, line, problem):
    path = write("", case(id="first"), line)
    with pytest.raises(FileFormatError) as caught:
        read_cases(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)
    assert (caught.value.path, caught.value.line) == (str(path), 3)


def test_layers_without_end_are_refused(write):
    deep = '{"layers": [' * 300 + "{}" + "]}" * 300
    path = write(json.dumps(case(instruction="X")).replace('"X"', deep))
    with pytest.raises(FileFormatError, match="nested too deeply"):
        read_cases(path)


def test_an_id_used_twice_is_refused(write):
    first, second = write(case(), name="a.jsonl"), write("", case(), name="b.jsonl")
    with pytest.raises(FileFormatError, match=r"b\.jsonl:2: case id 'tides' was already used in"):
        read_cases([first, second])
    clash = write(scenario(), case(id="s/none"))
    with pytest.raises(FileFormatError, match="'s/none' was already used"):
        read_cases(clash)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_cases(tmp_path / "none.jsonl")
